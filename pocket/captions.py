"""Writes and reads captions of the pocket world's scenes, in English and in Chinese."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .painter import Scene, Thing

LANGUAGES = ("en", "zh")
SPLITS = ("seen", "combinations", "templates", "synonyms")
"""What a test caption holds out: nothing, colour and shape pairs, sentence patterns, or words."""


@dataclass(frozen=True)
class Wanted:
    """What a caption says of one object; None where it says nothing."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Caption:
    """A sentence and what it asks for; ground is None where the sentence leaves it out."""

    text: str
    wanted: tuple[Wanted, ...]
    ground: str | None


@dataclass(frozen=True)
class Style:
    """Which part of the grammar a caption may use.

    words, patterns: "seen", "held" or "any"; drop: chance that an attribute is left unsaid.
    """

    words: str = "seen"
    patterns: str = "seen"
    drop: float = 0.15


STYLES: dict[str, Style] = {
    "seen": Style(),
    "combinations": Style(),
    "templates": Style(patterns="held"),
    "synonyms": Style(words="held"),
}


@lru_cache(maxsize=1)
def grammar() -> dict[str, Any]:
    """The grammar file: language -> slot -> value -> {"seen": [...], "held": [...]}."""
    text = Path(__file__).with_name("captions.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def describe(
    scene: Scene, rng: np.random.Generator, style: Style | None = None, order: bool = True
) -> Caption:
    """Decides what is said of a scene and in which order; `word` turns it into a sentence.

    order: objects may change places in the sentence.
    """
    style = style or Style()

    def said(value: str) -> str | None:
        return None if rng.random() < style.drop else value

    wanted = [Wanted(t.shape, said(t.colour), said(t.size), said(t.place)) for t in scene.things]
    if order and rng.random() < 0.5:
        wanted.reverse()
    return Caption("", tuple(wanted), said(scene.ground))


def word(
    caption: Caption,
    language: str,
    rng: np.random.Generator,
    style: Style | None = None,
    shapes: Mapping[str, str] | None = None,
) -> Caption:
    """Puts what a caption asks for into words of one language.

    shapes: names for shapes that the grammar has no word for.
    """
    style = style or Style()
    named = shapes or {}
    rules = grammar()[language]

    def pick(choices: Mapping[str, Sequence[str]], which: str) -> str:
        options = [*choices["seen"], *choices["held"]] if which == "any" else list(choices[which])
        return options[int(rng.integers(len(options)))]

    def name(slot: str, value: str | None) -> str | None:
        return None if value is None else pick(rules[slot][value], style.words)

    parts = [
        fill(
            pick(rules["one"], style.patterns),
            {
                "shape": named.get(wanted.shape) or name("shape", wanted.shape),
                "colour": name("colour", wanted.colour),
                "size": name("size", wanted.size),
                "place": name("place", wanted.place),
            },
        )
        for wanted in caption.wanted
    ]
    things = parts[0] if len(parts) == 1 else pick(rules["join"], style.patterns).join(parts)
    text = fill(
        pick(rules["all"], style.patterns), {"things": things, "ground": name("ground", caption.ground)}
    )
    return replace(caption, text=text.strip())


def parallel(scene: Scene, rng: np.random.Generator, style: Style | None = None) -> dict[str, Caption]:
    """The same content in every language: language -> caption."""
    content = describe(scene, rng, style)
    return {language: word(content, language, rng, style) for language in LANGUAGES}


def parse(text: str) -> Caption | None:
    """Reads a sentence typed by a person back into what it asks for; None where no shape is named.

    Words of both languages are looked up, longest first. An attribute belongs to the shape of its clause:
    clauses end at commas, semicolons, full stops and joining words, and a clause without a shape adds to the
    object before it (or, at the start of the sentence, after it).
    """
    clauses = _clauses(text)
    wanted: list[dict[str, str]] = []
    waiting: dict[str, str] = {}
    ground: str | None = None
    for found in clauses:
        here: dict[str, str] = dict(waiting)
        shaped = False
        for slot, value in found:
            if slot == "ground":
                ground = value
            elif slot == "shape" and shaped:
                wanted.append(here)
                here = {"shape": value}
            else:
                shaped = shaped or slot == "shape"
                here[slot] = value
        if shaped:
            wanted.append(here)
            waiting = {}
        elif wanted and not waiting and not any(slot in wanted[-1] for slot in here):
            wanted[-1].update(here)
        else:
            waiting = here
    if not wanted:
        return None
    return Caption(
        text,
        tuple(Wanted(w["shape"], w.get("colour"), w.get("size"), w.get("place")) for w in wanted),
        ground,
    )


def characters(language: str = "zh") -> list[str]:
    """Every character of a language's grammar, sorted: the vocabulary that the pocket world needs."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, str):
            found.update(re.sub(r"\{\w+\}", "", node))
        elif isinstance(node, Mapping):
            for child in node.values():  # pyright: ignore[reportUnknownVariableType]
                walk(child)
        elif isinstance(node, Sequence):
            for child in node:  # pyright: ignore[reportUnknownVariableType]
                walk(child)

    walk(grammar()[language])
    return sorted(found - set("[]{} "))


def scene_of(caption: Caption, rng: np.random.Generator) -> Scene:
    """A scene that fits a caption; what the caption leaves out is drawn at random."""
    from .painter import COLOURS, GROUNDS, PLACES, SIZES

    def some(value: str | None, options: Sequence[str]) -> str:
        return value if value is not None else options[int(rng.integers(len(options)))]

    taken = {w.place for w in caption.wanted}
    free = [p for p in PLACES if p not in taken]
    things: list[Thing] = []
    for w in caption.wanted:
        place = w.place if w.place is not None else free.pop(int(rng.integers(len(free))))
        things.append(Thing(w.shape, some(w.colour, list(COLOURS)), some(w.size, SIZES), place))
    return Scene(tuple(things), some(caption.ground, list(GROUNDS)))


def fill(pattern: str, values: Mapping[str, str | None]) -> str:
    """Fills {slot}s; a [bracketed part] whose slot has no value is left out."""

    def optional(match: re.Match[str]) -> str:
        slots = re.findall(r"\{(\w+)\}", match.group(1))
        return "" if any(values[slot] is None for slot in slots) else match.group(1)

    text = re.sub(r"\[([^\]]*)\]", optional, pattern)
    return re.sub(r"\{(\w+)\}", lambda m: values[m.group(1)] or "", text)


@lru_cache(maxsize=1)
def _lexicon() -> list[tuple[str, str, str]]:
    """(word, slot, value), longest word first."""
    entries: list[tuple[str, str, str]] = []
    for language in LANGUAGES:
        for slot in ("shape", "colour", "size", "place", "ground"):
            values: dict[str, dict[str, list[str]]] = grammar()[language][slot]
            for value, forms in values.items():
                entries += [(form, slot, value) for form in [*forms["seen"], *forms["held"]]]
    return sorted(entries, key=lambda entry: -len(entry[0]))


def _clauses(text: str) -> Iterator[list[tuple[str, str]]]:
    """Clauses of a sentence as lists of (slot, value) in reading order."""
    lists: list[list[str]] = [w for language in LANGUAGES for w in grammar()[language]["join"].values()]
    joins = {join.strip() for each in lists for join in each}
    words = [j for j in joins if j and j[0] not in ",;" and not re.fullmatch(r"[\W_]+", j)]
    # No colon here: "top left: a square" is one clause.
    stops = "[,;.\uff0c\uff1b\u3002\u3001]"
    splitter = "|".join(
        [stops, *(rf"\b{re.escape(w)}\b" if w.isascii() else re.escape(w.lstrip("\uff0c")) for w in words)]
    )
    for clause in re.split(splitter, text.lower()):
        found: list[tuple[int, str, str]] = []
        rest = clause
        for form, slot, value in _lexicon():
            pattern = rf"\b{re.escape(form)}\b" if form.isascii() else re.escape(form)
            for match in re.finditer(pattern, rest):
                found.append((match.start(), slot, value))
            rest = re.sub(pattern, lambda m: "\0" * len(m.group()), rest)
        if found:
            yield [(slot, value) for _, slot, value in sorted(found)]
