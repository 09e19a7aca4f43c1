"""Seeded changes of valid files: bytes, cuts, insertions, and edits of the JSON or the program inside."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Change = Callable[[bytes, random.Random], bytes]

NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        255,
        1 << 24,
        1 << 31,
        1 << 53,
        1 << 63,
        (1 << 64) - 1,
        1 << 80,
        1e308,
    ),
    *(0.5, -0.0, "", "x", "../x", "/etc/passwd", "C:\\x", "\0", "\u7ea2", "F32", "F64", "BOOL", "a" * 300),
    *([], [0], [-1], [1, 2], [[]], {}, {"x": 1}, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
)


def bytewise(data: bytes, chance: random.Random) -> bytes:
    """Flips, new bytes, cuts, insertions, repeated and swapped pieces; half of them near the beginning."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        reach = max(1, min(len(changed), chance.choice((8, 64, 1024, len(changed), len(changed)))))
        place = chance.randrange(reach)
        match chance.randrange(8):
            case 0 | 1:
                changed[place : place + 1] = bytes([chance.randrange(256)])
            case 2 | 3 if place < len(changed):
                changed[place] ^= 1 << chance.randrange(8)
            case 4:
                del changed[place : place + chance.choice((1, 1, 4, 64))]
            case 5:
                changed[place:place] = chance.randbytes(chance.choice((1, 1, 4, 64)))
            case 6:
                piece = bytes(changed[place : place + chance.choice((1, 8, 64))])
                changed[chance.randrange(len(changed) + 1) :][:0] = piece
            case _:
                if chance.random() < 0.3:
                    del changed[chance.randrange(len(changed) + 1) :]
        if not changed:
            break
    return bytes(changed)


def edited(value: Any, chance: random.Random) -> Any:
    """A JSON value with one place in it changed, taken out, doubled or renamed."""
    value = copy.deepcopy(value)
    owners: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        pairs = (
            inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        )
        for key, item in list(pairs):
            owners.append((inner, key))
            walk(item)

    walk(value)
    if not owners:
        return chance.choice(NASTY)
    owner, key = chance.choice(owners)
    match chance.randrange(6):
        case 0:
            del owner[key]
        case 1 if isinstance(owner, dict):
            owner[chance.choice((key.upper(), key + "x", "", "../" + key, "__metadata__"))] = owner.pop(key)
        case 2 if isinstance(owner[key], int):
            owner[key] += chance.choice((-1, 1, 4, -4, 1 << 32))
        case 3:
            other, name = chance.choice(owners)
            owner[key] = copy.deepcopy(other[name])
        case _:
            owner[key] = copy.deepcopy(chance.choice(NASTY))
    return value


def json_edited(data: bytes, chance: random.Random) -> bytes:
    """A JSON file with an edit, in one of several spellings."""
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 2))):
        value = edited(value, chance)
    return json.dumps(value, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, 1))).encode(
        "utf-8", "replace"
    )


def header_edited(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with an edit in its header, or in a JSON text among its metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    texts = [key for key, text in header.get("__metadata__", {}).items() if text.startswith("{")]
    if texts and chance.random() < 0.6:
        key = chance.choice(texts)
        header["__metadata__"][key] = json.dumps(edited(json.loads(header["__metadata__"][key]), chance))
    else:
        header = edited(header, chance)
    text = json.dumps(header).encode()
    said = len(text) + (chance.choice((-8, -1, 1, 8)) if chance.random() < 0.1 else 0)
    return struct.pack("<Q", max(0, said)) + text + data[8 + length :]


def program_edited(data: bytes, chance: random.Random) -> bytes:
    """A torch archive whose program is changed, and whose sums are right all the same."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as made:
        for name, content in members.items():
            made.writestr(name, bytewise(content, chance) if name.endswith("/data.pkl") else content)
    return written.getvalue()


def any_of(*changes: Change) -> Change:
    """One of several changes by chance."""
    return lambda data, chance: chance.choice(changes)(data, chance)
