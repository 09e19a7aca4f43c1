"""Native text of a branch: the published cutting into chunks, and the length that all texts of a sampling
share.

BDM (arXiv 2309.00952) reads a prompt in chunks of its tower's window, 50 tokens and two signs in 52 places.
Each chunk is read alone, without a mask; then the inner edges are dropped, so m chunks make 50 m + 2 rows.
Nothing masks the padding, so every text of a sampling is as long as the longest of them, and the chunks that
a shorter one lacks are those of an empty text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..bridges.base import Cond
from ..encoders.base import Encoder
from .rows import Weights
from .words import Chunk

MARK = "language_bridge_branch"
"""Our entry in a conditioning: for each branch, by digest, what it reads of this text."""

MOST_CHUNKS = 5
"""A prompt has no more chunks than this, as published; what goes beyond is cut off."""


def chunks_of(encoder: Encoder, texts: Iterable[tuple[str, float]]) -> list[Chunk]:
    """Texts with their weights in chunks of the tower's window: (id, weight, word id), word id 0 if special.

    As in BDM's release: the first padding of a chunk becomes the end sign, even one that was typed.
    """
    marks, room = encoder.marks, encoder.capacity
    pieces = [(piece.id, weight) for text, weight in texts for piece in encoder.tokenize(text)]
    pieces = pieces[: room * MOST_CHUNKS]
    chunks: list[Chunk] = []
    for start in range(0, max(len(pieces), 1), room):
        inside = pieces[start : start + room]
        ids = [*marks.start, *(token for token, _ in inside)]
        ids += [marks.padding] * (encoder.window - len(ids))
        end = ids.index(marks.padding)
        ids[end : end + len(marks.end)] = marks.end
        lead = len(marks.start)
        chunks.append(
            [
                (token, inside[place - lead][1], start + place - lead + 1)
                if lead <= place < lead + len(inside)
                else (token, 1.0, 0)
                for place, token in enumerate(ids)
            ]
        )
    return chunks


@dataclass(frozen=True, eq=False)
class BranchText:
    """What a branch reads of one text.

    rows: of its chunks, [M, T, C], or [B, M, T, C] for a batch of texts, edges and all; empty: of a chunk
    without text, [1, T, C]; edges: how many rows of start and of end each chunk has; pooled, empty_pooled:
    [1, P] of the first chunk, for SDXL; speaks: whether there is anything to read; own_length: not padded to
    the length of the others (ours, not BDM's). In a conditioning it is a plain dict of tensors, numbers and
    truth values, which can be saved.
    """

    rows: Tensor
    empty: Tensor
    edges: tuple[int, int]
    pooled: Tensor | None
    empty_pooled: Tensor | None
    speaks: bool
    own_length: bool

    @property
    def count(self) -> int:
        """Number of chunks."""
        return self.rows.shape[-3]

    def nothing(self) -> BranchText:
        """The empty text of the same tower."""
        return replace(self, rows=self.empty, pooled=self.empty_pooled, speaks=False, own_length=False)

    def read(self, count: int) -> Tensor:
        """The text in `count` chunks, or its own number when that is set: [B, L, C].

        L = count * capacity + edges.
        """
        count = self.count if self.own_length else max(count, self.count)
        rows = self.rows if self.rows.ndim == 4 else self.rows[None]
        lacking = self.empty.expand(len(rows), count - self.count, -1, -1)
        start, end = self.edges
        width = rows.shape[2]
        chunks = torch.cat([rows, lacking], dim=1).unbind(1)
        kept = [
            chunk[:, start if number else 0 : width if number == count - 1 else width - end]
            for number, chunk in enumerate(chunks)
        ]
        return torch.cat(kept, dim=1)

    def pack(self) -> dict[str, Any]:
        """The plain dict."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {"edges": list(self.edges)}

    @staticmethod
    def of(entry: Mapping[str, Any], branch: str) -> BranchText | None:
        """The text that a conditioning's dict has for the branch of this digest; None without one."""
        mark = entry.get(MARK)
        plain = mark.get(branch) if isinstance(mark, Mapping) else None
        if not isinstance(plain, Mapping):
            return None
        start, end = plain["edges"]
        return BranchText(**{**plain, "edges": (int(start), int(end))})


def weighed(rows: Tensor, empty: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """Rows [M, T, C] with the weights of their tokens: empty + weight * (row - empty). Ours, not BDM's."""
    loud = torch.tensor([[weight for _, weight, *_ in chunk] for chunk in chunks])
    word = torch.tensor(
        [[bool(rest[0]) if rest else weight != 1.0 for _, weight, *rest in chunk] for chunk in chunks]
    )
    weights = Weights(loud, word, 1.0)
    joined, _ = weights.apply(Cond(torch.cat([rows, empty])), tokenwise=True)
    return joined.view(rows.shape)


def common_count(texts: Iterable[BranchText | None]) -> int:
    """How many chunks the longest text of a sampling has, those with a length of their own left out."""
    return max((text.count for text in texts if text is not None and not text.own_length), default=1)
