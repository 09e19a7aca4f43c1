"""Every name that a graph can put into a node, against the path attacks: refused, or inside the folders.

A graph may come out of a picture from anybody, and a linked text is never compared with a node's list. So
each node is called with the attack itself, as the executor would do it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest

from language_bridge.bridges.errors import LONGEST, BridgeError
from language_bridge.bridges.file import save_bridge
from language_bridge.host import dataset, folders, trained, travel
from language_bridge.host.beginning import tower_file
from language_bridge.manifest.errors import FetchError
from language_bridge.nodes import convert as convert_node
from language_bridge.nodes.checkpoint import BridgeCheckpoint
from language_bridge.nodes.convert import Convert
from language_bridge.nodes.downloads import Downloads
from language_bridge.nodes.language_bridge import LanguageBridge
from language_bridge.tests.attacks import attacks, untouched
from language_bridge.tests.battery.mutants import edited
from language_bridge.tests.bridges.toys import WIDTH, toy_bridge, toy_header

CATEGORIES = ("checkpoints", "text_encoders", "controlnet", "diffusers", "diffusion_models", folders.FOLDER)


@pytest.fixture(scope="module")
def bridge_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    bridge = toy_bridge("mlp", WIDTH)
    path = tmp_path_factory.mktemp("bridge") / "x.safetensors"
    save_bridge(path, toy_header(bridge), bridge)
    return path.read_bytes()


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bridge_bytes: bytes) -> Iterator[Path]:
    """Model folders of their own; beside them, and beside their folder, a bridge that nobody may read."""
    models = tmp_path / "models"
    known = dict(folder_paths.folder_names_and_paths)
    for category in CATEGORIES:
        (models / category).mkdir(parents=True)
        suffixes = {".safetensors"} if category == folders.FOLDER else folder_paths.supported_pt_extensions
        known[category] = ([str(models / category)], set(suffixes))
        (models / category / "x").mkdir()
        (models / category / "inside.safetensors").write_bytes(bridge_bytes)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(models))
    for place in (tmp_path, models):
        (place / "outside.safetensors").write_bytes(bridge_bytes)
    yield tmp_path / "outside.safetensors"


def contained(path: Path, victim: Path) -> None:
    roots = [
        Path(root).resolve() for category in CATEGORIES for root in folder_paths.get_folder_paths(category)
    ]
    roots.append(folders._ASSETS.resolve())
    assert any(path.resolve().is_relative_to(root) for root in roots), path
    assert path.name != victim.name


def converting(**fixed: Any) -> Callable[[str, str], object]:
    """The convert node with the attack in one input."""

    def call(name: str, where: str) -> object:
        inputs: dict[str, Any] = {
            "source": "text_encoders/inside.safetensors",
            "together_with": convert_node.NOTHING,
            "tokenizer": convert_node.BESIDE,
            "preset": convert_node.RECOGNISE,
            "reference": convert_node.NOTHING,
            "unet": "auto",
            "form": "replace",
            "precision": convert_node.PRECISIONS[0],
            "overwrite": True,
        }
        Convert.fingerprint_inputs(**(inputs | {where: name}))
        return Convert.execute(**(inputs | {where: name}))

    return call


def fetching(name: str, where: str) -> object:
    """The node that fetches, with the attack in one input; nothing is agreed to, so nothing is fetched."""
    inputs: dict[str, Any] = {
        "set": "pea-sdxl-mt5",
        "action": "get",
        "sources": "as set",
        "reference": "none",
        "precision": "as published",
        "clean": False,
        "again": False,
        "language": "English",
        "agree": False,
        "trust_first_use": False,
    }
    return Downloads.execute(**(inputs | {where: name}))


def bridged(name: str, where: str) -> object:
    LanguageBridge.fingerprint_inputs(bridge=name)
    travel.fingerprint(name)
    return travel.resolve(name).path


def recorded(name: str, where: str) -> object:
    """The hidden record of a graph, with the attack in each of its fields."""
    found: Path | None = None
    for field in ("bridge", "id", "hash"):
        record = {"bridge": "gone.safetensors", "id": "gone", "hash": "0" * 12, "pack": "1"} | {field: name}
        file = name if field == "bridge" else "gone.safetensors"
        for text in (json.dumps(record), name):
            LanguageBridge.fingerprint_inputs(bridge=file, identity=text)
            try:
                found = travel.resolve(file, text).path
            except BridgeError:
                continue
    if found is None:
        raise BridgeError("x", "x", "x", "x")
    return found


def checkpoint(name: str, where: str) -> object:
    BridgeCheckpoint.fingerprint_inputs(checkpoint=name)
    return travel.model_path("checkpoints", name, "checkpoint")


def saved(name: str, where: str) -> object:
    """Where a run, or a trained bridge, of this name would be written: below the first model folder."""
    plain = trained.check_name(name.removesuffix(folders.SUFFIX), where)
    return Path(folder_paths.get_folder_paths(folders.FOLDER)[0]) / f"{plain}{folders.SUFFIX}"


INPUTS: dict[str, Callable[[str, str], object]] = {
    "LanguageBridge.bridge": bridged,
    "LanguageBridge.identity": recorded,
    "LanguageBridge, the file behind a name": lambda name, where: folders.bridge_path(name),
    "LanguageBridge, the files of a bridge": lambda name, where: folders.files_of(name)[0],
    "LanguageBridgeCheckpoint.checkpoint": checkpoint,
    **{
        f"LanguageBridgeConvert.{where}": converting()
        for where in (
            *("source", "together_with", "and_with", "tokenizer", "preset", "reference"),
            *("unet", "form", "precision"),
        )
    },
    "LanguageBridgeTrain.run": saved,
    "LanguageBridgeTrain.tower": lambda name, where: tower_file(name)[0],
    "LanguageBridgeTrain.continue_from": lambda name, where: folders.bridge_path(name),
    "LanguageBridgeSave.name": saved,
    "LanguageBridgeDataset.dataset": lambda name, where: dataset.place_of(name),
    **{f"LanguageBridgeDownloads.{where}": fetching for where in ("set", "action", "sources", "reference")},
}


@pytest.mark.parametrize("place", INPUTS)
def test_no_name_in_a_graph_leads_out_of_the_model_folders(place: str, victim: Path) -> None:
    call, where = INPUTS[place], place.rpartition(".")[2]
    names = attacks(victim)
    assert len(names) >= 140
    refused = 0
    with untouched(victim.parent):
        for name in names:
            try:
                found = call(name, where)
            except (BridgeError, FetchError) as error:
                refused += 1
                assert len(str(error)) < 4 * LONGEST
                str(error).encode("utf-8")
                continue
            assert isinstance(found, Path), (name, found)
            contained(found, victim)
    assert refused >= 80


def test_the_inside_is_found_so_the_refusals_are_not_for_nothing(victim: Path) -> None:
    for path in (
        bridged("inside.safetensors", "bridge"),
        folders.bridge_path("inside.safetensors"),
        travel.model_path("checkpoints", "inside.safetensors", "checkpoint"),
    ):
        assert isinstance(path, Path)
        contained(path, victim)


def graph(name: str, record: str) -> dict[str, Any]:
    """A queued graph in both forms, with a bridge's name and its record in every place that has one."""
    node = {"type": "LanguageBridge", "widgets_values": [name, 1.0, "two streams", record]}
    workflow = {
        "nodes": [node],
        "definitions": {"subgraphs": [{"nodes": [dict(node)]}]},
        "extra": {"language_bridge": {name: record}, "other": [1]},
    }
    inputs = {"bridge": name, "strength": 1.0, "identity": record}
    prompt = {"1": {"class_type": "LanguageBridge", "inputs": inputs}}
    return {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}


def test_a_queued_graph_is_stamped_whatever_it_holds(victim: Path) -> None:
    """The handler of every queued graph, of every client: no name leads out, and nothing is raised."""
    whole = travel.resolve("inside.safetensors")
    record = json.dumps({"bridge": "inside.safetensors", "id": "x", "hash": "0" * 12, "pack": "1"})
    with untouched(victim.parent):
        for name in attacks(victim):
            for data in (graph(name, record), graph("inside.safetensors", name), graph(name, name)):
                for found in travel.stamp(data, "1"):
                    contained(found.path, victim)
        chance = random.Random(7)
        for _ in range(300):
            odd = edited(graph("inside.safetensors", record), chance)
            if isinstance(odd, dict):
                travel.stamp(odd, "1")
    assert whole.path.name == "inside.safetensors"


def test_a_language_is_no_path() -> None:
    from language_bridge.host.language import words

    english = words("English")
    for name in attacks(Path("/tmp/outside.safetensors")):
        assert words(name) is english


def test_a_template_and_a_name_in_a_bridge_open_nothing(
    victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts inside a header may look like paths; they are texts. Files are looked for by listing folders."""
    bridge = toy_bridge("mlp", WIDTH)
    path = victim.parent / "models" / folders.FOLDER / "inside.safetensors"
    header = toy_header(bridge)
    for name in attacks(victim):
        if "\ud800" in name:
            continue
        reference = dataclasses.replace(header.encoder, identity=name[:2000])
        odd = dataclasses.replace(header, name=name[:2000], source=name[:2000], encoder=reference)
        save_bridge(path, odd, bridge)
        with pytest.raises(BridgeError, match="is missing"):
            folders.files_of("inside.safetensors")
        assert folders.bridge_names()
        try:
            contained(travel.resolve("inside.safetensors").path, victim)
        except BridgeError as error:
            assert len(str(error)) < 4 * LONGEST  # noqa: PT017
