"""Which letters a language is written in, so that a caption in the wrong one is noticed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from ..bridges.errors import BridgeError
from ..prompt.letters import LATIN, has_native

ANY = "any"
"""No language in particular: every text with a letter will do."""

_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"
_HANGUL = "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb\uffa1-\uffdc"
_CYRILLIC = "\u0400-\u052f\u1c80-\u1c88\u2de0-\u2dff\ua640-\ua69f"
_ARABIC = "\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f\u08a0-\u08b4\ufb50-\ufdfb\ufe70-\ufefc"

_LETTERS: Mapping[str, str] = {
    "zh": _HAN,
    "ja": _KANA + _HAN,
    "ko": _HANGUL,
    "ru": _CYRILLIC,
    "uk": _CYRILLIC,
    "bg": _CYRILLIC,
    "ar": _ARABIC,
    "fa": _ARABIC,
    "ur": _ARABIC,
    "he": "\u05d0-\u05ea\u05ef-\u05f2",
    "el": "\u0370-\u0373\u0376-\u03ff\u1f00-\u1fff",
    "hi": "\u0904-\u0939\u0958-\u0961",
    "bn": "\u0985-\u09b9\u09dc-\u09e1",
    "ta": "\u0b85-\u0bb9",
    "th": "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46",
    "ka": "\u10a0-\u10ff",
    "hy": "\u0531-\u0587",
    "vi": LATIN,
    "fr": LATIN,
    "de": LATIN,
    "es": LATIN,
    "it": LATIN,
    "pt": LATIN,
    "nl": LATIN,
    "pl": LATIN,
    "tr": LATIN,
    "id": LATIN,
}
"""Inside of a character class of `re` by language code (ISO 639-1)."""

LANGUAGES: tuple[str, ...] = (ANY, *_LETTERS)
"""What may be asked for."""

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "chinese": "zh",
        "cn": "zh",
        "japanese": "ja",
        "jp": "ja",
        "korean": "ko",
        "russian": "ru",
        "arabic": "ar",
    }
    | {"french": "fr", "german": "de", "spanish": "es", "italian": "it", "portuguese": "pt"}
    | {"vietnamese": "vi", "hindi": "hi", "thai": "th", "hebrew": "he", "greek": "el", "turkish": "tr"}
    | {"persian": "fa", "ukrainian": "uk", "polish": "pl", "indonesian": "id"}
)
"""Other names of languages that columns of a table carry."""


@cache  # most are never asked for, and all together take as long as the rest of the module
def _letter_of(language: str) -> re.Pattern[str]:
    return re.compile(f"[{_LETTERS[language]}]")


def require_language(language: str) -> None:
    """BridgeError when a language is not one of `LANGUAGES`."""
    if language not in LANGUAGES:
        raise BridgeError(
            "The language of the captions is not known.",
            repr(language)[:40],
            f"one of {', '.join(LANGUAGES)}",
            "Choose a language from the list, or any.",
        )


def speaks(text: str, language: str) -> bool:
    """Whether a text has a letter that the language is written in; for `ANY`, any letter.

    Chinese characters alone are Japanese, too, and Latin letters fit every language that uses them: this
    finds columns that were mixed up and broken encodings, not spelling.
    """
    if language == ANY:
        return _letter_of("fr").search(text) is not None or any(map(str.isalpha, text))
    return _letter_of(language).search(text) is not None


def stands_out(text: str, language: str) -> bool:
    """Whether a text can be told from English by its letters alone."""
    return has_native(text) if language == ANY else not is_latin(language) and speaks(text, language)


def is_latin(language: str) -> bool:
    """Whether a language is written in the letters of English."""
    return _LETTERS.get(language) == LATIN


def has_latin(text: str) -> bool:
    """Whether a text has a Latin letter, as every English one does."""
    return _letter_of("fr").search(text) is not None
