"""Measures the pocket world: English ceiling, Chinese floor and every shipped bridge, sampled by the host's
own KSampler.

`bootstrap.py run benchmarks/pocket.py [--json] [--count N] [--seed N]`. Captions are drawn from the grammar
with a fixed seed; no caption of the splits `combinations`, `templates` and `synonyms` can have been in a
bridge's training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from language_bridge.pocket import captions, judge
from language_bridge.pocket.captions import Caption
from language_bridge.pocket.painter import Scene, random_scene

STEPS, GUIDANCE, SAMPLER, SCHEDULER = 15, 2.0, "ddim", "ddim_uniform"
HEADLINE = ("combinations", "templates")
"""The splits whose attribute accuracy makes `ceiling`, `floor` and `bridges`."""


@dataclass(frozen=True)
class Asked:
    """One test: the same content in English, Chinese, and mixed (last object in English)."""

    english: Caption
    chinese: Caption
    mixed: str
    seed: int


def tests(split: str, count: int, seed: int) -> list[Asked]:
    """Captions of one split; `combinations` has only held-out pairs of colour and shape, the others any
    scene.
    """
    rng = np.random.default_rng([seed, captions.SPLITS.index(split)])
    style = captions.STYLES[split]
    found: list[Asked] = []
    for index in range(count):
        scene: Scene = random_scene(rng, held_out=split == "combinations")
        both = captions.parallel(scene, rng, style)
        found.append(Asked(both["en"], both["zh"], _mixed(both["zh"], rng), seed * 100000 + index))
    return found


def _mixed(chinese: Caption, rng: np.random.Generator) -> str:
    """The first object and the ground in Chinese, a second object in English."""
    if len(chinese.wanted) == 1:
        return chinese.text
    first = captions.word(Caption("", chinese.wanted[:1], chinese.ground), "zh", rng)
    second = captions.word(Caption("", chinese.wanted[1:], None), "en", rng)
    return f"{first.text}, {second.text}"


def _native_rows(extra: Mapping[str, Any]) -> int:
    """How many rows of a conditioning a bridge with a U-Net part reads with its own weights."""
    from language_bridge.host.rows import MARK

    return int(extra.get(MARK, {}).get("rows", 0))


def _together(extras: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of a batch of prompts: the first one's, and for a branch the native text of each."""
    from language_bridge.host.branch_text import MARK

    facts = dict(extras[0])
    for branch, first in (facts.get(MARK) or {}).items():
        rows = torch.stack([extra[MARK][branch]["rows"] for extra in extras])
        facts[MARK] = {**facts[MARK], branch: {**first, "rows": rows}}
    return facts


def _native_chunks(extra: Mapping[str, Any]) -> tuple[int, ...]:
    """How many chunks of native text each branch hears of a prompt."""
    from language_bridge.host.branch_text import MARK

    return tuple(len(text["rows"]) for text in (extra.get(MARK) or {}).values())


class Painter:
    """The pocket checkpoint and, if they are wanted, the shipped bridges, in the host's own classes."""

    def __init__(self, shipped: bool = True) -> None:
        from comfy.cli_args import args

        args.cpu = args.cpu or not torch.cuda.is_available()
        import logging

        import folder_paths

        import nodes

        logging.getLogger().setLevel(logging.WARNING)
        from language_bridge.host import folders
        from language_bridge.host.bridging import bridge
        from language_bridge.host.pocket import load_pocket

        del folder_paths
        folders.register()
        self.sample = nodes.common_ksampler
        self.model, self.clip, self.vae = load_pocket()
        self.judge = judge.load()
        self.bridged: dict[str, tuple[Any, Any]] = {}
        for name in folders.bridge_names() if shipped else ():
            if folders.bridge_header(folders.bridge_path(name)).base == "pocket":
                short = name.removesuffix(".safetensors")
                self.bridged[short] = bridge(self.model, self.clip, name, 1.0, "two streams")

    @torch.inference_mode()
    def paint(self, model: Any, clip: Any, prompts: list[str], seed: int) -> torch.Tensor:
        """Pictures [N, 64, 64, 3]; prompts of one context length share a batch; CFG against the empty one."""
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in prompts]
        empty, negative_extra = clip.encode_from_tokens_scheduled(clip.tokenize(""))[0]
        pictures: list[torch.Tensor | None] = [None] * len(prompts)
        shapes = [(int(text.shape[1]), _native_rows(extra), _native_chunks(extra)) for text, extra in encoded]
        for shape in sorted(set(shapes)):
            where = [i for i, one in enumerate(shapes) if one == shape]
            for start in range(0, len(where), 50):
                part = where[start : start + 50]
                # One dict for the batch: the same number of rows is native in each of its prompts.
                rows = torch.cat([encoded[i][0] for i in part])
                positive = [[rows, _together([encoded[i][1] for i in part])]]
                negative = [[empty.expand(len(part), -1, -1), negative_extra]]
                latent = {"samples": torch.zeros(len(part), 4, 8, 8)}
                out = self.sample(
                    model, seed + start, STEPS, GUIDANCE, SAMPLER, SCHEDULER, positive, negative, latent
                )
                for i, picture in zip(part, self.vae.decode(out[0]["samples"]), strict=True):
                    pictures[i] = picture
        return torch.stack([picture for picture in pictures if picture is not None])

    def score(self, model: Any, clip: Any, asked: list[tuple[str, Caption]], seed: int) -> dict[str, float]:
        """Shares of right attributes over prompts with what they ask for."""
        readings = self.judge.read_many(self.paint(model, clip, [text for text, _ in asked], seed))
        return judge.accuracy([judge.score(r, c) for r, (_, c) in zip(readings, asked, strict=True)])


def measure(count: int, seed: int) -> dict[str, Any]:
    """Every row on every split."""
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    painter = Painter()
    table: dict[str, dict[str, dict[str, float]]] = {}
    start = time.process_time()
    for split in captions.SPLITS:
        asked = tests(split, count, seed)
        rows: dict[str, tuple[Any, Any, list[tuple[str, Caption]]]] = {
            "english": (painter.model, painter.clip, [(a.english.text, a.english) for a in asked]),
            "chinese, stock CLIP": (
                painter.model,
                painter.clip,
                [(a.chinese.text, a.chinese) for a in asked],
            ),
        }
        for name, (model, clip) in painter.bridged.items():
            rows[name] = (model, clip, [(a.chinese.text, a.chinese) for a in asked])
            rows[f"{name}, mixed"] = (model, clip, [(a.mixed, a.chinese) for a in asked])
        for name, (model, clip, wanted) in rows.items():
            table.setdefault(name, {})[split] = painter.score(model, clip, wanted, seed)
            print(f"{split:14} {name:28} {table[name][split]['attributes']:.3f}", file=sys.stderr, flush=True)

    def headline(name: str) -> float:
        return float(np.mean([table[name][split]["attributes"] for split in HEADLINE]))

    names = list(painter.bridged)
    return {
        "ceiling": headline("english"),
        "floor": headline("chinese, stock CLIP"),
        "bridges": {name: headline(name) for name in names},
        "share": {name: headline(name) / headline("english") for name in names},
        "n": count * len(HEADLINE),
        "seed": seed,
        "cpu_seconds": round(time.process_time() - start, 1),
        "table": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--count", type=int, default=100, help="prompts in each split; two splits make the headline"
    )
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args()
    found = measure(options.count, options.seed)
    if options.json:
        print(json.dumps(found))
        return
    columns = ["attributes", "exact", *judge.ATTRIBUTES]
    for split in captions.SPLITS:
        print(f"\n{split} (n = {options.count})")
        print(f"{'':30}" + "".join(f"{name:>11}" for name in columns))
        for name, by_split in found["table"].items():
            shares = by_split[split]
            print(
                f"{name:30}"
                + "".join(f"{100 * shares.get(column, float('nan')):11.1f}" for column in columns)
            )
    print(f"\nheadline, mean of {' and '.join(HEADLINE)}, n = {found['n']}, seed {found['seed']}")
    print(f"  English ceiling            {100 * found['ceiling']:.1f}")
    print(f"  Chinese on the stock CLIP  {100 * found['floor']:.1f}")
    for name, share in found["bridges"].items():
        print(f"  {name:26} {100 * share:.1f}   ({100 * found['share'][name]:.1f} % of the ceiling)")
    print(f"  measured in {found['cpu_seconds']} CPU seconds")


if __name__ == "__main__":
    main()
