"""Kind `branch`: native text for a network beside the U-Net, as Bridge Diffusion Model has one.

BDM (arXiv 2309.00952, AAAI 2025) copies the encoder half and the middle of the U-Net, lets the copy read
Chinese text, and adds its 13 outputs to the frozen U-Net like a ControlNet's; there is no picture. Its file
is a ControlNet in diffusers' layout without `controlnet_cond_embedding`: 324 tensors and 363,141,760 numbers
for SD1.5, text of width 1024. The SDXL option of the released code (ControlNetModelBDM, 360CVGroup/
Bridge_Diffusion_Model, 51807d3) has two matrices more, before the network: tokens 1792 -> 2048 and pooled
1024 -> 1280.

The bridge of such a file is what stands before the network: nothing, or these two matrices. The network
itself travels as the file's U-Net part `branch`, under the names that single files give a U-Net; the host
builds it from its own blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from .base import Bridge, BridgeSpec, Cond, Hidden, Ops, Value, extent, require_sizes
from .errors import BridgeError

MARK = "controlnet_mid_block.weight"
"""The tensor that every ControlNet of diffusers has, and nothing else."""
HINT = "controlnet_cond_embedding."
TOKENS, POOLED = "prompt_embeds_projection", "pooled_prompt_embeds_projection"
SIZE_NUMBERS, SIZE_WIDTH = 6, 256
"""SDXL's network also reads six numbers (sizes and crop), each as a wave of this width, behind the pooled."""
MOST_LEVELS, MOST_BLOCKS, DEEPEST_TRANSFORMER = 8, 8, 16

Shapes = Mapping[str, tuple[int, ...]]

_RESIDUAL = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


@dataclass(frozen=True, kw_only=True)
class BranchSpec(BridgeSpec):
    """Widths: `hidden` of the tower, `context` that the network reads, `pooled` that it reads (0 = none).

    tower_pooled: width of the tower's pooled vector when a matrix brings it to `pooled`; 0 = it is as wide.
    """

    tower_pooled: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, tower_pooled=0)


class Branch(Bridge, kind="branch"):
    """context = states, or W states where the widths differ; pooled = the tower's, or V of it. No bias."""

    Spec = BranchSpec
    beside = True

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert isinstance(spec, BranchSpec)
        super().__init__(spec, ops=ops, device=device, dtype=dtype)
        if spec.hidden != spec.context:
            self.prompt_embeds_projection = ops.Linear(
                spec.hidden, spec.context, bias=False, device=device, dtype=dtype
            )
        if spec.pooled and spec.tower_pooled:
            self.pooled_prompt_embeds_projection = ops.Linear(
                spec.tower_pooled, spec.pooled, bias=False, device=device, dtype=dtype
            )

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Map states [B, T, D] to what the network reads: context [B, T, C] and, when it does, pooled."""
        self.check(hidden)
        spec = cast(BranchSpec, self.spec)
        context = (
            hidden.states if spec.hidden == spec.context else self.prompt_embeds_projection(hidden.states)
        )
        if not spec.pooled:
            return Cond(context)
        width = spec.tower_pooled or spec.pooled
        if hidden.pooled is None or hidden.pooled.shape[-1] != width:
            raise BridgeError(
                "This branch needs the pooled vector of its text tower.",
                "none" if hidden.pooled is None else f"a pooled vector of width {hidden.pooled.shape[-1]}",
                f"a pooled vector of width {width}",
                "Use the tower that the bridge file names in its header.",
            )
        projected = (
            self.pooled_prompt_embeds_projection(hidden.pooled) if spec.tower_pooled else hidden.pooled
        )
        return Cond(context, projected)

    @classmethod
    def part(cls, published: Mapping[str, Value]) -> dict[str, Value]:
        """The matrices before the network; none in the file for SD1.5."""
        if MARK not in published:
            return super().part(published)
        return {key: value for key, value in published.items() if key.startswith((TOKENS, POOLED))}

    @classmethod
    def unet_part(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network, named as in single files; its ends are `zero_convs.i.0` and `middle_block_out.0`."""
        if MARK not in tensors:
            return {}
        # The names alone say where a tensor belongs, so none is read from the disk for it.
        sizes = _measure(dict.fromkeys(tensors, (1, 1, 1, 1)))
        if sizes is None:
            return {}
        different = replace(sizes, widths=tuple(range(2, 2 + len(sizes.widths))))  # each with a shortcut
        return {ldm: tensors[name] for name, ldm, _ in _layout(different) if name in tensors}

    @classmethod
    def recognise(cls, shapes: Shapes) -> BranchSpec | None:
        """Recognise a branch of any topology by all of its names and shapes.

        BridgeError when the file is a ControlNet for pictures, or a branch that is not whole.
        """
        if MARK not in shapes:
            return None
        if any(key.startswith(HINT) for key in shapes):
            raise BridgeError(
                "This is a ControlNet for pictures, not a branch that reads text.",
                f"{sum(key.startswith(HINT) for key in shapes)} tensors {HINT}*",
                "a ControlNet layout without them, as BDM has it",
                "Load it with ComfyUI's own ControlNet loader; it needs no conversion.",
            )
        sizes = _measure(shapes)
        expected = {} if sizes is None else {name: shape for name, _, shape in _layout(sizes)}
        expected |= {
            key: shape for key, shape in shapes.items() if key in (f"{TOKENS}.weight", f"{POOLED}.weight")
        }
        if sizes is None or expected != dict(shapes):
            raise _not_whole(expected, shapes)
        tokens, pooled = shapes.get(f"{TOKENS}.weight"), shapes.get(f"{POOLED}.weight")
        spec = BranchSpec(
            hidden=sizes.context if tokens is None else extent(shapes, f"{TOKENS}.weight", 1),
            context=sizes.context,
            pooled=sizes.pooled,
            tower_pooled=0 if pooled is None else extent(shapes, f"{POOLED}.weight", 1),
        )
        if cls.shapes(spec) != cls.part(shapes):
            raise _not_whole({**expected, **cls.shapes(spec)}, shapes)
        return spec


@dataclass(frozen=True)
class _Sizes:
    """A branch's topology: channels of the latent, width and blocks of each level, transformer depths.

    depths: of each block's transformers, 0 = none; flat: the transformers' ends are matrices, not 1x1
    convolutions; added: width of the vector that is added to the timestep's (SDXL), 0 = none.
    """

    channels: int
    first: int
    widths: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]
    middle: int
    context: int
    flat: bool
    added: int

    @property
    def pooled(self) -> int:
        """Width of the pooled vector that the network reads."""
        return max(self.added - SIZE_NUMBERS * SIZE_WIDTH, 0)


def _measure(shapes: Shapes) -> _Sizes | None:
    """Read the topology off the names; None when they make none."""
    widths: list[int] = []
    depths: list[tuple[int, ...]] = []
    while len(widths) < MOST_LEVELS and f"down_blocks.{len(widths)}.resnets.0.conv1.weight" in shapes:
        level = f"down_blocks.{len(widths)}"
        widths.append(extent(shapes, f"{level}.resnets.0.conv1.weight"))
        blocks = _count(shapes, f"{level}.resnets.{{}}.conv1.weight", MOST_BLOCKS)
        depths.append(tuple(_depth(shapes, f"{level}.attentions.{number}") for number in range(blocks)))
    middle = _depth(shapes, "mid_block.attentions.0")
    ends = shapes.get("mid_block.attentions.0.proj_in.weight", ())
    if not widths or not middle or len(ends) not in (2, 4):
        return None
    return _Sizes(
        channels=extent(shapes, "conv_in.weight", 1),
        first=extent(shapes, "conv_in.weight"),
        widths=tuple(widths),
        depths=tuple(depths),
        middle=middle,
        context=extent(shapes, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
        flat=len(ends) == 2,
        added=extent(shapes, "add_embedding.linear_1.weight", 1),
    )


def _count(shapes: Shapes, pattern: str, most: int) -> int:
    count = 0
    while count < most and pattern.format(count) in shapes:
        count += 1
    return count


def _depth(shapes: Shapes, place: str) -> int:
    return _count(shapes, place + ".transformer_blocks.{}.norm1.weight", DEEPEST_TRANSFORMER)


Named = Iterator[tuple[str, str, tuple[int, ...]]]


def _layout(sizes: _Sizes) -> Named:
    """Every tensor of the network: published name, name in a single file, shape."""
    first, time = sizes.first, 4 * sizes.first
    yield from _pair("conv_in", "input_blocks.0.0", (first, sizes.channels, 3, 3))
    yield from _pair("time_embedding.linear_1", "time_embed.0", (time, first))
    yield from _pair("time_embedding.linear_2", "time_embed.2", (time, time))
    if sizes.added:
        yield from _pair("add_embedding.linear_1", "label_emb.0.0", (time, sizes.added))
        yield from _pair("add_embedding.linear_2", "label_emb.0.2", (time, time))
    ends, width = [first], first
    for level, (wide, depths) in enumerate(zip(sizes.widths, sizes.depths, strict=True)):
        place = f"down_blocks.{level}"
        for number, depth in enumerate(depths):
            block = f"input_blocks.{len(ends)}"
            yield from _residual(f"{place}.resnets.{number}", f"{block}.0", width, wide, time)
            if depth:
                yield from _transformer(f"{place}.attentions.{number}", f"{block}.1", wide, depth, sizes)
            width = wide
            ends.append(width)
        if level < len(sizes.widths) - 1:
            down = f"input_blocks.{len(ends)}.0.op"
            yield from _pair(f"{place}.downsamplers.0.conv", down, (width, width, 3, 3))
            ends.append(width)
    yield from _residual("mid_block.resnets.0", "middle_block.0", width, width, time)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", width, sizes.middle, sizes)
    yield from _residual("mid_block.resnets.1", "middle_block.2", width, width, time)
    for number, end in enumerate(ends):
        yield from _pair(f"controlnet_down_blocks.{number}", f"zero_convs.{number}.0", (end, end, 1, 1))
    yield from _pair("controlnet_mid_block", "middle_block_out.0", (width, width, 1, 1))


def _pair(name: str, ldm: str, shape: tuple[int, ...]) -> Named:
    yield f"{name}.weight", f"{ldm}.weight", shape
    yield f"{name}.bias", f"{ldm}.bias", shape[:1]


def _residual(name: str, ldm: str, width: int, wide: int, time: int) -> Named:
    shapes = {
        "norm1": (width,),
        "conv1": (wide, width, 3, 3),
        "time_emb_proj": (wide, time),
        "norm2": (wide,),
        "conv2": (wide, wide, 3, 3),
        "conv_shortcut": (wide, width, 1, 1),
    }
    for theirs, ours in _RESIDUAL:
        if theirs != "conv_shortcut" or width != wide:
            yield from _pair(f"{name}.{theirs}", f"{ldm}.{ours}", shapes[theirs])


def _transformer(name: str, ldm: str, wide: int, depth: int, sizes: _Sizes) -> Named:
    end = (wide, wide) if sizes.flat else (wide, wide, 1, 1)
    yield from _pair(f"{name}.norm", f"{ldm}.norm", (wide,))
    yield from _pair(f"{name}.proj_in", f"{ldm}.proj_in", end)
    yield from _pair(f"{name}.proj_out", f"{ldm}.proj_out", end)
    for number in range(depth):
        block = f"transformer_blocks.{number}"
        for part in ("norm1", "norm2", "norm3"):
            yield from _pair(f"{name}.{block}.{part}", f"{ldm}.{block}.{part}", (wide,))
        for attention, text in (("attn1", wide), ("attn2", sizes.context)):
            for part, width in (("to_q", wide), ("to_k", text), ("to_v", text)):
                key = f"{block}.{attention}.{part}.weight"
                yield f"{name}.{key}", f"{ldm}.{key}", (wide, width)
            key = f"{block}.{attention}.to_out.0"
            yield from _pair(f"{name}.{key}", f"{ldm}.{key}", (wide, wide))
        for part, shape in (("ff.net.0.proj", (8 * wide, wide)), ("ff.net.2", (wide, 4 * wide))):
            yield from _pair(f"{name}.{block}.{part}", f"{ldm}.{block}.{part}", shape)


def _not_whole(expected: Shapes, found: Shapes) -> BridgeError:
    odd = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
    return BridgeError(
        "This looks like a branch (BDM), but it is not whole or not of a known make.",
        f"{len(found)} tensors; {len(odd)} odd ones: "
        + ", ".join(f"{key} {list(found[key]) if key in found else 'missing'}" for key in odd[:6]),
        f"{len(expected)} tensors"
        + (
            ": " + ", ".join(f"{k} {list(expected[k]) if k in expected else 'none'}" for k in odd[:6])
            if odd
            else ""
        ),
        "Fetch the file again, or take the one that its authors published.",
    )
