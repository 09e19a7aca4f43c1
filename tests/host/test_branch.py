"""The branch behind the node: published numbers, and every law of a MODEL that carries something."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras.nodes_custom_sampler import (
    BasicScheduler,
    CFGGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustomAdvanced,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import nodes
from language_bridge.bridges.branch import Branch
from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import guard
from language_bridge.encoders.base import Encoder, create_encoder
from language_bridge.encoders.bert import BertSpec, bert_tokenizer
from language_bridge.encoders.file import save_encoder
from language_bridge.encoders.ledger import REST_NS, Ledger
from language_bridge.host import branch, bridging, folders
from language_bridge.host.branch_text import MARK, MOST_CHUNKS
from language_bridge.host.cache import EMBEDDINGS
from language_bridge.host.inspector import inspect
from language_bridge.host.language import words as sentences
from language_bridge.host.pocket import load_pocket
from language_bridge.nodes.language_bridge import LanguageBridge
from language_bridge.nodes.streams import Streams
from language_bridge.tests.fixtures.branches import SD15, TINY, PublishedBranch, random_branch, write_branch
from language_bridge.tests.fixtures.checkpoints import FAMILIES, POCKET
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, digest, encode, latent, same, sample, unet_calls
from language_bridge.tests.fixtures.towers import vocabulary
from language_bridge.tests.host.test_stock_nodes import hooked

RED_CAT = "\u7ea2\u8272\u7684\u732b"
BLUE_DOG = "\u84dd\u8272\u7684\u72d7"
LONG = RED_CAT * 6
MIXED, ENGLISH_PART = f"{RED_CAT}, a big dog", "a big dog"
WINDOW = 12
CAPACITY = WINDOW - 2
Loader = Callable[..., Checkpoint]


def branch_tower(identity: str, width: int, seed: int = 0) -> Encoder:
    """A BERT tower as a branch reads one: a short window, no mask."""
    words = vocabulary()
    spec = BertSpec(vocab=len(words), width=width, layers=2, window=WINDOW, heads=4, inner=64, projection=40)
    tower = create_encoder(
        "bert", spec, bert_tokenizer(words), identity=identity, window=WINDOW, mask_rule="none"
    )
    tower.reset_parameters(torch.Generator().manual_seed(seed))
    return tower.eval()


TOWER = branch_tower("tiny-branch", 48)
NETS = {"branch": random_branch(TINY["sd1"]), "branch-other": random_branch(TINY["sd1"], seed=9)}


@pytest.fixture(scope="module", autouse=True)
def files(models: Path) -> Iterator[None]:
    """Two branches for SD1.x and the tower that both read."""
    made = [models / "text_encoders" / "branch-tower.safetensors"]
    save_encoder(made[0], TOWER)
    for name, net in NETS.items():
        made.append(write_branch(models / "language_bridges" / f"{name}.safetensors", "sd1", TOWER, net))
    yield
    for path in made:
        path.unlink()


def branched(checkpoint: Checkpoint, name: str = "branch", **inputs: Any) -> tuple[Any, Any]:
    """MODEL and CLIP behind the node with a branch in it."""
    return bridged(checkpoint, bridge=f"{name}.safetensors", **inputs)


def read(payload: Sequence[int], chunks: int, tower: Encoder = TOWER) -> Tensor:
    """Native rows of token ids as BDM's script makes them, in its own words."""
    start, end, padding = tower.marks.start[0], tower.marks.end[0], tower.marks.padding
    ids = torch.tensor([start, *payload, *[padding] * (CAPACITY * chunks - len(payload)), padding])
    rows: list[Tensor] = []
    for number in range(chunks):
        chunk = ids[number * CAPACITY : number * CAPACITY + WINDOW].clone()
        chunk[0], chunk[-1] = start, padding
        chunk[(chunk == padding).nonzero()[0]] = end
        with torch.no_grad():
            states = tower(chunk[None], torch.ones(1, WINDOW, dtype=torch.bool)).states
        if chunks > 1:
            first, last = 1 if number else 0, -1 if number < chunks - 1 else None
            states = states[:, first:last]
        rows.append(states)
    return torch.cat(rows, dim=1)


def ids_of(text: str) -> list[int]:
    words = vocabulary()
    return [words.index(character) for character in text]


def schedule(steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps and sigmas (one more, zero) of SD1.x in even steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    logs = ((1 - abar) / abar).sqrt().log()
    times = torch.linspace(999, 0, steps, dtype=torch.float64)
    low, share = times.floor().long(), times.frac()
    high = (low + 1).clamp(max=999)
    sigmas = ((1 - share) * logs[low] + share * logs[high]).exp()
    return times.float(), torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def loop(
    checkpoint: Checkpoint,
    english: tuple[Any, Any],
    said: Callable[[Tensor, Tensor], Sequence[Tensor]],
    *,
    steps: int = 2,
    cfg: float = 3.0,
    seed: int = 5,
    y: Tensor | None = None,
    scale: float = 0.18215,
) -> Tensor:
    """Euler's method by hand around the host's U-Net; residuals go its control's way.

    said: doubled scaled latent [2, 4, 8, 8] and timesteps [2] to the residuals, negative first.
    """
    times, sigmas = schedule(steps)
    unet = checkpoint.model.model.diffusion_model
    context = torch.cat([english[1][0][0], english[0][0][0]])
    x = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(seed)) * (1 + sigmas[0] ** 2).sqrt()
    for number in range(steps):
        scaled = torch.cat([x, x]) / (1 + sigmas[number] ** 2).sqrt()
        time = times[number].expand(2)
        *skips, middle = said(scaled, time)
        with torch.inference_mode():
            control = {"output": list(skips), "middle": [middle], "input": []}
            no, yes = unet(scaled, time, context=context, y=y, control=control).chunk(2)
        x = x + (no + cfg * (yes - no)) * (sigmas[number + 1] - sigmas[number])
    return x / scale


Said = Callable[[Tensor, Tensor], list[Tensor]]


def speak(net: PublishedBranch, native: Tensor, strength: float = 1.0) -> Said:
    def said(x: Tensor, times: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [residual * strength for residual in net(x, times, native)]

    return said


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether they differ by at most `tolerance` of the largest number; random U-Nets make large latents."""
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


# -- numbers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", ["sd1", "pocket", "sdxl"])
def test_the_network_says_what_the_published_one_says(load: Loader, base: str) -> None:
    sizes = TINY[base]
    net = random_branch(sizes)

    class Holder:
        class model:
            class model_config:
                unet_config = (POCKET if base == "pocket" else FAMILIES[base]).unet

    part = Branch.unet_part(net.state_dict())
    branch.check(Holder, {key: tuple(value.shape) for key, value in part.items()}, base)
    ours = branch.build(Holder, part, torch.float32)
    x, times = torch.randn(2, 4, 16, 16), torch.tensor([801.0, 3.0])
    text = torch.randn(2, 30, sizes.context)
    added = torch.randn(2, sizes.added) if sizes.added else None
    with torch.no_grad():
        found, expected = ours(x, times, text, added), net(x, times, text, added)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert bool((one - other).abs().max() <= 1e-5) and float(other.abs().max()) > 0.05


def test_the_full_network_has_the_published_number_of_weights() -> None:
    unet = {**FAMILIES["sd1"].unet, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2]}
    unet |= {"transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3}

    class Holder:
        class model:
            class model_config:
                unet_config = unet

    with torch.device("meta"):
        part = Branch.unet_part(PublishedBranch(SD15).state_dict())
    shapes = {key: tuple(value.shape) for key, value in part.items()}
    branch.check(Holder, shapes, "bdm")
    net = branch.BranchNet(branch.config_of(Holder, shapes), torch.float32, "meta")
    assert len(net.state_dict()) == 324
    assert sum(weight.numel() for weight in net.parameters()) == 363_141_760


@pytest.mark.parametrize(
    ("positive", "negative", "chunks", "strength"),
    [
        (RED_CAT, "", 1, 0.6),
        (LONG, BLUE_DOG, 3, 1.0),
        (RED_CAT, LONG, 3, 1.0),
        (LONG * 4, "", 5, 1.0),
    ],
    ids=["empty negative", "long positive", "long negative", "longest"],
)
def test_latents_are_those_of_a_plain_loop(
    sd1: Checkpoint, positive: str, negative: str, chunks: int, strength: float
) -> None:
    model, clip = branched(sd1, strength=strength)
    most = CAPACITY * 5
    native = torch.cat([read(ids_of(text)[:most], chunks) for text in (negative, positive)])
    empty = encode(sd1.clip, "")
    expected = loop(sd1, (empty, empty), speak(NETS["branch"], native, strength), steps=4)
    found = sample(model, encode(clip, positive), encode(clip, negative), steps=4)
    assert near(found, expected)
    assert not near(found, sample(sd1.model, empty, empty, steps=4), 1e-2)


def test_latents_of_a_model_that_paints_agree_to_1e_4(models: Path) -> None:
    """The same on the pocket checkpoint, whose latents have the usual size."""
    pocket = Checkpoint("pocket", *load_pocket())
    tower = branch_tower("tiny-branch-pocket", 32)
    net = random_branch(TINY["pocket"])
    made = [models / "text_encoders" / "branch-pocket-tower.safetensors"]
    save_encoder(made[0], tower)
    made.append(write_branch(models / "language_bridges" / "branch-pocket.safetensors", "pocket", tower, net))
    try:
        model, clip = branched(pocket, "branch-pocket")
        positive, negative = encode(clip, LONG), encode(clip, BLUE_DOG)
    finally:
        for path in made:
            path.unlink()
    native = torch.cat([read(ids_of(text), 3, tower) for text in (BLUE_DOG, LONG)])
    empty = encode(pocket.clip, "")
    expected = loop(pocket, (empty, empty), speak(net, native), steps=4)
    found = sample(model, positive, negative, steps=4)
    assert bool((found - expected).abs().max() <= 1e-4)
    assert bool((found - sample(pocket.model, empty, empty, steps=4)).abs().max() > 0.1)


@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_english_words_go_to_the_backbone(sd1: Checkpoint, cfg: float) -> None:
    model, clip = branched(sd1)
    english = encode(sd1.clip, ENGLISH_PART), encode(sd1.clip, "blurry")
    native = torch.cat([read([], 1), read([*ids_of(RED_CAT), vocabulary().index(",")], 1)])
    expected = loop(sd1, english, speak(NETS["branch"], native), cfg=cfg)
    assert near(sample(model, encode(clip, MIXED), encode(clip, "blurry"), cfg=cfg), expected)


def test_a_controlnet_beside_it_reads_english_and_both_are_summed(sd1: Checkpoint) -> None:
    model, clip = branched(sd1)
    loaded = call(nodes.ControlNetLoader, control_net_name="sd1.ckpt")
    picture = torch.linspace(0, 1, 64 * 64 * 3).view(1, 64, 64, 3)
    facts = {"control_net": loaded, "image": picture, "strength": 0.7}
    facts |= {"start_percent": 0.0, "end_percent": 1.0}
    conds = call(
        nodes.ControlNetApplyAdvanced, positive=encode(clip, MIXED), negative=encode(clip, ""), **facts
    )
    english = encode(sd1.clip, ENGLISH_PART), encode(sd1.clip, "")
    native = torch.cat([read([], 1), read([*ids_of(RED_CAT), vocabulary().index(",")], 1)])
    own, rows = speak(NETS["branch"], native), torch.cat([english[1][0][0], english[0][0][0]])
    hint = picture.movedim(-1, 1).expand(2, -1, -1, -1)

    def both(x: Tensor, times: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            said = loaded.control_model(x=x, hint=hint, timesteps=times, context=rows)
        return [0.7 * a + b for a, b in zip((*said["output"], *said["middle"]), own(x, times), strict=True)]

    found = sample(model, *conds)
    assert near(found, loop(sd1, english, both))
    assert not near(found, sample(model, encode(clip, MIXED), encode(clip, "")), 1e-2)


def test_two_branches_at_once_are_summed(sd1: Checkpoint) -> None:
    first = branched(sd1, strength=0.5)
    model, clip = branched(sd1, "branch-other", model=first[0], clip=first[1])
    native = torch.cat([read([], 1), read(ids_of(RED_CAT), 1)])
    one, other = (speak(net, native, factor) for net, factor in zip(NETS.values(), (0.5, 1.0), strict=True))
    empty = encode(sd1.clip, "")

    def both(x: Tensor, times: Tensor) -> list[Tensor]:
        return [a + b for a, b in zip(one(x, times), other(x, times), strict=True)]

    found = sample(model, encode(clip, RED_CAT), encode(clip, ""))
    assert near(found, loop(sd1, (empty, empty), both))


def test_the_sdxl_option_reads_text_and_pooled_through_its_matrices(sdxl: Checkpoint, models: Path) -> None:
    net = random_branch(TINY["sdxl"], token=48, pooled=(40, 1280))
    path = write_branch(models / "language_bridges" / "branch-xl.safetensors", "sdxl", TOWER, net)
    try:
        model, clip = branched(sdxl, "branch-xl")
    finally:
        path.unlink()
    texts = (LONG, RED_CAT)
    empty = encode(sdxl.clip, "")
    sizes = {"width": 64, "height": 64}
    y = sdxl.model.model.encode_adm(pooled_output=empty[0][1]["pooled_output"], **sizes).expand(2, -1)
    with torch.no_grad():
        native = net.prompt_embeds_projection(torch.cat([read(ids_of(text), 3) for text in texts]))
        ids, mask = TOWER.batch([text[:CAPACITY] for text in texts])
        pooled = net.pooled_prompt_embeds_projection(TOWER(ids, mask).pooled)
    added = torch.cat([pooled, y[:, 1280:]], dim=1)

    def said(x: Tensor, times: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return net(x, times, native, added)

    expected = loop(sdxl, (empty, empty), said, steps=1, y=y, scale=0.13025)
    assert near(sample(model, encode(clip, texts[1]), encode(clip, texts[0]), steps=1), expected)


# -- laws ----------------------------------------------------------------------------------------------------
def test_english_conditioning_is_stock_and_so_is_the_picture(sd1: Checkpoint) -> None:
    model, clip = branched(sd1)
    for text in (ENGLISH_PART, "a (red:1.3) cat, [dog]", "blurry"):
        assert same(encode(clip, text), encode(sd1.clip, text))
    stock = sample(sd1.model, encode(sd1.clip, ENGLISH_PART), encode(sd1.clip, ""))
    assert torch.equal(sample(model, encode(clip, ENGLISH_PART), encode(clip, "")), stock)


def test_strength_0_and_english_only_are_not_there(sd1: Checkpoint) -> None:
    for inputs in ({"strength": 0.0}, {"route": "english only"}):
        model, clip = branched(sd1, **inputs)
        assert model is sd1.model and clip is sd1.clip


def test_a_model_without_the_branch_ignores_native_text(sd1: Checkpoint) -> None:
    _, clip = branched(sd1)
    positive, negative = encode(clip, MIXED), encode(clip, BLUE_DOG)
    stock = sample(sd1.model, encode(sd1.clip, ENGLISH_PART), encode(sd1.clip, ""))
    assert torch.equal(sample(sd1.model, positive, negative), stock)


def test_full_width_or_half_width_is_the_same(sd1: Checkpoint) -> None:
    _, clip = branched(sd1)
    wide, narrow = (f"{RED_CAT}{comma}\uff08{BLUE_DOG}:1.2\uff09" for comma in ("\uff0c", ","))
    assert same(encode(clip, wide), encode(clip, narrow))


def test_native_only_reads_the_prompt_as_it_was_typed(sd1: Checkpoint) -> None:
    """BDM's own grammar: both sorts of ASCII brackets go, with their weights; wide ones are text."""
    _, clip = branched(sd1, route="native only")

    def rows(text: str) -> Tensor:
        (mark,) = encode(clip, text)[0][1][MARK].values()
        return mark["rows"]

    assert torch.equal(rows(f"[{RED_CAT}]({BLUE_DOG}:1.4)"), rows(RED_CAT + BLUE_DOG))
    assert not torch.equal(rows(f"\uff08{RED_CAT}\uff09"), rows(RED_CAT))
    assert torch.equal(rows("cat"), read(ids_of("c") + [vocabulary().index(f"##{x}") for x in "at"], 1))
    assert same(encode(clip, "a cat")[0][0], encode(sd1.clip, "")[0][0])


def test_behind_a_break_each_stream_begins_a_window(sd1: Checkpoint) -> None:
    _, clip = branched(sd1)
    ((rows, facts),) = encode(clip, f"{RED_CAT} big BREAK {BLUE_DOG} BREAK dog")
    (mark,) = facts[MARK].values()
    assert torch.equal(mark["rows"], torch.cat([read(ids_of(text), 1) for text in (RED_CAT, BLUE_DOG)]))
    stock = [encode(sd1.clip, text)[0][0] for text in ("big", "dog")]
    assert rows.shape[1] == 154 and torch.equal(rows, torch.cat(stock, dim=1))
    words = clip.tokenize(f"{RED_CAT} big BREAK dog", return_word_ids=True)["l"]
    assert {token[2] for chunk in words for token in chunk} == {0, 1, 2}


def test_both_empty_is_stock_unless_all_is_native(sd1: Checkpoint) -> None:
    stock = sample(sd1.model, encode(sd1.clip, ""), encode(sd1.clip, ""))
    model, clip = branched(sd1)
    assert torch.equal(sample(model, encode(clip, ""), encode(clip, "")), stock)
    model, clip = branched(sd1, route="native only")
    empty, native = encode(sd1.clip, ""), read([], 1).expand(2, -1, -1)
    expected = loop(sd1, (empty, empty), speak(NETS["branch"], native))
    assert near(sample(model, encode(clip, ""), encode(clip, "")), expected)


def test_zeroed_conditioning_is_left_alone(sd1: Checkpoint) -> None:
    model, clip = branched(sd1)
    zero = call(nodes.ConditioningZeroOut, conditioning=encode(clip, BLUE_DOG))
    empty, native = encode(sd1.clip, ""), read(ids_of(RED_CAT), 1).expand(2, -1, -1)
    own = speak(NETS["branch"], native)

    def positive_alone(x: Tensor, times: Tensor) -> list[Tensor]:
        return [torch.cat([torch.zeros_like(r[:1]), r[1:]]) for r in own(x, times)]

    expected = loop(sd1, (empty, [[torch.zeros_like(empty[0][0]), {}]]), positive_alone)
    assert near(sample(model, encode(clip, RED_CAT), zero), expected)
    stock = sample(sd1.model, zero, zero)
    assert torch.equal(sample(model, zero, zero), stock)


# -- sampling ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("positive", "negative"),
    [(RED_CAT, ""), (LONG, BLUE_DOG), (RED_CAT, "blurry"), (MIXED, LONG)],
    ids=["empty negative", "long", "english negative", "mixed"],
)
def test_guidance_is_one_batched_call(sd1: Checkpoint, positive: str, negative: str) -> None:
    model, clip = branched(sd1, model=sd1.model.clone())
    with unet_calls(model) as calls:
        sample(model, encode(clip, positive), encode(clip, negative), steps=2)
    assert calls == [(2, 77, 768)] * 2


def test_weights_and_lengths_of_our_own_are_options(sd1: Checkpoint) -> None:
    model, clip = branched(sd1)
    native = torch.cat([read(ids_of(BLUE_DOG), 1).repeat(1, 8, 1), read(ids_of(LONG), 3).repeat(1, 3, 1)])
    assert native.shape[1] == math.lcm(12, 32)
    empty = encode(sd1.clip, "")
    expected = loop(sd1, (empty, empty), speak(NETS["branch"], native))
    own = clip.with_voices(own_length=True)
    assert near(sample(model, encode(own, LONG), encode(own, BLUE_DOG)), expected)
    loud, plain = clip.with_voices(weighted=True), encode(clip, f"({RED_CAT}:1.5){BLUE_DOG}")
    (said,), (mark,) = (
        entry[0][1][MARK].values() for entry in (encode(loud, f"({RED_CAT}:1.5){BLUE_DOG}"), plain)
    )
    empty_rows = read([], 1)
    expected_rows = mark["rows"].clone()
    expected_rows[:, 1:5] = empty_rows[:, 1:5] + 1.5 * (mark["rows"][:, 1:5] - empty_rows[:, 1:5])
    torch.testing.assert_close(said["rows"], expected_rows, rtol=1e-5, atol=1e-6)
    assert same(encode(loud, RED_CAT), encode(clip, RED_CAT))


def test_start_and_end_limit_the_steps(sd1: Checkpoint) -> None:
    model, clip = branched(sd1)
    positive, negative = encode(clip, RED_CAT), encode(clip, "")
    empty, native = encode(sd1.clip, ""), torch.cat([read([], 1), read(ids_of(RED_CAT), 1)])
    own, (times, _) = speak(NETS["branch"], native), schedule(2)
    for start, end, acting in ((0.0, 0.5, (0,)), (0.5, 1.0, (1,))):

        def said(x: Tensor, time: Tensor, acting: tuple[int, ...] = acting) -> list[Tensor]:
            acts = any(bool(time[0] == times[number]) for number in acting)
            return [residual * acts for residual in own(x, time)]

        found = sample(branch.limited(model, start, end), positive, negative)
        assert near(found, loop(sd1, (empty, empty), said))
    stock = sample(sd1.model, empty, empty)
    assert torch.equal(sample(branch.limited(model, 1.0, 1.0), positive, negative), stock)


def test_areas_timestep_ranges_and_combined_texts_each_hear_their_own(sd1: Checkpoint) -> None:
    model, clip = branched(sd1)
    cat, dog, negative = encode(clip, RED_CAT), encode(clip, LONG), encode(clip, "")

    def halves(*conditionings: Any) -> Any:
        left, right = (
            call(
                nodes.ConditioningSetArea,
                conditioning=conditioning,
                width=32,
                height=64,
                x=32 * number,
                y=0,
                strength=1.0,
            )
            for number, conditioning in enumerate(conditionings)
        )
        return call(nodes.ConditioningCombine, conditioning_1=left, conditioning_2=right)

    found = sample(model, halves(cat, dog), negative, cfg=1.0, steps=1)
    # Each half hears its own text alone: with the other half's text exchanged, it stays as it is.
    exchanged = sample(model, halves(cat, encode(clip, BLUE_DOG * 6)), negative, cfg=1.0, steps=1)
    assert near(found[..., :4], exchanged[..., :4])
    assert not near(found[..., 4:], exchanged[..., 4:], 1e-3)
    assert not near(found, sample(sd1.model, halves(cat, dog), negative, cfg=1.0, steps=1), 1e-2)

    early = call(nodes.ConditioningSetTimestepRange, conditioning=cat, start=0.0, end=0.5)
    late = call(nodes.ConditioningSetTimestepRange, conditioning=dog, start=0.5, end=1.0)
    ranged = call(nodes.ConditioningCombine, conditioning_1=early, conditioning_2=late)
    native = [torch.cat([read([], 3), read(ids_of(text), 3)]) for text in (RED_CAT, LONG)]
    (first, second), (times, _) = (speak(NETS["branch"], rows) for rows in native), schedule(2)
    empty = encode(sd1.clip, "")

    def said(x: Tensor, time: Tensor) -> list[Tensor]:
        return (first if bool(time[0] == times[0]) else second)(x, time)

    assert near(sample(model, ranged, negative), loop(sd1, (empty, empty), said))


def test_a_batch_paints_each_picture_as_the_loop_does(sd1: Checkpoint) -> None:
    model, clip = branched(sd1)
    positive, negative = encode(clip, RED_CAT), encode(clip, "")
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    done = []
    for part in (noise, noise[:1], noise[2:]):
        done.append(
            call(
                nodes.KSamplerAdvanced,
                model=model,
                add_noise="disable",
                noise_seed=0,
                steps=2,
                cfg=3.0,
                sampler_name="euler",
                scheduler="normal",
                positive=positive,
                negative=negative,
                latent_image={"samples": part},
                start_at_step=0,
                end_at_step=2,
                return_with_leftover_noise="disable",
            )["samples"]
        )
    assert near(done[0][:1], done[1], 1e-3) and near(done[0][2:], done[2], 1e-3)
    assert not near(done[0][:1], done[2], 1e-1)


def test_a_custom_guider_paints_what_the_ksampler_paints(sd1: Checkpoint) -> None:
    model, clip = branched(sd1)
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


# -- with others ---------------------------------------------------------------------------------------------
def test_a_lora_before_is_a_lora_after_and_touches_the_backbone_alone(sd1: Checkpoint) -> None:
    def lora(model: Any, clip: Any) -> tuple[Any, Any]:
        return call(
            nodes.LoraLoader,
            model=model,
            clip=clip,
            lora_name="sd1.safetensors",
            strength_model=1.0,
            strength_clip=1.0,
        )

    own = lora(sd1.model, sd1.clip)
    before = branched(sd1, model=own[0], clip=own[1])
    after = lora(*branched(sd1))
    pictures = [sample(model, encode(clip, MIXED), encode(clip, "")) for model, clip in (before, after)]
    assert torch.equal(*pictures)
    plain_model, plain = branched(sd1)
    assert not torch.equal(pictures[0], sample(plain_model, encode(plain, MIXED), encode(plain, "")))
    assert same(encode(after[1], RED_CAT)[0][1][MARK], encode(plain, RED_CAT)[0][1][MARK])
    assert not same(encode(after[1], MIXED)[0][0], encode(plain, MIXED)[0][0])


@pytest.mark.parametrize("route", ["two streams", "native only"])
def test_a_trigger_of_a_lora_reaches_the_english_stream(sd1: Checkpoint, models: Path, route: str) -> None:
    """Even one in Chinese, and wherever the LoRA was loaded."""
    path = models / "loras" / "branch-trigger.safetensors"
    save_file(
        load_file(models / "loras" / "sd1.safetensors"), path, metadata={"modelspec.trigger_phrase": BLUE_DOG}
    )

    def lora(model: Any, clip: Any) -> tuple[Any, Any]:
        strengths = {"strength_model": 1.0, "strength_clip": 1.0}
        return call(nodes.LoraLoader, model=model, clip=clip, lora_name=path.name, **strengths)

    try:
        own = lora(sd1.model, sd1.clip)
        before = branched(sd1, model=own[0], clip=own[1], route=route)[1]
        after = lora(*branched(sd1, route=route))[1]
        for clip in (before, after):
            ((rows, facts),) = encode(clip, RED_CAT + BLUE_DOG)
            (mark,) = facts[MARK].values()
            assert torch.equal(rows, encode(own[1], BLUE_DOG)[0][0])
            assert torch.equal(mark["rows"], read(ids_of(RED_CAT), 1))
    finally:
        path.unlink()


def test_kept_words_reach_the_english_stream_and_survive_clones(sd1: Checkpoint) -> None:
    clip = branched(sd1)[1]
    settings = {"blend": 0.5, "start_percent": 0.0, "end_percent": 1.0, "join": "rows appended"}
    kept = call(Streams, clip=clip, triggers="", keep=BLUE_DOG, **settings).clone()
    tokens = kept.tokenize(f"{RED_CAT}, {BLUE_DOG}")
    assert tokens["l"] == sd1.clip.tokenize(BLUE_DOG)["l"]
    (native,) = (value for key, value in tokens.items() if key != "l")
    assert native == next(v for k, v in clip.tokenize(f"{RED_CAT}, ").items() if k != "l")
    assert clip.tokenize(BLUE_DOG)["l"] == sd1.clip.tokenize("")["l"]  # the CLIP that came in is as it was
    for change in ({"blend": 0.7}, {"join": "shared window"}):
        with pytest.raises(BridgeError, match="nothing to join"):
            call(Streams, clip=clip, triggers="", keep="", **{**settings, **change})


def test_a_node_that_would_lose_the_native_text_is_told(sd1: Checkpoint) -> None:
    clip = branched(sd1)[1]
    for pooled in (False, True):
        with pytest.raises(BridgeError, match="would lose"), torch.inference_mode():
            clip.encode_from_tokens(clip.tokenize(MIXED), return_pooled=pooled)
        for text in ("", "a big dog"):
            with torch.inference_mode():
                stock = sd1.clip.encode_from_tokens(sd1.clip.tokenize(text), return_pooled=pooled)
                assert same(clip.encode_from_tokens(clip.tokenize(text), return_pooled=pooled), stock)


def test_the_inspector_reports_on_each_branch(sd1: Checkpoint) -> None:
    model, clip = branched(sd1)
    say = sentences("English")
    said = inspect(clip, f"({RED_CAT}:1.2), a big dog", say)
    assert "the branch branch.safetensors, two streams" in said
    assert f"Native stream: 5 of {CAPACITY} tokens in 1 window(s) of the tower tiny-branch" in said
    assert (
        "  a | big | dog" in said and "dropped here" in said and "As the CLIP is given it: a big dog" in said
    )
    both = branched(sd1, "branch-other", model=model, clip=clip)[1]
    said = inspect(both, RED_CAT, say)
    assert "What branch.safetensors hears:" in said and "What branch-other.safetensors hears:" in said
    most = CAPACITY * MOST_CHUNKS
    said = inspect(clip, RED_CAT * (most // 4 + 1), say)
    assert f"{most} of {most} tokens" in said and f"the last {4 * (most // 4 + 1) - most} token" in said


def test_merging_models_keeps_the_branch(load: Loader) -> None:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    one, two = load("sd1"), load("sd1", seed=7)
    model, clip = branched(one)
    positive, negative = encode(clip, RED_CAT), encode(clip, "")
    merged = call(ModelMergeSimple, model1=model, model2=two.model, ratio=0.5)
    stock = call(ModelMergeSimple, model1=one.model, model2=two.model, ratio=0.5)
    assert [each.name for each in branch.branches_of(merged)] == ["branch.safetensors"]
    pictures = [sample(each, positive, negative) for each in (merged, model, stock)]
    assert not any(near(pictures[0], other, 1e-2) for other in pictures[1:])


@pytest.mark.parametrize("scheduled", [True, False])
def test_hooks_keep_native_text_at_every_keyframe(sd1: Checkpoint, scheduled: bool) -> None:
    model, plain = branched(sd1)
    hooked_stock = hooked(sd1.clip, "sd1", schedule=scheduled)
    positive = encode(hooked(plain, "sd1", schedule=scheduled), MIXED)
    stock = encode(hooked_stock, ENGLISH_PART)
    expected = encode(plain, MIXED)[0][1][MARK]
    assert len(positive) == len(stock) == (2 if scheduled else 1)
    for entry, own in zip(positive, stock, strict=True):
        assert same(entry[0], own[0]) and same(entry[1][MARK], expected)
        assert entry[1].keys() == {*own[1], MARK}
    picture = sample(model, positive, encode(plain, ""))
    assert not near(picture, sample(model, encode(plain, MIXED), encode(plain, "")), 1e-3)
    assert not near(picture, sample(sd1.model, stock, encode(sd1.clip, "")), 1e-3)


def test_the_state_of_the_checkpoint_is_never_touched(sd1: Checkpoint) -> None:
    empty = encode(sd1.clip, "")
    sample(sd1.model, empty, empty, steps=1)  # LoRAs of an earlier graph are taken out now, if there were any
    before = digest(sd1.model.model.diffusion_model.state_dict())
    model, clip = branched(sd1)
    sample(model, encode(clip, MIXED), encode(clip, ""))
    assert digest(sd1.model.model.diffusion_model.state_dict()) == before
    assert model.model is sd1.model.model and not model.patches
    assert set(model.model_state_dict()) == set(sd1.model.model_state_dict())
    assert not branch.branches_of(sd1.model)


def test_gradients_go_through_the_residuals(sd1: Checkpoint) -> None:
    """Training beside a branch: what it adds is added out of place."""
    config: dict[str, Any] = {**FAMILIES["sd1"].unet, "dtype": torch.float32, "device": "cpu"}
    unet = UNetModel(**config, operations=comfy.ops.manual_cast)
    unet.load_state_dict({k: v.clone() for k, v in sd1.model.model.diffusion_model.state_dict().items()})
    net = branch.build(sd1.model, Branch.unet_part(NETS["branch"].state_dict()), torch.float32)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    native = torch.randn(1, 12, 48, requires_grad=True)
    time, text = torch.tensor([500.0]), torch.randn(1, 77, 768)
    options = branch.with_residuals({}, net(x, time, native))
    unet(x, time, context=text, transformer_options=options).square().sum().backward()
    assert x.grad is not None and native.grad is not None
    assert bool(x.grad.any()) and bool(native.grad.any())


def test_graphs_share_the_network_and_the_host_never_takes_it_for_lost(
    sd1: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = branched(sd1, strength=0.3)
    sample(first[0], encode(first[1], RED_CAT), encode(first[1], ""), steps=1)
    model, clip = branched(sd1)
    (one,), (other,) = branch.branches_of(first[0]), branch.branches_of(model)
    assert one.net is other.net and one.strength != other.strength
    del first, one, other
    gc.collect()
    changed = branch.limited(model.clone(), 0.0, 0.9)
    del model
    gc.collect()
    for _ in range(2):
        sample(changed, encode(clip, RED_CAT), encode(clip, ""), steps=1)
    assert "memory leak" not in caplog.text


def test_branch_and_tower_are_verified_once(
    sd1: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "verified.json", clock=lambda: time.time_ns() + 2 * REST_NS)
    monkeypatch.setattr(folders, "ledger", lambda: ledger)
    hashed: list[str] = []
    take = guard._hash
    monkeypatch.setattr(guard, "_hash", lambda up, name, t: (hashed.append(name), take(up, name, t))[1])
    said: list[Any] = []
    for again in (False, True):
        bridging.TOWERS.clear()
        bridging.BRANCHES.clear()
        EMBEDDINGS.clear()
        hashed.clear()
        model, clip = branched(sd1)
        said.append(sample(model, encode(clip, RED_CAT), encode(clip, ""), steps=1))
        assert bool(hashed) != again
    assert torch.equal(*said)


def test_a_node_that_changes_sizes_inside_the_unet_is_told_of_in_the_log(
    sd1: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Deep Shrink: where sizes differ the branch is left out, as a ControlNet is."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    model, clip = branched(sd1)
    shrunk = call(
        PatchModelAddDownscale,
        model=model,
        block_number=1,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=1.0,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    )
    picture = sample(shrunk, encode(clip, RED_CAT), encode(clip, ""), steps=1)
    assert torch.isfinite(picture).all()
    assert "left out" in caplog.text


# -- refusals ------------------------------------------------------------------------------------------------
def test_what_does_not_belong_together_is_refused(sd1: Checkpoint, load: Loader, models: Path) -> None:
    model, clip = branched(sd1)
    with pytest.raises(BridgeError, match="has this branch already"):
        branched(sd1, model=model, clip=clip)
    for first, then in (("branch", "linear-sd1"), ("linear-sd1", "branch")):
        one = branched(sd1, first)
        with pytest.raises(BridgeError, match="do not go together"):
            branched(sd1, then, model=one[0], clip=one[1])
    with pytest.raises(BridgeError, match="not made for this checkpoint"):
        branched(load("sd2"))
    other_model, other_clip = branched(sd1, "branch-other")
    with pytest.raises(BridgeError, match="two different branches"):
        sample(model, encode(other_clip, RED_CAT), encode(other_clip, ""))
    assert other_model is not model
    path = models / "language_bridges" / "wide.safetensors"
    sizes = TINY["pocket"]
    write_branch(path, "sd1", branch_tower("tiny-branch-32", 32), random_branch(sizes))
    try:
        with pytest.raises(BridgeError, match="does not fit this checkpoint"):
            branched(sd1, "wide")
    finally:
        path.unlink()


def test_a_batch_that_a_node_has_repeated_is_refused(sd1: Checkpoint) -> None:
    model, clip = branched(sd1, model=sd1.model.clone())

    def twice(apply: Any, given: Any) -> Tensor:
        c = {**given["c"], "c_crossattn": torch.cat([given["c"]["c_crossattn"]] * 2)}
        x, time = torch.cat([given["input"]] * 2), torch.cat([given["timestep"]] * 2)
        return apply(x, time, **c)[: len(given["input"])]

    model.set_model_unet_function_wrapper(twice)
    with pytest.raises(BridgeError, match="which text belongs to which picture"):
        sample(model, encode(clip, RED_CAT), encode(clip, ""), steps=1)


def test_the_node_asks_for_nothing_else(sd1: Checkpoint) -> None:
    """A branch stands behind the very inputs that every bridge has."""
    with pytest.raises(BridgeError, match="text tower"):
        call(
            LanguageBridge,
            model=sd1.model,
            clip=sd1.clip,
            bridge="branch.safetensors",
            strength=1.0,
            route="two streams",
            tower=sd1.clip,
        )
