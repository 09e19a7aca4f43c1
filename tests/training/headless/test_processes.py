"""Processes that disagree find it out, and what they add comes back in the shapes that went in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from language_bridge.bridges.errors import BridgeError
from language_bridge.training.headless import processes
from language_bridge.training.headless.processes import Processes

NUMBERS = some.integers(0, (1 << 53) - 1)


class Asked(Processes):
    """One of several processes; what the others would say in `agree` stands in their numbers."""

    def __init__(self, others: Sequence[int]) -> None:
        self.others = others

    index = 0

    @property
    def count(self) -> int:
        return 1 + len(self.others)

    def add(self, tensors: Sequence[Tensor]) -> None:
        for number in self.others:
            pieces = torch.tensor(
                [(number >> shift) & 0xFFF for shift in range(0, 60, 12)], dtype=torch.float64
            )
            tensors[0].add_(torch.cat([pieces, pieces.square()]))


@given(number=NUMBERS, count=some.integers(1, 4096))
def test_equal_numbers_agree(number: int, count: int) -> None:
    Asked([number] * min(count, 9)).agree(number)


@given(number=NUMBERS, others=some.lists(NUMBERS, min_size=1, max_size=4))
def test_one_other_number_is_found(number: int, others: list[int]) -> None:
    if set(others) == {number}:
        return
    with pytest.raises(BridgeError, match="do not have the same batches"):
        Asked(others).agree(number)


def test_sums_come_back_in_shape_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several shapes and types, more than are sent at once, each in its own storage."""
    sent: list[int] = []

    class Doubling:
        num_processes, process_index, device = 2, 0, torch.device("cpu")

        def reduce(self, flat: Tensor, reduction: str) -> Tensor:
            assert reduction == "sum"
            sent.append(flat.numel())
            return flat * 2

    made = Processes.__new__(Processes)
    made._accelerator = Doubling()
    monkeypatch.setattr(processes, "MOST_AT_ONCE", 8)
    tensors: list[Any] = [
        torch.ones(2, 3),
        torch.tensor(4.0),
        torch.ones(9),
        torch.ones(2, dtype=torch.float64),
    ]
    turned = torch.arange(6.0).view(2, 3).T
    made.add([*tensors, turned])
    assert [each.tolist() for each in tensors] == [[[2.0] * 3] * 2, 8.0, [2.0] * 9, [2.0] * 2]
    assert torch.equal(turned, torch.arange(0, 12, 2.0).view(2, 3).T)
    assert sent == [7, 9, 2, 6]


def test_one_process_adds_nothing_and_agrees_with_itself() -> None:
    alone = Processes(cpu=True)
    tensor = torch.ones(3)
    alone.add([tensor])
    alone.agree(7)
    assert (alone.index, alone.count, tensor.tolist()) == (0, 1, [1.0] * 3)
    assert alone.any(True) and not alone.any(False)
