"""What a training reads: batches of cached tensors, and who gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from ..bridges.base import Hidden
from .chance import Draw


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples as tensors; what a method does not need is None.

    latents [B, 4, h, w]; english: rows of the English caption [B, M, C], and its pooled vector [B, P];
    hidden: what a frozen tower says of the native caption; ids, mask [B, T]: the same caption for a tower
    that learns; native_only [B] float: PEA's flag z, 1 where no English caption is to be trusted;
    sizes [B, S]: SDXL's embedding of picture sizes.
    """

    latents: Tensor | None = None
    english: Tensor | None = None
    english_pooled: Tensor | None = None
    hidden: Hidden | None = None
    ids: Tensor | None = None
    mask: Tensor | None = None
    native_only: Tensor | None = None
    sizes: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return self._each(lambda value: value.to(device))

    def chosen(self, places: Tensor) -> Batch:
        """The examples at these places [K] int64."""
        return self._each(lambda value: value[places.to(value.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Hidden):
                pooled = None if value.pooled is None else change(value.pooled)
                value = Hidden(change(value.states), change(value.mask), pooled)
            elif value is not None:
                value = change(value)
            changed[field.name] = value
        return Batch(**changed)


class Memory(Protocol):
    """Rows of numbers kept by key; a `Bank` is one."""

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys that it does not hold."""
        ...

    def put(self, keys: Sequence[str], values: Tensor) -> None:
        """Keep values [K, length]."""
        ...

    def get(self, keys: Sequence[str]) -> Tensor:
        """The values [K, length] of keys that it holds."""
        ...


class Source(Protocol):
    """Examples by number."""

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """Numbers of the examples to learn from; those of one group may share a batch."""
        ...

    @property
    def held_out(self) -> Sequence[Sequence[int]]:
        """Numbers of the examples that are only measured."""
        ...

    def shape(self, number: int) -> tuple[int, int, int] | None:
        """Shape of an example's latent [4, h, w]; None where there are no pictures."""
        ...

    def key(self, number: int) -> str:
        """Hex digest of everything that the frozen models read of an example, and of these models."""
        ...

    def memory(self, length: int) -> Memory | None:
        """Where rows of so many numbers, one for an example at a fixed draw, are kept; None: nowhere."""
        ...

    def batch(self, draw: Draw) -> Batch:
        """The examples of a draw, on the device of the training."""
        ...

    def empty(self) -> Batch:
        """The empty prompt, one row: english, english_pooled, and hidden or ids and mask."""
        ...
