"""Compares files on disk with what the manifest says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import Stopped
from .schema import Manifest, WeightFile


@dataclass(frozen=True)
class Problem:
    """One file that is not what the manifest says; reads as a sentence."""

    path: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, expected {self.expected}"


def problems(root: Path, manifest: Manifest) -> Iterator[Problem]:
    """Every file of the manifest below *root* that is missing, outside, or of a wrong size or hash."""
    for entry in manifest.entries:
        for file in entry.files:
            problem = check(root, file)
            if problem is not None:
                yield problem


def check(root: Path, file: WeightFile, stopped: Callable[[], bool] | None = None) -> Problem | None:
    """What is wrong with one file, None when nothing is. Its hash is read only when its size is right.

    Raises:
        Stopped: `stopped` said so while the file was hashed.
    """
    try:
        return _check(root, file, stopped)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL; a ring of links, before Python 3.13
        return Problem(
            f"{file.path:.200}", f"{type(error).__name__}: {error!s:.200}", "a file that can be read"
        )


def _check(root: Path, file: WeightFile, stopped: Callable[[], bool] | None) -> Problem | None:
    path = (root / file.path).resolve()
    if not path.is_relative_to(root.resolve()):
        return Problem(file.path, "a link that leads out of the pack's folder", "a file in it")
    if not path.is_file():
        return Problem(file.path, "nothing", f"a file of {file.bytes} bytes")
    size = path.stat().st_size
    if size != file.bytes:
        return Problem(file.path, f"{size} bytes", f"{file.bytes} bytes")
    found = sha256(path, stopped)
    if found != file.sha256:
        return Problem(file.path, f"SHA-256 {found}", file.sha256)
    return None


def measure(root: Path, path: str) -> WeightFile:
    """The manifest's line for a file as it is on disk now."""
    return WeightFile(path, (root / path).stat().st_size, sha256(root / path))


def sha256(path: Path, stopped: Callable[[], bool] | None = None) -> str:
    """SHA-256 of a file's content in hex; Stopped when `stopped`, asked at each MiB, says so."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if stopped is not None and stopped():
                raise Stopped(f"{path.name}: while it was hashed")
    return digest.hexdigest()
