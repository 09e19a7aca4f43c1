"""Finds a wanted file that lies elsewhere under another name, by size and SHA-256, and gives it its place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .download import Fetched, Wanted
from .errors import FetchError, Stopped
from .part import ENDING, Part, flush_folder
from .verify import sha256

BLOCK_BYTES = 1 << 22
MOST_FILES = 100_000
"""The most files that are looked at below one folder."""


def adopt(
    folders: Iterable[Path],
    target: Path,
    wanted: Wanted,
    *,
    stopped: Callable[[], bool] | None = None,
) -> Fetched | None:
    """The wanted file, found below one of the folders and put to its place; None when it is nowhere.

    Only a file of known hash is looked for, and only files whose size fits are read. It gets its place as a
    second name of the same file where the disk can do that, and as a copy elsewhere; the first one stays.

    Raises:
        FetchError: the disk refuses. Stopped: `stopped` said so.
    """
    if not wanted.sha256 or target.exists():
        return None
    for path in _candidates(folders, wanted):
        with contextlib.suppress(OSError):
            if sha256(path, stopped) == wanted.sha256:
                return _placed(path, target, wanted, stopped)
    return None


def _candidates(folders: Iterable[Path], wanted: Wanted) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    for folder in folders:
        if "\0" in str(folder):
            continue  # there is none, and os.walk would not say so in words
        count = 0
        for place, inner, names in os.walk(folder):
            inner.sort()
            for name in sorted(names):
                count += 1
                if count > MOST_FILES:
                    return
                path = Path(place, name)
                with contextlib.suppress(OSError):
                    facts = path.stat()
                    known = facts.st_dev, facts.st_ino
                    fits = wanted.least_bytes <= facts.st_size <= (wanted.most_bytes or facts.st_size)
                    if path.is_file() and fits and not name.endswith(ENDING) and known not in seen:
                        seen.add(known)
                        yield path


def _placed(path: Path, target: Path, wanted: Wanted, stopped: Callable[[], bool] | None) -> Fetched:
    source = f"{path.name!r:.60}, which lay there"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path.resolve(), target)
        flush_folder(target.parent)
        return Fetched(target, target.stat().st_size, wanted.sha256, source)
    except OSError:
        pass  # another disk, or one that knows no second names
    with Part(target, wanted.key) as part:
        part.restart()
        try:
            with path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    part.write(block)
                    if stopped is not None and stopped():
                        raise Stopped(f"{target.name}: while it was copied")
        except OSError as error:
            raise FetchError(
                f"{path.name} cannot be read.", error, "the file, whole", "Mend the disk, or fetch the file."
            ) from error
        if part.sha256 != wanted.sha256:
            part.restart()
            raise FetchError(
                f"{path.name} was changed while it was copied.", part.sha256, wanted.sha256, "Fetch it again."
            )
        part.finish()
        return Fetched(target, part.size, part.sha256, source)
