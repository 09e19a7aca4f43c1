"""Node ids, inputs, outputs and defaults stay as saved workflows know them.

After a change on purpose: python bootstrap.py run tests/nodes/test_schemas.py writes schemas.json anew.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import folder_paths
import pytest

from language_bridge.host import folders
from language_bridge.nodes.extension import NODES, LanguageBridgeExtension
from language_bridge.prompt import MODES

SNAPSHOT = Path(__file__).with_name("schemas.json")
FACTS = ("default", "min", "max", "step", "options")
LISTS = {
    "LanguageBridgeConvert": {
        "source": "files of the model folders",
        "together_with": "files of the model folders",
        "tokenizer": "folders of models/text_encoders",
        "preset": "names of the table",
        "reference": "files of the model folders",
        "and_with": "files of the model folders",
    },
    "LanguageBridgeCheckpoint": {"checkpoint": "files of models/checkpoints"},
    "LanguageBridgeTrain": {
        "tower": "identities of tower files",
        "continue_from": "files of models/language_bridges",
    },
    "LanguageBridgeDataset": {"dataset": "folders and lists below input and datasets"},
    "LanguageBridgeDownloads": {
        "set": "published sets of the manifest",
        "reference": "files of models/checkpoints",
    },
}
"""Inputs whose options are what lies in the folders of a machine, or rows of a table that grows."""


def schemas() -> list[dict[str, Any]]:
    """What the host learns of each node, in the order of the menu."""
    folders.register()
    return [_node(node) for node in NODES]


def _node(node: Any) -> dict[str, Any]:
    schema = node.GET_SCHEMA()
    return {
        "id": schema.node_id,
        "name": schema.display_name,
        "category": schema.category,
        "inputs": [_input(given) | _list(schema.node_id, given.id) for given in schema.inputs],
        "outputs": [
            {"id": given.id, "name": given.display_name, "type": given.io_type} for given in schema.outputs
        ],
    }


def _input(given: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"id": given.id, "type": given.io_type, "optional": given.optional}
    facts |= {name: getattr(given, name) for name in FACTS if getattr(given, name, None) is not None}
    if facts.get("options") == folders.bridge_names():
        facts["options"] = "files of models/language_bridges"
    return facts


def _list(node: str, given: str) -> dict[str, Any]:
    words = LISTS.get(node, {}).get(given)
    return {} if words is None else {"options": words}


def test_the_schemas_are_those_of_the_snapshot() -> None:
    assert schemas() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_the_extension_offers_every_node_and_registers_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths.pop(folders.FOLDER, None)
    extension = LanguageBridgeExtension()
    asyncio.run(extension.on_load())
    assert folders.FOLDER in folder_paths.folder_names_and_paths
    nodes = asyncio.run(extension.get_node_list())
    assert [node.GET_SCHEMA().node_id for node in nodes] == [node["id"] for node in schemas()]


def test_the_routes_are_those_of_the_router_and_one_that_switches_off() -> None:
    inputs = {given["id"]: given for given in schemas()[0]["inputs"]}
    assert inputs["route"]["options"] == [*MODES, "english only"]
    assert inputs["route"]["default"] == MODES[0]


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(schemas(), indent=2) + "\n", encoding="utf-8")
