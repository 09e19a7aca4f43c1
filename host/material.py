"""What training reads, made by the graph's own VAE, CLIP and text tower, and kept on disk by content.

Banks lie in the host's user directory and carry the digest of what made their records in their names:
weights, LoRA patches, clip skip, window. So the same picture or caption is encoded once, whatever run asks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import comfy.model_management as management
import comfy.sd
import folder_paths
import torch
from torch import Tensor

from ..bridges.base import Hidden
from ..bridges.errors import BridgeError
from ..encoders.base import Encoder
from ..prompt import normalise
from ..training.bank import Bank, Damaged
from ..training.chance import Draw
from ..training.dataset import Dataset, Example, Problem
from ..training.pictures import (
    PictureError,
    bucket_of,
    buckets_for,
    picture_key,
    picture_size,
    read_picture,
)
from ..training.source import Batch, Memory
from .backbone import patched_weights, size_embedding
from .base import Base
from .clip import UNPROJECTED
from .folders import OWN_FOLDER
from .tower import load_device, patcher_of

WINDOW = 77
"""Rows of one window of the checkpoint's own CLIP, start, end and padding included."""
PIXELS = 8
"""Pixels of a latent's side, in SD1.x, SD2.x and SDXL."""
_CAPTIONS_AT_ONCE, _PIXELS_AT_ONCE, _MOST_AT_ONCE = 64, 8 * 512 * 512, 64
_SHORT = 24
_TEMPLATE = "opening"
_UNHEARD = ("text_projection.weight", "logit_scale")
"""What the host leaves unfilled where a file holds none; only SDXL's clip_g speaks through it."""

Thing = TypeVar("Thing")
Poll = Callable[[], None]
Tell = Callable[[str, int, int], None]
"""Told what is being done, how many are done, and of how many."""


def folder(*inside: str) -> Path:
    """A folder of training in the host's user directory, where no HTTP request reaches."""
    return Path(folder_paths.get_system_user_directory(OWN_FOLDER), "training", *inside)


def digest(weights: Iterable[tuple[str, Tensor]], *facts: object, poll: Poll = lambda: None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of weights, and over further facts."""
    total = hashlib.sha256(repr(facts).encode("utf-8"))
    for name, value in weights:
        poll()
        plain = value.detach().to("cpu").contiguous()
        total.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode("ascii"))
        if plain.numel():
            total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def key_of(*facts: object) -> str:
    """SHA-256 over facts."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()


class Kept(Generic[Thing]):
    """A bank and who makes its records: `make` turns things into records [K, ...]."""

    def __init__(self, bank: Bank, make: Callable[[list[Thing]], Tensor], at_once: int) -> None:
        self.bank = bank
        self._make = make
        self._at_once = at_once

    def fill(self, things: Mapping[str, Thing], poll: Poll, tell: Callable[[int, int], None]) -> int:
        """Make what is missing; how many that were."""
        missing = self.bank.missing(list(things))
        for start in range(0, len(missing), self._at_once):
            poll()
            keys = missing[start : start + self._at_once]
            self._put(keys, [things[key] for key in keys])
            tell(min(start + self._at_once, len(missing)), len(missing))
        return len(missing)

    def rows(self, keys: Sequence[str], things: Sequence[Thing]) -> Tensor:
        """Records [K, ...]; those that the disk has damaged are made again."""
        try:
            return self.bank.get(keys)
        except Damaged as damaged:
            known = dict(zip(keys, things, strict=True))
            self._put(list(damaged.keys), [known[key] for key in damaged.keys])
            return self.bank.get(keys)

    def _put(self, keys: list[str], things: list[Thing]) -> None:
        with torch.inference_mode():
            made = self._make(things)
        self.bank.put(keys, made.to("cpu", self.bank.dtype))


class Banks:
    """The banks of one training, closed together; one process writes to a bank at a time."""

    def __init__(self) -> None:
        self._open: dict[str, Bank] = {}

    def __enter__(self) -> Banks:
        return self

    def __exit__(self, *reason: object) -> None:
        for bank in self._open.values():
            bank.close()

    def open(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Bank:
        """The bank of this name in the host's user directory."""
        if name not in self._open:
            self._open[name] = Bank(folder("banks"), name, shape, dtype)
        return self._open[name]


class English:
    """The checkpoint's own CLIP as the teacher: rows of one window, padded as the host pads them."""

    def __init__(self, clip: Any, base: Base, poll: Poll) -> None:
        self.clip = stock(clip)
        self.base = base
        self.dtype = _kept_dtype(self.clip.patcher.load_device)
        state = patched_weights(self.clip.patcher, "")
        heard = (each for each in state if each[0].startswith("clip_g.") or not each[0].endswith(_UNHEARD))
        self.digest = digest(heard, "clip", self.clip.layer_idx, self.dtype, poll=poll)

    def rows(self, texts: list[str]) -> Tensor:
        """Texts to [K, 77, C]."""
        chunks = [self._tokens(text) for text in texts]
        together = {key: [each[key][0] for each in chunks] for key in chunks[0]}
        rows: Tensor = self.clip.encode_from_tokens(together)
        return rows.reshape(len(texts), WINDOW, -1)

    def pooled(self, texts: list[str]) -> Tensor:
        """Texts to pooled vectors [K, P]; without SDXL's projection where the base is not SDXL."""
        # The host gives the pooled vector of the first window of a call alone.
        form = True if self.base.pooled else UNPROJECTED
        said = [self.clip.encode_from_tokens(self._tokens(text), return_pooled=form)[1] for text in texts]
        return torch.cat([each.reshape(1, -1) for each in said])

    def _tokens(self, text: str) -> dict[str, Any]:
        # A caption is text: its brackets are no weights.
        tokens = self.clip.tokenize(text, disable_weights=True)
        return {key: chunks[:1] for key, chunks in tokens.items()}


def stock(clip: Any) -> Any:
    """The checkpoint's own CLIP of a CLIP that may be bridged, as a clone."""
    plain: Any = comfy.sd.CLIP.clone(clip)
    plain.__class__ = comfy.sd.CLIP
    # A bridged CLIP makes the host load its tower along.
    patches = plain.patcher.model_options.get("transformer_options", {}).get("patches", {})
    patches.pop("language_bridge", None)
    return plain


@dataclass(frozen=True, eq=False)
class Tower:
    """A text tower and how it reads.

    words: cuts and frames text: the encoder, or it with a method's template around. content: names encoder,
    layer, window, mask rule and weights. learns: whether it is part of the training.
    """

    encoder: Encoder
    words: Any
    content: str
    learns: bool = False


class Native:
    """A text tower on native captions: ids for one that learns, states for one that is frozen."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.patcher = None if tower.learns else patcher_of(tower.encoder)
        self.dtype = _kept_dtype(load_device())
        self.cut_short = 0

    def read(self, text: str) -> tuple[Tensor, Tensor]:
        """Ids and mask [T] of a caption as the node hands it to the tower; what does not fit is left out."""
        words = self.tower.words
        pieces = getattr(words, _TEMPLATE, words.tokenize)(normalise(text).text)
        self.cut_short += len(pieces) > words.capacity
        return words.frame([piece.id for piece in pieces[: words.capacity]])

    def states(self, framed: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Framed captions to states [K, T, D]."""
        return self._hidden(framed).states

    def pooled(self, framed: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Framed captions to pooled vectors [K, P]."""
        pooled = self._hidden(framed).pooled
        assert pooled is not None
        return pooled

    def _hidden(self, framed: list[tuple[Tensor, Tensor]]) -> Hidden:
        assert self.patcher is not None
        management.load_models_gpu([self.patcher])
        device = self.patcher.load_device
        ids, mask = (torch.stack(each).to(device) for each in zip(*framed, strict=True))
        return self.tower.encoder(ids, mask)


@dataclass(frozen=True, eq=False)
class Row:
    """One example as the source knows it: keys of its records, and what they are made from."""

    example: Example
    ids: Tensor
    mask: Tensor
    english: str
    size: tuple[int, int] | None = None
    latent: str = ""


@dataclass(frozen=True)
class Wants:
    """What a method reads: pictures; English rows and pooled vector; examples without English; pooled of the
    tower."""

    pictures: bool
    rows: bool
    pooled: bool
    without_english: bool
    tower_pooled: bool


class HostSource:
    """Examples whose tensors the graph's models have made; see `training.source.Source`."""

    def __init__(
        self,
        wants: Wants,
        rows: Sequence[Row],
        empty: Row,
        *,
        groups: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]],
        latents: Mapping[tuple[int, int], Kept[Example]],
        english: Kept[str] | None,
        pooled: Kept[str] | None,
        states: Kept[tuple[Tensor, Tensor]] | None,
        states_pooled: Kept[tuple[Tensor, Tensor]] | None,
        sizes: Mapping[tuple[int, int], Tensor],
        scale: Callable[[Tensor], Tensor],
        content: str,
        banks: Banks,
        device: torch.device,
    ) -> None:
        self.groups = groups
        self.held_out = held_out
        self.rows = rows
        self._wants = wants
        self._empty = empty
        self._latents = latents
        self._english = english
        self._pooled = pooled
        self._states = states
        self._states_pooled = states_pooled
        self._sizes = sizes
        self._scale = scale
        self._content = content
        self._banks = banks
        self._device = device

    def shape(self, number: int) -> tuple[int, int, int] | None:
        """Shape of an example's latent [4, h, w]."""
        size = self.rows[number].size
        return None if size is None else (4, size[1] // PIXELS, size[0] // PIXELS)

    def key(self, number: int) -> str:
        """Names everything that U-Net, VAE and CLIP read of an example, and these models."""
        row = self.rows[number]
        return key_of(self._content, row.latent, row.size, row.english)

    def memory(self, length: int) -> Memory | None:
        """A bank for what the U-Net says of an example."""
        name = f"taught-{self._content[:_SHORT]}-{length}"
        return _Taught(self._banks.open(name, (length,), torch.float16))

    def batch(self, draw: Draw) -> Batch:
        """The examples of a draw, on the device."""
        return self._batch([self.rows[number] for number in draw.numbers])

    def empty(self) -> Batch:
        """The empty prompt."""
        return self._batch([self._empty])

    def captions(self, texts: Sequence[str], native: Native) -> Batch:
        """Texts that are no examples, to be painted."""
        rows = [Row(Example(text), *native.read(text), "") for text in texts]
        framed = {_framed_key(each): each for each in ((row.ids, row.mask) for row in rows)}
        for kept in (self._states, self._states_pooled):
            if kept is not None:
                kept.fill(framed, lambda: None, lambda done, of: None)
        return self._batch(rows)

    def _batch(self, rows: Sequence[Row]) -> Batch:
        latents = sizes = english = english_pooled = hidden = None
        size = rows[0].size
        if self._wants.pictures and size is not None:
            latents = self._scale(self._latent_rows(size, rows)).float()
            if self._sizes:
                sizes = self._sizes[size].expand(len(rows), -1)
        texts = [row.english for row in rows]
        if self._english is not None:
            english = _given(rows, self._english, texts, "rows")
        if self._pooled is not None:
            english_pooled = _given(rows, self._pooled, texts, "pooled")
        framed = [(row.ids, row.mask) for row in rows]
        ids, mask = (torch.stack(each).to(self._device) for each in zip(*framed, strict=True))
        if self._states is not None:
            keys = [_framed_key(each) for each in framed]
            states = self._states.rows(keys, framed).to(self._device)
            pooled = None
            if self._states_pooled is not None:
                pooled = self._states_pooled.rows(keys, framed).to(self._device)
            hidden = Hidden(states, mask, pooled)
        flags = torch.tensor([float(row.example.native_only) for row in rows])
        learns = self._states is None
        return Batch(
            latents=latents,
            english=english,
            english_pooled=english_pooled,
            hidden=hidden,
            ids=ids if learns else None,
            mask=mask if learns else None,
            native_only=flags if self._wants.without_english else None,
            sizes=sizes,
        ).to(self._device)

    def _latent_rows(self, size: tuple[int, int], rows: Sequence[Row]) -> Tensor:
        given = [row.example.latent for row in rows]
        if all(each is not None for each in given):
            return torch.stack([each for each in given if each is not None])
        return self._latents[size].rows([row.latent for row in rows], [row.example for row in rows])


class _Taught:
    """A bank as a training's memory: records that the disk has damaged are missing ones."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._seen: tuple[list[str], Tensor] | None = None

    def missing(self, keys: Sequence[str]) -> list[str]:
        lacking = self._bank.missing(keys)
        known = [key for key in dict.fromkeys(keys) if key not in set(lacking)]
        try:
            self._seen = known, self._bank.get(known)
        except Damaged as damaged:
            self._seen = None
            lacking = [*lacking, *damaged.keys]
        return lacking

    def put(self, keys: Sequence[str], values: Tensor) -> None:
        self._bank.put(keys, values)

    def get(self, keys: Sequence[str]) -> Tensor:
        if self._seen is not None and self._seen[0] == list(keys):
            return self._seen[1]
        return self._bank.get(keys)


def _given(rows: Sequence[Row], kept: Kept[str], texts: list[str], name: str) -> Tensor:
    """English records, those that came with an example first."""
    own = [getattr(row.example, name) for row in rows]
    if all(each is None for each in own):
        return kept.rows([key_of(text) for text in texts], texts)
    known = [text for text, each in zip(texts, own, strict=True) if each is None]
    made = iter(kept.rows([key_of(text) for text in known], known))
    return torch.stack([next(made) if each is None else each.to(kept.bank.dtype) for each in own])


def _framed_key(framed: tuple[Tensor, Tensor]) -> str:
    ids, mask = framed
    return hashlib.sha256(ids.numpy().tobytes() + mask.numpy().tobytes()).hexdigest()


def _kept_dtype(device: torch.device) -> torch.dtype:
    """What records of text are kept in: where the host computes in half precision, in that."""
    return torch.float32 if management.is_device_cpu(device) else torch.float16


@dataclass(frozen=True, eq=False)
class Prepared:
    """A source with all of its records made, and what became of the dataset on the way.

    facts: what the data and the models are, for a run that goes on; problems: examples that were left out;
    made: how many records were computed just now, by sort; cut_short: captions longer than the window.
    """

    source: HostSource
    native: Native
    facts: Mapping[str, object]
    problems: tuple[Problem, ...]
    made: Mapping[str, int]
    cut_short: int


def prepare(
    dataset: Dataset,
    tower: Tower,
    wants: Wants,
    *,
    model: Any,
    clip: Any,
    vae: Any,
    base: Base,
    unet_content: str,
    resolution: int,
    held_out: float,
    banks: Banks,
    device: torch.device,
    poll: Poll,
    tell: Tell,
) -> Prepared:
    """Make everything that a method wants of a dataset, and keep it on disk; what is there is not made again.

    unet_content: digest of the frozen U-Net, "" where none is asked; resolution: of the pictures, in pixels;
    held_out: share of the examples that are only measured, chosen by their content. A picture that cannot be
    read is left out. BridgeError when nothing is left.
    """
    problems: list[Problem] = []
    made: dict[str, int] = {}
    chosen = _usable(dataset.examples, wants, base, problems)
    native = Native(tower)
    vae_content = ""
    latents: dict[tuple[int, int], Kept[Example]] = {}
    sized: dict[int, tuple[tuple[int, int], str]] = {}
    if wants.pictures:
        vae_content, latents, sized = _latents(chosen, vae, resolution, banks, problems, made, poll, tell)
        chosen = {number: example for number, example in chosen.items() if number in sized}
    if not chosen:
        raise BridgeError(
            "There is nothing to train on.",
            f"{len(dataset.examples)} examples, none of which this objective can use",
            _needs(wants),
            "Look at the report of the dataset: " + "; ".join(f"{p.place}: {p.what}" for p in problems[:3]),
        )

    rows: list[Row] = []
    for number, example in chosen.items():
        if number % 256 == 0:
            poll()
        size, latent = sized.get(number, (None, ""))
        rows.append(Row(example, *native.read(example.native), example.english, size, latent))
    empty = Row(Example(""), *native.read(""), "")

    teacher = English(clip, base, poll) if wants.rows or wants.pooled else None
    english = pooled = None
    if teacher is not None:
        texts = {key_of(text): text for text in ["", *(row.english for row in rows)]}
        if wants.rows:
            bank = banks.open(f"english-{teacher.digest[:_SHORT]}", (WINDOW, base.context), teacher.dtype)
            english = Kept(bank, teacher.rows, _CAPTIONS_AT_ONCE)
            made["english"] = english.fill(texts, poll, lambda done, of: tell("English", done, of))
        if wants.pooled:
            with torch.inference_mode():
                width = teacher.pooled([""]).shape[1]
            bank = banks.open(f"pooled-{teacher.digest[:_SHORT]}", (width,), teacher.dtype)
            pooled = Kept(bank, teacher.pooled, _CAPTIONS_AT_ONCE)
            made["pooled"] = pooled.fill(texts, poll, lambda done, of: tell("English", done, of))

    states = states_pooled = None
    if not tower.learns:
        framed = {_framed_key(each): each for each in ((row.ids, row.mask) for row in [empty, *rows])}
        name, window = tower.content[:_SHORT], len(empty.ids)
        kind = str(native.dtype)[6:]
        bank = banks.open(f"states-{name}-{kind}", (window, tower.encoder.width), native.dtype)
        states = Kept(bank, native.states, _CAPTIONS_AT_ONCE)
        made["states"] = states.fill(framed, poll, lambda done, of: tell("native text", done, of))
        if wants.tower_pooled:
            width = tower.encoder.pooled_width
            bank = banks.open(f"states-pooled-{name}-{kind}", (width,), native.dtype)
            states_pooled = Kept(bank, native.pooled, _CAPTIONS_AT_ONCE)
            made["native pooled"] = states_pooled.fill(
                framed, poll, lambda done, of: tell("native text", done, of)
            )

    groups, measured = _split(rows, held_out)
    clip_content = "" if teacher is None else teacher.digest
    content = key_of(unet_content, vae_content, clip_content)
    keys = sorted(_content_of(row) for row in rows)
    facts: dict[str, object] = {
        "unet": unet_content,
        "vae": vae_content,
        "clip": clip_content,
        "tower": tower.content,
        "data": key_of(keys),
        "examples": len(rows),
        "held_out": sum(len(group) for group in measured),
    }
    sizes: dict[tuple[int, int], Tensor] = {}
    for size in {row.size for row in rows if row.size is not None}:
        read = None if model is None else size_embedding(model, *size)
        if read is not None:
            sizes[size] = read
    source = HostSource(
        wants,
        rows,
        empty,
        groups=groups,
        held_out=measured,
        latents=latents,
        english=english,
        pooled=pooled,
        states=states,
        states_pooled=states_pooled,
        sizes=sizes,
        scale=(lambda value: value) if model is None else _scaled(model),
        content=content,
        banks=banks,
        device=device,
    )
    return Prepared(source, native, facts, tuple(problems), made, native.cut_short)


def _scaled(model: Any) -> Callable[[Tensor], Tensor]:
    latent_format = model.get_model_object("latent_format")
    return latent_format.process_in


def _usable(
    examples: Sequence[Example], wants: Wants, base: Base, problems: list[Problem]
) -> dict[int, Example]:
    """Examples that a method can use, by their number in the dataset."""
    chosen: dict[int, Example] = {}
    for number, example in enumerate(examples):
        if wants.rows and not wants.without_english and example.native_only:
            problems.append(Problem(example.place, "no_english"))
        elif wants.pictures and example.picture is None and example.latent is None:
            problems.append(Problem(example.place, "no_picture"))
        elif wants.rows and example.rows is not None and tuple(example.rows.shape) != (WINDOW, base.context):
            found = f"conditioning of shape {list(example.rows.shape)}, not {[WINDOW, base.context]}"
            problems.append(Problem(example.place, "tensor", found))
        else:
            chosen[number] = example
    return chosen


def _latents(
    examples: Mapping[int, Example],
    vae: Any,
    resolution: int,
    banks: Banks,
    problems: list[Problem],
    made: dict[str, int],
    poll: Poll,
    tell: Tell,
) -> tuple[str, dict[tuple[int, int], Kept[Example]], dict[int, tuple[tuple[int, int], str]]]:
    """Digest of the VAE, who gives the latents of each size, and size and key of each usable example."""
    step = min(64, resolution)
    buckets = buckets_for(resolution, step)
    sized: dict[int, tuple[tuple[int, int], str]] = {}
    pictures: dict[tuple[int, int], dict[str, tuple[int, Example]]] = {}
    for done, (number, example) in enumerate(examples.items()):
        if done % 16 == 0:
            poll()
            tell("pictures", done, len(examples))
        if example.latent is not None:
            _, height, width = example.latent.shape
            sized[number] = ((width * PIXELS, height * PIXELS), key_of(digest([("", example.latent)])))
            continue
        assert example.picture is not None
        try:
            size = bucket_of(*picture_size(example.picture), buckets)
            key = picture_key(example.picture, size)
        except PictureError as error:
            problems.append(_unreadable(example, error))
            continue
        sized[number] = size, key
        pictures.setdefault(size, {})[key] = (number, example)
    if not pictures:
        return "", {}, sized
    if vae is None:
        raise BridgeError(
            "This objective looks at pictures.",
            "nothing connected to the input vae",
            "the VAE of the checkpoint",
            "Connect the VAE output of the checkpoint loader.",
        )
    content = digest(sorted(vae.first_stage_model.state_dict().items()), "vae", poll=poll)
    latents: dict[tuple[int, int], Kept[Example]] = {}
    count = 0
    for size, found in sorted(pictures.items()):
        width, height = size
        shape = (4, height // PIXELS, width // PIXELS)
        bank = banks.open(f"latents-{content[:_SHORT]}-{width}x{height}", shape, torch.float32)
        at_once = max(1, min(_MOST_AT_ONCE, _PIXELS_AT_ONCE // (width * height)))
        latents[size] = kept = Kept(bank, _encoder(vae, size), at_once)
        missing = bank.missing(list(found))
        bad: set[str] = set()
        waiting: dict[str, Example] = {}
        for done, key in enumerate(missing, start=1):
            poll()
            number, example = found[key]
            waiting[key] = example
            if len(waiting) == at_once or done == len(missing):
                for one, error in _fill_or_leave(kept, waiting, poll).items():
                    bad.add(one)
                    problems.append(_unreadable(found[one][1], error))
                waiting.clear()
            tell(f"latents {width} x {height}", done, len(missing))
        count += len(missing) - len(bad)
        sized = {number: each for number, each in sized.items() if each[1] not in bad}
    made["latents"] = count
    return content, latents, sized


def _fill_or_leave(kept: Kept[Example], waiting: dict[str, Example], poll: Poll) -> dict[str, PictureError]:
    """Make latents of several pictures; those that cannot be read are named, and the others made."""
    try:
        kept.fill(waiting, poll, lambda done, of: None)
        return {}
    except PictureError:
        pass
    bad: dict[str, PictureError] = {}
    for key, example in waiting.items():
        try:
            kept.fill({key: example}, poll, lambda done, of: None)
        except PictureError as error:
            bad[key] = error
    return bad


def _encoder(vae: Any, size: tuple[int, int]) -> Callable[[list[Example]], Tensor]:
    def make(examples: list[Example]) -> Tensor:
        pictures = [_picture(example, size) for example in examples]
        return vae.encode(torch.stack(pictures))

    return make


def _picture(example: Example, size: tuple[int, int]) -> Tensor:
    assert example.picture is not None
    return read_picture(example.picture, size)


def _unreadable(example: Example, error: PictureError) -> Problem:
    name = example.picture.name if isinstance(example.picture, os.PathLike) else "image"
    return Problem(example.place, "unreadable", f"{name}: {error.found}")


def _split(rows: Sequence[Row], share: float) -> tuple[list[list[int]], list[list[int]]]:
    """Numbers to learn from and numbers to measure, each by size; content decides, not order or chance."""
    count = round(share * len(rows))
    if share > 0 and len(rows) >= 10:
        count = max(count, 1)
    order = sorted(range(len(rows)), key=lambda number: (key_of("split", _content_of(rows[number])), number))
    measured = set(order[: min(count, len(rows) - 1)])
    groups: dict[tuple[int, int] | None, list[int]] = {}
    held: dict[tuple[int, int] | None, list[int]] = {}
    for number, row in enumerate(rows):
        (held if number in measured else groups).setdefault(row.size, []).append(number)
    return list(groups.values()), list(held.values())


def _content_of(row: Row) -> str:
    return key_of(row.example.native, row.english, row.latent)


def _needs(wants: Wants) -> str:
    needs = ["a native caption"]
    if wants.pictures:
        needs.append("a picture")
    if wants.rows and not wants.without_english:
        needs.append("an English caption")
    return "examples with " + ", ".join(needs)
