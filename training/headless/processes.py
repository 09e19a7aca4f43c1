"""Hugging Face Accelerate as the processes of a training: device, number, sums over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...bridges.errors import BridgeError

MOST_AT_ONCE = 1 << 25
"""Numbers that are sent at once, as one tensor: few large messages are faster than many small ones."""


class Processes:
    """All processes that `accelerate launch` started; one, without it. They meet in `add`, in step.

    A trainer's `Ranks`. cpu: to stay off GPUs.
    """

    def __init__(self, cpu: bool = False) -> None:
        import accelerate  # pyright: ignore[reportMissingTypeStubs]

        # Precision and gradients are the trainer's own affair: they must be the same without Accelerate.
        self._accelerator: Any = cast(Any, accelerate).Accelerator(cpu=cpu, mixed_precision="no")

    @property
    def index(self) -> int:
        """This process, from 0."""
        return int(self._accelerator.process_index)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._accelerator.device

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count == 1:
            return
        for part in _parts(tensors):
            flat = torch.cat([each.detach().reshape(-1) for each in part]).to(self.device)
            whole = cast(Tensor, self._accelerator.reduce(flat, reduction="sum"))
            start = 0
            for each in part:
                each.detach().copy_(whole[start : start + each.numel()].view(each.shape))
                start += each.numel()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in one of them."""
        told = torch.tensor([float(flag)])
        self.add([told])
        return bool(told > 0)

    def agree(self, number: int, what: str = "batches") -> None:
        """Raise BridgeError in all of them unless all come with the same number, below 2**53."""
        # By Cauchy and Schwarz count * sum of squares = (sum)^2 for equal values alone. Pieces of 12 bits
        # keep both exact in double precision.
        pieces = torch.tensor([(number >> shift) & 0xFFF for shift in range(0, 60, 12)], dtype=torch.float64)
        told = torch.cat([pieces, pieces.square()])
        self.add([told])
        total, squares = told.chunk(2)
        if not torch.equal(squares * self.count, total.square()):
            raise BridgeError(
                f"The processes of this training do not have the same {what}.",
                f"in process {self.index}: {number}",
                "the same in every process",
                "Let all machines see the same shards, models and run folder, and use the same options.",
            )

    def wait(self) -> None:
        """Go on when all of them are here."""
        self._accelerator.wait_for_everyone()

    def end(self) -> None:
        """Close the connections between them."""
        self._accelerator.end_training()


def _parts(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, together not much more than MOST_AT_ONCE numbers."""
    parts: list[list[Tensor]] = []
    size = 0
    for each in tensors:
        if not parts or parts[-1][0].dtype != each.dtype or size + each.numel() > MOST_AT_ONCE:
            parts.append([])
            size = 0
        parts[-1].append(each)
        size += each.numel()
    return parts
