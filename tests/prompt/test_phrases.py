"""Triggers and what the artist keeps reach the english stream, wherever and however they are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from language_bridge.prompt import (
    MODES,
    NATIVE_ONLY,
    Phrase,
    Segment,
    english_prompt,
    parts,
    phrases_in,
    route,
)
from language_bridge.tests.prompt.prompts import (
    CAT,
    DOG,
    LATIN,
    NATIVE,
    PROMPTS,
    RED,
    SEEDS,
    SIGNS,
    TRIGGERS,
    has_native,
    joined,
    law,
    literal,
    typed,
)

MODE = st.sampled_from(MODES)
LATIN_TRIGGERS = [phrase for phrase in TRIGGERS if phrase.isascii()]
BEFORE = st.sampled_from(
    ["", " ", ",", CAT, f"{RED},", "((", "\\(", "embedding:x ", "lang:de ", "BREAK,", "\uac00"]
)
AFTER = st.sampled_from(
    ["", " ", ".", DOG, f",{RED}", "))", "\\)", ",embedding:x", " lang:en ", " BREAK", "-"]
)


def kept(*phrases: str) -> list[Phrase]:
    return [Phrase(phrase, "kept") for phrase in phrases]


def found(segments: list[Segment]) -> list[str]:
    return [literal(segment) for segment in segments if segment.reason in ("trigger", "kept")]


@law
@given(BEFORE, st.sampled_from(TRIGGERS), AFTER, st.sampled_from(["", ":1.3"]), SEEDS, MODE)
def test_a_phrase_is_found_in_any_company(
    before: str, trigger: str, after: str, number: str, seed: int, mode: str
) -> None:
    """Beside Chinese and Korean, in weights, next to names, marks and BREAK, in any width and case."""
    written = trigger if seed % 3 else trigger.upper() if seed % 2 else trigger.lower()
    core = f"({written}{number})" if number else written
    text = typed(f"{CAT},{before}{core}{after},{DOG}", seed)
    segments = [s for s in route(text, mode, [Phrase(trigger, "trigger")]) if s.reason == "trigger"]
    start = len(f"{CAT},{before}") + bool(number)
    assert [(s.start, s.end, s.stream) for s in segments] == [(start, start + len(written), "english")]
    assert literal(segments[0]) == written.replace("\\", "")


@law
@given(PROMPTS, st.lists(st.sampled_from([*LATIN_TRIGGERS, "cat", "red dress", "dress"]), max_size=4))
def test_on_two_streams_latin_phrases_change_nothing_but_reasons(text: str, phrases: list[str]) -> None:
    without, with_phrases = parts(route(text)), parts(route(text, phrases=kept(*phrases)))
    assert [english_prompt(part) for part in with_phrases] == [english_prompt(part) for part in without]
    native = [
        [[(s.text, s.weight) for s in part if s.stream == "native"] for part in cut]
        for cut in (without, with_phrases)
    ]
    assert native[0] == native[1]


@law
@given(
    joined(NATIVE, SIGNS, size=2),
    st.sampled_from(["zorb", "cat_", "_2", "\u00e9", "9"]),
    st.sampled_from(["cat", "2b", "blue eyes"]),
    st.booleans(),
    SEEDS,
    MODE,
)
def test_a_part_of_a_latin_word_is_no_phrase(
    before: str, stuck: str, phrase: str, behind: bool, seed: int, mode: str
) -> None:
    word = phrase + stuck if behind else stuck + phrase
    text = typed(f"{before} {word} {CAT}", seed)
    assert found(route(text, mode, kept(phrase))) == []
    assert found(route(f"{text} {phrase}", mode, kept(phrase))) == [phrase]


@law
@given(joined(NATIVE, LATIN, SIGNS, size=4), st.sampled_from(["hands", "v2", "\u574f", "hands-v2"]), MODE)
def test_no_phrase_is_found_in_the_name_of_an_embedding(around: str, phrase: str, mode: str) -> None:
    for name in ("hands-v2", "\u574f\u624b"):
        segments = route(f"{around} embedding:{name} {CAT}", mode, kept(phrase))
        assert f"embedding:{name}" in [s.text for s in segments if s.reason == "embedding"]
        assert found(segments) == []


@law
@given(PROMPTS, st.lists(st.sampled_from([*TRIGGERS, CAT, "cat"]), min_size=1, max_size=4), SEEDS, MODE)
def test_no_phrase_is_left_to_the_bridge(text: str, phrases: list[str], seed: int, mode: str) -> None:
    """What is native holds no phrase any more; asked of Chinese phrases, which match anywhere."""
    text = typed(text, seed)
    for segment in route(text, mode, kept(*phrases)):
        if segment.stream == "native":
            assert not any(phrase in segment.text for phrase in phrases if has_native(phrase))


@pytest.mark.parametrize(
    ("text", "phrases", "native_only"),
    [
        ("zorb zorb style", ["zorb", "zorb style"], ["zorb", "zorb style"]),
        ("a b c d", ["a b", "b c d"], ["b c d"]),
        ("xa a a", ["a a"], ["a a"]),
        ("Blue__Eyes, blue  eyes, blue_ eyes", ["blue eyes"], ["Blue__Eyes", "blue  eyes", "blue_ eyes"]),
        ("1girl, 11girl, 1girls, \uff11\uff27\uff49\uff52\uff4c", ["1girl"], ["1girl", "1Girl"]),
        (f"{RED}{CAT}", [CAT], [CAT]),
        ("zorb\ub97c zorb-like (zorb)'s", ["zorb"], ["zorb"] * 3),
        ("zorb (style:1.2)", ["zorb style"], ["zorb ", "style"]),
        ("miku \\(vocaloid\\)", ["miku (vocaloid)"], ["miku (vocaloid)"]),
        ("it\u2019s", ["it's"], ["it\u2019s"]),
        ("\u043a\u043e\u0442\u044b \u043a\u043e\u0442", ["\u043a\u043e\u0442"], ["\u043a\u043e\u0442"]),
        ("cafe\u0301 cafe", ["cafe"], ["cafe"]),
        ("a lang:en zorb lang:zh zorb BREAK zorb", ["zorb", "BREAK", "lang"], ["zorb", "zorb"]),
        ("cat", ["", " ", "_"], []),
    ],
)
def test_how_phrases_match(text: str, phrases: list[str], native_only: list[str]) -> None:
    assert found(route(text, NATIVE_ONLY, kept(*phrases))) == native_only


def test_the_first_of_two_equal_phrases_gives_the_reason() -> None:
    phrases = [Phrase("zorb", "trigger", "a.safetensors"), Phrase("Zorb", "kept")]
    assert [segment.reason for segment in route(f"{CAT}zorb", phrases=phrases)][1:] == ["trigger"]


def test_a_chinese_phrase_leaves_the_native_text_around_it() -> None:
    segments = route(f"{RED}{CAT}\uff0c({DOG}:1.2)", phrases=kept(CAT, DOG))
    assert [(s.text, s.weight, s.stream, s.reason) for s in segments] == [
        (RED, 1.0, "native", "native letters"),
        (CAT, 1.0, "english", "kept"),
        (",", 1.0, "english", "with its neighbour"),
        (DOG, 1.2, "english", "kept"),
    ]


@law
@given(
    st.lists(st.sampled_from([p for p in TRIGGERS if "\\" not in p]), max_size=5),
    SEEDS,
    st.sampled_from(",;\n"),
)
def test_a_list_of_phrases_is_read_back(phrases: list[str], seed: int, separator: str) -> None:
    written = typed(
        separator.join(f'"{each}"' if "," in each else each for each in phrases), seed, quotes=True
    )
    read = [phrase.text for phrase in phrases_in(written, "kept", "list")]
    assert read == list(dict.fromkeys(phrases))


def test_what_a_list_may_hold() -> None:
    assert phrases_in("(zorb style:1.2),, miku \\(vocaloid\\)\uff0c \n ", "trigger", "LoRA") == (
        Phrase("zorb style", "trigger", "LoRA"),
        Phrase("miku (vocaloid)", "trigger", "LoRA"),
    )
    assert phrases_in("", "kept") == ()
