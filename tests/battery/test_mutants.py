"""20,000 seeded mutants of valid files: each loads as a whole, true file, or is refused with a typed error.

A part of them runs in every test; all of them with `-m long`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import load_bridge, save_bridge
from language_bridge.conversion import presets
from language_bridge.conversion.containers import open_sources, read_foreign
from language_bridge.conversion.convert import convert
from language_bridge.encoders import guard
from language_bridge.encoders.file import load_encoder, read_encoder_header, save_encoder
from language_bridge.encoders.ledger import Ledger
from language_bridge.encoders.vocabulary import open_tokenizer, pieces
from language_bridge.encoders.xlmr import Xlmr
from language_bridge.manifest import lock
from language_bridge.manifest.adopt import adopt
from language_bridge.manifest.download import Wanted
from language_bridge.manifest.errors import FetchError
from language_bridge.manifest.part import Part
from language_bridge.manifest.schema import ManifestError, WeightFile, dump, parse
from language_bridge.manifest.verify import check
from language_bridge.tests.battery.bounds import bounded
from language_bridge.tests.battery.mutants import (
    Change,
    any_of,
    bytewise,
    header_edited,
    json_edited,
    program_edited,
)
from language_bridge.tests.bridges.test_file import toy_tower as small_tower
from language_bridge.tests.bridges.toys import WIDTH, toy_bridge, toy_header
from language_bridge.tests.conversion.layouts import (
    VOCAB_TXT,
    bert,
    model_folder,
    pea,
    save,
)
from language_bridge.tests.conversion.layouts import (
    random as weights,
)
from language_bridge.tests.conversion.test_convert import TABLE
from language_bridge.tests.encoders.toys import sentencepiece_model, toy_tower

CHECKOUT = Path(__file__).resolve().parents[2]
SEED = 20_261_121
MOST = 20_000
FEW = 400
TYPED = (BridgeError, FetchError, ManifestError)


@dataclass(frozen=True)
class Target:
    """A valid file, how it is changed, and what reads it; `read` raises when something odd came through."""

    name: str
    path: Path
    change: Change
    read: Callable[[Path], object]
    share: int = 2


def finite(tensors: dict[str, torch.Tensor]) -> None:
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())


def same_state(module: torch.nn.Module, whole: torch.nn.Module) -> None:
    """The very numbers: where a digest stands in the header, no other ones may come through."""
    one, other = module.state_dict(), whole.state_dict()
    assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def targets(folder: Path) -> list[Target]:
    """Every kind of file that a user may hand to the pack."""
    safetensors = any_of(bytewise, header_edited, header_edited)
    tower, inner = toy_tower(), small_tower()
    mlp, linear, branch = toy_bridge("mlp", WIDTH), toy_bridge("linear"), toy_bridge("branch")
    some = {"input_blocks.0.0.weight": torch.ones(4, 2), "middle_block.1.to_k.weight": torch.ones(4, 8)}
    save_bridge(folder / "plain.safetensors", toy_header(mlp), mlp)
    save_bridge(folder / "with tower.safetensors", toy_header(mlp), mlp, inner)
    save_bridge(folder / "with unet.safetensors", toy_header(linear, unet="kv"), linear, unet=some)
    save_bridge(folder / "branch.safetensors", toy_header(branch, unet="branch"), branch, unet=some)
    save_encoder(folder / "tower.safetensors", tower)
    save(folder / "adapter.safetensors", weights(pea("P3")))
    save(folder / "adapter.bin", weights(pea("P3")))
    save(folder / "last.ckpt", weights(pea("P3")), epoch=3, optimizer_states=[{"state": {0: torch.ones(3)}}])
    taiyi = model_folder(folder / "taiyi", weights(bert()), config={"a": [1]}, files={"vocab.txt": VOCAB_TXT})
    shards = folder / "shards"
    for number, name in enumerate(("layernorm.weight", "layernorm.bias"), 1):
        save(shards / f"model-0000{number}-of-00002.safetensors", weights({name: (16,)}))
    listed = {
        name: f"model-0000{number}-of-00002.safetensors"
        for number, name in enumerate(("layernorm.weight", "layernorm.bias"), 1)
    }
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}), encoding="utf-8")
    model = folder / "sentencepiece.bpe.model"
    model.write_bytes(sentencepiece_model("xlmr"))
    words = Xlmr.tokenizer_from({model.name: model.read_bytes()})
    (folder / "tokenizer.json").write_bytes(words)
    table = CHECKOUT / "conversion" / "presets.json"
    (folder / "presets.json").write_bytes(table.read_bytes())
    manifest = CHECKOUT / "weights_manifest.json"
    (folder / "manifest.json").write_bytes(manifest.read_bytes())
    record = lock.Record("a/b@main/x", 3, "0" * 64, "hub", True, False)
    made = lock.Made("language_bridges/x.safetensors", 3, "1" * 64)
    lock.write_lock(folder, lock.Lock({"checkpoints/x.bin": record}, {"x": (made,)}))
    pinned = (folder / "plain.safetensors").read_bytes()
    digest = hashlib.sha256(pinned).hexdigest()

    def bridge(path: Path) -> None:
        finite(load_bridge(path).bridge.state_dict())

    def with_tower(path: Path) -> None:
        loaded = load_bridge(path)
        finite(loaded.bridge.state_dict())
        assert loaded.encoder is not None
        same_state(loaded.encoder, inner)
        assert loaded.encoder.tokenizer_json == inner.tokenizer_json

    def with_unet(path: Path) -> None:
        loaded = load_bridge(path)
        finite({**loaded.bridge.state_dict(), **loaded.unet})
        assert loaded.unet

    def encoder(path: Path) -> None:
        loaded = load_encoder(path)
        same_state(loaded, tower)
        assert loaded.tokenizer_json == tower.tokenizer_json and loaded.tokenize("a cat")

    def foreign(path: Path) -> None:
        read = read_foreign(path)
        for name, shape in read.shapes.items():
            assert tuple(read[name].shape) == shape and read[name].dtype == read.dtypes[name]

    def converting(source: Path) -> Callable[[Path], None]:
        def reading(path: Path) -> None:
            out = path.parent / "out"
            for file in convert([source if source.is_dir() else path], out, presets=TABLE, overwrite=True):
                finite(guard.read_tensors(file, guard.read_layout(file)))
                header = read_encoder_header(file)
                if header is not None:
                    assert load_encoder(file).identity == header.identity

        return reading

    def sharded(_: Path) -> None:
        (part,) = open_sources([shards]).parts
        # A list of fewer, whole shards is a list; a tensor that is in none, or in another, is not read.
        assert all(part.weights[name].shape == (16,) and name in listed for name in part.weights)

    def vocabulary(path: Path) -> None:
        cut = open_tokenizer(Xlmr.tokenizer_from({model.name: path.read_bytes()}), 1000)[0]
        assert all(0 <= number < 1000 for number, _, _ in pieces(cut, "a red cat \u732b"))

    def tokenizer(path: Path) -> None:
        cut = open_tokenizer(path.read_bytes(), 1000)[0]
        assert all(0 <= number < 1000 for number, _, _ in pieces(cut, "a red cat \u732b"))

    def rows(path: Path) -> None:
        read = presets.read_presets(path)
        assert all(row.tower in read.towers for row in read.methods.values())

    def published(path: Path) -> None:
        read = parse(path.read_text(encoding="utf-8", errors="replace"))
        assert parse(dump(read)) == read
        for item in read.published:
            for file in item.files:
                assert (path.parent / file.place).resolve().is_relative_to(path.parent.resolve())

    def locked(path: Path) -> None:
        read = lock.read_lock(folder)
        for place in [*read.files, *(item.path for items in read.made.values() for item in items)]:
            assert (folder / place).resolve().is_relative_to(folder.resolve())

    def hashed(path: Path) -> None:
        wanted = WeightFile(path.name, len(pinned), digest)
        assert (check(path.parent, wanted) is None) == (path.read_bytes() == pinned)
        got = adopt([path.parent], path.parent / "out" / "adopted", Wanted("k", sha256=digest))
        assert (got is not None) == (path.read_bytes() == pinned)
        if got is not None:
            got.path.unlink()

    def unfinished(path: Path) -> None:
        target = folder / "parts" / "x.bin"
        with Part(target, "key") as part:
            assert part.size in (0, 8) and (not part.size or part.sha256 == state["sha256"])
            if part.size != 8:
                part.write(b"12345678")

    def verdicts(path: Path) -> None:
        with open(folder / "plain.safetensors", "rb") as file:
            facts = guard.Facts.of(path, file.fileno())
        assert Ledger(path).recall(facts, "x") is None

    state: dict[str, Any] = {
        **dict.fromkeys(("source", "host", "validator", "linked"), ""),
        "format": 1,
        "key": "key",
        "total": 16,
        "done": 8,
        "sha256": hashlib.sha256(b"12345678").hexdigest(),
    }
    (folder / "parts").mkdir()
    (folder / "parts" / "x.bin.part").write_bytes(b"12345678")
    (folder / "parts" / "x.bin.part.json").write_text(json.dumps(state), encoding="ascii")
    known = {"format": 1, "checks": 1, "verified": {"0" * 64: "1" * 64}}
    (folder / "verified.json").write_text(json.dumps(known), encoding="ascii")
    texts = any_of(bytewise, json_edited, json_edited)
    pickles = any_of(bytewise, program_edited, program_edited)
    return [
        Target("bridge", folder / "plain.safetensors", safetensors, bridge, 4),
        Target("bridge with a tower", folder / "with tower.safetensors", safetensors, with_tower, 4),
        Target("bridge with a U-Net part", folder / "with unet.safetensors", safetensors, with_unet),
        Target("branch", folder / "branch.safetensors", safetensors, with_unet),
        Target("tower", folder / "tower.safetensors", safetensors, encoder, 4),
        Target("adapter, read", folder / "adapter.safetensors", safetensors, foreign),
        Target(
            "adapter, converted", folder / "adapter.safetensors", safetensors, converting(folder / "x"), 1
        ),
        Target("pickle", folder / "adapter.bin", pickles, foreign, 8),
        Target("pickle of a trainer", folder / "last.ckpt", pickles, foreign, 8),
        Target("pickle, converted", folder / "adapter.bin", pickles, converting(folder / "x"), 1),
        Target("vocabulary", taiyi / "vocab.txt", bytewise, converting(taiyi), 1),
        Target("config", taiyi / "config.json", texts, converting(taiyi), 1),
        Target("list of shards", index, texts, sharded),
        Target("SentencePiece model", model, bytewise, vocabulary),
        Target("tokenizer.json", folder / "tokenizer.json", texts, tokenizer),
        Target("table", folder / "presets.json", texts, rows, 1),
        Target("manifest", folder / "manifest.json", texts, published, 1),
        Target("lock file", lock.lock_path(folder), texts, locked),
        Target("file of known hash", folder / "plain.safetensors", bytewise, hashed, 1),
        Target("state of a download", folder / "parts" / "x.bin.part.json", texts, unfinished, 1),
        Target("ledger", folder / "verified.json", texts, verdicts, 1),
    ]


def campaign(folder: Path, count: int) -> dict[str, Counter[str]]:
    """Make and read `count` mutants; for each target how many were read and how many were refused."""
    for part in ("good", "odd"):
        (folder / part).mkdir()
    found: dict[str, Counter[str]] = {}
    all_targets = targets(folder / "good")
    shares = sum(target.share for target in all_targets)
    slowest = 0.0
    for number, target in enumerate(all_targets):
        whole, seen = target.path.read_bytes(), found.setdefault(target.name, Counter())
        target.read(target.path)
        # What is found by its own place is changed there; all else is read from a file of its own.
        alone = target.path.suffix in (".safetensors", ".bin", ".ckpt") or target.name in (
            "ledger",
            "table",
            "manifest",
        )
        path = folder / "odd" / target.path.name if alone else target.path
        chance = random.Random(f"{SEED} {target.name}")
        for turn in range(max(2, count * target.share // shares)):
            mutant = target.change(whole, chance)
            path.write_bytes(mutant)
            began = time.process_time()
            try:
                with bounded(5.0):
                    target.read(path)
                seen["read" if mutant != whole else "the same"] += 1
            except TYPED as error:
                assert "expected:" in str(error) and len(str(error)) < 20_000
                seen["refused"] += 1
            except BaseException as error:
                kept = folder / f"mutant {number} {turn} of {target.name}"
                kept.write_bytes(mutant)
                raise AssertionError(f"{kept}: {type(error).__name__}: {error!s:.300}") from error
            slowest = max(slowest, time.process_time() - began)
        path.unlink(missing_ok=True)
        if not alone:
            path.write_bytes(whole)
    print(f"slowest: {slowest:.2f} s")
    for name, seen in found.items():
        print(f"{name}: {dict(seen)}")
    return found


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power failing."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_a_few_mutants_of_every_file_are_read_or_refused(tmp_path: Path, quick_disk: None) -> None:
    found = campaign(tmp_path, FEW)
    assert sum(sum(seen.values()) for seen in found.values()) >= FEW * 9 // 10
    refused = sum(seen["refused"] for seen in found.values())
    assert refused >= FEW // 3


@pytest.mark.slow
@pytest.mark.long
def test_twenty_thousand_mutants_are_read_or_refused(tmp_path: Path, quick_disk: None) -> None:
    found = campaign(tmp_path, MOST + 1500)  # some changes change nothing
    assert sum(seen["read"] + seen["refused"] for seen in found.values()) >= MOST
