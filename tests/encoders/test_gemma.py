"""Gemma 2, Gemma 3 and T5Gemma's encoder against transformers; their configs; their tokenizer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import identify_encoder
from language_bridge.encoders.file import load_encoder, save_encoder
from language_bridge.encoders.gemma import Gemma, GemmaSpec
from language_bridge.tests.bridges.toys import MarkedOps
from language_bridge.tests.encoders.toys import (
    SPEECH,
    TEXTS,
    TOYS,
    published,
    read,
    sentencepiece_model,
    shake,
)

SIZES: dict[str, Any] = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "query_pre_attn_scalar": 7,
    "sliding_window": 5,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"] * 2
KINDS: dict[str, dict[str, Any]] = {
    "Gemma3": {"sliding_window_pattern": 3, "rope_theta": 1e4, "rope_local_base_freq": 50.0},
    "Gemma3 of one pair": {"num_key_value_heads": 1, "layer_types": PATTERN[:5]},
    "Gemma3 stretched": {
        "sliding_window_pattern": 2,
        "rope_theta": 300.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "Gemma3 all global": {"layer_types": ["full_attention"] * 5},
    "Gemma2": {"rope_theta": 200.0, "attn_logit_softcapping": 2.0},
    "T5Gemma": {"rope_theta": 200.0, "attn_logit_softcapping": 2.0},
    "T5Gemma all local": {"layer_types": ["sliding_attention"] * 5, "attn_logit_softcapping": 1.5},
}
EXACT = {"rtol": 0, "atol": 1e-5}
"""Seen in float32: 0, at states up to 24 (both sides end in the same kernels of torch)."""


def reference(kind: str) -> tuple[torch.nn.Module, dict[str, Any], dict[str, torch.Tensor]]:
    """transformers' model, config.json as that kind publishes it, and the tensors under published names."""
    import transformers

    family, config = kind.split()[0], SIZES | KINDS[kind]
    if family == "T5Gemma":
        halves = {half: transformers.T5GemmaModuleConfig(**config) for half in ("encoder", "decoder")}
        made = transformers.T5GemmaConfig(**halves, vocab_size=420)
        made._attn_implementation = "eager"
        model = shake(transformers.T5GemmaModel(made))
        parts = {"encoder": config | {"model_type": "t5_gemma_module"}, "decoder": config}
        tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
        assert any(key.startswith("model.decoder.layers.") for key in tensors)
        return model.encoder, {"model_type": "t5gemma", "vocab_size": 420, **parts}, tensors
    text = "Text" if family == "Gemma3" else ""
    made = getattr(transformers, f"{family}{text}Config")(**config)
    made._attn_implementation = "eager" if family == "Gemma2" else "sdpa"  # sdpa leaves softcap out
    model = shake(getattr(transformers, f"{family}{text}Model")(made))
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors["lm_head.weight"] = torch.zeros(420, 32)
    name = {"Gemma2": "gemma2", "Gemma3": "gemma3_text"}[family]
    return model, config | {"model_type": name}, tensors


def uncapped(model: torch.nn.Module) -> torch.nn.Module:
    """T5Gemma as transformers 4.54 to 4.57 ran it: by torch's own attention, which knows no softcap."""
    for layer in model.layers:
        layer.self_attn.attn_logit_softcapping = None  # newer ones refuse what those had ignored
        layer.self_attn.config._attn_implementation = "sdpa"
    model.config._attn_implementation = "sdpa"
    return model


def expected_states(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
    seen = torch.ones_like(ids) if mask is None else mask.long()
    more = {} if type(model).__name__ == "T5GemmaEncoder" else {"use_cache": False}
    with torch.no_grad():
        return model(ids, attention_mask=seen, output_hidden_states=True, **more).hidden_states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
@pytest.mark.parametrize("mask_rule", ["pad", "none"])
def test_states_equal_the_reference(kind: str, layer: int, mask_rule: str) -> None:
    """Texts shorter and longer than the sliding window of five tokens, padded to 24."""
    model, config, tensors = reference(kind)
    tower = read(tensors, config, TOYS["gemma"](), layer=layer, mask_rule=mask_rule)
    ids, mask = tower.batch(TEXTS)
    assert int(mask.sum(1).max()) == 24 and int(mask.sum(1).min()) < 5
    expected = expected_states(model, ids, mask if mask_rule == "pad" else None)[layer]
    with torch.no_grad():
        found = tower(ids, mask).states
    heard = mask if mask_rule == "pad" else torch.ones_like(mask)
    assert expected[heard].abs().max() > 1 and torch.isfinite(found).all()
    torch.testing.assert_close(found[heard], expected[heard], **EXACT)


def test_softcap_can_be_left_out_as_older_transformers_did() -> None:
    model, config, tensors = reference("T5Gemma")
    tower = read(tensors, config, TOYS["gemma"]())
    other = Gemma(dataclasses.replace(tower.spec, softcap=0.0), tower.tokenizer_json, identity="t", window=24)
    other.load_state_dict(tower.state_dict())
    ids, mask = tower.batch(TEXTS)
    with torch.no_grad():
        states, capped = (each(ids, mask).states[mask] for each in (other, tower))
    torch.testing.assert_close(states, expected_states(uncapped(model), ids, mask)[-1][mask], **EXACT)
    assert (states - capped).abs().max() > 0.1


@pytest.mark.parametrize("change", [{"reach": 4}, {"every": 4}, {"near_theta": 60.0}, {"theta": 9e3}])
def test_each_fact_of_the_config_is_heard(change: dict[str, Any]) -> None:
    """What the parity above could not see if sizes were too small to matter."""
    _, config, tensors = reference("Gemma3")
    tower = read(tensors, config, TOYS["gemma"]())
    other = Gemma(dataclasses.replace(tower.spec, **change), tower.tokenizer_json, identity="toy", window=24)
    other.load_state_dict(tower.state_dict())
    ids, mask = tower.batch(TEXTS)
    with torch.no_grad():
        assert not torch.allclose(tower(ids, mask).states, other(ids, mask).states, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["Gemma3", "T5Gemma"])
def test_padding_before_the_text_gives_the_texts_the_same_states(kind: str) -> None:
    """Rotary positions tell distances alone: the same states anywhere, and those of transformers there."""
    model, config, tensors = reference(kind)
    right = read(tensors, config, TOYS["gemma"]())
    left = Gemma(
        dataclasses.replace(right.spec, left=True, end=1), right.tokenizer_json, identity="toy", window=24
    )
    left.load_state_dict(right.state_dict())
    ids, mask = left.batch(TEXTS)
    assert mask[:, -1].all() and (ids[:, -1] == 1).all() and not mask[1, 0]
    assert torch.equal(left.mask_of(ids), mask)
    expected = expected_states(model, ids, mask)[-1]
    with torch.no_grad():
        torch.testing.assert_close(left(ids, mask).states[mask], expected[mask], **EXACT)
        moved = ids.roll(-1, dims=1)[:1], mask.roll(-1, dims=1)[:1]
        alike = left(*moved).states[moved[1]], left(ids[:1], mask[:1]).states[mask[:1]]
    torch.testing.assert_close(*alike, rtol=1e-5, atol=1e-5)


# -- bfloat16 ------------------------------------------------------------------------------------------


def in_bfloat16(kind: str = "Gemma3", **build: Any) -> tuple[torch.nn.Module, Gemma]:
    model, config, tensors = reference(kind)
    tower = read(tensors, config | {"torch_dtype": "bfloat16"}, TOYS["gemma"](), **build)
    assert isinstance(tower, Gemma) and isinstance(tower.spec, GemmaSpec) and tower.spec.bfloat16
    return model.bfloat16(), tower


@pytest.mark.parametrize("kind", ["Gemma3", "T5Gemma"])
def test_the_factor_of_the_embeddings_is_the_one_of_bfloat16_in_every_type(kind: str) -> None:
    """sqrt(32) = 5.65685 is 5.65625 there: what the authors of an adapter have heard."""
    model, tower = in_bfloat16(kind, layer=0)
    ids, mask = tower.batch(TEXTS[:2])
    with torch.no_grad():
        assert torch.equal(tower(ids, mask).states, tower.embed_tokens(ids) * 5.65625)
        rounded = tower.bfloat16()(ids, mask).states
    assert torch.equal(rounded, expected_states(model, ids, mask)[0].float())


def test_without_the_rule_the_factor_follows_the_weights_as_in_transformers() -> None:
    _, config, tensors = reference("Gemma3")
    tower = read(tensors, config, TOYS["gemma"](), layer=0)
    ids, mask = tower.batch(TEXTS[:2])
    with torch.no_grad():
        states = tower(ids, mask).states
        torch.testing.assert_close(states, tower.embed_tokens(ids) * math.sqrt(32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["Gemma3", "T5Gemma"])
def test_in_bfloat16_it_rounds_as_little_and_as_much_as_transformers(kind: str) -> None:
    """Compared with float32 under the same factor, neither is further away than twice the other."""
    model, tower = in_bfloat16(kind)
    ids, mask = tower.batch(TEXTS)
    with torch.no_grad():
        wide = tower(ids, mask).states[mask]
        mine = tower.bfloat16()(ids, mask).states[mask]
    theirs = expected_states(model, ids, mask)[-1][mask].float()
    away, theirs_away = ((part - wide).square().mean().sqrt() for part in (mine, theirs))
    assert 0 < away < 2 * theirs_away and theirs_away < 2 * away


@pytest.mark.parametrize("ops", [torch.nn, MarkedOps])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_states_that_leave_float16_stay_finite(tmp_path: Path, dtype: torch.dtype, ops: Any) -> None:
    """Gemma 3's own do; asked for float16, a tower under the rule computes in bfloat16."""
    _, tower = in_bfloat16()
    with torch.no_grad():
        for layer in tower.layers:
            layer.post_feedforward_layernorm.weight.mul_(2e4)
    save_encoder(tmp_path / "x", tower)
    loaded = load_encoder(tmp_path / "x", dtype=dtype, ops=ops)
    ids, mask = loaded.batch(TEXTS)
    raw = loaded.embed_tokens(ids)
    with torch.no_grad():
        for_all = load_encoder(tmp_path / "x", dtype=torch.float32)
        for_all.layer = loaded.layer = -2
        states = loaded(ids, mask).states
        assert states.dtype == torch.float32 and torch.isfinite(states).all() and states.abs().max() > 65_504
        wide = for_all(ids, mask).states
    assert (states - wide).square().mean().sqrt() < 0.05 * wide.square().mean().sqrt()
    assert raw.dtype == (torch.bfloat16 if dtype == torch.float16 else dtype)


# -- what is recognised ----------------------------------------------------------------------------------


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def test_silence_of_a_config_means_the_defaults_of_transformers() -> None:
    """A config.json leaves out what equals the class's default."""
    import transformers

    for kind, config in (
        ("Gemma3", transformers.Gemma3TextConfig()),
        ("Gemma2", transformers.Gemma2Config()),
        ("T5Gemma", transformers.T5GemmaModuleConfig()),
    ):
        _, _, tensors = reference(kind)
        said = config.to_dict()
        silent = {"rms_norm_eps": 1e-6, "head_dim": 12}
        spec = published(tensors, silent, "gemma")
        spoken = published(
            tensors,
            {key: value for key, value in said.items() if key not in ("layer_types", "head_dim")} | silent,
            "gemma",
        )
        assert spec == spoken and isinstance(spec, GemmaSpec)
        assert spec.window == said["max_position_embeddings"] and spec.reach == said["sliding_window"]
        assert spec.softcap == (said["attn_logit_softcapping"] or 0) and spec.scalar == 256
        kinds = said["layer_types"]
        assert [spec.local(number) for number in range(len(kinds))] == [k != "full_attention" for k in kinds]


def test_newer_configs_keep_rotary_positions_elsewhere() -> None:
    _, config, tensors = reference("Gemma3")
    old = published(tensors, config, "gemma")
    newer = {key: value for key, value in config.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    assert published(tensors, newer, "gemma") == old
    newer["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    assert published(tensors, newer, "gemma") == dataclasses.replace(old, stretch=8.0)
    _, config, tensors = reference("T5Gemma")
    old = published(tensors, config, "gemma")
    inside = {key: value for key, value in config["encoder"].items() if key != "rope_theta"}
    inside["rope_parameters"] = {"rope_type": "default", "rope_theta": 200.0}
    assert published(tensors, config | {"encoder": inside}, "gemma") == old


def test_the_encoder_alone_and_parts_of_larger_models_are_known() -> None:
    _, config, tensors = reference("T5Gemma")
    whole = published(tensors, config, "gemma")
    alone = {key[6:]: value for key, value in tensors.items() if ".encoder." in key}
    bare = {key[8:]: value for key, value in alone.items()}
    assert published(alone, config, "gemma") == published(bare, config["encoder"], "gemma") == whole
    assert isinstance(whole, GemmaSpec) and not whole.causal and not whole.normed
    _, config, tensors = reference("Gemma3")
    inside = {f"language_{key}": value for key, value in tensors.items()}
    inside |= {"vision_tower.vision_model.embeddings.patch_embedding.weight": torch.zeros(2, 2)}
    around = {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 5}}
    assert published(inside, around, "gemma") == published(tensors, config, "gemma")


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("Gemma3", {"model_type": "gemma3n_text"}, "gemma3n_text"),
        ("Gemma3", {"model_type": "gemma2"}, "gemma2"),
        ("Gemma2", {"model_type": "vaultgemma"}, "vaultgemma"),
        ("Gemma3", {"hidden_activation": "silu"}, "silu"),
        ("Gemma3", {"use_bidirectional_attention": True}, "ahead"),
        ("Gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("Gemma2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "linear"),
        ("Gemma3", {"layer_types": PATTERN[1:]}, "uneven"),
        ("Gemma3", {"layer_types": [*PATTERN[:3], "chunked_attention"]}, "uneven"),
    ],
)
def test_relatives_that_compute_something_else_are_refused(
    kind: str, changes: dict[str, Any], found: str
) -> None:
    _, config, tensors = reference(kind)
    with pytest.raises(BridgeError, match="computes something else") as caught:
        identify_encoder(shapes_of(tensors), config | changes)
    assert found in caught.value.found


def test_tensors_that_gemma_does_not_have_are_refused() -> None:
    _, config, tensors = reference("Gemma3")
    for name in ("layer_scalar", "per_layer_input_gate.weight", "self_attn.q_proj.bias"):
        with pytest.raises(BridgeError, match="computes something else") as caught:
            identify_encoder(shapes_of(tensors) | {f"model.layers.0.{name}": (1,)}, config)
        assert name in caught.value.found


@pytest.mark.parametrize("kind", ["Gemma3", "Gemma2", "T5Gemma"])
def test_weights_without_their_config_are_refused_in_words(kind: str) -> None:
    _, _, tensors = reference(kind)
    with pytest.raises(BridgeError, match="weights alone") as caught:
        identify_encoder(shapes_of(tensors), {})
    assert "config.json" in caught.value.expected and "folder" in caught.value.action


@pytest.mark.parametrize(
    "odd",
    [
        *({"heads": 3}, {"head": 7}, {"every": 0}, {"reach": -1}, {"theta": 0.5}, {"near_theta": 1e13}),
        *({"stretch": 0.5}, {"scalar": 0.0}, {"softcap": -1.0}, {"eps": 1.0}, {"start": 420}, {"end": 420}),
    ],
)
def test_impossible_sizes_are_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(BridgeError, match="what to do:"):
        dataclasses.replace(TOYS["gemma"]().spec, **odd)


# -- tokenizers --------------------------------------------------------------------------------------------


def toy_files(**settings: object) -> dict[str, bytes]:
    return {
        "tokenizer.model": sentencepiece_model("gemma"),
        "tokenizer_config.json": json.dumps({"pad_token": "<pad>", **settings}).encode(),
    }


@pytest.mark.parametrize("text", [*SPEECH, "a\n\nb\n", "<start_of_turn>user\nred cat<end_of_turn>\n"])
def test_ids_are_those_of_sentencepiece(text: str) -> None:
    import sentencepiece

    judge = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("gemma"))
    assert [piece.id for piece in TOYS["gemma"]().tokenize(text)] == judge.encode(text)


def transformers_json(path: Path) -> bytes:
    """tokenizer.json as transformers' Gemma tokenizer writes it, with a picture's token behind its end."""
    import transformers
    from tokenizers import Tokenizer

    made = json.loads(Tokenizer.from_str(TOYS["gemma"]().tokenizer_json.decode()).to_str())
    merges = [tuple(pair) for pair in made["model"]["merges"]]
    tokenizer = transformers.GemmaTokenizer(vocab=made["model"]["vocab"], merges=merges, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(str(path))
    return (path / "tokenizer.json").read_bytes()


def test_a_published_tokenizer_json_is_read_without_the_tokens_of_pictures(tmp_path: Path) -> None:
    """Gemma-3-1B's own has <image_soft_token> at 262144, one past the last row of its embeddings."""
    import transformers

    data = transformers_json(tmp_path)
    judge = transformers.GemmaTokenizer.from_pretrained(str(tmp_path))
    count = len(json.loads(data)["model"]["vocab"])
    assert count == 400 and judge.convert_tokens_to_ids("<image_soft_token>") == count
    spec = dataclasses.replace(TOYS["gemma"]().spec, vocab=count)
    with pytest.raises(BridgeError, match="ids below 400"):
        Gemma(spec, data, identity="toy", window=24, device="meta")
    made = Gemma.tokenizer_from({"tokenizer.json": data, "tokenizer_config.json": b'{"pad_token": "<pad>"}'})
    tower = Gemma(spec, made, identity="toy", window=40, device="meta")
    assert tower.marks.padding == 0
    for text in SPEECH:
        ids = judge(text)["input_ids"]
        framed, mask = tower.frame([piece.id for piece in tower.tokenize(text)][: tower.capacity])
        assert framed[mask].tolist() == ids[:40] and ids[0] == 2


def test_a_tokenizer_without_padding_is_refused() -> None:
    files = toy_files()
    made = json.loads(Gemma.tokenizer_from(files))
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] != "<pad>"]
    made["model"]["vocab"]["<blank>"] = made["model"]["vocab"].pop("<pad>")
    made["padding"] = None
    with pytest.raises(BridgeError, match="no <pad>"):
        Gemma(TOYS["gemma"]().spec, json.dumps(made).encode(), identity="toy", window=24, device="meta")


@pytest.mark.parametrize(("start", "end"), [(2, -1), (2, 1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("left", [False, True])
def test_the_spec_says_what_frames_a_text(start: int, end: int, left: bool) -> None:
    tower = TOYS["gemma"](start=start, end=end, left=left, window=6)
    ids, mask = tower.frame([7, 8])
    spoken = [n for n in (start, 7, 8, end) if n >= 0]
    empty = [0] * (6 - len(spoken))
    assert ids.tolist() == (empty + spoken if left else spoken + empty)
    assert mask.tolist() == [number > 0 for number in ids.tolist()]
    assert tower.capacity == 6 - (start >= 0) - (end >= 0)


# -- published sizes ---------------------------------------------------------------------------------------

GEMMA_3_1B = GemmaSpec(
    vocab=262_144, width=1152, layers=26, window=32_768, heads=4, pairs=1, head=256, inner=6912
)
T5_GEMMA_2B = GemmaSpec(
    vocab=256_000,
    width=2304,
    layers=26,
    window=8192,
    heads=8,
    pairs=4,
    head=256,
    inner=9216,
    normed=False,
    causal=False,
)


@pytest.mark.parametrize(
    ("spec", "count"), [(GEMMA_3_1B, 999_885_952), (T5_GEMMA_2B, 2_614_341_888)], ids=["gemma", "t5gemma"]
)
def test_parameter_counts_at_published_sizes(spec: GemmaSpec, count: int) -> None:
    assert sum(math.prod(shape) for shape in Gemma.own_shapes(spec).values()) == count
