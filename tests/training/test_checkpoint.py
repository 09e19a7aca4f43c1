"""Checkpoints: whole whatever fails, damaged ones are found, and nobody else's files are touched."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import guard
from language_bridge.training import checkpoint
from language_bridge.training.checkpoint import Saved, latest, save, steps

Groups = dict[str, dict[str, Tensor]]


def groups_of(step: int) -> Groups:
    """Tensors of all the kinds that a training has, decided by the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {
            "bridge.layer.weight": torch.randn(30, 20, generator=generator),
            "bridge.half": torch.randn(7, generator=generator).half(),
        },
        "optimiser": {"a.step": torch.tensor(float(step)), "a.state1": torch.arange(9, dtype=torch.uint8)},
        "random": {"torch": torch.randint(0, 256, (50,), generator=generator).to(torch.uint8)},
        "nothing": {},
    }


def facts_of(step: int) -> dict[str, Any]:
    return {
        "settings": {"rate": 1e-4 / 3, "name": "\u732b", "none": None},
        "history": [[k, 1 / (k + 1)] for k in range(min(step, 500) // 100)],
    }


def keep_one(run: Path, step: int, keep: int = 2) -> Path:
    return save(run, step, groups_of(step), facts_of(step), keep)


def is_of(saved: Saved | None, step: int) -> bool:
    """Whether this is the checkpoint of that step with everything that belongs to it."""
    if saved is None or saved.step != step or dict(saved.facts) != facts_of(step):
        return False
    wanted = groups_of(step)
    return saved.tensors.keys() == wanted.keys() and all(
        group.keys() == saved.tensors[stem].keys()
        and all(
            torch.equal(t, saved.tensors[stem][n]) and t.dtype == saved.tensors[stem][n].dtype
            for n, t in group.items()
        )
        for stem, group in wanted.items()
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path / "some" / "run"
    keep_one(folder, 100)
    keep_one(folder, 200)
    return folder


# -- in peace ---------------------------------------------------------------------------------------


def test_what_is_saved_is_read_again_and_the_newest_are_kept(run: Path) -> None:
    assert is_of(latest(run), 200) and steps(run) == [100, 200]
    assert keep_one(run, 12345678901) == run / "step-12345678901"
    assert is_of(latest(run), 12345678901)
    assert names(run) == ["LATEST", "step-00000200", "step-12345678901"]
    assert (run / "LATEST").read_text(encoding="ascii") == "step-12345678901\n"
    keep_one(run, 12345678902, keep=1)
    assert names(run) == ["LATEST", "step-12345678902"] and is_of(latest(run), 12345678902)


def test_the_state_tells_the_hashes_that_other_tools_find(run: Path) -> None:
    import hashlib

    folder = run / "step-00000200"
    told = json.loads((folder / "state.json").read_text(encoding="ascii"))["files"]
    assert set(told) | {"state.json"} == set(names(folder))
    for name, entry in told.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_where_nothing_is_saved_there_is_nothing(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None and steps(tmp_path / "none") == []
    (tmp_path / "notes.txt").write_text("x", encoding="ascii")
    (tmp_path / f".step-00000100.0123456789ab{guard.TEMPORARY_SUFFIX}").mkdir()
    assert latest(tmp_path) is None and steps(tmp_path) == []


def test_a_step_that_comes_again_gets_a_folder_of_its_own_and_is_the_newest(run: Path) -> None:
    """A run whose newest checkpoint was damaged goes on from an older one, to the same steps again."""
    spoil = run / "step-00000200" / "weights.safetensors"
    spoil.write_bytes(spoil.read_bytes()[:-1])
    assert is_of(latest(run), 100)
    keep_one(run, 150, keep=3)
    assert is_of(latest(run), 150) and steps(run) == [100, 150, 200]
    assert keep_one(run, 200, keep=3) == run / "step-00000200-2"
    assert is_of(latest(run), 200) and latest(run).skipped == ()  # type: ignore[union-attr]
    assert names(run) == ["LATEST", "step-00000150", "step-00000200", "step-00000200-2"]
    keep_one(run, 200)
    assert names(run) == ["LATEST", "step-00000200-2", "step-00000200-3"]


def test_everybody_elses_files_stay(run: Path) -> None:
    (run / "step-00000100" / "mine.txt").write_text("from here on it is good", encoding="ascii")
    (run / "step-00000200" / ".DS_Store").write_bytes(b"left by a file manager")
    foreign = {
        "notes.txt": b"mine", "step-5": b"", "step-00000001": b"a file", ".step-00000001.tmp": b"",
        "LATEST.txt": b"", ".LATEST.abc.language-bridge.tmp": b"", "step-00000300.zip": b"", "a.log": b"x",
    }  # fmt: skip
    for name, data in foreign.items():
        (run / name).write_bytes(data)
    (run / "step-00000007-copy").mkdir()
    (run / "step-00000009").mkdir()  # without a state it is none of ours
    (run / "step-00000009" / "weights.safetensors").write_bytes(b"mine")
    for step in (300, 400, 500):
        keep_one(run, step)
    assert {name: (run / name).read_bytes() for name in foreign} == foreign
    assert (run / "step-00000100" / "mine.txt").is_file() and (run / "step-00000009").is_dir()
    assert steps(run) == [9, 100, 400, 500] and (run / "step-00000007-copy").is_dir()
    assert is_of(latest(run), 500)


def test_a_linked_checkpoint_is_read_and_not_removed(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "step-00000200", tmp_path / "elsewhere")
    (run / "step-00000200").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert is_of(latest(run), 200)
    for step in (300, 400):
        keep_one(run, step)
    assert len(names(tmp_path / "elsewhere")) == 5 and (run / "step-00000200").is_symlink()


# -- what cannot be saved ---------------------------------------------------------------------------

ODD: dict[str, tuple[tuple[Any, ...], str]] = {
    "step": ((-1, {}, {}), "step -1"),
    "keep": ((1, {}, {}, 0), "keep 0"),
    "file": ((1, {"../a": {}}, {}), "'../a'"),
    "state": ((1, {"state.json": {}}, {}), "'state.json'"),
    "facts": ((1, {}, {"a": torch.zeros(1)}), "not JSON serializable"),
    "infinite fact": ((1, {}, {"a": float("inf")}), "not JSON compliant"),
    "facts twice": ((1, {}, {"a": 1, 1: 2, "1": 3}), "twice"),
    "infinite number": ((1, {"a": {"b": torch.tensor([1.0, float("nan")])}}, {}), "1 of 2 numbers in 'b'"),
    "tensor's name": ((1, {"a": {"b c": torch.zeros(1)}}, {}), "tensor 'b c'"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_could_not_be_read_again_is_refused_and_nothing_happens(what: str, run: Path) -> None:
    before = names(run)
    given, said = ODD[what]
    with pytest.raises(BridgeError, match=rf"{said}[\s\S]*what to do:"):
        save(run, *given)
    assert names(run) == before and is_of(latest(run), 200)


def test_facts_beyond_measure_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_LARGEST_STATE_BYTES", 4000)
    save(run, 300, {}, {"a": "b" * 1500})
    with pytest.raises(BridgeError, match="2509 bytes"):
        save(run, 400, {}, {"a": "b" * 2500})
    monkeypatch.setattr(checkpoint, "_LARGEST_STATE_BYTES", 100)
    with pytest.raises(BridgeError, match="more than 100 bytes"):
        latest(run)


# -- a disk that fails ------------------------------------------------------------------------------

CALLS = ("fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir", "scandir", "stat")


class Disk:
    """Counts what is asked of the disk, and fails when `fails` says so: half a write is done by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, str], bool]) -> None:
        self.count = 0
        self.failed: list[str] = []
        self._fails = fails
        for name in CALLS:
            # Nothing hangs on a real flush here, which takes its time.
            real = getattr(os, name) if name != "fsync" else lambda descriptor: None
            monkeypatch.setattr(os, name, self._counting(name, real))
        for module in (guard, checkpoint):
            monkeypatch.setattr(module, "open", self._open, raising=False)

    def ask(self, name: str) -> None:
        self.count += 1
        if self._fails(self.count, name):
            self.failed.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self.ask(name)
            return real(*given, **named)

        return call

    def _open(self, path: Any, mode: str) -> Any:
        self.ask("open")
        file = open(path, mode)  # noqa: SIM115
        if "x" not in mode:
            return file
        real = file.write

        def write(data: bytes) -> int:
            try:
                self.ask("write")
            except OSError:
                real(data[: len(data) // 2])
                raise
            return real(data)

        return _Wrapped(file, write)


class _Wrapped:
    def __init__(self, file: Any, write: Callable[[bytes], int]) -> None:
        self._file = file
        self.write = write

    def __enter__(self) -> _Wrapped:
        return self

    def __exit__(self, *reason: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def disk(fails: Callable[[int, str], bool]) -> Iterator[Disk]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Disk(monkeypatch, fails)


WRITING = {"write", "mkdir", "fsync", "replace", "rename"}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_whatever_fails_the_checkpoint_before_stays_whole(
    lasting: bool, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Nth call to the disk fails, for N = 1, 2, ... until none is left; the next save always passes."""
    said: set[str] = set()
    number = 0
    for number in range(1, 500):
        folder = tmp_path / str(number)
        shutil.copytree(run, folder)
        caplog.clear()

        def fails(count: int, name: str, number: int = number) -> bool:
            return count == number or (lasting and count > number and name in WRITING)

        error, written = None, None
        with disk(fails) as counted:
            try:
                written = keep_one(folder, 300)
            except BridgeError as caught:
                error = caught
        if not counted.failed:
            break
        said.update(counted.failed[:1])
        saved = latest(folder)
        if error is None:
            assert is_of(saved, 300) and written == folder / "step-00000300", counted.failed
            # What went wrong without harm is told: the pointer is old, or something could not be removed.
            clean = names(folder) == ["LATEST", "step-00000200", "step-00000300"]
            assert clean or caplog.text, counted.failed
        else:
            assert "step 300" in error.what and "No space left" in error.found, counted.failed
            assert is_of(saved, 200) or is_of(saved, 300)
        pointed = folder / (folder / "LATEST").read_text(encoding="ascii").strip()
        assert is_of(latest(folder), int(pointed.name[5:])) or (pointed / "state.json").is_file()
        with disk(lambda count, name: False):
            keep_one(folder, 400)
        assert is_of(latest(folder), 400)
        assert not [name for name in names(folder) if name.startswith(".")] and len(steps(folder)) == 2
        shutil.rmtree(folder)
    assert 50 < number < 499, "many calls failed, and in the end none did"
    assert said >= {"write", "fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir"}


def test_the_first_save_of_a_run_may_fail_anywhere(tmp_path: Path) -> None:
    number = 0
    for number in range(1, 500):
        folder = tmp_path / str(number) / "run"
        with disk(lambda count, name, number=number: count == number) as counted:
            try:
                keep_one(folder, 100)
            except BridgeError as error:
                assert "No space left" in error.found
        if not counted.failed:
            break
        saved = latest(folder)
        assert saved is None or is_of(saved, 100)
        with disk(lambda count, name: False):
            keep_one(folder, 100)
        assert is_of(latest(folder), 100)
    assert 30 < number < 499


def test_a_disk_without_room_for_a_large_file(run: Path) -> None:
    """The system itself refuses to let a file grow beyond a limit."""
    groups = {**groups_of(300), "weights": {"a": torch.randn(300_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 10, 400, 70_000, 1_199_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(BridgeError, match=r"step 300 could not be saved[\s\S]*File too large"):
                save(run, 300, groups, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(run) == ["LATEST", "step-00000100", "step-00000200"] and is_of(latest(run), 200)
    save(run, 300, groups, {})
    assert names(run) == ["LATEST", "step-00000200", "step-00000300"]


class Cancelled(BaseException):
    """Whatever else may end a save."""


def test_a_save_that_is_cut_short_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_text", lambda state: (_ for _ in ()).throw(Cancelled))
    with pytest.raises(Cancelled):
        keep_one(run, 300)
    assert names(run) == ["LATEST", "step-00000100", "step-00000200"] and is_of(latest(run), 200)


def test_nothing_gets_its_name_before_it_is_on_the_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut may take: whatever was written, or named in a folder, and not flushed since.

    Nor is a file open while its folder is renamed, which Windows refuses, and no name is taken over.
    """
    dirty: set[int] = set()
    renamed: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "mkdir")}
    place = os.stat(run).st_ino

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        dirty.discard(os.fstat(descriptor).st_ino)

    def mkdir(path: Any, *rest: Any) -> None:
        real["mkdir"](path, *rest)
        dirty.add(os.stat(path).st_ino)

    def rename(old: Any, new: Any) -> None:
        held = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        assert not [path for path in held if path.startswith(str(old))]
        assert not os.path.lexists(new) and not dirty, "all that was done before is on the disk"
        real["rename"](old, new)
        renamed.append((Path(old).name, Path(new).name))
        dirty.add(os.stat(Path(new).parent).st_ino)

    def replace(old: Any, new: Any) -> None:
        assert os.stat(old).st_ino not in dirty
        if Path(new).name == "LATEST":
            assert not dirty - {place}
        real["replace"](old, new)
        dirty.add(os.stat(Path(new).parent).st_ino)

    def opened(path: Any, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115
        if "x" in mode:
            dirty.update({os.fstat(file.fileno()).st_ino, os.stat(Path(path).parent).st_ino})
        return file

    for name, call in {"fsync": fsync, "rename": rename, "replace": replace, "mkdir": mkdir}.items():
        monkeypatch.setattr(os, name, call)
    monkeypatch.setattr(guard, "open", opened, raising=False)
    keep_one(run, 300)
    assert [new for _, new in renamed][0] == "step-00000300"
    assert [old for old, _ in renamed][1:] == ["step-00000100"]


def test_windows_may_need_a_moment_to_rename_a_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PAUSES", (0.0, 0.001, 0.002))
    real, left = os.rename, [0]

    def rename(old: Any, new: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(errno.EACCES, "Access is denied")
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    left[0] = 3
    assert is_of(latest(run), 200) and keep_one(run, 300).name == "step-00000300"
    left[0] = 4
    with pytest.raises(BridgeError, match="Access is denied"):
        keep_one(run, 400)
    left[0] = 0
    assert is_of(latest(run), 300) and names(run) == ["LATEST", "step-00000200", "step-00000300"]


def test_what_cannot_be_removed_is_told_of_and_goes_with_the_next_save(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(path: Any, **named: Any) -> None:
        if named.get("ignore_errors") is not True:
            raise PermissionError(errno.EACCES, "Access is denied", str(path))

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refused)
        keep_one(run, 300)
    assert "takes up room" in caplog.text and is_of(latest(run), 300) and steps(run) == [200, 300]
    assert len(names(run)) == 4
    keep_one(run, 400)
    assert names(run) == ["LATEST", "step-00000300", "step-00000400"]


def test_a_file_in_the_way_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine", encoding="ascii")
    with pytest.raises(BridgeError, match="step 1 could not be saved"):
        keep_one(tmp_path / "run", 1)
    with pytest.raises(BridgeError, match="cannot be read"):
        latest(tmp_path / "run")
    assert (tmp_path / "run").read_text(encoding="ascii") == "mine"


# -- damage -----------------------------------------------------------------------------------------


def spoilt(data: bytes, chance: random.Random) -> dict[str, bytes | None]:
    """Ways to damage a file; None: it is gone."""
    ways: dict[str, bytes | None] = {
        "gone": None,
        "empty": b"",
        "cut": data[: len(data) // 2],
        "one short": data[:-1],
        "one more": data + b"\0",
        "zeros": bytes(len(data)),
    }
    for number in range(12):
        place, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        ways[f"flip {number}"] = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
    return ways


@pytest.mark.parametrize("name", ["weights", "optimiser", "random", "nothing", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(name: str, run: Path) -> None:
    folder = run / "step-00000200"
    path = folder / (f"{name}.json" if name == "state" else f"{name}.safetensors")
    whole = path.read_bytes()
    for way, data in spoilt(whole, random.Random(name)).items():
        path.unlink() if data is None else path.write_bytes(data)
        saved = latest(run)
        assert saved is not None and is_of(saved, 100), way
        assert len(saved.skipped) == 1 and saved.skipped[0].startswith("step-00000200: "), way
        path.write_bytes(whole)
    assert is_of(latest(run), 200)


def test_every_flipped_bit_of_the_state_is_found(run: Path) -> None:
    """Or it changes nothing of what is said."""
    path = run / "step-00000200" / "state.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        state = checkpoint._ours(run)[path.parent]
        assert state is None or (state.files, state.facts, state.step) == (
            checkpoint._read_state(path.parent).files,
            facts_of(200),
            200,
        )


def test_a_state_that_was_forged_is_refused(run: Path) -> None:
    """With the right hash, but files outside the folder, or numbers that are none."""
    path = run / "step-00000200" / "state.json"
    fields = json.loads(path.read_text(encoding="ascii"))
    fields.pop("sha256")
    entry = fields["files"]["weights.safetensors"]
    forged: list[Mapping[str, Any]] = [
        {"files": {"../step-00000100/weights.safetensors": entry}},
        {"files": {"/etc/passwd": entry}},
        {"files": {"weights.safetensors": {**entry, "bytes": "many"}}},
        {"files": {"weights.safetensors": []}},
        {"files": []},
        {"step": 100},
        {"step": "200"},
        {"serial": None},
        {"facts": [1]},
        {"format": 2},
    ]
    for change in forged:
        said = {**fields, **change}
        path.write_text(json.dumps({**said, "sha256": checkpoint._digest(said)}), encoding="ascii")
        saved = latest(run)
        assert is_of(saved, 100) and len(saved.skipped) == 1, change  # type: ignore[union-attr]


def test_when_all_are_damaged_nobody_begins_anew_unasked(run: Path) -> None:
    for step in (100, 200):
        path = run / f"step-{step:08d}" / "random.safetensors"
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BridgeError, match=r"No checkpoint in 'run' is whole[\s\S]*00000200[\s\S]*00000100"):
        latest(run)


def test_a_checkpoint_that_cannot_be_read_is_never_removed(run: Path) -> None:
    """It may be of a newer version."""
    path = run / "step-00000100" / "state.json"
    path.write_text(path.read_text(encoding="ascii").replace('"format": 1', '"format": 2'), encoding="ascii")
    for step in (300, 400, 500):
        keep_one(run, step)
    assert steps(run) == [100, 400, 500]
    saved = latest(run)
    assert saved is not None and is_of(saved, 500) and len(saved.skipped) == 1
    assert "does not know" in saved.skipped[0]
