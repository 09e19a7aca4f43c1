"""A graph finds its bridge on another machine by content, and what is another one is said."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders.file import save_encoder
from language_bridge.host import folders, identity, travel
from language_bridge.nodes.language_bridge import LanguageBridge
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import encode, same
from language_bridge.tests.fixtures.towers import tiny_bridge, tiny_tower, write_bridge
from language_bridge.tests.fixtures.travel import rewrite

PACK = "0.1.0"
CHINESE = "\u6211\u7684 \u6a21\u578b"
WORDS = "\u7ea2\u732b"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three empty model folders of a machine, a second root of each, a user directory, and a text tower."""
    known = dict(folder_paths.folder_names_and_paths)
    for name in ("language_bridges", "text_encoders", "controlnet"):
        roots = [tmp_path / name, tmp_path / CHINESE / name]
        for root in roots:
            root.mkdir(parents=True)
        known[name] = ([str(root) for root in roots], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    save_encoder(tmp_path / "text_encoders" / "tower.safetensors", tiny_tower())
    return tmp_path


def put(path: Path, seed: int = 0, name: str | None = None, kind: str = "linear", **more: Any) -> Path:
    """A bridge file; its own name is `name`, or that of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.with_name(f"{name}.safetensors") if name else path
    tower = tiny_tower()
    write_bridge(target, "sd1", tiny_bridge(kind, "sd1", tower, seed=seed), tower, **more)
    return target if target == path else target.rename(path)


def listed(path: Path, place: Path) -> str:
    return str(path.relative_to(place / "language_bridges"))


def record(path: Path, name: str) -> str:
    return identity.record_of(name, folders.bridge_header(path), path, PACK).to_json()


# -- what a bridge is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda fields, tensors: fields.update(name="another"),
        lambda fields, tensors: fields.update(source="elsewhere", licence="other", languages=["zh", "ja"]),
        lambda fields, tensors: fields["training"].update(steps=3, conversion={"program": "0.9"}),
        lambda fields, tensors: fields["spec"].update(norm=False),  # the default, written out
    ],
)
def test_name_and_provenance_are_no_content(place: Path, change: Any) -> None:
    path = put(place / "language_bridges" / "one.safetensors")
    before = identity.content(path)
    assert identity.content(rewrite(path, change)) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda fields, tensors: fields.update(base="sd2"),
        lambda fields, tensors: fields["encoder"].update(layer=-2),
        lambda fields, tensors: fields["encoder"].update(digest="0" * 64),
        lambda fields, tensors: fields["training"].update(unet="own"),
        lambda fields, tensors: fields["training"].update(says="clip input"),
        lambda fields, tensors: fields["training"].update(template={"before": "x", "after": ""}),
        lambda fields, tensors: tensors["bridge.context.bias"][-1:].add_(1),
        lambda fields, tensors: tensors.update(
            {"bridge.context.bias": tensors["bridge.context.bias"].half()}
        ),
    ],
)
def test_all_that_acts_is_content(place: Path, change: Any) -> None:
    path = put(place / "language_bridges" / "one.safetensors")
    before = identity.content(path)
    assert identity.content(rewrite(path, change)) != before


def test_a_tower_inside_is_content_by_its_digest(place: Path) -> None:
    contents = set()
    for seed in (1, 2):
        path = place / "language_bridges" / f"{seed}.safetensors"
        tower = tiny_tower(seed=seed)
        write_bridge(path, "sd1", tiny_bridge("linear", "sd1", tower), tower, inside=True)
        contents.add(identity.content(path))
    assert len(contents) == 2


def test_a_content_is_read_once_and_again_when_the_file_changes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(place / "language_bridges" / "one.safetensors")
    os.utime(path, ns=(1, 1))
    read: list[Path] = []
    take = identity._hash
    monkeypatch.setattr(identity, "_hash", lambda path, layout: (read.append(path), take(path, layout))[1])
    monkeypatch.setattr("language_bridge.encoders.ledger.REST_NS", 0)
    first = identity.content(path)
    assert identity.content(path) == first and len(read) == 1
    identity._known.clear()  # another start of ComfyUI
    assert identity.content(path) == first and len(read) == 1
    put(path, seed=1)
    assert identity.content(path) != first and len(read) == 2
    ledger = place / "user" / f"__{identity.OWN_FOLDER}" / identity.CONTENTS
    assert str(place) not in ledger.read_text(encoding="utf-8")


# -- the same content ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "there",
    [
        "language_bridges/other.safetensors",
        f"language_bridges/sub {CHINESE}/\u6865 1.safetensors",
        f"{CHINESE}/language_bridges/a.safetensors",
        "text_encoders/a.safetensors",
        "controlnet/sub/a.safetensors",
        f"{CHINESE}/controlnet/a.safetensors",
        f"{CHINESE}/text_encoders/{CHINESE}/a.safetensors",
    ],
)
def test_the_same_content_under_another_name_is_taken_without_a_word(
    place: Path, there: str, sd1: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    put(place / "language_bridges" / "unlike.safetensors", seed=1)
    kept = record(path, path.name)
    expected = encode(bridged(sd1, bridge=path.name, identity=kept)[1], WORDS)
    (place / there).parent.mkdir(parents=True, exist_ok=True)
    moved = path.rename(place / there)
    found = travel.resolve("mine.safetensors", kept)
    assert found.path == moved and found.note is None and found.name in folders.bridge_names()
    caplog.clear()
    assert same(encode(bridged(sd1, bridge="mine.safetensors", identity=kept)[1], WORDS), expected)
    assert not [entry for entry in caplog.records if entry.levelname == "WARNING"]
    # and it is in the list under its own name, which is a name like any other
    assert same(encode(bridged(sd1, bridge=found.name)[1], WORDS), expected)


@pytest.mark.parametrize("here, there", [("/", "\\"), ("\\", "/")])
def test_a_name_written_on_another_system_is_the_same_name(
    place: Path, here: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(place / "language_bridges" / "sub" / CHINESE / "a b.safetensors")
    names = [here.join(("sub", CHINESE, "a b.safetensors"))]
    assert folders.listed(there.join(("sub", CHINESE, "a b.safetensors")), names) == names[0]
    if here == "/":
        name = there.join(("sub", CHINESE, "a b.safetensors"))
        kept = record(path, name)
        assert "\\" not in kept
        assert travel.resolve(name).path == path == travel.resolve(name, kept).path
        assert travel.resolve(names[0], kept).note is None


def test_letters_composed_in_another_way_are_the_same_name(place: Path) -> None:
    path = put(place / "language_bridges" / "caf\u00e9.safetensors")
    assert travel.resolve("cafe\u0301.safetensors").path == path


def test_a_folder_of_two_kinds_is_listed_once_and_other_files_are_not_listed(place: Path) -> None:
    put(place / "language_bridges" / "mine.safetensors")
    folder_paths.folder_names_and_paths["controlnet"][0].append(str(place / "language_bridges"))
    save_file({"x": torch.zeros(1)}, str(place / "controlnet" / "plain.safetensors"))
    (place / "controlnet" / "broken.safetensors").write_bytes(b"not one")
    (place / "controlnet" / "gone.safetensors").symlink_to(place / "nothing")
    assert folders.bridge_names() == ["mine.safetensors"]


def test_a_tower_is_found_among_controlnets_and_behind_a_link_that_leads_back(place: Path) -> None:
    (place / "text_encoders" / "tower.safetensors").rename(place / "controlnet" / "t.safetensors")
    (place / "controlnet" / "up").symlink_to(place / "controlnet", target_is_directory=True)
    towers = [path for path, _ in folders.towers() if place in path.parents]
    assert towers == [place / "controlnet" / "t.safetensors"]


# -- another content -----------------------------------------------------------------------------------------


def test_another_content_under_the_same_name_is_taken_and_said(
    place: Path, sd1: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    kept = record(path, path.name)
    put(path, seed=1)
    found = travel.resolve(path.name, kept)
    meant, here = identity.parse(kept), identity.parse(record(path, path.name))
    assert found.path == path and found.note is not None
    for language in ("English", "Chinese"):
        assert path.name in found.say(language)
        assert str(meant) in found.say(language) and str(here) in found.say(language)
    assert str(meant) != str(here) and "#" in str(meant)
    caplog.clear()
    bridged(sd1, bridge=path.name, identity=kept)
    assert found.say("English") in caplog.text


def test_the_content_goes_before_the_name_and_that_is_said(place: Path) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    kept = record(path, path.name)
    old = path.rename(path.with_name("old.safetensors"))
    put(path, seed=1)
    found = travel.resolve("mine.safetensors", kept)
    assert found.path == old and found.note is not None and "old.safetensors" in found.say("English")


def test_another_bridge_under_the_same_name_is_refused(place: Path) -> None:
    path = put(place / "language_bridges" / "mine.safetensors", name="first")
    kept = record(path, path.name)
    put(path, seed=1, name="second")
    with pytest.raises(BridgeError) as caught:
        travel.resolve(path.name, kept)
    text = str(caught.value)
    assert "first#" in text and "second#" in text and "choose it again" in text
    assert travel.resolve(path.name).path == path  # as it is after that


def test_the_same_id_under_another_name_is_taken_and_said(place: Path) -> None:
    path = put(place / "language_bridges" / "mine.safetensors", name="first")
    kept = record(path, path.name)
    put(path.with_name("other.safetensors"), seed=1, name="first")
    path.unlink()
    found = travel.resolve("mine.safetensors", kept)
    assert found.name == "other.safetensors" and found.note is not None
    assert found.say("English").count("first#") == 2
    put(path.with_name("third.safetensors"), seed=2, name="first")
    with pytest.raises(BridgeError, match="Choose one of them") as caught:
        travel.resolve("mine.safetensors", kept)
    assert "other.safetensors, third.safetensors" in str(caught.value)


def test_a_record_about_another_name_says_nothing(place: Path) -> None:
    """Whoever chose another file in a program that does not know the record means the file."""
    one = put(place / "language_bridges" / "one.safetensors")
    two = put(place / "language_bridges" / "two.safetensors", seed=1)
    assert travel.resolve("two.safetensors", record(one, "one.safetensors")).path == two


def test_a_graph_without_a_record_goes_by_the_name_and_then_by_the_id(place: Path) -> None:
    path = put(place / "language_bridges" / "any.safetensors", name="first")
    assert travel.resolve("any.safetensors").note is None
    found = travel.resolve("first.safetensors")
    assert found.path == path and found.note is not None and "any.safetensors" in found.say("English")


# -- what is missing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("bdm-1.0", ("bdm-1.0, ", " MB", "https://huggingface.co/qihoo360/BDM1.0", "install.py get bdm-1.0")),
        ("pocket-iap", ("1.5 MB", "ships with Language Bridge", "install.py verify")),
        ("rouwei-gemma", ("https://", "by hand")),
        ("of-my-own", ("Ask for the file",)),
    ],
)
def test_what_is_missing_is_one_message_with_size_source_and_command(
    place: Path, wanted: str, expected: tuple[str, ...]
) -> None:
    put(place / "language_bridges" / "unlike.safetensors")
    kept = identity.Record(f"{wanted}.safetensors", wanted, "0123456789ab", PACK).to_json()
    for given in ("", kept):
        with pytest.raises(BridgeError) as caught:
            travel.resolve(f"{wanted}.safetensors", given)
        text = str(caught.value)
        assert f"{wanted}.safetensors" in text and "unlike.safetensors" in text
        assert all(part in text for part in expected), text
        assert (f"{wanted}#0123456789ab" in text) == bool(given)
        assert len(text.split("\n")) == 4 and str(place) not in text


def test_it_comes_before_any_checkpoint_is_loaded(place: Path) -> None:
    inputs: dict[str, Any] = {"bridge": "gone.safetensors", "strength": 1.0, "route": "two streams"}
    with pytest.raises(BridgeError, match="no bridge called"):
        LanguageBridge.check_lazy_status(**inputs, model=None, clip=None)
    for off in ({"strength": 0.0}, {"route": "english only"}):  # then none is needed
        assert LanguageBridge.check_lazy_status(**inputs | off, model=None, clip=None) == ["model", "clip"]
    put(place / "language_bridges" / "gone.safetensors")
    assert LanguageBridge.check_lazy_status(**inputs, model=None, clip=1, tower=None) == ["model", "tower"]
    assert LanguageBridge.check_lazy_status(**inputs, model=1, clip=1) == []


def test_the_hosts_own_list_check_leaves_the_name_to_us(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import execution

    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "LanguageBridge", LanguageBridge)
    graph: dict[str, Any] = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "any.safetensors"}},
        "2": {
            "class_type": "LanguageBridge",
            "inputs": {
                "model": ["1", 0],
                "clip": ["1", 1],
                "bridge": "gone.safetensors",
                "strength": 1.0,
                "route": "two streams",
            },
        },
    }

    def complaints(**changes: Any) -> list[dict[str, Any]]:
        changed = copy.deepcopy(graph)
        changed["2"]["inputs"] |= changes
        validated: dict[str, Any] = {"1": (True, [], "1")}
        return list(asyncio.run(execution.validate_inputs("id", changed, "2", validated))[1])

    assert complaints() == [] == complaints(identity="{}") == complaints(bridge="sub\\name.safetensors")
    assert [error["type"] for error in complaints(bridge=3)] == ["custom_validation_failed"]
    assert [error["type"] for error in complaints(route="no such")] == ["value_not_in_list"]  # as before


HOSTILE = [
    "../mine.safetensors",
    "..\\mine.safetensors",
    "/etc/mine.safetensors",
    "C:\\mine.safetensors",
    "C:mine.safetensors",
    "\\\\server\\share\\mine.safetensors",
    "//server/share/mine.safetensors",
    "sub/../../mine.safetensors",
    "./mine.safetensors",
    "https://example.org/mine.safetensors",
    "mine.safetensors\0",
    "mine\n.safetensors",
    "mine.safetensors:stream",
    ". ./mine.safetensors",
    "~/mine.safetensors",
    "",
    "x" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_path_leads_to_a_file_not_even_with_a_record_of_it(place: Path, name: str) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    kept = json.loads(record(path, "mine.safetensors")) | {"bridge": name.replace("\\", "/")}
    if name == "~/mine.safetensors":  # a folder of that name could be there: a name, and nothing is expanded
        assert travel.resolve(name, json.dumps(kept)).path == path
        return
    for given in ("", json.dumps(kept)):
        with pytest.raises(BridgeError, match="no bridge called") as caught:
            travel.resolve(name, given)
        assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"bridge": "mine.safetensors"}',
        '{"bridge": "mine.safetensors", "id": 3}',
        '{"bridge": "mine.safetensors", "id": "x", "hash": "short"}',
        '{"bridge": "mine.safetensors", "id": "x", "hash": "ABCDEF012345"}',
        '{"bridge": "mine.safetensors", "id": "a\\nb"}',
        "[" * 3000,
        "x" * 100_000,
        3,
        None,
        ["4", 0],
    ],
    ids=range(15),
)
def test_a_record_that_cannot_be_understood_is_none(place: Path, text: Any) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    assert travel.resolve("mine.safetensors", text).path == path
    assert identity.parse(text) is None


# -- fingerprint ---------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_content_and_not_the_name(place: Path) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    kept = record(path, path.name)
    before = LanguageBridge.fingerprint_inputs(bridge=path.name, identity=kept, strength=1.0)
    os.utime(path, ns=(1, 1))
    assert LanguageBridge.fingerprint_inputs(bridge=path.name, identity=kept) == before
    path.rename(path.with_name("other.safetensors"))
    assert LanguageBridge.fingerprint_inputs(bridge=path.name, identity=kept) == before
    put(path, seed=1)
    assert LanguageBridge.fingerprint_inputs(bridge=path.name) != before
    save_encoder(place / "text_encoders" / "tower.safetensors", tiny_tower(seed=5))
    assert LanguageBridge.fingerprint_inputs(bridge="other.safetensors") != before


def test_a_name_that_comes_over_a_link_is_followed_too(place: Path) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    before = LanguageBridge.fingerprint_inputs(bridge=None, identity="")
    put(path, seed=1, kind="mlp")
    assert LanguageBridge.fingerprint_inputs(bridge=None, identity="") != before


# -- what a picture carries ----------------------------------------------------------------------------------


def queued(name: str, kept: str | None = None, values: int = 3) -> dict[str, Any]:
    """The body of a request to /prompt, with one of our nodes outside and one inside of a subgraph."""
    node = {"type": "LanguageBridge", "widgets_values": [name, 1.0, "two streams"][:values]}
    if kept is not None:
        node["widgets_values"].append(kept)
    inner = {"nodes": [copy.deepcopy(node)]}
    inputs = {"bridge": name, "strength": 1.0} | ({} if kept is None else {"identity": kept})
    return {
        "prompt": {
            "4": {"class_type": "LanguageBridge", "inputs": inputs},
            "5": {"class_type": "SaveImage", "inputs": {"bridge": name}},
        },
        "extra_data": {
            "extra_pnginfo": {
                "workflow": {"nodes": [node, {"type": "Note"}], "definitions": {"subgraphs": [inner]}}
            }
        },
    }


def stamped(data: dict[str, Any]) -> list[str]:
    workflow = data["extra_data"]["extra_pnginfo"]["workflow"]
    graphs = [workflow, *workflow["definitions"]["subgraphs"]]
    return [
        data["prompt"]["4"]["inputs"]["identity"],
        *(graph["nodes"][0]["widgets_values"][3] for graph in graphs),
    ]


def test_every_form_of_a_queued_graph_gets_the_record(place: Path) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    for kept in (None, "", "nonsense", record(path, "other.safetensors")):
        data = queued("mine.safetensors", kept)
        assert travel.stamp(data, PACK) == []
        assert stamped(data) == [record(path, path.name)] * 3
        assert data["prompt"]["5"]["inputs"] == {"bridge": "mine.safetensors"}
    # one that is right stays as it is, also that of another version
    old = record(path, path.name).replace(PACK, "0.0.1")
    data = queued("mine.safetensors", old)
    assert travel.stamp(data, PACK) == [] and stamped(data) == [old] * 3


def test_a_name_that_an_outer_node_shows_travels_with_the_graph(place: Path) -> None:
    """A subgraph may show the bridge on its outside; then the name stands in no node of ours."""
    path = put(place / "language_bridges" / "mine.safetensors")
    put(place / "language_bridges" / "inner.safetensors", seed=1)
    data = queued("inner.safetensors")
    data["prompt"]["4"]["inputs"]["bridge"] = "mine.safetensors"
    assert travel.stamp(data, PACK) == []
    workflow = copy.deepcopy(data["extra_data"]["extra_pnginfo"]["workflow"])
    assert workflow["extra"] == {"language_bridge": {"mine.safetensors": record(path, path.name)}}

    moved = path.rename(path.with_name("moved.safetensors"))
    again = queued("inner.safetensors")
    again["prompt"]["4"]["inputs"] |= {"bridge": "mine.safetensors", "identity": stamped(data)[1]}
    again["extra_data"]["extra_pnginfo"]["workflow"] = workflow
    assert travel.stamp(again, PACK) == []
    assert travel.resolve("mine.safetensors", stamped(again)[0]).path == moved
    assert "extra" not in stamp_plain("inner.safetensors")  # not where a node says it


def stamp_plain(name: str) -> dict[str, Any]:
    data = queued(name)
    travel.stamp(data, PACK)
    workflow: dict[str, Any] = data["extra_data"]["extra_pnginfo"]["workflow"]
    return workflow


def test_a_picture_tells_what_made_it(place: Path) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    old = record(path, path.name)
    put(path, seed=1)
    data = queued("mine.safetensors", old)
    (said,) = travel.stamp(data, PACK)
    assert said.note is not None and stamped(data) == [record(path, path.name)] * 3 != [old] * 3
    assert travel.resolve("mine.safetensors", stamped(data)[0]).note is None  # said once


def test_the_record_of_what_is_missing_stays(place: Path) -> None:
    kept = identity.Record("gone.safetensors", "gone", "0123456789ab", PACK).to_json()
    data = queued("gone.safetensors", kept)
    assert travel.stamp(data, PACK) == [] and stamped(data) == [kept] * 3


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"prompt": []},
        {"prompt": {"1": 3, "2": {"class_type": "LanguageBridge"}}},
        {"prompt": {"1": {"class_type": "LanguageBridge", "inputs": {"bridge": ["2", 0]}}}},
        {"prompt": {"1": {"class_type": "LanguageBridge", "inputs": {"bridge": "x", "identity": ["2", 0]}}}},
        {"extra_data": None},
        {"extra_data": {"extra_pnginfo": []}},
        {"extra_data": {"extra_pnginfo": {"workflow": {"nodes": [None, {"type": "LanguageBridge"}]}}}},
        {"extra_data": {"extra_pnginfo": {"workflow": {"nodes": {}, "definitions": {"subgraphs": [3]}}}}},
        queued("mine.safetensors", values=2),
    ],
    ids=range(10),
)
def test_odd_graphs_are_left_to_the_host(place: Path, data: dict[str, Any]) -> None:
    data = copy.deepcopy(data)
    before = copy.deepcopy(data)
    assert travel.stamp(data, PACK) == []
    if "4" not in data.get("prompt", {}):
        assert data == before


def test_the_page_is_told(place: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The real server is asked in tests/nodes/test_travel.py; here, what it is given."""
    handlers: list[Callable[[Any], Any]] = []
    sent: list[tuple[str, Any, str]] = []
    server = types.SimpleNamespace(
        add_on_prompt_handler=handlers.append, send_sync=lambda *told: sent.append(told)
    )
    module = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", module)
    travel.watch(PACK)
    path = put(place / "language_bridges" / "mine.safetensors")
    old = record(path, path.name)
    put(path, seed=1)
    data = queued("mine.safetensors", old) | {"client_id": "me"}
    assert handlers[0](data) is data
    (event, told, client) = sent[0]
    assert event == travel.EVENT and client == "me" and len(told["notes"]) == 1
    assert told["records"] == {"mine.safetensors": record(path, path.name)}
    assert "mine.safetensors has another content" in caplog.text
    handlers[0]({"prompt": {}})
    assert len(sent) == 1


def test_the_list_for_the_page_reads_no_large_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(place / "language_bridges" / "mine.safetensors")
    assert travel.records(PACK) == {"mine.safetensors": record(path, path.name)}
    put(path, seed=1)
    monkeypatch.setattr(identity, "SMALL_BYTES", 10)
    assert travel.records(PACK) == {}
    shutil.copy(path, path.with_name("second.safetensors"))
    (place / "language_bridges" / "damaged.safetensors").write_bytes(b"x")
    assert travel.records(PACK) == {}
