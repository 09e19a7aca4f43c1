"""CLIP text towers against transformers and open_clip's layout, with the stock and with other tokenizers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders.clip import Clip, ClipSpec
from language_bridge.tests.encoders.toys import (
    TEXTS,
    TOYS,
    VOCABULARY,
    clip_files,
    published,
    read,
    shake,
)

SIZES = {
    "vocab_size": 520,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "projection_dim": 12,
    "bos_token_id": 518,
    "eos_token_id": 519,
}
EXACT = {"rtol": 0, "atol": 1e-5}
OPS = torch.nn


def reference(**changes: object) -> torch.nn.Module:
    """transformers' text model with projection; its keys are `text_model.*` and `text_projection.weight`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return shake(CLIPTextModelWithProjection(CLIPTextConfig(**(SIZES | changes))))


def hugging_face(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The published keys, whatever transformers calls its attributes today."""
    return {
        key if key.startswith(("text_model.", "text_projection.")) else "text_model." + key: value
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("mask_rule", ["pad", "none"])
def test_states_equal_the_reference(layer: int, activation: str, mask_rule: str) -> None:
    model = reference(hidden_act=activation)
    config = SIZES | {"hidden_act": activation}
    tower = read(hugging_face(model), config, TOYS["clip"](), layer=layer, mask_rule=mask_rule)
    ids, mask = tower.batch(TEXTS)
    seen = mask.long() if mask_rule == "pad" else None
    with torch.no_grad():
        out = model(ids, attention_mask=seen, output_hidden_states=True)
        hidden = tower(ids, mask)
    expected = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    torch.testing.assert_close(hidden.states, expected, **EXACT)
    torch.testing.assert_close(hidden.pooled, out.text_embeds, **EXACT)
    assert tower.pooled_width == 12


@pytest.mark.parametrize("stem", ["cond_stage_model.transformer.", "text_encoder.", ""])
def test_single_files_and_folders_are_read(stem: str) -> None:
    model = reference()
    tensors = {stem + key: value for key, value in hugging_face(model).items() if "projection" not in key}
    tensors[stem + "text_model.embeddings.position_ids"] = torch.arange(40)[None]
    tower = read(tensors, SIZES, TOYS["clip"](), mask_rule="none")
    ids, mask = tower.batch(TEXTS)
    with torch.no_grad():
        hidden, expected = tower(ids, mask), model(ids).last_hidden_state
    torch.testing.assert_close(hidden.states, expected, **EXACT)
    torch.testing.assert_close(hidden.pooled, expected[torch.arange(len(ids)), (ids == 519).int().argmax(1)])


class OpenClip(torch.nn.Module):
    """open_clip's text tower told again with torch's own layers, keys as it publishes them."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = OPS.Embedding(520, 32)
        self.positional_embedding = torch.nn.Parameter(torch.zeros(40, 32))
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList()
        for _ in range(3):
            block = torch.nn.Module()
            block.ln_1, block.ln_2 = OPS.LayerNorm(32), OPS.LayerNorm(32)
            block.attn = OPS.MultiheadAttention(32, 4, batch_first=True)
            block.mlp = torch.nn.Module()
            block.mlp.c_fc, block.mlp.c_proj = OPS.Linear(32, 48), OPS.Linear(48, 32)
            self.transformer.resblocks.append(block)
        self.ln_final = OPS.LayerNorm(32)
        self.text_projection = torch.nn.Parameter(torch.zeros(32, 12))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        ahead = torch.triu(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool), 1)
        for block in self.transformer.resblocks:
            normed = block.ln_1(states)
            states = states + block.attn(normed, normed, normed, attn_mask=ahead, need_weights=False)[0]
            inner = torch.nn.functional.gelu(block.mlp.c_fc(block.ln_2(states)))
            states = states + block.mlp.c_proj(inner)
        states = self.ln_final(states)
        return states, states[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection


@pytest.mark.parametrize("stem", ["", "text.", "cond_stage_model.model."])
def test_the_layout_of_open_clip_is_split_and_turned(stem: str) -> None:
    model = shake(OpenClip())
    with torch.no_grad():
        model.positional_embedding.mul_(3)
    tensors = {stem + key: value for key, value in model.state_dict().items()}
    tensors[stem + "logit_scale"] = torch.tensor(4.6)
    tensors["visual.positional_embedding"] = torch.zeros(5, 16)
    config = {"num_attention_heads": 4, "hidden_act": "gelu"}
    tower = read(tensors, config, TOYS["clip"](), mask_rule="none")
    ids, mask = tower.batch(TEXTS)
    with torch.no_grad():
        states, pooled = model(ids)
        hidden = tower(ids, mask)
    torch.testing.assert_close(hidden.states, states, **EXACT)
    torch.testing.assert_close(hidden.pooled, pooled, **EXACT)


def test_without_a_config_the_width_tells_the_activation() -> None:
    for width, expected in ((768, "quick_gelu"), (1024, "gelu")):
        tensors = TOYS["clip"](width=width, heads=2, layers=1, device="meta").state_dict()
        spec = published(tensors, {}, "clip")
        assert isinstance(spec, ClipSpec) and (spec.activation, spec.heads) == (expected, width // 64)
    with pytest.raises(BridgeError, match="'swish'"):
        published(tensors, {"hidden_act": "swish"}, "clip")


@pytest.mark.parametrize("text", [*TEXTS, "<|endoftext|>x", "it's 2 cats' (1.3)"])
def test_ids_equal_the_reference_tokenizer(text: str) -> None:
    from transformers import CLIPTokenizer

    files = clip_files()
    lines = files["merges.txt"].decode().split("\n")[1:-1]
    judge = CLIPTokenizer(
        vocab=json.loads(files["vocab.json"]), merges=[tuple(line.split(" ")) for line in lines]
    )
    tower = TOYS["clip"](window=40)
    ids, mask = tower.batch([text])
    full = judge(text, padding="max_length", truncation=True, max_length=40)
    assert ids[0].tolist() == full["input_ids"] and mask[0].long().tolist() == full["attention_mask"]


def test_a_bert_vocabulary_frames_with_its_own_marks() -> None:
    vocabulary = "\n".join(VOCABULARY).encode()
    tokenizer = Clip.tokenizer_from({"vocab.txt": vocabulary})
    spec = ClipSpec(vocab=len(VOCABULARY), width=32, layers=2, window=40, heads=4, inner=48)
    tower = Clip(spec, tokenizer, identity="toy", window=8)
    ids, mask = tower.batch(["\u7ea2\u732b"])
    assert [VOCABULARY[n] for n in ids[0].tolist()] == ["[CLS]", "\u7ea2", "\u732b", "[SEP]", *["[PAD]"] * 4]
    assert int(mask.sum()) == 4 and tower(ids, mask).pooled.shape == (1, 32)


MIAOBI_FILES = {
    "vocab.txt": "\n".join(VOCABULARY).encode(),
    "tokenizer_config.json": b'{"pad_token": "[PAD]", "do_lower_case": true, "model_max_length": 77}',
}


def test_miaobi_frames_berts_pieces_with_clips_marks() -> None:
    """CLIP's tower with its table of words, BERT's vocabulary in the table's first rows."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = SIZES | {"vocab_size": 49408}
    model = shake(CLIPTextModel(CLIPTextConfig(**sizes)))
    tensors = hugging_face(model)
    measured = published(tensors, sizes, "clip")
    spec = dataclasses.replace(measured, start=49406, end=49407)
    made = Clip.tokenizer_from(MIAOBI_FILES)
    tower = Clip(spec, made, identity="toy", window=24, mask_rule="none")
    tower.load_state_dict(Clip.adopt(tensors, spec), strict=True)
    ids, mask = tower.batch(["\u7ea2CAT", *TEXTS])
    first = [49406, VOCABULARY.index("\u7ea2"), VOCABULARY.index("cat"), 49407]
    assert ids[0].tolist() == [*first, *[0] * 20] and int(mask[0].sum()) == 4
    assert torch.equal(tower.mask_of(ids), mask)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        hidden = tower(ids, mask)
    torch.testing.assert_close(hidden.states, expected, **EXACT)
    ends = (ids == 49407).int().argmax(1)
    torch.testing.assert_close(hidden.pooled, expected[torch.arange(len(ids)), ends], **EXACT)


def test_which_marks_frame_another_vocabulary_in_clips_table_is_not_guessed() -> None:
    tokenizer = Clip.tokenizer_from(MIAOBI_FILES)
    spec = ClipSpec(vocab=49408, width=32, layers=1, window=40, heads=4, inner=48)
    with pytest.raises(BridgeError, match="49406 and 49407"):
        Clip(spec, tokenizer, identity="toy", window=8)
    with pytest.raises(BridgeError, match="do not fit its vocabulary"):
        dataclasses.replace(spec, start=49406)
    with pytest.raises(BridgeError, match="do not fit its vocabulary"):
        dataclasses.replace(spec, start=49406, end=49408)


@pytest.mark.parametrize(
    ("settings", "padding"),
    [({}, 519), ({"pad_token": "!"}, 0), ({"pad_token": {"content": "<|startoftext|>"}}, 518)],
)
def test_the_filler_is_the_one_that_the_settings_name(settings: dict[str, object], padding: int) -> None:
    """SD1 fills with the end token, SD2 and open_clip with token 0."""
    files = clip_files() | {"special_tokens_map.json": json.dumps(settings).encode()}
    tower = Clip(TOYS["clip"]().spec, Clip.tokenizer_from(files), identity="toy", window=8)
    ids, mask = tower.batch(["cat!"])
    assert ids[0, 5:].tolist() == [padding] * 3 or ids[0, 4:].tolist() == [519, *[padding] * 3]
    assert torch.equal(tower.mask_of(ids), mask)
    with pytest.raises(BridgeError, match="padding with"):
        Clip.tokenizer_from(clip_files() | {"tokenizer_config.json": b'{"pad_token": "[FILL]"}'})
