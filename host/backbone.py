"""A MODEL's U-Net as training needs it: a private frozen copy, LoRA patches and all, and a branch beside it.

The host runs nodes under inference mode, so the weights of a MODEL are tensors that autograd refuses. The
copy is built outside of it from tensors of its own; the MODEL is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import comfy.model_management as management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor, autocast
from torch.utils.checkpoint import checkpoint

from ..bridges.base import TIMESTEPS
from ..bridges.errors import BridgeError
from ..encoders import guard
from ..training.backbone import Backbone
from .base import BASE_OF_CONTEXT, NAMES
from .branch import KEY as BRANCH_KEY
from .branch import BranchNet, branches_of, with_residuals
from .unet import has_addition

PREFIX = "diffusion_model."
SAMPLING = "model_sampling"
"""The one object patch that a copy can hold: it is the noise schedule, and that is read through it."""

_LATENT_CHANNELS = 4
_KEYS_AND_VALUES = (".attn2.to_k.weight", ".attn2.to_v.weight")
_ENDS = ("zero_convs.", "middle_block_out.")


class FrozenUNet(UNetModel):
    """The host's U-Net that computes in the dtype of its weights, as the host lets it when it samples.

    A copy in float32 leaves a surrounding autocast alone.
    """

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Tensor:
        """x [B, 4, h, w], timesteps [B], context [B, N, C], y [B, A] to [B, 4, h, w] in the dtype of x."""
        dtype = self.dtype
        whole = nullcontext() if dtype == torch.float32 else autocast(x.device.type, enabled=False)
        with whole:
            said = super().forward(
                x.to(dtype),
                timesteps,
                None if context is None else context.to(dtype),
                None if y is None else y.to(dtype),
                control,
                dict(transformer_options or {}),
                **options,
            )
        return said.to(x.dtype)


class _Recomputed:
    """A block whose activations are computed a second time when the gradients need them, and not kept."""

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        forward: Callable[..., Tensor] = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        if not torch.is_grad_enabled():
            return forward(x, *arguments, **options)
        for counter in _COUNTERS:
            counter.count([x])
        # The host writes into transformer_options; the second time must see what the first one saw.
        arguments = tuple(dict(each) if isinstance(each, dict) else each for each in arguments)
        return checkpoint(forward, x, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


class _RecomputedResidual(_Recomputed, ResBlock):
    """A ResBlock."""


class _RecomputedTransformer(_Recomputed, SpatialTransformer):
    """A SpatialTransformer."""


def recompute(net: torch.nn.Module) -> None:
    """From now on the blocks of `net` keep no activations; numbers and gradients stay what they are."""
    for module in net.modules():
        if type(module) is ResBlock:
            module.__class__ = _RecomputedResidual
        elif type(module) is SpatialTransformer:
            module.__class__ = _RecomputedTransformer


def frozen_copy(model: Any, *, device: torch.device, dtype: torch.dtype, checkpointing: bool) -> Backbone:
    """The U-Net of a MODEL as a frozen backbone on `device`, its weights in `dtype`.

    Weights are those that the host samples with, LoRA patches applied by the host's own function; MODEL stays
    as it is. checkpointing: see `recompute`. BridgeError when the MODEL is none of SD1.x, SD2.x and SDXL, or
    carries what a copy cannot hold.
    """
    check(model)
    abar, prediction = schedule_of(model)
    config = {
        key: value
        for key, value in model.model.model_config.unet_config.items()
        if key not in ("dtype", "device", "operations")
    }
    with torch.inference_mode(False):
        unet = FrozenUNet(**config, dtype=dtype, device="meta", operations=comfy.ops.manual_cast)
        for name, value in patched_weights(model):
            comfy.utils.set_attr_param(unet, name, value.to(device=device, dtype=dtype, copy=True))
        unet.eval().requires_grad_(False)
        lacking = sorted(name for name, weight in unet.named_parameters() if weight.is_meta)
        if lacking:
            raise BridgeError(
                "The U-Net of this MODEL cannot be copied whole.",
                f"{len(lacking)} weights that the MODEL does not have, {lacking[0]} first",
                "every weight of its kind of U-Net",
                "Load the checkpoint again, or fetch it again if that does not help.",
            )
        if checkpointing:
            recompute(unet)
        return Backbone(unet, abar.to(device), prediction)


def patched_weights(model: Any, prefix: str = PREFIX) -> Iterator[tuple[str, Tensor]]:
    """Name behind the prefix, and weight as the host would load it: its dtype, its patches, its rounding.

    model: any patcher. A weight may share memory with the model's: it is not to be written to.
    """
    # The host's own function patches a weight of the model that a patcher holds. The patcher here holds the
    # weight alone, because that of the model may be patched already.
    patcher: Any = comfy.model_patcher.ModelPatcher(
        torch.nn.Module(), load_device=model.load_device, offload_device=torch.device("cpu")
    )
    for key, (original, *_) in model.get_key_patches(prefix).items():
        weight: Tensor = original[0]
        if key in model.patches:
            patcher.model = _holding(key, weight)
            patcher.patches = {key: model.patches[key]}
            with torch.inference_mode():
                weight = patcher.patch_weight_to_device(key, device_to=model.load_device, return_weight=True)
        yield key[len(prefix) :], weight


def _holding(name: str, weight: Tensor) -> torch.nn.Module:
    """Modules one in the other that have one parameter of this dotted name."""
    *path, last = name.split(".")
    outer = module = torch.nn.Module()
    for part in path:
        inner = torch.nn.Module()
        module.add_module(part, inner)
        module = inner
    with torch.inference_mode(weight.is_inference()):
        module.register_parameter(last, torch.nn.Parameter(weight, requires_grad=False))
    return outer


def schedule_of(model: Any) -> tuple[Tensor, Literal["eps", "v"]]:
    """Cumulative product of 1 - beta [1000] fp32 and what the U-Net predicts; BridgeError for others."""
    sampling = model.get_model_object(SAMPLING)
    kind = type(sampling)
    sigmas = getattr(sampling, "sigmas", torch.zeros(0))
    plain = (
        isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete)
        and getattr(kind, "calculate_input", None) is comfy.model_sampling.EPS.calculate_input
        and kind.timestep is comfy.model_sampling.ModelSamplingDiscrete.timestep
        and float(sampling.sigma_data) == 1.0
        and len(sigmas) == TIMESTEPS
    )
    predictions: tuple[tuple[Literal["eps", "v"], Any], ...] = (
        ("eps", comfy.model_sampling.EPS),
        ("v", comfy.model_sampling.V_PREDICTION),
    )
    for prediction, known in predictions:
        if plain and kind.calculate_denoised is known.calculate_denoised:
            with torch.inference_mode(False):
                squared = sigmas.detach().to("cpu", torch.float64, copy=True).square()
                return (1 / (1 + squared)).float(), prediction
    raise BridgeError(
        "Training does not know the noise schedule of this MODEL.",
        f"{', '.join(base.__name__ for base in kind.__mro__[1:3])} with {len(sigmas)} noise levels",
        f"{TIMESTEPS} discrete noise levels, predicting the noise (EPS) or the velocity (V_PREDICTION)",
        "Use an SD1.x, SD2.x or SDXL checkpoint, without a node that changes how it is sampled.",
    )


def check(model: Any) -> None:
    """BridgeError unless a copy of this MODEL's U-Net can be whole; nothing is computed."""
    inner = getattr(model, "model", None)
    unet = getattr(inner, "diffusion_model", None)
    config: Mapping[str, Any] = getattr(getattr(inner, "model_config", None), "unet_config", None) or {}
    context, channels = config.get("context_dim"), config.get("in_channels")
    base = BASE_OF_CONTEXT.get(context) if isinstance(context, int) else None
    reads = getattr(inner, "adm_channels", 0)
    if type(unet) is not UNetModel or base is None or bool(reads) != (base == "sdxl"):
        raise BridgeError(
            "Training cannot work on this MODEL.",
            f"{type(inner).__name__} whose text rows are {context} wide",
            f"{', '.join(NAMES.values())}",
            "Load an SD1.x, SD2.x or SDXL checkpoint in front of this node.",
        )
    if channels != _LATENT_CHANNELS:
        raise BridgeError(
            "Training needs a MODEL that paints from nothing.",
            f"a U-Net that reads {channels} channels, as inpainting checkpoints do",
            f"one that reads the {_LATENT_CHANNELS} channels of the latent alone",
            "Load the checkpoint that this one was made from.",
        )
    for what, where in _carried(model):
        raise BridgeError(
            "This MODEL carries something that training cannot take along.",
            f"{what}: {where}",
            "the MODEL of a checkpoint, with LoRAs of the plain loader at most",
            "Connect the MODEL from before that node to the training.",
        )


def _carried(model: Any) -> Iterator[tuple[str, str]]:
    """What changes how the U-Net of a MODEL answers, beside weight patches and the noise schedule."""
    if has_addition(model):
        yield "a language bridge that acts in the U-Net", "a Language Bridge node"
    for beside in branches_of(model):
        yield "a branch beside the U-Net", beside.name
    if model.injections:
        yield "layers put into the U-Net, as a bypass LoRA does", _names(model.injections)
    replaced = [name for name in model.object_patches if name != SAMPLING]
    if replaced:
        yield "replaced objects of the model", _names(replaced)
    if model.hook_patches:
        yield "LoRAs that a schedule switches", f"{len(model.hook_patches)} hooks"
    if model.weight_wrapper_patches:
        yield "functions around weights", _names(model.weight_wrapper_patches)
    options: Mapping[str, Any] = model.model_options
    told: Mapping[str, Any] = options.get("transformer_options", {})
    for name in ("patches", "patches_replace"):
        if told.get(name):
            yield "patches inside the U-Net", _names(told[name])
    if "model_function_wrapper" in options:
        yield "a function around the U-Net", "set_model_unet_function_wrapper"
    for place in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        both = {**model.wrappers.get(place, {}), **told.get("wrappers", {}).get(place, {})}
        keys = [key for key, each in both.items() if each and not str(key).startswith(BRANCH_KEY)]
        if keys:
            yield "a function around the U-Net", _names(keys)
    packed = [name for name, module in model.model.diffusion_model.named_modules() if _is_packed(module)]
    if packed:
        yield "weights in a packed form", f"{len(packed)} layers, {packed[0]} first"


def _is_packed(module: torch.nn.Module) -> bool:
    """Whether a layer holds numbers that only itself can read, as quantised layers do."""
    own = [weight for _, weight in module.named_parameters(recurse=False)]
    return bool(own) and (
        hasattr(module, "convert_weight")
        or any(not weight.is_floating_point() or hasattr(weight, "_qdata") for weight in own)
    )


def _names(keys: Iterable[Any]) -> str:
    return ", ".join(sorted(str(key) for key in keys)[:4])


def size_embedding(model: Any, width: int, height: int) -> Tensor | None:
    """What SDXL's U-Net reads behind the pooled vector of a whole picture of this size, [1, S] fp32.

    width, height: pixels. None for a base that reads none.
    """
    if not getattr(model.model, "adm_channels", 0):
        return None
    pooled = torch.zeros(1, 1280)
    read: Tensor = model.model.encode_adm(pooled_output=pooled, width=width, height=height)
    with torch.inference_mode(False):
        return read[:, pooled.shape[1] :].to("cpu", torch.float32, copy=True)


# A branch beside the U-Net, as BDM trains one.


class Beside:
    """A frozen U-Net over English text with a branch beside it that reads native text: called as one U-Net.

    english: rows [1, M, C] that the U-Net hears, of the empty prompt in BDM's training; pooled: for SDXL, the
    English pooled vector [1, P] beside them.
    """

    def __init__(
        self, unet: torch.nn.Module, net: torch.nn.Module, english: Tensor, pooled: Tensor | None = None
    ) -> None:
        self.unet = unet
        self.net = net
        self.english = english
        self.pooled = pooled

    def __call__(self, noisy: Tensor, timestep: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """noisy [B, 4, h, w], timestep [B], native rows [B, T, D] and, for SDXL, y [B, A] with the native
        pooled vector in front, to [B, 4, h, w]."""
        residuals = self.net(noisy, timestep, context, y)
        heard = y
        if y is not None and self.pooled is not None:
            own = self.pooled.to(y).expand(len(y), -1)
            heard = torch.cat([own, y[:, own.shape[1] :]], dim=1)
        english = self.english.to(noisy.device).expand(len(noisy), -1, -1)
        given = {} if heard is None else {"y": heard}
        options = with_residuals({}, residuals)
        return self.unet(noisy, timestep, context=english, transformer_options=options, **given)


def branch_copy(
    unet: torch.nn.Module,
    config: Mapping[str, Any],
    width: int,
    *,
    generator: torch.Generator | None = None,
    checkpointing: bool = False,
) -> BranchNet:
    """A branch that starts as the encoder half and the middle of a U-Net, for text of `width`; it learns.

    Keys and values of the cross-attention read another text, so they start anew, as large as the U-Net's; the
    convolutions at its ends start at zero. config: sizes of the U-Net, as the host keeps them. Weights are
    float32 on the device of the U-Net's.
    """
    sizes = {key: value for key, value in config.items() if key not in ("dtype", "device", "operations")}
    device = next(unet.parameters()).device
    with torch.inference_mode(False):
        net = BranchNet({**sizes, "context_dim": width}, torch.float32, "meta")
        theirs, start = unet.state_dict(), dict[str, Tensor]()
        for key, shape in guard.shapes_of(net).items():
            if key.startswith(_ENDS):
                start[key] = torch.zeros(shape)
            elif key.endswith(_KEYS_AND_VALUES):
                start[key] = torch.randn(shape, generator=generator) * theirs[key].float().std().cpu()
            else:
                start[key] = theirs[key]
        for key, value in start.items():
            comfy.utils.set_attr_param(net, key, value.to(device, torch.float32, copy=True))
        if checkpointing:
            recompute(net)
        return net.train().requires_grad_(True)


def branch_beside(
    model: Any,
    backbone: Backbone,
    width: int,
    english: Tensor,
    pooled: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    checkpointing: bool = False,
) -> tuple[Beside, BranchNet]:
    """A learning branch beside the frozen U-Net of a MODEL: how both are called, and the branch.

    backbone: of `frozen_copy`; width: of the native text; english, pooled: what the U-Net hears, see
    `Beside`.
    """
    config: Mapping[str, Any] = model.model.model_config.unet_config
    net = branch_copy(backbone.unet, config, width, generator=generator, checkpointing=checkpointing)
    return Beside(backbone.unet, net, english, pooled), net


# How much memory a training will take.


class KeptBytes:
    """Counts what autograd keeps for the gradients while it is entered, each tensor's memory once.

    Blocks of `recompute` keep their inputs beside autograd; those count, too.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        self._seen = {value.untyped_storage().data_ptr() for value in without}
        self._held: list[Tensor] = []
        self.total = 0

    def count(self, values: Iterable[Tensor]) -> None:
        """Add the memory of these tensors."""
        for value in values:
            storage = value.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self._held.append(value)  # so that no other tensor comes to lie at its address
                self.total += storage.nbytes()

    @contextmanager
    def counting(self) -> Iterator[KeptBytes]:
        """Counts while inside."""

        def keep(value: Tensor) -> Tensor:
            self.count([value])
            return value

        _COUNTERS.append(self)
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
                yield self
        finally:
            _COUNTERS.remove(self)
            self._held.clear()


_COUNTERS: list[KeptBytes] = []


@dataclass(frozen=True)
class Memory:
    """Bytes that a training takes on its device beside what is there already, and what is free.

    weights: of everything that the training holds; gradients, optimiser, average: of what learns;
    activations: of one micro-batch.
    """

    weights: int
    gradients: int
    optimiser: int
    average: int
    activations: int
    free: int

    @property
    def still(self) -> int:
        """Bytes that will be taken beyond the weights, which are there already."""
        return self.gradients + self.optimiser + self.average + self.activations

    @property
    def fits(self) -> bool:
        """Whether that is less than what is free."""
        return self.still <= self.free


def memory(
    held: Iterable[torch.nn.Module],
    learning: Iterable[Tensor],
    example: Callable[[], object],
    *,
    batch: int,
    states: float,
    averaged: bool,
    device: torch.device,
) -> Memory:
    """What a training will take on `device`, measured by one example and no update.

    example: computes the loss of one example with gradients; it is run once. batch: examples of a
    micro-batch; states: numbers that the optimiser keeps for each weight (AdamW 2).
    """
    modules = list(held)
    weights = [value for module in modules for value in (*module.parameters(), *module.buffers())]
    trained = list(learning)
    kept = KeptBytes([*weights, *trained])
    with kept.counting():
        example()
    size = sum(4 * value.numel() for value in trained)
    return Memory(
        weights=sum(value.numel() * value.element_size() for value in weights),
        gradients=sum(value.numel() * value.element_size() for value in trained),
        optimiser=int(size * states),
        average=size if averaged else 0,
        activations=kept.total * batch,
        free=int(management.get_free_memory(device)),
    )
