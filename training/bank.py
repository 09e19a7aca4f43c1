"""Keeps tensors on disk by content, so that what never changes in a training is computed once.

`<name>.data` holds records of one size, one after the other, and nothing else. `<name>.index` holds a header,
and for each record its key (a SHA-256), the CRC-32 of its bytes, and a CRC-32 of the entry itself. Records
are written first and flushed to the disk, then their entries: a process that is killed anywhere leaves an
index whose entries all speak of whole records. What is torn behind them is written over by the next writer.
Any number of processes may read while one writes.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import struct
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bridges.errors import BridgeError

if TYPE_CHECKING:
    from _typeshed import StrPath

_MAGIC = b"LBBANK1\n"
_HEAD_BYTES = 256
_ENTRY = struct.Struct("<32sII")
_CHECK = struct.Struct("<32sI")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_BLOCK_BYTES = 8 << 20
_OLD_S = 3600


class Damaged(BridgeError):
    """Records whose bytes are not those that were put; their `keys` are missing until they are put again."""

    def __init__(self, name: str, keys: Sequence[str]) -> None:
        self.name = name
        self.keys = tuple(keys)
        super().__init__(
            f"The cache {name!r} is damaged.",
            f"{len(self.keys)} record(s) whose checksum is wrong",
            "the bytes that were written",
            "They are computed again. If this comes back, look after the disk, or delete the cache.",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Let the error travel between processes."""
        return type(self), (self.name, self.keys)


class Bank:
    """Tensors of one shape and dtype by key; a context manager. One thread of a process uses it at a time.

    The files lie in `folder`, which is made. BridgeError when they hold other tensors, or the disk refuses.
    """

    def __init__(self, folder: StrPath, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a bank")
        self.name = name
        self.shape = tuple(int(side) for side in shape)
        self.dtype = dtype
        self._bytes = math.prod(self.shape) * dtype.itemsize
        if self._bytes < 1:
            raise ValueError(f"records of shape {self.shape} hold nothing")
        base = Path(folder)
        self._data_path, self._index_path, self._lock_path = (
            base / f"{name}.{suffix}" for suffix in ("data", "index", "lock")
        )
        self._rows: dict[bytes, int] = {}
        self._sums: list[int] = []
        self._records: Any = None  # [rows, bytes] uint8, mapped
        self._writer: _Writer | None = None
        self._closed = False
        try:
            base.mkdir(parents=True, exist_ok=True)
            if not self._index_path.exists():
                self._create()
            self._require_header()
            self._refresh()
        except OSError as error:
            raise self._refused("opened", error) from error

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many keys are there."""
        return len(self._rows)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no record, each once, in their order."""
        wanted = list(dict.fromkeys(keys))
        if any(_raw(key) not in self._rows for key in wanted):
            self._refresh()
        return [key for key in wanted if _raw(key) not in self._rows]

    def get(self, keys: Sequence[str]) -> Tensor:
        """The records of the keys: [K, *shape] in memory of its own.

        KeyError when one was never put; `Damaged` when a checksum is wrong.
        """
        raw = [_raw(key) for key in keys]
        if any(key not in self._rows for key in raw):
            self._refresh()
        rows = [self._rows[key] for key in raw]
        if not rows:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        if self._records is None or max(rows) >= len(self._records):
            self._map()
        mapped: Any = self._records
        block: Any = mapped[rows].reshape(-1)
        view = memoryview(block)
        size, sums = self._bytes, self._sums
        bad = [
            number
            for number, row in enumerate(rows)
            if zlib.crc32(view[number * size : (number + 1) * size]) != sums[row]
        ]
        if bad:
            for number in bad:
                self._rows.pop(raw[number], None)
            raise Damaged(self.name, list(dict.fromkeys(keys[number] for number in bad)))
        return torch.frombuffer(block, dtype=self.dtype).view(len(rows), *self.shape)

    def put(self, keys: Sequence[str], records: Tensor) -> None:
        """Keep the records [K, *shape] under their keys, all or none; what is there already is left alone.

        Returns when they are on the disk. BridgeError when another process is writing, or the disk refuses;
        the bank then holds what it held.
        """
        if tuple(records.shape) != (len(keys), *self.shape) or records.dtype != self.dtype:
            raise ValueError(
                f"{len(keys)} records of {list(self.shape)} {self.dtype} expected, "
                f"{list(records.shape)} {records.dtype} given"
            )
        if self._closed:
            raise ValueError(f"the bank {self.name!r} is closed")
        try:
            writer = self._writing()
            fresh = {_raw(key): number for number, key in enumerate(keys) if _raw(key) not in self._rows}
            if not fresh:
                return
            plain: Any = (
                records.detach().to("cpu").contiguous().reshape(len(keys), -1).view(torch.uint8).numpy()
            )
            chosen: Any = plain if len(fresh) == len(keys) else plain[list(fresh.values())]
            sums = [zlib.crc32(record) for record in chosen]
            writer.append(memoryview(chosen.reshape(-1)), list(fresh), sums)
        except OSError as error:
            raise self._refused("written", error) from error
        first = len(self._sums)
        self._sums += sums
        self._rows.update({key: first + number for number, key in enumerate(fresh)})

    def close(self) -> None:
        """Let go of the files; records that were given out stay."""
        self._records = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._closed = True

    # -- files -------------------------------------------------------------------------------------

    def _header(self) -> bytes:
        facts = {"shape": list(self.shape), "dtype": str(self.dtype)[6:], "order": sys.byteorder}
        text = json.dumps(facts, sort_keys=True).encode("ascii")
        if len(text) > _HEAD_BYTES - len(_MAGIC):
            raise ValueError(f"too many sides: {self.shape}")
        return _MAGIC + text.ljust(_HEAD_BYTES - len(_MAGIC), b" ")

    def _create(self) -> None:
        # Two processes may do this at once: each renames the same content into place.
        with open(self._data_path, "ab"):
            pass
        stem = f".{self._index_path.name}."
        for left in self._index_path.parent.glob(f"{stem}*.tmp"):  # of a process that was killed here
            if time.time() - left.stat().st_mtime > _OLD_S:
                left.unlink(missing_ok=True)
        temporary = self._index_path.with_name(f"{stem}{secrets.token_hex(6)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(self._header())
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, self._index_path)  # unlike a rename, never over what another has begun
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not self._index_path.exists():
                    os.replace(temporary, self._index_path)
        finally:
            temporary.unlink(missing_ok=True)

    def _require_header(self) -> None:
        with open(self._index_path, "rb") as file:
            found = file.read(_HEAD_BYTES)
        if found != self._header():
            facts = found[len(_MAGIC) :].decode("ascii", "replace").strip()
            raise BridgeError(
                f"The cache {self.name!r} holds something else.",
                facts[:160] if found.startswith(_MAGIC) else "no cache of Language Bridge",
                self._header()[len(_MAGIC) :].decode("ascii").strip(),
                f"Delete the files {self.name}.* in the cache folder; they are computed again.",
            )

    def _refresh(self) -> None:
        """Take in what other processes have put since."""
        known = len(self._sums)
        with open(self._index_path, "rb") as file:
            file.seek(_HEAD_BYTES + known * _ENTRY.size)
            entries = file.read()
        whole = os.path.getsize(self._data_path) // self._bytes
        sums = list[int]()
        last = 0
        for key, total, check in _ENTRY.iter_unpack(entries[: len(entries) // _ENTRY.size * _ENTRY.size]):
            row = known + len(sums)
            if row >= whole:
                break
            sums.append(total)
            if check == zlib.crc32(_CHECK.pack(key, total)):
                self._rows[key] = row
                last = len(sums)
        # A damaged entry among good ones loses its own record alone; the next writer begins behind the last.
        self._sums += sums[:last]

    def _map(self) -> None:
        import numpy as np

        self._records = None
        mapped: Any = np.memmap(self._data_path, np.uint8, "r", shape=(len(self._sums), self._bytes))
        self._records = mapped.view(np.ndarray)

    def _writing(self) -> _Writer:
        if self._writer is None:
            lock = _lock(self._lock_path)
            if lock is None:
                raise BridgeError(
                    f"The cache {self.name!r} is being written by somebody else.",
                    "another training in the same cache folder",
                    "one at a time",
                    "Wait until the other one ends, or stop it.",
                )
            try:
                self._refresh()
                self._writer = _Writer(self._data_path, self._index_path, lock, self._bytes, len(self._sums))
            except BaseException:
                os.close(lock)
                raise
        return self._writer

    def _refused(self, verb: str, error: OSError) -> BridgeError:
        return BridgeError(
            f"The cache {self.name!r} could not be {verb}.",
            error.strerror or error,
            f"a folder that can be written, with room for {self._bytes} bytes a record",
            "Free some space or choose another folder; what the cache held before is whole.",
        )


class _Writer:
    """The one that appends; whoever makes it holds the lock."""

    def __init__(self, data: Path, index: Path, lock: int, record_bytes: int, count: int) -> None:
        self._lock = lock
        self._bytes = record_bytes
        self._count = count
        self._data = open(data, "r+b", buffering=0)  # noqa: SIM115 - closed by close
        try:
            self._index = open(index, "r+b", buffering=0)  # noqa: SIM115 - closed by close
        except BaseException:
            self._data.close()
            raise

    def append(self, records: memoryview, keys: Sequence[bytes], sums: Sequence[int]) -> None:
        """Write records, then their entries, each flushed to the disk; OSError leaves what was there."""
        _write(self._data, self._count * self._bytes, records)
        entries = b"".join(
            _ENTRY.pack(key, total, zlib.crc32(_CHECK.pack(key, total)))
            for key, total in zip(keys, sums, strict=True)
        )
        end = _HEAD_BYTES + self._count * _ENTRY.size
        self._index.truncate(end)  # what a killed process left behind the last whole entry
        try:
            _write(self._index, end, memoryview(entries))
        except OSError:
            self._index.truncate(end)
            raise
        self._count += len(keys)

    def close(self) -> None:
        """Close the files, and with the lock's the lock."""
        self._data.close()
        self._index.close()
        os.close(self._lock)


def _write(file: Any, start: int, data: memoryview) -> None:
    file.seek(start)
    done = 0
    while done < len(data):
        done += file.write(data[done : done + _BLOCK_BYTES])
    os.fsync(file.fileno())


def _raw(key: str) -> bytes:
    raw = bytes.fromhex(key)
    if len(raw) != 32:
        raise ValueError(f"{key!r} is no SHA-256 in hex")
    return raw


def _lock(path: Path) -> int | None:
    """Lock a file until its descriptor is closed, by us or by the death of the process; None if taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except PermissionError:  # how Windows says that it is taken
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
