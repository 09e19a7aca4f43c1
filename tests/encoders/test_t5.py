"""T5, mT5 and umT5 encoders against transformers: numbers, the float16 rule, SentencePiece ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders.file import load_encoder, save_encoder
from language_bridge.encoders.t5 import T5, T5Spec, t5_tokenizer
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

SIZES = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "dropout_rate": 0.0,
}
FAMILIES = {
    "t5": "relu",
    "flan-t5": "gated-gelu",
    "mt5": "gated-gelu",
    "umt5": "gated-gelu",
    "silu": "gated-silu",
}
EXACT = {"rtol": 0, "atol": 1e-5}


def reference(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    import transformers

    config = SIZES | {"feed_forward_proj": FAMILIES[name]}
    kind = {"mt5": "MT5", "umt5": "UMT5"}.get(name, "T5")
    made = getattr(transformers, f"{kind}Config")(**config, attn_implementation="eager")
    return shake(getattr(transformers, f"{kind}EncoderModel")(made)), config


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
@pytest.mark.parametrize("mask_rule", ["pad", "none"])
def test_states_equal_the_reference(name: str, layer: int, mask_rule: str) -> None:
    model, config = reference(name)
    tower = read(model.state_dict(), config, TOYS["t5"](), layer=layer, mask_rule=mask_rule)
    ids, mask = tower.batch(TEXTS)
    seen = mask.long() if mask_rule == "pad" else torch.ones_like(ids)
    with torch.no_grad():
        expected = model(ids, attention_mask=seen, output_hidden_states=True).hidden_states[layer]
        hidden = tower(ids, mask)
    torch.testing.assert_close(hidden.states, expected, **EXACT)
    assert hidden.pooled is None and tower.pooled_width == 0


def test_long_texts_reach_every_bucket() -> None:
    model, config = reference("flan-t5")
    tower = read(model.state_dict(), config, TOYS["t5"](window=40), window=200)
    ids = torch.randint(3, 80, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = tower(ids, torch.ones_like(ids, dtype=torch.bool)).states
        torch.testing.assert_close(states, model(ids).last_hidden_state, **EXACT)


@pytest.mark.parametrize("words", ["shared.weight", "encoder.embed_tokens.weight", "both"])
@pytest.mark.parametrize("stem", ["", "text_encoder."])
def test_the_words_are_found_beside_a_decoder(words: str, stem: str) -> None:
    model, config = reference("flan-t5")
    tensors = {
        stem + k: v for k, v in model.state_dict().items() if "embed_tokens" not in k and "shared" not in k
    }
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if words in (name, "both"):
            tensors[stem + name] = model.state_dict()["shared.weight"]
    tensors[stem + "decoder.embed_tokens.weight"] = torch.zeros(100, 32)
    tensors[stem + "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.zeros(8, 4)
    tensors["lm_head.weight"] = torch.zeros(100, 32)
    tower = read(tensors, config, TOYS["t5"]())
    ids, mask = tower.batch(TEXTS)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(tower(ids, mask).states, expected, **EXACT)


@pytest.mark.parametrize("large", [False, True])
def test_the_half_rule_computes_as_transformers_does_in_float16(large: bool) -> None:
    """The states that ELLA was trained on: float16 throughout, infinities clamped."""
    model, config = reference("flan-t5")
    if large:
        with torch.no_grad():
            model.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(3e4)
    model = model.half()
    single = T5(
        published(model.state_dict(), config, "t5"), TOYS["t5"]().tokenizer_json, identity="toy", window=24
    )
    fields = {name: getattr(single.spec, name) for name in single.spec.__dataclass_fields__}
    ids, mask = single.batch(TEXTS)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask.long()).last_hidden_state
    for dtype in (None, torch.float32, torch.float16):
        tower = T5(
            T5Spec(**(fields | {"half": True})),
            single.tokenizer_json,
            identity="toy",
            window=24,
            dtype=dtype,
            ops=MarkedOps,
        )
        tower.load_state_dict(T5.adopt(model.state_dict(), tower.spec))
        assert {parameter.dtype for parameter in tower.parameters()} == {torch.float16}
        with torch.no_grad():
            states = tower(ids, mask).states
        assert states.dtype == torch.float32 and torch.isfinite(states).all()
        torch.testing.assert_close(states, expected.float(), rtol=0, atol=1e-6)
    single.load_state_dict(T5.adopt(model.state_dict(), single.spec))
    with torch.no_grad():
        assert (single(ids, mask).states - expected.float()).abs().max() > 0


@pytest.mark.parametrize("text", SPEECH)
def test_ids_are_those_of_sentencepiece(text: str) -> None:
    import sentencepiece

    judge = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("t5"))
    tower = TOYS["t5"]()
    assert [piece.id for piece in tower.tokenize(text)] == judge.encode(text)
    ids, mask = tower.batch([text])
    expected = [*judge.encode(text)[:23], 1]
    assert ids[0].tolist() == expected + [0] * (24 - len(expected)) and int(mask.sum()) == len(expected)


@pytest.mark.parametrize("text", [*SPEECH, "a </s> b", "<extra_id_0> x <extra_id_9>"])
def test_ids_equal_the_reference_tokenizer(text: str) -> None:
    import base64
    import json

    from transformers import T5Tokenizer

    tokenizer = t5_tokenizer(sentencepiece_model("t5"), 10)
    made = json.loads(tokenizer)
    charsmap = next(s for s in made["normalizer"]["normalizers"] if s["type"] == "Precompiled")
    judge = T5Tokenizer(
        vocab=[tuple(entry) for entry in made["model"]["vocab"]],
        extra_ids=10,
        _spm_precompiled_charsmap=base64.b64decode(charsmap["precompiled_charsmap"]),
    )
    tower = T5(TOYS["t5"]().spec, tokenizer, identity="toy", window=24, device="meta")
    ids = [piece.id for piece in tower.tokenize(text)]
    assert ids == judge(text, add_special_tokens=False)["input_ids"]


def test_sentinels_come_from_the_settings() -> None:
    files = {"spiece.model": sentencepiece_model("t5"), "tokenizer_config.json": b'{"extra_ids": 10}'}
    tower = T5(TOYS["t5"]().spec, T5.tokenizer_from(files), identity="toy", window=24, device="meta")
    assert [p.id for p in tower.tokenize("<extra_id_0><extra_id_9>")] == [89, 80]
    with pytest.raises(BridgeError, match="not T5's"):
        t5_tokenizer(sentencepiece_model("xlmr"))


def test_the_usual_start_fits_an_attention_without_scale() -> None:
    tower = TOYS["t5"]()
    tower.reset_parameters(torch.Generator().manual_seed(1))
    state = tower.state_dict()
    assert abs(float(state["shared.weight"].std()) - 1) < 0.1
    query = state["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert abs(float(query.std()) - (32 * 6) ** -0.5) < 0.02


def test_a_tower_under_the_half_rule_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    tower = TOYS["t5"](half=True)
    save_encoder(tmp_path / "half", tower)
    for dtype in (None, torch.float32, torch.float16):
        loaded = load_encoder(tmp_path / "half", dtype=dtype)
        first, second = tower(*tower.batch(TEXTS)), loaded(*loaded.batch(TEXTS))
        assert torch.equal(first.states, second.states) and first.states.dtype == torch.float32
