"""XLM-RoBERTa against transformers and SentencePiece: numbers, positions, ids shifted by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import identify_encoder
from language_bridge.encoders.xlmr import Xlmr, XlmrSpec, xlmr_tokenizer
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
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 42,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
EXACT = {"rtol": 0, "atol": 1e-5}


def reference() -> torch.nn.Module:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    return shake(XLMRobertaModel(XLMRobertaConfig(**SIZES)))


STEMS = {
    "Hugging Face": "",
    "Hugging Face with a head": "roberta.",
    "open_clip": "text.transformer.",
    "AltDiffusion": "roberta.",
    "AltDiffusion, single file": "cond_stage_model.roberta.",
    "AltDiffusion, folder in one": "text_encoder.roberta.",
}


@pytest.mark.parametrize("layout", STEMS)
@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
@pytest.mark.parametrize("mask_rule", ["pad", "none"])
def test_states_equal_the_reference(layout: str, layer: int, mask_rule: str) -> None:
    model = reference()
    tensors = {STEMS[layout] + key: value for key, value in model.state_dict().items()}
    tensors[STEMS[layout] + "embeddings.position_ids"] = torch.arange(42)[None]
    outer = STEMS[layout].removesuffix("roberta.")
    tensors[outer + "transformation.weight"] = torch.zeros(24, 32)
    tensors[outer + "transformation.bias"] = torch.zeros(24)
    tensors[outer + "pre_LN.weight"] = torch.zeros(32)
    tower = read(tensors, SIZES, TOYS["xlmr"](), layer=layer, mask_rule=mask_rule)
    ids, mask = tower.batch(TEXTS)
    seen = mask.long() if mask_rule == "pad" else torch.ones_like(ids)
    with torch.no_grad():
        expected = model(ids, attention_mask=seen, output_hidden_states=True).hidden_states[layer]
        hidden = tower(ids, mask)
    torch.testing.assert_close(hidden.states, expected, **EXACT)
    torch.testing.assert_close(hidden.pooled, expected[:, 0], **EXACT)


def altclip() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """transformers' text half of AltCLIP, and its weights as they are published, among the other half's."""
    from transformers import AltCLIPTextConfig, AltCLIPTextModel

    model = shake(AltCLIPTextModel(AltCLIPTextConfig(project_dim=24, **SIZES)))
    published_names = {key.replace("encoder.layers.", "encoder.layer."): key for key in model.state_dict()}
    tensors = {f"text_model.{name}": model.state_dict()[key] for name, key in published_names.items()}
    tensors["text_model.roberta.embeddings.position_ids"] = torch.arange(42)[None]
    tensors |= {"text_projection.weight": torch.zeros(24, 24), "logit_scale": torch.zeros(())}
    return model, tensors | {"vision_model.embeddings.class_embedding": torch.zeros(16)}


@pytest.mark.parametrize("norm", [True, False])
def test_altclips_head_gives_the_states_of_the_class_that_it_was_published_with(norm: bool) -> None:
    """transformers norms before the head; FlagAI's own code and diffusers' RobertaSeries class do not."""
    model, tensors = altclip()
    measured = published(tensors, {"text_config": SIZES}, "xlmr")
    assert isinstance(measured, XlmrSpec)
    assert (measured.width, measured.inside, measured.norm) == (24, 32, True)
    spec = dataclasses.replace(measured, norm=norm)
    toy = TOYS["xlmr"]()
    tower = Xlmr(spec, toy.tokenizer_json, identity="toy", window=24)
    tower.load_state_dict(Xlmr.adopt(tensors, spec), strict=True)
    assert (tower.width, tower.pooled_width) == (24, 24)
    ids, mask = tower.batch(TEXTS)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask.long(), output_hidden_states=True)
        series = model.transformation(theirs.hidden_states[-1])
        hidden = tower(ids, mask)
    assert (series - theirs.last_hidden_state).abs().max() > 0.1
    expected = theirs.last_hidden_state if norm else series
    torch.testing.assert_close(hidden.states, expected, **EXACT)
    torch.testing.assert_close(hidden.pooled, expected[:, 0], **EXACT)


@pytest.mark.parametrize("key", ["transformation.bias", "transformation_pre.weight"])
def test_a_head_that_is_not_whole_or_not_for_retrieval_is_not_the_towers(key: str) -> None:
    """m18's conditioning has a head of its own, which is a bridge wherever it is published."""
    _, tensors = altclip()
    if f"text_model.{key}" in tensors:
        del tensors[f"text_model.{key}"]
    else:
        tensors[f"text_model.{key}"] = torch.zeros(24, 32)
    spec = published(tensors, SIZES, "xlmr")
    assert isinstance(spec, XlmrSpec) and (spec.width, spec.inside, spec.norm) == (32, 0, False)


@pytest.mark.parametrize("changes", [{"norm": True}, {"inside": 30}, {"inside": -1}])
def test_odd_heads_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BridgeError, match="what to do:"):
        dataclasses.replace(TOYS["xlmr"]().spec, **changes)


def test_positions_count_from_two_and_padding_sits_at_one() -> None:
    tower = TOYS["xlmr"]()
    seen: list[torch.Tensor] = []
    tower.embeddings.position_embeddings.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ids = torch.tensor([[0, 7, 8, 2, 1, 1, 1]])
    tower(ids, ids != 1)
    assert seen[0].tolist() == [[2, 3, 4, 5, 1, 1, 1]]


def test_an_empty_text_is_framed_as_published() -> None:
    ids, mask = TOYS["xlmr"](window=6).frame([])
    assert ids.tolist() == [0, 2, 1, 1, 1, 1] and mask.tolist() == [True, True, *[False] * 4]


@pytest.mark.parametrize("text", SPEECH)
def test_ids_are_those_of_sentencepiece_shifted_by_one(text: str) -> None:
    import sentencepiece

    judge = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("xlmr"))
    expected = [number + 1 if number else 3 for number in judge.encode(text)]
    assert [piece.id for piece in TOYS["xlmr"]().tokenize(text)] == expected


@pytest.mark.parametrize("text", [*SPEECH, "<s> hi </s>x", "a <mask> b", "<pad>"])
def test_ids_equal_the_reference_tokenizer(text: str) -> None:
    import base64
    import json

    from transformers import XLMRobertaTokenizer

    made = json.loads(xlmr_tokenizer(sentencepiece_model("xlmr")))
    charsmap = next(s for s in made["normalizer"]["normalizers"] if s["type"] == "Precompiled")
    vocabulary = [tuple(entry) for entry in made["model"]["vocab"]]
    judge = XLMRobertaTokenizer(
        vocab=vocabulary, _spm_precompiled_charsmap=base64.b64decode(charsmap["precompiled_charsmap"])
    )
    tower = TOYS["xlmr"]()
    ids = [piece.id for piece in tower.tokenize(text)]
    if "<mask>" in text:  # transformers swallows the space before it
        ids = [number for number in ids if number != judge.convert_tokens_to_ids("\u2581")]
        expected = judge(text, add_special_tokens=False)["input_ids"]
        assert ids == [n for n in expected if n != judge.convert_tokens_to_ids("\u2581")]
        return
    assert ids == judge(text, add_special_tokens=False)["input_ids"]
    full = judge(text, padding="max_length", truncation=True, max_length=24)
    framed, mask = tower.batch([text])
    assert framed[0].tolist() == full["input_ids"] and mask[0].long().tolist() == full["attention_mask"]


def test_special_tokens_have_their_numbers() -> None:
    tower = TOYS["xlmr"]()
    assert [p.id for p in tower.tokenize("<s><pad></s><unk><mask>")] == [0, 1, 2, 3, 81]


def test_raw_sentencepiece_numbering_is_refused() -> None:
    from language_bridge.encoders.vocabulary import read_sentencepiece, sentencepiece_json

    model = sentencepiece_model("xlmr")
    raw = sentencepiece_json(read_sentencepiece(model, "m"), "m", special=["<pad>"])
    with pytest.raises(BridgeError, match="shifted by one"):
        Xlmr(TOYS["xlmr"]().spec, raw, identity="toy", window=24)
    with pytest.raises(BridgeError, match=r"not XLM-RoBERTa's"):
        xlmr_tokenizer(sentencepiece_model("t5"))


def test_it_is_told_from_bert_and_from_english_roberta() -> None:
    state = TOYS["xlmr"]().state_dict()
    spec = published(state, {}, "xlmr")
    assert isinstance(spec, XlmrSpec) and spec.window == 40 and spec.eps == 1e-5
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    with pytest.raises(BridgeError, match="claimed by nobody"):
        identify_encoder(shapes, {"model_type": "roberta"})
