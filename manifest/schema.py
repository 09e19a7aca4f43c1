"""The manifest as values: parses weights_manifest.json, validates it, writes the same text back.

The same rules as a JSON Schema for other programs: weights_manifest.schema.json beside this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

FORMAT = 2
SCHEMA = "manifest/weights_manifest.schema.json"
"""What the manifest names under "$schema", relative to itself."""
BASES = ("pocket", "sd1", "sd2", "sdxl")
LICENCE_CLASSES = ("permissive", "restricted", "non-commercial", "undeclared")
"""restricted: free, with terms on use that travel with the weights; undeclared: the page names no licence."""
UNITS: Mapping[str, int] = {"kB": 10**3, "MB": 10**6, "GB": 10**9}
FOLDERS = ("checkpoints", "diffusion_models", "vae", "text_encoders", "controlnet")
"""Model folders of ComfyUI that a file of a set may go to by name."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that are Python pickles inside."""

LONGEST_PATH = 400
_DEVICES = r"(con|prn|aux|nul|com[0-9]|lpt[0-9])"

_NAME = re.compile(rf"(?!{_DEVICES}(\.|\Z))[a-z0-9]([a-z0-9._-]{{0,98}}[a-z0-9_-])?")
_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
_DEVICE = re.compile(rf"{_DEVICES}(\..*)?", re.IGNORECASE)
_UNFINISHED = (".part", ".part.json", ".new")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"main|refs/pr/[1-9][0-9]{0,5}|[0-9a-f]{40}")
_SHOWN = re.compile(r"[1-9][0-9]{0,3}(\.[0-9]{1,2})? (kB|MB|GB)")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})?")
_LINK = re.compile(r"https://[a-z0-9.-]+/[\x21-\x7e]*")


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
    """One thing that ships with the pack: what it is, base, licence, where it came from, files."""

    name: str
    about: str
    base: str
    licence: str
    source: str
    files: tuple[WeightFile, ...]


@dataclass(frozen=True)
class RemoteFile:
    """One published file: where it is (Hub repository, revision, path there), and what is known of it.

    bytes: exact size, 0 where nobody has read it. shown: size as the Hub's page rounds it ("2.24 GB"), ""
    where that was not read either. sha256: hex, "" where it was not verified. modelscope: the same repository
    on ModelScope, "" where unknown. to: where it belongs below ComfyUI's models folder; "" = the download
    folder.
    """

    repo: str
    revision: str
    path: str
    bytes: int = 0
    shown: str = ""
    sha256: str = ""
    modelscope: str = ""
    to: str = ""

    @property
    def key(self) -> str:
        """What identifies the content: repository, revision and path."""
        return f"{self.repo}@{self.revision}/{self.path}"

    @property
    def place(self) -> str:
        """Path below the models folder, forward slashes."""
        return self.to or f"{DOWNLOADS}/{self.repo.replace('/', '--')}/{self.path}"

    @property
    def is_pickle(self) -> bool:
        """Whether opening the file unguarded could run a program."""
        return self.path.lower().endswith(PICKLES)

    @property
    def least_bytes(self) -> int:
        """The fewest bytes that the file can have."""
        return self.bytes or (_rounded(self.shown)[0] if self.shown else 1)

    @property
    def most_bytes(self) -> int | None:
        """The most bytes that the file can have, None where nothing is known."""
        return self.bytes or (_rounded(self.shown)[1] if self.shown else None)


DOWNLOADS = "language_bridge_downloads"
"""Folder below ComfyUI's models that published files go to; not one in which ComfyUI looks for models."""


@dataclass(frozen=True)
class Conversion:
    """What `install.py convert` is told: the row of its table, the U-Net part, what is handed to it.

    give: paths in the repository, "." = the whole folder. reference: what the U-Net was trained from, in
    words, "" where no checkpoint has to be named.
    """

    preset: str
    give: tuple[str, ...]
    unet: str = "auto"
    reference: str = ""


@dataclass(frozen=True)
class PublishedSet:
    """One published set of weights, never shipped with the pack: a bridge, a text tower or a checkpoint.

    consent: whether the user is asked to read the licence first. gated: whether the Hub asks for an account.
    card: page to read. needs: sets that are fetched and converted together with this one. conversion: None =
    opened as it is. by_hand: why it cannot be fetched, and what to do; then there are no files.
    """

    name: str
    about: str
    base: str
    languages: tuple[str, ...]
    licence: str
    licence_class: str
    consent: bool
    gated: bool
    card: str
    needs: tuple[str, ...]
    files: tuple[RemoteFile, ...]
    conversion: Conversion | None
    by_hand: str


@dataclass(frozen=True)
class Manifest:
    """What ships (entries) and what is published elsewhere, in the order of the file; no two share a name."""

    entries: tuple[Entry, ...]
    published: tuple[PublishedSet, ...] = ()

    def find(self, name: str) -> PublishedSet | None:
        """The published set of that name."""
        return next((item for item in self.published if item.name == name), None)

    def with_needs(self, wanted: PublishedSet) -> tuple[PublishedSet, ...]:
        """The set and, behind it, every set that it needs, each once."""
        found = [wanted]
        for item in found:
            found += [need for need in map(self.find, item.needs) if need is not None and need not in found]
        return tuple(found)


def parse(text: str) -> Manifest:
    """The manifest that a JSON text describes.

    Raises:
        ManifestError: not JSON, another format, or a field that is missing, unknown or of the wrong form.
    """
    try:
        data: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError("the whole file", str(error), "JSON") from error
    top = _table(data, "the whole file", {"$schema", "format", "entries", "published"})
    if type(top["format"]) is not int or top["format"] != FORMAT:
        raise ManifestError("format", top["format"], f"{FORMAT}; a newer one needs a newer pack")
    if top["$schema"] != SCHEMA:
        raise ManifestError("$schema", top["$schema"], SCHEMA)
    entries = tuple(
        _entry(item, f"entry {index}") for index, item in enumerate(_list(top["entries"], "entries"))
    )
    published = tuple(
        _published(item, f"set {index}") for index, item in enumerate(_list(top["published"], "published"))
    )
    names = [entry.name for entry in (*entries, *published)]
    for name in names:
        if names.count(name) > 1:
            raise ManifestError("names", name, "every name once")
    _require_agreement(published)
    return Manifest(entries, published)


def dump(manifest: Manifest) -> str:
    """The JSON text of a manifest; `dump(parse(text)) == text` for every text that `dump` wrote."""
    published = [
        asdict(item) | {"files": [_told(file) for file in item.files], "conversion": _how(item.conversion)}
        for item in manifest.published
    ]
    data = {
        "$schema": SCHEMA,
        "format": FORMAT,
        "entries": [asdict(entry) for entry in manifest.entries],
        "published": published,
    }
    return json.dumps(data, indent=2, ensure_ascii=True) + "\n"


def _told(file: RemoteFile) -> dict[str, object]:
    always = ("repo", "revision", "path", "bytes", "sha256")
    return {name: value for name, value in asdict(file).items() if value or name in always}


def _how(conversion: Conversion | None) -> dict[str, object] | None:
    if conversion is None:
        return None
    return {name: value for name, value in asdict(conversion).items() if value}


def _require_agreement(published: tuple[PublishedSet, ...]) -> None:
    """Needs exist and do not go in circles; one file is told once, and no two go to one place."""
    known = {item.name: item for item in published}
    told: dict[str, RemoteFile] = {}
    places: dict[str, str] = {}
    for item in published:
        for need in item.needs:
            if need not in known or known[need].needs:
                raise ManifestError(f"set {item.name!r}: needs", need, "a set that needs no other")
        for file in item.files:
            if told.setdefault(file.place, file) != file:
                raise ManifestError(f"set {item.name!r}: files", file.place, "one file for each place")
            # Windows and macOS take a.bin and A.bin for one file.
            if places.setdefault(file.place.lower(), file.place) != file.place:
                raise ManifestError(
                    f"set {item.name!r}: files", file.place, "names that differ in more than case"
                )


def _entry(data: object, place: str) -> Entry:
    table = _table(data, place, {"name", "about", "base", "licence", "source", "files"})
    name = _matching(table["name"], f"{place}: name", _NAME, "lower-case letters, digits, . _ -")
    place = f"entry {name!r}"
    base = _one_of(table["base"], f"{place}: base", BASES)
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
    return WeightFile(
        _path(table["path"], f"{place}: path"),
        _whole(table["bytes"], f"{place}: bytes"),
        _matching(table["sha256"], f"{place}: sha256", _SHA256, "64 lower-case hex digits"),
    )


def _published(data: object, place: str) -> PublishedSet:
    table = _table(data, place, set(PublishedSet.__dataclass_fields__))
    name = _matching(table["name"], f"{place}: name", _NAME, "lower-case letters, digits, . _ -")
    place = f"set {name!r}"
    files = tuple(_remote(item, f"{place}: files") for item in _list(table["files"], f"{place}: files"))
    by_hand = _text(table["by_hand"], f"{place}: by_hand")
    if bool(files) == bool(by_hand):
        raise ManifestError(f"{place}: files", len(files), "files, or else the reason in by_hand")
    kind = _one_of(table["licence_class"], f"{place}: licence_class", LICENCE_CLASSES)
    consent = _flag(table["consent"], f"{place}: consent")
    if not consent and kind != "permissive":
        raise ManifestError(f"{place}: consent", consent, f"true, because the licence class is {kind}")
    conversion = None
    if table["conversion"] is not None:
        conversion = _conversion(table["conversion"], f"{place}: conversion")
        if by_hand:
            raise ManifestError(f"{place}: conversion", conversion.preset, "null, where there are no files")
        folders = {"/".join(file.path.split("/")[:end]) for file in files for end in range(1, 9)} | {"."}
        for given in conversion.give:
            if given not in folders:
                raise ManifestError(f"{place}: give", given, "a file of the set, a folder of one, or .")
    return PublishedSet(
        name=name,
        about=_text(table["about"], f"{place}: about"),
        base=_one_of(table["base"], f"{place}: base", ("", *BASES)),
        languages=tuple(
            _matching(item, f"{place}: languages", _LANGUAGE, "a language code")
            for item in _list(table["languages"], f"{place}: languages")
        ),
        licence=_text(table["licence"], f"{place}: licence"),
        licence_class=kind,
        consent=consent,
        gated=_flag(table["gated"], f"{place}: gated"),
        card=_matching(table["card"], f"{place}: card", _LINK, "an https address"),
        needs=tuple(
            _matching(item, f"{place}: needs", _NAME, "the name of a set")
            for item in _list(table["needs"], f"{place}: needs")
        ),
        files=files,
        conversion=conversion,
        by_hand=by_hand,
    )


def _remote(data: object, place: str) -> RemoteFile:
    required = {"repo", "revision", "path", "bytes", "sha256"}
    table = {"shown": "", "modelscope": "", "to": ""} | dict(
        _table(data, place, required, {"shown", "modelscope", "to"})
    )
    path = _path(table["path"], f"{place}: path")
    place = f"{place} {path!r}"
    size = _whole(table["bytes"], f"{place}: bytes")
    shown = _optional(table["shown"], f"{place}: shown", _SHOWN, "a rounded size such as 2.24 GB")
    if shown and size:
        raise ManifestError(f"{place}: shown", shown, "nothing, where the exact size is known")
    to = _text(table["to"], f"{place}: to")
    if to and (to.split("/")[0] not in FOLDERS or "/" not in to or _path(to, f"{place}: to") != to):
        raise ManifestError(f"{place}: to", to, f"a path below one of {', '.join(FOLDERS)}")
    return RemoteFile(
        repo=_matching(table["repo"], f"{place}: repo", _REPO, "owner/name"),
        revision=_matching(table["revision"], f"{place}: revision", _REVISION, "main, refs/pr/N, a commit"),
        path=path,
        bytes=size,
        shown=shown,
        sha256=_optional(table["sha256"], f"{place}: sha256", _SHA256, "64 lower-case hex digits, or none"),
        modelscope=_optional(table["modelscope"], f"{place}: modelscope", _REPO, "owner/name, or none"),
        to=to,
    )


def _conversion(data: object, place: str) -> Conversion:
    table = {"unet": "auto", "reference": ""} | dict(
        _table(data, place, {"preset", "give"}, {"unet", "reference"})
    )
    give = tuple(
        item if item == "." else _path(item, f"{place}: give")
        for item in _list(table["give"], f"{place}: give")
    )
    if not give:
        raise ManifestError(f"{place}: give", [], "at least one path")
    return Conversion(
        preset=_matching(table["preset"], f"{place}: preset", _NAME, "a row of conversion/presets.json"),
        give=cast("tuple[str, ...]", give),
        unet=_one_of(table["unet"], f"{place}: unet", ("auto", "none", "kv", "attn2", "full")),
        reference=_text(table["reference"], f"{place}: reference"),
    )


def _rounded(shown: str) -> tuple[int, int]:
    """The least and the most bytes that a page shows as this size: one step of the last digit either way."""
    number, unit = shown.split(" ")
    step = 10 ** -len(number.partition(".")[2])
    return max(int((float(number) - step) * UNITS[unit]), 1), int((float(number) + step) * UNITS[unit]) + 1


def _table(data: object, place: str, keys: set[str], optional: set[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ManifestError(place, type(data).__name__, "a JSON object")
    table = cast("dict[str, Any]", data)
    if set(table) - (optional or set()) != keys:
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


def _flag(data: object, place: str) -> bool:
    if not isinstance(data, bool):
        raise ManifestError(place, data, "true or false")
    return data


def _whole(data: object, place: str) -> int:
    if not isinstance(data, int) or isinstance(data, bool) or data < 0:
        raise ManifestError(place, data, "a whole number of bytes")
    return data


def is_plain(path: str) -> bool:
    """Whether a path is relative and means the same file below a folder on every system.

    Plain ASCII names with forward slashes: nothing that leads out, no drive, stream or device of Windows, no
    end that Windows drops, and no name that an unfinished download has.
    """
    parts = path.split("/")
    plain = all(_PART.fullmatch(part) and not _DEVICE.fullmatch(part) for part in parts)
    return plain and len(path) <= LONGEST_PATH and not path.lower().endswith(_UNFINISHED)


def _path(data: object, place: str) -> str:
    path = _text(data, place)
    if not is_plain(path):
        raise ManifestError(place, path[:200], "a relative path of plain names, with forward slashes")
    return path


def _one_of(data: object, place: str, allowed: tuple[str, ...]) -> str:
    text = _text(data, place)
    if text not in allowed:
        raise ManifestError(place, text, f"one of {', '.join(repr(word) for word in allowed)}")
    return text


def _matching(data: object, place: str, pattern: re.Pattern[str], expected: str) -> str:
    text = _text(data, place)
    if not pattern.fullmatch(text):
        raise ManifestError(place, text, expected)
    return text


def _optional(data: object, place: str, pattern: re.Pattern[str], expected: str) -> str:
    return "" if data == "" else _matching(data, place, pattern, expected)
