r"""Reads the weights of a prompt in the grammar of AUTOMATIC1111's web UI, as BDM's released script does.

    (x)      weight times 1.1                  [x]       weight divided by 1.1
    (x:1.3)  weight times 1.3                  \( \) \[ \] \\    the sign itself

A bracket that is never closed still weighs all that follows it; a closing one without an opening one, and any
full-width bracket, are text, and so is a number that is none, as in (x:1.2.3). It differs from ComfyUI's own
grammar (`weights.py`): square brackets count, and (x:1.3) multiplies what stands around it instead of taking
its place.
"""

from __future__ import annotations

import re

from .weights import EMPHASIS

_PIECE = re.compile(r"\\[()\[\]\\]|\\|[(\[\])]|:(?P<number>[+-]?[.\d]+)\)|[^\\()\[\]:]+|:")


def emphasised(text: str) -> list[tuple[str, float]]:
    """Cut a prompt into texts with their weights, neighbours of equal weight joined; never an empty list."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for match in _PIECE.finditer(text):
        piece, number = match[0], match["number"]
        if piece.startswith("\\"):
            pieces.append((piece[1:], 1.0))
        elif piece in opened:
            opened[piece].append(len(pieces))
        elif (factor := _number(number)) is not None and opened["("]:
            weigh(opened["("].pop(), factor)
        elif piece == ")" and opened["("]:
            weigh(opened["("].pop(), EMPHASIS)
        elif piece == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / EMPHASIS)
        else:
            pieces.append((piece, 1.0))
    for bracket, factor in (("(", EMPHASIS), ("[", 1 / EMPHASIS)):
        for start in opened[bracket]:
            weigh(start, factor)
    spans: list[tuple[str, float]] = []
    for piece, weight in pieces:
        if spans and spans[-1][1] == weight:
            spans[-1] = (spans[-1][0] + piece, weight)
        else:
            spans.append((piece, weight))
    return spans or [("", 1.0)]


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
