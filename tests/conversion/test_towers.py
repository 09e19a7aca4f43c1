"""Towers that take more than one file or one reading: PEA-Diffusion's dual one, AltCLIP, MiaoBi."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from language_bridge.bridges.file import load_bridge, read_header
from language_bridge.conversion.presets import MethodRow, TowerRow
from language_bridge.encoders.dual import Dual
from language_bridge.encoders.file import load_encoder, read_encoder_header
from language_bridge.tests.conversion.layouts import (
    PIECES,
    TEXT,
    VOCAB_TXT,
    WIDTH,
    WORDS,
    bert,
    model_folder,
    pea,
    random,
    save,
    sentencepiece,
    table,
    under,
    xlmr,
)
from language_bridge.tests.conversion.test_convert import CHINESE_CLIP, PEA, chinese_clip, refused, same
from language_bridge.tests.conversion.test_convert import converted as converted_by

XLMR = TowerRow(
    name="xlm-roberta",
    family="xlmr",
    match={"vocab": len(PIECES) + 2, "width": WIDTH, "layers": 2},
    starts=("text.transformer.",),
    window=20,
    mask_rule="pad",
)
BOTH = TowerRow(
    name="both",
    family="dual",
    match={},
    halves=("xlm-roberta", "chinese-clip"),
    window=14,
    mask_rule="pad",
)
T5 = TowerRow(name="mt5", family="t5", match={"width": 2 * WIDTH}, window=8, mask_rule="pad")
SIZES = {"hidden": 2 * WIDTH, "context": 24, "pooled": 12}
MT5 = dataclasses.replace(PEA, name="pea-mt5", match=SIZES, tower="mt5")
DUAL = dataclasses.replace(PEA, name="pea-dual", match=SIZES, tower="both")
PAIRS = table([XLMR, CHINESE_CLIP, BOTH, T5], [MT5, DUAL, PEA])


def converted(paths: Any, out: Path, presets: Any = PAIRS, **options: Any) -> list[Path]:
    return converted_by(paths, out, presets, **options)


def open_clip(seed: int = 5) -> dict[str, Tensor]:
    """open_clip's layout, with its other heads and a bit of its vision tower around it."""
    around = {"text.proj.0.weight": torch.ones(3, 3), "visual.conv1.weight": torch.ones(3)}
    return under("text.transformer.", random(xlmr(pooler=True), seed)) | around


def adapter(path: Path, hidden: int = 2 * WIDTH) -> Path:
    return save(path / "pytorch_model.bin", random(pea("P3", hidden=hidden)))


def first(path: Path) -> Path:
    folder = path / "CLIP-ViT-H-14-xlm-roberta"
    return model_folder(
        folder,
        open_clip(),
        name="open_clip_pytorch_model.bin",
        files={"sentencepiece.bpe.model": sentencepiece()},
    )


def second(path: Path) -> Path:
    return model_folder(path / "chinese-clip", chinese_clip("hf"), files={"vocab.txt": VOCAB_TXT})


@pytest.mark.parametrize("turned", [False, True])
def test_a_dual_tower_is_put_together_from_the_files_of_its_halves(tmp_path: Path, turned: bool) -> None:
    towers = [first(tmp_path), second(tmp_path)]
    tower_path, bridge_path = converted(
        [adapter(tmp_path), *(reversed(towers) if turned else towers)], tmp_path / "out"
    )
    assert (tower_path.name, bridge_path.name) == ("both-tower.safetensors", "pea-dual.safetensors")
    header, reads = read_encoder_header(tower_path), read_header(bridge_path)
    assert header is not None and reads is not None
    assert (header.family, header.window, header.layer) == ("dual", 14, -1)
    assert reads.encoder.differs(header) is None and reads.encoder.digest == header.digest
    assert {fact["name"] for fact in reads.training["conversion"]["files"]} >= {  # type: ignore[index]
        "pytorch_model.bin",
        "open_clip_pytorch_model.bin",
        "vocab.txt",
        "sentencepiece.bpe.model",
    }
    tower = load_encoder(tower_path)
    assert isinstance(tower, Dual)
    assert same(dict(tower.first.state_dict()), random(xlmr(), 5))
    projection = random({"p": (20, WIDTH)}, 1)["p"]
    assert same(dict(tower.second.state_dict()), {**random(bert()), "text_projection.weight": projection})

    alone = [
        load_encoder(converted([path], tmp_path / "alone")[0]) for path in (first(tmp_path), second(tmp_path))
    ]
    hidden = tower(*tower.batch([TEXT]))
    framed = [half.batch([TEXT]) for half in (tower.first, tower.second)]
    expected = [half(*pair).states for half, pair in zip(alone, framed, strict=True)]
    assert torch.equal(hidden.states, torch.cat(expected, dim=-1))
    cond = load_bridge(bridge_path).bridge(hidden)
    assert cond.context.shape == (1, 14, 24) and cond.pooled is not None and cond.pooled.shape == (1, 12)


def test_the_tokenizers_of_both_halves_may_be_named_alone(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(VOCAB_TXT)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(sentencepiece())
    files = [
        save(tmp_path / "open_clip.bin", open_clip()),
        save(tmp_path / "clip_cn_vit-h-14.pt", chinese_clip("pt"), epoch=1),
        tmp_path / "vocab.txt",
        tmp_path / "sentencepiece.bpe.model",
    ]
    (path,) = converted(files, tmp_path / "one", preset="pea-dual")
    folders = [first(tmp_path), second(tmp_path)]
    (other,) = converted(folders, tmp_path / "other", preset="both")
    one, two = load_encoder(path), load_encoder(other)
    assert one.tokenizer_json == two.tokenizer_json and same(dict(one.state_dict()), dict(two.state_dict()))


def test_a_named_tokenizer_json_goes_to_the_half_that_it_fits(tmp_path: Path) -> None:
    """Both families read a tokenizer.json, and either would rather have it than a vocabulary of its own."""
    from language_bridge.encoders.xlmr import xlmr_tokenizer

    (tmp_path / "tokenizer.json").write_bytes(xlmr_tokenizer(sentencepiece()))
    (tmp_path / "vocab.txt").write_bytes(VOCAB_TXT)
    weights = save(tmp_path / "open_clip.bin", open_clip())
    for chinese in (
        [second(tmp_path)],
        [save(tmp_path / "clip_cn.pt", chinese_clip("pt")), tmp_path / "vocab.txt"],
    ):
        files = [weights, tmp_path / "tokenizer.json", *chinese]
        (path,) = converted(files, tmp_path / "out", preset="both", overwrite=True)
        tower = load_encoder(path)
        assert isinstance(tower, Dual)
        assert [piece.id for piece in tower.second.tokenize(TEXT)] == [WORDS.index(sign) for sign in TEXT]
        assert len(tower.first.tokenize(TEXT)) >= len(TEXT)


def test_an_adapter_of_the_dual_width_alone_is_a_question(tmp_path: Path) -> None:
    """mT5-XL is as wide as both towers together, so shapes cannot tell."""
    source = adapter(tmp_path)
    assert refused([source], tmp_path / "out", PAIRS).found == "pea-mt5, pea-dual"
    (path,) = converted([source], tmp_path / "out", preset="pea-dual")
    header = read_header(path)
    assert header is not None and header.encoder.identity == "both" and header.encoder.window == 14


MISSING = "One half of the text tower both is missing"
TWICE = "One half of the text tower both is there twice"


@pytest.mark.parametrize("preset", [None, "pea-dual"])
@pytest.mark.parametrize(("half", "name"), [(first, "xlm-roberta"), (second, "chinese-clip")])
def test_a_half_that_is_missing_is_said(
    tmp_path: Path, preset: str | None, half: Callable[[Path], Path], name: str
) -> None:
    files = [adapter(tmp_path), half(tmp_path)]
    error = refused(files, tmp_path / "out", PAIRS, match=MISSING, preset=preset)
    assert name in error.found and "one xlm-roberta" in error.expected and "chinese-clip" in error.expected
    refused([half(tmp_path)], tmp_path / "out", PAIRS, match=MISSING, preset="pea-dual")


@pytest.mark.parametrize("preset", [None, "pea-dual"])
@pytest.mark.parametrize("half", [first, second])
def test_a_half_that_is_there_twice_is_said(
    tmp_path: Path, preset: str | None, half: Callable[[Path], Path]
) -> None:
    halves = [half(tmp_path / "one"), half(tmp_path / "two")]
    refused([adapter(tmp_path), *halves], tmp_path / "out", PAIRS, match=TWICE, preset=preset)
    refused(halves, tmp_path / "out", PAIRS, match=TWICE, preset=preset)
    third = [first(tmp_path), second(tmp_path), halves[0]]
    refused([adapter(tmp_path), *third], tmp_path / "out", PAIRS, match="several text towers", preset=preset)


def test_a_tower_of_another_width_is_no_half(tmp_path: Path) -> None:
    narrow = under("text_model.", random(bert(width=32))) | {"text_projection.weight": torch.ones(20, 32)}
    other = model_folder(tmp_path / "base", narrow, files={"vocab.txt": VOCAB_TXT})
    files = [adapter(tmp_path), first(tmp_path), other]
    error = refused(files, tmp_path / "out", PAIRS, match="The two text towers are not those of both")
    assert "base is" in error.found and '"width": 32' in error.found
    refused([first(tmp_path), other], tmp_path / "out", PAIRS, match="several text towers")


def test_an_adapter_of_another_width_does_not_read_both(tmp_path: Path) -> None:
    towers = [first(tmp_path), second(tmp_path)]
    source = adapter(tmp_path, hidden=WIDTH)
    refused([source, *towers], tmp_path / "out", PAIRS, match="several text towers")
    error = refused([source, *towers], tmp_path / "out", PAIRS, preset="pea-dual", match="not what the table")
    assert f'"hidden": {WIDTH}' in error.found


def test_a_half_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    weights = save(tmp_path / "open_clip.bin", open_clip())
    error = refused([weights, second(tmp_path)], tmp_path / "out", PAIRS, preset="pea-dual")
    assert "sentencepiece.bpe.model" in error.expected
    (tmp_path / "vocab.txt").write_bytes(VOCAB_TXT)
    files = [weights, tmp_path / "vocab.txt", second(tmp_path)]
    assert "sentencepiece.bpe.model" in refused(files, tmp_path / "out", PAIRS, preset="both").expected


def test_two_different_tokenizer_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "tokenizer_config.json").write_text(f'{{"n": {number}}}', encoding="utf-8")
    again = [tmp_path / str(number) / "tokenizer_config.json" for number in (1, 2)]
    sources = [first(tmp_path), second(tmp_path)]
    assert "two different files" in refused([*sources, *again], tmp_path / "out", PAIRS, preset="both").found
    (tmp_path / "3").mkdir()
    same_again = tmp_path / "3" / "tokenizer_config.json"
    same_again.write_bytes(again[0].read_bytes())
    converted([*sources, again[0], same_again], tmp_path / "out", preset="both")


# -- AltCLIP ------------------------------------------------------------------------------------------

HEAD = 40
ALTCLIP = TowerRow(
    name="altclip",
    family="xlmr",
    match={"width": HEAD, "inside": WIDTH},
    starts=("text_model.roberta.",),
    change={"norm": False},
    window=16,
    mask_rule="pad",
)
NORMED = dataclasses.replace(ALTCLIP, name="altclip-normed", match={**ALTCLIP.match, "norm": True}, change={})
READS = dataclasses.replace(PEA, name="pea-altclip", match={"hidden": HEAD}, tower="altclip")
ALTCLIPS = table(
    [ALTCLIP, NORMED], [READS, dataclasses.replace(READS, name="pea-altclip-normed", tower="altclip-normed")]
)


def altclip(folder: Path, **around: Tensor) -> Path:
    """BAAI/AltCLIP's layout: text tower and its head, pooler, projections, a bit of the vision tower."""
    head: dict[str, tuple[int, ...]] = {
        "transformation.weight": (HEAD, WIDTH),
        "transformation.bias": (HEAD,),
    }
    head |= {"pre_LN.weight": (WIDTH,), "pre_LN.bias": (WIDTH,)}
    text = under("roberta.", random(xlmr(pooler=True), 5)) | random(head, 6)
    text |= {"roberta.embeddings.position_ids": torch.arange(42)[None]}
    whole = under("text_model.", text) | {"text_projection.weight": torch.ones(8, HEAD)}
    whole |= {"visual_projection.weight": torch.ones(8, 3), "logit_scale": torch.ones(())}
    whole |= {"vision_model.pre_layrnorm.weight": torch.ones(3)}
    return model_folder(folder, whole | around, files={"sentencepiece.bpe.model": sentencepiece()})


@pytest.mark.parametrize("norm", [False, True])
def test_altclip_is_a_tower_with_its_head_in_it(tmp_path: Path, norm: bool) -> None:
    name = "pea-altclip-normed" if norm else "pea-altclip"
    files = [adapter(tmp_path, HEAD), altclip(tmp_path / "AltCLIP")]
    error = refused(files, tmp_path / "out", ALTCLIPS, match="Several published models")
    assert error.found == "pea-altclip, pea-altclip-normed"
    tower_path, bridge_path = converted(files, tmp_path / "out", ALTCLIPS, preset=name)
    tower, bridge = load_encoder(tower_path), load_bridge(bridge_path)
    assert bridge.header.kind == "mlp" and tower.width == HEAD
    head = random({"w": (HEAD, WIDTH), "b": (HEAD,), "pre_LN.weight": (WIDTH,), "pre_LN.bias": (WIDTH,)}, 6)
    expected = random(xlmr(), 5) | {"transformation.weight": head["w"], "transformation.bias": head["b"]}
    if norm:
        expected |= {name: head[name] for name in ("pre_LN.weight", "pre_LN.bias")}
    assert same(dict(tower.state_dict()), expected)
    cond = bridge.bridge(tower(*tower.batch([TEXT])))
    assert cond.context.shape == (1, 16, 24)


def test_altclip_alone_asks_which_of_its_states_are_meant(tmp_path: Path) -> None:
    folder = altclip(tmp_path / "AltCLIP")
    assert refused([folder], tmp_path / "out", ALTCLIPS).found == "altclip, altclip-normed"
    (path,) = converted([folder], tmp_path / "out", ALTCLIPS, preset="altclip")
    assert path.name == "altclip-tower.safetensors"
    strange = altclip(tmp_path / "changed", **{"text_model.pre_LN.extra": torch.ones(3)})
    refused([strange], tmp_path / "other", ALTCLIPS, preset="altclip", match="belong to nothing known")


# -- MiaoBi -------------------------------------------------------------------------------------------

MIAOBI_TOWER = TowerRow(
    name="miaobi",
    family="clip",
    match={"vocab": 49408, "width": 24, "layers": 1},
    starts=("text_model.",),
    tokenizer="vocab.txt",
    change={"start": 49406, "end": 49407},
    window=12,
    mask_rule="none",
)
OWN = MethodRow(
    name="miaobi",
    base="sd1",
    kind="identity",
    match={"hidden": 24, "context": 24},
    tower="miaobi",
    unet="own",
)
MIAOBI = table([MIAOBI_TOWER], [OWN, dataclasses.replace(OWN, name="miaobi-any-unet", unet="none")])
SETTINGS = b'{"pad_token": "[PAD]", "do_lower_case": true, "model_max_length": 77}'


def miaobi(folder: Path, files: dict[str, bytes]) -> Path:
    """The diffusers folder: CLIP's text model with BERT's vocabulary and the program of its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **sizes))
    state = {
        key if key.startswith("text_model.") else f"text_model.{key}": value.half()
        for key, value in model.state_dict().items()
    }
    model_folder(folder / "text_encoder", state, name="model.safetensors", config={**sizes})
    (folder / "tokenizer").mkdir()
    for name, data in files.items():
        (folder / "tokenizer" / name).write_bytes(data)
    return folder


def test_miaobi_asks_for_which_unet_and_frames_as_published(tmp_path: Path) -> None:
    published = {"vocab.txt": VOCAB_TXT, "tokenizer_config.json": SETTINGS}
    root = miaobi(tmp_path / "miaobi_beta0.9", {**published, "clip_tokenizer_roberta.py": b"raise Error\n"})
    assert refused([root], tmp_path / "out", MIAOBI).found == "miaobi, miaobi-any-unet"
    tower_path, own = converted([root], tmp_path / "out", MIAOBI, preset="miaobi")
    header = read_header(own)
    assert header is not None and header.training["unet"] == "own"
    _, free = converted([root], tmp_path / "out", MIAOBI, preset="miaobi-any-unet")
    header = read_header(free)
    assert header is not None and "unet" not in header.training
    tower = load_encoder(tower_path)
    ids, _ = tower.batch([TEXT])
    assert ids[0].tolist() == [49406, *(WORDS.index(sign) for sign in TEXT), 49407, 0, 0, 0, 0]
    assert (tower.mask_rule, tower.window) == ("none", 12)


def test_a_stock_clip_is_not_taken_for_miaobi(tmp_path: Path) -> None:
    from language_bridge.tests.encoders.toys import clip_files

    stock = miaobi(tmp_path / "sd15", clip_files())
    for preset in (None, "miaobi"):
        refused([stock], tmp_path / "out", MIAOBI, preset=preset)
    (tmp_path / "vocab.txt").write_bytes(VOCAB_TXT)
    refused([stock, tmp_path / "vocab.txt"], tmp_path / "out", MIAOBI, preset="miaobi")
