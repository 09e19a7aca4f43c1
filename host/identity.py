"""What a bridge is, whatever its file is called: its id, a hash of its content, and the record in a graph.

A graph keeps, beside the file name that people see, what that name meant where it was made: the bridge's own
name (id), the first digits of the hash of its content, and the version of the pack.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import unicodedata
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, cast

import folder_paths

from ..bridges.base import kind_class, parse_spec
from ..bridges.errors import BridgeError
from ..bridges.file import BridgeHeader
from ..encoders import guard
from ..encoders.file import PREFIX, TOKENIZER, read_encoder_header
from ..encoders.ledger import Facts, Ledger

OWN_FOLDER = "language_bridge"
CONTENTS = "contents.json"
DIGITS = 12
"""Of the hash, in a graph."""

ACTING = ("unet", "says", "template")
"""Fields of a training record that change what a bridge does; all others are provenance."""

SMALL_BYTES = 8 << 20
"""What is so small is hashed when the list of bridges is asked for; all else when it is first used."""

LONGEST, LONGEST_ID = 2000, 200
"""Characters of a record and of an id."""

MOST_KEPT = 512

_HASH = re.compile(rf"[0-9a-f]{{{DIGITS}}}")
_BLOCK = 1 << 22

_known: OrderedDict[Facts, str] = OrderedDict()
_lock = Lock()


@dataclass(frozen=True)
class Record:
    """What a file name meant where a graph was made.

    bridge: the file name with forward slashes; id: the bridge's own name; hash: the first digits of its
    content's SHA-256, "" where only the id is known; pack: version of the pack that wrote it.
    """

    bridge: str
    id: str
    hash: str = ""
    pack: str = ""

    def to_json(self) -> str:
        """The text that a graph keeps."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def __str__(self) -> str:
        return f"{self.id}#{self.hash}" if self.hash else self.id


def parse(text: object) -> Record | None:
    """The record in a graph's text; None when there is none, or nothing that can be understood."""
    if not isinstance(text, str) or not text or len(text) > LONGEST:
        return None
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    fields = cast("dict[str, object]", found) if isinstance(found, dict) else {}
    values = [fields.get(name, "") for name in ("bridge", "id", "hash", "pack")]
    if not all(isinstance(value, str) and value.isprintable() for value in values):
        return None
    record = Record(*cast("list[str]", values))
    fits = bool(record.bridge) and 0 < len(record.id) <= LONGEST_ID
    return record if fits and _HASH.fullmatch(record.hash or "0" * DIGITS) else None


def about(name: str, text: object) -> Record | None:
    """The record of a graph when it is about this file name; one about another name says nothing of it."""
    record = parse(text)
    return record if record is not None and plain(record.bridge) == plain(name) else None


def plain(name: str) -> str:
    """A file name as it compares between systems: forward slashes, one form of composed letters."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def id_of(header: BridgeHeader, name: str) -> str:
    """The bridge's own name; of one that has none, its file name without folder and ending."""
    own = " ".join(header.name.split())
    return (
        own
        if own and own.isprintable() and len(own) <= LONGEST_ID
        else plain(name).rpartition("/")[2].rpartition(".")[0]
    )


def record_of(name: str, header: BridgeHeader, path: Path, pack: str) -> Record:
    """What a graph keeps of the bridge in a file; reads the file when its content is not known yet."""
    return Record(plain(name), id_of(header, name), content(path)[:DIGITS], pack)


def content(path: Path) -> str:
    """SHA-256 (hex) of what a bridge does: kind, sizes, base, tower, acting fields, and its weights.

    Neither its name nor its provenance goes in, so the same weights that were converted twice are the same.
    Of a tower inside, its own digest stands for it. Remembered in the same way as what was verified, so a
    file is read once. BridgeError when it is damaged or no bridge.
    """
    facts = _facts(path)
    known = _recall(facts)
    if known is not None:
        return known
    layout = guard.read_layout(path)
    ledger = _ledger(os.path.join(folder_paths.get_system_user_directory(OWN_FOLDER), CONTENTS))
    known = ledger.recall(facts, layout.digest)
    if not known:
        known = _hash(path, layout)
        if not (ledger.at_rest(facts) and _facts(path) == facts):
            return known
        ledger.remember(facts, layout.digest, known)
    with _lock:
        _known[facts] = known
        if len(_known) > MOST_KEPT:
            _known.popitem(last=False)
    return known


def is_cheap(path: Path) -> bool:
    """Whether the content is known already, or so small that it is soon known."""
    try:
        if _recall(_facts(path)) is not None:
            return True
        layout = guard.read_layout(path)
    except BridgeError:
        return False
    ledger = _ledger(os.path.join(folder_paths.get_system_user_directory(OWN_FOLDER), CONTENTS))
    return bool(ledger.recall(_facts(path), layout.digest)) or _weight(path, layout) <= SMALL_BYTES


def _recall(facts: Facts) -> str | None:
    with _lock:
        return _known.get(facts)


def _facts(path: Path) -> Facts:
    try:
        with path.open("rb") as file:
            return Facts.of(path, file.fileno())
    except OSError as error:
        raise BridgeError(
            f"The file {path.name!r} cannot be opened.", error.strerror, "a readable file", "Put it back."
        ) from error


@lru_cache(maxsize=4)
def _ledger(path: str) -> Ledger:
    return Ledger(path)


def _spans(path: Path, layout: guard.Layout) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of every tensor that is not of the tower, by name, sorted."""
    firsts = sorted({entry.first for entry in layout.tensors.values()}) + [path.stat().st_size]
    ends = dict(zip(firsts, firsts[1:], strict=False))
    return {
        name: (entry.first, 0 if 0 in entry.shape else ends[entry.first] - entry.first)
        for name, entry in sorted(layout.tensors.items())
        if not name.startswith(PREFIX) and name != TOKENIZER
    }


def _weight(path: Path, layout: guard.Layout) -> int:
    return sum(count for _, count in _spans(path, layout).values())


def _hash(path: Path, layout: guard.Layout) -> str:
    text = layout.metadata.get("language_bridge")
    if text is None:
        raise BridgeError(
            f"{path.name} is not a bridge file.",
            "a safetensors file without the header key language_bridge",
            "a bridge saved by Language Bridge",
            "Choose another file, one that Language Bridge has saved.",
        )
    header = BridgeHeader.from_json(text)
    tower = read_encoder_header(path)
    spec = parse_spec(kind_class(header.kind).Spec, header.spec, f"bridge of kind {header.kind!r}")
    acting: dict[str, Any] = {
        "kind": header.kind,
        "spec": dataclasses.asdict(spec),
        "base": header.base,
        "encoder": dataclasses.asdict(header.encoder),
        "unet": header.unet,
        "training": {name: header.training[name] for name in ACTING if name in header.training},
        "tower": tower.digest if tower is not None else "",
    }
    total = hashlib.sha256(json.dumps(acting, sort_keys=True).encode("ascii"))
    try:
        with path.open("rb") as file:
            for name, (first, count) in _spans(path, layout).items():
                entry = layout.tensors[name]
                total.update(f"\0{name}\0{entry.dtype}\0{list(entry.shape)}\0".encode("ascii"))
                file.seek(first)
                while count > 0 and (block := file.read(min(count, _BLOCK))):
                    total.update(block)
                    count -= len(block)
                if count:
                    raise OSError(f"{count} bytes of {name} are missing")
    except OSError as error:
        raise BridgeError(
            f"The file {path.name!r} cannot be read whole.",
            error.strerror or error,
            "a whole bridge file",
            "Try again; if it stays, get the file again.",
        ) from error
    return total.hexdigest()
