"""Checkpoints of a training that no crash can tear: a folder each, with the hashes of all that is in it.

run/step-00000500/weights.safetensors   one file for each group of tensors
                  optimiser.safetensors
                  state.json            facts, sizes and SHA-256 of the files, and of itself
run/LATEST                              the newest folder's name, for people and scripts

A folder is written under a temporary name, flushed to the disk and renamed, so that one with its own name is
whole. Nothing is overwritten: a step that is saved again gets a folder of its own (step-00000500-2). What is
read is checked all the same, since disks forget.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..bridges.errors import BridgeError
from ..encoders import guard

FORMAT = 1
STATE = "state.json"
LATEST = "LATEST"
SUFFIX = ".safetensors"

_FOLDER = re.compile(r"step-([0-9]{8,15})(?:-([0-9]{1,6}))?")
_PASSING = re.compile(rf"\.({_FOLDER.pattern}|{LATEST})\.[0-9a-f]{{12}}{re.escape(guard.TEMPORARY_SUFFIX)}")
_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,63}")
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file managers leave behind without being asked."""
_BLOCK_BYTES = 1 << 20
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6) if os.name == "nt" else ()
"""Windows renames no folder while a scanner has a file in it open, which soon passes."""
_LARGEST_STATE_BYTES = 64 << 20
_OWNER = "checkpoint"
_ELSEWHERE = "Go on from another checkpoint."


@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint that was read and found whole.

    tensors: by the stem of their file and by name, on the CPU. skipped: what is wrong with newer ones.
    """

    step: int
    folder: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, object]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _State:
    """What state.json says.

    serial: counts the saves of a run, and so tells which is the newest; a run that goes on from an older
    checkpoint, because the newest was damaged, comes to the same steps again. files: bytes and SHA-256.
    """

    step: int
    serial: int
    files: Mapping[str, tuple[int, str]]
    facts: Mapping[str, object]


def save(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, object],
    keep: int = 2,
) -> Path:
    """Write a checkpoint and return its folder; then remove all but the `keep` (>= 1) that were saved last.

    tensors: by the stem of the file and by name. facts: any JSON object. One process writes to a run.

    BridgeError when a number is not finite, something cannot be written as safetensors or JSON, or the disk
    refuses; the checkpoints from before are then as they were. A checkpoint that cannot be read, or that
    somebody has put a file of their own into, is never removed, and neither is anything else in `run`.
    """
    what = f"The checkpoint of step {step} could not be saved."
    _require(what, step, list(tensors), facts, keep)
    passing = _passing(run, _name(step))
    try:
        _make(run)
        _sweep(run)
        older = _ours(run)
        os.mkdir(passing)
        files: dict[str, tuple[int, str]] = {}
        for stem, group in tensors.items():
            path = passing / (stem + SUFFIX)
            guard.write(path, {name: tensor.detach() for name, tensor in group.items()}, {})
            guard.read_layout(path)
            files[path.name] = _measure(path)
        serial = 1 + max((state.serial for state in older.values() if state), default=0)
        guard.write_whole(passing / STATE, [_text(_State(step, serial, files, facts))])
        folder = _free(run, step)
        _rename(passing, folder)
        guard.flush_folder(run)
    except (OSError, BridgeError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise BridgeError(
            what,
            cause,
            f"a writable folder {run.name!r} with enough free space",
            "Free some space, or choose another folder; older checkpoints are untouched, go on from them.",
        ) from error
    finally:
        shutil.rmtree(passing, ignore_errors=True)
    try:
        guard.write_whole(run / LATEST, [folder.name.encode("ascii") + b"\n"])
    except (BridgeError, OSError) as error:
        # The checkpoint stands. What the pointer still names must stay, too, so nothing is removed.
        logging.warning("Language Bridge: %s is saved, but %s", folder.name, error)
    else:
        _prune(run, older, keep - 1)
    return folder


def latest(run: Path) -> Saved | None:
    """Read the whole checkpoint that was saved last; None when there is none.

    Damaged ones are passed over and named in `skipped`. BridgeError when all are damaged, or the folder
    cannot be read.
    """
    try:
        ours = _ours(run) if os.path.lexists(run) else {}
    except OSError as error:
        raise BridgeError(
            f"The folder {run.name!r} cannot be read.", error, "a readable folder", "Check its path."
        ) from error
    skipped: list[str] = []
    # Nobody knows how new a state is that cannot be read: it goes first, to be named.
    for folder in [*(path for path, state in ours.items() if state is None), *_newest_first(ours)]:
        try:
            state = ours[folder] or _read_state(folder)
            tensors = {
                name.removesuffix(SUFFIX): _read(folder / name, *state.files[name]) for name in state.files
            }
        except (BridgeError, OSError) as error:
            why = f"{error.what} Found: {error.found}" if isinstance(error, BridgeError) else str(error)
            skipped.append(f"{folder.name}: {why}")
        else:
            return Saved(state.step, folder, tensors, state.facts, tuple(skipped))
    if skipped:
        raise BridgeError(
            f"No checkpoint in {run.name!r} is whole.",
            "; ".join(skipped),
            "at least one that is whole",
            "Bring one back from a copy of the folder, or begin anew in another folder.",
        )
    return None


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, ascending, by the names of the folders alone; OSError as it comes."""
    return sorted({int(name[1]) for path in _folders(run) if (name := _FOLDER.fullmatch(path.name))})


# -- writing ----------------------------------------------------------------------------------------


def _require(what: str, step: int, stems: list[str], facts: Mapping[str, object], keep: int) -> None:
    """Refuse what could not be found or read again."""
    action = "This is a fault of the training's code; please report it."
    if not 0 <= step < 10**15 or keep < 1:
        raise BridgeError(what, f"step {step}, keep {keep}", "a step from 0, at least 1 to keep", action)
    if odd := [stem for stem in stems if not _STEM.fullmatch(stem)]:
        raise BridgeError(what, f"a file {odd[0]!r:.80}", "a name of letters, digits, _ and -", action)
    try:
        text = json.dumps(dict(facts), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BridgeError(what, f"facts: {error!s:.200}", "facts in JSON", action) from error
    guard.parse_json(text, what)
    if len(text) > _LARGEST_STATE_BYTES // 2:
        raise BridgeError(what, f"facts of {len(text)} bytes", f"{_LARGEST_STATE_BYTES // 2}", action)


def _make(run: Path) -> None:
    if not run.is_dir():
        os.makedirs(run, exist_ok=True)
        guard.flush_folder(run.parent)


def _sweep(run: Path) -> None:
    """Remove what a process left behind that died while it saved or removed."""
    for path in list(run.iterdir()):
        if _PASSING.fullmatch(path.name):
            _remove(path)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _passing(run: Path, name: str) -> Path:
    return run / f".{name}.{secrets.token_hex(6)}{guard.TEMPORARY_SUFFIX}"


def _free(run: Path, step: int) -> Path:
    folder, again = run / _name(step), 1
    while os.path.lexists(folder):
        again += 1
        folder = run / f"{_name(step)}-{again}"
    return folder


def _rename(path: Path, target: Path) -> None:
    for pause in _PAUSES:
        try:
            return os.rename(path, target)
        except PermissionError:
            time.sleep(pause)
    return os.rename(path, target)


def _prune(run: Path, older: Mapping[Path, _State | None], keep: int) -> None:
    """Remove all but the newest `keep` of the older ones; what cannot be removed is told of and stays."""
    for folder in [path for path, state in older.items() if state is None]:
        _stays(folder, "it cannot be read")
    for folder in _newest_first(older)[keep:]:
        state = older[folder]
        assert state is not None
        try:
            names = {path.name for path in folder.iterdir()}
            if folder.is_symlink() or names - {STATE, *state.files, *_LITTER}:
                continue
            # Under another name first, so that half of it never stands where a whole one is looked for.
            passing = _passing(run, folder.name)
            _rename(folder, passing)
        except OSError as error:
            _stays(folder, error)
        else:
            _remove(passing)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        _stays(path, error)


def _stays(path: Path, why: object) -> None:
    logging.warning("Language Bridge: %s was not removed and takes up room: %s", path, why)


# -- reading ----------------------------------------------------------------------------------------


def _folders(run: Path) -> list[Path]:
    if not os.path.lexists(run):
        return []
    return [path for path in run.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]


def _ours(run: Path) -> dict[Path, _State | None]:
    """The checkpoints of a run, with None where the state cannot be read."""
    states: dict[Path, _State | None] = {}
    for folder in _folders(run):
        try:
            states[folder] = _read_state(folder)
        except (BridgeError, OSError):
            states[folder] = None
    return states


def _newest_first(states: Mapping[Path, _State | None]) -> list[Path]:
    serials = {folder: state.serial for folder, state in states.items() if state}
    return sorted(serials, key=lambda folder: (serials[folder], folder.name), reverse=True)


def _text(state: _State) -> bytes:
    fields = {
        "format": FORMAT,
        "step": state.step,
        "serial": state.serial,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in state.files.items()},
        "facts": dict(state.facts),
    }
    return json.dumps({**fields, "sha256": _digest(fields)}).encode("ascii")


def _digest(fields: Mapping[str, object]) -> str:
    """SHA-256 of what a state says, whatever the blanks and the order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode("ascii")).hexdigest()


def _read_state(folder: Path) -> _State:
    with open(folder / STATE, "rb") as file:
        text = file.read(_LARGEST_STATE_BYTES + 1)
    what = f"The file {STATE!r} is damaged."
    if len(text) > _LARGEST_STATE_BYTES:
        raise BridgeError(what, f"more than {_LARGEST_STATE_BYTES} bytes", "a short file", _ELSEWHERE)
    try:
        fields = guard.parse_header(text.decode("ascii"), FORMAT, _OWNER)
    except UnicodeDecodeError as error:
        raise BridgeError(what, error, "ASCII", _ELSEWHERE) from error
    told = fields.pop("sha256", None)
    if told != _digest(fields):
        raise BridgeError(what, "another SHA-256 than its own", "what was written", _ELSEWHERE)
    step = guard.field(fields, "step", int, _OWNER)
    name = _FOLDER.fullmatch(folder.name)
    if name is None or int(name[1]) != step:
        raise BridgeError(what, f"step {step} in {folder.name!r}", "the step of the folder", _ELSEWHERE)
    files: dict[str, tuple[int, str]] = {}
    for name, entry in guard.record(fields, "files", _OWNER).items():
        entry = guard.record({name: entry}, name, _OWNER)
        if not name.endswith(SUFFIX) or not _STEM.fullmatch(name.removesuffix(SUFFIX)):
            raise BridgeError(what, f"a file {name!r:.80}", "a file in this folder", _ELSEWHERE)
        files[name] = guard.field(entry, "bytes", int, _OWNER), guard.field(entry, "sha256", str, _OWNER)
    serial = guard.field(fields, "serial", int, _OWNER)
    return _State(step, serial, files, guard.record(fields, "facts", _OWNER))


def _read(path: Path, size_bytes: int, digest: str) -> dict[str, Tensor]:
    found = _measure(path, size_bytes)
    if found != (size_bytes, digest):
        raise BridgeError(
            f"The file {path.name!r} is damaged.",
            f"{found[0]} bytes" if found[0] != size_bytes else f"SHA-256 {found[1]}",
            f"{size_bytes} bytes, SHA-256 {digest}",
            _ELSEWHERE,
        )
    return guard.read_tensors(path, guard.read_layout(path))


def _measure(path: Path, most_bytes: int | None = None) -> tuple[int, str]:
    """Size and SHA-256 of a file, of which no more is read when it is larger than `most_bytes`."""
    total, size = hashlib.sha256(), os.stat(path).st_size
    with open(path, "rb") as file:
        while (most_bytes is None or size <= most_bytes) and (block := file.read(_BLOCK_BYTES)):
            total.update(block)
    return size, total.hexdigest()
