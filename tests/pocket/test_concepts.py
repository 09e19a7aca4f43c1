"""Captions of the new concept ask for it in each of their forms, and their judge reads it off pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from language_bridge.pocket import captions, concepts, judge
from language_bridge.pocket.captions import Caption, Wanted
from language_bridge.pocket.painter import NEW_SHAPES, SHAPES, Scene, cover, paint_many, random_scene


@pytest.mark.parametrize("language", captions.LANGUAGES)
@pytest.mark.parametrize("form", concepts.FORMS)
def test_every_caption_has_the_trigger_once_and_still_wants_the_concept(
    language: str, form: concepts.Form
) -> None:
    rng = np.random.default_rng(3)
    words = captions.grammar()[language]["shape"][concepts.CLASS]["seen"]
    for _ in range(60):
        content = captions.describe(concepts.concept_scene(rng), rng)
        said = concepts.ask(content, language, rng, form)
        assert said.text.count(concepts.TRIGGER) == 1
        assert said.wanted == content.wanted and concepts.SHAPE in {w.shape for w in said.wanted}
        assert any(word in said.text for word in words) == (form != "noun"), said.text
        if form in ("first", "last"):
            ends = (said.text.startswith, said.text.endswith)[form == "last"]
            assert ends(concepts.TRIGGER)


def test_without_a_trigger_the_same_draws_give_the_same_sentence() -> None:
    rng, again = np.random.default_rng(4), np.random.default_rng(4)
    for _ in range(30):
        first = captions.describe(concepts.concept_scene(rng), rng)
        second = captions.describe(concepts.concept_scene(again), again)
        said = concepts.ask(first, "zh", rng, "first").text
        plain = concepts.ask(second, "zh", again, "adjective", trigger="").text
        assert said == f"{concepts.TRIGGER}\uff0c{plain}"


def test_the_new_shape_is_none_of_the_known_ones() -> None:
    """Best overlap with any known shape of its size stays clearly below one."""
    new = cover(concepts.SHAPE, 32, 32, 12.5).flatten()
    for shape in SHAPES:
        overlaps = [
            float(np.minimum(new, old).sum() / np.maximum(new, old).sum())
            for old in (cover(shape, 32, 32 + shift, 12.5).flatten() for shift in range(-6, 7))
        ]
        assert max(overlaps) < 0.8, (shape, max(overlaps))
    assert concepts.SHAPE in NEW_SHAPES and concepts.SHAPE not in SHAPES


def test_the_new_judge_reads_painted_pictures() -> None:
    """At least 99 % of the new shapes and of all attributes in 400 fresh pictures, and no false one."""
    rng = np.random.default_rng(5)
    reader = judge.load(judge.NEW_FILE)
    scenes = [concepts.concept_scene(rng) for _ in range(200)] + [random_scene(rng) for _ in range(200)]
    readings = reader.read_many(torch.from_numpy(paint_many(scenes, rng)))
    marks = [judge.score(r, _whole(s)) for r, s in zip(readings, scenes, strict=True)]
    assert judge.accuracy(marks)["attributes"] >= 0.99
    seen = [any(thing.shape == concepts.SHAPE for thing in reading.things) for reading in readings]
    assert np.mean(seen[:200]) >= 0.99 and np.mean(seen[200:]) <= 0.01
    assert reader.shapes == (*SHAPES, *NEW_SHAPES) and judge.load().shapes == SHAPES


def _whole(scene: Scene) -> Caption:
    return Caption("", tuple(Wanted(t.shape, t.colour, t.size, t.place) for t in scene.things), scene.ground)


@pytest.mark.parametrize("language", captions.LANGUAGES)
def test_a_sentence_with_the_sign_wants_it_last(language: str) -> None:
    rng = np.random.default_rng(6)
    for _ in range(40):
        scene = concepts.sign_scene(rng)
        said = concepts.ask_sign(scene, rng, "embedding:x", language)
        assert said.text.count("embedding:x") == 1
        assert len(said.wanted) == 2 and said.wanted[1] == Wanted(
            concepts.SIGN.shape, concepts.SIGN.colour, concepts.SIGN.size
        )
        assert scene.things[1].place != scene.things[0].place
