"""How the native and the English stream of a prompt are joined: where their rows stand, how loud each is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..bridges.errors import BridgeError
from .words import Chunk

APPENDED, SHARED = "rows appended", "shared window"
JOINS = (APPENDED, SHARED)
"""Rows appended: every row of both streams. Shared window: see `share_window`."""

NEUTRAL = 0.5
START, END = "clip_start_percent", "clip_end_percent"
"""The host's own marks of an entry that holds for a part of the steps; it combines them with the artist's."""


@dataclass(frozen=True)
class Joining:
    """How two streams are joined; as it stands by default, a prompt is what it is without it, bit for bit.

    join: one of `JOINS`; blend: 0 = English meaning alone, 0.5 = both as they are, 1 = native meaning alone;
    start, end: the part of sampling, 0..1, in which `blend` holds; before and after, both are as they are.
    BridgeError for values out of range.
    """

    join: str = APPENDED
    blend: float = NEUTRAL
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.join not in JOINS:
            raise BridgeError(
                "There is no such way to join the streams.",
                repr(self.join),
                " or ".join(JOINS),
                "Choose one of the list.",
            )
        if not (0 <= self.blend <= 1 and 0 <= self.start <= 1 and 0 <= self.end <= 1):
            raise BridgeError(
                "The blend of the streams is out of range.",
                f"blend {self.blend}, from {self.start} to {self.end}",
                "three numbers from 0 to 1",
                "Set blend, start_percent and end_percent between 0 and 1.",
            )

    @property
    def neutral(self) -> bool:
        """Whether both streams are as loud as they are by themselves at every step."""
        return self.blend == NEUTRAL or self.start >= self.end

    @property
    def levels(self) -> tuple[float, float]:
        """What the weights of the native and of the English tokens are multiplied by.

        The stream that the slider leaves fades: 1 - (distance from the middle)^2, flat around the middle. The
        other one keeps its weights.
        """
        fading = 1.0 - (2.0 * self.blend - 1.0) ** 2
        return (1.0, fading) if self.blend > NEUTRAL else (fading, 1.0)

    def at_first(self) -> Joining:
        """What holds at the first step, for all of them: for nodes that know of no steps."""
        whole = replace(self, start=0.0, end=1.0)
        return whole if self.start == 0.0 < self.end else replace(whole, blend=NEUTRAL)

    def stretches(self) -> list[tuple[float, float, Joining]]:
        """(start, end, what holds there) from the first step to the last, without gaps."""
        alike = replace(self, blend=NEUTRAL, start=0.0, end=1.0)
        if self.neutral:
            return [(0.0, 1.0, alike)]
        found = [
            (0.0, self.start, alike),
            (self.start, self.end, replace(self, start=0.0, end=1.0)),
            (self.end, 1.0, alike),
        ]
        return [(start, end, joining) for start, end, joining in found if start < end]

    def share(self, native: int, english: int) -> float:
        """Share of the native pooled vector, of the numbers of spoken tokens; the blend shifts the odds."""
        share = native / max(native + english, 1)
        if self.blend == NEUTRAL:
            return share
        one, other = share * self.blend, (1.0 - share) * (1.0 - self.blend)
        return one / (one + other) if one + other else self.blend


def limit(entry: dict[str, Any], start: float, end: float) -> bool:
    """Lets a conditioning's entry hold from `start` to `end` at most; False when nothing is left of it."""
    if (start, end) != (0.0, 1.0):
        start, end = max(start, entry.get(START, 0.0)), min(end, entry.get(END, 1.0))
        entry[START], entry[END] = start, end
    return start < end


def fade(tokens: Mapping[str, Sequence[Chunk]], level: float) -> dict[str, list[Chunk]]:
    """Tokens whose weights are multiplied by `level`, those of padding too: it also tells of the words."""
    return {
        key: [[(token, weight * level, *rest) for token, weight, *rest in chunk] for chunk in chunks]
        for key, chunks in tokens.items()
    }


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one stream, [1, N, C], with what each is: padding or not [N] bool; words: number of words."""

    context: Tensor
    padding: Tensor
    words: int


def append(native: Tensor, english: Tensor) -> tuple[Tensor, int]:
    """All rows of both streams, native ones first, and the number of native ones."""
    return torch.cat([native, english.to(native)], dim=1), native.shape[1]


def share_window(native: Rows, english: Rows, window: int, unit: int = 1) -> tuple[Tensor, int] | None:
    """The rows of both that say something, filled up with rows of their padding to a multiple of `window`.

    Padding is not nothing: in CLIP it says the whole prompt once more, and the cross-attention has no mask.
    So its rows are shared out as the words are, `unit` by `unit`. Rows [1, N, C], native ones first, and the
    number of native ones; None where there is not enough padding to make a whole window.
    """
    said = int((~native.padding).sum()), int((~english.padding).sum())
    total = -(-sum(said) // window) * window
    free = total - sum(said)
    most = int(native.padding.sum()), int(english.padding.sum())
    if free > sum(most):
        return None
    theirs = unit * round(free / unit * english.words / max(native.words + english.words, 1))
    theirs = max(min(theirs, most[1]), free - most[0])
    kept = [_first(native, free - theirs), _first(english, theirs).to(native.context)]
    return torch.cat(kept, dim=1), kept[0].shape[1]


def _first(rows: Rows, count: int) -> Tensor:
    """The rows that say something and the first `count` of padding, in their order."""
    chosen = ~rows.padding | (rows.padding & (rows.padding.cumsum(0) <= count))
    return rows.context[:, chosen.to(rows.context.device)]
