"""Finds the words of a text in any script, by rule and without a dictionary.

The rule follows the default word boundaries of Unicode Standard Annex 29 (UAX #29), which break around every
character of the scripts that are written without spaces, and departs from it where a prompt wants it
otherwise. A word is one of these:

Han              one character, with the iteration mark behind it
hiragana         one character, with small kana, iteration mark or long vowel mark behind it (a mora)
katakana         a run, because it writes loan words (WB13)
Thai, Lao        a consonant with the vowels that are written before and behind it
Burmese, Khmer and the other scripts of South East Asia that are written without spaces
                 a consonant with what is stacked under it
other letters    a run of letters, digits and "_" (WB5, WB9, WB10, WB13a), with an apostrophe, middle dot or
                 gershayim inside (WB6, WB7), and, unlike UAX #29, with a hyphen inside and without a full
                 stop, because a Chinese full stop is read as one. It ends where Latin letters meet others,
                 because there the streams part
digits           a run, alone or in such a word, with full stop or comma inside (WB8, WB11, WB12)
everything else  one sign (WB999), but the same sign again and again is one word; so is an emoji sequence
                 (WB3c, WB15)

Combining marks, variation selectors, joiners and format characters go with what stands before them (WB4).
Blanks, the zero-width space among them, are in no word; every other character is in exactly one.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from .letters import is_latin, is_native

_LATIN, _OTHER, _DIGIT, _LOW_LINE = "L", "N", "d", "u"
_HAN, _AGAIN, _HIRAGANA, _SMALL, _KATAKANA, _LONG = "H", "I", "h", "s", "k", "p"
_BEFORE, _THAI, _BEHIND, _STACK = "v", "t", "f", "a"
_MARK, _STACKER, _JOINER = "x", "o", "j"
_APOSTROPHE, _HYPHEN, _DECIMAL, _FLAG, _SIGN, _BLANK = "q", "m", "c", "R", "z", " "

_SINGLE = {
    **dict.fromkeys("\u3005\u303b", _AGAIN),
    "\u3007": _HAN,
    **dict.fromkeys("\u3041\u3043\u3045\u3047\u3049\u3063\u3083\u3085\u3087\u308e\u3095\u3096", _SMALL),
    **dict.fromkeys("\u309d\u309e", _SMALL),
    **dict.fromkeys("\u30fc\uff70", _LONG),
    **dict.fromkeys("\uff9e\uff9f", _MARK),
    **dict.fromkeys("\u0e40\u0e41\u0e42\u0e43\u0e44\u0ec0\u0ec1\u0ec2\u0ec3\u0ec4", _BEFORE),
    **dict.fromkeys("\u0e2f\u0e30\u0e32\u0e33\u0e45\u0e46\u0eaf\u0eb0\u0eb2\u0eb3\u0ec6", _BEHIND),
    **dict.fromkeys("\u1039\u17d2\u1a60\uaaf6", _STACKER),
    **dict.fromkeys("'\u2019\u00b7\u05f3\u05f4", _APOSTROPHE),
    **dict.fromkeys("-\u2010\u2011", _HYPHEN),
    **dict.fromkeys(".,\u066b\u066c", _DECIMAL),
    "\u200d": _JOINER,
    "\u200b": _BLANK,
}
_LETTERS = (  # first, last, kind of the letters in it
    (0x0E01, 0x0EDF, _THAI),
    (0x1000, 0x109F, _STACK),  # Burmese
    (0x1780, 0x17FF, _STACK),  # Khmer
    (0x1950, 0x19DF, _STACK),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF, _STACK),  # Tai Tham
    (0x2E80, 0x2FDF, _HAN),
    (0x3006, 0x3006, _HAN),
    (0x3021, 0x3029, _HAN),
    (0x3038, 0x303A, _HAN),
    (0x3041, 0x309F, _HIRAGANA),
    (0x30A0, 0x30FF, _KATAKANA),
    (0x31F0, 0x31FF, _KATAKANA),
    (0x3400, 0x9FFF, _HAN),
    (0xA9E0, 0xA9FF, _STACK),
    (0xAA60, 0xAADF, _STACK),  # Burmese, Tai Viet
    (0xF900, 0xFAFF, _HAN),
    (0xFF66, 0xFF9D, _KATAKANA),
    (0x1B000, 0x1B16F, _HIRAGANA),
    (0x20000, 0x3FFFF, _HAN),
)
_RUNNING = {_HAN, _AGAIN, _HIRAGANA, _SMALL, _KATAKANA, _LONG, _BEFORE, _THAI, _BEHIND, _STACK}
_HANGUL = ("\u1100\u11ff", "\u3130\u318f", "\ua960\ua97f", "\uac00\ud7ff", "\uffa0\uffdc")

_X = "[xoj]*"


def _run(letter: str, digits: str) -> str:
    inside = f"(?:(?:{letter}|{digits}){_X})+"
    joined = f"(?:[qm](?=[{letter}du])|(?<=d)c(?=d))"
    return f"{inside}(?:{joined}{inside})*"


_DIGITS = f"[du](?!{_X}(?:[du]{_X})*L)"  # "3d" stays whole behind letters of another script
_WORD = re.compile(
    rf"(?:[du]{_X})*(?=N){_run('N', _DIGITS)}|{_run('L', '[du]')}"
    rf"|[HI]{_X}(?:I{_X})*|[hs]{_X}(?:[sp]{_X})*|(?:[kp]{_X})+"
    rf"|v?{_X}t{_X}(?:f{_X})*|a{_X}(?:(?<=o)a{_X})*"
    rf"|RR{_X}|z{_X}(?:(?<=j)z{_X})*|[xoj]+|[^ ]{_X}"
)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each word of `text`, in order."""
    kinds = "".join(map(_kind, text))
    spans: list[tuple[int, int]] = []
    for match in _WORD.finditer(kinds):
        start, end = match.span()
        if (
            spans
            and spans[-1][1] == start
            and _same_sign(text[slice(*spans[-1])], text[start:end], kinds[start])
        ):
            spans[-1] = spans[-1][0], end
        else:
            spans.append((start, end))
    return spans


def runs_on(character: str) -> bool:
    """Whether words of this letter's script may follow one another without a blank; Hangul is one such."""
    return _kind(character) in _RUNNING or any(first <= character <= last for first, last in _HANGUL)


@lru_cache(maxsize=1 << 14)
def _kind(character: str) -> str:
    if character in _SINGLE:
        return _SINGLE[character]
    if character.isspace():
        return _BLANK
    category, code = unicodedata.category(character), ord(character)
    if category in ("Mn", "Mc", "Me", "Cf") or 0x1F3FB <= code <= 0x1F3FF:
        return _MARK
    if category == "Nd":
        return _DIGIT
    if category == "Pc":
        return _LOW_LINE
    if 0x1F1E6 <= code <= 0x1F1FF:
        return _FLAG
    if is_latin(character) or (character.isalpha() and not is_native(character)):
        return _LATIN
    if category[0] != "L" and category != "Nl":
        return _SIGN
    return next((kind for first, last, kind in _LETTERS if first <= code <= last), _OTHER)


def _same_sign(left: str, right: str, kind: str) -> bool:
    return kind in "zqmc" and left[-1] == right and set(left) == {right}
