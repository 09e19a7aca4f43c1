"""Pictures of a training as it goes: the loss curve, a grid of samples, and both side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, FAINT, GRID = (255, 255, 255), (60, 60, 60), (205, 216, 232), (232, 232, 232)
AVERAGE, MEASURED = (31, 95, 175), (214, 102, 26)
_MARGIN = (64, 34, 16, 34)
"""Left, top, right, bottom, in pixels."""
_SMOOTH = 0.03
"""The running mean reaches over about this share of all steps, and over `_FEWEST` at least."""
_FEWEST = 10.0

Point = tuple[int, float]


def curve(
    history: Sequence[Point], held_out: Sequence[Point], size: tuple[int, int] = (560, 400)
) -> Image.Image:
    """The loss of each step, its running mean, and the loss over held-out examples; axes carry numbers."""
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    font = _font(13)
    left, top, right, bottom = _MARGIN[0], _MARGIN[1], size[0] - _MARGIN[2], size[1] - _MARGIN[3]
    history = [point for point in history if math.isfinite(point[1])]
    held_out = [point for point in held_out if math.isfinite(point[1])]
    if not history:
        draw.text((left, top), "no step yet", INK, font)
        return picture
    means = _running(history)
    low, high = _range([value for _, value in (*means, *held_out)], [value for _, value in history])
    last = max(step for step, _ in (*history, *held_out))
    first = min(step for step, _ in (*history, *held_out))

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / max(1, last - first)
        up = (min(max(value, low), high) - low) / (high - low)
        return left + across * (right - left), bottom - up * (bottom - top)

    for value in _ticks(low, high, 7):
        _, y = place(first, value)
        draw.line([(left, y), (right, y)], GRID)
        text = f"{value:.4g}"
        draw.text((left - 6 - draw.textlength(text, font), y - 8), text, INK, font)
    for step in _ticks(first, last, 6):
        x, _ = place(step, low)
        draw.line([(x, bottom), (x, bottom + 4)], INK)
        text = f"{step:g}"
        draw.text((min(x, right) - draw.textlength(text, font) / 2, bottom + 8), text, INK, font)
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    _line(draw, [place(*point) for point in _thinned(history, right - left)], FAINT, 1)
    _line(draw, [place(*point) for point in _thinned(means, right - left)], AVERAGE, 2)
    measured = [place(*point) for point in held_out]
    _line(draw, measured, MEASURED, 2)
    for x, y in measured:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], MEASURED)
    legend = [("loss of a step", FAINT), (f"mean {means[-1][1]:.4g}", AVERAGE)]
    if held_out:
        legend.append((f"held out {held_out[-1][1]:.4g}", MEASURED))
    x = float(left)
    for text, colour in legend:
        draw.line([(x, 17), (x + 18, 17)], colour, 3)
        draw.text((x + 24, 9), text, INK, font)
        x += 40 + draw.textlength(text, font)
    return picture


def grid(pictures: Tensor, cell: int = 192, columns: int = 2) -> Image.Image:
    """Pictures [B, H, W, 3] in 0..1 as tiles whose longer side is `cell` pixels, row by row."""
    tiles = [
        Image.fromarray((each.clamp(0, 1) * 255).round().byte().numpy(), "RGB") for each in pictures.cpu()
    ]
    wide, high = tiles[0].size
    scale = cell / max(wide, high)
    side = (max(1, round(wide * scale)), max(1, round(high * scale)))
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side[0] + 4) - 4, rows * (side[1] + 4) - 4), PAPER)
    for number, tile in enumerate(tiles):
        small = tile.resize(side, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
        sheet.paste(small, (number % columns * (side[0] + 4), number // columns * (side[1] + 4)))
    return sheet


def beside(*pictures: Image.Image | None) -> Image.Image:
    """Pictures next to each other on white, centred; None stands for none."""
    shown = [picture for picture in pictures if picture is not None]
    gap = 12
    width = sum(picture.width for picture in shown) + gap * (len(shown) - 1)
    height = max(picture.height for picture in shown)
    sheet = Image.new("RGB", (width, height), PAPER)
    x = 0
    for picture in shown:
        sheet.paste(picture, (x, (height - picture.height) // 2))
        x += picture.width + gap
    return sheet


def pixels(picture: Image.Image) -> Tensor:
    """A picture as the host hands pictures on: [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()


def _running(points: Sequence[Point]) -> list[Point]:
    """An exponential mean that forgets its start."""
    keep = 1 - 1 / max(_FEWEST, _SMOOTH * len(points))
    total = weight = 0.0
    means: list[Point] = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        means.append((step, total / weight))
    return means


def _range(shown: Sequence[float], all_of_them: Sequence[float]) -> tuple[float, float]:
    """What the axis reaches over: all of `shown`, and of the rest all but the oddest hundredth."""
    low = min(*shown, float(np.quantile(all_of_them, 0.01)))
    high = max(*shown, float(np.quantile(all_of_them, 0.99)))
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two values."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    start = math.ceil(low / step)
    return [number * step for number in range(start, math.floor(high / step) + 1)]


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    stretch = -(-2 * len(points) // most)
    thin: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        thin += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return thin


def _line(
    draw: ImageDraw.ImageDraw, places: Sequence[tuple[float, float]], colour: tuple[int, ...], width: int
) -> None:
    if len(places) > 1:
        draw.line(list(places), colour, width, joint="curve")
