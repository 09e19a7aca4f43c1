"""A thin picture autoencoder, 64x64x3 to 4x8x8 and back, that widens exactly into the TAESD layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TAESD_WIDTH = 64
"""Channels of every inner layer of the published TAESD layout."""

STOCK_SCALE = 0.18215
"""Factor by which an SD1.x host multiplies what a VAE encodes before the U-Net sees it."""


class _Clamp(torch.nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return torch.tanh(latent / 3) * 3


class _Block(torch.nn.Module):
    """Three convolutions with a shortcut: [B, width, H, W] to the same shape."""

    def __init__(self, width: int, ops: Any) -> None:
        super().__init__()
        self.conv = torch.nn.Sequential(
            ops.Conv2d(width, width, 3, padding=1),
            torch.nn.ReLU(),
            ops.Conv2d(width, width, 3, padding=1),
            torch.nn.ReLU(),
            ops.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.conv(features) + features)


class Autoencoder(torch.nn.Module):
    """Encoder and decoder in the layer order of TAESD, with `width` channels where TAESD has 64.

    Without normalisation layers a channel of zeros stays zero through every layer, so padding the weights
    with zeros to 64 channels (`taesd_state`) computes the same function.
    """

    def __init__(self, width: int = 32, ops: Any = torch.nn) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, **options: Any) -> torch.nn.Module:
            return ops.Conv2d(inputs, outputs, 3, padding=1, **options)

        def blocks(count: int) -> list[torch.nn.Module]:
            return [_Block(width, ops) for _ in range(count)]

        def down() -> torch.nn.Module:
            return conv(width, width, stride=2, bias=False)

        def up() -> list[torch.nn.Module]:
            return [torch.nn.Upsample(scale_factor=2), conv(width, width, bias=False)]

        self.width = width
        self.taesd_encoder = torch.nn.Sequential(
            conv(3, width),
            *blocks(1),
            down(),
            *blocks(3),
            down(),
            *blocks(3),
            down(),
            *blocks(3),
            conv(width, 4),
        )
        self.taesd_decoder = torch.nn.Sequential(
            _Clamp(),
            conv(4, width),
            torch.nn.ReLU(),
            *blocks(3),
            *up(),
            *blocks(3),
            *up(),
            *blocks(3),
            *up(),
            *blocks(1),
            conv(width, 3),
        )

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in 0..1 to latents [B, 4, H/8, W/8]."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to pictures [B, 3, 8h, 8w], nominally in 0..1."""
        return self.taesd_decoder(latents)


def taesd_state(model: Autoencoder, deviation: float) -> dict[str, Tensor]:
    """The state dict of a 64-channel TAESD that computes what `model` computes.

    deviation: standard deviation of the model's latents; `vae_scale` is set so that the host's U-Net sees
    latents of standard deviation 1 after its own factor of `STOCK_SCALE`.
    """
    padded: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        shape = [TAESD_WIDTH if size == model.width else size for size in value.shape[:2]] + list(
            value.shape[2:]
        )
        wide = torch.zeros(shape, dtype=value.dtype)
        wide[tuple(slice(0, size) for size in value.shape)] = value
        padded[key] = wide
    padded["vae_scale"] = torch.tensor(deviation * STOCK_SCALE)
    padded["vae_shift"] = torch.tensor(0.0)
    return padded
