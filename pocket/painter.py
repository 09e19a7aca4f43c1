"""Paints the pocket world's scenes: coloured shapes in four corners of a grey picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SIDE = 64
"""Height and width of a picture in pixels."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.14),
    "orange": (0.97, 0.52, 0.06),
    "yellow": (0.98, 0.90, 0.14),
    "green": (0.12, 0.62, 0.20),
    "cyan": (0.10, 0.80, 0.82),
    "blue": (0.12, 0.24, 0.86),
    "purple": (0.52, 0.14, 0.70),
    "pink": (0.98, 0.60, 0.76),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
NEW_SHAPES = ("bowl",)
"""Shapes that only a LoRA learns: no text encoder, U-Net or bridge of the pocket world has met them."""
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
GROUNDS: dict[str, float] = {"light": 0.86, "middle": 0.55, "dark": 0.24}

HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = (
    ("red", "star"),
    ("orange", "ring"),
    ("yellow", "cross"),
    ("green", "circle"),
    ("cyan", "triangle"),
    ("blue", "square"),
    ("purple", "star"),
    ("pink", "circle"),
)
"""Colour and shape pairs that no Chinese encoder and no bridge sees in training."""

RADIUS = {"small": 7.0, "large": 12.5}


@dataclass(frozen=True)
class Thing:
    """One object of a scene, in the English names of `COLOURS`, `SHAPES` (or `NEW_SHAPES`), `SIZES` and
    `PLACES`.
    """

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One or two objects in different corners on a grey ground (a key of `GROUNDS`)."""

    things: tuple[Thing, ...]
    ground: str


def holds_out(scene: Scene) -> bool:
    """Whether the scene has at least one colour and shape pair of `HELD_OUT_PAIRS`."""
    return any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in scene.things)


def random_scene(rng: np.random.Generator, held_out: bool | None = None) -> Scene:
    """Draws a scene uniformly.

    held_out: None = any scene; True = every object is a held-out pair; False = no object is one.
    """
    count = int(rng.integers(1, 3))
    places = rng.permutation(len(PLACES))[:count]
    things: list[Thing] = []
    for place in places:
        while True:
            colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
            shape = SHAPES[int(rng.integers(len(SHAPES)))]
            if held_out is None or ((colour, shape) in HELD_OUT_PAIRS) == held_out:
                break
        things.append(Thing(shape, colour, SIZES[int(rng.integers(2))], PLACES[int(place)]))
    return Scene(tuple(things), list(GROUNDS)[int(rng.integers(len(GROUNDS)))])


def paint(scene: Scene, rng: np.random.Generator | None = None) -> npt.NDArray[np.float32]:
    """Draws a scene, anti-aliased: [SIDE, SIDE, 3] in 0..1.

    rng: jitters place, radius and colour slightly; None paints the exact middle of each range.
    """

    def jitter(width: float) -> float:
        return 0.0 if rng is None else float(rng.uniform(-width, width))

    picture = np.full((SIDE, SIDE, 3), GROUNDS[scene.ground] + jitter(0.02), dtype=np.float32)
    for thing in scene.things:
        across = 48.0 if "right" in thing.place else 16.0
        down = 48.0 if "bottom" in thing.place else 16.0
        shape = cover(thing.shape, across + jitter(1.5), down + jitter(1.5), RADIUS[thing.size] + jitter(0.7))
        ink = np.array(COLOURS[thing.colour], dtype=np.float32) + np.float32(jitter(0.03))
        picture = picture * (1.0 - shape[..., None]) + ink * shape[..., None]
    return np.minimum(np.maximum(picture, 0.0), 1.0).astype(np.float32)


def paint_many(scenes: Sequence[Scene], rng: np.random.Generator | None = None) -> npt.NDArray[np.float32]:
    """Paints scenes into one array [N, SIDE, SIDE, 3]."""
    return np.stack([paint(scene, rng) for scene in scenes])


_GRID_Y, _GRID_X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def cover(shape: str, across: float, down: float, radius: float) -> npt.NDArray[np.float32]:
    """Share of each pixel that a shape covers, from its signed distance: [SIDE, SIDE] in 0..1.

    across, down: its middle, radius: its size, all in pixels. ValueError on an unknown shape.
    """
    x, y = _GRID_X - across, _GRID_Y - down
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(x, y) - radius * 0.72) - radius * 0.28
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius * 0.88
    elif shape == "cross":
        arm, reach = radius * 0.33, radius
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - reach)
        level = np.maximum(np.abs(x) - reach, np.abs(y) - arm)
        distance = np.minimum(upright, level)
    elif shape == "triangle":
        distance = _polygon(x, y, radius * 1.12, 3, 1.0)
    elif shape == "star":
        distance = _polygon(x, y, radius * 1.12, 5, 0.42)
    elif shape == "bowl":  # the lower half of a circle
        rim = y + radius * 0.4
        distance = np.maximum(np.hypot(x, rim) - radius, -rim)
    else:
        raise ValueError(f"no shape is called {shape!r}; there are {', '.join((*SHAPES, *NEW_SHAPES))}")
    return np.minimum(np.maximum(0.5 - distance, 0.0), 1.0).astype(np.float32)


def _polygon(
    x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], radius: float, points: int, waist: float
) -> npt.NDArray[np.float32]:
    """Signed distance to a regular polygon (waist 1) or a star with its inner corners at waist * radius."""
    if waist >= 1.0:
        turns = 2 * np.pi * np.arange(points) / points
        edges = [x * np.sin(turn + np.pi / points) - y * np.cos(turn + np.pi / points) for turn in turns]
        return np.max(np.stack(edges), axis=0) - radius * np.cos(np.pi / points)
    angle = np.abs((np.arctan2(x, -y) + np.pi / points) % (2 * np.pi / points) - np.pi / points)
    length = np.hypot(x, y)
    tip = np.array([radius, 0.0])
    notch = radius * waist * np.array([np.cos(np.pi / points), np.sin(np.pi / points)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    # Left normal of the edge from tip to notch points away from the centre.
    return (length * np.cos(angle) - tip[0]) * edge[1] - (length * np.sin(angle)) * edge[0]
