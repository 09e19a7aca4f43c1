"""Pretrains the pocket world's Chinese text tower from pictures alone: it never meets English, the U-Net or a
held-out pair.

`bootstrap.py run recipes/pocket_encoder.py --work DIR`, after `recipes/pocket_autoencoder.py`. As a Chinese
CLIP learns from Chinese captions of pictures, this tower learns to say what its small reader needs to draw
the latent. It knows every word of the Chinese grammar, synonyms included, but sees no held-out sentence
pattern and no held-out colour and shape pair.
"""

from __future__ import annotations

import argparse
import json
import string
import time
from pathlib import Path

import numpy as np
import torch
from torch import autocast

from language_bridge.encoders.bert import Bert, BertSpec, bert_tokenizer
from language_bridge.encoders.file import save_encoder
from language_bridge.pocket import captions, judge
from language_bridge.pocket.captions import Style
from language_bridge.pocket.painter import paint_many, random_scene
from language_bridge.recipes.pocket_reader import PictureReader
from language_bridge.recipes.pocket_world import decode, latents_of, optimisers, typed

IDENTITY = "pocket-zh"


def vocabulary() -> list[str]:
    """Special tokens, the grammar's characters, ASCII, full-width punctuation, and pieces inside words."""
    ascii_signs = list(string.ascii_lowercase + string.digits + string.punctuation)
    wide = [chr(code) for code in (0x3001, 0x3002, 0xFF08, 0xFF09, 0xFF0C, 0xFF1A, 0xFF1B)]
    words = sorted({*captions.characters("zh"), *ascii_signs, *wide})
    pieces = [f"##{sign}" for sign in string.ascii_lowercase + string.digits]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *pieces]


def new_tower(width: int = 128, layers: int = 3) -> Bert:
    """A fresh Chinese tower over that vocabulary."""
    words = vocabulary()
    spec = BertSpec(vocab=len(words), width=width, layers=layers, heads=4, inner=4 * width, window=77)
    tower = Bert(spec, bert_tokenizer(words), identity=IDENTITY, window=77)
    tower.reset_parameters()
    return tower


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=24000)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # dead channels leave denormal moments in the optimiser, four times slower
    rng = np.random.default_rng(options.seed + 11)

    scenes = [random_scene(rng, held_out=False) for _ in range(options.scenes)]
    latents = latents_of(options.work, paint_many(scenes, rng))
    tower = new_tower()
    ids: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    rows = 2 * options.scenes  # two captions for each picture
    for index in range(rows):
        style = Style(words="any", patterns="seen", drop=0.12)
        said = captions.word(captions.describe(scenes[index % options.scenes], rng, style), "zh", rng, style)
        framed, mask = tower.batch([typed(said.text, rng)])
        ids.append(framed)
        masks.append(mask)
    all_ids, all_masks = torch.cat(ids), torch.cat(masks)

    reader = PictureReader(tower.width)
    optimise, progress = optimisers([tower, reader], muon=0.01, adam=1e-3)
    start, step, running = time.process_time(), 0, 1.0
    while (share := (time.process_time() - start) / (60 * options.minutes)) < 1:
        progress(share)
        pick = torch.randint(rows, (64,))
        with autocast("cpu", torch.bfloat16):
            guess = reader(tower(all_ids[pick], all_masks[pick]).states)
        loss = (guess.float() - latents[pick % options.scenes]).square().mean()
        loss.backward()
        optimise()
        running = 0.98 * running + 0.02 * float(loss.detach())
        if step % 100 == 0:
            print(f"encoder step {step} loss {running:.4f} cpu {time.process_time() - start:.0f}", flush=True)
        step += 1

    report: dict[str, object] = {
        "seed": options.seed,
        "steps": step,
        "loss": running,
        "cpu_minutes": options.minutes,
    }
    reading = judge.load(options.work / "pocket-judge.safetensors")
    for split, style in captions.STYLES.items():
        rng = np.random.default_rng(99)
        tests = [random_scene(rng, held_out=split == "combinations") for _ in range(256)]
        asked = [captions.word(captions.describe(s, rng, style), "zh", rng, style) for s in tests]
        with torch.no_grad():
            guess = reader(tower(*tower.batch([c.text for c in asked])).states)
        marks = [
            judge.score(r, c)
            for r, c in zip(reading.read_many(decode(options.work, guess)), asked, strict=True)
        ]
        report[split] = round(judge.accuracy(marks)["attributes"], 4)
    print(json.dumps(report), flush=True)
    (options.work / "encoder.json").write_text(json.dumps(report), encoding="utf-8")
    save_encoder(
        options.work / "pocket-zh-encoder.safetensors",
        tower,
        languages=("zh",),
        licence="GPL-3.0-or-later",
        source="recipes/pocket_encoder.py",
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
