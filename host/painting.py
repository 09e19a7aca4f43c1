"""Pictures of a bridge in training: a plain sampler through the training's own U-Net, and the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bridges.base import TIMESTEPS, Cond
from ..training.backbone import Backbone
from ..training.chance import Draw, generator
from ..training.methods import Student
from ..training.source import Batch

_AT_ONCE = 16


@torch.no_grad()
def paint(
    student: Student,
    backbone: Backbone,
    batch: Batch,
    empty: Batch,
    shape: tuple[int, int, int],
    *,
    sizes: Tensor | None = None,
    steps: int,
    guidance: float,
    seed: int,
    poll: Callable[[], None],
) -> Tensor:
    """Latents [B, 4, h, w] for the captions of a batch: DDIM (arXiv 2010.02502) with guidance against the
    empty prompt.

    shape: of one latent; sizes [1, S]: what SDXL's U-Net reads of the picture's size. The start is drawn from
    the seed alone, on the CPU.
    """
    rows = batch.ids if batch.ids is not None else None if batch.hidden is None else batch.hidden.states
    assert rows is not None
    count, device = len(rows), rows.device
    x = torch.randn((count, *shape), generator=generator(seed, "paint")).to(device)
    times = torch.linspace(TIMESTEPS - 1, 0, steps + 1).round().long()[:-1]
    abar = backbone.abar.to(device)
    said: Cond | None = None
    for place, time in enumerate(times.tolist()):
        poll()
        if said is None or student.bridge.timed:
            said = _speak(student, batch, empty, count, time)
        twice = torch.full((2 * count,), time, device=device)
        answer = backbone(
            torch.cat([x, x]),
            twice,
            context=said.context,
            pooled=said.pooled,
            sizes=None if sizes is None else sizes.to(device).expand(2 * count, -1),
        ).float()
        yes, no = answer.chunk(2)
        clean, noise = backbone.clean(x, no + guidance * (yes - no), twice[:count])
        later = abar[times[place + 1]] if place + 1 < len(times) else abar.new_ones(())
        x = later.sqrt() * clean + (1 - later).sqrt() * noise
    return x


def _speak(student: Student, batch: Batch, empty: Batch, count: int, time: int) -> Cond:
    """What the bridge says of captions and, behind them, as often of the empty prompt, at one timestep."""
    halves: list[Cond] = []
    for each, number in ((batch, count), (empty, 1)):
        rows = each.ids if each.ids is not None else None if each.hidden is None else each.hidden.states
        assert rows is not None
        device = rows.device
        timestep = torch.full((number,), time, device=device)
        draw = Draw(tuple(range(number)), timestep, torch.zeros(number, dtype=torch.bool, device=device))
        said = student.speak(each, empty, draw)
        pooled = each.english_pooled if said.pooled is None else said.pooled
        pooled = None if pooled is None else pooled.float().expand(count, -1)
        halves.append(Cond(said.context.float().expand(count, -1, -1), pooled))
    (native, nothing), pooled = halves, None
    if native.pooled is not None and nothing.pooled is not None:
        pooled = torch.cat([native.pooled, nothing.pooled])
    return Cond(torch.cat([native.context, nothing.context]), pooled)


def decoded(model: Any, vae: Any, latents: Tensor) -> Tensor:
    """Pictures [B, H, W, 3] in 0..1 of latents as the U-Net has them."""
    with torch.inference_mode():
        pictures: Tensor = vae.decode(
            model.get_model_object("latent_format").process_out(latents.float().cpu())
        )
    with torch.inference_mode(False):
        return pictures.detach().clone().float().cpu().clamp(0, 1)


def accuracy(painted: Callable[[Sequence[str]], Tensor], count: int) -> dict[str, float]:
    """Share of attributes that the pocket judge sees right, for each sort of held-out caption.

    painted: pictures [B, H, W, 3] of native captions; count: captions of each sort. The captions are the same
    at every call, and those of the recipes.
    """
    import numpy as np

    from ..pocket import captions, judge
    from ..pocket.painter import random_scene

    reading = judge.load()
    report: dict[str, float] = {}
    for split, style in captions.STYLES.items():
        random = np.random.default_rng(1234)
        scenes = [random_scene(random, held_out=split == "combinations") for _ in range(count)]
        asked = [
            captions.word(captions.describe(scene, random, style), "zh", random, style) for scene in scenes
        ]
        marks: list[Any] = []
        for start in range(0, count, _AT_ONCE):
            part = asked[start : start + _AT_ONCE]
            seen = reading.read_many(painted([caption.text for caption in part]))
            marks += [judge.score(each, caption) for each, caption in zip(seen, part, strict=True)]
        report[split] = round(judge.accuracy(marks)["attributes"], 4)
    return report
