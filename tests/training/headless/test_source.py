"""Batches from shards do not depend on who reads them, and one bad picture costs one picture."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from language_bridge.bridges.base import Hidden
from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders.file import load_encoder
from language_bridge.training.chance import Chance
from language_bridge.training.headless.models import embedded, open_model
from language_bridge.training.headless.source import Reading, ShardSource
from language_bridge.training.headless.stream import Stream
from language_bridge.training.published import Rules
from language_bridge.training.settings import Settings
from language_bridge.training.source import Batch

from .toys import CAT, member, picture, row, write_shard

SHAPES = ((32, 48), (32, 32))
RULES = Rules(least_area=0)
SETTINGS = Settings(steps=8, batch=4, drop=0.5, seed=3)


@pytest.fixture(scope="module")
def models(small: Path) -> dict[str, Any]:
    """The parts of both models that a source asks."""
    opened = {
        name: open_model(small / name, device="cpu", dtype=torch.float32, unet=False)
        for name in ("sd1", "xl")
    }
    return {**opened, "tower": load_encoder(small / "tower.safetensors").eval()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shards of two shapes; the second and the seventh picture end in the middle."""
    folder = tmp_path_factory.mktemp("pictures")
    made: list[Path] = []
    for number in range(3):
        rows = []
        for seed in range(6 * number, 6 * number + 6):
            fields, content = row(seed, width=40 + seed, height=(64, 40)[seed % 2])
            rows.append((fields, content[:-200] if seed in (1, 6) else content))
        made.append(write_shard(folder / f"{number}.tar", rows, 6 * number))
    return made


@contextmanager
def source(
    shards: list[Path], models: dict[str, Any], model: str = "sd1", **changes: Any
) -> Iterator[ShardSource]:
    opened = models[model]
    stream = Stream(shards, RULES.fault, changes.pop("shapes", SHAPES), batch=4, seed=3, window=2)
    made = ShardSource(
        stream,
        RULES,
        models["tower"],
        opened.english,
        changes.pop("latents", opened.latents),
        **{"device": "cpu", "pooled": opened.pooled, "embedding": opened.sizes, "seed": 3} | changes,
    )
    try:
        yield made
    finally:
        made.close()


def batches(
    one: ShardSource, steps: int, part: tuple[int, int] = (0, 1), micro: int = 4
) -> list[list[Batch]]:
    """What a trainer would see in this part of the processes, by micro-batches of so many."""
    found: list[list[Batch]] = []
    for step in range(steps):
        numbers = one.at(step)
        drawn = Chance(SETTINGS).at(step, numbers, one.shape(numbers[0]))
        share = len(numbers) // part[1]
        mine = drawn.part(part[0] * share, (part[0] + 1) * share)
        found.append([one.batch(mine.part(at, at + micro)) for at in range(0, share, micro)])
    return found


def joined(parts: list[Batch]) -> dict[str, torch.Tensor]:
    """All tensors of some batches, one behind the other."""
    found: dict[str, torch.Tensor] = {}
    for name in ("latents", "english", "english_pooled", "native_only", "sizes", "ids", "mask", "hidden"):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Hidden):
            values = [value.states for value in values]
        if values[0] is not None:
            found[name] = torch.cat(values)
    return found


@pytest.mark.parametrize(("parts", "micro"), [(2, 2), (1, 1), (4, 1)])
def test_cutting_a_batch_changes_no_example(
    shards: list[Path], models: dict[str, Any], parts: int, micro: int
) -> None:
    """Processes and micro-batches together see what one process sees at once, bad pictures included."""
    with source(shards, models, "xl") as one:
        whole = [joined(each) for each in batches(one, 6)]
    seen: list[list[Batch]] = [[] for _ in whole]
    for index in range(parts):
        with source(shards, models, "xl", part=(index, parts)) as one:
            for step, each in enumerate(batches(one, 6, (index, parts), micro)):
                seen[step] += each
    for expected, got in zip(whole, seen, strict=True):
        together = joined(got)
        assert (
            together.keys() == expected.keys() >= {"latents", "english", "english_pooled", "sizes", "hidden"}
        )
        for name, value in expected.items():
            torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_picture_that_cannot_be_read_is_counted_and_replaced(
    shards: list[Path], models: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A whole example stands in its place, captions and all; it is named once."""
    with source(shards, models) as one:
        found = [part for each in batches(one, 12) for part in each]
        assert one.unreadable == 2
    assert all(len(part.latents) == len(part.english) == 4 for part in found if part.latents is not None)
    assert all(bool(torch.isfinite(part.latents).all()) for part in found if part.latents is not None)
    assert [record.message for record in caplog.records if "cannot be read" in record.message].__len__() == 2


def test_shards_of_bad_pictures_alone_are_an_error(tmp_path: Path, models: dict[str, Any]) -> None:
    rows = [(row(seed)[0], picture(seed=seed)[:-200]) for seed in range(3)]
    shard = write_shard(tmp_path / "a.tar", rows)
    with source([shard], models) as one, pytest.raises(BridgeError, match="No picture"):
        batches(one, 1)


def test_captions_are_read_as_the_nodes_read_prompts(tmp_path: Path, models: dict[str, Any]) -> None:
    """Full-width punctuation is half-width to the tower, unless prompts are read as typed."""
    wide, half = CAT + "\uff0c" + CAT, CAT + "," + CAT
    shard = write_shard(tmp_path / "a.tar", [row(0, caption_zh=wide)] * 4)
    tower = models["tower"]
    for typed, text in ((False, half), (True, wide)):
        with source([shard], models, typed=typed, tower_learns=True) as one:
            (part,) = batches(one, 1)[0]
        assert torch.equal(part.ids[0], tower.batch([text])[0][0])
        assert part.hidden is None


def test_without_pictures_none_is_opened(tmp_path: Path, models: dict[str, Any]) -> None:
    """A method without pictures takes captions of every shape, of damaged pictures, and of none."""
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as out:
        for seed in range(4):
            fields, content = row(seed, width=(32, 64)[seed % 2])
            if seed:
                member(out, f"{seed}.jpg", content[: 300 if seed == 1 else None])
            member(out, f"{seed}.json", json.dumps(fields).encode())
    with source([shard], models, latents=None, shapes=()) as one:
        numbers = one.at(0)
        assert one.shape(numbers[0]) is None
        part = one.batch(Chance(SETTINGS).at(0, numbers, None))
        assert one.unreadable == 0
    assert part.latents is None and part.sizes is None
    assert len(set(numbers)) == 4 == len(part.english)


@pytest.mark.parametrize("order", ["height", "width"])
def test_sdxl_is_told_the_size_the_cut_and_the_result(
    tmp_path: Path, models: dict[str, Any], order: str
) -> None:
    """A picture 64 x 40 that covers 32 x 32 is scaled to 51.2 x 32; 9.6 are cut off on either side."""
    shard = write_shard(tmp_path / "a.tar", [row(0, width=64, height=40)])
    with source(
        [shard],
        models,
        "xl",
        shapes=((32, 32),),
        reading=Reading(crop="centre", order=order),  # type: ignore[arg-type]
    ) as one:
        (part,) = batches(one, 1)[0]
    told = (40, 64, 0, 10, 32, 32) if order == "height" else (64, 40, 0, 10, 32, 32)
    assert torch.equal(part.sizes[0], embedded(torch.tensor([told]), 16)[0])


def test_a_random_cut_is_another_in_each_epoch(tmp_path: Path, models: dict[str, Any]) -> None:
    shard = write_shard(tmp_path / "a.tar", [row(0, width=320, height=40)] * 4)
    with source([shard], models, shapes=((32, 32),)) as one:
        (first,), (second,) = batches(one, 2)
    with source([shard], models, shapes=((32, 32),)) as one:
        ((again,),) = batches(one, 1)
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents.sort(dim=0).values, second.latents.sort(dim=0).values)


def test_what_is_held_out_is_the_same_at_every_measurement(
    shards: list[Path], models: dict[str, Any]
) -> None:
    aside = Stream(shards[1:2], RULES.fault, SHAPES, batch=4, seed=3)
    with source(shards[:1], models, held_out=aside, most_held_out=5) as one:
        assert sum(len(group) for group in one.held_out) == 5
        for group in one.held_out:
            assert len({one.shape(number) for number in group}) <= 1
            assert all(number < 0 for number in group)
            if group:
                draw = Chance(SETTINGS).held_out(group, one.shape(group[0]))
                first = one.batch(draw)
                one.at(0), one.at(3)
                assert torch.equal(one.batch(draw).latents, first.latents)


def test_the_empty_prompt_is_one_row_of_both(models: dict[str, Any], shards: list[Path]) -> None:
    with source(shards, models, "xl") as one:
        empty = one.empty()
    rows, pooled = models["xl"].english([""])
    assert torch.equal(empty.english, rows) and torch.equal(empty.english_pooled, pooled)
    assert empty.hidden is not None and len(empty.hidden.states) == 1
