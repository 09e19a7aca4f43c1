"""Kind `ella`: the timestep-aware connector of ELLA (arXiv 2403.05135) for SD1.x.

64 learned latents listen to the text and to each other in six perceiver blocks; the denoising step shifts and
scales every norm, so the context is another one at each step. Follows model.py of TencentQQGYLab/ELLA
(3c228f1) in its keys. Published: hidden 2048 (Flan-T5-XL encoder, computed in float16), context 768.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from .attention import Attention
from .base import (
    Bridge,
    BridgeSpec,
    Cond,
    Hidden,
    Ops,
    extent,
    require_depth,
    require_divisible,
    require_sizes,
)

EPS = 1e-6
LONGEST_PERIOD = 10_000


@dataclass(frozen=True, kw_only=True)
class EllaSpec(BridgeSpec):
    """Sizes: `queries` latents, `layers` blocks of `heads` heads, `channels` of the timestep's sinusoids.

    padding: read padding rows too. The authors trained with 128 tokens, padding included, and show their
    pictures without any (the default here); the two give different conditioning.
    """

    queries: int = 64
    layers: int = 6
    heads: int = 8
    channels: int = 320
    padding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, queries=1, layers=1, heads=1, channels=2)
        require_depth(self, "layers")
        require_divisible(self, context=self.heads, channels=2)


class _TimedNorm(nn.Module):
    """LayerNorm whose shift and scale are read off the timestep."""

    def __init__(
        self, width: int, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.linear = ops.Linear(width, 2 * width, device=device, dtype=dtype)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, N, W], time [B, 1, W]."""
        shift, scale = self.linear(silu(time)).chunk(2, dim=-1)
        return layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class _Mlp(nn.Module):
    """Two layers with a squared ReLU between them."""

    def __init__(
        self, width: int, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.c_fc = ops.Linear(width, 4 * width, device=device, dtype=dtype)
        self.c_proj = ops.Linear(4 * width, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, W]."""
        return self.c_proj(torch.relu(self.c_fc(x)).square())


class _Block(nn.Module):
    """Latents listen to themselves and the text, then think."""

    def __init__(
        self, width: int, heads: int, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, ops=ops, device=device, dtype=dtype)
        self.mlp = _Mlp(width, ops, device, dtype)
        self.ln_1 = _TimedNorm(width, ops, device, dtype)
        self.ln_2 = _TimedNorm(width, ops, device, dtype)
        self.ln_ff = _TimedNorm(width, ops, device, dtype)

    def forward(self, latents: Tensor, text: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        """latents [B, N, W], text [B, T, W], time [B, 1, W], mask [B, N + T]."""
        own = self.ln_1(latents, time)
        latents = latents + self.attn(own, torch.cat([own, self.ln_2(text, time)], dim=1), mask)
        return latents + self.mlp(self.ln_ff(latents, time))


class _Connector(nn.Module):
    """The latents and their blocks."""

    def __init__(
        self, spec: EllaSpec, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        width = spec.context
        self.latents = nn.Parameter(torch.empty(spec.queries, width, device=device, dtype=dtype))
        self.time_aware_linear = ops.Linear(width, width, device=device, dtype=dtype)
        self.proj_in = ops.Linear(spec.hidden, width, device=device, dtype=dtype)
        self.perceiver_blocks = nn.ModuleList(
            _Block(width, spec.heads, ops, device, dtype) for _ in range(spec.layers)
        )

    def start(self, generator: torch.Generator | None) -> None:
        """Start the latents as the authors do."""
        nn.init.normal_(self.latents, std=self.latents.shape[-1] ** -0.5, generator=generator)

    def forward(self, states: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        """states [B, T, D], time [B, 1, W], mask [B, T] to latents [B, N, W]."""
        text = self.proj_in(states)
        latents = self.latents.to(text) + self.time_aware_linear(silu(time))  # [B, N, W]
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(mask), latents.shape[1]), mask], dim=1)
        for block in self.perceiver_blocks:
            latents = block(latents, text, time, mask)
        return latents


class _TimeEmbedding(nn.Module):
    """Two layers over the sinusoids of the timestep."""

    def __init__(
        self, spec: EllaSpec, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(spec.channels, spec.context, device=device, dtype=dtype)
        self.linear_2 = ops.Linear(spec.context, spec.context, device=device, dtype=dtype)

    def forward(self, waves: Tensor) -> Tensor:
        """waves [B, 1, channels] to [B, 1, W]."""
        return self.linear_2(silu(self.linear_1(waves)))


class Ella(Bridge, kind="ella"):
    """context = connector(states, timestep), [B, 64, C]; no pooled vector."""

    Spec = EllaSpec
    tokenwise = False
    timed = True
    pools = False

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert isinstance(spec, EllaSpec)
        super().__init__(spec, ops=ops, device=device, dtype=dtype)
        self.time_embedding = _TimeEmbedding(spec, ops, device, dtype)
        self.connector = _Connector(spec, ops, device, dtype)

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Map states [B, T, D] at timestep [B] to context [B, 64, C]."""
        self.check(hidden)
        assert isinstance(self.spec, EllaSpec)
        states = hidden.states
        waves = sinusoids(self.require_timestep(timestep, len(states)).to(states.device), self.spec.channels)
        time = self.time_embedding(waves[:, None].to(states))
        return Cond(self.connector(states, time, None if self.spec.padding else hidden.mask))

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> EllaSpec | None:
        """Recognise the published layout by its exact set of keys and shapes (8 heads, as published)."""
        return cls.exact(
            shapes,
            hidden=extent(shapes, "connector.proj_in.weight", 1),
            context=extent(shapes, "connector.proj_in.weight"),
            queries=extent(shapes, "connector.latents"),
            layers=sum(key.endswith(".attn.in_proj_weight") for key in shapes),
            channels=extent(shapes, "time_embedding.linear_1.weight", 1),
        )


def sinusoids(timestep: Tensor, channels: int) -> Tensor:
    """timestep [B] to [B, channels], float32: cosines, then sines, of periods from 2 pi to 20,000 pi."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
