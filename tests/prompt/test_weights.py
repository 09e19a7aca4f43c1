"""The weights of a prompt are ComfyUI's, odd corners included."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from language_bridge.prompt import Span, escape, split
from language_bridge.tests.prompt.prompts import PROMPTS, law

PIECES = ["(", ")", "((", "))", "\\(", "\\)", "\\", ":", ":1.3)", ":0)", ":-1)", ":1e3)", ": 1.2 )", "a", " "]
PIECES += [
    "cat",
    "(cat:1.2)",
    "(a",
    "b)",
    ":x)",
    ":nan)",
    ":inf)",
    ":1_0)",
    "\0\1",
    "\0\2",
    "\0",
    "\1",
    "\n",
    "()",
]
GRAMMAR = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
WEIGHTS = re.compile(r"(?:[()]|:[^()]*\))*")


def read(host: Any, text: str) -> list[tuple[str, float]]:
    """What ComfyUI itself makes of a prompt."""
    spans = host.token_weights(host.escape_important(text), 1.0)
    return [(host.unescape_important(part), weight) for part, weight in spans]


def same(ours: list[Span], theirs: list[tuple[str, float]]) -> bool:
    return [span.text for span in ours] == [text for text, _ in theirs] and all(
        span.weight == weight or (math.isnan(span.weight) and math.isnan(weight))
        for span, (_, weight) in zip(ours, theirs, strict=True)
    )


@law
@given(GRAMMAR | PROMPTS | st.text(st.characters(max_codepoint=127)))
@example("a (b) ((c)) (d:1.3) ((e:1.2) f:0.5)")
@example("\\(a\\) (b \\(c\\):1.1)")
@example("(a:1.1:1.2)")
@example(")(")
@example("((a)")
@example("(a))")
@example("(:1.2)")
@example("a\\\\(b)")
def test_equal_to_the_host(grammar_of_the_host: Any, text: str) -> None:
    assert same(split(text), read(grammar_of_the_host, text))


@law
@given(GRAMMAR | PROMPTS)
def test_every_character_knows_where_it_stood(text: str) -> None:
    """Between the spans stand brackets and numbers alone; an escaped bracket stood on two places."""
    end = 0
    for span in split(text):
        assert WEIGHTS.fullmatch(text[end : span.start])
        assert end <= span.start <= span.end and len(span.offsets) == len(span.text) + 1
        for letter, (first, last) in zip(span.text, pairwise(span.offsets), strict=True):
            stood = text[first:last]
            assert stood == letter or (letter in "()" and stood in (f"\\{letter}", "\0\1", "\0\2"))
        end = span.end
    assert WEIGHTS.fullmatch(text[end:])


@law
@given(st.text(st.characters(exclude_characters="\0")))
def test_escaped_text_is_one_span_of_its_own(text: str) -> None:
    """But for the character that the host itself hides escaped brackets with."""
    spans = [(span.text, span.weight) for span in split(escape(text))]
    assert spans == ([(text, 1.0)] if text else [])


def test_the_shown_rules() -> None:
    spans = split("a (b) ((c:1.3) d:0.5)")
    assert [span.text for span in spans] == ["a ", "b", " ", "c", " d"]
    assert [span.weight for span in spans] == pytest.approx([1, 1.1, 1, 1.3, 0.5])
    assert [(span.start, span.end) for span in spans] == [(0, 2), (3, 4), (5, 6), (8, 9), (14, 16)]


def test_depth_is_no_danger() -> None:
    assert split("(" * 3000 + "x")[0].text == "(" * 3000 + "x"
    assert split("(" * 1500 + "x" + ")" * 1500)[0].text == "x"
