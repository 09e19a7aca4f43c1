"""Kind `rouwei`: the adapter of RouWei-Gemma and RouWei-T5Gemma for SDXL.

The projected text, padded to 512 rows, passes wide blocks, is compressed into 308 rows (four windows of CLIP)
by learned queries with a gate, passes narrow blocks, and is pooled by a learned token. Follows
llm_to_sdxl_adapter.py of NeuroSenko/ComfyUI_LLM_SDXL_Adapter (77c1e6c) in its keys. Published, with context
2048 and pooled 1280: hidden 1152 (Gemma-3-1b, 2 wide and 3 narrow blocks), 2304 (T5Gemma-2b, 3 and 3).

Behind Gemma's chat template the first 27 rows are dropped (`skip`): row i is read at place i - skip, and such
a tower must put its padding behind the text. Otherwise each row keeps its place among the 512, so that the
rows of a tower that pads before the text are the last ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Attention
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

HEADS = 16
GEMMA_HIDDEN = 1152
GEMMA_TEMPLATE_TOKENS = 27


@dataclass(frozen=True, kw_only=True)
class RouweiSpec(BridgeSpec):
    """Sizes: `heads` of every attention, `window` rows read, `queries` rows out, `wide` and `narrow` blocks.

    skip: first rows of the tower that are dropped, because they stand for a template; 0 = none.
    """

    heads: int
    window: int = 512
    queries: int = 308
    wide: int = 2
    narrow: int = 3
    skip: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, heads=1, window=1, queries=1, wide=0, narrow=0, skip=0)
        require_depth(self, "wide", "narrow")
        require_divisible(self, context=self.heads)


class _Block(nn.Module):
    """Pre-norm self-attention and an MLP with GELU."""

    def __init__(
        self, spec: RouweiSpec, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        width = spec.context
        self.norm1 = ops.LayerNorm(width, device=device, dtype=dtype)
        self.attn = Attention(width, spec.heads, ops=ops, device=device, dtype=dtype)
        self.norm2 = ops.LayerNorm(width, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            ops.Linear(width, 4 * width, device=device, dtype=dtype),
            nn.GELU(),
            ops.Linear(4 * width, width, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, W]; mask [B, N] hides rows from the attention."""
        own = self.norm1(x)
        x = x + self.attn(own, own, mask)
        return x + self.mlp(self.norm2(x))


class Rouwei(Bridge, kind="rouwei"):
    """context [B, 308, C] and pooled [B, P] of up to 512 rows of the tower; see the top of this file."""

    Spec = RouweiSpec
    tokenwise = False

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert isinstance(spec, RouweiSpec)
        super().__init__(spec, ops=ops, device=device, dtype=dtype)
        width = spec.context

        def rows(count: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(1, count, width, device=device, dtype=dtype))

        self.seq_projection = ops.Linear(spec.hidden, width, device=device, dtype=dtype)
        self.input_position_embeddings = rows(spec.window)
        self.output_position_embeddings = rows(spec.queries)
        self.wide_attention_blocks = nn.ModuleList(_Block(spec, ops, device, dtype) for _ in range(spec.wide))
        self.compression_queries = rows(spec.queries)
        self.compression_attention = Attention(width, spec.heads, ops=ops, device=device, dtype=dtype)
        self.compression_norm = ops.LayerNorm(width, device=device, dtype=dtype)
        self.compression_gate = nn.Sequential(
            ops.Linear(2 * width, width, device=device, dtype=dtype), nn.Sigmoid()
        )
        self.narrow_attention_blocks = nn.ModuleList(
            _Block(spec, ops, device, dtype) for _ in range(spec.narrow)
        )
        if spec.pooled:
            self.pooling_attention = Attention(width, spec.heads, ops=ops, device=device, dtype=dtype)
            self.pooling_token = rows(1)
            self.pooled_projection = nn.Sequential(
                ops.Linear(width, width, device=device, dtype=dtype),
                ops.LayerNorm(width, device=device, dtype=dtype),
                nn.GELU(),
                nn.Identity(),  # a dropout while the authors trained
                ops.Linear(width, spec.pooled, device=device, dtype=dtype),
            )

    @property
    def lead(self) -> int:
        """The start token and what stands before the prompt in the chat template."""
        assert isinstance(self.spec, RouweiSpec)
        return self.spec.skip

    def start(self, generator: torch.Generator | None) -> None:
        """Start places, queries and the pooling token as the authors do."""
        for _, value in self.named_parameters(recurse=False):
            nn.init.normal_(value, generator=generator)

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Map states [B, T, D], template included, to context [B, 308, C] and pooled [B, P]."""
        self.check(hidden)
        spec = self.spec
        assert isinstance(spec, RouweiSpec)
        rows = slice(spec.skip, spec.skip + spec.window)
        x, mask = self.seq_projection(hidden.states[:, rows]), hidden.mask[:, rows]
        self.require_tokens(mask)
        missing = spec.window - x.shape[1]
        x = nn.functional.pad(x, (0, 0, 0, missing)) + self.input_position_embeddings.to(x)
        mask = nn.functional.pad(mask, (0, missing))
        for block in self.wide_attention_blocks:
            x = block(x, mask)

        queries = self.compression_queries.to(x).expand(len(x), -1, -1)
        heard = self.compression_attention(queries, x, mask)
        gate = self.compression_gate(torch.cat([queries, heard], dim=-1))
        context = self.compression_norm(gate * heard + (1 - gate) * queries)
        context = context + self.output_position_embeddings.to(x)
        for block in self.narrow_attention_blocks:
            context = block(context)
        if not spec.pooled:
            return Cond(context)
        token = self.pooling_token.to(x).expand(len(x), -1, -1)
        return Cond(context, self.pooled_projection(self.pooling_attention(token, context)[:, 0]))

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> RouweiSpec | None:
        """Recognise the published layout by its exact set of keys and shapes (16 heads, as published)."""
        hidden = extent(shapes, "seq_projection.weight", 1)
        blocks = [key for key in shapes if key.endswith(".attn.in_proj_weight")]
        return cls.exact(
            shapes,
            hidden=hidden,
            context=extent(shapes, "seq_projection.weight"),
            pooled=extent(shapes, "pooled_projection.4.weight"),
            heads=HEADS,
            window=extent(shapes, "input_position_embeddings", 1),
            queries=extent(shapes, "compression_queries", 1),
            wide=sum(key.startswith("wide_attention_blocks.") for key in blocks),
            narrow=sum(key.startswith("narrow_attention_blocks.") for key in blocks),
            skip=GEMMA_TEMPLATE_TOKENS if hidden == GEMMA_HIDDEN else 0,
        )
