"""Gemma-3-1B and T5Gemma-2B as RouWei's towers: recognised at full size, converted from small folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import load_bridge
from language_bridge.conversion import convert as room
from language_bridge.conversion.containers import Part, Source, Weights
from language_bridge.conversion.presets import Presets, published
from language_bridge.encoders.file import load_encoder
from language_bridge.encoders.gemma import GemmaSpec
from language_bridge.tests.bridges import references
from language_bridge.tests.conversion.layouts import save
from language_bridge.tests.encoders.test_gemma import expected_states, reference, toy_files, uncapped

GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
"""The published config.json (google/gemma-3-1b-it), without what does not concern the numbers."""

T5_GEMMA_2B: dict[str, Any] = {
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "layer_types": ["sliding_attention", "full_attention"] * 13,
    "max_position_embeddings": 8192,
    "model_type": "t5_gemma_module",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
"""Of T5Gemma-2B's encoder, as a third party writes it out; the published file is behind a licence gate."""


def choices(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[set[str], GemmaSpec]:
    """The tower rows that fit a published file of these shapes, and its spec."""
    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    weights = Weights(dict(shapes), dtypes, lambda key: torch.empty(shapes[key], device="meta"))
    contents = room._contents(Source((Part("x", weights, dict(config)),), {}, {}, ()))
    (found,) = contents.towers
    assert found.tower is not None and isinstance(found.tower[1], GemmaSpec)
    return {choice.tower.name for choice in room._fitting(contents, published())}, found.tower[1]


def test_gemma_3_1b_is_recognised_at_full_size() -> None:
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA_3_1B))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    names, spec = choices(GEMMA_3_1B, shapes)
    assert names == {"gemma-3-1b-it", "rouwei-gemma-v0.1"}
    assert spec.bfloat16 and spec.reach == 512 and spec.theta == 1e6 and spec.near_theta == 1e4
    assert [number for number in range(26) if not spec.local(number)] == [5, 11, 17, 23]


def test_t5gemma_2b_is_recognised_at_full_size_beside_its_decoder() -> None:
    halves = {half: transformers.T5GemmaModuleConfig(**T5_GEMMA_2B) for half in ("encoder", "decoder")}
    config = transformers.T5GemmaConfig(**halves, vocab_size=256_000)
    with torch.device("meta"):
        model = transformers.T5GemmaForConditionalGeneration(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert any(key.startswith("model.decoder.layers.25.cross_attn") for key in shapes)
    whole = {"model_type": "t5gemma", "encoder": T5_GEMMA_2B, "decoder": T5_GEMMA_2B}
    names, spec = choices(whole, shapes)
    assert names == {"t5gemma-2b-2b-ul2", "t5gemma-2b-2b-ul2-right"}
    assert spec.softcap == 50 and not spec.causal and spec.bfloat16
    encoder = {key[6:]: shape for key, shape in shapes.items() if key.startswith("model.encoder.")}
    assert choices(whole, encoder) == (names, spec) == choices(T5_GEMMA_2B, encoder)


def folder_of(kind: str, path: Path) -> tuple[Path, torch.nn.Module]:
    """A transformers folder in two shards, in bfloat16, and the model as its readers ran it."""
    model, config, tensors = reference(kind)
    model = uncapped(model) if kind == "T5Gemma" else model
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())  # its buffers stay as they are
    names = sorted(tensors)
    index = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    path.mkdir()
    for file in sorted(set(index.values())):
        chosen = {name: tensors[name].to(torch.bfloat16) for name in names if index[name] == file}
        save_file(chosen, str(path / file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}), encoding="utf-8")
    for name, data in toy_files().items():
        (path / name).write_bytes(data)
    return path, model


def table() -> Presets:
    """The published rows of RouWei, for towers of the small size."""
    towers = {
        name: dataclasses.replace(row, match={**row.match, "vocab": 420, "width": 32, "layers": 5}, window=24)
        if row.family == "gemma"
        else row
        for name, row in published().towers.items()
    }
    methods = {
        name: dataclasses.replace(row, match={"hidden": 32})
        for name, row in published().methods.items()
        if row.kind == "rouwei"
    }
    return Presets(towers, methods)


def adapter(path: Path) -> Path:
    weights = references.Rouwei(32, 32, 8, 12, 6, 2, 3).state_dict()
    return save(path, {key: value.contiguous() for key, value in weights.items()})


@pytest.mark.parametrize(
    ("kind", "preset", "tower"),
    [
        ("Gemma3", "rouwei-gemma-v0", "gemma-3-1b-it"),
        ("Gemma3", "rouwei-gemma-v0.1", "rouwei-gemma-v0.1"),
        ("T5Gemma", "rouwei-t5gemma", "t5gemma-2b-2b-ul2"),
        ("T5Gemma", "rouwei-t5gemma-right", "t5gemma-2b-2b-ul2-right"),
    ],
)
def test_adapter_and_folder_give_bridge_and_tower(tmp_path: Path, kind: str, preset: str, tower: str) -> None:
    folder, model = folder_of(kind, tmp_path / "tower")
    written = room.convert(
        [adapter(tmp_path / "a.safetensors"), folder], tmp_path / "out", preset=preset, presets=table()
    )
    paths = {path.name: path for path in written}
    assert set(paths) == {f"{preset}.safetensors", f"{tower}-tower.safetensors"}
    bridge = load_bridge(paths[f"{preset}.safetensors"])
    encoder = load_encoder(paths[f"{tower}-tower.safetensors"])
    assert bridge.header.encoder.identity == encoder.identity == tower
    assert bridge.header.encoder.digest and bridge.header.encoder.family == encoder.family == "gemma"
    assert isinstance(encoder.spec, GemmaSpec) and encoder.spec.bfloat16 and encoder.window == 24
    assert encoder.spec.left == (preset == "rouwei-t5gemma")
    assert encoder.marks.start == (2,) and encoder.marks.end == ((1,) if kind == "T5Gemma" else ())
    assert bool(bridge.header.training.get("template")) == (kind == "Gemma3")
    ids, mask = encoder.batch(["a red cat on the mat", "draw"])
    scale = torch.tensor(32**0.5)
    with torch.no_grad():  # transformers in float32, under the factor of bfloat16
        model.get_input_embeddings().weight.mul_(scale.bfloat16().float() / scale)
        expected = expected_states(model, ids, mask)[-1]
        torch.testing.assert_close(encoder(ids, mask).states[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_a_folder_alone_gives_the_tower_that_was_named(tmp_path: Path) -> None:
    folder, _ = folder_of("Gemma3", tmp_path / "tower")
    with pytest.raises(BridgeError, match="Several published models") as caught:
        room.convert([folder], tmp_path / "out", presets=table())
    assert caught.value.found == "gemma-3-1b-it, rouwei-gemma-v0.1"
    (path,) = room.convert([folder], tmp_path / "out", preset="gemma-3-1b-it", presets=table())
    assert load_encoder(path).identity == "gemma-3-1b-it"


def test_an_adapter_alone_reads_our_tower_or_the_hosts(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    with pytest.raises(BridgeError, match="Several published models") as caught:
        room.convert([source], tmp_path / "out", presets=table())
    assert "rouwei-gemma-v0, " in caught.value.found and "rouwei-gemma-v0-host" in caught.value.found
    for preset, family in (("rouwei-gemma-v0", "gemma"), ("rouwei-gemma-v0-host", "host")):
        (path,) = room.convert([source], tmp_path / "out", preset=preset, presets=table())
        header = load_bridge(path).header
        assert header.encoder.family == family and not header.encoder.digest
        assert header.training["template"] == dict(published().methods[preset].template)


def test_a_folder_without_tokenizer_or_config_is_refused_in_words(tmp_path: Path) -> None:
    folder, _ = folder_of("Gemma3", tmp_path / "tower")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(BridgeError, match="tokenizer of this text tower") as caught:
        room.convert([folder], tmp_path / "out", preset="gemma-3-1b-it", presets=table())
    assert "tokenizer.json or tokenizer.model" in caught.value.expected
    (folder / "config.json").unlink()
    with pytest.raises(BridgeError, match="weights alone"):
        room.convert([folder], tmp_path / "out", preset="gemma-3-1b-it", presets=table())
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
