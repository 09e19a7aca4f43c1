"""Native text as a tower reads it: windows of tokens with their weights, and what is asked of the tower."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bridges.errors import BridgeError
from ..encoders.base import Piece
from ..prompt import word_spans
from .rows import Weights

Chunk = list[tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Asked:
    """Native text as the tower reads it: ids, masks [S, T], and how its rows are weighed."""

    ids: Tensor
    masks: Tensor
    weights: Weights

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        values = (self.ids, self.masks, self.weights.weights)
        facts = f"{self.weights.strength} {self.weights.pairs} {[tuple(v.shape) for v in values]}"
        total = hashlib.sha256(facts.encode("ascii"))
        for value in values:
            total.update(value.numpy().tobytes())
        return total.hexdigest()


class Framed:
    """A tower with a method's template around every window; what `cut` and `ask` need of a tower, as it is.

    before, after: texts. The first text of a prompt is cut together with what stands before it, because some
    tokenizers treat the beginning of a text in a way of their own.
    """

    def __init__(self, encoder: Any, before: str, after: str) -> None:
        self._encoder = encoder
        self._text = before
        self._before = [piece.id for piece in encoder.tokenize(before)] if before else []
        self._after = [piece.id for piece in encoder.tokenize(after)] if after else []
        if self.capacity < 1:
            raise BridgeError(
                f"The window of the text tower {encoder.identity!r} has no room for text.",
                f"{len(self._before) + len(self._after)} tokens of template, {encoder.capacity} in a window",
                "a window longer than the template",
                "Fetch or convert the bridge again; its header does not fit its tower.",
            )

    @property
    def capacity(self) -> int:
        """How many pieces fit into one window beside template and special tokens."""
        return self._encoder.capacity - len(self._before) - len(self._after)

    def opening(self, text: str) -> list[Any]:
        """Pieces of the first text of a prompt."""
        whole = self._encoder.tokenize(self._text + text)
        count, width = len(self._before), len(self._text)
        if [piece.id for piece in whole[:count]] != self._before:
            return self._encoder.tokenize(text)
        return [
            Piece(piece.id, max(piece.start - width, 0), max(piece.end - width, 0)) for piece in whole[count:]
        ]

    def tokenize(self, text: str) -> list[Any]:
        """Pieces of a text."""
        return self._encoder.tokenize(text)

    def frame(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The tower's frame around template and ids: ids [window], mask [window]."""
        return self._encoder.frame([*self._before, *ids, *self._after])

    def mask_of(self, ids: Tensor) -> Tensor:
        """The mask [B, T] of framed ids [B, T]."""
        return self._encoder.mask_of(ids)


def cut(tower: Any, texts: Iterable[tuple[str, float]], words: int = 0) -> list[Chunk]:
    """Texts with their weights, framed to the tower's window: (id, weight, word id), word id 0 if special.

    tower: an `Encoder`, a `Framed`, or a `BorrowedEncoder`. words: how many words there were before; the
    first one here has the next number, so that numbers are unique in a prompt (the host's meaning of them).
    """
    first = getattr(tower, "opening", tower.tokenize)
    tokens: list[tuple[Any, ...]] = []
    for number, (text, weight) in enumerate(texts):
        pieces = (tower.tokenize if number else first)(text)
        numbers = number_words(text, [(piece.start, piece.end) for piece in pieces], words)
        tokens += [(piece.id, weight, word) for piece, word in zip(pieces, numbers, strict=True)]
        words = max(numbers, default=words)
    room = tower.capacity
    groups = [tokens[start : start + room] for start in range(0, len(tokens), room)] or [[]]
    return [_chunk(tower, group) for group in groups]


def windows(tower: Any, parts: Iterable[Sequence[tuple[str, float]]]) -> list[Chunk]:
    """The same for a prompt in parts: each begins a window; one without texts has none. [] for no texts."""
    chunks: list[Chunk] = []
    for texts in parts:
        if texts:
            chunks += cut(tower, texts, max((word for chunk in chunks for *_, word in chunk), default=0))
    return chunks


def stock_windows(
    tokenize: Callable[[str], dict[str, list[Chunk]]], prompts: Sequence[str]
) -> dict[str, list[Chunk]]:
    """Stock tokens of the parts of a prompt, each in windows of its own; word ids, where asked, go on.

    tokenize: the checkpoint's own; a part that says nothing has no window, unless it is the only one.
    """
    spoken = [prompt for prompt in prompts if prompt.strip()] if len(prompts) > 1 else list(prompts)
    tokens = tokenize(spoken[0] if spoken else "")
    for prompt in spoken[1:]:
        for key, chunks in tokenize(prompt).items():
            words = max((word for chunk in tokens[key] for _, _, *ids in chunk for word in ids), default=0)
            tokens[key] = tokens[key] + [
                [(token, weight, *(word and word + words for word in ids)) for token, weight, *ids in chunk]
                for chunk in chunks
            ]
    return tokens


def number_words(text: str, places: Sequence[tuple[int, int]], words: int = 0) -> list[int]:
    """The number of the word that each piece of a text stands in, counting up from words + 1 without a hole.

    places: the characters [start, end) of `text` that each piece stands for. Words are those of
    `prompt.word_spans`; a piece that holds several makes one of them, and one that holds none, a space alone,
    goes with the word behind it. Where a tokenizer does not tell the places (a tower of the host), each piece
    is a word.
    """
    if not any(end for _, end in places):
        return [words + number for number in range(1, len(places) + 1)]
    spans = word_spans(text)
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    numbers: list[int] = []
    reach = -1  # the last span of the present word
    for start, end in places:
        first = min(bisect_right(ends, start), len(spans) - 1)  # the span that holds `start`, or the next one
        last = max(first, bisect_left(starts, end) - 1)
        if first > reach or not numbers:
            words += 1
        reach = max(reach, last)
        numbers.append(words)
    return numbers


def _chunk(tower: Any, group: Sequence[tuple[Any, ...]]) -> Chunk:
    ids, _ = tower.frame([token for token, *_ in group])
    # Ids that no token has show where the tower puts the text; a family may put padding before it.
    shown, _ = tower.frame([-1] * len(group))
    lead = int((shown < 0).int().argmax()) if group else 0
    chunk: Chunk = []
    for place, token in enumerate(ids.tolist()):
        inside = 0 <= place - lead < len(group)
        _, weight, word = group[place - lead] if inside else (token, 1.0, 0)
        chunk.append((token, weight, word))
    return chunk


def ask(
    tower: Any, chunks: Sequence[Chunk], strength: float = 1.0, level: float = 1.0, *, pairs: bool = False
) -> Asked:
    """Chunks as the tower reads them; when any is weighted, the empty prompt is asked behind them.

    strength: of the words; level: of all rows, padding too; pairs: see `Weights`.
    """
    nothing, nothing_mask = tower.frame([])
    ids = torch.tensor([[token for token, *_ in chunk] for chunk in chunks])
    loud = torch.tensor([[weight for _, weight, *_ in chunk] for chunk in chunks])
    word = ~torch.isin(ids, nothing)
    weights = Weights(torch.where(word, loud * strength, loud) * level, word, strength, pairs)
    masks = tower.mask_of(ids)
    if weights.weighted:
        ids, masks = torch.cat([ids, nothing[None]]), torch.cat([masks, nothing_mask[None]])
    return Asked(ids, masks, weights)
