"""The laws of the bridged CLIP (docs/design.md), with the stock CLIP as the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from torch import Tensor

from language_bridge.bridges.base import Bridge, BridgeSpec, Cond, Hidden
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import load_bridge
from language_bridge.encoders.base import Encoder
from language_bridge.encoders.file import load_encoder
from language_bridge.host.base import base_of
from language_bridge.host.clip import BridgedClip, Speech
from language_bridge.host.tower import NativeTower
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import digest, encode, same, sample
from language_bridge.tests.fixtures.towers import tiny_bridge, tiny_tower, write_bridge

RED_CAT = "\u7ea2\u8272\u7684\u732b"
BLUE_DOG = "\u84dd\u8272\u7684\u72d7"
ENGLISH = {
    "plain": "a photo of a red cat",
    "weights": "a (very (big):1.2) cat, \\(sic\\), ((two)) [dogs]",
    "embedding": "embedding:{base}-word a cat, embedding:{base}-word",
    "accents": "caf\u00e9 \u2014 na\u00efve \u201cquoted\u201d, (\u00e9t\u00e9:1.2)",
    "signs": "1girl, 2:3 !! {{}} 50% \U0001f431",
    "long": "one two three four five six seven eight nine ten " * 9,
}
KINDS = ("identity", "linear", "mlp")


def parts(models: Path, kind: str, base: str) -> tuple[Encoder, Callable[..., Cond]]:
    """Tower and bridge of a file as plain torch modules, without the host."""
    loaded = load_bridge(models / "language_bridges" / f"{kind}-{base}.safetensors")
    encoder = loaded.encoder or load_encoder(models / "text_encoders" / "tiny-zh.safetensors")
    return encoder.eval(), loaded.bridge.eval()


@torch.no_grad()
def published(models: Path, kind: str, base: str, *texts: str) -> Cond:
    """bridge(encoder(texts)) in plain torch: what the method itself gives for each text, [texts, N, C]."""
    encoder, bridge = parts(models, kind, base)
    return bridge(encoder(*encoder.batch(texts)))


def context(conditioning: Any) -> Tensor:
    assert len(conditioning) == 1
    return conditioning[0][0]


def pooled(conditioning: Any) -> Any:
    return conditioning[0][1]["pooled_output"]


# -- law (a) -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ENGLISH.values(), ids=ENGLISH)
def test_an_english_prompt_is_the_stock_conditioning_bit_for_bit(checkpoint: Checkpoint, text: str) -> None:
    text = text.format(base=checkpoint.name)
    _, clip = bridged(checkpoint)
    assert same(encode(clip, text), encode(checkpoint.clip, text))


@pytest.mark.parametrize("strength", [0.5, 1.7])
def test_strength_does_not_touch_english(sd1: Checkpoint, strength: float) -> None:
    _, clip = bridged(sd1, strength=strength)
    assert same(encode(clip, ENGLISH["weights"]), encode(sd1.clip, ENGLISH["weights"]))


# -- law (b) -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_native_only_gives_the_numbers_of_the_method(checkpoint: Checkpoint, models: Path, kind: str) -> None:
    _, clip = bridged(checkpoint, kind, route="native only")
    for text in (RED_CAT, f"{RED_CAT} and a big dog", "a red cat", ""):
        expected = published(models, kind, checkpoint.name, text)
        conditioning = encode(clip, text)
        assert torch.equal(context(conditioning), expected.context)
        if checkpoint.name == "sdxl":
            assert torch.equal(pooled(conditioning), expected.pooled)
            assert pooled(conditioning).shape == (1, 1280)


def test_the_empty_prompt_is_native_under_two_streams(checkpoint: Checkpoint, models: Path) -> None:
    _, clip = bridged(checkpoint)
    for text in ("", "  ", "\n"):
        expected = published(models, "mlp", checkpoint.name, text)
        assert torch.equal(context(encode(clip, text)), expected.context)


def test_native_text_under_two_streams_is_native_only(checkpoint: Checkpoint) -> None:
    _, two = bridged(checkpoint)
    _, only = bridged(checkpoint, route="native only")
    assert same(encode(two, RED_CAT), encode(only, RED_CAT))


# -- law (c) -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "inputs", [{"strength": 0.0}, {"route": "english only"}], ids=["strength 0", "english only"]
)
def test_off_hands_the_very_objects_on(checkpoint: Checkpoint, inputs: dict[str, Any]) -> None:
    model, clip = bridged(checkpoint, **inputs)
    assert model is checkpoint.model
    assert clip is checkpoint.clip


def test_off_needs_no_bridge_file(sd1: Checkpoint) -> None:
    assert bridged(sd1, bridge="gone.safetensors", strength=0.0) == (sd1.model, sd1.clip)


def test_the_checkpoint_is_as_it_was_after_bridged_use(checkpoint: Checkpoint) -> None:
    english, negative = encode(checkpoint.clip, "a red cat"), encode(checkpoint.clip, "")
    steps = 1 if checkpoint.name == "sdxl" else 2
    before = digest(checkpoint.clip.get_sd())
    latents = sample(checkpoint.model, english, negative, steps=steps)

    model, clip = bridged(checkpoint)
    native = sample(model, encode(clip, RED_CAT), encode(clip, ""), steps=steps)
    mixed = sample(model, encode(clip, f"{RED_CAT}, a red cat"), encode(clip, ""), steps=steps)
    assert torch.isfinite(native).all() and torch.isfinite(mixed).all()
    assert not torch.equal(native, latents) and not torch.equal(mixed, native)

    assert digest(checkpoint.clip.get_sd()) == before
    assert same(encode(checkpoint.clip, "a red cat"), english)
    assert same(encode(checkpoint.clip, ""), negative)
    assert torch.equal(sample(checkpoint.model, english, negative, steps=steps), latents)
    assert type(checkpoint.clip) is comfy.sd.CLIP


# -- law (d) -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("full", "half"),
    [
        (f"\uff08{RED_CAT}\uff1a1.3\uff09\uff0c{BLUE_DOG}", f"({RED_CAT}:1.3),{BLUE_DOG}"),
        (f"{RED_CAT}\uff0ca big dog\uff08round\uff1a1.2\uff09", f"{RED_CAT},a big dog(round:1.2)"),
        ("a \uff08red\uff1a1.2\uff09 cat\uff01", "a (red:1.2) cat!"),
        (f"{RED_CAT}\u3000{BLUE_DOG}\u3002", f"{RED_CAT} {BLUE_DOG}."),
    ],
    ids=["native", "mixed", "english", "blank and stop"],
)
def test_full_width_and_half_width_punctuation_give_the_same(sd1: Checkpoint, full: str, half: str) -> None:
    _, clip = bridged(sd1)
    assert same(encode(clip, full), encode(clip, half))


# -- joining -------------------------------------------------------------------------------------------------
def test_mixed_is_native_rows_then_english_rows(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    mixed = encode(clip, f"{RED_CAT}, a big dog")
    native, english = encode(clip, f"{RED_CAT}, "), encode(checkpoint.clip, "a big dog")
    assert torch.equal(context(mixed), torch.cat([context(native), context(english)], dim=1))
    assert context(mixed).shape[1] == 154


@pytest.mark.parametrize(
    ("text", "native_tokens", "english_tokens"), [("{},dog", 5, 1), ("{},a big dog", 5, 3)]
)
def test_sdxl_pooled_is_mixed_by_share_of_tokens(
    sdxl: Checkpoint, models: Path, text: str, native_tokens: int, english_tokens: int
) -> None:
    _, clip = bridged(sdxl)
    own = pooled(encode(sdxl.clip, text.split(",")[1]))
    native = published(models, "mlp", "sdxl", RED_CAT + ",").pooled
    share = native_tokens / (native_tokens + english_tokens)
    assert torch.equal(pooled(encode(clip, text.format(RED_CAT))), share * native + (1 - share) * own)


def test_a_bridge_without_pooled_leaves_the_english_pooled_on_sdxl(sdxl: Checkpoint, models: Path) -> None:
    tower = tiny_tower()
    plain = tiny_bridge("linear", "sdxl", tower, pooled=0)
    write_bridge(models / "language_bridges" / "no-pooled.safetensors", "sdxl", plain, tower)
    _, clip = bridged(sdxl, bridge="no-pooled.safetensors")
    assert torch.equal(pooled(encode(clip, RED_CAT)), pooled(encode(sdxl.clip, "")))
    assert context(encode(clip, RED_CAT)).shape == (1, 77, 2048)
    assert torch.equal(pooled(encode(clip, f"{RED_CAT}, dog")), pooled(encode(sdxl.clip, "dog")))


def test_a_silent_english_stream_adds_no_rows(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    assert context(encode(clip, RED_CAT)).shape[1] == 77
    assert context(encode(clip, "")).shape[1] == 77


def test_long_native_prompts_are_several_windows(checkpoint: Checkpoint, models: Path) -> None:
    _, clip = bridged(checkpoint)
    text = RED_CAT * 45  # 180 tokens in windows of 75
    windows = [text[:75], text[75:150], text[150:]]
    expected = published(models, "mlp", checkpoint.name, *windows)
    conditioning = encode(clip, text)
    assert torch.equal(context(conditioning), expected.context.flatten(0, 1)[None])
    if checkpoint.name == "sdxl":
        assert torch.equal(pooled(conditioning), expected.pooled[:1])


# -- weights -------------------------------------------------------------------------------------------------
def weighted(models: Path, base: str, text: str, weights: dict[int, float]) -> Tensor:
    """empty + weight * (row - empty) at the given places, as the stock CLIP weighs its rows."""
    rows, empty = published(models, "mlp", base, text, "").context
    for place, weight in weights.items():
        rows[place] = empty[place] + weight * (rows[place] - empty[place])
    return rows[None]


def test_a_weight_acts_on_the_rows_of_its_native_tokens(checkpoint: Checkpoint, models: Path) -> None:
    _, clip = bridged(checkpoint, route="native only")
    text = f"({RED_CAT}:1.3){BLUE_DOG}"
    expected = weighted(models, checkpoint.name, RED_CAT + BLUE_DOG, dict.fromkeys(range(1, 5), 1.3))
    assert torch.equal(context(encode(clip, text)), expected)


def test_strength_multiplies_the_weights_of_native_tokens(checkpoint: Checkpoint, models: Path) -> None:
    _, clip = bridged(checkpoint, route="native only", strength=0.5)
    expected = weighted(models, checkpoint.name, RED_CAT + BLUE_DOG, dict.fromkeys(range(3, 9), 0.5))
    got = context(encode(clip, f"({RED_CAT[:2]}:2){RED_CAT[2:]}{BLUE_DOG}"))
    assert torch.equal(got, expected)


def test_strength_reaches_the_pooled_vector(sdxl: Checkpoint, models: Path) -> None:
    _, clip = bridged(sdxl, strength=0.5)
    text, empty = published(models, "mlp", "sdxl", RED_CAT, "").pooled
    assert torch.equal(pooled(encode(clip, RED_CAT)), (empty + 0.5 * (text - empty))[None])


def test_one_bracket_pair_is_one_point_one(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    assert same(encode(clip, f"({RED_CAT})"), encode(clip, f"({RED_CAT}:1.1)"))
    assert not same(encode(clip, f"({RED_CAT})"), encode(clip, RED_CAT))


def test_english_weights_inside_a_chinese_prompt_act_as_in_the_stock_clip(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    mixed = context(encode(clip, f"{RED_CAT}, (big:1.4) dog"))
    assert torch.equal(mixed[:, 77:], context(encode(checkpoint.clip, "(big:1.4) dog")))


class Halving(Bridge):
    """A bridge whose rows do not stand for tokens: every second state, widened to the base."""

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        return Cond(hidden.states[:, ::2].repeat(1, 1, 24))


def test_rows_that_stand_for_no_token_get_the_mean_weight(sd1: Checkpoint) -> None:
    halving = Halving(BridgeSpec(hidden=32, context=768))
    tower = NativeTower(tiny_tower(), halving)
    clip = BridgedClip.over(
        sd1.clip, Speech(tower, "two streams", 0.5, base_of(sd1.model, sd1.clip), "halving")
    )
    with torch.inference_mode():
        rows, empty = halving(tower.encoder(*tower.encoder.batch([RED_CAT, ""]))).context
    got = context(encode(clip, f"({RED_CAT[:2]}:2){RED_CAT[2:]}"))
    assert torch.equal(got[0], empty + 0.75 * (rows - empty)) and got.shape[1] == 39


def test_rows_that_are_not_finite_are_an_error_and_not_a_black_picture(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    bias = clip.speech.tower.encoder.encoder.layer[0].output.LayerNorm.bias
    with torch.inference_mode():
        bias[0] = float("nan")
    with pytest.raises(BridgeError, match="not finite"):
        encode(clip, RED_CAT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tower_in_half_precision_is_near(
    checkpoint: Checkpoint, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, full = bridged(checkpoint)
    monkeypatch.setattr("language_bridge.host.bridging.tower_dtype", lambda: dtype)
    _, half = bridged(checkpoint)
    assert {weight.dtype for weight in half.speech.tower.reader.parameters()} == {dtype}
    text = f"({RED_CAT}:1.3){BLUE_DOG}"
    rows, expected = context(encode(half, text)), context(encode(full, text))
    assert rows.dtype is torch.float32 and not torch.equal(rows, expected)
    assert (rows - expected).abs().max() < 0.05 * expected.abs().max()


# -- tokens --------------------------------------------------------------------------------------------------
TEXTS = [
    "",
    " ",
    RED_CAT,
    "a red cat",
    f"{RED_CAT}, a (big:1.2) dog",
    f"({RED_CAT}:1.2)" * 40,
    "a big dog " * 40,
    "()",
]


@pytest.mark.parametrize("word_ids", [False, True])
@pytest.mark.parametrize("route", ["two streams", "native only"])
def test_tokens_are_lists_of_chunks_of_tuples(checkpoint: Checkpoint, route: str, word_ids: bool) -> None:
    _, clip = bridged(checkpoint, route=route)
    for text in TEXTS:
        tokens = clip.tokenize(text, return_word_ids=word_ids)
        assert set(checkpoint.clip.tokenize("")) < set(tokens)
        for chunks in tokens.values():
            assert type(chunks) is list and chunks
            for chunk in chunks:
                assert type(chunk) is list and chunk
                assert all(type(token) is tuple and len(token) == 2 + word_ids for token in chunk)
                if word_ids:
                    assert all(type(token[2]) is int for token in chunk)


def test_word_ids_change_nothing_but_the_tuples(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    for text in TEXTS:
        plain, numbered = clip.tokenize(text), clip.tokenize(text, return_word_ids=True)
        assert plain == {
            key: [[token[:2] for token in chunk] for chunk in chunks] for key, chunks in numbered.items()
        }
        assert same(clip.encode_from_tokens(plain), clip.encode_from_tokens(numbered))


def test_word_ids_of_native_tokens_count_up_and_are_0_for_special_tokens(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    first, *_ = clip.tokenize(RED_CAT, return_word_ids=True)["native"]
    assert [word for _, _, word in first] == [0, 1, 2, 3, 4, *[0] * 72]


def test_the_stock_keys_hold_the_stock_tokens_of_the_english_part(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    tokens = clip.tokenize(f"{RED_CAT}, a (big:1.2) dog")
    stock = checkpoint.clip.tokenize("a (big:1.2) dog")
    del tokens["native"]
    assert tokens == stock


# -- encode_from_tokens --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text", ["a red cat", RED_CAT, f"{RED_CAT}, a big dog"], ids=["english", "native", "mixed"]
)
def test_every_form_of_the_answer_says_the_same(checkpoint: Checkpoint, text: str) -> None:
    _, clip = bridged(checkpoint)
    tokens = clip.tokenize(text)
    with torch.inference_mode():
        bare = clip.encode_from_tokens(tokens)
        both = clip.encode_from_tokens(tokens, return_pooled=True)
        full = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
        scheduled = clip.encode_from_tokens_scheduled(tokens, add_dict={"width": 512})
        encoded = clip.encode(text)
    assert same(both, (bare, full["pooled_output"])) and same(full["cond"], bare) and same(encoded, bare)
    assert same(scheduled, [[bare, {"pooled_output": full["pooled_output"], "width": 512}]])


def test_unprojected_pooled_means_what_it_means_in_the_stock_clip(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    with torch.inference_mode():
        for text in ("a red cat", "a (red:1.2) cat", ""):
            stock = checkpoint.clip.encode_from_tokens(
                checkpoint.clip.tokenize(text), return_pooled="unprojected"
            )
            assert same(clip.encode_from_tokens(clip.tokenize(text), return_pooled="unprojected"), stock)
        scheduled = clip.encode_from_tokens_scheduled(clip.tokenize("a red cat"), unprojected=True)
        assert same(
            scheduled,
            checkpoint.clip.encode_from_tokens_scheduled(
                checkpoint.clip.tokenize("a red cat"), unprojected=True
            ),
        )


@pytest.mark.parametrize("text", [RED_CAT, f"{RED_CAT}, dog"])
def test_a_box_of_text_that_would_be_lost_is_refused(checkpoint: Checkpoint, text: str) -> None:
    clip = bridged(checkpoint)[1]
    tokens = clip.tokenize(text)
    with pytest.raises(BridgeError, match="GLIGEN"), torch.inference_mode():
        clip.encode_from_tokens(tokens, return_pooled="unprojected")
    with pytest.raises(BridgeError, match="GLIGEN"), torch.inference_mode():
        clip.encode_from_tokens_scheduled(tokens, unprojected=True)


def test_encoding_leaves_the_tokens_as_they_are(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    tokens = clip.tokenize(f"({RED_CAT}:1.2), a big dog")
    before = copy.deepcopy(tokens)
    with torch.inference_mode():
        clip.encode_from_tokens_scheduled(tokens)
    assert tokens == before


def test_stock_tokens_without_our_key_are_english(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    tokens = sd1.clip.tokenize("a red cat")
    with torch.inference_mode():
        assert same(
            clip.encode_from_tokens(tokens, return_pooled=True),
            sd1.clip.encode_from_tokens(tokens, return_pooled=True),
        )


# -- objects -------------------------------------------------------------------------------------------------
def test_the_bridged_clip_is_the_checkpoints_own_clip_and_more(checkpoint: Checkpoint) -> None:
    model, clip = bridged(checkpoint)
    assert isinstance(clip, comfy.sd.CLIP)
    assert model is checkpoint.model
    assert clip.cond_stage_model is checkpoint.clip.cond_stage_model
    assert clip.tokenizer is checkpoint.clip.tokenizer
    assert clip.patcher is not checkpoint.clip.patcher and clip.patcher.model is checkpoint.clip.patcher.model
    assert clip.get_sd().keys() == checkpoint.clip.get_sd().keys()


def test_a_clone_is_bridged_and_on_its_own(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    clone = clip.clone()
    assert type(clone) is BridgedClip and clone.speech is clip.speech
    assert same(encode(clone, RED_CAT), encode(clip, RED_CAT))
    key = next(iter(clip.cond_stage_model.state_dict()))
    clone.add_patches({key: (torch.ones(1),)})
    clone.clip_layer(-2)
    clone.set_tokenizer_option("min_length", 3)
    assert clone.patcher.patches and not clip.patcher.patches and not sd1.clip.patcher.patches
    assert clip.layer_idx is None and sd1.clip.layer_idx is None
    assert clip.tokenizer_options == {} == sd1.clip.tokenizer_options
    assert clone.clone().layer_idx == -2 and clone.clone().tokenizer_options == {"min_length": 3}


def test_clone_hands_the_hosts_arguments_on(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    clone = clip.clone(disable_dynamic=True)
    assert type(clone) is BridgedClip
    assert same(encode(clone, f"{RED_CAT}, cat"), encode(clip, f"{RED_CAT}, cat"))


def test_a_bridged_clip_is_not_bridged_again(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    with pytest.raises(BridgeError, match="already has a language bridge"):
        bridged(sd1, clip=clip)


def test_two_checkpoints_are_bridged_at_once(load: Callable[..., Checkpoint]) -> None:
    texts = [RED_CAT, "a red cat", f"{RED_CAT}, a big dog"]
    loaded = [load(name) for name in ("sd1", "sd2", "sdxl")]
    alone = [[encode(bridged(checkpoint)[1], text) for text in texts] for checkpoint in loaded]
    clips = [bridged(checkpoint)[1] for checkpoint in loaded]
    for number, text in enumerate(texts):
        for clip, expected in zip(clips, alone, strict=True):
            assert same(encode(clip, text), expected[number])


def test_two_bridges_on_one_checkpoint_do_not_hear_each_other(sd1: Checkpoint) -> None:
    texts = [RED_CAT, "a red cat", f"{RED_CAT}, a big dog", ""]
    alone = [[encode(bridged(sd1, kind)[1], text) for text in texts] for kind in KINDS]
    clips = [bridged(sd1, kind)[1] for kind in KINDS]
    for number, text in enumerate(texts):
        for clip, expected in zip(clips, alone, strict=True):
            assert same(encode(clip, text), expected[number])
    assert not same(alone[0][0], alone[1][0]) and not same(alone[1][0], alone[2][0])
