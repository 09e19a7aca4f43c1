"""A prompt that comes again gives the same numbers and loads no tower; nobody can spoil what is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as management
import pytest
import torch

from language_bridge.bridges.base import Cond, Hidden
from language_bridge.host.cache import EMBEDDINGS, EmbeddingCache, Said
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import encode, same

RED_CAT = "\u7ea2\u8272\u7684\u732b"
MIXED = f"{RED_CAT}, a big dog"
Loads = list[list[Any]]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loads]:
    """What the host is asked to load, call by call: the models and what they bring along."""
    calls: Loads = []
    load = management.load_models_gpu

    def watch(models: Any, *arguments: Any, **options: Any) -> Any:
        wanted = [*models, *(more for model in models for more in model.model_patches_models())]
        calls.append([patcher.model for patcher in wanted])
        return load(models, *arguments, **options)

    monkeypatch.setattr(management, "load_models_gpu", watch)
    yield calls


# -- through the node ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [RED_CAT, "", RED_CAT * 45], ids=["native", "empty", "long"])
def test_a_native_prompt_that_comes_again_loads_nothing(
    checkpoint: Checkpoint, loads: Loads, text: str
) -> None:
    _, clip = bridged(checkpoint)
    first = encode(clip, text)
    assert len(loads) == 1 and clip.speech.tower.reader in loads[0]
    loads.clear()
    assert same(encode(clip, text), first) and not loads


@pytest.mark.parametrize("text", [MIXED, f"({RED_CAT}:1.3), a big dog"], ids=["plain", "weighted"])
def test_a_mixed_prompt_that_comes_again_loads_the_clip_and_no_tower(
    checkpoint: Checkpoint, loads: Loads, text: str
) -> None:
    _, clip = bridged(checkpoint)
    first = encode(clip, text)
    assert any(clip.speech.tower.reader in models for models in loads)
    loads.clear()
    assert same(encode(clip, text), first)
    assert loads == [[clip.cond_stage_model]]


def test_an_english_prompt_never_loads_the_tower(checkpoint: Checkpoint, loads: Loads) -> None:
    _, clip = bridged(checkpoint)
    encode(clip, "a big dog")
    assert loads == [[clip.cond_stage_model]]


def test_the_node_run_again_does_not_load_the_tower(sd1: Checkpoint, loads: Loads) -> None:
    first = encode(bridged(sd1)[1], RED_CAT)
    loads.clear()
    assert same(encode(bridged(sd1)[1], RED_CAT), first)
    louder = encode(bridged(sd1, strength=1.0, route="native only")[1], RED_CAT)
    assert same(louder, first) and not loads


def test_a_tower_that_is_in_use_is_not_read_again(sd1: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    _, clip = bridged(sd1)
    with monkeypatch.context() as patched:
        patched.setattr("language_bridge.host.bridging.load_bridge", None)
        patched.setattr("language_bridge.host.bridging.load_encoder", None)
        _, louder = bridged(sd1, strength=1.5)
    assert louder.speech.tower is clip.speech.tower and clip.speech.strength == 1.0
    first = encode(clip, RED_CAT)
    assert not same(encode(louder, RED_CAT), first) and same(encode(clip, RED_CAT), first)


def test_another_strength_or_weight_gives_other_numbers(sd1: Checkpoint, loads: Loads) -> None:
    plain = encode(bridged(sd1)[1], RED_CAT)
    half = encode(bridged(sd1, strength=0.5)[1], RED_CAT)
    loads.clear()
    heavy = encode(bridged(sd1)[1], f"({RED_CAT}:0.5)")
    assert not loads  # the tower said these words already; the weight acts on what it said
    assert same(heavy, half) and not same(half, plain)
    EMBEDDINGS.clear()
    assert same(encode(bridged(sd1)[1], f"({RED_CAT}:0.5)"), heavy)


@pytest.mark.parametrize("spoil", ["context", "pooled"])
def test_an_edit_in_place_does_not_reach_the_cache(sdxl: Checkpoint, spoil: str) -> None:
    _, clip = bridged(sdxl)
    for _ in range(3):
        got = encode(clip, RED_CAT)
        expected = [[got[0][0].clone(), {"pooled_output": got[0][1]["pooled_output"].clone()}]]
        with torch.inference_mode():
            (got[0][0] if spoil == "context" else got[0][1]["pooled_output"]).fill_(7.0)
        assert same(encode(clip, RED_CAT), expected)


def test_two_bridges_do_not_share_words(sd1: Checkpoint) -> None:
    assert not same(encode(bridged(sd1, "mlp")[1], RED_CAT), encode(bridged(sd1, "linear")[1], RED_CAT))
    assert len(EMBEDDINGS) == 2


def test_another_dtype_is_another_entry(sd1: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    full = encode(bridged(sd1)[1], RED_CAT)
    monkeypatch.setattr("language_bridge.host.bridging.tower_dtype", lambda: torch.float16)
    assert not same(encode(bridged(sd1)[1], RED_CAT), full)


def test_a_replaced_file_is_forgotten(sd1: Checkpoint, models: Path) -> None:
    folder = models / "language_bridges"
    path = folder / "changing.safetensors"
    try:
        shutil.copy(folder / "linear-sd1.safetensors", path)
        linear = encode(bridged(sd1, bridge=path.name)[1], RED_CAT)
        assert len(EMBEDDINGS) == 1
        shutil.copy(folder / "mlp-sd1.safetensors", path)
        _, clip = bridged(sd1, bridge=path.name)
        assert len(EMBEDDINGS) == 0 and EMBEDDINGS.size_bytes == 0
        assert not same(encode(clip, RED_CAT), linear)
        assert same(encode(clip, RED_CAT), encode(bridged(sd1, "mlp")[1], RED_CAT))
    finally:
        path.unlink()


# -- the cache itself ----------------------------------------------------------------------------------------
def said(number: float, rows: int = 4, *, states: bool = False) -> Said:
    """16 bytes a row, and as much again with states."""
    hidden = Hidden(torch.full((1, rows, 3), float(number)), torch.ones(1, 4 * rows, dtype=torch.bool))
    return Said(Cond(torch.full((1, rows, 4), float(number))), hidden if states else None)


def test_the_limit_in_bytes_holds_and_the_oldest_goes_first() -> None:
    cache = EmbeddingCache(limit_bytes=3 * 64)
    for key in range(3):
        cache.put("d", key, said(key))
    assert len(cache) == 3 and cache.size_bytes == 192
    assert cache.get("d", 0) is not None and cache.holds("d", 1)  # 2 is the oldest now
    cache.put("d", 3, said(3))
    assert not cache.holds("d", 2) and cache.holds("d", 0) and cache.holds("d", 1) and cache.holds("d", 3)
    cache.put("d", 4, said(4, rows=8))  # as large as two
    assert cache.size_bytes == 192 and len(cache) == 2 and cache.holds("d", 4)
    cache.put("d", 5, said(5, rows=13))
    assert not cache.holds("d", 5) and cache.holds("d", 4)  # larger than everything: not kept


def test_an_entry_that_is_put_twice_counts_once() -> None:
    cache = EmbeddingCache()
    for number in (1, 2):
        cache.put("d", "key", said(number, states=True))
    found = cache.get("d", "key")
    assert found is not None and found.hidden is not None
    assert bool((found.cond.context == 2).all()) and cache.size_bytes == 128 and len(cache) == 1


def test_what_goes_in_and_what_comes_out_are_copies() -> None:
    cache, given = EmbeddingCache(), said(1, states=True)
    cache.put("d", "key", given)
    assert given.hidden is not None
    given.cond.context.zero_()
    given.hidden.states.zero_()
    for _ in range(2):
        found = cache.get("d", "key")
        assert found is not None and found.hidden is not None
        assert bool((found.cond.context == 1).all()) and bool((found.hidden.states == 1).all())
        found.cond.context.zero_()
        found.hidden.states.zero_()
        found.hidden.mask.zero_()


def test_a_new_digest_drops_the_old_one_unless_another_file_has_it() -> None:
    cache = EmbeddingCache()
    for name, digest in (("a", "one"), ("b", "one"), ("c", "two")):
        cache.claim(name, digest)
    cache.put("one", 0, said(1))
    cache.put("two", 0, said(2))
    cache.claim("a", "three")
    assert cache.holds("one", 0)  # b still has it
    cache.claim("b", "three")
    assert not cache.holds("one", 0) and cache.holds("two", 0) and cache.size_bytes == 64
    cache.claim("c", "two")
    assert cache.holds("two", 0)
    cache.clear()
    assert len(cache) == cache.size_bytes == 0
