"""Trains the LoRA of the pocket world's new concept, the judge that knows it, and a Textual Inversion word.

    bootstrap.py run recipes/pocket_lora.py --stage judge --work DIR --pictures 3000 --minutes 1.5
    bootstrap.py run recipes/pocket_lora.py --stage lora --work DIR --pictures 1500 --minutes 6
    bootstrap.py run recipes/pocket_lora.py --stage embedding --work DIR --pictures 900 --minutes 2.5

Everything stands on the shipped checkpoint (pocket/assets): its weights are frozen, its own decoder makes the
latents. The files are written to DIR.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, autocast

from language_bridge.host import pocket
from language_bridge.pocket import captions, concepts, judge
from language_bridge.pocket.autoencoder import STOCK_SCALE, TAESD_WIDTH, Autoencoder
from language_bridge.pocket.captions import Caption, Style
from language_bridge.pocket.painter import (
    COLOURS,
    NEW_SHAPES,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    paint_many,
    random_scene,
)
from language_bridge.recipes.pocket_world import alphas, english_ids, new_clip, new_unet, sample

RANK, ALPHA = 8, 8.0
FORMS: tuple[tuple[concepts.Form, float], ...] = (
    ("first", 0.4),
    ("last", 0.3),
    ("adjective", 0.15),
    ("noun", 0.15),
)
"""How often a training caption has the trigger where; tags are shuffled as kohya's shuffle_caption does."""

WIDTH = 32
"""Channels of the pocket autoencoder before it was widened with zeros."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stage", choices=["judge", "lora", "embedding"], required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "judge":
        train_judge(options.work, options.pictures, options.seed, options.minutes)
    elif options.stage == "lora":
        train_lora(options.work, options.pictures, options.seed, options.minutes)
    else:
        train_embedding(options.work, options.pictures, options.seed, options.minutes)


class Base:
    """The shipped checkpoint, frozen, in trainable classes."""

    def __init__(self) -> None:
        state = {key: value.float() for key, value in load_file(str(pocket.FILE)).items()}

        def part(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}

        self.clip: Any = new_clip()
        missing = self.clip.load_state_dict(part("cond_stage_model.transformer."), strict=False).missing_keys
        assert not [key for key in missing if "position_ids" not in key], missing
        self.unet: Any = new_unet()
        self.unet.load_state_dict(part("model.diffusion_model."))
        autoencoder = part("first_stage_model.")
        self.deviation = float(autoencoder.pop("vae_scale")) / STOCK_SCALE
        autoencoder.pop("vae_shift")
        self.autoencoder = Autoencoder(WIDTH)
        self.autoencoder.load_state_dict({key: _narrow(value) for key, value in autoencoder.items()})
        for module in (self.clip, self.unet, self.autoencoder):
            module.eval().requires_grad_(False)

    @torch.no_grad()
    def latents(self, pictures: Any) -> Tensor:
        """Normalised latents [N, 4, 8, 8] of pictures [N, 64, 64, 3]."""
        images = torch.from_numpy(pictures).movedim(-1, 1)
        return torch.cat([self.autoencoder.encode(p) for p in images.split(128)]) / self.deviation

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, 64, 64, 3] in 0..1 of normalised latents."""
        parts = [self.autoencoder.decode(part * self.deviation) for part in latents.split(128)]
        return torch.cat(parts).clamp(0, 1).movedim(1, -1)

    def states(self, sentences: Sequence[str]) -> Tensor:
        """Text rows [N, 77, 96]."""
        return self.clip(input_ids=english_ids(sentences)).last_hidden_state


def _narrow(value: Tensor) -> Tensor:
    """Undoes the widening: the channels that are not padding."""
    return value[tuple(slice(0, WIDTH if size == TAESD_WIDTH else size) for size in value.shape[:2])]


def train_judge(work: Path, count: int, seed: int, minutes: float) -> None:
    """Goes on from the shipped judge with one shape more; painted and restored pictures, with noise."""
    base = Base()
    rng = np.random.default_rng(seed + 1)
    scenes = [concepts.concept_scene(rng) if index % 3 == 0 else random_scene(rng) for index in range(count)]
    painted = torch.from_numpy(paint_many(scenes, rng)).movedim(-1, 1)
    restored = _restored(base, painted, 0.25)
    model = judge.Judge(shapes=(*SHAPES, *NEW_SHAPES))
    _grow(model, judge.load())
    kinds = torch.zeros(count, 4, dtype=torch.long)
    colours, sizes = torch.zeros_like(kinds), torch.zeros_like(kinds)
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            cell = PLACES.index(thing.place)
            kinds[index, cell] = 1 + model.shapes.index(thing.shape)
            colours[index, cell] = list(COLOURS).index(thing.colour)
            sizes[index, cell] = SIZES.index(thing.size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    start, step = time.process_time(), 0
    while (share := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (1 - share) + 1e-5
        pick = torch.randint(count, (64,))
        images = torch.where(torch.rand(64, 1, 1, 1) < 0.6, restored[pick], painted[pick])
        images = (images + torch.rand(64, 1, 1, 1) * 0.06 * torch.randn_like(images)).clamp(0, 1)
        logits = model(judge.corners_of(images))
        target = kinds[pick].view(-1)
        there = target > 0
        loss = torch.nn.functional.cross_entropy(logits[0], target)
        loss = loss + torch.nn.functional.cross_entropy(logits[1][there], colours[pick].view(-1)[there])
        loss = loss + torch.nn.functional.cross_entropy(logits[2][there], sizes[pick].view(-1)[there])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
    model.eval()
    out = work / judge.NEW_FILE.name
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, str(out))
    report: dict[str, Any] = {"steps": step, "cpu_seconds": time.process_time() - start}
    report |= test_judge(base, judge.load(out))
    print(json.dumps(report, indent=1), flush=True)


def _restored(base: Base, painted: Tensor, noise: float) -> Tensor:
    with torch.no_grad(), autocast("cpu", torch.bfloat16):
        parts = [base.autoencoder.encode(part).float() for part in painted.split(128)]
        latents = torch.cat(parts)
        latents = latents + torch.rand(len(latents), 1, 1, 1) * noise * torch.randn_like(latents)
        done = [base.autoencoder.decode(part).float().clamp(0, 1) for part in latents.split(128)]
    return torch.cat(done)


def _grow(model: judge.Judge, known: judge.Judge) -> None:
    """Takes over every weight of a judge that knows fewer shapes; the new rows begin where they are."""
    state, old = model.state_dict(), known.state_dict()
    rows = 1 + len(known.shapes)
    extra = len(model.shapes) - len(known.shapes)
    for key, value in old.items():
        if key.startswith("head."):
            state[key][:rows] = value[:rows]
            state[key][rows + extra :] = value[rows:]
        else:
            state[key] = value
    model.load_state_dict(state)


def test_judge(base: Base, model: judge.Judge, count: int = 600) -> dict[str, Any]:
    """Share of new shapes, and of all attributes, read right on fresh pictures, painted and restored."""
    rng = np.random.default_rng(77)
    scenes = [concepts.concept_scene(rng) for _ in range(count)]
    painted = torch.from_numpy(paint_many(scenes, rng)).movedim(-1, 1)
    found: dict[str, Any] = {}
    for name, pictures in (("painted", painted), ("restored", _restored(base, painted, 0.0))):
        readings = model.read_many(pictures.movedim(1, -1))
        new = [
            any(seen.shape == s.things[0].shape and seen.place == s.things[0].place for seen in r.things)
            for r, s in zip(readings, scenes, strict=True)
        ]
        marks = [judge.score(r, _whole(s)) for r, s in zip(readings, scenes, strict=True)]
        found[name] = {"new shape": float(np.mean(new)), **judge.accuracy(marks)}
    return found


def _whole(scene: Scene) -> Caption:
    wanted = tuple(captions.Wanted(t.shape, t.colour, t.size, t.place) for t in scene.things)
    return Caption("", wanted, scene.ground)


class Lora(torch.nn.Module):
    """Low-rank updates beside layers of a frozen network, named as kohya's scripts name them.

    prefix: `lora_unet` or `lora_te`; layers by path. Each is up(down(x)) * alpha / rank, added by a hook.
    """

    def __init__(self, network: torch.nn.Module, prefix: str, ops: Any = torch.nn) -> None:
        super().__init__()
        self.down, self.up = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        for path, layer in _targets(network):
            name = f"{prefix}_{path.replace('.', '_')}"
            if isinstance(layer, torch.nn.Conv2d):
                self.down[name] = ops.Conv2d(
                    layer.in_channels, RANK, layer.kernel_size, layer.stride, layer.padding, bias=False
                )
                self.up[name] = ops.Conv2d(RANK, layer.out_channels, 1, bias=False)
            else:
                assert isinstance(layer, torch.nn.Linear)
                self.down[name] = ops.Linear(layer.in_features, RANK, bias=False)
                self.up[name] = ops.Linear(RANK, layer.out_features, bias=False)
            torch.nn.init.zeros_(self.up[name].weight)
            layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def add(layer: torch.nn.Module, arguments: tuple[Any, ...], answer: Tensor) -> Tensor:
            return answer + self.up[name](self.down[name](arguments[0])) * (ALPHA / RANK)

        return add

    def tensors(self) -> dict[str, Tensor]:
        """The weights as they go into a file, fp16."""
        found: dict[str, Tensor] = {}
        for name in self.down:
            found[f"{name}.lora_down.weight"] = self.down[name].weight.detach().half().contiguous()
            found[f"{name}.lora_up.weight"] = self.up[name].weight.detach().half().contiguous()
            found[f"{name}.alpha"] = torch.tensor(ALPHA).half()
        return found


def _targets(network: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Attention, feed-forward and convolution layers; no time embedding, no first and last layer."""
    parts = ("attn", "ff.", "proj_in", "proj_out", "in_layers", "out_layers", "skip", "mlp", "op", "conv")
    for path, layer in list(network.named_modules()):
        inner = path.startswith(("input_blocks", "middle_block", "output_blocks", "text_model.encoder"))
        plain = isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
        if plain and inner and path != "input_blocks.0.0" and any(part in path for part in parts):
            yield path, layer


def training_captions(
    scenes: Sequence[Scene], rng: np.random.Generator
) -> tuple[list[str], list[concepts.Form]]:
    """One English caption for each picture of the concept, and where it has the trigger."""
    names, shares = [form for form, _ in FORMS], [share for _, share in FORMS]
    forms = [names[int(rng.choice(len(names), p=shares))] for _ in scenes]
    style = Style(words="any", patterns="any", drop=0.2)
    texts = [
        concepts.ask(captions.describe(scene, rng, style), "en", rng, form, style).text
        for scene, form in zip(scenes, forms, strict=True)
    ]
    return texts, forms


def train_lora(work: Path, count: int, seed: int, minutes: float) -> None:
    """The plain noise loss on pictures of the concept, half of each batch regularisation pictures."""
    base = Base()
    rng = np.random.default_rng(seed + 3)
    scenes = [concepts.concept_scene(rng) for _ in range(count)]
    texts, _ = training_captions(scenes, rng)
    style = Style(words="any", patterns="any", drop=0.12)
    # As kohya's regularisation pictures are of the class: without them every circle becomes the new thing.
    others = [
        concepts.concept_scene(rng, concepts.CLASS) if index % 3 else random_scene(rng)
        for index in range(count)
    ]
    plain = [captions.word(captions.describe(s, rng, style), "en", rng, style).text for s in others]
    latents = base.latents(paint_many([*scenes, *others], rng))
    ids = english_ids([*texts, *plain])
    nothing = english_ids([""])
    unet, text = Lora(base.unet, "lora_unet"), Lora(base.clip, "lora_te")
    rates = {id(unet): 5e-3, id(text): 3e-3}
    optimiser = torch.optim.AdamW(
        [{"params": list(part.parameters()), "rate": rates[id(part)]} for part in (unet, text)],
        weight_decay=0.01,
    )
    abar = alphas()
    weight_of = (1 / abar).clamp(max=10) / (1 / abar).clamp(max=10).mean()
    start, step, running, last = time.process_time(), 0, 1.0, 0.0
    half, draws = 8, 3  # each caption is read once and trained on at three noise levels
    while (share := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * min(1.0, step / 50) * (0.02 + 0.98 * (1 - share))
        pick = torch.cat([torch.randint(count, (half,)), count + torch.randint(count, (half,))])
        clean = latents[pick].repeat(draws, 1, 1, 1)
        said = torch.where(torch.rand(2 * half, 1) < 0.1, nothing, ids[pick])
        t = torch.randint(1000, (2 * half * draws,))
        noise = torch.randn_like(clean)
        a = abar[t].view(-1, 1, 1, 1)
        with autocast("cpu", torch.bfloat16):
            context = base.clip(input_ids=said).last_hidden_state.repeat(draws, 1, 1)
            guess = base.unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), context=context)
        loss = (weight_of[t] * (guess.float() - noise).square().mean((1, 2, 3))).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*unet.parameters(), *text.parameters()], 1.0)
        optimiser.step()
        running = 0.98 * running + 0.02 * float(loss.detach())
        step += 1
        used = time.process_time() - start
        if used - last > 100:
            last = used
            _save(work, unet, text, texts, step, running, used)
            print(step, f"loss {running:.4f} cpu {used:.0f}", json.dumps(test_lora(work, base)), flush=True)
    _save(work, unet, text, texts, step, running, time.process_time() - start)
    print(step, f"loss {running:.4f}", json.dumps(test_lora(work, base, 96)), flush=True)


def _save(
    work: Path, unet: Lora, text: Lora, texts: Sequence[str], step: int, loss: float, used: float
) -> None:
    tags: dict[str, int] = {}
    for caption in texts:
        for tag in (part.strip() for part in caption.split(",")):
            tags[tag] = tags.get(tag, 0) + bool(tag)
    common = dict(sorted(tags.items(), key=lambda item: -item[1])[:200])
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(ALPHA),
        "ss_network_args": json.dumps({"conv_dim": str(RANK), "conv_alpha": str(ALPHA)}),
        "ss_output_name": concepts.LORA.stem,
        "ss_num_train_images": str(len(texts)),
        "ss_num_reg_images": str(len(texts)),
        "ss_steps": str(step),
        "ss_tag_frequency": json.dumps({f"1_{concepts.TRIGGER} {concepts.CLASS}": common}),
        "modelspec.title": concepts.LORA.stem,
        "modelspec.trigger_phrase": concepts.TRIGGER,
        "language_bridge_training": json.dumps({"loss": round(loss, 4), "cpu_seconds": round(used)}),
        "licence": "GPL-3.0-or-later",
    }
    tensors = unet.tensors() | text.tensors()
    save_file(tensors, str(work / concepts.LORA.name), metadata=header)


@torch.no_grad()
def test_lora(work: Path, base: Base, count: int = 32) -> dict[str, dict[str, float]]:
    """English prompts with the trigger, the same without it, and the trigger in a window of its own."""
    rng = np.random.default_rng(11)
    scenes = [concepts.concept_scene(rng) for _ in range(count)]
    content = [captions.describe(scene, rng) for scene in scenes]
    first = [concepts.ask(c, "en", rng, "first") for c in content]
    noun = [concepts.ask(c, "en", rng, "noun") for c in content]
    plain = [concepts.ask(c, "en", rng, "adjective", trigger="") for c in content]
    path = work / judge.NEW_FILE.name
    reader = judge.load(path if path.is_file() else judge.NEW_FILE)
    empty = base.states([""])
    alone = base.states([concepts.TRIGGER]).expand(count, -1, -1)
    rows = {
        "first": base.states([c.text for c in first]),
        "noun": base.states([c.text for c in noun]),
        "without": base.states([c.text for c in plain]),
    }
    rows["own window"] = torch.cat([rows["without"], alone], 1)
    found: dict[str, dict[str, float]] = {}
    for name, context in rows.items():
        nothing = empty.repeat(1, context.shape[1] // 77, 1)
        latents = sample(base.unet, context, nothing, steps=15, guidance=2.0, seed=1)
        readings = reader.read_many(base.decode(latents))
        shares = judge.accuracy([judge.score(r, c) for r, c in zip(readings, content, strict=True)])
        drawn = np.mean([any(seen.shape == concepts.SHAPE for seen in r.things) for r in readings])
        found[name] = {"drawn": round(float(drawn), 2)} | {k: round(v, 2) for k, v in shares.items()}
    return found


class Word(torch.nn.Module):
    """A Textual Inversion word of several rows, put into the text encoder in the place of a stand-in word."""

    def __init__(self, base: Base, stand_in: str, first: str) -> None:
        super().__init__()
        table = next(m for m in base.clip.modules() if isinstance(m, torch.nn.Embedding))
        special = set(english_ids([""])[0].tolist())
        self.ids = [i for i in english_ids([stand_in])[0].tolist() if i not in special]
        start = [i for i in english_ids([first])[0].tolist() if i not in special][0]
        self.rows = torch.nn.Parameter(table.weight[start].detach().repeat(len(self.ids), 1))
        table.register_forward_hook(self._put_in)

    def _put_in(self, table: torch.nn.Module, arguments: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        if answer.shape[-1] == self.rows.shape[1] and arguments[0].dtype == torch.long:
            for row, token in zip(self.rows, self.ids, strict=True):
                answer = torch.where((arguments[0] == token)[..., None], row, answer)
        return answer


def train_embedding(work: Path, count: int, seed: int, minutes: float) -> None:
    """The plain noise loss; nothing learns but the rows of the word."""
    base = Base()
    word = Word(base, concepts.TRIGGER, "dot")
    rng = np.random.default_rng(seed + 5)
    scenes: list[Scene] = []
    texts: list[str] = []
    for index in range(count):
        scene = concepts.sign_scene(rng)
        alone = index % 3 == 0  # pictures of the sign alone, named alone or with their ground
        scenes.append(Scene(scene.things[1:], scene.ground) if alone else scene)
        texts.append(concepts.TRIGGER if alone else concepts.ask_sign(scene, rng, concepts.TRIGGER).text)
    latents, ids = base.latents(paint_many(scenes, rng)), english_ids(texts)
    optimiser = torch.optim.AdamW(word.parameters(), lr=1e-2, weight_decay=0.0)
    abar = alphas()
    weight_of = (1 / abar).clamp(max=10) / (1 / abar).clamp(max=10).mean()
    start, step, running, draws = time.process_time(), 0, 1.0, 3
    while (share := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (0.02 + 0.98 * (1 - share))
        pick = torch.randint(count, (12,))
        clean = latents[pick].repeat(draws, 1, 1, 1)
        t = torch.randint(1000, (len(clean),))
        noise = torch.randn_like(clean)
        a = abar[t].view(-1, 1, 1, 1)
        with autocast("cpu", torch.bfloat16):
            context = base.clip(input_ids=ids[pick]).last_hidden_state.repeat(draws, 1, 1)
            guess = base.unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), context=context)
        loss = (weight_of[t] * (guess.float() - noise).square().mean((1, 2, 3))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        running = 0.98 * running + 0.02 * float(loss.detach())
        step += 1
    header = {
        "language_bridge_training": json.dumps({"steps": step, "loss": round(running, 4)}),
        "licence": "GPL-3.0-or-later",
    }
    rows = {"emb_params": word.rows.detach().half().contiguous()}
    save_file(rows, str(work / concepts.EMBEDDING.name), metadata=header)
    print(step, f"loss {running:.4f}", json.dumps(test_embedding(base)), flush=True)


@torch.no_grad()
def test_embedding(base: Base, count: int = 48) -> dict[str, float]:
    """English prompts with the word: attributes of both things."""
    rng = np.random.default_rng(12)
    asked = [concepts.ask_sign(concepts.sign_scene(rng), rng, concepts.TRIGGER) for _ in range(count)]
    context = base.states([c.text for c in asked])
    latents = sample(base.unet, context, base.states([""]), steps=15, guidance=2.0, seed=1)
    readings = judge.load().read_many(base.decode(latents))
    return judge.accuracy([judge.score(r, c) for r, c in zip(readings, asked, strict=True)])


if __name__ == "__main__":
    main()
