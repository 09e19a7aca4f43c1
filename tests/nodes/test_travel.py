"""On the real server: what is missing or another one is said once, and pictures carry what made them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from language_bridge.bridges.file import METADATA_KEY
from language_bridge.encoders import guard
from language_bridge.host import identity, travel
from language_bridge.tests.fixtures.travel import (
    failure,
    leaks,
    listening,
    metadata,
    own_bridge,
    queue,
    saved_workflow,
)
from language_bridge.tests.nodes.test_convert import models, run

if TYPE_CHECKING:
    from language_bridge.harness.server import Server

NAME = "\u6211\u7684 \u6865.safetensors"
converting = models
"""The model folders of the convert node's tests, under another name here."""


@pytest.fixture
def bridges(server: Server) -> Iterator[Path]:
    """The server's bridge folder; what a test puts there is gone after it."""
    folder = server.base / "models" / "language_bridges"
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


def kept(workflow: dict[str, Any]) -> str:
    (found,) = (node["widgets_values"] for node in workflow["nodes"] if node["type"] == "LanguageBridge")
    return str(found[3])


def events(frames: list[bytes], kind: str) -> list[Any]:
    told = [json.loads(frame) for frame in frames if frame.startswith(b"{")]
    return [event["data"] for event in told if event["type"] == kind]


def test_a_picture_carries_the_record_and_another_content_is_said(server: Server, bridges: Path) -> None:
    own_bridge(bridges / NAME, "mine")
    entry = queue(server, saved_workflow(NAME))
    (picture,) = server.pictures(entry)
    told = metadata(picture)
    (asked,) = (n["inputs"] for n in told["prompt"].values() if n["class_type"] == "LanguageBridge")
    record = identity.parse(asked["identity"])
    assert record is not None and record.bridge == NAME and record.id == "mine" and record.hash
    assert kept(told["workflow"]) == asked["identity"]
    assert identity.content(bridges / NAME).startswith(record.hash)

    own_bridge(bridges / NAME, "mine", seed=1)
    client = uuid.uuid4().hex
    with listening(server, client) as frames:
        entry = queue(server, told["workflow"], client)
    assert entry["status"]["status_str"] == "success"
    (event,) = events(frames, travel.EVENT)
    (note,) = event["notes"]
    changed = identity.parse(event["records"][NAME])
    assert changed is not None and str(record) in note and str(changed) in note and record != changed
    assert note in server.log.read_text(encoding="utf-8")
    (other,) = server.pictures(entry)
    assert kept(metadata(other)["workflow"]) == changed.to_json()
    assert other != picture


def test_what_is_missing_is_said_once_before_anything_is_loaded(server: Server) -> None:
    client = uuid.uuid4().hex
    with listening(server, client) as frames:
        entry = queue(server, saved_workflow("altdiffusion-m9.safetensors"), client)
    error = failure(entry)
    assert error["node_type"] == "LanguageBridge" and error["executed"] == []
    text = error["exception_message"]
    for part in (
        "no bridge called 'altdiffusion-m9.safetensors'",
        " MB",
        "BAAI",
        "install.py get altdiffusion-m9",
    ):
        assert part in text
    assert len(events(frames, "execution_error")) == 1
    assert not [note for event in events(frames, travel.EVENT) for note in event["notes"]]


def test_switched_off_it_needs_no_bridge(server: Server) -> None:
    workflow = saved_workflow("gone.safetensors")
    for node in workflow["nodes"]:
        if node["type"] == "LanguageBridge":
            node["widgets_values"][1] = 0.0
    assert queue(server, workflow)["status"]["status_str"] == "success"


def test_the_list_of_the_page_has_the_record_of_each_shipped_bridge(server: Server) -> None:
    facts = server.ask("/object_info/LanguageBridge")["LanguageBridge"]["input"]["required"]["bridge"][1]
    shipped = [name for name in facts["options"] if name.startswith("pocket-")]
    assert shipped and set(shipped) <= set(facts["records"])
    for name in shipped:
        record = identity.parse(facts["records"][name])
        assert record is not None and f"{record.id}.safetensors" == record.bridge == name and record.hash


def test_what_the_convert_node_writes_names_no_folder_and_no_token(
    converting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"hf_{uuid.uuid4().hex}"
    monkeypatch.setenv("HF_TOKEN", token)
    run("text_encoders/pea.bin")
    layout = guard.read_layout(converting / "language_bridges" / "pea.safetensors")
    places = {name: text.encode("utf-8") for name, text in layout.metadata.items()}
    needles = [token, str(converting), str(Path.home())]
    assert METADATA_KEY in places and b"pea.bin" in places[METADATA_KEY]
    assert leaks(places, needles) == []
    assert leaks(places | {"control": json.dumps({"from": str(converting)}).encode()}, needles)
