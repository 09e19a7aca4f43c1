"""Native rows: how weights act on what a bridge said, at encode time and again at every step of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bridges.base import Cond, Hidden

MARK = "language_bridge"
"""Our entry in a conditioning: which rows are native, and what a timed bridge needs to say them again."""


@dataclass(frozen=True, eq=False)
class Weights:
    """How loud the native tokens are: `weights` [S, T], `word` [S, T] (True = a spoken token), `strength`.

    When any weight is not one, what the bridge said has one entry more than S: the empty prompt, last.
    pairs: every row stands twice, for the keys and for the values of the cross-attention, and a negative
    weight turns the second one over: what the pack NegPip makes of the checkpoint's own rows.
    """

    weights: Tensor
    word: Tensor
    strength: float
    pairs: bool = False

    @property
    def weighted(self) -> bool:
        """Whether any weight is not one."""
        return bool((self.weights != 1.0).any())

    def apply(self, cond: Cond, *, tokenwise: bool) -> tuple[Tensor, Tensor | None]:
        """Native rows [1, S*N, C] (twice as many with `pairs`) and pooled [1, P] of the first window.

        Weights act as in the stock CLIP, on the rows that stand for the tokens: empty + weight * (row -
        empty), where empty is the row of the empty prompt at the same place. A bridge whose rows do not stand
        for tokens (`tokenwise` False) gets the mean weight of the window for all of its rows.
        """
        weights, count = self.weights, len(self.weights)
        rows, pooled = cond.context[:count], None if cond.pooled is None else cond.pooled[:1]
        sign = rows.new_ones(())
        if self.weighted:
            empty = cond.context[-1:]
            if not tokenwise or rows.shape[1] != weights.shape[1]:
                counted = self.word.sum(1).clamp(min=1)
                mean = torch.where(self.word, weights, 0.0).sum(1) / counted
                weights = mean[:, None].expand(-1, rows.shape[1])
            weights = weights[..., None].to(rows.device)
            if self.pairs:
                sign, weights = torch.where(weights < 0, -1.0, 1.0).to(rows), weights.abs()
            rows = torch.where(weights == 1.0, rows, empty + weights.to(rows) * (rows - empty))
            if pooled is not None and cond.pooled is not None and self.strength != 1.0:
                pooled = cond.pooled[-1:] + self.strength * (pooled - cond.pooled[-1:])
        if self.pairs:
            rows = torch.stack([rows, sign * rows], dim=2).flatten(1, 2)
        return rows.flatten(0, 1)[None], pooled


@dataclass(frozen=True, eq=False)
class Mark:
    """What a conditioning says of its native rows: whose they are, how many, and for timed kinds the words.

    bridge: digest of the bridge that said them; rows: their number, they stand first; hidden, weights: what
    a timed bridge says them from; words: the digest of these two. In a conditioning it is a plain dict of
    texts, numbers and tensors, which can be saved.
    """

    bridge: str
    rows: int
    hidden: Hidden | None = None
    weights: Weights | None = None
    words: str = ""

    def pack(self) -> dict[str, Any]:
        """The plain dict."""
        plain: dict[str, Any] = {"bridge": self.bridge, "rows": self.rows}
        if self.hidden is not None and self.weights is not None:
            plain |= {"states": self.hidden.states, "mask": self.hidden.mask, "pooled": self.hidden.pooled}
            plain |= {"weights": self.weights.weights, "word": self.weights.word}
            plain |= {"strength": self.weights.strength, "pairs": self.weights.pairs, "words": self.words}
        return plain

    @staticmethod
    def of(entry: Mapping[str, Any], bridge: str) -> Mark | None:
        """The mark of a conditioning's dict; None when it has none of the bridge `bridge`."""
        plain = entry.get(MARK)
        if not isinstance(plain, Mapping) or plain.get("bridge") != bridge:
            return None
        if "states" not in plain:
            return Mark(bridge, int(plain["rows"]))
        hidden = Hidden(plain["states"], plain["mask"], plain["pooled"])
        pairs = bool(plain.get("pairs", False))
        weights = Weights(plain["weights"], plain["word"], float(plain["strength"]), pairs)
        return Mark(bridge, int(plain["rows"]), hidden, weights, str(plain["words"]))
