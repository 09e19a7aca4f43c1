"""Which letters belong to which way of writing: Latin, or a native script."""

from __future__ import annotations

import re

# Latin letters of every block, and the letter-like signs that English text uses.
LATIN = (
    "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02ff\u1d00-\u1dbf\u1e00-\u1eff\u2071\u207f"
    "\u2090-\u209c\u2100-\u214f\u2c60-\u2c7f\ua720-\ua7ff\uab30-\uab6f\ufb00-\ufb06\U0001d400-\U0001d7ff"
)
"""Inside of a character class of `re`."""
LATIN_WORD = rf"{LATIN}0-9_"
"""The same with what else makes up a Latin word: ASCII digits and the underscore."""

_LATIN = re.compile(f"[{LATIN}]")
_FULL_WIDTH_LATIN = re.compile("[\uff21-\uff3a\uff41-\uff5a]")


def is_latin(character: str) -> bool:
    """Whether a character is a letter of a Latin word."""
    return _LATIN.match(character) is not None


def is_native(character: str) -> bool:
    """Whether a character is a letter of a script other than Latin; full-width Latin letters are Latin."""
    return character.isalpha() and not _LATIN.match(character) and not _FULL_WIDTH_LATIN.match(character)


def has_native(text: str) -> bool:
    """Whether any letter of a text is native; the width in which the text was typed does not matter."""
    return not text.isascii() and any(map(is_native, text))
