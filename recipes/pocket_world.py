"""What the recipes of the pocket world share: model shapes, data, optimiser and a plain sampler."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from language_bridge.host.pocket import CLIP_CONFIG, UNET_CONFIG
from language_bridge.pocket.autoencoder import Autoencoder
from language_bridge.prompt.grammar import normalise

__all__ = [
    "CLIP_CONFIG",
    "UNET_CONFIG",
    "alphas",
    "decode",
    "english_ids",
    "half_width",
    "latents_of",
    "new_clip",
    "new_unet",
    "optimisers",
    "sample",
    "typed",
]


def prepare_host() -> None:
    """Tells the host to stay on the CPU where there is no GPU; must run before its model management is
    imported.
    """
    from comfy.cli_args import args

    args.cpu = args.cpu or not torch.cuda.is_available()


def alphas() -> Tensor:
    """Cumulative product of 1 - beta of SD's scaled-linear schedule: [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def new_clip() -> torch.nn.Module:
    """A fresh English tower, trainable, in the Hugging Face key layout (`text_model.*`)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return _with_prefix(CLIPTextModel(CLIPTextConfig(**CLIP_CONFIG, bos_token_id=49406, pad_token_id=49407)))


def _with_prefix(model: Any) -> Any:
    """Some transformers releases name the tower's weights without `text_model.`; files always carry it."""
    if any(key.startswith("text_model.") for key in model.state_dict()):
        return model
    holder = torch.nn.Module()
    holder.text_model = model
    holder.forward = model.forward
    return holder


def new_unet() -> torch.nn.Module:
    """A fresh U-Net of the host's own class with ordinary initial weights and zeroed block outputs."""
    prepare_host()
    import comfy.ops
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

    config = {**UNET_CONFIG, "dtype": torch.float32}
    unet = UNetModel(**config, operations=comfy.ops.disable_weight_init)
    for module in unet.modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(module, kind):
                kind.reset_parameters(module)  # type: ignore[attr-defined]
    for module in unet.modules():
        last = None
        if isinstance(module, ResBlock):
            last = module.out_layers[-1]
        elif isinstance(module, SpatialTransformer):
            last = module.proj_out
        if last is not None:
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    torch.nn.init.zeros_(unet.out[-1].weight)
    torch.nn.init.zeros_(unet.out[-1].bias)
    return unet.requires_grad_(True)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    prepare_host()
    import comfy.sd1_clip

    return comfy.sd1_clip.SD1Tokenizer()


def english_ids(sentences: Sequence[str]) -> Tensor:
    """Token ids exactly as the host frames them: [N, 77]."""
    rows = [[token for token, _ in _tokenizer().tokenize_with_weights(text)["l"][0]] for text in sentences]
    return torch.tensor(rows)


def half_width(text: str) -> str:
    """The sentence as the node hands it to the tower: full-width grammar marks read like half-width ones."""
    return normalise(text).text


def typed(text: str, rng: np.random.Generator, wide: float = 0.4) -> str:
    """The sentence as people type it: a tenth with no punctuation, a share `wide` full-width."""
    chance = rng.random()
    if chance < 0.1:
        return "".join(" " if sign in "\uff0c\uff1b\uff1a\u3001" else sign for sign in text)
    return half_width(text) if chance < 1 - wide else text


@lru_cache(maxsize=2)
def _autoencoder(work: Path) -> tuple[Autoencoder, float]:
    model = Autoencoder(32)
    model.load_state_dict(load_file(str(work / "autoencoder.safetensors")))
    facts = json.loads((work / "autoencoder.json").read_text(encoding="utf-8"))
    return model.eval(), float(facts["deviation"])


@torch.no_grad()
def latents_of(work: Path, pictures: npt.NDArray[np.float32]) -> Tensor:
    """Normalised latents [N, 4, 8, 8] of pictures [N, 64, 64, 3]."""
    model, deviation = _autoencoder(work)
    images = torch.from_numpy(pictures).movedim(-1, 1)
    return torch.cat([model.encode(part) for part in images.split(256)]) / deviation


@torch.no_grad()
def decode(work: Path, latents: Tensor) -> Tensor:
    """Pictures [N, 64, 64, 3] in 0..1 of normalised latents."""
    model, deviation = _autoencoder(work)
    return (
        torch.cat([model.decode(part * deviation) for part in latents.split(128)]).clamp(0, 1).movedim(1, -1)
    )


def optimisers(
    modules: Sequence[torch.nn.Module], muon: float, adam: float
) -> tuple[Callable[[], None], Callable[[float], None]]:
    """Muon for matrices and convolutions, AdamW for the rest: (step, set progress in 0..1).

    torch's Muon takes matrices only; a convolution is given to it as a matrix view of the same storage.
    """
    matrices: list[torch.nn.Parameter] = []
    views: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if (
                parameter.ndim >= 2
                and "embedding" not in name
                and "cells" not in name
                and min(parameter.shape[:2]) > 4
            ):
                matrices.append(parameter)
                views.append(torch.nn.Parameter(parameter.data.view(parameter.shape[0], -1)))
            else:
                others.append(parameter)
    first = torch.optim.Muon(views, lr=muon, weight_decay=0.01)
    second = torch.optim.AdamW(others, lr=adam, weight_decay=0.0, betas=(0.9, 0.98))

    def step() -> None:
        torch.nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for view, parameter in zip(views, matrices, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        first.step()
        second.step()
        for parameter in [*matrices, *others]:
            parameter.grad = None

    def progress(share: float) -> None:
        scale = min(1.0, share / 0.02 + 0.02) * max(
            0.02, 0.5 * (1 + math.cos(math.pi * max(0.0, share - 0.3) / 0.7))
        )
        for group in first.param_groups:
            group["lr"] = muon * scale
        for group in second.param_groups:
            group["lr"] = adam * scale

    return step, progress


@torch.no_grad()
def sample(
    unet: torch.nn.Module,
    context: Tensor,
    empty: Tensor,
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 64,
) -> Tensor:
    """Plain DDIM with classifier-free guidance: contexts [N, T, C] to normalised latents [N, 4, 8, 8]."""
    abar = alphas()
    generator = torch.Generator().manual_seed(seed)
    times = torch.linspace(999, 0, steps + 1).round().long()[:-1]
    done: list[Tensor] = []
    for part in context.split(batch):
        x = torch.randn(len(part), 4, 8, 8, generator=generator)
        both = torch.cat([part, empty.expand(len(part), part.shape[1], -1)])
        for index, time in enumerate(times):
            t = torch.full((2 * len(part),), float(time))
            yes, no = unet(torch.cat([x, x]), t, context=both).chunk(2)
            noise = no + guidance * (yes - no)
            a = abar[time]
            clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
            b = abar[times[index + 1]] if index + 1 < len(times) else torch.tensor(1.0)
            x = b.sqrt() * clean + (1 - b).sqrt() * noise
        done.append(x)
    return torch.cat(done)
