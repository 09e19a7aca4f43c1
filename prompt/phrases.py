"""Finds the phrases that always reach the english stream: trigger words of LoRAs and what the artist keeps.

A phrase is found whatever its width, its case and its quotes. A blank and an underscore are the same, and any
number of either matches any number, because taggers and artists write blue_eyes and blue eyes for one thing.
Letters of scripts that separate words match whole words only: "cat" is not in "cats" or in "cat_ears", but it
is in "cat-girl" and in a Chinese or Korean sentence that it touches. Han, kana, Hangul, Thai and their like
match anywhere. The longest phrase takes its place first, then the one that was given first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .grammar import fold, half_width
from .letters import LATIN_WORD
from .weights import split
from .words import runs_on

PhraseReason = Literal["trigger", "kept"]

CLOSED = "\uffff"
"""Stands for a character that no phrase may contain; no text has it (a noncharacter of Unicode)."""

_LATIN_WORD = re.compile(f"[{LATIN_WORD}]")
_GAP = re.compile(r"[\s_]+")
_ENTRY = re.compile(r'"([^"\n]*)"|([^",;\n]+)')


@dataclass(frozen=True)
class Phrase:
    """Words that always reach the english stream, on every route, whatever their script.

    text: as the artist or a LoRA's metadata write it; brackets in it are text, escaped or not.
    source: where it is from, for people.
    """

    text: str
    reason: PhraseReason
    source: str = ""


def phrases_in(text: str, reason: PhraseReason, source: str = "") -> tuple[Phrase, ...]:
    """The phrases of a list that a person or a node has written, each once.

    They are separated by commas, semicolons or line breaks, of any width; one that holds such a sign stands
    in double quotes. Weights around them are taken off.
    """
    literal = "".join(span.text for span in split(half_width(text)))
    found = (" ".join((quoted or bare).split()) for quoted, bare in _ENTRY.findall(literal))
    return tuple(Phrase(each, reason, source) for each in dict.fromkeys(found) if each)


def find(text: str, phrases: Sequence[Phrase]) -> list[tuple[int, int, Phrase]]:
    """Start, end and phrase of every place in a folded `text`, in order; places do not overlap."""
    taken = bytearray(len(text))
    found: list[tuple[int, int, Phrase]] = []
    for phrase in sorted(phrases, key=lambda phrase: -len(phrase.text)):
        pattern = _pattern(phrase.text)
        for start, end in _places(pattern, text) if pattern else ():
            if not any(taken[start:end]):
                taken[start:end] = b"\1" * (end - start)
                found.append((start, end, phrase))
    return sorted(found, key=lambda place: place[:2])


@lru_cache(maxsize=1 << 12)
def _pattern(phrase: str) -> re.Pattern[str] | None:
    plain = fold(phrase.replace("\\(", "(").replace("\\)", ")"))
    parts = [re.escape(part) for part in _GAP.split(plain) if part]
    return re.compile(r"[\s_]+".join(parts)) if parts else None


def _places(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    match = pattern.search(text)
    while match:
        start, end = match.span()
        whole = _edge(text, start) and _edge(text, end)
        if whole:
            yield start, end
        match = pattern.search(text, end if whole else start + 1)


def _edge(text: str, place: int) -> bool:
    """Whether a word may end or begin at `place`."""
    if not 0 < place < len(text):
        return True
    left, right = text[place - 1], text[place]
    if unicodedata.category(right)[0] == "M":
        return False
    latin = [_LATIN_WORD.match(character) is not None for character in (left, right)]
    if any(latin):
        return not all(latin)
    return not (_separated(left) and _separated(right))


def _separated(character: str) -> bool:
    """Whether a character belongs to a word that blanks separate from the next."""
    return (character.isalpha() or unicodedata.category(character)[0] == "M") and not runs_on(character)
