"""What every text tower is: pieces of text, the base class, and the registry of families."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..bridges.base import Hidden, Ops, import_folder, parse_spec, register, require_sizes
from ..bridges.errors import BridgeError
from . import guard
from .vocabulary import open_tokenizer, pieces, unknown_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MASK_RULES = ("pad", "none")
STANDARD_DEVIATION = 0.02  # initializer_range of most published configurations

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, object]


@dataclass(frozen=True)
class Piece:
    """One token of a text: its id and the characters [start, end) of the text that it stands for."""

    id: int
    start: int
    end: int


@dataclass(frozen=True)
class Marks:
    """Special tokens of one window: ids before the text, ids after it, and the id that fills the rest."""

    start: tuple[int, ...]
    end: tuple[int, ...]
    padding: int


@dataclass(frozen=True)
class Origin:
    """Where one of our tensors lies in a published file: part `part` of `parts` equal ones along the first
    axis, `turned` when the file stores [in, out] instead of [out, in]."""

    name: str
    part: int = 0
    parts: int = 1
    turned: bool = False

    def shape(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Shape of our tensor, or None when the file does not have it."""
        shape = shapes.get(self.name)
        if shape is None or not shape or shape[0] % self.parts:
            return None
        shape = (shape[0] // self.parts, *shape[1:])
        return shape[::-1] if self.turned else shape

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensor, as a view of the file's."""
        tensor = tensors[self.name]
        if self.parts > 1:
            tensor = tensor.chunk(self.parts)[self.part]
        return tensor.T if self.turned else tensor


@dataclass(frozen=True)
class Layers:
    """Makes layers where and how the caller wants them."""

    ops: Ops
    device: torch.device | str | None
    dtype: torch.dtype | None

    @property
    def wide(self) -> torch.dtype | None:
        """The dtype of all but linear layers: a tower stored in 8 bits computes in float16."""
        return guard.wide(self.dtype)

    def linear(self, width_in: int, width_out: int, *, bias: bool = True) -> nn.Module:
        """A linear layer."""
        return self.ops.Linear(width_in, width_out, bias=bias, device=self.device, dtype=self.dtype)

    def norm(self, width: int, eps: float) -> nn.Module:
        """A LayerNorm with scale and shift."""
        return self.ops.LayerNorm(width, eps=eps, device=self.device, dtype=self.wide)

    def scale(self, width: int, eps: float) -> RootMeanSquareNorm:
        """A root-mean-square norm with scale."""
        return RootMeanSquareNorm(width, eps, self)

    def embedding(self, rows: int, width: int) -> nn.Module:
        """A table of `rows` vectors."""
        return self.ops.Embedding(rows, width, device=self.device, dtype=self.wide)


class RootMeanSquareNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the mean in float32 (Zhang and Sennrich 2019); T5, Llama."""

    def __init__(self, width: int, eps: float, layers: Layers) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=layers.device, dtype=layers.wide))

    def forward(self, states: Tensor) -> Tensor:
        """states [..., width] -> the same shape and dtype; the scale is moved to wherever the states are."""
        wide = states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(states) * wide.to(states.dtype)


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

    A family writes `build` (its layers), `find_marks` (its special tokens) and `forward`; for published files
    also `measure`, `origins` and `tokenizer_from`.
    """

    family: ClassVar[str]
    Spec: ClassVar[type[EncoderSpec]] = EncoderSpec

    spec: EncoderSpec
    tokenizer_json: bytes
    marks: Marks
    _tokenizer: Tokenizer

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
        self.settle(spec, tokenizer_json, identity=identity, window=window, layer=layer, mask_rule=mask_rule)
        self.build(spec, Layers(ops, device, dtype))

    def settle(
        self,
        spec: EncoderSpec,
        tokenizer_json: bytes,
        *,
        identity: str,
        window: int,
        layer: int,
        mask_rule: str,
    ) -> None:
        """Keep everything but the layers, after checking it; BridgeError on odd arguments."""
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
        self.read_tokenizer()

    def read_tokenizer(self) -> None:
        """Open `tokenizer_json` and find the special tokens; BridgeError when it does not fit the tower."""
        self._tokenizer, filler = open_tokenizer(self.tokenizer_json, self.spec.vocab)
        self.marks = self.find_marks(self._tokenizer, filler)

    def find_marks(self, tokenizer: Tokenizer, filler: int | None) -> Marks:
        """Say which special tokens frame a text; `filler` is the padding id that the JSON itself names.

        BridgeError when the tokenizer lacks one of them.
        """
        raise NotImplementedError

    def build(self, spec: EncoderSpec, layers: Layers) -> None:
        """Make the layers of `spec` as attributes."""
        raise NotImplementedError

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
        return self.window - len(self.marks.start) - len(self.marks.end)

    def tokenize(self, text: str) -> list[Piece]:
        """Cut `text` into pieces, without special tokens and without a limit on their number.

        Pieces of one character cut into bytes all have that character's place; the space that SentencePiece
        puts before a text has the place of the first character.
        """
        return [Piece(*piece) for piece in pieces(self._tokenizer, text)]

    def is_unknown(self, number: int) -> bool:
        """Whether a token id stands for text that the vocabulary does not have."""
        return number == self._unknown

    @cached_property
    def _unknown(self) -> int | None:
        # Asked for by few, and costs as much as a tenth of a load.
        return unknown_id(self.tokenizer_json)

    def frame(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Add special tokens and padding: ids [window] int64, mask [window] bool (True = not padding).

        BridgeError when there are more than `capacity` ids.
        """
        if len(ids) > self.capacity:
            raise too_long(len(ids), self.capacity)
        marks = self.marks
        spoken = [*marks.start, *ids, *marks.end]
        filled = [*spoken, *[marks.padding] * (self.window - len(spoken))]
        return torch.tensor(filled, dtype=torch.int64), torch.arange(self.window) < len(spoken)

    def mask_of(self, ids: Tensor) -> Tensor:
        """The mask [B, T] bool of framed ids [B, T]: False from the padding at the end of each row on."""
        marks = self.marks
        later = (ids != marks.padding).flip(-1).long().cumsum(-1).flip(-1)
        count = (later > 0).sum(-1, keepdim=True)
        if marks.end and marks.end[-1] == marks.padding:  # the first of the equal ids is the end itself
            count = count + 1
        return torch.arange(ids.shape[-1], device=ids.device) < count

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read ids [B, T] int64 under mask [B, T] bool: states [B, T, D], pooled [B, P]."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Give every parameter the family's usual random start; only training asks for this.

        By default matrices are normal with deviation 0.02, biases zero, norms one.
        """
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, RootMeanSquareNorm)):
                nn.init.ones_(module.weight)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=STANDARD_DEVIATION, generator=generator)
            bias = cast("Tensor | None", getattr(module, "bias", None))
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)

    @classmethod
    def recognise(cls, shapes: Shapes, config: Config) -> EncoderSpec | None:
        """Say which tower of this family lies in a published file, or None when none (whole) does.

        `shapes` are all tensors of the file under their published names; others than the tower's may be
        among them. `config` is the parsed config.json, empty when there is none. BridgeError when the file
        holds several such towers, or one that this version would compute wrongly.
        """
        try:
            spec = cls.measure(shapes, config)
        except (IndexError, ZeroDivisionError):  # a tensor with fewer axes than the layout's, or with none
            return None
        if spec is None:
            return None
        origins = cls.origins(spec, shapes)
        expected = cls.own_shapes(spec)
        whole = all(origins[key].shape(shapes) == shape for key, shape in expected.items())
        return spec if whole else None

    @classmethod
    def adopt(cls, tensors: Mapping[str, Tensor], spec: EncoderSpec) -> dict[str, Tensor]:
        """Take the tower's tensors from a published file under our names, turned and split where needed.

        Tensors are views; those that are not the tower's are never touched. BridgeError when one is missing
        or of another shape than `spec` says.
        """
        origins = cls.origins(spec, tensors)
        expected = cls.own_shapes(spec)
        missing = sorted({origins[key].name for key in expected if origins[key].name not in tensors})
        if missing:
            raise BridgeError(
                f"The text tower of family {cls.family!r} in this file is not whole.",
                f"missing: {', '.join(missing[:8])}"
                + (f" and {len(missing) - 8} more" if missing[8:] else ""),
                f"{len(expected)} tensors",
                "Fetch the file again, or take the file that its authors published.",
            )
        adopted = {key: origins[key].take(tensors) for key in expected}
        for key, tensor in adopted.items():
            if tuple(tensor.shape) != expected[key]:
                raise BridgeError(
                    f"The text tower of family {cls.family!r} in this file has an odd tensor.",
                    f"{origins[key].name} {list(tensors[origins[key].name].shape)}",
                    f"{key} {list(expected[key])}",
                    "Fetch the file again, or take the file that its authors published.",
                )
        return adopted

    @classmethod
    def tokenizer_from(cls, files: Mapping[str, bytes]) -> bytes:
        """Build our tokenizer JSON from published files by bare name; BridgeError naming what is missing."""
        raise NotImplementedError

    @classmethod
    def measure(cls, shapes: Shapes, config: Config) -> EncoderSpec | None:
        """Read the sizes off a published file, or None when it cannot be of this family."""
        return None

    @classmethod
    def origins(cls, spec: EncoderSpec, names: Iterable[str]) -> dict[str, Origin]:
        """Where each tensor of our state dict lies in a published file with these tensor names."""
        raise NotImplementedError

    @classmethod
    def bare(cls, spec: EncoderSpec, layers: Layers) -> Encoder:
        """A tower that has its layers and nothing else yet."""
        tower = cls.__new__(cls)
        nn.Module.__init__(tower)
        tower.build(spec, layers)
        return tower

    @classmethod
    def own_shapes(cls, spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
        """Shapes of our state dict by key; no memory is taken."""
        state = cast("dict[str, Tensor]", cls.bare(spec, Layers(torch.nn, "meta", None)).state_dict())
        return {key: tuple(value.shape) for key, value in state.items()}

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
    tower, spec = _family(family, spec)
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


def encoder_shapes(family: str, spec: Mapping[str, object] | EncoderSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a tower by key; no memory is taken. BridgeError on an odd family or spec."""
    tower, spec = _family(family, spec)
    return tower.own_shapes(spec)


def _family(family: str, spec: Mapping[str, object] | EncoderSpec) -> tuple[type[Encoder], EncoderSpec]:
    known = _FAMILIES if family in _FAMILIES else families()
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
    return tower, spec


def identify_encoder(shapes: Shapes, config: Config) -> tuple[type[Encoder], EncoderSpec]:
    """Ask every family whether a published file holds its tower; exactly one must say yes, or BridgeError."""
    claims: list[tuple[type[Encoder], EncoderSpec]] = []
    for tower in families().values():
        spec = tower.recognise(shapes, config)
        if spec is not None:
            claims.append((tower, spec))
    if len(claims) != 1:
        seen = ", ".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items())[:12])
        raise BridgeError(
            "The file does not hold one text tower that Language Bridge knows.",
            f"claimed by {[tower.family for tower, _ in claims] or 'nobody'}; {len(shapes)} tensors: {seen}",
            f"a whole tower of exactly one of {', '.join(families())}",
            "Choose the text encoder's file as its authors published it, with its config.json beside it.",
        )
    return claims[0]


def find_stem(names: Iterable[str], marker: str, also: str = "") -> str | None:
    """The part of a tensor name before `marker`, the one that a tower has once; None when nothing fits.

    With `also`, a stem counts only if stem + `also` is a name as well. BridgeError when several stems fit.
    """
    known = set(names)
    found = {name[: -len(marker)] for name in known if name.endswith(marker)}
    stems = sorted(
        stem for stem in found if (not stem or stem.endswith(".")) and (not also or stem + also in known)
    )
    if len(stems) > 1:
        raise BridgeError(
            "The file holds several text towers of one kind.",
            ", ".join(f"{stem}{marker}" for stem in stems[:6]),
            f"one tensor that ends with {marker}",
            "Take the text encoder's own file, as its authors published it.",
        )
    return stems[0] if stems else None


def count_layers(names: Iterable[str], stem: str) -> int:
    """How many different numbers follow `stem` in the names."""
    rests = (name[len(stem) :].split(".", 1)[0] for name in names if name.startswith(stem))
    return len({rest for rest in rests if rest.isdecimal()})


PARTS_OF_CONFIGS = ("text_config", "qllama_config", "llm_config")


def setting(config: Config, *names: str) -> object:
    """The first of these settings in a config.json or in its text part; None when it has none of them."""
    places = [config.get(part) for part in PARTS_OF_CONFIGS]
    texts = [cast("dict[str, object]", place) for place in places if isinstance(place, dict)]
    for place in (*texts, config):
        for name in names:
            if place.get(name) is not None:
                return place[name]
    return None


def whole_setting(config: Config, *names: str, default: int) -> int:
    """A whole number from a config.json, or `default`."""
    value = setting(config, *names)
    return value if type(value) is int else default


def real_setting(config: Config, *names: str, default: float) -> float:
    """A number from a config.json, or `default`."""
    value = setting(config, *names)
    return float(value) if type(value) in (int, float) else default  # pyright: ignore[reportArgumentType]


def marker_id(tokenizer: Tokenizer, *names: str) -> int:
    """Id of the first of these special tokens that the tokenizer has; BridgeError when it has none."""
    for name in names:
        number = tokenizer.token_to_id(name)
        if number is not None:
            return number
    raise BridgeError(
        "The text tower's tokenizer cannot be used.",
        f"no {' or '.join(names)}",
        "a tokenizer with the special tokens of this family",
        "The file is damaged or does not belong to this tower; fetch or save it again.",
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
