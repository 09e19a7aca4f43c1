"""True sizes of published files, without their memory: each is recognised, no tensor is left over."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from language_bridge.bridges.base import create
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import load_bridge, read_header
from language_bridge.conversion import convert as room
from language_bridge.conversion.containers import Part, Source, Weights
from language_bridge.conversion.presets import MethodRow, TowerRow, published
from language_bridge.encoders import families
from language_bridge.encoders.file import load_encoder
from language_bridge.tests.bridges import references
from language_bridge.tests.conversion.layouts import (
    LDM,
    heads,
    model_folder,
    pea,
    random,
    save,
    table,
    under,
    unet_shapes,
)
from language_bridge.tests.encoders import toys
from language_bridge.tests.fixtures.branches import SD15, PublishedBranch

Shapes = Mapping[str, tuple[int, ...]]

BERT_BASE = {
    "vocab_size": 21128,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
BERT_LARGE = BERT_BASE | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
XLMR_LARGE = BERT_LARGE | {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
T5_XL = {
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 32,
}
T5_XL |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def chinese_clip(text: Mapping[str, int], projection: int) -> dict[str, tuple[int, ...]]:
    config = transformers.ChineseCLIPConfig(
        text_config=dict(text),
        vision_config=VISION | {"image_size": 16, "patch_size": 8},
        projection_dim=projection,
    )
    return shapes_of(transformers.ChineseCLIPModel(config)) | {
        "text_model.embeddings.position_ids": (1, 512),
        "vision_model.embeddings.position_ids": (1, 5),
    }


def cn_clip(text: Mapping[str, int], projection: int) -> dict[str, tuple[int, ...]]:
    tower = shapes_of(transformers.BertModel(transformers.BertConfig(**text)))
    around = {"visual.conv1.weight": (8, 3, 14, 14), "visual.transformer.resblocks.0.ln_1.weight": (8,)}
    around |= {"text_projection": (text["hidden_size"], projection), "logit_scale": ()}
    return under("module.", under("bert.", tower) | around)


def xlmr(prefix: str, **around: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    model = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**XLMR_LARGE))
    return under(prefix, shapes_of(model) | {"embeddings.position_ids": (1, 514)}) | around


def single_file(text: Shapes, context: int) -> dict[str, tuple[int, ...]]:
    around = {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3), "model_ema.num_updates": ()}
    around |= dict.fromkeys(("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar"), (1000,))
    return under(LDM, unet_shapes(context, 320)) | under("cond_stage_model.", text) | around


def t5(vocab: int, whole: bool) -> dict[str, tuple[int, ...]]:
    config = transformers.T5Config(**T5_XL, vocab_size=vocab)
    kind = transformers.T5ForConditionalGeneration if whole else transformers.T5EncoderModel
    return shapes_of(kind(config))


def llama(vocab: int, stem: str, packed: bool = False, crossed: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{stem}embed_tokens.weight": (vocab, 4096),
        f"{stem}norm.weight": (4096,),
    }
    for number in range(32):
        layer = f"{stem}layers.{number}."
        names = ["W_pack"] if packed else ["q_proj", "k_proj", "v_proj"]
        shapes |= {f"{layer}self_attn.{name}.weight": (12288 if packed else 4096, 4096) for name in names}
        shapes |= {
            f"{layer}self_attn.o_proj.weight": (4096, 4096),
            f"{layer}mlp.down_proj.weight": (4096, 11008),
        }
        shapes |= {f"{layer}mlp.{name}.weight": (11008, 4096) for name in ("gate_proj", "up_proj")}
        shapes |= {
            f"{layer}{name}.weight": (4096,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        if crossed and number % 2 == 0:
            shapes |= {
                f"{layer}cross_attn.{n}.weight": (4, 4) for n in ("q_proj", "o_proj", "k_proj", "v_proj")
            }
            shapes |= {f"{layer}cross_attn.{n}.weight": (4,) for n in ("norm1", "norm2")}
    return shapes


def intern_vl() -> dict[str, tuple[int, ...]]:
    around = {"vision_model.embeddings.class_embedding": (1, 1, 3200), "query_tokens": (1, 96, 4096)}
    around |= {"text_projection": (4096, 768), "logit_scale": (), "clip_projector.norm.weight": (3200,)}
    around |= {
        "clip_projector2.q_proj.weight": (4, 4),
        "itm_head.weight": (2, 4),
        "qllama.lm_head.weight": (4, 4),
    }
    return llama(49954, "qllama.model.", crossed=True) | around


def alt(m18: bool = False) -> dict[str, tuple[int, ...]]:
    return xlmr("roberta.") | heads(1024, 1024 if m18 else 768, m18=m18)


def taiyi() -> dict[str, tuple[int, ...]]:
    return shapes_of(transformers.BertModel(transformers.BertConfig(**BERT_BASE)))


def alt_clip(m18: bool = False) -> dict[str, tuple[int, ...]]:
    """BAAI/AltCLIP and AltCLIP-m18: XLM-R under a head for retrieval, and CLIP's other half."""
    width = 1024 if m18 else 768
    head: dict[str, tuple[int, ...]] = {
        "transformation.weight": (width, 1024),
        "transformation.bias": (width,),
    }
    head |= {"pre_LN.weight": (1024,), "pre_LN.bias": (1024,)}
    around = {"text_projection.weight": (width, width), "visual_projection.weight": (width, 1024)}
    around |= {"vision_model.embeddings.class_embedding": (1024,), "logit_scale": ()}
    return under("text_model.", xlmr("roberta.") | head) | around


def clip_l() -> dict[str, tuple[int, ...]]:
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_L))
    shapes = {
        key if key.startswith("text_model.") else f"text_model.{key}": v
        for key, v in shapes_of(model).items()
    }
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 123_060_480  # 246 MB in half
    return shapes | {"text_model.embeddings.position_ids": (1, 77)}


def open_clip() -> dict[str, tuple[int, ...]]:
    heads_of_clip = {"text.proj.0.weight": (1024, 1024), "text.proj.2.weight": (4, 4), "visual.proj": (4, 4)}
    return (
        xlmr("text.transformer.") | heads_of_clip | {"visual.conv1.weight": (1, 3, 14, 14), "logit_scale": ()}
    )


HUGE = {f"chinese-clip-vit-huge-patch14{window}" for window in ("", "-64", "-77", "-unmasked")}
LARGE = {"chinese-clip-vit-large-patch14", "chinese-clip-vit-large-patch14-336px"}
TAIYI = {f"taiyi-sd-1b-{name}" for name in ("chinese-v0.1", "chinese-v0.1-77", "anime-chinese-v0.1")}
ALT = {"altdiffusion-m2", "altdiffusion-m9"}
ELLA = {"ella-sd1.5-tsc-t5xl", "ella-sd1.5-tsc-t5xl-host"}
CASES: dict[str, tuple[Callable[[], Shapes], set[str]]] = {
    "Chinese-CLIP B/16": (lambda: chinese_clip(BERT_BASE, 512), {"chinese-clip-vit-base-patch16"}),
    "Chinese-CLIP L/14": (lambda: chinese_clip(BERT_BASE, 768), LARGE),
    "Chinese-CLIP H/14": (lambda: chinese_clip(BERT_LARGE, 1024), HUGE),
    "clip_cn_vit-h-14.pt": (lambda: cn_clip(BERT_LARGE, 1024), HUGE),
    "clip_cn_vit-b-16.pt": (lambda: cn_clip(BERT_BASE, 512), {"chinese-clip-vit-base-patch16"}),
    "Taiyi text_encoder": (taiyi, TAIYI),
    "Taiyi .ckpt": (lambda: single_file(under("transformer.", taiyi()), 768), TAIYI),
    "open_clip XLM-R": (open_clip, {"open-clip-xlm-roberta-large-vit-h-14"}),
    "AltCLIP": (alt_clip, {"altclip", "altclip-normed"}),
    "AltCLIP-m18": (lambda: alt_clip(m18=True), set()),
    "MiaoBi text_encoder": (clip_l, {"miaobi-beta-0.9", "miaobi-beta-0.9-any-unet"}),
    "AltDiffusion text_encoder": (alt, ALT),
    "AltDiffusion-m9.safetensors": (lambda: single_file(alt(), 768), ALT),
    "AltDiffusion-m18 text_encoder": (lambda: alt(m18=True), {"altdiffusion-m18"}),
    "AltDiffusion-m18.safetensors": (lambda: single_file(alt(m18=True), 1024), {"altdiffusion-m18"}),
    "Flan-T5-XL": (lambda: t5(32128, whole=True), {"flan-t5-xl"}),
    "Flan-T5-XL encoder": (lambda: t5(32128, whole=False), {"flan-t5-xl"}),
    "mT5-XL": (lambda: t5(250112, whole=True), {"mt5-xl"}),
    "Baichuan2-7B": (
        lambda: llama(125696, "model.", packed=True) | {"lm_head.weight": (125696, 4096)},
        {"baichuan2-7b-chat"},
    ),
    "InternVL-14B": (intern_vl, {"internvl-14b-224px-80", "internvl-14b-224px-83"}),
    "OmniDiffusion": (
        lambda: shapes_of(references.Omni(4096, 2048, 1280, 227, 4)),
        {f"omnidiffusion-stage-{stage}" for stage in (1, 2, 3)},
    ),
    "ELLA": (lambda: shapes_of(references.Ella(2048, 768, 64, 6, 320)), ELLA),
    "BDM1.0": (lambda: shapes_of(PublishedBranch(SD15)), {"bdm-1.0"}),
    "MuLan sd15": (lambda: shapes_of(references.MulanAdapter(4096, 768, 120, 1)), {"mulan-sd15"}),
    "MuLan sd21": (lambda: shapes_of(references.MulanAdapter(4096, 1024, 120, 1)), {"mulan-sd21"}),
    "MuLan sdxl": (
        lambda: shapes_of(references.MulanXl(4096, 1280, 768, 1280, 768, 120, added=True)),
        {"mulan-sdxl"},
    ),
    "RouWei-Gemma": (
        lambda: shapes_of(references.Rouwei(1152, 2048, 1280, 512, 308, 2, 3)),
        {f"rouwei-gemma-{version}{host}" for version in ("v0", "v0.1") for host in ("", "-host")},
    ),
    "RouWei-T5Gemma": (
        lambda: shapes_of(references.Rouwei(2304, 2048, 1280, 512, 308, 3, 3)),
        {f"rouwei-t5gemma{reading}" for reading in ("", "-right", "-host")},
    ),
}
"""Name -> shapes, and the rows that fit: methods where there are any, else towers."""


def part_of(name: str, shapes: Shapes) -> Part:
    dtypes = dict.fromkeys(shapes, torch.float32)
    return Part(name, Weights(shapes, dtypes, lambda key: torch.empty(shapes[key], device="meta")))


@pytest.mark.parametrize("name", CASES)
def test_a_published_file_is_recognised_as_what_it_is(name: str) -> None:
    make, expected = CASES[name]
    with torch.device("meta"):
        shapes = make()
    words = {"vocab.txt": b""} if name.startswith("MiaoBi") else {}
    contents = room._contents(Source((part_of(name, shapes),), words, {}, ()))
    fitting = room._fitting(contents, published())
    methods = {choice.method.name for choice in fitting if choice.method is not None}
    towers = {choice.tower.name for choice in fitting if choice.method is None}
    assert (methods or towers) == expected
    assert not methods or towers <= {published().methods[method].tower for method in methods}


@pytest.mark.parametrize("chinese", ["hf", "pt"])
def test_the_two_towers_of_peas_dual_adapter_are_recognised_together(chinese: str) -> None:
    with torch.device("meta"):
        make = chinese_clip if chinese == "hf" else cn_clip
        towers = (part_of("cn", make(BERT_LARGE, 1024)), part_of("mul", open_clip()))
        adapter = part_of("pea", pea("P3", hidden=2048, width=2048, pooled=1280, context=2048))
    (choice,) = room._fitting(room._contents(Source((*towers, adapter), {}, {}, ())), published())
    assert choice.method is not None and choice.method.name == "pea-sdxl-dual"
    assert [found.part.name for found in choice.parts] == ["mul", "cn"]


@pytest.mark.parametrize(("layout", "width", "count"), [("P2", 1024, 4_987_136), ("P4", 2048, 15_732_736)])
def test_peas_published_sizes_are_those_that_load(
    tmp_path: Path, layout: str, width: int, count: int
) -> None:
    shapes = pea(layout, hidden=1024, width=width, pooled=1280, context=2048)
    source = save(tmp_path / "pytorch_model.bin", random(shapes, dtype=torch.float16))
    (path,) = room.convert([source], tmp_path, preset="pea-sdxl-xlm-roberta")
    bridge = load_bridge(path).bridge
    assert sum(parameter.numel() for parameter in bridge.parameters()) == count
    assert (bridge.spec.hidden, bridge.spec.context, bridge.spec.pooled) == (1024, 2048, 1280)


def test_the_whole_unet_of_another_make_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """OmniDiffusion's folders hold an SDXL U-Net, which nothing is taken from."""
    adapter = references.Omni(16, 16, 8, 5, 1)
    root = tmp_path / "stage-2"
    model_folder(root / "text_encoder_adapter", adapter.state_dict())
    sdxl = {"conv_in.weight": (2,), "down_blocks.0.resnets.0.norm1.weight": (2,), "add_embedding.x": (2,)}
    model_folder(root / "unet_ema", random(sdxl), name="diffusion_pytorch_model.safetensors")
    row = MethodRow(name="omni", base="sdxl", kind="omni", match={}, tower="t", unet="own")
    (path,) = room.convert([root], tmp_path / "out", presets=table(methods=[row]))
    header = read_header(path)
    assert header is not None and header.training["unet"] == "own"
    with pytest.raises(BridgeError, match="cannot be converted"):
        room.convert([root], tmp_path / "out", presets=table(methods=[row]), unet="full", overwrite=True)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("omni", lambda: references.Omni(24, 16, 8, 5, 2)),
        ("ella", lambda: references.Ella(24, 16, 6, 2, 8)),
        ("mulan", lambda: references.MulanAdapter(24, 16, 6, 1)),
        ("rouwei", lambda: references.Rouwei(24, 32, 8, 12, 6, 2, 3)),
    ],
)
def test_adapters_of_every_kind_come_out_with_their_numbers(
    tmp_path: Path, kind: str, reference: Any, ending: str
) -> None:
    weights = reference().state_dict()
    template = {"before": "draw: "}
    row = MethodRow(name=kind, base="sd1", kind=kind, match={}, tower="t", template=template)
    source = save(tmp_path / f"x{ending}", {key: value.contiguous() for key, value in weights.items()})
    (path,) = room.convert([source], tmp_path, presets=table(methods=[row]))
    loaded = load_bridge(path)
    assert loaded.header.kind == kind and loaded.header.training["template"] == template
    state = loaded.bridge.state_dict()
    assert set(state) == set(weights) and all(
        torch.equal(state[key], value) for key, value in weights.items()
    )
    assert type(create(kind, loaded.header.spec)) is type(loaded.bridge)


def test_a_bridge_file_that_replaces_a_piece_of_the_unet_asks_what_becomes_of_it(tmp_path: Path) -> None:
    spec = {"hidden": 24, "first": 16, "second": 8, "pooled": 12, "queries": 6}
    weights = references.MulanXl(**spec, tower_pooled=0, added=True).state_dict()
    row = MethodRow(name="mulan", base="sdxl", kind="mulan", match={}, tower="t")
    source = save(tmp_path / "x.pth", weights)
    presets = table(methods=[row])
    with pytest.raises(BridgeError, match="a piece of the U-Net as well"):
        room.convert([source], tmp_path / "a", presets=presets)
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").iterdir())
    (path,) = room.convert([source], tmp_path / "b", presets=presets, unet="none")
    left_out = load_bridge(path)
    assert not left_out.unet and left_out.header.training["unet_complete"] is False
    (path,) = room.convert([source], tmp_path / "c", presets=presets, unet="full")
    whole = load_bridge(path)
    assert whole.header.unet == "full" and whole.header.training["unet"] == "replace"
    assert torch.equal(whole.unet["label_emb.0.0.weight"], weights["add_embedding.linear_1.weight"])


@pytest.mark.parametrize("family", sorted(set(families()) - {"dual"}))
def test_towers_of_every_family_come_out_with_their_numbers(tmp_path: Path, family: str) -> None:
    tower = toys.TOYS[family]()
    state = {key: value.contiguous() for key, value in tower.state_dict().items()}
    folder = model_folder(
        tmp_path / family, state, config={"num_attention_heads": 4}, files=toys.tokenizer_files(family)
    )
    row = TowerRow(name="t", family=family, match={"width": tower.width}, window=12, mask_rule="pad")
    (path,) = room.convert([folder], tmp_path / "out", presets=table([row]))
    loaded = load_encoder(path)
    assert loaded.family == family and loaded.window == 12
    found = loaded.state_dict()
    assert set(found) == set(state) and all(torch.equal(found[key], value) for key, value in state.items())
    hidden = loaded(*loaded.batch(["a red cat on the mat"]))
    assert hidden.states.shape == (1, 12, tower.width)


def test_a_packed_decoder_comes_out_split(tmp_path: Path) -> None:
    """Baichuan2 stores queries, keys and values as one matrix, in shards, with `lm_head` beside them."""
    tower = toys.single_tower("llama", pairs=4)
    state = {key: value.contiguous() for key, value in tower.state_dict().items()}
    packed = {f"model.{key}": value for key, value in state.items()} | {"lm_head.weight": torch.ones(2, 2)}
    for key in [key for key in packed if key.endswith("q_proj.weight")]:
        parts = [packed.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
        packed[key.replace("q_proj", "W_pack")] = torch.cat(parts)
    names = sorted(packed)
    index = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(names)}
    folder = tmp_path / "Baichuan2"
    for file in sorted(set(index.values())):
        save(folder / file, {name: packed[name] for name in names if index[name] == file})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    heads_of_toy = {"num_attention_heads": tower.spec.heads}
    (folder / "config.json").write_text(json.dumps(heads_of_toy), encoding="utf-8")
    for name, data in toys.tokenizer_files("llama").items():
        (folder / name).write_bytes(data)
    row = TowerRow(
        name="t",
        family="llama",
        match={"width": tower.width},
        starts=("model.layers.0.self_attn.W_pack",),
        change={"end": -1},
        window=12,
        mask_rule="pad",
    )
    (path,) = room.convert([folder], tmp_path / "out", presets=table([row]))
    loaded = load_encoder(path)
    found = loaded.state_dict()
    assert set(found) == set(state) and all(torch.equal(found[key], value) for key, value in state.items())
    assert loaded.marks.end == ()
