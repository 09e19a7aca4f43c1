"""The command line of training at scale: every option, and the values that PEA-Diffusion was trained with."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .stream import Size

ABOUT = """\
Train a bridge with diffusers U-Nets over WebDataset shards, on one GPU, several, or several machines.

  python -m training --model SDXL --tower TOWER --shards 'part-{000..099}.tar' --run RUN --out BRIDGE
  accelerate launch -m training ...the same, in as many processes as accelerate is configured for

Needs the packages diffusers and accelerate beside torch and transformers. What stands in a shard, and what
the options mean: docs/training-at-scale.md. The same command goes on where a run was left.
"""
METHODS = ("pea", "iap", "align", "kv", "attn2", "branch", "resample")
SHAPES = (
    (448, 896),
    (448, 832),
    (512, 768),
    (576, 704),
    (640, 640),
    (704, 576),
    (768, 512),
    (832, 448),
    (896, 448),
)
"""Sizes (width, height) that PEA-Diffusion was trained with for SDXL; one 512 x 512 for SD1.5."""


@dataclass(frozen=True)
class Published:
    """What the authors of PEA-Diffusion chose for a base, where the command line says nothing.

    batch: examples of a step in each process; offset: strength of offset noise; area, judged: see `Rules`.
    """

    shapes: tuple[tuple[int, int], ...] = SHAPES
    batch: int = 10
    offset: float = 0.5
    area: int = 640 * 640
    judged: bool = False
    rate: float = 1e-5
    warmup: int = 100


PUBLISHED = {"sdxl": Published()}
SMALL = Published(((512, 512),), 40, 0.0, 0, True)
"""The same for SD1.5, and for SD2.x, which the authors did not train."""


def published(base: str) -> Published:
    """The authors' values for a base."""
    return PUBLISHED.get(base, SMALL)


def parser() -> argparse.ArgumentParser:
    """Every option."""
    top = argparse.ArgumentParser(
        prog="python -m training", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = top.add_argument_group("what is trained")
    what.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="SD model in diffusers' layout"
    )
    what.add_argument("--variant", help="ending of its weight files, for example fp16")
    what.add_argument("--tower", type=Path, required=True, metavar="FILE", help="text tower, a file of ours")
    what.add_argument("--method", choices=METHODS, default="pea")
    what.add_argument(
        "--start", type=Path, metavar="FILE", help="bridge to go on from; without it, a new one"
    )
    what.add_argument("--kind", help="kind of a new bridge (mlp; branch for --method branch)")
    what.add_argument(
        "--size", action="append", default=[], type=_setting, metavar="NAME=N", help="a size of a new bridge"
    )
    what.add_argument("--tower-learns", action="store_true", help="train the tower as well, or alone")
    what.add_argument("--bridge-rests", action="store_true", help="leave the bridge as it is")

    data = top.add_argument_group("data")
    data.add_argument("--shards", nargs="+", required=True, metavar="TAR", help="files, folders, {000..099}")
    data.add_argument("--held-out", nargs="+", metavar="TAR", help="shards that are only measured")
    data.add_argument("--window", type=_whole, default=8, help="shards shuffled together (8)")
    data.add_argument("--shapes", type=_shapes, metavar="WxH,...", help="sizes of pictures (the authors')")
    data.add_argument("--crop", choices=("random", "centre"), default="random")
    data.add_argument("--size-order", choices=("height", "width"), default="height", help="SDXL's sizes")
    data.add_argument("--threads", type=_whole, default=4, help="that decode pictures (4)")
    data.add_argument("--native-field", default="caption_zh", help="(caption_zh)")
    data.add_argument("--english-field", default="caption_en", help="(caption_en)")
    data.add_argument("--no-cleaning", action="store_true", help="leave captions as they were found")
    data.add_argument("--simplify", choices=("auto", "yes", "no"), default="auto", help="with OpenCC")
    data.add_argument("--keep-unnamed", action="store_true", help="rows without captions, too")
    data.add_argument("--least-area", type=int, metavar="PIXELS", help="(409600 for SDXL, else 0)")
    data.add_argument("--least-aesthetic", type=float, default=6.0, help="(6)")
    data.add_argument("--most-watermark", type=float, default=0.5, help="(0.5)")

    how = top.add_argument_group("how")
    how.add_argument("--steps", type=_whole, default=50_000, help="(50000)")
    how.add_argument("--batch", type=_whole, help="examples at once in a process (10 for SDXL, else 40)")
    how.add_argument("--accumulation", type=_whole, default=1, help="such batches for a step (1)")
    how.add_argument("--learning-rate", type=float, help="(1e-5)")
    how.add_argument("--warmup", type=int, help="(100)")
    how.add_argument("--schedule", default="constant", choices=("constant", "linear", "cosine"))
    how.add_argument("--optimiser", default="AdamW")
    how.add_argument("--weight-decay", type=float, default=0.0, help="(0)")
    how.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients, 0 for none (1)")
    how.add_argument("--average", type=float, default=0.0, help="decay of averaged weights, 0 for none (0)")
    how.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    how.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    how.add_argument("--drop", type=float, default=0.1, help="share of dropped captions (0.1)")
    how.add_argument("--noise-offset", type=float, help="(0.5 for SDXL, else 0)")
    how.add_argument("--weight", type=float, default=0.1, help="pea: weight of block features (0.1)")
    how.add_argument("--compare", choices=("tokens", "squared", "cosine"), default="tokens", help="align")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--cpu", action="store_true", help="stay off GPUs")

    files = top.add_argument_group("files")
    files.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of checkpoints")
    files.add_argument("--out", type=Path, required=True, metavar="FILE", help="the bridge, at the end")
    files.add_argument("--save-every", type=int, default=500, help="steps (500)")
    files.add_argument("--keep", type=_whole, default=2, help="checkpoints (2)")
    files.add_argument("--validate-every", type=int, default=500, help="steps (500)")
    files.add_argument("--tell-every", type=_whole, default=10, help="steps (10)")
    files.add_argument("--name", help="of the bridge (its file's)")
    files.add_argument("--language", default="zh", help="(zh)")
    files.add_argument("--licence", default="")
    files.add_argument("--half", action="store_true", help="write float16")
    return top


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _shapes(text: str) -> tuple[Size, ...]:
    found = re.fullmatch(r"(\d+x\d+)(,\d+x\d+)*", text)
    sizes = [tuple(int(side) for side in each.split("x")) for each in text.split(",")] if found else []
    if not sizes or any(side % 8 or not 8 <= side <= 4096 for size in sizes for side in size):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT,... in multiples of 8 up to 4096")
    return tuple((width, height) for width, height in sizes)


def _setting(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    known: dict[str, object] = {"true": True, "false": False}
    if not name or not (value.isdecimal() or value in known):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, NAME=true or NAME=false")
    return name, known.get(value, int(value) if value.isdecimal() else 0)
