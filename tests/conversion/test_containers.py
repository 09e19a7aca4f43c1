"""The guarded door: every odd or hostile file is refused in words, and nothing in it is run."""

from __future__ import annotations

import json
import os
import random as chance
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.conversion import containers
from language_bridge.conversion.containers import open_sources, provenance, read_foreign
from language_bridge.tests.conversion.layouts import model_folder, random, save

SHAPES = {"fc.weight": (6, 4), "fc.bias": (6,)}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save(tmp_path / "good.bin", random(SHAPES))


def refused(path: Path) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        read_foreign(path)
    error = caught.value
    assert error.found and error.expected and error.action
    assert "weights_only" not in str(error), "nobody may be told to switch the protection off"
    return error


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_ending_is_read_number_for_number(tmp_path: Path, ending: str, dtype: torch.dtype) -> None:
    weights = random(SHAPES, dtype=dtype)
    read = read_foreign(save(tmp_path / f"weights{ending}", weights))
    assert dict(read.shapes) == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert set(read.dtypes.values()) == {dtype}
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


def test_a_lightning_checkpoint_is_its_state_dict(tmp_path: Path) -> None:
    weights = random(SHAPES)
    around: dict[str, Any] = {
        "epoch": 3,
        "global_step": 9,
        "optimizer_states": [{"state": {0: torch.ones(3)}}],
    }
    read = read_foreign(save(tmp_path / "last.ckpt", weights, **around))
    assert set(read) == set(weights)
    assert torch.equal(read["fc.weight"], weights["fc.weight"])


def test_an_old_lightning_checkpoint_may_name_its_callback(tmp_path: Path) -> None:
    name, module = "ModelCheckpoint", "pytorch_lightning.callbacks.model_checkpoint"
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": random(SHAPES), "callbacks": {torch.float32: {"best": 0.5}}}, path)
    rewrite(path, lambda program: program.replace(b"ctorch\nfloat32\n", f"c{module}\n{name}\n".encode()))
    assert set(read_foreign(path)) == set(SHAPES)


def test_parameters_and_ordered_dicts_are_plain(tmp_path: Path) -> None:
    layer = torch.nn.GRUCell(4, 6)
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    torch.save(OrderedDict(w=torch.nn.Parameter(torch.ones(2))), tmp_path / "b.pt")
    assert torch.equal(read_foreign(tmp_path / "a.pt")["weight_ih"], layer.weight_ih)
    assert type(read_foreign(tmp_path / "b.pt")["w"]) is torch.Tensor


# -- pickles ------------------------------------------------------------------------------------------


class Command:
    """What an attacker writes: unpickling it calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        function, *arguments = self.call
        return function, tuple(arguments)


def rewrite(path: Path, change: Any, **keywords: Any) -> None:
    """Write the archive anew with another program."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", **keywords) as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize(
    "call",
    [
        (os.system, "echo run > ran"),
        (os.mkdir, "ran"),
        (print, "ran"),
        (getattr, "x", "upper"),
        (Path, "ran"),
    ],
    ids=lambda call: call[0].__name__,
)
def test_a_pickle_that_calls_something_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("weight", "beside"):
        path = tmp_path / f"{place}.bin"
        hostile = {"fc.weight": torch.ones(2), "x": Command(*call)}
        torch.save(hostile if place == "weight" else {"state_dict": random(SHAPES), **hostile}, path)
        error = refused(path)
        assert "mention" in error.found
    assert not (tmp_path / "ran").exists()


def test_a_class_of_the_authors_own_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": random(SHAPES), "args": Command(Command)}, tmp_path / "stage-1.ckpt")
    assert "Command" in refused(tmp_path / "stage-1.ckpt").found


def test_torch_itself_may_be_asked_for_nothing_but_tensors(tmp_path: Path) -> None:
    for function in (torch.load, torch.hub.load, torch.jit.load):
        torch.save({"x": Command(function, "http://localhost/")}, tmp_path / "x.pt")
        assert "mention" in refused(tmp_path / "x.pt").found


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_do_not_get_around_the_check(tmp_path: Path, protocol: int) -> None:
    torch.save({"x": Command(os.system, "true")}, tmp_path / "x.pt", pickle_protocol=protocol)
    refused(tmp_path / "x.pt")


def test_names_that_torch_was_taught_elsewhere_are_still_refused(tmp_path: Path) -> None:
    torch.save({"x": Command(os.getcwd)}, tmp_path / "x.pt")
    with torch.serialization.safe_globals([os.getcwd]):
        refused(tmp_path / "x.pt")


def test_torchs_own_refusal_reaches_nobody_as_advice(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_check_program", lambda *_: None)
    torch.save({"x": Command(os.system, "true")}, good)
    assert "posix.system" in refused(good).found or "nt.system" in refused(good).found


def test_the_format_before_torch_1_6_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(random(SHAPES), path, _use_new_zipfile_serialization=False)
    assert "no zip archive" in refused(path).found


def test_a_zip_bomb_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.bin"
    torch.save({"x": torch.zeros(4_000_000)}, path)
    rewrite(path, lambda program: program, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "compressed" in refused(path).found


def test_a_directory_that_claims_more_than_the_file_holds_is_refused(good: Path) -> None:
    data = bytearray(good.read_bytes())
    central = data.find(b"PK\x01\x02")
    while central >= 0:
        struct.pack_into("<II", data, central + 20, 1 << 28, 1 << 28)
        central = data.find(b"PK\x01\x02", central + 4)
    good.write_bytes(data)
    refused(good)


@pytest.mark.parametrize(
    "member", ["archive/code/x.py", "archive/constants.pkl", "../x", "other/data/0", "a"]
)
def test_an_archive_with_other_members_is_refused(good: Path, member: str) -> None:
    with zipfile.ZipFile(good, "a") as archive:
        archive.writestr(member, b"x")
    refused(good)


def test_a_member_that_stands_there_twice_is_refused(good: Path) -> None:
    with zipfile.ZipFile(good) as archive:
        name = archive.namelist()[0]
    with zipfile.ZipFile(good, "a") as archive, pytest.warns(UserWarning):
        archive.writestr(name, b"x")
    refused(good)


def test_bytes_before_or_behind_the_archive_are_refused(good: Path) -> None:
    data = good.read_bytes()
    for changed in (data + b"x", b"PK\x03\x04" + data, data + b"PK\x05\x06" + bytes(18)):
        good.write_bytes(changed)
        refused(good)


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"x{ending}", random(SHAPES))
    data = path.read_bytes()
    for length in sorted({0, 1, 3, 8, 40, len(data) // 2, len(data) - 300, len(data) - 22, len(data) - 1}):
        path.write_bytes(data[: max(length, 0)])
        refused(path)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wide.bin"
    torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, path)
    assert "bytes claimed" in refused(path).found
    torch.save({f"x{n}": torch.zeros(100, 100).T for n in range(3)}, path)
    assert len(read_foreign(path)) == 3, "a transposed tensor is an ordinary one"
    shared = torch.zeros(1000)
    torch.save({f"x{n}": shared for n in range(50)}, path)
    assert "tensors of 200000 bytes" in refused(path).found


@pytest.mark.parametrize(
    "loaded",
    [
        [torch.ones(2)],
        torch.ones(2),
        {"x": [torch.ones(2)]},
        {"x": 3},
        {3: torch.ones(2)},
        {"a b": torch.ones(2)},
        {"x" * 300: torch.ones(2)},
        {"x": torch.ones(2).to_sparse()},
        {"x": torch.ones(2, dtype=torch.complex64)},
        {"x": torch.ones(2, device="meta")},
        {},
    ],
    ids=lambda loaded: repr(loaded)[:40],
)
def test_what_is_no_tensor_by_name_is_refused(tmp_path: Path, loaded: Any) -> None:
    torch.save(loaded, tmp_path / "x.pt")
    refused(tmp_path / "x.pt")


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from language_bridge.encoders import guard

    torch.save({f"x{n}": torch.ones(1) for n in range(40)}, tmp_path / "x.pt")
    monkeypatch.setattr(guard, "MOST_TENSORS", 30)
    assert "40" in refused(tmp_path / "x.pt").found


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_a_file_with_any_byte_changed_is_read_or_refused_in_words(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"x{ending}", random(SHAPES))
    whole = path.read_bytes()
    generator = chance.Random(0)
    read = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.choice([1, 1, 2, 8])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            weights = read_foreign(path)
            assert all(weights[name].shape == shape for name, shape in weights.shapes.items())
            read += 1
        except BridgeError:
            continue
    assert 0 < read < 400


# -- stand-ins and places ------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
        (b"\r\n <HTML>", "web page"),
        (b'<?xml version="1.0"?><Error>', "web page"),
        (b"", "0 bytes"),
        (b"not a model at all, but long enough to be read as a header", ""),
        (os.urandom(4096), ""),
    ],
)
def test_a_stand_in_for_weights_is_called_by_its_name(
    tmp_path: Path, ending: str, content: bytes, word: str
) -> None:
    path = tmp_path / f"model{ending}"
    path.write_bytes(content)
    assert word in refused(path).found


def test_a_file_that_is_none_or_missing_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.bin")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    assert ".txt" in refused(tmp_path / "notes.txt").found
    (tmp_path / "folder.bin").mkdir()
    refused(tmp_path / "folder.bin")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.bin")
        assert "no ordinary file" in refused(tmp_path / "pipe.bin").found


def test_an_oversized_file_is_refused_by_its_size(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "LARGEST_FILE_BYTES", 100)
    assert f"{good.stat().st_size} bytes" in refused(good).found


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json", "vocab.txt"])
def test_a_link_out_of_a_model_folder_is_refused(tmp_path: Path, good: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model", random(SHAPES), config={}, files={"vocab.txt": b"x"})
    secret = tmp_path / "secret"
    secret.write_bytes(good.read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(BridgeError, match="leads out of the folder"):
        open_sources([folder])


def test_a_linked_part_folder_is_refused(tmp_path: Path) -> None:
    model_folder(tmp_path / "elsewhere", random(SHAPES))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "text_encoder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BridgeError, match="leads out of the folder"):
        open_sources([tmp_path / "model"])


def test_the_hubs_cache_links_to_its_own_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    save(repository / "blobs" / "x.bin", random(SHAPES)).rename(repository / "blobs" / "0123")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_model.bin").symlink_to("../../blobs/0123")
    assert len(open_sources([snapshot]).parts[0].weights) == 2


# -- folders -------------------------------------------------------------------------------------------


def test_a_folder_gives_weights_config_and_tokenizer(tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path / "m",
        random(SHAPES),
        config={"model_type": "bert"},
        files={"vocab.txt": b"a\n", "x.py": b"1"},
    )
    source = open_sources([folder])
    (part,) = source.parts
    assert (dict(part.config), dict(part.files)) == ({"model_type": "bert"}, {"vocab.txt": b"a\n"})
    assert {path.name for path in source.paths} == {"pytorch_model.bin", "config.json", "vocab.txt"}


def test_a_diffusers_folder_gives_its_parts_with_the_tokenizer_beside_them(tmp_path: Path) -> None:
    root = tmp_path / "Alt"
    model_folder(root / "text_encoder", random(SHAPES), config={"a": 1})
    model_folder(root / "unet", random(SHAPES), name="diffusion_pytorch_model.safetensors")
    model_folder(root / "vae", random(SHAPES), name="diffusion_pytorch_model.bin")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.txt").write_bytes(b"a\n")
    text, unet = open_sources([root]).parts
    assert (text.name, unet.name) == ("Alt/text_encoder", "Alt/unet")
    assert "vocab.txt" in text.files
    (single,) = open_sources([root / "text_encoder" / "pytorch_model.bin"]).parts
    assert "vocab.txt" in single.files and single.config == {"a": 1}


def test_what_lies_beside_a_single_file_of_another_name_is_not_its_own(tmp_path: Path) -> None:
    model_folder(
        tmp_path, random(SHAPES), name="some-model.ckpt", config={"a": 1}, files={"vocab.txt": b"a\n"}
    )
    (part,) = open_sources([tmp_path / "some-model.ckpt"]).parts
    assert not part.files and not part.config


def test_tokenizer_files_may_be_named_alone(tmp_path: Path, good: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"a\n")
    (tmp_path / "config.json").write_bytes(b'{"a": 1}')
    source = open_sources([good, tmp_path / "vocab.txt", tmp_path / "config.json"])
    assert (dict(source.files), dict(source.config)) == ({"vocab.txt": b"a\n"}, {"a": 1})


def test_safetensors_are_preferred_and_several_files_are_not_guessed_between(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", random(SHAPES, seed=1))
    save(folder / "model.safetensors", random(SHAPES, seed=2))
    (part,) = open_sources([folder]).parts
    assert part.paths[0].name == "model.safetensors"
    folder = tmp_path / "n"
    for name in ("one.pth", "two.pth"):
        save(folder / name, random(SHAPES))
    with pytest.raises(BridgeError, match="several weight files"):
        open_sources([folder])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BridgeError, match="holds no weights"):
        open_sources([tmp_path / "empty"])


@pytest.mark.parametrize(
    "text", [b"{'a': True}", b'{"a": True}', b'{"a": 1, "a": 2}', b"[]", b"\xff", b"{" * 9999]
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = model_folder(tmp_path / "m", random(SHAPES), files={"config.json": text})
    with pytest.raises(BridgeError, match=r"config\.json"):
        open_sources([folder])


def shards(folder: Path, ending: str) -> dict[str, Any]:
    weights = random(SHAPES)
    first, second = f"model-00001-of-00002{ending}", f"model-00002-of-00002{ending}"
    save(folder / first, {"fc.weight": weights["fc.weight"]})
    save(folder / second, {"fc.bias": weights["fc.bias"]})
    return {"metadata": {"total_size": 1}, "weight_map": {"fc.weight": first, "fc.bias": second}}


def write_index(folder: Path, index: object, ending: str) -> None:
    name = "model.safetensors.index.json" if ending == ".safetensors" else "pytorch_model.bin.index.json"
    (folder / name).write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_folder_in_shards_is_read_as_one(tmp_path: Path, ending: str) -> None:
    write_index(tmp_path, shards(tmp_path, ending), ending)
    (part,) = open_sources([tmp_path]).parts
    weights = random(SHAPES)
    assert all(torch.equal(part.weights[name], tensor) for name, tensor in weights.items())
    assert len(part.paths) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"fc.weight": "../x.safetensors"},
        {"fc.weight": "/etc/passwd"},
        {"fc.weight": 3},
        {"fc.weight": "model-00002-of-00002.safetensors"},
        {"more": "model-00002-of-00002.safetensors"},
        {"fc.weight": "model-00003-of-00003.safetensors"},
    ],
)
def test_a_list_of_shards_that_does_not_agree_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    index = shards(tmp_path, ".safetensors")
    index["weight_map"] |= change
    write_index(tmp_path, index, ".safetensors")
    with pytest.raises(BridgeError):
        open_sources([tmp_path])


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, ".safetensors")
    save(tmp_path / "model-00002-of-00002.safetensors", random(SHAPES))
    write_index(tmp_path, index, ".safetensors")
    with pytest.raises(BridgeError, match="missing or twice"):
        open_sources([tmp_path])
    write_index(tmp_path, {"weight_map": {}}, ".safetensors")
    with pytest.raises(BridgeError, match="no weight_map"):
        open_sources([tmp_path])


def test_provenance_names_size_and_hash(good: Path) -> None:
    import hashlib

    (fact,) = provenance((good,))
    data = good.read_bytes()
    assert fact == {"name": "good.bin", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_numbers_stay_on_the_disk_until_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3), "b": torch.ones(3)}, path)
    weights = read_foreign(path)
    assert "a" in weights and "c" not in weights and list(weights) == ["a", "b"]
    with pytest.raises(KeyError):
        weights["c"]
