"""Kind `identity`: a native tower whose states are already the checkpoint's context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Bridge, BridgeSpec, Cond, Hidden, Ops
from .errors import BridgeError


@dataclass(frozen=True, kw_only=True)
class IdentitySpec(BridgeSpec):
    """Sizes: `hidden` equals `context`; `pooled` > 0 hands the tower's own pooled vector on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden != self.context:
            raise BridgeError(
                "An identity bridge cannot change the width.",
                f"hidden {self.hidden}, context {self.context}",
                "two equal widths",
                "Use a linear or mlp bridge for this tower.",
            )


class Identity(Bridge, kind="identity"):
    """context = states [B, T, C]; no parameters."""

    Spec = IdentitySpec

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, ops=ops, device=device, dtype=dtype)

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Hand states [B, T, C] and, when the spec asks for it, pooled [B, P] through unchanged."""
        self.check(hidden)
        if not self.spec.pooled:
            return Cond(hidden.states)
        if hidden.pooled is None or hidden.pooled.shape[-1] != self.spec.pooled:
            raise BridgeError(
                "This identity bridge needs a pooled vector that the text tower does not give.",
                "none" if hidden.pooled is None else tuple(hidden.pooled.shape),
                f"[batch, {self.spec.pooled}]",
                "Use the tower that the bridge file names in its header.",
            )
        return Cond(hidden.states, hidden.pooled)
