"""Bridges that say input embeddings of the CLIP: one text model reads both languages in one window."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_extras.nodes_hooks import CreateHookKeyframe, CreateHookLora, SetClipHooks, SetHookKeyframes
from torch import Tensor

import nodes
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import BridgeHeader, load_bridge, save_bridge
from language_bridge.encoders.file import load_encoder
from language_bridge.host.joining import Joining
from language_bridge.host.pseudo import CLIP_INPUT, SAYS, Place
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, encode, same, sample
from language_bridge.tests.fixtures.towers import reference, tiny_bridge, tiny_tower

RED_CAT = "\u7ea2\u8272\u7684\u732b"
START, END = 49406, 49407
MIXED = f"{RED_CAT}, a big dog {RED_CAT}"


def write(path: Path, base: str, kind: str = "mlp") -> str:
    tower = tiny_tower()
    bridge = tiny_bridge(kind, base, tower, **({"pooled": 0} if base == "sdxl" else {}))
    header = BridgeHeader(
        kind=kind,
        spec=dataclasses.asdict(bridge.spec),
        base=base,
        encoder=reference(tower),
        training={SAYS: CLIP_INPUT},
    )
    save_bridge(path, header, bridge)
    return path.name


@pytest.fixture(scope="module")
def names(models: Path) -> Iterator[dict[str, str]]:
    """Files by base."""
    folder = models / "language_bridges"
    made = {base: write(folder / f"inside-{base}.safetensors", base) for base in ("sd1", "sd2", "sdxl")}
    yield made
    for name in made.values():
        (folder / name).unlink()


@pytest.fixture(params=["sd1", "sd2"])
def inside(request: pytest.FixtureRequest, load: Any, names: dict[str, str]) -> tuple[Checkpoint, Any, str]:
    """A checkpoint, its CLIP behind such a bridge, and the file."""
    checkpoint = load(request.param)
    model, clip = bridged(checkpoint, bridge=names[request.param])
    assert model is checkpoint.model
    return checkpoint, clip, names[request.param]


@torch.no_grad()
def vectors(models: Path, name: str, text: str) -> Tensor:
    """What bridge and tower say of a text, [T, W], without the host."""
    loaded = load_bridge(models / "language_bridges" / name)
    encoder = load_encoder(models / "text_encoders" / "tiny-zh.safetensors").eval()
    return loaded.bridge.eval()(encoder(*encoder.batch([text]))).context[0]


def by_hand(checkpoint: Checkpoint, items: list[Any]) -> Any:
    """The stock CLIP over one window of tokens and vectors."""
    (key, (empty,)) = next(iter(checkpoint.clip.tokenize("").items()))
    padding = empty[2][0]
    window = [(START, 1.0), *items, (END, 1.0)]
    window += [(padding, 1.0)] * (77 - len(window))
    with torch.inference_mode():
        return checkpoint.clip.encode_from_tokens_scheduled({key: [window]})


def english(checkpoint: Checkpoint, text: str) -> list[Any]:
    (chunk,) = next(iter(checkpoint.clip.tokenize(text).values()))
    return chunk[1 : [token for token, _ in chunk].index(END)]


# -- laws ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["a (red:1.2) cat", "", "  ", "one two three " * 40, "a cat BREAK a dog!"])
def test_english_and_empty_prompts_are_stock_bit_for_bit(inside: Any, text: str) -> None:
    checkpoint, clip, _ = inside
    assert same(encode(clip, text), encode(checkpoint.clip, text))


def test_native_text_is_read_by_the_own_clip_where_it_was_typed(inside: Any, models: Path) -> None:
    checkpoint, clip, name = inside
    said = vectors(models, name, f"{RED_CAT}, {RED_CAT}")
    native = [(said[place], 1.0) for place in range(1, 10)]
    first, last = native[:5], native[5:]
    expected = by_hand(checkpoint, [*first, *english(checkpoint, "a big dog"), *last])
    assert same(encode(clip, MIXED), expected)
    assert same(
        encode(clip, RED_CAT), by_hand(checkpoint, [(v, 1.0) for v in vectors(models, name, RED_CAT)[1:5]])
    )


def test_full_width_typing_gives_the_same(inside: Any) -> None:
    _, clip, _ = inside
    full = f"\uff08{RED_CAT}\uff1a1.3\uff09\uff0ca big dog\uff08round\uff1a1.2\uff09"
    assert same(encode(clip, full), encode(clip, f"({RED_CAT}:1.3),a big dog(round:1.2)"))


def test_weights_and_strength_are_weights_of_the_places(inside: Any, models: Path) -> None:
    checkpoint, _, name = inside
    _, clip = bridged(checkpoint, bridge=name, strength=0.5)
    said = vectors(models, name, RED_CAT)
    items = [(said[1], 0.5), (said[2], 0.5), (said[3], 0.65), (said[4], 0.65)]
    expected = by_hand(checkpoint, [*items, *english(checkpoint, "(dog:1.2)")])
    got = encode(clip, f"{RED_CAT[:2]}({RED_CAT[2:]}:1.3) (dog:1.2)")
    assert torch.allclose(got[0][0], expected[0][0], rtol=1e-5, atol=1e-5)


def test_a_lora_of_the_text_model_acts_on_native_words(sd1: Checkpoint, names: dict[str, str]) -> None:
    model, clip = bridged(sd1, bridge=names["sd1"])
    _, loaded = call(
        nodes.LoraLoader,
        model=model,
        clip=clip,
        lora_name="sd1.safetensors",
        strength_model=0.0,
        strength_clip=1.0,
    )
    assert not same(encode(loaded, RED_CAT), encode(clip, RED_CAT))
    latents = sample(model, encode(loaded, MIXED), encode(loaded, ""))
    assert torch.isfinite(latents).all()


# -- blend ---------------------------------------------------------------------------------------------------
def test_the_blend_goes_from_one_stream_to_the_other(inside: Any) -> None:
    checkpoint, clip, _ = inside

    def at(blend: float, **facts: Any) -> Any:
        return encode(clip.with_speech(joining=Joining(blend=blend, **facts)), MIXED)

    assert same(at(0.5), encode(clip, MIXED))
    assert same(at(0.0), encode(checkpoint.clip, "a big dog"))
    ends = {0.0: at(0.0)[0][0], 1.0: at(1.0)[0][0]}
    middle = at(0.5)[0][0]
    for blend in (0.1, 0.4, 0.7, 0.9):
        share = (2 * blend - 1) ** 2
        end = ends[float(blend > 0.5)]
        assert torch.allclose(at(blend)[0][0], middle + share * (end - middle), rtol=1e-4, atol=1e-5)
    entries = at(0.0, start=0.5)
    assert len(entries) == 2 and torch.equal(entries[0][0], middle) and torch.equal(entries[1][0], ends[0.0])
    for text in (RED_CAT, "a cat", ""):
        assert same(encode(clip.with_speech(joining=Joining(blend=0.0)), text), encode(clip, text))


def test_clip_schedules_reach_native_words_and_blend(sd1: Checkpoint, names: dict[str, str]) -> None:
    _, clip = bridged(sd1, bridge=names["sd1"])
    hooks = call(CreateHookLora, lora_name="sd1.safetensors", strength_model=1.0, strength_clip=1.0)
    keyframes = call(CreateHookKeyframe, strength_mult=0.0, start_percent=0.0)
    keyframes = call(CreateHookKeyframe, strength_mult=1.0, start_percent=0.5, prev_hook_kf=keyframes)
    hooks = call(SetHookKeyframes, hooks=hooks, hook_kf=keyframes)

    def at(blend: float) -> Any:
        joined = clip.with_speech(joining=Joining(blend=blend))
        scheduled = call(SetClipHooks, clip=joined, schedule_clip=True, apply_to_conds=True, hooks=hooks)
        return encode(scheduled, MIXED)

    both, native, between = at(0.5), at(1.0), at(0.8)
    assert len(both) == len(native) == len(between) == 2
    assert torch.equal(both[0][0], encode(clip, MIXED)[0][0])
    assert not torch.equal(both[0][0], both[1][0]) and not torch.equal(native[0][0], native[1][0])
    for middle, end, got in zip(both, native, between, strict=True):
        expected = middle[0] + 0.36 * (end[0] - middle[0])
        assert torch.allclose(got[0], expected, rtol=1e-4, atol=1e-5)
        assert got[1].keys() == middle[1].keys()


# -- tokens --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("word_ids", [False, True])
def test_tokens_are_windows_of_tuples(inside: Any, word_ids: bool) -> None:
    checkpoint, clip, _ = inside
    for text in (RED_CAT, MIXED, RED_CAT * 45, f"{RED_CAT} BREAK dog", f"{'dog ' * 70}{RED_CAT * 3}"):
        tokens = clip.tokenize(text, return_word_ids=word_ids)
        assert set(tokens) == {*checkpoint.clip.tokenize(""), "native"}
        for chunks in tokens.values():
            assert all(len(chunk) == 77 and all(len(t) == 2 + word_ids for t in chunk) for chunk in chunks)
        key = next(iter(tokens))
        found = [token[0] for chunk in tokens[key] for token in chunk if isinstance(token[0], Place)]
        assert len(found) == 4 * text.count(RED_CAT) + text.count(",")
        assert [(p.window, p.row) for p in found] == sorted((p.window, p.row) for p in found)
        plain = clip.tokenize(text)
        assert same(encode(clip, text), _encode(clip, plain))


def _encode(clip: Any, tokens: Any) -> Any:
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(tokens)


def test_break_begins_a_window(inside: Any) -> None:
    _, clip, _ = inside
    apart = encode(clip, f"{RED_CAT} dog BREAK cat")[0][0]
    assert apart.shape[1] == 154
    alone = encode(clip, f"{RED_CAT} dog")[0][0]
    # Two windows are one batch, and a batch of another size may be summed in another order.
    torch.testing.assert_close(apart[:, :77], alone, rtol=1e-5, atol=1e-5)


def test_a_node_that_reads_the_tokens_alone_is_told(inside: Any) -> None:
    _, clip, _ = inside
    tokens = clip.tokenize(RED_CAT)
    key = next(iter(tokens))
    with pytest.raises(BridgeError, match="lose the native text"), torch.inference_mode():
        getattr(clip.cond_stage_model, f"clip_{key}").encode_token_weights(tokens[key])


def test_two_text_models_are_refused(sdxl: Checkpoint, names: dict[str, str]) -> None:
    with pytest.raises(BridgeError, match="cannot speak to the text model"):
        bridged(sdxl, bridge=names["sdxl"])
