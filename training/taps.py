"""Reads what a frozen U-Net computes inside: block features, queries and weights of its cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn


def cross_attentions(unet: nn.Module) -> list[nn.Module]:
    """Every cross-attention in running order; both LDM and diffusers call them `attn2`."""
    parts = cast(Any, unet)
    # diffusers registers the middle block last, but runs it before the way up.
    roots = [parts.down_blocks, parts.mid_block, parts.up_blocks] if hasattr(unet, "down_blocks") else [parts]
    named = [
        pair for root in roots for pair in cast("dict[str, nn.Module]", dict(root.named_modules())).items()
    ]
    return [module for name, module in named if name.endswith(".attn2")]


def level_ends(unet: nn.Module) -> list[nn.Module]:
    """The modules whose outputs PEA compares: the end of each level going down, the middle, the end of each
    going up.

    With diffusers those are `down_blocks`, `mid_block` and `up_blocks`; in the LDM layout a level ends with
    the block that changes the resolution, and the last level with the last block. Nine blocks on SD1.5, seven
    on SDXL.
    """
    if hasattr(unet, "down_blocks"):
        parts = cast(Any, unet)
        return [*parts.down_blocks, parts.mid_block, *parts.up_blocks]
    down = list(cast(Any, unet).input_blocks)
    up = list(cast(Any, unet).output_blocks)
    ends = [block for block in down if any(hasattr(part, "op") for part in block.children())]
    rises = [block for block in up if any(hasattr(part, "use_conv") for part in list(block.children())[1:])]
    # The host calls a block's layers one by one and never the block itself: its last layer stands for it.
    return [block[-1] for block in (*ends, down[-1], cast(Any, unet).middle_block, *rises, up[-1])]


class _Taps:
    """Forward hooks for the length of a `with` block."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.taken: list[Tensor] = []

    def __enter__(self) -> _Taps:
        for module in self._modules:
            self._handles.append(module.register_forward_hook(self._take))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _take(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.taken.append(cast(Tensor, output[0] if isinstance(output, tuple) else output))


class BlockTaps(_Taps):
    """The features of `level_ends` in the order in which the U-Net computes them."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__(level_ends(unet))

    @property
    def features(self) -> list[Tensor]:
        """One [B, channels, h, w] for each block."""
        return self.taken


class QueryTaps(_Taps):
    """The queries of every cross-attention."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__([cast(Any, attention).to_q for attention in cross_attentions(unet)])

    @property
    def queries(self) -> list[Tensor]:
        """One [B, pixels, channels] for each cross-attention, in the order of `cross_attentions`."""
        return self.taken


@dataclass(frozen=True)
class CrossAttention:
    """One frozen cross-attention as a function of ready queries and a text context."""

    module: nn.Module

    @staticmethod
    def of(unet: nn.Module) -> list[CrossAttention]:
        """All of a U-Net's, in the order of `QueryTaps.queries`."""
        return [CrossAttention(module) for module in cross_attentions(unet)]

    def attend(self, queries: Tensor, context: Tensor, projected: bool = True) -> Tensor:
        """Queries [B, pixels, C'] over a context [B, N, C], unmasked as in SD: [B, pixels, C'].

        projected: with the output projection, which mixes the heads; without it, what the heads found.
        """
        value = self._by_head(cast(Any, self.module).to_v(context))
        query, key = self._by_head(queries), self._by_head(cast(Any, self.module).to_k(context))
        found = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return cast(Any, self.module).to_out[0](found) if projected else found

    def weights(self, queries: Tensor, context: Tensor) -> Tensor:
        """How much each query looks at each row of the context: [B, heads, pixels, N], sums are one."""
        query, key = self._by_head(queries), self._by_head(cast(Any, self.module).to_k(context))
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)

    def _by_head(self, values: Tensor) -> Tensor:
        heads = int(cast(Any, self.module).heads)
        return cast(Any, values).unflatten(-1, (heads, -1)).transpose(1, 2)
