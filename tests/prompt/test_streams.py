"""Who hears what: the laws of design.md section 4, and the rules of the routing table."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from language_bridge.prompt import (
    MODES,
    NATIVE_ONLY,
    TWO_STREAMS,
    Phrase,
    Segment,
    changes,
    english_prompt,
    escape,
    normalise,
    parts,
    route,
)
from language_bridge.tests.prompt.prompts import (
    BREAKS,
    CAT,
    DOG,
    ENGLISH,
    LATIN,
    NAMES,
    NATIVE,
    PROMPTS,
    RED,
    SEEDS,
    SIGNS,
    TRIGGERS,
    UNMARKED,
    has_native,
    joined,
    law,
    literal,
    typed,
)

MODE = st.sampled_from(MODES)
PHRASES = st.lists(
    st.builds(
        Phrase, st.sampled_from([*TRIGGERS, CAT, "cat", "3", "red"]), st.sampled_from(["trigger", "kept"])
    ),
    max_size=4,
)
REASONS: dict[str, set[str]] = {
    "native": {"native letters", "with its neighbour", "no letters", "native only", "empty"},
    "english": {
        *("latin words", "with its neighbour", "no letters", "embedding", "marked", "trigger", "kept"),
        "plain english",
    },
    "break": {"break"},
}
HILL = "\u5c71"
FORCED = {"embedding", "marked", "trigger", "kept"}


def shown(text: str, mode: str = TWO_STREAMS) -> list[tuple[str, str]]:
    return [(segment.stream[0], segment.text) for segment in route(text, mode)]


def said(segments: list[Segment]) -> list[tuple[str, float, str]]:
    """What is left when the places are taken away."""
    return [(segment.text, segment.weight, segment.stream) for segment in segments]


def hearing(segments: list[Segment], length: int) -> list[str]:
    """The stream of every character of the prompt, "" for the grammar between the segments."""
    streams = [""] * length
    for segment in segments:
        streams[segment.start : segment.end] = [segment.stream] * (segment.end - segment.start)
    return streams


# -- nothing is lost, nothing is invented --------------------------------------------------------------------
@law
@given(PROMPTS, MODE, PHRASES, SEEDS)
def test_segments_and_unheard_grammar_are_the_prompt(
    text: str, mode: str, phrases: list[Phrase], seed: int
) -> None:
    text = typed(text, seed, quotes=True)
    segments = route(text, mode, phrases)
    unheard = [change for change in changes(text, segments) if not change.read]
    escapes = [change for change in unheard if change.reason == "escape"]
    pieces = [(change.start, change.end) for change in unheard if change.reason != "escape"]
    pieces += [(segment.start, segment.end) for segment in segments]
    assert "".join(text[start:end] for start, end in sorted(pieces)) == text
    for change in unheard:
        narrow = normalise(change.typed).text
        expected = {
            "escape": r"\\",
            "weight": r"(?:[()]|:[^()]*\))*",
            "mark": r"lang:[a-z]{2,3}(?:-[A-Z]+)*\s*",
        }
        assert re.fullmatch(expected[change.reason], narrow), change
    for change in escapes:
        assert any(segment.start <= change.start < segment.end for segment in segments)


@law
@given(PROMPTS, MODE, PHRASES, SEEDS)
def test_a_segment_says_what_stood_in_its_place(
    text: str, mode: str, phrases: list[Phrase], seed: int
) -> None:
    text = typed(text, seed, quotes=True)
    narrow = normalise(text).text
    for segment in route(text, mode, phrases):
        stood = narrow[segment.start : segment.end]
        if segment.reason == "plain english":
            assert segment.text == stood == narrow
        else:
            assert literal(segment) == stood.replace("\\(", "(").replace("\\)", ")")


@law
@given(PROMPTS, MODE, PHRASES)
def test_every_segment_has_a_true_reason(text: str, mode: str, phrases: list[Phrase]) -> None:
    segments = route(text, mode, phrases)
    assert segments
    assert [(s.start, s.end) for s in segments] == sorted((s.start, s.end) for s in segments)
    for segment in segments:
        assert segment.reason in REASONS[segment.stream]
        assert segment.text or segment.reason == "empty"
        if segment.reason == "native letters":
            assert has_native(segment.text)
        elif segment.reason == "latin words":
            assert re.search("[A-Za-z]", segment.text) and not has_native(segment.text)
        elif segment.reason in ("with its neighbour", "no letters"):
            assert not re.search("[A-Za-z]", segment.text) and not has_native(segment.text)
        elif segment.reason == "native only":
            assert mode == NATIVE_ONLY


@law
@given(PROMPTS, MODE, PHRASES, SEEDS)
def test_width_does_not_matter(text: str, mode: str, phrases: list[Phrase], seed: int) -> None:
    wide = typed(text, seed, quotes=has_native(text))
    assert route(wide, mode, phrases) == route(text, mode, phrases)


@law
@given(UNMARKED, MODE, PHRASES)
def test_weights_are_the_hosts_character_by_character(
    grammar_of_the_host: Any, text: str, mode: str, phrases: list[Phrase]
) -> None:
    segments = route(text, mode, phrases)
    if segments[0].reason in ("plain english", "empty"):
        return
    host = grammar_of_the_host
    theirs = host.token_weights(host.escape_important(text), 1.0)
    expected = [(letter, weight) for part, weight in theirs for letter in host.unescape_important(part)]
    assert [(letter, segment.weight) for segment in segments for letter in literal(segment)] == expected


# -- english -------------------------------------------------------------------------------------------------
@law
@given(ENGLISH | st.text(st.characters(max_codepoint=127)), PHRASES)
def test_english_comes_back_byte_for_byte(text: str, phrases: list[Phrase]) -> None:
    segments = route(text, TWO_STREAMS, phrases)
    if not text.strip():
        assert segments == [Segment(text, 1.0, "native", "empty", 0, len(text))]
    elif "lang:" not in text:
        assert segments == [Segment(text, 1.0, "english", "plain english", 0, len(text))]
        assert english_prompt(segments) == text
        assert parts(segments) == [segments]


@law
@given(PROMPTS, MODE, PHRASES)
def test_the_english_prompt_says_to_the_host_what_the_segments_say(
    grammar_of_the_host: Any, text: str, mode: str, phrases: list[Phrase]
) -> None:
    host = grammar_of_the_host

    def heard(prompt: str) -> list[tuple[str, float]]:
        spans = host.token_weights(host.escape_important(prompt), 1.0)
        return [
            (letter, weight)
            for part, weight in spans
            for letter in host.unescape_important(part)
            if not letter.isspace()
        ]

    for part in parts(route(text, mode, phrases)):
        if part[0].reason == "plain english":
            continue
        expected = [
            (letter, segment.weight)
            for segment in part
            if segment.stream == "english"
            for letter in literal(segment)
            if not letter.isspace()
        ]
        assert heard(english_prompt(part)) == expected


@law
@given(PROMPTS, MODE, PHRASES)
def test_the_host_finds_our_embeddings_and_no_others(
    grammar_of_the_host: Any, stock_tokenizer: Any, text: str, mode: str, phrases: list[Phrase]
) -> None:
    """The stock tokenizer looks up just the names that have a segment, in their order."""
    looked_up: list[str] = []

    class Watched(grammar_of_the_host.SDTokenizer):
        def _try_get_embedding(self, embedding_name: str) -> tuple[Any, str, str]:
            found = super()._try_get_embedding(embedding_name)
            looked_up.append(found[1])
            return torch.zeros(768), found[1], found[2]

    watched = Watched.__new__(Watched)
    watched.__dict__ = stock_tokenizer.__dict__  # made once: it reads a vocabulary
    for part in parts(route(text, mode, phrases)):
        if part[0].reason == "plain english":
            continue
        looked_up.clear()
        watched.tokenize_with_weights(english_prompt(part))
        names = [
            literal(segment).split(":", 1)[1].strip() for segment in part if segment.reason == "embedding"
        ]
        assert looked_up == names


# -- embeddings ----------------------------------------------------------------------------------------------
BESIDE = st.sampled_from(["", " ", ",", ".", "(", CAT, f"{RED},", " cat ", "\\(", "\u300c"])


@law
@given(BESIDE, st.sampled_from(NAMES), st.sampled_from(["", " "]), BESIDE, SEEDS, MODE, PHRASES)
def test_an_embedding_is_found_wherever_it_stands(
    before: str, name: str, blank: str, after: str, seed: int, mode: str, phrases: list[Phrase]
) -> None:
    """With and without a blank, behind Chinese text, before a comma of any width, in weights, typed wide."""
    if not name.isascii():
        after = f",{after}"  # a Chinese name goes on until a sign
    written = f"embedding:{blank}{name}"
    text = typed(f"{CAT},{before}{written}{after}{DOG}", seed)
    found = [segment for segment in route(text, mode, phrases) if segment.reason == "embedding"]
    start = len(CAT) + 1 + len(before)
    weight = 1.0
    expected = normalise(written.replace("\\(", "(").replace("\\)", ")")).text
    assert [(s.text, s.weight, s.stream) for s in found] == [(escape(expected), weight, "english")]
    assert (found[0].start, found[0].end) == (start, start + len(written))


@law
@given(
    joined(NATIVE, SIGNS, size=3), st.sampled_from(NAMES), st.sampled_from(["1.3", "0.5", "-1"]), SEEDS, MODE
)
def test_an_embedding_has_the_weight_that_it_is_given(
    before: str, name: str, weight: str, seed: int, mode: str
) -> None:
    text = typed(f"{CAT},(embedding:{name}:{weight}),{before}", seed)
    found = [segment for segment in route(text, mode) if segment.reason == "embedding"]
    assert [(segment.text, segment.weight) for segment in found] == [(f"embedding:{name}", float(weight))]


def test_a_word_before_embedding_is_no_embedding() -> None:
    assert ("e", "myembedding:x") in shown(f"{CAT} myembedding:x")


@pytest.mark.parametrize(
    "text", [f"{CAT} embedding:", f"{CAT} embedding: , {DOG}", f"{CAT}\uff0cembedding\uff1a\uff0c"]
)
def test_an_embedding_without_a_name_is_text_that_the_host_can_read(text: str) -> None:
    prompt = english_prompt(route(text))
    assert "embedding :" in prompt and "embedding:" not in prompt


def test_an_embedding_keeps_blanks_around_it_in_the_english_prompt() -> None:
    prompt = english_prompt(route(f"{CAT}a cat,embedding:x,dog(embedding:y:1.2){DOG}"))
    assert prompt == "a cat, embedding:x ,dog (embedding:y:1.2)"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"{CAT}embedding:a.b{DOG}", "embedding:a.b"),
        (f"{CAT} embedding:sub/hands.pt\u3002", "embedding:sub/hands.pt"),
        (f"{CAT} embedding:sub\\hands\\({CAT}", "embedding:sub\\hands"),
        (f"{CAT}\uff08embedding\uff1ahands\uff1a1.2\uff09", "embedding:hands"),
        (f"{CAT} embedding:{RED} {DOG}", f"embedding:{RED}"),
        (f"{CAT} embedding:{RED}\uff0c{DOG}", f"embedding:{RED}"),
        (f"{CAT} embedding:{RED}\u3001{DOG}", f"embedding:{RED}"),
        (f"{CAT} embedding:{RED}\u3002{DOG}", f"embedding:{RED}"),
        (f"{CAT} embedding:{RED}.safetensors\u3002", f"embedding:{RED}.safetensors"),
        (f"{CAT} embedding:{RED}-v1.5 {DOG}", f"embedding:{RED}-v1.5"),
        (f"{CAT} embedding:{RED}\u201d", f"embedding:{RED}"),
        (f"{CAT} embedding:caf\u00e9{DOG}", "embedding:caf\u00e9"),
        (f"{CAT} embedding:  hands, {DOG}", "embedding:  hands"),
        (f"{CAT} embedding: embedding:hands", "embedding:hands"),
        (f"{CAT} embedding: lang:en embedding:hands", "embedding:hands"),
        (f"{CAT} embedding: BREAK embedding:hands", "embedding:hands"),
    ],
)
def test_names_of_embeddings(text: str, name: str) -> None:
    assert [s.text for s in route(text) if s.reason == "embedding"] == [name]


# -- marks ---------------------------------------------------------------------------------------------------
@law
@given(PROMPTS, joined(NATIVE, LATIN, SIGNS, TRIGGERS, BREAKS), SEEDS, MODE, PHRASES)
def test_a_marked_span_is_english_whatever_it_holds(
    before: str, inside: str, seed: int, mode: str, phrases: list[Phrase]
) -> None:
    head, tail = f"{before.replace('(', '')} lang:en ", f" lang:zh {HILL}"
    text = typed(head + inside + tail, seed)
    segments = route(text, mode, phrases)
    start, end = len(head), len(head + inside)
    for segment in segments:
        if segment.start < end and start < segment.end:
            assert segment.stream in ("english", "break")
            assert segment.reason in ("marked", "embedding", "break")
    assert segments[-1].stream == "native" and segments[-1].text == HILL
    assert not any(
        re.search(r"(?<![A-Za-z0-9_])lang:(?:en|zh)(?![a-z])", segment.text) for segment in segments
    )


def test_a_mark_reaches_over_weights() -> None:
    text = f"{RED} lang:en a {CAT} (on:1.2) 3 \\(mats\\) lang:zh {DOG}"
    for mode in MODES:
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
    assert shown(f"lang:en {CAT} lang:zh-CN {CAT}") == [("e", f"{CAT} "), ("n", CAT)]
    assert shown(f"{CAT}lang:en{DOG}lang:zh{CAT}") == [("n", CAT), ("e", DOG), ("n", CAT)]


# -- BREAK ---------------------------------------------------------------------------------------------------
WHOLE = joined(NATIVE, LATIN, SIGNS, ["embedding:a.b "], size=5).filter(has_native)


@law
@given(
    st.lists(WHOLE, min_size=1, max_size=4),
    st.sampled_from([" BREAK ", "BREAK", "\uff22\uff32\uff25\uff21\uff2b"]),
    MODE,
)
def test_each_part_is_heard_as_if_it_stood_alone(prompts: list[str], separator: str, mode: str) -> None:
    """Also directly between Chinese characters; blanks around BREAK belong to it."""
    prompts = [f"{CAT}{prompt.strip()}{DOG}" for prompt in prompts]
    text = separator.join(prompts)
    cut = parts(route(text, mode))
    assert [said(part) for part in cut] == [said(route(prompt, mode)) for prompt in prompts]


@law
@given(PROMPTS, MODE, PHRASES)
def test_parts_hold_all_that_is_said(text: str, mode: str, phrases: list[Phrase]) -> None:
    segments = route(text, mode, phrases)
    cut = parts(segments)
    kept = [segment for part in cut for segment in part]
    assert kept and all(cut)
    assert kept == [s for s in segments if s in kept]
    assert all(s.stream == "break" or not s.text.strip() for s in segments if s not in kept)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (f"{CAT} BREAK {DOG}", 2),
        (f"{CAT}\uff0cBREAK\uff0c{DOG}", 2),
        (f"({CAT} BREAK {DOG}:1.2)", 2),
        (f"lang:en a cat BREAK {CAT} lang:zh BREAK dog", 3),
        (f"BREAK {CAT} BREAK BREAK {DOG} BREAK", 2),
        (f"{CAT} BREAKFAST {DOG}", 1),
        (f"{CAT} BREAK_ {DOG} 2BREAK break Break", 1),
        (f"{CAT} embedding:BREAK {DOG}", 1),
    ],
)
def test_break_is_a_word_of_its_own(text: str, count: int) -> None:
    assert len(parts(route(text))) == count


def test_weights_go_on_behind_a_break() -> None:
    segments = route(f"({CAT} BREAK {DOG}:1.2)")
    assert [(s.text, s.weight) for s in segments if s.stream == "native"] == [(CAT, 1.2), (DOG, 1.2)]


def test_signs_behind_a_break_do_not_look_across_it() -> None:
    segments = parts(route(f"{CAT} BREAK, cat BREAK, {CAT} BREAK, BREAK cat"))
    assert [(s.stream[0], s.text) for part in segments for s in part] == [
        ("n", CAT),
        ("e", ", cat"),
        ("n", f", {CAT}"),
        ("n", ","),
        ("e", "cat"),
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u3000"])
def test_the_empty_prompt_is_native(text: str, mode: str) -> None:
    assert route(text, mode) == [Segment(normalise(text).text, 1.0, "native", "empty", 0, len(text))]


@pytest.mark.parametrize("text", ["BREAK", " BREAK BREAK "])
def test_breaks_alone_say_nothing(text: str) -> None:
    assert [[(s.stream, s.reason) for s in part] for part in parts(route(text, NATIVE_ONLY))] == [
        [("native", "empty")]
    ]


# -- the table -----------------------------------------------------------------------------------------------
@law
@given(PROMPTS, PHRASES)
def test_native_only_sends_all_else_through_the_bridge(text: str, phrases: list[Phrase]) -> None:
    for segment in route(text, NATIVE_ONLY, phrases):
        assert (segment.stream == "english") == (segment.reason in FORCED)


@law
@given(PROMPTS)
def test_the_mode_moves_nothing_but_latin_words_and_what_goes_with_them(text: str) -> None:
    two, only = (hearing(route(text, mode), len(text)) for mode in (TWO_STREAMS, NATIVE_ONLY))
    for letter, here, there in zip(text, two, only, strict=True):
        if there == "english":
            assert here == "english"
        if has_native(letter) and here == "native":
            assert there == "native"


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
        (f"{CAT}\u3001{DOG}\u3002", [("n", f"{CAT},{DOG}.")]),
        (f"{CAT}\u201c{DOG}\u201d\u300c{RED}\u300d", [("n", f'{CAT}"{DOG}"\u300c{RED}\u300d')]),
        (f"{CAT}, it\u2019s", [("n", f"{CAT}, "), ("e", "it's")]),
        ("\u043a\u043e\u0442 cat", [("n", "\u043a\u043e\u0442 "), ("e", "cat")]),
        ("\u3042\u30fc cat", [("n", "\u3042\u30fc "), ("e", "cat")]),
        ("\uace0\uc591\uc774", [("n", "\uace0\uc591\uc774")]),
        ("\u0e41\u0e21\u0e27 \u0915\u093f", [("n", "\u0e41\u0e21\u0e27 \u0915\u093f")]),
        (f"cafe\u0301 {CAT}", [("e", "cafe\u0301 "), ("n", CAT)]),
        (f"{CAT}\\(1\\) cat \\(2\\)", [("n", f"{CAT}(1) "), ("e", "cat \\(2\\)")]),
        (f"{CAT}\uff3c\uff081\uff3c\uff09", [("n", f"{CAT}(1)")]),
    ],
)
def test_the_table(text: str, segments: list[tuple[str, str]]) -> None:
    assert shown(text) == segments


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


def test_weights_that_are_no_numbers_go_on() -> None:
    (segment,) = route(f"({CAT}:nan)")
    assert segment.text == CAT and math.isnan(segment.weight)


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="two streams, native only"):
        route(CAT, "three streams")
