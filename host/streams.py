"""Gives a CLIP that hears two languages the artist's settings: kept words, and how its streams are joined."""

from __future__ import annotations

from typing import Any

from ..bridges.errors import BridgeError
from ..prompt import Phrase, phrases_in
from .branch_clip import BranchedClip
from .clip import BridgedClip
from .joining import Joining

SOURCE = "Language Bridge Streams"


def settled(clip: Any, triggers: str, keep: str, joining: Joining) -> Any:
    """A clone of a bridged or branched CLIP; triggers, keep: lists as an artist or a node writes them.

    BridgeError for another CLIP, and for a branch with a joining of its own: there is one stream of rows.
    """
    phrases: tuple[Phrase, ...] = (*phrases_in(triggers, "trigger", SOURCE), *phrases_in(keep, "kept"))
    if isinstance(clip, BridgedClip):
        return clip.with_speech(phrases=phrases, joining=joining)
    if not isinstance(clip, BranchedClip):
        raise BridgeError(
            "This CLIP has no language bridge, so there are no streams to join.",
            "the CLIP of a checkpoint",
            "a CLIP that comes from a Language Bridge node",
            "Put Language Bridge between Load Checkpoint and this node.",
        )
    if joining.join != Joining().join or not joining.neutral:
        raise BridgeError(
            "A branch reads its text beside the U-Net, so there is nothing to join or to blend.",
            f"join {joining.join!r}, blend {joining.blend:g}",
            f"join {Joining().join!r}, blend {Joining().blend:g}",
            "Leave join and blend as they are, and use the strength of Language Bridge or the steps of "
            "Language Bridge Branch.",
        )
    return clip.with_kept(phrases)
