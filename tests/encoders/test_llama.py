"""Decoders of Llama's layout against transformers; Baichuan's packed projections; QLLaMA; tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import identify_encoder
from language_bridge.encoders.llama import Llama, LlamaSpec
from language_bridge.tests.encoders.toys import (
    SPEECH,
    TEXTS,
    TOYS,
    published,
    read,
    sentencepiece_model,
    shake,
)

SIZES = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 60,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 4},
    "Llama with GQA": {"num_key_value_heads": 2},
    "Llama with one pair": {"num_key_value_heads": 1, "head_dim": 12},
    "Llama with theta": {"num_key_value_heads": 2, "rope_theta": 500_000.0},
    "Qwen2": {"num_key_value_heads": 2, "rope_theta": 1_000_000.0},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1_000_000.0},
}
EXACT = {"rtol": 0, "atol": 1e-5}


def reference(kind: str = "Llama") -> tuple[torch.nn.Module, dict[str, Any]]:
    """transformers' decoder, and config.json as that kind publishes it."""
    import transformers

    config = SIZES | KINDS[kind]
    family = kind.split()[0]
    made = getattr(transformers, f"{family}Config")(**config)
    return shake(getattr(transformers, f"{family}Model")(made)), config


def expected_states(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
    seen = torch.ones_like(ids) if mask is None else mask.long()
    with torch.no_grad():
        return model(ids, attention_mask=seen, output_hidden_states=True, use_cache=False).hidden_states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
@pytest.mark.parametrize("mask_rule", ["pad", "none"])
def test_states_equal_the_reference(kind: str, layer: int, mask_rule: str) -> None:
    model, config = reference(kind)
    tensors = {"model." + key: value for key, value in model.state_dict().items()}
    tensors["lm_head.weight"] = torch.zeros(420, 32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    tower = read(tensors, config, TOYS["llama"](), layer=layer, mask_rule=mask_rule)
    ids, mask = tower.batch(TEXTS)
    expected = expected_states(model, ids, mask if mask_rule == "pad" else None)
    with torch.no_grad():
        hidden = tower(ids, mask)
    torch.testing.assert_close(hidden.states, expected[layer], **EXACT)
    last = mask.sum(1) - 1
    torch.testing.assert_close(hidden.pooled, expected[-1][torch.arange(len(ids)), last], **EXACT)


def test_theta_is_found_where_newer_configs_keep_it() -> None:
    state = TOYS["llama"]().state_dict()
    config = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    spec = published(state, config, "llama")
    assert isinstance(spec, LlamaSpec) and spec.theta == 123.0


@pytest.mark.parametrize("stem", ["model.", ""])
def test_packed_projections_of_baichuan_are_split(stem: str) -> None:
    model, config = reference("Llama")
    state = model.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if ".q_proj." in key:
            parts = [state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            tensors[stem + key.replace("q_proj", "W_pack")] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            tensors[stem + key] = value
    assert tensors[stem + "layers.0.self_attn.W_pack.weight"].shape == (96, 32)
    tower = read(tensors, config, TOYS["llama"]())
    ids, mask = tower.batch(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(tower(ids, mask).states, expected_states(model, ids, mask)[-1], **EXACT)


def test_the_text_side_of_internvl_is_read() -> None:
    """`qllama.model.*` with layers of cross-attention that text does not use, and a projection [in, out]."""
    model, config = reference("Llama")
    tensors = {"qllama.model." + key: value for key, value in model.state_dict().items()}
    for layer in (0, 2):
        stem = f"qllama.model.layers.{layer}.cross_attn."
        tensors |= {stem + name: torch.zeros(32, 32) for name in ("q_proj.weight", "k_proj.weight")}
    projection = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
    tensors |= {"text_projection": projection, "qllama.lm_head.weight": torch.zeros(420, 32)}
    tensors["query_tokens"] = torch.zeros(1, 96, 32)
    tower = read(tensors, {"qllama_config": config}, TOYS["llama"]())
    ids, mask = tower.batch(TEXTS)
    states = expected_states(model, ids, mask)[-1]
    with torch.no_grad():
        hidden = tower(ids, mask)
    torch.testing.assert_close(hidden.states, states, **EXACT)
    pooled = states[torch.arange(len(ids)), mask.sum(1) - 1] @ projection
    torch.testing.assert_close(hidden.pooled, pooled, rtol=0, atol=1e-4)
    assert tower.pooled_width == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
        {"use_sliding_window": True},
        {"model_type": "gemma"},
    ],
)
def test_models_that_compute_something_else_are_refused(changes: dict[str, object]) -> None:
    shapes = {key: tuple(value.shape) for key, value in TOYS["llama"]().state_dict().items()}
    with pytest.raises(BridgeError, match="computes something else"):
        identify_encoder(shapes, SIZES | changes)


def test_gemmas_layers_are_left_to_their_own_family() -> None:
    shapes = {key: tuple(value.shape) for key, value in TOYS["gemma"]().state_dict().items()}
    assert Llama.recognise(shapes, SIZES) is None


@pytest.mark.parametrize("kind", ["llama", "baichuan"])
@pytest.mark.parametrize("text", SPEECH)
def test_ids_are_those_of_sentencepiece(kind: str, text: str) -> None:
    import sentencepiece

    model = sentencepiece_model(kind)
    judge = sentencepiece.SentencePieceProcessor(model_proto=model)
    tower = Llama(
        TOYS["llama"]().spec,
        Llama.tokenizer_from({"tokenizer.model": model}),
        identity="toy",
        window=40,
        device="meta",
    )
    assert [piece.id for piece in tower.tokenize(text)] == judge.encode(text)


def test_bytes_of_one_character_have_its_place() -> None:
    text = "a\U0001f431b"
    spans = [(p.start, p.end) for p in TOYS["llama"]().tokenize(text)]
    assert spans[-5:-1] == [(1, 2)] * 4 and spans[-1] == (2, 3)


@pytest.mark.parametrize(("start", "end"), [(1, 2), (1, -1), (-1, 2), (-1, -1)])
def test_the_spec_says_what_frames_a_text(start: int, end: int) -> None:
    tower = TOYS["llama"](start=start, end=end, window=6)
    ids, mask = tower.frame([7, 8])
    spoken = [n for n in (start, 7, 8, end) if n >= 0]
    assert ids.tolist() == spoken + [0] * (6 - len(spoken)) and int(mask.sum()) == len(spoken)
    assert tower.capacity == 6 - (start >= 0) - (end >= 0)


def test_qwen_has_no_start_token_whatever_its_config_says() -> None:
    state = TOYS["llama"]().state_dict()
    spec = published(state, SIZES | {"model_type": "qwen2", "eos_token_id": [7, 8]}, "llama")
    assert isinstance(spec, LlamaSpec) and (spec.start, spec.end) == (-1, 7)
