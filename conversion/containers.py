"""The guarded door for published weights: opens safetensors, checkpoints and model folders, and runs nothing.

What comes in was made by strangers. A pickle is looked at before it is opened: its zip directory (nothing
compressed, no sizes that do not add up), its program (followed in program.py without running it), and then
torch's weights-only loader, with the tensors left on the disk. Safetensors headers go through encoders.guard.
Nothing is followed out of a folder, and nothing but plain tensors with names comes through.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch import load as open_pickle

from ..bridges.errors import BridgeError
from ..encoders import guard
from .program import CHECKPOINT_CALLBACK, NUMBERS, OddProgram, check_program

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = (
    "vocab.txt",
    "tokenizer.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CONFIG = "config.json"

LARGEST_FILE_BYTES = 64 << 30
LARGEST_TEXT_BYTES = 64 << 20
LARGEST_CONFIG_BYTES = 1 << 20
LARGEST_PROGRAM_BYTES = 32 << 20  # data.pkl of a pickle: names and shapes, no numbers
LARGEST_DIRECTORY_BYTES = 8 << 20
MOST_SHARDS = 1000
MOST_VIEWS = 4  # tensors of a pickle may share memory, but not be this many times larger than the file

_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
_PARTS = ("text_encoder", "text_encoder_adapter", "unet", "unet_ema")
_TOKENIZER_FOLDER = "tokenizer"

_ROOT = re.compile(r"(?!\.{1,2}/)[^/\\:\0]{1,200}/")
_MEMBER = re.compile(
    _ROOT.pattern + r"(data\.pkl|data/\d{1,9}|version|byteorder|\.format_version|\.storage_alignment)"
)
_SERIALIZATION_ID = ".data/serialization_id"
_DTYPES = frozenset(cast(torch.dtype, getattr(torch, name)) for name in NUMBERS)
_AGAIN = "Fetch the file again from where it is published, and compare its size."

Fetch = Callable[[str], Tensor]


class Weights(Mapping[str, Tensor]):
    """Tensors by name that stay on the disk until they are asked for; shapes and dtypes are known at once."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], fetch: Fetch
    ) -> None:
        self.shapes = dict(shapes)
        self.dtypes = dict(dtypes)
        self._fetch = fetch

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes


@dataclass(frozen=True, eq=False)
class Part:
    """One set of published weights and what lies beside it: config.json, tokenizer files by bare name."""

    name: str
    weights: Weights
    config: Mapping[str, object] = field(default_factory=lambda: dict[str, object]())
    files: Mapping[str, bytes] = field(default_factory=lambda: dict[str, bytes]())
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """Everything that was named together: parts, and tokenizer or config files that were named alone."""

    parts: tuple[Part, ...]
    files: Mapping[str, bytes]
    config: Mapping[str, object]
    paths: tuple[Path, ...]


def open_sources(paths: list[Path]) -> Source:
    """Open files and folders that belong together; BridgeError when one is not what it should be."""
    parts: list[Part] = []
    files: dict[str, bytes] = {}
    config: dict[str, object] = {}
    alone: list[Path] = []
    for path in paths:
        with _reachable(path.name):
            _open_source(path, parts, files, config, alone)
    used = [file for part in parts for file in part.paths]
    return Source(tuple(parts), files, config, tuple(dict.fromkeys([*used, *alone])))


def _open_source(
    path: Path, parts: list[Part], files: dict[str, bytes], config: dict[str, object], alone: list[Path]
) -> None:
    """Open one file or folder, and add what it holds to the rest."""
    if path.is_dir():
        opened = _open_folder(path)
        parts += opened
        if not opened:
            found = _tokenizer_files(path, _Place(path), path.name)
            if not found:
                raise _no_weights(path, path.name)
            for name, (_, data) in found.items():
                _put(files, name, data)
            alone += [file for file, _ in found.values()]
    elif path.name == CONFIG:
        config.clear()
        config |= _read_config(_regular(path, None, LARGEST_CONFIG_BYTES, path.name), path.name)
        alone.append(path)
    elif path.name in TOKENIZER_FILES:
        _put(files, path.name, _regular(path, None, LARGEST_TEXT_BYTES, path.name).read_bytes())
        alone.append(path)
    else:
        parts.append(_open_file(path))


@contextmanager
def _reachable(name: str) -> Generator[None, None, None]:
    """Say in words what the file system makes of a path: too long, a NUL in it, a ring of links, no right."""
    try:
        yield
    except BridgeError:
        raise
    except (OSError, ValueError) as error:
        raise _refused(
            name[-120:],
            f"{type(error).__name__}: {error!s:.200}",
            "a path that can be read",
            "Check the path.",
        ) from error


def _put(files: dict[str, bytes], name: str, data: bytes) -> None:
    """Keep a file that was named alone; another one under the same name could be any tower's."""
    if files.setdefault(name, data) != data:
        raise _refused(
            name,
            "two different files of this name, named alone",
            "one",
            "Put each beside the weights that it belongs to, and name the folder of those.",
        )


def read_foreign(path: Path) -> Weights:
    """The tensors of one published file, by name; BridgeError when anything in it is odd."""
    with _reachable(path.name):
        return _read_weights(path, None, path.name)


def provenance(paths: tuple[Path, ...], between: Callable[[], None] | None = None) -> list[dict[str, object]]:
    """Name, size in bytes and SHA-256 of each file, in the order given; `between` is called at each block."""
    facts: list[dict[str, object]] = []
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                if between is not None:
                    between()
        facts.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()})
    return facts


# -- folders ------------------------------------------------------------------------------------------


class _Place:
    """A folder that nothing may lead out of. The Hub's cache links its snapshots to blobs beside them."""

    def __init__(self, folder: Path) -> None:
        self.root = _resolved(folder)
        for parent in self.root.parents:
            if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
                self.root = parent.parent

    def holds(self, path: Path) -> bool:
        return _resolved(path).is_relative_to(self.root)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # what Python says of a ring of links before 3.13
        raise OSError(str(error)) from error


def _open_folder(folder: Path) -> list[Part]:
    """The parts of a diffusers folder, or the one of a transformers folder; empty when there is no weight."""
    place = _Place(folder)
    parts: list[Part] = []
    for name in _PARTS:
        inner = folder / name
        if inner.is_dir() and (name != "unet" or not (folder / "unet_ema").is_dir()):
            if not place.holds(inner):
                raise _outside(f"{folder.name}/{name}")
            part = _open_model(inner, place, f"{folder.name}/{name}", folder / _TOKENIZER_FOLDER)
            if part is not None:
                parts.append(part)
    if parts:
        return parts
    part = _open_model(folder, place, folder.name, folder / _TOKENIZER_FOLDER)
    return [] if part is None else [part]


def _open_model(
    folder: Path, place: _Place, name: str, tokenizer: Path, chosen: Path | None = None
) -> Part | None:
    """Weights (`chosen`, or those of the folder), config and tokenizer; None when it holds no weights."""
    inside = place if chosen is None else None  # a file that was named itself may be a link
    chosen = chosen or _weights_of(folder, name)
    if chosen is None:
        return None
    if chosen.name.endswith(".index.json"):
        weights, paths = _read_shards(chosen, place, name)
    else:
        weights, paths = _read_weights(chosen, inside, f"{name}/{chosen.name}"), (chosen,)
    config: dict[str, object] = {}
    if (folder / CONFIG).exists():
        label = f"{name}/{CONFIG}"
        config = _read_config(_regular(folder / CONFIG, place, LARGEST_CONFIG_BYTES, label), label)
        paths = (*paths, folder / CONFIG)
    found = _tokenizer_files(tokenizer, place, name) if tokenizer.is_dir() else {}
    found |= _tokenizer_files(folder, place, name)
    paths = (*paths, *(path for path, _ in found.values()))
    return Part(name, weights, config, {key: data for key, (_, data) in found.items()}, paths)


def _weights_of(folder: Path, name: str) -> Path | None:
    for ending in (SAFETENSORS, f"{SAFETENSORS}.index.json", ".bin", ".bin.index.json"):
        for stem in _STEMS:
            if (folder / f"{stem}{ending}").exists():
                return folder / f"{stem}{ending}"
    rest = sorted(path for path in folder.iterdir() if path.suffix.lower() in (SAFETENSORS, *PICKLES))
    if len(rest) > 1:
        raise BridgeError(
            f"The folder {name!r} holds several weight files.",
            ", ".join(path.name for path in rest[:8]),
            "one, or one with a usual name such as model.safetensors or pytorch_model.bin",
            "Name the file that you mean instead of the folder.",
        )
    return rest[0] if rest else None


def _tokenizer_files(folder: Path, place: _Place, name: str) -> dict[str, tuple[Path, bytes]]:
    found: dict[str, tuple[Path, bytes]] = {}
    for file in TOKENIZER_FILES:
        path = folder / file
        if path.exists():
            found[file] = path, _regular(path, place, LARGEST_TEXT_BYTES, f"{name}/{file}").read_bytes()
    return found


def _open_file(path: Path) -> Part:
    """One weight file. What lies beside it counts only where its name is that of a file in a model folder."""
    usual = {f"{stem}{ending}" for stem in _STEMS for ending in (SAFETENSORS, ".bin")}
    if path.name not in usual or not path.exists():
        return Part(path.name, _read_weights(path, None, path.name), paths=(path,))
    folder = path.absolute().parent
    tokenizer = folder.parent / _TOKENIZER_FOLDER
    place = _Place(folder.parent if tokenizer.is_dir() else folder)
    part = _open_model(folder, place, folder.name, tokenizer, path)
    assert part is not None
    return part


# -- files --------------------------------------------------------------------------------------------


def _regular(path: Path, place: _Place | None, limit: int, name: str) -> Path:
    """The same path when it is an ordinary file of a sensible size, inside `place`, and no stand-in."""
    try:
        if place is not None and not place.holds(path):
            raise _outside(name)
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise _refused(name, "something that is no ordinary file", "a file", "Name a file that exists.")
        if not 0 < facts.st_size <= limit:
            raise _refused(name, f"{facts.st_size} bytes", f"1 to {limit} bytes", _AGAIN)
        with path.open("rb") as file:
            start = file.read(256)
    except (OSError, ValueError) as error:
        if isinstance(error, BridgeError):
            raise
        raise _refused(
            name, f"{type(error).__name__}: {error!s:.200}", "a readable file", "Check the path."
        ) from error
    if start.startswith(b"version https://git-lfs"):
        raise _refused(
            name,
            f"a Git LFS pointer of {facts.st_size} bytes, a stand-in for the weights",
            "the weights themselves",
            "Fetch the file with a browser or with git lfs pull.",
        )
    if re.match(rb"\s*(<!doctype|<html|<\?xml|<head|<body)", start, re.IGNORECASE):
        raise _refused(
            name,
            "a web page",
            "the file itself",
            "The download was answered by a page (login, consent, error). Open the address in a browser.",
        )
    return path


def _read_config(path: Path, name: str) -> dict[str, object]:
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors put it there
    return guard.parse_json(text, f"The file {name!r} cannot be read.")


def _read_weights(path: Path, place: _Place | None, name: str) -> Weights:
    suffix = path.suffix.lower()
    if suffix not in (SAFETENSORS, *PICKLES):
        raise _refused(
            name,
            f"a file with the ending {suffix!r}",
            f"{', '.join((SAFETENSORS, *PICKLES))}, a model folder, or a tokenizer file by its own name",
            "Name the file that holds the weights.",
        )
    _regular(path, place, LARGEST_FILE_BYTES, name)
    weights = _read_safetensors(path) if suffix == SAFETENSORS else _read_pickle(path, name)
    if not len(weights):
        raise _refused(name, "no tensors", "weights", _AGAIN)
    return weights


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    layout = guard.read_layout(path)
    held: list[Any] = []

    def fetch(name: str) -> Tensor:
        try:
            if not held:
                held.append(cast(Any, safe_open)(path, framework="pt", device="cpu"))
            return cast(Tensor, held[0].get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise _refused(path.name, f"{error!s:.200}", "a whole safetensors file", _AGAIN) from error

    names = {number: getattr(torch, word) for number, word in zip(_SAFETENSORS_DTYPES, NUMBERS, strict=True)}
    return Weights(layout.shapes, {key: names[entry.dtype] for key, entry in layout.tensors.items()}, fetch)


_SAFETENSORS_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def _read_shards(index: Path, place: _Place, name: str) -> tuple[Weights, tuple[Path, ...]]:
    label = f"{name}/{index.name}"
    fields = guard.parse_json(
        _regular(index, place, guard.LARGEST_HEADER_BYTES, label).read_bytes(),
        f"The file {label!r} is damaged.",
    )
    listed = cast("dict[str, object]", fields.get("weight_map"))
    if not isinstance(fields.get("weight_map"), dict) or not listed:
        raise _refused(label, "no weight_map", "a list of tensors and their files", _AGAIN)
    files = sorted({str(file) for file in listed.values()})
    if len(files) > MOST_SHARDS or any(not re.fullmatch(r"[\w.-]{1,200}", file) for file in files):
        raise _refused(label, f"files {files[:4]}", "plain file names in the same folder", _AGAIN)
    shards = {file: _read_weights(index.parent / file, place, f"{name}/{file}") for file in files}
    found = {key: file for file, shard in shards.items() for key in shard}
    if found != listed or len(found) != sum(len(shard) for shard in shards.values()):
        odd = sorted(key for key in {*found, *listed} if found.get(key) != listed.get(key))
        raise _refused(
            label,
            f"{len(odd)} tensors in another file than listed, missing or twice: {', '.join(odd[:4])}",
            "every tensor once, in the file that the list names",
            _AGAIN,
        )
    shapes = {key: shards[file].shapes[key] for key, file in found.items()}
    dtypes = {key: shards[file].dtypes[key] for key, file in found.items()}
    paths = (index, *(index.parent / file for file in files))
    return Weights(shapes, dtypes, lambda key: shards[found[key]][key]), paths


# -- pickles ------------------------------------------------------------------------------------------


def _read_pickle(path: Path, name: str) -> Weights:
    """Torch's zip format only: checked, then opened by the weights-only loader, the numbers on the disk."""
    _check_program(*_program_of(path, name), name)
    with _inert_callback():
        try:
            loaded: object = open_pickle(path, map_location="cpu", weights_only=True, mmap=True)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except Exception as error:
            # Torch's own text advises to switch the protection off; it must not reach anybody.
            asked = re.search(r"GLOBAL (\S+)", str(error))
            found = f"a call of {asked.group(1)}" if asked else f"{type(error).__name__} while reading"
            raise _refused(name, found, "plain tensors by name", _UNTRUSTED) from error
    state = _items(loaded)
    if state is None:
        raise _refused(name, f"a {type(loaded).__name__}", "tensors by name", _UNTRUSTED)
    inner = _items(state.get("state_dict"))
    return _plain_tensors(state if inner is None else inner, name, path.stat().st_size)


def _items(value: object) -> dict[object, object] | None:
    """A plain dict of a dict or OrderedDict, whose attributes may hide its methods, but not its class's."""
    plain: Any = dict
    return plain(plain.items(value)) if isinstance(value, dict) else None


_UNTRUSTED = "Do not open it by other means. Look for a .safetensors or diffusers version of these weights."


def _plain_tensors(state: Mapping[object, object], name: str, size_bytes: int) -> Weights:
    if len(state) > guard.MOST_TENSORS:
        raise _refused(name, f"{len(state)} tensors", f"at most {guard.MOST_TENSORS}", _UNTRUSTED)
    tensors: dict[str, Tensor] = {}
    total_bytes = 0
    for key, value in state.items():
        if not isinstance(key, str) or not guard.TENSOR_NAME.fullmatch(key):
            called = repr(key[:80]) if isinstance(key, str) else f"by a {type(key).__name__}"
            raise _refused(name, f"a tensor called {called:.80}", "plain names", _UNTRUSTED)
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise _refused(name, f"{key!r} is a {type(value).__name__}", "tensors by name", _UNTRUSTED)
        tensor = cast(Tensor, value).detach()
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in _DTYPES
        used_bytes = tensor.numel() * tensor.element_size()
        if not plain or used_bytes > tensor.untyped_storage().nbytes():
            raise _refused(
                name,
                f"{key!r}: {list(tensor.shape)} of {str(tensor.dtype)[6:]}, {used_bytes} bytes claimed",
                "ordinary tensors that are no larger than what is stored of them",
                _UNTRUSTED,
            )
        total_bytes += used_bytes
        tensors[key] = tensor
    if total_bytes > MOST_VIEWS * size_bytes:
        raise _refused(
            name, f"tensors of {total_bytes} bytes", f"not much over {size_bytes} bytes", _UNTRUSTED
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return Weights(shapes, {key: tensor.dtype for key, tensor in tensors.items()}, tensors.__getitem__)


def _program_of(path: Path, name: str) -> tuple[bytes, dict[str, int]]:
    """The pickle inside torch's zip, after a look at the directory, and the bytes of each stored record."""
    where = "an archive as torch.save writes it"
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"PK\x03\x04":
            raise _refused(
                name,
                "no zip archive (a damaged file, or the format of torch before 1.6)",
                where,
                "Fetch a newer or a .safetensors version of the same weights.",
            )
        _check_directory(file, size, name)
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_members(members, size, name)
                program = next(member for member in members if member.filename.endswith("/data.pkl"))
                if program.file_size > LARGEST_PROGRAM_BYTES:
                    raise _refused(
                        name, f"{program.file_size} bytes", f"at most {LARGEST_PROGRAM_BYTES}", _UNTRUSTED
                    )
                stored = {
                    member.filename.rpartition("/")[2]: member.file_size
                    for member in members
                    if "/data/" in member.filename
                }
                found = archive.read(program)
        except BridgeError:
            raise
        except Exception as error:  # whatever the library makes of a damaged directory
            raise _refused(name, f"{type(error).__name__}: {error!s:.120}", where, _AGAIN) from error
    _require_same(path, found, stored, name)
    return found, stored


def _require_same(path: Path, program: bytes, stored: Mapping[str, int], name: str) -> None:
    """Refuse an archive that torch's own reader sees in another way than the one it was checked with."""
    try:
        reader = cast(Any, torch)._C.PyTorchFileReader(str(path))
        same = bytes(reader.get_record("data.pkl")) == program
        records = {record for record in reader.get_all_records() if record.startswith("data/")}
        same = same and records == {f"data/{key}" for key in stored}
    except Exception as error:  # whatever the library makes of a damaged archive
        raise _refused(
            name, f"{type(error).__name__} while reading", "an archive as torch.save writes it", _AGAIN
        ) from error
    if not same:
        raise _refused(name, "an archive of two readings", "an archive as torch.save writes it", _UNTRUSTED)


def _check_program(program: bytes, stored: Mapping[str, int], name: str) -> None:
    """Refuse a pickle whose program is more than plain tensors need. Nothing is run here."""
    try:
        check_program(program, stored)
    except OddProgram as error:
        raise _refused(
            name, str(error), "plain tensors by name, as torch.save writes them", _UNTRUSTED
        ) from error


def _check_directory(file: BinaryIO, size: int, name: str) -> None:
    """Read the end of the archive ourselves: a small directory that lies right before its end mark."""
    file.seek(max(0, size - 42))
    tail = file.read(42)
    end = tail[-22:]
    if len(tail) < 42 or end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise _refused(name, "no end mark: the file is cut off", "a whole archive", _AGAIN)
    count, length, first = (int(number) for number in struct.unpack("<HII", end[10:20]))
    mark = size - 22
    if tail[:4] == b"PK\x06\x07":
        mark = int(struct.unpack("<Q", tail[8:16])[0])
        if mark + 56 != size - 42:
            raise _refused(name, "an end mark at an odd place", "a whole archive", _AGAIN)
        file.seek(mark)
        count, length, first = struct.unpack("<QQQ", file.read(56)[32:56])
    if first + length != mark or length > LARGEST_DIRECTORY_BYTES or count > guard.MOST_TENSORS + 16:
        raise _refused(
            name,
            f"a directory of {length} bytes with {count} entries",
            f"at most {LARGEST_DIRECTORY_BYTES} bytes, right before the end",
            _AGAIN,
        )


def _check_members(members: list[zipfile.ZipInfo], size: int, name: str) -> None:
    names = [member.orig_filename for member in members]  # before a NUL cuts it off
    if any("/code/" in member or member.endswith("/constants.pkl") for member in names):
        raise _refused(name, "a TorchScript program", "weights alone", _UNTRUSTED)
    odd = [
        member
        for member in names
        if not _MEMBER.fullmatch(member)
        and not (member.endswith(f"/{_SERIALIZATION_ID}") and _ROOT.match(member))
    ]
    roots = {member.split("/", 1)[0] for member in names}
    if odd or len(roots) != 1 or len(set(names)) != len(names) or f"{min(roots)}/data.pkl" not in names:
        raise _refused(
            name, f"members {(odd or names)[:4]}", "one data.pkl and numbered data, each once", _UNTRUSTED
        )
    packed = [
        member.filename
        for member in members
        if member.compress_type != zipfile.ZIP_STORED
        or member.flag_bits & 1
        or member.compress_size != member.file_size
    ]
    total = sum(member.file_size for member in members)
    if packed or total > size:
        raise _refused(
            name,
            f"{len(packed)} compressed members, {total} bytes in a file of {size}",
            "members that are stored as they are",
            _UNTRUSTED,
        )


def _inert_callback() -> Any:
    """Lets old Lightning checkpoints name a callback class: the name then means an empty class of ours."""
    module, name = CHECKPOINT_CALLBACK
    stand_in = type(name, (), {"__module__": module, "__qualname__": name})
    allow = getattr(torch.serialization, "safe_globals", None)
    return nullcontext() if allow is None else allow([stand_in])


# -- errors -------------------------------------------------------------------------------------------


def _refused(name: str, found: str, expected: str, action: str) -> BridgeError:
    return BridgeError(f"The file {name!r} cannot be used.", found, expected, action)


def _outside(name: str) -> BridgeError:
    return _refused(
        name,
        "a link that leads out of the folder",
        "files inside of the folder",
        "Put the file itself there, or name the file instead of the folder.",
    )


def _no_weights(folder: Path, name: str) -> BridgeError:
    seen = sorted(path.name for path in folder.iterdir())[:8]
    return BridgeError(
        f"The folder {name!r} holds no weights.",
        ", ".join(seen) or "nothing",
        f"a {SAFETENSORS} or {PICKLES[0]} file, or {', '.join(_PARTS)} folders",
        "Name the folder that holds the weights, or the file itself.",
    )
