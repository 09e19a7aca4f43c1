"""Malformed safetensors files against every reader of the pack: refused in words, soon, and for little."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from language_bridge.bridges.errors import LONGEST, BridgeError
from language_bridge.bridges.file import METADATA_KEY, load_bridge, read_header, save_bridge
from language_bridge.conversion.containers import open_sources, read_foreign
from language_bridge.encoders import guard
from language_bridge.encoders.file import METADATA_KEY as TOWER_KEY
from language_bridge.encoders.file import load_encoder, read_encoder_header, save_encoder
from language_bridge.manifest.adopt import adopt
from language_bridge.manifest.download import Wanted
from language_bridge.tests.battery.bounds import bounded
from language_bridge.tests.battery.odd_safetensors import (
    CONTAINERS,
    WHOLE,
    Case,
    bridge_headers,
    tokenizers,
    tower_headers,
)
from language_bridge.tests.bridges.toys import WIDTH, toy_bridge, toy_header
from language_bridge.tests.encoders.toys import toy_tower

NUMBERS = "not finite"


def everything(path: Path) -> object:
    return guard.read_tensors(path, guard.read_layout(path))


READERS: dict[str, Callable[[Path], object]] = {
    "read_layout": guard.read_layout,
    "read_tensors": everything,
    "read_header": read_header,
    "read_encoder_header": read_encoder_header,
    "load_bridge": load_bridge,
    "load_encoder": load_encoder,
    "read_foreign": read_foreign,
    "open_sources": lambda path: open_sources([path]),
}
NUMBER_READERS = ("read_tensors",)
"""Readers that look at the numbers of a file that is nothing of ours."""


def refusal(reader: Callable[[Path], object], path: Path) -> str:
    """The text of the refusal, "" when there is none; anything but a BridgeError comes through."""
    with bounded():
        try:
            reader(path)
        except BridgeError as error:
            assert error.what and error.found and error.expected and error.action
            assert len(str(error)) < 4 * LONGEST
            str(error).encode("utf-8")
            return str(error)
    return ""


def test_there_are_cases_enough() -> None:
    names = [case.name for case in CONTAINERS]
    assert len(set(names)) == len(names)
    assert sum(bool(case.phrase) for case in CONTAINERS) >= 90


@pytest.mark.parametrize("case", CONTAINERS, ids=lambda case: case.name)
def test_every_reader_refuses_a_malformed_file(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(case.data)
    large = len(case.data) > 1 << 19  # the readers share the reading of the header
    for name, reader in READERS.items():
        if large and name not in ("read_header", "read_foreign"):
            continue
        said = refusal(reader, path)
        if case.phrase and (case.phrase != NUMBERS or name in NUMBER_READERS):
            # The conversion's door looks at size and first bytes before it reads a header.
            own = name in ("read_foreign", "open_sources") and ("0 bytes" in said or "a web page" in said)
            assert case.phrase in said or own, (name, said)
        elif name.startswith("load_"):
            assert "Language Bridge" in said, (name, said)
        elif name in ("read_foreign", "open_sources") and not guard.read_layout(path).tensors:
            assert "no tensors" in said, (name, said)
        else:
            assert not said, (name, said)


@pytest.mark.parametrize("cut", [*range(9), 20, 40, 60, len(WHOLE) - 5, len(WHOLE) - 4, len(WHOLE) - 1])
def test_a_file_cut_at_every_boundary_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(WHOLE[:cut])
    assert all(refusal(reader, path) for reader in READERS.values())


# -- what is no file -------------------------------------------------------------------------------------


def places(tmp_path: Path) -> dict[str, Path]:
    """Paths behind which there is no ordinary file, each under a name that ends well."""
    made: dict[str, Path] = {
        "nothing": tmp_path / "nothing.safetensors",
        "a folder": tmp_path / "folder.safetensors",
        "below a file": tmp_path / "file.safetensors" / "x.safetensors",
        "a name too long": tmp_path / ("a" * 300 + ".safetensors"),
        "a path too long": tmp_path / ("a/" * 3000 + "x.safetensors"),
        "a NUL in the name": tmp_path / "x\0.safetensors",
        "half of a letter": tmp_path / "x\ud800.safetensors",
    }
    made["a folder"].mkdir()
    (tmp_path / "file.safetensors").write_bytes(WHOLE)
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe.safetensors")
        made["a pipe"] = tmp_path / "pipe.safetensors"
        for name, target in (("ring", "ring.safetensors"), ("hanging", "nowhere"), ("null", os.devnull)):
            (tmp_path / f"{name}.safetensors").symlink_to(target)
            made[name] = tmp_path / f"{name}.safetensors"
        for device in ("/dev/zero", "/dev/full"):
            if Path(device).exists():
                link = tmp_path / f"{Path(device).name}.safetensors"
                link.symlink_to(device)
                made[device] = link
    return made


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    for name, path in places(tmp_path).items():
        for reader in READERS.values():
            said: list[str] = []
            thread = threading.Thread(target=lambda: said.append(refusal(reader, path)), daemon=True)  # noqa: B023
            thread.start()
            thread.join(10)
            assert said and said[0], (name, reader)


@pytest.mark.skipif(os.name != "posix", reason="links need a right on Windows")
def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(WHOLE)
    (tmp_path / "link.safetensors").symlink_to("there")
    assert guard.read_layout(tmp_path / "link.safetensors").tensors


def test_a_file_that_shrinks_or_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    bridge = toy_bridge("mlp", WIDTH)
    save_bridge(path, toy_header(bridge), bridge)
    whole = path.read_bytes()
    layout = guard.read_layout(path)
    for size in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole)
        with guard.open_weights(path) as weights:
            os.truncate(path, size)
            gone = [n for n, entry in layout.tensors.items() if entry.first + weights.bytes_of(n) > size]
            assert gone
            for name in layout.tensors:
                if name not in gone:
                    assert weights[name].isfinite().all()
                    continue
                with pytest.raises(BridgeError, match="bytes in"):
                    weights[name]
    path.write_bytes(WHOLE)
    with pytest.raises(BridgeError, match="changed while it was being read"):
        guard.read_tensors(path, layout)


# -- headers of ours -----------------------------------------------------------------------------------------


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """By the format's own writer, which checks nothing and does not wait for the disk."""
    safetensors.torch.save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path, metadata)


def with_text(path: Path, key: str, text: str) -> None:
    """The same file with another text in its metadata."""
    layout = guard.read_layout(path)
    write(path, guard.read_tensors(path, layout), dict(layout.metadata) | {key: text})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    bridge = toy_bridge("mlp", WIDTH)
    save_bridge(folder / "bridge.safetensors", toy_header(bridge), bridge)
    save_encoder(folder / "tower.safetensors", toy_tower())
    return {"bridge": folder / "bridge.safetensors", "tower": folder / "tower.safetensors"}


def header_of(path: Path, key: str) -> dict[str, Any]:
    return json.loads(guard.read_layout(path).metadata[key])


def check(path: Path, readers: tuple[Callable[[Path], object], ...], name: str, phrase: str) -> None:
    """The first reader decides; one that reads the header alone may see less, but nothing untyped."""
    said = refusal(readers[0], path)
    assert phrase in said if phrase else not said, (name, said)
    for reader in readers[1:]:
        assert not refusal(reader, path) or said, name


def test_every_odd_header_of_a_bridge_is_refused(good: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    cases = bridge_headers(header_of(good["bridge"], METADATA_KEY))
    assert len(cases) >= 60
    for name, (text, phrase) in cases.items():
        shutil.copy(good["bridge"], path)
        with_text(path, METADATA_KEY, text)
        check(path, (load_bridge, read_header), name, phrase)


def test_every_odd_header_of_a_tower_is_refused(good: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    cases = tower_headers(header_of(good["tower"], TOWER_KEY))
    assert len(cases) >= 50
    for name, (text, phrase) in cases.items():
        shutil.copy(good["tower"], path)
        with_text(path, TOWER_KEY, text)
        check(path, (load_encoder, read_encoder_header), name, phrase)


@pytest.mark.parametrize("kind", ["bridge", "tower"])
def test_wrong_missing_and_surplus_tensors_are_named(
    kind: str, good: dict[str, Path], tmp_path: Path
) -> None:
    path, load = tmp_path / "odd.safetensors", load_bridge if kind == "bridge" else load_encoder
    layout = guard.read_layout(good[kind])
    tensors = guard.read_tensors(good[kind], layout)
    for name in [name for name in layout.tensors if name != "tokenizer"][:: 1 if kind == "bridge" else 12]:
        rest = {key: value for key, value in tensors.items() if key != name}
        numbers = tensors[name]
        odd = {
            "missing": rest,
            "renamed": rest | {name + "x": numbers},
            "in capitals": rest | {name.upper(): numbers},
            "surplus": tensors | {name + ".extra": numbers},
            "longer": rest | {name: torch.cat([numbers, numbers])},
            "flat": rest | {name: numbers.reshape(1, -1)},
            "of whole numbers": rest | {name: numbers.int()},
            "empty": rest | {name: numbers[:0]},
            "one odd number": rest | {name: torch.full_like(numbers, torch.inf)},
        }
        for what, content in odd.items():
            write(path, content, dict(layout.metadata))
            said = refusal(load, path)
            assert name.rpartition(".")[2] in said or what == "in capitals", (what, name, said)
            assert said, (what, name)


def test_wrong_tokenizer_bytes_are_noticed_by_the_digest(good: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    entry = guard.read_layout(good["tower"]).tensors["tokenizer"]
    whole = good["tower"].read_bytes()
    place = whole.index(b"cafe", entry.first)
    path.write_bytes(whole[:place] + b"coffee"[:4] + whole[place + 4 :])
    assert "digest" in refusal(load_encoder, path)


def test_every_hostile_tokenizer_is_refused_or_cuts_a_text(good: dict[str, Path], tmp_path: Path) -> None:
    """The digest is that of the odd file, as whoever made the file would have it."""
    path = tmp_path / "odd.safetensors"
    layout = guard.read_layout(good["tower"])
    tensors = guard.read_tensors(good["tower"], layout)
    header = header_of(good["tower"], TOWER_KEY)
    cases = tokenizers(tensors["tokenizer"].numpy().tobytes())
    assert len(cases) >= 30
    for name, (text, phrase) in cases.items():
        odd = tensors | {"tokenizer": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        write(path, odd, {TOWER_KEY: json.dumps(header | {"digest": guard.digest(odd)})})
        check(path, (load_encoder,), name, phrase)
        if not phrase:
            assert load_encoder(path).tokenize("a cat")


def test_a_tokenizer_that_fails_at_a_text_says_so(good: dict[str, Path], tmp_path: Path) -> None:
    """Patterns that never come to an end meet the library's own limit, which is a panic in it."""
    path = tmp_path / "odd.safetensors"
    tensors = guard.read_tensors(good["tower"], guard.read_layout(good["tower"]))
    whole = json.loads(tensors["tokenizer"].numpy().tobytes())
    for step in (
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "(a*a*)*b"}, "behavior": "Isolated", "invert": False},
    ):
        text = json.dumps(whole | {"pre_tokenizer": step}).encode()
        odd = tensors | {"tokenizer": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        header = header_of(good["tower"], TOWER_KEY) | {"digest": guard.digest(odd)}
        write(path, odd, {TOWER_KEY: json.dumps(header)})
        tower = load_encoder(path)
        with bounded(10.0):
            try:
                tower.tokenize("a" * 40 + "!")
            except BridgeError as error:
                assert "tokenizer cannot be used" in str(error)  # noqa: PT017


# -- files that lie elsewhere ----------------------------------------------------------------------------


def test_only_the_very_content_is_taken_from_a_folder(tmp_path: Path) -> None:
    """Whatever lies there, under whatever name: by size and hash, and nothing is waited for."""
    folder = tmp_path / "there"
    folder.mkdir()
    for number, case in enumerate(CONTAINERS):
        if len(case.data) < 1 << 20:
            (folder / f"{number}.safetensors").write_bytes(case.data)
    places(folder)
    wanted = Wanted("k", sha256=hashlib.sha256(b"another").hexdigest())
    with bounded(4.0):
        assert adopt([folder], tmp_path / "models" / "x.safetensors", wanted) is None
        wanted = Wanted("k", sha256=hashlib.sha256(WHOLE).hexdigest())
        got = adopt([folder, tmp_path / "missing"], tmp_path / "models" / "x.safetensors", wanted)
    assert got is not None and got.path.read_bytes() == WHOLE
    assert (tmp_path / "models" / "x.safetensors").stat().st_nlink >= 1
