"""The pocket checkpoint is an ordinary one to the host: loads, paints, takes LoRAs and embeddings, saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_base
import comfy.sd
import comfy.taesd.taesd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_merging import CheckpointSave
from safetensors.torch import load_file

import nodes
from language_bridge.bridges.errors import BridgeError
from language_bridge.host import branch_text, folders, pocket
from language_bridge.host.base import Base, base_of
from language_bridge.nodes.pocket_checkpoint import PocketCheckpoint
from language_bridge.pocket.autoencoder import STOCK_SCALE, Autoencoder, taesd_state
from language_bridge.tests.fixtures.checkpoints import write_pocket
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, digest, encode, same, sample

RED_CAT = "\u7ea2\u8272\u7684\u732b"


@pytest.fixture(scope="session", params=["random", "shipped"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pocket checkpoint of random weights, and the one that ships."""
    if request.param == "shipped":
        return pocket.FILE
    return write_pocket(tmp_path_factory.mktemp("pocket") / "pocket.safetensors")


@pytest.fixture(scope="session")
def world(file: Path, models: Path) -> Checkpoint:
    """MODEL, CLIP and VAE of the file."""
    with torch.inference_mode():
        return Checkpoint("pocket", *pocket.load_pocket(file))


def test_it_loads_in_the_hosts_own_classes(world: Checkpoint) -> None:
    assert type(world.model.model) is comfy.model_base.BaseModel
    assert type(world.model.model.diffusion_model) is comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel
    assert type(world.clip) is comfy.sd.CLIP and type(world.vae) is comfy.sd.VAE
    assert type(world.vae.first_stage_model) is comfy.taesd.taesd.TAESD
    assert base_of(world.model, world.clip) == Base("pocket", 96, 0, ("l",))


def test_every_weight_of_the_file_is_in_the_models(world: Checkpoint, file: Path) -> None:
    stored = load_file(str(file))
    unet = {
        key.removeprefix("model.diffusion_model."): value
        for key, value in stored.items()
        if "diffusion_model" in key
    }
    loaded = world.model.model.diffusion_model.state_dict()
    assert unet.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], value.float()) for key, value in unet.items())
    words = {key.split("text_model.")[1]: value for key, value in stored.items() if "text_model." in key}
    tower = world.clip.cond_stage_model.clip_l.transformer.text_model.state_dict()
    assert words.keys() == tower.keys()
    assert all(torch.equal(tower[key].float(), value.float()) for key, value in words.items())
    picture = {
        key.removeprefix("first_stage_model."): value for key, value in stored.items() if "first_stage" in key
    }
    assert picture.keys() == world.vae.first_stage_model.state_dict().keys()


def test_it_encodes_rows_of_width_96(world: Checkpoint) -> None:
    rows = encode(world.clip, "a big red circle")[0][0]
    assert rows.shape == (1, 77, 96) and torch.isfinite(rows).all()
    assert encode(world.clip, "a (big:1.4) red circle " * 20)[0][0].shape == (1, 154, 96)


def test_it_paints_a_picture_of_64_by_64(world: Checkpoint) -> None:
    latents = sample(world.model, encode(world.clip, "a big red circle"), encode(world.clip, ""))
    picture = call(nodes.VAEDecode, samples={"samples": latents}, vae=world.vae)
    assert picture.shape == (1, 64, 64, 3) and torch.isfinite(picture).all()
    assert 0 <= picture.min() <= picture.max() <= 1
    again = call(nodes.VAEEncode, pixels=picture, vae=world.vae)["samples"]
    assert again.shape == (1, 4, 8, 8) and torch.isfinite(again).all()


def test_words_move_the_picture(world: Checkpoint) -> None:
    one, other = (
        sample(world.model, encode(world.clip, text), encode(world.clip, ""))
        for text in ("a circle", "a star")
    )
    assert not torch.equal(one, other)


def test_a_lora_maps_to_unet_and_text(world: Checkpoint) -> None:
    model, clip = call(
        nodes.LoraLoader,
        model=world.model,
        clip=world.clip,
        lora_name="pocket.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    assert len(model.patches) == 1 and len(clip.patcher.patches) == 1
    assert not same(encode(clip, "a circle"), encode(world.clip, "a circle"))


def test_embeddings_and_clip_skip(world: Checkpoint) -> None:
    tokens = world.clip.tokenize("embedding:pocket-word")["l"][0]
    assert [isinstance(token, torch.Tensor) for token, _ in tokens[:4]] == [False, True, True, False]
    skipped = call(nodes.CLIPSetLastLayer, clip=world.clip, stop_at_clip_layer=-2)
    assert not same(encode(skipped, "a circle"), encode(world.clip, "a circle"))


def test_checkpoint_save(
    world: Checkpoint, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("folder_paths.output_directory", str(tmp_path))
    call(CheckpointSave, model=world.model, clip=world.clip, vae=world.vae, filename_prefix="pocket")
    stored, source = load_file(str(next(tmp_path.glob("*.safetensors")))), load_file(str(file))
    for key, value in source.items():
        assert torch.equal(stored[key].float(), value.float()), key


def test_the_host_can_build_it_again_from_its_file(world: Checkpoint) -> None:
    for patcher in (world.model, world.clip.patcher):
        factory, arguments = patcher.cached_patcher_init[:2]
        with torch.inference_mode():
            again = factory(*arguments, disable_dynamic=True)
        weights, rebuilt = patcher.model.state_dict(), again.model.state_dict()
        kept = [key for key in weights if "text_projection" not in key]  # the host's own, in no file
        assert again is not patcher and weights.keys() == rebuilt.keys()
        assert digest({key: weights[key] for key in kept}) == digest({key: rebuilt[key] for key in kept})


@pytest.mark.parametrize("kind", ["identity", "linear", "mlp"])
def test_it_is_bridged_like_any_checkpoint(world: Checkpoint, kind: str) -> None:
    model, clip = bridged(world, kind)
    assert same(encode(clip, "a big red circle"), encode(world.clip, "a big red circle"))
    assert encode(clip, RED_CAT)[0][0].shape == (1, 77, 96)
    assert torch.isfinite(sample(model, encode(clip, f"{RED_CAT}, a circle"), encode(clip, ""))).all()


def test_the_node_loads_the_shipped_file() -> None:
    model, clip, vae = call(PocketCheckpoint)
    with torch.inference_mode():
        shipped, words, _ = pocket.load_pocket(pocket.FILE)
    assert digest(model.model.state_dict()) == digest(shipped.model.state_dict())
    assert same(encode(clip, "a circle"), encode(words, "a circle"))
    assert type(vae) is comfy.sd.VAE


def test_every_shipped_bridge_works_behind_the_shipped_file(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ([str(pocket.FILE.parent / "bridges")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.FOLDER, place)
    world = Checkpoint("pocket", *call(PocketCheckpoint))
    names = folders.bridge_names()
    assert names
    for name in names:
        _, clip = bridged(world, bridge=name)
        native, empty = encode(clip, RED_CAT), encode(clip, "")
        rows, nothing = native[0][0], empty[0][0]
        assert rows.shape == nothing.shape == (1, 77, 96)
        if branch_text.MARK in native[0][1]:  # a branch reads rows of its own, beside those of the checkpoint
            assert torch.equal(rows, nothing)
            ((said, silent),) = zip(
                native[0][1][branch_text.MARK].values(), empty[0][1][branch_text.MARK].values(), strict=True
            )
            rows, nothing = said["rows"], silent["rows"]
        assert torch.isfinite(rows).all() and not torch.equal(rows, nothing)


# -- damage --------------------------------------------------------------------------------------------------
def refusal(path: Path) -> str:
    with pytest.raises(BridgeError) as caught:
        pocket.load_pocket(path)
    text = str(caught.value)
    assert [line.split(":")[0] for line in text.split("\n")[1:]] == ["  found", "  expected", "  what to do"]
    return text


def test_a_missing_file(tmp_path: Path) -> None:
    assert "not there" in refusal(tmp_path / "pocket-base.safetensors")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0" * 1000])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pocket-base.safetensors"
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def damaged(source: Path, target: Path, change: Any) -> Path:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(source), framework="pt") as file:
        facts = dict(file.metadata())
    tensors = load_file(str(source))
    change(tensors, facts)
    save_file(tensors, str(target), metadata=facts)
    return target


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pocket(tmp_path_factory.mktemp("whole") / "pocket.safetensors")


def test_another_checkpoint(whole: Path, tmp_path: Path) -> None:
    path = damaged(
        whole, tmp_path / "other.safetensors", lambda tensors, facts: facts.pop("language_bridge_pocket")
    )
    assert "is not a pocket checkpoint" in refusal(path)


def test_a_torn_file(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn.safetensors"
    path.write_bytes(whole.read_bytes()[:-1000])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.out.2.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "first_stage_model.taesd_decoder.1.weight",
    ],
)
@pytest.mark.parametrize("how", ["missing", "of another shape", "not finite"])
def test_a_file_with_a_bad_tensor(whole: Path, tmp_path: Path, key: str, how: str) -> None:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        if how == "missing":
            del tensors[key]
        elif how == "not finite":
            tensors[key].view(-1)[0] = float("inf")
        else:
            tensors[key] = torch.zeros(3, dtype=torch.half)

    assert key in refusal(damaged(whole, tmp_path / "bad.safetensors", change))


# -- the autoencoder -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("deviation", [1.0, 0.37])
def test_the_thin_autoencoder_widens_exactly_into_the_hosts_taesd(width: int, deviation: float) -> None:
    torch.manual_seed(width)
    thin, wide = Autoencoder(width), comfy.taesd.taesd.TAESD()
    wide.load_state_dict(taesd_state(thin, deviation))
    pictures, latents = torch.rand(2, 3, 64, 64), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        seen = wide.encode(pictures * 2 - 1) * STOCK_SCALE  # what an SD1.x U-Net sees
        assert (seen * deviation - thin.encode(pictures)).abs().max() <= 1e-5
        painted = wide.decode(latents / deviation / STOCK_SCALE) / 2 + 0.5
        assert (painted - thin.decode(latents)).abs().max() <= 1e-5
        assert thin.decode(latents).std() > 1e-3
