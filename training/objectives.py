"""What a bridge learns from: each objective is (what the bridge said, what it should match) to a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..bridges.errors import BridgeError
from .taps import BlockTaps

_COMPARED = ("output", "heads", "weights")
_DISTANCES = ("squared", "absolute", "cosine")


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


class Attention(Protocol):
    """Image queries [B, pixels, C'] over a text context [B, N, C]; `CrossAttention` is one."""

    def attend(self, queries: Tensor, context: Tensor, projected: bool = True) -> Tensor:
        """What the queries find, [B, pixels, C'']."""
        ...

    def weights(self, queries: Tensor, context: Tensor) -> Tensor:
        """How much each query looks at each row, [B, heads, pixels, N]."""
        ...


class PlainAttention:
    """Attention without weights: the rows of a text are its keys and its values.

    With the tokens of an image encoder as queries [B, M, C], as wide as the text, this is the reading of
    "Images As Pivots" in which image and text meet in CLIP's space and no U-Net is asked.
    """

    def attend(self, queries: Tensor, context: Tensor, projected: bool = True) -> Tensor:
        """softmax(q k / sqrt(C)) k: [B, M, C]; there is no projection to leave out."""
        return nn.functional.scaled_dot_product_attention(queries, context, context)

    def weights(self, queries: Tensor, context: Tensor) -> Tensor:
        """[B, 1, M, N], sums are one."""
        return (queries @ context.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1)[:, None]


@dataclass(frozen=True)
class IapSettings:
    """What "Images As Pivots" leaves open, as values; the defaults are ours and trained `pocket-iap`.

    compare: "output", what a cross-attention hands on; "heads", what its heads found before the projection
    that mixes them; "weights", where the heads look, which needs texts of equal length.
    distance: "squared", "absolute" or "cosine" (one minus it, along the channels, or the text for weights).
    scaled: whether each layer's distance is divided by the variance of its target, so that all layers count
    alike; a cosine is scaled as it is.
    layers: numbers of the cross-attentions in running order that count, from 0; None for all.
    """

    compare: Literal["output", "heads", "weights"] = "output"
    distance: Literal["squared", "absolute", "cosine"] = "squared"
    scaled: bool = True
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, known in (("compare", _COMPARED), ("distance", _DISTANCES)):
            if getattr(self, name) not in known:
                raise BridgeError(
                    f"The IAP-style objective does not know this choice of {name}.",
                    repr(getattr(self, name)),
                    " or ".join(known),
                    "Choose one of these.",
                )


class Iap:
    """IAP-style: image queries attend to native text as they attend to English text.

    After "Images As Pivots" (arXiv 2305.11540, abstract): the distance between cross-attention(image, native)
    and cross-attention(image, English) is minimised, and only the native side learns. The paper's choice of
    attention is not published in code, so this is a relative of the paper's method and not a copy. Which
    attention it is, is chosen by `layers`: those of the frozen U-Net, with its projections (`pocket-iap` was
    trained so), or a `PlainAttention` over the tokens of an image encoder. `IapSettings` holds what else is
    open.
    """

    def __init__(
        self,
        layers: Sequence[Attention],
        settings: IapSettings = IapSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self.layers = list(layers)
        self.settings = settings
        count = len(self.layers)
        self.counted = range(count) if settings.layers is None else settings.layers
        if not self.counted or not all(0 <= number < count for number in self.counted):
            raise BridgeError(
                "The IAP-style objective cannot compare these layers.",
                f"layers {list(self.counted)} of a U-Net with {count} cross-attentions",
                f"at least one, each from 0 to {count - 1}",
                "Choose other layers, or all of them.",
            )

    def __call__(self, queries: Sequence[Tensor], native: Tensor, english: Tensor) -> Loss:
        """queries: one [B, pixels, channels] for each layer; native, english: contexts [B, N, C] and [B, M,
        C].
        """
        terms: dict[str, Tensor] = {}
        pairs = list(zip(self.layers, queries, strict=True))
        for index in self.counted:
            layer, query = pairs[index]
            with torch.no_grad():
                target = self._look(layer, query, english)
            distance = self._distance(self._look(layer, query, native), target)
            scaled = self.settings.scaled and self.settings.distance != "cosine"
            terms[f"layer{index}"] = distance / target.var().clamp(min=1e-6) if scaled else distance
        return Loss(torch.stack(list(terms.values())).mean(), terms)

    def _look(self, layer: Attention, query: Tensor, context: Tensor) -> Tensor:
        compare = self.settings.compare
        if compare == "weights":
            return layer.weights(query, context)
        return layer.attend(query, context, projected=compare == "output")

    def _distance(self, ours: Tensor, target: Tensor) -> Tensor:
        if ours.shape != target.shape:
            raise BridgeError(
                "The IAP-style objective cannot compare these texts.",
                f"attention of shapes {list(ours.shape)} and {list(target.shape)}",
                "native and English text of the same number of rows",
                'Compare "output" or "heads", or pad both texts to one length.',
            )
        if self.settings.distance == "cosine":
            return (1 - nn.functional.cosine_similarity(ours.float(), target.float(), dim=-1)).mean()
        apart = ours - target
        return apart.square().mean() if self.settings.distance == "squared" else apart.abs().mean()


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
