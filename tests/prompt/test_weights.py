"""The weights of a prompt are ComfyUI's, odd corners included."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from language_bridge.prompt import Span, escape, split

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


def host(text: str) -> list[tuple[str, float]]:
    """What ComfyUI itself makes of a prompt."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    return [(unescape_important(part), weight) for part, weight in token_weights(escape_important(text), 1.0)]


def same(ours: list[Span], theirs: list[tuple[str, float]]) -> bool:
    return [span.text for span in ours] == [text for text, _ in theirs] and all(
        span.weight == weight or (math.isnan(span.weight) and math.isnan(weight))
        for span, (_, weight) in zip(ours, theirs, strict=True)
    )


@settings(max_examples=600, deadline=None)
@given(GRAMMAR | st.text(st.characters(max_codepoint=127)))
@example("a (b) ((c)) (d:1.3) ((e:1.2) f:0.5)")
@example("\\(a\\) (b \\(c\\):1.1)")
@example("(a:1.1:1.2)")
@example(")(")
@example("((a)")
@example("(a))")
@example("(:1.2)")
@example("a\\\\(b)")
def test_equal_to_the_host(text: str) -> None:
    assert same(split(text), host(text))


@given(st.text())
def test_escaped_text_is_one_span_of_its_own(text: str) -> None:
    if "\0" in text:
        return  # the host's own placeholder for an escaped bracket
    assert split(escape(text)) == ([Span(text, 1.0)] if text else [])


def test_the_shown_rules() -> None:
    spans = split("a (b) ((c:1.3) d:0.5)")
    assert [span.text for span in spans] == ["a ", "b", " ", "c", " d"]
    assert [span.weight for span in spans] == pytest.approx([1, 1.1, 1, 1.3, 0.5])


def test_depth_is_no_danger() -> None:
    assert split("(" * 3000 + "x")[0].text == "(" * 3000 + "x"
    assert split("(" * 1500 + "x" + ")" * 1500)[0].text == "x"
