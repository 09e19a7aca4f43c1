"""Decides which stream hears which part of a prompt: native (through the bridge) or english (the own CLIP).

letters of a non-Latin script      native
Latin words                        english, in the mode "two streams"
embedding:name                     english, always, in a segment of its own
lang:en ... lang:zh                english, always, all that stands between (lang:zh, or any other
                                   lang:xx, ends the span)
digits, punctuation, space         with what stands to their left; digits that touch native text with it
no native letter and no mark       one english segment, the prompt as it was typed
nothing, or only blanks            native
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .grammar import normalise
from .weights import Span, split

Stream = Literal["native", "english"]
Mode = Literal["two streams", "native only"]

TWO_STREAMS: Mode = "two streams"
NATIVE_ONLY: Mode = "native only"
MODES: tuple[Mode, ...] = (TWO_STREAMS, NATIVE_ONLY)

# Latin letters of every block, and the letter-like signs that English text uses.
_LATIN = (
    "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02ff\u1d00-\u1dbf\u1e00-\u1eff\u2071\u207f"
    "\u2090-\u209c\u2100-\u214f\u2c60-\u2c7f\ua720-\ua7ff\uab30-\uab6f\ufb00-\ufb06\U0001d400-\U0001d7ff"
)
_WORD = rf"[{_LATIN}0-9_]+(?:(?:['\u2019-]|(?<=[0-9])\.(?=[0-9]))[{_LATIN}0-9_]+)*"
# A name is plain ASCII, so that it ends where Chinese text begins; one that begins in Chinese ends at a blank
# or at punctuation. It never ends in a full stop.
_NAME = r"(?:[A-Za-z0-9_.+/\\-]*[A-Za-z0-9_+-]|[^\x00-\x7f][^\s,.;!?()]*)"
_EMBEDDING = rf"(?<![{_LATIN}0-9_])embedding:{_NAME}"
_ATOM = re.compile(rf"(?P<embedding>{_EMBEDDING})|(?P<word>{_WORD})|(?P<sign>.)", re.DOTALL)
_MARK = re.compile(rf"(?<![{_LATIN}0-9_])lang:([a-z]{{2,3}})(?![{_LATIN}0-9_])\s*")
_LETTER = re.compile(f"[{_LATIN}]")
_STOP = re.compile(r"[\s,.;:!?\u3001]")


@dataclass(frozen=True)
class Segment:
    """A part of a prompt for one stream.

    Native text is literal. English text is in the host's prompt grammar (brackets that are text are escaped),
    so that the stock tokenizer can read it; `weight` comes on top.
    """

    text: str
    weight: float
    stream: Stream


@dataclass(frozen=True)
class _Atom:
    """A smallest piece of span number `span`; stream None goes with its neighbours, `alone` with nobody."""

    text: str
    span: int
    weight: float
    stream: Stream | None
    alone: bool = False


def route(text: str, mode: str = TWO_STREAMS) -> list[Segment]:
    """Cut a prompt into segments, in order; ValueError on an unknown mode.

    Nothing is lost but the brackets and numbers of the weights, and the lang: marks with the blanks behind.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    text = normalise(text).text
    if not text.strip():
        return [Segment(text, 1.0, "native")]
    spans = split(text)
    atoms = list(_atoms(spans))
    if mode == NATIVE_ONLY:
        atoms = [atom if atom.alone else replace(atom, stream="native") for atom in atoms]
    elif not any(atom.stream == "native" for atom in atoms) and not any(_MARK.search(s.text) for s in spans):
        return [Segment(text, 1.0, "english")]
    return _join(_settle(atoms))


def english_prompt(segments: Sequence[Segment]) -> str:
    """Write the english segments as one prompt for the stock tokenizer, weights and all; "" when none is."""
    prompt = ""
    for segment in segments:
        if segment.stream != "english" or not (segment.text.strip() or len(segments) == 1):
            continue
        if prompt and not prompt[-1].isspace():
            prompt += " "  # an embedding's name needs a blank on either side
        prompt += segment.text if segment.weight == 1.0 else f"({segment.text}:{segment.weight!r})"
    return prompt


def escape(text: str) -> str:
    """Write literal text so that the host's prompt grammar reads it as text."""
    return text.replace("(", "\\(").replace(")", "\\)")


def _atoms(spans: Sequence[Span]) -> Iterator[_Atom]:
    forced = False  # inside lang:en ... lang:zh, which may reach over several spans
    for number, span in enumerate(spans):
        end = 0
        for mark in [*_MARK.finditer(span.text), None]:
            chunk = span.text[end : mark.start() if mark else None]
            if forced and chunk:
                yield _Atom(chunk, number, span.weight, "english", alone=True)
            elif chunk:
                yield from _scan(chunk, number, span.weight)
            if mark:
                forced, end = mark[1] == "en", mark.end()


def _scan(text: str, span: int, weight: float) -> Iterator[_Atom]:
    for match in _ATOM.finditer(text):
        piece = match[0]
        if match["embedding"]:
            yield _Atom(piece, span, weight, "english", alone=True)
        elif match["word"]:
            yield _Atom(piece, span, weight, "english" if _LETTER.search(piece) else None)
        else:
            yield _Atom(piece, span, weight, "native" if piece.isalpha() else None)


def _settle(atoms: list[_Atom]) -> list[_Atom]:
    """Give every undecided atom a stream; atoms that stand alone neither give nor take one."""
    streams: list[Stream | None] = [atom.stream for atom in atoms]
    touching: list[int] | None = None  # signs between here and native text on the right; None = out of touch
    for place in range(len(atoms) - 1, -1, -1):
        atom = atoms[place]
        if atom.stream == "native":
            touching = []
        elif atom.stream is not None or _STOP.fullmatch(atom.text):
            touching = None
        elif touching is not None:
            touching.append(place)
            if any(character.isdigit() for character in atom.text):
                for settled in touching:
                    streams[settled] = "native"
                touching = []
    left: Stream = "english"
    for stream, atom in zip(reversed(streams), reversed(atoms), strict=True):
        if stream and not atom.alone:
            left = stream  # what stands first also takes the signs before it
    settled_atoms: list[_Atom] = []
    for stream, atom in zip(streams, atoms, strict=True):
        if not atom.alone:
            left = stream or left
        settled_atoms.append(replace(atom, stream=stream or left))
    return settled_atoms


def _join(atoms: list[_Atom]) -> list[Segment]:
    segments: list[Segment] = []
    last: _Atom | None = None
    for atom in atoms:
        stream: Stream = atom.stream or "native"
        text = escape(atom.text) if stream == "english" else atom.text
        if last and not (last.alone or atom.alone) and (last.span, last.stream) == (atom.span, stream):
            segments[-1] = replace(segments[-1], text=segments[-1].text + text)
        else:
            segments.append(Segment(text, atom.weight, stream))
        last = atom
    return segments
