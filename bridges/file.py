"""Bridge files: one safetensors file that says what it is, with the bridge and all that belongs to it.

metadata  language_bridge            JSON, see BridgeHeader
          language_bridge_encoder    JSON of the tower, when the file holds one
tensors   bridge.*                   the bridge
          encoder.*, tokenizer       a tower that was itself trained (see encoders.file)
          unet.*                     cross-attention weights, when the method changes them; or a branch
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..encoders import guard
from ..encoders.base import Encoder
from ..encoders.file import METADATA_KEY as ENCODER_METADATA_KEY
from ..encoders.file import PREFIX as ENCODER_PREFIX
from ..encoders.file import TOKENIZER, EncoderHeader, pack_encoder, unpack_encoder
from ..encoders.ledger import Ledger
from .base import Bridge, Ops, create, kind_class, parse_spec
from .errors import BridgeError

if TYPE_CHECKING:
    from _typeshed import StrPath

FORMAT = 1
METADATA_KEY = "language_bridge"
PREFIX = "bridge."
UNET_PREFIX = "unet."
BASES = ("sd1", "sd2", "sdxl", "pocket")
BRANCH = "branch"
"""U-Net part of a bridge whose context is for a network beside the U-Net, which the file holds."""
UNET_PARTS = ("none", "kv", "attn2", "full", BRANCH)

_OWNER = "bridge"


@dataclass(frozen=True)
class EncoderRef:
    """The text tower that a bridge reads, and how it reads it.

    digest: the SHA-256 of the tower's own header; empty where the bridge takes any tower of that identity.
    """

    family: str
    identity: str
    layer: int
    window: int
    mask_rule: str
    digest: str = ""

    def differs(self, tower: EncoderHeader) -> str | None:
        """Where a tower is not the one meant, as "found, expected"; None when it is the one."""
        for name in ("family", "identity", "layer", "window", "mask_rule", "digest"):
            found, expected = getattr(tower, name), getattr(self, name)
            if found != expected and not (name == "digest" and not expected):
                return f"{name} {found!r} against {expected!r}"
        return None


@dataclass(frozen=True, kw_only=True)
class BridgeHeader:
    """What a bridge file says about itself; `training` is the provenance, any JSON object."""

    format: int = FORMAT
    kind: str
    spec: Mapping[str, object]
    base: str
    encoder: EncoderRef
    languages: tuple[str, ...] = ()
    unet: str = "none"
    training: Mapping[str, object] = field(default_factory=lambda: dict[str, object]())
    licence: str = ""
    source: str = ""
    name: str = ""

    def to_json(self) -> str:
        """The header as it stands in the file; BridgeError when `training` is not JSON."""
        try:
            return json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BridgeError(
                "The header of the bridge cannot be written.",
                error,
                "texts, numbers, lists and objects only",
                "Mend the header's spec or training record.",
            ) from error

    @staticmethod
    def from_json(text: str) -> BridgeHeader:
        """Read a header; BridgeError when it is damaged, unknown or newer than this version."""
        fields = guard.parse_header(text, FORMAT, _OWNER)
        reference = guard.record(fields, "encoder", _OWNER)
        header = BridgeHeader(
            format=guard.field(fields, "format", int, _OWNER),
            kind=guard.field(fields, "kind", str, _OWNER),
            spec=guard.record(fields, "spec", _OWNER),
            base=guard.field(fields, "base", str, _OWNER),
            encoder=parse_spec(EncoderRef, reference, "bridge's encoder reference"),
            languages=guard.texts(fields, "languages", _OWNER),
            unet=guard.field(fields, "unet", str, _OWNER),
            training=guard.record(fields, "training", _OWNER),
            licence=guard.field(fields, "licence", str, _OWNER),
            source=guard.field(fields, "source", str, _OWNER),
            name=guard.field(fields, "name", str, _OWNER),
        )
        header.check()
        return header

    def check(self) -> None:
        """Raise BridgeError unless base and U-Net part are known words."""
        guard.one_of(self.base, BASES, "base", _OWNER)
        guard.one_of(self.unet, UNET_PARTS, "U-Net part", _OWNER)


@dataclass(frozen=True, eq=False)
class LoadedBridge:
    """A bridge file in memory: its header, the bridge, its own tower if it brings one, its U-Net weights."""

    header: BridgeHeader
    bridge: Bridge
    encoder: Encoder | None = None
    unet: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType(dict[str, Tensor]()))


def read_header(path: StrPath) -> BridgeHeader | None:
    """Say which bridge a file holds, reading its header only; None when it holds none of ours.

    BridgeError when the file is damaged or newer than this version.
    """
    text = guard.read_layout(path).metadata.get(METADATA_KEY)
    return None if text is None else BridgeHeader.from_json(text)


def save_bridge(
    path: StrPath,
    header: BridgeHeader,
    bridge: Bridge,
    encoder: Encoder | None = None,
    *,
    unet: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a bridge file in one piece, weights in `dtype` (None = as they are).

    A tower is stored with its own header, which takes languages, licence and source from the bridge's.
    BridgeError when header and contents disagree, a number is not finite, or the disk refuses.
    """
    header.check()
    written = BridgeHeader.from_json(header.to_json())
    told = dataclasses.asdict(bridge.spec)
    # A field that an older version did not know yet stands at its default.
    if header.kind != bridge.kind or _with_defaults(bridge, written.spec) != told:
        raise _disagree(f"{bridge.kind} {bridge.spec}", f"{header.kind} {dict(header.spec)}")
    tensors = guard.stored(bridge, PREFIX, dtype)
    metadata = {METADATA_KEY: header.to_json()}
    if encoder is not None:
        tower, weights = pack_encoder(
            encoder, languages=header.languages, licence=header.licence, source=header.source, dtype=dtype
        )
        _require_same_tower(header.encoder, tower)
        tensors |= weights
        metadata[ENCODER_METADATA_KEY] = tower.to_json()
    if bool(unet) != (header.unet != "none"):
        raise _disagree(f"{len(unet or {})} U-Net tensors", f"U-Net part {header.unet!r}")
    for key, value in (unet or {}).items():
        tensors[UNET_PREFIX + key] = value.detach().to("cpu", dtype or value.dtype).contiguous()
    guard.write(path, tensors, metadata)


def load_bridge(
    path: StrPath,
    *,
    ops: Ops = torch.nn,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    ledger: Ledger | None = None,
) -> LoadedBridge:
    """Build what a bridge file holds, in `dtype` (None = float32); BridgeError when it is not whole.

    With a dtype of 8 bits a tower's linear layers are stored in it; the rest, and the bridge, are float16.
    ledger: what was verified before, which is then neither hashed nor searched for odd numbers again.
    """
    return guard.read_weights(path, ledger, lambda weights: _unpack(weights, ops, device, dtype))


def _unpack(
    weights: guard.Weights, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
) -> LoadedBridge:
    layout = weights.layout
    text = layout.metadata.get(METADATA_KEY)
    if text is None:
        raise BridgeError(
            "The file is not a bridge of Language Bridge.",
            f"no {METADATA_KEY!r} in its header",
            "a bridge file",
            "Choose a bridge file that Language Bridge has saved.",
        )
    header = BridgeHeader.from_json(text)
    spec = parse_spec(kind_class(header.kind).Spec, header.spec, f"bridge of kind {header.kind!r}")
    tower_text = layout.metadata.get(ENCODER_METADATA_KEY)
    tower = None if tower_text is None else EncoderHeader.from_json(tower_text)
    if tower is not None:
        _require_same_tower(header.encoder, tower)

    parts: dict[str, set[str]] = {
        "tower": {name for name in layout.tensors if tower and _is_tower(name)},
        "unet": {name for name in layout.tensors if header.unet != "none" and name.startswith(UNET_PREFIX)},
    }
    own = {name: shape for name, shape in layout.shapes.items() if not any(name in p for p in parts.values())}
    # Shapes come first and from plain layers that hold no memory: a false header must not cost any.
    expected = guard.shapes_of(create(header.kind, spec, device="meta"))
    guard.require_shapes({PREFIX + key: shape for key, shape in expected.items()}, own, _OWNER)
    if header.unet != "none" and not parts["unet"]:
        raise _disagree("no U-Net tensors", f"U-Net part {header.unet!r}")

    encoder = None
    if tower is not None:
        encoder = unpack_encoder(tower, weights, parts["tower"], ops=ops, device=device, dtype=dtype)
    bridge = create(header.kind, spec, ops=ops, device="meta", dtype=guard.wide(dtype))
    guard.fill(bridge, weights, PREFIX, guard.wide(dtype), _OWNER, device=device)
    unet = {name[len(UNET_PREFIX) :]: weights[name] for name in sorted(parts["unet"])}
    weights.settle("" if tower is None else tower.digest)
    return LoadedBridge(header, bridge, encoder, unet)


def _with_defaults(bridge: Bridge, spec: Mapping[str, object]) -> dict[str, object]:
    fields = dataclasses.fields(bridge.Spec)
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return {**defaults, **spec}


def _is_tower(name: str) -> bool:
    return name == TOKENIZER or name.startswith(ENCODER_PREFIX)


def _require_same_tower(reference: EncoderRef, tower: EncoderHeader) -> None:
    difference = reference.differs(tower)
    if difference is not None:
        raise _disagree(f"tower {tower.identity!r} with {difference}", f"tower {reference}")


def _disagree(found: str, expected: str) -> BridgeError:
    return BridgeError(
        "The header of the bridge file and its contents disagree.",
        found,
        expected,
        "Write a header that fits, or fetch or save the file again.",
    )
