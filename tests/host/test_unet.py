"""U-Net parts by stream: native rows are read by the bridge's weights, English rows by the own ones."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as management
import pytest
import torch
from comfy_extras.nodes_custom_sampler import (
    BasicScheduler,
    CFGGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_lora_debug import LoraLoaderBypass
from torch import Tensor
from torch import load as open_pickle
from torch.nn.functional import linear

import nodes
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import BridgeHeader, save_bridge
from language_bridge.host.joining import SHARED, Joining
from language_bridge.host.rows import MARK
from language_bridge.host.unet import KEY, part_shapes
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, digest, encode, latent, same, sample, unet_calls
from language_bridge.tests.fixtures.towers import reference, tiny_bridge, tiny_tower

RED_CAT = "\u7ea2\u8272\u7684\u732b"
BLUE_DOG = "\u84dd\u8272\u7684\u72d7"
MIXED, NATIVE_PART, ENGLISH_PART = f"{RED_CAT}, a big dog", f"{RED_CAT}, ", "a big dog"
PARTS = [("kv", "delta"), ("kv", "replace"), ("attn2", "delta"), ("attn2", "replace")]
Loader = Callable[..., Checkpoint]
Weights = dict[str, Tensor]


def part_weights(model: Any, part: str, seed: int = 11) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = part_shapes(model, part)
    return {key: torch.randn(shape, generator=generator) * 0.05 for key, shape in shapes.items()}


def write(
    path: Path, base: str, weights: Weights, part: str, training: Mapping[str, object], seed: int = 0
) -> str:
    """A bridge file with a U-Net part, behind the tower that every tiny bridge reads."""
    tower = tiny_tower()
    bridge = tiny_bridge("linear", base, tower, seed=seed)
    header = BridgeHeader(
        kind="linear",
        spec=dataclasses.asdict(bridge.spec),
        base=base,
        encoder=reference(tower),
        unet=part,
        training=training,
    )
    save_bridge(path, header, bridge, unet=weights)
    return path.name


@pytest.fixture(scope="module")
def files(models: Path, load: Loader) -> Iterator[dict[tuple[str, str, str], tuple[str, Weights]]]:
    """Name and U-Net weights of a bridge file, by base, part and how it is meant."""
    folder, made = models / "language_bridges", {}
    for base, parts in (("sd1", PARTS), ("sd2", PARTS[1:3]), ("sdxl", PARTS[:2])):
        for part, how in parts:
            weights = part_weights(load(base).model, part)
            name = f"{part}-{how}-{base}.safetensors"
            write(folder / name, base, weights, part, {"unet": how})
            made[base, part, how] = (name, weights)
    yield made
    for name, _ in made.values():
        (folder / name).unlink()


def unmarked(conditioning: Any) -> Any:
    """The same rows without our mark: what a MODEL that knows of no bridge is given anyway."""
    return [
        [rows, {key: value for key, value in facts.items() if key != MARK}] for rows, facts in conditioning
    ]


def replaced(model: Any, weights: Weights, how: str) -> Any:
    """The host's own U-Net with these weights patched in, the host's own way."""
    clone = model.clone()
    kind = "diff" if how == "delta" else "set"
    clone.add_patches({f"diffusion_model.{key}": (kind, (value,)) for key, value in weights.items()})
    return clone


@contextmanager
def by_hand(model: Any, weights: Weights, how: str, *native: Any) -> Iterator[None]:
    """Another way to the same numbers: torch hooks that know a native row by its very content."""
    rows = torch.cat([conditioning[0][0].flatten(0, 1) for conditioning in native]).unique(dim=0)
    handles, speaking = [], []
    unet = model.model.diffusion_model

    memory: dict[tuple[tuple[int, ...], float], Tensor] = {}

    def known(text: Tensor) -> Tensor:
        key = (tuple(text.shape), float(text.sum()))
        if key not in memory:
            memory[key] = torch.stack([(entry[:, None] == rows).all(-1).any(-1) for entry in text])
        return memory[key]

    def notice(_: Any, __: Any, options: Any) -> None:
        speaking[:] = [known(options["context"])]

    def answer(name: str) -> Any:
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")

        def hook(_: Any, given: Any, own: Tensor) -> Tensor:
            where = speaking[0] if name.endswith((".to_k", ".to_v")) else speaking[0].any(1)[:, None]
            said = linear(given[0], weight, bias)
            return torch.where(where[..., None], own + said if how == "delta" else said, own)

        return hook

    for name in {key.split(".attn2.")[0] for key in weights}:
        block = unet.get_submodule(f"{name}.attn2")
        handles.append(block.register_forward_pre_hook(notice, with_kwargs=True))
    for name in {key.rsplit(".", 1)[0] for key in weights}:
        handles.append(unet.get_submodule(name).register_forward_hook(answer(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max())))


# -- law (a) -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("part", "how"), PARTS)
def test_english_is_stock_bit_for_bit(sd1: Checkpoint, files: Any, part: str, how: str) -> None:
    model, clip = bridged(sd1, bridge=files["sd1", part, how][0])
    positive, negative = encode(clip, ENGLISH_PART), encode(clip, "blurry")
    assert same(positive, encode(sd1.clip, ENGLISH_PART))
    stock = sample(sd1.model, encode(sd1.clip, ENGLISH_PART), encode(sd1.clip, "blurry"))
    assert torch.equal(sample(model, positive, negative), stock)


# -- law (b) -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "part", "how"),
    [*[("sd1", *each) for each in PARTS], ("sd2", "kv", "replace"), ("sd2", "attn2", "delta")]
    + [("sdxl", "kv", "delta"), ("sdxl", "kv", "replace")],
)
def test_native_only_is_the_hosts_unet_with_these_weights(
    load: Loader, files: Any, base: str, part: str, how: str
) -> None:
    checkpoint = load(base)
    name, weights = files[base, part, how]
    model, clip = bridged(checkpoint, bridge=name, route="native only")
    positive, negative = encode(clip, f"{RED_CAT} and a dog"), encode(clip, "")
    own = replaced(checkpoint.model, weights, how)
    steps = 1 if base == "sdxl" else 3
    expected = sample(own, unmarked(positive), unmarked(negative), steps=steps)
    got = sample(model, positive, negative, steps=steps)
    assert near(got, expected)
    assert not near(got, sample(checkpoint.model, unmarked(positive), unmarked(negative), steps=steps))


def test_the_number_of_tensors_is_the_published_one() -> None:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    class Holder:
        class model:
            diffusion_model = UNetModel(
                device="meta",
                dtype=torch.float32,
                operations=comfy.ops.disable_weight_init,
                image_size=32,
                in_channels=4,
                out_channels=4,
                model_channels=320,
                num_res_blocks=[2, 2, 2, 2],
                channel_mult=[1, 2, 4, 4],
                transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
                transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
                transformer_depth_middle=1,
                context_dim=768,
                num_heads=8,
                use_spatial_transformer=True,
                legacy=False,
            )

    for part, count, numbers in (("kv", 32, 19_169_280), ("attn2", 80, 43_962_560)):
        shapes = part_shapes(Holder, part)
        assert len(shapes) == count
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == numbers
    assert part_shapes(Holder, "kv")["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)


# -- mixed ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("part", "how"), PARTS)
@pytest.mark.parametrize(
    ("positive", "negative"),
    [(MIXED, ""), (MIXED, "blurry"), (RED_CAT, "blurry"), (ENGLISH_PART, ""), (MIXED, f"{BLUE_DOG}, ugly")],
    ids=["mixed", "english negative", "native against english", "english against native", "both mixed"],
)
def test_each_row_is_read_by_its_own_weights(
    sd1: Checkpoint, files: Any, part: str, how: str, positive: str, negative: str
) -> None:
    name, weights = files["sd1", part, how]
    model, clip = bridged(sd1, bridge=name)
    conds = encode(clip, positive), encode(clip, negative)
    alone = [encode(clip, text) for text in (NATIVE_PART, RED_CAT, f"{BLUE_DOG}, ", "")]
    watched = model.clone()
    with unet_calls(watched) as calls:
        got = sample(watched, *conds)
    assert [shape[0] for shape in calls] == [2, 2]  # positive and negative in one batch
    with by_hand(sd1.model, weights, how, *alone):
        expected = sample(sd1.model, *map(unmarked, conds))
    assert near(got, expected)
    assert not near(got, sample(sd1.model, *map(unmarked, conds)))


def test_positive_and_negative_batched_are_what_they_are_alone(sd1: Checkpoint, files: Any) -> None:
    import comfy.samplers

    model, clip = bridged(sd1, bridge=files["sd1", "attn2", "replace"][0])
    conds = encode(clip, MIXED), encode(clip, RED_CAT)  # 154 rows, 77 of them native, against 77 native
    batched = sample(model, *conds)

    def apart(arguments: Any) -> Any:
        rest = (arguments["input"], arguments["sigma"], arguments["model_options"])
        each = [
            comfy.samplers.calc_cond_batch(arguments["model"], [cond], *rest) for cond in arguments["conds"]
        ]
        return [found[0] for found in each]

    single = model.clone()
    single.set_model_sampler_calc_cond_batch_function(apart)
    with unet_calls(single) as calls:
        assert near(sample(single, *conds), batched)
    assert {shape[:2] for shape in calls} == {(1, 154), (1, 77)}


def test_a_batch_of_pictures(sd1: Checkpoint, files: Any) -> None:
    name, weights = files["sd1", "kv", "replace"]
    model, clip = bridged(sd1, bridge=name)
    conds = encode(clip, MIXED), encode(clip, "")

    def three(model: Any, conds: Any) -> Tensor:
        done = call(
            nodes.KSampler,
            model=model,
            seed=5,
            steps=2,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
            positive=conds[0],
            negative=conds[1],
            latent_image=call(nodes.EmptyLatentImage, width=64, height=64, batch_size=3),
            denoise=1.0,
        )
        return done["samples"]

    with by_hand(sd1.model, weights, "replace", encode(clip, NATIVE_PART), encode(clip, "")):
        expected = three(sd1.model, [unmarked(cond) for cond in conds])
    assert near(three(model, conds), expected)


# -- beside other things -------------------------------------------------------------------------------------
def with_lora(model: Any, clip: Any, name: str = "sd1") -> Any:
    inputs = {"lora_name": f"{name}.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    return call(nodes.LoraLoader, model=model, clip=clip, **inputs)


@pytest.mark.parametrize("how", ["delta", "replace"])
def test_a_lora_reaches_the_english_rows_before_and_after(sd1: Checkpoint, files: Any, how: str) -> None:
    name, weights = files["sd1", "kv", how]
    stock = with_lora(sd1.model, sd1.clip)
    before = bridged(sd1, bridge=name, model=stock[0], clip=stock[1])
    after = with_lora(*bridged(sd1, bridge=name))
    negative = encode(before[1], "")
    latents = [sample(model, encode(clip, MIXED), negative) for model, clip in (before, after)]
    assert torch.equal(*latents)
    rows = unmarked(encode(before[1], MIXED)), unmarked(negative)
    with by_hand(stock[0], weights, how, encode(before[1], NATIVE_PART), negative):
        assert near(latents[0], sample(stock[0], *rows))
    english = encode(stock[1], ENGLISH_PART), encode(stock[1], "blurry")
    assert torch.equal(sample(after[0], *english), sample(stock[0], *english))


def test_a_bypass_lora(sd1: Checkpoint, files: Any) -> None:
    name, weights = files["sd1", "kv", "replace"]
    inputs = {"lora_name": "sd1.safetensors", "strength_model": 1.0, "strength_clip": 0.0}
    model, clip = bridged(sd1, bridge=name)
    bypassed, _ = call(LoraLoaderBypass, model=model, clip=clip, **inputs)
    stock, _ = call(LoraLoaderBypass, model=sd1.model, clip=sd1.clip, **inputs)
    english = encode(sd1.clip, ENGLISH_PART), encode(sd1.clip, "blurry")
    assert torch.equal(sample(bypassed, *english), sample(stock, *english))
    assert not near(sample(bypassed, *english), sample(model, *english))
    patched, _ = with_lora(model, clip)
    conds = encode(clip, MIXED), encode(clip, "")
    assert near(sample(bypassed, *conds), sample(patched, *conds))


@pytest.mark.parametrize("part", ["kv", "attn2"])
def test_other_patches_of_the_cross_attention_go_on(sd1: Checkpoint, files: Any, part: str) -> None:
    from comfy.ldm.modules.attention import optimized_attention

    seen: list[tuple[int, ...]] = []

    def replace(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
        seen.append(tuple(k.shape))
        own = optimized_attention(q, k, v, options["n_heads"])
        return own + 0.1 * optimized_attention(q, k.flip(1)[:, :4], v[:, :4], options["n_heads"])

    def query(n: Tensor, context: Tensor, value: Tensor, options: Any) -> Any:
        return n * 1.1, context, value

    def busy(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn2_replace(replace, "input", 1)
        clone.set_model_attn2_patch(query)
        clone.set_model_attn2_output_patch(lambda n, options: n * 0.9)
        return clone

    name, weights = files["sd1", part, "replace"]
    model, clip = bridged(sd1, bridge=name)
    conds = encode(clip, MIXED), encode(clip, "blurry")
    got = sample(busy(model), *conds)
    assert seen
    if part == "kv":  # a replaced block never calls attn2 itself, on which the reference listens
        return
    english = encode(clip, ENGLISH_PART), encode(clip, "blurry")
    assert not near(got, sample(model, *conds))
    assert torch.equal(sample(busy(model), *english), sample(busy(sd1.model), *english))


def test_rows_that_another_node_puts_behind_stay_the_checkpoints_own(sd1: Checkpoint, files: Any) -> None:
    name, weights = files["sd1", "kv", "replace"]
    model, clip = bridged(sd1, bridge=name)
    more = torch.randn(1, 4, 768, generator=torch.Generator().manual_seed(1)) * 0.1

    def append(n: Tensor, context: Tensor, value: Tensor, options: Any) -> Any:
        rows = torch.cat([context, more.expand(len(context), -1, -1)], dim=1)
        return n, rows, rows

    def busy(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_attn2_patch(append)
        return clone

    conds = encode(clip, MIXED), encode(clip, "")
    with by_hand(sd1.model, weights, "replace", encode(clip, NATIVE_PART), encode(clip, "")):
        expected = sample(busy(sd1.model), *map(unmarked, conds))
    assert near(sample(busy(model), *conds), expected)


def test_rows_that_another_node_takes_away_are_an_error(sd1: Checkpoint, files: Any) -> None:
    model, clip = bridged(sd1, bridge=files["sd1", "kv", "delta"][0])
    busy = model.clone()
    busy.set_model_attn2_patch(lambda n, context, value, options: (n, context[:, ::2], value[:, ::2]))
    before = [module.__dict__.get("forward") for module in model.model.modules()]
    with pytest.raises(BridgeError, match="which text rows are native"):
        sample(busy, encode(clip, MIXED), encode(clip, ""))
    assert [module.__dict__.get("forward") for module in model.model.modules()] == before


def test_a_controlnet(sd1: Checkpoint, files: Any) -> None:
    name, weights = files["sd1", "kv", "replace"]
    model, clip = bridged(sd1, bridge=name)
    net = call(nodes.ControlNetLoader, control_net_name="sd1.ckpt")
    picture = torch.linspace(0, 1, 64 * 64 * 3).view(1, 64, 64, 3)

    def controlled(positive: Any, negative: Any) -> Any:
        inputs = {"control_net": net, "image": picture, "strength": 1.0}
        inputs |= {"start_percent": 0.0, "end_percent": 1.0}
        return call(nodes.ControlNetApplyAdvanced, positive=positive, negative=negative, **inputs)

    conds = encode(clip, MIXED), encode(clip, "blurry")
    got = sample(model, *controlled(*conds))
    with by_hand(sd1.model, weights, "replace", encode(clip, NATIVE_PART)):
        expected = sample(sd1.model, *controlled(*map(unmarked, conds)))
    assert near(got, expected) and not near(got, sample(model, *conds))


def test_a_custom_guider_paints_what_the_ksampler_paints(sd1: Checkpoint, files: Any) -> None:
    model, clip = bridged(sd1, bridge=files["sd1", "attn2", "delta"][0])
    positive, negative = encode(clip, MIXED), encode(clip, "")
    output, _ = call(
        SamplerCustomAdvanced,
        noise=call(RandomNoise, noise_seed=5),
        guider=call(CFGGuider, model=model, positive=positive, negative=negative, cfg=3.0),
        sampler=call(KSamplerSelect, sampler_name="euler"),
        sigmas=call(BasicScheduler, model=model, scheduler="normal", steps=2, denoise=1.0),
        latent_image=latent(),
    )
    assert torch.equal(output["samples"], sample(model, positive, negative))


def combine(one: Any, other: Any) -> Any:
    return call(nodes.ConditioningCombine, conditioning_1=one, conditioning_2=other)


def area(one: Any, other: Any) -> Any:
    placed = call(nodes.ConditioningSetArea, conditioning=one, width=32, height=64, x=0, y=0, strength=0.8)
    return combine(placed, other)


def zero(one: Any, _: Any) -> Any:
    return call(nodes.ConditioningZeroOut, conditioning=one)


def concat(one: Any, other: Any) -> Any:
    return call(nodes.ConditioningConcat, conditioning_to=one, conditioning_from=other)


@pytest.mark.parametrize("node", [combine, area, zero, concat], ids=lambda node: node.__name__)
def test_conditioning_nodes(sd1: Checkpoint, files: Any, node: Any) -> None:
    name, weights = files["sd1", "kv", "delta"]
    model, clip = bridged(sd1, bridge=name)
    positive = node(encode(clip, MIXED), encode(clip, ENGLISH_PART))
    got = sample(model, positive, encode(clip, "blurry"))
    with by_hand(sd1.model, weights, "delta", encode(clip, NATIVE_PART)):
        expected = sample(sd1.model, unmarked(positive), encode(clip, "blurry"))
    assert near(got, expected)


# -- objects and memory --------------------------------------------------------------------------------------
def test_nothing_of_the_checkpoint_is_patched(sd1: Checkpoint, files: Any) -> None:
    weights = digest(sd1.model.model.state_dict())
    stock = sample(sd1.model, encode(sd1.clip, "a cat"), encode(sd1.clip, ""))
    model, clip = bridged(sd1, bridge=files["sd1", "attn2", "replace"][0])
    assert model is not sd1.model and model.model is sd1.model.model
    assert not model.patches and not model.object_patches and not sd1.model.wrappers
    sample(model, encode(clip, MIXED), encode(clip, ""))
    assert digest(sd1.model.model.state_dict()) == weights
    assert torch.equal(sample(sd1.model, encode(sd1.clip, "a cat"), encode(sd1.clip, "")), stock)


def test_the_host_loads_and_counts_the_part(sd1: Checkpoint, files: Any) -> None:
    model, clip = bridged(sd1, bridge=files["sd1", "kv", "delta"][0])
    conds = encode(clip, MIXED), encode(clip, "")
    management.unload_all_models()
    sample(model.clone(), *conds)
    (patcher,) = model.get_additional_models()
    loaded = [entry.model.model for entry in management.current_loaded_models if entry.model is not None]
    assert patcher.model in loaded and clip.speech.tower.reader not in loaded
    shapes = part_shapes(sd1.model, "kv").values()
    assert patcher.model_size() == 4 * sum(torch.Size(shape).numel() for shape in shapes)


def test_graphs_share_the_part_and_the_host_never_takes_it_for_lost(
    sd1: Checkpoint, files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Two graphs alive at once, as with the host's cache of results; then the first of them goes."""
    caplog.set_level(logging.INFO)
    first = bridged(sd1, bridge=files["sd1", "kv", "replace"][0], strength=0.3)
    sample(first[0], encode(first[1], RED_CAT), encode(first[1], ""), steps=1)
    model, clip = bridged(sd1, bridge=files["sd1", "kv", "replace"][0])
    parts = [part.model for each in (first[0], model) for part in each.additional_models[KEY]]
    assert len(parts) == 2 and parts[0] is parts[1]
    positive, negative = encode(clip, RED_CAT), encode(clip, "")
    expected = sample(model, positive, negative, steps=1)
    del first, parts
    gc.collect()
    for _ in range(2):
        assert torch.equal(sample(model, positive, negative, steps=1), expected)
    assert "memory leak" not in caplog.text


def test_off_hands_the_very_objects_on(sd1: Checkpoint, files: Any) -> None:
    name = files["sd1", "kv", "delta"][0]
    assert bridged(sd1, bridge=name, strength=0.0) == (sd1.model, sd1.clip)


def test_the_mark_is_plain_and_can_be_saved(sd1: Checkpoint, files: Any, tmp_path: Path) -> None:
    model, clip = bridged(sd1, bridge=files["sd1", "kv", "delta"][0])
    conds = encode(clip, MIXED), encode(clip, "")
    torch.save(conds, tmp_path / "conds.pt")
    again = open_pickle(tmp_path / "conds.pt", weights_only=True)
    assert torch.equal(sample(model, *again), sample(model, *conds))
    assert MARK not in encode(clip, ENGLISH_PART)[0][1]


# -- refusals ------------------------------------------------------------------------------------------------
def test_a_second_bridge_on_one_model(sd1: Checkpoint, files: Any) -> None:
    name = files["sd1", "kv", "delta"][0]
    model, _ = bridged(sd1, bridge=name)
    with pytest.raises(BridgeError, match="MODEL already has a language bridge"):
        bridged(sd1, bridge=name, model=model)


def test_text_of_another_bridge(sd1: Checkpoint, files: Any) -> None:
    model, _ = bridged(sd1, bridge=files["sd1", "kv", "delta"][0])
    _, other = bridged(sd1, bridge=files["sd1", "kv", "replace"][0])
    with pytest.raises(BridgeError, match="two different bridges"):
        sample(model, encode(other, RED_CAT), encode(other, ""))


@pytest.mark.parametrize(
    ("part", "training", "change", "words"),
    [
        ("kv", {}, None, "does not say how"),
        ("kv", {"unet": "own"}, None, "does not say how"),
        ("full", {"unet": "replace"}, None, "whole U-Net of its own"),
        ("kv", {"unet": "delta"}, "missing", "does not fit this checkpoint"),
        ("kv", {"unet": "delta"}, "surplus", "does not fit this checkpoint"),
        ("kv", {"unet": "delta"}, "shape", "does not fit this checkpoint"),
        ("attn2", {"unet": "delta"}, None, "does not fit this checkpoint"),
    ],
)
def test_a_part_that_cannot_be_used_is_refused(
    sd1: Checkpoint, models: Path, part: str, training: Any, change: str | None, words: str
) -> None:
    weights = part_weights(sd1.model, "kv")
    first = next(iter(weights))
    if change == "missing":
        del weights[first]
    elif change == "surplus":
        weights["input_blocks.9.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(3, 3)
    elif change == "shape":
        weights[first] = weights[first][:-1]
    path = models / "language_bridges" / "refused.safetensors"
    try:
        write(path, "sd1", weights, part, training)
        with pytest.raises(BridgeError, match=words) as caught:
            bridged(sd1, bridge=path.name)
        assert len(str(caught.value).split("\n")) == 4
    finally:
        path.unlink()


def test_a_bridge_for_its_own_unet(
    sd1: Checkpoint, models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.model_base

    path = models / "language_bridges" / "own.safetensors"
    try:
        write(path, "sd1", {}, "none", {"unet": "own"})
        model, _ = bridged(sd1, bridge=path.name)
        assert model is sd1.model and "own checkpoint" in caplog.text
        monkeypatch.setattr(sd1.model.model, "model_type", comfy.model_base.ModelType.V_PREDICTION)
        with pytest.raises(BridgeError, match="its own checkpoint"):
            bridged(sd1, bridge=path.name)
    finally:
        path.unlink()


# -- joined otherwise ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("part", "how"), [("kv", "replace"), ("attn2", "delta")])
def test_native_rows_in_a_shared_window_are_read_by_the_part(
    sd1: Checkpoint, files: Any, part: str, how: str
) -> None:
    name, weights = files["sd1", part, how]
    model, clip = bridged(sd1, bridge=name)
    positive, negative = encode(clip.with_speech(joining=Joining(SHARED)), MIXED), encode(clip, "")
    native = encode(clip, NATIVE_PART)
    assert positive[0][0].shape[1] == 77 and 7 <= positive[0][1][MARK]["rows"] < 77
    got = sample(model, positive, negative)
    with by_hand(sd1.model, weights, how, native, negative):
        expected = sample(sd1.model, unmarked(positive), unmarked(negative))
    assert near(got, expected)
    assert not near(got, sample(sd1.model, unmarked(positive), unmarked(negative)))


def test_text_that_another_pack_puts_in_the_place_of_ours_is_refused(sd1: Checkpoint, files: Any) -> None:
    model, clip = bridged(sd1, bridge=files["sd1", "kv", "replace"][0])
    clone = model.clone()

    def other(q: Tensor, text: Tensor, value: Tensor, options: Any) -> tuple[Tensor, Tensor, Tensor]:
        turned = text.flip(1)
        return q, turned, turned

    clone.set_model_attn2_patch(other)
    with pytest.raises(BridgeError, match="cannot tell any more"):
        sample(clone, encode(clip, MIXED), encode(clip, ""))
