"""Lays pictures out as one labelled sheet: a row per way of prompting, a column per prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELL = 208
MARGIN = 12
LABEL = 168
TEXT = 15
LINES = 4
TOP = 48

FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)
FONT_NAMES = (
    "NotoSansCJK-Regular*",
    "NotoSansCJKsc-Regular*",
    "NotoSansSC*",
    "SourceHanSansSC-Regular*",
    "SourceHanSansCN-Regular*",
    "wqy-*",
    "PingFang*",
    "Hiragino Sans GB*",
    "STHeiti*",
    "msyh*",
    "simhei*",
    "simsun*",
    "Deng*",
    "DroidSansFallback*",
    "NotoSerifCJK-Regular*",
    "uming*",
    "ukai*",
)


@dataclass(frozen=True)
class Cell:
    """One picture of the sheet.

    picture: its file, None leaves the place empty; gloss: printed without a font for the prompt's script;
    remark: a short line below, such as the judge's score.
    """

    picture: Path | None
    prompt: str
    gloss: str
    remark: str = ""


def compose(labels: Sequence[str], rows: Sequence[Sequence[Cell]], title: str) -> Image.Image:
    """The sheet as an RGB image; `labels` name the rows, each row has the same number of cells."""
    columns = max(len(row) for row in rows)
    latin = ImageFont.load_default(TEXT)
    heading = ImageFont.load_default(TEXT + 5)
    native = find_font("".join(cell.prompt for row in rows for cell in row))
    line = TEXT + 5
    lines_below = [max(_lines_below(cell, native, latin) for cell in row) for row in rows]
    heights = [CELL + line * count + 2 * MARGIN for count in lines_below]
    width = max(LABEL + columns * (CELL + MARGIN), MARGIN + round(heading.getlength(title))) + MARGIN
    sheet = Image.new("RGB", (width, TOP + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 14), title, font=heading, fill="black")
    for index, (label, row) in enumerate(zip(labels, rows, strict=True)):
        top = TOP + sum(heights[:index])
        for number, text in enumerate(_wrapped(label, heading, LABEL - 2 * MARGIN)):
            draw.text((MARGIN, top + 24 * number), text, font=heading, fill="black")
        for column, cell in enumerate(row):
            left = LABEL + column * (CELL + MARGIN)
            if cell.picture is None:
                draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline="#cccccc")
            else:
                sheet.paste(_scaled(cell.picture), (left, top))
            text, font = _readable(cell, native, latin)
            lines = _wrapped(text, font, CELL)[:LINES]
            for number, part in enumerate(lines):
                draw.text((left, top + CELL + 4 + line * number), part, font=font, fill="black")
            if cell.remark:
                place = (left, top + CELL + 4 + line * len(lines))
                draw.text(place, cell.remark, font=latin, fill="#555555")
    return sheet


def _lines_below(cell: Cell, native: Font | None, latin: Font) -> int:
    return min(LINES, len(_wrapped(*_readable(cell, native, latin), CELL))) + bool(cell.remark)


def find_font(sample: str, size: int = TEXT) -> Font | None:
    """A font of this machine that can draw every character of `sample`; None where there is none."""
    wanted = {character for character in sample if ord(character) > 0x2000}
    if not wanted:
        return ImageFont.load_default(size)
    for path in _font_files():
        try:
            font = ImageFont.truetype(str(path), size)
        except OSError:
            continue
        missing = _ink(font, "\U0010fffe")
        if all(_ink(font, character) != missing for character in wanted):
            return font
    return None


def _font_files() -> Iterator[Path]:
    folders = [
        Path(folder).expanduser() for folder in FONT_FOLDERS if sys.platform == "win32" or folder[1] != ":"
    ]
    for name in FONT_NAMES:
        for folder in folders:
            if folder.is_dir():
                yield from sorted(folder.rglob(f"{name}.tt[cf]"))
                yield from sorted(folder.rglob(f"{name}.otf"))


def _ink(font: Font, character: str) -> bytes:
    picture = Image.new("L", (2 * TEXT, 2 * TEXT))
    ImageDraw.Draw(picture).text((0, 0), character, font=font, fill=255)
    return picture.tobytes()


def _readable(cell: Cell, native: Font | None, latin: Font) -> tuple[str, Font]:
    if cell.prompt.isascii():
        return cell.prompt, latin
    if native is not None:
        return cell.prompt, native
    gloss = cell.gloss if cell.gloss.isascii() else ""
    return f"{gloss} (zh)".strip(), latin


def _wrapped(text: str, font: Font, width: float) -> list[str]:
    """Breaks text at spaces and between wide characters."""
    pieces: list[str] = []
    for character in text:
        wide = ord(character) > 0x2000
        if pieces and not wide and pieces[-1][-1] != " " and ord(pieces[-1][-1]) <= 0x2000:
            pieces[-1] += character
        else:
            pieces.append(character)
    lines = [""]
    for piece in pieces:
        if lines[-1] and font.getlength(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return [line.rstrip() for line in lines]


def _scaled(path: Path) -> Image.Image:
    with path.open("rb") as file:
        picture = Image.open(file).convert("RGB")
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    framed = Image.new("RGB", (CELL, CELL), "white")
    fitted = picture.resize(size, Image.Resampling.LANCZOS)
    framed.paste(fitted, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return framed
