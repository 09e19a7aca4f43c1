"""Chooses the language of the reports, which are shown in a node and not translated by the page."""

from __future__ import annotations

import locale

from ..reports.words import Words, code_of, words_of
from . import page

LANGUAGES = ["auto", "English", "Chinese"]
"""What a node offers; auto is the language of the page, or of the system where the page never chose one."""

_CODES = {"English": "en", "Chinese": "zh"}

__all__ = ["LANGUAGES", "Words", "words"]


def words(language: str = LANGUAGES[0]) -> Words:
    """The sentences in a language of `LANGUAGES`; an unknown one is English."""
    code = _CODES.get(language)
    if code is None and language == LANGUAGES[0]:
        code = code_of(page.chosen("Comfy.Locale") or locale.getlocale()[0] or "")
    return words_of(code or "en")
