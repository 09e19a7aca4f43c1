"""Reads the weights of a prompt, (x), (x:1.3), nested and escaped, exactly as ComfyUI does.

The law is the host's behaviour (comfy.sd1_clip, 0.30.0), odd corners included: a group that is never closed
is plain text, a lone ")" shifts the counting, (:1.3) is text, and float() decides what a number is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

EMPHASIS = 1.1  # what one pair of brackets without a number multiplies by

# The host hides escaped brackets behind these pairs, two characters for two; so must we, because a prompt may
# contain them.
_HIDDEN = (("\\)", "\0\1", ")"), ("\\(", "\0\2", "("))


@dataclass(frozen=True)
class Span:
    """Literal text (escapes resolved), its weight, and where each character stood in what was split.

    `offsets` has one entry more than `text` has characters: character i is what stood at offsets[i] up to
    offsets[i + 1], two characters where it was escaped.
    """

    text: str
    weight: float
    offsets: tuple[int, ...]

    @property
    def start(self) -> int:
        """Where the span begins in what was split."""
        return self.offsets[0]

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.offsets[-1]


def split(text: str) -> list[Span]:
    """Cut a prompt into spans of one weight each; an empty prompt gives an empty list."""
    for written, hidden, _ in _HIDDEN:
        text = text.replace(written, hidden)
    spans: list[Span] = []
    waiting = [
        (0, len(text), 1.0, False)
    ]  # a stack instead of recursion: a thousand brackets must not overflow
    while waiting:
        start, end, weight, plain = waiting.pop()
        if plain:
            spans.append(_reveal(text[start:end], weight, start))
            continue
        groups = [_open(text, *group, weight) for group in _groups(text, start, end)]
        waiting.extend(reversed(groups))
    return spans


def _open(text: str, start: int, end: int, weight: float) -> tuple[int, int, float, bool]:
    """Take brackets and number off the group [start, end): inner text, its weight, whether it is plain."""
    if end - start < 2 or text[start] != "(" or text[end - 1] != ")":
        return start, end, weight, True
    start, end = start + 1, end - 1
    colon = text.rfind(":", start, end)
    if colon > start:
        try:
            return start, colon, float(text[colon + 1 : end]), False
        except ValueError:
            pass  # "(a: b)" is text with a colon in it
    return start, end, weight * EMPHASIS, False


def _groups(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) at the outermost brackets: plain runs and bracketed groups in turn."""
    depth = 0
    for place in range(start, end):
        if text[place] == "(":
            if depth == 0 and start < place:
                yield start, place
                start = place
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                yield start, place + 1
                start = place + 1
    if start < end:
        yield start, end


def _reveal(hidden: str, weight: float, place: int) -> Span:
    text, offsets = hidden, range(place, place + len(hidden) + 1)
    if "\0" not in hidden:
        return Span(text, weight, tuple(offsets))
    for _, pair, literal in _HIDDEN:
        text = text.replace(pair, literal)
    kept = [0]
    while kept[-1] < len(hidden):
        kept.append(kept[-1] + (2 if hidden[kept[-1] : kept[-1] + 2] in ("\0\1", "\0\2") else 1))
    return Span(text, weight, tuple(offsets[i] for i in kept))
