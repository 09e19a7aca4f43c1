"""The sentences of the reports: the same in both languages, and chosen as the user asked."""

from __future__ import annotations

import json
import locale
import re
import string
from pathlib import Path
from typing import Any

import folder_paths
import pytest

from language_bridge.host import language

TEXTS = Path(language.__file__).parents[1] / "locales"


def texts(code: str) -> dict[str, str]:
    loaded: dict[str, str] = json.loads((TEXTS / code / "reports.json").read_text(encoding="utf-8"))
    return loaded


def fields(text: str) -> set[str | None]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_both_languages_have_the_same_sentences_with_the_same_values() -> None:
    english, chinese = texts("en"), texts("zh")
    assert set(english) == set(chinese)
    assert {name: fields(text) for name, text in english.items()} == {
        name: fields(text) for name, text in chinese.items()
    }


def test_chinese_is_chinese_and_english_is_not() -> None:
    def letters(text: str) -> str:
        return re.sub(r"\{\w+\}", "", text)

    han = re.compile("[\u4e00-\u9fff]")
    assert not [name for name, text in texts("en").items() if han.search(text)]
    # What has no letters but values and signs needs no translation.
    spoken = {name: letters(text) for name, text in texts("zh").items()}
    assert not [name for name, text in spoken.items() if re.search("[a-z]{3}", text) and not han.search(text)]


def test_a_language_can_be_asked_for() -> None:
    assert language.words("English")("inspector_english_silent") == texts("en")["inspector_english_silent"]
    assert language.words("Chinese")("inspector_english_silent") == texts("zh")["inspector_english_silent"]


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "get_public_user_directory", lambda user: str(tmp_path / user))
    (tmp_path / "default").mkdir()
    return tmp_path / "default" / "comfy.settings.json"


def chosen() -> str:
    said = language.words("auto")("inspector_english_silent")
    return next(code for code in ("en", "zh") if texts(code)["inspector_english_silent"] == said)


@pytest.mark.parametrize(
    ("page", "expected"), [("zh", "zh"), ("zh-TW", "zh"), ("en", "en"), ("fr", "en"), ("ja", "en")]
)
def test_auto_is_the_language_of_the_page(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch, page: str, expected: str
) -> None:
    monkeypatch.setattr(locale, "getlocale", lambda: ("zh_CN" if expected == "en" else "en_US", "UTF-8"))
    user_folder.write_text(json.dumps({"Comfy.Locale": page}), encoding="utf-8")
    assert chosen() == expected


@pytest.mark.parametrize("written", [None, "", "{", "[]", '{"Comfy.Locale": 7}', "{}"])
@pytest.mark.parametrize(
    ("system", "expected"),
    [("zh_CN", "zh"), ("Chinese (Simplified)_China", "zh"), ("en_US", "en"), (None, "en")],
)
def test_auto_is_the_language_of_the_system_where_the_page_says_nothing(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch, written: str | None, system: Any, expected: str
) -> None:
    monkeypatch.setattr(locale, "getlocale", lambda: (system, "UTF-8"))
    if written is not None:
        user_folder.write_text(written, encoding="utf-8")
    assert chosen() == expected
