"""The ledger recalls the very file that was verified, no other, and whatever befalls it is never an error."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from language_bridge.encoders.ledger import (
    CHECKS,
    FORMAT,
    LARGEST_BYTES,
    MOST_ENTRIES,
    REST_NS,
    Facts,
    Ledger,
)

FACTS = Facts("/models/tower.safetensors", 1000, 10**18, 10**18 + 5, 66, 12345)
HEADER, DIGEST = "a" * 64, "b" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "user" / "pack" / "verified.json")


def facts_of(path: Path) -> Facts:
    with open(path, "rb") as file:
        return Facts.of(path, file.fileno())


@pytest.mark.parametrize("digest", ["", DIGEST])
def test_what_was_remembered_is_recalled_by_everybody(digest: str, ledger: Ledger) -> None:
    assert ledger.recall(FACTS, HEADER) is None
    ledger.remember(FACTS, HEADER, digest)
    assert ledger.recall(FACTS, HEADER) == digest
    assert Ledger(ledger.path).recall(FACTS, HEADER) == digest
    assert [path.name for path in ledger.path.parent.iterdir()] == ["verified.json"]


def test_no_other_file_is_recalled(ledger: Ledger) -> None:
    ledger.remember(FACTS, HEADER, DIGEST)
    assert ledger.recall(FACTS, "c" * 64) is None
    for field in dataclasses.fields(FACTS):
        value = getattr(FACTS, field.name)
        other = dataclasses.replace(FACTS, **{field.name: value + ("x" if field.name == "path" else 1)})
        assert ledger.recall(other, HEADER) is None, field.name


def test_paths_are_not_written_down(ledger: Ledger) -> None:
    ledger.remember(FACTS, HEADER, DIGEST)
    assert "models" not in ledger.path.read_text(encoding="ascii")


def test_a_name_that_is_no_unicode_can_be_remembered(ledger: Ledger) -> None:
    odd = dataclasses.replace(FACTS, path="/models/\udcff\u732b.safetensors")
    ledger.remember(odd, HEADER, "")
    assert ledger.recall(odd, HEADER) == ""


@pytest.mark.parametrize(("age", "rests"), [(REST_NS, True), (REST_NS - 1, False), (-1, False)])
@pytest.mark.parametrize("field", ["modified_ns", "changed_ns"])
def test_a_file_rests_when_both_its_times_are_two_seconds_old(
    age: int, rests: bool, field: str, tmp_path: Path
) -> None:
    now = 2 * 10**18
    facts = dataclasses.replace(FACTS, **{field: now - age})
    assert Ledger(tmp_path / "x", clock=lambda: now).at_rest(facts) == rests


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"x")


def overwrite_and_put_the_time_back(path: Path) -> None:
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    overwrite(path)
    os.utime(path, ns=times)


def replace_by_a_twin(path: Path) -> None:
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    twin = path.with_name("twin")
    twin.write_bytes(path.read_bytes())
    os.utime(twin, ns=times)
    os.replace(twin, path)


CHANGES: list[Callable[[Path], None]] = [append, overwrite, replace_by_a_twin]
if os.name == "posix":  # Windows keeps no time that shows it: docs/bridge-file.md says so
    CHANGES.append(overwrite_and_put_the_time_back)


@pytest.mark.parametrize("change", CHANGES)
def test_facts_show_that_a_file_was_written_to(change: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    before = facts_of(path)
    assert facts_of(path) == before
    time.sleep(0.05)  # longer than a tick of the file system's clock; `at_rest` takes care of the rest
    change(path)
    assert facts_of(path) != before


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_a_link_is_the_file_that_it_leads_to(tmp_path: Path) -> None:
    path, link = tmp_path / "weights", tmp_path / "link"
    path.write_bytes(b"some weights")
    link.symlink_to(path)
    assert facts_of(link) == facts_of(path)


GOOD = {"format": FORMAT, "checks": CHECKS, "verified": {}}
DAMAGED = {
    "empty": b"",
    "half": b'{"format": 1, "checks": 1, "verif',
    "binary": bytes(range(256)),
    "a list": b"[]",
    "a number": b"7",
    "deep": b"[" * 99_999,
    "another format": json.dumps(GOOD | {"format": FORMAT + 1}).encode(),
    "stricter checks": json.dumps(GOOD | {"checks": CHECKS + 1}).encode(),
    "no entries": json.dumps({"format": FORMAT, "checks": CHECKS}).encode(),
    "entries in a list": json.dumps(GOOD | {"verified": [HEADER]}).encode(),
    "too large": json.dumps(GOOD | {"verified": {HEADER: "x" * LARGEST_BYTES}}).encode(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_ledger_that_cannot_be_read_knows_nothing_and_is_written_anew(name: str, ledger: Ledger) -> None:
    ledger.path.parent.mkdir(parents=True)
    ledger.path.write_bytes(DAMAGED[name])
    assert ledger.recall(FACTS, HEADER) is None
    ledger.remember(FACTS, HEADER, DIGEST)
    assert ledger.recall(FACTS, HEADER) == DIGEST


@pytest.mark.parametrize("field", ["format", "checks"])
def test_entries_of_another_version_do_not_count(field: str, ledger: Ledger) -> None:
    ledger.remember(FACTS, HEADER, DIGEST)
    whole = json.loads(ledger.path.read_text(encoding="ascii"))
    ledger.path.write_text(json.dumps(whole | {field: whole[field] + 1}), encoding="ascii")
    assert ledger.recall(FACTS, HEADER) is None


def test_every_truncation_knows_nothing(ledger: Ledger) -> None:
    ledger.remember(FACTS, HEADER, DIGEST)
    whole = ledger.path.read_bytes()
    for length in range(len(whole)):
        ledger.path.write_bytes(whole[:length])
        assert ledger.recall(FACTS, HEADER) is None


@pytest.mark.parametrize("verdict", [7, None, "yes", "b" * 63, "b" * 64 + "\n", ["b" * 64]])
def test_an_odd_verdict_is_none(verdict: object, ledger: Ledger) -> None:
    ledger.remember(FACTS, HEADER, DIGEST)
    whole = json.loads(ledger.path.read_text(encoding="ascii"))
    whole["verified"] = dict.fromkeys(whole["verified"], verdict)
    ledger.path.write_text(json.dumps(whole), encoding="ascii")
    assert ledger.recall(FACTS, HEADER) is None


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "verified.json", tmp_path):
        nowhere = Ledger(path)
        nowhere.remember(FACTS, HEADER, DIGEST)
        assert nowhere.recall(FACTS, HEADER) is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_ledger_and_nothing_else(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.remember(FACTS, HEADER, DIGEST)

    def busy(*arguments: object) -> None:
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(os, "replace", busy)
    ledger.remember(FACTS, "c" * 64, DIGEST)
    assert ledger.recall(FACTS, "c" * 64) is None
    assert ledger.recall(FACTS, HEADER) == DIGEST
    assert [path.name for path in ledger.path.parent.iterdir()] == ["verified.json"]


def test_the_oldest_entries_go_first(ledger: Ledger) -> None:
    entries = {f"{number:064x}": DIGEST for number in range(MOST_ENTRIES)}
    ledger.path.parent.mkdir(parents=True)
    ledger.path.write_text(json.dumps(GOOD | {"verified": entries}), encoding="ascii")
    ledger.remember(FACTS, HEADER, DIGEST)
    kept = list(json.loads(ledger.path.read_text(encoding="ascii"))["verified"])
    assert kept[:-1] == list(entries)[1:]
    ledger.remember(FACTS, HEADER, DIGEST)  # known already: nobody has to go
    assert list(json.loads(ledger.path.read_text(encoding="ascii"))["verified"]) == kept
    assert ledger.path.stat().st_size < LARGEST_BYTES // 8


def test_writers_side_by_side_never_leave_half_a_ledger(ledger: Ledger) -> None:
    """Each has a `Ledger` of its own, as other processes have; an entry may get lost, the file may not."""
    ledger.remember(FACTS, HEADER, DIGEST)
    torn: list[str] = []
    working = threading.Event()

    def write(name: str) -> None:
        own = Ledger(ledger.path)
        for number in range(60):
            own.remember(dataclasses.replace(FACTS, inode=number), name * 64, DIGEST)

    def read() -> None:
        while not working.is_set():
            text = ledger.path.read_text(encoding="ascii")
            try:
                json.loads(text)["verified"]
            except ValueError:
                torn.append(text)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(name,)) for name in "cde"]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    working.set()
    reader.join()
    assert not torn
    last = dataclasses.replace(FACTS, inode=59)
    assert any(ledger.recall(last, name * 64) == DIGEST for name in "cde")
    assert [path.name for path in ledger.path.parent.iterdir()] == ["verified.json"]
