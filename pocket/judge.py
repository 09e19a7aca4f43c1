"""Reads shapes, colours, sizes and the ground off a picture and scores them against a caption."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .captions import Caption, Wanted
from .painter import COLOURS, GROUNDS, NEW_SHAPES, PLACES, SHAPES, SIZES

ATTRIBUTES = ("shape", "colour", "size", "position", "ground", "count")
FILE = Path(__file__).parent / "assets" / "pocket-judge.safetensors"
NEW_FILE = FILE.with_name("pocket-judge-new.safetensors")
"""The same network, trained once more with `NEW_SHAPES` among the shapes; for what a LoRA draws."""


@dataclass(frozen=True)
class Seen:
    """What stands in one corner."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Reading:
    """Everything the judge sees in one picture."""

    things: tuple[Seen, ...]
    ground: str

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON report."""
        return {"things": [asdict(thing) for thing in self.things], "ground": self.ground}


class Judge(torch.nn.Module):
    """A small convolutional network over the four corners of a picture, plus the median for the ground.

    Each 32x32 corner gets logits for emptiness and shape (1 + S), colour (8) and size (2).
    """

    def __init__(self, width: int = 24, shapes: Sequence[str] = SHAPES, ops: Any = torch.nn) -> None:
        super().__init__()
        self.width = width
        self.shapes = tuple(shapes)
        self.body = torch.nn.Sequential(
            ops.Conv2d(3, width, 3, padding=1),
            torch.nn.ReLU(),
            ops.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            torch.nn.ReLU(),
            ops.Conv2d(2 * width, 4 * width, 3, padding=1, stride=2),
            torch.nn.ReLU(),
            ops.Conv2d(4 * width, 4 * width, 3, padding=1, stride=2),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
        )
        self.head = ops.Linear(4 * width * 16, 1 + len(self.shapes) + len(COLOURS) + len(SIZES))

    def forward(self, corners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Corners [N, 3, 32, 32] in 0..1 to logits: empty or shape [N, 1 + S], colour [N, 8], size [N, 2]."""
        logits = self.head(self.body(corners - 0.5))
        shape, colour, size = logits.split([1 + len(self.shapes), len(COLOURS), len(SIZES)], dim=1)
        return shape, colour, size

    @torch.no_grad()
    def read_many(self, pictures: Tensor) -> list[Reading]:
        """Readings of pictures [B, H, W, 3] in 0..1; other sizes than 64x64 are resized first."""
        images = pictures[..., :3].float().movedim(-1, 1).clamp(0, 1)
        if images.shape[-2:] != (64, 64):
            images = torch.nn.functional.interpolate(images, (64, 64), mode="area")
        corners = corners_of(images)
        kinds, colours, sizes = (logits.argmax(1).view(-1, 4) for logits in self(corners))
        grey = images.mean(1).flatten(1).median(1).values
        levels = torch.tensor(list(GROUNDS.values()), device=grey.device)
        grounds = (grey[:, None] - levels).abs().argmin(1)
        readings: list[Reading] = []
        for index in range(images.shape[0]):
            things = tuple(
                Seen(
                    self.shapes[int(kinds[index, cell]) - 1],
                    list(COLOURS)[int(colours[index, cell])],
                    SIZES[int(sizes[index, cell])],
                    PLACES[cell],
                )
                for cell in range(4)
                if int(kinds[index, cell]) > 0
            )
            readings.append(Reading(things, list(GROUNDS)[int(grounds[index])]))
        return readings

    def read(self, picture: Tensor) -> Reading:
        """The reading of one picture [H, W, 3] in 0..1."""
        return self.read_many(picture[None])[0]


def corners_of(images: Tensor) -> Tensor:
    """Images [B, 3, 64, 64] to corners [4B, 3, 32, 32] in the order of `PLACES`, picture by picture."""
    rows = images.unfold(2, 32, 32).unfold(3, 32, 32)  # [B, 3, 2, 2, 32, 32]
    return rows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)


def load(path: Path = FILE) -> Judge:
    """A shipped judge; whether it knows the new shapes shows in its size."""
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    state = load_file(str(path))
    known = state["head.bias"].shape[0] - 1 - len(COLOURS) - len(SIZES)
    every = (*SHAPES, *NEW_SHAPES)
    judge = Judge(width=int(state["body.0.weight"].shape[0]), shapes=every[:known])
    judge.load_state_dict({key: value.float() for key, value in state.items()})
    return judge.eval()


def score(reading: Reading, caption: Caption) -> dict[str, list[bool]]:
    """Which of the attributes that a caption names are right: attribute -> one truth per mention.

    Objects are matched to what was seen in the way that makes most attributes right (places must fit where
    they are named). An object that is not found at all fails each of its named attributes. "count" is right
    when the picture has as many objects as the caption names.
    """
    best: dict[str, list[bool]] | None = None
    slots: list[Seen | None] = [*reading.things, *[None] * len(caption.wanted)]
    for choice in itertools.permutations(slots, len(caption.wanted)):
        marks = _marks(choice, caption.wanted)
        if best is None or _right(marks) > _right(best):
            best = marks
    assert best is not None
    best["count"] = [len(reading.things) == len(caption.wanted)]
    if caption.ground is not None:
        best["ground"] = [reading.ground == caption.ground]
    return best


def accuracy(marks: Sequence[dict[str, list[bool]]]) -> dict[str, float]:
    """Shares over many pictures: each attribute, "attributes" (all mentions together) and "exact" (whole
    pictures).
    """
    totals = {name: [mark for each in marks for mark in each.get(name, [])] for name in ATTRIBUTES}
    shares = {name: sum(found) / len(found) for name, found in totals.items() if found}
    every = [mark for found in totals.values() for mark in found]
    shares["attributes"] = sum(every) / max(len(every), 1)
    shares["exact"] = sum(all(all(found) for found in each.values()) for each in marks) / max(len(marks), 1)
    return shares


def _marks(choice: Sequence[Seen | None], wanted: Sequence[Wanted]) -> dict[str, list[bool]]:
    marks: dict[str, list[bool]] = {}
    for seen, wish in zip(choice, wanted, strict=True):
        if seen is not None and wish.place is not None and seen.place != wish.place:
            seen = None
        marks.setdefault("shape", []).append(seen is not None and seen.shape == wish.shape)
        if wish.colour is not None:
            marks.setdefault("colour", []).append(seen is not None and seen.colour == wish.colour)
        if wish.size is not None:
            marks.setdefault("size", []).append(seen is not None and seen.size == wish.size)
        if wish.place is not None:
            marks.setdefault("position", []).append(seen is not None)
    return marks


def _right(marks: dict[str, list[bool]]) -> int:
    return sum(sum(found) for found in marks.values())
