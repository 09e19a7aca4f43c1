"""A bridge that was trained without ComfyUI works in its node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from language_bridge.bridges.file import load_bridge
from language_bridge.encoders.file import load_encoder
from language_bridge.host import branch
from language_bridge.nodes.language_bridge import LanguageBridge
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, encode, sample
from language_bridge.tests.training.headless.toys import CAT, UNET, unet_of, write_model, write_shards
from language_bridge.training.headless.command import main


def test_the_node_says_what_was_trained(
    load: Callable[..., Checkpoint], models: Path, tmp_path: Path
) -> None:
    """The file, its tower found by identity, gives in the graph the rows that it has in training."""
    name = "headless.safetensors"
    tower = models / "text_encoders" / "tiny-zh.safetensors"
    write_model(tmp_path / "sd1", context=768)
    write_shards(tmp_path / "shards", (5,))
    given = ["--model", str(tmp_path / "sd1"), "--tower", str(tower), "--shards", str(tmp_path / "shards")]
    given += ["--run", str(tmp_path / "run"), "--out", str(models / "language_bridges" / name), "--cpu"]
    given += ["--shapes", "32x32", "--least-area", "0", "--batch", "2", "--steps", "2", "--size", "width=16"]
    assert main(given) == 0
    try:
        checkpoint = load("sd1")
        _, clip = call(
            LanguageBridge,
            model=checkpoint.model,
            clip=checkpoint.clip,
            bridge=name,
            strength=1.0,
            route="native only",
        )
        encoder = load_encoder(tower).eval()
        with torch.inference_mode():
            expected = load_bridge(models / "language_bridges" / name).bridge(encoder(*encoder.batch([CAT])))
        assert torch.allclose(encode(clip, CAT)[0][0], expected.context, rtol=1e-4, atol=1e-5)
    finally:
        (models / "language_bridges" / name).unlink()


def test_a_branch_opens_in_the_node(load: Callable[..., Checkpoint], models: Path, tmp_path: Path) -> None:
    """The network at the MODEL is the file's, and it is heard."""
    name = "headless-branch.safetensors"
    tower = models / "text_encoders" / "tiny-zh.safetensors"
    write_model(tmp_path / "sd1", context=768)
    wide = {"block_out_channels": (320, 320), "layers_per_block": 1, "attention_head_dim": 8}
    wide |= {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    unet_of({**UNET, **wide}, 768).save_pretrained(tmp_path / "sd1" / "unet")
    write_shards(tmp_path / "shards", (5,))
    given = ["--model", str(tmp_path / "sd1"), "--tower", str(tower), "--shards", str(tmp_path / "shards")]
    given += ["--run", str(tmp_path / "run"), "--out", str(models / "language_bridges" / name), "--cpu"]
    given += ["--shapes", "32x32", "--least-area", "0", "--batch", "2", "--steps", "2"]
    assert main([*given, "--method", "branch", "--learning-rate", "0.01", "--warmup", "0"]) == 0
    try:
        checkpoint = load("sd1")
        model, clip = bridged(checkpoint, bridge=name)
        written = load_bridge(models / "language_bridges" / name).unet
        (beside,) = branch.branches_of(model)
        held = beside.net.state_dict()
        assert held.keys() == written.keys()
        assert all(torch.equal(held[key].float().cpu(), value) for key, value in written.items())
        native, empty = encode(clip, CAT), encode(clip, "")
        alone = sample(checkpoint.model, *[encode(checkpoint.clip, "")] * 2)
        assert float((sample(model, native, empty) - alone).abs().max()) > 1e-3
    finally:
        (models / "language_bridges" / name).unlink()
