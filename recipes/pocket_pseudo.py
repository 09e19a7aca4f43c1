"""Trains the bridge that speaks inside the pocket checkpoint's own CLIP: native text as pseudo-tokens.

`bootstrap.py run recipes/pocket_pseudo.py --work DIR [--unmixed]`, after pocket_base.py and
pocket_encoder.py. Tower and bridge learn to say input embeddings of the CLIP, which stand in its window
where the Chinese characters stand in the prompt; U-Net and CLIP are frozen. The objective is the IAP-style
one of pocket_bridges.py. Half of the captions have words or clauses in English; with `--unmixed` the training
sees Chinese captions alone, like the other bridges. Seen words and patterns only, no held-out pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, autocast

from language_bridge.benchmarks import mixing
from language_bridge.bridges.base import Bridge, create
from language_bridge.bridges.file import BridgeHeader, EncoderRef, save_bridge
from language_bridge.encoders.base import Encoder
from language_bridge.encoders.file import load_encoder
from language_bridge.host.pseudo import CLIP_INPUT, SAYS
from language_bridge.pocket import captions, judge
from language_bridge.pocket.painter import paint_many, random_scene
from language_bridge.prompt import route
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
    typed,
)
from language_bridge.training.objectives import Iap
from language_bridge.training.taps import CrossAttention, QueryTaps

CONTEXT = int(CLIP_CONFIG["hidden_size"])
WINDOW = 77
START, END = 49406, 49407
NAMES = {False: "pocket-pseudo-unmixed", True: "pocket-pseudo"}


@dataclass(frozen=True)
class Sentences:
    """Prompts as CLIP and tower read them, [N, 77] each: ids, tower ids, tower mask, and `places`: which row
    of the tower stands in which place of CLIP's window, -1 where CLIP has a token of its own."""

    ids: Tensor
    native: Tensor
    mask: Tensor
    places: Tensor


def sentences(prompts: Sequence[str], encoder: Encoder) -> Sentences:
    """Prompts as the node would cut them; native text goes to the tower, its places stay in CLIP's window."""
    rows: list[tuple[list[int], Tensor, Tensor, list[int]]] = []
    for prompt in prompts:
        ids, places, pieces = [START], [-1], []
        for segment in route(prompt):
            if segment.stream == "native":
                found = [piece.id for piece in encoder.tokenize(segment.text)]
                # The tower's own start token comes first.
                places += range(len(pieces) + 1, len(pieces) + 1 + len(found))
                ids += [END] * len(found)
                pieces += found
            elif segment.text.strip():
                words = [
                    token for token in english_ids([segment.text])[0].tolist() if token not in (START, END)
                ]
                ids += words
                places += [-1] * len(words)
        ids, places = ids[: WINDOW - 1], places[: WINDOW - 1]
        native, mask = encoder.frame(pieces[: encoder.capacity])
        rows.append((ids + [END] * (WINDOW - len(ids)), native, mask, places + [-1] * (WINDOW - len(places))))
    ids_of, natives, masks, places_of = zip(*rows, strict=True)
    return Sentences(torch.tensor(ids_of), torch.stack(natives), torch.stack(masks), torch.tensor(places_of))


def read(clip: Any, encoder: Encoder, bridge: Bridge, said: Sentences) -> Tensor:
    """Context [N, 77, C]: what the English CLIP says of sentences with pseudo-tokens in them."""
    pseudo = bridge(encoder(said.native, said.mask)).context

    def put_in(module: Any, arguments: Any, embedded: Tensor) -> Tensor:
        given = pseudo.gather(1, said.places.clamp(min=0)[..., None].expand(-1, -1, pseudo.shape[-1]))
        return torch.where((said.places >= 0)[..., None], given.to(embedded), embedded)

    model = getattr(clip, "text_model", clip)
    model = getattr(model, "text_model", model)
    handle = model.embeddings.token_embedding.register_forward_hook(put_in)
    try:
        return clip(input_ids=said.ids).last_hidden_state
    finally:
        handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--unmixed", dest="mixed", action="store_false")
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=12000)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # dead channels leave denormal moments in the optimiser, four times slower
    work: Path = options.work
    start = time.process_time()
    encoder = load_encoder(work / "pocket-zh-encoder.safetensors")
    encoder.requires_grad_(True)
    bridge = create("mlp", {"hidden": encoder.width, "context": CONTEXT, "width": 256, "depth": 3})
    bridge.reset_parameters()
    clip: Any = new_clip()
    clip.load_state_dict(load_file(str(work / "clip.safetensors")), strict=False)
    clip.eval().requires_grad_(False)
    unet = new_unet()
    unet.load_state_dict(load_file(str(work / "unet.safetensors")))
    unet.eval().requires_grad_(False)

    rng = np.random.default_rng(options.seed + 41)
    scenes = [random_scene(rng, held_out=False) for _ in range(options.scenes)]
    latents = latents_of(work, paint_many(scenes, rng))
    style = captions.STYLES["seen"]
    asked = [captions.describe(scene, rng) for scene in scenes]
    with torch.no_grad():
        english = [captions.word(each, "en", rng).text for each in asked]
        target = torch.cat(
            [clip(input_ids=part).last_hidden_state.half() for part in english_ids(english).split(256)]
        )
    banks = [cached_queries(unet, latents, target) for _ in range(2)]

    def worded(each: captions.Caption) -> str:
        chance = rng.random() if options.mixed else 1.0
        if chance < 0.35:
            return mixing.by_word(each, rng, style).text
        if chance < 0.5:
            return mixing.by_object(each, rng, style).text
        return typed(captions.word(each, "zh", rng).text, rng, wide=0.0)

    said = sentences([worded(each) for each in asked], encoder)
    objective = Iap(CrossAttention.of(unet))
    optimise, progress = optimisers([encoder, bridge], muon=0.005, adam=1e-3)
    step, running = 0, 1.0
    while (share := (time.process_time() - start) / (60 * options.minutes)) < 1:
        progress(share)
        pick = torch.randint(len(latents), (48,))
        queries = banks[step % len(banks)]
        part = Sentences(said.ids[pick], said.native[pick], said.mask[pick], said.places[pick])
        with autocast("cpu", torch.bfloat16):
            context = read(clip, encoder, bridge, part)
        loss = objective(
            [layer[pick].float() for layer in queries], context.float(), target[pick].float()
        ).total
        loss.backward()
        optimise()
        running = 0.98 * running + 0.02 * float(loss.detach())
        step += 1
        if step % 100 == 0:
            print(f"pseudo step {step} loss {running:.4f} share {share:.2f}", flush=True)
        if step % 1000 == 0:
            print(evaluate(work, unet, clip, encoder, bridge, 32), flush=True)
    record: dict[str, Any] = {"objective": "iap", "mixed": options.mixed, "steps": step, "batch": 48}
    record |= {"loss": running, "seed": options.seed, "scenes": options.scenes}
    record |= {
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        SAYS: CLIP_INPUT,
    }
    report = evaluate(work, unet, clip, encoder, bridge, 100)
    print(json.dumps({**record, "accuracy": report}), flush=True)
    name = NAMES[options.mixed]
    encoder.identity = f"{name}-zh"
    header = BridgeHeader(
        kind=bridge.kind,
        spec=dataclasses.asdict(bridge.spec),
        base="pocket",
        encoder=EncoderRef(
            encoder.family, encoder.identity, encoder.layer, encoder.window, encoder.mask_rule, ""
        ),
        languages=("zh",),
        training=record,
        licence="GPL-3.0-or-later",
        source="recipes/pocket_pseudo.py",
        name=name,
    )
    save_bridge(work / f"{name}.safetensors", header, bridge, encoder, dtype=torch.float16)
    (work / f"{name}.json").write_text(json.dumps({**record, "accuracy": report}), encoding="utf-8")


@torch.no_grad()
def cached_queries(unet: torch.nn.Module, latents: Tensor, context: Tensor) -> list[Tensor]:
    """Queries of every cross-attention over the English text, at one random timestep for each latent."""
    abar, times = alphas(), torch.randint(1000, (len(latents),))
    taken: list[list[Tensor]] = []
    for part in torch.arange(len(latents)).split(256):
        a = abar[times[part]].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents[part] + (1 - a).sqrt() * torch.randn_like(latents[part])
        with QueryTaps(unet) as taps:
            unet(noisy, times[part].float(), context=context[part].float())
        taken.append([query.half() for query in taps.queries])
    return [torch.cat(layer) for layer in zip(*taken, strict=True)]


@torch.no_grad()
def evaluate(
    work: Path, unet: torch.nn.Module, clip: Any, encoder: Encoder, bridge: Bridge, count: int
) -> dict[str, float]:
    """Attribute accuracy of prompts in Chinese, mixed by object and by word; 15 DDIM steps, guidance 2."""
    reading = judge.load(work / "pocket-judge.safetensors")
    encoder.eval()
    nothing = clip(input_ids=english_ids([""])).last_hidden_state
    report: dict[str, float] = {}
    for split in ("combinations", "templates"):
        style = captions.STYLES[split]
        for kind in ("native", "by object", "by word"):
            rng = np.random.default_rng(1234)
            asked = [captions.describe(scene, rng, style) for scene in mixing.scenes(split, count, rng)]
            if kind == "native":
                prompts = [captions.word(each, "zh", rng, style) for each in asked]
            else:
                worded = mixing.by_object if kind == "by object" else mixing.by_word
                prompts = [worded(each, rng, style) for each in asked]
            context = read(clip, encoder, bridge, sentences([each.text for each in prompts], encoder))
            latents = sample(unet, context, nothing, steps=15, guidance=2.0, seed=1)
            readings = reading.read_many(decode(work, latents))
            marks = [judge.score(r, c) for r, c in zip(readings, prompts, strict=True)]
            report[f"{kind}, {split}"] = round(judge.accuracy(marks)["attributes"], 4)
    encoder.train()
    return report


if __name__ == "__main__":
    main()
