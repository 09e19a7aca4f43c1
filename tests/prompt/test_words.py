"""Words in any script: every character but blanks is in one word, and a Chinese clause is many."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from language_bridge.prompt import normalise, word_spans
from language_bridge.tests.prompt.prompts import LATIN, NATIVE, PROMPTS, SEEDS, law, typed

MARKS = "\u0301\u200d\ufe0f\u3099\u20e3"
ANY = (
    st.text()
    | PROMPTS
    | st.text(st.sampled_from(f"a1-'.,_ \u732b\u3005\u304b\u30ab\u30fc\u0e40\u0e01\u0e32\u1780\u17d2{MARKS}"))
)


def words(text: str) -> list[str]:
    return [text[start:end] for start, end in word_spans(text)]


@law
@given(ANY)
def test_every_character_but_blanks_is_in_exactly_one_word(text: str) -> None:
    covered = [0] * len(text)
    for start, end in word_spans(text):
        assert start < end
        for place in range(start, end):
            covered[place] += 1
    blank = [character.isspace() or character == "\u200b" for character in text]
    assert covered == [0 if each else 1 for each in blank]
    assert word_spans(text) == sorted(word_spans(text))


@law
@given(ANY, ANY, st.sampled_from([" ", "\n", "\u3000"]))
def test_a_blank_parts_words_whatever_stands_around(left: str, right: str, blank: str) -> None:
    shift = len(left) + 1
    expected = word_spans(left) + [(start + shift, end + shift) for start, end in word_spans(right)]
    assert word_spans(left + blank + right) == expected


@law
@given(
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF)), st.sampled_from(["", *LATIN, *NATIVE])
)
def test_every_han_character_is_a_word(han: str, other: str) -> None:
    assert words(han + other + han) == [*han, *words(other), *han]


@law
@given(st.lists(st.sampled_from([*LATIN, *NATIVE]), max_size=6), SEEDS)
def test_a_word_is_of_one_kind_and_width_does_not_matter(pieces: list[str], seed: int) -> None:
    text = "".join(pieces)
    for word in words(text):
        latin = [letter.isascii() or letter == "\u00e9" for letter in word if letter.isalpha()]
        assert all(latin) or not any(latin)
    wide = "".join(chr(ord(c) + 0xFEE0) if c.isascii() and c.isalnum() and seed % 2 else c for c in text)
    assert word_spans(wide) == word_spans(text) == word_spans(normalise(typed(text, seed, quotes=True)).text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u7ea2\u8272\uff0c\u4eba\u3005\u3007", "\u7ea2|\u8272|\uff0c|\u4eba\u3005|\u3007"),
        ("\u732b\ufe00", "\u732b\ufe00"),
        ("\u304d\u3083\u30fc\u3063\u3068", "\u304d\u3083\u30fc\u3063|\u3068"),
        ("\u30b9\u30fc\u30d1\u30fc\u30cd\u30b3", "\u30b9\u30fc\u30d1\u30fc\u30cd\u30b3"),
        ("\uff76\uff9e\uff8a\uff9e\uff9d", "\uff76\uff9e\uff8a\uff9e\uff9d"),
        ("\u8d64\u3044\u30cd\u30b3", "\u8d64|\u3044|\u30cd\u30b3"),
        ("\u0e40\u0e1b\u0e47\u0e19\u0e44\u0e17\u0e22", "\u0e40\u0e1b\u0e47|\u0e19|\u0e44\u0e17|\u0e22"),
        ("\u0eaa\u0eb2\u0ea7", "\u0eaa\u0eb2|\u0ea7"),
        ("\u1781\u17d2\u1798\u17c2\u179a", "\u1781\u17d2\u1798\u17c2|\u179a"),
        ("\u1019\u103c\u1014\u103a", "\u1019\u103c|\u1014\u103a"),
        ("\u0f56\u0f7c\u0f51\u0f0b\u0f61\u0f72\u0f42", "\u0f56\u0f7c\u0f51|\u0f0b|\u0f61\u0f72\u0f42"),
        ("\uace0\uc591\uc774\uac00 zorb\ub97c 3d", "\uace0\uc591\uc774\uac00|zorb|\ub97c|3d"),
        ("\uace0\uc591\uc7743d", "\uace0\uc591\uc774|3d"),
        ("\u043a\u043e\u0442-3, \u043a\u043e\u0442cat2", "\u043a\u043e\u0442-3|,|\u043a\u043e\u0442|cat2"),
        ("\u0642\u0650\u0637\u0629\u060c", "\u0642\u0650\u0637\u0629|\u060c"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947", "\u0928\u092e\u0938\u094d\u0924\u0947"),
        ("\u05e6\u05d4\u05f4\u05dc", "\u05e6\u05d4\u05f4\u05dc"),
        ("don't t-shirt it\u2019s blue_eyes", "don't|t-shirt|it\u2019s|blue_eyes"),
        ("v1.5 1,000 a.b 3. 1girl", "v1.5|1,000|a|.|b|3|.|1girl"),
        ("-a- 'b' --", "-|a|-|'|b|'|--"),
        ("\u2026\u2026 !!? ...", "\u2026\u2026|!!|?|..."),
        ("\U0001f468\u200d\U0001f469\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469|\U0001f44d\U0001f3fd"),
        ("\U0001f1e8\U0001f1f3\U0001f1ef\U0001f1f5", "\U0001f1e8\U0001f1f3|\U0001f1ef\U0001f1f5"),
        ("cafe\u0301 \u0301a", "cafe\u0301|\u0301|a"),
        ("a\u200bb", "a|b"),
        ("", ""),
    ],
)
def test_words_of_each_script(text: str, expected: str) -> None:
    assert words(text) == [word for word in expected.split("|") if word]
