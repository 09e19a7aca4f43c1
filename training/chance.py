"""Everything random in a step, drawn from the seed and the step's number alone.

So a training that goes on after a crash, one whose batches are cut smaller, and one that runs in two
processes see the same noise, timesteps and dropped captions as one that was never disturbed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bridges.base import TIMESTEPS
from .settings import Settings

_NOISY = 3 * TIMESTEPS // 5


def generator(*seeds: object) -> torch.Generator:
    """A generator on the CPU that the seeds decide, and nothing else."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True, eq=False)
class Draw:
    """The chance of some examples: numbers of the examples, noise and extra noise [B, 4, h, w] or none,
    timestep [B] int64, dropped [B] bool, and which of its fixed draws an example has, [B] int64.
    """

    numbers: tuple[int, ...]
    timestep: Tensor
    dropped: Tensor
    noise: Tensor | None = None
    extra: Tensor | None = None
    fixed: Tensor | None = None

    def part(self, start: int, end: int) -> Draw:
        """The chance of examples `start` to `end`."""
        return Draw(
            self.numbers[start:end],
            self.timestep[start:end],
            self.dropped[start:end],
            *(None if each is None else each[start:end] for each in (self.noise, self.extra, self.fixed)),
        )

    def to(self, device: torch.device | str) -> Draw:
        """The same on another device."""
        return Draw(
            self.numbers,
            self.timestep.to(device),
            self.dropped.to(device),
            *(None if each is None else each.to(device) for each in (self.noise, self.extra, self.fixed)),
        )


class Chance:
    """Draws for a training with these settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def at(self, step: int, numbers: Sequence[int], shape: Sequence[int] | None) -> Draw:
        """The chance of a whole step over these examples; shape: of one latent [4, h, w], or None."""
        return self._draw(generator(self.settings.seed, "step", step), numbers, shape, self.settings.drop)

    def held_out(self, numbers: Sequence[int], shape: Sequence[int] | None) -> Draw:
        """The chance of examples that are only measured: the same at every measurement, nothing dropped."""
        return self._draw(generator("held out", *numbers), numbers, shape, 0.0)

    def fixed(self, number: int, draw: int, shape: Sequence[int]) -> tuple[Tensor, int, bool]:
        """Noise [4, h, w] and timestep of one of the fixed draws of an example, and whether it is dropped."""
        source = generator(self.settings.seed, "fixed", number, draw)
        timestep = int(self._timesteps(source, 1))
        dropped = bool(torch.rand(1, generator=source) < self.settings.drop)
        return self._noise(source, (1, *shape))[0], timestep, dropped

    def _draw(
        self, source: torch.Generator, numbers: Sequence[int], shape: Sequence[int] | None, drop: float
    ) -> Draw:
        count = len(numbers)
        dropped = torch.rand(count, generator=source) < drop
        timestep = self._timesteps(source, count)
        if shape is None:
            return Draw(tuple(numbers), timestep, dropped)
        if self.settings.draws:
            which = torch.randint(self.settings.draws, (count,), generator=source)
            drawn = [
                self.fixed(number, int(draw), shape) for number, draw in zip(numbers, which, strict=True)
            ]
            noise, timestep = torch.stack([each[0] for each in drawn]), torch.tensor([t for _, t, _ in drawn])
            dropped = torch.tensor([each[2] for each in drawn]) & (drop > 0)
        else:
            which, noise = None, self._noise(source, (count, *shape))
        extra = None
        if self.settings.perturbation:
            extra = self.settings.perturbation * torch.randn(noise.shape, generator=source)
        return Draw(tuple(numbers), timestep, dropped, noise, extra, which)

    def _timesteps(self, source: torch.Generator, count: int) -> Tensor:
        anywhere = torch.randint(TIMESTEPS, (count,), generator=source)
        noisy = torch.randint(_NOISY, TIMESTEPS, (count,), generator=source)
        return torch.where(torch.rand(count, generator=source) < self.settings.high_noise, noisy, anywhere)

    def _noise(self, source: torch.Generator, shape: Sequence[int]) -> Tensor:
        noise = torch.randn(tuple(shape), generator=source)
        if self.settings.noise_offset:
            flat = torch.randn((*shape[:2], 1, 1), generator=source)
            noise = noise + self.settings.noise_offset * flat
        return noise
