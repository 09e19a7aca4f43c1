"""A source of random tensors, and every method over a tiny U-Net, small enough for a step in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from language_bridge.bridges.base import Hidden, create
from language_bridge.training.backbone import Backbone
from language_bridge.training.chance import Draw
from language_bridge.training.methods import (
    AlignMethod,
    BranchMethod,
    IapMethod,
    KvMethod,
    Method,
    PeaMethod,
    ResampleMethod,
    Student,
    learning_keys,
)
from language_bridge.training.objectives import IapSettings
from language_bridge.training.source import Batch

ROWS, HIDDEN, CONTEXT = 7, 16, 24
SHAPE = (4, 8, 8)
NAMES = ("pea", "iap", "align", "kv", "branch", "resample")


class Rows:
    """Rows of numbers by key, in memory."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def missing(self, keys: Sequence[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self.held]

    def put(self, keys: Sequence[str], values: Tensor) -> None:
        self.held |= dict(zip(keys, values.clone(), strict=True))

    def get(self, keys: Sequence[str]) -> Tensor:
        return torch.stack([self.held[key] for key in keys])


class Toy:
    """`count` examples to learn from and four that are held out."""

    def __init__(self, count: int = 10) -> None:
        source = torch.Generator().manual_seed(5)
        whole = count + 4
        self.count = count
        self.latents = torch.randn(whole, *SHAPE, generator=source)
        self.english = torch.randn(whole, ROWS, CONTEXT, generator=source)
        self.states = torch.randn(whole, ROWS, HIDDEN, generator=source)
        self.flags = (torch.arange(whole) % 3 == 0).float()
        self.nothing = torch.randn(1, ROWS, CONTEXT, generator=source)
        self.silence = torch.randn(1, ROWS, HIDDEN, generator=source)
        self.rows: Rows | None = Rows()

    @property
    def groups(self) -> list[range]:
        return [range(self.count // 2), range(self.count // 2, self.count)]

    @property
    def held_out(self) -> list[range]:
        return [range(self.count, self.count + 4)]

    def shape(self, number: int) -> tuple[int, int, int]:
        return SHAPE

    def key(self, number: int) -> str:
        return f"toy {number}"

    def memory(self, length: int) -> Rows | None:
        return self.rows

    def batch(self, draw: Draw) -> Batch:
        index = torch.tensor(draw.numbers)
        mask = torch.ones(len(index), ROWS, dtype=torch.bool)
        return Batch(
            latents=self.latents[index],
            english=self.english[index],
            hidden=Hidden(self.states[index], mask),
            native_only=self.flags[index],
        )

    def empty(self) -> Batch:
        mask = torch.ones(1, ROWS, dtype=torch.bool)
        return Batch(english=self.nothing, hidden=Hidden(self.silence, mask))


class Beside(nn.Module):
    """A frozen U-Net with something beside it that learns: a map of the text to a shift of the noise."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        ops: Any = nn
        self.net = ops.Linear(HIDDEN, 4)

    def __call__(self, noisy: Tensor, timestep: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
        english = torch.zeros(len(noisy), ROWS, CONTEXT)
        return self.unet(noisy, timestep, context=english) + self.net(context).mean(1)[:, :, None, None]


def schedule() -> Tensor:
    """SD's own, [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def method_of(name: str, unet: Any, seed: int = 0) -> Method:
    """A freshly started student under this method; `unet` is copied where it learns."""
    import copy

    torch.manual_seed(seed)
    spec = {"hidden": HIDDEN, "context": CONTEXT, "width": 20, "depth": 2}
    bridge = create("mlp", spec)
    bridge.reset_parameters()
    backbone = Backbone(unet, schedule())
    if name == "pea":
        return PeaMethod(Student(bridge), backbone)
    if name == "iap":
        return IapMethod(Student(bridge), backbone, IapSettings(scaled=False), pixels=5)
    if name == "align":
        return AlignMethod(Student(bridge), length=0.01)
    if name == "kv":
        own = copy.deepcopy(unet)
        return KvMethod(Student(bridge, unet=learning_keys(own, "kv")), Backbone(own, schedule()), "noisy")
    if name == "branch":
        beside = Beside(unet)
        silent = create("branch", {"hidden": HIDDEN, "context": HIDDEN})
        learning = dict(beside.net.named_parameters())
        return BranchMethod(Student(silent, unet=learning), Backbone(unet, schedule(), denoise=beside))
    return ResampleMethod(Student(bridge), backbone)
