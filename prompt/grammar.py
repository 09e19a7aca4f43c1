"""Makes a prompt the same whether it was typed with full-width or half-width punctuation.

A Chinese or Japanese keyboard gives U+FF08 where the prompt grammar knows "(" and U+3002 where it knows ".".
Every full-width form of an ASCII character becomes that character, wherever it stands: a comma that the
grammar ignores is still a token to the text tower, and a rule that looked around would make two prompts of
one. Punctuation that has no ASCII twin (quotation brackets, the listing comma, dashes) stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

FULL_WIDTH_START, FULL_WIDTH_END, FULL_WIDTH_SHIFT = 0xFF01, 0xFF5E, 0xFEE0

_HALF_WIDTH: dict[int, str] = {
    **{code: chr(code - FULL_WIDTH_SHIFT) for code in range(FULL_WIDTH_START, FULL_WIDTH_END + 1)},
    0x3000: " ",  # ideographic space
    0x3002: ".",  # ideographic full stop
    0xFF61: ".",  # the same, narrow
}


@dataclass(frozen=True)
class Normalised:
    """A prompt with half-width grammar; `offsets[i]` is where its character i stood in the original."""

    text: str
    offsets: tuple[int, ...]


def normalise(text: str) -> Normalised:
    """Turn full-width forms into their ASCII twins, one for one; ASCII text comes back unchanged."""
    return Normalised(text.translate(_HALF_WIDTH), tuple(range(len(text))))
