"""Published layouts with random weights, converted and loaded again: every number as it was published."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from language_bridge.bridges.base import Hidden
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import load_bridge, read_header
from language_bridge.conversion import VERSION
from language_bridge.conversion.convert import PROVENANCE_KEY, convert
from language_bridge.conversion.presets import MethodRow, Presets, TowerRow
from language_bridge.encoders import guard
from language_bridge.encoders.file import load_encoder, read_encoder_header
from language_bridge.tests.conversion import layouts
from language_bridge.tests.conversion.layouts import (
    CONTEXT,
    LDM,
    TEXT,
    VOCAB_TXT,
    WIDTH,
    WORDS,
    bert,
    diffusers_names,
    heads,
    model_folder,
    pea,
    random,
    save,
    sentencepiece,
    table,
    trained,
    under,
    unet_shapes,
    xlmr,
)
from language_bridge.tests.conversion.test_containers import Command, rewrite

KV = ("attn2.to_k.weight", "attn2.to_v.weight")

BERT = {"vocab": len(WORDS), "width": WIDTH, "layers": 2}
CHINESE_CLIP = TowerRow(
    name="chinese-clip",
    family="bert",
    match={**BERT, "projection": 20},
    starts=("text_model.", "module.bert.", "bert."),
    window=12,
    mask_rule="pad",
    languages=("zh",),
    licence="none stated",
    source="somewhere",
    about="A tower.",
)
TAIYI_TOWER = TowerRow(
    name="taiyi",
    family="bert",
    match=BERT,
    starts=("embeddings.", "cond_stage_model.transformer.embeddings."),
    window=30,
    mask_rule="none",
    languages=("zh",),
)
TAIYI = MethodRow(
    name="taiyi", base="sd1", kind="identity", match={"hidden": WIDTH, "context": WIDTH}, tower="taiyi"
)
ROBERTA = ("roberta.", "cond_stage_model.roberta.", "text_model.roberta.")
XLMR = {"vocab": len(layouts.PIECES) + 2, "width": WIDTH, "layers": 2}
ALT_TOWER = TowerRow(
    name="alt-m9",
    family="xlmr",
    match=XLMR,
    starts=ROBERTA,
    window=16,
    mask_rule="pad",
    languages=("zh", "en"),
)
M18_TOWER = dataclasses.replace(ALT_TOWER, name="alt-m18", layer=-2)
ALT = MethodRow(
    name="alt-m9",
    base="sd1",
    kind="linear",
    match={"hidden": WIDTH, "context": CONTEXT, "norm": False},
    tower="alt-m9",
    unet="kv",
    languages=("zh", "en"),
    licence="CreativeML OpenRAIL-M",
    source="BAAI",
)
M18 = MethodRow(
    name="alt-m18",
    base="sd2",
    kind="linear",
    match={"hidden": WIDTH, "context": CONTEXT, "norm": True},
    tower="alt-m18",
    unet="own",
)
PEA = MethodRow(
    name="pea",
    base="sdxl",
    kind="mlp",
    match={"hidden": 16, "context": 24, "pooled": 12},
    tower="chinese-clip",
    languages=("zh",),
    licence="Apache-2.0",
    source="OPPOer/PEA-Diffusion",
    about="An adapter.",
)
PEA_SD15 = dataclasses.replace(
    PEA, name="pea-sd15", base="sd1", match={"hidden": 16, "context": 24, "pooled": 0}
)
TABLE = table([CHINESE_CLIP, TAIYI_TOWER, ALT_TOWER, M18_TOWER], [PEA, PEA_SD15, TAIYI, ALT, M18])


def converted(paths: Iterable[Path], out: Path, presets: Presets = TABLE, **options: Any) -> list[Path]:
    return convert(list(paths), out, presets=presets, **options)


def refused(
    paths: Iterable[Path], out: Path, presets: Presets = TABLE, match: str = "", **options: Any
) -> BridgeError:
    """The error of a conversion that must leave nothing behind."""
    before = sorted(out.rglob("*")) if out.exists() else []
    with pytest.raises(BridgeError, match=match or None) as caught:
        converted(paths, out, presets, **options)
    assert (sorted(out.rglob("*")) if out.exists() else []) == before
    assert caught.value.found and caught.value.expected and caught.value.action
    return caught.value


def same(ours: Mapping[str, Tensor], published: Mapping[str, Tensor]) -> bool:
    return set(ours) == set(published) and all(
        torch.equal(ours[name].to(value.dtype), value) for name, value in published.items()
    )


# -- bridges ------------------------------------------------------------------------------------------

ENDINGS = [".bin", ".safetensors"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("layout", ["P2", "P3", "P4", "SD1.5-3", "SD1.5-5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_peas_layouts_come_out_with_their_numbers(
    tmp_path: Path, layout: str, ending: str, dtype: torch.dtype
) -> None:
    weights = random(pea(layout), dtype=dtype)
    source = save(tmp_path / f"pytorch_model{ending}", weights)
    (path,) = converted([source], tmp_path / "out")
    sdxl = layout.startswith("P")
    assert path.name == ("pea.safetensors" if sdxl else "pea-sd15.safetensors")
    loaded = load_bridge(path)
    renamed = {"fc1.": "projector.0.", "fc2.": "projector.2.", "fc3.": "fc."}
    expected = {
        next((new + key[4:] for old, new in renamed.items() if key.startswith(old)), key): value
        for key, value in weights.items()
    }
    assert same(dict(loaded.bridge.state_dict()), expected)
    assert {entry.dtype for entry in guard.read_layout(path).tensors.values()} == {
        "F32" if dtype == torch.float32 else "F16"
    }

    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    cond = loaded.bridge(Hidden(states, torch.ones(2, 5, dtype=torch.bool)))
    x = torch.nn.functional.layer_norm(
        states, [16], weights["layernorm.weight"].float(), weights["layernorm.bias"].float()
    )
    matrices = [
        (w.float(), weights.get(k.replace("weight", "bias"))) for k, w in weights.items() if w.ndim == 2
    ]
    for number, (weight, bias) in enumerate(matrices):
        if number == len(matrices) - 1 and sdxl:
            assert cond.pooled is not None
            torch.testing.assert_close(cond.pooled, x.mean(1))
        x = torch.nn.functional.gelu(x) if number else x
        x = torch.nn.functional.linear(x, weight, None if bias is None else bias.float())
    torch.testing.assert_close(cond.context, x)


def test_the_header_says_what_the_table_and_the_file_say(tmp_path: Path) -> None:
    source = save(tmp_path / "pytorch_model.bin", random(pea("P3")))
    (path,) = converted([source], tmp_path, name="my-pea")
    header = read_header(path)
    assert header is not None and path.name == "my-pea.safetensors"
    assert (header.name, header.kind, header.base, header.unet) == ("my-pea", "mlp", "sdxl", "none")
    assert (header.languages, header.licence, header.source) == (
        ("zh",),
        "Apache-2.0",
        "OPPOer/PEA-Diffusion",
    )
    assert dataclasses.astuple(header.encoder) == ("bert", "chinese-clip", -1, 12, "pad", "")
    record: Any = header.training["conversion"]
    assert record["by"] == f"Language Bridge {VERSION}"
    assert record["preset"] == "pea"
    assert record["recognised"] == {"bridge": {"kind": "mlp", **header.spec}}
    (fact,) = record["files"]
    assert (fact["name"], fact["bytes"]) == ("pytorch_model.bin", source.stat().st_size)
    assert len(fact["sha256"]) == 64


@pytest.mark.parametrize("prefix", ["module.", "adapter.module."])
def test_a_prefix_that_all_names_share_is_taken_off(tmp_path: Path, prefix: str) -> None:
    source = save(tmp_path / "x.pt", under(prefix, random(pea("P4"))), epoch=3)
    (path,) = converted([source], tmp_path)
    assert same(dict(load_bridge(path).bridge.state_dict()), random(pea("P4")))


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    source = save(tmp_path / "x.bin", random(pea("P3")))
    (one,), (two,) = (converted([source], tmp_path / place) for place in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_half_precision_is_written_when_it_is_asked_for(tmp_path: Path) -> None:
    source = save(tmp_path / "x.bin", random(pea("P3")))
    (path,) = converted([source], tmp_path, dtype=torch.float16)
    assert {entry.dtype for entry in guard.read_layout(path).tensors.values()} == {"F16"}


# -- towers -------------------------------------------------------------------------------------------


def chinese_clip(layout: str, seed: int = 0) -> dict[str, Tensor]:
    """Chinese-CLIP with a bit of a vision tower around it: "hf", "pt" or "bare" (pt without `module.`)."""
    tower = random(bert(), seed)
    projection = random({"p": (20, WIDTH)}, seed + 1)["p"]
    if layout == "hf":
        around = {
            "text_model.embeddings.position_ids": torch.arange(40)[None],
            "vision_model.pre_layrnorm.weight": torch.ones(3),
            "visual_projection.weight": torch.ones(3, 3),
            "text_projection.weight": projection,
            "logit_scale": torch.tensor(4.6),
        }
        return under("text_model.", tower) | around
    around = {
        "visual.conv1.weight": torch.ones(3),
        "text_projection": projection.T,
        "logit_scale": torch.ones(()),
    }
    plain = under("bert.", {**tower, **random({"pooler.dense.weight": (WIDTH, WIDTH)})}) | around
    return under("module.", plain) if layout == "pt" else plain


@pytest.mark.parametrize("layout", ["hf", "pt", "bare"])
def test_chinese_clip_comes_out_of_all_its_layouts(tmp_path: Path, layout: str) -> None:
    weights = chinese_clip(layout)
    if layout == "hf":
        folder = tmp_path / "hf"
        sources = [
            model_folder(
                folder, weights, config={"model_type": "chinese_clip"}, files={"vocab.txt": VOCAB_TXT}
            )
        ]
    else:
        (tmp_path / "vocab.txt").write_bytes(VOCAB_TXT)
        sources = [save(tmp_path / "clip_cn.pt", weights, epoch=1, name="x"), tmp_path / "vocab.txt"]
    (path,) = converted(sources, tmp_path / "out")
    assert path.name == "chinese-clip-tower.safetensors"
    tower = load_encoder(path)
    projection = random({"p": (20, WIDTH)}, 1)["p"]
    assert same(dict(tower.state_dict()), {**random(bert()), "text_projection.weight": projection})
    assert [piece.id for piece in tower.tokenize(TEXT)] == [WORDS.index(sign) for sign in TEXT]
    header = read_encoder_header(path)
    assert header is not None
    assert (header.identity, header.window, header.mask_rule) == ("chinese-clip", 12, "pad")
    assert (header.languages, header.licence, header.source) == (("zh",), "none stated", "somewhere")
    record = json.loads(guard.read_layout(path).metadata[PROVENANCE_KEY])
    assert {fact["name"] for fact in record["files"]} >= {"vocab.txt"}
    assert record["recognised"]["tower"]["family"] == "bert"


def test_the_tower_of_a_method_may_be_converted_by_the_methods_name(tmp_path: Path) -> None:
    other = dataclasses.replace(CHINESE_CLIP, name="chinese-clip-52", window=10)
    presets = table([CHINESE_CLIP, other], [PEA])
    folder = model_folder(tmp_path / "hf", chinese_clip("hf"), files={"vocab.txt": VOCAB_TXT})
    error = refused([folder], tmp_path / "out", presets, match="Several published models")
    assert "chinese-clip, chinese-clip-52" in error.found
    (path,) = converted([folder], tmp_path / "out", presets, preset="pea")
    assert path.name == "chinese-clip-tower.safetensors"


def test_a_bridge_converted_with_its_tower_names_its_very_training(tmp_path: Path) -> None:
    method = dataclasses.replace(PEA, match={"hidden": WIDTH})
    adapter = save(tmp_path / "pytorch_model.bin", random(pea("P3", hidden=WIDTH)))
    folder = model_folder(tmp_path / "hf", chinese_clip("hf"), files={"vocab.txt": VOCAB_TXT})
    tower, bridge = converted(
        [adapter, folder], tmp_path / "b", table([CHINESE_CLIP], [method]), towers=tmp_path / "t"
    )
    assert (tower.parent.name, bridge.parent.name) == ("t", "b")
    encoder, header = read_encoder_header(tower), read_header(bridge)
    assert encoder is not None and header is not None
    assert header.encoder.differs(encoder) is None and header.encoder.digest == encoder.digest
    loaded, read = load_encoder(tower), load_bridge(bridge).bridge
    cond = read(loaded(*loaded.batch([TEXT])))
    assert cond.context.shape == (1, 12, 24)


def taiyi(tmp_path: Path, layout: str) -> list[Path]:
    tower = random(bert(pooler=True))
    if layout == "diffusers":
        root = tmp_path / "Taiyi"
        config = {"architectures": ["BertModel"], "model_type": "bert", "num_attention_heads": 1}
        model_folder(root / "text_encoder", tower, config=config)
        model_folder(root / "tokenizer", {}, files={"vocab.txt": VOCAB_TXT})
        (root / "tokenizer" / "pytorch_model.bin").unlink()
        (root / "model_index.json").write_text("{}", encoding="utf-8")
        unet = random(unet_shapes())
        model_folder(
            root / "unet",
            {name: unet[ldm] for name, ldm in diffusers_names().items()},
            name="diffusion_pytorch_model.bin",
        )
        model_folder(root / "vae", random({"x": (1,)}), name="diffusion_pytorch_model.bin")
        return [root]
    whole = under("cond_stage_model.transformer.", tower) | under(LDM, random(unet_shapes()))
    whole |= {"first_stage_model.decoder.conv_in.weight": torch.ones(2), "betas": torch.ones(3)}
    whole |= {
        "model_ema.decay": torch.ones(()),
        "cond_stage_model.transformer.embeddings.position_ids": torch.ones(1, 2),
    }
    (tmp_path / "vocab.txt").write_bytes(VOCAB_TXT)
    ending = ".safetensors" if layout == "single" else ".ckpt"
    around = {"global_step": 3} if layout == "lightning" else {}
    return [save(tmp_path / f"Taiyi{ending}", whole, **around), tmp_path / "vocab.txt"]


@pytest.mark.parametrize("layout", ["diffusers", "single", "lightning"])
def test_taiyi_comes_out_as_a_tower_and_an_identity_bridge(tmp_path: Path, layout: str) -> None:
    tower_path, bridge_path = converted(taiyi(tmp_path, layout), tmp_path / "out")
    assert (tower_path.name, bridge_path.name) == ("taiyi-tower.safetensors", "taiyi.safetensors")
    tower, loaded = load_encoder(tower_path), load_bridge(bridge_path)
    assert same(dict(tower.state_dict()), random(bert()))
    assert (tower.window, tower.mask_rule) == (30, "none")
    hidden = tower(*tower.batch([TEXT]))
    assert torch.equal(loaded.bridge(hidden).context, hidden.states)
    assert loaded.header.unet == "none" and "unet" not in loaded.header.training


def test_a_tower_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    sources = taiyi(tmp_path, "single")
    assert "vocab.txt" in refused(sources[:1], tmp_path / "out").expected
    (tmp_path / "vocab.txt").write_bytes(b"one\ntwo\n")
    refused(sources, tmp_path / "out")


def test_shards_of_a_tower_come_out_as_one(tmp_path: Path) -> None:
    weights = random(bert())
    names = sorted(weights)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save(tmp_path / "m" / file, {name: weights[name] for name in part})
        index |= dict.fromkeys(part, file)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index}), encoding="utf-8"
    )
    (tmp_path / "m" / "vocab.txt").write_bytes(VOCAB_TXT)
    tower, _ = converted([tmp_path / "m"], tmp_path / "out")
    assert same(dict(load_encoder(tower).state_dict()), weights)


# -- AltDiffusion ---------------------------------------------------------------------------------------


def altdiffusion(
    tmp_path: Path, layout: str, moved: tuple[str, ...] = KV, *, m18: bool = False
) -> list[Path]:
    text = under("roberta.", random(xlmr(pooler=True))) | random(heads(WIDTH, CONTEXT, m18=m18), 3)
    text |= {"roberta.embeddings.position_ids": torch.arange(42)[None]}
    unet = trained(random(unet_shapes()), *moved)
    if layout == "diffusers":
        root = tmp_path / "Alt"
        model_folder(root / "text_encoder", text, config={"num_attention_heads": 4})
        (root / "tokenizer").mkdir()
        (root / "tokenizer" / "sentencepiece.bpe.model").write_bytes(sentencepiece())
        model_folder(
            root / "unet",
            {name: unet[ldm] for name, ldm in diffusers_names().items()},
            name="diffusion_pytorch_model.safetensors",
        )
        return [root]
    whole = under("cond_stage_model.", text) | under(LDM, unet) | {"first_stage_model.x": torch.ones(1)}
    (tmp_path / "sentencepiece.bpe.model").write_bytes(sentencepiece())
    return [save(tmp_path / "Alt.safetensors", whole), tmp_path / "sentencepiece.bpe.model"]


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """The checkpoint that the training began with."""
    return save(tmp_path / "sd-v1-4.ckpt", under(LDM, random(unet_shapes())), global_step=1)


@pytest.mark.parametrize("layout", ["diffusers", "single"])
@pytest.mark.parametrize("form", ["replace", "delta"])
def test_altdiffusion_comes_out_with_its_trained_keys_and_values(
    tmp_path: Path, started: Path, layout: str, form: str
) -> None:
    sources = altdiffusion(tmp_path, layout)
    tower_path, bridge_path = converted(sources, tmp_path / "out", reference=started, form=form)
    tower, loaded = load_encoder(tower_path), load_bridge(bridge_path)
    assert same(dict(tower.state_dict()), random(xlmr()))
    head = random(heads(WIDTH, CONTEXT), 3)
    hidden = tower(*tower.batch([TEXT]))
    expected = torch.nn.functional.linear(
        hidden.states, head["transformation.weight"], head["transformation.bias"]
    )
    assert torch.equal(loaded.bridge(hidden).context, expected)

    old, new = random(unet_shapes()), trained(random(unet_shapes()), *KV)
    chosen = {name for name in old if name.endswith(KV)}
    assert (loaded.header.unet, len(loaded.unet)) == ("kv", 32)
    assert same(
        loaded.unet, {name: new[name] if form == "replace" else new[name] - old[name] for name in chosen}
    )
    assert loaded.header.training["unet"] == form and loaded.header.training["unet_complete"] is True
    record: Any = loaded.header.training["conversion"]
    assert record["reference"][0]["name"] == "sd-v1-4.ckpt"
    assert record["unet"] == {"part": "kv", "tensors": 32, "moved_besides": []}


def test_all_of_attn2_is_taken_when_all_of_it_moved(tmp_path: Path, started: Path) -> None:
    sources = altdiffusion(tmp_path, "diffusers", (*KV, "attn2.to_q.weight", "attn2.to_out.0.bias"))
    _, bridge = converted(sources, tmp_path / "out", reference=started)
    loaded = load_bridge(bridge)
    assert (loaded.header.unet, len(loaded.unet)) == ("attn2", 80)


def test_a_patch_that_is_not_all_of_the_training_is_not_called_complete(
    tmp_path: Path, started: Path
) -> None:
    sources = altdiffusion(tmp_path, "diffusers", (*KV, "out.2.bias"))
    assert "out.2.bias" in refused(sources, tmp_path / "out", reference=started).found
    _, bridge = converted(sources, tmp_path / "out", reference=started, unet="kv")
    header = read_header(bridge)
    assert header is not None and header.training["unet_complete"] is False
    record: Any = header.training["conversion"]
    assert record["unet"]["moved_besides"] == ["out.2.bias"]


def test_altdiffusion_without_its_unet_or_a_reference_is_refused(tmp_path: Path, started: Path) -> None:
    (root,) = altdiffusion(tmp_path, "diffusers")
    assert "--reference" in refused([root], tmp_path / "out").action
    text = root / "text_encoder" / "pytorch_model.bin"
    assert "needs the U-Net" in refused([text], tmp_path / "out", reference=started).what
    pieces = tmp_path / "sentencepiece.bpe.model"
    pieces.write_bytes(sentencepiece())
    assert "no U-Net" in refused([root], tmp_path / "out", reference=text).found
    _, bridge = converted([text], tmp_path / "out", unet="none")
    header = read_header(bridge)
    assert header is not None and header.unet == "none" and header.training["unet"] == "own"


def test_the_whole_unet_is_carried_when_it_is_asked_for(tmp_path: Path) -> None:
    _, bridge = converted(altdiffusion(tmp_path, "diffusers"), tmp_path / "out", unet="full")
    loaded = load_bridge(bridge)
    assert loaded.header.unet == "full" and loaded.header.training["unet"] == "replace"
    assert same(loaded.unet, trained(random(unet_shapes()), *KV))


@pytest.mark.parametrize("layout", ["diffusers", "single"])
def test_m18_reads_the_last_layer_but_one_and_goes_with_its_own_unet(tmp_path: Path, layout: str) -> None:
    tower_path, bridge_path = converted(altdiffusion(tmp_path, layout, m18=True), tmp_path / "out")
    tower, loaded = load_encoder(tower_path), load_bridge(bridge_path)
    assert (tower.layer, loaded.header.base, loaded.header.unet) == (-2, "sd2", "none")
    assert loaded.header.training["unet"] == "own"
    head = random(heads(WIDTH, CONTEXT, m18=True), 3)
    hidden = tower(*tower.batch([TEXT]))
    normed = torch.nn.functional.layer_norm(
        hidden.states, [WIDTH], head["pre_LN.weight"], head["pre_LN.bias"]
    )
    expected = torch.nn.functional.linear(
        normed, head["transformation_pre.weight"], head["transformation_pre.bias"]
    )
    torch.testing.assert_close(loaded.bridge(hidden).context, expected)


# -- which row ----------------------------------------------------------------------------------------


def test_two_rows_that_fit_are_a_question(tmp_path: Path) -> None:
    presets = table([CHINESE_CLIP], [PEA, dataclasses.replace(PEA, name="pea-other", base="sdxl")])
    source = save(tmp_path / "x.bin", random(pea("P3")))
    assert refused([source], tmp_path / "out", presets).found == "pea, pea-other"
    (path,) = converted([source], tmp_path / "out", presets, preset="pea-other")
    assert path.name == "pea-other.safetensors"


def test_a_row_may_set_what_the_file_cannot_say(tmp_path: Path) -> None:
    tower = dataclasses.replace(TAIYI_TOWER, change={"eps": 1e-6})
    path, _ = converted(taiyi(tmp_path, "diffusers"), tmp_path / "out", table([tower], [TAIYI]))
    header = read_encoder_header(path)
    assert header is not None and header.spec["eps"] == 1e-6
    for change in ({"eps": "small"}, {"epsilon": 1e-6}, {"heads": 3}):
        wrong = dataclasses.replace(TAIYI_TOWER, change=change)
        refused([tmp_path / "Taiyi"], tmp_path / "other", table([wrong], [TAIYI]))


def test_a_hash_that_the_table_knows_settles_it(tmp_path: Path) -> None:
    import hashlib

    source = save(tmp_path / "x.bin", random(pea("P3")))
    known = hashlib.sha256(source.read_bytes()).hexdigest()
    presets = table([CHINESE_CLIP], [PEA, dataclasses.replace(PEA, name="pinned", sha256=(known,))])
    (path,) = converted([source], tmp_path / "out", presets)
    assert path.name == "pinned.safetensors"


def test_a_name_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "x.bin", random(pea("P3")))
    for name in ("alt-m9", "chinese-clip", "nobody"):
        error = refused([source], tmp_path / "out", preset=name, match="not what the table calls")
        assert "pea" in error.expected
    assert "no such name" in refused([source], tmp_path / "out", preset="nobody").found


def test_sizes_that_no_row_knows_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "x.bin", random(pea("P3", hidden=17)))
    assert '"hidden": 17' in refused([source], tmp_path / "out", match="no row").found


def test_what_nobody_recognises_is_refused_with_what_was_seen(tmp_path: Path) -> None:
    source = save(tmp_path / "x.bin", random({"some.lora_up.weight": (4, 4), "alpha": (1,)}))
    error = refused([source], tmp_path / "out")
    assert "claimed by nobody" in error.found and "some.lora_up.weight [4, 4]" in error.found


def test_what_two_kinds_claim_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from language_bridge.bridges.linear import Linear, LinearSpec

    monkeypatch.setattr(Linear, "recognise", classmethod(lambda cls, shapes: LinearSpec(hidden=1, context=1)))
    source = save(tmp_path / "x.bin", random(pea("P3")))
    assert "linear, mlp" in refused([source], tmp_path / "out").found


def test_what_two_families_claim_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from language_bridge.encoders.xlmr import Xlmr

    monkeypatch.setattr(Xlmr, "recognise", classmethod(lambda cls, shapes, config: object()))
    assert "bert, xlmr" in refused(taiyi(tmp_path, "diffusers"), tmp_path / "out").found


@pytest.mark.parametrize("surplus", ["evil.weight", "projector.9.weight", "layernorm.extra"])
def test_a_bridge_with_another_tensor_is_refused(tmp_path: Path, surplus: str) -> None:
    source = save(tmp_path / "x.bin", random(pea("P3")) | {surplus: torch.ones(2)})
    refused([source], tmp_path / "out")


@pytest.mark.parametrize("surplus", ["encoder.layer.0.adapter.weight", "extra", "transformation.weight"])
def test_a_tower_with_another_tensor_is_refused(tmp_path: Path, surplus: str) -> None:
    folder = model_folder(
        tmp_path / "m", random(bert()) | {surplus: torch.ones(2)}, files={"vocab.txt": VOCAB_TXT}
    )
    assert surplus in refused([folder], tmp_path / "out", match="belong to nothing known").found


def test_a_tower_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    weights = random(bert())
    del weights["encoder.layer.1.output.dense.bias"]
    refused([model_folder(tmp_path / "m", weights, files={"vocab.txt": VOCAB_TXT})], tmp_path / "out")


def test_a_head_of_m18_without_the_one_that_counts_is_refused(tmp_path: Path) -> None:
    (root,) = altdiffusion(tmp_path, "diffusers")
    text = under("roberta.", random(xlmr())) | random({"transformation.weight": (WIDTH, WIDTH)})
    text |= random({"transformation.bias": (WIDTH,), "pre_LN.weight": (WIDTH,), "pre_LN.bias": (WIDTH,)})
    model_folder(root / "text_encoder", text)
    refused([root], tmp_path / "out", match="belong to nothing known")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tmp_path: Path, started: Path, value: float) -> None:
    weights = random(pea("P3"))
    weights["projector.2.weight"][0, 0] = value
    assert "projector.2.weight" in refused([save(tmp_path / "x.bin", weights)], tmp_path / "out").found
    tower = random(bert())
    tower["encoder.layer.1.output.dense.bias"][3] = value
    folder = model_folder(tmp_path / "m", tower, files={"vocab.txt": VOCAB_TXT})
    refused([folder], tmp_path / "out")
    (root,) = altdiffusion(tmp_path, "diffusers")
    unet = trained(random(unet_shapes()), *KV)
    unet["output_blocks.5.1.transformer_blocks.0.attn2.to_v.weight"][0, 0] = value
    model_folder(
        root / "unet",
        {name: unet[ldm] for name, ldm in diffusers_names().items()},
        name="diffusion_pytorch_model.safetensors",
    )
    refused([root], tmp_path / "out", reference=started)


def hostile(folder: Path, sort: str) -> Path:
    """A download that is not what it should be."""
    good = save(folder / "pytorch_model.bin", random(pea("P3")))
    if sort == "calls something":
        torch.save(random(pea("P3")) | {"x": Command(os.mkdir, str(folder / "ran"))}, good)
    elif sort == "zip bomb":
        rewrite(good, lambda program: program, compression=zipfile.ZIP_DEFLATED)
    elif sort == "cut off":
        good.write_bytes(good.read_bytes()[:-100])
    elif sort == "web page":
        good.write_bytes(b"<!doctype html><title>Log in</title>")
    elif sort == "Git LFS pointer":
        good.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif sort == "noise":
        good.write_bytes(bytes(range(256)) * 8)
    elif sort == "link":
        good.rename(folder / "elsewhere.bin")
        (folder / "model").mkdir()
        (folder / "model" / "pytorch_model.bin").symlink_to(folder / "elsewhere.bin")
        return folder / "model"
    return good


@pytest.mark.parametrize(
    "sort", ["calls something", "zip bomb", "cut off", "web page", "Git LFS pointer", "noise", "link"]
)
def test_a_hostile_or_broken_download_leaves_nothing_behind(tmp_path: Path, sort: str) -> None:
    refused([hostile(tmp_path / "in", sort)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "in" / "ran").exists()


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    weights = {key: tensor.mul(100).to(torch.int8) for key, tensor in random(pea("P3")).items()}
    assert "int8" in refused([save(tmp_path / "x.bin", weights)], tmp_path / "out").found


def test_mixed_precision_becomes_float32(tmp_path: Path) -> None:
    weights = random(pea("P3"))
    weights["fc.weight"] = weights["fc.weight"].half()
    (path,) = converted([save(tmp_path / "x.bin", weights)], tmp_path)
    assert {entry.dtype for entry in guard.read_layout(path).tensors.values()} == {"F32"}
    assert same(dict(load_bridge(path).bridge.state_dict()), weights)


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    weights = random(pea("P3"))
    weights["fc.bias"][0] = 1e6
    source = save(tmp_path / "x.bin", weights)
    assert "fc.bias" in refused([source], tmp_path / "out", dtype=torch.float16).found


def test_two_of_a_sort_at_once_are_refused(tmp_path: Path) -> None:
    one, two = (save(tmp_path / f"{name}.bin", random(pea("P3"))) for name in ("one", "two"))
    assert refused([one, two], tmp_path / "out").found == "one.bin, two.bin"


def test_a_checkpoint_without_anything_to_convert_is_refused(tmp_path: Path, started: Path) -> None:
    refused([started], tmp_path / "out")
    adapter = save(tmp_path / "x.bin", random(pea("P3")))
    refused([adapter, tmp_path / "missing.bin"], tmp_path / "out")
    (tmp_path / "vocab.txt").write_bytes(VOCAB_TXT)
    refused([tmp_path / "vocab.txt"], tmp_path / "out", match="no weights among")
    refused([], tmp_path / "out")


def test_our_own_files_need_no_conversion(tmp_path: Path) -> None:
    tower, bridge = converted(taiyi(tmp_path, "diffusers"), tmp_path / "out")
    for path in (tower, *converted([save(tmp_path / "x.bin", random(pea("P3")))], tmp_path / "out")):
        refused([path], tmp_path / "other", match="saved by Language Bridge already")
    refused([bridge], tmp_path / "other")  # an identity bridge holds no tensors at all


# -- writing ------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_kept_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    source = save(tmp_path / "x.bin", random(pea("P3")))
    target = tmp_path / "pea.safetensors"
    target.write_bytes(b"mine")
    refused([source], tmp_path, match="already")
    assert target.read_bytes() == b"mine"
    converted([source], tmp_path, overwrite=True)
    assert read_header(target) is not None


def test_the_very_same_tower_is_not_written_twice(tmp_path: Path) -> None:
    sources = taiyi(tmp_path, "diffusers")
    tower, bridge = converted(sources, tmp_path / "out")
    before = tower.stat().st_mtime_ns
    bridge.unlink()
    assert converted(sources, tmp_path / "out") == [tower, bridge]
    assert tower.stat().st_mtime_ns == before
    bridge.unlink()
    tower.write_bytes(b"another")
    refused(sources, tmp_path / "out", match="already")


def test_either_both_files_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from language_bridge.conversion import convert as module

    def fail(*_: Any, **__: Any) -> None:
        raise BridgeError("The disk is full.", "0 bytes", "more", "Make room.")

    monkeypatch.setattr(module, "save_bridge", fail)
    (tmp_path / "out").mkdir()
    refused(taiyi(tmp_path, "diffusers"), tmp_path / "out", match="disk is full")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a\\b", "x" * 200])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    source = save(tmp_path / "x.bin", random(pea("P3")))
    if name:
        refused([source], tmp_path / "out", name=name, match="cannot have this name")


@pytest.mark.parametrize("option", [{"unet": "all"}, {"form": "add"}])
def test_an_unknown_word_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    refused([save(tmp_path / "x.bin", random(pea("P3")))], tmp_path / "out", **option)
