"""Tower files: what goes in comes out, and what is odd is refused."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize(
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
