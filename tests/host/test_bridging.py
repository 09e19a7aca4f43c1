"""What does not belong together is refused by the node, in three parts, before anything is changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders.file import save_encoder
from language_bridge.nodes.language_bridge import LanguageBridge
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import digest, encode, same
from language_bridge.tests.fixtures.towers import TOWER, tiny_bridge, tiny_tower, write_bridge

Loader = Callable[..., Checkpoint]


@pytest.fixture
def bridges(models: Path) -> Any:
    """The bridge folder; what a test puts there is gone after it."""
    folder = models / "language_bridges"
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


@pytest.fixture
def towers(models: Path) -> Any:
    """The folder of text towers; what a test puts there is gone after it."""
    folder = models / "text_encoders"
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


def refusal(checkpoint: Checkpoint, **inputs: Any) -> str:
    """The text of the error that the node gives; the checkpoint must be as it was before."""
    weights, words = digest(checkpoint.clip.get_sd()), encode(checkpoint.clip, "a red cat")
    options = json.dumps(checkpoint.clip.patcher.model_options, default=repr, sort_keys=True)
    with pytest.raises(BridgeError) as caught:
        bridged(checkpoint, **inputs)
    text = str(caught.value)
    what, found, expected, action = text.split("\n")
    assert what and found.startswith("  found: ") and len(found) > 9
    assert expected.startswith("  expected: ") and len(expected) > 12
    assert action.startswith("  what to do: ") and len(action) > 14
    assert not checkpoint.clip.patcher.patches and not checkpoint.model.patches
    assert json.dumps(checkpoint.clip.patcher.model_options, default=repr, sort_keys=True) == options
    assert digest(checkpoint.clip.get_sd()) == weights
    assert same(encode(checkpoint.clip, "a red cat"), words)
    return text


# -- what belongs together -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "other"), [("sd1", "sdxl"), ("sd2", "sd1"), ("sdxl", "sd2"), ("sd1", "pocket")]
)
def test_a_bridge_for_another_base(load: Loader, base: str, other: str) -> None:
    text = refusal(load(base), bridge=f"mlp-{other}.safetensors")
    names = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL", "pocket": "pocket"}
    assert names[base] in text and names[other] in text


def test_model_and_clip_of_two_checkpoints(load: Loader) -> None:
    text = refusal(load("sd1"), model=load("sdxl").model)
    assert "do not belong together" in text and "SDXL" in text and "SD1.x" in text
    assert "do not belong together" in refusal(load("sdxl"), model=load("sd2").model)


def test_a_model_or_clip_of_another_world(sd1: Checkpoint) -> None:
    class Other:
        cond_stage_model = torch.nn.Identity()

    assert "cannot work on this CLIP" in refusal(sd1, clip=Other())
    assert "cannot work on this MODEL" in refusal(sd1, model=Other())


def test_a_flux_like_clip_is_refused(sd1: Checkpoint) -> None:
    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip_l, self.t5xxl = sd1.clip.cond_stage_model.clip_l, torch.nn.Identity()

    class Flux:
        cond_stage_model = Towers()

    assert "cannot work on this CLIP" in refusal(sd1, clip=Flux())


def test_a_header_whose_width_does_not_fit_its_base(sd1: Checkpoint, bridges: Path) -> None:
    tower = tiny_tower()
    write_bridge(bridges / "odd.safetensors", "sd1", tiny_bridge("linear", "sd2", tower), tower)
    text = refusal(sd1, bridge="odd.safetensors")
    assert "1024" in text and "768" in text


def test_a_bridge_that_changes_the_unet(sd1: Checkpoint, bridges: Path) -> None:
    tower = tiny_tower()
    write_bridge(bridges / "kv.safetensors", "sd1", tiny_bridge("linear", "sd1", tower), tower, unet="kv")
    assert "'kv'" in refusal(sd1, bridge="kv.safetensors")


def test_an_unknown_route(sd1: Checkpoint) -> None:
    assert "two streams" in refusal(sd1, route="esperanto")


# -- names ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "unknown.safetensors",
        "",
        ".",
        "..",
        "../text_encoders/tiny-zh.safetensors",
        "..\\text_encoders\\tiny-zh.safetensors",
        "sub/../mlp-sd1.safetensors",
        "./mlp-sd1.safetensors",
        "mlp-sd1.safetensors/",
        "mlp-sd1",
        "C:\\models\\mlp-sd1.safetensors",
        "//server/share/mlp-sd1.safetensors",
        "mlp-sd1.safetensors\0",
    ],
)
def test_a_name_that_the_folder_does_not_list(sd1: Checkpoint, name: str) -> None:
    text = refusal(sd1, bridge=name)
    assert "no bridge called" in text and "identity-sd1.safetensors" in text  # what there is


def test_an_absolute_path_is_no_name(sd1: Checkpoint, models: Path) -> None:
    assert "no bridge called" in refusal(sd1, bridge=str(models / "language_bridges" / "mlp-sd1.safetensors"))


def test_a_file_outside_the_folder_is_not_opened(
    sd1: Checkpoint, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("language_bridge.host.folders.read_header", opened.append)
    shutil.copy(models / "language_bridges" / "mlp-sd1.safetensors", models / "outside.safetensors")
    refusal(sd1, bridge="../outside.safetensors")
    assert LanguageBridge.fingerprint_inputs(bridge="../outside.safetensors") == "../outside.safetensors"
    assert not opened


def test_a_file_that_has_gone(sd1: Checkpoint, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folder_paths.get_filename_list", lambda _: ["gone.safetensors"])
    assert "has gone" in refusal(sd1, bridge="gone.safetensors")


# -- files ---------------------------------------------------------------------------------------------------
def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>Sign in to download</html>", encoding="utf-8")


def other_safetensors(path: Path) -> None:
    save_file({"lora_up": torch.zeros(2, 2)}, str(path))


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    facts, tensors = metadata_of(path), load_file(str(path))
    change(tensors)
    save_file(tensors, str(path), metadata=facts)


def without_a_tensor(path: Path) -> None:
    changed(path, lambda tensors: tensors.pop("bridge.projector.0.weight"))


def with_a_tensor_too_many(path: Path) -> None:
    changed(path, lambda tensors: tensors.update({"bridge.more": torch.zeros(1)}))


def of_another_shape(path: Path) -> None:
    changed(path, lambda tensors: tensors.update({"bridge.projector.0.weight": torch.zeros(3, 3)}))


def not_a_number(path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bridge.projector.0.weight"][0, 0] = float("nan")

    changed(path, change)


DAMAGE = [
    cut_off,
    emptied,
    noise,
    page,
    other_safetensors,
    without_a_tensor,
    with_a_tensor_too_many,
    of_another_shape,
    not_a_number,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_bridge_file(sd1: Checkpoint, bridges: Path, damage: Callable[[Path], None]) -> None:
    path = bridges / "damaged.safetensors"
    shutil.copy(bridges / "mlp-sd1.safetensors", path)
    assert bridged(sd1, bridge=path.name)  # it was whole
    damage(path)
    refusal(sd1, bridge=path.name)


def test_a_replaced_bridge_file_is_read_again(sd1: Checkpoint, bridges: Path) -> None:
    path = bridges / "replaced.safetensors"
    shutil.copy(bridges / "linear-sd1.safetensors", path)
    before = LanguageBridge.fingerprint_inputs(bridge=path.name)
    assert LanguageBridge.fingerprint_inputs(bridge=path.name) == before
    shutil.copy(bridges / "mlp-sd1.safetensors", path)
    assert LanguageBridge.fingerprint_inputs(bridge=path.name) != before
    words = "\u7ea2\u732b"
    assert same(encode(bridged(sd1, bridge=path.name)[1], words), encode(bridged(sd1, "mlp")[1], words))


def test_a_replaced_tower_file_is_read_again(bridges: Path, towers: Path) -> None:
    before = LanguageBridge.fingerprint_inputs(bridge="mlp-sd1.safetensors")
    own = LanguageBridge.fingerprint_inputs(bridge="identity-sd1.safetensors")
    os.utime(towers / "tiny-zh.safetensors", ns=(1, 1))
    assert LanguageBridge.fingerprint_inputs(bridge="mlp-sd1.safetensors") != before
    assert LanguageBridge.fingerprint_inputs(bridge="identity-sd1.safetensors") == own


# -- towers --------------------------------------------------------------------------------------------------
def write_for(bridges: Path, tower: Any) -> str:
    write_bridge(bridges / "own.safetensors", "sd1", tiny_bridge("linear", "sd1", tower), tower)
    return "own.safetensors"


def test_a_missing_tower(sd1: Checkpoint, bridges: Path) -> None:
    text = refusal(sd1, bridge=write_for(bridges, tiny_tower("absent-zh")))
    assert "absent-zh" in text and "missing" in text and "models/text_encoders" in text


def test_a_tower_of_the_same_name_with_another_window(sd1: Checkpoint, bridges: Path) -> None:
    text = refusal(sd1, bridge=write_for(bridges, tiny_tower(TOWER, window=52)))
    assert TOWER in text and "window 77" in text and "window 52" in text


def test_a_tower_is_found_by_what_it_is_and_not_by_its_name(
    sd1: Checkpoint, bridges: Path, towers: Path
) -> None:
    name = write_for(bridges, tiny_tower("renamed-zh", seed=4))
    (towers / "sub").mkdir()
    try:
        save_encoder(towers / "sub" / "what-ever.safetensors", tiny_tower("renamed-zh", seed=4))
        assert bridged(sd1, bridge=name)
    finally:
        shutil.rmtree(towers / "sub")


def test_of_two_towers_of_one_name_the_fitting_one_is_taken(
    sd1: Checkpoint, bridges: Path, towers: Path
) -> None:
    save_encoder(towers / "a.safetensors", tiny_tower("twin-zh", window=52))
    save_encoder(towers / "b.safetensors", tiny_tower("twin-zh"))
    _, clip = bridged(sd1, bridge=write_for(bridges, tiny_tower("twin-zh")))
    assert clip.speech.tower.encoder.window == 77


def test_a_damaged_tower_file(sd1: Checkpoint, bridges: Path, towers: Path) -> None:
    tower = tiny_tower("damaged-zh")
    path = towers / "damaged.safetensors"
    name = write_for(bridges, tower)
    save_encoder(path, tower)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.embeddings.LayerNorm.weight"][0] += 1

    changed(path, change)  # the header still says what it said; the digest tells
    assert "digest" in refusal(sd1, bridge=name)
    cut_off(path)
    assert "damaged-zh" in refusal(sd1, bridge=name)  # a torn file is no tower


def test_a_tower_that_is_too_narrow_for_the_bridge(sd1: Checkpoint, bridges: Path, towers: Path) -> None:
    narrow = tiny_tower("narrow-zh", width=16)
    save_encoder(towers / "narrow.safetensors", narrow)
    bridge = tiny_bridge("linear", "sd1", tiny_tower())
    write_bridge(bridges / "wide.safetensors", "sd1", bridge, narrow)
    text = refusal(sd1, bridge="wide.safetensors")
    assert "16" in text and "32" in text


def test_a_pooled_vector_of_another_width(sdxl: Checkpoint, bridges: Path) -> None:
    tower = tiny_tower()
    write_bridge(
        bridges / "thin.safetensors", "sdxl", tiny_bridge("linear", "sdxl", tower, pooled=768), tower
    )
    text = refusal(sdxl, bridge="thin.safetensors")
    assert "768" in text and "1280" in text


def test_foreign_files_among_the_towers_are_passed_over(sd1: Checkpoint, towers: Path) -> None:
    noise(towers / "a-noise.safetensors")
    other_safetensors(towers / "a-foreign.safetensors")
    (towers / "a-dead-link.safetensors").symlink_to(towers / "nowhere.safetensors")
    assert bridged(sd1)


def test_the_error_names_the_bridge(sd1: Checkpoint) -> None:
    assert "mlp-sdxl" in refusal(sd1, bridge="mlp-sdxl.safetensors")
