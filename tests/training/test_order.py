"""Every example once an epoch, whatever was asked before."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_bridge.bridges.errors import BridgeError
from language_bridge.training.order import Order


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_an_epoch_reads_everything_in_batches_of_one_group(sizes: list[int], batch: int, seed: int) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    groups = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    order = Order(groups, batch, seed)
    seen: set[int] = set()
    for step in range(order.epoch):
        numbers = order.at(step)
        assert len(numbers) == batch
        assert any(set(numbers) <= set(group) for group in groups)
        seen |= set(numbers)
    assert seen == set(range(sum(sizes)))


def test_an_example_comes_again_only_to_fill_the_last_batch() -> None:
    order = Order([range(10)], 4, 0)
    read = [number for step in range(order.epoch) for number in order.at(step)]
    assert sorted(read)[:10] != read[:10] and len(read) == 12
    assert sorted(read[:10]) == list(range(10)) or len(set(read)) == 10


def test_any_step_can_be_asked_at_any_time() -> None:
    forward, backward = Order([range(30)], 4, 7), Order([range(30)], 4, 7)
    steps = range(5 * forward.epoch)
    expected = [forward.at(step) for step in steps]
    assert [backward.at(step) for step in reversed(steps)] == expected[::-1]
    assert expected[: forward.epoch] != expected[forward.epoch : 2 * forward.epoch]
    assert [Order([range(30)], 4, 8).at(step) for step in steps] != expected


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(BridgeError, match="nothing to train on"):
        Order([[], []], 4, 0)
