"""Windows of a tower: templates, numbers of words, and towers whose framed ids are not the pieces' own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import BridgeHeader, EncoderRef
from language_bridge.host.bridging import template_of
from language_bridge.host.words import Framed, ask, cut, number_words, windows
from language_bridge.prompt import word_spans
from language_bridge.tests.encoders.toys import TOYS

FAMILIES = sorted(TOYS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [("", ""), ("a cat", ""), ("a cat", "the cat")])
def test_words_stand_between_what_is_no_word(family: str, template: tuple[str, str]) -> None:
    tower = TOYS[family]()
    framed = Framed(tower, *template)
    for text in ("red", "red cat red cat " * 9, ""):
        pieces = [piece.id for piece in framed.opening(text)]
        chunks = cut(framed, [(text, 1.5)])
        words = [word for chunk in chunks for _, _, word in chunk if word]
        assert len(words) == len(pieces)
        assert words == sorted(words) and set(words) == set(range(1, max(words, default=0) + 1))
        assert all(len(chunk) == tower.window for chunk in chunks)
        for chunk in chunks:
            assert all(weight == (1.5 if word else 1.0) for _, weight, word in chunk)
        for start, chunk in zip(range(0, max(len(pieces), 1), framed.capacity), chunks, strict=True):
            ids, mask = framed.frame(pieces[start : start + framed.capacity])
            assert [token for token, *_ in chunk] == ids.tolist()
            assert torch.equal(framed.mask_of(ids[None])[0], mask)


SENTENCES = [
    "\u4e00\u53ea\u7ea2\u8272\u7684\u732b,\u5728\u5730\u6bef\u4e0a",
    "a red cat drawing, the cat's ",
    "\u732b\u3068\u72ac\u304c\u904a\u3076 \uace0\uc591\uc774\uac00 zorb\ub97c 3d",
    "\u043a\u043e\u0448\u043a\u0430 \u043d\u0430 \u043a\u043e\u0432\u0440\u0435, caf\u00e9 d\u00e9j\u00e0",
    "  two  spaces\n\u732b \U0001f431 ",
]
"""Native and Latin, with characters that no toy vocabulary has."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", SENTENCES)
def test_every_family_tells_where_its_pieces_stand(family: str, text: str) -> None:
    """Pieces in order, none outside the text, every character but blanks in one of them."""
    pieces = TOYS[family]().tokenize(text)
    places = [(piece.start, piece.end) for piece in pieces]
    assert all(0 <= start <= end <= len(text) for start, end in places)
    assert [start for start, _ in places] == sorted(start for start, _ in places)
    held = {place for start, end in places for place in range(start, end)}
    assert {place for place, letter in enumerate(text) if not letter.isspace()} <= held


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [("", ""), ("a cat ", " x")])
@pytest.mark.parametrize("text", SENTENCES)
def test_a_piece_has_the_number_of_the_word_it_stands_in(
    family: str, template: tuple[str, str], text: str
) -> None:
    """Pieces of one word share a number, pieces of two words do not, unless a piece joins the words."""
    tower = Framed(TOYS[family](), *template)
    pieces = tower.opening(text)
    numbers = [word for chunk in cut(tower, [(text, 1.0)]) for *_, word in chunk if word]
    assert len(numbers) == len(pieces)
    word_at = {place: n for n, span in enumerate(word_spans(text)) for place in range(*span)}
    held = [{word_at[place] for place in range(p.start, p.end) if place in word_at} for p in pieces]
    for one, (piece, number) in zip(held, zip(pieces, numbers, strict=True), strict=True):
        for other, (_, its_number) in zip(held, zip(pieces, numbers, strict=True), strict=True):
            if one & other:
                assert number == its_number, piece
            elif one and other and all(len(words) < 2 for words in held):
                assert number != its_number, piece


@given(st.text(st.sampled_from("\u732b\u72d7 ab,."), max_size=30), st.data())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_numbers_count_up_without_a_hole_however_a_text_is_cut(text: str, data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(0, len(text)), max_size=8))
    bounds = sorted({0, len(text), *cuts})
    places = list(pairwise(bounds))
    numbers = number_words(text, places, words=5)
    assert len(numbers) == len(places)
    previous = 5
    for number in numbers:
        assert number - previous in (0, 1)
        previous = number
    assert not numbers or numbers[0] == 6


def test_a_chinese_clause_is_many_words_and_a_long_word_is_one() -> None:
    tower = TOYS["bert"]()
    chunk = cut(tower, [("\u4e00\u53ea\u732b, supercat", 1.0), ("\u732b", 1.2)])[0]
    words = [word for _, _, word in chunk if word]
    assert words[:4] == [1, 2, 3, 4] and words[4:-1] == [5] * len(words[4:-1]) and words[-1] == 6
    assert len(words) > 7


def test_where_a_tokenizer_tells_no_places_each_piece_is_a_word() -> None:
    assert number_words("\u4e00\u53ea\u732b", [(0, 0)] * 3) == [1, 2, 3]
    assert number_words("", []) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_begins_a_window_and_its_words_go_on(family: str) -> None:
    tower = TOYS[family]()
    red, cat = [("red cat", 1.2), ("red", 1.0)], [("the cat", 1.0)]
    alone, other = cut(tower, red), cut(tower, cat)
    together = windows(tower, [red, [], cat])
    assert [[token[:2] for token in chunk] for chunk in together] == [
        [token[:2] for token in chunk] for chunk in [*alone, *other]
    ]
    words = [word for chunk in together for *_, word in chunk if word]
    assert words == sorted(words) and set(words) == set(range(1, max(words) + 1))
    assert together[: len(alone)] == alone
    assert windows(tower, []) == windows(tower, [[]]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_without_weights_only_the_text_is_asked(family: str) -> None:
    tower = TOYS[family]()
    plain = ask(tower, cut(tower, [("red cat", 1.0)]))
    heavy = ask(tower, cut(tower, [("red cat", 1.2)]))
    assert len(plain.ids) == 1 and len(heavy.ids) == 2
    assert torch.equal(heavy.ids[0], plain.ids[0]) and torch.equal(heavy.ids[1], tower.frame([])[0])
    assert plain.digest != heavy.digest != ask(tower, cut(tower, [("red cat", 1.3)])).digest


def test_a_template_longer_than_the_window_is_refused() -> None:
    with pytest.raises(BridgeError, match="no room for text"):
        Framed(TOYS["bert"](), "red cat " * 20, "")


def header(kind: str, spec: dict[str, object], **training: object) -> BridgeHeader:
    reference = EncoderRef("llama", "any", -1, 80, "pad")
    return BridgeHeader(kind=kind, spec=spec, base="sd1", encoder=reference, training=training)


def test_a_method_that_counts_on_a_template_is_not_used_without_it() -> None:
    sizes: dict[str, object] = {"hidden": 64, "context": 2048, "pooled": 1280, "heads": 16}
    assert template_of(header("rouwei", sizes), "x") == ("", "")
    with pytest.raises(BridgeError, match="template"):
        template_of(header("rouwei", sizes | {"skip": 27}), "x")
    given = header("rouwei", sizes | {"skip": 27}, template={"before": "one", "after": "two"})
    assert template_of(given, "x") == ("one", "two")
    assert template_of(header("mulan", {"hidden": 64, "context": 768}), "x") == ("summarize:", "")
    plain = header("mulan", {"hidden": 64, "context": 768}, template={"before": "", "after": ""})
    assert template_of(plain, "x") == ("", "")
