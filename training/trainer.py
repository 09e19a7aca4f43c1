"""Runs a method over a source step by step, and loses nothing on the way."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, autocast

from ..bridges.errors import BridgeError
from . import checkpoint
from .chance import Chance, Draw
from .methods import Method
from .objectives import Loss
from .optimiser import Average, Optimiser
from .order import Order
from .settings import Settings
from .source import Source
from .teaching import Teaching

FREE = {"steps", "save_every", "keep", "sample_every", "validate_every", "batch", "accumulation"}
"""Settings that may change between two parts of a run; batch * accumulation may not."""
MOST_RETRIES = 4
"""How often a run may shrink its micro-batch for want of memory."""
MOST_ODD = 20
"""How many steps in a row may be left out because their gradients are not finite."""
HELD_OUT_BATCHES = 8
_FIRST_SCALE, _GROWTH = 2.0**14, 1000
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What a precision computes in; fp32 is everything as it is."""


@dataclass(frozen=True)
class Report:
    """What one step says.

    step: how many steps are done; loss, parts: means over the batch; rate: the learning rate; norm: of the
    gradients before clipping; seconds: wall time; micro: examples that the network saw at once; skipped: the
    step changed nothing because its gradients were not finite; held_out: loss over what is only measured,
    where this step measured it; saved: the checkpoint, where this step wrote one.
    """

    step: int
    steps: int
    loss: float
    parts: Mapping[str, float]
    rate: float
    norm: float
    seconds: float
    micro: int
    skipped: bool = False
    held_out: float | None = None
    saved: Path | None = None


class Ranks(Protocol):
    """Processes that train one bridge together."""

    @property
    def index(self) -> int:
        """This process, from 0."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        ...


class Steps(Protocol):
    """Which examples each step reads; an `Order` is one, and so is a stream that only goes forward."""

    def at(self, step: int) -> tuple[int, ...]:
        """Numbers of the examples of the whole batch, latents of one shape; asked in rising steps."""
        ...

    def position(self, step: int) -> object:
        """Whatever JSON it needs to go on before `step`; None when the number is enough."""
        ...

    def seek(self, step: int, position: object) -> None:
        """Go to where `position` was taken."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    index: int = 0
    count: int = 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Nobody to add."""


class Trainer:
    """A training that can be left and taken up at any step.

    run: folder of its checkpoints, None to keep none. order: what each step reads, None for every example of
    the source once an epoch, shuffled. facts: what the data and the models are; a run goes on
    only with the same. poll: called before each micro-batch, and may raise to cancel; the last whole step is
    then saved. out_of_memory: errors after which the micro-batch is halved, `relieve` called, and the step
    begun anew; the batch as a whole stays as it was. device: where the source gives its batches.

    Gradients are sums over micro-batches and processes of the share of each in the whole batch, so cutting a
    batch changes a step by rounding alone. A run that is resumed gives the same weights bit for bit as one
    that was not interrupted, on a CPU with the same number of threads.
    """

    def __init__(
        self,
        method: Method,
        source: Source,
        settings: Settings,
        run: Path | None = None,
        *,
        order: Steps | None = None,
        facts: Mapping[str, object] | None = None,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
        poll: Callable[[], None] = lambda: None,
        out_of_memory: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, MemoryError),
        relieve: Callable[[], None] = lambda: None,
    ) -> None:
        self.method = method
        self.source = source
        self.settings = settings
        self.run = run
        self.facts = dict(facts or {})
        self.device = torch.device(device)
        self.ranks: Ranks = ranks or Alone()
        self.poll = poll
        self.relieve = relieve
        self.out_of_memory = out_of_memory
        self.step: int = 0
        self.history: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self.cpu_seconds = 0.0
        """Processor time of all steps so far, measurements and checkpoints included."""
        self.micro = settings.batch
        self.retries = 0
        self.chance = Chance(settings)
        self.order: Steps = order or Order(
            source.groups, settings.effective * self.ranks.count, settings.seed
        )
        self.weights = method.student.learning()
        self.optimiser = Optimiser(self.weights, settings)
        self.average = Average(self.weights, settings.average) if settings.average else None
        self.empty = source.empty()
        self._teaching: Teaching | None = None
        if method.teaches:
            self._teaching = Teaching(
                lambda batch, draw: method.teach(batch, draw, self.empty), source, settings, method.name
            )
        self._scale, self._good = (_FIRST_SCALE if settings.precision == "fp16" else 1.0), 0
        self._odd = 0
        self._whole = True
        self._finish = False
        self._saved_at = -1

    def finish(self) -> None:
        """Let the present step be the last one."""
        self._finish = True

    @contextmanager
    def averaged(self) -> Generator[None]:
        """While inside, the weights are their moving average, where one is kept."""
        with nullcontext() if self.average is None else self.average.worn():
            yield

    def resume(self) -> int:
        """Take up the newest whole checkpoint of the run; the step that it stands at, 0 when there is none.

        BridgeError when it was trained with other settings, data or models.
        """
        saved = None if self.run is None else checkpoint.latest(self.run)
        if saved is None:
            return 0
        for skipped in saved.skipped:
            logging.warning("a checkpoint of this run is damaged and left out: %s", skipped)
        self._agree(cast("dict[str, object]", saved.facts.get("settings", {})), saved.facts)
        weights = saved.tensors["weights"]
        if _shapes(weights) != _shapes(self.weights):
            raise self._other("weights", f"{len(weights)} tensors", f"{len(self.weights)} tensors")
        with torch.no_grad():
            for name, each in self.weights.items():
                each.copy_(weights[name])
        self.optimiser.load(saved.tensors["optimiser"], cast(Any, saved.facts["optimiser"]))
        if self.average is not None:
            self.average.load(saved.tensors["average"])
        torch.set_rng_state(saved.tensors["random"]["torch"])
        if "cuda" in saved.tensors["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved.tensors["random"]["cuda"], self.device)
        facts = cast("dict[str, Any]", saved.facts)
        self.step = self._saved_at = saved.step
        self.history = _curve(saved.tensors["curves"], "loss")
        self.held_out = _curve(saved.tensors["curves"], "held_out")
        self._scale, self._good = float(facts["scale"]), int(facts["good"])
        self.cpu_seconds = float(facts["cpu_seconds"])
        self.order.seek(self.step, facts["position"])
        return self.step

    def train(self) -> Iterator[Report]:
        """Go on to the last step, with a report for each.

        However it is left, the last whole step is saved if the run keeps checkpoints.
        """
        settings = self.settings
        try:
            while self.step < settings.steps and not self._finish:
                started, began = time.perf_counter(), time.process_time()
                report = self._one(started)
                step = report.step
                if self.ranks.index == 0:
                    self._remember(report)
                if settings.validate_every and (
                    step % settings.validate_every == 0 or step == settings.steps
                ):
                    report = replace(report, held_out=self.validate())
                if settings.save_every and step % settings.save_every == 0:
                    report = replace(report, saved=self.save())
                self.cpu_seconds += time.process_time() - began
                yield report
        finally:
            if self._whole and self.step != self._saved_at and self.step > 0:
                self.save()

    def validate(self) -> float | None:
        """Loss over examples that are not learnt from, with averaged weights; None when there are none."""
        total, count = 0.0, 0
        with torch.no_grad(), self.averaged():
            for group in [list(group) for group in self.source.held_out if group]:
                for start in range(0, len(group), self.micro):
                    if count >= HELD_OUT_BATCHES * self.settings.batch:
                        break
                    numbers = group[start : start + self.micro]
                    self.poll()
                    draw = self.chance.held_out(numbers, self.source.shape(numbers[0]))
                    total += float(self._loss(draw.to(self.device)).total) * len(numbers)
                    count += len(numbers)
        if not count:
            return None
        self.held_out.append((self.step, total / count))
        return total / count

    def save(self) -> Path | None:
        """Write a checkpoint of the present step; None when the run keeps none, or in all processes but one.

        BridgeError when the disk refuses; the checkpoints before it stay whole.
        """
        if self.run is None or self.ranks.index:
            self._saved_at = self.step
            return None
        random = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {
            "weights": {name: each.detach() for name, each in self.weights.items()},
            "optimiser": self.optimiser.tensors(),
            "random": random,
            "curves": {
                "loss": _points(self.history),
                "held_out": _points(self.held_out),
            },
        }
        if self.average is not None:
            tensors["average"] = self.average.tensors()
        facts: dict[str, object] = {
            "settings": self.settings.to_json(),
            "processes": self.ranks.count,
            "method": self.method.record(),
            "about": self.facts,
            "optimiser": self.optimiser.facts(),
            "position": self.order.position(self.step),
            "scale": self._scale,
            "good": self._good,
            "cpu_seconds": self.cpu_seconds,
        }
        written = checkpoint.save(self.run, self.step, tensors, facts, keep=self.settings.keep)
        self._saved_at = self.step
        return written

    def _one(self, started: float) -> Report:
        step, settings = self.step, self.settings
        numbers = self.order.at(step)
        drawn = self.chance.at(step, numbers, self.source.shape(numbers[0]))
        share = len(numbers) // self.ranks.count
        mine = drawn.part(self.ranks.index * share, (self.ranks.index + 1) * share)
        sums = self._gradients(mine, len(numbers))
        gradients = [each.grad for each in self.weights.values() if each.grad is not None]
        names = sorted(sums)
        told = torch.stack([sums[name] for name in names])
        self.ranks.add([*gradients, told])
        if self._scale != 1.0:
            for each in gradients:
                each.div_(self._scale)
        said = {name: float(value) for name, value in zip(names, told.cpu(), strict=True)}
        skipped = not bool(torch.stack([each.isfinite().all() for each in gradients]).all())
        length = float("nan")
        if skipped:
            self._clear()
            self._count_odd()
        else:
            self._whole = False  # an error from here on leaves weights that belong to no step
            length = self.optimiser.step(step)
            if self.average is not None:
                self.average.update()
            self._odd = 0
        self._rescale(skipped)
        self.step += 1
        self._whole = True
        return Report(
            self.step,
            settings.steps,
            said.pop("loss"),
            said,
            self.optimiser.rate(step),
            length,
            time.perf_counter() - started,
            self.micro,
            skipped,
        )

    def _gradients(self, draw: Draw, whole: int) -> dict[str, Tensor]:
        """Sums of this process's gradients and losses over micro-batches that fit into memory."""
        while True:
            try:
                return self._attempt(draw, whole)
            except self.out_of_memory as error:
                self._clear()
                said = str(error)
            self._shrink(said)

    def _attempt(self, draw: Draw, whole: int) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for start in range(0, len(draw.numbers), self.micro):
            self.poll()
            part = draw.part(start, start + self.micro).to(self.device)
            loss = self._loss(part)
            share = len(part.numbers) / whole
            (loss.total * (share * self._scale)).backward()  # pyright: ignore[reportUnknownMemberType]
            for name, value in {"loss": loss.total, **loss.parts}.items():
                seen = value.detach().float() * share
                sums[name] = sums[name] + seen if name in sums else seen
        return sums

    def _loss(self, draw: Draw) -> Loss:
        batch = self.source.batch(draw)
        with computing(self.settings, self.device):
            taught = () if self._teaching is None else self._teaching.of(batch, draw)
            return self.method.loss(batch, self.empty, draw, taught)

    def _shrink(self, said: str) -> None:
        self.retries += 1
        if self.micro == 1 or self.retries > MOST_RETRIES:
            raise BridgeError(
                "The training does not fit into memory.",
                f"out of memory with {self.micro} examples at once: {said[:160]}",
                "room for at least one example",
                "Turn gradient checkpointing on, use a lower resolution or bf16, or close other programs.",
            )
        self.micro = -(-self.micro // 2)
        logging.warning("out of memory; going on with %d examples at once, same batch", self.micro)
        self.relieve()

    def _count_odd(self) -> None:
        self._odd += 1
        if self._odd >= MOST_ODD:
            raise BridgeError(
                "The training has gone astray.",
                f"gradients that are not finite, {self._odd} steps in a row, at step {self.step}",
                "finite gradients",
                "Continue the run from its last checkpoint with a lower learning rate, or with bf16 or fp32.",
            )

    def _rescale(self, skipped: bool) -> None:
        if self.settings.precision != "fp16":
            return
        if skipped:
            self._scale, self._good = max(self._scale / 2, 1.0), 0
        else:
            self._good += 1
            if self._good >= _GROWTH:
                self._scale, self._good = self._scale * 2, 0

    def _clear(self) -> None:
        for each in self.weights.values():
            each.grad = None

    def _remember(self, report: Report) -> None:
        if not report.skipped:
            self.history.append((report.step, report.loss))

    def _agree(self, settings: Mapping[str, object], facts: Mapping[str, object]) -> None:
        then, now = Settings.from_json(settings), self.settings
        before, after = then.to_json(), now.to_json()
        odd = [name for name in before if name not in FREE and before[name] != after[name]]
        processes = cast(int, facts.get("processes", 1))
        if then.effective * processes != now.effective * self.ranks.count:
            odd.append("batch * accumulation")
            before["batch * accumulation"] = then.effective * processes
            after["batch * accumulation"] = now.effective * self.ranks.count
        if odd:
            raise self._other(
                ", ".join(odd),
                ", ".join(f"{name} {before[name]}" for name in odd),
                ", ".join(f"{name} {after[name]}" for name in odd),
            )
        about = cast("dict[str, object]", facts.get("about", {}))
        method = cast("dict[str, object]", facts.get("method", {}))
        for what, old, new in (
            ("models or data", about, self.facts),
            ("method", method, self.method.record()),
        ):
            changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            if changed:
                raise self._other(
                    f"{what}: {', '.join(changed)}",
                    ", ".join(f"{key} {old.get(key)!r:.60}" for key in changed),
                    ", ".join(f"{key} {new.get(key)!r:.60}" for key in changed),
                )

    def _other(self, what: str, then: str, now: str) -> BridgeError:
        return BridgeError(
            f"This run was begun with other {what}.",
            f"now {now}",
            f"as before: {then}",
            "Set them as they were, or give this training another name.",
        )


def computing(settings: Settings, device: torch.device) -> autocast:
    """While inside, the networks compute in the precision of the settings."""
    dtype = DTYPES.get(settings.precision)
    return autocast(device.type, dtype, enabled=dtype is not None)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: each.shape for name, each in tensors.items()}


def _curve(curves: Mapping[str, Tensor], name: str) -> list[tuple[int, float]]:
    return [(int(step), float(loss)) for step, loss in curves[name].reshape(-1, 2)]


def _points(curve: Sequence[tuple[int, float]]) -> Tensor:
    """Steps and losses [N, 2]; a loss that is no number is left out, because no file of ours holds one."""
    return torch.tensor([point for point in curve if math.isfinite(point[1])], dtype=torch.float64)
