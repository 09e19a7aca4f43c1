"""Writes what benchmarks/pocket.py measured into the tables of both READMEs and the pocket page.

    python bootstrap.py run benchmarks/pocket.py --json | tail -1 > figures.json
    python bootstrap.py run recipes/figures.py figures.json

Only the cells between the marks `figures:begin` and `figures:end` change; headings and first columns are a
person's.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from language_bridge.pocket import captions, judge

PACK = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "README.zh-CN.md", "docs/pocket-world.md")
_BLOCK = re.compile(r"(<!-- figures:begin -->\n)(.*?)(<!-- figures:end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("figures", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.figures.read_text(encoding="utf-8").splitlines()[-1])
    for page in PAGES:
        path = PACK / page
        text = path.read_text(encoding="utf-8")
        filled, count = _BLOCK.subn(lambda m: m[1] + _tables(m[2], found["table"]) + m[3], text)
        if count != 1:
            raise SystemExit(f"{page}: {count} blocks between figures:begin and figures:end; expected 1")
        path.write_text(filled, encoding="utf-8")


def _tables(block: str, table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The block with every cell behind a row's label filled in; split columns first, then one split each."""
    splits = iter([None, "combinations", "templates"])
    split: str | None = None
    rows = 0
    seen: set[str] = set()
    lines: list[str] = []
    for line in block.splitlines():
        if line.startswith("| |"):
            split, rows, seen = next(splits), 0, set()
        elif line.startswith("|") and not line.startswith("| ---"):
            label = line.split("|")[1].strip()
            shares = table[_row(label, rows, seen)]
            cells = _by_split(shares) if split is None else _by_attribute(shares[split])
            line = f"| {label} | " + " | ".join(f"{100 * share:.1f}" for share in cells) + " |"
            rows += 1
        lines.append(line)
    return "\n".join(lines) + "\n"


def _row(label: str, index: int, seen: set[str]) -> str:
    """The key of a row: English, stock CLIP, then a bridge, and that bridge again for mixed prompts."""
    named = re.search(r"`([^`]+)`", label)
    if named is None:
        return ("english", "chinese, stock CLIP")[index]
    name = named[1]
    mixed = name in seen
    seen.add(name)
    return f"{name}, mixed" if mixed else name


def _by_split(shares: Mapping[str, Mapping[str, float]]) -> list[float]:
    each = [shares[split]["attributes"] for split in captions.SPLITS]
    return [*each, (shares["combinations"]["attributes"] + shares["templates"]["attributes"]) / 2]


def _by_attribute(shares: Mapping[str, float]) -> list[float]:
    return [shares[name] for name in ("exact", *judge.ATTRIBUTES)]


if __name__ == "__main__":
    main()
