"""Reads the sentences of the reports, `locales/<code>/reports.json`, in English or Chinese."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

CODES = ("en", "zh")
_TEXTS = Path(__file__).resolve().parent.parent / "locales"


class Words:
    """The report sentences of one language."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def __call__(self, name: str, /, **values: object) -> str:
        """The sentence `name` with its values filled in; KeyError when there is no such sentence."""
        return self._texts[name].format(**values)


@cache
def words_of(code: str) -> Words:
    """The sentences of a language of `CODES`."""
    return Words(json.loads((_TEXTS / code / "reports.json").read_text(encoding="utf-8")))


def code_of(locale: str) -> str:
    """The language of `CODES` for the name of a locale, English for any that is not Chinese."""
    return "zh" if locale.lower().startswith(("zh", "chinese")) else "en"
