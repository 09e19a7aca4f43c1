"""A small cross-attention decoder from text states to a latent, for pretraining pocket text encoders."""

from __future__ import annotations

import torch
from torch import Tensor

ops = torch.nn  # no host under the recipes: plain torch, trained in fp32


class _Layer(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList(ops.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out = (ops.Linear(width, width, bias=False) for _ in range(4))
        self.mix_in, self.mix_out = ops.Linear(width, 3 * width), ops.Linear(width, width)
        self.grow, self.shrink = ops.Linear(width, 3 * width), ops.Linear(3 * width, width)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return found.transpose(1, 2).flatten(2)

    def forward(self, cells: Tensor, text: Tensor) -> Tensor:
        cells = cells + self.out(
            self._attend(self.query(self.norms[0](cells)), self.key(text), self.value(text))
        )
        cells = cells + self.mix_out(self._attend(*self.mix_in(self.norms[1](cells)).chunk(3, dim=-1)))
        return cells + self.shrink(torch.nn.functional.gelu(self.grow(self.norms[2](cells))))


class PictureReader(torch.nn.Module):
    """Text states [B, T, text] to a latent [B, 4, 8, 8]."""

    def __init__(self, text: int, width: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.cells = torch.nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.text = ops.Linear(text, width)
        self.layers = torch.nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = ops.LayerNorm(width)
        self.out = ops.Linear(width, 16)

    def forward(self, states: Tensor) -> Tensor:
        text = self.text(states)
        cells = self.cells.expand(len(states), -1, -1)
        for layer in self.layers:
            cells = layer(cells, text)
        patches = self.out(self.norm(cells)).view(-1, 4, 4, 4, 2, 2)  # [B, row, column, channel, 2, 2]
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, 4, 8, 8)
