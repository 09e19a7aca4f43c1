"""Trains the pocket world's Chinese language model, a decoder that predicts the next character and no more.

`bootstrap.py run recipes/pocket_language_model.py --work DIR`. It stands for the large language model of an
LLM adapter: it reads Chinese sentences (every word, no held-out sentence pattern, no held-out colour and
shape pair) and never meets a picture, English, or the U-Net.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import autocast

from language_bridge.encoders.bert import bert_tokenizer
from language_bridge.encoders.file import save_encoder
from language_bridge.encoders.llama import Llama, LlamaSpec
from language_bridge.pocket import captions
from language_bridge.pocket.captions import Style
from language_bridge.pocket.painter import random_scene
from language_bridge.recipes.pocket_encoder import vocabulary
from language_bridge.recipes.pocket_world import optimisers, typed

IDENTITY = "pocket-zh-lm"
START = 2  # [CLS]; no end token, as OmniDiffusion reads its language model


def new_decoder(width: int = 128, layers: int = 4) -> Llama:
    """A fresh decoder over the same characters as the pocket tower."""
    words = vocabulary()
    spec = LlamaSpec(
        vocab=len(words),
        width=width,
        layers=layers,
        heads=4,
        pairs=2,
        head=width // 4,
        inner=3 * width,
        window=77,
        start=START,
        end=-1,
    )
    decoder = Llama(spec, bert_tokenizer(words), identity=IDENTITY, window=77)
    decoder.reset_parameters()
    return decoder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sentences", type=int, default=32000)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # dead channels leave denormal moments in the optimiser, four times slower
    rng = np.random.default_rng(options.seed + 31)
    decoder = new_decoder()
    style = Style(words="any", patterns="seen", drop=0.12)
    texts: list[str] = []
    for _ in range(options.sentences):
        scene = random_scene(rng, held_out=False)
        texts.append(typed(captions.word(captions.describe(scene, rng, style), "zh", rng, style).text, rng))
    ids, mask = decoder.batch(texts)
    optimise, progress = optimisers([decoder], muon=0.01, adam=1e-3)
    start, step, running = time.process_time(), 0, 4.0
    while (share := (time.process_time() - start) / (60 * options.minutes)) < 1:
        progress(share)
        pick = torch.randint(len(ids), (64,))
        with autocast("cpu", torch.bfloat16):
            states = decoder(ids[pick], mask[pick]).states
            logits = states[:, :-1] @ decoder.embed_tokens.weight.T.to(states.dtype)
        known = mask[pick][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.float()[known], ids[pick][:, 1:][known])
        loss.backward()
        optimise()
        running = 0.98 * running + 0.02 * float(loss.detach())
        if step % 200 == 0:
            print(f"lm step {step} loss {running:.4f} cpu {time.process_time() - start:.0f}", flush=True)
        step += 1
    report = {"seed": options.seed, "steps": step, "loss": running, "cpu_minutes": options.minutes}
    print(json.dumps(report), flush=True)
    (options.work / "language_model.json").write_text(json.dumps(report), encoding="utf-8")
    save_encoder(
        options.work / f"{IDENTITY}.safetensors",
        decoder,
        languages=("zh",),
        licence="GPL-3.0-or-later",
        source="recipes/pocket_language_model.py",
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
