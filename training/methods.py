"""Each way of training a bridge: what learns, what it is compared with, and what that needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, autocast, nn

from ..bridges.base import Bridge, Cond, Hidden
from ..bridges.errors import BridgeError
from ..encoders.base import Encoder
from .backbone import Backbone
from .chance import Draw
from .objectives import Align, Diffusion, Iap, IapSettings, Loss, Pea, PeaBatch
from .source import Batch
from .taps import CrossAttention, QueryTaps

KEYS_AND_VALUES = re.compile(r"\.attn2\.to_[kv]\.weight$")
CROSS_ATTENTION = re.compile(r"\.attn2\.")
WEIGHTINGS = ("plain", "noisy")
_HEAVIEST = 10.0


@dataclass(eq=False)
class Student:
    """Everything that may learn.

    bridge; encoder: the tower, where it is to learn; unet: weights of the U-Net, or of the network beside it,
    by their names in a bridge file; bridge_learns: False to leave the bridge as it is.
    """

    bridge: Bridge
    encoder: Encoder | None = None
    unet: Mapping[str, nn.Parameter] | None = None
    bridge_learns: bool = True

    def learning(self) -> dict[str, nn.Parameter]:
        """Every weight that learns, in single precision, by its name in a bridge file."""
        named: dict[str, nn.Parameter] = {}
        modules: list[tuple[str, nn.Module | None]] = [("bridge", self.bridge), ("encoder", self.encoder)]
        for prefix, module in modules:
            if module is not None:
                learns = prefix != "bridge" or self.bridge_learns
                module.requires_grad_(learns)
                if learns:
                    module.float()
                    named.update((f"{prefix}.{name}", each) for name, each in module.named_parameters())
        for name, each in (self.unet or {}).items():
            each.data = each.data.float()
            each.requires_grad = True
            named[f"unet.{name}"] = each
        if not named:
            raise BridgeError(
                "There is nothing to learn.",
                f"a bridge of kind {self.bridge.kind!r} without weights, and nothing beside it",
                "a bridge with weights, a tower that learns, or a part of the U-Net that learns",
                "Choose another kind of bridge, let the tower learn, or choose another objective.",
            )
        return named

    def speak(self, batch: Batch, empty: Batch, draw: Draw) -> Cond:
        """What the student says of a batch; dropped captions have the rows of the empty prompt.

        As in PEA-Diffusion's code the pooled vector is never dropped.
        """
        hidden, dropped = self._hidden(batch), draw.dropped
        timestep = draw.timestep.float() if self.bridge.timed else None
        if not bool(dropped.any()):
            return self.bridge(hidden, timestep)
        nothing = self._hidden(empty)
        if self.bridge.timed:  # the empty prompt has other rows at each timestep
            states = torch.where(dropped[:, None, None], nothing.states.to(hidden.states), hidden.states)
            mask = torch.where(dropped[:, None], nothing.mask, hidden.mask)
            return self.bridge(Hidden(states, mask, hidden.pooled), timestep)
        said, silent = self.bridge(hidden), self.bridge(nothing)
        rows = torch.where(dropped[:, None, None], silent.context.to(said.context), said.context)
        return Cond(rows, said.pooled)

    def _hidden(self, batch: Batch) -> Hidden:
        if self.encoder is not None:
            assert batch.ids is not None and batch.mask is not None
            return self.encoder(batch.ids, batch.mask)
        assert batch.hidden is not None
        states = batch.hidden.states.float()
        pooled = None if batch.hidden.pooled is None else batch.hidden.pooled.float()
        return Hidden(states, batch.hidden.mask, pooled)


class Method:
    """One way of training; `name` is what people choose."""

    name: ClassVar[str]
    pictures: ClassVar[bool] = True
    """Whether it reads latents."""
    parallel: ClassVar[bool] = True
    """Whether it reads English captions; one that can do without some has `native_only` in its batches."""
    asks_unet: ClassVar[bool] = True
    """Whether the U-Net must be in memory."""
    teaches: ClassVar[bool] = False
    """Whether the frozen U-Net says something under English text that can be remembered."""

    def __init__(self, student: Student) -> None:
        self.student = student

    def teach(self, batch: Batch, draw: Draw, empty: Batch) -> tuple[Tensor, ...]:
        """What the frozen U-Net says under English text: tensors [B, ...]."""
        raise NotImplementedError

    def loss(self, batch: Batch, empty: Batch, draw: Draw, taught: tuple[Tensor, ...]) -> Loss:
        """How far the student is from what it should say; a mean over the batch."""
        raise NotImplementedError

    def record(self) -> dict[str, object]:
        """What a bridge file says about the method."""
        return {"objective": self.name}


class _ThroughBackbone(Method):
    """A method that looks at pictures through a frozen U-Net."""

    def __init__(self, student: Student, backbone: Backbone) -> None:
        super().__init__(student)
        self.backbone = backbone

    def _noised(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """What the U-Net sees, and what it should say."""
        latents, noise = _there(batch.latents), _there(draw.noise)
        seen = noise if draw.extra is None else noise + draw.extra
        noisy = self.backbone.noised(latents, seen, draw.timestep)
        return noisy, self.backbone.target(latents, noise, draw.timestep)


class PeaMethod(_ThroughBackbone):
    """PEA-Diffusion: the bridge learns from the teacher's noise and block features."""

    name = "pea"
    teaches = True

    def __init__(
        self, student: Student, backbone: Backbone, weight: float = 0.1, skip_odd: bool = False
    ) -> None:
        super().__init__(student, backbone)
        self.objective = Pea(backbone.unet, backbone, weight, skip_odd=skip_odd)
        self.weight = weight

    def teach(self, batch: Batch, draw: Draw, empty: Batch) -> tuple[Tensor, ...]:
        return self.objective.teach(self._batch(batch, empty, draw))

    def loss(self, batch: Batch, empty: Batch, draw: Draw, taught: tuple[Tensor, ...]) -> Loss:
        said = self.student.speak(batch, empty, draw)
        pooled = batch.english_pooled if said.pooled is None else said.pooled
        return self.objective(said.context, self._batch(batch, empty, draw), pooled, taught)

    def record(self) -> dict[str, object]:
        return {"objective": self.name, "weight": self.weight}

    def _batch(self, batch: Batch, empty: Batch, draw: Draw) -> PeaBatch:
        noisy, target = self._noised(batch, draw)
        flags = torch.zeros(len(noisy), device=noisy.device)
        return PeaBatch(
            noisy,
            target,
            draw.timestep.float(),
            _english(batch, empty, draw),
            flags if batch.native_only is None else batch.native_only.float(),
            batch.english_pooled,
            batch.sizes,
        )


class IapMethod(_ThroughBackbone):
    """IAP-style: image queries attend to native text as they attend to English text.

    The queries are those of the frozen U-Net's cross-attentions over noised latents under English text, at
    `pixels` places of each layer. With fixed draws they are computed once, and the U-Net's blocks are not
    run again.
    """

    name = "iap"
    teaches = True

    def __init__(
        self,
        student: Student,
        backbone: Backbone,
        settings: IapSettings = IapSettings(),  # noqa: B008 (frozen)
        pixels: int = 64,
    ) -> None:
        super().__init__(student, backbone)
        self.objective = Iap(CrossAttention.of(backbone.unet), settings)
        self.pixels = pixels

    def teach(self, batch: Batch, draw: Draw, empty: Batch) -> tuple[Tensor, ...]:
        noisy, _ = self._noised(batch, draw)
        with QueryTaps(self.backbone.unet) as taps:
            self.backbone(
                noisy,
                draw.timestep,
                context=_english(batch, empty, draw),
                pooled=batch.english_pooled,
                sizes=batch.sizes,
            )
        return tuple(_spread(queries, self.pixels) for queries in taps.taken)

    def loss(self, batch: Batch, empty: Batch, draw: Draw, taught: tuple[Tensor, ...]) -> Loss:
        said = self.student.speak(batch, empty, draw)
        with autocast(said.context.device.type, enabled=False):
            queries = [each.float() for each in taught]
            return self.objective(queries, said.context.float(), _english(batch, empty, draw))

    def record(self) -> dict[str, object]:
        settings = self.objective.settings
        return {
            "objective": self.name,
            "compare": settings.compare,
            "distance": settings.distance,
            "scaled": settings.scaled,
            "layers": list(self.objective.counted),
            "pixels": self.pixels,
        }


class AlignMethod(Method):
    """The bridge's rows are drawn to the English rows; no picture and no U-Net is asked."""

    name = "align"
    pictures = False
    asks_unet = False

    def __init__(self, student: Student, compare: str = "tokens", length: float = 2e-5) -> None:
        super().__init__(student)
        self.objective = Align(length, compare)

    def loss(self, batch: Batch, empty: Batch, draw: Draw, taught: tuple[Tensor, ...]) -> Loss:
        said = self.student.speak(batch, empty, draw)
        pooled = None if batch.english_pooled is None else batch.english_pooled
        return self.objective(said.context, _english(batch, empty, draw), said.pooled, pooled)

    def record(self) -> dict[str, object]:
        return {"objective": self.name, "compare": self.objective.compare, "length": self.objective.length}


class _ImageMethod(_ThroughBackbone):
    """The plain diffusion loss over native text.

    weighting: "plain", or "noisy": 1 / abar up to 10, with mean 1, which counts the noisy timesteps for more.
    """

    parallel = False

    def __init__(self, student: Student, backbone: Backbone, weighting: str = "plain") -> None:
        super().__init__(student, backbone)
        if weighting not in WEIGHTINGS:
            raise BridgeError(
                "The diffusion loss does not know this weighting of timesteps.",
                repr(weighting)[:80],
                " or ".join(WEIGHTINGS),
                "Choose one of these.",
            )
        self.weighting = weighting
        heavy = (1 / backbone.abar).clamp(max=_HEAVIEST)
        self.objective = Diffusion(backbone, heavy / heavy.mean() if weighting == "noisy" else None)

    def loss(self, batch: Batch, empty: Batch, draw: Draw, taught: tuple[Tensor, ...]) -> Loss:
        said = self.student.speak(batch, empty, draw)
        noisy, target = self._noised(batch, draw)
        pooled = batch.english_pooled if said.pooled is None else said.pooled
        return self.objective(said.context, noisy, target, draw.timestep, pooled, batch.sizes)

    def record(self) -> dict[str, object]:
        return {"objective": self.name, "weighting": self.weighting}


class KvMethod(_ImageMethod):
    """Keys and values of the U-Net's cross-attention learn from pictures, as AltDiffusion's did (arXiv
    2308.09991), after the tower was aligned.
    """

    name = "kv"


class BranchMethod(_ImageMethod):
    """A network beside the U-Net learns, as BDM's did (arXiv 2309.00952); `backbone` runs both."""

    name = "branch"


class ResampleMethod(_ImageMethod):
    """The bridge behind a language model learns from pictures, as in OmniDiffusion's second and third stage
    (arXiv 2405.12914). Its authors let the U-Net learn along; here the checkpoint stays as it is.

    The first stage is `AlignMethod`; the third is this one again, over a small set of good pictures.
    """

    name = "resample"


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (PeaMethod, IapMethod, AlignMethod, KvMethod, BranchMethod, ResampleMethod)
}
"""Every method by the name that people choose."""


def learning_keys(unet: nn.Module, part: Literal["kv", "attn2"]) -> dict[str, nn.Parameter]:
    """The weights of a U-Net's cross-attention that a bridge file can hold, by name.

    "kv": keys and values, as AltDiffusion's paper says; "attn2": the whole, as its released code trains.
    """
    wanted = KEYS_AND_VALUES if part == "kv" else CROSS_ATTENTION
    return {name: each for name, each in unet.named_parameters() if wanted.search(name)}


def _english(batch: Batch, empty: Batch, draw: Draw) -> Tensor:
    """The English rows [B, M, C], those of the empty prompt where the caption was dropped."""
    rows = _there(batch.english).float()
    if not bool(draw.dropped.any()):
        return rows
    return torch.where(draw.dropped[:, None, None], _there(empty.english).float(), rows)


def _there(value: Tensor | None) -> Tensor:
    assert value is not None, "the source gives what the method needs"
    return value


def _spread(queries: Tensor, count: int) -> Tensor:
    """`count` places [B, count, C] evenly spread over [B, pixels, C]; all of them when there are no more."""
    pixels = queries.shape[1]
    if pixels <= count:
        return queries
    places = torch.arange(count, device=queries.device) * pixels // count
    return queries[:, places]
