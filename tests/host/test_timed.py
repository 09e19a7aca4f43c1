"""Timed bridges: the U-Net hears at every step what the bridge says at that step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
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
from torch import Tensor

import nodes
from language_bridge.bridges.base import Hidden, create
from language_bridge.bridges.file import BridgeHeader, load_bridge, save_bridge
from language_bridge.encoders.file import load_encoder
from language_bridge.host.cache import EMBEDDINGS
from language_bridge.host.rows import MARK
from language_bridge.host.tower import FIRST_TIMESTEP
from language_bridge.host.unet import part_shapes
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, encode, latent, same, sample
from language_bridge.tests.fixtures.towers import reference, tiny_tower

RED_CAT = "\u7ea2\u8272\u7684\u732b"
BLUE_DOG = "\u84dd\u8272\u7684\u72d7"
ROWS = 64
Say = Callable[[str, int], Tensor]


def write(path: Path, weights: dict[str, Tensor] | None = None) -> str:
    """A bridge of kind ella for SD1.x in front of the usual tiny tower; with `weights`, of kind kv too."""
    tower = tiny_tower()
    spec = {"hidden": 32, "context": 768, "queries": ROWS, "layers": 1, "heads": 8, "channels": 16}
    bridge = create("ella", spec)
    bridge.reset_parameters(torch.Generator().manual_seed(3))
    header = BridgeHeader(
        kind="ella",
        spec=dataclasses.asdict(bridge.spec),
        base="sd1",
        encoder=reference(tower),
        unet="kv" if weights else "none",
        training={"unet": "replace"},
    )
    save_bridge(path, header, bridge, unet=weights)
    return path.name


@pytest.fixture(scope="module")
def timed(models: Path) -> Iterator[str]:
    """The name of a timed bridge."""
    path = models / "language_bridges" / "ella-sd1.safetensors"
    yield write(path)
    path.unlink()


@pytest.fixture
def say(models: Path, timed: str) -> Say:
    """bridge(encoder(text), timestep) in plain torch, [1, N, C]."""
    bridge = load_bridge(models / "language_bridges" / timed).bridge.eval()
    encoder = load_encoder(models / "text_encoders" / "tiny-zh.safetensors").eval()

    @torch.no_grad()
    def at(text: str, timestep: int) -> Tensor:
        hidden = encoder(*encoder.batch([text]))
        return bridge(Hidden(hidden.states, hidden.mask), torch.tensor([timestep])).context

    return at


def heard(model: Any) -> tuple[Any, list[tuple[int, Any, Tensor]]]:
    """A clone of MODEL, and what its U-Net will hear: timestep, cond_or_uncond, text rows of each call."""
    clone, calls = model.clone(), []

    def watch(apply: Any, arguments: Any) -> Tensor:
        time = model.model.model_sampling.timestep(arguments["timestep"])
        calls.append((int(time[0]), arguments["cond_or_uncond"], arguments["c"]["c_crossattn"].clone()))
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    clone.set_model_unet_function_wrapper(watch)
    return clone, calls


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max())))


def test_every_step_hears_its_own_rows_in_one_batch(sd1: Checkpoint, timed: str, say: Say) -> None:
    model, clip = bridged(sd1, bridge=timed)
    model, calls = heard(model)
    sample(model, encode(clip, RED_CAT), encode(clip, ""), steps=4)
    times = [time for time, _, _ in calls]
    assert len(times) == 4 and times == sorted(set(times), reverse=True)
    for time, which, rows in calls:
        assert rows.shape == (2, ROWS, 768)
        for entry, uncond in zip(rows, which, strict=True):
            assert near(entry[None], say("" if uncond else RED_CAT, time))
    assert not near(calls[0][2], calls[-1][2])


def test_the_picture_is_the_one_by_hand(sd1: Checkpoint, timed: str, say: Say) -> None:
    model, clip = bridged(sd1, bridge=timed)
    positive, negative = encode(clip, f"{RED_CAT}, a big dog"), encode(clip, "blurry")
    own = sd1.model.clone()

    def by_hand(apply: Any, arguments: Any) -> Tensor:
        time = int(sd1.model.model.model_sampling.timestep(arguments["timestep"])[0])
        rows = arguments["c"]["c_crossattn"].clone()
        for place, uncond in enumerate(arguments["cond_or_uncond"]):
            if not uncond:
                rows[place, :ROWS] = say(f"{RED_CAT}, ", time)[0]
        return apply(arguments["input"], arguments["timestep"], **{**arguments["c"], "c_crossattn": rows})

    own.set_model_unet_function_wrapper(by_hand)
    got = sample(model, positive, negative, steps=3)
    assert near(got, sample(own, positive, negative, steps=3))
    assert not near(got, sample(sd1.model, positive, negative, steps=3))


def test_outside_of_sampling_stand_the_rows_of_the_first_step(sd1: Checkpoint, timed: str, say: Say) -> None:
    _, clip = bridged(sd1, bridge=timed)
    rows = encode(clip, RED_CAT)[0][0]
    assert near(rows, say(RED_CAT, FIRST_TIMESTEP)) and rows.shape == (1, ROWS, 768)
    english = encode(sd1.clip, "a big dog")[0][0]
    mixed = encode(clip, f"{RED_CAT}, a big dog")[0][0]
    assert torch.equal(mixed, torch.cat([encode(clip, f"{RED_CAT}, ")[0][0], english], dim=1))


def test_english_is_stock_bit_for_bit(sd1: Checkpoint, timed: str) -> None:
    model, clip = bridged(sd1, bridge=timed)
    conds = encode(clip, "a big dog"), encode(clip, "blurry")
    assert same(conds[0], encode(sd1.clip, "a big dog"))
    assert torch.equal(sample(model, *conds), sample(sd1.model, *conds))


def test_weights_and_strength_act_at_every_step(sd1: Checkpoint, timed: str, say: Say) -> None:
    model, clip = bridged(sd1, bridge=timed, strength=0.5)
    model, calls = heard(model)
    sample(model, encode(clip, f"({RED_CAT[:2]}:2){RED_CAT[2:]}"), encode(clip, ""))
    for time, which, rows in calls:
        text, empty = say(RED_CAT, time), say("", time)
        assert near(rows[which.index(0)][None], empty + 0.75 * (text - empty))


def test_long_prompts_are_several_windows(sd1: Checkpoint, timed: str, say: Say) -> None:
    model, clip = bridged(sd1, bridge=timed)
    model, calls = heard(model)
    text = RED_CAT * 30
    sample(model, encode(clip, text), encode(clip, ""), steps=1)
    (time, which, rows), *_ = calls
    expected = torch.cat([say(text[:75], time), say(text[75:], time)], dim=1)
    assert near(rows[which.index(0)][None], expected)


def test_the_same_steps_again_ask_nobody(
    sd1: Checkpoint, timed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clip = bridged(sd1, bridge=timed)
    conds = encode(clip, RED_CAT), encode(clip, "")
    asked: list[int] = []
    forward = type(clip.speech.tower.bridge).forward
    monkeypatch.setattr(
        type(clip.speech.tower.bridge),
        "forward",
        lambda self, hidden, timestep: asked.append(int(timestep[0])) or forward(self, hidden, timestep),
    )
    first = sample(model, *conds, steps=3)
    assert len(asked) >= 5  # positive and negative, three steps; the first may be known
    asked.clear()
    assert torch.equal(sample(model, *conds, steps=3), first) and not asked
    again = encode(clip, RED_CAT), encode(clip, "")
    assert torch.equal(sample(model, *again, steps=3, seed=6), sample(model, *conds, steps=3, seed=6))
    assert not asked
    EMBEDDINGS.clear()
    assert torch.equal(sample(model, *conds, steps=3), first) and asked


def test_the_bridge_is_there_while_sampling_and_the_tower_is_not(sd1: Checkpoint, timed: str) -> None:
    model, clip = bridged(sd1, bridge=timed)
    tower = clip.speech.tower
    conds = encode(clip, RED_CAT), encode(clip, "")
    management.unload_all_models()
    sample(model.clone(), *conds)
    loaded = [entry.model.model for entry in management.current_loaded_models if entry.model is not None]
    assert tower.bridge in loaded and tower.reader not in loaded
    assert not any(module is tower.bridge for module in tower.reader.modules())


def averaged(one: Any, other: Any) -> Any:
    return call(
        nodes.ConditioningAverage, conditioning_to=one, conditioning_from=other, conditioning_to_strength=0.3
    )


def zeroed(one: Any, _: Any) -> Any:
    return call(nodes.ConditioningZeroOut, conditioning=one)


@pytest.mark.parametrize("node", [averaged, zeroed], ids=lambda node: node.__name__)
def test_rows_that_a_node_has_changed_stay_as_it_left_them(sd1: Checkpoint, timed: str, node: Any) -> None:
    model, clip = bridged(sd1, bridge=timed)
    positive = node(encode(clip, RED_CAT), encode(clip, BLUE_DOG))
    assert MARK in positive[0][1]
    model, calls = heard(model)
    sample(model, positive, encode(clip, ""))
    for _, which, rows in calls:
        assert torch.equal(rows[which.index(0)], positive[0][0][0])


def test_two_texts_one_behind_the_other(sd1: Checkpoint, timed: str, say: Say) -> None:
    model, clip = bridged(sd1, bridge=timed)
    inputs = {"conditioning_to": encode(clip, RED_CAT), "conditioning_from": encode(sd1.clip, "a dog")}
    positive = call(nodes.ConditioningConcat, **inputs)
    model, calls = heard(model)
    sample(model, positive, encode(clip, ""), steps=1)
    for time, which, rows in calls:
        if 0 in which:
            entry = rows[which.index(0)][None]
            assert near(entry[:, :ROWS], say(RED_CAT, time))
            assert torch.equal(entry[:, ROWS:], encode(sd1.clip, "a dog")[0][0])


def test_a_controlnet_hears_the_rows_of_the_step(
    sd1: Checkpoint, timed: str, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.controlnet import ControlNet

    model, clip = bridged(sd1, bridge=timed)
    net = call(nodes.ControlNetLoader, control_net_name="sd1.ckpt")
    inputs = {"control_net": net, "image": torch.full((1, 64, 64, 3), 0.5), "strength": 1.0}
    inputs |= {"start_percent": 0.0, "end_percent": 1.0}
    positive, negative = encode(clip, RED_CAT), encode(clip, "")
    conds = call(nodes.ControlNetApplyAdvanced, positive=positive, negative=negative, **inputs)
    listened: list[Tensor] = []
    get = ControlNet.get_control

    def watch(self: Any, x: Any, t: Any, cond: Any, *rest: Any) -> Any:
        listened.append(cond["c_crossattn"])
        return get(self, x, t, cond, *rest)

    monkeypatch.setattr(ControlNet, "get_control", watch)
    model, calls = heard(model)
    sample(model, *conds)
    assert len(listened) == len(calls) == 2
    for (_, _, rows), control in zip(calls, listened, strict=True):
        assert torch.equal(rows, control)


def test_a_custom_guider_and_a_sampler_that_asks_twice(sd1: Checkpoint, timed: str, say: Say) -> None:
    model, clip = bridged(sd1, bridge=timed)
    model, calls = heard(model)
    positive, negative = encode(clip, RED_CAT), encode(clip, "")
    call(
        SamplerCustomAdvanced,
        noise=call(RandomNoise, noise_seed=5),
        guider=call(CFGGuider, model=model, positive=positive, negative=negative, cfg=3.0),
        sampler=call(KSamplerSelect, sampler_name="heun"),
        sigmas=call(BasicScheduler, model=model, scheduler="karras", steps=3, denoise=0.6),
        latent_image=latent(),
    )
    assert len(calls) == 5
    for time, which, rows in calls:
        assert near(rows[which.index(0)][None], say(RED_CAT, time))


def test_a_timed_bridge_with_a_unet_part(sd1: Checkpoint, models: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = part_shapes(sd1.model, "kv")
    weights = {key: torch.randn(shape, generator=generator) * 0.05 for key, shape in shapes.items()}
    path = models / "language_bridges" / "ella-kv.safetensors"
    try:
        model, clip = bridged(sd1, bridge=write(path, weights))
        conds = encode(clip, RED_CAT), encode(clip, "")
        got = sample(model, *conds)
        (plain,) = [bridged(sd1, bridge=write(path))[0]]
        own = plain.clone()
        patches = {f"diffusion_model.{key}": ("set", (value,)) for key, value in weights.items()}
        own.add_patches(patches)
        _, other = bridged(sd1, bridge=path.name)
        expected = sample(own, encode(other, RED_CAT), encode(other, ""))
        assert near(got, expected)
    finally:
        path.unlink()
