"""Trains the pocket world's two Chinese bridges, IAP-style and PEA, against the frozen pocket checkpoint.

`bootstrap.py run recipes/pocket_bridges.py --work DIR --method iap|pea`, after pocket_base.py and
pocket_encoder.py. Training sees Chinese captions in the seen words and patterns only, and no held-out colour
and shape pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, autocast

from language_bridge.bridges.base import Bridge, create
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
from language_bridge.training.objectives import Iap, Pea, PeaBatch
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
    parser.add_argument("--method", choices=["iap", "pea"], required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=16000)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # dead channels leave denormal moments in the optimiser, four times slower
    encoder = load_encoder(options.work / "pocket-zh-encoder.safetensors")
    world = build(options.work, encoder, options.scenes, options.seed)
    start = time.process_time()
    train = train_iap if options.method == "iap" else train_pea
    bridge, record = train(world, encoder, options.minutes, options.work)
    record |= {
        "seed": options.seed,
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        "scenes": options.scenes,
    }
    report = evaluate(options.work, world, encoder, bridge, 200)
    print(json.dumps({"method": options.method, **record, "accuracy": report}), flush=True)
    name = f"pocket-{options.method}"
    owns = options.method == "iap"
    tower_file = read_encoder_header(options.work / "pocket-zh-encoder.safetensors")
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
        training=record,
        licence="GPL-3.0-or-later",
        source="recipes/pocket_bridges.py",
        name=name,
    )
    if owns:
        encoder.identity = f"{name}-zh"
    out = options.work / f"{name}.safetensors"
    save_bridge(out, header, bridge, encoder if owns else None, dtype=torch.float16)
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


def progress_of(minutes: float) -> Iterator[float]:
    start = time.process_time()
    while (share := (time.process_time() - start) / (60 * minutes)) < 1:
        yield share


def train_iap(world: World, encoder: Encoder, minutes: float, work: Path) -> tuple[Bridge, dict[str, Any]]:
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
    return bridge, {"objective": "iap", "steps": step, "batch": 48, "loss": running}


def train_pea(world: World, encoder: Encoder, minutes: float, work: Path) -> tuple[Bridge, dict[str, Any]]:
    """The tower stays frozen; the adapter learns from the teacher's noise and block features (all captions
    parallel).
    """
    bridge = create("mlp", {"hidden": encoder.width, "context": CONTEXT, "width": 512, "depth": 3})
    bridge.reset_parameters()
    encoder.eval().requires_grad_(False)
    with torch.no_grad():
        parts = zip(world.ids.split(256), world.mask.split(256), strict=True)
        states = torch.cat([encoder(i, m).states.half() for i, m in parts])
        empty = encoder(*encoder.batch([""]))
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
        hidden = type(empty)(chosen, world.mask[pick], None)
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
    return bridge, {"objective": "pea", "steps": step, "batch": 48, "loss": running}


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


if __name__ == "__main__":
    main()
