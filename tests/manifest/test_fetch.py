"""Fetching sets: licence and trust come first, hashes are pinned or written down, changes are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from language_bridge.manifest import adopt, fetch, pin, sources
from language_bridge.manifest.connection import Wire
from language_bridge.manifest.errors import FetchError
from language_bridge.manifest.lock import Record, lock_path, read_lock
from language_bridge.manifest.schema import (
    DOWNLOADS,
    Conversion,
    Manifest,
    PublishedSet,
    RemoteFile,
    dump,
    parse,
)
from language_bridge.manifest.sources import Address
from language_bridge.tests.manifest.hub import COMMIT, Hub, LoopbackWire, Request, honest, running
from language_bridge.tests.manifest.test_download import QUICK

FILES = {
    "/who/what/resolve/main/model.bin": b"weights " * 5000,
    "/who/what/resolve/main/vocab.txt": b"\xe7\x8c\xab\n" * 700,
    "/who/tower/resolve/main/text/model.safetensors": b"tower " * 4000,
}


def digest(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()


WEIGHTS = RemoteFile("who/what", "main", "model.bin", sha256=digest("/who/what/resolve/main/model.bin"))
VOCABULARY = RemoteFile("who/what", "main", "vocab.txt", shown="2.8 kB")
TOWER = RemoteFile("who/tower", "main", "text/model.safetensors", to="text_encoders/t.safetensors")


def published(name: str, *files: RemoteFile, **more: Any) -> PublishedSet:
    base = PublishedSet(
        name=name,
        about=".",
        base="sd1",
        languages=("zh",),
        licence="MIT",
        licence_class="permissive",
        consent=False,
        gated=False,
        card="https://huggingface.co/who/what",
        needs=(),
        files=files,
        conversion=None,
        by_hand="",
    )
    return replace(base, **more)


BRIDGE = published(
    "bridge", WEIGHTS, VOCABULARY, needs=("tower",), conversion=Conversion("x", ("model.bin", "vocab.txt"))
)
MANIFEST = Manifest((), (BRIDGE, published("tower", TOWER, conversion=Conversion("t", ("text",)))))


def a_hub(request: Request) -> None:
    """Serves FILES as the Hub does: large ones with their SHA-256, small ones with git's hash."""
    body = FILES.get(request.path)
    if body is None:
        request.reply(404)
        return
    if "vocab" in request.path:
        etag = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
        honest(body, f'"{etag}"', X_Repo_Commit=COMMIT)(request)
        return
    sha = hashlib.sha256(body).hexdigest()
    told = {"X_Linked_Etag": f'"{sha}"', "X_Linked_Size": str(len(body)), "X_Repo_Commit": COMMIT}
    honest(body, f'"{sha}"', **told)(request)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub of this test, and a mirror that nobody answers for."""
    with running(a_hub) as started:
        monkeypatch.setattr(sources, "HUB", started.url("").rstrip("/"))
        yield started


def get(
    models: Path, hub: Hub, name: str = "bridge", manifest: Manifest = MANIFEST, **more: Any
) -> fetch.Haul:
    options: dict[str, Any] = {"wire": LoopbackWire({hub.host}), "pace": QUICK, "environ": {}} | more
    return fetch.fetch_set(manifest, name, models, **options)


def test_a_set_comes_with_what_it_needs_each_file_in_its_place(tmp_path: Path, hub: Hub) -> None:
    lines: list[str] = []
    haul = get(tmp_path, hub, say=lines.append)
    assert [item.name for item in haul.sets] == ["bridge", "tower"]
    folder = tmp_path / DOWNLOADS / "who--what"
    assert (folder / "model.bin").read_bytes() == FILES["/who/what/resolve/main/model.bin"]
    assert (tmp_path / "text_encoders" / "t.safetensors").is_file()
    assert [file.path for file in haul.unverified] == ["vocab.txt", "text/model.safetensors"]
    assert "verified" in lines[0] and "NOT" not in lines[0]
    assert "NOT verified: trusted on first use (SHA" in lines[1]
    assert "NOT verified: trusted on first use, as its source told it" in lines[2]
    assert fetch.given_to_converter(BRIDGE, haul.sets, tmp_path) == [
        folder / "model.bin",
        folder / "vocab.txt",
        tmp_path / DOWNLOADS / "who--tower" / "text",
    ]
    asked = len(hub.log)
    get(tmp_path, hub)
    assert len(hub.log) == asked, "nothing is fetched twice"


def test_the_lock_file_remembers_and_a_change_is_refused(tmp_path: Path, hub: Hub) -> None:
    get(tmp_path, hub)
    known = read_lock(tmp_path).files[VOCABULARY.place]
    assert known == Record(
        VOCABULARY.key, 2800, digest("/who/what/resolve/main/vocab.txt"), "hub", False, False
    )
    target = tmp_path / VOCABULARY.place
    target.unlink()
    hub.behave = lambda request: request.reply(200, b"\xe7\x8b\x97\n" * 700, ETag='"x"')
    with pytest.raises(FetchError, match="SHA-256"):
        get(tmp_path, hub)
    assert not target.exists()
    hub.behave = a_hub
    lines: list[str] = []
    get(tmp_path, hub, say=lines.append)
    assert any("the same as when it was first fetched" in line for line in lines)


def test_a_file_put_there_by_hand_is_taken_and_said_to_be_unverified(tmp_path: Path, hub: Hub) -> None:
    target = tmp_path / VOCABULARY.place
    target.parent.mkdir(parents=True)
    target.write_bytes(FILES["/who/what/resolve/main/vocab.txt"])
    lines: list[str] = []
    get(tmp_path, hub, say=lines.append)
    assert "from was there, NOT verified" in lines[1]
    assert "/who/what/resolve/main/vocab.txt" not in [request.path for request in hub.log]


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_of_known_hash_is_found_under_any_name(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    def refuse(*given: object) -> None:
        raise OSError("another disk")

    content = FILES["/who/what/resolve/main/model.bin"]
    there = tmp_path / "\u6211\u7684 files" / "model (1).bin.crdownload"
    there.parent.mkdir()
    (there.parent / "same size").write_bytes(b"?" * len(content))
    there.write_bytes(content)
    if not linked:
        monkeypatch.setattr(adopt.os, "link", refuse)
    models = tmp_path / "models"
    lines: list[str] = []
    get(models, hub, look=[tmp_path / "nothing", there.parent], say=lines.append)
    assert (models / WEIGHTS.place).read_bytes() == content == there.read_bytes()
    assert (models / WEIGHTS.place).samefile(there) == linked
    assert "model (1).bin.crdownload', which lay there, verified" in lines[0]
    assert "/who/what/resolve/main/model.bin" not in [request.path for request in hub.log]
    assert not list(models.rglob("*.part*"))


def test_a_file_of_unknown_hash_or_another_content_is_not_adopted(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "vocab.txt").write_bytes(FILES["/who/what/resolve/main/vocab.txt"])
    (tmp_path / "model.bin").write_bytes(b"?" * len(FILES["/who/what/resolve/main/model.bin"]))
    get(tmp_path / "models", hub, look=[tmp_path])
    assert len(hub.log) == 3


def test_a_file_without_a_hash_does_not_come_from_a_source_that_was_not_chosen(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(a_hub) as mirror:
        monkeypatch.setattr(sources, "mirror", lambda environ=None: mirror.url("").rstrip("/"))
        hub.behave = lambda request: request.reply(503)
        wire = LoopbackWire({hub.host, mirror.host})
        with pytest.raises(FetchError, match=r"vocab.txt could not be fetched") as error:
            get(tmp_path, hub, wire=wire)
        assert "LANGUAGE_BRIDGE_SOURCES" in error.value.action
        assert [request.path[-9:] for request in mirror.log] == ["model.bin"], "only the one with a hash"
        get(tmp_path, hub, wire=wire, environ={"LANGUAGE_BRIDGE_SOURCES": "mirror"})
        assert read_lock(tmp_path).files[VOCABULARY.place].source == "mirror"


def test_a_licence_that_asks_for_consent_comes_first(tmp_path: Path, hub: Hub) -> None:
    asking = published("tower", TOWER, licence="", licence_class="undeclared", consent=True)
    manifest = replace(MANIFEST, published=(BRIDGE, asking))
    with pytest.raises(FetchError, match="licence has to be read") as error:
        get(tmp_path, hub, manifest=manifest)
    assert "tower: no licence declared, https://huggingface.co/who/what" in error.value.found
    assert not hub.log and not list(tmp_path.iterdir())
    get(tmp_path, hub, manifest=manifest, agreed=True)


def test_a_pickle_of_unknown_hash_needs_a_word_of_trust_once(tmp_path: Path, hub: Hub) -> None:
    unknown = replace(WEIGHTS, sha256="")
    manifest = Manifest((), (published("bridge", unknown),))
    with pytest.raises(FetchError, match="--trust-first-use"):
        get(tmp_path, hub, manifest=manifest)
    assert not hub.log
    get(tmp_path, hub, manifest=manifest, trusting=True)
    (tmp_path / unknown.place).unlink()
    get(tmp_path, hub, manifest=manifest)


def test_a_token_is_sent_for_gated_sets_alone(tmp_path: Path, hub: Hub) -> None:
    environ = {"HF_TOKEN": "hf_secret"}
    gated = published("tower", TOWER, gated=True)
    get(tmp_path, hub, manifest=replace(MANIFEST, published=(BRIDGE, gated)), environ=environ)
    sent = {request.path: request.headers.get("authorization") for request in hub.log}
    assert sent.pop("/who/tower/resolve/main/text/model.safetensors") == "Bearer hf_secret"
    assert set(sent.values()) == {None}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not [path for path in written if b"hf_secret" in path.read_bytes()]


def test_what_has_to_be_fetched_by_hand_is_said(tmp_path: Path, hub: Hub) -> None:
    hand = published("tower", by_hand="Its files are not known. Fetch them.")
    with pytest.raises(FetchError, match="Its files are not known"):
        get(tmp_path, hub, "tower", manifest=Manifest((), (hand,)))
    with pytest.raises(FetchError, match="one of bridge, tower"):
        get(tmp_path, hub, "other")
    haul = get(tmp_path, hub, manifest=replace(MANIFEST, published=(BRIDGE, hand)))
    assert [item.name for item in haul.sets] == ["bridge"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 2, "files": {}, "made": {}}',
        '{"format": 1, "files": {"x": {}}, "made": {}}',
        '{"format": 1, "files": {}, "made": {"x": 1}}',
        '{"format": 1, "files": [], "made": {}}',
        '{"format": 1, "files": {"x": {"key": "", "bytes": "1", "sha256": "", "source": "", "pinned": true, '
        '"told": true}}, "made": {}}',
    ],
)
def test_a_damaged_lock_file_trusts_nothing(tmp_path: Path, hub: Hub, text: str) -> None:
    lock_path(tmp_path).parent.mkdir()
    lock_path(tmp_path).write_text(text, encoding="utf-8")
    with pytest.raises(FetchError, match="lock file is damaged"):
        get(tmp_path, hub)
    assert not hub.log


def test_what_the_shipped_manifest_hands_to_the_converter_lies_where_the_files_are(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "weights_manifest.json").read_text(encoding="utf-8")
    manifest = parse(text)
    for item in manifest.published:
        models = tmp_path / item.name
        sets = manifest.with_needs(item)
        for file in (file for one in sets for file in one.files):
            (models / file.place).parent.mkdir(parents=True, exist_ok=True)
            (models / file.place).write_bytes(b"x")
        given = fetch.given_to_converter(item, sets, models)
        assert all(path.exists() for path in given), item.name
        assert len(given) >= len(item.conversion.give if item.conversion else ())


def test_problems_of_a_set(tmp_path: Path, hub: Hub) -> None:
    def wrong() -> dict[str, str]:
        return {problem.path: problem.found for problem in fetch.set_problems(MANIFEST, "bridge", tmp_path)}

    assert set(wrong().values()) == {"nothing"} and len(wrong()) == 3
    get(tmp_path, hub)
    assert wrong() == {}
    (tmp_path / WEIGHTS.place).write_bytes(b"x")
    (tmp_path / VOCABULARY.place).write_bytes(FILES["/who/what/resolve/main/vocab.txt"][:-1] + b"x")
    assert set(wrong()) == {WEIGHTS.place, VOCABULARY.place}
    made = tmp_path / "language_bridges" / "bridge.safetensors"
    made.parent.mkdir()
    made.write_bytes(b"made")
    fetch.record_made(tmp_path, "bridge", [made])
    (tmp_path / WEIGHTS.place).unlink()
    assert set(wrong()) == {VOCABULARY.place}, "gone is well once it is converted, changed is not"
    made.write_bytes(b"mode")
    assert set(wrong()) == {"language_bridges/bridge.safetensors", WEIGHTS.place, VOCABULARY.place}


def test_a_file_that_nobody_fetched_and_nobody_knows_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / VOCABULARY.place).parent.mkdir(parents=True)
    (tmp_path / VOCABULARY.place).write_bytes(b"?")
    problem = fetch.file_problem(VOCABULARY, read_lock(tmp_path), tmp_path)
    assert problem is not None and "no known hash" in problem.found


# -- pinning --------------------------------------------------------------------------------------------


def pinned(hub: Hub, manifest: Manifest = MANIFEST, name: str = "", wire: Wire | None = None) -> pin.Pinned:
    def at(file: RemoteFile) -> Address:
        return Address("hub", hub.url(f"/{file.repo}/resolve/{file.revision}/{file.path}"))

    return pin.pin(manifest, wire or LoopbackWire({hub.host}), name, hub=at)


def test_pinning_fills_what_is_not_known(hub: Hub) -> None:
    found = pinned(hub)
    assert not found.contradicted
    files = {file.path: file for item in found.manifest.published for file in item.files}
    for path, file in files.items():
        name = f"/{file.repo}/resolve/main/{path}"
        assert (file.revision, file.bytes, file.shown) == (COMMIT, len(FILES[name]), "")
        assert file.sha256 == digest(name)
    assert parse(dump(found.manifest)) == found.manifest
    methods = {(request.method, request.path[-9:]) for request in hub.log}
    assert ("GET", "model.bin") not in methods, "large files are not fetched for that"


def test_pinning_one_set_leaves_the_others_alone(hub: Hub) -> None:
    found = pinned(hub, name="tower")
    assert found.manifest.published[0] == BRIDGE
    assert found.manifest.published[1].files[0].revision == COMMIT
    with pytest.raises(FetchError):
        pinned(hub, name="other")


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"shown": "9.1 MB", "sha256": ""}])
def test_what_the_hub_contradicts_is_said_and_stays(hub: Hub, wrong: dict[str, Any]) -> None:
    manifest = Manifest((), (published("bridge", replace(WEIGHTS, **wrong)),))
    found = pinned(hub, manifest)
    assert found.contradicted and "CONTRADICTED" in found.lines[0]
    assert found.manifest == manifest


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"x"', "X_Repo_Commit": COMMIT},
        {"ETag": '"' + "0" * 64 + '"'},
        {"ETag": '"' + "0" * 40 + '"', "X_Repo_Commit": COMMIT},
        {"ETag": '"' + "0" * 64 + '"', "X_Repo_Commit": "main"},
    ],
)
def test_metadata_that_say_too_little_or_lie_change_nothing(hub: Hub, headers: dict[str, str]) -> None:
    hub.behave = lambda request: request.reply(200, b"abc", **headers)
    found = pinned(hub)
    assert found.manifest == MANIFEST and len(found.lines) == 3
    hub.behave = lambda request: request.reply(404)
    assert pinned(hub).manifest == MANIFEST


def test_the_hub_itself_is_asked_and_never_a_mirror() -> None:
    assert pin._at_hub(WEIGHTS).url.startswith("https://huggingface.co/")
    assert json.loads(dump(MANIFEST))["format"] == 2
