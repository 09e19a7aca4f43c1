"""Makes a prompt the same whether it was typed with full-width or half-width punctuation.

A Chinese or Japanese keyboard gives U+FF08 where the prompt grammar knows "(" and U+3002 where it knows ".".
What is read as what, one character for one, wherever it stands (a comma that the grammar ignores is still a
token to the text tower, and a rule that looked around would make two prompts of one):

full width       every wide, small or narrow form of an ASCII character, as the Unicode Character Database
                 decomposes it: U+FF01 to U+FF5E (brackets, colon, comma, digits, Latin letters, backslash)
                 and U+FE50 to U+FE6B (left over from Big5); narrow corner quotes become the wide ones
CJK punctuation  what the same keys give without the input method: ideographic space U+3000 is a space, comma
                 U+3001 (the listing comma) is ",", full stop U+3002 is ".", lenticular brackets U+3010 and
                 U+3011 are "[" and "]"
curly quote      U+2018 and U+2019 are "'", U+201C and U+201D are '"', because the quote keys of a Chinese
                 keyboard give nothing else; but only in a prompt that has a native letter. English word
                 processors write curly quotes too, and an English prompt is left as it is, byte for byte

Text, and left alone: corner quotes U+300C to U+300F (no key gives an ASCII quote in their place, and towers
have learned what they enclose), book title marks, dashes, ellipses, the middle dot of names; wide signs that
have no ASCII twin, such as the yen sign; letters, half-width katakana too, which are the tokenizer's affair.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .letters import has_native

ChangeReason = Literal["full width", "CJK punctuation", "curly quote", "weight", "mark", "escape"]

_CJK = {0x3000: " ", 0x3001: ",", 0x3002: ".", 0x3010: "[", 0x3011: "]"}
_CURLY = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}
_CORNER = {0xFF62: "\u300c", 0xFF63: "\u300d"}


def _forms() -> Iterator[tuple[int, str]]:
    for code in (*range(0xFE50, 0xFE70), *range(0xFF01, 0xFF66)):
        kind, _, target = unicodedata.decomposition(chr(code)).partition(" ")
        if kind in ("<wide>", "<small>", "<narrow>"):
            twin = chr(int(target, 16)).translate(_CJK)
            if twin.isascii():
                yield code, twin


_WIDE: dict[int, str] = {**dict(_forms()), **_CORNER}
_ALWAYS = {**_WIDE, **_CJK}
_ALL = {**_ALWAYS, **_CURLY}


@dataclass(frozen=True)
class Normalised:
    """A prompt with half-width grammar; `offsets[i]` is where its character i stood in the original."""

    text: str
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """The characters [start, end) of a prompt were typed as `typed` and are read as `read` ("" = as nothing).

    reason: "full width", "CJK punctuation" and "curly quote" as above; "weight", "mark" and "escape" for the
    grammar that no stream hears: brackets and numbers of weights, lang: marks, the backslash of a bracket.
    """

    start: int
    end: int
    typed: str
    read: str
    reason: ChangeReason


def normalise(text: str) -> Normalised:
    """Turn what a native keyboard gives into its ASCII twins, one for one; ASCII comes back unchanged."""
    return Normalised(text.translate(_table(text)), tuple(range(len(text))))


def half_width(text: str) -> str:
    """`text` with every twin in ASCII, curly quotes too; as long as before."""
    return text.translate(_ALL)


def fold(text: str) -> str:
    """`text` as it is compared with other text: half-width and in small letters; as long as before."""
    folded = half_width(text)
    small = folded.lower()
    if len(small) == len(folded):
        return small
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in folded)


def width_changes(text: str) -> list[Change]:
    """What `normalise` changed, neighbours of one reason together, in order."""
    table = _table(text)
    changes: list[Change] = []
    for place, character in enumerate(text):
        read = table.get(ord(character))
        if read is None:
            continue
        reason = _reason(ord(character))
        last = changes[-1] if changes else None
        if last and (last.end, last.reason) == (place, reason):
            changes[-1] = Change(last.start, place + 1, last.typed + character, last.read + read, reason)
        else:
            changes.append(Change(place, place + 1, character, read, reason))
    return changes


def _table(text: str) -> dict[int, str]:
    return _ALL if has_native(text) else _ALWAYS


def _reason(code: int) -> ChangeReason:
    if code in _WIDE:
        return "full width"
    return "CJK punctuation" if code in _CJK else "curly quote"
