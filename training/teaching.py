"""What the frozen U-Net says under English text, computed once for each fixed draw of an example."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor, autocast

from ..bridges.errors import BridgeError
from .bank import Damaged
from .chance import Draw
from .settings import Settings
from .source import Batch, Memory, Source

Teach = Callable[[Batch, Draw], tuple[Tensor, ...]]
"""The examples of a draw to what the frozen U-Net says of each: tensors [B, ...]."""

_STORED = torch.float16


class Teaching:
    """Calls `teach`, or remembers what it said before.

    With fixed draws (`Settings.draws`) what is remembered is stored in half precision, and so is what is
    said for the first time, so that a training sees the same numbers whenever it was interrupted.
    """

    def __init__(self, teach: Teach, source: Source, settings: Settings, name: str) -> None:
        self._teach = teach
        self._source = source
        self._settings = settings
        self._name = name
        self._shapes: dict[tuple[int, ...] | None, list[torch.Size]] = {}
        self._memories: dict[int, Memory | None] = {}

    def of(self, batch: Batch, draw: Draw) -> tuple[Tensor, ...]:
        """What the frozen U-Net says of these examples, [B, ...] each; no gradient flows into it."""
        with torch.no_grad():
            if draw.fixed is None:
                return self._teach(batch, draw)
            shapes = self._shapes_of(batch, draw)
            keys = [self._key(draw, place) for place in range(len(draw.numbers))]
            memory = self._memory(sum(each.numel() for each in shapes))
            kind = draw.timestep.device.type
            with autocast(kind, enabled=False):  # it has no rule for stacking half precision on a CPU
                known = _held(memory, keys)
            places = [place for place, key in enumerate(keys) if key not in known]
            told = self._teach(_rows(batch, places), _chosen(draw, places)) if places else ()
            with autocast(kind, enabled=False):
                rows = self._kept(memory, known, keys, places, told).to(draw.timestep.device).float()
            return _parts(rows, shapes)

    def _shapes_of(self, batch: Batch, draw: Draw) -> list[torch.Size]:
        """Shapes of what is said of one example, by asking once for each shape of latents."""
        shape = None if draw.noise is None else tuple(draw.noise.shape[1:])
        if shape not in self._shapes:
            told = self._teach(_rows(batch, [0]), draw.part(0, 1))
            self._shapes[shape] = [each.shape[1:] for each in told]
        return self._shapes[shape]

    def _memory(self, length: int) -> Memory | None:
        if length not in self._memories:
            self._memories[length] = self._source.memory(length)
        return self._memories[length]

    def _kept(
        self,
        memory: Memory | None,
        known: dict[str, Tensor],
        keys: list[str],
        places: list[int],
        told: tuple[Tensor, ...],
    ) -> Tensor:
        """Rows [B, length] in half precision: those just told, which are kept, and those known before."""
        if not places:
            return torch.stack([known[key] for key in keys])
        flat = torch.cat([each.flatten(1) for each in told], dim=1).to(_STORED)
        if not bool(torch.isfinite(flat).all()):
            raise BridgeError(
                "What the U-Net says cannot be kept.",
                "numbers beyond half precision",
                "numbers up to 65504",
                "Train without fixed draws (draws = 0).",
            )
        said = dict(zip([keys[place] for place in places], flat.cpu(), strict=True))
        if memory is not None:
            memory.put(list(said), torch.stack(list(said.values())))
        return torch.stack([known[key] if key in known else said[key] for key in keys])

    def _key(self, draw: Draw, place: int) -> str:
        assert draw.fixed is not None and draw.noise is not None
        settings = self._settings
        facts = (
            self._name,
            self._source.key(draw.numbers[place]),
            draw.numbers[place],
            settings.seed,
            settings.high_noise,
            settings.noise_offset,
            int(draw.fixed[place]),
            bool(draw.dropped[place]),
            tuple(draw.noise.shape[1:]),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def _held(memory: Memory | None, keys: list[str]) -> dict[str, Tensor]:
    """What a memory holds of these keys; records that the disk has damaged count as not held."""
    if memory is None:
        return {}
    lacking = set(memory.missing(keys))
    while True:
        held = [key for key in dict.fromkeys(keys) if key not in lacking]
        try:
            return dict(zip(held, memory.get(held), strict=True)) if held else {}
        except Damaged as error:
            logging.warning("%s", error)
            lacking |= set(error.keys)


def _rows(batch: Batch, places: list[int]) -> Batch:
    return batch.chosen(torch.tensor(places))


def _chosen(draw: Draw, places: list[int]) -> Draw:
    index = torch.tensor(places, device=draw.timestep.device)
    return Draw(
        tuple(draw.numbers[place] for place in places),
        draw.timestep[index],
        draw.dropped[index],
        *(None if each is None else each[index] for each in (draw.noise, draw.extra, draw.fixed)),
    )


def _parts(rows: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
    """Rows [B, length] cut into tensors [B, *shape]."""
    parts: list[Tensor] = []
    start = 0
    for each in shapes:
        parts.append(rows[:, start : start + each.numel()].reshape(len(rows), *each))
        start += each.numel()
    return tuple(parts)
