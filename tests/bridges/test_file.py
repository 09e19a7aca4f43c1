"""Bridge files: what they hold, and every way in which they can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import (
    ENCODER_METADATA_KEY,
    METADATA_KEY,
    BridgeHeader,
    EncoderRef,
    load_bridge,
    read_header,
    save_bridge,
)
from language_bridge.encoders import guard
from language_bridge.encoders.bert import Bert, BertSpec, bert_tokenizer
from language_bridge.encoders.file import save_encoder
from language_bridge.encoders.ledger import REST_NS, Ledger
from language_bridge.tests.bridges.toys import MarkedOps, toy_bridge, toy_header, toy_hidden

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u7ea2", "\u732b", "a", "##b"]


def toy_tower(identity: str = "toy") -> Bert:
    spec = BertSpec(vocab=9, width=8, layers=1, window=16, heads=2, inner=16)
    tower = Bert(spec, bert_tokenizer(VOCABULARY), identity=identity, window=16)
    tower.reset_parameters(torch.Generator().manual_seed(3))
    return tower


def pack(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_header_is_read_without_the_weights(bridge_file: Path) -> None:
    header = read_header(bridge_file)
    assert header == toy_header(toy_bridge("mlp", 8))
    assert header is not None and header.training["note"] == "\u7ea2\u732b"


def test_a_file_of_somebody_else_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    assert read_header(path) is None
    with pytest.raises(BridgeError, match="not a bridge of Language Bridge"):
        load_bridge(path)


def test_the_file_is_plain_safetensors(bridge_file: Path) -> None:
    tensors = safetensors.torch.load_file(bridge_file)
    state = load_bridge(bridge_file).bridge.state_dict()
    assert {f"bridge.{key}" for key in state} == set(tensors)
    assert all(torch.equal(tensors[f"bridge.{key}"], value) for key, value in state.items())


def test_the_same_contents_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        bridge = toy_bridge("mlp", 8)
        save_bridge(tmp_path / name, toy_header(bridge), bridge, toy_tower())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_half_precision_file_loads_into_the_asked_dtype(tmp_path: Path) -> None:
    bridge = toy_bridge("mlp", 8)
    save_bridge(tmp_path / "half", toy_header(bridge), bridge, toy_tower(), dtype=torch.float16)
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        loaded = load_bridge(tmp_path / "half", dtype=dtype, ops=MarkedOps)
        assert loaded.encoder is not None
        for module in (loaded.bridge, loaded.encoder):
            assert {parameter.dtype for parameter in module.parameters()} == {dtype or torch.float32}
            assert all(parameter.requires_grad for parameter in module.parameters())
    assert type(loaded.bridge.fc) is MarkedOps.Linear


def test_weights_too_large_for_the_asked_dtype_are_refused(tmp_path: Path) -> None:
    bridge = toy_bridge("linear")
    with torch.no_grad():
        bridge.context.bias[3] = 1e6
    with pytest.raises(BridgeError, match=r"'bridge\.context\.bias' are not finite \(float16\)"):
        save_bridge(tmp_path / "toy", toy_header(bridge), bridge, dtype=torch.float16)
    save_bridge(tmp_path / "toy", toy_header(bridge), bridge)
    with pytest.raises(BridgeError, match=r"'bridge\.context\.bias' are not finite \(float16\)"):
        load_bridge(tmp_path / "toy", dtype=torch.float16)


def test_a_tower_travels_with_its_bridge(tmp_path: Path) -> None:
    bridge, tower = toy_bridge("mlp"), toy_tower()
    path = tmp_path / "toy.safetensors"
    save_bridge(path, toy_header(bridge), bridge, tower)
    loaded = load_bridge(path)
    assert loaded.encoder is not None and loaded.encoder.identity == "toy"
    ids, mask = tower.batch(["\u7ea2\u732b ab", ""])
    before, after = tower(ids, mask), loaded.encoder(*loaded.encoder.batch(["\u7ea2\u732b ab", ""]))
    assert torch.equal(before.states, after.states) and torch.equal(before.pooled, after.pooled)
    assert torch.equal(bridge(before).context, loaded.bridge(after).context)


def test_the_tower_must_be_the_one_in_the_header(tmp_path: Path) -> None:
    bridge = toy_bridge("mlp")
    with pytest.raises(BridgeError, match="identity 'other' against"):
        save_bridge(tmp_path / "toy", toy_header(bridge), bridge, toy_tower("other"))
    save_bridge(tmp_path / "toy", toy_header(bridge), bridge, toy_tower())
    layout = guard.read_layout(tmp_path / "toy")
    tower = json.loads(layout.metadata[ENCODER_METADATA_KEY]) | {"layer": 0}
    metadata = dict(layout.metadata) | {ENCODER_METADATA_KEY: json.dumps(tower)}
    safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "toy"), tmp_path / "odd", metadata)
    with pytest.raises(BridgeError, match="layer 0 against"):
        load_bridge(tmp_path / "odd")


def test_a_reference_with_a_digest_takes_that_training_of_the_tower_only(tmp_path: Path) -> None:
    bridge, tower = toy_bridge("mlp"), toy_tower()
    digest = save_encoder(tmp_path / "tower", tower).digest
    header = toy_header(bridge)
    named = dataclasses.replace(header, encoder=dataclasses.replace(header.encoder, digest=digest))
    save_bridge(tmp_path / "toy", named, bridge, tower)
    assert load_bridge(tmp_path / "toy").header.encoder.digest == digest
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    with pytest.raises(BridgeError, match="digest"):
        save_bridge(tmp_path / "toy", named, bridge, tower)
    save_bridge(tmp_path / "toy", header, bridge, tower)  # without a digest any training of the tower will do


def test_unet_weights_come_back_and_must_be_announced(tmp_path: Path) -> None:
    bridge = toy_bridge("linear")
    unet = {"middle_block.1.to_k.weight": torch.randn(4, 8)}
    path = tmp_path / "toy.safetensors"
    with pytest.raises(BridgeError, match="1 U-Net tensors"):
        save_bridge(path, toy_header(bridge), bridge, unet=unet)
    with pytest.raises(BridgeError, match="0 U-Net tensors"):
        save_bridge(path, toy_header(bridge, unet="kv"), bridge)
    save_bridge(path, toy_header(bridge, unet="kv"), bridge, unet=unet)
    loaded = load_bridge(path)
    assert list(loaded.unet) == list(unet)
    assert torch.equal(loaded.unet["middle_block.1.to_k.weight"], unet["middle_block.1.to_k.weight"])


def test_a_header_of_an_older_version_is_kept_as_it_is(tmp_path: Path) -> None:
    """A field that its version did not know stands at its default; any other difference is refused."""
    bridge = toy_bridge("linear", 8)
    old = {"hidden": 8, "context": 8, "pooled": 8}
    save_bridge(tmp_path / "toy", toy_header(bridge, spec=old), bridge)
    loaded = load_bridge(tmp_path / "toy")
    assert loaded.header.spec == old and loaded.bridge.spec == bridge.spec
    save_bridge(tmp_path / "again", loaded.header, loaded.bridge)
    for odd in ({"norm": True}, {"hidden": 9}, {"stranger": 0}):
        with pytest.raises(BridgeError, match="disagree"):
            save_bridge(tmp_path / "odd", toy_header(bridge, spec=old | odd), bridge)
    with pytest.raises(BridgeError, match="disagree"):
        save_bridge(tmp_path / "odd", toy_header(bridge, spec={"context": 8, "pooled": 8}), bridge)


def test_a_header_that_lies_about_the_bridge_is_not_written(tmp_path: Path) -> None:
    bridge = toy_bridge("mlp")
    for odd in ({"kind": "linear"}, {"spec": {"hidden": 9}}, {"base": "sd3"}, {"unet": "half"}):
        with pytest.raises(BridgeError):
            save_bridge(tmp_path / "toy", toy_header(bridge, **odd), bridge)
    with pytest.raises(BridgeError, match="cannot be written"):
        save_bridge(tmp_path / "toy", toy_header(bridge, training={"loss": float("nan")}), bridge)
    with pytest.raises(BridgeError, match="cannot be written"):
        save_bridge(tmp_path / "toy", toy_header(bridge, training={"model": object()}), bridge)
    assert list(tmp_path.iterdir()) == []


HEADER = json.loads(toy_header(toy_bridge("mlp", 8)).to_json())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        *[({name: None}, name) for name in HEADER],
        *[
            ({name: {"odd": 1} if name not in ("spec", "training", "encoder") else 7}, name)
            for name in HEADER
        ],
        ({"format": 0}, "format 0"),
        ({"format": 2}, "format 2"),
        ({"format": 1.0}, "format 1.0"),
        ({"format": True}, "format True"),
        ({"kind": "perceiver"}, "'perceiver'"),
        ({"base": "flux"}, "'flux'"),
        ({"unet": "all"}, "'all'"),
        ({"languages": ["zh", 3]}, "languages"),
        ({"encoder": {"family": "bert"}}, "family"),
        ({"encoder": HEADER["encoder"] | {"layer": "last"}}, "layer"),
        ({"encoder": HEADER["encoder"] | {"window": 1 << 40}}, "window"),
        ({"spec": HEADER["spec"] | {"depth": 10**9}}, "depth"),
        ({"spec": HEADER["spec"] | {"width": 1 << 24}}, "wrong-shaped"),
        ({"spec": HEADER["spec"] | {"width": 1 << 60}}, "width"),
        ({"spec": HEADER["spec"] | {"depth": 4}}, "projector.6.weight"),
        ({"spec": HEADER["spec"] | {"pooled": 0}}, "surplus"),
    ],
)
def test_an_odd_header_is_refused(change: dict[str, Any], word: str, bridge_file: Path) -> None:
    tensors = safetensors.torch.load_file(bridge_file)
    header = {name: value for name, value in (HEADER | change).items() if value is not None}
    safetensors.torch.save_file(tensors, bridge_file, {METADATA_KEY: json.dumps(header)})
    with pytest.raises(BridgeError) as caught:
        load_bridge(bridge_file)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '"x"', "null", "NaN", '{"format": NaN}', '{"format": 1, "format": 1}', "[" * 9999],
)
def test_a_header_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "toy"
    path.write_bytes(pack({"__metadata__": {METADATA_KEY: text}}))
    with pytest.raises(BridgeError):
        read_header(path)


DAMAGED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "zeros": b"\0" * 64,
    "text": b"this is not a safetensors file, but somebody gave it the name of one",
    "pickle": b"\x80\x02}q\x00." * 9,
    "zip": b"PK\x03\x04" + b"\0" * 60,
    "huge length": struct.pack("<Q", 1 << 62) + b"{}",
    "negative length": b"\xff" * 8 + b"{}",
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "header over 8 MiB": pack(b"{" + b" " * (8 << 20) + b"}"),
    "header of one byte": pack(b"{"),
    "no json": pack(b"{]"),
    "a list": pack([]),
    "not utf-8": pack(b'{"\xff": 1}'),
    "deep": pack(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "long number": pack(b'{"a": ' + b"9" * 10_000 + b"}"),
    "NaN": pack(b'{"a": NaN}'),
    "twice": pack(b'{"__metadata__": {}, "__metadata__": {}}'),
    "metadata a list": pack({"__metadata__": []}),
    "metadata of numbers": pack({"__metadata__": {METADATA_KEY: 3}}),
    "metadata nested": pack({"__metadata__": {METADATA_KEY: {"format": 1}}}),
    "too many tensors": pack({f"t{n}": entry(shape=[0], offsets=[0, 0]) for n in range(20_001)}),
    "tensor a number": pack({"a": 1}),
    "tensor without dtype": pack({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "tensor with more": pack({"a": entry() | {"extra": 1}}, b"\0" * 4),
    "unknown dtype": pack({"a": entry(dtype="F31")}, b"\0" * 4),
    "dtype a list": pack({"a": entry() | {"dtype": ["F32"]}}, b"\0" * 4),
    "negative shape": pack({"a": entry(shape=[-1])}, b"\0" * 4),
    "shape a word": pack({"a": entry(shape="1")}, b"\0" * 4),
    "shape of floats": pack({"a": entry(shape=[1.0])}, b"\0" * 4),
    "shape true": pack({"a": entry(shape=[True])}, b"\0" * 4),
    "endless shape": pack({"a": entry(shape=[1] * 9)}, b"\0" * 4),
    "overflowing shape": pack({"a": entry(shape=[1 << 47] * 8)}, b"\0" * 4),
    "too few bytes": pack({"a": entry(shape=[2])}, b"\0" * 4),
    "past the end": pack({"a": entry(offsets=[4, 8])}, b"\0" * 4),
    "backwards": pack({"a": entry(offsets=[4, 0])}, b"\0" * 4),
    "three offsets": pack({"a": entry(offsets=[0, 4, 4])}, b"\0" * 4),
    "overlap": pack({"a": entry(), "b": entry()}, b"\0" * 4),
    "hole": pack({"a": entry(), "b": entry(offsets=[8, 12])}, b"\0" * 12),
    "trailing bytes": pack({"a": entry()}, b"\0" * 5),
    "path as a name": pack({"../../etc/passwd": entry()}, b"\0" * 4),
    "no name": pack({"": entry()}, b"\0" * 4),
    "NUL in a name": pack({"a\0b": entry()}, b"\0" * 4),
    "long name": pack({"a" * 257: entry()}, b"\0" * 4),
    "line end after a name": pack({"a\n": entry()}, b"\0" * 4),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    path.write_bytes(DAMAGED[name])
    for reader in (read_header, load_bridge):
        with pytest.raises(BridgeError, match=r"toy\.safetensors"):
            reader(path)


def test_every_truncation_is_refused(bridge_file: Path) -> None:
    whole = bridge_file.read_bytes()
    for length in [*range(64), *range(64, len(whole), 37), len(whole) - 1]:
        bridge_file.write_bytes(whole[:length])
        with pytest.raises(BridgeError):
            read_header(bridge_file)


def test_mutants_never_raise_anything_else(bridge_file: Path) -> None:
    """300 seeded mutants: each loads or is refused in three parts."""
    whole, chance = bridge_file.read_bytes(), random.Random(5)
    for _ in range(300):
        mutant = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            # half of the hits go to the length and the header, where they hurt
            place = chance.randrange(chance.choice((8, 900, 900, len(whole))))
            mutant[place] = chance.randrange(256)
        bridge_file.write_bytes(mutant)
        try:
            loaded = load_bridge(bridge_file)
        except BridgeError as error:
            assert "what to do:" in str(error)
        else:
            assert all(torch.isfinite(p).all() for p in loaded.bridge.parameters())


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(BridgeError, match="cannot be opened"):
            read_header(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    call: str, bridge_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bridge_file.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    bridge = toy_bridge("linear")
    with pytest.raises(BridgeError, match="No space left"):
        save_bridge(bridge_file, toy_header(bridge), bridge)
    monkeypatch.undo()
    assert bridge_file.read_bytes() == before
    assert list(bridge_file.parent.iterdir()) == [bridge_file]


def test_weights_that_went_astray_are_not_written(bridge_file: Path) -> None:
    before = bridge_file.read_bytes()
    bridge = toy_bridge("linear")
    with torch.no_grad():
        bridge.context.weight[0, 0] = torch.nan
    with pytest.raises(BridgeError, match=r"1 of 64 numbers in 'bridge\.context\.weight'"):
        save_bridge(bridge_file, toy_header(bridge), bridge)
    assert bridge_file.read_bytes() == before


def test_a_loaded_bridge_outlives_its_file(bridge_file: Path) -> None:
    loaded = load_bridge(bridge_file)
    before = loaded.bridge(toy_hidden(1, 4)).context
    bridge_file.write_bytes(b"\0" * bridge_file.stat().st_size)
    assert torch.equal(loaded.bridge(toy_hidden(1, 4)).context, before)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger for which every file has been at rest for long."""
    return Ledger(tmp_path / "user" / "verified.json", clock=lambda: time.time_ns() + 2 * REST_NS)


def whole_bridge(path: Path) -> Path:
    """A file with all that may be in one: a bridge, its tower, a U-Net part."""
    bridge = toy_bridge("mlp")
    unet = {"x.to_k.weight": torch.randn(4, 8), "x.to_v.weight": torch.randn(4, 8)}
    save_bridge(path, toy_header(bridge, unet="kv"), bridge, toy_tower(), unet=unet)
    return path


def everything(path: Path, ledger: Ledger | None = None) -> dict[str, torch.Tensor]:
    """Every weight that a file gives, by its name in the file."""
    loaded = load_bridge(path, ledger=ledger)
    assert loaded.encoder is not None
    parts = {"bridge.": loaded.bridge.state_dict(), "encoder.": loaded.encoder.state_dict()}
    parts["unet."] = dict(loaded.unet)
    return {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}


def test_a_verified_bridge_file_is_taken_as_it_is(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = whole_bridge(tmp_path / "toy")
    first = everything(path, ledger)

    def search(tensors: dict[str, torch.Tensor], what: str) -> None:
        raise AssertionError(f"searched {list(tensors)}")

    monkeypatch.setattr(guard, "require_finite", search)
    monkeypatch.setattr(guard, "_hash", search)
    again = everything(path, ledger)
    assert list(first) == list(again) and all(torch.equal(first[key], again[key]) for key in first)
    with pytest.raises(AssertionError, match="searched"):
        everything(path)


@pytest.mark.parametrize("part", ["bridge.", "encoder.", "unet."])
@pytest.mark.parametrize("number", [torch.nan, 3.0])
def test_a_bridge_file_that_was_written_to_is_verified_again(
    part: str, number: float, tmp_path: Path, ledger: Ledger
) -> None:
    path = whole_bridge(tmp_path / "toy")
    first = everything(path, ledger)
    name, entry = next((n, e) for n, e in guard.read_layout(path).tensors.items() if n.startswith(part))
    time.sleep(0.05)  # longer than a tick of the file system's clock
    with open(path, "r+b") as file:
        file.seek(entry.first)
        file.write(struct.pack("<f", number))
    if number == 3.0 and part != "encoder.":  # without a digest, another finite number is another bridge
        assert not torch.equal(everything(path, ledger)[name], first[name])
        return
    for _ in range(2):
        with pytest.raises(BridgeError, match="not finite" if number != 3.0 else "digest"):
            everything(path, ledger)


def test_header_values_compare_and_default() -> None:
    header = BridgeHeader(kind="x", spec={}, base="sd1", encoder=EncoderRef("bert", "toy", -1, 77, "none"))
    assert (header.format, header.unet, header.training, header.languages) == (1, "none", {}, ())
    assert BridgeHeader.from_json(header.to_json()) == header
