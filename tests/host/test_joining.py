"""Laws of the joining: neutral is nothing, the ends are one stream alone, and between them one fades."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_extras.nodes_hooks import CreateHookKeyframe, CreateHookLora, SetClipHooks, SetHookKeyframes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nodes
from language_bridge.bridges.errors import BridgeError
from language_bridge.host.clip import BridgedClip
from language_bridge.host.joining import (
    APPENDED,
    END,
    JOINS,
    SHARED,
    START,
    Joining,
    Rows,
    limit,
    share_window,
)
from language_bridge.prompt import Phrase
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, encode, same, sample

RED_CAT = "\u7ea2\u8272\u7684\u732b"
NATIVE, ENGLISH = f"{RED_CAT}, ", "a big (round:1.2) dog"
MIXED = NATIVE + ENGLISH
ALONE = (RED_CAT, "", "a red cat", f"({RED_CAT}:1.3)")
"""Prompts in which one stream at most has words."""

shares = st.floats(0, 1)
steady = settings(deadline=None, derandomize=True, database=None)


def joined(clip: BridgedClip, *facts: Any, **changes: Any) -> BridgedClip:
    return clip.with_speech(joining=Joining(*facts, **changes))


def rows(conditioning: Any) -> Tensor:
    assert len(conditioning) == 1
    return conditioning[0][0]


# -- numbers -------------------------------------------------------------------------------------------------
@steady
@given(shares, shares)
def test_levels_fade_the_stream_that_the_slider_leaves(one: float, other: float) -> None:
    less, more = sorted((one, other))
    native, english = zip(Joining(blend=less).levels, Joining(blend=more).levels, strict=True)
    assert native[0] <= native[1] and english[0] >= english[1]
    assert max(Joining(blend=one).levels) == 1.0 and min(Joining(blend=one).levels) >= 0.0
    assert Joining(blend=one).levels == Joining(blend=1 - one).levels[::-1] or 1 - (1 - one) != one
    # Nowhere steeper than 4, so it has no jump.
    assert all(abs(a - b) <= 4 * (more - less) + 1e-12 for a, b in (native, english))


@steady
@given(st.integers(0, 200), st.integers(0, 200), shares)
def test_the_pooled_share_is_that_of_the_words_and_moves_with_the_blend(
    native: int, english: int, blend: float
) -> None:
    share = Joining(blend=blend).share(native, english)
    plain = native / max(native + english, 1)
    assert 0 <= share <= 1
    assert Joining().share(native, english) == plain
    assert share >= plain - 1e-12 if blend > 0.5 else share <= plain + 1e-12 or not native + english
    if native and english:
        assert (
            Joining(blend=1.0).share(native, english) == 1 and Joining(blend=0.0).share(native, english) == 0
        )


@steady
@given(shares, shares, shares)
def test_stretches_cover_all_of_sampling_once(blend: float, start: float, end: float) -> None:
    joining = Joining(blend=blend, start=start, end=end)
    found = joining.stretches()
    assert found[0][0] == 0.0 and found[-1][1] == 1.0
    assert all(one[1] == other[0] for one, other in zip(found, found[1:], strict=False))
    assert all(a < b for a, b, _ in found)
    for a, b, here in found:
        inside = start <= a and b <= end and not joining.neutral
        assert here.blend == (blend if inside else 0.5) and (here.start, here.end) == (0.0, 1.0)
    assert joining.at_first() == found[0][2]


@steady
@given(shares, shares, shares, shares)
def test_a_limit_only_narrows(start: float, end: float, begin: float, stop: float) -> None:
    entry: dict[str, Any] = {START: begin, END: stop}
    kept = limit(entry, start, end)
    assert (entry[START], entry[END]) == (max(start, begin), min(end, stop))
    assert kept == (max(start, begin) < min(end, stop)) or (start, end) == (0.0, 1.0)


@pytest.mark.parametrize("facts", [("rows",), (APPENDED, 1.1), (APPENDED, 0.5, -0.1), (APPENDED, 0.5, 0, 2)])
def test_what_is_out_of_range_is_refused(facts: Any) -> None:
    with pytest.raises(BridgeError):
        Joining(*facts)


@st.composite
def two_streams(draw: Any) -> tuple[Rows, Rows, int]:
    window = draw(st.integers(4, 12))
    made: list[Rows] = []
    for sign in (1, -1):
        count = draw(st.integers(1, 3)) * window
        padding = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        context = sign * torch.arange(1.0, count + 1)[None, :, None]
        made.append(Rows(context, padding, draw(st.integers(0, count))))
    return made[0], made[1], window


@steady
@given(two_streams())
def test_a_shared_window_keeps_every_row_that_says_something(drawn: tuple[Rows, Rows, int]) -> None:
    native, english, window = drawn
    said = [each.context[0, ~each.padding, 0].tolist() for each in (native, english)]
    result = share_window(native, english, window)
    needed = -(-sum(map(len, said)) // window) * window
    if result is None:
        assert needed > native.context.shape[1] + english.context.shape[1]
        return
    context, count = result
    found = context[0, :, 0].tolist()
    assert len(found) == needed
    assert all(row > 0 for row in found[:count]) and all(row < 0 for row in found[count:])
    for part, of, each in ((found[:count], said[0], native), (found[count:], said[1], english)):
        assert [row for row in part if row in of] == of
        assert part == sorted(part, key=abs)  # in their order, and none twice
        assert len(set(part)) == len(part) and set(part) <= set(each.context[0, :, 0].tolist())


# -- the default ---------------------------------------------------------------------------------------------
def test_neutral_is_bit_equal_to_nothing(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    for text in (MIXED, *ALONE):
        for settings_ in ({}, {"blend": 0.9, "start": 0.4, "end": 0.4}, {"blend": 0.5, "start": 0.2}):
            assert same(encode(joined(clip, **settings_), text), encode(clip, text))


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_a_prompt_in_one_language_is_the_same_at_every_blend(
    checkpoint: Checkpoint, join: str, blend: float
) -> None:
    _, clip = bridged(checkpoint)
    for text in ALONE:
        assert same(encode(joined(clip, join, blend, 0.2, 0.8), text), encode(clip, text))
    assert same(encode(joined(clip, join, blend), ENGLISH), encode(checkpoint.clip, ENGLISH))


# -- the ends ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("join", JOINS)
def test_at_the_ends_it_is_as_if_the_other_stream_had_not_been_typed(
    checkpoint: Checkpoint, join: str
) -> None:
    _, clip = bridged(checkpoint)
    assert same(encode(joined(clip, join, 1.0), MIXED), encode(clip, NATIVE))
    assert same(encode(joined(clip, join, 0.0), MIXED), encode(checkpoint.clip, ENGLISH))


def test_the_ends_without_a_pooled_vector_of_the_bridge(sdxl: Checkpoint, models: Path) -> None:
    from language_bridge.tests.fixtures.towers import tiny_bridge, tiny_tower, write_bridge

    tower = tiny_tower()
    plain = tiny_bridge("linear", "sdxl", tower, pooled=0)
    write_bridge(models / "language_bridges" / "no-pooled.safetensors", "sdxl", plain, tower)
    _, clip = bridged(sdxl, bridge="no-pooled.safetensors")
    assert same(encode(joined(clip, blend=1.0), MIXED), encode(clip, NATIVE))


# -- between -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("blend", [0.2, 0.6, 0.9])
def test_the_fading_stream_goes_to_its_empty_prompt(checkpoint: Checkpoint, blend: float) -> None:
    _, clip = bridged(checkpoint)
    plain, got = rows(encode(clip, f"{NATIVE}dog")), rows(encode(joined(clip, blend=blend), f"{NATIVE}dog"))
    level = min(Joining(blend=blend).levels)
    native, english = slice(0, 77), slice(77, 154)
    fading, staying = (english, native) if blend > 0.5 else (native, english)
    empty = rows(encode(checkpoint.clip if blend > 0.5 else clip, ""))
    assert torch.equal(got[:, staying], plain[:, staying])
    expected = empty + level * (plain[:, fading] - empty)
    assert torch.allclose(got[:, fading], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[:, fading], plain[:, fading], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("join", JOINS)
def test_a_small_step_of_the_slider_is_a_small_step_of_the_rows(sd1: Checkpoint, join: str) -> None:
    _, clip = bridged(sd1)
    for blend in (0.1, 0.5, 0.501, 0.9, 0.99):
        here, there = (rows(encode(joined(clip, join, b), MIXED)) for b in (blend, blend + 1e-3))
        scale = float(here.abs().max())
        assert float((here - there).abs().max()) <= 2e-2 * scale


@pytest.mark.parametrize("blend", [0.25, 0.5, 0.75])
def test_sdxl_pooled_moves_with_the_blend(sdxl: Checkpoint, blend: float) -> None:
    _, clip = bridged(sdxl)
    pooled = encode(joined(clip, blend=blend), f"{RED_CAT},dog")[0][1]["pooled_output"]
    native, own = (
        encode(c, t)[0][1]["pooled_output"] for c, t in ((clip, f"{RED_CAT},"), (sdxl.clip, "dog"))
    )
    one, other = 5 * blend, 1 * (1 - blend)
    share = one / (one + other)
    assert torch.allclose(pooled, share * native + (1 - share) * own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("joining", [Joining(APPENDED, 0.7), Joining(SHARED), Joining(SHARED, 0.2, 0.0, 0.5)])
def test_full_width_typing_changes_nothing_under_a_joining(sd1: Checkpoint, joining: Joining) -> None:
    _, clip = bridged(sd1)
    clip = clip.with_speech(joining=joining)
    full = f"\uff08{RED_CAT}\uff1a1.3\uff09\uff0ca big dog\uff08round\uff1a1.2\uff09"
    assert same(encode(clip, full), encode(clip, f"({RED_CAT}:1.3),a big dog(round:1.2)"))


# -- steps ---------------------------------------------------------------------------------------------------
def test_a_blend_for_some_steps_is_an_entry_for_each_stretch(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    entries = encode(joined(clip, blend=1.0, start=0.25, end=0.75), MIXED)
    assert [(entry[1][START], entry[1][END]) for entry in entries] == [(0, 0.25), (0.25, 0.75), (0.75, 1)]
    plain, native = rows(encode(clip, MIXED)), rows(encode(clip, NATIVE))
    for entry, expected in zip(entries, (plain, native, plain), strict=True):
        assert torch.equal(entry[0], expected)


def test_sampling_with_stretches_is_sampling_with_timestep_ranges(sd1: Checkpoint) -> None:
    model, clip = bridged(sd1)
    negative = encode(clip, "")
    got = sample(model, encode(joined(clip, blend=0.0, start=0.5), MIXED), negative, steps=4)

    def part(conditioning: Any, start: float, end: float) -> Any:
        return call(nodes.ConditioningSetTimestepRange, conditioning=conditioning, start=start, end=end)

    parts = [
        *part(encode(clip, MIXED), 0.0, 0.5),
        *part(encode(sd1.clip, ENGLISH), 0.5, 1.0),
    ]
    assert torch.equal(got, sample(model, parts, negative, steps=4))
    assert not torch.equal(got, sample(model, encode(clip, MIXED), negative, steps=4))


def test_a_range_of_the_artist_narrows_the_stretches(sd1: Checkpoint) -> None:
    model, clip = bridged(sd1)
    streams = joined(clip, blend=0.0, start=0.5)
    late = call(nodes.ConditioningSetTimestepRange, conditioning=encode(streams, MIXED), start=0.5, end=1.0)
    only = call(
        nodes.ConditioningSetTimestepRange, conditioning=encode(sd1.clip, ENGLISH), start=0.5, end=1.0
    )
    early = call(nodes.ConditioningSetTimestepRange, conditioning=encode(clip, ""), start=0.0, end=0.5)
    negative = encode(clip, "")
    assert torch.equal(
        sample(model, [*early, *late], negative, steps=4), sample(model, [*early, *only], negative, steps=4)
    )


def test_clip_schedules_and_stretches_go_together(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    hooks = call(CreateHookLora, lora_name="sd1.safetensors", strength_model=1.0, strength_clip=1.0)
    keyframes = call(CreateHookKeyframe, strength_mult=0.2, start_percent=0.0)
    keyframes = call(CreateHookKeyframe, strength_mult=1.0, start_percent=0.5, prev_hook_kf=keyframes)
    hooks = call(SetHookKeyframes, hooks=hooks, hook_kf=keyframes)
    hooked = call(SetClipHooks, clip=clip, schedule_clip=True, apply_to_conds=True, hooks=hooks)
    plain, entries = encode(hooked, MIXED), encode(joined(hooked, blend=0.0, start=0.25), MIXED)
    spans = [(entry[1][START], entry[1][END]) for entry in entries]
    assert all(start < end for start, end in spans)
    first, last = spans[0][0], max(end for _, end in spans)
    assert first == 0.0 and last == max(entry[1][END] for entry in plain)
    assert sum(end - start for start, end in spans) == pytest.approx(
        sum(entry[1][END] - entry[1][START] for entry in plain)
    )
    assert {entry[0].shape[1] for entry, span in zip(entries, spans, strict=True) if span[0] >= 0.25} == {77}
    assert {entry[0].shape[1] for entry, span in zip(entries, spans, strict=True) if span[0] < 0.25} == {154}


def test_nodes_that_know_of_no_steps_get_what_holds_at_the_first(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    tokens = clip.tokenize(MIXED)
    with torch.inference_mode():
        early = joined(clip, blend=0.8, end=0.3).encode_from_tokens(tokens)
        late = joined(clip, blend=0.8, start=0.3).encode_from_tokens(tokens)
        assert torch.equal(early, joined(clip, blend=0.8).encode_from_tokens(tokens))
        assert torch.equal(late, clip.encode_from_tokens(tokens)) and not torch.equal(early, late)


# -- shared window -------------------------------------------------------------------------------------------
def test_a_shared_window_is_one_window_with_the_words_of_both(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    got = rows(encode(joined(clip, SHARED), f"{RED_CAT},dog"))
    native, english = rows(encode(clip, f"{RED_CAT},")), rows(encode(checkpoint.clip, "dog"))
    assert got.shape == native.shape
    # Start, five words and end of the native stream; start, word and what follows of the English one.
    assert torch.equal(got[:, :7], native[:, :7])
    border = int((got[0, :, None] == english[0, None, :]).all(-1).any(1).nonzero()[0])
    assert torch.equal(got[:, :border], native[:, :border])
    assert torch.equal(got[:, border:], english[:, : 77 - border])


def test_a_long_prompt_shares_as_many_windows_as_it_needs(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    text = f"{RED_CAT * 19},{'dog ' * 40}"  # 77 native tokens in two windows, 40 English ones
    assert rows(encode(clip, text)).shape[1] == 231
    assert rows(encode(joined(clip, SHARED), text)).shape[1] == 154


def test_rows_that_stand_for_no_word_are_appended(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    expected = encode(clip, MIXED)
    bridge = clip.speech.tower.bridge
    before = type(bridge).tokenwise
    try:
        type(bridge).tokenwise = False
        assert same(encode(joined(clip, SHARED), MIXED), expected)
    finally:
        type(bridge).tokenwise = before


def test_positive_and_negative_prompt_may_be_joined_in_their_own_way(sd1: Checkpoint) -> None:
    model, clip = bridged(sd1)
    conditionings = [
        encode(joined(clip, SHARED), MIXED),
        encode(joined(clip, APPENDED, 0.8), f"{RED_CAT}, blurry"),
    ]
    latents = sample(model, *conditionings)
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, sample(model, conditionings[0], encode(clip, f"{RED_CAT}, blurry")))


# -- parts and phrases ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("join", JOINS)
def test_break_and_phrases_under_every_join(sd1: Checkpoint, join: str) -> None:
    _, clip = bridged(sd1)
    text = f"{RED_CAT}, dog BREAK {RED_CAT}{RED_CAT}, cat"
    kept = clip.with_speech(joining=Joining(join, 0.7), phrases=(Phrase(RED_CAT[:2], "kept"),))
    tokens = kept.tokenize(text)
    assert len(tokens["native"]) == 2 == len(tokens["l"])
    heard = [token for chunk in tokens["native"] for token, *_ in chunk]
    without = [token for chunk in clip.tokenize(text)["native"] for token, *_ in chunk]
    assert len(set(heard)) < len(set(without))  # the kept word has left the native stream
    assert same(encode(kept.with_speech(joining=Joining(join, 0.0)), text), _english(kept, tokens))


def _english(clip: BridgedClip, tokens: Any) -> Any:
    """What the checkpoint's own CLIP says of the English tokens alone."""
    import comfy.sd

    plain = {"l": [[(int(token + 0), *rest) for token, *rest in chunk] for chunk in tokens["l"]]}
    with torch.inference_mode():
        return comfy.sd.CLIP.encode_from_tokens_scheduled(clip, plain)


# -- NegPip --------------------------------------------------------------------------------------------------
def test_negpip_gets_native_rows_in_pairs(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1, route="native only")
    pairs = clip.clone()
    pairs.patcher.model_options = {**pairs.patcher.model_options, "ppm_negpip": True}
    for text in (RED_CAT, f"({RED_CAT}:1.3)", ""):
        plain, both = rows(encode(clip, text)), rows(encode(pairs, text))
        assert torch.equal(both[:, 0::2], plain) and torch.equal(both[:, 1::2], plain)
    loud, quiet = rows(encode(clip, f"({RED_CAT}:1.2)")), rows(encode(pairs, f"({RED_CAT}:-1.2)"))
    assert torch.equal(quiet[:, 0::2], loud)
    assert torch.equal(quiet[:, 1::2][:, 1:5], -loud[:, 1:5])  # the words
    assert torch.equal(quiet[:, 1::2][:, 5:], loud[:, 5:])  # the rest of the window
