"""The branch of a bridge (BDM): a network beside the U-Net that reads native text, and its way into a MODEL.

The MODEL carries the network as a further model and three keyed wrappers; no weight and no object of the
checkpoint is touched. At each call of the U-Net the network reads the same noisy latent and the native text
of each entry of the batch; what it says is added to the U-Net's skip connections and to its middle, out of
place, where a ControlNet's goes. ControlNets beside it read the English text as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.conds
import comfy.ops
import torch
from comfy.cldm.cldm import ControlNet
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..bridges.errors import BridgeError
from ..encoders import guard
from .branch_text import MARK, BranchText, common_count

KEY = "language_bridge_branch"
"""Our wrappers and models at a MODEL have this name, with the digest of the branch behind it."""

Shapes = Mapping[str, tuple[int, ...]]


class BranchNet(ControlNet):
    """The host's ControlNet without its picture: encoder half, middle, and zero convolutions."""

    def __init__(
        self,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device | str,
        operations: Any = comfy.ops.manual_cast,
    ) -> None:
        super().__init__(hint_channels=1, dtype=dtype, device=device, operations=operations, **config)
        del self.input_hint_block
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """x [B, 4, H, W] as the U-Net reads it, timesteps [B], context [B, N, C], y [B, A] for SDXL.

        Residuals in the order of the U-Net's input blocks, the middle's last.
        """
        waves = timestep_embedding(timesteps, self.model_channels, repeat_only=False).to(x.dtype)
        time = self.time_embed(waves)
        if self.num_classes is not None:
            time = time + self.label_emb(y)
        residuals: list[Tensor] = []
        for block, zero in zip(self.input_blocks, self.zero_convs, strict=True):
            x = block(x, time, context)
            residuals.append(zero(x, time, context))
        x = self.middle_block(x, time, context)
        return [*residuals, self.middle_block_out(x, time, context)]


def config_of(model: Any, shapes: Shapes) -> dict[str, Any]:
    """The configuration of the branch with these tensors beside this MODEL's U-Net.

    Everything is the U-Net's own but the widths of the text and of the latent, which the file says.
    """
    config = {
        key: value
        for key, value in model.model.model_config.unet_config.items()
        if key not in ("dtype", "device", "operations")
    }
    text = next((shape for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")), (0, 0))
    latent = shapes.get("input_blocks.0.0.weight", (0, 4))
    return config | {"context_dim": text[1], "in_channels": latent[1]}


def check(model: Any, shapes: Shapes, name: str) -> None:
    """BridgeError unless tensors of these shapes are a branch for this MODEL; nothing is allocated."""
    found = dict(shapes)
    expected: dict[str, tuple[int, ...]] = {}
    if "input_blocks.0.0.weight" in found and any(key.endswith(".attn2.to_k.weight") for key in found):
        net = BranchNet(config_of(model, found), torch.float32, "meta")
        expected = guard.shapes_of(net)
    if found != expected:
        odd = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise BridgeError(
            f"The branch {name} does not fit this checkpoint.",
            f"{len(found)} tensors, {odd[0]} {found.get(odd[0], 'missing')}",
            f"{len(expected)} tensors, {odd[0]} {expected.get(odd[0], 'not there')}",
            "Use a checkpoint of the base that the branch was made for, or convert the branch again.",
        )


def build(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> BranchNet:
    """The network with its weights in `dtype`; `check` comes first."""
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    net = BranchNet(config_of(model, shapes), dtype, "meta")
    net.load_state_dict(
        {key: value.to(dtype, copy=True) for key, value in tensors.items()}, strict=True, assign=True
    )
    return net.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Beside:
    """One branch at one MODEL: its network, how loud it is, and from which to which part of the sampling.

    patcher: of the network, one for all MODELs: the host takes a network without its patcher for lost;
    strength: factor of every residual; start, end: shares of the sampling, 0 to 1.
    """

    name: str
    digest: str
    patcher: Any
    strength: float
    start: float = 0.0
    end: float = 1.0

    @property
    def net(self) -> BranchNet:
        """The network, which the patcher keeps."""
        return self.patcher.model

    @property
    def key(self) -> str:
        """Its name at the MODEL."""
        return key_of(self.digest)

    def outer_sample(self, executor: Any, *arguments: Any, **options: Any) -> Any:
        """Gives each conditioning its native text, all of one length; silent when no text is native.

        A conditioning without native text beside others that have some is read as an empty native text; one
        whose rows are all zero (ConditioningZeroOut) is left alone by the branch.
        """
        conds: dict[str, list[dict[str, Any]]] = executor.class_obj.conds
        texts = {key: [self._text(entry) for entry in entries] for key, entries in conds.items()}
        known = [text for each in texts.values() for text in each if text is not None]
        zeroed = {key: [_zeroed(entry) for entry in entries] for key, entries in conds.items()}
        speaking = any(
            text is not None and text.speaks and not none
            for key, each in texts.items()
            for text, none in zip(each, zeroed[key], strict=True)
        )
        if speaking:
            count, nothing = common_count(known), known[0].nothing()
            for key, entries in conds.items():
                conds[key] = [
                    self._told(entry, text or nothing, count, not none)
                    for entry, text, none in zip(entries, texts[key], zeroed[key], strict=True)
                ]
        return executor(*arguments, **options)

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **options: Any,
    ) -> Any:
        """Decides, on the CPU, which entries of the batch the branch speaks to at this step."""
        told: Mapping[str, Any] = {} if transformer_options is None else transformer_options
        heard = options.pop(f"{self.key}_heard", None)
        if heard is not None and bool(heard.any()) and self._acts(executor.class_obj.model_sampling, t):
            places = heard.flatten().cpu().nonzero()[:, 0]
            told = {**told, self.key: None if len(places) == len(heard) else places}
        else:
            options = {name: value for name, value in options.items() if not name.startswith(self.key)}
        return executor(x, t, c_concat, c_crossattn, control, told, **options)

    def diffusion_model(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Tensor,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **options: Any,
    ) -> Any:
        """Calls the U-Net with the residuals of the branch added to its skip connections and its middle."""
        rows = options.pop(f"{self.key}_rows", None)
        pooled = options.pop(f"{self.key}_pooled", None)
        told: Mapping[str, Any] = {} if transformer_options is None else transformer_options
        if rows is None or self.key not in told:
            return executor(x, timesteps, context, y, control, told, **options)
        if len(rows) != len(x):
            raise BridgeError(
                f"The branch {self.name} cannot tell any more which text belongs to which picture.",
                f"{len(x)} pictures and {len(rows)} native texts at the U-Net",
                "as many of the one as of the other",
                "Take away the node that cuts up or repeats the batch inside the U-Net.",
            )
        added = None if y is None or pooled is None else torch.cat([pooled, y[:, pooled.shape[1] :]], dim=1)
        residuals = self._say(x, timesteps, rows, added, told[self.key])
        patched = with_residuals(told, residuals)
        return executor(x, timesteps, context, y, control, patched, **options)

    def _say(
        self, x: Tensor, timesteps: Tensor, rows: Tensor, y: Tensor | None, places: Tensor | None
    ) -> list[Tensor]:
        """Residuals for all entries; those that the branch does not speak to get zeros."""
        x = x[:, : self.net.in_channels]  # inpainting checkpoints read mask and picture behind the latent
        if places is None:
            return [self._loud(residual) for residual in self.net(x, timesteps, rows, y)]
        places = places.to(x.device)
        some = self.net(x[places], timesteps[places], rows[places], None if y is None else y[places])
        return [
            residual.new_zeros(len(x), *residual.shape[1:]).index_copy(0, places, self._loud(residual))
            for residual in some
        ]

    def _loud(self, residual: Tensor) -> Tensor:
        return residual if self.strength == 1.0 else residual * self.strength

    def _acts(self, sampling: Any, t: Tensor) -> bool:
        if (self.start, self.end) == (0.0, 1.0):
            return True
        sigma = float(t.flatten()[0])
        return sampling.percent_to_sigma(self.end) <= sigma <= sampling.percent_to_sigma(self.start)

    def _text(self, entry: Mapping[str, Any]) -> BranchText | None:
        """What this branch reads of a conditioning; BridgeError when only another branch has marked it."""
        text = BranchText.of(entry, self.digest)
        if text is None and entry.get(MARK):
            raise BridgeError(
                "MODEL and conditioning come from two different branches.",
                f"a MODEL behind the branch {self.name}, and text that another branch has encoded",
                "both outputs of the same Language Bridge node",
                "Connect MODEL and CLIP of one Language Bridge node, not of two.",
            )
        return text

    def _told(self, entry: dict[str, Any], text: BranchText, count: int, heard: bool) -> dict[str, Any]:
        added: dict[str, Any] = {
            f"{self.key}_rows": comfy.conds.CONDCrossAttn(text.read(count)),
            f"{self.key}_heard": comfy.conds.CONDRegular(torch.tensor([[float(heard)]])),
        }
        if text.pooled is not None:
            added[f"{self.key}_pooled"] = comfy.conds.CONDRegular(text.pooled)
        return {**entry, "model_conds": {**entry["model_conds"], **added}}


def add_to(model: Any, beside: Beside) -> Any:
    """A clone of MODEL with the branch at it; with one of the same digest, that one is replaced."""
    clone = model.clone()
    for place, wrapper in (
        (WrappersMP.OUTER_SAMPLE, beside.outer_sample),
        (WrappersMP.APPLY_MODEL, beside.apply_model),
        (WrappersMP.DIFFUSION_MODEL, beside.diffusion_model),
    ):
        clone.remove_wrappers_with_key(place, beside.key)
        clone.add_wrapper_with_key(place, beside.key, wrapper)
    clone.set_additional_models(beside.key, [beside.patcher])
    return clone


def branches_of(model: Any) -> list[Beside]:
    """The branches that a MODEL carries."""
    wrappers: Mapping[str, Sequence[Any]] = model.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    return [
        wrapper.__self__
        for key, each in wrappers.items()
        if isinstance(key, str) and key.startswith(KEY)
        for wrapper in each
    ]


def limited(model: Any, start: float, end: float) -> Any:
    """A clone of MODEL whose branches act from `start` to `end` of the sampling (shares, 0 to 1).

    BridgeError when it carries none.
    """
    carried = branches_of(model)
    if not carried:
        raise BridgeError(
            "This MODEL has no branch.",
            "a MODEL that comes from no Language Bridge node with a branch in it",
            "the MODEL of such a node",
            "Choose a branch in the Language Bridge node, or take this node away.",
        )
    for beside in carried:
        model = add_to(model, replace(beside, start=start, end=end))
    return model


def key_of(digest: str) -> str:
    """The name at a MODEL of the branch of this digest."""
    return f"{KEY}_{digest[:16]}"


def _zeroed(entry: Mapping[str, Any]) -> bool:
    rows = entry.get("cross_attn")
    return rows is not None and not bool(torch.any(rows))


def with_residuals(options: Mapping[str, Any], residuals: Sequence[Tensor]) -> dict[str, Any]:
    """transformer_options in which the U-Net adds `residuals`, before what other patches do there."""
    *waiting, middle = residuals

    def at_skip(h: Tensor, skip: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        return h, _sum(skip, waiting.pop())

    def at_middle(given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "h": _sum(given["h"], middle)}

    patches = dict(options.get("patches", {}))
    for name, patch in (("output_block_patch", at_skip), ("middle_block_after_patch", at_middle)):
        patches[name] = [patch, *patches.get(name, ())]
    return {**options, "patches": patches}


def _sum(own: Tensor, residual: Tensor) -> Tensor:
    if own.shape != residual.shape:  # a node has changed the sizes inside the U-Net
        logging.warning(
            "a branch says %s where the U-Net has %s; left out", list(residual.shape), list(own.shape)
        )
        return own
    return own + residual.to(own.dtype)
