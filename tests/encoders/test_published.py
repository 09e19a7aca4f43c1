"""Published layouts of BERT towers: Chinese-CLIP (two layouts), Taiyi, LDM files; sizes of the real ones."""

from __future__ import annotations

import math

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import families
from language_bridge.encoders.bert import Bert, BertSpec
from language_bridge.tests.encoders.toys import TEXTS, VOCABULARY, published, read, shake, toy_tower

SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
EXACT = {"rtol": 0, "atol": 1e-5}


def chinese_clip() -> torch.nn.Module:
    """transformers' whole Chinese-CLIP, small, with random weights."""
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ChineseCLIPConfig(
        text_config=SIZES, vision_config=vision | {"image_size": 16, "patch_size": 8}, projection_dim=12
    )
    return shake(ChineseCLIPModel(config))


def cn_clip_layout(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The original .pt: `module.bert.*`, `module.visual.*`, the projection as a matrix [in, out]."""
    published: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        if key.startswith("text_model."):
            published["module.bert." + key.removeprefix("text_model.")] = value
        elif key == "text_projection.weight":
            published["module.text_projection"] = value.T.contiguous()
        elif key.startswith("vision_model."):
            published["module.visual." + key.removeprefix("vision_model.")] = value
    return published | {"module.logit_scale": torch.tensor(4.6)}


def states_of(model: torch.nn.Module, tower: Bert, mask: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids, seen = tower.batch(TEXTS)
    seen = seen.long() if mask else torch.ones_like(ids)
    out = model.text_model(ids, attention_mask=seen)
    return out.last_hidden_state, model.text_projection(out.last_hidden_state[:, 0])


@pytest.mark.parametrize("layout", ["hf", "cn_clip", "cn_clip without module"])
@pytest.mark.parametrize("mask_rule", ["pad", "none"])
def test_chinese_clip_equals_the_reference(layout: str, mask_rule: str) -> None:
    model = chinese_clip()
    tensors = dict(model.state_dict()) if layout == "hf" else cn_clip_layout(model)
    if "without" in layout:
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    tower = read(tensors, {"text_config": SIZES}, toy_tower(), mask_rule=mask_rule)
    with torch.no_grad():
        states, pooled = states_of(model, tower, mask_rule == "pad")
        hidden = tower(*tower.batch(TEXTS))
    assert tower.pooled_width == 12
    torch.testing.assert_close(hidden.states, states, **EXACT)
    torch.testing.assert_close(hidden.pooled, pooled, **EXACT)


@pytest.mark.parametrize("stem", ["", "cond_stage_model.transformer.", "bert.", "text_encoder."])
def test_taiyi_equals_the_reference(stem: str) -> None:
    from transformers import BertConfig, BertModel

    model = shake(BertModel(BertConfig(**SIZES)))
    tensors = {stem + key: value for key, value in model.state_dict().items()}
    tensors[stem + "embeddings.position_ids"] = torch.arange(40)[None]
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(8, 4, 3, 3)
    # Taiyi pads to 512 without a mask.
    tower = read(tensors, SIZES, toy_tower(), mask_rule="none", window=40)
    ids, mask = tower.batch(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(tower(ids, mask).states, model(ids).last_hidden_state, **EXACT)


def test_norms_of_old_files_are_renamed() -> None:
    state = toy_tower().state_dict()
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in state.items()
    }
    assert old.keys() != state.keys()
    adopted = Bert.adopt(old, published(old, {}, "bert"))
    assert all(torch.equal(adopted[key], state[key]) for key in state)


def test_heads_and_eps_come_from_the_config() -> None:
    state = toy_tower().state_dict()
    spec = published(state, {"text_config": {"num_attention_heads": 8, "layer_norm_eps": 1e-6}}, "bert")
    assert isinstance(spec, BertSpec) and (spec.heads, spec.eps) == (8, 1e-6)
    spec = published(state, {}, "bert")
    assert isinstance(spec, BertSpec) and (spec.heads, spec.eps) == (1, 1e-12)  # 32 wide: too small for two


def test_adoption_takes_no_memory() -> None:
    """Views only, so that a conversion can ask with tensors that take no memory which keys are used."""
    tensors = cn_clip_layout(chinese_clip())
    spec = published(tensors, {}, "bert")
    views = {name: torch.full((), 1.0).expand(value.shape) for name, value in tensors.items()}
    assert all(value.untyped_storage().nbytes() == 4 for value in Bert.adopt(views, spec).values())


def test_a_vocabulary_keeps_its_case_when_it_says_so() -> None:
    lines = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Cat", "cat"]).encode()
    cased = Bert.tokenizer_from({"vocab.txt": lines, "tokenizer_config.json": b'{"do_lower_case": false}'})
    spec = BertSpec(vocab=6, width=8, layers=1, window=8, heads=1, inner=8)
    for tokenizer, expected in ((cased, 4), (Bert.tokenizer_from({"vocab.txt": lines}), 5)):
        tower = Bert(spec, tokenizer, identity="toy", window=8, device="meta")
        assert [piece.id for piece in tower.tokenize("Cat")] == [expected]
    with pytest.raises(BridgeError, match=r"vocab\.txt"):
        Bert.tokenizer_from({"vocab.txt": b"\xff\xfe"})


REAL = {
    "chinese-clip-vit-huge-patch14": (
        "bert",
        (21128, 1024, 24, 512),
        {"heads": 16, "inner": 4096},
        324_472_832,
    ),
    "chinese-clip base, Taiyi": ("bert", (21128, 768, 12, 512), {"heads": 12, "inner": 3072}, 101_677_056),
    "xlm-roberta-large": ("xlmr", (250_002, 1024, 24, 512), {"heads": 16, "inner": 4096}, 558_840_832),
    "xlm-roberta-base": ("xlmr", (250_002, 768, 12, 512), {"heads": 12, "inner": 3072}, 277_453_056),
    "clip-vit-large-patch14": ("clip", (49_408, 768, 12, 77), {"heads": 12, "inner": 3072}, 123_060_480),
    "flan-t5-xl": (
        "t5",
        (32_128, 2048, 24, 512),
        {"heads": 32, "head": 64, "inner": 5120},
        1_223_527_424,
    ),
    "mt5-xl": ("t5", (250_112, 2048, 24, 512), {"heads": 32, "head": 64, "inner": 5120}, 1_669_958_656),
    "Baichuan2-7B (without lm_head)": (
        "llama",
        (125_696, 4096, 32, 4096),
        {"heads": 32, "pairs": 32, "head": 128, "inner": 11_008},
        6_991_122_432,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_parameter_counts_of_published_towers(name: str) -> None:
    family, (vocab, width, layers, window), more, parameters = REAL[name]
    tower = families()[family]
    spec = tower.Spec(vocab=vocab, width=width, layers=layers, window=window, **more)
    assert sum(math.prod(shape) for shape in tower.own_shapes(spec).values()) == parameters
