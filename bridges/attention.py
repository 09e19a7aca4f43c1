"""Attention and transformers under the weight names of torch's own modules, their layers from `ops`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from .base import Ops


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of queries [B, N, W] over keys, values [B, M, W], by `heads` heads.

    mask [B, M]: True where a key may be read; None = everywhere. Returns [B, N, W].
    """
    heard = None if mask is None else mask[:, None, None]
    mixed = scaled_dot_product_attention(
        _by_heads(queries, heads), _by_heads(keys, heads), _by_heads(values, heads), heard
    )
    return mixed.transpose(1, 2).flatten(2)


def _by_heads(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2)


class Attention(nn.Module):
    """torch.nn.MultiheadAttention(width, heads, batch_first=True): the same keys and numbers.

    Queries, keys and values share one packed matrix in_proj_weight [3W, W] with in_proj_bias [3W].
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        ops: Ops,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width, device=device, dtype=dtype))
        self.out_proj = ops.Linear(width, width, device=device, dtype=dtype)

    def start(self, generator: torch.Generator | None) -> None:
        """Start the packed matrix as torch does."""
        nn.init.xavier_uniform_(self.in_proj_weight, generator=generator)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, queries: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [B, N, W] over source [B, M, W], of which mask [B, M] (True = read) may hide rows."""
        # Host layers cast as they are called; bare parameters follow their input here.
        to_query, to_key, to_value = self.in_proj_weight.to(queries).chunk(3)
        query_bias, key_bias, value_bias = self.in_proj_bias.to(queries).chunk(3)
        heard = attend(
            linear(queries, to_query, query_bias),
            linear(source, to_key, key_bias),
            linear(source, to_value, value_bias),
            self.heads,
            mask,
        )
        return self.out_proj(heard)


class TransformerLayer(nn.Module):
    """One pre-norm layer with ReLU; one that `listens` also attends to a memory, as decoder layers do."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        listens: bool,
        ops: Ops,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, ops=ops, device=device, dtype=dtype)
        self.norm1 = ops.LayerNorm(width, device=device, dtype=dtype)
        if listens:
            self.multihead_attn = Attention(width, heads, ops=ops, device=device, dtype=dtype)
            self.norm3 = ops.LayerNorm(width, device=device, dtype=dtype)
        self.linear1 = ops.Linear(width, 4 * width, device=device, dtype=dtype)
        self.linear2 = ops.Linear(4 * width, width, device=device, dtype=dtype)
        self.norm2 = ops.LayerNorm(width, device=device, dtype=dtype)
        self.listens = listens

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """x [B, N, W]; mask [B, M] hides rows of what is attended to last: the memory, or x itself."""
        own = self.norm1(x)
        x = x + self.self_attn(own, own, None if self.listens else mask)
        if self.listens:
            x = x + self.multihead_attn(self.norm2(x), memory, mask)
        return x + self.linear2(torch.relu(self.linear1((self.norm3 if self.listens else self.norm2)(x))))


class TransformerStack(nn.Module):
    """Layers and a norm behind the last."""

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        *,
        listens: bool,
        ops: Ops,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, listens=listens, ops=ops, device=device, dtype=dtype)
            for _ in range(depth)
        )
        self.norm = ops.LayerNorm(width, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """x [B, N, W] through all layers and the norm."""
        for layer in self.layers:
            x = layer(x, mask, memory)
        return self.norm(x)


class Transformer(nn.Module):
    """torch.nn.Transformer(width, heads, depth, depth, 4 * width, 0, norm_first=True, batch_first=True).

    ReLU and a norm behind either stack are torch's defaults, on which published weights rely.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        *,
        ops: Ops,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = TransformerStack(
            width, heads, depth, listens=False, ops=ops, device=device, dtype=dtype
        )
        self.decoder = TransformerStack(
            width, heads, depth, listens=True, ops=ops, device=device, dtype=dtype
        )

    def forward(self, source: Tensor, queries: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [B, N, W] that read source [B, M, W] where mask [B, M] is True (None = everywhere)."""
        return self.decoder(queries, mask, self.encoder(source, mask))
