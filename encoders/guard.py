"""The one door for weights: reads and writes safetensors files, and trusts nothing that it has not checked.

The safetensors library lets some odd files through, spends a gigabyte on a header full of empty tensors, and
maps files into memory, where they may change after they were checked. So header and tensors are read here,
under our own limits, and each tensor is checked in the memory that it is used from. Files are written to a
temporary name, flushed to the disk and then renamed, so that none is torn when the process dies.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import mmap
import os
import re
import reprlib
import secrets
import stat
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from ..bridges.errors import BridgeError
from .ledger import Facts, Ledger

if TYPE_CHECKING:
    from _typeshed import StrPath

LARGEST_HEADER_BYTES = 8 << 20
MOST_TENSORS = 20_000
MOST_LISTS = 500_000
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}")
LEAST_ROOM_BYTES = 8 << 20
_OWN = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
TEMPORARY_SUFFIX = ".language-bridge.tmp"

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_AGAIN = "Fetch or save the file again."

Kind = TypeVar("Kind")
Built = TypeVar("Built")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header announces it: dtype as safetensors names it, shape, first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Layout:
    """What a safetensors header says, checked: metadata, tensors by name, and the header's own SHA-256."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    digest: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name."""
        return {name: entry.shape for name, entry in self.tensors.items()}


def read_layout(path: StrPath) -> Layout:
    """Read and check the header alone; BridgeError when the file is not a whole safetensors file."""
    with _opened(path) as file:
        return _layout(file, Path(path).name)


@contextmanager
def _opened(path: StrPath) -> Generator[io.FileIO, None, None]:
    name = Path(path).name
    try:
        file = io.FileIO(os.fspath(path), opener=_without_waiting)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BridgeError(
            f"The file {name[-120:]!r} cannot be opened.", error, "a readable file", "Check its path."
        ) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BridgeError(
                f"The file {name[-120:]!r} cannot be opened.",
                "a pipe, a device or something else that is no ordinary file",
                "a file",
                "Check its path.",
            )
        yield file


def read_small(path: StrPath, most_bytes: int) -> bytes:
    """All of an ordinary file of at most so many bytes; BridgeError when it is larger or something else."""
    with _opened(path) as file:
        try:
            data = file.read(most_bytes + 1)
        except OSError as error:
            raise BridgeError(
                f"The file {Path(path).name!r} cannot be read.", error, "a readable file", "Check its path."
            ) from error
    if len(data) > most_bytes:
        raise BridgeError(
            f"The file {Path(path).name!r} is too large.",
            f"more than {most_bytes} bytes",
            f"at most {most_bytes} bytes",
            "Choose the file that is meant.",
        )
    return data


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe at once, too, although nobody writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)


def _layout(file: io.FileIO, name: str) -> Layout:
    where = f"The file {name!r} is damaged or is not a safetensors file."
    try:
        size_bytes = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        limit = min(LARGEST_HEADER_BYTES, size_bytes - 8)
        if not 2 <= length <= limit:
            raise BridgeError(where, f"a header of {length} bytes", f"2 to {limit} bytes", _AGAIN)
        header = file.read(length)
        if len(header) != length:
            raise BridgeError(where, f"{len(header)} bytes of header", f"{length} bytes", _AGAIN)
    except OSError as error:
        raise BridgeError(where, error, "a whole safetensors file", _AGAIN) from error
    lists = header.count(b"[") + header.count(b"{")
    if lists > MOST_LISTS:  # they would cost far more than their bytes
        raise BridgeError(where, f"a header with {lists} lists", f"at most {MOST_LISTS}", _AGAIN)
    fields = parse_json(header, where)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in cast("dict[str, object]", metadata).values()
    ):
        raise BridgeError(where, "metadata that is not text", "names with texts", _AGAIN)
    if len(fields) > MOST_TENSORS:
        raise BridgeError(where, f"{len(fields)} tensors", f"at most {MOST_TENSORS}", _AGAIN)
    payload_bytes = size_bytes - 8 - length
    tensors: dict[str, TensorEntry] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in fields.items():
        checked = _tensor_entry(name, entry, 8 + length, payload_bytes)
        if checked is None:
            raise BridgeError(
                where,
                f"tensor {name!r:.80}: {reprlib.repr(entry):.160}",
                "dtype, shape and offsets that agree",
                _AGAIN,
            )
        tensors[name] = checked[0]
        spans.append(checked[1])
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise BridgeError(where, f"a hole or overlap at byte {first}", f"data from byte {end}", _AGAIN)
        end = last
    if end != payload_bytes:
        raise BridgeError(where, f"{payload_bytes} bytes of data", f"{end} bytes of data", _AGAIN)
    return Layout(cast("dict[str, str]", metadata), tensors, hashlib.sha256(start + header).hexdigest())


def _tensor_entry(
    name: str, entry: object, base: int, payload_bytes: int
) -> tuple[TensorEntry, tuple[int, int]] | None:
    if not TENSOR_NAME.fullmatch(name) or not isinstance(entry, dict):
        return None
    fields = cast("dict[str, object]", entry)
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        return None
    shape, offsets = _whole_numbers(fields["shape"]), _whole_numbers(fields["data_offsets"])
    dtype = fields["dtype"]
    if shape is None or offsets is None or len(offsets) != 2 or not isinstance(dtype, str):
        return None
    first, last = offsets
    if dtype not in _DTYPES or not first <= last <= payload_bytes:
        return None
    if math.prod(shape) * _DTYPES[dtype].itemsize != last - first:
        return None
    return TensorEntry(dtype, shape, base + first), (first, last)


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(cast("list[object]", value)) > 8:
        return None
    numbers: list[int] = []
    for number in cast("list[object]", value):
        if type(number) is not int or not 0 <= number < 1 << 48:
            return None
        numbers.append(number)
    return tuple(numbers)


class Changed(Exception):
    """A file that the ledger knows was written to while it was being read, so nothing vouches for it."""


class Weights(Mapping[str, Tensor]):
    """The tensors of one open file, each read when it is asked for, into CPU memory of its own.

    A tensor with NaN or infinity is a BridgeError, unless `known` says that this file was verified before.
    """

    layout: Layout
    known: str | None
    """The digest that the tower in this file was found to have, "" without a tower; None: not verified."""

    def __init__(self, file: io.FileIO, path: StrPath, ledger: Ledger | None) -> None:
        self._file = file
        self._path = path
        self._where = f"The file {Path(path).name!r} is damaged."
        self._ledger = ledger
        self._facts = self._now()
        self._at_rest = ledger is not None and ledger.at_rest(self._facts)
        self._checked: set[str] = set()
        self.layout = _layout(file, Path(path).name)
        self.known = None if ledger is None else ledger.recall(self._facts, self.layout.digest)

    def __len__(self) -> int:
        return len(self.layout.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.layout.tensors

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor from the file; KeyError when there is none of that name."""
        entry = self.layout.tensors[name]
        return self.read(name, torch.empty(entry.shape, dtype=_DTYPES[entry.dtype]))

    def read(self, name: str, tensor: Tensor) -> Tensor:
        """Read one tensor into `tensor`, which has its size and dtype and lies in one piece on the CPU."""
        memory, done = _view(tensor), 0
        try:
            self._file.seek(self.layout.tensors[name].first)
            while done < memory.nbytes and (count := self._file.readinto(memory[done:])):
                done += count
        except OSError as error:
            raise BridgeError(self._where, error, "a whole safetensors file", _AGAIN) from error
        if done != memory.nbytes:
            raise BridgeError(self._where, f"{done} bytes in {name!r}", f"{memory.nbytes} bytes", _AGAIN)
        if self.known is None:
            require_finite({name: tensor}, self._where)
            self._checked.add(name)
        return tensor

    def bytes_of(self, name: str) -> int:
        """How many bytes one tensor takes."""
        entry = self.layout.tensors[name]
        return math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize

    def into(self, buffer: Tensor, name: str) -> Tensor:
        """Read one tensor into the beginning of `buffer` (bytes), where it lies until the next one comes."""
        entry = self.layout.tensors[name]
        return self.read(name, buffer[: self.bytes_of(name)].view(_DTYPES[entry.dtype]).view(entry.shape))

    def settle(self, digest: str = "") -> None:
        """Say that all checks are passed, the last thing before the file is closed.

        digest: what the tower inside was found to have. A file that was verified whole is remembered;
        `Changed` when the file was taken on trust and is not the same any more.
        """
        same = self._now() == self._facts
        if self.known is not None:
            if not same:
                raise Changed
        elif self._ledger and self._at_rest and same and self._checked == set(self.layout.tensors):
            self._ledger.remember(self._facts, self.layout.digest, digest)

    def _now(self) -> Facts:
        try:
            return Facts.of(self._path, self._file.fileno())
        except OSError as error:
            raise BridgeError(self._where, error, "a readable file", _AGAIN) from error


@contextmanager
def open_weights(path: StrPath, ledger: Ledger | None = None) -> Generator[Weights, None, None]:
    """Open a file whose header is checked, its tensors still to be read; BridgeError when it is damaged.

    Without a ledger everything is verified.
    """
    with _opened(path) as file:
        yield Weights(file, path, ledger)


def read_weights(path: StrPath, ledger: Ledger | None, build: Callable[[Weights], Built]) -> Built:
    """What `build` makes of a file; made again, verifying in full, when the file changes in the meantime."""
    try:
        with open_weights(path, ledger) as weights:
            return build(weights)
    except Changed:
        with open_weights(path) as weights:
            return build(weights)


def read_tensors(path: StrPath, layout: Layout) -> dict[str, Tensor]:
    """Read every tensor of a checked file to the CPU; BridgeError when one holds NaN or infinity."""
    with open_weights(path) as weights:
        if weights.layout != layout:
            raise BridgeError(
                f"The file {Path(path).name!r} was changed while it was being read.",
                f"header {weights.layout.digest}",
                f"header {layout.digest}",
                "Try again.",
            )
        return dict(weights)


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise BridgeError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _all_finite(tensor):
            count = int((~torch.isfinite(tensor.to(wide(tensor.dtype)))).sum())
            raise BridgeError(
                what,
                f"{count} of {tensor.numel()} numbers in {name!r} are not finite ({str(tensor.dtype)[6:]})",
                "finite numbers only",
                "The training went astray, the file is damaged, or the dtype is too small for these weights.",
            )


def _all_finite(tensor: Tensor) -> bool:
    # NaN and infinity never leave a sum again, and show in the extremes; both cost far less than a verdict on
    # every number. A sum of finite numbers may itself leave the range, so it can only acquit.
    tensor = tensor.to(wide(tensor.dtype) or tensor.dtype)  # neither is to be had of 8-bit numbers
    if not tensor.numel() or math.isfinite(float(tensor.sum())):
        return True
    return all(math.isfinite(float(end)) for end in tensor.aminmax())


def require_shapes(expected: Shapes, found: Shapes, owner: str) -> None:
    """Raise BridgeError listing what is missing, surplus or wrong-shaped."""
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    wrong = sorted(name for name in set(expected) & set(found) if expected[name] != found[name])
    if not missing and not surplus and not wrong:
        return
    raise BridgeError(
        f"The tensors of the {owner} are not the ones that its header announces.",
        "; ".join(
            f"{noun}: {_few(parts)}"
            for noun, parts in (
                ("missing", missing),
                ("surplus", [f"{name} {list(found[name])}" for name in surplus]),
                ("wrong-shaped", [f"{name} {list(found[name])}" for name in wrong]),
            )
            if parts
        ),
        f"{len(expected)} tensors"
        + (f", {_few([f'{name} {list(expected[name])}' for name in wrong or missing])}" if expected else ""),
        "The file is incomplete or its header is wrong. Fetch it again, or save it again from training.",
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's weights by key."""
    return {key: tuple(value.shape) for key, value in cast("dict[str, Tensor]", module.state_dict()).items()}


def wide(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to compute in: `dtype`, or float16 where that has 8 bits, which serve to store alone."""
    return torch.float16 if dtype is not None and dtype.itemsize == 1 else dtype


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    prefix: str,
    dtype: torch.dtype | None,
    owner: str,
    *,
    device: torch.device | str | None = None,
    seen: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Give `module` the tensors under `prefix` in `dtype` (None = float32); BridgeError when one is odd.

    Call `require_shapes` first. Tensors are taken one after the other in the order of their names, `seen` is
    told of each as it came, and the module never shares memory with `tensors`. A weight that the module has
    already made keeps the dtype and the device that it was made with; on the meta device it goes to `device`.
    """
    made = cast("dict[str, Tensor]", module.state_dict())
    names = sorted(name for name in tensors if name.startswith(prefix))
    file = tensors if isinstance(tensors, Weights) else None
    targets: dict[str, torch.dtype] = {}
    for name in names:
        stored_as = tensors[name].dtype if file is None else _DTYPES[file.layout.tensors[name].dtype]
        if not stored_as.is_floating_point:
            raise BridgeError(
                f"The weights of the {owner} are of an odd type.",
                f"{name!r} of {str(stored_as)[6:]}",
                "float16, bfloat16, float32 or float64",
                _AGAIN,
            )
        own = made.get(name[len(prefix) :])
        targets[name] = _unmade_dtype(module, name[len(prefix) :], dtype) if own is None else own.dtype
    entries = {} if file is None else {name: file.layout.tensors[name] for name in names}
    entries = {name: entry for name, entry in entries.items() if _DTYPES[entry.dtype] == targets[name]}
    room = _Room(entries.values())
    cast_bytes = [] if file is None else [file.bytes_of(name) for name in names if name not in entries]
    # One buffer for all that is cast, unless somebody looks at a tensor after the next one has come.
    buffer = None if seen is not None else torch.empty(max(cast_bytes, default=0), dtype=torch.uint8)
    weights: dict[str, Tensor] = {}
    for name in names:
        key, target = name[len(prefix) :], targets[name]
        if file is not None and name in entries:
            weight = tensor = file.read(name, room.take(entries[name]))
        else:
            tensor = tensors[name] if file is None or buffer is None else file.into(buffer, name)
            weight = tensor.to("cpu", target, copy=True)
        if seen is not None:
            seen(name, tensor)
        # What is finite in the file can only leave the range when the range becomes smaller.
        if torch.finfo(target).max < torch.finfo(tensor.dtype).max:
            require_finite({name: weight}, f"The weights of the {owner} cannot be used.")
        own = made.get(key)
        weights[key] = weight.to(device or "cpu" if own is None or own.is_meta else own.device)
    module.load_state_dict(weights, strict=True, assign=True)
    empty = [key for key, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    assert not empty, empty


class _Room:
    """Memory for tensors of a file: one mapping, each as far from the start of a page as it is in the file.

    A page of the file then fills one page of memory; where it straddles two, the system copies a fifth more
    slowly. Tensors share no page, because the host pins weights by the page. The mapping goes when the last
    of them goes; few weights have none.
    """

    def __init__(self, entries: Iterable[TensorEntry]) -> None:
        size_bytes = sum(self._pages(entry) for entry in entries)
        self._memory = mmap.mmap(-1, size_bytes, **_OWN) if _OWN and size_bytes >= LEAST_ROOM_BYTES else None
        self._end = 0

    @staticmethod
    def _pages(entry: TensorEntry) -> int:
        whole = entry.first % mmap.PAGESIZE + math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize
        return -(-whole // mmap.PAGESIZE) * mmap.PAGESIZE

    def take(self, entry: TensorEntry) -> Tensor:
        """A tensor whose numbers are yet to be read."""
        dtype, begin = _DTYPES[entry.dtype], self._end + entry.first % mmap.PAGESIZE
        count = math.prod(entry.shape) * dtype.itemsize
        if self._memory is None or not count or begin % dtype.itemsize:
            return torch.empty(entry.shape, dtype=dtype)
        self._end += self._pages(entry)
        memory = torch.frombuffer(self._memory, dtype=torch.uint8, count=count, offset=begin)
        return memory.view(dtype).view(entry.shape)


def _unmade_dtype(module: nn.Module, key: str, dtype: torch.dtype | None) -> torch.dtype:
    # Layers of the host may come without weights until they are filled. Only linear ones are kept in 8 bits.
    linear = isinstance(module.get_submodule(key.rpartition(".")[0]), nn.Linear)
    return (dtype if linear else wide(dtype)) or torch.float32


def stored(module: nn.Module, prefix: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights of `module` as they go into a file: on the CPU, in `dtype` (None = as they are)."""
    state = cast("dict[str, Tensor]", module.state_dict())
    return {
        prefix + key: value.detach().to("cpu", dtype or value.dtype).contiguous()
        for key, value in state.items()
    }


def write(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one piece or not at all; the same input gives the same bytes.

    BridgeError when a number is not finite or the disk refuses.
    """
    target = Path(path)
    require_finite(tensors, f"The file {target.name!r} was not written.")
    # Widest first keeps every tensor aligned, as the format's own writer does.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        first, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    write_whole(target, chain((start,), (_bytes(tensors[name]) for name in order)))


def write_whole(path: StrPath, pieces: Iterable[bytes]) -> None:
    """Write a file in one piece or not at all; BridgeError when the disk refuses."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        flush_folder(target.parent)
    except OSError as error:
        raise BridgeError(
            f"The file {target.name!r} could not be written.",
            error,
            "a writable folder with enough free space",
            "Free some space or choose another folder; the old file, if any, is untouched.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network folders have no such call
            raise
    finally:
        os.close(descriptor)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(_view(tensor))


def _view(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of each tensor, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _hash(total.update, name, tensor)
    return total.hexdigest()


def _hash(update: Callable[[bytes | memoryview], None], name: str, tensor: Tensor) -> None:
    update(f"{name}\0{_NAMES[tensor.dtype]}\0{list(tensor.shape)}\0".encode("ascii"))
    update(_view(tensor))


class Hasher:
    """Takes the `digest` of tensors that come one by one, in a thread beside the reading of the next one.

    At most two wait, so that hashing never holds a whole file in memory. A context manager.
    """

    def __init__(self) -> None:
        self._total = hashlib.sha256()
        self._last = ""
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *reason: object) -> None:
        self._thread.shutdown()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor, which must not change from now on; names come in their order."""
        assert name > self._last, (name, self._last)
        self._last = name
        while len(self._waiting) > 1:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(_hash, self._total.update, name, tensor))

    def hexdigest(self) -> str:
        """The digest of all that came."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._total.hexdigest()


def parse_json(text: bytes | str, what: str) -> dict[str, object]:
    """Read one JSON object; BridgeError(`what`, ...) on anything else, on NaN and on a name given twice.

    Bytes are UTF-8 without a byte order mark, and nothing else, as in safetensors files.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value: object = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique
        )
        if "\\ud" in text.lower():
            # Halves of a letter: json takes them, but nothing could print, hash or send them.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BridgeError(what, f"{type(error).__name__}: {error!s:.200}", "a JSON header", _AGAIN) from error
    if not isinstance(value, dict):
        raise BridgeError(what, type(value).__name__, "a JSON object", _AGAIN)
    return cast("dict[str, object]", value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number:.40} is too large a number")
    return float(number)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def parse_header(text: str, newest: int, owner: str) -> dict[str, object]:
    """Read the JSON that says what a file is; BridgeError on a format number that is not 1 to `newest`."""
    fields = parse_json(text, f"The header of the {owner} is damaged.")
    number = fields.get("format")
    if type(number) is not int or not 1 <= number <= newest:
        raise BridgeError(
            f"The {owner} is in a format that this version does not know.",
            f"format {number!r:.40}",
            f"format 1 to {newest}",
            "Update Language Bridge." if type(number) is int and number > newest else _AGAIN,
        )
    return fields


def field(fields: Mapping[str, object], name: str, kind: type[Kind], owner: str) -> Kind:
    """Take one field of a header; BridgeError when it is missing or of another type."""
    value = fields.get(name)
    if type(value) is not kind:
        raise BridgeError(
            f"The header of the {owner} is damaged.",
            f"{name} = {value!r:.80}" if name in fields else f"no field {name!r}",
            f"{name} of type {kind.__name__}",
            _AGAIN,
        )
    return value


def record(fields: Mapping[str, object], name: str, owner: str) -> dict[str, object]:
    """Take one field that is a JSON object; BridgeError when it is something else."""
    return cast("dict[str, object]", field(fields, name, dict, owner))


def texts(fields: Mapping[str, object], name: str, owner: str) -> tuple[str, ...]:
    """Take one field that is a list of texts; BridgeError when it is something else."""
    values = cast("list[object]", field(fields, name, list, owner))
    return tuple(field({name: value}, name, str, owner) for value in values)


def one_of(value: str, allowed: tuple[str, ...], name: str, owner: str) -> str:
    """Return `value` when it is allowed, or raise BridgeError."""
    if value not in allowed:
        raise BridgeError(
            f"The {owner} has an unknown {name}.",
            repr(value)[:80],
            f"one of {', '.join(allowed)}",
            "Update Language Bridge, or use a file made for this version.",
        )
    return value
