"""Kind `linear`: one matrix from the tower's width to the checkpoint's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Bridge, BridgeSpec, Cond, Hidden, Ops


@dataclass(frozen=True, kw_only=True)
class LinearSpec(BridgeSpec):
    """Sizes of the matrix, and of a second one for the pooled vector when `pooled` > 0."""


class Linear(Bridge, kind="linear"):
    """context = W states + b; pooled = V mean(states) + c, the mean over all tokens, padding included."""

    Spec = LinearSpec

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, ops=ops, device=device, dtype=dtype)
        self.context = ops.Linear(spec.hidden, spec.context, device=device, dtype=dtype)
        if spec.pooled:
            self.pooled = ops.Linear(spec.hidden, spec.pooled, device=device, dtype=dtype)

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Map states [B, T, D] to context [B, T, C] and, when the spec asks for it, pooled [B, P]."""
        self.check(hidden)
        context = self.context(hidden.states)
        return Cond(context, self.pooled(hidden.states.mean(dim=1)) if self.spec.pooled else None)
