"""How long, how fast and with what a training goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ..bridges.errors import BridgeError

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")
_MOST = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a training that is neither data nor method; a checkpoint keeps it.

    steps: updates of the weights. batch: examples that the network sees at once; batch * accumulation
    examples make one step. learning_rate: the peak, reached after `warmup` steps. clip: the largest norm of
    the gradients, 0 for none. average: decay of the moving average of the weights, 0 for none.
    checkpointing: whether activations are computed twice instead of kept. drop: share of captions replaced by
    the empty prompt. save_every, sample_every, validate_every: steps, 0 for never. keep: how many checkpoints
    stay. high_noise: share of the timesteps drawn from the noisier two fifths. noise_offset: strength of
    noise that is equal all over a channel, part of the target. perturbation: strength of further noise on
    what the U-Net sees, no part of the target. draws: how many fixed pairs of noise and timestep an example
    has, so that what the frozen U-Net says of them is computed once; 0 draws afresh at each step.
    """

    steps: int
    batch: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-4
    warmup: int = 100
    schedule: str = "cosine"
    optimiser: str = "AdamW"
    weight_decay: float = 0.0
    clip: float = 1.0
    average: float = 0.0
    precision: str = "fp32"
    checkpointing: bool = False
    drop: float = 0.1
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    sample_every: int = 0
    validate_every: int = 0
    high_noise: float = 0.0
    noise_offset: float = 0.0
    perturbation: float = 0.0
    draws: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "keep"):
            self._within(name, 1, _MOST)
        for name in ("warmup", "save_every", "sample_every", "validate_every", "draws"):
            self._within(name, 0, _MOST)
        self._within("seed", 0, (1 << 63) - 1)
        self._within("learning_rate", 1e-12, 1e3)
        for name in ("weight_decay", "clip", "noise_offset", "perturbation"):
            self._within(name, 0.0, 1e3)
        for name in ("drop", "high_noise"):
            self._within(name, 0.0, 1.0)
        self._within("average", 0.0, 0.999999)
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise _odd(name, getattr(self, name), " or ".join(known))

    def _within(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if not least <= value <= most:
            raise _odd(name, value, f"{least:g} to {most:g}")

    @property
    def effective(self) -> int:
        """Examples of one step."""
        return self.batch * self.accumulation

    def to_json(self) -> dict[str, object]:
        """As a checkpoint keeps it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, object]) -> Settings:
        """Read what `to_json` gave; BridgeError when a field is missing, unknown, or of another type."""
        known = {field.name: field for field in dataclasses.fields(Settings)}
        odd = [
            name for name, value in fields.items() if name not in known or not _is(value, known[name].type)
        ]
        if odd or "steps" not in fields:
            raise _odd("record of its settings", odd or "no steps", f"fields {sorted(known)}")
        return Settings(**fields)  # pyright: ignore[reportArgumentType]


def _is(value: object, kind: object) -> bool:
    """Whether a value from JSON is of the type that an annotation names."""
    if kind == "float":
        return type(value) in (int, float)
    return type(value).__name__ == kind


def _odd(name: str, found: object, expected: str) -> BridgeError:
    return BridgeError(
        f"The training cannot begin with this {name}.", repr(found)[:80], expected, "Choose another value."
    )
