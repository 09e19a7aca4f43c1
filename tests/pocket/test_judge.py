"""The judge reads painted pictures right, and its score follows what a caption names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from language_bridge.pocket import judge
from language_bridge.pocket.captions import Caption, Wanted
from language_bridge.pocket.judge import Reading, Seen, accuracy, corners_of, score
from language_bridge.pocket.painter import paint_many, random_scene

RED_CIRCLE = Seen("circle", "red", "large", "top left")
BLUE_STAR = Seen("star", "blue", "small", "bottom right")


def test_the_shipped_judge_reads_painted_pictures() -> None:
    """At least 99.5 % of the attributes of 300 fresh pictures, fixed seed."""
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng) for _ in range(300)]
    readings = judge.load().read_many(torch.from_numpy(paint_many(scenes, rng)))
    wanted = [
        Caption("", tuple(Wanted(t.shape, t.colour, t.size, t.place) for t in s.things), s.ground)
        for s in scenes
    ]
    shares = accuracy([score(r, w) for r, w in zip(readings, wanted, strict=True)])
    assert shares["attributes"] >= 0.995, shares


def test_a_noise_picture_is_not_read_as_right() -> None:
    """Scored against captions, pure noise stays near chance: the judge does not flatter."""
    rng = np.random.default_rng(6)
    scenes = [random_scene(rng) for _ in range(200)]
    readings = judge.load().read_many(torch.rand(200, 64, 64, 3, generator=torch.Generator().manual_seed(0)))
    wanted = [
        Caption("", tuple(Wanted(t.shape, t.colour, t.size, t.place) for t in s.things), s.ground)
        for s in scenes
    ]
    assert accuracy([score(r, w) for r, w in zip(readings, wanted, strict=True)])["exact"] < 0.05


def test_places_bind_attributes() -> None:
    """Two things that swapped corners fail their places, even though every word appears in the picture."""
    reading = Reading((RED_CIRCLE, BLUE_STAR), "light")
    right = Caption(
        "",
        (Wanted("star", "blue", "small", "bottom right"), Wanted("circle", "red", None, "top left")),
        "light",
    )
    marks = score(reading, right)
    assert all(all(found) for found in marks.values()) and sum(map(len, marks.values())) == 9
    swapped = Caption(
        "",
        (Wanted("star", "blue", "small", "top left"), Wanted("circle", "red", None, "bottom right")),
        "light",
    )
    marks = score(reading, swapped)
    assert marks["shape"] == [False, False] and marks["colour"] == [False, False] and marks["count"] == [True]


def test_unnamed_attributes_are_not_judged_and_missing_things_fail() -> None:
    """A bare caption is judged on shape and count alone; an empty picture fails both."""
    bare = Caption("", (Wanted("circle"),), None)
    assert score(Reading((RED_CIRCLE,), "dark"), bare) == {"shape": [True], "count": [True]}
    assert score(Reading((), "dark"), bare) == {"shape": [False], "count": [False]}
    assert score(Reading((RED_CIRCLE, BLUE_STAR), "dark"), bare) == {"shape": [True], "count": [False]}


def test_corners_come_in_the_order_of_places() -> None:
    """Each 32x32 corner, row by row."""
    image = torch.zeros(1, 3, 64, 64)
    image[0, :, :32, 32:] = 1
    assert corners_of(image).mean((1, 2, 3)).tolist() == [0, 1, 0, 0]


def test_all_pocket_assets_stay_small() -> None:
    """Together at most 40 MB, so that a clone stays quick."""
    folder = Path(judge.__file__).parent / "assets"
    assert 0 < sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 40 * 1000 * 1000
