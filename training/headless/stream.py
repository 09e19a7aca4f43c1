"""The order of a training over shards: which examples each step reads, known as the reading goes on.

An epoch takes the shards in an order of its own, some at a time; the examples of such a window are
shuffled together and cut into batches of one shape. What is left of a shape waits for the next window, and
is filled up at the end of the epoch. All of it follows from the seed, the epoch and what lies in the shards,
so every process comes to the same batches without a word, and reads only the pictures of its own part.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ...bridges.errors import BridgeError
from ..chance import generator
from .shards import Judge, Limits, Place, Survey, survey

Size = tuple[int, int]
PLACES = 1 << 24
"""The number of an example is that of its shard times this, and its place in the shard."""
WINDOW = 8


@dataclass(frozen=True)
class Position:
    """Where a window begins: its first step, epoch and number, and what waits from those before, by shape."""

    step: int = 0
    epoch: int = 0
    window: int = 0
    carried: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> dict[str, object]:
        """As the log keeps it."""
        carried = [list(numbers) for numbers in self.carried]
        return {"step": self.step, "epoch": self.epoch, "window": self.window, "carried": carried}

    @staticmethod
    def from_json(fields: Mapping[str, object]) -> Position | None:
        """Read what `to_json` gave; None when it is anything else."""
        plain = [fields.get(name) for name in ("step", "epoch", "window")]
        carried = fields.get("carried")
        if not all(type(value) is int and value >= 0 for value in plain) or not isinstance(carried, list):
            return None
        rows: list[tuple[int, ...]] = []
        for row in cast("list[object]", carried):
            numbers = cast("list[object]", row) if isinstance(row, list) else [None]
            if not all(type(number) is int and number >= 0 for number in numbers):
                return None
            rows.append(tuple(cast("list[int]", numbers)))
        step, epoch, window = cast("list[int]", plain)
        return Position(step, epoch, window, tuple(rows))


@dataclass(frozen=True)
class _Window:
    position: Position
    batches: tuple[tuple[int, ...], ...]
    after: Position
    pool: tuple[int, ...]
    """Every example that this window knows."""


class Stream:
    """The examples of each step: `at(step)`, for steps that mostly rise.

    shards: their files. judge: what is left out. shapes: the sizes (width, height) of pictures, one of which
    all of a batch have; empty when no pictures are read. batch: examples of a step in all processes together.
    window: shards whose examples are shuffled together. usable, left_out: examples of the shards read so far,
    and those that are not used, by reason. agree: called with a number that must be the same in
    all processes, at each new window.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        judge: Judge,
        shapes: Sequence[Size],
        *,
        batch: int,
        seed: int,
        window: int = WINDOW,
        agree: Callable[[int], None] = lambda number: None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> None:
        self.shards = list(shards)
        self.shapes = list(shapes)
        self.batch, self.seed, self.window = batch, seed, window
        self.left_out: Counter[str] = Counter()
        self.usable = 0
        self._judge, self._limits = judge, limits
        self._agree = agree
        self._reader = ThreadPoolExecutor(1, "shards")
        self._surveys: dict[int, Future[Survey]] = {}
        self._counted: set[int] = set()
        self._windows: list[_Window] = []
        self._start = Position()

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the names and sizes of the shards, in their order."""
        total = hashlib.sha256()
        for path in self.shards:
            total.update(f"{path.name}\0{path.stat().st_size}\n".encode())
        return total.hexdigest()

    def at(self, step: int) -> tuple[int, ...]:
        """The numbers of the examples of step 0, 1, 2, ...; BridgeError when the shards hold none."""
        window = self.window_of(step)
        return window.batches[step - window.position.step]

    def ahead(self, step: int) -> tuple[int, ...]:
        """The examples of a step, if it is of a window that is known already, else ()."""
        for window in self._windows:
            if 0 <= step - window.position.step < len(window.batches):
                return window.batches[step - window.position.step]
        return ()

    def position(self, step: int) -> dict[str, object]:
        """Where the window of a step begins, as JSON."""
        if self._windows and step == self._windows[-1].after.step:
            return self._windows[-1].after.to_json()
        return self.window_of(step).position.to_json()

    def seek(self, step: int, position: object) -> None:
        """Go to where `position` was taken; BridgeError when it is none of these shards."""
        found = (
            Position.from_json(cast("dict[str, object]", position)) if isinstance(position, dict) else None
        )
        if found is None or found.step > step or not self._holds(found):
            raise BridgeError(
                "The checkpoint does not say where in the shards it stands.",
                f"{position!r:.120}",
                "the step, epoch and window of a training over these shards",
                "Go on with the shards that the training began with.",
            )
        self._windows, self._start = [], found

    def _holds(self, position: Position) -> bool:
        shards = {number // PLACES for numbers in position.carried for number in numbers}
        return len(position.carried) <= max(1, len(self.shapes)) and all(
            shard < len(self.shards) for shard in shards
        )

    def epoch_of(self, step: int) -> int:
        """Which time the shards are gone through at a step, from 0."""
        return self.window_of(step).position.epoch

    def neighbours(self, step: int, number: int) -> list[int]:
        """What may stand in for an example that cannot be read: the rest of its batch, then of its window."""
        window = self.window_of(step)
        batch = window.batches[step - window.position.step]
        at = batch.index(number) + 1
        return [*batch[at:], *batch[: at - 1], *window.pool]

    def place(self, number: int) -> tuple[Path, Place]:
        """Where an example lies."""
        shard, place = divmod(number, PLACES)
        return self.shards[shard], self._survey(shard).places[place]

    def shape(self, number: int) -> Size | None:
        """The shape (width, height) whose batches an example belongs to; None when no pictures are read."""
        if not self.shapes:
            return None
        return self.shapes[nearest(self.place(number)[1].size, self.shapes)]

    def first(self, count: int) -> list[list[int]]:
        """At most `count` examples in the order of the shards, by shape, for what is only measured."""
        groups: list[list[int]] = [[] for _ in self.shapes or [None]]
        left = count
        for shard in range(len(self.shards)):
            for place in range(min(left, len(self._survey(shard).places))):
                number = shard * PLACES + place
                groups[self._group(number)].append(number)
                left -= 1
            if not left:
                break
        return groups

    def window_of(self, step: int) -> _Window:
        """The window that a step belongs to, planned if it is new."""
        for window in self._windows:
            if 0 <= step - window.position.step < len(window.batches):
                return window
        position = self._start if step >= self._start.step else Position()
        if self._windows and step >= self._windows[-1].after.step:
            position = self._windows[-1].after
        empty = 0
        while True:
            window = self._plan(position)
            if window.batches:
                self._windows = [*self._windows[-1:], window]
                self._forget()
                if step < window.after.step:
                    return window
            # Nothing at all out of a whole epoch ends the training; an epoch's end gives out what has waited.
            empty = 0 if window.pool else empty + 1
            if empty > -(-len(self.shards) // self.window):
                raise self._nothing()
            position = window.after

    def _plan(self, position: Position) -> _Window:
        order = self._order(position.epoch)
        start = position.window * self.window
        shards = order[start : start + self.window]
        last = start + self.window >= len(order)
        following = self._order(position.epoch + 1)[: self.window] if last else order[start + self.window :]
        for shard in [*shards, *following[: self.window]]:
            self._ask(shard)
        numbers = [
            shard * PLACES + place for shard in shards for place in range(len(self._survey(shard).places))
        ]
        for shard in shards:
            self._count(shard)
        seeds = (self.seed, "window", position.epoch, position.window)
        numbers = [numbers[place] for place in _shuffled(len(numbers), *seeds)]
        groups: list[list[int]] = [[] for _ in self.shapes or [None]]
        for group, waiting in zip(groups, position.carried, strict=False):
            group += waiting
        for number in numbers:
            groups[self._group(number)].append(number)
        batches: list[tuple[int, ...]] = []
        carried: list[tuple[int, ...]] = []
        for group in groups:
            if last and group:  # nothing waits beyond the end of an epoch
                short = -len(group) % self.batch
                group += (group * -(-short // len(group)))[:short]
            whole = len(group) // self.batch * self.batch
            batches += [tuple(group[at : at + self.batch]) for at in range(0, whole, self.batch)]
            carried.append(tuple(group[whole:]))
        pool = tuple(number for group in groups for number in group)
        batches = [batches[place] for place in _shuffled(len(batches), *seeds, "batches")]
        step = position.step + len(batches)
        after = (
            Position(step, position.epoch + 1)
            if last
            else Position(step, position.epoch, position.window + 1, tuple(carried))
        )
        said = hashlib.sha256(repr((position, batches)).encode()).digest()
        self._agree(int.from_bytes(said[:6], "little"))
        return _Window(position, tuple(batches), after, pool)

    def _order(self, epoch: int) -> list[int]:
        return _shuffled(len(self.shards), self.seed, "shards", epoch)

    def _group(self, number: int) -> int:
        return nearest(self.place(number)[1].size, self.shapes) if self.shapes else 0

    def _ask(self, shard: int) -> None:
        """Have a shard read by the thread beside, so that the next window is there when it is needed."""
        if shard not in self._surveys:
            path = self.shards[shard]
            self._surveys[shard] = self._reader.submit(
                survey, path, self._judge, self._limits, bool(self.shapes)
            )

    def _survey(self, shard: int) -> Survey:
        self._ask(shard)
        return self._surveys[shard].result()

    def _count(self, shard: int) -> None:
        if shard not in self._counted:
            self._counted.add(shard)
            self.left_out.update(self._survey(shard).left_out)
            self.usable += len(self._survey(shard).places)

    def _forget(self) -> None:
        """Keep what the last two windows and the one being read ahead need."""
        last = self._windows[-1]
        kept = {number // PLACES for window in self._windows for number in window.pool}
        order = self._order(last.after.epoch)
        start = last.after.window * self.window
        kept.update(order[start : start + self.window])
        self._surveys = {shard: each for shard, each in self._surveys.items() if shard in kept}

    def _nothing(self) -> BridgeError:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return BridgeError(
            "There is nothing to train on in these shards.",
            reasons or "no pictures with captions",
            "tar files of pictures (jpg) and captions (json) that pass the filters",
            "Look at the reasons: the filters can be changed, see --help.",
        )


def nearest(size: Size, shapes: Sequence[Size]) -> int:
    """The number of the shape whose width over height is nearest to a picture's, as in the authors' code."""
    aspect = size[0] / size[1]
    return min(range(len(shapes)), key=lambda at: (abs(shapes[at][0] / shapes[at][1] - aspect), at))


def _shuffled(count: int, *seeds: object) -> list[int]:
    """0 ... count - 1 in an order that the seeds decide."""
    return cast("list[int]", cast(Any, torch.randperm(count, generator=generator(*seeds))).tolist())
