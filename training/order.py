"""Which examples a step reads: a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..bridges.errors import BridgeError
from .chance import generator


class Order:
    """Every example once an epoch, in batches of examples of one group, in an order of its own each epoch.

    The last batch of a group is filled up with the group's first examples of that epoch.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch: int, seed: int) -> None:
        self.groups = [list(group) for group in groups if group]
        if not self.groups:
            raise BridgeError(
                "There is nothing to train on.",
                "no usable example",
                "at least one",
                "Look at the dataset's report; it names what is wrong with each file.",
            )
        self.batch = batch
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._batches)

    @property
    def epoch(self) -> int:
        """Steps of one epoch."""
        return sum(-(-len(group) // self.batch) for group in self.groups)

    def at(self, step: int) -> tuple[int, ...]:
        """The numbers of the examples of step 0, 1, 2, ..."""
        epoch, place = divmod(step, self.epoch)
        return self._epoch(epoch)[place]

    def position(self, step: int) -> None:
        """Nothing but the step's number is needed to go on."""

    def seek(self, step: int, position: object) -> None:
        """Nothing to do: any step can be asked for."""

    def _batches(self, epoch: int) -> list[tuple[int, ...]]:
        source = generator(self.seed, "order", epoch)
        batches: list[tuple[int, ...]] = []
        for group in self.groups:
            order = _shuffled(len(group), source)
            while len(order) % self.batch:
                order += order[: self.batch - len(order) % self.batch]
            numbers = [group[place] for place in order]
            batches += [
                tuple(numbers[start : start + self.batch]) for start in range(0, len(numbers), self.batch)
            ]
        return [batches[place] for place in _shuffled(len(batches), source)]


def _shuffled(count: int, source: torch.Generator) -> list[int]:
    return [int(place) for place in torch.randperm(count, generator=source)]
