"""Painted scenes of the pocket world with their captions, as a dataset to try training with."""

from __future__ import annotations

import numpy as np
import torch

from ..pocket import captions
from ..pocket.painter import paint_many, random_scene
from ..training.dataset import Dataset, Example


def scenes(count: int, seed: int) -> Dataset:
    """So many pictures with a Chinese and an English caption each; the same seed gives the same ones.

    Colours and shapes that belong together only in the tests, and words and sentences of the tests, do not
    occur.
    """
    random = np.random.default_rng(seed)
    drawn = [random_scene(random, held_out=False) for _ in range(count)]
    pictures = paint_many(drawn, random)
    examples: list[Example] = []
    with torch.inference_mode(False):
        for number, (scene, picture) in enumerate(zip(drawn, pictures, strict=True), start=1):
            both = captions.parallel(scene, random)
            pixels = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32))
            examples.append(Example(both["zh"].text, both["en"].text, pixels, f"scene {number}"))
    return Dataset("pocket scenes", tuple(examples), (), "zh")
