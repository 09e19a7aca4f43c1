"""Kind `linear`: one matrix from the tower's width to the checkpoint's.

AltDiffusion (arXiv 2211.06679, 2308.09991) is such a bridge behind XLM-R; its published text encoders hold
the tower (`roberta.*`) and up to three heads, of which one makes the conditioning (diffusers'
RobertaSeriesModelWithTransformation):

    m2, m9   context = transformation(states of the last layer)
    m18      context = transformation_pre(pre_LN(states of the last layer but one))

The other heads serve retrieval and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .base import Bridge, BridgeSpec, Cond, Hidden, Ops, Value, extent

PLACES = ("", "text_model.", "text_encoder.", "cond_stage_model.", "cond_stage_model.text_encoder.")
"""Where published files keep an AltDiffusion text encoder; what lies outside is the rest of a checkpoint."""
TOWER = "roberta."


@dataclass(frozen=True, kw_only=True)
class LinearSpec(BridgeSpec):
    """Sizes of the matrix, and of a second one for the pooled vector when `pooled` > 0.

    norm: the states pass a LayerNorm first (AltDiffusion m18).
    """

    norm: bool = False


class Linear(Bridge, kind="linear"):
    """context = W x + b; pooled = V mean(x) + c, the mean over all tokens, padding included.

    x = states, or LayerNorm(states) when the spec says `norm`.
    """

    Spec = LinearSpec
    key_map = MappingProxyType(
        {"transformation_pre.": "context.", "transformation.": "context.", "pre_LN.": "norm."}
    )

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert isinstance(spec, LinearSpec)
        super().__init__(spec, ops=ops, device=device, dtype=dtype)
        if spec.norm:
            self.norm = ops.LayerNorm(spec.hidden, device=device, dtype=dtype)
        self.context = ops.Linear(spec.hidden, spec.context, device=device, dtype=dtype)
        if spec.pooled:
            self.pooled = ops.Linear(spec.hidden, spec.pooled, device=device, dtype=dtype)

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Map states [B, T, D] to context [B, T, C] and, when the spec asks for it, pooled [B, P]."""
        self.check(hidden)
        assert isinstance(self.spec, LinearSpec)
        x = self.norm(hidden.states) if self.spec.norm else hidden.states
        return Cond(self.context(x), self.pooled(x.mean(dim=1)) if self.spec.pooled else None)

    @classmethod
    def part(cls, published: Mapping[str, Value]) -> dict[str, Value]:
        """The head that makes the conditioning, out of the head's tensors alone or of a whole file."""
        place = _place(published)
        if place is None:
            return super().part(published)
        unused = "transformation." if f"{place}transformation_pre.weight" in published else "pre_LN."
        inside = {key[len(place) :]: value for key, value in published.items() if key.startswith(place)}
        return super().part(
            {key: value for key, value in inside.items() if not key.startswith((TOWER, unused))}
        )

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> LinearSpec | None:
        """Recognise AltDiffusion's heads, with or without the tower and the checkpoint around them."""
        place = _place(shapes)
        if place is None:
            return None
        norm = f"{place}transformation_pre.weight" in shapes
        own = cls.part(shapes)
        hidden, context = extent(own, "context.weight", 1), extent(own, "context.weight")
        if f"{place}pre_LN.weight" in shapes and not norm and hidden == context:
            return None  # AltCLIP-m18 without AltDiffusion's head: its square matrix is the retrieval head
        return cls.exact(own, hidden=hidden, context=context, norm=norm)


def _place(published: Mapping[str, object]) -> str | None:
    speaks = ("transformation_pre.weight", "transformation.weight")
    return next((place for place in PLACES if any(place + key in published for key in speaks)), None)
