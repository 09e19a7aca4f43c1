"""Measures ways to join the native and the English stream of a prompt, on the pocket world.

`bootstrap.py run benchmarks/streams.py [--json] [--samples N] [--seed N] [--bridge NAME]`. Rows: English,
Chinese, mixed by object, mixed by word, and a Chinese prompt with the trigger of a LoRA. Columns: what the
pack ships ("rows appended" and "shared window" over the bridge, "inside the CLIP" over `pocket-pseudo`), and
experiments that it does not ship. Captions are drawn from the grammar with a fixed seed, half of them of the
split `combinations`, half of `templates`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from language_bridge.benchmarks import mixing, triggers
from language_bridge.benchmarks.pocket import GUIDANCE, HEADLINE, SAMPLER, SCHEDULER, Painter
from language_bridge.pocket import captions
from language_bridge.pocket.captions import Caption, Wanted
from language_bridge.pocket.painter import COLOURS, PLACES, SHAPES, SIZES

ROWS = ("english", "native", "by object", "by word")
BLENDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STOCK = "stock CLIP"
INSIDE = "pocket-pseudo"
"""The bridge that says input embeddings of the CLIP."""
WINDOW = 77
ROUNDS, TIMED_STEPS = 9, 4


@dataclass(frozen=True)
class Column:
    """One way to join: over which bridge, and what it makes of that bridge's MODEL and CLIP."""

    name: str
    bridge: str
    model: Callable[[Any], Any]
    clip: Callable[[Any], Any]
    ships: bool = True


def prompts(row: str, count: int, seed: int) -> list[Caption]:
    """Half of them of each split of the headline."""
    found: list[Caption] = []
    for split in HEADLINE:
        style = captions.STYLES[split]
        rng = np.random.default_rng([seed, captions.SPLITS.index(split), ROWS.index(row)])
        for scene in mixing.scenes(split, count // 2, rng, pairs=row == "by object"):
            asked = captions.describe(scene, rng, style)
            if row == "by object":
                found.append(mixing.by_object(asked, rng, style))
            elif row == "by word":
                found.append(mixing.by_word(asked, rng, style))
            else:
                found.append(captions.word(asked, "en" if row == "english" else "zh", rng, style))
    return found


def attention_mixed(model: Any) -> Any:
    """Decoupled cross-attention: half of the answer of the native rows and half of that of the English ones.

    For prompts of one window in each stream, [native 77 ; English 77]; a shorter prompt, which the host
    repeats to the same length, reads the same twice, so half and half is what it always was.
    """
    from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention

    def mix(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        heads = int(options["n_heads"])
        if k.shape[1] != 2 * WINDOW:
            return optimized_attention(q, k, v, heads)
        native = optimized_attention(q, k[:, :WINDOW], v[:, :WINDOW], heads)
        return 0.5 * native + 0.5 * optimized_attention(q, k[:, WINDOW:], v[:, WINDOW:], heads)

    clone, unet = model.clone(), model.model.diffusion_model
    for name, blocks in (("input", unet.input_blocks), ("output", unet.output_blocks)):
        for number, block in enumerate(blocks):
            if any(isinstance(part, SpatialTransformer) for part in block):
                clone.set_model_attn2_replace(mix, name, number)
    clone.set_model_attn2_replace(mix, "middle", 0)
    return clone


def columns(bridge: str) -> list[Column]:
    """What is compared; the first is the default of the pack."""
    from language_bridge.host.joining import JOINS, Joining

    def own(value: Any) -> Any:
        return value

    def joined(join: str) -> Column:
        return Column(join, bridge, own, lambda clip: clip.with_speech(joining=Joining(join)))

    default = Joining().join
    return [
        *(joined(join) for join in sorted(JOINS, key=lambda join: join != default)),
        Column("inside the CLIP", INSIDE, own, own),
        Column("attention mixed", bridge, attention_mixed, own, ships=False),
    ]


def same(one: Any, other: Any, texts: Sequence[str]) -> bool:
    """Whether two CLIPs give bit-identical rows for every text."""
    with torch.inference_mode():
        return all(
            torch.equal(
                *(clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0] for clip in (one, other))
            )
            for text in texts
        )


def step_seconds(painter: Painter, model: Any, positive: Tensor, negative: Tensor) -> float:
    """CPU seconds of sampling some steps with CFG, a batch of 8."""
    latent = {"samples": torch.zeros(8, 4, 8, 8)}
    conditioning = [[[rows.expand(8, -1, -1), {}]] for rows in (positive, negative)]
    start = time.process_time()
    painter.sample(model, 1, TIMED_STEPS, GUIDANCE, SAMPLER, SCHEDULER, *conditioning, latent)
    return time.process_time() - start


@torch.inference_mode()
def step_cost(painter: Painter, model: Any, clip: Any, text: str) -> tuple[float, int]:
    """Time of a step over that of one with stock rows of the same length, median of rounds; that length."""

    def rows(source: Any, prompt: str) -> Tensor:
        return source.encode_from_tokens_scheduled(source.tokenize(prompt))[0][0]

    mixed, negative = rows(clip, text), rows(clip, "")
    stock = rows(painter.clip, "a red circle ").repeat(1, mixed.shape[1] // WINDOW, 1)
    empty = rows(painter.clip, "")
    pairs = [
        (
            step_seconds(painter, model, mixed, negative),
            step_seconds(painter, painter.model, stock, empty),
        )
        for _ in range(ROUNDS)
    ]
    return statistics.median(ours / theirs for ours, theirs in pairs), int(mixed.shape[1])


def disagreeing(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Prompts that say one object twice, in Chinese with one colour and in English with another, as (prompt,
    Chinese colour, English colour).
    """
    rng = np.random.default_rng([seed, 77])
    style = captions.STYLES["seen"]
    found: list[tuple[str, str, str]] = []
    for _ in range(count):
        first, second = (str(colour) for colour in rng.permutation(list(COLOURS))[:2])
        shape, place, size = (str(rng.choice(values)) for values in (SHAPES, PLACES, SIZES))
        texts = [
            captions.word(Caption("", (Wanted(shape, colour, size, place),), None), language, rng, style).text
            for language, colour in (("zh", first), ("en", second))
        ]
        found.append((", ".join(texts), first, second))
    return found


def blend_curve(
    painter: Painter, model: Any, clip: Any, join: str, count: int, seed: int
) -> list[dict[str, float]]:
    """For each blend: share of pictures with the Chinese colour, with the English one, with one object."""
    from language_bridge.host.joining import JOINS, Joining

    asked = disagreeing(count, seed)
    curve: list[dict[str, float]] = []
    for blend in BLENDS:
        joining = Joining(join if join in JOINS else JOINS[0], blend)
        pictures = painter.paint(
            model, clip.with_speech(joining=joining), [text for text, _, _ in asked], seed
        )
        readings = painter.judge.read_many(pictures)
        seen = [{thing.colour for thing in reading.things} for reading in readings]
        curve.append(
            {
                "blend": blend,
                "native": float(np.mean([a in each for each, (_, a, _) in zip(seen, asked, strict=True)])),
                "english": float(np.mean([b in each for each, (_, _, b) in zip(seen, asked, strict=True)])),
                "one object": float(np.mean([len(reading.things) == 1 for reading in readings])),
            }
        )
    return curve


def measure(count: int, seed: int, bridge: str) -> dict[str, Any]:
    """The whole table."""
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    painter = Painter()
    start = time.process_time()
    table: dict[str, dict[str, dict[str, float]]] = {}
    costs: dict[str, dict[str, float]] = {}
    ways = columns(bridge)
    default = ways[0]

    def note(row: str, column: str, shares: dict[str, float]) -> None:
        table.setdefault(row, {})[column] = shares
        line = "  ".join(f"{name} {100 * share:.1f}" for name, share in shares.items())
        print(f"{row:10} {column:18} {line}", file=sys.stderr, flush=True)

    asked_of = {row: [(each.text, each) for each in prompts(row, count, seed)] for row in ROWS}
    note("english", STOCK, painter.score(painter.model, painter.clip, asked_of["english"], seed))
    ceiling = table["english"][STOCK]["attributes"]
    for row, asked in asked_of.items():
        texts = [text for text, _ in asked]
        for way in ways:
            model, clip = painter.bridged[way.bridge]
            painting, joined = way.model(model), way.clip(clip)
            # A prompt in one language is the same rows whatever the join; checked, and not sampled again.
            if row == "english" and same(joined, painter.clip, texts):
                note(row, way.name, table[row][STOCK])
            elif row == "native" and way.bridge == bridge and default.name in table.get(row, {}):
                if not same(joined, default.clip(clip), texts):
                    raise SystemExit(f"{way.name} changes prompts in one language")
                note(row, way.name, table[row][default.name])
            else:
                note(row, way.name, painter.score(painting, joined, asked, seed))
            if row == "by object":
                cost, length = step_cost(painter, painting, joined, texts[0])
                costs[way.name] = {"ratio": round(cost, 3), "rows": length}

    wanted = triggers.tests(count, seed)
    stock = triggers.with_lora(painter.model, painter.clip)
    english = painter.paint(*stock, [each.english for each in wanted], seed)
    note("trigger", STOCK, triggers.score(english, wanted))
    for way in ways:
        model, clip = triggers.with_lora(*painter.bridged[way.bridge])
        pictures = painter.paint(way.model(model), way.clip(clip), [each.chinese for each in wanted], seed)
        note("trigger", way.name, triggers.score(pictures, wanted))
    best = table["trigger"][STOCK]
    shares = {
        way.name: {
            **{row: table[row][way.name]["attributes"] / ceiling for row in ROWS},
            **{each: table["trigger"][way.name][each] / best[each] for each in ("drawn", "kept")},
        }
        for way in ways
    }
    mixed = {name: (each["by object"] + each["by word"]) / 2 for name, each in shares.items()}
    triggered = {name: min(each["drawn"], each["kept"]) for name, each in shares.items()}
    winner = max((way.name for way in ways if way.ships), key=lambda name: mixed[name])
    curves = {
        way.name: blend_curve(painter, *painter.bridged[way.bridge], way.name, max(count // 4, 8), seed)
        for way in ways
        if way.ships
    }
    return {
        "winner": winner,
        "mixed_share": mixed[winner],
        "trigger_share": triggered[winner],
        "step_cost": costs[winner]["ratio"],
        "default": default.name,
        "default_mixed_share": mixed[default.name],
        "default_trigger_share": triggered[default.name],
        "default_step_cost": costs[default.name]["ratio"],
        "ceiling": ceiling,
        "shares": shares,
        "costs": costs,
        "blend": curves,
        "n": count // 2 * 2,
        "seed": seed,
        "bridge": bridge,
        "cpu_seconds": round(time.process_time() - start, 1),
        "table": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--samples", type=int, default=200, help="prompts in each row")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--bridge", default="pocket-iap")
    options = parser.parse_args()
    found = measure(options.samples, options.seed, options.bridge)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"\nshare of the English ceiling ({100 * found['ceiling']:.1f}), "
        f"n = {found['n']}, seed {found['seed']}"
    )
    names = [*ROWS, "drawn", "kept"]
    print(f"{'':20}" + "".join(f"{name:>11}" for name in names) + f"{'step':>8}{'rows':>6}")
    for column, shares in found["shares"].items():
        cost = found["costs"][column]
        cells = "".join(f"{100 * shares[name]:11.1f}" for name in names)
        print(f"{column:20}{cells}{cost['ratio']:8.2f}{cost['rows']:6}")
    for column, curve in found["blend"].items():
        print(f"\nblend, {column}: share of pictures with the Chinese colour, the English colour, one object")
        for point in curve:
            print("  " + "  ".join(f"{name} {value:.2f}" for name, value in point.items()))
    print(f"measured in {found['cpu_seconds']} CPU seconds")


if __name__ == "__main__":
    main()
