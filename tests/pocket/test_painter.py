"""The painter puts each thing where the scene says, in its colour, and nothing elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from language_bridge.pocket.painter import (
    COLOURS,
    GROUNDS,
    HELD_OUT_PAIRS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    Thing,
    holds_out,
    paint,
    random_scene,
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
def test_ink_stays_in_its_corner(shape: str, place: str) -> None:
    """Outside the named corner all is the ground's grey; inside there is ink, more of it when large."""
    amounts = []
    for size in SIZES:
        picture = paint(Scene((Thing(shape, "red", size, place),), "middle"))
        ink = np.abs(picture - GROUNDS["middle"]).max(-1) > 0.02
        top, left = (32 if "bottom" in place else 0), (32 if "right" in place else 0)
        assert ink[top : top + 32, left : left + 32].sum() == ink.sum() > 20
        amounts.append(int(ink.sum()))
    assert amounts[1] > 1.5 * amounts[0]


def test_full_cover_is_the_pure_colour() -> None:
    """The middle of a large square has exactly its colour."""
    for colour, value in COLOURS.items():
        picture = paint(Scene((Thing("square", colour, "large", "top left"),), "dark"))
        np.testing.assert_allclose(picture[16, 16], value, atol=1e-6)


def test_jitter_is_seeded_and_small() -> None:
    """The same generator state paints the same picture; jitter moves a picture but keeps its range."""
    scene = Scene(
        (Thing("star", "blue", "small", "top right"), Thing("ring", "pink", "large", "bottom left")), "light"
    )
    first, again = (paint(scene, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again) and not np.array_equal(first, paint(scene))
    assert first.shape == (SIDE, SIDE, 3) and first.min() >= 0 and first.max() <= 1


def test_scenes_keep_out_what_they_must() -> None:
    """held_out=False draws no held-out pair, True nothing else; two things never share a corner."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert not holds_out(random_scene(rng, held_out=False))
        scene = random_scene(rng, held_out=True)
        assert all((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in scene.things)
        assert len({thing.place for thing in scene.things}) == len(scene.things)


def test_an_unknown_shape_is_named() -> None:
    """A wrong name is answered with the right ones."""
    with pytest.raises(ValueError, match="no shape is called 'blob'.*circle"):
        paint(Scene((Thing("blob", "red", "small", "top left"),), "light"))
