"""The manifest as values: parses weights_manifest.json, validates it, writes the same text back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

FORMAT = 1
BASES = ("pocket", "sd1", "sd2", "sdxl")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ManifestError(ValueError):
    """The manifest is not what this version understands; the text names the place, found and expected."""

    def __init__(self, place: str, found: object, expected: str) -> None:
        super().__init__(f"weights manifest, {place}\n  found: {found!r}\n  expected: {expected}")
        self.place = place
        self.expected = expected


@dataclass(frozen=True)
class WeightFile:
    """One file: its path below the pack's folder (forward slashes), its size in bytes, its SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One thing a user can name: what it is, the base it fits, its licence, where it came from, its files."""

    name: str
    about: str
    base: str
    licence: str
    source: str
    files: tuple[WeightFile, ...]


@dataclass(frozen=True)
class Manifest:
    """All entries, in the order of the file; no two have the same name."""

    entries: tuple[Entry, ...]


def parse(text: str) -> Manifest:
    """The manifest that a JSON text describes.

    Raises:
        ManifestError: not JSON, a newer format, or a field that is missing, unknown or of the wrong form.
    """
    try:
        data: object = json.loads(text)
    except ValueError as error:
        raise ManifestError("the whole file", str(error), "JSON") from error
    top = _table(data, "the whole file", {"format", "entries"})
    if type(top["format"]) is not int or top["format"] != FORMAT:
        raise ManifestError("format", top["format"], f"{FORMAT}; a newer one needs a newer pack")
    entries = tuple(
        _entry(item, f"entry {index}") for index, item in enumerate(_list(top["entries"], "entries"))
    )
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ManifestError("entries", name, "every name once")
    return Manifest(entries)


def dump(manifest: Manifest) -> str:
    """The JSON text of a manifest; `dump(parse(text)) == text` for every text that `dump` wrote."""
    data = {"format": FORMAT, "entries": [asdict(entry) for entry in manifest.entries]}
    return json.dumps(data, indent=2, ensure_ascii=True) + "\n"


def _entry(data: object, place: str) -> Entry:
    table = _table(data, place, {"name", "about", "base", "licence", "source", "files"})
    name = _matching(table["name"], f"{place}: name", _NAME, "lower-case letters, digits, . _ -")
    place = f"entry {name!r}"
    base = _text(table["base"], f"{place}: base")
    if base not in BASES:
        raise ManifestError(f"{place}: base", base, f"one of {', '.join(BASES)}")
    files = tuple(_file(item, f"{place}: files") for item in _list(table["files"], f"{place}: files"))
    if not files:
        raise ManifestError(f"{place}: files", [], "at least one file")
    return Entry(
        name,
        _text(table["about"], f"{place}: about"),
        base,
        _text(table["licence"], f"{place}: licence"),
        _text(table["source"], f"{place}: source"),
        files,
    )


def _file(data: object, place: str) -> WeightFile:
    table = _table(data, place, {"path", "bytes", "sha256"})
    path = _text(table["path"], f"{place}: path")
    if not all(_PART.fullmatch(part) for part in path.split("/")):
        raise ManifestError(f"{place}: path", path, "a relative path of plain names, with forward slashes")
    size = table["bytes"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ManifestError(f"{place}: bytes", size, "a whole number of bytes")
    return WeightFile(
        path, size, _matching(table["sha256"], f"{place}: sha256", _SHA256, "64 lower-case hex digits")
    )


def _table(data: object, place: str, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ManifestError(place, type(data).__name__, "a JSON object")
    table = cast("dict[str, Any]", data)
    if set(table) != keys:
        raise ManifestError(place, sorted(table), f"exactly the keys {sorted(keys)}")
    return table


def _list(data: object, place: str) -> list[object]:
    if not isinstance(data, list):
        raise ManifestError(place, type(data).__name__, "a JSON list")
    return cast("list[object]", data)


def _text(data: object, place: str) -> str:
    if not isinstance(data, str):
        raise ManifestError(place, data, "a text")
    return data


def _matching(data: object, place: str, pattern: re.Pattern[str], expected: str) -> str:
    text = _text(data, place)
    if not pattern.fullmatch(text):
        raise ManifestError(place, text, expected)
    return text
