"""U-Net parts: finds a U-Net in published weights, names it the LDM way, and takes out what a method trained.

Two layouts hold the same network: LDM (single files, `model.diffusion_model.input_blocks...`) and diffusers
(`down_blocks...`). Everything here uses LDM names relative to the U-Net. The table covers SD1.x and SD2.x:
four levels, two blocks in each, one transformer block in each attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bridges.errors import BridgeError
from .containers import Weights

LDM_PREFIX = "model.diffusion_model."
PARTS = ("kv", "attn2", "full")
FORMS = ("replace", "delta")
COUNTS = {"kv": 32, "attn2": 80}
"""Tensors of each part in SD1.x and SD2.x: K and V of 16 blocks; or Q, output and its bias as well."""

ROUNDING = 2.0**-10
"""Two copies of one weight may differ by one step of float16 (11 significant bits): each was rounded once."""
COARSE_ROUNDING = 2.0**-7
"""The same for bfloat16 (8 significant bits), where one of the two copies is stored in it."""
SMALLEST = 2.0**-24
"""The smallest step of float16: what rounding can do to a number near zero."""

_KEYS_AND_VALUES = re.compile(r".*\.attn2\.to_[kv]\.weight")
_CROSS_ATTENTION = re.compile(r".*\.attn2\.(to_[qkv]\.weight|to_out\.0\.(weight|bias))")

_SINGLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.([0-3])|(mid)_block)\.(resnets|attentions|downsamplers|upsamplers)\.([0-2])\.(.+)"
)


@dataclass(frozen=True, eq=False)
class UnetPart:
    """What goes into a bridge file: the tensors by LDM name, as `form` "replace" or "delta".

    moved: the U-Net tensors outside of the part that differ from the reference too. With any of them the part
    is not what was published, and `complete` is false.
    """

    part: str
    form: str
    tensors: Mapping[str, Tensor]
    moved: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the part is all that was trained."""
        return not self.moved


def ldm_name(diffusers: str) -> str | None:
    """The LDM name of a diffusers U-Net tensor; None when the table does not know it.

    down_blocks.1.attentions.0.proj_in.weight -> input_blocks.4.1.proj_in.weight
    """
    head, _, last = diffusers.rpartition(".")
    if head in _SINGLE:
        return f"{_SINGLE[head]}.{last}"
    found = _BLOCK.fullmatch(diffusers)
    if found is None:
        return None
    side, level, middle, what, number, rest = found.groups()
    place = _place(side or middle, int(level or 0), what, int(number))
    if what in ("downsamplers", "upsamplers"):
        name, _, last = rest.rpartition(".")
        wanted = "op" if what == "downsamplers" else "conv"
        return f"{place}.{wanted}.{last}" if place and name == "conv" else None
    if what == "resnets":
        name, _, last = rest.rpartition(".")
        return f"{place}.{_RESIDUAL[name]}.{last}" if place and name in _RESIDUAL else None
    return f"{place}.{rest}" if place else None


def _place(side: str, level: int, what: str, number: int) -> str | None:
    if side == "mid":
        order = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}
        return f"middle_block.{order[what, number]}" if (what, number) in order else None
    if side == "down":
        if what == "downsamplers":
            return f"input_blocks.{3 * level + 3}.0" if number == 0 and level < 3 else None
        column = {"resnets": 0, "attentions": 1}.get(what)
        return (
            f"input_blocks.{3 * level + number + 1}.{column}" if column is not None and number < 2 else None
        )
    if what == "upsamplers":
        # The first level up has no attention, so its upsampler stands one place earlier.
        return f"output_blocks.{3 * level + 2}.{2 if level else 1}" if number == 0 and level < 3 else None
    column = {"resnets": 0, "attentions": 1}.get(what)
    return f"output_blocks.{3 * level + number}.{column}" if column is not None else None


def is_unet(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether there is a U-Net of any make among `shapes`, in one of the two layouts."""
    if any(key.startswith(LDM_PREFIX) for key in shapes):
        return True
    if "controlnet_mid_block.weight" in shapes:
        return False  # a ControlNet or a branch has a U-Net's encoder half, under the same names
    return "conv_in.weight" in shapes and any(key.startswith("down_blocks.") for key in shapes)


def find_unet(weights: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """LDM name -> published name of every U-Net tensor among `weights` (shapes by name); empty without one.

    BridgeError when there is a U-Net with tensors that the table does not know.
    """
    ldm = {key[len(LDM_PREFIX) :]: key for key in weights if key.startswith(LDM_PREFIX)}
    if ldm:
        return ldm
    if not is_unet(weights):
        return {}
    names = {key: ldm_name(key) for key in weights}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise BridgeError(
            "The U-Net is of a make that cannot be converted.",
            f"{len(unknown)} of {len(weights)} tensors with unknown names: {', '.join(unknown[:4])}",
            "a U-Net of SD1.x or SD2.x in the layout of diffusers or of a single file",
            "Use the checkpoint itself with an ordinary loader, or convert its text encoder alone.",
        )
    return {name: key for key, name in names.items() if name is not None}


def members(part: str, names: Sequence[str]) -> list[str]:
    """The tensors of `part` among LDM `names`; BridgeError when there are not as many as in SD1.x, SD2.x."""
    pattern = {"kv": _KEYS_AND_VALUES, "attn2": _CROSS_ATTENTION}.get(part)
    chosen = sorted(name for name in names if pattern is None or pattern.fullmatch(name))
    if part in COUNTS and len(chosen) != COUNTS[part]:
        raise BridgeError(
            "The U-Net has another number of cross-attention tensors than SD1.x and SD2.x.",
            f"{len(chosen)} for the part {part!r}",
            f"{COUNTS[part]}",
            "Check that this is a whole U-Net of SD1.x or SD2.x.",
        )
    return chosen


def compare(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors of one shape are the same but for one rounding to half precision of each."""
    coarse = torch.bfloat16 in (ours.dtype, theirs.dtype)
    a, b = ours.to(torch.float32), theirs.to(torch.float32)
    allowed = (COARSE_ROUNDING if coarse else ROUNDING) * torch.maximum(a.abs(), b.abs()) + SMALLEST
    return bool(((a - b).abs() <= allowed).all())


def extract(weights: Weights, reference: Weights, *, part: str = "auto", form: str = "replace") -> UnetPart:
    """Take the trained part of a U-Net out of `weights`, compared with the U-Net it started from.

    part: "kv", "attn2" or "auto", the smallest of the two that holds all that moved. form: "replace", the
    published weights, or "delta", published minus reference in float32. BridgeError when nothing moved, when
    the two are different networks, and with "auto" when something outside of the cross-attention moved.
    """
    ours, theirs = find_unet(weights.shapes), find_unet(reference.shapes)
    _require_same_network(
        {name: weights.shapes[key] for name, key in ours.items()},
        {name: reference.shapes[key] for name, key in theirs.items()},
    )
    kv, attn2 = (set(members(name, list(ours))) for name in ("kv", "attn2"))
    moved = {name for name in sorted(ours) if not compare(weights[ours[name]], reference[theirs[name]])}
    if not moved:
        raise BridgeError(
            "The U-Net is the reference's own: there is nothing to take out of it.",
            f"{len(ours)} equal tensors",
            "a U-Net whose cross-attention was trained",
            "Convert without a reference and with U-Net part none, or choose the U-Net that was trained.",
        )
    if part == "auto":
        part = "kv" if moved <= kv else "attn2"
        if not moved <= attn2:
            outside = sorted(moved - attn2)
            raise BridgeError(
                "More than the cross-attention of this U-Net was trained: a part is not the whole method.",
                f"{len(outside)} other tensors differ from the reference: {', '.join(outside[:4])}",
                "differences in the cross-attention (attn2) alone, float16 rounding allowed",
                "Check the reference; or load the published checkpoint whole; or ask for the U-Net part kv "
                "or attn2 by name, to take it all the same, marked as incomplete.",
            )
    chosen = kv if part == "kv" else attn2
    tensors = {name: weights[ours[name]] for name in sorted(chosen)}
    if form == "delta":
        tensors = {name: own.float() - reference[theirs[name]].float() for name, own in tensors.items()}
    return UnetPart(part, form, tensors, tuple(sorted(moved - chosen)))


def whole(weights: Weights) -> UnetPart:
    """All of a U-Net, for a method that trained all of it."""
    names = find_unet(weights.shapes)
    return UnetPart("full", "replace", {name: weights[key] for name, key in sorted(names.items())})


def _require_same_network(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> None:
    if not theirs:
        raise BridgeError(
            "The reference holds no U-Net.",
            "no U-Net tensors",
            "the checkpoint that the training started from, such as SD 1.4, as a file or a diffusers folder",
            "Choose a checkpoint as the reference.",
        )
    odd = [
        name
        for name in sorted({*ours, *theirs})
        if name not in ours or name not in theirs or ours[name] != theirs[name]
    ]
    if odd:
        name = odd[0]
        raise BridgeError(
            "The U-Net and the reference are different networks.",
            f"{len(odd)} tensors differ in name or shape: {name} {ours.get(name)} and {theirs.get(name)}",
            "the same names and shapes",
            "Choose the checkpoint that the training started from as the reference.",
        )
