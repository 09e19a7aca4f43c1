"""Every path that a file or a command line can hold, against the list of path attacks.

Manifest, lock file, table, names of sets and of written files, members of archives, lists of shards, names of
tensors and of stored numbers. Names in graphs: tests/nodes/test_path_attacks.py.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from language_bridge import install
from language_bridge.bridges.errors import LONGEST, BridgeError
from language_bridge.bridges.file import read_header
from language_bridge.conversion import presets
from language_bridge.conversion.containers import open_sources, read_foreign
from language_bridge.conversion.convert import convert
from language_bridge.encoders import guard
from language_bridge.encoders.file import load_encoder
from language_bridge.manifest import fetch, lock
from language_bridge.manifest.adopt import adopt
from language_bridge.manifest.connection import Refused, Wire
from language_bridge.manifest.download import Wanted
from language_bridge.manifest.errors import FetchError
from language_bridge.manifest.schema import DOWNLOADS, FOLDERS, ManifestError, WeightFile, is_plain, parse
from language_bridge.manifest.sources import addresses
from language_bridge.manifest.verify import check
from language_bridge.tests.attacks import attacks, in_arguments, untouched
from language_bridge.tests.battery.hostile_pickles import archive, stored, table, tensor, text, weights
from language_bridge.tests.battery.odd_safetensors import FOUR, entry, pack
from language_bridge.tests.conversion.layouts import VOCAB_TXT, bert, model_folder, pea, random, save
from language_bridge.tests.conversion.test_convert import TABLE
from language_bridge.tests.manifest.test_schema import valid

TYPED = (BridgeError, FetchError, ManifestError, Refused)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A whole weight file beside (and above) the folder `models` that may be read and written."""
    (tmp_path / "models" / "x").mkdir(parents=True)
    save(tmp_path / "models" / "inside.safetensors", random(pea("P3")))
    for place in (tmp_path, tmp_path.parent):
        save(place / "outside.safetensors", random(pea("P3")))
    return tmp_path / "outside.safetensors"


def refusals(names: list[str], call: Callable[[str], object]) -> int:
    """Call with every name; count the refusals, and let nothing untyped through."""
    count = 0
    for name in names:
        try:
            call(name)
        except TYPED as error:
            assert len(str(error)) < 4 * LONGEST
            str(error).encode("utf-8", "strict" if "\ud800" not in name else "replace")
            count += 1
    return count


# -- the manifest --------------------------------------------------------------------------------------------

FIELDS = (
    "entries/0/files/0/path",
    "entries/0/name",
    "published/0/name",
    "published/0/needs/0",
    "published/0/files/0/path",
    "published/0/files/0/to",
    "published/0/files/0/repo",
    "published/0/files/0/revision",
    "published/0/files/0/modelscope",
    "published/0/files/0/sha256",
    "published/0/conversion/preset",
    "published/0/conversion/give/0",
    "published/0/card",
)


def with_value(place: str, value: str) -> str:
    data = copy.deepcopy(valid())
    owner: Any = data
    *road, last = place.split("/")
    for step in road:
        owner = owner[int(step) if step.isdigit() else step]
    if isinstance(owner, list):
        owner[:] = [value]
    else:
        owner[last] = value
    return json.dumps(data)


@pytest.mark.parametrize("place", FIELDS)
def test_no_field_of_the_manifest_leads_out_of_its_folder(place: str, tmp_path: Path, victim: Path) -> None:
    """What is accepted stays below the models folder, under a name that means the same on every system."""
    models = (tmp_path / "models").resolve()
    accepted = 0
    for name in attacks(victim):
        try:
            manifest = parse(with_value(place, name))
        except ManifestError as error:
            assert len(str(error)) < 4 * LONGEST or len(name) > LONGEST
            continue
        accepted += 1
        for item in manifest.published:
            for file in item.files:
                assert is_plain(file.place) and file.place.split("/")[0] in (*FOLDERS, DOWNLOADS)
                assert (models / file.place).resolve().is_relative_to(models)
                for address in addresses(file, {}):
                    assert Wire({"huggingface.co", "hf-mirror.com", "www.modelscope.cn"}).require(address.url)
            paths = fetch.given_to_converter(item, [item], models)
            assert all(path.resolve().is_relative_to(models) for path in paths)
        for shipped in manifest.entries:
            assert all(is_plain(file.path) for file in shipped.files)
    assert accepted <= 4, "an empty field, or one that holds any word"


def test_a_shipped_path_is_checked_again_where_it_is_read(tmp_path: Path, victim: Path) -> None:
    """Also one that never went through the parser, and one that is a link out of the folder."""
    root = tmp_path / "models"
    facts = WeightFile("", victim.stat().st_size, fetch.measure(victim.parent, victim.name).sha256)
    for name in attacks(victim):
        problem = check(root, WeightFile(name, facts.bytes, facts.sha256))
        assert problem is not None, name
    (root / "link.safetensors").symlink_to(victim)
    problem = check(root, WeightFile("link.safetensors", facts.bytes, facts.sha256))
    assert problem is not None and "leads out" in problem.found


def test_two_places_that_differ_in_case_alone_are_refused() -> None:
    data = valid()
    first = data["published"][0]["files"][0]
    data["published"][0]["files"] = [first, first | {"path": "unet/A.bin"}]
    with pytest.raises(ManifestError, match="more than case"):
        parse(json.dumps(data))


# -- the lock file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["files", "made"])
def test_no_path_in_the_lock_file_leads_out(place: str, victim: Path) -> None:
    models = victim.parent / "models"
    record = {"key": "k", "bytes": 1, "sha256": "0" * 64, "source": "hub", "pinned": True, "told": True}
    path = lock.lock_path(models)
    path.parent.mkdir(parents=True)

    def read(name: str) -> None:
        files = {name: record} if place == "files" else {}
        made = {"x": [{"path": name, "bytes": 1, "sha256": "0" * 64}]} if place == "made" else {}
        path.write_text(json.dumps({"format": 1, "files": files, "made": made}), encoding="utf-8")
        found = lock.read_lock(models)
        for kept in [*found.files, *(item.path for items in found.made.values() for item in items)]:
            assert (models / kept).resolve().is_relative_to(models.resolve())

    names = attacks(victim)
    assert refusals(names, read) >= len(names) - 3


# -- names on the command line and in tables -----------------------------------------------------------------


def test_no_name_of_a_set_is_a_path(victim: Path) -> None:
    manifest = parse(json.dumps(valid()))
    models = victim.parent / "models"
    names = attacks(victim)
    with untouched(victim.parent):
        for call in (
            lambda name: fetch.find(manifest, name),
            lambda name: fetch.fetch_set(manifest, name, models, agreed=True, trusting=True),
            lambda name: list(fetch.set_problems(manifest, name, models)),
        ):
            assert refusals(names, call) == len(names)


def test_no_name_of_a_bridge_to_be_written_leads_out(tmp_path: Path, victim: Path) -> None:
    """`install.py convert --name`, and the names of a table."""
    out = tmp_path / "models" / "out"
    source = tmp_path / "models" / "inside.safetensors"
    names = attacks(victim)

    def call(name: str) -> None:
        (written,) = convert([source], out, presets=TABLE, name=name, overwrite=True)
        assert written.resolve().parent == out.resolve() and is_plain(written.name), written
        written.unlink()

    with untouched(tmp_path.parent):
        assert refusals(names, call) >= len(names) - 8
        if out.exists():
            out.rmdir()


@pytest.mark.parametrize("field", ["name", "tower", "family", "about", "source", "licence"])
def test_no_text_of_a_table_leads_out(field: str, tmp_path: Path, victim: Path) -> None:
    row = {
        "name": "t",
        "family": "bert",
        "match": {"width": 64},
        "window": 8,
        "mask_rule": "pad",
    }
    method = {"name": "m", "base": "sdxl", "kind": "mlp", "match": {"hidden": 16}, "tower": "t"}
    path = tmp_path / "models" / "table.json"
    source = tmp_path / "models" / "inside.safetensors"
    out = tmp_path / "models" / "out"

    def call(name: str) -> None:
        rows = {
            "format": 1,
            "towers": [row | ({field: name} if field in ("family",) else {})],
            "methods": [method | ({field: name} if field != "family" else {})],
        }
        path.write_text(json.dumps(rows), encoding="utf-8")
        read = presets.read_presets(path)
        for written in convert([source], out, presets=read, overwrite=True):
            assert written.resolve().parent == out.resolve() and is_plain(written.name), written

    with untouched(tmp_path.parent / "outside.safetensors"):
        refused = refusals(attacks(victim), call)
    assert refused >= 80 or field in ("about", "source", "licence", "family")
    assert not out.exists() or {file.parent for file in out.rglob("*")} == {out}


def quietly(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Run install.py in this process; an exit of the argument parser is its code."""
    try:
        return install.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        capsys.readouterr()


ARGUMENTS: dict[str, Callable[[str, Path], list[str]]] = {
    "get ID": lambda name, models: ["get", "--models", str(models), "--", name],
    "get --look": lambda name, models: ["get", "nothing", "--models", str(models), f"--look={name}"],
    "get --reference": lambda name, models: [
        "get",
        "nothing",
        "--models",
        str(models),
        f"--reference={name}",
    ],
    "get --models": lambda name, models: ["get", "nothing", f"--models={name}"],
    "verify ID": lambda name, models: ["verify", name],
    "pin ID": lambda name, models: ["pin", "--check", "--", name or "nothing"],
    "convert FILE": lambda name, models: ["convert", "--out", str(models / "out"), "--", name],
    "convert --as": lambda name, models: [
        *("convert", "--out", str(models / "out"), f"--as={name}", str(models / "inside.safetensors")),
    ],
    "convert --name": lambda name, models: [
        *("convert", "--out", str(models / "out"), f"--name={name}", str(models / "inside.safetensors")),
    ],
    "convert --presets": lambda name, models: [
        *("convert", "--out", str(models / "out"), f"--presets={name}", str(models / "inside.safetensors")),
    ],
    "convert --reference": lambda name, models: [
        *("convert", "--out", str(models / "out"), f"--reference={name}", str(models / "inside.safetensors")),
    ],
}


@pytest.mark.parametrize("place", ARGUMENTS)
def test_no_argument_of_install_ends_in_a_traceback_or_writes_elsewhere(
    place: str,
    tmp_path: Path,
    victim: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever types a path may name any file; what is odd is said in words, and nothing else is written."""
    models = tmp_path / "models"
    monkeypatch.chdir(models)
    monkeypatch.setattr(install, "find_comfyui", lambda pack=None: tmp_path)
    names = in_arguments(attacks(victim))
    assert len(names) >= 80
    if place == "convert FILE":  # one that names the victim itself may read it: that is what was typed
        names = [name for name in names if Path(name).name != victim.name or "\\" in name]
    modules = set(sys.modules)
    with untouched(tmp_path.parent):
        for name in names:
            assert quietly(ARGUMENTS[place](name, models), capsys) in (0, 1, 2), name
    assert "language_bridge" in modules


@pytest.mark.parametrize("kind", ["out", "towers"])
def test_an_odd_folder_to_write_into_is_an_error_in_words(kind: str, tmp_path: Path, victim: Path) -> None:
    inside = tmp_path / "models" / "inside.safetensors"
    for name in (
        "\0",
        "x\0y",
        "a" * 300,
        "a/" * 3000,
        str(inside),
        str(inside / "x"),
        "/dev/null/x",
        "/proc/x",
    ):
        folders = {"out": tmp_path / "o", "towers": tmp_path / "t"} | {kind: Path(name)}
        with pytest.raises(BridgeError):
            convert([inside], folders["out"], towers=folders["towers"], presets=TABLE, name="x")
            if kind == "towers":  # an adapter alone writes no tower
                raise BridgeError("x", "x", "x", "x")


# -- what files hold -----------------------------------------------------------------------------------------


def test_no_list_of_shards_leads_out_of_its_folder(tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "models" / "shards"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"

    def call(name: str) -> None:
        index.write_text(json.dumps({"weight_map": {"layernorm.weight": name}}), encoding="utf-8")
        open_sources([folder])

    names = attacks(victim)
    assert refusals(names, call) == len(names)


def test_no_name_of_a_tensor_or_of_stored_numbers_is_a_path(tmp_path: Path, victim: Path) -> None:
    names = attacks(victim)
    path = tmp_path / "models" / "odd.safetensors"
    plain = sum(guard.TENSOR_NAME.fullmatch(name) is not None for name in names)

    def as_tensor(name: str) -> None:
        path.write_bytes(pack({name: entry()}, FOUR))
        guard.read_layout(path)

    def as_tensor_in_a_pickle(name: str) -> None:
        file = path.with_suffix(".bin")
        code = b"\x80\x02" + table((text(name), tensor())) + b"."
        file.write_bytes(archive(code))
        read_foreign(file)

    def as_storage(name: str) -> None:
        file = path.with_suffix(".bin")
        file.write_bytes(archive(weights(tensor(stored(key=name)))))
        read_foreign(file)

    with untouched(victim.parent.parent / "x"):
        assert refusals(names, as_tensor) == len(names) - plain
        assert refusals(names, as_tensor_in_a_pickle) == len(names) - plain
        assert refusals(names, as_storage) == len(names)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_no_member_of_an_archive_is_a_path(tmp_path: Path, victim: Path) -> None:
    path = tmp_path / "models" / "odd.bin"
    names = [name for name in attacks(victim) if "\ud800" not in name and len(name) < 65_000]
    names = [name for name in names if name.split("\0")[0]]  # zipfile writes no member without a name

    def as_member(name: str) -> None:
        path.write_bytes(archive(weights(tensor()), more=((name, b"x"),)))
        read_foreign(path)

    def as_root(name: str) -> None:
        path.write_bytes(archive(weights(tensor()), root=name))
        assert set(read_foreign(path)) == {"fc.weight"}

    def as_record(name: str) -> None:
        path.write_bytes(archive(weights(tensor()), {"0": FOUR * 4, name: b"x"}))
        read_foreign(path)

    with untouched(tmp_path.parent / "x"):
        assert refusals(names, as_member) == len(names)
        assert refusals(names, as_record) == len(names)
        assert refusals(names, as_root) >= 60, "a root is no path: it is never written to the disk"
    assert sorted(file.name for file in (tmp_path / "models").iterdir()) == [
        "inside.safetensors",
        "odd.bin",
        "x",
    ]


def test_files_with_such_names_are_read_or_refused_as_files(tmp_path: Path, victim: Path) -> None:
    """A path in the hands of a reader: what is no file of a model folder is refused, typed and at once."""
    folder = tmp_path / "models"
    for reader in (
        guard.read_layout,
        read_header,
        load_encoder,
        read_foreign,
        lambda path: open_sources([path]),
        lambda path: (
            adopt([path], folder / "adopted", Wanted("k", sha256="0" * 64)) or guard.read_layout(path)
        ),
    ):
        names = [name for name in attacks(victim) if Path(name).name != victim.name]
        # A folder that somebody names himself may be opened; whether it holds weights is another question.
        names = [name for name in names if len(name) > 200 or not (folder / name).is_dir()]
        assert refusals(names, lambda name: reader(folder / name)) == len(names) >= 60  # noqa: B023


@pytest.mark.skipif(os.name != "posix", reason="links need a right on Windows")
@pytest.mark.parametrize(
    "what", ["weights", "vocab.txt", "config.json", "tokenizer", "text_encoder", "shard"]
)
def test_links_in_a_downloaded_folder_lead_nowhere(what: str, tmp_path: Path, victim: Path) -> None:
    """A folder that was cloned from somewhere may hold links; each way out is tried."""
    ways = [
        victim,
        Path("../../outside.safetensors"),
        Path("/etc/passwd"),
        Path("/proc/self/mem"),
    ]
    ways += [Path("nowhere")] if what == "weights" else []  # without the others a folder is whole
    for number, way in enumerate(ways):
        folder = model_folder(
            tmp_path / "models" / f"{what} {number}",
            random(bert()),
            config={},
            files={"vocab.txt": VOCAB_TXT},
        )
        place = folder / {"weights": "pytorch_model.bin"}.get(what, what)
        if what in ("tokenizer", "text_encoder"):
            outside = model_folder(
                tmp_path / f"elsewhere {number}", random(bert()), files={"vocab.txt": b"x"}
            )
            way = outside
        elif what == "shard":
            (folder / "pytorch_model.bin").unlink()
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "shard"}}), encoding="utf-8"
            )
        else:
            place.unlink()
        place.symlink_to(way)
        with pytest.raises(BridgeError):
            open_sources([folder])


def test_the_tensors_of_a_link_out_are_never_in_a_bridge(tmp_path: Path, victim: Path) -> None:
    secret = random(pea("P3"), seed=77)
    save(tmp_path / "secret.safetensors", secret)
    folder = tmp_path / "models" / "cloned"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(BridgeError, match="leads out of the folder"):
        convert([folder], tmp_path / "out", presets=TABLE)
    assert not (tmp_path / "out").exists() and torch.is_tensor(secret["layernorm.weight"])
