"""WebDataset shards: what lies in a tar file, found without reading its pictures, and one example of it."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...bridges.errors import BridgeError
from ..pictures import PictureError, picture_size

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXT = "json"
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = tarfile.BLOCKSIZE

Fields = Mapping[str, object]
Judge = Callable[[Fields, "tuple[int, int] | None"], "str | None"]
"""Fields of an example and size of its picture, if it is read, to why it is left out; None when it stays."""


@dataclass(frozen=True)
class Limits:
    """What a shard may ask for: files in it, bytes of one caption file and of one picture, shards in all."""

    files: int = 4_000_000
    text_bytes: int = 1 << 20
    picture_bytes: int = 64 << 20
    shards: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where an example lies: first byte and length of its picture and of its caption file, and the picture's
    (width, height) as it is looked at. Without pictures these are zeros.
    """

    picture: tuple[int, int]
    text: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Survey:
    """What a shard holds: usable examples in the order of the tar, and how many were left out, by reason."""

    places: tuple[Place, ...]
    left_out: Mapping[str, int] = field(default_factory=lambda: dict[str, int]())


def find_shards(names: Sequence[str], limits: Limits = Limits()) -> list[Path]:  # noqa: B008 (frozen)
    """The tar files that these names stand for, each once: files, folders of them, and numbered ranges.

    A range is written as WebDataset does, `cats-{000..123}.tar`. BridgeError when a name stands for nothing,
    or for something that is no file of this machine.
    """
    found: dict[Path, None] = {}
    for name in names:
        if "://" in name or name.startswith("pipe:"):
            raise _odd(
                name, "an address", "Copy the shards to this machine, or mount their folder, and name that."
            )
        for single in _spread(name, limits):
            path = Path(single)
            inside = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
            if not inside:
                raise _odd(single, "nothing", "Correct the name; compressed tars must be unpacked first.")
            found.update(dict.fromkeys(inside))
    if not 0 < len(found) <= limits.shards:
        raise _odd(" ".join(names)[:80], f"{len(found)} files", f"Name 1 to {limits.shards} tar files.")
    return list(found)


def survey(
    path: Path,
    judge: Judge,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    pictures: bool = True,
) -> Survey:
    """Read the headers, the caption files and the beginnings of the pictures of a shard.

    pictures: False where captions are all that is wanted; what else belongs to them is not looked at.

    What is damaged is left out and counted, and never raises: a header that cannot be read, after which the
    next readable one is looked for; a shard that ends early; a caption file that is no JSON object; a picture
    whose kind or size cannot be told. judge: what else is left out, and why.
    """
    left_out: Counter[str] = Counter()
    places: list[Place] = []
    try:
        with path.open("rb") as file:
            for picture, text in _pairs(file, left_out, limits):
                if text is None or (pictures and picture is None):
                    left_out["no caption file" if text is None else "no picture"] += 1
                    continue
                fields = fields_of(read(file, text))
                if fields is None:
                    left_out["damaged caption file"] += 1
                    continue
                size = None
                if pictures and picture is not None:
                    try:
                        size = picture_size(cast(BinaryIO, _Window(file, *picture)))
                    except PictureError:
                        left_out["damaged picture"] += 1
                        continue
                reason = judge(fields, size)
                if reason is None:
                    where = picture if pictures and picture is not None else (0, 0)
                    places.append(Place(where, text, size or (0, 0)))
                else:
                    left_out[reason] += 1
    except OSError:
        left_out["unreadable shard"] += 1
    return Survey(tuple(places), dict(left_out))


def read(file: BinaryIO, span: tuple[int, int]) -> bytes:
    """The bytes of one member; fewer when the file ends before."""
    file.seek(span[0])
    return file.read(span[1])


def fields_of(text: bytes) -> dict[str, object] | None:
    """The fields of a caption file (UTF-8 JSON); None when it is no JSON object."""
    try:
        value: object = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, object]", value) if isinstance(value, dict) else None


class _Window(io.RawIOBase):
    """Part of an open file as a file of its own, so that a picture's size costs only its first bytes."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        got = self._file.read(count)
        self._at += len(got)
        return got


def _pairs(
    file: BinaryIO, left_out: Counter[str], limits: Limits
) -> Iterator[tuple[tuple[int, int] | None, tuple[int, int] | None]]:
    """Spans of the picture and of the caption file of each example; neighbours with one name belong together.

    The name of an example is its path up to the first dot of the file name, as in WebDataset.
    """
    end_bytes = file.seek(0, io.SEEK_END)
    name, picture, text = None, None, None
    for member in _members(file, end_bytes, left_out, limits):
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if (folder, stem) != name:
            if picture or text:
                yield picture, text
            name, picture, text = (folder, stem), None, None
        ending, span = ending.lower(), (member.offset_data, member.size)
        most = limits.text_bytes if ending == TEXT else limits.picture_bytes
        if ending not in (TEXT, *PICTURES) or not member.isreg():
            continue
        if span[0] + span[1] > end_bytes:
            left_out["cut off"] += 1
        elif not 0 < span[1] <= most:
            left_out["empty or too large"] += 1
        elif ending == TEXT:
            text = span
        else:
            picture = span
    if picture or text:
        yield picture, text


def _members(
    file: BinaryIO, end_bytes: int, left_out: Counter[str], limits: Limits
) -> Iterator[tarfile.TarInfo]:
    """Headers of a tar in order; what lies between them and is none is passed over and counted."""
    file.seek(0)
    expected = count = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, errorlevel=0) as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members = []  # it would remember every header of a large shard
                if member.offset > expected and any(_sample(file, expected, member.offset)):
                    left_out["damaged header"] += 1
                expected = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                count += 1
                if count > limits.files:
                    left_out["beyond the limit of files"] += 1
                    return
                yield member
    except (tarfile.TarError, ValueError, EOFError, RecursionError):
        left_out["damaged shard"] += 1
        return
    if end_bytes - expected > 0 and any(_sample(file, expected, end_bytes)):
        left_out["damaged header"] += 1


def _sample(file: BinaryIO, start: int, end: int) -> bytes:
    """The first block of a gap between members, which is empty where tars were only put together."""
    file.seek(start)
    return file.read(min(_BLOCK, end - start))


def _spread(name: str, limits: Limits) -> Iterator[str]:
    """A name with every numbered range written out."""
    ranges: list[list[str]] = []
    total = 1
    for first, last in _BRACES.findall(name):
        count = int(last) - int(first) + 1
        total *= max(count, 0)
        if not 0 < total <= limits.shards:
            raise _odd(name, f"a range of {count}", f"Name 1 to {limits.shards} tar files, smallest first.")
        wide = len(first) if first.startswith("0") else 0
        ranges.append([f"{number:0{wide}d}" for number in range(int(first), int(last) + 1)])
    between = _BRACES.sub("\0", name).split("\0")
    for chosen in itertools.product(*ranges):
        yield "".join(part for pair in itertools.zip_longest(between, chosen, fillvalue="") for part in pair)


def _odd(name: str, found: str, action: str) -> BridgeError:
    return BridgeError(
        f"These shards cannot be read: {name!r}.",
        found,
        "tar files, a folder that holds some, or a range like part-{000..123}.tar",
        action,
    )
