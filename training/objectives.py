"""What a bridge learns from: each objective is (what the bridge said, what it should match) to a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .taps import BlockTaps, CrossAttention


@dataclass(frozen=True)
class Loss:
    """total: what is minimised; parts: its named terms before weighting."""

    total: Tensor
    parts: dict[str, Tensor]


class Denoiser(Protocol):
    """A frozen U-Net: noisy latents [B, 4, h, w], timesteps [B] and context [B, N, C] to predicted noise [B,
    4, h, w].
    """

    def __call__(self, noisy: Tensor, timestep: Tensor, *, context: Tensor) -> Tensor: ...


class Iap:
    """IAP-style: image queries attend to native text as they attend to English text.

    After "Images As Pivots" (arXiv 2305.11540, abstract): the distance between cross-attention(image, native)
    and cross-attention(image, English) is minimised, and only the native side learns. The paper's choice of
    attention is not published in code; here the queries, keys, values and output projections are the frozen
    U-Net's own, which makes this a relative of the paper's method and not a copy. Each layer's squared
    distance is divided by the variance of its target, so that every layer counts alike.
    """

    def __init__(self, layers: Sequence[CrossAttention]) -> None:
        self.layers = list(layers)

    def __call__(self, queries: Sequence[Tensor], native: Tensor, english: Tensor) -> Loss:
        """queries: one [B, pixels, channels] for each layer; native, english: contexts [B, N, C] and [B, M,
        C].
        """
        terms: dict[str, Tensor] = {}
        for index, (layer, query) in enumerate(zip(self.layers, queries, strict=True)):
            with torch.no_grad():
                target = layer.attend(query, english)
            distance = (layer.attend(query, native) - target).square().mean()
            terms[f"layer{index}"] = distance / target.var().clamp(min=1e-6)
        return Loss(torch.stack(list(terms.values())).mean(), terms)


@dataclass(frozen=True)
class PeaBatch:
    """noisy, noise [B, 4, h, w]; timestep [B]; teacher: English context [B, M, C]; native_only [B]: the flag
    z, 1 where a caption has no English parallel.
    """

    noisy: Tensor
    noise: Tensor
    timestep: Tensor
    teacher: Tensor
    native_only: Tensor


class Pea:
    """PEA-Diffusion's distillation through the frozen U-Net (arXiv 2311.17086; terms as in the authors'
    released code).

    L = mean(z (e_s - e)^2) + mean((1 - z)(e_s - e_t)^2) + weight * sum over blocks of mean((1 - z)(F_s -
    F_t)^2), where e_s and e_t are the noise predicted under native and under English text and F the outputs
    of the level ends. Teacher and student are one U-Net run twice: both of the authors' copies hold the same
    frozen weights.
    """

    def __init__(
        self,
        unet: nn.Module,
        denoise: Denoiser | None = None,
        weight: float = 0.1,
        taps: Callable[[nn.Module], BlockTaps] = BlockTaps,
    ) -> None:
        self.unet = unet
        self.denoise: Denoiser = denoise or unet
        self.weight = weight
        self.taps = taps

    def __call__(self, native: Tensor, batch: PeaBatch) -> Loss:
        """native: what the bridge said, [B, N, C]; gradients reach it through the U-Net."""
        with torch.no_grad(), self.taps(self.unet) as teacher_taps:
            teacher = self.denoise(batch.noisy, batch.timestep, context=batch.teacher)
        with self.taps(self.unet) as student_taps:
            student = self.denoise(batch.noisy, batch.timestep, context=native)
        z = batch.native_only
        noise = _flagged(student, batch.noise, z)
        logit = _flagged(student, teacher, 1 - z)
        pairs = zip(student_taps.taken, teacher_taps.taken, strict=True)
        feature = torch.stack([_flagged(ours, theirs, 1 - z) for ours, theirs in pairs]).sum()
        total = noise + logit + self.weight * feature
        return Loss(total, {"noise": noise, "logit": logit, "feature": feature})


class Align:
    """Rows drawn to the English rows: mean(1 - cosine) + length * mean((|native| - |English|)^2).

    OmniDiffusion's first stage (arXiv 2405.12914; "cos-len" of the released code, where length = 2e-5).
    """

    def __init__(self, length: float = 2e-5) -> None:
        self.length = length

    def __call__(self, native: Tensor, english: Tensor) -> Loss:
        """native, english: rows [B, N, C] of the same number."""
        ours, theirs = native.float(), english.float()
        cosine = (1 - nn.functional.cosine_similarity(ours, theirs, dim=-1)).mean()
        length = (_lengths(ours) - _lengths(theirs)).square().mean()
        return Loss(cosine + self.length * length, {"cosine": cosine, "length": length})


class Diffusion:
    """The plain diffusion loss, mean(w(t) (e_s - e)^2).

    What AltDiffusion trains its U-Net with (arXiv 2308.09991; noise prediction and plain squared error as in
    the authors' training configuration).

    unet: predicts noise and may itself be learning, for example its cross-attention's keys and values.
    weight: w, one number for each timestep [1000], or None for w = 1.
    """

    def __init__(self, unet: Denoiser, weight: Tensor | None = None) -> None:
        self.unet = unet
        self.weight = weight

    def __call__(self, native: Tensor, noisy: Tensor, noise: Tensor, timestep: Tensor) -> Loss:
        """native [B, N, C]; noisy, noise [B, 4, h, w]; timestep [B]."""
        guess = self.unet(noisy, timestep, context=native)
        each = (guess.float() - noise.float()).square().flatten(1).mean(1)
        total = (each if self.weight is None else self.weight[timestep.long()] * each).mean()
        return Loss(total, {"noise": total})


def _lengths(rows: Tensor) -> Tensor:
    """Euclidean length of each row: [B, N, C] to [B, N]."""
    return rows.square().sum(dim=-1).sqrt()


def _flagged(ours: Tensor, theirs: Tensor, flag: Tensor) -> Tensor:
    """Mean over the whole batch of flag * (ours - theirs)^2 in fp32; the flag leaves the divisor alone."""
    return (flag.view(-1, *[1] * (ours.ndim - 1)) * (ours.float() - theirs.float()).square()).mean()
