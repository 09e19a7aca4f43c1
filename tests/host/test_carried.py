"""A LoRA is found by what it holds, whatever loaded it and whatever its file is called."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy_extras.nodes_hooks import CreateHookLora, SetClipHooks
from safetensors.torch import load_file, save_file

import nodes
from language_bridge.encoders import guard
from language_bridge.host import carried
from language_bridge.tests.fixtures.checkpoints import FAMILIES, write_lora
from language_bridge.tests.fixtures.graph import Checkpoint
from language_bridge.tests.fixtures.stock import call


@pytest.fixture
def loras(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty LoRA folder; nothing of another test is remembered."""
    known = dict(folder_paths.folder_names_and_paths)
    known["loras"] = ([str(tmp_path)], set(folder_paths.supported_pt_extensions))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(carried, "_FOUND", {})
    yield tmp_path


def put_on(checkpoint: Checkpoint, name: str, strength: float = 1.0, text: float | None = None) -> Any:
    """MODEL and CLIP behind the stock loader."""
    return call(
        nodes.LoraLoader,
        model=checkpoint.model,
        clip=checkpoint.clip,
        lora_name=name,
        strength_model=strength,
        strength_clip=strength if text is None else text,
    )


def names(*patchers: Any) -> list[list[str]]:
    """The files of every LoRA that patchers carry."""
    return [[facts.name for facts in carried.files_of(load)] for load in carried.carried_by(*patchers)]


def decoys(folder: Path, count: int = 5) -> None:
    """Files of the same names, shapes and size, with other numbers."""
    for seed in range(count):
        write_lora(folder / f"decoy-{seed}.safetensors", FAMILIES["sd1"], seed=100 + seed)


def test_the_file_is_found_among_others_of_its_layout(loras: Path, sd1: Checkpoint) -> None:
    decoys(loras)
    (loras / "deep" / "er").mkdir(parents=True)
    write_lora(loras / "deep" / "er" / "mine.safetensors", FAMILIES["sd1"], seed=1)
    model, clip = put_on(sd1, os.path.join("deep", "er", "mine.safetensors"), 0.5)
    assert names(model, clip.patcher) == [["deep/er/mine.safetensors"]]
    assert names(model) == names(clip.patcher) == [["deep/er/mine.safetensors"]]
    assert [load.strength for load in carried.carried_by(model)] == [0.5]
    assert names(sd1.model, sd1.clip.patcher) == []


def test_a_stack_is_found_in_its_order_and_copies_by_every_name(loras: Path, sd1: Checkpoint) -> None:
    decoys(loras)
    shutil.copy(loras / "decoy-1.safetensors", loras / "the-same.safetensors")
    model, clip = put_on(sd1, "decoy-3.safetensors")
    second = Checkpoint("sd1", model, clip, sd1.vae)
    model, clip = put_on(second, "the-same.safetensors")
    assert names(model) == [["decoy-3.safetensors"], ["decoy-1.safetensors", "the-same.safetensors"]]


def test_a_part_for_the_unet_alone_is_found_in_what_the_loader_hands_over(
    loras: Path, sd1: Checkpoint
) -> None:
    """LoraLoader hands all keys to the CLIP, too, where none of them fits."""
    write_lora(loras / "unet.safetensors", FAMILIES["sd1"], text=False, seed=7)
    handed: list[Any] = []

    class Listening:
        cond_stage_model = sd1.clip.cond_stage_model
        patcher = sd1.clip.patcher

        def clone(self) -> Any:
            return self

        def add_patches(self, patches: Any, strength: float) -> Any:
            handed.append((patches, strength))
            return []

    call(
        nodes.LoraLoader,
        model=sd1.model,
        clip=Listening(),
        lora_name="unet.safetensors",
        strength_model=1.0,
        strength_clip=0.25,
    )
    ((patches, strength),) = handed
    (load,) = carried.loads(patches, strength)
    assert load.strength == 0.25
    assert [facts.name for facts in carried.files_of(load)] == ["unet.safetensors"]


def test_a_loader_that_hands_over_block_by_block_gives_one_load(loras: Path, sd1: Checkpoint) -> None:
    write_lora(loras / "a.safetensors", FAMILIES["sd1"], seed=1)
    model, clip = put_on(sd1, "a.safetensors")
    pieces = [{key: entries[0][1]} for key, entries in {**model.patches, **clip.patcher.patches}.items()]
    assert len(pieces) == 2
    found: tuple[carried.Load, ...] = ()
    for piece in pieces:
        found = carried.together(found, carried.loads(piece))
    assert len(found) == 1
    assert [facts.name for facts in carried.files_of(found[0])] == ["a.safetensors"]


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_lora_of_a_hook_is_found(loras: Path, sd1: Checkpoint, scheduled: bool) -> None:
    decoys(loras)
    hooks = call(CreateHookLora, lora_name="decoy-2.safetensors", strength_model=1.0, strength_clip=1.0)
    clip = call(SetClipHooks, clip=sd1.clip, schedule_clip=scheduled, apply_to_conds=True, hooks=hooks)
    assert names(clip.patcher) == names(clip.clone().patcher) == [["decoy-2.safetensors"]]
    assert names(sd1.clip.patcher) == []


def test_the_lora_inside_a_merged_clip_is_found(loras: Path, load: Callable[..., Checkpoint]) -> None:
    from comfy_extras.nodes_model_merging import CLIPMergeSimple

    first, second = load("sd1"), load("sd1", 1)
    write_lora(loras / "a.safetensors", FAMILIES["sd1"], seed=1)
    _, clip = put_on(second, "a.safetensors")
    merged = call(CLIPMergeSimple, clip1=first.clip, clip2=clip, ratio=0.5)
    assert names(merged.patcher) == [["a.safetensors"]]


def test_pickles_and_damaged_files_are_passed_over(loras: Path, sd1: Checkpoint) -> None:
    write_lora(loras / "a.safetensors", FAMILIES["sd1"], seed=1)
    model, _ = put_on(sd1, "a.safetensors")
    torch.save(load_file(str(loras / "a.safetensors")), loras / "a.pt")
    whole = (loras / "a.safetensors").read_bytes()
    (loras / "cut.safetensors").write_bytes(whole[:-1])
    (loras / "tiny.safetensors").write_bytes(b"abc")
    (loras / "a.safetensors").unlink()
    assert names(model) == [[]]
    (loras / "back.safetensors").write_bytes(whole)
    os.utime(loras)
    assert names(model) == [["back.safetensors"]]


def test_one_number_less_alike_is_another_file(loras: Path, sd1: Checkpoint) -> None:
    """Every tensor that is compared decides; a file whose numbers change is not found any more."""
    write_lora(loras / "a.safetensors", FAMILIES["sd1"], seed=1)
    model, clip = put_on(sd1, "a.safetensors")
    (load, *others) = carried.carried_by(model, clip.patcher)
    assert not others and len(load.probes) == 4
    tensors = load_file(str(loras / "a.safetensors"))
    for name in [name for name, tensor in tensors.items() if tensor.ndim]:
        for place, _ in carried._rows(tensors[name].shape):
            changed = {key: value.clone() for key, value in tensors.items()}
            changed[name][place, 0] += 1
            carried._FOUND.clear()
            save_file(changed, str(loras / "a.safetensors"))
            assert names(model, clip.patcher) == [[]], (name, place)
    carried._FOUND.clear()
    save_file(tensors, str(loras / "a.safetensors"))
    assert names(model, clip.patcher) == [["a.safetensors"]]


def test_a_file_that_holds_more_than_the_host_could_use_is_found(loras: Path, sd1: Checkpoint) -> None:
    write_lora(loras / "xl.safetensors", FAMILIES["sdxl"], unet=False, seed=1)
    write_lora(loras / "xl-other.safetensors", FAMILIES["sdxl"], unet=False, seed=2)
    _, clip = put_on(sd1, "xl.safetensors")  # lora_te1 fits, lora_te2 has no layer here
    assert names(clip.patcher) == [["xl.safetensors"]]


def test_looking_again_opens_no_file(loras: Path, sd1: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    decoys(loras)
    model, clip = put_on(sd1, "decoy-0.safetensors")
    assert names(model, clip.patcher) == [["decoy-0.safetensors"]]
    monkeypatch.setattr(guard, "read_layout", None)
    monkeypatch.setattr(carried, "_payload", None)
    monkeypatch.setattr(carried, "_index", None)
    monkeypatch.setattr(carried, "_is", None)
    assert names(model, clip.patcher) == [["decoy-0.safetensors"]]


@pytest.mark.parametrize("patches", [None, 3, {"a": None}, {"a": ("diff", 1)}, {"a": [((), 1, 2)]}])
def test_what_is_no_lora_is_none(patches: Any) -> None:
    assert carried.loads(patches) == ()
    assert carried.carried_by(patches, object()) == ()
