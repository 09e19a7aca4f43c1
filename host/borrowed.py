"""A text tower that ComfyUI itself loaded: its raw states, its tokenizer or T5's, its memory management."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management as management
import comfy.sd1_clip
import comfy.text_encoders.t5
import torch
from torch import Tensor

from ..bridges.base import Bridge, Hidden
from ..bridges.errors import BridgeError
from ..bridges.file import BridgeHeader
from ..encoders import guard
from ..encoders.base import Piece, marker_id, too_long
from ..encoders.vocabulary import open_tokenizer, pieces
from .tower import NativeTower

FAMILY = "host"
"""What the header of a bridge says of its tower when ComfyUI loads it."""

READ_AS_T5 = ("flan-t5-xl-host",)
"""Identities of towers that ComfyUI opens as Pile-T5, whatever the file is: see `T5Encoder`."""

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
        self._before, self._after, self._padding = self._marks()
        if self.layer >= 0 or self.capacity < 1:
            raise BridgeError(
                f"The text tower {self.identity!r} cannot be read as the bridge asks.",
                f"layer {self.layer}, window {self.window} with room for {self.capacity} tokens of text",
                "a layer counted from the last (-1, -2, ..) and a window with room for text",
                "Fetch or save the bridge again; its header does not fit its tower.",
            )

    def _marks(self) -> tuple[list[int], list[int], int]:
        """Ids before and after a text, and the padding."""
        first, last = self._words.start_token, self._words.end_token
        before, after = ([] if token is None else [int(token)] for token in (first, last))
        return before, after, int(self._words.pad_token)

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
            with on_device(device), self._reading():
                states, pooled = self.model(ids.tolist())[:2]
        finally:
            owner.reset_clip_options()
        if states.ndim != 3 or states.shape[-1] != self.width:
            raise _odd(self.clip, f"states {list(states.shape)}")
        return Hidden(states, mask, pooled if pooled is not None and pooled.ndim == 2 else None)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Around each call of the model: what must be otherwise than for the host's own use of it."""
        yield

    def _cut(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._words.tokenizer(text)["input_ids"]
        return list(ids[self._words.tokens_start : -1 if self._words.tokenizer_adds_end_token else None])


class T5Encoder(BorrowedEncoder):
    """T5 or Flan-T5 in a CLIP that ComfyUI made for Pile-T5, because the width is the same.

    That CLIP cuts text into Pile-T5's pieces, has other special tokens, and a table of positions in each
    layer, of which a T5 file fills the first alone. Here text is cut by T5's own tokenizer, which ComfyUI
    ships for its other T5 towers, and the first table holds for all layers, as in T5. After each call the
    CLIP is as it was. Which of the two models was loaded is read off the file that its loader names.
    """

    def __init__(self, clip: Any, header: BridgeHeader) -> None:
        path = Path(comfy.text_encoders.t5.__file__).with_name("t5_tokenizer") / "tokenizer.json"
        inner, _ = _inside(clip)
        _require_t5(clip, inner, header.encoder.identity)
        rows = int(inner.transformer.get_input_embeddings().weight.shape[0])
        self._tokenizer, _ = open_tokenizer(path.read_bytes(), rows)
        super().__init__(clip, header)
        self._masked = header.encoder.mask_rule == "pad"
        logging.warning(
            "%s: ComfyUI computes this tower in float32; the bridge was trained on float16, which looks "
            "different. The converted tower computes as it was trained.",
            self.identity,
        )

    def _marks(self) -> tuple[list[int], list[int], int]:
        return [], [marker_id(self._tokenizer, "</s>")], marker_id(self._tokenizer, "<pad>")

    def tokenize(self, text: str) -> list[Piece]:
        """Pieces of a text, without special tokens."""
        return [Piece(*piece) for piece in pieces(self._tokenizer, text)]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        changes = {
            "special_tokens": {"end": self._after[0], "pad": self._padding},
            "enable_attention_masks": self._masked,
            "zero_out_masked": False,
        }
        before = {name: getattr(self.model, name) for name in changes}
        later = [block.layer[0].SelfAttention for block in self.model.transformer.encoder.block[1:]]
        tables = [attention.relative_attention_bias for attention in later]
        try:
            for name, value in changes.items():
                setattr(self.model, name, value)
            for attention in later:
                attention.relative_attention_bias = None  # the bias of the layer before holds on
            yield
        finally:
            for name, value in before.items():
                setattr(self.model, name, value)
            for attention, table in zip(later, tables, strict=True):
                attention.relative_attention_bias = table


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
    if header.encoder.identity in READ_AS_T5:
        encoder: BorrowedEncoder = T5Encoder(clip, header)
    else:
        encoder = BorrowedEncoder(clip, header)
        _require_filled(clip, encoder.model)
    if encoder.width != header.spec.get("hidden"):
        raise BridgeError(
            f"The text tower at the input tower does not fit the bridge {name}.",
            f"{type(clip.cond_stage_model).__name__} with states of width {encoder.width}",
            f"{header.encoder.identity!r}, states of width {header.spec.get('hidden')}",
            f"Load {header.encoder.identity!r} with CLIPLoader and connect that.",
        )
    return encoder


TABLE = "SelfAttention.relative_attention_bias.weight"
FIRST = "encoder.block.0."


def _require_t5(clip: Any, inner: Any, identity: str) -> None:
    """Refuse a CLIP whose file is no T5: all tensors of the model but the later tables of positions, and none
    of those. BridgeError, too, when nobody knows which file it was."""
    if not isinstance(inner.transformer, comfy.text_encoders.t5.T5):
        raise _no_t5(identity, f"a CLIP around {type(inner.transformer).__name__}")
    found = _file_of(clip)
    if found is None:
        raise _no_t5(identity, "a CLIP that does not say which file it was loaded from")
    try:
        names = set(guard.read_layout(found).shapes)
    except BridgeError as error:
        raise _no_t5(identity, f"{found.name}: {error.found}") from error
    later = _later_tables(names)
    if later:
        raise _no_t5(
            identity, f"{found.name}, which has {len(later) + 1} tables of positions, as Pile-T5 has"
        )
    own = {name for name, _ in inner.transformer.named_parameters() if name.endswith(".weight")}
    missing = sorted(own - _later_tables(own) - names)
    if missing:
        raise _no_t5(identity, f"{found.name}, without {missing[:2]}")


def _require_filled(clip: Any, inner: Any) -> None:
    """Refuse a T5 that the host opened as Pile-T5, where the header asks for the host's own reading: most of
    its tables of positions are whatever was in memory. A file that cannot be looked at is not judged."""
    found = _file_of(clip)
    if found is None or not isinstance(inner.transformer, comfy.text_encoders.t5.T5):
        return
    try:
        names = set(guard.read_layout(found).shapes)
    except BridgeError:
        return
    empty = _later_tables({name for name, _ in inner.transformer.named_parameters()}) - names
    if empty:
        raise _odd(clip, f"{found.name}, which fills all but {len(empty)} tables of positions of this class")


def _later_tables(names: Iterable[str]) -> set[str]:
    """The tables of positions of all layers but the first, which T5 does not have and Pile-T5 has."""
    return {name for name in names if name.endswith(TABLE) and not name.startswith(FIRST)}


def _file_of(clip: Any) -> Path | None:
    """The one file that the host's loader says the CLIP came from."""
    made = getattr(clip.patcher, "cached_patcher_init", None)
    paths = made[1][0] if isinstance(made, tuple) and len(made) > 1 and made[1] else None
    paths = [paths] if isinstance(paths, str) else paths
    single = isinstance(paths, (list, tuple)) and len(paths) == 1
    return Path(str(paths[0])) if single and paths else None


def _no_t5(identity: str, found: str) -> BridgeError:
    return BridgeError(
        "This CLIP cannot be shown to hold the text tower of the bridge.",
        found,
        f"{identity!r}: one .safetensors file of Flan-T5-XL's encoder with one table of positions, opened by "
        "ComfyUI's CLIPLoader",
        "Load that file with CLIPLoader. Or convert the tower's transformers folder together with the bridge "
        "(ella-sd1.5-tsc-t5xl), which needs no CLIP and computes as published.",
    )


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
