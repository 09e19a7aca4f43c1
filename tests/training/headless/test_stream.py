"""The order over shards is a function of the seed and the shards, whoever asks and wherever they begin."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from language_bridge.bridges.errors import BridgeError
from language_bridge.training.headless.stream import PLACES, Position, Stream, nearest

from .toys import row, write_shard, write_shards

SHAPES = ((32, 48), (32, 32), (48, 32))
SIZES = ((32, 32), (40, 60), (70, 48), (33, 32), (16, 500))


def everything(fields: Any, size: tuple[int, int] | None) -> str | None:
    return None


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five shards of 1 to 9 examples, pictures of five sizes among them."""
    folder = tmp_path_factory.mktemp("shards")
    made: list[Path] = []
    at = 0
    for number, count in enumerate((9, 1, 6, 4, 8)):
        rows = [
            row(seed, width=SIZES[seed % 5][0], height=SIZES[seed % 5][1]) for seed in range(at, at + count)
        ]
        made.append(write_shard(folder / f"{number}.tar", rows, at))
        at += count
    return made


@contextmanager
def stream(shards: list[Path], shapes: Any = SHAPES, **changes: Any) -> Iterator[Stream]:
    made = Stream(shards, everything, shapes, **{"batch": 3, "seed": 4, "window": 2} | changes)
    try:
        yield made
    finally:
        made.close()


def first(shards: list[Path], steps: int, **changes: Any) -> list[tuple[int, ...]]:
    with stream(shards, **changes) as one:
        return [one.at(step) for step in range(steps)]


def steps_of_an_epoch(one: Stream, epoch: int) -> list[int]:
    found: list[int] = []
    step = 0
    while (at := one.epoch_of(step)) <= epoch:
        found += [step] if at == epoch else []
        step += 1
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=some.integers(1, 9), window=some.integers(1, 6), seed=some.integers(0, 3), bare=some.booleans())
def test_an_epoch_gives_every_example_and_each_batch_has_one_shape(
    shards: list[Path], batch: int, window: int, seed: int, bare: bool
) -> None:
    """No example is left out; one comes again only to fill the last batch of its shape in the epoch."""
    with stream(shards, () if bare else SHAPES, batch=batch, window=window, seed=seed) as one:
        for epoch in (0, 1):
            batches = [one.at(step) for step in steps_of_an_epoch(one, epoch)]
            assert all(len(each) == batch for each in batches)
            counts = Counter(number for each in batches for number in each)
            assert len(counts) == 28
            shapes: Counter[Any] = Counter()
            for number in counts:
                shapes[one.shape(number)] += 1
            assert sum(counts.values()) == sum(-(-count // batch) * batch for count in shapes.values())
            for each in batches:
                assert len({one.shape(number) for number in each}) == 1


def test_the_order_is_another_in_each_epoch_and_with_each_seed(shards: list[Path]) -> None:
    with stream(shards) as one:
        epochs = [[one.at(step) for step in steps_of_an_epoch(one, epoch)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert first(shards, 5, seed=1) != first(shards, 5, seed=2)
    assert first(shards, 5) == first(shards, 5)


@pytest.mark.parametrize("window", [1, 2, 9])
def test_a_stream_goes_on_from_any_step_as_if_never_left(shards: list[Path], window: int) -> None:
    """`position` and `seek`, through JSON, give the steps that an uninterrupted stream gives."""
    whole = first(shards, 30, window=window)
    positions: list[str] = []
    with stream(shards, window=window) as one:
        for step in range(30):
            positions.append(json.dumps(one.position(step)))
            assert one.at(step) == whole[step]
            positions[step] = json.dumps(one.position(step)) if step % 2 else positions[step]
    for step in range(0, 30, 3):
        with stream(shards, window=window) as one:
            one.seek(step, json.loads(positions[step]))
            assert [one.at(later) for later in range(step, 30)] == whole[step:]


def test_a_position_is_small_and_reads_no_shard_that_is_behind_it(shards: list[Path]) -> None:
    with stream(shards, window=1) as one:
        step = steps_of_an_epoch(one, 3)[-1]
        position = one.position(step)
        expected = one.at(step)
    assert len(json.dumps(position)) < 400
    read: list[int] = []

    class Watched(Stream):
        def _survey(self, shard: int) -> Any:
            read.append(shard)
            return super()._survey(shard)

    other = Watched(shards, everything, SHAPES, batch=3, seed=4, window=1)
    other.seek(step, position)
    assert other.at(step) == expected
    waiting = {number // PLACES for numbers in Position.from_json(position).carried for number in numbers}  # type: ignore[union-attr]
    assert len(set(read) - waiting) <= 1
    other.close()


@pytest.mark.parametrize(
    "position",
    [
        None,
        {},
        {"step": 9, "epoch": 0, "window": 0, "carried": []},
        {"step": -1, "epoch": 0, "window": 0, "carried": []},
        {"step": 0, "epoch": 0, "window": 0, "carried": [["x"]]},
        {"step": 0, "epoch": 0, "window": 0, "carried": [[PLACES * 99]]},
        {"step": 0, "epoch": True, "window": 0, "carried": []},
    ],
)
def test_a_position_of_something_else_is_an_error(shards: list[Path], position: Any) -> None:
    with stream(shards) as one, pytest.raises(BridgeError, match="does not say where"):
        one.seek(3, position)


def test_processes_say_at_each_window_what_they_plan(shards: list[Path]) -> None:
    """The number is the same for the same plan, and another for another one."""
    told: list[list[int]] = []
    for seed in (1, 1, 2):
        said: list[int] = []
        first(shards, 12, seed=seed, agree=said.append)
        told.append(said)
    assert told[0] == told[1] != told[2]
    assert all(0 <= number < 1 << 53 for said in told for number in said)


def test_shards_without_a_usable_example_are_an_error_that_says_why(tmp_path: Path) -> None:
    made = write_shards(tmp_path, (2, 1))
    one = Stream(made, lambda fields, size: "too dull", SHAPES, batch=2, seed=0)
    with pytest.raises(BridgeError, match="3 too dull"):
        one.at(0)
    one.close()


def test_an_unreadable_shard_does_not_end_the_stream(shards: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "x.tar"
    broken.write_bytes(b"no tar at all" * 100)
    gone = tmp_path / "gone.tar"
    gone.write_bytes(b"")
    with stream([*shards, broken, gone]) as one:
        gone.unlink()
        counts = Counter(n for step in steps_of_an_epoch(one, 0) for n in one.at(step))
    assert len(counts) == 28
    assert one.left_out["unreadable shard"] == one.left_out["damaged header"] == 1


def test_the_nearest_shape_is_the_one_of_the_published_code() -> None:
    """The least difference of width over height, and of equal ones the first."""
    assert [nearest(size, SHAPES) for size in ((100, 100), (1, 9), (5, 4), (3, 2))] == [1, 0, 1, 2]
