"""Trains the Chinese bridges of the pocket world: IAP-style, PEA, AltDiffusion-style, LLM-style.

`bootstrap.py run recipes/pocket_bridges.py --work DIR --method iap|pea|alt|llm`, after pocket_base.py and
pocket_encoder.py. Training sees Chinese captions in the seen words and patterns only, and no held-out colour
and shape pair.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, autocast

from language_bridge.bridges.base import Bridge, Hidden, create
from language_bridge.bridges.file import BridgeHeader, EncoderRef, save_bridge
from language_bridge.encoders.base import Encoder
from language_bridge.encoders.file import load_encoder, read_encoder_header
from language_bridge.pocket import captions, judge
from language_bridge.pocket.painter import paint_many, random_scene
from language_bridge.recipes.pocket_world import (
    CLIP_CONFIG,
    alphas,
    decode,
    english_ids,
    half_width,
    latents_of,
    new_clip,
    new_unet,
    optimisers,
    sample,
    typed,
)
from language_bridge.training.objectives import Align, Diffusion, Iap, Pea, PeaBatch
from language_bridge.training.taps import CrossAttention, QueryTaps

CONTEXT = int(CLIP_CONFIG["hidden_size"])


@dataclass
class World:
    """Everything cached once: latents, English context, Chinese ids and masks, and the frozen U-Net."""

    latents: Tensor
    english: Tensor
    ids: Tensor
    mask: Tensor
    empty_english: Tensor
    unet: torch.nn.Module
    clip: torch.nn.Module


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", choices=sorted(METHODS), required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=16000)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # dead channels leave denormal moments in the optimiser, four times slower
    tower_path = options.work / f"{TOWERS.get(options.method, 'pocket-zh-encoder')}.safetensors"
    encoder = load_encoder(tower_path)
    world = build(options.work, encoder, options.scenes, options.seed)
    start = time.process_time()
    bridge, unet, record = METHODS[options.method](world, encoder, options.minutes, options.work)
    record |= {
        "seed": options.seed,
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        "scenes": options.scenes,
    }
    report = evaluate(options.work, world, encoder, bridge, 200)
    print(json.dumps({"method": options.method, **record, "accuracy": report}), flush=True)
    name = f"pocket-{options.method}"
    owns = options.method == "iap"
    tower_file = read_encoder_header(tower_path)
    assert tower_file is not None
    digest = "" if owns else tower_file.digest
    header = BridgeHeader(
        kind=bridge.kind,
        spec=dataclasses.asdict(bridge.spec),
        base="pocket",
        encoder=EncoderRef(
            encoder.family,
            f"{name}-zh" if owns else encoder.identity,
            encoder.layer,
            encoder.window,
            encoder.mask_rule,
            digest,
        ),
        languages=("zh",),
        unet="kv" if unet else "none",
        training=record,
        licence="GPL-3.0-or-later",
        source="recipes/pocket_bridges.py",
        name=name,
    )
    if owns:
        encoder.identity = f"{name}-zh"
    out = options.work / f"{name}.safetensors"
    save_bridge(out, header, bridge, encoder if owns else None, unet=unet, dtype=torch.float16)
    (options.work / f"{name}.json").write_text(json.dumps({**record, "accuracy": report}), encoding="utf-8")


def build(work: Path, encoder: Encoder, count: int, seed: int) -> World:
    rng = np.random.default_rng(seed + 21)
    scenes = [random_scene(rng, held_out=False) for _ in range(count)]
    latents = latents_of(work, paint_many(scenes, rng))
    pairs = [captions.parallel(scene, rng) for scene in scenes]
    clip = new_clip()
    clip.load_state_dict(load_file(str(work / "clip.safetensors")), strict=False)
    clip.eval()
    with torch.no_grad():
        parts = [
            clip(input_ids=p).last_hidden_state.half()
            for p in english_ids([x["en"].text for x in pairs]).split(256)
        ]
        empty = clip(input_ids=english_ids([""])).last_hidden_state
    ids, mask = encoder.batch([typed(x["zh"].text, rng, wide=0.0) for x in pairs])
    unet = new_unet()
    unet.load_state_dict(load_file(str(work / "unet.safetensors")))
    unet.eval().requires_grad_(False)
    return World(latents, torch.cat(parts), ids, mask, empty, unet, clip)


Trained = tuple[Bridge, dict[str, Tensor], dict[str, Any]]
"""A bridge, the U-Net weights that it brings, and the record of its training."""

FIRST_STAGE = 0.3
"""Share of the time in which the resampler of an LLM adapter learns the English rows."""

KEYS_AND_VALUES = re.compile(r"\.attn2\.to_[kv]\.weight$")


def progress_of(minutes: float) -> Iterator[float]:
    start = time.process_time()
    while (share := (time.process_time() - start) / (60 * minutes)) < 1:
        yield share


def train_iap(world: World, encoder: Encoder, minutes: float, work: Path) -> Trained:
    """Tower and bridge learn together; queries of the frozen U-Net over the English text are cached once."""
    bridge = create("mlp", {"hidden": encoder.width, "context": CONTEXT, "width": 256, "depth": 3})
    bridge.reset_parameters()
    encoder.requires_grad_(True)
    layers = CrossAttention.of(world.unet)
    objective = Iap(layers)
    abar = alphas()
    queries: list[list[Tensor]] = []
    times_of = [torch.randint(1000, (len(world.latents),)) for _ in range(2)]
    with torch.no_grad():
        for times in times_of:
            taken: list[list[Tensor]] = []
            for part in torch.arange(len(world.latents)).split(256):
                a = abar[times[part]].view(-1, 1, 1, 1)
                noisy = a.sqrt() * world.latents[part] + (1 - a).sqrt() * torch.randn_like(
                    world.latents[part]
                )
                with QueryTaps(world.unet) as taps:
                    world.unet(noisy, times[part].float(), context=world.english[part].float())
                taken.append([q.half() for q in taps.queries])
            queries.append([torch.cat(layer) for layer in zip(*taken, strict=True)])
    optimise, progress = optimisers([encoder, bridge], muon=0.005, adam=1e-3)
    step, running = 0, 1.0
    empty_ids, empty_mask = encoder.frame([])
    for share in progress_of(minutes):
        progress(share)
        pick = torch.randint(len(world.latents), (48,))
        bank = queries[step % len(queries)]
        english = world.english[pick].float()
        ids, mask = world.ids[pick], world.mask[pick]
        dropped = torch.rand(len(pick)) < 0.08
        ids = torch.where(dropped[:, None], empty_ids, ids)
        mask = torch.where(dropped[:, None], empty_mask, mask)
        english = torch.where(dropped[:, None, None], world.empty_english, english)
        with autocast("cpu", torch.bfloat16):
            native = bridge(encoder(ids, mask)).context
        loss = objective([q[pick].float() for q in bank], native.float(), english).total
        loss.backward()
        optimise()
        running = 0.98 * running + 0.02 * float(loss.detach())
        step += 1
        if step % 200 == 0:
            print(f"iap step {step} loss {running:.4f} share {share:.2f}", flush=True)
        if step % 1500 == 0:
            print(evaluate(work, world, encoder, bridge, 48), flush=True)
    return bridge, {}, {"objective": "iap", "steps": step, "batch": 48, "loss": running}


def train_pea(world: World, encoder: Encoder, minutes: float, work: Path) -> Trained:
    """The tower stays frozen; the adapter learns from the teacher's noise and block features (all captions
    parallel).
    """
    bridge = create("mlp", {"hidden": encoder.width, "context": CONTEXT, "width": 512, "depth": 3})
    bridge.reset_parameters()
    states, empty = frozen_states(world, encoder)
    objective = Pea(world.unet)
    abar = alphas()
    optimise, progress = optimisers([bridge], muon=0.01, adam=2e-3)
    step, running = 0, 1.0
    for share in progress_of(minutes):
        progress(share)
        pick = torch.randint(len(world.latents), (48,))
        # High noise decides the picture; half of the draws are taken from the upper third.
        times = torch.where(torch.rand(48) < 0.5, torch.randint(1000, (48,)), torch.randint(600, 1000, (48,)))
        noise = torch.randn(48, 4, 8, 8)
        a = abar[times].view(-1, 1, 1, 1)
        dropped = torch.rand(48) < 0.1
        chosen = torch.where(dropped[:, None, None], empty.states, states[pick].float())
        hidden = Hidden(chosen, world.mask[pick], None)
        english = torch.where(dropped[:, None, None], world.empty_english, world.english[pick].float())
        batch = PeaBatch(
            noisy=a.sqrt() * world.latents[pick] + (1 - a).sqrt() * noise,
            noise=noise,
            timestep=times.float(),
            teacher=english,
            native_only=torch.zeros(48),
        )
        with autocast("cpu", torch.bfloat16):
            loss = objective(bridge(hidden).context, batch).total
        loss.backward()
        optimise()
        running = 0.98 * running + 0.02 * float(loss.detach())
        step += 1
        if step % 100 == 0:
            print(f"pea step {step} loss {running:.4f} share {share:.2f}", flush=True)
        if step % 800 == 0:
            print(evaluate(work, world, encoder, bridge, 48), flush=True)
    return bridge, {}, {"objective": "pea", "steps": step, "batch": 48, "loss": running}


def train_alt(world: World, encoder: Encoder, minutes: float, work: Path) -> Trained:
    """As AltDiffusion trains its U-Net: tower frozen, plain diffusion loss, no English text. What learns here
    is one matrix and the keys and values of the cross-attention.
    """
    bridge = create("linear", {"hidden": encoder.width, "context": CONTEXT})
    bridge.reset_parameters()
    states, empty = frozen_states(world, encoder)
    student = copy.deepcopy(world.unet)
    learning = {name: p for name, p in student.named_parameters() if KEYS_AND_VALUES.search(name)}
    for parameter in learning.values():
        parameter.requires_grad_(True)
    abar = alphas()
    weight = (1 / abar).clamp(max=10) / (1 / abar).clamp(max=10).mean()
    objective = Diffusion(student, weight)
    optimise, progress = optimisers([bridge, student], muon=0.01, adam=2e-3)
    step, running = 0, 1.0
    for share in progress_of(minutes):
        progress(share)
        pick = torch.randint(len(world.latents), (64,))
        times = torch.randint(1000, (64,))
        noise = torch.randn(64, 4, 8, 8)
        a = abar[times].view(-1, 1, 1, 1)
        dropped = torch.rand(64) < 0.1
        chosen = torch.where(dropped[:, None, None], empty.states, states[pick].float())
        hidden = Hidden(chosen, world.mask[pick], None)
        noisy = a.sqrt() * world.latents[pick] + (1 - a).sqrt() * noise
        with autocast("cpu", torch.bfloat16):
            loss = objective(bridge(hidden).context, noisy, noise, times.float()).total
        loss.backward()
        optimise()
        running = 0.98 * running + 0.02 * float(loss.detach())
        step += 1
        if step % 200 == 0:
            print(f"alt step {step} loss {running:.4f} share {share:.2f}", flush=True)
        if step % 1000 == 0:
            print(evaluate(work, dataclasses.replace(world, unet=student), encoder, bridge, 48), flush=True)
    world.unet = student
    unet = {name: parameter.detach() for name, parameter in learning.items()}
    record = {"objective": "diffusion", "unet": "replace", "steps": step, "batch": 64, "loss": running}
    return bridge, unet, record


def train_llm(world: World, encoder: Encoder, minutes: float, work: Path) -> Trained:
    """As OmniDiffusion, in two stages: a resampler behind a frozen language model first learns the English
    rows (cos-len), then learns through the frozen U-Net. The second stage is PEA's distillation where the
    authors train the U-Net along: the checkpoint is to stay as it is."""
    spec = {"hidden": encoder.width, "context": CONTEXT, "queries": 77, "layers": 2, "heads": 4}
    bridge = create("omni", spec)
    bridge.reset_parameters()
    states, empty = frozen_states(world, encoder)
    align, distil = Align(length=0.01), Pea(world.unet)
    empty_mask = empty.mask.expand(48, -1)
    abar = alphas()
    optimise, progress = optimisers([bridge], muon=0.005, adam=1e-3)
    step, running = 0, 1.0
    for share in progress_of(minutes):
        progress(share)
        pick = torch.randint(len(world.latents), (48,))
        dropped = torch.rand(48) < 0.1
        chosen = torch.where(dropped[:, None, None], empty.states, states[pick].float())
        hidden = Hidden(chosen, torch.where(dropped[:, None], empty_mask, world.mask[pick]), None)
        english = torch.where(dropped[:, None, None], world.empty_english, world.english[pick].float())
        with autocast("cpu", torch.bfloat16):
            native = bridge(hidden).context
            if share < FIRST_STAGE:
                loss = align(native, english).total
            else:
                times = torch.where(
                    torch.rand(48) < 0.5, torch.randint(1000, (48,)), torch.randint(600, 1000, (48,))
                )
                noise = torch.randn(48, 4, 8, 8)
                a = abar[times].view(-1, 1, 1, 1)
                noisy = a.sqrt() * world.latents[pick] + (1 - a).sqrt() * noise
                loss = distil(native, PeaBatch(noisy, noise, times.float(), english, torch.zeros(48))).total
        loss.backward()
        optimise()
        running = 0.98 * running + 0.02 * float(loss.detach())
        step += 1
        if step % 200 == 0:
            print(f"llm step {step} loss {running:.4f} share {share:.2f}", flush=True)
        if step % 1000 == 0:
            print(evaluate(work, world, encoder, bridge, 48), flush=True)
    record = {"objective": "align, then pea", "steps": step, "batch": 48, "loss": running}
    return bridge, {}, record


def frozen_states(world: World, encoder: Encoder) -> tuple[Tensor, Hidden]:
    """What a tower that no longer learns says of every caption [N, T, D] (fp16) and of the empty prompt."""
    encoder.eval().requires_grad_(False)
    with torch.no_grad():
        parts = zip(world.ids.split(256), world.mask.split(256), strict=True)
        return torch.cat([encoder(i, m).states.half() for i, m in parts]), encoder(*encoder.batch([""]))


@torch.no_grad()
def evaluate(work: Path, world: World, encoder: Encoder, bridge: Bridge, count: int) -> dict[str, float]:
    """Attribute accuracy on each split over `count` captions, 15 DDIM steps, guidance 2."""
    reading = judge.load(work / "pocket-judge.safetensors")
    encoder.eval()
    report: dict[str, float] = {}
    for split, style in captions.STYLES.items():
        rng = np.random.default_rng(1234)
        tests = [random_scene(rng, held_out=split == "combinations") for _ in range(count)]
        asked = [captions.word(captions.describe(s, rng, style), "zh", rng, style) for s in tests]
        context = bridge(encoder(*encoder.batch([half_width(c.text) for c in asked]))).context
        nothing = bridge(encoder(*encoder.batch([""]))).context
        latents = sample(world.unet, context, nothing, steps=15, guidance=2.0, seed=1)
        marks = [
            judge.score(r, c) for r, c in zip(reading.read_many(decode(work, latents)), asked, strict=True)
        ]
        report[split] = round(judge.accuracy(marks)["attributes"], 4)
    return report


METHODS = {"iap": train_iap, "pea": train_pea, "alt": train_alt, "llm": train_llm}
TOWERS = {"llm": "pocket-zh-lm"}
"""The tower of each method, when it is not the one trained from pictures."""

if __name__ == "__main__":
    main()
