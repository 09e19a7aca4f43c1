"""Trains the pocket world's English text encoder and U-Net and writes its checkpoint.

`bootstrap.py run recipes/pocket_base.py --work DIR --stage text|unet|pack`, after
`recipes/pocket_autoencoder.py --out DIR`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import autocast

from language_bridge.pocket import captions, judge
from language_bridge.pocket.autoencoder import Autoencoder, taesd_state
from language_bridge.pocket.captions import Caption, Style
from language_bridge.pocket.painter import Scene, paint_many, random_scene
from language_bridge.recipes.pocket_reader import PictureReader
from language_bridge.recipes.pocket_world import (
    CLIP_CONFIG,
    alphas,
    decode,
    english_ids,
    latents_of,
    new_clip,
    new_unet,
    optimisers,
    sample,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stage", choices=["text", "unet", "pack"], required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=24000)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # dead channels leave denormal moments in the optimiser, four times slower
    if options.stage == "text":
        train_text(options.work, options.minutes, options.scenes, options.seed)
    elif options.stage == "unet":
        train_unet(options.work, options.minutes, options.scenes, options.seed)
    else:
        pack(options.work)


def world(work: Path, count: int, seed: int) -> tuple[list[Scene], torch.Tensor, list[Caption]]:
    """Scenes, their normalised latents [N, 4, 8, 8] and one English caption each (words and patterns of every
    split).
    """
    rng = np.random.default_rng(seed + 1)
    scenes = [random_scene(rng) for _ in range(count)]
    latents = latents_of(work, paint_many(scenes, rng))
    texts: list[Caption] = []
    for scene in scenes:
        style = Style(words="any", patterns="any", drop=0.12)
        texts.append(captions.word(captions.describe(scene, rng, style), "en", rng, style))
    return scenes, latents, texts


def train_text(work: Path, minutes: float, count: int, seed: int) -> None:
    """Regresses the latent from the caption through a small cross-attention reader."""
    _, latents, texts = world(work, count, seed)
    ids = english_ids([c.text for c in texts])
    clip = new_clip()
    reader = PictureReader(CLIP_CONFIG["hidden_size"])
    optimise, schedule = optimisers([clip, reader], muon=0.01, adam=1e-3)
    start, step, running = time.process_time(), 0, 1.0
    while (share := (time.process_time() - start) / (60 * minutes)) < 1:
        schedule(share)
        pick = torch.randint(len(ids), (64,))
        with autocast("cpu", torch.bfloat16):
            states = clip(input_ids=ids[pick]).last_hidden_state
            guess = reader(states)
        loss = (guess.float() - latents[pick]).square().mean()
        loss.backward()
        optimise()
        running = 0.98 * running + 0.02 * float(loss.detach())
        if step % 100 == 0:
            print(f"text step {step} loss {running:.4f} cpu {time.process_time() - start:.0f}", flush=True)
        step += 1
    save_file(
        {k: v.contiguous() for k, v in clip.state_dict().items() if "position_ids" not in k},
        str(work / "clip.safetensors"),
    )
    rng = np.random.default_rng(99)
    report: dict[str, Any] = {"steps": step, "loss": running}
    with torch.no_grad():
        tests = [random_scene(rng) for _ in range(256)]
        asked = [captions.word(captions.describe(s, rng), "en", rng) for s in tests]
        guess = reader(clip(input_ids=english_ids([c.text for c in asked])).last_hidden_state)
        readings = judge.load(work / "pocket-judge.safetensors").read_many(decode(work, guess))
        report["accuracy"] = judge.accuracy([judge.score(r, c) for r, c in zip(readings, asked, strict=True)])
    (work / "clip.json").write_text(json.dumps(report), encoding="utf-8")
    print(json.dumps(report), flush=True)


def train_unet(work: Path, minutes: float, count: int, seed: int) -> None:
    """Epsilon loss on cached text states; one batch in eight reads its caption in two chunks, as long prompts
    do.
    """
    scenes, latents, texts = world(work, count, seed)
    clip = new_clip()
    clip.load_state_dict(load_file(str(work / "clip.safetensors")), strict=False)
    clip.eval()

    @torch.no_grad()
    def states(sentences: list[str]) -> torch.Tensor:
        parts = [clip(input_ids=part).last_hidden_state.half() for part in english_ids(sentences).split(256)]
        return torch.cat(parts)

    rng = np.random.default_rng(seed + 2)
    context = states([c.text for c in texts])
    halves = [i for i, scene in enumerate(scenes) if len(scene.things) == 2][: count // 6]
    first: list[str] = []
    second: list[str] = []
    for index in halves:
        scene = scenes[index]
        ground_first = rng.random() < 0.5
        for spoken, thing in zip((first, second), scene.things, strict=True):
            said = captions.describe(Scene((thing,), scene.ground), rng)
            if (spoken is first) != ground_first:
                said = Caption("", said.wanted, None)
            spoken.append(captions.word(said, "en", rng).text)
    double = torch.cat([states(first), states(second)], dim=1)
    empty = states([""])[0]
    unet = new_unet()
    average = new_unet()
    average.load_state_dict(unet.state_dict())
    optimise, schedule = optimisers([unet], muon=0.01, adam=1e-3)
    abar = alphas()
    rate = 1 / abar
    weight_of = rate.clamp(max=10) / rate.clamp(max=10).mean()
    start, step, running, last_test = time.process_time(), 0, 1.0, 0.0
    half_index = torch.tensor(halves)
    while (share := (time.process_time() - start) / (60 * minutes)) < 1:
        schedule(share)
        if step % 8 == 7:
            where = torch.randint(len(halves), (96,))
            clean, text, nothing = (
                latents[half_index[where]],
                double[where].float(),
                torch.cat([empty, empty]).float(),
            )
        else:
            where = torch.randint(len(texts), (128,))
            clean, text, nothing = latents[where], context[where].float(), empty.float()
        text = torch.where(torch.rand(len(text), 1, 1) < 0.1, nothing, text)
        t = torch.randint(1000, (len(text),))
        noise = torch.randn_like(clean)
        a = abar[t].view(-1, 1, 1, 1)
        with autocast("cpu", torch.bfloat16):
            guess = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), context=text)
        loss = (weight_of[t] * (guess.float() - noise).square().mean((1, 2, 3))).mean()
        loss.backward()
        optimise()
        running = 0.99 * running + 0.01 * float(loss.detach())
        keep = min(0.9985, (step + 1) / (step + 10))
        with torch.no_grad():
            for old, new in zip(average.parameters(), unet.parameters(), strict=True):
                old.lerp_(new, 1 - keep)
        step += 1
        used = time.process_time() - start
        if used - last_test > 240 or step == 50:
            last_test = used
            save_file(
                {k: v.contiguous() for k, v in average.state_dict().items()}, str(work / "unet.safetensors")
            )
            shares = test_base(work, average, states)
            print(f"unet step {step} loss {running:.4f} cpu {used:.0f} {shares}", flush=True)
    save_file({k: v.contiguous() for k, v in average.state_dict().items()}, str(work / "unet.safetensors"))
    report = {
        "steps": step,
        "loss": running,
        "cpu_seconds": used,
        "accuracy": test_base(work, average, states, 512),
    }
    (work / "unet.json").write_text(json.dumps(report), encoding="utf-8")
    print(json.dumps(report), flush=True)


def test_base(work: Path, unet: torch.nn.Module, states: Any, count: int = 96) -> dict[str, float]:
    rng = np.random.default_rng(7)
    asked = [captions.word(captions.describe(random_scene(rng), rng), "en", rng) for _ in range(count)]
    latents = sample(
        unet, states([c.text for c in asked]).float(), states([""]).float(), steps=15, guidance=2.0, seed=1
    )
    readings = judge.load(work / "pocket-judge.safetensors").read_many(decode(work, latents))
    shares = judge.accuracy([judge.score(r, c) for r, c in zip(readings, asked, strict=True)])
    return {name: round(share, 3) for name, share in shares.items()}


def pack(work: Path) -> None:
    """Writes the checkpoint in SD1.x key names, fp16."""
    facts = json.loads((work / "autoencoder.json").read_text(encoding="utf-8"))
    model = Autoencoder(32)
    model.load_state_dict(load_file(str(work / "autoencoder.safetensors")))
    tensors = {f"first_stage_model.{k}": v for k, v in taesd_state(model, facts["deviation"]).items()}
    tensors |= {f"model.diffusion_model.{k}": v for k, v in load_file(str(work / "unet.safetensors")).items()}
    tensors |= {
        f"cond_stage_model.transformer.{k}": v for k, v in load_file(str(work / "clip.safetensors")).items()
    }
    header = {
        "language_bridge_pocket": json.dumps(
            {"format": 1, "clip": CLIP_CONFIG, "licence": "GPL-3.0-or-later"}
        )
    }
    out = work / "pocket-base.safetensors"
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, str(out), metadata=header)
    print(out, out.stat().st_size)


if __name__ == "__main__":
    main()
