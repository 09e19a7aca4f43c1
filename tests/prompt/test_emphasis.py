"""The web UI's grammar of weights, which BDM's released script parses and drops."""

from __future__ import annotations

import random

import pytest

from language_bridge.prompt.emphasis import emphasised

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("", [("", 1.0)]),
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", UP), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", UP)]),
        ("[low", [("low", DOWN)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", UP)]),
        ("a)b]", [("a)b]", 1.0)]),
        ("(a:1.5)", [("a", 1.5)]),
        ("a:1.5)", [("a:1.5)", 1.0)]),
        ("((a:1.5))", [("a", 1.5 * UP)]),
        ("(x:1.2.3)", [("x:1.2.3)", UP)]),
        ("\uff08a\uff09", [("\uff08a\uff09", 1.0)]),
    ],
)
def test_spans(prompt: str, spans: list[tuple[str, float]]) -> None:
    assert emphasised(prompt) == spans


def test_nested_and_mixed_brackets() -> None:
    spans = emphasised("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).")
    texts = [text for text, _ in spans]
    assert texts == ["a ", "house", " ", "on", " a ", "hill", ", sun, ", "sky", "."]
    weights = [1.0, 1.3 * UP * UP, UP, 1.0, UP, 0.5 * UP, UP, UP**4, UP]
    assert [weight for _, weight in spans] == pytest.approx(weights)


def test_nothing_but_brackets_and_numbers_is_lost_and_neighbours_differ() -> None:
    rng = random.Random(0)
    for _ in range(500):
        prompt = "".join(rng.choice("()[]\\:1.+-ab\u732b ") for _ in range(rng.randint(0, 14)))
        spans = emphasised(prompt)
        assert all(one[1] != other[1] for one, other in zip(spans, spans[1:], strict=False))
        letters = [character for character in prompt if character in "ab\u732b "]
        assert [c for text, _ in spans for c in text if c in "ab\u732b "] == letters
