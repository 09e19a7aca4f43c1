"""The lock file: which published files were fetched, with which hash, and what was made of them.

A file whose hash the manifest does not know is trusted the first time that it is fetched. Its hash is written
down here, and from then on another content under that name is refused, wherever it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from .errors import FetchError
from .part import write_whole
from .schema import DOWNLOADS, is_plain

NAME = "lock.json"
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One fetched file: what it is (`key`), size, SHA-256, the source.

    pinned: the manifest knew the hash. told: the source told the same hash before the file came.
    """

    key: str
    bytes: int
    sha256: str
    source: str
    pinned: bool
    told: bool


@dataclass(frozen=True)
class Made:
    """One file that was converted: its path below the models folder, size, SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Lock:
    """Records by place below the models folder, and what was made by the name of the set."""

    files: Mapping[str, Record] = field(default_factory=lambda: dict[str, Record]())
    made: Mapping[str, tuple[Made, ...]] = field(default_factory=lambda: dict[str, tuple[Made, ...]]())

    def with_file(self, place: str, record: Record) -> Lock:
        """The same with one record more."""
        return Lock({**self.files, place: record}, self.made)

    def with_made(self, name: str, made: tuple[Made, ...]) -> Lock:
        """The same with what was made of a set."""
        return Lock(self.files, {**self.made, name: made})


def lock_path(models: Path) -> Path:
    """Where the lock file lies."""
    return models / DOWNLOADS / NAME


def read_lock(models: Path) -> Lock:
    """The lock file of a models folder, empty where there is none.

    Raises:
        FetchError: it is there and damaged; then nothing may be trusted for the first time.
    """
    path = lock_path(models)
    try:
        loaded: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Lock()
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error!s:.120}") from error
    try:
        top = _table(loaded, {"format", "files", "made"})
        if top["format"] != FORMAT:
            raise ValueError(f"format {top['format']!r:.20}")
        files = {place: Record(**_values(item, Record)) for place, item in _names(top["files"]).items()}
        made = {
            name: tuple(Made(**_values(item, Made)) for item in cast("list[object]", items))
            for name, items in _names(top["made"]).items()
        }
        for place in [*files, *(item.path for items in made.values() for item in items)]:
            if not is_plain(place):
                raise ValueError(f"the path {place!r:.120}")
    except (ValueError, TypeError) as error:
        raise _damaged(path, error) from error
    return Lock(files, made)


def write_lock(models: Path, lock: Lock) -> None:
    """Write the lock file in one step.

    Raises:
        FetchError: the disk refuses.
    """
    path = lock_path(models)
    data = {
        "format": FORMAT,
        "files": {place: asdict(lock.files[place]) for place in sorted(lock.files)},
        "made": {name: [asdict(made) for made in lock.made[name]] for name in sorted(lock.made)},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(data, indent=2, ensure_ascii=True) + "\n").encode("ascii"))
    except OSError as error:
        raise FetchError(
            "The lock file cannot be written.",
            f"{type(error).__name__}: {error!s:.200}",
            f"room and the right to write in {path.parent}",
            "Free some space or mend the folder, and fetch again.",
        ) from error


def _values(data: object, kind: type[Any]) -> dict[str, Any]:
    """The fields of a Record or Made, each of its type; ValueError on anything else."""
    types: Mapping[str, str] = {name: f.type for name, f in kind.__dataclass_fields__.items()}
    table = _table(data, set(types))
    for name, value in table.items():
        if type(value).__name__ != types[name]:
            raise ValueError(f"{name} = {value!r:.60}")
    return table


def _names(data: object) -> dict[str, object]:
    if not isinstance(data, dict):
        raise ValueError(f"{type(data).__name__} instead of names")
    return cast("dict[str, object]", data)


def _table(data: object, keys: set[str]) -> dict[str, Any]:
    table = _names(data)
    if set(table) != keys:
        raise ValueError(f"the fields {sorted(table)!s:.120}")
    return table


def _damaged(path: Path, found: object) -> FetchError:
    return FetchError(
        "The lock file is damaged, so what was trusted before is not known.",
        f"{found!s:.200}, {path}",
        "the file as Language Bridge wrote it",
        "Restore it from a backup, or delete it to trust unverified files anew.",
    )
