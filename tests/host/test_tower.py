"""The native tower is loaded together with the CLIP that it stands beside, and is one model for the host."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as management
import comfy.ops
import pytest
import torch

from language_bridge.bridges.base import Cond
from language_bridge.bridges.file import load_bridge
from language_bridge.encoders.file import load_encoder, save_encoder
from language_bridge.tests.encoders.toys import TOYS
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import encode
from language_bridge.tests.fixtures.towers import tiny_bridge, tiny_tower, write_bridge

RED_CAT = "\u7ea2\u8272\u7684\u732b"


def loaded_models() -> list[object]:
    return [entry.model.model for entry in management.current_loaded_models if entry.model is not None]


def test_the_tower_is_loaded_with_the_clip(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    management.unload_all_models()
    clip.load_model()
    assert clip.speech.tower.reader in loaded_models() and clip.cond_stage_model in loaded_models()


def test_the_tower_is_loaded_with_a_clone(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    management.unload_all_models()
    clip.clone().load_model()
    assert clip.speech.tower.reader in loaded_models()


def test_native_text_alone_does_not_load_the_english_tower(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    management.unload_all_models()
    encode(clip, RED_CAT)
    assert clip.speech.tower.reader in loaded_models()
    assert clip.cond_stage_model not in loaded_models()


def test_the_stock_clip_does_not_load_the_tower(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    management.unload_all_models()
    encode(sd1.clip, "a red cat")
    assert clip.speech.tower.reader not in loaded_models()
    assert clip.speech.tower.patcher not in sd1.clip.patcher.model_patches_models()


def test_the_host_counts_the_tower(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    tower = clip.speech.tower
    size = sum(weight.numel() * weight.element_size() for weight in tower.reader.parameters())
    assert tower.patcher.model_size() >= size > 0
    assert not any(weight.requires_grad for weight in tower.reader.parameters())
    assert not tower.reader.training


def test_read_gives_fp32_on_the_intermediate_device(sdxl: Checkpoint) -> None:
    _, clip = bridged(sdxl)
    tower = clip.speech.tower
    ids, mask = tower.encoder.batch([RED_CAT, ""])
    tower.load()
    cond = tower.read(ids, mask)
    assert isinstance(cond, Cond) and cond.pooled is not None
    assert cond.context.shape == (2, 77, 2048) and cond.pooled.shape == (2, 1280)
    for value in (cond.context, cond.pooled):
        assert value.dtype is torch.float32 and value.device == management.intermediate_device()


def test_a_clip_that_is_dropped_leaves_no_tower_behind(sd1: Checkpoint) -> None:
    import gc
    import weakref

    _, clip = bridged(sd1)
    encode(clip, RED_CAT)
    reader = weakref.ref(clip.speech.tower.reader)
    del clip
    gc.collect()
    management.cleanup_models_gc()
    management.cleanup_models()
    gc.collect()
    assert reader() is None


@pytest.mark.parametrize("family", sorted(TOYS))
def test_a_tower_in_eight_bits_stores_its_matrices_so_and_computes_in_sixteen(
    family: str, tmp_path: Path
) -> None:
    tower = TOYS[family]().eval()
    save_encoder(tmp_path / "tower", tower)
    dtype = torch.float8_e4m3fn
    small = load_encoder(tmp_path / "tower", ops=comfy.ops.manual_cast, dtype=dtype)
    stored = {parameter.dtype for parameter in small.parameters()}
    assert dtype in stored and stored <= {dtype, torch.float16}
    ids, mask = tower.batch(["a b", ""])
    with torch.no_grad():
        full, said = tower(ids, mask).states, small(ids, mask).states
    assert said.dtype in (torch.float16, torch.float32) and bool(torch.isfinite(said).all())
    likeness = torch.nn.functional.cosine_similarity(said.float().flatten(), full.flatten(), dim=0)
    assert float(likeness) > 0.97
    assert not torch.equal(said.float(), full)


def test_a_bridge_behind_a_tower_in_eight_bits_stays_in_sixteen(tmp_path: Path) -> None:
    tower = tiny_tower()
    bridge = tiny_bridge("mlp", "sd1", tower)
    path = write_bridge(tmp_path / "own.safetensors", "sd1", bridge, tower, inside=True)
    loaded = load_bridge(path, ops=comfy.ops.manual_cast, dtype=torch.float8_e4m3fn)
    assert {parameter.dtype for parameter in loaded.bridge.parameters()} == {torch.float16}
    assert loaded.encoder is not None
    with torch.no_grad():
        rows = loaded.bridge(loaded.encoder(*tower.batch(["a"]))).context
    assert rows.dtype == torch.float16 and bool(torch.isfinite(rows).all())
