"""Tells which base model a MODEL and a CLIP belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..bridges.errors import BridgeError

NAMES = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL", "pocket": "the pocket world"}
"""What people call each base."""

BASE_OF_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl", 96: "pocket"}
"""Width of the text rows that a U-Net reads -> base."""


@dataclass(frozen=True)
class Base:
    """name: a key of `NAMES`; context: width of the text rows that the U-Net reads; pooled: SDXL's or 0.

    keys: the checkpoint's own text towers in the tokens dict, `l`, `h` or `l` and `g`.
    """

    name: str
    context: int
    pooled: int
    keys: tuple[str, ...]


def base_of(model: Any, clip: Any) -> Base:
    """The base of a MODEL and its CLIP; BridgeError when one is not ours or they do not fit."""
    text = base_of_clip(clip)
    config = getattr(getattr(model, "model", None), "model_config", None)
    unet: dict[str, Any] = getattr(config, "unet_config", None) or {}
    context = unet.get("context_dim")
    if context not in BASE_OF_CONTEXT:
        raise BridgeError(
            "Language Bridge cannot work on this MODEL.",
            f"{type(getattr(model, 'model', model)).__name__} that reads text rows of width {context}",
            "a Stable Diffusion 1.x, 2.x or SDXL base model (768, 1024 or 2048 wide)",
            "Load an SD1.x, SD2.x or SDXL checkpoint in front of this node.",
        )
    if BASE_OF_CONTEXT[context] != text.name:
        raise BridgeError(
            "MODEL and CLIP do not belong together.",
            f"a MODEL of {NAMES[BASE_OF_CONTEXT[context]]} and a CLIP of {NAMES[text.name]}",
            "both of the same base model",
            "Connect both outputs of the same checkpoint loader.",
        )
    return text


def base_of_clip(clip: Any) -> Base:
    """The base that a CLIP belongs to; BridgeError when it is none of ours."""
    towers = getattr(clip, "cond_stage_model", None)
    has = {key: getattr(towers, f"clip_{key}", None) for key in ("l", "g", "h")}
    if has["l"] is not None and has["g"] is not None:
        return Base("sdxl", 2048, 1280, ("g", "l"))
    if has["h"] is not None:
        return Base("sd2", 1024, 0, ("h",))
    if has["l"] is not None and not any(hasattr(towers, name) for name in ("t5xxl", "llama", "t5xl")):
        width = has["l"].transformer.get_input_embeddings().weight.shape[1]
        return Base("pocket" if width == 96 else "sd1", int(width), 0, ("l",))
    raise BridgeError(
        "Language Bridge cannot work on this CLIP.",
        type(towers).__name__,
        "the CLIP of an SD1.x, SD2.x or SDXL checkpoint",
        "Connect the CLIP output of an SD1.x, SD2.x or SDXL checkpoint loader.",
    )
