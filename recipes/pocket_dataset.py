"""Writes the pocket world as a user's training data: pictures with captions, and a file of sentence pairs.

`bootstrap.py run recipes/pocket_dataset.py --out DIR --count N --seed S` makes DIR/pictures (PNG files and
captions.jsonl) and DIR/pairs.tsv. As in the other recipes, no held-out colour and shape pair, no held-out
word and no held-out sentence pattern is among them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from language_bridge.pocket import captions
from language_bridge.pocket.painter import paint, random_scene
from language_bridge.recipes.pocket_world import typed

PICTURES, CAPTIONS, PAIRS = "pictures", "captions.jsonl", "pairs.tsv"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.out, options.count, options.seed)
    print(json.dumps({"pictures": options.count, "seed": options.seed}))


def write(out: Path, count: int, seed: int) -> None:
    """Write `count` pictures with captions, and `count` sentence pairs of other scenes (fewer where two fall
    alike); the same arguments give the same files.
    """
    rng = np.random.default_rng([seed, 60])
    folder = out / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / CAPTIONS, "w", encoding="utf-8", newline="\n") as file:
        for number in range(count):
            scene = random_scene(rng, held_out=False)
            name = f"{number:06}.png"
            pixels = np.rint(paint(scene, rng) * 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name, compress_level=1)
            native, english = _pair(scene, rng)
            row = {"image": name, "native": native, "english": english}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    pairs = dict.fromkeys(_pair(random_scene(rng, held_out=False), rng) for _ in range(count))
    with open(out / PAIRS, "w", encoding="utf-8", newline="\n") as file:
        file.write("english\tnative\n")
        file.writelines(f"{english}\t{native}\n" for native, english in pairs)


def _pair(scene: captions.Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A Chinese sentence, as people type it, and the same in English."""
    said = captions.parallel(scene, rng)
    return typed(said["zh"].text, rng, wide=0.0), said["en"].text


if __name__ == "__main__":
    main()
