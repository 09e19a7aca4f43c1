"""What every bridge is: the values that go in and come out, the base class, and the registry of kinds."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from .errors import BridgeError

TIMESTEPS = 1000  # denoising steps that SD1.x, SD2.x and SDXL were trained with
DEEPEST = 32  # no spec may ask for more layers in a row; keeps a hostile header from asking for millions
LARGEST_SIZE = 1 << 24  # no size in a spec may be larger; keeps a hostile header from asking for terabytes

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Hidden:
    """What a text tower says: states [B, T, D] float, mask [B, T] bool (True = real token), pooled [B, P]."""

    states: Tensor
    mask: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Cond:
    """What a checkpoint listens to: context [B, N, C] and, for SDXL, pooled [B, P]."""

    context: Tensor
    pooled: Tensor | None = None


class Ops(Protocol):
    """Where layers come from: `torch.nn`, or a class of the host's that casts and offloads weights."""

    @property
    def Linear(self) -> Callable[..., nn.Module]: ...

    @property
    def LayerNorm(self) -> Callable[..., nn.Module]: ...

    @property
    def Embedding(self) -> Callable[..., nn.Module]: ...

    @property
    def Conv2d(self) -> Callable[..., nn.Module]: ...


@dataclass(frozen=True, kw_only=True)
class BridgeSpec:
    """Sizes of a bridge: tower width `hidden`, checkpoint width `context`, pooled width (0 = none)."""

    hidden: int
    context: int
    pooled: int = 0

    def __post_init__(self) -> None:
        require_sizes(self, hidden=1, context=1, pooled=0)


class Bridge(nn.Module):
    """A trainable map `Hidden` (+ timestep) -> `Cond`; declared as `class Mlp(Bridge, kind="mlp")`."""

    kind: ClassVar[str]
    Spec: ClassVar[type[BridgeSpec]] = BridgeSpec
    key_map: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Foreign key prefix -> our key prefix; keys without a matching prefix keep their name."""
    timed: ClassVar[bool] = False
    """Whether the context changes with the denoising step; if so, `forward` must be told the timestep."""
    pools: ClassVar[bool] = True
    """Whether a bridge of this kind can be asked for a pooled vector (`spec.pooled` > 0)."""
    tokenwise: ClassVar[bool] = True
    """Whether row i of the context stands for token i; otherwise rows stand for the text as a whole."""
    hears_padding: ClassVar[bool] = False
    """Whether padding changes the context of real tokens, because the published method has no mask."""
    beside: ClassVar[bool] = False
    """Whether the context is for a network beside the U-Net, and `unet_part` gives that network."""

    spec: BridgeSpec

    def __init_subclass__(cls, *, kind: str | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if kind is not None:
            cls.kind = kind
            register(_KINDS, "kind of bridge", kind, cls)

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.pooled and not self.pools:
            raise BridgeError(
                f"A bridge of kind {self.kind!r} makes no pooled vector.",
                f"pooled {spec.pooled}",
                "pooled 0",
                "Use it for a checkpoint that reads no pooled vector (SD1.x, SD2.x), or take another kind.",
            )
        self.spec = spec

    @property
    def lead(self) -> int:
        """How many rows before a text, start token and template, the bridge drops; 0 = any number will do."""
        return 0

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Map hidden states [B, T, D] to context [B, N, C]; `timestep` [B] only matters to timed kinds."""
        raise NotImplementedError

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> BridgeSpec | None:
        """Return the spec of a foreign file by its tensor shapes, or None when it is not of this kind."""
        return None

    @classmethod
    def part(cls, published: Mapping[str, Value]) -> dict[str, Value]:
        """What of a published file (tensors, or their shapes, by name) is the bridge, under our names.

        A kind whose files hold more than the bridge leaves that out here; whatever is left must be exactly
        the bridge's own.
        """
        own = {cls.own_key(key): value for key, value in published.items()}
        return own if len(own) == len(published) else dict(published)  # two names for one tensor fit nowhere

    @classmethod
    def adopt(cls, tensors: Mapping[str, Tensor], spec: BridgeSpec) -> dict[str, Tensor]:
        """The state dict of a bridge of `spec` out of a published file; BridgeError when it does not fit.

        Only the bridge's own tensors are looked up, so `tensors` may read them from the disk one by one.
        """
        own = {name: tensors[key] for name, key in cls.part({key: key for key in tensors}).items()}
        expected, found = cls.shapes(spec), {key: tuple(value.shape) for key, value in own.items()}
        if expected != found:
            odd = sorted(key for key in expected | found if expected.get(key) != found.get(key))
            raise BridgeError(
                f"The published file does not hold a bridge of kind {cls.kind!r} of these sizes.",
                ", ".join(f"{key} {list(found[key]) if key in found else 'missing'}" for key in odd[:8]),
                ", ".join(f"{key} {list(expected[key]) if key in expected else 'none'}" for key in odd[:8]),
                "Fetch the file again, or choose what it really is.",
            )
        return own

    @classmethod
    def unet_part(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a published bridge file belongs into the U-Net, under LDM's names relative to the U-Net."""
        return {}

    @classmethod
    def shapes(cls, spec: BridgeSpec) -> dict[str, tuple[int, ...]]:
        """Shapes of the state dict of a bridge of `spec`; BridgeError when there is no such bridge."""
        state = typing.cast("dict[str, Tensor]", cls(spec, device="meta").state_dict())
        return {key: tuple(value.shape) for key, value in state.items()}

    @classmethod
    def exact(cls, own: Mapping[str, tuple[int, ...]], **sizes: int | bool) -> Any:
        """The spec with `sizes` if a bridge of these has exactly the tensors `own`, else None."""
        try:
            spec = cls.Spec(**sizes)
            return spec if cls.shapes(spec) == dict(own) else None
        except BridgeError:
            return None

    @classmethod
    def own_key(cls, foreign: str) -> str:
        """Translate one key of a published file with `key_map`."""
        for prefix, ours in cls.key_map.items():
            if foreign.startswith(prefix):
                return ours + foreign[len(prefix) :]
        return foreign

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Give every parameter torch's usual starting value (host layers are born uninitialised)."""
        reset_layers(self, generator)

    def check(self, hidden: Hidden) -> None:
        """Raise BridgeError unless `hidden` has the width that this bridge was made for."""
        width = hidden.states.shape[-1]
        if hidden.states.ndim != 3 or width != self.spec.hidden:
            raise BridgeError(
                f"This {self.kind} bridge cannot read what the text tower says.",
                f"hidden states {tuple(hidden.states.shape)}",
                f"[batch, tokens, {self.spec.hidden}]",
                "Use the tower that the bridge file names in its header.",
            )

    def require_tokens(self, mask: Tensor) -> None:
        """Raise BridgeError when a text of `mask` [B, T] has no token that this bridge could read."""
        if not bool(mask.any(dim=1).all()):
            raise BridgeError(
                f"This {self.kind} bridge has nothing to read.",
                f"a text without tokens, of {tuple(mask.shape)} places",
                "at least one token in each text",
                "Use the tower and the window that the bridge file names in its header.",
            )

    def require_timestep(self, timestep: Tensor | None, batch: int) -> Tensor:
        """Return `timestep` [B], each in 0..999; BridgeError unless there is one for each text."""
        found = "none" if timestep is None else f"shape {tuple(timestep.shape)}"
        if timestep is not None and timestep.shape == (batch,):
            low, high = timestep.aminmax()
            found = f"{float(low):g} to {float(high):g}"
            if low >= 0 and high < TIMESTEPS:
                return timestep
        raise BridgeError(
            f"This {self.kind} bridge must know the denoising step.",
            f"timestep {found}",
            f"a timestep for each of {batch} texts, 0 to {TIMESTEPS - 1}",
            "Encode with the nodes of Language Bridge, which repeat the bridge at every step.",
        )


def extent(shapes: Mapping[str, tuple[int, ...]], key: str, axis: int = 0) -> int:
    """Size of one axis of a tensor, or 0 when there is none."""
    shape = shapes.get(key, ())
    return shape[axis] if axis < len(shape) else 0


def kinds() -> Mapping[str, type[Bridge]]:
    """Return every kind of bridge in this folder by name."""
    import_folder(__package__ or "bridges", Path(__file__).parent)
    return MappingProxyType(dict(sorted(_KINDS.items())))


def create(
    kind: str,
    spec: Mapping[str, object] | BridgeSpec,
    *,
    ops: Ops = torch.nn,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Bridge:
    """Build a bridge of `kind`, its weights as `ops` makes them; BridgeError on an unknown kind or spec."""
    bridge = kind_class(kind)
    if not isinstance(spec, BridgeSpec):
        spec = parse_spec(bridge.Spec, spec, f"bridge of kind {kind!r}")
    elif not isinstance(spec, bridge.Spec):
        raise BridgeError(
            f"The spec does not belong to a bridge of kind {kind!r}.",
            type(spec).__qualname__,
            bridge.Spec.__qualname__,
            "Take the spec class from the kind itself: kinds()[kind].Spec.",
        )
    return bridge(spec, ops=ops, device=device, dtype=dtype)


def kind_class(kind: str) -> type[Bridge]:
    """Return the class of `kind`; BridgeError when there is none."""
    known = kinds()
    if kind not in known:
        raise BridgeError(
            "The bridge is of a kind that this version does not know.",
            repr(kind),
            f"one of {', '.join(known)}",
            "Update Language Bridge, or use a file made for this version.",
        )
    return known[kind]


def identify(shapes: Mapping[str, tuple[int, ...]]) -> tuple[type[Bridge], BridgeSpec]:
    """Ask every kind whether a foreign file is its own; exactly one must say yes, or BridgeError."""
    claims: list[tuple[type[Bridge], BridgeSpec]] = []
    for bridge in kinds().values():
        spec = bridge.recognise(shapes)
        if spec is not None:
            claims.append((bridge, spec))
    if len(claims) != 1:
        seen = ", ".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items())[:12])
        raise BridgeError(
            "The file does not look like one published bridge.",
            f"claimed by {[bridge.kind for bridge, _ in claims] or 'nobody'}; {len(shapes)} tensors: {seen}",
            f"the layout of exactly one of {', '.join(kinds())}",
            "Check that this is a bridge (adapter) file and not a whole checkpoint.",
        )
    return claims[0]


# What towers share with bridges: sizes, registries, starting values.

Registered = TypeVar("Registered", bound=type[nn.Module])


@runtime_checkable
class Starting(Protocol):
    """A module that gives its own parameters their starting values."""

    def start(self, generator: torch.Generator | None) -> None: ...


_TYPES: Mapping[type, tuple[type, ...]] = {int: (int,), float: (float, int), bool: (bool,), str: (str,)}


def parse_spec(spec: type[Value], fields: Mapping[str, object], owner: str) -> Value:
    """Build the dataclass `spec` from untrusted `fields`; BridgeError on unknown, missing or odd values."""
    hints = typing.get_type_hints(spec)
    known = {field.name: field for field in dataclasses.fields(typing.cast(Any, spec))}
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if not required <= set(fields) <= set(known):
        raise BridgeError(
            f"The sizes (spec) of the {owner} are not complete.",
            f"fields {sorted(fields)}",
            f"fields {sorted(required)}, optional {sorted(set(known) - required)}",
            "The file is damaged or was made by another version; fetch or save it again.",
        )
    for name, value in fields.items():
        small = not isinstance(value, int) or abs(value) <= LARGEST_SIZE
        if type(value) not in _TYPES.get(hints[name], (hints[name],)) or not small:
            raise BridgeError(
                f"The sizes (spec) of the {owner} are damaged.",
                f"{name} = {value!r:.80}",
                f"{name} of type {hints[name].__name__}, numbers up to {LARGEST_SIZE}",
                "Fetch or save the file again.",
            )
    return spec(**fields)


def require_sizes(spec: object, **least: int) -> None:
    """Raise BridgeError unless each named field of `spec` is a whole number >= its least value."""
    for name, smallest in least.items():
        value = getattr(spec, name)
        if type(value) is not int or not smallest <= value <= LARGEST_SIZE:
            raise BridgeError(
                f"A size in {type(spec).__qualname__} is out of range.",
                f"{name} = {value!r:.80}",
                f"{smallest} <= {name} <= {LARGEST_SIZE}",
                "The file is damaged or was made by another version; fetch or save it again.",
            )


def require_depth(spec: object, *names: str) -> None:
    """Raise BridgeError when one of the named fields of `spec`, a number of layers, is above DEEPEST."""
    for name in names:
        value = getattr(spec, name)
        if value > DEEPEST:
            raise BridgeError(
                f"{type(spec).__qualname__} asks for too many layers.",
                f"{name} = {value}",
                f"{name} <= {DEEPEST}",
                "The file is damaged or was made by another version; fetch or save it again.",
            )


def require_divisible(spec: object, **divisors: int) -> None:
    """Raise BridgeError unless each named field of `spec` is a multiple of its divisor."""
    for name, divisor in divisors.items():
        value = getattr(spec, name)
        if value % divisor:
            raise BridgeError(
                f"A size in {type(spec).__qualname__} does not divide evenly.",
                f"{name} = {value}",
                f"a multiple of {divisor}",
                "The file is damaged or was made by another version; fetch or save it again.",
            )


def register(registry: dict[str, Registered], noun: str, name: str, cls: Registered) -> None:
    """Add `cls` under `name`; BridgeError naming both modules when the name is taken."""
    taken = registry.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise BridgeError(
            f"Two files define the same {noun}.",
            f"{name!r} in {taken.__module__} and in {cls.__module__}",
            f"one file for each {noun}",
            "Rename one of the two.",
        )
    registry[name] = cls


def import_folder(package: str, folder: Path) -> None:
    """Import every module of `folder`, so that the classes in it register themselves."""
    for module in pkgutil.iter_modules([str(folder)]):
        importlib.import_module(f"{package}.{module.name}")


def reset_layers(root: nn.Module, generator: torch.Generator | None = None) -> None:
    """Start linear layers like torch.nn.Linear does, norms at one and zero; other layers are left alone.

    A module that holds parameters of its own starts them in a method `start(generator)`.
    """
    for module in root.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            bias = typing.cast("Tensor | None", module.bias)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound, generator=generator)
    for module in root.modules():
        if isinstance(module, Starting):
            module.start(generator)


_KINDS: dict[str, type[Bridge]] = {}
