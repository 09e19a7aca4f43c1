"""The published layout of PEA-Diffusion's data is read as its authors' code reads it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from language_bridge.training.published import Captions, Rules

CAT = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"
DOG = "\u72d7"
LARGE = (640, 640)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"caption_ori": CAT, "caption_en": "a cat"}, Captions(CAT, "a cat", True)),
        ({"caption_ori_zh": CAT}, Captions(CAT, "", True)),
        ({"caption_ori_en": DOG + " dog!", "caption_zh": CAT}, Captions(DOG + "!", "", True)),
        ({"caption_ori": "a cat", "caption_ori_zh": CAT, "caption_zh": DOG}, Captions(DOG, "", False)),
        ({"caption_ori": "a cat", "caption_ori_en": CAT}, Captions(CAT, "", True)),
        ({"caption_ori_en": "a cat", "caption_zh": CAT, "caption_en": "c"}, Captions(CAT, "c", False)),
        ({"caption_zh": 3, "caption_en": None}, Captions("", "", False)),
    ],
)
def test_which_caption_is_native_and_what_is_trusted(fields: dict[str, Any], expected: Captions) -> None:
    """z is 1 when one of the three captions as found has a Chinese character, asked in their order."""
    assert Rules().read(fields) == expected


@given(
    some.text(
        alphabet=some.sampled_from("\u732b\u9fa5\u9fa6 a,.!?:;\uff0c\u3002\uff01\u201c\u201d\u3001(7\n")
    )
)
def test_captions_as_found_keep_chinese_digits_and_the_published_marks_alone(text: str) -> None:
    found = Rules().read({"caption_ori": CAT + text}).native
    kept = "[\u4e00-\u9fa50-9,.!?:;\uff0c\u3002\uff01\uff1f\uff1a\uff1b\u201c\u201d]"
    assert found == CAT + "".join(re.findall(kept, text))
    assert Rules(clean=False).read({"caption_ori": CAT + text}).native == (CAT + text).strip()


def test_translated_captions_are_not_touched() -> None:
    rules = Rules(simplify=str.upper)
    assert rules.read({"caption_zh": "a (b) " + CAT}).native == "a (b) " + CAT
    assert rules.read({"caption_ori": CAT + "a", "x": 1}).native == CAT
    assert Rules(clean=False, simplify=str.upper).read({"caption_ori": CAT + "a"}).native == CAT + "A"


SCORED = {"caption_zh": CAT, "caption_en": "a cat", "watermark": 0.5, "aesthetic_score": 6}
FOUND = {"caption_ori": CAT, "watermark": 0.9, "aesthetic_score": 1.0}


@pytest.mark.parametrize(
    ("fields", "size", "reason"),
    [
        (SCORED, LARGE, None),
        (SCORED, (639, 641), "picture too small"),
        (SCORED | {"aesthetic_score": 5.9}, LARGE, "aesthetic score too low"),
        (SCORED | {"watermark": 0.51}, LARGE, "watermark"),
        (SCORED | {"aesthetic_score": "none"}, LARGE, None),
        (FOUND, LARGE, None),
        (FOUND, (100, 100), "picture too small"),
        ({"caption_zh": CAT, "caption_en": "a cat", "aesthetic_score": 1}, (8, 8), None),
        ({"caption_en": "a cat"}, LARGE, "no native caption"),
        ({"caption_zh": CAT}, LARGE, "no English caption"),
    ],
)
def test_the_published_filters(fields: dict[str, Any], size: tuple[int, int], reason: str | None) -> None:
    """Area 640 x 640; aesthetic >= 6 and watermark <= 0.5 but for native data; no `watermark`, no filter."""
    assert Rules().fault(fields, size) == reason


def test_on_sd15_the_scores_judge_native_rows_too() -> None:
    rules = Rules(least_area=0, native_judged=True)
    assert rules.fault(FOUND, (8, 8)) == "aesthetic score too low"


def test_a_method_gets_the_captions_that_it_needs() -> None:
    assert Rules(needs="both").fault(FOUND, LARGE) == "no English caption to trust"
    assert Rules(needs="native").fault({"caption_zh": CAT}, LARGE) is None
    assert Rules(unnamed=True).fault({"caption_zh": CAT}, LARGE) is None
    assert Rules(unnamed=True).fault({}, LARGE) == "no native caption"
