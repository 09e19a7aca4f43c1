"""BDM's files become a tower and a bridge file with a branch, number for number."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from language_bridge.bridges.branch import Branch
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import load_bridge
from language_bridge.conversion.convert import convert, report
from language_bridge.conversion.presets import MethodRow, TowerRow
from language_bridge.encoders.file import load_encoder, read_encoder_header
from language_bridge.tests.conversion.layouts import (
    VOCAB_TXT,
    WIDTH,
    WORDS,
    bert,
    model_folder,
    random,
    save,
    table,
    under,
)
from language_bridge.tests.fixtures.branches import Sizes, random_branch

SIZES = Sizes((32, 64), ((1,), (0,)), WIDTH, heads=4)
PROJECTION = 20
TOWER = TowerRow(
    name="huge",
    family="bert",
    match={"vocab": len(WORDS), "width": WIDTH, "layers": 2, "projection": PROJECTION},
    starts=("text_model.", "module.bert."),
    window=12,
    mask_rule="none",
    languages=("zh",),
)
BDM = MethodRow(
    name="bdm",
    base="sd1",
    kind="branch",
    match={"hidden": WIDTH, "context": WIDTH, "pooled": 0},
    tower="huge",
    languages=("zh",),
    source="somewhere",
)
TABLE = table([TOWER], [BDM])
XL = dataclasses.replace(
    BDM,
    name="bdm-xl",
    base="sdxl",
    match={"hidden": WIDTH, "context": 48, "pooled": 64, "tower_pooled": PROJECTION},
)


def chinese_clip(folder: Path, make: str) -> Path:
    """The tower as Hugging Face and as cn_clip store it, with something of the picture side."""
    weights = random(bert(), seed=3)
    if make == "transformers":
        around = {"text_projection.weight": torch.randn(PROJECTION, WIDTH), "logit_scale": torch.ones(())}
        return model_folder(
            folder,
            under("text_model.", weights) | around,
            config={"text_config": {}},
            files={"vocab.txt": VOCAB_TXT},
        )
    around = {
        "text_projection": torch.randn(WIDTH, PROJECTION),
        "visual.conv1.weight": torch.randn(2, 3, 4, 4),
    }
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_bytes(VOCAB_TXT)
    save(folder / "clip_cn.pt", under("module.", under("bert.", weights) | around), epoch=1)
    return folder


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
@pytest.mark.parametrize("make", ["transformers", "cn_clip"])
def test_the_branch_comes_out_number_for_number(tmp_path: Path, ending: str, make: str) -> None:
    net = random_branch(SIZES)
    branch = model_folder(
        tmp_path / "branch", net.state_dict(), name=f"diffusion_pytorch_model{ending}", config={"x": 1}
    )
    written = convert([branch, chinese_clip(tmp_path / "tower", make)], tmp_path / "out", presets=TABLE)
    tower_file, file = sorted(written, key=lambda path: path.name == "bdm.safetensors")
    loaded = load_bridge(file)
    assert (loaded.header.kind, loaded.header.unet, loaded.header.base) == ("branch", "branch", "sd1")
    assert loaded.header.spec == {"hidden": WIDTH, "context": WIDTH, "pooled": 0, "tower_pooled": 0}
    expected = Branch.unet_part(net.state_dict())
    assert loaded.unet.keys() == expected.keys()
    assert all(torch.equal(loaded.unet[key], value) for key, value in expected.items())
    tower = read_encoder_header(tower_file)
    assert tower is not None and (tower.mask_rule, tower.window, tower.layer) == ("none", 12, -1)
    assert loaded.header.encoder.digest == tower.digest
    text = load_encoder(tower_file).state_dict()["embeddings.word_embeddings.weight"]
    assert torch.equal(text, random(bert(), seed=3)["embeddings.word_embeddings.weight"])
    assert any("beside the U-Net" in line for line in report(written))
    assert "unet" not in loaded.header.training


def test_the_sdxl_option_brings_its_matrices(tmp_path: Path) -> None:
    sizes = dataclasses.replace(SIZES, context=48, head_width=16, flat=True, added=64 + 6 * 256)
    net = random_branch(sizes, token=WIDTH, pooled=(PROJECTION, 64))
    file = save(tmp_path / "xl.safetensors", net.state_dict())
    (path,) = convert([file], tmp_path / "out", presets=table([TOWER], [XL]))
    loaded = load_bridge(path)
    state = net.state_dict()
    own = loaded.bridge.state_dict()
    assert own.keys() == {"prompt_embeds_projection.weight", "pooled_prompt_embeds_projection.weight"}
    assert all(torch.equal(own[key], state[key]) for key in own)
    assert len(loaded.unet) == len(state) - 2
    assert torch.equal(loaded.unet["label_emb.0.0.weight"], state["add_embedding.linear_1.weight"])


def test_what_is_no_whole_branch_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    state = random_branch(SIZES).state_dict()
    for name, weights, words in (
        ("short", {key: state[key] for key in list(state)[1:]}, "not whole"),
        ("more", {**state, "conv_out.weight": torch.ones(1)}, "not whole"),
        ("picture", {**state, "controlnet_cond_embedding.conv_in.weight": torch.ones(1)}, "for pictures"),
    ):
        file = save(tmp_path / f"{name}.safetensors", weights)
        with pytest.raises(BridgeError, match=words):
            convert([file], tmp_path / "out", presets=TABLE)
    file = save(tmp_path / "whole.safetensors", state)
    with pytest.raises(BridgeError, match="network of its own"):
        convert([file], tmp_path / "out", presets=TABLE, unet="kv")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
