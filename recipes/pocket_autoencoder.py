"""Trains the pocket world's autoencoder and judge.

`bootstrap.py run recipes/pocket_autoencoder.py --out DIR --stage autoencoder|judge`
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import autocast

from language_bridge.pocket import judge as judging
from language_bridge.pocket.autoencoder import Autoencoder
from language_bridge.pocket.painter import COLOURS, PLACES, SHAPES, SIZES, Scene, paint_many, random_scene


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=["autoencoder", "judge"], required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--judge-steps", type=int, default=700)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # dead channels leave denormal moments in the optimiser, four times slower
    options.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)

    scenes = [random_scene(rng) for _ in range(20000)]
    pictures = torch.from_numpy(paint_many(scenes, rng)).movedim(-1, 1)  # [N, 3, 64, 64]
    test_scenes = [random_scene(rng) for _ in range(512)]
    test = torch.from_numpy(paint_many(test_scenes, rng)).movedim(-1, 1)

    if options.stage == "autoencoder":
        model = train_autoencoder(pictures, test, options.steps, options.width)
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()},
            str(options.out / "autoencoder.safetensors"),
        )
        restored = decode_all(model, encode_all(model, test))
        facts = {
            "seed": options.seed,
            "deviation": float(encode_all(model, pictures[:4000]).std()),
            "decibel": -10 * float((restored - test).square().mean().log10()),
        }
        (options.out / "autoencoder.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        print(json.dumps(facts))
        return
    model = Autoencoder(options.width)
    model.load_state_dict(load_file(str(options.out / "autoencoder.safetensors")))
    restored = decode_all(model.eval(), encode_all(model, test))
    judge = train_judge(model, pictures, scenes, options.judge_steps)
    save_file(
        {k: v.half().contiguous() for k, v in judge.state_dict().items()},
        str(options.out / "pocket-judge.safetensors"),
    )
    facts = {"seed": options.seed}
    for name, images in (("painted", test), ("restored", restored)):
        readings = judge.read_many(images.movedim(1, -1))
        marks = [judging.score(r, _full(s)) for r, s in zip(readings, test_scenes, strict=True)]
        facts[f"judge_{name}"] = judging.accuracy(marks)
    (options.out / "judge.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    print(json.dumps(facts, indent=1))


def train_autoencoder(pictures: torch.Tensor, test: torch.Tensor, steps: int, width: int) -> Autoencoder:
    """Squared and absolute error; noise on the latents keeps small mistakes of a sampler small."""
    model = Autoencoder(width).to(memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}], lr=2e-3
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    start = time.process_time()
    for step in range(steps):
        batch = pictures[torch.randint(len(pictures), (32,))].to(memory_format=torch.channels_last)
        with autocast("cpu", torch.bfloat16):
            latents = model.encode(batch)
            noisy = latents + 0.08 * torch.randn_like(latents)
            out = model.decode(noisy)
        error = out.float() - batch
        # Contrast-weighted: thin strokes on wide grounds would otherwise hardly count.
        weight = 1 + 4 * (batch - batch.flatten(2).median(2).values[..., None, None]).abs().amax(
            1, keepdim=True
        )
        loss = (
            (weight * error.square()).mean()
            + 0.1 * (weight * error.abs()).mean()
            + 1e-3 * latents.float().square().mean()
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            seen = decode_all(model, encode_all(model, test[:128]))
            decibel = -10 * float((seen - test[:128]).square().mean().log10())
            print(
                f"step {step} loss {float(loss):.5f} psnr {decibel:.2f}",
                f"cpu {time.process_time() - start:.0f}",
                flush=True,
            )
    return model.eval()


@torch.no_grad()
def encode_all(model: Autoencoder, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.encode(part) for part in pictures.split(128)])


@torch.no_grad()
def decode_all(model: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.decode(part) for part in latents.split(128)]).clamp(0, 1)


def train_judge(model: Autoencoder, pictures: torch.Tensor, scenes: list[Scene], steps: int) -> judging.Judge:
    """Half painted, half restored pictures, with noise: the judge must not mind what an autoencoder does to
    edges.
    """
    judge = judging.Judge()
    kinds = torch.zeros(len(scenes), 4, dtype=torch.long)
    colours, sizes = torch.zeros_like(kinds), torch.zeros_like(kinds)
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            cell = PLACES.index(thing.place)
            kinds[index, cell] = 1 + SHAPES.index(thing.shape)
            colours[index, cell] = list(COLOURS).index(thing.colour)
            sizes[index, cell] = SIZES.index(thing.size)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in range(steps):
        pick = torch.randint(len(scenes), (64,))
        images = pictures[pick]
        with autocast("cpu", torch.bfloat16):
            latents = encode_all(model, images).float()
            blurred = decode_all(
                model, latents + torch.rand(64, 1, 1, 1) * 0.25 * torch.randn_like(latents)
            ).float()
        images = torch.where(torch.rand(64, 1, 1, 1) < 0.5, blurred, images)
        images = (images + torch.rand(64, 1, 1, 1) * 0.06 * torch.randn_like(images)).clamp(0, 1)
        logits = judge(judging.corners_of(images))
        target = kinds[pick].view(-1)
        there = target > 0
        loss = torch.nn.functional.cross_entropy(logits[0], target)
        loss = loss + torch.nn.functional.cross_entropy(logits[1][there], colours[pick].view(-1)[there])
        loss = loss + torch.nn.functional.cross_entropy(logits[2][there], sizes[pick].view(-1)[there])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"judge step {step} loss {float(loss):.4f}", flush=True)
    return judge.eval()


def _full(scene: Scene) -> judging.Caption:
    from language_bridge.pocket.captions import Caption, Wanted

    wanted = tuple(Wanted(t.shape, t.colour, t.size, t.place) for t in scene.things)
    return Caption("", wanted, scene.ground)


if __name__ == "__main__":
    main()
