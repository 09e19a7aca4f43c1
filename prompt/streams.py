"""Decides which stream hears which part of a prompt: native (through the bridge) or english (the own CLIP).

letters of a non-Latin script      native
Latin words                        english, in the mode "two streams"
embedding:name                     english, always, in a segment of its own
lang:en ... lang:zh                english, always, all that stands between (lang:zh, or any other
                                   lang:xx, ends the span)
phrases (triggers, keep-list)      english, always, in segments of their own
digits, punctuation, space         with what stands to their left; digits that touch native text with it
BREAK                              separates parts: each stream begins a new window there
no native letter and no mark       one english segment, the prompt as it was typed, BREAK and all
nothing, or only blanks            native

In the mode "native only" all but embeddings, marked spans and phrases is native.

BREAK and lang: are words of their own: no Latin letter, digit or underscore touches them, while Chinese
characters and punctuation may. The name of an embedding is Latin, and ends where Chinese text begins: Latin
letters, digits, "_", "-" and "+", inside it also "/", backslash, full stop and "@#$%&=~", and pairs of
brackets. Or it begins in another script, and goes on to a blank or to punctuation, save a full stop between
two digits or before safetensors, pt or bin. Blanks may stand between colon and name, if no mark and no BREAK
follows. "embedding:" without a name is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from .grammar import Change, fold, normalise, width_changes
from .letters import LATIN, LATIN_WORD, has_native, is_native
from .phrases import CLOSED, Phrase, find
from .weights import Span, split

Stream = Literal["native", "english", "break"]
Mode = Literal["two streams", "native only"]
Reason = Literal[
    "native letters",
    "latin words",
    "with its neighbour",
    "no letters",
    "embedding",
    "marked",
    "trigger",
    "kept",
    "native only",
    "plain english",
    "empty",
    "break",
]

TWO_STREAMS: Mode = "two streams"
NATIVE_ONLY: Mode = "native only"
MODES: tuple[Mode, ...] = (TWO_STREAMS, NATIVE_ONLY)

_FREE, _APART = rf"(?<![{LATIN_WORD}])", rf"(?![{LATIN_WORD}])"  # nothing of a Latin word before, behind
_BRACKETS = rf"\([{LATIN_WORD}.+/\\-]+\)"
_LATIN_NAME = rf"(?:[{LATIN_WORD}.+/\\@#$%&=~-]|{_BRACKETS})*(?:[{LATIN_WORD}+-]|{_BRACKETS})"
_INSIDE = (
    r"[^\s,.;:!?()\[\]<>{}\"'|*\u2014\u2018-\u201f\u2026\u3008-\u3011\u060c\u061b\u061f\u0964\u0965]"
    r"|(?<=[0-9])\.(?=[0-9])"
)
_NATIVE_NAME = rf"(?![\x00-\x7f])\w(?:{_INSIDE})*(?:\.(?:safetensors|pt|bin){_APART})?"
_MARKS = rf"lang:(?P<language>[a-z]{{2,3}})(?:-(?:[A-Z][a-z]{{3}}|[A-Z]{{2}}))*{_APART}\s*"
_FIXED = re.compile(
    rf"(?P<embedding>{_FREE}embedding:(?:[ \t]+(?!embedding:|lang:|BREAK{_APART}))?"
    rf"(?:{_LATIN_NAME}|{_NATIVE_NAME}))"
    rf"|(?P<mark>{_FREE}{_MARKS})"
    rf"|(?P<part>(?:(?<!\s)\s+)?{_FREE}BREAK{_APART}\s*)"
)
_MARK = re.compile(_MARKS)
_WORD = rf"[{LATIN_WORD}]+(?:(?:['\u2019-]|(?<=[0-9])\.(?=[0-9]))[{LATIN_WORD}]+)*"
_ATOM = re.compile(rf"(?P<word>{_WORD})|.", re.DOTALL)
_LETTER = re.compile(f"[{LATIN}]")
_STOP = re.compile(r"[\s,.;:!?\u060c\u061b\u061f\u0964\u0965]")
_ESCAPED = re.compile(r"\\[()]")
_NAMELESS = re.compile(f"{_FREE}embedding:")


@dataclass(frozen=True)
class Segment:
    """A part of a prompt for one stream: the characters [start, end) of the prompt as it was typed, and why.

    Native text is literal. English text is in the host's prompt grammar (brackets that are text are escaped),
    so that the stock tokenizer can read it; `weight` comes on top. The text of a "break" is the word BREAK
    with the blanks around it, which nobody hears. Reasons:

    native letters      it has letters of a native script
    latin words         it has Latin letters
    with its neighbour  signs and digits that go with what they stand beside
    no letters          signs and digits in a part that has no letters
    embedding, marked   embedding:name; between lang:en and the next mark
    trigger, kept       a `Phrase`
    native only         the mode
    plain english       the whole prompt, as it was typed: it has no native letter and no mark
    empty, break        nothing was said; BREAK
    """

    text: str
    weight: float
    stream: Stream
    reason: Reason
    start: int
    end: int


@dataclass(frozen=True)
class _Atom:
    """A smallest piece: [start, end) of the literal text, in span number `span`.

    Stream None goes with its neighbours, and `sign` is its text; `alone` neither gives nor takes a stream;
    `apart` is a segment by itself.
    """

    start: int
    end: int
    span: int
    stream: Stream | None
    reason: Reason
    sign: str = ""
    alone: bool = False
    apart: bool = False


class _Literal:
    """The text of a prompt without weights and escapes, and where each character stood."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.text = "".join(span.text for span in spans)
        self._starts = [offset for span in spans for offset in span.offsets[:-1]]
        self._ends = [offset for span in spans for offset in span.offsets[1:]]

    def segment(self, atom: _Atom) -> Segment:
        """The segment that holds one atom."""
        text = self.text[atom.start : atom.end]
        stream: Stream = atom.stream or "native"
        return Segment(
            escape(text) if stream == "english" else text,
            self.spans[atom.span].weight,
            stream,
            atom.reason,
            self._starts[atom.start],
            self._ends[atom.end - 1],
        )


def route(text: str, mode: str = TWO_STREAMS, phrases: Sequence[Phrase] = ()) -> list[Segment]:
    """Cut a prompt into segments, in order, at least one; ValueError on an unknown mode.

    Between the segments stand the brackets and numbers of the weights, and the lang: marks with the blanks
    behind; nothing else is lost. `changes` tells all of it.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    text = normalise(text).text
    if not text.strip():
        return [Segment(text, 1.0, "native", "empty", 0, len(text))]
    spans = split(text)
    if mode == TWO_STREAMS and not has_native(text) and not any(map(_has_mark, spans)):
        return [Segment(text, 1.0, "english", "plain english", 0, len(text))]
    literal = _Literal(spans)
    atoms = list(_atoms(literal, phrases))
    if mode == NATIVE_ONLY:
        atoms = [
            atom if atom.alone or atom.apart else replace(atom, stream="native", reason="native only")
            for atom in atoms
        ]
    segments = [literal.segment(atom) for atom in _join(_settle(atoms))]
    if all(segment.stream == "break" for segment in segments):
        segments.append(Segment("", 1.0, "native", "empty", len(text), len(text)))
    return segments


def parts(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Cut segments at every BREAK; parts in which nothing is said are left out, unless there is no other."""
    cut: list[list[Segment]] = [[]]
    for segment in segments:
        if segment.stream == "break":
            cut.append([])
        else:
            cut[-1].append(segment)
    said = [part for part in cut if any(segment.text.strip() for segment in part)]
    return said or [[segment for part in cut for segment in part]]


def english_prompt(segments: Sequence[Segment]) -> str:
    """Write the english segments of a part as one prompt for the stock tokenizer; "" when there is none.

    Weights are written out. An embedding's name gets the blanks that the host wants around it; the word
    "embedding:" without a name gets one inside, because the host would look for a name behind it.
    """
    groups: list[Segment] = []
    for segment in segments:
        if segment.stream != "english" or not (segment.text.strip() or len(segments) == 1):
            continue
        last = groups[-1] if groups else None
        if last and (last.end, last.weight) == (segment.start, segment.weight) and _plain(last, segment):
            groups[-1] = replace(last, text=last.text + segment.text, end=segment.end)
        else:
            groups.append(segment)
    prompt = ""
    for group in groups:
        if prompt and not prompt[-1].isspace():
            prompt += " "
        text = group.text
        if group.reason not in ("embedding", "plain english"):
            text = _NAMELESS.sub("embedding :", text)
        prompt += text if group.weight == 1.0 else f"({text}:{group.weight!r})"
    return prompt


def changes(text: str, segments: Sequence[Segment] = ()) -> list[Change]:
    """What is read otherwise than it was typed, in order: what `normalise` changes in the prompt `text`.

    With the segments that `route` made of it, also what no stream hears (`read` is ""); these changes and the
    segments together are the whole prompt, each character once.
    """
    found = width_changes(text)
    if segments:
        narrow = normalise(text).text
        bounds = [0, *(place for segment in segments for place in (segment.start, segment.end)), len(text)]
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            found.extend(_unheard(text, narrow, start, end))
        for segment in segments:
            if segment.reason == "plain english":
                continue
            for match in _ESCAPED.finditer(narrow, segment.start, segment.end):
                place = match.start()
                found.append(Change(place, place + 1, text[place], "", "escape"))
    return sorted(found, key=lambda change: (change.start, change.end))


def escape(text: str) -> str:
    """Write literal text so that the host's prompt grammar reads it as text."""
    return text.replace("(", "\\(").replace(")", "\\)")


def _has_mark(span: Span) -> bool:
    return any(match["mark"] for match in _FIXED.finditer(span.text))


def _plain(*segments: Segment) -> bool:
    return all(segment.reason != "embedding" for segment in segments)


def _unheard(text: str, narrow: str, start: int, end: int) -> Iterator[Change]:
    """The grammar between two segments: marks, and what is left is brackets and numbers."""
    for match in [*_MARK.finditer(narrow, start, end), None]:
        stop = match.start() if match else end
        if start < stop:
            yield Change(start, stop, text[start:stop], "", "weight")
        if match:
            start = match.end()
            yield Change(stop, start, text[stop:start], "", "mark")


def _atoms(literal: _Literal, phrases: Sequence[Phrase]) -> Iterator[_Atom]:
    """All pieces but the marks, in order."""
    atoms: list[_Atom] = []
    free: list[_Atom] = []
    forced = False  # inside lang:en ... lang:zh, which may reach over several spans
    base = 0
    for number, span in enumerate(literal.spans):
        end = 0
        for match in [*_FIXED.finditer(span.text), None]:
            start, end = end, match.start() if match else len(span.text)
            chunk = _Atom(base + start, base + end, number, "english", "marked", alone=True)
            if start < end:
                (atoms if forced else free).append(chunk)
            if match is None:
                break
            start, end = match.span()
            fixed = replace(chunk, start=base + start, end=base + end)
            if match["embedding"]:
                atoms.append(replace(fixed, reason="embedding"))
            elif match["part"]:
                atoms.append(replace(fixed, stream="break", reason="break"))
            else:
                forced = match["language"] == "en"
        base += len(span.text)
    atoms.extend(_scan(literal.text, free, phrases))
    return iter(sorted(atoms, key=lambda atom: atom.start))


def _scan(text: str, chunks: Sequence[_Atom], phrases: Sequence[Phrase]) -> Iterator[_Atom]:
    """The phrases, words and signs of the chunks that no embedding, mark or BREAK holds."""
    places: list[tuple[int, int, Phrase]] = []
    if phrases:
        folded, shown, end = fold(text), "", 0
        for chunk in chunks:
            shown += CLOSED * (chunk.start - end) + folded[chunk.start : chunk.end]
            end = chunk.end
        places = find(shown, phrases)
    for chunk in chunks:
        start = chunk.start
        for first, last, phrase in [*places, (chunk.end, chunk.end, None)]:
            first, last = max(first, start), min(last, chunk.end)
            if phrase is not None and first >= last:
                continue  # another chunk's
            yield from _words(text, replace(chunk, start=start, end=first))
            if phrase is not None:
                yield _Atom(first, last, chunk.span, "english", phrase.reason, apart=True)
            start = last


def _words(text: str, chunk: _Atom) -> Iterator[_Atom]:
    for match in _ATOM.finditer(text, chunk.start, chunk.end):
        stream: Stream | None = None
        reason: Reason = "with its neighbour"
        if match["word"]:
            if _LETTER.search(match[0]):
                stream, reason = "english", "latin words"
        elif is_native(match[0]):
            stream, reason = "native", "native letters"
        yield _Atom(*match.span(), chunk.span, stream, reason, match[0])


def _settle(atoms: Sequence[_Atom]) -> Iterator[_Atom]:
    """Give every undecided atom a stream, part by part."""
    left: Stream = "english"
    bounds = [-1, *(place for place, atom in enumerate(atoms) if atom.stream == "break"), len(atoms)]
    for before, behind in pairwise(bounds):
        if before >= 0:
            yield atoms[before]
        for atom in _settle_part(atoms[before + 1 : behind], left):
            if not atom.alone and atom.stream:
                left = atom.stream
            yield atom


def _settle_part(atoms: Sequence[_Atom], left: Stream) -> Iterator[_Atom]:
    """The same for one part; `left` is what stood before it, for a part without letters."""
    streams: list[Stream | None] = [atom.stream for atom in atoms]
    touching: list[int] | None = None  # signs between here and native text on the right; None = out of touch
    for place in range(len(atoms) - 1, -1, -1):
        atom = atoms[place]
        if atom.stream == "native":
            touching = []
        elif atom.stream is not None or _STOP.fullmatch(atom.sign):
            touching = None
        elif touching is not None:
            touching.append(place)
            if any(character.isdigit() for character in atom.sign):
                for settled in touching:
                    streams[settled] = "native"
                touching = []
    lettered = False
    for stream, atom in zip(reversed(streams), reversed(atoms), strict=True):
        if stream and not atom.alone:
            left, lettered = stream, True  # what stands first also takes the signs before it
    for stream, atom in zip(streams, atoms, strict=True):
        if not atom.alone:
            left = stream or left
        reason: Reason = atom.reason if lettered or atom.stream else "no letters"
        yield replace(atom, stream=stream or left, reason=reason)


def _join(atoms: Iterable[_Atom]) -> Iterator[_Atom]:
    """Put neighbours of one span and one stream together; what has letters gives the reason."""
    last: _Atom | None = None
    for atom in atoms:
        if last and _one(last, atom):
            reason = atom.reason if last.reason == "with its neighbour" else last.reason
            last = replace(last, end=atom.end, reason=reason)
            continue
        if last:
            yield last
        last = atom
    if last:
        yield last


def _one(left: _Atom, right: _Atom) -> bool:
    separate = left.alone or right.alone or left.apart or right.apart
    return not separate and (left.end, left.span, left.stream) == (right.start, right.span, right.stream)
