"""Trains the branch of the pocket world as BDM is trained: plain diffusion loss, frozen backbone, no English.

`bootstrap.py run recipes/pocket_branch.py --work DIR [--minutes N] [--steps N]`, after pocket_base.py and
pocket_encoder.py. The branch starts as a copy of the U-Net's encoder half and middle, with keys and values of
its own for the tower's width, and zero convolutions at its ends. It reads Chinese; the U-Net beside it hears
the empty English prompt at every step. Training sees captions in the seen words and patterns only, and no
held-out colour and shape pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, autocast

from language_bridge.bridges.base import Bridge, create
from language_bridge.bridges.file import BRANCH, BridgeHeader, EncoderRef, save_bridge
from language_bridge.encoders.file import load_encoder, read_encoder_header
from language_bridge.recipes.pocket_bridges import World, build, evaluate, frozen_states, progress_of
from language_bridge.recipes.pocket_world import UNET_CONFIG, alphas, optimisers, prepare_host

NAME = "pocket-branch"
BATCH, DROPPED = 64, 0.1


def train(
    world: World, states: Tensor, empty: Tensor, beside: Any, limit: tuple[float, int], report: Any
) -> dict[str, Any]:
    """Learn until the minutes or the steps of `limit` are over, whatever comes first."""
    minutes, steps = limit
    abar = alphas()
    weight = (1 / abar).clamp(max=10) / (1 / abar).clamp(max=10).mean()
    optimise, progress = optimisers([beside.net], muon=0.01, adam=2e-3)
    step, running = 0, 1.0
    for share in progress_of(minutes):
        if steps and step == steps:
            break
        progress(max(share, step / steps if steps else 0.0))
        pick = torch.randint(len(world.latents), (BATCH,))
        # High noise decides the picture; half of the draws are taken from the upper third.
        high = torch.rand(BATCH) < 0.5
        times = torch.where(high, torch.randint(600, 1000, (BATCH,)), torch.randint(1000, (BATCH,)))
        noise = torch.randn(BATCH, 4, 8, 8)
        a = abar[times].view(-1, 1, 1, 1)
        dropped = torch.rand(BATCH) < DROPPED
        native = torch.where(dropped[:, None, None], empty, states[pick].float())
        noisy = a.sqrt() * world.latents[pick] + (1 - a).sqrt() * noise
        with autocast("cpu", torch.bfloat16):
            said = beside(noisy, times.float(), native)
        loss = ((said.float() - noise).square().mean((1, 2, 3)) * weight[times]).mean()
        loss.backward()
        optimise()
        running = 0.98 * running + 0.02 * float(loss.detach())
        step += 1
        if step % 200 == 0:
            print(f"branch step {step} loss {running:.4f} share {share:.2f}", flush=True)
        if step % 1000 == 0:
            report(step)
    return {"objective": "diffusion", "steps": step, "batch": BATCH, "loss": running}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder of what is made (default: --work)")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps; 0 = by the minutes")
    parser.add_argument("--start", type=Path, help="go on from the branch of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=16000)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    out: Path = options.out or options.work
    tower_path = options.work / "pocket-zh-encoder.safetensors"
    encoder, tower = load_encoder(tower_path), read_encoder_header(tower_path)
    assert tower is not None
    world = build(options.work, encoder, options.scenes, options.seed)
    states, empty = frozen_states(world, encoder)
    prepare_host()
    from language_bridge.host.backbone import Beside, branch_copy

    net = branch_copy(world.unet, UNET_CONFIG, encoder.width)
    if options.start:
        net.load_state_dict(load_file(str(options.start)))
    beside = Beside(world.unet, net, world.empty_english)
    bridge: Bridge = create("branch", {"hidden": encoder.width, "context": encoder.width})
    seen = dataclasses.replace(world, unet=beside)  # pyright: ignore[reportArgumentType] - called alike

    def report(step: int) -> None:
        save_file(net.state_dict(), str(out / f"{NAME}-state.safetensors"))
        print(step, evaluate(options.work, seen, encoder, bridge, 48), flush=True)

    began = time.process_time()
    record = train(world, states, empty.states, beside, (options.minutes, options.steps), report)
    record |= {
        "seed": options.seed,
        "cpu_minutes": round((time.process_time() - began) / 60, 1),
        "scenes": options.scenes,
    }
    save_file(net.state_dict(), str(out / f"{NAME}-state.safetensors"))
    accuracy = evaluate(options.work, seen, encoder, bridge, 200)
    print(json.dumps({**record, "accuracy": accuracy}), flush=True)
    header = BridgeHeader(
        kind=bridge.kind,
        spec=dataclasses.asdict(bridge.spec),
        base="pocket",
        encoder=EncoderRef(
            encoder.family, encoder.identity, encoder.layer, encoder.window, encoder.mask_rule, tower.digest
        ),
        languages=("zh",),
        unet=BRANCH,
        training=record,
        licence="GPL-3.0-or-later",
        source="recipes/pocket_branch.py",
        name=NAME,
    )
    save_bridge(out / f"{NAME}.safetensors", header, bridge, unet=net.state_dict(), dtype=torch.float16)
    (out / f"{NAME}.json").write_text(json.dumps({**record, "accuracy": accuracy}), encoding="utf-8")


if __name__ == "__main__":
    main()
