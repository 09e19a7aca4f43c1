"""Hostile pickles at the door of the conversion: each is refused in words, and nothing in it is run."""

from __future__ import annotations

import io
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from language_bridge.bridges.errors import LONGEST, BridgeError
from language_bridge.conversion.containers import open_sources, read_foreign
from language_bridge.conversion.program import ALLOWED_GLOBALS, OddProgram, check_program
from language_bridge.tests.attacks import untouched
from language_bridge.tests.battery.bounds import bounded
from language_bridge.tests.battery.hostile_pickles import Hostile, archive, hostile, saved

CANARY = Path(tempfile.mkdtemp(prefix="language-bridge-canary-")) / "canary"
CASES = hostile(CANARY)


class Plain(pickle.Unpickler):
    """Python's own loader, which runs what it reads; for harmless canaries alone."""

    def persistent_load(self, pid: Any) -> Any:
        """Anything in the place of stored numbers."""
        return torch.storage.TypedStorage(
            wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
        )


def run_plainly(data: bytes) -> None:
    """What a program that trusts the file would do with it."""
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as zipped:
            data = next(zipped.read(name) for name in zipped.namelist() if name.endswith("/data.pkl"))
    with suppress(Exception):
        Plain(io.BytesIO(data)).load()


@pytest.fixture(autouse=True)
def canary() -> Iterator[Path]:
    """The file that is made when something is run."""
    CANARY.parent.mkdir(exist_ok=True)
    CANARY.with_name("canary.py").write_text(f"open({str(CANARY)!r}, 'w').close()", encoding="ascii")
    yield CANARY
    shutil.rmtree(CANARY.parent)


def test_there_are_cases_enough() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert sum(bool(case.phrase) for case in CASES) >= 120 and sum(case.runs for case in CASES) >= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_pickle_is_refused_and_not_run(case: Hostile, canary: Path, tmp_path: Path) -> None:
    path = tmp_path / f"odd{case.ending}"
    path.write_bytes(case.data)
    if case.runs:
        run_plainly(case.data)
        assert canary.exists(), "the control: this payload is none"
        canary.unlink()
    modules = set(sys.modules)
    for reader in (read_foreign, lambda path: open_sources([path])):
        said = ""
        with bounded(), untouched(tmp_path, canary.parent):
            try:
                loaded = reader(path)
                if reader is read_foreign:
                    assert all(loaded[name].shape == shape for name, shape in loaded.shapes.items())
            except BridgeError as error:
                assert error.found and error.expected and error.action
                said = str(error)
        assert not canary.exists()
        assert case.phrase in said if case.phrase else not said, said
        assert len(said) < 4 * LONGEST and "weights_only" not in said
        said.encode("utf-8")
    assert not {name for name in set(sys.modules) - modules if name.startswith(("runpy", "code", "timeit"))}


@pytest.mark.parametrize("kind", ["program", "archive"])
def test_a_file_cut_off_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cut.bin"
    whole = saved({"fc.weight": torch.ones(4), "fc.bias": torch.ones(2)})
    with zipfile.ZipFile(io.BytesIO(whole)) as zipped:
        root = zipped.namelist()[0].split("/")[0]
        code = zipped.read(f"{root}/data.pkl")
        records = {key: zipped.read(f"{root}/data/{key}") for key in ("0", "1")}
    for length in range(0, len(code if kind == "program" else whole), 1 if kind == "program" else 7):
        data = archive(code[:length], records) if kind == "program" else whole[:length]
        path.write_bytes(data)
        with pytest.raises(BridgeError):
            read_foreign(path)


def test_what_a_program_may_mention_calls_nothing_by_itself() -> None:
    """The list is short, and each name on it is a class of numbers, a dtype, or a maker of tensors."""
    assert len(ALLOWED_GLOBALS) <= 30
    for mention in ALLOWED_GLOBALS:
        module, name = mention.split(" ")
        assert module.startswith(("torch", "collections", "pytorch_lightning")), mention
        assert name[0].isupper() or name.startswith("_rebuild_") or hasattr(torch, name), mention


def test_a_program_is_followed_without_being_run(canary: Path) -> None:
    """The check alone refuses what runs, so torch's own loader is the second line and not the first."""
    for case in CASES:
        if not case.runs or case.data[:4] != b"PK\x03\x04":
            continue
        with zipfile.ZipFile(io.BytesIO(case.data)) as zipped:
            name = next(name for name in zipped.namelist() if name.endswith("/data.pkl"))
            with pytest.raises(OddProgram):
                check_program(zipped.read(name), {"0": 16})
    assert not canary.exists()
