"""The manifest's laws: the same text back, every wrong field a typed error that names its place."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_bridge.conversion import presets
from language_bridge.manifest.schema import (
    BASES,
    DOWNLOADS,
    LICENCE_CLASSES,
    SCHEMA,
    Conversion,
    Entry,
    Manifest,
    ManifestError,
    PublishedSet,
    RemoteFile,
    WeightFile,
    dump,
    is_plain,
    parse,
)
from language_bridge.tests.manifest.json_schema import fits

CHECKOUT = Path(__file__).resolve().parents[2]

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True).filter(is_plain)
parts = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,10}", fullmatch=True).filter(is_plain)
paths = st.lists(parts, min_size=1, max_size=3).map("/".join)
hashes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
repos = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}/[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True)
files = st.builds(WeightFile, path=paths, bytes=st.integers(0, 2**50), sha256=hashes)
entries = st.builds(
    Entry,
    name=names,
    about=st.text(max_size=30),
    base=st.sampled_from(BASES),
    licence=st.text(max_size=10),
    source=st.text(max_size=10),
    files=st.lists(files, min_size=1, max_size=2).map(tuple),
)
remotes = st.builds(
    RemoteFile,
    repo=repos,
    revision=st.sampled_from(["main", "refs/pr/37", "0" * 40]),
    path=paths,
    bytes=st.integers(1, 2**40),
    sha256=st.just("") | hashes,
    modelscope=st.just("") | repos,
) | st.builds(
    RemoteFile,
    repo=repos,
    revision=st.just("main"),
    path=paths,
    shown=st.sampled_from(["", "2.24 GB", "110 kB", "9.1 MB"]),
    to=st.just("") | parts.map("checkpoints/{}".format),
)


def published_of(name: str, file: RemoteFile, kind: str, converts: bool) -> PublishedSet:
    """A set with one file."""
    return PublishedSet(
        name=name,
        about="\u4e2d",
        base="sd1",
        languages=("zh", "zh-Hans"),
        licence="x",
        licence_class=kind,
        consent=kind != "permissive",
        gated=False,
        card="https://huggingface.co/a/b",
        needs=(),
        files=(file,),
        conversion=Conversion("p", (file.path,), "none", "SD 1.4") if converts else None,
        by_hand="",
    )


sets = st.builds(published_of, names, remotes, st.sampled_from(LICENCE_CLASSES), st.booleans())


@st.composite
def whole_manifests(draw: st.DrawFn) -> Manifest:
    """Manifests in which no name and no place stands twice."""
    shipped = draw(st.lists(entries, max_size=2, unique_by=lambda entry: entry.name))
    taken = {entry.name for entry in shipped}
    offered = draw(st.lists(sets.filter(lambda item: item.name not in taken), max_size=2))
    seen: set[str] = set()
    chosen: list[PublishedSet] = []
    for item in offered:
        own = {item.name, item.files[0].place.lower()}
        if not own & seen:
            chosen.append(item)
            seen |= own
    return Manifest(tuple(shipped), tuple(chosen))


@settings(max_examples=40, deadline=None)
@given(whole_manifests())
def test_what_was_written_reads_back_and_writes_the_same_text(manifest: Manifest) -> None:
    text = dump(manifest)
    assert parse(text) == manifest
    assert dump(parse(text)) == text
    assert text.isascii()


@functools.cache
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((CHECKOUT / SCHEMA).read_text(encoding="utf-8"))
    return loaded


@settings(max_examples=40, deadline=None)
@given(whole_manifests())
def test_what_was_written_fits_the_published_schema(manifest: Manifest) -> None:
    assert fits(json.loads(dump(manifest)), schema(), schema())


def valid() -> dict[str, Any]:
    file = {"path": "pocket/assets/a.safetensors", "bytes": 3, "sha256": "0" * 64}
    entry = {"name": "a", "about": "", "base": "sd1", "licence": "MIT", "source": "", "files": [file]}
    remote = {
        "repo": "who/what",
        "revision": "main",
        "path": "unet/a.bin",
        "bytes": 0,
        "sha256": "",
        "shown": "2.24 GB",
        "modelscope": "",
        "to": "",
    }
    published = {
        "name": "b",
        "about": "",
        "base": "",
        "languages": ["zh"],
        "licence": "",
        "licence_class": "undeclared",
        "consent": True,
        "gated": False,
        "card": "https://huggingface.co/who/what",
        "needs": [],
        "files": [remote],
        "conversion": {"preset": "b", "give": ["unet"], "unet": "auto", "reference": ""},
        "by_hand": "",
    }
    return {"$schema": SCHEMA, "format": 2, "entries": [entry], "published": [published]}


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
    assert len(parse(json.dumps(valid())).published) == 1
    assert fits(valid(), schema(), schema())


WRONG = [
    ("format", 1),
    ("format", 3),
    ("format", "2"),
    ("format", True),
    ("format", KeyError),
    ("$schema", KeyError),
    ("$schema", "https://example.org"),
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
    ("entries/0/files/0/bytes", 1.5),
    ("entries/0/files/0/bytes", True),
    ("entries/0/files/0/bytes", "3"),
    ("entries/0/files/0/sha256", "0" * 63),
    ("entries/0/files/0/sha256", "G" * 64),
    ("entries/0/files/0/sha256", KeyError),
    ("published", KeyError),
    ("published/0", None),
    ("published/0/name", "B"),
    ("published/0/base", "flux"),
    ("published/0/languages", ["Chinese"]),
    ("published/0/languages", "zh"),
    ("published/0/licence_class", "free"),
    ("published/0/consent", False),
    ("published/0/consent", 1),
    ("published/0/gated", None),
    ("published/0/card", "http://huggingface.co/x"),
    ("published/0/card", "https://user:secret@huggingface.co/x"),
    ("published/0/card", "https://huggingface.co/a b"),
    ("published/0/needs", "b"),
    ("published/0/needs", ["B"]),
    ("published/0/files", []),
    ("published/0/by_hand", "because"),
    ("published/0/conversion", {}),
    ("published/0/conversion/give", []),
    ("published/0/conversion/give", ["../x"]),
    ("published/0/conversion/unet", "all"),
    ("published/0/conversion/preset", ""),
    ("published/0/files/0/repo", "what"),
    ("published/0/files/0/repo", "../what"),
    ("published/0/files/0/repo", "who/what/more"),
    ("published/0/files/0/revision", "abc"),
    ("published/0/files/0/revision", "refs/pr/0"),
    ("published/0/files/0/revision", "main\n"),
    ("published/0/files/0/path", "../a.bin"),
    ("published/0/files/0/path", "C:\\a.bin"),
    ("published/0/files/0/bytes", 5),  # beside a rounded size
    ("published/0/files/0/shown", "2,24 GB"),
    ("published/0/files/0/shown", "0 GB"),
    ("published/0/files/0/sha256", "x"),
    ("published/0/files/0/modelscope", "https://modelscope.cn/a/b"),
    ("published/0/files/0/to", "custom_nodes/x.py"),
    ("published/0/files/0/to", "checkpoints"),
    ("published/0/files/0/to", "checkpoints/../../x"),
    ("published/0/files/0/surplus", ""),
]


@pytest.mark.parametrize(("place", "value"), WRONG)
def test_a_wrong_field_is_a_typed_error_and_does_not_fit_the_schema(place: str, value: object) -> None:
    text = changed(place, value)
    with pytest.raises(ManifestError, match="expected"):
        parse(text)
    assert not fits(json.loads(text), schema(), schema())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '"x"', "\x00", "[" * 100_000])
def test_what_is_no_manifest_at_all_is_a_typed_error(text: str) -> None:
    with pytest.raises(ManifestError):
        parse(text)


def test_a_name_may_stand_only_once() -> None:
    data = valid()
    data["entries"].append(copy.deepcopy(data["entries"][0]))
    with pytest.raises(ManifestError, match="once"):
        parse(json.dumps(data))
    with pytest.raises(ManifestError, match="once"):
        parse(changed("published/0/name", "a"))


def test_needs_are_known_and_need_nothing_themselves() -> None:
    for need in ("c", "b"):
        with pytest.raises(ManifestError, match="needs no other"):
            parse(changed("published/0/needs", [need]))


def test_one_place_is_for_one_file() -> None:
    data = valid()
    second = copy.deepcopy(data["published"][0]) | {"name": "c"}
    data["published"].append(second)
    assert len(parse(json.dumps(data)).published) == 2, "two sets may share a file"
    second["files"][0]["sha256"] = "0" * 64
    with pytest.raises(ManifestError, match="one file for each place"):
        parse(json.dumps(data))


def test_what_is_given_to_the_converter_lies_in_the_set() -> None:
    for given_path in ("unet", "unet/a.bin", "."):
        parse(changed("published/0/conversion/give", [given_path]))
    with pytest.raises(ManifestError, match="give"):
        parse(changed("published/0/conversion/give", ["vae"]))


def test_a_rounded_size_bounds_the_exact_one() -> None:
    file = RemoteFile("a/b", "main", "x", shown="2.24 GB")
    assert file.least_bytes <= 2_236_000_000 < 2_244_999_999 <= (file.most_bytes or 0)
    assert file.least_bytes > 2_200_000_000 and (file.most_bytes or 0) < 2_280_000_000
    assert RemoteFile("a/b", "main", "x", shown="110 kB").least_bytes <= 109_540
    exact = replace(file, shown="", bytes=7)
    assert (exact.least_bytes, exact.most_bytes) == (7, 7)
    unknown = replace(file, shown="")
    assert (unknown.least_bytes, unknown.most_bytes) == (1, None)
    assert file.place == f"{DOWNLOADS}/a--b/x"


# -- the manifest that ships ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Manifest:
    return parse((CHECKOUT / "weights_manifest.json").read_text(encoding="utf-8"))


def test_the_shipped_manifest_is_as_dump_writes_it_and_fits_the_schema(shipped: Manifest) -> None:
    text = (CHECKOUT / "weights_manifest.json").read_text(encoding="utf-8")
    assert dump(shipped) == text
    assert fits(json.loads(text), schema(), schema())


def test_every_conversion_is_a_row_of_the_table_with_its_base_and_languages(shipped: Manifest) -> None:
    table = presets.published()
    for item in shipped.published:
        if item.conversion is None:
            continue
        row = table.methods.get(item.conversion.preset)
        if row is None:
            assert item.conversion.preset in table.towers and item.base == ""
            continue
        assert (item.base, item.languages) == (row.base, row.languages), item.name
        assert item.card == row.source
        for need in map(shipped.find, item.needs):
            assert need is not None
            towers = {need.name, need.conversion.preset if need.conversion else need.name}
            assert any(row.tower.startswith(name) for name in towers), f"{item.name} needs {need.name}"


def test_every_hash_of_the_table_that_the_manifest_names_is_the_same(shipped: Manifest) -> None:
    """The table pins what settles a choice; both were copied from the same pages."""
    table = presets.published()
    pinned = {digest for row in (*table.methods.values(), *table.towers.values()) for digest in row.sha256}
    told = {file.sha256 for item in shipped.published for file in item.files if file.sha256}
    not_offered = {
        "f35bc7ad4db5a47e87f4cef6cc4c643a7190f64a66927ff7aec4cd186ddcd4d2",  # Chinese-CLIP large again
        "62d48b4d841a3178511fa453df0dae59b22089ace64609cc9d5353d0a7f37c26",  # Taiyi's U-Net, SD 1.4's own
        "2d2c2e2537f67fbca7e8d7f18861ed6aed4c823d76613d4d93211ba1bea6f0c3",  # m18's U-Net as a pickle
    }
    assert pinned - told == not_offered


def test_licences_are_told_or_asked_for(shipped: Manifest) -> None:
    for item in shipped.published:
        assert item.about.endswith(".")
        assert bool(item.licence) == (item.licence_class != "undeclared"), item.name


def test_no_file_comes_from_a_branch_that_a_hash_contradicts(shipped: Manifest) -> None:
    """A commit stands in full; what is on main is either hashed, or said to be unverified."""
    for item in shipped.published:
        unverified = [file for file in item.files if not file.sha256 and file.is_pickle]
        if unverified:
            assert "not verified" in item.about, item.name
