"""Finds bridges and text towers in the host's model folders, by what the files say of themselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths

from ..bridges.errors import BridgeError
from ..bridges.file import BridgeHeader, EncoderRef, read_header
from ..encoders.file import EncoderHeader, read_encoder_header
from ..encoders.ledger import Ledger
from .identity import OWN_FOLDER, plain

FOLDER = "language_bridges"
ELSEWHERE = ("text_encoders", "controlnet")
"""Other folders of models in which bridges are found, by their headers."""
SUFFIX = ".safetensors"
LEDGER = "verified.json"
_ASSETS = Path(__file__).parent.parent / "pocket" / "assets"


def register() -> None:
    """Registers models/language_bridges, and behind it the bridges that ship with the pack; twice is once."""
    paths, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    known = list(paths)
    for place in (os.path.join(folder_paths.models_dir, FOLDER), str(_ASSETS / "bridges")):
        if place not in known:
            known.append(place)
    # An added folder starts with an empty set of suffixes, which would list every file.
    folder_paths.folder_names_and_paths[FOLDER] = (known, {SUFFIX})


def bridge_names() -> list[str]:
    """Names of every bridge for the node's combo: files of the bridge folders, then those found elsewhere.

    A bridge in another folder has that folder behind its name: "mine.safetensors [controlnet]".
    """
    names = folder_paths.get_filename_list(FOLDER)
    return [*names, *(name for name in _elsewhere() if name not in names)]


def find(name: str) -> tuple[str, Path] | None:
    """Name in the list and file of a bridge; None when the list has none of that name.

    Only names that the folders list are found, so none leads elsewhere. Slashes may be those of another
    system. BridgeError when the file has gone since it was listed.
    """
    here = listed(name, folder_paths.get_filename_list(FOLDER))
    if here is not None:
        found = folder_paths.get_full_path(FOLDER, here)
    else:
        others = _elsewhere()
        here = listed(name, others)
        if here is None:
            return None
        found = str(others[here])
    if found is None or not os.path.isfile(found):
        raise BridgeError(
            f"The bridge file {here!r:.120} has gone.",
            "a name in the list without a file behind it",
            "a file of the folder models/language_bridges",
            "Put the file back, or press R in the browser to refresh the list.",
        )
    return here, Path(found)


def bridge_path(name: str) -> Path:
    """The file of a bridge name; BridgeError when there is none."""
    found = find(name)
    if found is None:
        names = bridge_names()
        raise BridgeError(
            f"There is no bridge called {name!r:.120}.",
            f"{len(names)} bridges: {', '.join(names[:8]) or 'none'}",
            "a file of the folder models/language_bridges",
            "Put the bridge file there, press R in the browser to refresh, and choose it again.",
        )
    return found[1]


def listed(name: str, names: Iterable[str]) -> str | None:
    """The name of the list that is meant, also when another system wrote it; None: it is not there."""
    names = list(names)
    if name in names:
        return name
    return next((other for other in names if plain(other) == plain(name)), None)


def _elsewhere() -> dict[str, Path]:
    """Bridges that lie in the folders of other models, by their name in the list."""
    found: dict[str, Path] = {}
    for folder in ELSEWHERE:
        if folder not in folder_paths.folder_names_and_paths:
            continue
        for name in folder_paths.get_filename_list(folder):
            place = folder_paths.get_full_path(folder, name) if name.lower().endswith(SUFFIX) else None
            if place is not None and _header_here(Path(place)) is not None:
                found[f"{name} [{folder}]"] = Path(place)
    if not found:
        return found
    ours = {os.path.realpath(root) for root in _bridge_roots()}
    return {name: path for name, path in found.items() if not any(_is_below(path, root) for root in ours)}


def _is_below(path: Path, root: str) -> bool:
    """Whether a file lies in a folder, so that a folder registered for two kinds is listed once."""
    return os.path.realpath(path).startswith(os.path.join(root, ""))


def _header_here(path: Path) -> BridgeHeader | None:
    """The header of a bridge; None of any other file, readable or not."""
    try:
        facts = path.stat()
        return _bridge_header(str(path), facts.st_size, facts.st_mtime_ns)
    except (OSError, BridgeError) as error:
        logging.debug("Language Bridge passes over %s: %s", path.name, error)
        return None


def bridge_header(path: Path) -> BridgeHeader:
    """What a bridge file says of itself; BridgeError when it is no bridge."""
    header = read_header(path)
    if header is None:
        raise BridgeError(
            f"{path.name} is not a bridge file.",
            "a safetensors file without the header key language_bridge",
            "a bridge saved by Language Bridge",
            "Choose another file, one that Language Bridge has saved.",
        )
    return header


def encoder_path(wanted: EncoderRef, bridge: str) -> Path:
    """The tower file that a bridge names, found by identity whatever its file name.

    wanted: what the bridge's header says of its tower. BridgeError names what is missing, or how a tower of
    that name differs.
    """
    near: list[tuple[Path, str]] = []
    for path, header in towers():
        if header.identity != wanted.identity:
            continue
        difference = wanted.differs(header)
        if difference is None:
            return path
        near.append((path, difference))
    if near:
        path, difference = near[0]
        raise BridgeError(
            f"The text tower {wanted.identity!r} is not the one that the bridge {bridge} was trained with.",
            f"{path.name}: {difference}",
            f"{wanted.family}, layer {wanted.layer}, window {wanted.window}, mask {wanted.mask_rule}"
            + (f", digest {wanted.digest}" if wanted.digest else ""),
            "Fetch the tower that belongs to this bridge into models/text_encoders.",
        )
    raise BridgeError(
        f"The text tower that the bridge {bridge} needs is missing.",
        f"no file with the identity {wanted.identity!r} in models/text_encoders",
        f"a tower file: {wanted.family}, identity {wanted.identity!r}, window {wanted.window}",
        "Put the tower file into models/text_encoders (any file name) and queue again.",
    )


def headers() -> Iterator[tuple[str, Path, BridgeHeader]]:
    """Name, file and header of every bridge that can be read."""
    places: dict[str, Path] = {}
    for name in folder_paths.get_filename_list(FOLDER):
        found = folder_paths.get_full_path(FOLDER, name)
        if found is not None:
            places[name] = Path(found)
    for name, path in (places | {n: p for n, p in _elsewhere().items() if n not in places}).items():
        header = _header_here(path)
        if header is not None:
            yield name, path, header


def files_of(name: str) -> list[Path]:
    """Every file that a bridge is made of: its own, and the tower's when that is a file of its own."""
    path = bridge_path(name)
    wanted = bridge_header(path).encoder
    alone = wanted.family == "host" or read_encoder_header(path)
    return [path] if alone else [path, encoder_path(wanted, name)]


def towers() -> Iterator[tuple[Path, EncoderHeader]]:
    """Every tower file of the text encoder, bridge and ControlNet folders with its header."""
    roots = [*_roots("text_encoders"), *_bridge_roots(), *_roots("controlnet"), str(_ASSETS / "encoders")]
    for root in dict.fromkeys(roots):
        been: set[str] = set()
        for folder, inner, names in os.walk(root, followlinks=True):
            been.add(os.path.realpath(folder))
            # A link that leads back up would be walked until the path is too long for the system.
            inner[:] = [name for name in inner if os.path.realpath(os.path.join(folder, name)) not in been]
            for name in sorted(names):
                if not name.lower().endswith(SUFFIX):
                    continue
                path = Path(folder) / name
                try:
                    facts = path.stat()
                    header = _tower_header(str(path), facts.st_size, facts.st_mtime_ns)
                except (OSError, BridgeError) as error:
                    logging.debug("Language Bridge passes over %s: %s", path.name, error)
                    continue
                if header is not None:
                    yield path, header


def ledger() -> Ledger:
    """What was verified on this machine: in the host's user directory, where no HTTP request reaches."""
    return _ledger(os.path.join(folder_paths.get_system_user_directory(OWN_FOLDER), LEDGER))


@lru_cache(maxsize=4)
def _ledger(path: str) -> Ledger:
    return Ledger(path)


def _bridge_roots() -> list[str]:
    return _roots(FOLDER)


def _roots(folder: str) -> list[str]:
    paths: Any = folder_paths.folder_names_and_paths.get(folder, ([], set()))[0]
    return list(paths)


@lru_cache(maxsize=4096)
def _bridge_header(path: str, size: int, modified: int) -> BridgeHeader | None:
    """The header of a bridge file, None of any other; size and time of change notice a new content."""
    return read_header(path)


@lru_cache(maxsize=4096)
def _tower_header(path: str, size: int, modified: int) -> EncoderHeader | None:
    """The header of a file that is a tower and nothing else: one inside a bridge belongs to that bridge.

    Size and time of change are only there to notice a new content.
    """
    return None if read_header(path) is not None else read_encoder_header(path)
