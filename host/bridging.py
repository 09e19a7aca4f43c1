"""Takes a bridge by name to a bridged CLIP, with every check of the headers before the first weight."""

from __future__ import annotations

from typing import Any

import comfy.ops

from ..bridges.base import Bridge
from ..bridges.errors import BridgeError
from ..bridges.file import BridgeHeader, load_bridge
from ..encoders.base import Encoder
from ..encoders.file import load_encoder
from ..prompt import MODES
from . import folders
from .base import NAMES, Base, base_of
from .clip import BridgedClip, Speech
from .tower import NativeTower, tower_dtype


def bridge_clip(model: Any, clip: Any, name: str, strength: float, route: str) -> BridgedClip:
    """A bridged clone of `clip`.

    name: a bridge of the folders; strength: weight of the native text, > 0; route: one of `prompt.MODES`.
    BridgeError, in words and before sampling, when base, bridge and text tower do not belong together or a
    file is damaged or missing.
    """
    if route not in MODES:
        raise BridgeError(
            "There is no such route.", repr(route), " or ".join(MODES), "Choose one of the list."
        )
    base = base_of(model, clip)
    path = folders.bridge_path(name)
    header = folders.bridge_header(path)
    _check(header, base, name)
    tower_file = folders.files_of(name)[-1]
    ops, dtype = comfy.ops.manual_cast, tower_dtype()
    loaded = load_bridge(path, ops=ops, dtype=dtype)
    encoder = loaded.encoder
    if encoder is None:
        encoder = load_encoder(tower_file, ops=ops, dtype=dtype)
    _check_width(encoder, loaded.bridge, name)
    tower = NativeTower(encoder, loaded.bridge)
    return BridgedClip.over(clip, Speech(tower, route, strength, base, name))


def _check(header: BridgeHeader, base: Base, name: str) -> None:
    if header.base != base.name:
        raise BridgeError(
            f"The bridge {name} is not made for this checkpoint.",
            f"a bridge for {NAMES[header.base]} in front of a checkpoint of {NAMES[base.name]}",
            f"a bridge for {NAMES[base.name]}",
            f"Choose a bridge for {NAMES[base.name]}, or load a checkpoint of {NAMES[header.base]}.",
        )
    if header.unet != "none":
        raise BridgeError(
            f"The bridge {name} also changes the U-Net, which this version cannot do.",
            f"U-Net part {header.unet!r}",
            "a bridge that leaves the U-Net alone (U-Net part 'none')",
            "Update Language Bridge.",
        )
    context, pooled = header.spec.get("context"), header.spec.get("pooled", 0)
    if context != base.context or pooled not in (0, base.pooled):
        raise BridgeError(
            f"The bridge {name} speaks to another width.",
            f"text rows of width {context}, pooled vector of width {pooled}",
            f"text rows of width {base.context} and pooled width {base.pooled}, as {NAMES[base.name]} reads",
            "Fetch or save the bridge again; its header does not fit its base.",
        )


def _check_width(encoder: Encoder, bridge: Bridge, name: str) -> None:
    if encoder.width != bridge.spec.hidden:
        raise BridgeError(
            f"The text tower {encoder.identity!r} does not fit the bridge {name}.",
            f"states of width {encoder.width}",
            f"states of width {bridge.spec.hidden}",
            "Fetch the tower that belongs to this bridge into models/text_encoders.",
        )
