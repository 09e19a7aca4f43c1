"""The frozen U-Net as training sees it: its noise schedule, and one call whatever its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn


class Denoise(Protocol):
    """noisy [B, 4, h, w], timestep [B], context [B, N, C] and, for SDXL, y [B, P + S] to [B, 4, h, w]."""

    def __call__(self, noisy: Tensor, timestep: Tensor, context: Tensor, y: Tensor | None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Backbone:
    """A U-Net with what it was trained to predict.

    unet: its modules, where taps are set; abar: cumulative product of 1 - beta, [1000] fp32;
    prediction: "eps" (noise) or "v" (velocity, arXiv 2202.00512, section 4 and appendix D);
    denoise: how it is called, None for `unet(noisy, timestep, context=..., y=...)` as LDM's are.
    """

    unet: nn.Module
    abar: Tensor
    prediction: Literal["eps", "v"] = "eps"
    denoise: Denoise | None = None

    def noised(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """sqrt(abar) latents + sqrt(1 - abar) noise, at timestep [B] int64."""
        signal, rest = self._shares(timestep, latents)
        return signal * latents + rest * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the U-Net should say of `noised`: the noise, or sqrt(abar) noise - sqrt(1 - abar) latents."""
        if self.prediction == "eps":
            return noise
        signal, rest = self._shares(timestep, latents)
        return signal * noise - rest * latents

    def clean(self, noisy: Tensor, said: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and the noise that what the U-Net said of `noisy` stands for."""
        signal, rest = self._shares(timestep, noisy)
        if self.prediction == "eps":
            return (noisy - rest * said) / signal, said
        return signal * noisy - rest * said, signal * said + rest * noisy

    def __call__(
        self,
        noisy: Tensor,
        timestep: Tensor,
        *,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """What the U-Net says; SDXL reads pooled [B, P] and the embedding of the sizes [B, S] behind it."""
        y = None if pooled is None or sizes is None else torch.cat([pooled, sizes.to(pooled)], dim=1)
        if self.denoise is not None:
            return self.denoise(noisy, timestep.float(), context, y)
        given = {} if y is None else {"y": y}
        return cast(Any, self.unet)(noisy, timestep.float(), context=context, **given)

    def _shares(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar.to(timestep.device)[timestep].to(like).view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()
