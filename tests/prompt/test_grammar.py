"""Law (d): a prompt typed with full-width or half-width punctuation is the same prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from language_bridge.prompt import Change, changes, normalise
from language_bridge.tests.prompt.prompts import (
    CAT,
    ENGLISH,
    PROMPTS,
    QUOTES,
    SEEDS,
    WIDE,
    has_native,
    law,
    typed,
)

ANY = st.text() | PROMPTS


@law
@given(PROMPTS, SEEDS)
def test_width_does_not_matter(text: str, seed: int) -> None:
    narrow = normalise(text).text
    assert normalise(typed(text, seed, quotes=has_native(text))).text == narrow


@law
@given(ENGLISH | st.text(st.characters(max_codepoint=0x24F)))
def test_what_an_english_keyboard_and_a_word_processor_write_is_left_alone(text: str) -> None:
    assert normalise(text).text == text
    assert changes(text) == []


@law
@given(ANY, SEEDS)
def test_normalising_twice_is_normalising_once_and_one_for_one(text: str, seed: int) -> None:
    text = typed(text, seed, quotes=True)
    once = normalise(text)
    assert normalise(once.text).text == once.text
    assert once.offsets == tuple(range(len(text))) and len(once.text) == len(text)


@law
@given(ANY, SEEDS)
def test_changes_say_all_that_was_changed_and_nothing_else(text: str, seed: int) -> None:
    text = typed(text, seed, quotes=True)
    replayed = list(text)
    end = 0
    for change in changes(text):
        assert end <= change.start < change.end
        end = change.end
        assert change.typed == text[change.start : end]
        assert len(change.read) == len(change.typed)
        assert all(read != letter for read, letter in zip(change.read, change.typed, strict=True))
        replayed[change.start : end] = change.read
    assert "".join(replayed) == normalise(text).text


@pytest.mark.parametrize("half", WIDE)
def test_every_form_of_every_ascii_sign_is_that_sign(half: str) -> None:
    for form in WIDE[half]:
        assert normalise(form).text == normalise(CAT + form).text[1:] == half


@pytest.mark.parametrize("half", QUOTES)
def test_curly_quotes_are_quotes_beside_native_letters_and_themselves_in_english(half: str) -> None:
    for curly in QUOTES[half]:
        assert normalise(f"a {curly}{CAT}").text == f"a {half}{CAT}"
        assert normalise(f"a {curly}cat").text == f"a {curly}cat"
        assert normalise(f"\uff21 {curly}\uff0c").text == f"A {curly},"


def test_what_has_no_twin_stays() -> None:
    kept = "\u300c\u300d\u300e\u300f\u300a\u300b\u2014\u2026\u00b7\u30fb\uffe5\uff76\uff9e\u2460\u060c"
    assert normalise(kept + CAT).text == kept + CAT
    assert normalise("\uff62\uff63").text == "\u300c\u300d"


def test_neighbours_of_one_reason_are_one_change() -> None:
    assert changes(f"\uff08{CAT}\uff1a\uff11\uff09\u3001\u3002\u201d") == [
        Change(0, 1, "\uff08", "(", "full width"),
        Change(2, 5, "\uff1a\uff11\uff09", ":1)", "full width"),
        Change(5, 7, "\u3001\u3002", ",.", "CJK punctuation"),
        Change(7, 8, "\u201d", '"', "curly quote"),
    ]
