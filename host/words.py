"""Native text as a tower reads it: windows of tokens with their weights, and what is asked of the tower."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bridges.errors import BridgeError
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
        total = hashlib.sha256(f"{self.weights.strength} {[tuple(v.shape) for v in values]}".encode("ascii"))
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
        count = len(self._before)
        same = [piece.id for piece in whole[:count]] == self._before
        return whole[count:] if same else self._encoder.tokenize(text)

    def tokenize(self, text: str) -> list[Any]:
        """Pieces of a text."""
        return self._encoder.tokenize(text)

    def frame(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The tower's frame around template and ids: ids [window], mask [window]."""
        return self._encoder.frame([*self._before, *ids, *self._after])

    def mask_of(self, ids: Tensor) -> Tensor:
        """The mask [B, T] of framed ids [B, T]."""
        return self._encoder.mask_of(ids)


def cut(tower: Any, texts: Iterable[tuple[str, float]]) -> list[Chunk]:
    """Texts with their weights, framed to the tower's window: (id, weight, word id), word id 0 if special.

    tower: an `Encoder`, a `Framed`, or a `BorrowedEncoder`.
    """
    first = getattr(tower, "opening", tower.tokenize)
    pieces = [
        (piece.id, weight)
        for number, (text, weight) in enumerate(texts)
        for piece in (tower.tokenize if number else first)(text)
    ]
    room, nothing = tower.capacity, tower.frame([])[0]
    groups = [pieces[start : start + room] for start in range(0, len(pieces), room)] or [[]]
    chunks: list[Chunk] = []
    word = 0
    for group in groups:
        ids, _ = tower.frame([token for token, _ in group])
        # Where a window begins to differ from the empty one, its text begins.
        lead = int((ids != nothing).int().argmax()) if group else 0
        chunk: Chunk = []
        for place, token in enumerate(ids.tolist()):
            inside = 0 <= place - lead < len(group)
            word += inside
            chunk.append((token, group[place - lead][1] if inside else 1.0, word if inside else 0))
        chunks.append(chunk)
    return chunks


def ask(tower: Any, chunks: Sequence[Chunk], strength: float = 1.0) -> Asked:
    """Chunks as the tower reads them; when any is weighted, the empty prompt is asked behind them."""
    nothing, nothing_mask = tower.frame([])
    ids = torch.tensor([[token for token, *_ in chunk] for chunk in chunks])
    loud = torch.tensor([[weight for _, weight, *_ in chunk] for chunk in chunks])
    word = ~torch.isin(ids, nothing)
    weights = Weights(torch.where(word, loud * strength, loud), word, strength)
    masks = tower.mask_of(ids)
    if weights.weighted:
        ids, masks = torch.cat([ids, nothing[None]]), torch.cat([masks, nothing_mask[None]])
    return Asked(ids, masks, weights)
