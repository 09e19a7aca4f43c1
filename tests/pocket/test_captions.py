"""Captions say what the scene has, in both languages; held-out parts never leak into training captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from language_bridge.pocket import captions
from language_bridge.pocket.captions import (
    LANGUAGES,
    SPLITS,
    STYLES,
    Style,
    grammar,
    parallel,
    parse,
    scene_of,
)
from language_bridge.pocket.painter import random_scene


def test_both_languages_ask_for_the_same_and_are_read_back() -> None:
    """parse(word(x)) = x on at least 99 % of captions; the rest are truly ambiguous sentences."""
    rng = np.random.default_rng(0)
    right = total = 0
    for _ in range(400):
        scene = random_scene(rng)
        for split in SPLITS:
            both = parallel(scene, rng, STYLES[split])
            assert both["en"].wanted == both["zh"].wanted and both["en"].ground == both["zh"].ground
            for caption in both.values():
                read = parse(caption.text)
                total += 1
                right += (
                    read is not None
                    and sorted(map(str, read.wanted)) == sorted(map(str, caption.wanted))
                    and read.ground == caption.ground
                )
    assert right / total >= 0.99, f"{right} of {total}"


def test_training_captions_use_no_held_out_word() -> None:
    """In style "seen" no form that is held out, and not part of a seen form, ever appears in Chinese."""
    rules = grammar()["zh"]
    held = [
        form
        for slot in ("shape", "colour", "size", "place", "ground")
        for v in rules[slot].values()
        for form in v["held"]
    ]
    rng = np.random.default_rng(1)
    texts = [parallel(random_scene(rng), rng)["zh"].text for _ in range(600)]
    assert not [form for form in held if any(form in text for text in texts)]


def test_held_out_patterns_look_like_no_seen_pattern() -> None:
    """Seen and held-out sentence patterns are different lists in every slot and language."""
    for language in LANGUAGES:
        rules = grammar()[language]
        for slot in ("one", "all", "join"):
            assert not set(rules[slot]["seen"]) & set(rules[slot]["held"])


def test_dropped_attributes_are_not_asked_for() -> None:
    """drop=0 says everything, drop=1 only the shapes."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        scene = random_scene(rng)
        full = parallel(scene, rng, Style(drop=0.0))["zh"]
        assert full.ground and all(w.colour and w.size and w.place for w in full.wanted)
        bare = parallel(scene, rng, Style(drop=1.0))["zh"]
        assert bare.ground is None and not any(w.colour or w.size or w.place for w in bare.wanted)


def test_a_caption_is_a_scene_again() -> None:
    """scene_of keeps everything said and invents the rest without two things in one corner."""
    rng = np.random.default_rng(3)
    for _ in range(100):
        caption = parallel(random_scene(rng), rng, Style(drop=0.5))["en"]
        scene = scene_of(caption, rng)
        for wish, thing in zip(caption.wanted, scene.things, strict=True):
            assert (
                thing.shape == wish.shape
                and wish.colour in (None, thing.colour)
                and wish.place in (None, thing.place)
            )
        assert len({thing.place for thing in scene.things}) == len(scene.things)


def test_prompts_without_a_shape_are_not_understood() -> None:
    """Nothing to judge is said as None, not guessed."""
    assert parse("a photo of a cat") is None and parse("") is None


def test_demo_prompts_ask_for_the_same_in_all_three_wordings() -> None:
    """pocket/demo.json: English, Chinese and mixed mean one picture."""
    demo = json.loads((Path(captions.__file__).parent / "demo.json").read_text(encoding="utf-8"))
    for triple in demo:
        read = [parse(triple[wording]) for wording in ("en", "zh", "mixed")]
        assert all(r is not None for r in read)
        assert len({str((sorted(map(str, r.wanted)), r.ground)) for r in read if r}) == 1, triple
