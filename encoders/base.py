"""What every text tower is: pieces of text, the base class, and the registry of families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bridges.base import Hidden, Ops, import_folder, parse_spec, register, require_sizes
from ..bridges.errors import BridgeError

MASK_RULES = ("pad", "none")


@dataclass(frozen=True)
class Piece:
    """One token of a text: its id and the characters [start, end) of the text that it stands for."""

    id: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Sizes of a tower: rows of the vocabulary, width of the states, number of layers, longest window."""

    vocab: int
    width: int
    layers: int
    window: int

    def __post_init__(self) -> None:
        require_sizes(self, vocab=1, width=1, layers=0, window=2)


class Encoder(nn.Module):
    """A text tower that carries its own tokenizer; declared as `class Bert(Encoder, family="bert")`.

    `identity` is the tower's name for people, `window` the number of tokens including the special ones,
    `layer` the layer whose states are used (-1 = last, 0 = the embeddings), `mask_rule` says whether
    padding is hidden from the attention ("pad") or not ("none").
    """

    family: ClassVar[str]
    Spec: ClassVar[type[EncoderSpec]] = EncoderSpec

    spec: EncoderSpec
    tokenizer_json: bytes

    def __init_subclass__(cls, *, family: str | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if family is not None:
            cls.family = family
            register(_FAMILIES, "family of towers", family, cls)

    def __init__(
        self,
        spec: EncoderSpec,
        tokenizer_json: bytes,
        *,
        identity: str,
        window: int,
        layer: int = -1,
        mask_rule: str = "pad",
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= window <= spec.window:
            raise _odd("window", window, f"2 to {spec.window} tokens")
        if not -spec.layers - 1 <= layer <= spec.layers:
            raise _odd("layer", layer, f"{-spec.layers - 1} to {spec.layers} (-1 = last)")
        if mask_rule not in MASK_RULES:
            raise _odd("mask rule", mask_rule, " or ".join(MASK_RULES))
        self.spec = spec
        self.tokenizer_json = bytes(tokenizer_json)
        self.identity = identity
        self.window = window
        self.layer = layer
        self.mask_rule = mask_rule

    @property
    def width(self) -> int:
        """Width D of the states."""
        return self.spec.width

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled vector, 0 when the family has none."""
        return self.spec.width

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids that the tower knows."""
        return self.spec.vocab

    @property
    def depth(self) -> int:
        """How many layers are run to reach `layer`."""
        return self.layer if self.layer >= 0 else self.spec.layers + 1 + self.layer

    @property
    def capacity(self) -> int:
        """How many pieces fit into one window beside the special tokens."""
        raise NotImplementedError

    def tokenize(self, text: str) -> list[Piece]:
        """Cut `text` into pieces, without special tokens and without a limit on their number."""
        raise NotImplementedError

    def frame(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Add special tokens and padding: ids [window] int64, mask [window] bool (True = not padding).

        BridgeError when there are more than `capacity` ids.
        """
        raise NotImplementedError

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read ids [B, T] int64 under mask [B, T] bool: states [B, T, D], pooled [B, P]."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Give every parameter the family's usual random start; only training asks for this."""
        raise NotImplementedError

    def batch(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenize and frame texts, each cut off at `capacity` pieces: ids [B, window], mask [B, window]."""
        framed = [self.frame([piece.id for piece in self.tokenize(text)][: self.capacity]) for text in texts]
        return torch.stack([ids for ids, _ in framed]), torch.stack([mask for _, mask in framed])


def families() -> Mapping[str, type[Encoder]]:
    """Return every family of towers in this folder by name."""
    import_folder(__package__ or "encoders", Path(__file__).parent)
    return MappingProxyType(dict(sorted(_FAMILIES.items())))


def create_encoder(
    family: str,
    spec: Mapping[str, object] | EncoderSpec,
    tokenizer_json: bytes,
    *,
    identity: str,
    window: int,
    layer: int = -1,
    mask_rule: str = "pad",
    ops: Ops = torch.nn,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Encoder:
    """Build a tower of `family`; its weights are whatever `ops` makes. BridgeError on odd arguments."""
    known = families()
    if family not in known:
        raise BridgeError(
            "The text tower is of a family that this version does not know.",
            repr(family),
            f"one of {', '.join(known)}",
            "Update Language Bridge, or use a file made for this version.",
        )
    tower = known[family]
    if not isinstance(spec, EncoderSpec):
        spec = parse_spec(tower.Spec, spec, f"text tower of family {family!r}")
    return tower(
        spec,
        tokenizer_json,
        identity=identity,
        window=window,
        layer=layer,
        mask_rule=mask_rule,
        ops=ops,
        device=device,
        dtype=dtype,
    )


def too_long(count: int, capacity: int) -> BridgeError:
    """The error for a frame that is asked to hold more pieces than it can."""
    return BridgeError(
        "The text does not fit into one window of the text tower.",
        f"{count} tokens",
        f"at most {capacity} tokens",
        "Cut the text into several windows first.",
    )


def _odd(name: str, found: object, expected: str) -> BridgeError:
    return BridgeError(
        f"The text tower cannot be built with this {name}.",
        repr(found),
        expected,
        "The file is damaged or was made by another version; fetch or save it again.",
    )


_FAMILIES: dict[str, type[Encoder]] = {}
