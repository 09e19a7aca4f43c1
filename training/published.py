"""PEA-Diffusion's data layout: which caption of a row is native, which English, and which rows are used.

Fields: caption_ori, caption_ori_zh, caption_ori_en (as found), caption_zh, caption_en (translated),
watermark, aesthetic_score. Rules as in the authors' released code (OPPO-Mente-Lab/PEA-Diffusion,
custom_dataset_sdxl.py and custom_dataset.py at e403b2a).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

FOUND = ("caption_ori", "caption_ori_zh", "caption_ori_en")
NATIVE, ENGLISH = "caption_zh", "caption_en"
WATERMARK, AESTHETIC = "watermark", "aesthetic_score"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_NOT_KEPT = re.compile("[^\u4e00-\u9fa50-9,.!?:;\uff0c\u3002\uff01\uff1f\uff1a\uff1b\u201c\u201d]")


@dataclass(frozen=True)
class Captions:
    """native and english: what student and teacher read, "" where there is none; native_only: the flag z."""

    native: str
    english: str
    native_only: bool


@dataclass(frozen=True)
class Rules:
    """How rows are read; the defaults are the authors' for SDXL. For SD1.5 they judge all rows by the scores,
    and none by the area.

    native_field, english_field: names of the parallel captions. clean: whether captions as they were found
    are reduced to Chinese characters, digits and a little punctuation, as the authors do (spaces go, too).
    simplify: turns traditional characters into simplified ones, None to leave them. least_area: pixels;
    least_aesthetic, most_watermark: scores. native_judged: whether rows with a caption_ori or caption_ori_zh
    are judged by the scores as well. needs: which captions a method reads, "native", "either" (English where
    the flag z is 0) or "both" (and so no row whose flag is 1). unnamed: a caption that is absent is the empty
    prompt, as with the authors, who so teach that it means what the other caption says; otherwise the row is
    left out.
    """

    native_field: str = NATIVE
    english_field: str = ENGLISH
    clean: bool = True
    simplify: Callable[[str], str] | None = None
    least_area: int = 640 * 640
    least_aesthetic: float = 6.0
    most_watermark: float = 0.5
    native_judged: bool = False
    needs: Literal["native", "either", "both"] = "either"
    unnamed: bool = False

    def read(self, fields: Mapping[str, object]) -> Captions:
        """The captions of a row.

        The flag z is 1 when the first of caption_ori (or, where that is absent, caption_ori_zh) and
        caption_ori_en that has a Chinese character is the native caption; what it means in English is then
        not to be trusted. Otherwise the parallel captions are read.
        """
        first = FOUND[0] if fields.get(FOUND[0]) is not None else FOUND[1]
        english = _text(fields, self.english_field)
        for name in (first, FOUND[2]):
            found = _text(fields, name)
            if _CHINESE.search(found):
                found = _NOT_KEPT.sub("", found) if self.clean else found
                return Captions(self.simplify(found) if self.simplify else found, english, True)
        return Captions(_text(fields, self.native_field), english, False)

    def fault(self, fields: Mapping[str, object], size: tuple[int, int] | None) -> str | None:
        """Why a row with a picture of this size (width, height) is left out; None when it is used.

        As in the authors' code a row without the field `watermark` is not judged. A score that is absent or
        no number is not compared.
        """
        captions = self.read(fields)
        if not captions.native and not (self.unnamed and captions.english):
            return "no native caption"
        if self.needs == "both" and captions.native_only:
            return "no English caption to trust"
        parallel = not captions.native_only and not self.unnamed
        if self.needs != "native" and parallel and not captions.english:
            return "no English caption"
        if WATERMARK not in fields:
            return None
        if size is not None and size[0] * size[1] < self.least_area:
            return "picture too small"
        if not self.native_judged and any(fields.get(name) is not None for name in FOUND[:2]):
            return None
        aesthetic, watermark = _score(fields, AESTHETIC), _score(fields, WATERMARK)
        if aesthetic is not None and aesthetic < self.least_aesthetic:
            return "aesthetic score too low"
        if watermark is not None and watermark > self.most_watermark:
            return "watermark"
        return None


def _text(fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name)
    return value.strip() if isinstance(value, str) else ""


def _score(fields: Mapping[str, object], name: str) -> float | None:
    value = fields.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
