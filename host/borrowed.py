"""A text tower that ComfyUI itself loaded: its raw states, its own tokenizer, its memory management."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management as management
import comfy.sd1_clip
import torch
from torch import Tensor

from ..bridges.base import Bridge, Hidden
from ..bridges.errors import BridgeError
from ..bridges.file import BridgeHeader
from ..encoders.base import Piece, too_long
from .tower import NativeTower

FAMILY = "host"
"""What the header of a bridge says of its tower when ComfyUI loads it."""

_NAMES: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


class BorrowedEncoder:
    """What a `BridgedClip` asks of its encoder, answered by a CLIP of the host.

    Text is cut by the tokenizer of the CLIP; its special tokens stand around it, padding behind it up to the
    window that the header names.
    """

    def __init__(self, clip: Any, header: BridgeHeader) -> None:
        reference = header.encoder
        self.clip = clip
        self.identity = reference.identity
        self.window = reference.window
        self.layer = reference.layer
        self.model, self._words = _inside(clip)
        self.width = int(self.model.transformer.get_input_embeddings().weight.shape[1])
        first, last = self._words.start_token, self._words.end_token
        self._before = [] if first is None else [int(first)]
        self._after = [] if last is None else [int(last)]
        self._padding = int(self._words.pad_token)
        if self.layer >= 0 or self.capacity < 1:
            raise BridgeError(
                f"The text tower {self.identity!r} cannot be read as the bridge asks.",
                f"layer {self.layer}, window {self.window} with room for {self.capacity} tokens of text",
                "a layer counted from the last (-1, -2, ..) and a window with room for text",
                "Fetch or save the bridge again; its header does not fit its tower.",
            )

    @property
    def capacity(self) -> int:
        """How many pieces fit into one window beside the special tokens."""
        return self.window - len(self._before) - len(self._after)

    def tokenize(self, text: str) -> list[Piece]:
        """Pieces of a text, without special tokens; the host's tokenizers do not say where they stand."""
        return [Piece(token, 0, 0) for token in self._cut(text)]

    def frame(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Special tokens and padding around ids: ids [window] int64, mask [window] bool."""
        if len(ids) > self.capacity:
            raise too_long(len(ids), self.capacity)
        spoken = [*self._before, *ids, *self._after]
        filled = [*spoken, *[self._padding] * (self.window - len(spoken))]
        return torch.tensor(filled, dtype=torch.int64), torch.arange(self.window) < len(spoken)

    def mask_of(self, ids: Tensor) -> Tensor:
        """The mask [B, T] bool of framed ids [B, T]: False from the padding at the end of each row on."""
        later = (ids != self._padding).flip(-1).long().cumsum(-1).flip(-1)
        count = (later > 0).sum(-1, keepdim=True)
        if self._after and self._after[-1] == self._padding:
            count = count + 1
        return torch.arange(ids.shape[-1], device=ids.device) < count

    def __call__(self, ids: Tensor, mask: Tensor) -> Hidden:
        """States [B, T, D] of ids [B, T]; the CLIP must be loaded."""
        owner = self.clip.cond_stage_model
        owner.reset_clip_options()
        device = self.clip.patcher.load_device
        # None is the last layer; without the word a class would fall back to a layer of its own.
        self.model.set_clip_options(
            {"layer": None if self.layer == -1 else self.layer, "execution_device": device}
        )
        on_device = getattr(management, "cuda_device_context", nullcontext)  # newer hosts
        try:
            with on_device(device):
                states, pooled = self.model(ids.tolist())[:2]
        finally:
            owner.reset_clip_options()
        if states.ndim != 3 or states.shape[-1] != self.width:
            raise _odd(self.clip, f"states {list(states.shape)}")
        return Hidden(states, mask, pooled if pooled is not None and pooled.ndim == 2 else None)

    def _cut(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._words.tokenizer(text)["input_ids"]
        return list(ids[self._words.tokens_start : -1 if self._words.tokenizer_adds_end_token else None])


class BorrowedTower(NativeTower):
    """A `NativeTower` whose encoder is a CLIP of the host, under that CLIP's own patcher."""

    encoder: Any

    def __init__(
        self, encoder: BorrowedEncoder, bridge: Bridge, digest: str, template: tuple[str, str]
    ) -> None:
        name = _NAMES.setdefault(encoder.clip.cond_stage_model, uuid.uuid4().hex)
        owned: Any = encoder
        super().__init__(owned, bridge, f"{digest} {name} {encoder.clip.patcher.patches_uuid}", template)

    @property
    def apart(self) -> bool:
        """Always: the tower belongs to the host."""
        return True

    def _reader(self) -> torch.nn.Module:
        return self.encoder.clip.cond_stage_model

    def _patcher(self) -> Any:
        return self.encoder.clip.patcher


def borrow(clip: Any, header: BridgeHeader, name: str) -> BorrowedEncoder:
    """The CLIP that a bridge `name` of the family "host" asks for; BridgeError when it cannot be that one."""
    if clip is None:
        raise BridgeError(
            f"The bridge {name} reads a text tower that ComfyUI loads.",
            "nothing connected to the input tower",
            f"the CLIP of {header.encoder.identity!r}",
            "Load it with CLIPLoader and connect its CLIP to the input tower.",
        )
    encoder = BorrowedEncoder(clip, header)
    if encoder.width != header.spec.get("hidden"):
        raise BridgeError(
            f"The text tower at the input tower does not fit the bridge {name}.",
            f"{type(clip.cond_stage_model).__name__} with states of width {encoder.width}",
            f"{header.encoder.identity!r}, states of width {header.spec.get('hidden')}",
            f"Load {header.encoder.identity!r} with CLIPLoader and connect that.",
        )
    return encoder


def refuse(header: BridgeHeader, name: str) -> BridgeError:
    """The error for a CLIP at the input `tower` of a bridge that has a tower of its own."""
    return BridgeError(
        f"The bridge {name} does not take a text tower from ComfyUI.",
        "a CLIP at the input tower",
        f"its own tower {header.encoder.identity!r} of the family {header.encoder.family}",
        "Disconnect the input tower.",
    )


def _inside(clip: Any) -> tuple[Any, Any]:
    """The one text model of a CLIP and its tokenizer; BridgeError when there are several or none."""
    model = getattr(clip, "cond_stage_model", None)
    words = getattr(clip, "tokenizer", None)
    inner = getattr(model, str(getattr(model, "clip", "")), None)
    cutter = getattr(words, str(getattr(words, "clip", "")), None)
    whole = isinstance(inner, comfy.sd1_clip.SDClipModel) and isinstance(cutter, comfy.sd1_clip.SDTokenizer)
    if not whole or hasattr(clip, "speech"):
        raise _odd(clip, type(model).__name__ if not hasattr(clip, "speech") else "a bridged CLIP")
    if getattr(cutter, "pad_left", False):
        raise _odd(clip, f"{type(cutter).__name__}, which pads on the left")
    return inner, cutter


def _odd(clip: Any, found: str) -> BridgeError:
    return BridgeError(
        "This CLIP cannot serve as a text tower.",
        found,
        "a CLIP with one text model that pads on the right, as CLIPLoader makes it",
        "Connect the CLIP output of a CLIPLoader with one text encoder.",
    )
