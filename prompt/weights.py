"""Reads the weights of a prompt, (x), (x:1.3), nested and escaped, exactly as ComfyUI does.

The law is the host's behaviour (comfy.sd1_clip, 0.30.0), odd corners included: a group that is never closed
is plain text, a lone ")" shifts the counting, (:1.3) is text, and float() decides what a number is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

EMPHASIS = 1.1  # what one pair of brackets without a number multiplies by

# The host hides escaped brackets behind these pairs; so must we, because a prompt may contain them.
_HIDDEN = (("\\)", "\0\1", ")"), ("\\(", "\0\2", "("))


@dataclass(frozen=True)
class Span:
    """Literal text (escapes resolved) and the weight that it carries."""

    text: str
    weight: float


def split(text: str) -> list[Span]:
    """Cut a prompt into spans of one weight each; an empty prompt gives an empty list."""
    for written, hidden, _ in _HIDDEN:
        text = text.replace(written, hidden)
    spans: list[Span] = []
    waiting = [(text, 1.0, False)]  # a stack instead of recursion: a thousand brackets must not overflow
    while waiting:
        part, weight, plain = waiting.pop()
        if plain:
            spans.append(Span(_reveal(part), weight))
            continue
        waiting.extend(reversed([_open(group, weight) for group in _groups(part)]))
    return spans


def _open(group: str, weight: float) -> tuple[str, float, bool]:
    """Take the brackets and the number off one group: inner text, its weight, whether it is plain text."""
    if len(group) < 2 or group[0] != "(" or group[-1] != ")":
        return group, weight, True
    inner = group[1:-1]
    colon = inner.rfind(":")
    if colon > 0:
        try:
            return inner[:colon], float(inner[colon + 1 :]), False
        except ValueError:
            pass  # "(a: b)" is text with a colon in it
    return inner, weight * EMPHASIS, False


def _groups(text: str) -> Iterator[str]:
    """Cut at the outermost brackets: plain runs and bracketed groups in turn."""
    start = depth = 0
    for place, character in enumerate(text):
        if character == "(":
            if depth == 0 and start < place:
                yield text[start:place]
                start = place
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]
                start = place + 1
    if start < len(text):
        yield text[start:]


def _reveal(text: str) -> str:
    for _, hidden, literal in _HIDDEN:
        text = text.replace(hidden, literal)
    return text
