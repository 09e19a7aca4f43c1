"""The doctor's node: what it looks at in this host, and what it says in the real server."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as management
import folder_paths
import pytest
import torch

from language_bridge.encoders.file import save_encoder
from language_bridge.harness.server import Server
from language_bridge.host import doctor as facts
from language_bridge.host.tower import tower_dtype
from language_bridge.nodes.doctor import Doctor
from language_bridge.reports import doctor
from language_bridge.tests.fixtures.towers import tiny_bridge, tiny_tower, write_bridge


def test_it_looks_at_every_model_folder_of_the_host_and_not_at_what_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from language_bridge.host import folders

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folders.register()
    paths, endings = folder_paths.folder_names_and_paths["loras"]
    folder_paths.folder_names_and_paths["loras"] = ([*paths, str(tmp_path)], endings)
    roots = facts.roots(doctor.CATEGORIES)
    assert set(roots) == set(doctor.CATEGORIES)
    assert roots["loras"] == (*map(Path, paths), tmp_path)
    assert folders.FOLDER in roots
    assert all(facts.SHIPPED not in path.parents for found in roots.values() for path in found)


def test_devices_and_number_formats_are_the_hosts_own() -> None:
    found = dict(facts.choices())
    assert found["device"] == management.get_torch_device_name(management.get_torch_device())
    device, dtype = found["tower"].split(", ")
    assert device == str(management.text_encoder_device())
    assert getattr(torch, dtype) == tower_dtype()
    versions = dict(facts.versions())
    assert versions["ComfyUI"] != "-" and versions["torch"] != "-" and "/" not in str(versions)


def test_it_is_stopped_like_any_other_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tiny_tower()
    write_bridge(tmp_path / "b.safetensors", "sd1", tiny_bridge("linear", "sd1", tower), tower, inside=True)
    monkeypatch.setattr(facts, "roots", lambda names: {"loras": (tmp_path,)})
    assert "loras/b.safetensors" in str(Doctor.execute("English", False).args[0])
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        Doctor.execute("English", False)
    assert not management.processing_interrupted()


@pytest.mark.parametrize(
    ("language", "sentence"),
    [("English", "nobody looks for towers there"), ("Chinese", "\u653e\u9519\u4e86\u6587\u4ef6\u5939")],
)
def test_the_server_names_a_tower_in_the_wrong_folder(server: Server, language: str, sentence: str) -> None:
    path = server.base / "models" / "checkpoints" / "\u5854 tower.safetensors"
    save_encoder(path, tiny_tower())
    try:
        graph = {
            "1": {"class_type": "LanguageBridgeDoctor", "inputs": {"language": language, "hosts": False}}
        }
        text = server.run(graph)["outputs"]["1"]["text"][0]
    finally:
        path.unlink()
    assert f"checkpoints/{path.name}" in text and sentence in text and "models/text_encoders" in text
    assert str(server.base) not in text
