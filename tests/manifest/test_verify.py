"""Files against the manifest: every kind of damage is named, and the shipped files are as it says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from language_bridge.manifest.schema import Entry, Manifest, WeightFile, parse
from language_bridge.manifest.verify import check, measure, problems


@pytest.fixture
def file(tmp_path: Path) -> WeightFile:
    (tmp_path / "a.bin").write_bytes(b"abc")
    return measure(tmp_path, "a.bin")


def test_a_measured_file_has_no_problem(tmp_path: Path, file: WeightFile) -> None:
    assert file.bytes == 3
    assert file.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert check(tmp_path, file) is None


@pytest.mark.parametrize(("content", "said"), [(None, "nothing"), (b"ab", "2 bytes"), (b"abd", "SHA-256 ")])
def test_damage_is_named(tmp_path: Path, file: WeightFile, content: bytes | None, said: str) -> None:
    (tmp_path / "a.bin").unlink()
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    problem = check(tmp_path, file)
    assert problem is not None
    assert problem.found.startswith(said)
    assert str(problem).startswith("a.bin: found ")


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, file: WeightFile) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.bin").symlink_to(tmp_path / "a.bin")
    problem = check(tmp_path / "inside", file)
    assert problem is not None
    assert "link" in problem.found


def test_problems_names_each_wrong_file_once(tmp_path: Path, file: WeightFile) -> None:
    missing = WeightFile("b.bin", 1, "0" * 64)
    manifest = Manifest((Entry("a", "", "sd1", "", "", (file, missing)),))
    assert [problem.path for problem in problems(tmp_path, manifest)] == ["b.bin"]


def test_the_shipped_files_are_as_the_manifest_says(checkout: Path) -> None:
    manifest = parse((checkout / "weights_manifest.json").read_text(encoding="utf-8"))
    assert [str(problem) for problem in problems(checkout, manifest)] == []
    named = {file.path for entry in manifest.entries for file in entry.files}
    shipped = {
        path.relative_to(checkout).as_posix()
        for path in (checkout / "pocket" / "assets").rglob("*.safetensors")
    }
    assert named == shipped, "refresh it: python bootstrap.py run recipes/manifest.py"
    assert all(entry.about for entry in manifest.entries), "say in weights_manifest.json what each file is"


def test_the_shipped_files_stay_small(checkout: Path) -> None:
    total = sum(path.stat().st_size for path in (checkout / "pocket" / "assets").rglob("*") if path.is_file())
    assert 0 < total <= 40 * 1024 * 1024
