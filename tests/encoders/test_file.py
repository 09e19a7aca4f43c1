"""Tower files: what goes in comes out, and what is odd is refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import guard
from language_bridge.encoders.file import (
    METADATA_KEY,
    EncoderHeader,
    load_encoder,
    read_encoder_header,
    save_encoder,
)
from language_bridge.encoders.ledger import REST_NS, Facts, Ledger
from language_bridge.tests.encoders.toys import TEXTS, toy_tower


@pytest.fixture
def tower_file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    save_encoder(path, toy_tower(layer=-2), languages=["zh"], licence="Apache-2.0", source="tests")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("projection", [0, 12])
def test_save_then_load_is_bit_equal(dtype: torch.dtype, projection: int, tmp_path: Path) -> None:
    tower = toy_tower(layer=-2, mask_rule="none", projection=projection).to(dtype)
    path = tmp_path / "toy.safetensors"
    header = save_encoder(path, tower, languages=["zh", "en"], licence="Apache-2.0", source="tests")
    assert read_encoder_header(path) == header
    assert (header.family, header.identity, header.languages) == ("bert", "toy", ("zh", "en"))
    loaded = load_encoder(path, dtype=dtype)
    assert (loaded.layer, loaded.window, loaded.mask_rule) == (-2, 24, "none")
    assert loaded.spec == tower.spec and loaded.tokenizer_json == tower.tokenizer_json
    before, after = tower.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    first, second = tower(*tower.batch(TEXTS)), loaded(*loaded.batch(TEXTS))
    assert torch.equal(first.states, second.states) and torch.equal(first.pooled, second.pooled)


def test_half_precision_on_disk_full_precision_in_memory(tmp_path: Path) -> None:
    tower = toy_tower()
    save_encoder(tmp_path / "half", tower, dtype=torch.float16)
    save_encoder(tmp_path / "full", tower)
    assert (tmp_path / "half").stat().st_size < (tmp_path / "full").stat().st_size * 0.7
    loaded = load_encoder(tmp_path / "half")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    states, exact = loaded(*loaded.batch(TEXTS)).states, tower(*tower.batch(TEXTS)).states
    torch.testing.assert_close(states, exact, rtol=0, atol=0.05)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}


def test_the_digest_tells_towers_apart_and_nothing_else(tmp_path: Path) -> None:
    first = save_encoder(tmp_path / "one", toy_tower(), source="here").digest
    assert save_encoder(tmp_path / "two", toy_tower(), source="there").digest == first
    assert save_encoder(tmp_path / "three", toy_tower(seed=1)).digest != first
    assert len(first) == 64


def test_a_file_of_somebody_else_is_no_tower(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "other")
    assert read_encoder_header(tmp_path / "other") is None
    with pytest.raises(BridgeError, match="not a text tower"):
        load_encoder(tmp_path / "other")


def spoil(path: Path, header: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> None:
    """Change a valid file: header fields (None = taken out), tensors (None = taken out)."""
    contents = safetensors.torch.load_file(path)
    fields = json.loads(guard.read_layout(path).metadata[METADATA_KEY]) | (header or {})
    kept = {name: value for name, value in fields.items() if value is not None}
    for name, tensor in tensors.items():
        contents.pop(name)
        if tensor is not None:
            contents[name] = tensor
    safetensors.torch.save_file(contents, path, {METADATA_KEY: json.dumps(kept)})


NORM = "encoder.embeddings.LayerNorm.weight"


ODD = pytest.mark.parametrize(
    ("header", "tensors", "word"),
    [
        ({"format": 2}, {}, "Update Language Bridge"),
        ({"format": None}, {}, "format"),
        ({"family": "elmo"}, {}, "'elmo'"),
        ({"identity": 7}, {}, "identity"),
        ({"spec": {"vocab": 4}}, {}, "spec"),
        ({"spec": []}, {}, "spec"),
        ({"layer": 9}, {}, "layer"),
        ({"window": 4096}, {}, "window"),
        ({"mask_rule": "causal"}, {}, "mask rule"),
        ({"languages": "zh"}, {}, "languages"),
        ({"digest": "0" * 64}, {}, "digest 000"),
        ({}, {NORM: None}, f"missing: {NORM}"),
        ({}, {NORM: torch.zeros(31)}, f"wrong-shaped: {NORM} \\[31\\]"),
        ({}, {NORM: torch.zeros(32)}, "digest"),
        ({}, {NORM: torch.full((32,), torch.nan)}, f"{NORM}' are not finite"),
        ({}, {"tokenizer": None}, "without a usable tokenizer"),
        ({}, {"tokenizer": torch.zeros(9)}, "without a usable tokenizer"),
        ({}, {"tokenizer": torch.zeros(9, dtype=torch.uint8)}, "tokenizer cannot be used"),
    ],
)


@ODD
def test_odd_files_are_refused(
    header: dict[str, Any], tensors: dict[str, Any], word: str, tower_file: Path
) -> None:
    spoil(tower_file, header, **tensors)
    with pytest.raises(BridgeError, match=word) as caught:
        load_encoder(tower_file)
    assert "what to do:" in str(caught.value)


def test_a_surplus_tensor_is_refused(tower_file: Path) -> None:
    contents = safetensors.torch.load_file(tower_file) | {"encoder.pooler.dense.bias": torch.zeros(32)}
    metadata = dict(guard.read_layout(tower_file).metadata)
    safetensors.torch.save_file(contents, tower_file, metadata)
    with pytest.raises(BridgeError, match=r"surplus: encoder\.pooler\.dense\.bias \[32\]"):
        load_encoder(tower_file)


def test_truncated_files_are_refused(tower_file: Path) -> None:
    whole = tower_file.read_bytes()
    for length in [*range(0, len(whole), 997), len(whole) - 1]:
        tower_file.write_bytes(whole[:length])
        for reader in (read_encoder_header, load_encoder):
            with pytest.raises(BridgeError):
                reader(tower_file)


def test_headers_round_trip() -> None:
    header = EncoderHeader(
        family="bert", identity="\u53e3\u888b", spec={"vocab": 4}, layer=-1, window=24, mask_rule="pad"
    )
    assert EncoderHeader.from_json(header.to_json()) == header


# -- what was verified before --------------------------------------------------------------------------------
@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger for which every file has been at rest for long."""
    return Ledger(tmp_path / "user" / "verified.json", clock=lambda: time.time_ns() + 2 * REST_NS)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that were hashed or searched for odd numbers, in order."""
    done: list[str] = []
    search, take = guard.require_finite, guard._hash
    monkeypatch.setattr(guard, "require_finite", lambda t, what: (done.extend(t), search(t, what))[1])
    monkeypatch.setattr(guard, "_hash", lambda up, name, t: (done.append(name), take(up, name, t))[1])
    return done


def same(first: Any, second: Any) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_file_is_hashed_and_searched_once(
    dtype: torch.dtype | None, tower_file: Path, ledger: Ledger, checks: list[str]
) -> None:
    names = list(guard.read_layout(tower_file).tensors)
    first = load_encoder(tower_file, dtype=dtype, ledger=ledger)
    assert all(checks.count(name) >= 2 for name in names)
    checks.clear()
    again = load_encoder(tower_file, dtype=dtype, ledger=Ledger(ledger.path))
    # The cast is this load's own, and may lead out of the range.
    assert checks == ([] if dtype is None else sorted(name for name in names if name != "tokenizer"))
    assert same(first, again)
    checks.clear()
    load_encoder(tower_file, dtype=dtype)
    assert all(checks.count(name) >= 2 for name in names)


def test_without_a_ledger_nothing_is_written_down(tower_file: Path) -> None:
    load_encoder(tower_file)
    assert [path.name for path in tower_file.parent.iterdir()] == [tower_file.name]


def test_a_file_that_was_written_just_now_is_not_remembered(tower_file: Path, checks: list[str]) -> None:
    ledger = Ledger(tower_file.with_name("verified.json"))
    tower_file.touch()
    load_encoder(tower_file, ledger=ledger)
    assert not ledger.path.exists()
    checks.clear()
    load_encoder(tower_file, ledger=ledger)
    assert checks


def overwrite(path: Path, name: str, tensor: torch.Tensor, keep_time: bool) -> None:
    """Change one tensor in place: neither header nor size change, nor, on demand, the time of writing."""
    before = path.stat()
    time.sleep(0.05)  # longer than a tick of the file system's clock
    with open(path, "r+b") as file:
        file.seek(guard.read_layout(path).tensors[name].first)
        file.write(guard._bytes(tensor))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [False, True] if os.name == "posix" else [False])
@pytest.mark.parametrize(("number", "word"), [(3.0, "digest"), (torch.nan, "not finite")])
def test_a_file_that_was_written_to_is_verified_again(
    number: float, word: str, keep_time: bool, tower_file: Path, ledger: Ledger
) -> None:
    load_encoder(tower_file, ledger=ledger)
    overwrite(tower_file, NORM, torch.full((32,), number), keep_time)
    for _ in range(2):
        with pytest.raises(BridgeError, match=word):
            load_encoder(tower_file, ledger=ledger)


def test_a_file_under_another_name_or_newly_saved_is_verified_again(
    tower_file: Path, ledger: Ledger, checks: list[str]
) -> None:
    load_encoder(tower_file, ledger=ledger)
    moved = tower_file.rename(tower_file.with_name("moved"))
    for path in (moved, tower_file):
        save_encoder(tower_file, toy_tower(layer=-2))
        checks.clear()
        load_encoder(path, ledger=ledger)
        assert checks


def test_a_file_that_was_refused_is_not_remembered(tower_file: Path, ledger: Ledger) -> None:
    spoil(tower_file, **{NORM: torch.zeros(32)})
    for _ in range(2):
        with pytest.raises(BridgeError, match="digest"):
            load_encoder(tower_file, ledger=ledger)
    assert not ledger.path.exists()


@pytest.mark.parametrize("number", [3.0, torch.nan])
def test_a_file_that_is_written_to_while_it_is_read_is_not_trusted(
    number: float, tower_file: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the entry of before stands for what was read, nor is what was read remembered."""
    whole = tower_file.read_bytes()
    fill = guard.fill

    def write_then_fill(*arguments: Any, **options: Any) -> None:
        tower_file.write_bytes(whole)
        overwrite(tower_file, NORM, torch.full((32,), number), keep_time=False)
        fill(*arguments, **options)

    load_encoder(tower_file, ledger=ledger)
    remembered = ledger.path.read_bytes()
    monkeypatch.setattr(guard, "fill", write_then_fill)
    with pytest.raises(BridgeError, match="digest|not finite"):
        load_encoder(tower_file, ledger=ledger)
    assert ledger.path.read_bytes() == remembered


def test_a_file_that_is_touched_while_it_is_read_is_verified_in_the_same_load(
    tower_file: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, checks: list[str]
) -> None:
    first = load_encoder(tower_file, ledger=ledger)
    fill = guard.fill

    def touch_then_fill(*arguments: Any, **options: Any) -> None:
        time.sleep(0.05)
        tower_file.touch()
        fill(*arguments, **options)

    monkeypatch.setattr(guard, "fill", touch_then_fill)
    checks.clear()
    assert same(first, load_encoder(tower_file, ledger=ledger))
    assert all(checks.count(name) >= 2 for name in guard.read_layout(tower_file).tensors)


def forge(ledger: Ledger, path: Path) -> None:
    """Write into the ledger that a file was verified, and found to be what its header says."""
    layout = guard.read_layout(path)
    digest = json.loads(layout.metadata[METADATA_KEY]).get("digest", "")
    with open(path, "rb") as file:
        ledger.remember(Facts.of(path, file.fileno()), layout.digest, digest)


@ODD
def test_a_ledger_stands_for_the_hash_and_the_search_alone(
    header: dict[str, Any], tensors: dict[str, Any], word: str, tower_file: Path, ledger: Ledger
) -> None:
    spoil(tower_file, header, **tensors)
    forge(ledger, tower_file)
    if word.startswith("digest") or "finite" in word:
        load_encoder(tower_file, ledger=ledger)
        return
    with pytest.raises(BridgeError, match=word):
        load_encoder(tower_file, ledger=ledger)


def test_a_digest_in_the_ledger_that_is_not_the_headers_saves_no_hashing(
    tower_file: Path, ledger: Ledger, checks: list[str]
) -> None:
    layout = guard.read_layout(tower_file)
    with open(tower_file, "rb") as file:
        ledger.remember(Facts.of(tower_file, file.fileno()), layout.digest, "")
    load_encoder(tower_file, ledger=ledger)
    assert checks == [*sorted(name for name in layout.tensors if name != "tokenizer"), "tokenizer"]
