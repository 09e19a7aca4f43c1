"""Native text inside the window of the checkpoint's own CLIP, for bridges that say its input embeddings.

Each piece of native text has a place of its own in the tokens of the CLIP, where it was typed. What the
bridge says of it is put there before the CLIP reads the window, so one text model reads both languages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..bridges.errors import BridgeError
from .words import Chunk

SAYS, CLIP_INPUT = "says", "clip input"
"""In a bridge's training record: {"says": "clip input"}. Otherwise a bridge says rows for the U-Net."""

WHOLE_WORD = 8
"""The host cuts no word of fewer tokens between two windows."""


class Reminder(int):
    """A token of an English window whose prompt also has native text, `native` [chunks].

    It is that token in every way but one: read by a text model, it raises. So a node that encodes the
    checkpoint's own tokens alone, and would lose the native text without a word, says so.
    """

    native: list[Chunk]

    @classmethod
    def of(cls, token: int, native: list[Chunk]) -> Reminder:
        """`token`, reminding of `native`."""
        reminder = cls(token)
        reminder.native = native
        return reminder

    def __int__(self) -> int:
        raise BridgeError(
            "This node would lose the native text of the prompt.",
            "a node that encodes the checkpoint's own tokens alone",
            "a node that encodes all tokens that the CLIP gives, as CLIP Text Encode does",
            "Use CLIP Text Encode for this prompt, or write it in English.",
        )


class Place(Reminder):
    """A token that stands for one piece of native text: number `row` of window `window` of `native`."""

    window: int
    row: int


Item = tuple[Any, ...]
"""Token or `Place`, weight, word id."""


def weave(parts: Sequence[Sequence[Sequence[Chunk] | int]], native: list[Chunk], empty: Chunk) -> list[Chunk]:
    """Windows of the CLIP for the parts of a prompt, as (token, weight, word id).

    parts: for each part its segments in order, stock windows of an English one or the number of pieces of a
    native one; native: the windows of the tower, whose pieces are dealt out in order; empty: the CLIP's
    window of the empty prompt.
    """
    pieces = _places(native, int(empty[1][0]))
    chunks: list[Chunk] = []
    words = 0
    for part in parts:
        items: list[Item] = []
        for given in part:
            said = (
                [next(pieces) for _ in range(given)]
                if isinstance(given, int)
                else [token for chunk in given for token in words_of(chunk, empty)]
            )
            for _, group in groupby(said, key=lambda item: item[2]):
                words += 1
                items += [(token, weight, words) for token, weight, *_ in group]
        if items:
            chunks += _windows(items, empty)
    return chunks or [window_of([], empty, 3)]


def words_of(chunk: Chunk, empty: Chunk) -> list[Item]:
    """What stands between start and end token of a window."""
    end = empty[1][0]
    found: list[Item] = []
    for token in chunk[1:]:
        if isinstance(token[0], int) and not isinstance(token[0], Place) and token[0] == end:
            break
        found.append(token)
    return found


def window_of(items: Sequence[Item], empty: Chunk, size: int) -> Chunk:
    """One window: start token, items, end token, padding; `size`: 3 with word ids, 2 without."""
    first, last, *rest = [(token[0], 1.0, 0)[:size] for token in empty]
    return [first, *(item[:size] for item in items), last, *rest[: len(rest) - len(items)]]


def _windows(items: Sequence[Item], empty: Chunk) -> list[Chunk]:
    room = len(empty) - 2
    groups: list[list[Item]] = [[]]
    for _, group in groupby(items, key=lambda item: item[2]):
        word = list(group)
        if len(word) < WHOLE_WORD and len(groups[-1]) + len(word) > room:
            groups.append([])
        for item in word:
            if len(groups[-1]) == room:
                groups.append([])
            groups[-1].append(item)
    return [window_of(group, empty, 3) for group in groups]


def places(tokens: Mapping[str, Sequence[Chunk]]) -> list[Place]:
    """Every place of native text in the tokens of a CLIP."""
    found: list[Place] = []
    for chunks in tokens.values():
        for chunk in chunks if isinstance(chunks, list) else ():
            if isinstance(chunk, list):
                found += [
                    token[0] for token in chunk if isinstance(token, tuple) and isinstance(token[0], Place)
                ]
    return found


def keep(chunks: Sequence[Chunk], empty: Chunk, *, native: bool) -> list[Chunk]:
    """The same windows with the words of one stream alone."""
    return [
        window_of(
            [token for token in words_of(chunk, empty) if isinstance(token[0], Place) == native],
            empty,
            len(chunk[0]),
        )
        for chunk in chunks
    ]


def both(chunks: Sequence[Chunk], empty: Chunk) -> bool:
    """Whether words of both streams are in these windows."""
    found = {isinstance(token[0], Place) for chunk in chunks for token in words_of(chunk, empty)}
    return len(found) == 2


def fill(chunks: Sequence[Chunk], said: Callable[[list[Chunk]], Tensor], strength: float) -> list[Chunk]:
    """Windows in which every place holds its vector [W]; its weight is multiplied by `strength`.

    said: native windows to what the bridge says of them, [S, T, W]; asked once for each prompt.
    """
    known: dict[int, Tensor] = {}

    def filled(token: tuple[Any, ...]) -> tuple[Any, ...]:
        place = token[0]
        if not isinstance(place, Place):
            return token
        if id(place.native) not in known:
            known[id(place.native)] = said(place.native)
        return known[id(place.native)][place.window, place.row], token[1] * strength, *token[2:]

    return [[filled(token) for token in chunk] for chunk in chunks]


def mix(joined: Mapping[str, Any], alone: Mapping[str, Any], share: float) -> dict[str, Any]:
    """`joined` with rows and pooled vector moved towards those of `alone` by `share`, 0..1."""
    moved = dict(joined)
    for key in ("cond", "pooled_output"):
        one, other = joined.get(key), alone.get(key)
        if one is not None and other is not None:
            moved[key] = torch.lerp(one, other.to(one), share)
    return moved


def _places(native: list[Chunk], token: int) -> Iterator[Item]:
    """A place for every word token of the native windows, in order."""
    for window, chunk in enumerate(native):
        for row, (_, weight, word) in enumerate(chunk):
            if word:
                place = Place.of(token, native)
                assert isinstance(place, Place)
                place.window, place.row = window, row
                yield place, weight, word
