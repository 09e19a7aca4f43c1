"""Remembers which files were verified on this machine, so that a file is hashed and checked once per content.

Like git's index, the ledger takes a file for the same as long as the file system says that nobody has written
to it: real path, size, times of the last change of content and of the file's record, device and inode, and
with them a hash of the file's own header. An entry is written only when these were the same before and after
the check, and when the file was at rest: a file written in the same tick of the clock as the check could be
written again without a trace.

The ledger only ever saves work. One that is missing, damaged, too large, of another version, or in a folder
that cannot be written makes every file be verified again, and is never an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from _typeshed import StrPath

FORMAT = 1
CHECKS = 1
"""Number of what "verified" means. Whoever makes a check of weights stricter counts it up."""

MOST_ENTRIES = 512
LARGEST_BYTES = 1 << 20
REST_NS = 2_000_000_000
"""A file must be this old to be remembered; no file system in use keeps times more coarsely (FAT: 2 s)."""

_HASH = re.compile(r"[0-9a-f]{64}")
_VERDICT = re.compile(r"([0-9a-f]{64})?")


@dataclass(frozen=True)
class Facts:
    """What the file system says of a file; times in nanoseconds since 1970.

    changed_ns is the last change of the file's record (ctime), which nobody can put back on POSIX systems;
    on Windows it is the time of creation.
    """

    path: str
    size_bytes: int
    modified_ns: int
    changed_ns: int
    device: int
    inode: int

    @staticmethod
    def of(path: StrPath, descriptor: int) -> Facts:
        """Facts of the open file `descriptor`, which `path` led to; OSError when there are none."""
        found = os.fstat(descriptor)
        return Facts(
            os.path.realpath(path),
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
            found.st_dev,
            found.st_ino,
        )


class Ledger:
    """A small JSON file of verdicts: a hash of facts and header -> digest of the tower inside ("" = none).

    Paths are kept only as part of that hash. Several processes may share the file: each writes all of it
    under another name and renames it, and the worst that can get lost is an entry. What was remembered
    longest ago goes first.
    """

    def __init__(self, path: StrPath, *, clock: Callable[[], int] = time.time_ns) -> None:
        self.path = Path(path)
        self._clock = clock
        self._lock = Lock()

    def at_rest(self, facts: Facts) -> bool:
        """Whether the file was last written long enough ago for its facts to tell the next write from it."""
        return self._clock() - max(facts.modified_ns, facts.changed_ns) >= REST_NS

    def recall(self, facts: Facts, header: str) -> str | None:
        """The digest that the tower in this very file was found to have, "" without a tower; else None."""
        return self._read().get(_mark(facts, header))

    def remember(self, facts: Facts, header: str, digest: str) -> None:
        """Write down that a file was verified whole; does nothing where that is not possible."""
        mark = _mark(facts, header)
        with self._lock:
            entries = self._read()
            entries.pop(mark, None)
            entries[mark] = digest
            for oldest in list(entries)[:-MOST_ENTRIES]:
                del entries[oldest]
            self._write(entries)

    def _read(self) -> dict[str, str]:
        try:
            with open(self.path, "rb") as file:
                text = file.read(LARGEST_BYTES + 1)
            value: object = json.loads(text) if len(text) <= LARGEST_BYTES else None
        except (OSError, ValueError, RecursionError):
            return {}
        fields = cast("dict[str, object]", value) if isinstance(value, dict) else {}
        known = fields.get("verified")
        if (fields.get("format"), fields.get("checks")) != (FORMAT, CHECKS) or not isinstance(known, dict):
            return {}
        return {
            mark: verdict
            for mark, verdict in cast("dict[str, object]", known).items()
            if _HASH.fullmatch(mark) and isinstance(verdict, str) and _VERDICT.fullmatch(verdict)
        }

    def _write(self, entries: dict[str, str]) -> None:
        text = json.dumps({"format": FORMAT, "checks": CHECKS, "verified": entries}, indent=0)
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(text, encoding="ascii")
                os.replace(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError:
            return  # a full or read-only disk, or (on Windows) a reader of the old file: verify again


def _mark(facts: Facts, header: str) -> str:
    return hashlib.sha256(json.dumps([*astuple(facts), header]).encode("ascii")).hexdigest()
