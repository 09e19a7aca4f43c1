"""The labelled sheet: every picture is on it, no prompt is drawn as empty boxes, long prompts are wrapped."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageFont

from language_bridge.pocket import sheet
from language_bridge.pocket.sheet import CELL, Cell, compose, find_font

CHINESE = "\u7ea2\u8272\u7684\u5706"


@pytest.fixture
def red(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_every_picture_is_on_the_sheet(red: Path) -> None:
    rows = [
        [Cell(red, "a", "a"), Cell(None, "", "")],
        [Cell(red, "b", "b", "2 of 2 right"), Cell(red, "c", "c")],
    ]
    picture = compose(["first", "second"], rows, "title")
    reds = sum(count for count, colour in picture.getcolors(1 << 20) or [] if colour == (255, 0, 0))
    assert reds == 3 * CELL * CELL


def test_a_wide_picture_keeps_its_shape(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), (0, 0, 255)).save(tmp_path / "wide.png")
    picture = compose(["row"], [[Cell(tmp_path / "wide.png", "", "")]], "")
    blues = sum(count for count, colour in picture.getcolors(1 << 20) or [] if colour == (0, 0, 255))
    assert blues == CELL * CELL // 2


def test_a_font_is_taken_only_when_it_has_every_character(monkeypatch: pytest.MonkeyPatch) -> None:
    latin = ImageFont.load_default(sheet.TEXT)
    assert isinstance(latin, ImageFont.FreeTypeFont)
    monkeypatch.setattr(sheet, "_font_files", lambda: iter([Path("latin")]))
    monkeypatch.setattr(ImageFont, "truetype", lambda *_, **__: latin)
    assert find_font(CHINESE) is None
    assert find_font("plain") is not None


def test_without_a_font_the_gloss_is_drawn(red: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(sheet, "_font_files", lambda: iter([]))
    monkeypatch.setattr(sheet, "_wrapped", lambda text, font, width: drawn.append(text) or [text])
    compose(["row"], [[Cell(red, CHINESE, "a red circle"), Cell(red, CHINESE, CHINESE)]], "")
    assert "a red circle (zh)" in drawn
    assert all(text.isascii() for text in drawn)


@pytest.mark.parametrize(
    "text", ["word " * 40, CHINESE * 20, "mixed " + CHINESE * 9 + " words", "", "x" * 200]
)
def test_wrapping_loses_nothing_and_keeps_within_the_width(text: str) -> None:
    font = ImageFont.load_default(sheet.TEXT)
    lines = sheet._wrapped(text, font, CELL)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= CELL for line in lines if " " in line or line[:1] > "\u2000")
