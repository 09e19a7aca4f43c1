"""The unfinished file of a download: what has arrived, what is known of it, and how it becomes the file.

Beside NAME lie NAME.part (the bytes) and NAME.part.json (the state). The state is written when so many bytes
are surely on the disk, with the hash of these bytes; what lies behind them after a crash is cut off, and what
does not have that hash is thrown away. NAME itself appears at the very end, in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import FetchError, Stopped

ENDING = ".part"
STATE_ENDING = ".part.json"
_FORMAT = 1
_LARGEST_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class State:
    """What is known of the bytes: of which file, from which source and host, the validator of that host.

    validator: strong ETag or date of Last-Modified, "" without one. linked: the SHA-256 that the source told,
    "" without one. total: size of the whole file, 0 = not told. done, sha256: of the bytes on the disk.
    """

    key: str
    source: str
    host: str
    validator: str
    linked: str
    total: int
    done: int
    sha256: str


class Part:
    """The open .part file of one target. Use it in a with statement; one process at a time."""

    def __init__(self, target: Path, key: str, stopped: Callable[[], bool] | None = None) -> None:
        """stopped: asked while old bytes are hashed; Stopped is raised when it says so, nothing is lost."""
        self.target = target
        self.path = target.with_name(target.name + ENDING)
        self.state_path = target.with_name(target.name + STATE_ENDING)
        self.state: State | None = None
        self.size = 0
        self._key = key
        self._stopped = stopped
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Part:
        """Open or begin; FetchError when another process holds it or the disk refuses."""
        with self._disk():
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_symlink() or self.state_path.is_symlink():
                raise OSError(f"{self.path.name} is a link")
            self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | _BINARY, 0o644), "r+b")
            try:
                if not _locked(self._file) or not self._is_mine():
                    raise FetchError(
                        f"{self.target.name} is being fetched already.",
                        f"another process that holds {self.path.name}",
                        "one download of a file at a time",
                        "Wait until it is done, or end it.",
                    )
                self._take_up(_read_state(self.state_path))
            except BaseException:
                self._file.close()
                self._file = None
                raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close; a part without a byte is removed."""
        if self._file is None:
            return
        if not self.size and os.name != "nt":  # while it is still held
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
                self.state_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.close()
        self._file = None

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of what has arrived."""
        return self._digest.hexdigest()

    def begin(self, state: State) -> None:
        """Say what the bytes to come are, behind those that are there."""
        self.state = replace(state, key=self._key)
        self.save()

    def restart(self) -> None:
        """Throw away what has arrived."""
        with self._disk():
            self.state_path.unlink(missing_ok=True)
            self._cut(0)
        self.state, self.size, self._digest = None, 0, hashlib.sha256()

    def write(self, block: bytes) -> None:
        """Add bytes at the end."""
        with self._disk():
            self._open.write(block)
        self._digest.update(block)
        self.size += len(block)

    def save(self) -> None:
        """Bring the bytes to the disk, then the state that vouches for them."""
        if self.state is None:
            return
        with self._disk():
            self._open.flush()
            os.fsync(self._open.fileno())
            self.state = replace(self.state, done=self.size, sha256=self.sha256)
            write_whole(self.state_path, json.dumps({"format": _FORMAT} | asdict(self.state)).encode("ascii"))

    def first_bytes(self, count: int) -> bytes:
        """The first bytes of what has arrived."""
        with self._disk():
            self._open.flush()
            self._open.seek(0)
            start = self._open.read(count)
            self._open.seek(self.size)
        return start

    def finish(self) -> None:
        """Give the file its name; the caller has checked size and hash."""
        with self._disk():
            self._open.flush()
            os.fsync(self._open.fileno())
            if os.name == "nt":  # an open file cannot be renamed there
                self._open.close()
            os.replace(self.path, self.target)
            flush_folder(self.target.parent)
            self.state_path.unlink(missing_ok=True)

    @property
    def _open(self) -> BinaryIO:
        assert self._file is not None, "outside of its with statement"
        return self._file

    def _is_mine(self) -> bool:
        """Whether the name still means the file that was opened: its last owner may have renamed it."""
        try:
            return os.path.samestat(os.fstat(self._open.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _take_up(self, state: State | None) -> None:
        length = os.fstat(self._open.fileno()).st_size
        if state is not None and state.key == self._key and 0 < state.done <= length:
            left = state.done
            while left and (block := self._open.read(min(left, 1 << 20))):
                self._digest.update(block)
                left -= len(block)
                if self._stopped is not None and self._stopped():
                    raise Stopped(f"{self.path.name}: while it was hashed")
            if not left and self.sha256 == state.sha256:
                self._cut(state.done)
                self.state, self.size = state, state.done
                return
            self._digest = hashlib.sha256()
        self.restart()

    def _cut(self, size: int) -> None:
        self._open.seek(size)
        self._open.truncate(size)

    @contextlib.contextmanager
    def _disk(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            raise FetchError(
                f"{self.target.name} cannot be written.",
                f"{type(error).__name__}: {error!s:.200}",
                f"room and the right to write in {self.target.parent}",
                "Free some space or mend the folder, and fetch again: what has arrived is kept.",
            ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file in one step; OSError when the disk refuses."""
    passing = path.with_name(f"{path.name}.new")
    with open(passing, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(passing, path)


def flush_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)


def _read_state(path: Path) -> State | None:
    """The state on the disk; None when there is none or anything in it is odd."""
    try:
        if path.stat().st_size > _LARGEST_STATE_BYTES:
            return None
        loaded: object = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(loaded, dict):
        return None
    fields = cast("dict[str, object]", loaded)
    kinds = {name: int if name in ("total", "done") else str for name in State.__dataclass_fields__}
    if fields.pop("format", None) != _FORMAT or set(fields) != set(kinds):
        return None
    if any(type(fields[name]) is not kind for name, kind in kinds.items()):
        return None
    return State(**cast("dict[str, Any]", fields))


def _locked(file: BinaryIO) -> bool:
    """Whether this process now holds the file alone; the lock goes with the file or the process."""
    try:
        if os.name == "nt":
            import msvcrt

            lock: Any = msvcrt
            file.seek(1 << 62)  # a byte far behind the data: a lock there keeps nobody from reading
            lock.locking(file.fileno(), lock.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Windows has this word for a lock of another's; elsewhere the file system knows no locks at all.
        return os.name != "nt"
    return True
