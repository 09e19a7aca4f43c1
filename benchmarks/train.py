"""What training costs here, beside the same training as PEA-Diffusion's authors have built theirs.

    python bootstrap.py run benchmarks/train.py [--json] [--rounds N] [--size PIXELS] [--batch N] [--small]

Keys, each from one run in which the sides take turns:
pea_speedup         samples per second here, over those of the plain training; here latents, texts and what
                    the U-Net says under English text are remembered (fixed draws, from the second epoch on)
pea_speedup_fresh   the same with new noise at every step, so that only latents and texts are remembered
pea_memory          most bytes of tensors held in a step here, weights included, over those of the plain one
loss_apart          largest difference of the losses of both sides over the steps, relative to the loss
node_overhead       CPU time of a step inside the node, over that of a bare loop of the same step, less one

The plain side is the authors' structure (arXiv 2311.17086, released code): two U-Nets with the same weights,
the picture through the VAE and both captions through their towers at every step, hooks on the level ends.
Sizes are those of SD1.5, CLIP-L, BERT-base and the published SD1.5 bridge; all weights are random. `--small`
takes a thin U-Net, where the towers weigh more. Ratios are medians over the rounds of CPU time over CPU time,
on CUDA of wall time; both sides compute in float32, and see the same pictures, captions, noise and drops.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from language_bridge.benchmarks.branch import SD15, Held
from language_bridge.benchmarks.encode import ratios
from language_bridge.bridges.base import Hidden, create
from language_bridge.training.backbone import Backbone
from language_bridge.training.bank import Bank
from language_bridge.training.chance import Chance, Draw
from language_bridge.training.methods import PeaMethod, Student
from language_bridge.training.order import Order
from language_bridge.training.settings import Settings
from language_bridge.training.source import Batch
from language_bridge.training.taps import level_ends
from language_bridge.training.trainer import Trainer

TARGETS = {"pea_speedup": 1.5, "pea_memory": 0.65, "loss_apart": 1e-4, "node_overhead": 0.03}
CAPTIONS = [
    ("\u7ea2\u8272\u7684\u732b", "a red cat"),
    ("\u84dd\u8272\u7684\u72d7\u5728\u8349\u5730\u4e0a", "a blue dog on the grass"),
    ("\u6c34\u58a8\u5c71\u6c34", "mountains in ink"),
    ("\u96ea\u591c\u7684\u5bab\u6bbf", "a palace on a snowy night"),
]


class World:
    """Frozen models of SD1.5's sizes, four pictures with captions, and a bridge to learn."""

    def __init__(self, size: int, small: bool) -> None:
        import comfy.ops
        from comfy.ldm.models.autoencoder import AutoencoderKL

        from language_bridge.host.backbone import FrozenUNet
        from language_bridge.tests.fixtures import checkpoints

        torch.manual_seed(0)
        family = checkpoints.FAMILIES["sd1"]
        config = family.unet if small else {**family.unet, **SD15}
        self.unet = FrozenUNet(**config, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        _start(self.unet)
        channels = {"ch": 32 if small else 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
        shape = {"in_channels": 3, "out_ch": 3, "resolution": 256, "attn_resolutions": [], "dropout": 0.0}
        self.vae = AutoencoderKL(
            embed_dim=4, ddconfig={"double_z": True, "z_channels": 4, **shape, **channels}
        ).eval()
        _start(self.vae)
        self.clip, self.tower = _clip(), _tower()
        self.pictures = torch.rand(4, 3, size, size) * 2 - 1
        self.native = self.tower.batch([each for each, _ in CAPTIONS] + [""])
        self.english = torch.randint(1000, 40000, (5, 77))
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.abar = torch.cumprod(1 - betas, 0).float()

    def bridge(self) -> Any:
        """The published bridge of SD1.5, freshly started, always with the same numbers."""
        made = create("mlp", {"hidden": self.tower.width, "context": 768, "width": 1024, "depth": 5})
        made.reset_parameters(torch.Generator().manual_seed(1))
        return made

    @torch.no_grad()
    def latents(self, numbers: list[int]) -> Tensor:
        """Pictures through the VAE."""
        return self.vae.encode(self.pictures[numbers]) * 0.18215

    @torch.no_grad()
    def rows(self, numbers: list[int]) -> Tensor:
        """English captions through CLIP-L."""
        return self.clip(input_ids=self.english[numbers]).last_hidden_state

    @torch.no_grad()
    def hidden(self, numbers: list[int]) -> Hidden:
        """Native captions through the tower."""
        return self.tower(self.native[0][numbers], self.native[1][numbers])


class Kept:
    """The pictures and captions as banks give them, for the trainer."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        numbers = [0, 1, 2, 3, 4]
        self.banks: dict[str, Bank] = {}
        self.facts: dict[str, Tensor] = {}
        hidden = world.hidden(numbers)
        self.mask = hidden.mask
        for name, values in (
            ("latents", world.latents(numbers[:4])),
            ("english", world.rows(numbers)),
            ("native", hidden.states),
        ):
            bank = Bank(folder, name, values.shape[1:], torch.float32)
            bank.put([self.key(number) for number in range(len(values))], values)
            self.banks[name] = bank
        self.taught: Bank | None = None

    @property
    def groups(self) -> list[list[int]]:
        return [[0, 1, 2, 3]]

    held_out: tuple[()] = ()

    def shape(self, number: int) -> tuple[int, ...]:
        side = self.world.pictures.shape[-1] // 8
        return 4, side, side

    def key(self, number: int) -> str:
        return hashlib.sha256(str(number).encode()).hexdigest()

    def memory(self, length: int) -> Bank:
        if self.taught is None:
            self.taught = Bank(self.folder, "taught", (length,), torch.float16)
        return self.taught

    def batch(self, draw: Draw) -> Batch:
        keys = [self.key(number) for number in draw.numbers]
        hidden = Hidden(self.banks["native"].get(keys), self.mask[list(draw.numbers)])
        return Batch(self.banks["latents"].get(keys), self.banks["english"].get(keys), None, hidden)

    def empty(self) -> Batch:
        key = [self.key(4)]
        hidden = Hidden(self.banks["native"].get(key), self.mask[4:])
        return Batch(english=self.banks["english"].get(key), hidden=hidden)


class Plain:
    """The authors' structure: everything computed at every step."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world = world
        self.teacher, self.student = world.unet, copy.deepcopy(world.unet)
        self.bridge = world.bridge()
        self.optimiser = torch.optim.AdamW(
            self.bridge.parameters(), lr=settings.learning_rate, weight_decay=0.0
        )
        self.order, self.chance = Order([[0, 1, 2, 3]], settings.effective, settings.seed), Chance(settings)
        self.done = 0

    def step(self) -> float:
        """One step; its loss."""
        world, numbers = self.world, list(self.order.at(self.done))
        side = world.pictures.shape[-1] // 8
        draw = self.chance.at(self.done, numbers, (4, side, side))
        assert draw.noise is not None
        latents = world.latents(numbers)
        abar = world.abar[draw.timestep].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * draw.noise
        dropped = draw.dropped[:, None, None]
        english = torch.where(dropped, world.rows([4]), world.rows(numbers))
        native = torch.where(
            dropped, self.bridge(world.hidden([4])).context, self.bridge(world.hidden(numbers)).context
        )
        with torch.no_grad():
            theirs = _features(self.teacher, noisy, draw.timestep, english)
        ours = _features(self.student, noisy, draw.timestep, native)
        apart = [(a - b).square().mean() for a, b in zip(ours, theirs, strict=True)]
        loss = apart[0] + 0.1 * torch.stack(apart[1:]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.bridge.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.done += 1
        return float(loss.detach())


class Ours:
    """The trainer over the same."""

    def __init__(self, world: World, source: Kept, settings: Settings) -> None:
        backbone = Backbone(world.unet, world.abar)
        trainer = Trainer(PeaMethod(Student(world.bridge()), backbone), source, settings)
        self.reports: Iterator[Any] = trainer.train()

    def step(self) -> float:
        """One step; its loss."""
        return float(next(self.reports).loss)


def _features(unet: Any, noisy: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
    taken: list[Tensor] = []

    def take(_: Any, __: Any, output: Tensor) -> None:
        taken.append(output)

    handles = [end.register_forward_hook(take) for end in level_ends(unet)]
    said = unet(noisy, timestep.float(), context=context)
    for handle in handles:
        handle.remove()
    return [said, *taken]


def _start(module: Any) -> None:
    """Weights of the size that keeps activations near one, so that no side works on denormal numbers."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                fan = weight[0].numel()
                weight.normal_(0.0, fan**-0.5)
            else:
                weight.fill_(1.0 if weight.ndim else 0.0)
        for name, weight in module.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
    module.eval().requires_grad_(False)


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def _tower() -> Any:
    from language_bridge.encoders.base import create_encoder
    from language_bridge.encoders.bert import BertSpec, bert_tokenizer
    from language_bridge.tests.fixtures.towers import vocabulary

    words = vocabulary()
    spec = BertSpec(vocab=len(words), width=768, layers=12, window=77, heads=12, inner=3072)
    tower = create_encoder("bert", spec, bert_tokenizer(words), identity="bench-zh", window=77)
    tower.reset_parameters(torch.Generator().manual_seed(0))
    return tower.eval().requires_grad_(False)


def _weights(*modules: Any) -> int:
    """Bytes of all weights, shared ones once."""
    held = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for m in modules
        for each in m.parameters()
    }
    return sum(held.values())


def _most(step: Callable[[], object], weights: int) -> int:
    """Most bytes held in a step: the weights that stay, and the tensors that come and go."""
    gc.collect()
    with Held() as held:
        step()
    return weights + held.most


def measure(rounds: int, size: int, batch: int, small: bool) -> dict[str, Any]:
    """Everything but the node."""
    world = World(size, small)
    settings = Settings(steps=10**6, batch=batch, learning_rate=1e-5, warmup=0, draws=1, save_every=0)
    fresh = Settings(steps=10**6, batch=batch, learning_rate=1e-5, warmup=0, save_every=0)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Kept(world, Path(folder))
        plain, ours, new = Plain(world, settings), Ours(world, source, settings), Ours(world, source, fresh)
        epoch = -(-4 // batch)
        losses = [(plain.step(), ours.step()) for _ in range(max(2, 2 * epoch))]
        found["losses"] = losses
        found["loss_apart"] = max(abs(a - b) / abs(a) for a, b in losses)
        for key, side in (("pea_speedup", ours), ("pea_speedup_fresh", new)):
            rows = ratios(rounds, plain.step, side.step)
            found[key] = statistics.median(rows)
            found[f"{key}_spread"] = [min(rows), max(rows)]
        everything = _weights(world.unet, plain.student, world.vae, world.clip, world.tower, plain.bridge)
        lean = _weights(world.unet, plain.bridge)
        most = _most(plain.step, everything), _most(ours.step, lean), _most(new.step, lean)
        found["pea_memory"] = max(most[1:]) / most[0]
        found["peak_bytes"] = {"plain": most[0], "remembered": most[1], "fresh": most[2]}
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=256, help="pixels of the pictures")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a thin U-Net")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    from language_bridge.recipes.pocket_world import prepare_host

    prepare_host()
    torch.set_num_threads(options.threads)
    started = time.time()
    found = measure(options.rounds, options.size, options.batch, options.small)
    found["minutes"] = round((time.time() - started) / 60, 1)
    if options.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:20} {value}  {'aim ' + str(TARGETS[key]) if key in TARGETS else ''}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
