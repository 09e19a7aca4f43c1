"""The one door for weights: reads and writes safetensors files, and trusts nothing that it has not checked.

The safetensors library lets some odd files through and spends a gigabyte on a header full of empty tensors,
so the header is read here first, under our own limits. Files are written to a temporary name, flushed to the
disk and then renamed, because older versions of the library leave torn files when the process dies.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..bridges.errors import BridgeError

if TYPE_CHECKING:
    from _typeshed import StrPath

LARGEST_HEADER_BYTES = 8 << 20
MOST_TENSORS = 20_000
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}")
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
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header announces it: dtype as safetensors names it, shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What a safetensors header says, checked: the metadata and the tensors by name."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name."""
        return {name: entry.shape for name, entry in self.tensors.items()}


def read_layout(path: StrPath) -> Layout:
    """Read and check the header alone; BridgeError when the file is not a whole safetensors file."""
    where = f"The file {Path(path).name!r} is damaged or is not a safetensors file."
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            limit = min(LARGEST_HEADER_BYTES, size_bytes - 8)
            if not 2 <= length <= limit:
                raise BridgeError(where, f"a header of {length} bytes", f"2 to {limit} bytes", _AGAIN)
            header = file.read(length)
    except OSError as error:
        raise BridgeError(
            f"The file {Path(path).name!r} cannot be opened.", error, "a readable file", "Check its path."
        ) from error
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
        checked = _tensor_entry(name, entry, payload_bytes)
        if checked is None:
            raise BridgeError(
                where, f"tensor {name!r:.80}: {entry!r:.120}", "dtype, shape and offsets that agree", _AGAIN
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
    return Layout(cast("dict[str, str]", metadata), tensors)


def _tensor_entry(name: str, entry: object, payload_bytes: int) -> tuple[TensorEntry, tuple[int, int]] | None:
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
    return TensorEntry(dtype, shape), (first, last)


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(cast("list[object]", value)) > 8:
        return None
    numbers: list[int] = []
    for number in cast("list[object]", value):
        if type(number) is not int or not 0 <= number < 1 << 48:
            return None
        numbers.append(number)
    return tuple(numbers)


def read_tensors(path: StrPath, layout: Layout) -> dict[str, Tensor]:
    """Read every tensor of a checked file to the CPU; BridgeError when one holds NaN or infinity."""
    from safetensors import SafetensorError, safe_open

    where = f"The file {Path(path).name!r} is damaged."
    tensors: dict[str, Tensor] = {}
    try:
        with cast(Any, safe_open)(path, framework="pt", device="cpu") as file:
            for name in layout.tensors:
                tensors[name] = cast(Tensor, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise BridgeError(where, error, "a whole safetensors file", _AGAIN) from error
    require_finite(tensors, where)
    return tensors


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise BridgeError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _all_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise BridgeError(
                what,
                f"{count} of {tensor.numel()} numbers in {name!r} are not finite ({str(tensor.dtype)[6:]})",
                "finite numbers only",
                "The training went astray, the file is damaged, or the dtype is too small for these weights.",
            )


def _all_finite(tensor: Tensor) -> bool:
    # NaN and infinity show in the extremes, which cost far less to find than a verdict on every number.
    tensor = tensor.to(wide(tensor.dtype) or tensor.dtype)  # extremes of 8-bit numbers are not to be had
    return not tensor.numel() or all(math.isfinite(float(end)) for end in tensor.aminmax())


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
    module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, dtype: torch.dtype | None, owner: str
) -> None:
    """Load the tensors under `prefix` into `module` in `dtype` (None = float32); BridgeError when one is odd.

    With a dtype of 8 bits each weight takes the dtype that its layer was made in. Call `require_shapes`
    first. The cast happens here because host layers may adopt tensors as they come.
    """
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise BridgeError(
                f"The weights of the {owner} are of an odd type.",
                f"{name!r} of {str(tensor.dtype)[6:]}",
                "float16, bfloat16, float32 or float64",
                _AGAIN,
            )
    made = cast("dict[str, Tensor]", module.state_dict()) if wide(dtype) != dtype else {}
    weights = {
        name: tensor.to(made[name[len(prefix) :]].dtype if made else dtype or torch.float32)
        for name, tensor in found.items()
    }
    # What `read_tensors` has checked can only leave the range when it becomes smaller.
    narrowed = {name: value for name, value in weights.items() if value.dtype != found[name].dtype}
    require_finite(narrowed, f"The weights of the {owner} cannot be used.")
    module.load_state_dict({name[len(prefix) :]: tensor for name, tensor in weights.items()}, strict=True)
    empty = [key for key, value in cast("dict[str, Tensor]", module.state_dict()).items() if value.is_meta]
    assert not empty, empty


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
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                file.write(_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise BridgeError(
            f"The file {target.name!r} could not be written.",
            error,
            "a writable folder with enough free space",
            "Free some space or choose another folder; the old file, if any, is untouched.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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
        total.update(f"{name}\0{_NAMES[tensor.dtype]}\0{list(tensor.shape)}\0".encode("ascii"))
        total.update(_view(tensor))
    return total.hexdigest()


def parse_json(text: bytes | str, what: str) -> dict[str, object]:
    """Read one JSON object; BridgeError(`what`, ...) on anything else, on NaN and on a name given twice."""
    try:
        value: object = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BridgeError(what, f"{type(error).__name__}: {error!s:.200}", "a JSON header", _AGAIN) from error
    if not isinstance(value, dict):
        raise BridgeError(what, type(value).__name__, "a JSON object", _AGAIN)
    return cast("dict[str, object]", value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


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
