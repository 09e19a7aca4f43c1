"""The manifest's laws: the same text back, every wrong field a typed error that names its place."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from language_bridge.manifest.schema import BASES, Entry, Manifest, ManifestError, WeightFile, dump, parse

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
parts = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,10}", fullmatch=True)
files = st.builds(
    WeightFile,
    path=st.lists(parts, min_size=1, max_size=3).map("/".join),
    bytes=st.integers(0, 2**50),
    sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)
entries = st.builds(
    Entry,
    name=names,
    about=st.text(max_size=30),
    base=st.sampled_from(BASES),
    licence=st.text(max_size=10),
    source=st.text(max_size=10),
    files=st.lists(files, min_size=1, max_size=2).map(tuple),
)
manifests = st.builds(Manifest, st.lists(entries, max_size=3, unique_by=lambda entry: entry.name).map(tuple))


@given(manifests)
def test_what_was_written_reads_back_and_writes_the_same_text(manifest: Manifest) -> None:
    text = dump(manifest)
    assert parse(text) == manifest
    assert dump(parse(text)) == text
    assert text.isascii()


def valid() -> dict[str, Any]:
    file = {"path": "pocket/assets/a.safetensors", "bytes": 3, "sha256": "0" * 64}
    entry = {"name": "a", "about": "", "base": "sd1", "licence": "MIT", "source": "", "files": [file]}
    return {"format": 1, "entries": [entry]}


def changed(place: str, value: object) -> str:
    data = valid()
    owner: Any = data
    *road, last = place.split("/")
    for step in road:
        owner = owner[int(step) if step.isdigit() else step]
    if value is KeyError:
        del owner[last]
    else:
        owner[int(last) if last.isdigit() else last] = value
    return json.dumps(data)


def test_the_example_is_valid() -> None:
    assert len(parse(json.dumps(valid())).entries) == 1


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", 2),
        ("format", "1"),
        ("format", True),
        ("format", KeyError),
        ("surplus", 1),
        ("entries", {}),
        ("entries/0", []),
        ("entries/0/name", "Upper"),
        ("entries/0/name", ""),
        ("entries/0/name", "../x"),
        ("entries/0/name", None),
        ("entries/0/base", "sd3"),
        ("entries/0/about", 1),
        ("entries/0/licence", KeyError),
        ("entries/0/surplus", 1),
        ("entries/0/files", []),
        ("entries/0/files", "x"),
        ("entries/0/files/0/path", "/etc/passwd"),
        ("entries/0/files/0/path", "../x"),
        ("entries/0/files/0/path", "a/../x"),
        ("entries/0/files/0/path", "a\\b"),
        ("entries/0/files/0/path", "C:/x"),
        ("entries/0/files/0/path", "a//b"),
        ("entries/0/files/0/path", "a\x00"),
        ("entries/0/files/0/path", "a\n"),
        ("entries/0/files/0/path", ""),
        ("entries/0/files/0/bytes", -1),
        ("entries/0/files/0/bytes", 1.0),
        ("entries/0/files/0/bytes", True),
        ("entries/0/files/0/bytes", "3"),
        ("entries/0/files/0/sha256", "0" * 63),
        ("entries/0/files/0/sha256", "G" * 64),
        ("entries/0/files/0/sha256", KeyError),
    ],
)
def test_a_wrong_field_is_a_typed_error(place: str, value: object) -> None:
    with pytest.raises(ManifestError, match="expected"):
        parse(changed(place, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '"x"', "\x00"])
def test_what_is_no_manifest_at_all_is_a_typed_error(text: str) -> None:
    with pytest.raises(ManifestError):
        parse(text)


def test_a_name_may_stand_only_once() -> None:
    data = valid()
    data["entries"].append(copy.deepcopy(data["entries"][0]))
    with pytest.raises(ManifestError, match="once"):
        parse(json.dumps(data))
