"""Chooses the language of the reports, which are shown in a node and not translated by the page."""

from __future__ import annotations

import json
import locale
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths

LANGUAGES = ["auto", "English", "Chinese"]
"""What a node offers; auto is the language of the page, or of the system where the page never chose one."""

_TEXTS = Path(__file__).resolve().parent.parent / "locales"
_CODES = {"English": "en", "Chinese": "zh"}
_LARGEST_SETTINGS_BYTES = 4 << 20


class Words:
    """The report sentences of one language, from `locales/<code>/reports.json`."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def __call__(self, name: str, /, **values: object) -> str:
        """The sentence `name` with its values filled in; KeyError when there is no such sentence."""
        return self._texts[name].format(**values)


def words(language: str = LANGUAGES[0]) -> Words:
    """The sentences in a language of `LANGUAGES`; an unknown one is English."""
    code = _CODES.get(language) or (_of_page() or _of_system() if language == LANGUAGES[0] else "en")
    return _read(code)


@cache
def _read(code: str) -> Words:
    return Words(json.loads((_TEXTS / code / "reports.json").read_text(encoding="utf-8")))


def _of_page() -> str | None:
    """What the user chose in the settings of the page; None when nothing can be read."""
    try:
        path = Path(folder_paths.get_public_user_directory("default") or "") / "comfy.settings.json"
        if path.stat().st_size > _LARGEST_SETTINGS_BYTES:
            return None
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
        chosen = settings.get("Comfy.Locale")
    except (OSError, ValueError, AttributeError):
        return None
    return _code(chosen) if isinstance(chosen, str) and chosen else None


def _of_system() -> str:
    return _code(locale.getlocale()[0] or "")


def _code(name: str) -> str:
    return "zh" if name.lower().startswith(("zh", "chinese")) else "en"
