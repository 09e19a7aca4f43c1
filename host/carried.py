"""Finds out which LoRA files a MODEL or CLIP carries, by comparing the patches themselves with the files.

No loader writes down which file a patch came from, but every one ends in `add_patches`, with the file's own
tensors. So what is remembered of a load is the names that the host took from the file and a few numbers of a
few tensors (a `Load`, which holds no tensor alive), and a file is that LoRA when it has these names, shapes
and numbers. Files are told apart by size first, so that a folder of a thousand is one glance at each.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import logging
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import folder_paths
import torch
from torch import Tensor

from ..encoders import guard

FOLDER = "loras"
SUFFIX = ".safetensors"
PROBES = 4
"""Tensors of a LoRA that are compared with a file; two epochs of one training differ in any of them."""
_NUMBERS = 16
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SLACK_BYTES = 64


@dataclass(frozen=True)
class Probe:
    """A tensor's shape, dtype, and the bytes of its first and middle rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    first: bytes
    middle: bytes

    @property
    def kind(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype as a header names them."""
        return self.shape, _DTYPES.get(self.dtype, "")


@dataclass(frozen=True, eq=False)
class Load:
    """One LoRA as a loader handed it to the host.

    names: tensors of the file that the host could use (the host's own set object, which tells two loads
    apart; empty where the host does not say); payload: bytes of its tensors; strength: of the first patch.
    """

    names: AbstractSet[str]
    payload: int
    probes: tuple[Probe, ...]
    strength: float
    digest: str


@dataclass(frozen=True)
class Facts:
    """A file of the LoRA folders: its name there, where it is, and what changes when its content does."""

    name: str
    path: str
    size: int
    modified: int

    @property
    def layout(self) -> guard.Layout:
        """Its header; BridgeError when it is damaged."""
        return _layout(self.path, self.size, self.modified)


def loads(patches: Mapping[Any, Any], strength: float = 1.0) -> tuple[Load, ...]:
    """The LoRAs among what a loader gives to `add_patches`; never raises."""
    try:
        return tuple(map(_load, groups((strength, patch) for patch in patches.values())))
    except Exception as error:
        _log_once(f"passes over patches that it cannot read: {error}")
        return ()


def together(known: Sequence[Load], new: Iterable[Load]) -> tuple[Load, ...]:
    """Both, each LoRA once: some loaders hand the blocks of one LoRA over one by one."""
    found = list(known)
    for load in new:
        if not any(
            load.names is other.names if load.names else load.digest == other.digest for other in found
        ):
            found.append(load)
    return tuple(found)


def carried_by(*patchers: Any) -> tuple[Load, ...]:
    """The LoRAs that patchers of the host carry, scheduled ones (hooks) included; never raises."""
    found: tuple[Load, ...] = ()
    try:
        # All at once, because MODEL and CLIP have a half each of most LoRAs.
        found = tuple(map(_load, groups(itertools.chain(*map(entries_of, patchers)))))
    except Exception as error:
        _log_once(f"passes over patches that it cannot read: {error}")
    for patcher in patchers:
        found = together(found, scheduled(patcher))
    return found


def scheduled(patcher: Any) -> tuple[Load, ...]:
    """The LoRAs of a CLIP's hooks, which are not patches before they are used; never raises."""
    try:
        hooks = getattr(getattr(patcher, "forced_hooks", None), "hooks", None) or ()
        weights = [hook.weights for hook in hooks if isinstance(getattr(hook, "weights", None), Mapping)]
        return tuple(load for each in weights for load in _of_hook(each))
    except Exception as error:
        _log_once(f"passes over hooks that it cannot read: {error}")
        return ()


@dataclass(frozen=True)
class Group:
    """The tensors of one LoRA, the names that the host took from its file, and the first strength."""

    names: AbstractSet[str]
    tensors: Sequence[Tensor]
    strength: float


def groups(patches: Iterable[tuple[float, Any]]) -> list[Group]:
    """Patches with their strengths, sorted by the LoRA that they come from: the host's set of names.

    Merged models nest patches in lists; plain differences count only where there is nothing else.
    """
    found: dict[int, tuple[AbstractSet[str], list[Tensor], float]] = {}
    plain: list[Tensor] = []
    weight = 1.0
    for strength, patch in patches:
        for adapter in adapters(patch):
            tensors = _tensors(adapter)
            if isinstance(adapter, tuple):
                plain += tensors
                weight = strength
            else:
                names: AbstractSet[str] = adapter.loaded_keys
                found.setdefault(id(names), (names, [], strength))[1].extend(tensors)
    if not found and plain:
        return [Group(frozenset(), plain, weight)]
    return [Group(*each) for each in found.values()]


def adapters(patch: Any) -> Iterator[Any]:
    """Weight adapters and ("diff", tensors) tuples in a patch."""
    adapter = isinstance(getattr(patch, "loaded_keys", None), (set, frozenset)) and hasattr(patch, "weights")
    if adapter or (isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff"):
        yield patch
    elif isinstance(patch, list):
        for inner in patch:  # what get_key_patches gives: (weight, function), then (strength, patch, ...)
            if isinstance(inner, tuple) and len(inner) > 2:
                yield from adapters(inner[1])


def _tensors(adapter: Any) -> list[Tensor]:
    values: Any = adapter[1] if isinstance(adapter, tuple) else adapter.weights
    flat = [one for value in values for one in (value if isinstance(value, (list, tuple)) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]


def entries_of(patcher: Any) -> Iterator[tuple[float, Any]]:
    """(strength, patch) of everything that a MODEL's or CLIP's patcher adds to weights."""
    patches = getattr(patcher, "patches", None)
    for entries in list(patches.values()) if isinstance(patches, Mapping) else ():
        for strength, patch, *_ in entries:
            yield float(strength), patch


def _load(group: Group) -> Load:
    names, payload = group.names, sum(t.numel() * t.element_size() for t in group.tensors)
    probes = _probes(group.tensors)
    total = hashlib.sha256("\n".join(sorted(names)).encode("utf-8", "replace"))
    total.update(repr(probes).encode("ascii", "replace"))
    return Load(names, payload, probes, group.strength, total.hexdigest())


def _probes(tensors: Sequence[Tensor]) -> tuple[Probe, ...]:
    """Of the rarest shapes, because a file has few places to look for them."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    often = {shape: shapes.count(shape) for shape in set(shapes)}
    order = sorted(range(len(tensors)), key=lambda place: (often[shapes[place]], place))
    found: list[Probe] = []
    for place in order:
        tensor = tensors[place]
        if tensor.ndim and tensor.numel() >= _NUMBERS and tensor.device.type != "meta":
            first, middle = (_bytes(tensor[start:stop]) for start, stop in _rows(tensor.shape))
            if any(first) or any(middle):  # zeros tell nothing
                found.append(Probe(shapes[place], tensor.dtype, first, middle))
        if len(found) == PROBES:
            break
    return tuple(found)


def _rows(shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows that are compared: the first ones, and as many from the middle."""
    row = max(1, torch.Size(shape[1:]).numel())
    count = min(shape[0], -(-_NUMBERS // row))
    middle = (shape[0] - count) // 2
    return (0, count), (middle, middle + count)


def _bytes(rows: Tensor) -> bytes:
    flat = rows.detach().to("cpu").contiguous().reshape(-1)[:_NUMBERS]
    return bytes(flat.view(torch.uint8).numpy().data)


_HOOKS: dict[tuple[Any, ...], tuple[Load, ...]] = {}


def _of_hook(weights: Mapping[Any, Any]) -> tuple[Load, ...]:
    """Loads of a hook, which holds the tensors of a file by name until it is first used, and patches then."""
    first = next(iter(weights.items()), (None, None))
    raw = isinstance(first[1], Tensor)
    tensors = [value for value in weights.values() if isinstance(value, Tensor) and value.ndim]
    seen = _probes(tensors[:1])
    key = (id(weights), len(weights), str(first[0]), seen)
    if key not in _HOOKS:
        if len(_HOOKS) > 64:
            _HOOKS.clear()
        names = frozenset(str(name) for name in weights)
        _HOOKS[key] = (_load(Group(names, tensors, 1.0)),) if raw else loads(weights)
    return _HOOKS[key]


_FOUND: dict[str, tuple[int, tuple[Facts, ...]]] = {}


def files_of(load: Load) -> tuple[Facts, ...]:
    """The files of the LoRA folders that hold this LoRA: one, or several when they are copies; never raises.

    Remembered until the folders change.
    """
    try:
        listed = tuple(folder_paths.get_filename_list(FOLDER))
        known = _FOUND.get(load.digest)
        if known is not None and known[0] == hash(listed) and all(_same(facts) for facts in known[1]):
            return known[1]
        found = _search(load, listed)
        _FOUND[load.digest] = (hash(listed), found)
        return found
    except Exception as error:
        _log_once(f"cannot look for LoRA files: {error}")
        return ()


def _search(load: Load, listed: Sequence[str]) -> tuple[Facts, ...]:
    if not load.probes:
        return ()
    near: list[Facts] = []
    rest: list[tuple[int, Facts]] = []
    slack = _SLACK_BYTES + 8 * len(load.names)  # the host hands alphas over as plain numbers
    for facts in _listed(listed, load.payload):
        spare = _payload(facts.path, facts.size, facts.modified) - load.payload
        if 0 <= spare <= slack:
            near.append(facts)
        elif spare > slack:
            rest.append((spare, facts))
    found = tuple(facts for facts in near if _is(facts, load))
    if found:
        return found
    # The rest hold more than the host could use: a text half for another encoder, say.
    spares: set[int] = set()
    more: list[Facts] = []
    for spare, facts in sorted(rest, key=lambda item: item[0]):
        if spares and spare not in spares:
            break
        if _is(facts, load):
            more.append(facts)
            spares.add(spare)
    return tuple(more)


def _listed(names: Sequence[str], least: int) -> Iterator[Facts]:
    for name in names:
        path = folder_paths.get_full_path(FOLDER, name)
        if path is None or not name.lower().endswith(SUFFIX):
            continue  # pickles are never opened, so they are never found
        try:
            facts = os.stat(path)
        except OSError:
            continue
        if facts.st_size > least:
            yield Facts(name.replace("\\", "/"), path, facts.st_size, facts.st_mtime_ns)


def _same(facts: Facts) -> bool:
    try:
        now = os.stat(facts.path)
    except OSError:
        return False
    return (now.st_size, now.st_mtime_ns) == (facts.size, facts.modified)


@functools.lru_cache(maxsize=16384)
def _payload(path: str, size: int, modified: int) -> int:
    """Bytes of tensors in a file, by the length of its header alone; -1 when it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError:
        return -1
    return size - 8 - struct.unpack("<Q", start)[0] if len(start) == 8 else -1


@functools.lru_cache(maxsize=64)
def _layout(path: str, size: int, modified: int) -> guard.Layout:
    return guard.read_layout(path)


@dataclass(frozen=True, eq=False)
class _Index:
    """Where tensors lie in files of one layout: offsets behind the header, by shape and dtype."""

    count: int
    places: Mapping[tuple[tuple[int, ...], str], array[int]]


_INDEXES: WeakValueDictionary[bytes, _Index] = WeakValueDictionary()
"""Indexes by what a header says of its tensors; the files of one training script share one."""
_NOTHING = _Index(0, {})


@functools.lru_cache(maxsize=16384)
def _index(path: str, size: int, modified: int) -> _Index:
    """The index of a file, for looking up numbers; a file that has them is checked in earnest afterwards."""
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(guard.LARGEST_HEADER_BYTES, size - 8):
                return _NOTHING
            header = file.read(length)
        # Metadata comes first and differs from file to file; in a text the quotes of this word are escaped.
        key = hashlib.blake2b(header[header.find(b'"dtype"') :]).digest()
        known = _INDEXES.get(key)
        if known is None:
            known = _INDEXES[key] = _index_of(json.loads(header))
        return known
    except (OSError, ValueError, struct.error, TypeError, LookupError, RecursionError) as error:
        logging.debug("Language Bridge passes over %s: %s", path, error)
        return _NOTHING


def _index_of(header: Mapping[str, Any]) -> _Index:
    places: dict[tuple[tuple[int, ...], str], array[int]] = {}
    count = 0
    for name, entry in header.items():
        if name != "__metadata__":
            kind = (tuple(entry["shape"]), str(entry["dtype"]))
            places.setdefault(kind, array("q")).append(entry["data_offsets"][0])
            count += 1
    return _Index(count, places)


def _is(facts: Facts, load: Load) -> bool:
    """Whether a file holds this LoRA: the numbers of every probe, and its names."""
    index = _index(facts.path, facts.size, facts.modified)
    if index.count < len(load.names) or not all(probe.kind in index.places for probe in load.probes):
        return False
    begin = facts.size - _payload(facts.path, facts.size, facts.modified)
    try:
        with open(facts.path, "rb", buffering=0) as file:
            if not all(_holds(file, begin, index.places[probe.kind], probe) for probe in load.probes):
                return False
        return load.names <= facts.layout.tensors.keys()
    except (OSError, ValueError) as error:
        _log_once(f"passes over {facts.name}: {error}")
        return False


def _holds(file: io.FileIO, begin: int, offsets: Iterable[int], probe: Probe) -> bool:
    """Whether one of the tensors at `offsets` behind `begin` has the numbers of a probe."""
    row = probe.dtype.itemsize * torch.Size(probe.shape[1:]).numel()
    middle = _rows(probe.shape)[1][0] * row
    for offset in offsets:
        file.seek(begin + offset)
        if file.read(len(probe.first)) == probe.first:
            file.seek(begin + offset + middle)
            if file.read(len(probe.middle)) == probe.middle:
                return True
    return False


@functools.cache
def _log_once(what: str) -> None:
    logging.warning("Language Bridge %s", what)
