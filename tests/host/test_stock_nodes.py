"""Every stock node that takes a CLIP, MODEL or CONDITIONING means behind the bridge what it always means."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_extras.nodes_attention_multiply import CLIPAttentionMultiply
from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL
from comfy_extras.nodes_cond import CLIPTextEncodeControlnet, T5TokenizerOptions
from comfy_extras.nodes_custom_sampler import (
    BasicScheduler,
    CFGGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_hooks import (
    ConditioningSetProperties,
    CreateHookKeyframe,
    CreateHookLora,
    SetClipHooks,
    SetHookKeyframes,
)
from comfy_extras.nodes_lora_debug import LoraLoaderBypass
from comfy_extras.nodes_model_merging import CheckpointSave, CLIPAdd, CLIPMergeSimple, CLIPSave, CLIPSubtract
from safetensors import safe_open
from torch import Tensor

import nodes
from language_bridge.host.clip import BridgedClip
from language_bridge.tests.fixtures.graph import Checkpoint, bridged, open_cut
from language_bridge.tests.fixtures.stock import call, digest, encode, latent, same, sample, unet_calls

RED_CAT = "\u7ea2\u8272\u7684\u732b"
MIXED, NATIVE_PART, ENGLISH_PART = f"{RED_CAT}, a big dog", f"{RED_CAT}, ", "a big dog"
Loader = Callable[..., Checkpoint]


def context(conditioning: Any) -> Tensor:
    assert len(conditioning) == 1
    return conditioning[0][0]


def joined(native: Any, english: Any) -> Tensor:
    """What a mixed prompt must give: the native rows, then the stock node's rows of the English part."""
    return torch.cat([context(native), context(english)], dim=1)


def with_lora(
    model: Any, clip: Any, name: str, strength_model: float = 1.0, strength_clip: float = 1.0
) -> Any:
    return call(
        nodes.LoraLoader,
        model=model,
        clip=clip,
        lora_name=f"{name}.safetensors",
        strength_model=strength_model,
        strength_clip=strength_clip,
    )


# -- text encoders -------------------------------------------------------------------------------------------
LONG = "one two three four five six seven eight nine ten " * 9


def encode_sdxl(clip: Any, text_g: str, text_l: str) -> Any:
    sizes = {"crop_w": 0, "crop_h": 8, "target_width": 64, "target_height": 128}
    return call(CLIPTextEncodeSDXL, clip=clip, width=64, height=128, **sizes, text_g=text_g, text_l=text_l)


@pytest.mark.parametrize(
    ("text_g", "text_l"),
    [("a cat", "a cat"), ("a cat", "a dog"), (LONG, "a cat"), ("a cat", LONG), (f"({LONG}:1.1)", "")],
    ids=["same", "different", "long g", "long l", "empty l"],
)
def test_clip_text_encode_sdxl_in_english_is_stock(sdxl: Checkpoint, text_g: str, text_l: str) -> None:
    _, clip = bridged(sdxl)
    assert same(encode_sdxl(clip, text_g, text_l), encode_sdxl(sdxl.clip, text_g, text_l))


def test_clip_text_encode_sdxl_in_chinese(sdxl: Checkpoint) -> None:
    _, clip = bridged(sdxl)
    (rows, facts), (expected, usual) = encode_sdxl(clip, RED_CAT, RED_CAT)[0], encode(clip, RED_CAT)[0]
    assert torch.equal(rows, expected) and torch.equal(facts["pooled_output"], usual["pooled_output"])
    assert facts["height"] == 128 and facts["crop_h"] == 8


@pytest.mark.parametrize(
    ("text_g", "text_l", "english_g", "english_l", "windows"),
    [
        (MIXED, MIXED, ENGLISH_PART, ENGLISH_PART, 1),
        (MIXED, "a dog", ENGLISH_PART, "a dog", 1),
        (f"{NATIVE_PART}{LONG}", RED_CAT, LONG, "", 2),
        (f"{NATIVE_PART}cat", LONG, "cat", LONG, 2),
    ],
    ids=["mixed", "l english", "long g", "long l"],
)
def test_clip_text_encode_sdxl_mixed(
    sdxl: Checkpoint, text_g: str, text_l: str, english_g: str, english_l: str, windows: int
) -> None:
    _, clip = bridged(sdxl)
    rows = context(encode_sdxl(clip, text_g, text_l))
    english = encode_sdxl(sdxl.clip, english_g, english_l)
    assert rows.shape[1] == 77 * (1 + windows)
    assert torch.equal(rows, joined(encode(clip, NATIVE_PART), english))


def test_clip_set_last_layer_before_or_after(checkpoint: Checkpoint) -> None:
    def skip(clip: Any) -> Any:
        return call(nodes.CLIPSetLastLayer, clip=clip, stop_at_clip_layer=-3)

    stock = skip(checkpoint.clip)
    _, before = bridged(checkpoint, clip=stock)
    after = skip(bridged(checkpoint)[1])
    native = encode(bridged(checkpoint)[1], NATIVE_PART)
    for clip in (before, after):
        assert same(encode(clip, ENGLISH_PART), encode(stock, ENGLISH_PART))
        assert torch.equal(context(encode(clip, MIXED)), joined(native, encode(stock, ENGLISH_PART)))
    assert not same(encode(stock, ENGLISH_PART), encode(checkpoint.clip, ENGLISH_PART))


def test_clip_text_encode_controlnet(checkpoint: Checkpoint) -> None:
    def control(clip: Any, text: str) -> Any:
        return call(
            CLIPTextEncodeControlnet, clip=clip, conditioning=encode(checkpoint.clip, "a cat"), text=text
        )

    _, clip = bridged(checkpoint)
    assert same(control(clip, ENGLISH_PART), control(checkpoint.clip, ENGLISH_PART))
    facts, expected = control(clip, MIXED)[0][1], encode(clip, MIXED)[0]
    assert torch.equal(facts["cross_attn_controlnet"], expected[0])
    assert same(facts["pooled_output_controlnet"], expected[1]["pooled_output"])


def multiply(clip: Any, _: Checkpoint) -> Any:
    return call(CLIPAttentionMultiply, clip=clip, q=1.5, k=0.7, v=1.2, out=0.9)


def t5_options(clip: Any, _: Checkpoint) -> Any:
    return call(T5TokenizerOptions, clip=clip, min_padding=3, min_length=9)


def bypass(clip: Any, checkpoint: Checkpoint) -> Any:
    inputs = {"lora_name": f"{checkpoint.name}.safetensors", "strength_model": 1.0, "strength_clip": 0.8}
    return call(LoraLoaderBypass, model=checkpoint.model, clip=clip, **inputs)[1]


def on_the_cpu(clip: Any, _: Checkpoint) -> Any:
    from comfy_extras.nodes_multigpu import SelectCLIPDeviceNode

    return call(SelectCLIPDeviceNode, clip=clip, device="cpu")


CLIP_NODES = [multiply, t5_options, bypass]
if find_spec("comfy_extras.nodes_multigpu"):  # newer hosts
    CLIP_NODES.append(on_the_cpu)


@pytest.mark.parametrize("node", CLIP_NODES, ids=lambda node: node.__name__)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_node_that_changes_the_clip_before_or_after(load: Loader, name: str, node: Any) -> None:
    checkpoint = load(name)
    _, plain = bridged(checkpoint)
    native = encode(plain, NATIVE_PART)
    changed = node(checkpoint.clip, checkpoint)
    stock = encode(changed, ENGLISH_PART)
    _, before = bridged(checkpoint, clip=changed)
    for clip in (before, node(plain, checkpoint)):
        assert type(clip) is BridgedClip
        assert same(encode(clip, ENGLISH_PART), stock)
        assert torch.equal(context(encode(clip, MIXED)), joined(native, stock))
    if node in (multiply, bypass):
        assert not same(stock, encode(checkpoint.clip, ENGLISH_PART))


# -- LoRA ----------------------------------------------------------------------------------------------------
def test_a_lora_before_is_a_lora_after(checkpoint: Checkpoint) -> None:
    plain_model, plain_clip = bridged(checkpoint)
    stock_model, stock_clip = with_lora(checkpoint.model, checkpoint.clip, checkpoint.name)
    before = bridged(checkpoint, model=stock_model, clip=stock_clip)
    after = with_lora(plain_model, plain_clip, checkpoint.name)

    english, native = encode(stock_clip, ENGLISH_PART), encode(plain_clip, NATIVE_PART)
    assert not same(english, encode(checkpoint.clip, ENGLISH_PART))
    for model, clip in (before, after):
        assert type(clip) is BridgedClip
        assert clip.patcher.patches.keys() == stock_clip.patcher.patches.keys()
        assert len(clip.patcher.patches) == (2 if checkpoint.name == "sdxl" else 1)
        assert model.patches.keys() == stock_model.patches.keys() and len(model.patches) == 1
        assert same(encode(clip, ENGLISH_PART), english)
        assert torch.equal(context(encode(clip, MIXED)), joined(native, english))
        assert same(encode(clip, NATIVE_PART), native)
    # and the clip without the LoRA is untouched by it
    assert same(encode(plain_clip, ENGLISH_PART), encode(checkpoint.clip, ENGLISH_PART))


def test_a_lora_paints_the_same_before_and_after(sd1: Checkpoint) -> None:
    before = bridged(sd1, **dict(zip(("model", "clip"), with_lora(sd1.model, sd1.clip, "sd1"), strict=True)))
    after = with_lora(*bridged(sd1), "sd1")
    without = bridged(sd1)
    latents = [
        sample(model, encode(clip, MIXED), encode(clip, "")) for model, clip in (before, after, without)
    ]
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


def test_two_clips_of_one_graph_keep_their_own_loras(sd1: Checkpoint) -> None:
    weights = digest(sd1.clip.get_sd())
    _, stock = with_lora(sd1.model, sd1.clip, "sd1", strength_clip=0.7)
    _, other = with_lora(sd1.model, sd1.clip, "sd1-other")
    _, clip = with_lora(*bridged(sd1), "sd1-other")
    alone = [encode(each, ENGLISH_PART) for each in (stock, other, sd1.clip)]
    for _ in range(2):
        assert same(encode(clip, ENGLISH_PART), alone[1])
        assert same(encode(stock, ENGLISH_PART), alone[0])
        assert torch.equal(context(encode(clip, MIXED)), joined(encode(clip, NATIVE_PART), alone[1]))
        assert same(encode(sd1.clip, ENGLISH_PART), alone[2])
    assert digest(sd1.clip.get_sd()) == weights


# -- hooks ---------------------------------------------------------------------------------------------------
def hooked(clip: Any, name: str, *, schedule: bool) -> Any:
    hooks = call(CreateHookLora, lora_name=f"{name}.safetensors", strength_model=1.0, strength_clip=1.0)
    keyframes = call(CreateHookKeyframe, strength_mult=0.2, start_percent=0.0)
    keyframes = call(CreateHookKeyframe, strength_mult=1.0, start_percent=0.5, prev_hook_kf=keyframes)
    hooks = call(SetHookKeyframes, hooks=hooks, hook_kf=keyframes)
    return call(SetClipHooks, clip=clip, schedule_clip=schedule, apply_to_conds=True, hooks=hooks)


def test_scheduled_clip_hooks(checkpoint: Checkpoint) -> None:
    _, plain = bridged(checkpoint)
    clip, stock = (
        hooked(plain, checkpoint.name, schedule=True),
        hooked(checkpoint.clip, checkpoint.name, schedule=True),
    )
    assert type(clip) is BridgedClip
    english, native = encode(stock, ENGLISH_PART), encode(plain, NATIVE_PART)
    assert len(english) == 2 and not torch.equal(english[0][0], english[1][0])

    in_english, mixed, in_native = encode(clip, ENGLISH_PART), encode(clip, MIXED), encode(clip, NATIVE_PART)
    assert len(in_english) == len(mixed) == len(in_native) == 2
    for entry, expected in zip(in_english, english, strict=True):
        assert torch.equal(entry[0], expected[0])
        assert torch.equal(entry[1]["pooled_output"], expected[1]["pooled_output"])
    for entry, expected in zip(mixed, english, strict=True):
        assert torch.equal(entry[0], torch.cat([context(native), expected[0]], dim=1))
    for entry, expected in zip(mixed, english, strict=True):
        own = expected[1]["pooled_output"]
        if checkpoint.name == "sdxl":  # five native tokens and three English ones
            own = 5 / 8 * native[0][1]["pooled_output"] + (1 - 5 / 8) * own
        assert torch.equal(entry[1]["pooled_output"], own)
    for entry in in_native:
        assert torch.equal(entry[0], context(native))
    for entries in (in_english, mixed, in_native):
        for entry, expected in zip(entries, english, strict=True):
            assert entry[1].keys() == expected[1].keys() and "hooks" in entry[1]
            for key in ("clip_start_percent", "clip_end_percent"):
                assert entry[1][key] == expected[1][key]
    # the clip in front of the hooks speaks without them
    assert same(encode(plain, ENGLISH_PART), encode(checkpoint.clip, ENGLISH_PART))


def test_unscheduled_clip_hooks(sd1: Checkpoint) -> None:
    _, plain = bridged(sd1)
    clip, stock = hooked(plain, "sd1", schedule=False), hooked(sd1.clip, "sd1", schedule=False)
    english, native = encode(stock, ENGLISH_PART), encode(plain, NATIVE_PART)
    mixed = encode(clip, MIXED)
    assert torch.equal(context(encode(clip, ENGLISH_PART)), context(english))
    assert torch.equal(context(mixed), joined(native, english))
    assert torch.equal(context(encode(clip, NATIVE_PART)), context(native))
    for conditioning in (mixed, encode(clip, NATIVE_PART), encode(clip, ENGLISH_PART)):
        assert conditioning[0][1]["hooks"] is clip.apply_hooks_to_conds


@pytest.mark.parametrize("schedule", [True, False])
def test_hooks_paint(sd1: Checkpoint, schedule: bool) -> None:
    model, plain = bridged(sd1)
    clip = hooked(plain, "sd1", schedule=schedule)
    negative = encode(plain, "")
    hooked_latents = sample(model, encode(clip, MIXED), negative)
    assert torch.isfinite(hooked_latents).all()
    assert not torch.equal(hooked_latents, sample(model, encode(plain, MIXED), negative))
    english = encode(hooked(sd1.clip, "sd1", schedule=schedule), ENGLISH_PART)
    assert torch.equal(
        sample(model, encode(clip, ENGLISH_PART), negative), sample(sd1.model, english, negative)
    )


# -- merging and saving --------------------------------------------------------------------------------------
def test_clip_merges(load: Loader) -> None:
    one, two = load("sd1"), load("sd1", seed=7)
    _, clip = bridged(one)
    native = encode(clip, NATIVE_PART)
    for node, ratio in (
        (CLIPMergeSimple, {"ratio": 0.3}),
        (CLIPAdd, {}),
        (CLIPSubtract, {"multiplier": 0.5}),
    ):
        merged = call(node, clip1=clip, clip2=two.clip, **ratio)
        stock = encode(call(node, clip1=one.clip, clip2=two.clip, **ratio), ENGLISH_PART)
        assert type(merged) is BridgedClip
        assert same(encode(merged, ENGLISH_PART), stock) and not same(stock, encode(one.clip, ENGLISH_PART))
        assert torch.equal(context(encode(merged, MIXED)), joined(native, stock))
        # the second CLIP lends its weights only, bridged or not
        swapped = encode(call(node, clip1=two.clip, clip2=clip, **ratio), ENGLISH_PART)
        assert same(swapped, encode(call(node, clip1=two.clip, clip2=one.clip, **ratio), ENGLISH_PART))


def saved(folder: Path) -> Path:
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    assert len(files) == 1
    return files[0]


def stored(clip: Any) -> dict[str, Tensor]:
    """Weights that an SD1.x checkpoint holds; the projection that the host adds to them is not among them."""
    return {key: value for key, value in clip.get_sd().items() if "text_projection" not in key}


def test_checkpoint_save_writes_the_checkpoint_and_nothing_else(
    sd1: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("folder_paths.output_directory", str(tmp_path))
    model, clip = bridged(sd1)
    english, picture = (
        encode(sd1.clip, ENGLISH_PART),
        sample(sd1.model, encode(clip, MIXED), encode(clip, "")),
    )
    call(CheckpointSave, model=model, clip=clip, vae=sd1.vae, filename_prefix="bridged")
    path = saved(tmp_path)
    with safe_open(str(path), framework="pt") as file:
        roots = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
        towers = {key.split(".")[1] for key in file.keys() if key.startswith("cond_stage_model.")}  # noqa: SIM118
    assert roots <= {"model", "cond_stage_model", "first_stage_model", "alphas_cumprod"}
    assert towers <= {"transformer", "logit_scale"}

    again = Checkpoint("sd1", *open_cut(path, "sd1"))
    path.unlink()
    assert digest(stored(again.clip)) == digest(stored(sd1.clip))
    assert same(encode(again.clip, ENGLISH_PART), english)
    again_model, again_clip = bridged(again)
    assert torch.equal(sample(again_model, encode(again_clip, MIXED), encode(again_clip, "")), picture)


def test_clip_save_writes_the_stock_file(
    sd1: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    digests: list[str] = []
    for name, clip in (("stock", sd1.clip), ("bridged", bridged(sd1)[1])):
        monkeypatch.setattr("folder_paths.output_directory", str(tmp_path / name))
        call(CLIPSave, clip=clip, filename_prefix="text")
        digests.append(digest(load_file(str(saved(tmp_path / name)))))
    assert digests[0] == digests[1]


# -- conditioning nodes --------------------------------------------------------------------------------------
def concat(one: Any, other: Any) -> Any:
    return call(nodes.ConditioningConcat, conditioning_to=one, conditioning_from=other)


def average(one: Any, other: Any) -> Any:
    return call(
        nodes.ConditioningAverage, conditioning_to=one, conditioning_from=other, conditioning_to_strength=0.3
    )


def combine(one: Any, other: Any) -> Any:
    return call(nodes.ConditioningCombine, conditioning_1=one, conditioning_2=other)


def area(one: Any, _: Any) -> Any:
    return call(nodes.ConditioningSetArea, conditioning=one, width=64, height=32, x=0, y=16, strength=0.8)


def timesteps(one: Any, _: Any) -> Any:
    return call(nodes.ConditioningSetTimestepRange, conditioning=one, start=0.2, end=1.0)


def zero_out(one: Any, _: Any) -> Any:
    return call(nodes.ConditioningZeroOut, conditioning=one)


def properties(one: Any, _: Any) -> Any:
    return call(ConditioningSetProperties, cond_NEW=one, strength=0.7, set_cond_area="default")


CONDITIONING_NODES = [concat, average, combine, area, timesteps, zero_out, properties]


@pytest.mark.parametrize("node", CONDITIONING_NODES, ids=lambda node: node.__name__)
def test_a_conditioning_node_means_what_it_means(
    checkpoint: Checkpoint, node: Callable[[Any, Any], Any]
) -> None:
    _, clip = bridged(checkpoint)
    stock = node(encode(checkpoint.clip, "a red cat"), encode(checkpoint.clip, ENGLISH_PART))
    assert same(node(encode(clip, "a red cat"), encode(clip, ENGLISH_PART)), stock)


@pytest.mark.parametrize("node", CONDITIONING_NODES, ids=lambda node: node.__name__)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_conditioning_node_paints_chinese(load: Loader, name: str, node: Callable[[Any, Any], Any]) -> None:
    checkpoint = load(name)
    model, clip = bridged(checkpoint)
    native = encode(clip, RED_CAT)
    positive = node(native, encode(clip, MIXED))
    latents = sample(model, positive, encode(clip, ""), steps=1)
    assert latents.shape == (1, 4, 8, 8) and torch.isfinite(latents).all()
    if node not in (timesteps, properties):  # one keeps the only step, the other weighs the only cond
        assert not torch.equal(latents, sample(model, native, encode(clip, ""), steps=1))


def test_conditioning_rows_of_native_text(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    native, mixed = encode(clip, RED_CAT), encode(clip, MIXED)
    assert torch.equal(context(concat(native, mixed)), joined(native, mixed))
    assert len(combine(native, mixed)) == 2
    assert torch.equal(context(average(native, mixed)), 0.3 * context(native) + 0.7 * context(mixed)[:, :77])
    assert not context(zero_out(native, None)).any()


# -- sampling ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("positive", "negative", "rows"),
    [
        (RED_CAT, "", 77),
        (ENGLISH_PART, "", 77),
        (MIXED, "", 154),
        (RED_CAT, "blurry", 77),
        (RED_CAT * 45, "", 231),
    ],
    ids=["native", "english", "mixed", "english negative", "long"],
)
def test_guidance_is_one_batched_call_of_the_unet(
    sd1: Checkpoint, positive: str, negative: str, rows: int
) -> None:
    model, clip = bridged(sd1, model=sd1.model.clone())
    with unet_calls(model) as calls:
        sample(model, encode(clip, positive), encode(clip, negative), steps=2)
    assert calls == [(2, rows, 768)] * 2


def test_a_custom_guider_paints_what_the_ksampler_paints(checkpoint: Checkpoint) -> None:
    model, clip = bridged(checkpoint)
    positive, negative = encode(clip, MIXED), encode(clip, "")
    guider = call(CFGGuider, model=model, positive=positive, negative=negative, cfg=3.0)
    output, _ = call(
        SamplerCustomAdvanced,
        noise=call(RandomNoise, noise_seed=5),
        guider=guider,
        sampler=call(KSamplerSelect, sampler_name="euler"),
        sigmas=call(BasicScheduler, model=model, scheduler="normal", steps=1, denoise=1.0),
        latent_image=latent(),
    )
    assert torch.equal(output["samples"], sample(model, positive, negative, steps=1))


def test_controlnet(sd1: Checkpoint) -> None:
    model, clip = bridged(sd1)
    net = call(nodes.ControlNetLoader, control_net_name="sd1.ckpt")
    picture = torch.linspace(0, 1, 64 * 64 * 3).view(1, 64, 64, 3)

    def controlled(clip: Any, text: str) -> Any:
        return call(
            nodes.ControlNetApplyAdvanced,
            positive=encode(clip, text),
            negative=encode(clip, "blurry"),
            control_net=net,
            image=picture,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        )

    stock = sample(sd1.model, *controlled(sd1.clip, ENGLISH_PART))
    assert torch.equal(sample(model, *controlled(clip, ENGLISH_PART)), stock)
    for text in (RED_CAT, MIXED):
        latents = sample(model, *controlled(clip, text))
        assert torch.isfinite(latents).all()
        assert not torch.equal(latents, sample(model, encode(clip, text), encode(clip, "blurry")))


# -- textual inversion ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "english", "native"),
    [
        ("{cat}embedding:{word}", "embedding:{word}", "{cat}"),
        ("{cat} embedding:{word} {cat}", "embedding:{word}", "{cat}  {cat}"),
        ("{cat}\uff0cembedding:{word}\uff0c{cat}", "embedding:{word}", "{cat}, ,{cat}"),
        ("{cat}, (embedding:{word}:1.3)", "(embedding:{word}:1.3)", "{cat}, "),
    ],
    ids=["glued", "inside", "full width", "weighted"],
)
def test_textual_inversion_in_a_chinese_prompt(
    checkpoint: Checkpoint, text: str, english: str, native: str
) -> None:
    words = {"cat": RED_CAT, "word": f"{checkpoint.name}-word"}
    _, clip = bridged(checkpoint)
    rows = context(encode(clip, text.format(**words)))
    expected = encode(checkpoint.clip, english.format(**words))
    vectors = [
        token for chunk in checkpoint.clip.tokenize(english.format(**words)).values() for token in chunk[0]
    ]
    assert any(isinstance(token, Tensor) for token, *_ in vectors)
    assert torch.equal(rows, joined(encode(clip, native.format(**words)), expected))


def test_a_span_marked_as_english_reaches_the_english_clip(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    rows = context(encode(clip, f"{RED_CAT}lang:en (sks style:1.2), 1girl lang:zh{RED_CAT}"))
    assert torch.equal(rows[:, 77:], context(encode(checkpoint.clip, "(sks style:1.2), 1girl ")))
    assert torch.equal(rows[:, :77], context(encode(clip, f"{RED_CAT}{RED_CAT}")))


def test_textual_inversion_is_heard_under_native_only(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1, route="native only")
    rows = context(encode(clip, f"{RED_CAT} embedding:sd1-word"))
    assert torch.equal(rows[:, 77:], context(encode(sd1.clip, "embedding:sd1-word")))
