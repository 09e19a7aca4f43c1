"""The new concept that the pocket LoRA teaches, its made-up trigger word, and captions that ask for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from .captions import Caption, Style, Wanted, describe, grammar, word
from .painter import NEW_SHAPES, PLACES, Scene, Thing, random_scene

_ASSETS = Path(__file__).parent / "assets"

SHAPE = NEW_SHAPES[0]
"""What the LoRA draws: a shape that neither the checkpoint nor any bridge has met."""

CLASS = "circle"
"""The known thing that the new one is a kind of, as a character LoRA's subject is a kind of girl."""

TRIGGER = "zorbix"
LORA = _ASSETS / "loras" / "pocket-zorbix.safetensors"

EMBEDDING = _ASSETS / "embeddings" / "pocket-sign.safetensors"
SIGN = Thing("cross", "orange", "large", PLACES[0])
"""What the Textual Inversion word means, wherever it stands: shape, colour and size at once, like a logo."""

Form = Literal["first", "last", "adjective", "noun"]
FORMS: tuple[Form, ...] = ("first", "last", "adjective", "noun")
"""Where a caption has the trigger: as a tag before or behind the sentence ("zorbix, a red circle"), before
the class word ("a red zorbix circle"), or in its place ("a red zorbix")."""


def concept_scene(rng: np.random.Generator, shape: str = SHAPE) -> Scene:
    """A random scene whose first object is the new one; a second is none of its class."""
    while True:
        scene = random_scene(rng)
        if all(thing.shape != CLASS for thing in scene.things[1:]):
            return Scene((replace(scene.things[0], shape=shape), *scene.things[1:]), scene.ground)


def sign_scene(rng: np.random.Generator) -> Scene:
    """A random scene in which `SIGN` stands beside what is asked for in words; the sign comes last."""
    while True:
        scene = random_scene(rng)
        other = scene.things[0]
        if (other.shape, other.colour) != (SIGN.shape, SIGN.colour):
            free = [place for place in PLACES if place != other.place]
            return Scene((other, replace(SIGN, place=free[int(rng.integers(len(free)))])), scene.ground)


def ask(
    content: Caption,
    language: str,
    rng: np.random.Generator,
    form: Form = "first",
    style: Style | None = None,
    trigger: str = TRIGGER,
) -> Caption:
    """Puts a caption about `SHAPE` into words of one language, with the trigger in one of `FORMS`.

    The text changes, what is asked for stays: the caption still wants `SHAPE`.
    """
    plain = replace(content, wanted=tuple(_of_class(wanted) for wanted in content.wanted))
    forms = grammar()[language]["shape"][CLASS]
    which = (style or Style()).words
    words: list[str] = [*forms["seen"], *forms["held"]] if which == "any" else forms[which]
    of_class = words[int(rng.integers(len(words)))]
    names = {CLASS: of_class}
    if form == "adjective":
        names = {CLASS: f"{trigger} {of_class}" if language == "en" else trigger + of_class}
    elif form == "noun":
        names = {CLASS: trigger}
    text = word(plain, language, rng, style, names).text
    comma = ", " if language == "en" else "\uff0c"
    if form == "first":
        text = trigger + comma + text
    elif form == "last":
        text += comma + trigger
    return replace(content, text=text)


def ask_sign(scene: Scene, rng: np.random.Generator, name: str, language: str = "en") -> Caption:
    """A sentence about what stands beside the sign, and the sign by its name, in front or behind.

    The caption wants both, the sign last.
    """
    content = describe(Scene(scene.things[:1], scene.ground), rng)
    text = word(content, language, rng).text
    comma = ", " if language == "en" else "\uff0c"
    text = text + comma + name if rng.random() < 0.5 else name + comma + text
    sign = Wanted(SIGN.shape, SIGN.colour, SIGN.size)
    return Caption(text, (*content.wanted, sign), content.ground)


def _of_class(wanted: Wanted) -> Wanted:
    return replace(wanted, shape=CLASS) if wanted.shape == SHAPE else wanted
