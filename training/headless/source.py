"""Batches from shards: pictures decoded in threads, texts and latents by the frozen models."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...bridges.base import Hidden
from ...bridges.errors import BridgeError
from ...encoders.base import Encoder
from ...prompt.grammar import normalise
from ..chance import Draw, generator
from ..pictures import PictureError, read_picture
from ..published import Captions, Rules
from ..source import Batch, Memory
from .models import English, Latents, embedded
from .shards import Place, fields_of, read
from .stream import Size, Stream

MOST_NAMED = 20
"""So many unreadable pictures are named; the rest is only counted."""


@dataclass(frozen=True)
class Reading:
    """How examples are read.

    crop: "random" as the authors do, or "centre". order: of SDXL's sizes, "height" first as when pictures are
    made, or "width" first as the authors of PEA-Diffusion trained. threads: that decode pictures.
    """

    crop: Literal["random", "centre"] = "random"
    order: Literal["height", "width"] = "height"
    threads: int = 4


@dataclass(frozen=True, eq=False)
class Sample:
    """One example: its captions, its picture [H, W, 3] in 0..1 or None, and SDXL's six sizes in pixels,
    heights first: of the picture, of what was cut off above and left, of what is left.
    """

    captions: Captions
    picture: Tensor | None
    sizes: tuple[int, ...]


class ShardSource:
    """Examples of a `Stream` as batches; a `Source`.

    tower: reads the native captions; tower_learns: its ids are given and not its states. latents: None when
    the method asks for no pictures. pooled, embedding: widths of SDXL's pooled vector and of the embedding of
    each of its sizes, 0 without. typed: native captions are read as they are, not with half-width punctuation
    as the nodes read prompts. part: the share of this process in each batch, as (index, count). held_out: a
    stream of examples that are only measured.
    """

    def __init__(
        self,
        stream: Stream,
        rules: Rules,
        tower: Encoder,
        english: English,
        latents: Latents | None,
        *,
        device: torch.device | str,
        pooled: int = 0,
        embedding: int = 0,
        tower_learns: bool = False,
        typed: bool = False,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
        held_out: Stream | None = None,
        most_held_out: int = 0,
    ) -> None:
        self.stream = stream
        self.unreadable = 0
        self._rules, self._reading, self._seed, self._part = rules, reading, seed, part
        self._tower, self._english, self._latents = tower, english, latents
        self._device, self._pooled, self._embedding = torch.device(device), pooled, embedding
        self._learns, self._typed = tower_learns, typed
        self._aside = held_out
        self._held = (
            [] if held_out is None else [[-1 - n for n in group] for group in held_out.first(most_held_out)]
        )
        self._threads = ThreadPoolExecutor(max(1, reading.threads), "pictures")
        self._step = 0
        self._waiting: dict[tuple[int, int], Future[Sample]] = {}
        self._broken: set[int] = set()

    # -- what a trainer asks: steps ------------------------------------------------------------------

    def at(self, step: int) -> tuple[int, ...]:
        """The examples of a step; reading those of this process begins, and of the next step."""
        numbers = self.stream.at(step)
        self._step = step
        self._waiting = {key: each for key, each in self._waiting.items() if key[0] >= step}
        self._fetch(step, numbers)
        self._fetch(step + 1, self.stream.ahead(step + 1))
        return numbers

    def position(self, step: int) -> object:
        """Where in the shards a step stands."""
        return self.stream.position(step)

    def seek(self, step: int, position: object) -> None:
        """Go to where `position` was taken."""
        self._waiting.clear()
        self.stream.seek(step, position)

    def close(self) -> None:
        """Stop reading ahead."""
        self._threads.shutdown(cancel_futures=True)
        for stream in (self.stream, self._aside):
            if stream is not None:
                stream.close()

    # -- what a trainer asks: examples ---------------------------------------------------------------

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """None: the order of a stream is its own."""
        return ()

    @property
    def held_out(self) -> Sequence[Sequence[int]]:
        """Examples of the shards that are only measured; their numbers are negative."""
        return self._held

    def shape(self, number: int) -> tuple[int, int, int] | None:
        """Shape of an example's latent [4, h, w]; None when no pictures are read."""
        size = self._of(number)[0].shape(self._of(number)[1])
        if size is None or self._latents is None:
            return None
        factor = self._latents.factor
        return self._latents.channels, size[1] // factor, size[0] // factor

    def key(self, number: int) -> str:
        """The example's number in these shards."""
        return f"{self.stream.digest} {number}"

    def memory(self, length: int) -> Memory | None:
        """Nothing is kept: at this scale an example does not come again soon."""
        return None

    def batch(self, draw: Draw) -> Batch:
        """The examples of a draw; one that cannot be read is replaced by the next one that can."""
        size = None
        if draw.noise is not None and self._latents is not None:
            size = (draw.noise.shape[3] * self._latents.factor, draw.noise.shape[2] * self._latents.factor)
        return self._batch([self._sample(number, size) for number in draw.numbers])

    def empty(self) -> Batch:
        """The empty prompt."""
        return self._batch([Sample(Captions("", "", False), None, ())])

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        captions = [sample.captions for sample in samples]
        rows, pooled = self._english([each.english for each in captions])
        native = [each.native if self._typed else normalise(each.native).text for each in captions]
        ids, mask = (each.to(self._device) for each in self._tower.batch(native))
        pictures = [sample.picture for sample in samples if sample.picture is not None]
        latents = None
        if pictures and self._latents is not None:
            latents = self._latents(torch.stack(pictures))
        sizes = None
        if pictures and self._pooled:
            told = torch.tensor([self._ordered(sample.sizes) for sample in samples], device=self._device)
            sizes = embedded(told, self._embedding)
        return Batch(
            latents=latents,
            english=rows,
            english_pooled=pooled if self._pooled else None,
            hidden=None if self._learns else self._states(ids, mask),
            ids=ids if self._learns else None,
            mask=mask if self._learns else None,
            native_only=torch.tensor([float(each.native_only) for each in captions], device=self._device),
            sizes=sizes,
        )

    @torch.no_grad()
    def _states(self, ids: Tensor, mask: Tensor) -> Hidden:
        return self._tower(ids, mask)

    def _ordered(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The authors turn the first and the last pair round, and leave the cut as it is."""
        if self._reading.order == "height":
            return sizes
        high, wide, top, left, below, across = sizes
        return wide, high, top, left, across, below

    # -- one example ---------------------------------------------------------------------------------

    def _of(self, number: int) -> tuple[Stream, int]:
        if number >= 0:
            return self.stream, number
        assert self._aside is not None
        return self._aside, -1 - number

    def _fetch(self, step: int, numbers: Sequence[int]) -> None:
        index, count = self._part
        share = len(numbers) // count
        epoch = self.stream.epoch_of(step) if numbers else 0
        for number in numbers[index * share : (index + 1) * share]:
            if (step, number) not in self._waiting and number not in self._broken:
                size = self.stream.shape(number)
                job = self._job(self.stream, number, size, epoch)
                self._waiting[step, number] = self._threads.submit(job)

    def _job(self, stream: Stream, number: int, size: Size | None, epoch: int) -> Callable[[], Sample]:
        path, place = stream.place(number)
        return lambda: self._read(path, place, number, size, epoch)

    def _sample(self, number: int, size: Size | None) -> Sample:
        stream, inner = self._of(number)
        others = (
            self.stream.neighbours(self._step, inner)
            if stream is self.stream
            else [-1 - each for group in self._held for each in group]
        )
        tried = 0
        for one in (inner, *others):
            tried += 1
            found = self._tried(one, size, stream)
            if found is not None:
                return found
        raise self._nothing(tried)

    def _tried(self, number: int, size: Size | None, stream: Stream) -> Sample | None:
        """An example of this size, or None when it cannot be read, which is then known."""
        if stream is self.stream and number in self._broken:
            return None
        try:
            waiting = self._waiting.get((self._step, number)) if stream is self.stream else None
            if waiting is not None and size == stream.shape(number):
                return waiting.result()
            epoch = self.stream.epoch_of(self._step) if stream is self.stream else -1
            return self._job(stream, number, size, epoch)()
        except (PictureError, OSError) as error:
            path, _ = stream.place(number)
            self.unreadable += 1
            if self.unreadable <= MOST_NAMED:
                logging.warning("%s: an example cannot be read and is passed over: %s", path.name, error)
            if stream is self.stream:
                self._broken.add(number)
            return None

    def _read(self, path: Path, place: Place, number: int, size: Size | None, epoch: int) -> Sample:
        with path.open("rb") as file:
            fields = fields_of(read(file, place.text))
            data = b"" if size is None else read(file, place.picture)
        if fields is None:
            raise PictureError(path.name, "a caption file that is no JSON any more")
        captions = self._rules.read(fields)
        if size is None:
            return Sample(captions, None, ())
        where = (0.5, 0.5)
        if self._reading.crop == "random" and epoch >= 0:
            chance = torch.rand(2, generator=generator(self._seed, "crop", epoch, number))
            where = (float(chance[0]), float(chance[1]))
        picture = read_picture(io.BytesIO(data), size, where)
        return Sample(captions, picture, (*_cut(place.size, size, where),))

    def _nothing(self, tried: int) -> BridgeError:
        return BridgeError(
            "No picture of this part of the shards can be read.",
            f"{tried} pictures, none of them whole",
            "whole pictures",
            "Look at the shards that the log names; copy them again.",
        )


def _cut(picture: Size, size: Size, where: tuple[float, float]) -> tuple[int, ...]:
    """SDXL's sizes: of a picture, of what is cut off once it covers `size`, of `size`; heights first."""
    scale = max(size[0] / picture[0], size[1] / picture[1])
    left = round(where[0] * (picture[0] * scale - size[0]))
    top = round(where[1] * (picture[1] * scale - size[1]))
    return picture[1], picture[0], top, left, size[1], size[0]
