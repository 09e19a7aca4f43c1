"""Family `dual`: two towers read the same text, their states side by side on the feature axis.

PEA-Diffusion's dual encoder (XLM-R beside Chinese-CLIP, 64 tokens each) is the model. Each tower has its own
tokenizer; both are framed to one window, so that row t holds the t-th token of either.

A token of this family is a pair: id = first * base + second, where `base` is one more than the second tower's
vocabulary and the highest number of a tower (its vocabulary's size) stands for "nothing". Pieces are paired
in the order of the text, so a long prompt can be cut anywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..bridges.base import Hidden, parse_spec
from ..bridges.errors import BridgeError
from . import guard
from .base import Encoder, EncoderSpec, Layers, Piece, families, too_long

_AGAIN = "The file is damaged or was made by another version; fetch or save it again."


@dataclass(frozen=True, kw_only=True)
class DualSpec(EncoderSpec):
    """Both towers as JSON {"family", "spec", "layer", "mask_rule"}; width and vocab are their sums."""

    first: str
    second: str

    def __post_init__(self) -> None:
        super().__post_init__()
        halves = self.halves
        expected = {
            "vocab": sum(half.spec.vocab for half in halves),
            "width": sum(half.spec.width for half in halves),
            "layers": max(half.spec.layers for half in halves),
            "window": min(half.spec.window for half in halves),
        }
        found = {name: getattr(self, name) for name in expected}
        if found != expected:
            raise BridgeError("The sizes of this dual tower do not fit together.", found, expected, _AGAIN)

    @property
    def halves(self) -> tuple[Half, Half]:
        """The two towers."""
        return Half.from_json(self.first), Half.from_json(self.second)


@dataclass(frozen=True)
class Half:
    """One of the two towers: family, sizes, layer whose states are used, mask rule."""

    family: str
    spec: EncoderSpec
    layer: int = -1
    mask_rule: str = "pad"

    def to_json(self) -> str:
        """The half as it stands in the spec."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True)

    @staticmethod
    def from_json(text: str) -> Half:
        """Read a half; BridgeError when it is damaged."""
        what = "The sizes (spec) of a half of this dual tower are damaged."
        fields = guard.parse_json(text, what)
        family, spec = fields.get("family"), fields.get("spec")
        layer, mask_rule = fields.get("layer"), fields.get("mask_rule")
        if (
            set(fields) != {"family", "spec", "layer", "mask_rule"}
            or not (isinstance(family, str) and isinstance(spec, dict))
            or not (type(layer) is int and isinstance(mask_rule, str))
            or family == Dual.family
            or family not in families()
        ):
            raise BridgeError(
                what, f"{text:.200}", "family, spec, layer and mask_rule of a known single tower", _AGAIN
            )
        parsed = parse_spec(
            families()[family].Spec, cast("dict[str, object]", spec), f"text tower of family {family!r}"
        )
        return Half(family, parsed, layer, mask_rule)


class Dual(Encoder, family="dual"):
    """Two towers: states = [first, second], pooled = [first, second] of those that have a pooled vector.

    `layer` must be -1, each half has its own; so has the mask rule: a half hides its own padding or does not,
    and the mask of the whole is True where either half has a token.
    """

    Spec = DualSpec

    first: Encoder
    second: Encoder
    _texts: tuple[bytes, bytes] | None = None

    def read_tokenizer(self) -> None:
        """Take both tokenizers apart; BridgeError when there are not two, or on a layer of the whole."""
        if self.layer != -1:
            raise BridgeError(
                "A dual tower has no layers of its own.", f"layer {self.layer}", "layer -1", _AGAIN
            )
        self._texts = _both_tokenizers(self.tokenizer_json)

    def build(self, spec: EncoderSpec, layers: Layers) -> None:
        """Make both towers, and give them their tokenizers when this tower has them."""
        assert isinstance(spec, DualSpec)
        towers: list[Encoder] = []
        for number, half in enumerate(spec.halves):
            tower = families()[half.family].bare(half.spec, layers)
            if self._texts is not None:
                tower.settle(
                    half.spec,
                    self._texts[number],
                    identity=self.identity,
                    window=self.window,
                    layer=half.layer,
                    mask_rule=half.mask_rule,
                )
            towers.append(tower)
        self.first, self.second = towers

    @property
    def pooled_width(self) -> int:
        """Sum of the pooled widths of both."""
        return self.first.pooled_width + self.second.pooled_width

    @property
    def vocabulary_size(self) -> int:
        """Number of pairs, "nothing" counted on either side."""
        return (self.first.vocabulary_size + 1) * self._base

    @property
    def capacity(self) -> int:
        """Pairs that surely fit beside the special tokens of both."""
        return min(self.first.capacity, self.second.capacity)

    @property
    def _base(self) -> int:
        return self.second.vocabulary_size + 1

    def tokenize(self, text: str) -> list[Piece]:
        """Cut `text` with both tokenizers and pair the pieces that overlap; ids are pairs."""
        firsts, seconds = self.first.tokenize(text), self.second.tokenize(text)
        nothing = self.first.vocabulary_size, self.second.vocabulary_size
        paired: list[Piece] = []
        here = there = 0
        while here < len(firsts) or there < len(seconds):
            one = firsts[here] if here < len(firsts) else None
            other = seconds[there] if there < len(seconds) else None
            if one is not None and other is not None:
                if max(one.start, other.start) < min(one.end, other.end) or one.start == other.start:
                    pass
                elif (one.start, one.end) < (other.start, other.end):
                    other = None
                else:
                    one = None
            here, there = here + (one is not None), there + (other is not None)
            both = [piece for piece in (one, other) if piece is not None]
            number = (nothing[0] if one is None else one.id) * self._base
            number += nothing[1] if other is None else other.id
            paired.append(Piece(number, min(p.start for p in both), max(p.end for p in both)))
        return paired

    def is_unknown(self, number: int) -> bool:
        """Whether either half has no token for the text of a pair."""
        return self.first.is_unknown(number // self._base) or self.second.is_unknown(number % self._base)

    def frame(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Frame both sides, each without its "nothing": ids [window] of pairs, mask [window] of either."""
        if len(ids) > self.capacity:
            raise too_long(len(ids), self.capacity)
        sides = ([number // self._base for number in ids], [number % self._base for number in ids])
        towers = (self.first, self.second)
        framed = [
            tower.frame([number for number in side if number != tower.vocabulary_size])
            for tower, side in zip(towers, sides, strict=True)
        ]
        (first, first_mask), (second, second_mask) = framed
        return first * self._base + second, first_mask | second_mask

    def mask_of(self, ids: Tensor) -> Tensor:
        """The mask [B, T] bool of framed pairs [B, T]: True where either half has a token."""
        first, second = ids // self._base, ids % self._base
        return self.first.mask_of(first) | self.second.mask_of(second)

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read pairs [B, T] under mask [B, T] bool: states [B, T, D1 + D2], pooled [B, P1 + P2] or None."""
        mask = mask.bool()
        hidden: list[Hidden] = []
        for tower, side in ((self.first, ids // self._base), (self.second, ids % self._base)):
            hidden.append(tower(side, tower.mask_of(side) & mask))
        states = torch.cat([one.states for one in hidden], dim=-1)
        pooled = [one.pooled for one in hidden if one.pooled is not None]
        return Hidden(states, mask, torch.cat(pooled, dim=-1) if pooled else None)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start both as their families do."""
        self.first.reset_parameters(generator)
        self.second.reset_parameters(generator)

    @classmethod
    def tokenizer_from(cls, files: Mapping[str, bytes]) -> bytes:
        """Nothing is published as a dual tower: always BridgeError."""
        raise BridgeError(
            "A dual tower is not made from one model's files.",
            ", ".join(sorted(files)) or "no tokenizer files",
            "two text towers",
            "Convert the files of both towers together.",
        )


def join(first: Encoder, second: Encoder, *, identity: str, window: int) -> Dual:
    """Put two towers side by side in one `window`; the weights are shared with them, not copied."""
    halves = [Half(tower.family, tower.spec, tower.layer, tower.mask_rule) for tower in (first, second)]
    spec = DualSpec(
        vocab=first.spec.vocab + second.spec.vocab,
        width=first.width + second.width,
        layers=max(first.spec.layers, second.spec.layers),
        window=min(first.spec.window, second.spec.window),
        first=halves[0].to_json(),
        second=halves[1].to_json(),
    )
    texts = {"first": first.tokenizer_json.decode("utf-8"), "second": second.tokenizer_json.decode("utf-8")}
    tokenizers = json.dumps(texts, sort_keys=True, ensure_ascii=False).encode("utf-8")
    joined = Dual(spec, tokenizers, identity=identity, window=window, device="meta")
    for tower, given in ((joined.first, first), (joined.second, second)):
        tower.load_state_dict(given.state_dict(), assign=True)
    return joined


def _both_tokenizers(tokenizer_json: bytes) -> tuple[bytes, bytes]:
    fields = guard.parse_json(tokenizer_json, "The text tower's tokenizer cannot be used.")
    first, second = fields.get("first"), fields.get("second")
    if set(fields) != {"first", "second"} or not isinstance(first, str) or not isinstance(second, str):
        raise BridgeError(
            "The text tower's tokenizer cannot be used.",
            f"fields {sorted(fields)[:8]}",
            "the tokenizers of both towers, first and second",
            "The file is damaged or does not belong to this tower; fetch or save it again.",
        )
    return first.encode("utf-8"), second.encode("utf-8")
