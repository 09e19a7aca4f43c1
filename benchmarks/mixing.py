"""Prompts in two languages about one scene of the pocket world: by object, or by word inside a clause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from language_bridge.pocket import captions
from language_bridge.pocket.captions import Caption, Style
from language_bridge.pocket.painter import Scene, random_scene

SLOTS = ("shape", "colour", "size", "place")


def scenes(split: str, count: int, rng: np.random.Generator, *, pairs: bool = False) -> list[Scene]:
    """Scenes of a split; `pairs` keeps those of two objects."""
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(rng, held_out=split == "combinations")
        if len(scene.things) == 2 or not pairs:
            found.append(scene)
    return found


def by_object(asked: Caption, rng: np.random.Generator, style: Style) -> Caption:
    """The first object and the ground in Chinese, the second object in English."""
    first = captions.word(Caption("", asked.wanted[:1], asked.ground), "zh", rng, style)
    if len(asked.wanted) == 1:
        return first
    second = captions.word(Caption("", asked.wanted[1:], None), "en", rng, style)
    return replace(asked, text=f"{first.text}, {second.text}")


def by_word(asked: Caption, rng: np.random.Generator, style: Style) -> Caption:
    """A Chinese sentence that names one attribute of each object in English, at its place in the clause."""
    said = [[slot for slot in SLOTS if getattr(wanted, slot) is not None] for wanted in asked.wanted]
    return _written(asked, rng, style, [{slots[int(rng.integers(len(slots)))]} for slots in said])


def _written(
    asked: Caption,
    rng: np.random.Generator,
    style: Style,
    english: Sequence[set[str]],
) -> Caption:
    rules = captions.grammar()

    def pick(choices: Mapping[str, Sequence[str]], which: str) -> str:
        options = [*choices["seen"], *choices["held"]] if which == "any" else list(choices[which])
        return options[int(rng.integers(len(options)))]

    clauses: list[str] = []
    for wanted, slots in zip(asked.wanted, english, strict=True):
        values: dict[str, str | None] = {}
        for slot in SLOTS:
            value = getattr(wanted, slot)
            language = "en" if slot in slots else "zh"
            word = None if value is None else pick(rules[language][slot][value], style.words)
            values[slot] = f" {word} " if word and slot in slots else word
        clauses.append(captions.fill(pick(rules["zh"]["one"], style.patterns), values))
    things = clauses[0] if len(clauses) == 1 else pick(rules["zh"]["join"], style.patterns).join(clauses)
    ground = None if asked.ground is None else pick(rules["zh"]["ground"][asked.ground], style.words)
    text = captions.fill(pick(rules["zh"]["all"], style.patterns), {"things": things, "ground": ground})
    return replace(asked, text=text.strip())
