"""A network beside a diffusers U-Net that reads native text, as BDM trains one (arXiv 2309.00952).

It is diffusers' own ControlNet without its picture: encoder half and middle of the U-Net, and zero
convolutions. What it says goes where a ControlNet's goes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...bridges.branch import Branch
from ...bridges.errors import BridgeError
from ..backbone import Backbone
from .models import ask, widths

_KEYS_AND_VALUES = (".attn2.to_k.weight", ".attn2.to_v.weight")
_ENDS = ("controlnet_down_blocks.", "controlnet_mid_block.")


class Beside:
    """A frozen U-Net over English text with a branch beside it that reads native text: called as one U-Net.

    english: rows [1, M, C] that the U-Net hears, of the empty prompt in training; pooled: for SDXL, the
    English pooled vector [1, P] beside them.
    """

    def __init__(
        self, unet: nn.Module, net: nn.Module, english: Tensor, pooled: Tensor | None = None
    ) -> None:
        self.unet = unet
        self.net = net
        self.english = english
        self.pooled = pooled

    def __call__(self, noisy: Tensor, timestep: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """noisy [B, 4, h, w], timestep [B], native rows [B, T, D] and, for SDXL, y [B, A] with the native
        pooled vector in front, to [B, 4, h, w]."""
        width = 0 if self.pooled is None else self.pooled.shape[1]
        # In the place of a picture stands nothing: a zero that is added to every channel.
        nothing = torch.zeros((), device=noisy.device)
        skips, middle = ask(self.net, noisy, timestep, context, y, width, controlnet_cond=nothing)
        heard = y
        if y is not None and self.pooled is not None:
            heard = torch.cat([self.pooled.to(y).expand(len(y), -1), y[:, width:]], dim=1)
        dtype = next(self.unet.parameters()).dtype
        said = ask(
            self.unet,
            noisy,
            timestep,
            self.english.to(noisy.device).expand(len(noisy), -1, -1),
            heard,
            width,
            down_block_additional_residuals=tuple(each.to(dtype) for each in skips),
            mid_block_additional_residual=middle.to(dtype),
        )
        return said[0]


def branch_copy(
    unet: nn.Module, width: int, *, generator: torch.Generator | None = None, checkpointing: bool = False
) -> nn.Module:
    """A branch that starts as the encoder half and the middle of a U-Net, for text of `width`; it learns.

    Keys and values of the cross-attention read another text, so they start anew, as large as the U-Net's; the
    convolutions at its ends start at zero. Weights are float32 on the device of the U-Net's. BridgeError when
    the U-Net is of a make that no bridge file can hold the branch of.
    """
    import diffusers

    kind: Any = cast(Any, diffusers).ControlNetModel
    told: dict[str, Any] = dict(cast(Any, unet).config)
    known = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in told.items() if key in known} | {"cross_attention_dim": width}
    try:
        net: Any = kind(**config, conditioning_embedding_out_channels=(1,))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _odd_unet(f"{error!s:.300}") from error
    net.controlnet_cond_embedding = nn.Identity()
    _, pooled = widths(told)
    if pooled:
        net.add_time_proj = nn.Identity()  # the sizes come embedded, see `backbone_of`
    theirs = unet.state_dict()
    with torch.no_grad():
        for name, weight in cast(nn.Module, net).named_parameters():
            if name.startswith(_ENDS):
                weight.zero_()
                continue
            own = theirs.get(name)
            if own is None:
                raise _odd_unet(f"no {name}")
            if name.endswith(_KEYS_AND_VALUES):
                start = torch.randn(weight.shape, generator=generator) * own.float().std().cpu()
            elif own.shape == weight.shape:
                start = own.float()
            else:
                raise _odd_unet(f"{name} {list(own.shape)}, where a ControlNet has {list(weight.shape)}")
            weight.copy_(start)
    if checkpointing:
        net.enable_gradient_checkpointing()
    made = cast(nn.Module, net).float().to(next(unet.parameters()).device).train().requires_grad_(True)
    learning(made)
    return made


def learning(net: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight of a branch by its name in a bridge file; BridgeError when one has no name there."""
    named = dict(net.named_parameters())
    try:
        Branch.recognise({name: tuple(each.shape) for name, each in named.items()})
    except BridgeError as error:
        raise _odd_unet(error.found) from error
    part = cast("dict[str, nn.Parameter]", Branch.unet_part(named))
    if len(part) != len(named):
        raise _odd_unet(f"{len(part)} of {len(named)} weights of the branch")
    return part


def go_on(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the branch of a bridge file into `net`; BridgeError when it does not fit."""
    own = learning(net)
    odd = sorted(
        name
        for name in {*own, *tensors}
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if odd:
        raise BridgeError(
            "The branch to go on from does not fit.",
            f"{len(tensors)} tensors, {len(odd)} of another shape or name, {odd[0]} first",
            f"the {len(own)} tensors of a branch for this model and this tower",
            "Choose a branch that was trained with a U-Net and a tower of the same sizes.",
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(tensors[name])


def beside(backbone: Backbone, net: nn.Module, english: Tensor, pooled: Tensor | None = None) -> Backbone:
    """A backbone whose U-Net is called with a branch beside it; english, pooled: see `Beside`."""
    pair = Beside(backbone.unet, net, english, pooled)
    return Backbone(backbone.unet, backbone.abar, backbone.prediction, pair)


def _odd_unet(found: str) -> BridgeError:
    return BridgeError(
        "No branch can be trained beside this U-Net.",
        found,
        "a U-Net of SD1.x, SD2.x or SDXL, of which diffusers can make a ControlNet",
        "Use another model, or train a bridge of another kind: --method.",
    )
