"""Kind `omni`: the resampler behind a large language model of OmniDiffusion (arXiv 2405.12914, ECCV 2024).

Learned queries read the text through torch's own transformer (4 + 4 layers, 8 heads) and become 227 rows, as
long as three windows of CLIP. Follows text_encoder/mlm_encoder.py of llm-conditioned-diffusion/OmniDiffusion
(ff74b98) in its keys. Published: hidden 4096 (Baichuan2-7B-Chat, last layer), context 2048, pooled 1280.
The authors encode one text at a time and cut it before the end token, so the mask here must be True for the
start token and the text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Transformer
from .base import (
    Bridge,
    BridgeSpec,
    Cond,
    Hidden,
    Ops,
    extent,
    require_depth,
    require_divisible,
    require_sizes,
)


@dataclass(frozen=True, kw_only=True)
class OmniSpec(BridgeSpec):
    """Sizes: `queries` rows out, `layers` in the encoder and as many in the decoder, `heads` of each."""

    queries: int = 227
    layers: int = 4
    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, queries=3, layers=1, heads=1)
        require_depth(self, "layers")
        require_divisible(self, context=self.heads)


class Omni(Bridge, kind="omni"):
    """context = transformer(fc(states), queries); pooled = fc1(mean of the rows but the first and last)."""

    Spec = OmniSpec
    tokenwise = False

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert isinstance(spec, OmniSpec)
        super().__init__(spec, ops=ops, device=device, dtype=dtype)
        width = spec.context
        self.fc = nn.Sequential(
            ops.Linear(spec.hidden, width, device=device, dtype=dtype),
            nn.GELU(),
            ops.Linear(width, width, device=device, dtype=dtype),
        )
        self.t2i_decoder_prompt = nn.Parameter(
            torch.empty(1, spec.queries, width, device=device, dtype=dtype)
        )
        self.llm_to_t2i_mapping = Transformer(
            width, spec.heads, spec.layers, ops=ops, device=device, dtype=dtype
        )
        if spec.pooled:
            self.fc1 = nn.Sequential(
                ops.Linear(width, spec.pooled, device=device, dtype=dtype),
                nn.GELU(),
                ops.Linear(spec.pooled, spec.pooled, device=device, dtype=dtype),
            )

    def start(self, generator: torch.Generator | None) -> None:
        """Start the queries as the authors do."""
        nn.init.normal_(self.t2i_decoder_prompt, generator=generator)

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Map states [B, T, D], padding unread, to context [B, 227, C] and, for SDXL, pooled [B, P]."""
        self.check(hidden)
        self.require_tokens(hidden.mask)
        source = self.fc(hidden.states)
        queries = self.t2i_decoder_prompt.to(source).expand(len(source), -1, -1)
        context = self.llm_to_t2i_mapping(source, queries, hidden.mask)
        return Cond(context, self.fc1(context[:, 1:-1].mean(dim=1)) if self.spec.pooled else None)

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> OmniSpec | None:
        """Recognise the published layout by its exact set of keys and shapes (8 heads, as published)."""
        return cls.exact(
            shapes,
            hidden=extent(shapes, "fc.0.weight", 1),
            context=extent(shapes, "fc.0.weight"),
            pooled=extent(shapes, "fc1.0.weight"),
            queries=extent(shapes, "t2i_decoder_prompt", 1),
            layers=sum(key.endswith(".multihead_attn.in_proj_weight") for key in shapes),
        )
