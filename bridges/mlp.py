"""Kind `mlp`: the token-wise adapter of PEA-Diffusion (arXiv 2311.17086).

x = projector(LayerNorm(states)), `depth` linear layers with erf-GELU between them. With a pooled vector
(SDXL) context = fc(GELU(x)) and pooled = mean(x) over all tokens, before that GELU and padding included;
without one (SD1.x) x itself is the context. Published layouts, in the keys of OPPO-Mente-Lab/PEA-Diffusion:

    layout           bias   depth  keys
    SDXL "P3", "P4"  no     3, 4   layernorm, projector.{0,2,..}.weight, fc
    SDXL "P2" (old)  yes    2      layernorm, fc1, fc2, fc3
    SD1.5            no     3, 5   layernorm, projector.{0,2,..}.weight
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .base import DEEPEST, LARGEST_SIZE, Bridge, BridgeSpec, Cond, Hidden, Ops, require_depth, require_sizes


@dataclass(frozen=True, kw_only=True)
class MlpSpec(BridgeSpec):
    """Sizes: `width` inside, `depth` linear layers in the projector, with `bias` in the old layout only."""

    width: int
    depth: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, width=1, depth=1)
        require_depth(self, "depth")


class Mlp(Bridge, kind="mlp"):
    """LayerNorm, `depth` linear layers with GELU between; SDXL adds GELU and `fc`, and pools by the mean."""

    Spec = MlpSpec
    key_map = MappingProxyType({"fc1.": "projector.0.", "fc2.": "projector.2.", "fc3.": "fc."})

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert isinstance(spec, MlpSpec)
        super().__init__(spec, ops=ops, device=device, dtype=dtype)
        self.layernorm = ops.LayerNorm(spec.hidden, device=device, dtype=dtype)
        widths = [spec.hidden, *[spec.width] * (spec.depth - 1), spec.pooled or spec.context]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers.append(ops.Linear(width_in, width_out, bias=spec.bias, device=device, dtype=dtype))
            layers.append(nn.GELU())
        self.projector = nn.Sequential(*layers[:-1])
        if spec.pooled:
            self.fc = ops.Linear(spec.pooled, spec.context, device=device, dtype=dtype)

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Map states [B, T, D] to context [B, T, C] and, for SDXL, pooled [B, P]."""
        self.check(hidden)
        x = self.projector(self.layernorm(hidden.states))  # [B, T, P or C]
        if not self.spec.pooled:
            return Cond(x)
        return Cond(self.fc(nn.functional.gelu(x)), x.mean(dim=1))

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> MlpSpec | None:
        """Recognise the three published layouts by their exact set of keys and chain of shapes."""
        ours = {cls.own_key(key): shape for key, shape in shapes.items()}
        depth = sum(key.startswith("projector.") and key.endswith(".weight") for key in ours)
        first, last = ours.get("projector.0.weight"), ours.get(f"projector.{2 * depth - 2}.weight")
        head = ours.get("fc.weight", (0, 0))
        if not first or not last or len(ours) != len(shapes) or depth > DEEPEST:
            return None
        if any(len(shape) != 2 or max(shape) > LARGEST_SIZE for shape in (first, last, head)):
            return None
        if min(*first, *last) < 1:
            return None
        spec = MlpSpec(
            hidden=first[1],
            context=head[0] or last[0],
            pooled=last[0] if head[0] else 0,
            width=first[0],
            depth=depth,
            bias="projector.0.bias" in ours,
        )
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in cls(spec).state_dict().items()}
        return spec if expected == ours else None
