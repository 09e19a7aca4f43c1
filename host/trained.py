"""A trained bridge in memory, and its way into models/language_bridges."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import folder_paths
import torch
from torch import Tensor

from ..bridges.base import Bridge
from ..bridges.errors import BridgeError
from ..bridges.file import BridgeHeader, EncoderRef, save_bridge
from ..encoders.base import Encoder
from . import folders
from .base import NAMES
from .bridging import TEMPLATE

_NAME = re.compile(r"[^\W_][\w \-.()+]{0,63}")
_RESERVED = {"con", "prn", "aux", "nul"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in range(10)
}
_MEBI = 1 << 20


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained bridge in memory, ready to be saved or trained further; everything is on the CPU.

    encoder: its own tower, where that has learnt. unet: weights for the U-Net in a form of `how`, or those of
    a branch. training: the record of how it came about.
    """

    bridge: Bridge
    encoder: Encoder | None
    reference: EncoderRef
    base: str
    languages: tuple[str, ...]
    unet: Mapping[str, Tensor]
    part: str
    training: Mapping[str, object]
    run: str

    def header(self, name: str) -> BridgeHeader:
        """What its file says of it."""
        reference = self.reference
        if self.encoder is not None:
            reference = dataclasses.replace(reference, identity=f"{name}-tower", digest="")
        return BridgeHeader(
            kind=self.bridge.kind,
            spec=dataclasses.asdict(self.bridge.spec),
            base=self.base,
            encoder=reference,
            languages=self.languages,
            unet=self.part,
            training=self.training,
            source=f"trained with Language Bridge, run {self.run}",
            name=name,
        )


def check_name(name: str, what: str) -> str:
    """A name that is a file's or a folder's and nothing else, without spaces around; else BridgeError."""
    plain = name.strip()
    fits = _NAME.fullmatch(plain) and not plain.endswith((".", " ")) and ".." not in plain
    if not fits or plain.split(".")[0].lower() in _RESERVED:
        raise BridgeError(
            f"This cannot be the name of a {what}.",
            repr(name)[:80],
            "letters, digits, spaces and - _ . ( ) +, at most 64, beginning with a letter or a digit",
            "Choose another name.",
        )
    return plain


def save(trained: Trained, name: str, *, overwrite: bool = False, half: bool = True) -> Path:
    """Write a trained bridge into models/language_bridges; BridgeError when that name is taken.

    half: weights in float16, as bridges are usually shared; else in float32.
    """
    plain = check_name(name.removesuffix(folders.SUFFIX), "bridge")
    path = Path(folder_paths.get_folder_paths(folders.FOLDER)[0]) / f"{plain}{folders.SUFFIX}"
    if path.exists() and not overwrite:
        raise BridgeError(
            f"There is a bridge called {path.name} already.",
            "a file of that name in models/language_bridges",
            "a name that is free, or overwrite switched on",
            "Choose another name, or switch overwrite on.",
        )
    with torch.inference_mode(False), torch.no_grad():
        encoder = None
        if trained.encoder is not None:
            encoder = copy.deepcopy(trained.encoder)
            encoder.identity = f"{plain}-tower"
        dtype = torch.float16 if half else torch.float32
        save_bridge(
            path, trained.header(plain), trained.bridge, encoder, unet=trained.unet or None, dtype=dtype
        )
    return path


def about(trained: Trained, path: Path) -> str:
    """A few lines on a bridge that was saved."""
    header = trained.header(path.stem)
    lines = [
        f"{path.name}: {path.stat().st_size / _MEBI:.1f} MiB",
        f"kind {header.kind}, for {NAMES[header.base]}, languages {', '.join(header.languages) or 'unknown'}",
        f"text tower: {header.encoder.identity}"
        + (" (inside the file)" if trained.encoder is not None else ""),
        f"part for the U-Net: {header.unet}",
        f"objective {trained.training.get('objective')}, {trained.training.get('steps')} steps",
    ]
    return "\n".join(lines)


def template_in(record: Mapping[str, object]) -> tuple[str, str]:
    """Texts that a method puts before and after a prompt, by its training record."""
    known = record.get(TEMPLATE)
    texts = cast("Mapping[str, object]", known) if isinstance(known, Mapping) else {}
    return str(texts.get("before", "")), str(texts.get("after", ""))


def at_rest(module: Any) -> Any:
    """A copy on the CPU that does not learn; float32."""
    with torch.inference_mode(False):
        return copy.deepcopy(module).to("cpu", torch.float32).requires_grad_(False).eval()
