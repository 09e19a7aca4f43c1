"""A converted AltDiffusion before the checkpoint that it came from paints what its own checkpoint paints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from torch import load as open_pickle

import nodes
from language_bridge.conversion.convert import convert
from language_bridge.conversion.presets import Presets, read_presets
from language_bridge.host.checkpoint import open_checkpoint
from language_bridge.nodes.language_bridge import LanguageBridge
from language_bridge.tests.encoders.toys import tokenizer_files
from language_bridge.tests.fixtures.checkpoints import FAMILIES, write_checkpoint
from language_bridge.tests.fixtures.stock import call, encode, same, sample

from .test_checkpoint import LAYERS, TEXT, WIDTH, head, xlmr

CAT = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"
STRANGERS = ("out of the way of embedding:sd1-word", "blurry")


@dataclass(frozen=True)
class World:
    """A stock SD1.x checkpoint, AltDiffusion made from it, and the table that knows their sizes."""

    stock: Any
    stock_file: Path
    alt_file: Path
    part: str
    table: Presets


@pytest.fixture(scope="module", params=["kv", "attn2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Path) -> World:
    folder = tmp_path_factory.mktemp("alt")
    windows = write_checkpoint(folder / "windows.ckpt", FAMILIES["sd1"], cut=True)
    state = open_pickle(windows, weights_only=True)["state_dict"]
    # The converter takes no tensors that claim more than is stored of them.
    state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    stock_file = folder / "sd14.safetensors"
    save_file(state, str(stock_file))
    moved = ("to_k", "to_v") if request.param == "kv" else ("to_k", "to_v", "to_q", "to_out")
    generator = torch.Generator().manual_seed(9)
    for key, value in state.items():
        if ".attn2." in key and any(f".{name}." in key for name in moved):
            state[key] = value + torch.randn(value.shape, generator=generator) * 0.03
    state = {key: value for key, value in state.items() if not key.startswith(TEXT)}
    state |= {f"{TEXT}roberta.{key}": value for key, value in xlmr().state_dict().items()}
    alt_file = folder / "alt.safetensors"
    save_file(state | head("transformation", 768), str(alt_file))
    words = alt_file.with_suffix("")
    words.mkdir()
    for name, content in tokenizer_files("xlmr").items():
        (words / name).write_bytes(content)
    table = json.loads(
        resources("language_bridge.conversion").joinpath("presets.json").read_text(encoding="utf-8")
    )
    for row in table["towers"]:
        if row["name"] == "altdiffusion-m9":
            row["match"] = {"vocab": 90, "width": WIDTH, "layers": LAYERS}
            row.pop("sha256", None)
    for row in table["methods"]:
        if row["name"] == "altdiffusion-m9":
            row["match"] = row["match"] | {"hidden": WIDTH}
            row.pop("sha256", None)
    (folder / "presets.json").write_text(json.dumps(table), encoding="utf-8")
    with torch.inference_mode():
        opened = comfy.sd.load_checkpoint_guess_config(
            str(stock_file),
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            te_model_options=FAMILIES["sd1"].cut,
            output_vae=False,
        )
    return World(opened, stock_file, alt_file, request.param, read_presets(folder / "presets.json"))


@pytest.fixture(params=["replace", "delta"])
def bridge(
    request: pytest.FixtureRequest, world: World, models: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The converted bridge, in the host's folder."""
    # The small U-Net has five blocks with cross-attention, SD1.x has sixteen.
    monkeypatch.setattr("language_bridge.conversion.unet.COUNTS", {"kv": 10, "attn2": 25})
    written = convert(
        [world.alt_file, world.alt_file.with_suffix("") / "sentencepiece.bpe.model"],
        models / "language_bridges",
        towers=models / "text_encoders",
        preset="altdiffusion-m9",
        reference=world.stock_file,
        unet=world.part,
        form=request.param,
        presets=world.table,
    )
    (name,) = [path.name for path in written if path.parent.name == "language_bridges"]
    yield name
    for path in written:
        path.unlink()


def test_it_paints_what_its_own_checkpoint_paints(world: World, bridge: str) -> None:
    with torch.inference_mode():
        own_model, own_clip, _ = open_checkpoint(world.alt_file)
    inputs = {"model": world.stock[0], "clip": world.stock[1], "bridge": bridge, "strength": 1.0}
    model, clip = call(LanguageBridge, **inputs, route="native only")
    for text in (CAT, "a red cat", ""):
        assert torch.equal(encode(clip, text)[0][0], encode(own_clip, text)[0][0])
    expected = sample(own_model, encode(own_clip, CAT), encode(own_clip, ""), steps=3)
    got = sample(model, encode(clip, CAT), encode(clip, ""), steps=3)
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    unaware = sample(world.stock[0], encode(own_clip, CAT), encode(own_clip, ""), steps=3)
    assert (unaware - expected).abs().max() > 1e-3


@pytest.mark.parametrize("lora", [None, "sd1.safetensors"])
def test_english_stays_the_stock_checkpoints(world: World, bridge: str, lora: str | None) -> None:
    """Words and pictures, with a Textual Inversion, and with a LoRA over text and cross-attention."""
    inputs = {"model": world.stock[0], "clip": world.stock[1], "bridge": bridge, "strength": 1.0}
    bridged = call(LanguageBridge, **inputs, route="two streams")
    pairs = [bridged, world.stock[:2]]
    if lora is not None:
        weights = {"lora_name": lora, "strength_model": 1.0, "strength_clip": 1.0}
        pairs = [call(nodes.LoraLoader, model=model, clip=clip, **weights) for model, clip in pairs]
        assert not same(*(encode(clip, "blurry") for clip in (pairs[1][1], world.stock[1])))
    (model, clip), (stock_model, stock_clip) = pairs
    conds = [encode(clip, text) for text in STRANGERS]
    stock = [encode(stock_clip, text) for text in STRANGERS]
    assert same(conds, stock)
    assert not same(stock[0], encode(stock_clip, "out of the way of"))
    assert torch.equal(sample(model, *conds), sample(stock_model, *stock))
