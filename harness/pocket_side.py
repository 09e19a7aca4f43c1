"""The half of the demo that needs the installed environment: words prompts, reads pictures, draws the sheet.

``python pocket_side.py word|draw`` reads one JSON object on standard input and prints one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from language_bridge.pocket import captions


def word(job: dict[str, Any]) -> dict[str, Any]:
    """{"prompts": [text]} to {"prompts": [{"en", "zh", "mixed"}]}.

    A text keeps its own wording under its own language. The others are worded from what the pocket world's
    grammar reads in it, and are left out when it reads nothing.
    """
    triples: list[dict[str, str]] = []
    for text in job["prompts"]:
        triple = {language_of(text): text}
        caption = captions.parse(text) if job["pocket"] else None
        if caption is not None:
            for language in ("en", "zh"):
                triple.setdefault(language, captions.word(caption, language, np.random.default_rng(0)).text)
        triples.append(triple)
    return {"prompts": triples}


def language_of(text: str) -> str:
    """ "en" without any letter beyond ASCII, "zh" without an ASCII letter, else "mixed"."""
    letters = [character for character in text if character.isalpha()]
    if all(character.isascii() for character in letters):
        return "en"
    return "mixed" if any(character.isascii() for character in letters) else "zh"


def draw(job: dict[str, Any]) -> dict[str, Any]:
    """Reads every picture with the judge (in the pocket world) and writes the sheet."""
    from language_bridge.pocket.sheet import Cell, compose

    judged = _judge(job["pictures"]) if job["judge"] else [None] * len(job["pictures"])
    cells: dict[tuple[int, int], Cell] = {}
    for picture, verdict in zip(job["pictures"], judged, strict=True):
        remark = f"{verdict['right']} of {verdict['asked']} right" if verdict else ""
        cells[picture["row"], picture["column"]] = Cell(
            Path(picture["path"]), picture["prompt"], picture["gloss"], remark
        )
    rows = [
        [cells.get((row, column), Cell(None, "", "")) for column in range(job["columns"])]
        for row in range(len(job["labels"]))
    ]
    drawn = [index for index, row in enumerate(rows) if any(cell.picture for cell in row)]
    labels = [job["labels"][index] for index in drawn]
    compose(labels, [rows[index] for index in drawn], job["title"]).save(job["sheet"])
    return {"judge": judged}


def _judge(pictures: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    import torch
    from PIL import Image

    from language_bridge.pocket import judge

    reader = judge.load()
    verdicts: list[dict[str, Any] | None] = []
    for picture in pictures:
        with Image.open(picture["path"]) as file:
            pixels = torch.from_numpy(np.asarray(file.convert("RGB")).copy()).float() / 255
        reading = reader.read(pixels)
        caption = captions.parse(picture["meaning"])
        verdict: dict[str, Any] = {"sees": reading.as_json(), "right": 0, "asked": 0, "marks": {}}
        if caption is not None:
            marks = judge.score(reading, caption)
            flat = [mark for values in marks.values() for mark in values]
            verdict |= {"right": sum(flat), "asked": len(flat), "marks": marks}
        verdicts.append(verdict)
    return verdicts


COMMANDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"word": word, "draw": draw}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]](json.load(sys.stdin))))
