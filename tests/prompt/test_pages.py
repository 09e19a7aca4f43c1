"""The examples of docs/prompts.md and docs/prompts.zh-CN.md, run as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from language_bridge.prompt import NATIVE_ONLY, TWO_STREAMS, Phrase, english_prompt, parts, route

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("prompts.md", "prompts.zh-CN.md")
FIRST = ("You type", "\u4f60\u8f93\u5165")
CODE = re.compile(r"`([^`]+)`(?:\u00d7([0-9.]+))?")
SAID = re.compile(rf"{CODE.pattern}|(/)")


def examples(page: str) -> Iterator[tuple[str, str, str, str]]:
    """Head, prompt, native and english cell of every example."""
    head = ""
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = ""
        elif cells[0].startswith(FIRST):
            head = cells[0]
        elif head and not cells[0].startswith("---"):
            yield head, cells[0], cells[1], cells[2]


def read(cell: str) -> list[list[tuple[str, str]]]:
    """Texts and weights of each part; parts stand between slashes."""
    said: list[list[tuple[str, str]]] = [[]]
    for text, weight, slash in SAID.findall(cell):
        if slash:
            said.append([])
        else:
            said[-1].append((text, weight))
    return said


def shown(head: str, text: str) -> list[list[list[tuple[str, str]]]]:
    """What a row ought to say: for either stream, for each part, its texts and weights."""
    mode = NATIVE_ONLY if NATIVE_ONLY in head else TWO_STREAMS
    phrases = [Phrase(phrase, "kept") for phrase, _ in CODE.findall(head)]
    native: list[list[tuple[str, str]]] = []
    english: list[list[tuple[str, str]]] = []
    for part in parts(route(text, mode, phrases)):
        said = [
            (s.text.strip(), "" if s.weight == 1 else repr(s.weight)) for s in part if s.stream == "native"
        ]
        native.append([each for each in said if each[0]])
        prompt = english_prompt(part).strip()
        english.append([(prompt, "")] if prompt else [])
    return [native, english]


@pytest.mark.parametrize("page", PAGES)
def test_every_example_is_true(page: str) -> None:
    count = 0
    for head, typed, native, english in examples(page):
        ((text, _),) = CODE.findall(typed)
        assert [read(native), read(english)] == shown(head, text), typed
        count += 1
    assert count >= 20


def test_both_pages_have_the_same_examples() -> None:
    kept = [[(CODE.findall(head), *cells) for head, *cells in examples(page)] for page in PAGES]
    assert kept[0] == kept[1]
