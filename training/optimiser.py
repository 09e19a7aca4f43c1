"""From gradients to new weights: optimisers by name, their learning rate, the moving average of the weights.

All that they remember comes out as tensors and JSON, so that a checkpoint needs no pickle, and goes back in
bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ..bridges.errors import BridgeError
from ..encoders import guard

if TYPE_CHECKING:
    from .settings import Settings

OPTIMISERS = ("AdamW", "Adam", "SGD", "RMSprop", "Adafactor", "Muon", "AdamW8bit")
"""AdamW, Adam (its weight decay is part of the gradient), SGD with momentum 0.9, RMSprop, Adafactor, and
AdamW with 8-bit state from the package bitsandbytes; all else as torch has it. Muon: see `Optimiser`.
"""
ADAM_SHARE = 0.2
"""What Muon cannot take learns by AdamW, at this share of the rate."""
LEAST_SIDE = 4
"""A matrix without more rows and columns than this is none for Muon."""
LAST_SCALE = 0.02
"""Where the cosine ends."""
EMBEDDINGS = ("embedding", "embed_tokens", "shared.weight", "relative_attention_bias")
"""How the towers name their tables: rows that are looked up, not multiplied."""

_OWNER = "optimiser's state"
_MOMENTUM = 0.9
_UPDATES = "updates"
_WEIGHTS = "weights."


def scale_at(step: int, settings: Settings) -> float:
    """The share of the peak learning rate at step 0, 1, 2, ...

    It rises linearly to 1 over the first `warmup` steps, (step + 1) / warmup, and then is constant, or falls
    linearly to 0, or as a cosine to 0.02, in both cases reached when `steps` steps are done.
    """
    rise = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    done = min(1.0, max(0, step - settings.warmup) / max(1, settings.steps - settings.warmup))
    if settings.schedule == "linear":
        return rise * (1 - done)
    if settings.schedule == "cosine":
        return rise * (LAST_SCALE + (1 - LAST_SCALE) * 0.5 * (1 + math.cos(math.pi * done)))
    return rise


class Optimiser:
    """Updates parameters by name, with the optimiser, rate, weight decay and clipping of the settings.

    "Muon" is two: Muon for matrices, and for convolutions as matrices [out, in x height x width]; AdamW with
    betas 0.9 and 0.98, a fifth of the rate and no weight decay for vectors, embeddings and what has four rows
    or columns or less.

    BridgeError when there is nothing to train, a parameter comes twice, or the optimiser is unknown or not
    installed.
    """

    @torch.inference_mode(False)
    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Settings) -> None:
        self.settings = settings
        self._parameters = dict(parameters)
        if not parameters:
            raise BridgeError(
                "There is nothing to train.",
                "no parameters",
                "at least one",
                "Choose a method that trains some.",
            )
        if len({id(parameter) for parameter in parameters.values()}) < len(parameters):
            raise BridgeError(
                "The training cannot begin.",
                f"one parameter under two names among {len(parameters)}",
                "each parameter once",
                "Name shared weights once.",
            )
        self._views: dict[str, nn.Parameter] = {}
        if settings.optimiser == "Muon":
            self._views = {
                name: nn.Parameter(_matrix(parameter))
                for name, parameter in parameters.items()
                if _is_matrix(name, parameter)
            }
        # What torch's optimiser knows of each parameter: itself, or its view as a matrix.
        self._targets = {**self._parameters, **self._views}
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []
        self._part_of: dict[str, torch.optim.Optimizer] = {}
        rest = [name for name in self._targets if name not in self._views]
        if self._views:
            self._add(settings.optimiser, list(self._views), 1.0, weight_decay=settings.weight_decay)
        if rest and settings.optimiser == "Muon":
            self._add("AdamW", rest, ADAM_SHARE, betas=(0.9, 0.98), weight_decay=0.0)
        elif rest:
            options = {"momentum": _MOMENTUM} if settings.optimiser == "SGD" else {}
            self._add(settings.optimiser, rest, 1.0, weight_decay=settings.weight_decay, **options)

    def _add(self, kind: str, names: list[str], share: float, **options: object) -> None:
        targets = [self._targets[name] for name in names]
        part = _class_of(kind)(targets, lr=share * self.settings.learning_rate, **options)
        self._parts.append((part, share))
        self._part_of |= dict.fromkeys(names, part)

    def rate(self, number: int) -> float:
        """The learning rate of step 0, 1, 2, ..."""
        return self.settings.learning_rate * scale_at(number, self.settings)

    def step(self, number: int) -> float:
        """Do step 0, 1, 2, ... with the gradients that are there, drop them, and return their norm unclipped.

        A norm that is not finite is returned, too, and then neither weights nor state have changed.
        """
        # Without a limit the gradients are multiplied by one, which changes no bit.
        norm = float(nn.utils.clip_grad_norm_([*self._parameters.values()], self.settings.clip or math.inf))
        if math.isfinite(norm):
            self._apply(self.rate(number))
        for parameter in self._parameters.values():
            parameter.grad = None
        return norm

    def _apply(self, rate: float) -> None:
        for name, view in self._views.items():
            # Made anew each time, because a model that was moved in the meantime has its weights elsewhere.
            parameter = self._parameters[name]
            view.data = _matrix(parameter)
            view.grad = None if parameter.grad is None else _matrix(parameter.grad)
        for part, share in self._parts:
            for group in part.param_groups:
                group["lr"] = share * rate
            part.step()
        for name, view in self._views.items():
            parameter = self._parameters[name]
            if view.data_ptr() != parameter.data_ptr():  # channels last: a copy instead of a view
                parameter.data.copy_(view.data.view(parameter.shape))
            view.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by name of the parameter and of the state; not copied."""
        return {
            f"{name}.{key}": value.detach()
            for name, key, value in self._remembered()
            if isinstance(value, Tensor)
        }

    def facts(self) -> dict[str, object]:
        """What is to be kept beside `tensors`, as JSON: whose state it is, and what of it is a number."""
        state: dict[str, dict[str, object]] = {}
        for name, key, value in self._remembered():
            told = list(value.shape) if isinstance(value, Tensor) else value
            state.setdefault(name, {})[key] = told
        shapes = {name: list(parameter.shape) for name, parameter in self._parameters.items()}
        return {"optimiser": self.settings.optimiser, "parameters": shapes, "state": state}

    def _remembered(self) -> list[tuple[str, str, object]]:
        found: list[tuple[str, str, object]] = []
        for name, target in self._targets.items():
            state = cast("Mapping[str, object]", self._part_of[name].state.get(target, {}))
            found += [(name, key, value) for key, value in state.items()]
        return found

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        """Take up what `tensors` and `facts` gave, on the devices where the parameters are.

        BridgeError, with nothing changed, when they are another optimiser's or of other parameters.
        """
        kind = guard.field(facts, "optimiser", str, _OWNER)
        if kind != self.settings.optimiser:
            _refuse(kind, self.settings.optimiser)
        saved = guard.record(facts, "parameters", _OWNER)
        mine: dict[str, object] = {name: list(value.shape) for name, value in self._parameters.items()}
        for name in sorted({*saved, *mine}):
            if saved.get(name) != mine.get(name):
                _refuse(*(f"{name!r} {side.get(name, 'not trained')}" for side in (saved, mine)))
        state = guard.record(facts, "state", _OWNER)
        expected: dict[str, tuple[int, ...]] = {}
        numbers: dict[str, dict[str, object]] = {}
        for name in state:
            if name not in mine:
                _refuse(f"state of {name!r}", "state of parameters that are trained")
            for key, value in guard.record(state, name, _OWNER).items():
                if isinstance(value, list):
                    expected[f"{name}.{key}"] = tuple(cast("list[int]", value))
                    numbers.setdefault(name, {})[key] = value
                elif value is None or isinstance(value, (bool, int, float)):
                    numbers.setdefault(name, {})[key] = value
                else:
                    _refuse(f"{name}.{key} = {value!r:.80}", "a number or a shape")
        guard.require_shapes(expected, {name: tuple(value.shape) for name, value in tensors.items()}, _OWNER)
        for part, _ in self._parts:
            part.state.clear()
        for name, values in numbers.items():
            target = self._targets[name]
            self._part_of[name].state[target] = {
                key: _placed(tensors[f"{name}.{key}"], target, key) if isinstance(value, list) else value
                for key, value in values.items()
            }


def _is_matrix(name: str, parameter: Tensor) -> bool:
    if parameter.ndim < 2 or min(parameter.shape[:2]) <= LEAST_SIDE:
        return False
    return not any(word in name for word in EMBEDDINGS)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(tensor.shape[0], -1)


@torch.inference_mode(False)
def _placed(saved: Tensor, target: Tensor, key: str) -> Tensor:
    """A copy where the optimiser wants it: counts stay on the CPU, and what has the parameter's shape gets
    its order in memory. Never a tensor of inference mode, which could not be updated.
    """
    if key == "step":
        return saved.clone()
    if saved.shape == target.shape:
        return torch.empty_like(target, dtype=saved.dtype, requires_grad=False).copy_(saved)
    return saved.to(target.device, copy=True)


def _class_of(kind: str) -> Callable[..., torch.optim.Optimizer]:
    if kind not in OPTIMISERS:
        raise BridgeError(
            "The optimiser is unknown.", repr(kind)[:80], ", ".join(OPTIMISERS), "Choose one of these."
        )
    if kind == "AdamW8bit":
        return _eight_bit()
    found: Any = getattr(torch.optim, kind, None)
    if found is None:
        raise BridgeError(
            f"The optimiser {kind} is not part of this torch.",
            f"torch {torch.__version__}",
            {"Muon": "torch 2.9 or newer", "Adafactor": "torch 2.5 or newer"}.get(kind, "a newer torch"),
            "Choose AdamW, or update torch.",
        )
    return found


def _eight_bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except Exception as error:  # where it does not suit the machine, it raises what it likes
        raise BridgeError(
            "The optimiser AdamW8bit cannot be used.",
            f"{type(error).__name__}: {error!s:.200}",
            "the package bitsandbytes, which fits this torch and this machine",
            "Choose AdamW, or install bitsandbytes into ComfyUI's Python.",
        ) from error
    return cast("Any", bitsandbytes).optim.AdamW8bit


def _refuse(found: object, expected: object) -> NoReturn:
    raise BridgeError(
        "The saved state of the optimiser does not fit this training.",
        found,
        expected,
        "Go on with the method and the optimiser that the checkpoint was made with, or begin anew.",
    )


class Average:
    """The exponential moving average of parameters, kept in 32 bits.

    After n updates the next one keeps min(decay, (1 + n) / (10 + n)) of the average, so that the weights from
    before the training soon count for nothing (the ramp of TensorFlow's ExponentialMovingAverage).
    """

    @torch.inference_mode(False)
    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = dict(parameters)
        self._means = {name: _mean_of(parameter) for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the average."""
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self._parameters.items():
            mean = self._means[name]
            mean.lerp_(parameter.to(mean), 1 - kept)
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """All that the average remembers; not copied."""
        means = {_WEIGHTS + name: mean for name, mean in self._means.items()}
        return {_UPDATES: torch.tensor(self.updates), **means}

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by name, in the dtype of the parameters."""
        return {name: mean.to(self._parameters[name].dtype) for name, mean in self._means.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave; BridgeError, with nothing changed, when it is of other parameters."""
        expected = {name: tuple(value.shape) for name, value in self.tensors().items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        guard.require_shapes(expected, found, "average of the weights")
        self.updates = int(tensors[_UPDATES])
        with torch.no_grad():
            for name, mean in self._means.items():
                mean.copy_(tensors[_WEIGHTS + name])

    @contextmanager
    def worn(self) -> Generator[None, None, None]:
        """Put the averaged weights into the parameters, and their own back at the end, bit for bit."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._put(self._means)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])


def _mean_of(parameter: Tensor) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return parameter.detach().to(dtype, copy=True)
