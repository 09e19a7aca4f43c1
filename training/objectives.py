"""What a bridge learns from: each objective is (what the bridge said, what it should match) to a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from ..bridges.errors import BridgeError
from .taps import BlockTaps

_COMPARED = ("output", "heads", "weights")
ALIGNED = ("tokens", "squared", "cls", "cosine")
"""What `Align` compares."""
_DISTANCES = ("squared", "absolute", "cosine")


@dataclass(frozen=True)
class Loss:
    """total: what is minimised; parts: its named terms before weighting."""

    total: Tensor
    parts: dict[str, Tensor]


class Denoiser(Protocol):
    """A U-Net: noisy latents [B, 4, h, w], timesteps [B] and context [B, N, C] to what it predicts [B, 4, h,
    w]. SDXL's is also given `pooled` [B, P] and `sizes` [B, S]; a `Backbone` is one.
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


@dataclass(frozen=True, eq=False)
class PeaBatch:
    """noisy, noise [B, 4, h, w]; timestep [B]; teacher: English context [B, M, C]; native_only [B]: the flag
    z, 1 where a caption has no English parallel.

    noise is what the U-Net should say: the noise, or the velocity for checkpoints that predict that. For SDXL
    teacher_pooled [B, P] is the English pooled vector and sizes [B, S] the embedding of the picture sizes.
    """

    noisy: Tensor
    noise: Tensor
    timestep: Tensor
    teacher: Tensor
    native_only: Tensor
    teacher_pooled: Tensor | None = None
    sizes: Tensor | None = None


class Pea:
    """PEA-Diffusion's distillation through the frozen U-Net (arXiv 2311.17086; terms as in the authors'
    released code).

    L = mean(z (e_s - e)^2) + mean((1 - z)(e_s - e_t)^2) + weight * sum over blocks of mean((1 - z)(F_s -
    F_t)^2), where e_s and e_t are the noise predicted under native and under English text and F the outputs
    of the level ends: nine on SD1.5, seven on SDXL. Teacher and student are one U-Net run twice: both of the
    authors' copies hold the same frozen weights.

    skip_odd: leave a block's term out of a step in which it is not finite, as the authors do in half
    precision on SD1.5.
    """

    def __init__(
        self,
        unet: nn.Module,
        denoise: Denoiser | None = None,
        weight: float = 0.1,
        taps: Callable[[nn.Module], BlockTaps] = BlockTaps,
        skip_odd: bool = False,
    ) -> None:
        self.unet = unet
        self.denoise: Denoiser = denoise or unet
        self.weight = weight
        self.taps = taps
        self.skip_odd = skip_odd

    def teach(self, batch: PeaBatch) -> tuple[Tensor, ...]:
        """What the U-Net says under English text: the noise [B, 4, h, w], and the features of each block."""
        with torch.no_grad():
            return self._said(batch, batch.teacher, batch.teacher_pooled)

    def __call__(
        self,
        native: Tensor,
        batch: PeaBatch,
        pooled: Tensor | None = None,
        taught: tuple[Tensor, ...] | None = None,
    ) -> Loss:
        """native, pooled: what the bridge said, [B, N, C] and, for SDXL, [B, P]; gradients reach them through
        the U-Net. taught: what `teach` gives, where it is known.
        """
        teacher, *theirs = self.teach(batch) if taught is None else taught
        student, *ours = self._said(batch, native, pooled)
        z = batch.native_only
        noise = _flagged(student, batch.noise, z)
        logit = _flagged(student, teacher, 1 - z)
        blocks = torch.stack([_flagged(mine, other, 1 - z) for mine, other in zip(ours, theirs, strict=True)])
        if self.skip_odd:
            blocks = torch.where(torch.isfinite(blocks), blocks, torch.zeros_like(blocks))
        feature = blocks.sum()
        total = noise + logit + self.weight * feature
        return Loss(total, {"noise": noise, "logit": logit, "feature": feature})

    def _said(self, batch: PeaBatch, context: Tensor, pooled: Tensor | None) -> tuple[Tensor, ...]:
        with self.taps(self.unet) as taps:
            noise = _denoised(self.denoise, batch.noisy, batch.timestep, context, pooled, batch.sizes)
        return noise, *taps.taken


class Align:
    """Rows drawn to the English rows, without pictures.

    compare: "tokens", mean(1 - cosine) + length * mean((|native| - |English|)^2) over equally many rows:
    OmniDiffusion's first stage (arXiv 2405.12914; "cos-len" of the released code, where length = 2e-5);
    "squared", the mean squared error of the same rows; "cls", the mean squared error of the first native row
    and the English pooled vector, as AltCLIP distils its start token (arXiv 2211.06679);
    "cosine", one minus the cosine of the mean native and the mean English row, which wants no equal number.
    Where bridge and checkpoint both have a pooled vector, cosine and length of these are added to "tokens".
    """

    def __init__(self, length: float = 2e-5, compare: str = "tokens") -> None:
        if compare not in ALIGNED:
            raise BridgeError(
                "The alignment does not know this choice of rows.",
                repr(compare)[:80],
                " or ".join(ALIGNED),
                "Choose one of these.",
            )
        self.length = length
        self.compare = compare

    def __call__(
        self,
        native: Tensor,
        english: Tensor,
        pooled: Tensor | None = None,
        english_pooled: Tensor | None = None,
    ) -> Loss:
        """native [B, N, C], english [B, M, C]: rows; pooled, english_pooled [B, P]."""
        ours, theirs = native.float(), english.float()
        if self.compare == "cosine":
            apart = (1 - nn.functional.cosine_similarity(ours.mean(1), theirs.mean(1), dim=-1)).mean()
            return Loss(apart, {"cosine": apart})
        if self.compare == "cls":
            if english_pooled is None or english_pooled.shape[-1] != ours.shape[-1]:
                raise _no_rows(
                    "first row", ours.shape, None if english_pooled is None else english_pooled.shape
                )
            squared = (ours[:, 0] - english_pooled.float()).square().mean()
            return Loss(squared, {"squared": squared})
        if ours.shape != theirs.shape:
            raise _no_rows("rows", ours.shape, theirs.shape)
        if self.compare == "squared":
            squared = (ours - theirs).square().mean()
            return Loss(squared, {"squared": squared})
        parts = self._apart(ours, theirs, "")
        if pooled is not None and english_pooled is not None:
            parts |= self._apart(pooled.float(), english_pooled.float(), "pooled ")
        cosines = [part for name, part in parts.items() if name.endswith("cosine")]
        lengths = [part for name, part in parts.items() if name.endswith("length")]
        return Loss(torch.stack(cosines).sum() + self.length * torch.stack(lengths).sum(), parts)

    def _apart(self, ours: Tensor, theirs: Tensor, name: str) -> dict[str, Tensor]:
        cosine = (1 - nn.functional.cosine_similarity(ours, theirs, dim=-1)).mean()
        return {f"{name}cosine": cosine, f"{name}length": (_lengths(ours) - _lengths(theirs)).square().mean()}


class Diffusion:
    """The plain diffusion loss, mean(w(t) (e_s - e)^2).

    What AltDiffusion trains its U-Net with (arXiv 2308.09991; noise prediction and plain squared error as in
    the authors' training configuration), BDM its branch, and OmniDiffusion its second and third stage.

    unet: predicts noise and may itself be learning, for example its cross-attention's keys and values.
    weight: w, one number for each timestep [1000], or None for w = 1.
    """

    def __init__(self, unet: Denoiser, weight: Tensor | None = None) -> None:
        self.unet = unet
        self.weight = weight

    def __call__(
        self,
        native: Tensor,
        noisy: Tensor,
        noise: Tensor,
        timestep: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Loss:
        """native [B, N, C]; noisy, noise (or what else is to be said) [B, 4, h, w]; timestep [B]; for SDXL
        pooled [B, P] and sizes [B, S].
        """
        guess = _denoised(self.unet, noisy, timestep, native, pooled, sizes)
        each = (guess.float() - noise.float()).square().flatten(1).mean(1)
        weight = None if self.weight is None else self.weight.to(each.device)[timestep.long()]
        total = (each if weight is None else weight * each).mean()
        return Loss(total, {"noise": total})


def _denoised(
    unet: Denoiser,
    noisy: Tensor,
    timestep: Tensor,
    context: Tensor,
    pooled: Tensor | None,
    sizes: Tensor | None,
) -> Tensor:
    """What the U-Net says; only SDXL's hears of pooled vectors and sizes."""
    if sizes is None:
        return unet(noisy, timestep, context=context)
    return cast(Any, unet)(noisy, timestep, context=context, pooled=pooled, sizes=sizes)


def _no_rows(what: str, ours: Sequence[int], theirs: Sequence[int] | None) -> BridgeError:
    return BridgeError(
        f"The {what} of native and English text cannot be compared.",
        f"native {list(ours)}, English {'none' if theirs is None else list(theirs)}",
        "tensors of one shape",
        'Use a bridge with as many rows as the checkpoint reads, such as "omni" with 77 queries, or compare '
        '"cosine".',
    )


def _lengths(rows: Tensor) -> Tensor:
    """Euclidean length of each row: [B, N, C] to [B, N]."""
    return rows.square().sum(dim=-1).sqrt()


def _flagged(ours: Tensor, theirs: Tensor, flag: Tensor) -> Tensor:
    """Mean over the whole batch of flag * (ours - theirs)^2 in fp32; the flag leaves the divisor alone."""
    return (flag.view(-1, *[1] * (ours.ndim - 1)) * (ours.float() - theirs.float()).square()).mean()
