"""The downloads node: lists, asks for consent, fetches, converts, stops; here and in a real server."""

from __future__ import annotations

import ast
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import pytest

from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import read_header
from language_bridge.conversion import convert as converter
from language_bridge.harness.environment import CHECKOUT
from language_bridge.harness.server import PromptError, shipped_files
from language_bridge.host import folders, page
from language_bridge.manifest import bring, fetch, sources
from language_bridge.manifest.errors import FetchError
from language_bridge.manifest.lock import read_lock
from language_bridge.manifest.schema import DOWNLOADS, Manifest
from language_bridge.nodes import downloads as node
from language_bridge.nodes.downloads import Downloads
from language_bridge.tests.fixtures.far import DEFAULTS, TOKEN, Far
from language_bridge.tests.fixtures.offers import CARD, dripping, offered, pea_p2
from language_bridge.tests.manifest.hub import Hub, LoopbackWire, honest, running


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return pea_p2(tmp_path_factory.mktemp("pea") / "x.bin").read_bytes()


@dataclass
class Desk:
    """What a test of the node needs: its hub, manifest and models folder."""

    hub: Hub
    manifest: Manifest
    models: Path

    def run(self, **changes: Any) -> str:
        return str(Downloads.execute(**(DEFAULTS | changes)).args[0])

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.models.rglob("*") if path.is_file())


@pytest.fixture
def desk(tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    models = tmp_path / "\u6a21\u578b und models"
    for name in ("LANGUAGE_BRIDGE_SOURCES", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    manifest = offered(body)
    with running(honest(body)) as hub:
        monkeypatch.setattr(sources, "HUB", hub.url("").rstrip("/"))
        monkeypatch.setattr(fetch, "allowed_wire", lambda environ: LoopbackWire({hub.host}))
        monkeypatch.setattr(folder_paths, "models_dir", str(models))
        known = dict(folder_paths.folder_names_and_paths)
        for name in bring.LOOKED_AT:
            known[name] = ([str(models / name)], {".safetensors"})
        monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        monkeypatch.setattr(node, "read_manifest", lambda: manifest)
        yield Desk(hub, manifest, models)


def test_the_list_says_the_state_of_every_set_and_asks_nobody(desk: Desk) -> None:
    said = desk.run(action="list")
    assert "0 here, 3 to be fetched, 1 by hand" in said
    assert [line.split()[1] for line in said.splitlines()[3:]] == ["mine", "asking", "tower", "paged"]
    assert "Wonder Licence 1.0" in said and "hub, mirror, modelscope" in said
    assert not desk.hub.log and not desk.models.exists()
    desk.run()
    assert "1 here, 2 to be fetched, 1 by hand" in desk.run(action="list")
    assert "\u5df2\u6709 1 \u5957" in desk.run(action="list", language="Chinese")


def test_a_set_is_fetched_checked_and_converted_once(desk: Desk, body: bytes) -> None:
    said = desk.run()
    bridge = desk.models / "language_bridges" / "mine.safetensors"
    header = read_header(bridge)
    assert header is not None and header.name == "mine"
    assert "mine is fetched and checked" in said and "Not fetched: tower. Fetch it from its page." in said
    assert str(desk.models) not in said and "not needed any longer" in said
    pickle = desk.models / DOWNLOADS / "who--pea" / "pytorch_model.bin"
    assert pickle.read_bytes() == body
    pickle.unlink()
    asked = len(desk.hub.log)
    assert "here already" in desk.run() and len(desk.hub.log) == asked
    assert "as the manifest and the lock file say" in desk.run(action="verify")


def test_what_was_fetched_can_be_deleted_once_it_is_converted(desk: Desk) -> None:
    assert "is deleted" in desk.run(clean=True)
    assert desk.files == ["lock.json", "mine.safetensors"]


def test_a_bridge_that_came_another_way_counts_as_here_whatever_its_name(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.run(set="paged", precision="float16")
    place = tmp_path / "shared" / "\u6865.safetensors"
    place.parent.mkdir()
    (desk.models / "language_bridges" / "paged.safetensors").rename(place)
    (desk.models / DOWNLOADS / "lock.json").unlink()
    shared = ([str(place.parent)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "language_bridges", shared)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    said = desk.run(action="list").splitlines()
    assert "here, a file of your own" in said[6] and said[6].startswith("+ paged")
    assert node.facts_of(desk.manifest)[3]["state"] == "own"


def test_verify_names_the_damaged_file(desk: Desk) -> None:
    desk.run()
    bridge = desk.models / "language_bridges" / "mine.safetensors"
    bridge.write_bytes(bridge.read_bytes()[:-1] + b"?")
    said = desk.run(action="verify")
    assert "language_bridges/mine.safetensors: found SHA-256" in said and str(desk.models) not in said
    assert "\u600e\u4e48\u529e" in desk.run(action="verify", language="Chinese")


def test_the_command_and_the_node_convert_through_one_function(
    desk: Desk, body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from language_bridge import install

    desk.run()
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)
    given = ["mine", "--models", str(tmp_path / "other")]
    assert install.get(given, manifest=desk.manifest, wire=LoopbackWire({desk.hub.host})) == 0
    made = read_lock(desk.models).made["mine"]
    assert made == read_lock(tmp_path / "other").made["mine"], "the same bytes"


@pytest.mark.parametrize("language", ["English", "Chinese"])
def test_without_consent_nothing_is_asked_and_the_licence_is_named(desk: Desk, language: str) -> None:
    with pytest.raises(FetchError) as refused:
        desk.run(set="asking", language=language)
    assert refused.value.found == f"asking: Wonder Licence 1.0, {CARD}"
    assert refused.value.expected == "your consent" and "the box of the node" in refused.value.action
    with pytest.raises(FetchError, match="hash of a pickle is not known"):
        desk.run(set="asking", agree=True)
    with pytest.raises(FetchError, match="licence has to be read"):
        desk.run(set="asking", agree="true", trust_first_use=True)
    assert not desk.hub.log and desk.files == []
    said = desk.run(set="asking", agree=True, trust_first_use=True)
    assert "NOT verified, trusted on first use" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"set": "other"},
        {"set": "../mine"},
        {"set": "https://example.org/x"},
        {"set": "tower"},
        {"action": "delete"},
        {"sources": "http://127.0.0.1"},
        {"sources": "modelscope"},
        {"reference": "../../etc/passwd"},
        {"precision": "float64"},
    ],
    ids=str,
)
def test_what_is_not_in_a_list_is_refused(desk: Desk, changes: dict[str, Any]) -> None:
    with pytest.raises((FetchError, BridgeError)) as refused:
        desk.run(**changes)
    assert "what to do:" in str(refused.value)
    assert not desk.hub.log and desk.files == []


def test_no_error_tells_where_the_models_folder_is(desk: Desk) -> None:
    place = desk.models / DOWNLOADS / "who--pea" / "pytorch_model.bin"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"another")
    with pytest.raises(FetchError) as refused:
        desk.run()
    assert "who--pea" in str(refused.value) and str(desk.models) not in str(refused.value)
    (desk.models / DOWNLOADS / "lock.json").write_text("{", encoding="utf-8")
    with pytest.raises(FetchError) as damaged:
        desk.run(action="list")
    assert "lock.json" in str(damaged.value) and str(desk.models.parent) not in str(damaged.value)


def stop_while(act: Callable[[], object], begun: Callable[[], bool]) -> tuple[BaseException, float]:
    """Interrupt `act` as the page does once it has begun; how it ended, and seconds from one to the other."""
    ended: list[tuple[BaseException, float]] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            ended.append((error, time.monotonic()))

    thread = threading.Thread(target=run)
    thread.start()
    while not begun():
        time.sleep(0.01)
        assert thread.is_alive()
    start = time.monotonic()
    management.interrupt_current_processing(True)
    thread.join(30)
    return ended[0][0], ended[0][1] - start


def test_stopping_a_download_takes_less_than_a_second_and_keeps_what_came(desk: Desk, body: bytes) -> None:
    desk.hub.behave = dripping(body)
    part = desk.models / DOWNLOADS / "who--pea" / "pytorch_model.bin.part"
    error, seconds = stop_while(desk.run, lambda: part.is_file() and part.stat().st_size > 0)
    assert isinstance(error, management.InterruptProcessingException) and seconds < 1
    assert not management.processing_interrupted(), "the next run is not stopped"
    assert desk.files == ["pytorch_model.bin.part", "pytorch_model.bin.part.json"]
    desk.hub.behave = honest(body, '"slow"')
    desk.run()
    assert desk.hub.log[-1].start, "it went on where it was"


def test_stopping_a_conversion_takes_less_than_a_second_and_writes_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    build = converter._build_bridge

    def slow(*given: Any) -> Any:
        begun.set()
        assert goes_on.wait(20)
        return build(*given)

    monkeypatch.setattr(converter, "_build_bridge", slow)
    error, seconds = stop_while(desk.run, begun.is_set)
    assert isinstance(error, management.InterruptProcessingException) and seconds < 1
    goes_on.set()
    with bring._CONVERTING:  # the thread has ended
        assert desk.files == ["lock.json", "pytorch_model.bin"]
    asked = len(desk.hub.log)
    desk.run()
    assert desk.files == ["lock.json", "mine.safetensors", "pytorch_model.bin"]
    assert len(desk.hub.log) == asked, "nothing is fetched again"


def test_the_order_of_sources_is_the_environments_then_the_nodes_then_the_pages(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, str] = {}
    monkeypatch.setattr(page, "chosen", lambda name: chosen.get(name, ""))

    def found(order: str = node.AS_SET) -> tuple[str, str]:
        environ, why = node.environment(order)
        return ",".join(sources.order(environ)), why

    assert found() == ("hub,mirror,modelscope", "default")
    chosen[node.SETTING] = node.USUAL
    assert found() == ("hub,mirror,modelscope", "default")
    chosen[node.SETTING] = "mirror,modelscope"
    assert found() == ("mirror,modelscope", "page")
    assert "mirror, modelscope (set on the page)" in desk.run(action="list")
    assert found("hub") == ("hub", "node")
    monkeypatch.setenv("LANGUAGE_BRIDGE_SOURCES", "modelscope")
    assert found("hub") == ("modelscope", "environment")
    monkeypatch.delenv("LANGUAGE_BRIDGE_SOURCES")
    chosen[node.SETTING] = "ftp://example.org"
    with pytest.raises(BridgeError, match="not in the list"):
        found()


def test_what_the_page_is_told_holds_no_path_and_survives_a_damaged_lock(desk: Desk) -> None:
    desk.run()
    (desk.models / DOWNLOADS / "lock.json").write_text("{", encoding="utf-8")
    told = node.facts_of(desk.manifest)
    assert [item["state"] for item in told] == ["own", "fetchable", "by hand", "fetchable"]
    assert str(desk.models) not in json.dumps(told, ensure_ascii=False)
    assert told[1]["asks"] == [{"name": "asking", "licence": "Wonder Licence 1.0", "card": CARD}]
    assert [item["trust"] for item in told] == [False, True, False, False]


def test_a_damaged_manifest_does_not_keep_the_pack_from_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.register()
    monkeypatch.setattr(node, "PACK", tmp_path)
    assert node.read_manifest() == Manifest(())
    (tmp_path / "weights_manifest.json").write_text("{", encoding="utf-8")
    assert node.read_manifest() == Manifest(())
    assert Downloads.define_schema().inputs[0].options == []


# -- in the real server, over real TLS -----------------------------------------------------------------


def test_the_server_lists_refuses_fetches_and_verifies(far: Far) -> None:
    known = far.server.ask("/object_info/LanguageBridgeDownloads")["LanguageBridgeDownloads"]
    options, facts = known["input"]["required"]["set"][0], known["input"]["required"]["set"][1]
    assert (options if options != "COMBO" else facts["options"]) == ["mine", "asking", "tower", "paged"]
    assert [item["state"] for item in facts[node.FACTS]][:3] == ["fetchable", "fetchable", "by hand"]
    asked = len(far.hub.log)
    assert "to be fetched" in far.run(action="list")
    with pytest.raises(PromptError) as refused:
        far.run(set="asking")
    assert "Wonder Licence 1.0" in str(refused.value) and len(far.hub.log) == asked
    with pytest.raises(PromptError):
        far.run(set="../../x")
    said = far.run()
    assert "mine is fetched and checked" in said and str(far.server.base) not in said
    assert read_header(far.server.base / "models" / "language_bridges" / "mine.safetensors") is not None
    assert "as the manifest and the lock file say" in far.run(action="verify")
    bridges = far.server.ask("/object_info/LanguageBridge")["LanguageBridge"]["input"]["required"]["bridge"]
    assert "mine.safetensors" in json.dumps(bridges)
    logged = far.server.log.read_text(encoding="utf-8")
    assert TOKEN not in logged + json.dumps(far.server.ask("/history"))
    assert not [request for request in far.hub.log if "authorization" in request.headers]


def test_the_page_stops_a_download_in_the_server_within_a_second(far: Far) -> None:
    far.hub.behave = dripping(far.body)
    asked = {"set": "asking", "agree": True, "trust_first_use": True}
    count = len(far.hub.log)
    identity = far.server.ask("/prompt", {"prompt": far.queue(**asked)})["prompt_id"]
    while len(far.hub.log) == count:
        time.sleep(0.02)
    time.sleep(0.3)
    start = time.monotonic()
    far.server.ask("/interrupt", {"prompt_id": identity})
    while not (entry := far.server.ask(f"/history/{identity}")):
        time.sleep(0.02)
    seconds = time.monotonic() - start
    kinds = [kind for kind, _ in entry[identity]["status"]["messages"]]
    assert "execution_interrupted" in kinds and seconds < 1
    far.hub.behave = honest(far.body, '"slow"')
    assert "asking is fetched and checked" in far.run(**asked)
    assert far.hub.log[-1].start


def test_no_route_of_the_pack_starts_a_download() -> None:
    """The page queues the nodes: the server checks origin and choices as for every graph. The one route ends
    a training, and its module reaches nothing of the downloader.
    """
    words = ("routes", "add_route", "add_get", "add_post", "add_static", "add_resource")
    for path in shipped_files():
        if path.suffix == ".py" and path.as_posix() != "nodes/finish.py":
            tree = ast.parse((CHECKOUT / path).read_text(encoding="utf-8"))
            names = {one.attr for one in ast.walk(tree) if isinstance(one, ast.Attribute)}
            assert not names & {*words}, path
