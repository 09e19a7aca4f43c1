"""Tower files: one safetensors file with weights, tokenizer and a header that says what it is.

    metadata  language_bridge_encoder   JSON, see EncoderHeader
    tensors   encoder.*                 the weights
              tokenizer                 uint8, the UTF-8 bytes of tokenizer.json

The same three may live inside a bridge file, when the bridge comes with a tower that was itself trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..bridges.base import Ops
from ..bridges.errors import BridgeError
from . import guard
from .base import Encoder, create_encoder, encoder_shapes
from .ledger import Ledger

if TYPE_CHECKING:
    from _typeshed import StrPath

FORMAT = 1
METADATA_KEY = "language_bridge_encoder"
PREFIX = "encoder."
TOKENIZER = "tokenizer"
LARGEST_TOKENIZER_BYTES = 64 << 20

_OWNER = "text tower"


@dataclass(frozen=True, kw_only=True)
class EncoderHeader:
    """What a tower file says about itself; `digest` is the SHA-256 over weights and tokenizer."""

    format: int = FORMAT
    family: str
    identity: str
    spec: Mapping[str, object]
    layer: int
    window: int
    mask_rule: str
    languages: tuple[str, ...] = ()
    licence: str = ""
    source: str = ""
    digest: str = ""

    def to_json(self) -> str:
        """The header as it stands in the file."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True)

    @staticmethod
    def from_json(text: str) -> EncoderHeader:
        """Read a header; BridgeError when it is damaged or newer than this version."""
        fields = guard.parse_header(text, FORMAT, _OWNER)
        return EncoderHeader(
            format=guard.field(fields, "format", int, _OWNER),
            family=guard.field(fields, "family", str, _OWNER),
            identity=guard.field(fields, "identity", str, _OWNER),
            spec=guard.record(fields, "spec", _OWNER),
            layer=guard.field(fields, "layer", int, _OWNER),
            window=guard.field(fields, "window", int, _OWNER),
            mask_rule=guard.field(fields, "mask_rule", str, _OWNER),
            languages=guard.texts(fields, "languages", _OWNER),
            licence=guard.field(fields, "licence", str, _OWNER),
            source=guard.field(fields, "source", str, _OWNER),
            digest=guard.field(fields, "digest", str, _OWNER),
        )


def read_encoder_header(path: StrPath) -> EncoderHeader | None:
    """Say which tower a file holds, reading its header only; None when it holds none of ours."""
    text = guard.read_layout(path).metadata.get(METADATA_KEY)
    return None if text is None else EncoderHeader.from_json(text)


def save_encoder(
    path: StrPath,
    encoder: Encoder,
    *,
    languages: Sequence[str] = (),
    licence: str = "",
    source: str = "",
    dtype: torch.dtype | None = None,
) -> EncoderHeader:
    """Write a tower file, weights in `dtype` (None = as they are), and return its header."""
    header, tensors = pack_encoder(encoder, languages=languages, licence=licence, source=source, dtype=dtype)
    guard.write(path, tensors, {METADATA_KEY: header.to_json()})
    return header


def load_encoder(
    path: StrPath,
    *,
    ops: Ops = torch.nn,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    ledger: Ledger | None = None,
) -> Encoder:
    """Build the tower that a file holds, in `dtype` (None = float32); BridgeError when it is not whole.

    ledger: what was verified before, which is then neither hashed nor searched for odd numbers again.
    """

    def build(weights: guard.Weights) -> Encoder:
        text = weights.layout.metadata.get(METADATA_KEY)
        if text is None:
            raise BridgeError(
                "The file is not a text tower of Language Bridge.",
                f"no {METADATA_KEY!r} in its header",
                "a tower file",
                "Choose a text tower that Language Bridge has saved.",
            )
        header = EncoderHeader.from_json(text)
        encoder = unpack_encoder(header, weights, weights, ops=ops, device=device, dtype=dtype)
        weights.settle(header.digest)
        return encoder

    return guard.read_weights(path, ledger, build)


def pack_encoder(
    encoder: Encoder,
    *,
    languages: Sequence[str] = (),
    licence: str = "",
    source: str = "",
    dtype: torch.dtype | None = None,
) -> tuple[EncoderHeader, dict[str, Tensor]]:
    """Make the header and the tensors of a tower, ready to be written."""
    tensors = guard.stored(encoder, PREFIX, dtype)
    tensors[TOKENIZER] = torch.frombuffer(bytearray(encoder.tokenizer_json), dtype=torch.uint8)
    header = EncoderHeader(
        family=encoder.family,
        identity=encoder.identity,
        spec=dataclasses.asdict(encoder.spec),
        layer=encoder.layer,
        window=encoder.window,
        mask_rule=encoder.mask_rule,
        languages=tuple(languages),
        licence=licence,
        source=source,
        digest=guard.digest(tensors),
    )
    return header, tensors


def unpack_encoder(
    header: EncoderHeader,
    weights: guard.Weights,
    names: Iterable[str],
    *,
    ops: Ops = torch.nn,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Encoder:
    """Build a tower from a header and those tensors of its file that have these names.

    BridgeError when they do not belong together, or when the digest of what was read is not the header's.
    """
    entries = {name: weights.layout.tensors[name] for name in names}
    tokenizer = entries.get(TOKENIZER)
    count = 0 if tokenizer is None else math.prod(tokenizer.shape)
    if tokenizer is None or tokenizer.dtype != "U8" or not 0 < count <= LARGEST_TOKENIZER_BYTES:
        raise BridgeError(
            "The text tower comes without a usable tokenizer.",
            "no tensor 'tokenizer'" if tokenizer is None else f"{count} x {tokenizer.dtype}",
            f"tensor 'tokenizer', U8, at most {LARGEST_TOKENIZER_BYTES} bytes",
            "Fetch or save the file again.",
        )

    text = weights[TOKENIZER]
    # On the meta device, because a false header must not cost memory; the weights take their place as read.
    encoder = create_encoder(
        header.family,
        header.spec,
        text.numpy().tobytes(),
        identity=header.identity,
        window=header.window,
        layer=header.layer,
        mask_rule=header.mask_rule,
        ops=ops,
        device="meta",
        dtype=dtype,
    )
    found = {name: entry.shape for name, entry in entries.items() if name != TOKENIZER}
    if {PREFIX + key: shape for key, shape in guard.shapes_of(encoder).items()} != found:
        # Layers of the host may come without weights, so it is plain layers that decide.
        shapes = encoder_shapes(header.family, header.spec)
        guard.require_shapes({PREFIX + key: shape for key, shape in shapes.items()}, found, _OWNER)
    with guard.Hasher() as hasher:
        hashes = weights.known != header.digest
        seen = hasher.add if hashes else None
        guard.fill(encoder, weights, PREFIX, dtype, _OWNER, device=device, seen=seen)
        if hashes:
            hasher.add(TOKENIZER, text)
            digest = hasher.hexdigest()
            if digest != header.digest:
                raise BridgeError(
                    "The text tower is not the one that its header was written for.",
                    f"digest {digest}",
                    f"digest {header.digest}",
                    "Fetch or save the file again.",
                )
    return encoder
