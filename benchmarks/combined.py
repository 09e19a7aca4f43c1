"""Measures the claim of Bridge Diffusion Model in the pocket world: what a prompt says in Chinese and what it
says in English come together in one picture.

`bootstrap.py run benchmarks/combined.py [--json] [--count N] [--seed N] [--sheet FILE]`. Two sorts of prompt:
an object in Chinese and another in English; an object in Chinese and the ground in English. Each half is also
painted alone, and the whole is said in English to the stock CLIP. `--sheet` paints the first prompts of each
sort, as they were drawn, as one labelled picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from language_bridge.benchmarks.pocket import Painter
from language_bridge.pocket import captions, judge
from language_bridge.pocket.captions import Caption
from language_bridge.pocket.painter import random_scene

BRIDGE = "pocket-branch"
SORTS = ("two objects", "object and ground")
ROWS = {
    "chinese": "Chinese half alone, over the branch",
    "english": "English half alone",
    "both": "both in one prompt, over the branch",
    "all english": "all in English, stock CLIP (ceiling)",
}
ON_SHEET = 3
"""So many prompts of each sort are on the sheet: the first ones."""


@dataclass(frozen=True)
class Asked:
    """One picture in two halves: what the Chinese asks for, what the English asks for, and all in English."""

    chinese: Caption
    english: Caption
    whole: Caption

    def prompt(self, row: str) -> str:
        """What is typed for one of `ROWS`."""
        both = f"{self.chinese.text}, {self.english.text}"
        return {"both": both, "all english": self.whole.text}.get(row) or getattr(self, row).text


def tests(sort: str, count: int, seed: int) -> list[Asked]:
    """Halves of one sort, in seen words and patterns; what is said of an object is drawn as in training."""
    rng = np.random.default_rng([seed, SORTS.index(sort)])
    found: list[Asked] = []
    while len(found) < count:
        content = captions.describe(random_scene(rng), rng)
        if len(content.wanted) != (2 if sort == SORTS[0] else 1):
            continue
        if sort == SORTS[0]:
            first, second = (Caption("", (wanted,), None) for wanted in content.wanted)
            content = dataclasses.replace(content, ground=None)
            english = captions.word(second, "en", rng)
        elif content.ground is None:
            continue
        else:
            first = dataclasses.replace(content, ground=None)
            words = captions.grammar()["en"]["ground"][content.ground]["seen"]
            text = f"{words[int(rng.integers(len(words)))]} background"
            english = Caption(text, (), content.ground)
        found.append(Asked(captions.word(first, "zh", rng), english, captions.word(content, "en", rng)))
    return found


def _marks(reading: judge.Reading, asked: Asked) -> dict[str, list[bool]]:
    """What is right of each half; the halves' objects are looked for together, so none counts twice."""
    together = Caption("", asked.chinese.wanted + asked.english.wanted, asked.english.ground)
    pairs = judge.score(reading, together)
    place = [0 if wanted in asked.chinese.wanted else 1 for wanted in together.wanted]
    halves: dict[str, list[bool]] = {"chinese": [], "english": list(pairs.get("ground", []))}
    said = {"shape": "shape", "colour": "colour", "size": "size", "position": "place"}
    for attribute, name in said.items():
        mentioned = [
            half for half, wanted in zip(place, together.wanted, strict=True) if getattr(wanted, name)
        ]
        for half, right in zip(mentioned, pairs.get(attribute, []), strict=True):
            halves["english" if half else "chinese"].append(right)
    return halves


def _share(marks: list[bool]) -> float:
    return sum(marks) / len(marks)


def measure(painter: Painter, count: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Sort -> row -> shares: right attributes of the Chinese, of the English, wholly right pictures."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for sort in SORTS:
        asked = tests(sort, count, seed)
        for row in ROWS:
            pictures = paint(painter, row, [each.prompt(row) for each in asked], seed)
            marks = [
                _marks(reading, each)
                for reading, each in zip(painter.judge.read_many(pictures), asked, strict=True)
            ]
            table.setdefault(sort, {})[row] = {
                **{
                    half: _share([m for each in marks for m in each[half]]) for half in ("chinese", "english")
                },
                "exact": _share([all(each["chinese"]) and all(each["english"]) for each in marks]),
            }
            print(f"{sort:18} {row:12} {table[sort][row]}", file=sys.stderr, flush=True)
    return table


def paint(painter: Painter, row: str, prompts: list[str], seed: int) -> torch.Tensor:
    """Pictures [N, 64, 64, 3] of one row's prompts."""
    model, clip = (painter.model, painter.clip) if row == "all english" else painter.bridged[BRIDGE]
    return painter.paint(model, clip, prompts, seed)


def draw(painter: Painter, seed: int, place: Path) -> None:
    """The sheet: the first prompts of each sort, a row for each way of saying them."""
    from PIL import Image

    from language_bridge.pocket.sheet import Cell, compose

    asked = [each for sort in SORTS for each in tests(sort, ON_SHEET, seed)]
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in list(ROWS)[:3]:
            # One by one, so that every picture of a column begins with the same noise.
            pictures = [paint(painter, row, [each.prompt(row)], seed)[0] for each in asked]
            cells: list[Cell] = []
            for number, (picture, each) in enumerate(zip(pictures, asked, strict=True)):
                file = Path(folder) / f"{row}-{number}.png"
                pixels = (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()
                Image.fromarray(pixels).save(file)
                halves = _marks(painter.judge.read(picture), each)
                remark = ", ".join(
                    f"{name} {sum(halves[half])} of {len(halves[half])}"
                    for half, name in (("chinese", "zh"), ("english", "en"))
                )
                cells.append(Cell(file, each.prompt(row), each.whole.text, f"right: {remark}"))
            rows.append(cells)
        labels = ["Chinese half", "English half", "Both in one prompt"]
        sheet = compose(labels, rows, "pocket-branch (BDM): Chinese and English in one picture")
    sheet.save(place, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=int, default=200, help="prompts of each sort; 0 = the sheet alone")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    painter = Painter()
    if options.sheet:
        draw(painter, options.seed, options.sheet)
    if not options.count:
        return
    table = measure(painter, options.count, options.seed)
    report: dict[str, Any] = {"n": options.count, "seed": options.seed, "table": table}
    if options.json:
        print(json.dumps(report))
        return
    for sort, rows in table.items():
        print(f"\n{sort} (n = {options.count}, seed {options.seed})")
        print(f"{'':40}{'Chinese':>10}{'English':>10}{'exact':>10}")
        for row, shares in rows.items():
            print(f"{ROWS[row]:40}" + "".join(f"{100 * share:10.1f}" for share in shares.values()))


if __name__ == "__main__":
    main()
