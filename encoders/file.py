"""Tower files: one safetensors file with weights, tokenizer and a header that says what it is.

    metadata  language_bridge_encoder   JSON, see EncoderHeader
    tensors   encoder.*                 the weights
              tokenizer                 uint8, the UTF-8 bytes of tokenizer.json

The same three may live inside a bridge file, when the bridge comes with a tower that was itself trained.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..bridges.base import Ops
from ..bridges.errors import BridgeError
from . import guard
from .base import Encoder, create_encoder, encoder_shapes

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
) -> Encoder:
    """Build the tower that a file holds, in `dtype` (None = float32); BridgeError when it is not whole."""
    layout = guard.read_layout(path)
    text = layout.metadata.get(METADATA_KEY)
    if text is None:
        raise BridgeError(
            "The file is not a text tower of Language Bridge.",
            f"no {METADATA_KEY!r} in its header",
            "a tower file",
            "Choose a text tower that Language Bridge has saved.",
        )
    header = EncoderHeader.from_json(text)
    return unpack_encoder(header, guard.read_tensors(path, layout), ops=ops, device=device, dtype=dtype)


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
    tensors: Mapping[str, Tensor],
    *,
    ops: Ops = torch.nn,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Encoder:
    """Build a tower from a header and its tensors; BridgeError when they do not belong together."""
    tokenizer = tensors.get(TOKENIZER)
    if (
        tokenizer is None
        or tokenizer.dtype != torch.uint8
        or not 0 < tokenizer.numel() <= LARGEST_TOKENIZER_BYTES
    ):
        raise BridgeError(
            "The text tower comes without a usable tokenizer.",
            "no tensor 'tokenizer'" if tokenizer is None else f"{tokenizer.numel()} x {tokenizer.dtype}",
            f"tensor 'tokenizer', uint8, at most {LARGEST_TOKENIZER_BYTES} bytes",
            "Fetch or save the file again.",
        )

    # Shapes come first and from plain layers that hold no memory: a false header must not cost any.
    shapes = encoder_shapes(header.family, header.spec)
    expected = {PREFIX + key: shape for key, shape in shapes.items()}
    expected[TOKENIZER] = tuple(tokenizer.shape)
    guard.require_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, _OWNER)
    with ThreadPoolExecutor(1) as beside:  # hashing waits for nobody and lets other threads work
        hashing = beside.submit(guard.digest, tensors)
        encoder = create_encoder(
            header.family,
            header.spec,
            tokenizer.numpy().tobytes(),
            identity=header.identity,
            window=header.window,
            layer=header.layer,
            mask_rule=header.mask_rule,
            ops=ops,
            device=device,
            dtype=dtype,
        )
        guard.fill(encoder, tensors, PREFIX, dtype, _OWNER)
        found = hashing.result()
    if found != header.digest:
        raise BridgeError(
            "The text tower is not the one that its header was written for.",
            f"digest {found}",
            f"digest {header.digest}",
            "Fetch or save the file again.",
        )
    return encoder
