"""A workflow travels from one ComfyUI to another and gives the same picture; nothing secret travels along."""

from __future__ import annotations

import copy
import io
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from language_bridge.encoders import guard
from language_bridge.harness.server import Server
from language_bridge.tests.fixtures.travel import (
    failure,
    finished,
    leaks,
    listening,
    metadata,
    own_bridge,
    queue,
    saved_workflow,
)

if TYPE_CHECKING:
    from language_bridge.harness.environment import Environment

HERE = "sub/\u539f\u7248.safetensors"
THERE = ("\u6211\u7684 \u6a21\u578b", "\u522b\u7684 \u540d\u5b57.safetensors")
TOKEN = f"hf_{uuid.uuid4().hex}"
PASSWORD = f"pw{uuid.uuid4().hex}"
SECRETS = (TOKEN, f"reader:{PASSWORD}", PASSWORD)


@pytest.fixture(scope="module")
def elsewhere(environment: Environment) -> Iterator[Server]:
    """Another machine: a ComfyUI with folders of its own, a token, and secrets in all settings of sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
        patch.setenv("HF_ENDPOINT", f"https://reader:{PASSWORD}@mirror.example")
        patch.setenv("HTTPS_PROXY", f"http://reader:{PASSWORD}@127.0.0.1:9")
        patch.setenv("LANGUAGE_BRIDGE_HOSTS", f"reader:{PASSWORD}@cdn.example")
        with Server(environment, lambda text: None) as running:
            yield running


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)))


def test_a_saved_picture_gives_the_same_picture_on_another_machine(server: Server, elsewhere: Server) -> None:
    """Every file has another name and folder there; the graph is what the PNG carries, in both its forms."""
    first = own_bridge(server.base / "models" / "language_bridges" / HERE, "travels")
    there = elsewhere.base.joinpath("models", "language_bridges", *THERE)
    there.parent.mkdir(parents=True)
    there.write_bytes(first.read_bytes())
    (picture,) = server.pictures(queue(server, saved_workflow(HERE)))
    told = metadata(picture)

    windows = copy.deepcopy(told["prompt"])
    for node in windows.values():
        if node["class_type"] == "LanguageBridge":
            assert node["inputs"]["bridge"] == HERE
            node["inputs"]["bridge"] = HERE.replace("/", "\\")
    runs = {
        "as the page saved it": queue(elsewhere, told["workflow"]),
        "as programs send it": finished(
            elsewhere, elsewhere.ask("/prompt", {"prompt": told["prompt"]})["prompt_id"]
        ),
        "saved on Windows": finished(elsewhere, elsewhere.ask("/prompt", {"prompt": windows})["prompt_id"]),
    }
    for form, entry in runs.items():
        (again,) = elsewhere.pictures(entry)
        assert np.array_equal(pixels(again), pixels(picture)), form
    said = [line for line in _ours(elsewhere) if "Language Bridge: " in line]
    assert said and all("is called" in line for line in said)  # the same content: nothing more has to be said

    there.unlink()
    error = failure(queue(elsewhere, told["workflow"]))
    assert "no bridge called" in error["exception_message"] and "travels#" in error["exception_message"]
    without = saved_workflow(HERE)
    first.unlink()
    assert "Ask for the file" in failure(queue(elsewhere, without))["exception_message"]


def _ours(server: Server) -> list[str]:
    lines = server.log.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "Language Bridge" in line]


def everything(server: Server, entry: dict[str, Any], frames: list[bytes]) -> dict[str, bytes]:
    """All that leaves a machine or is kept of a run, by where it is."""
    found = {f"picture {number}": picture for number, picture in enumerate(server.pictures(entry))}
    for name, picture in list(found.items()):
        found[f"{name}, its text"] = json.dumps(metadata(picture)).encode()
    for path in ("/history", "/object_info", "/queue", "/api/jobs", "/internal/logs", "/system_stats"):
        try:
            found[path] = server.download(path)
        except OSError:  # a host without that page
            assert path not in ("/history", "/object_info")
    found["websocket"] = b"\n".join(frames)
    found["log"] = server.log.read_bytes()
    for path in (server.base / "user").rglob("*"):
        if path.is_file():
            found[str(path.relative_to(server.base))] = path.read_bytes()
    for path in (server.base / "models").rglob("*.safetensors"):
        found[path.name] = "".join(guard.read_layout(path).metadata.values()).encode("utf-8")
    return found


def test_no_secret_and_no_path_of_the_machine_is_in_what_is_saved_or_sent(elsewhere: Server) -> None:
    bridges = elsewhere.base / "models" / "language_bridges"
    own_bridge(bridges / "mine.safetensors", "mine")
    client = uuid.uuid4().hex
    with listening(elsewhere, client) as frames:
        entry = queue(elsewhere, saved_workflow("mine.safetensors"), client)
    assert entry["status"]["status_str"] == "success"
    places = everything(elsewhere, entry, frames)
    assert {"picture 0", "/history", "/object_info", "log", "mine.safetensors"} <= set(places)
    assert len(places["websocket"]) > 1000 and len(places["log"]) > 1000
    assert leaks(places, SECRETS) == []
    # The host itself names its folders in its log, in its own pages of facts, and behind an error.
    paths = [str(elsewhere.base), str(elsewhere.environment.root), str(Path.home())]
    kept = {name: data for name, data in places.items() if name.startswith(("picture", "mine"))}
    kept |= {"history of the run": json.dumps(entry).encode(), "websocket": places["websocket"]}
    assert leaks(kept, paths) == []
    assert leaks({"our lines of the log": "\n".join(_ours(elsewhere)).encode()}, paths) == []
    about_us = elsewhere.ask("/object_info")
    ours = {
        name: json.dumps(facts).encode()
        for name, facts in about_us.items()
        if name.startswith("LanguageBridge")
    }
    assert ours and leaks(ours, paths) == []


@pytest.mark.parametrize("kind", ["LanguageBridgeDoctor", "LanguageBridgeDownloads"])
def test_the_nodes_that_read_the_settings_of_sources_say_no_secret(elsewhere: Server, kind: str) -> None:
    """They find settings that cannot be used, with a password in an address, and must not repeat them."""
    facts = elsewhere.ask(f"/object_info/{kind}")[kind]["input"]
    inputs = {
        name: told.get("default", (told.get("options") or [""])[0])
        for name, (_, told) in {**facts["required"], **facts.get("optional", {})}.items()
    }
    if "hosts" in inputs:
        inputs["hosts"] = True  # nothing answers behind a proxy that is not there
    client = uuid.uuid4().hex
    with listening(elsewhere, client) as frames:
        body = {"prompt": {"1": {"class_type": kind, "inputs": inputs}}, "client_id": client}
        entry = finished(elsewhere, elsewhere.ask("/prompt", body)["prompt_id"])
    assert entry["outputs"]["1"]["text"]
    assert leaks(everything(elsewhere, entry, frames), SECRETS) == []


def test_the_search_for_secrets_finds_one_wherever_it_stands(elsewhere: Server) -> None:
    """The control: a graph and a file that do hold a secret and a path are found in every place."""
    bridges = elsewhere.base / "models" / "language_bridges"
    secret, path = f"control{uuid.uuid4().hex}", str(elsewhere.base)
    own_bridge(bridges / f"{secret}.safetensors", f"{secret} {path}")
    client = uuid.uuid4().hex
    workflow = saved_workflow(f"{secret}.safetensors")
    for node in workflow["nodes"]:
        if node["type"] == "CLIPTextEncode":
            node["widgets_values"][0] = f"{secret} {path}"
    with listening(elsewhere, client) as frames:
        entry = queue(elsewhere, workflow, client)
        failure(queue(elsewhere, saved_workflow(f"no-{secret}.safetensors"), client))
    places = everything(elsewhere, entry, frames)
    found = {place for place, data in places.items() if leaks({place: data}, [secret])}
    assert {"picture 0", "picture 0, its text", "/history", "/object_info", "websocket", "log"} <= found
    assert f"{secret}.safetensors" in found
    shown = {place for place, data in places.items() if leaks({place: data}, [path])}
    assert {"picture 0", "/history", f"{secret}.safetensors"} <= shown
    (bridges / f"{secret}.safetensors").unlink()
