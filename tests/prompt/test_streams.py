"""Who hears what: the laws of design.md section 4, and the rules of the routing table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from language_bridge.prompt import (
    MODES,
    NATIVE_ONLY,
    TWO_STREAMS,
    Segment,
    Span,
    english_prompt,
    normalise,
    route,
    split,
)
from language_bridge.tests.prompt.test_grammar import MIXED, widened

CAT, DOG, RED = "\u732b", "\u72d7", "\u7ea2\u8272"
WORDS = [
    CAT,
    DOG,
    RED,
    "cat",
    "red dress",
    " ",
    ",",
    "\uff0c",
    "1.3",
    "3",
    "(",
    ")",
    "\uff08",
    "embedding:hands",
]
WORDS += ["\uff1a1.2\uff09", "lang:en ", "lang:zh ", "\\(", "\\)", "\\", "\u3001", "\U0001f431", "\u3042"]
PROMPTS = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)
MODE = st.sampled_from(MODES)


def shown(text: str, mode: str = TWO_STREAMS) -> list[tuple[str, str]]:
    return [(segment.stream[0], segment.text) for segment in route(text, mode)]


def literal(segments: list[Segment]) -> str:
    """The text of all segments with the english ones read by the prompt grammar."""
    parts = [
        segment.text if segment.stream == "native" else "".join(span.text for span in split(segment.text))
        for segment in segments
    ]
    return "".join(parts)


@given(st.text(st.characters(max_codepoint=127)))
def test_english_comes_back_byte_for_byte(text: str) -> None:
    if not text.strip():
        assert route(text) == [Segment(text, 1.0, "native")]
    elif "lang:" not in text:
        assert route(text) == [Segment(text, 1.0, "english")]
        assert english_prompt(route(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "a cat, (red:1.3) \\(really\\) [x]",
        "123, ...",
        "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m",
        "\u201cquoted\u201d \u2014 it\u2019s 20\u00b0 \u2122 \u00bd",
        "embedding:bad_hands, 8k",
        "((",
        "\U0001f431",
    ],
)
def test_latin_text_is_english_and_untouched(text: str) -> None:
    assert route(text) == [Segment(text, 1.0, "english")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u3000"])
def test_the_empty_prompt_is_native(text: str, mode: str) -> None:
    assert [segment.stream for segment in route(text, mode)] == ["native"]


@given(PROMPTS | MIXED, MODE)
def test_no_character_is_lost(text: str, mode: str) -> None:
    if "lang:" in text:
        return
    narrow = normalise(text).text
    whole = "".join(span.text for span in split(narrow)) if narrow.strip() else narrow
    assert literal(route(text, mode)) == whole


@given(PROMPTS, MODE)
def test_routing_is_total_and_segments_are_not_empty(text: str, mode: str) -> None:
    segments = route(text, mode)
    assert all(segment.text for segment in segments) or not normalise(text).text
    assert {segment.stream for segment in segments} <= {"native", "english"}


@given(widened(PROMPTS), MODE)
def test_width_does_not_matter(pair: tuple[str, str], mode: str) -> None:
    assert route(pair[0], mode) == route(pair[1], mode)


@given(PROMPTS)
def test_the_english_prompt_carries_words_and_weights(text: str) -> None:
    """Read by the host's grammar, english_prompt says what the english segments say, with their weights."""
    segments = route(text)
    said = [span for s in segments if s.stream == "english" for span in split(f"({s.text}:{s.weight})")]
    heard = split(english_prompt(segments))
    if len(segments) > 1:
        assert words(heard) == words(said)


def words(spans: list[Span]) -> list[tuple[str, float]]:
    return [(word, span.weight) for span in spans for word in span.text.split()]


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        (CAT, [("n", CAT)]),
        (f"{CAT},{DOG}", [("n", f"{CAT},{DOG}")]),
        (f"1.3{CAT}2", [("n", f"1.3{CAT}2")]),
        (f"{CAT}1.3{DOG}", [("n", f"{CAT}1.3{DOG}")]),
        (f"{CAT} 8k {DOG}", [("n", f"{CAT} "), ("e", "8k "), ("n", DOG)]),
        (f"a red cat {CAT}", [("e", "a red cat "), ("n", CAT)]),
        (f"{CAT}t-shirt{DOG}", [("n", CAT), ("e", "t-shirt"), ("n", DOG)]),
        (f"{CAT}v1.5{DOG}", [("n", CAT), ("e", "v1.5"), ("n", DOG)]),
        (f"my_trigger2, {CAT}", [("e", "my_trigger2, "), ("n", CAT)]),
        (f"cat, 3{CAT}", [("e", "cat, "), ("n", f"3{CAT}")]),
        (f"cat, 1.3%{CAT}", [("e", "cat, "), ("n", f"1.3%{CAT}")]),
        (f"cat 3, {CAT}", [("e", "cat 3, "), ("n", CAT)]),
        (f", {CAT}", [("n", f", {CAT}")]),
        (f"3 cats, {CAT}", [("e", "3 cats, "), ("n", CAT)]),
        (f"{CAT}, cat", [("n", f"{CAT}, "), ("e", "cat")]),
        (f"{CAT}\u3001{DOG}\u3002", [("n", f"{CAT}\u3001{DOG}.")]),
        ("\u043a\u043e\u0442 cat", [("n", "\u043a\u043e\u0442 "), ("e", "cat")]),
        ("\u3042\u30fc cat", [("n", "\u3042\u30fc "), ("e", "cat")]),
        ("\uace0\uc591\uc774", [("n", "\uace0\uc591\uc774")]),
        ("\u0e41\u0e21\u0e27 \u0915\u093f", [("n", "\u0e41\u0e21\u0e27 \u0915\u093f")]),
        (f"cafe\u0301 {CAT}", [("e", "cafe\u0301 "), ("n", CAT)]),
    ],
)
def test_the_table(text: str, segments: list[tuple[str, str]]) -> None:
    assert shown(text) == segments


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("comma", [",", "\uff0c"])
def test_an_embedding_is_found_between_chinese_text_and_a_comma(comma: str, mode: str) -> None:
    segments = shown(f"{CAT}embedding:good_hands-v2{comma}{DOG}", mode)
    assert segments == [("n", CAT), ("e", "embedding:good_hands-v2"), ("n", f",{DOG}")]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"{CAT}embedding:a.b{DOG}", "embedding:a.b"),
        (f"{CAT} embedding:sub/hands.pt\u3002", "embedding:sub/hands.pt"),
        (f"{CAT}\uff08embedding\uff1ahands\uff1a1.2\uff09", "embedding:hands"),
        (f"{CAT} embedding:{RED} {DOG}", f"embedding:{RED}"),
        (f"{CAT} embedding:{RED}\uff0c{DOG}", f"embedding:{RED}"),
    ],
)
def test_names_of_embeddings(text: str, name: str) -> None:
    assert [s.text for s in route(text) if s.stream == "english"] == [name]


def test_a_word_before_embedding_is_no_embedding() -> None:
    assert ("e", "myembedding:x") in shown(f"{CAT} myembedding:x")


def test_an_embedding_keeps_blanks_around_it_in_the_english_prompt() -> None:
    prompt = english_prompt(route(f"{CAT}a cat,embedding:x,dog(embedding:y:1.2){DOG}"))
    assert prompt == "a cat, embedding:x ,dog (embedding:y:1.2)"


def test_weights_survive_routing() -> None:
    segments = route(f"({CAT} cat:1.3) (({DOG})) (dog:0.5), \uff08{RED}\uff1a1.2\uff09")
    found = [(s.stream[0], s.text, s.weight) for s in segments if s.text.strip(" ,")]
    assert found == [
        ("n", f"{CAT} ", 1.3),
        ("e", "cat", 1.3),
        ("n", DOG, pytest.approx(1.21)),
        ("e", "dog", 0.5),
        ("n", RED, 1.2),
    ]
    assert english_prompt(segments) == "(cat:1.3) (dog:0.5) , "


@pytest.mark.parametrize("mode", MODES)
def test_a_marked_span_is_english_whatever_it_holds(mode: str) -> None:
    text = f"{RED} lang:en a {CAT} (on:1.2) 3 \\(mats\\) lang:zh {DOG}"
    assert [(s.stream[0], s.text, s.weight) for s in route(text, mode)] == [
        ("n", f"{RED} ", 1.0),
        ("e", f"a {CAT} ", 1.0),
        ("e", "on", 1.2),
        ("e", " 3 \\(mats\\) ", 1.0),
        ("n", DOG, 1.0),
    ]
    assert english_prompt(route(text, mode)) == f"a {CAT} (on:1.2)  3 \\(mats\\) "


def test_marks_work_in_full_width_and_in_english_prompts() -> None:
    assert shown(f"lang\uff1aen {CAT}") == [("e", CAT)]
    assert shown("lang:en a cat") == [("e", "a cat")]
    assert shown("slang:en a cat") == [("e", "slang:en a cat")]
    assert shown(f"lang:english {CAT}") == [("e", "lang:english "), ("n", CAT)]


def test_native_only_sends_words_through_the_bridge() -> None:
    assert shown(f"a red cat, {CAT}", NATIVE_ONLY) == [("n", f"a red cat, {CAT}")]
    assert shown("a (red:1.2) cat", NATIVE_ONLY) == [("n", "a "), ("n", "red"), ("n", " cat")]


def test_literal_brackets_are_literal_for_both() -> None:
    assert shown(f"{CAT}\\(1\\) cat \\(2\\)") == [("n", f"{CAT}(1) "), ("e", "cat \\(2\\)")]


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="two streams, native only"):
        route(CAT, "three streams")
