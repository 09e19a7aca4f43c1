"""A training in the graph: from MODEL, CLIP, VAE and a dataset to a bridge, and back out cleanly.

Everything that learns is a copy of its own. MODEL, CLIP and VAE are asked through the host and stay as they
are; the U-Net is a private frozen copy. What is learnt is kept in checkpoints of the run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import comfy.model_management as management
import torch
from PIL import Image
from torch import Tensor

from ..bridges.base import BridgeSpec
from ..bridges.errors import BridgeError
from ..bridges.file import BRANCH
from ..training.backbone import Backbone
from ..training.chance import generator
from ..training.dataset import Dataset
from ..training.methods import (
    METHODS,
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
from ..training.objectives import IapSettings
from ..training.order import Order
from ..training.trainer import DTYPES, Report, Trainer, computing
from . import backbone as backbones
from . import material, painting, preview
from .backbone import branch_copy, frozen_copy, patched_weights
from .base import Base, base_of, base_of_clip
from .beginning import Beginner
from .bridging import TEMPLATE
from .choice import (
    KINDS,
    LEARNERS,
    NOTHING,
    OF_THE_BRIDGE,
    PRECISIONS,
    UNET_PARTS,
    Choice,
    Options,
    Watch,
    settings_of,
)
from .trained import Trained, about, at_rest, check_name, save
from .unet import DELTA

__all__ = [
    "KINDS",
    "LEARNERS",
    "NOTHING",
    "OF_THE_BRIDGE",
    "PRECISIONS",
    "RUNNING",
    "Choice",
    "Options",
    "Outcome",
    "Trained",
    "Watch",
    "Watcher",
    "about",
    "check_name",
    "finish",
    "save",
    "settings_of",
    "train",
]

_STATES = {"AdamW": 2, "Adam": 2, "SGD": 1, "RMSprop": 1, "Adafactor": 0.1, "Muon": 1, "AdamW8bit": 0.5}
"""Numbers that an optimiser keeps for each weight, about."""
_SHOWN_PROBLEMS = 12
_TELL_EVERY = 20
_MEBI = 1 << 20

RUNNING: dict[str, Trainer] = {}
"""Trainings that are under way, by the name of their run."""


class Watcher(Protocol):
    """Who is told how a training goes."""

    def say(self, text: str) -> None:
        """A line about what is being done."""
        ...

    def show(self, step: int, steps: int, picture: Image.Image | None) -> None:
        """Progress, and a picture when there is a new one."""
        ...


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a training gives: the bridge, curve and samples [1, H, W, 3], the loss of each step, a report."""

    trained: Trained
    picture: Tensor
    losses: tuple[float, ...]
    report: str


def finish(run: str) -> bool:
    """Let the training of a run end after its present step; False when none is under way."""
    trainer = RUNNING.get(run)
    if trainer is None:
        return False
    trainer.finish()
    return True


def train(
    choice: Choice,
    dataset: Dataset,
    *,
    model: Any,
    clip: Any,
    vae: Any,
    watcher: Watcher,
    before: Trained | None = None,
) -> Outcome:
    """Train a bridge; before: one of an earlier training, to go on with.

    The host's interrupt is raised on, after the last whole step was saved. BridgeError when something does
    not fit together, before anything is loaded where that can be told.
    """
    # Around everything, so that no exit leaves the host in another mode than it was in.
    with _training_mode():
        job = _Job(choice, dataset, model, clip, vae, watcher, before)
        try:
            with job.banks:
                return job.run()
        finally:
            RUNNING.pop(job.name, None)
            del job
            management.soft_empty_cache()


@contextmanager
def _training_mode() -> Iterator[None]:
    """Leaves inference mode and tells the host that it trains.

    On a CPU, numbers next to nothing are taken for nothing: channels that never fire leave such numbers in
    the optimiser, and they cost a multiple of the time.
    """
    slow = management.is_device_cpu(management.get_torch_device())
    knows = hasattr(management, "in_training")
    was = getattr(management, "in_training", False)
    try:
        if knows:
            management.in_training = True
        if slow:
            torch.set_flush_denormal(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if slow:
            torch.set_flush_denormal(False)
        if knows:
            management.in_training = was


class _Job:
    """One training from its checks to its outcome."""

    def __init__(
        self,
        choice: Choice,
        dataset: Dataset,
        model: Any,
        clip: Any,
        vae: Any,
        watcher: Watcher,
        before: Trained | None,
    ) -> None:
        self.choice = choice
        self.name = check_name(choice.run, "run")
        self.dataset = dataset
        self.model = model
        self.clip = clip
        self.vae = vae
        self.watcher = watcher
        self.before = before
        self.kind = _method_class(choice.objective)
        self.base: Base = base_of_clip(clip) if model is None else base_of(model, clip)
        self.device: torch.device = management.get_torch_device()
        self.folder = material.folder("runs", self.name)
        self.banks = material.Banks()
        self._backbone: Backbone | None = None
        self._check()

    def _check(self) -> None:
        if self.name in RUNNING:
            raise BridgeError(
                "This run is being trained already.",
                f"run {self.name!r}",
                "a run that nobody trains",
                "Wait until it ends, or give this training another name.",
            )
        if self.kind.asks_unet:
            if self.model is None:
                raise BridgeError(
                    f"The objective {self.choice.objective} looks through the U-Net.",
                    "nothing connected to the input model",
                    "the MODEL of the checkpoint",
                    "Connect the MODEL output of the checkpoint loader.",
                )
            backbones.check(self.model)
            backbones.schedule_of(self.model)
        if not self.choice.resume and any(self.folder.glob("step-*")):
            raise BridgeError(
                f"There is a run {self.name!r} already.",
                "checkpoints of an earlier training",
                "a name that no run has, or resume switched on",
                "Switch resume on to go on with it, or give this training another name.",
            )
        if self.before is not None and self.choice.continue_from != NOTHING:
            raise BridgeError(
                "There are two bridges to begin with.",
                f"one at the input trained, and {self.choice.continue_from}",
                "one of the two",
                f"Set continue_from to {NOTHING!r}, or take the link away.",
            )

    def run(self) -> Outcome:
        """All of it."""
        choice = self.choice
        self.watcher.say("looking at models and data")
        self.start = Beginner(choice, self.base, self.dataset.language, self.before).begin()
        wants = self._wants()
        unet_content = ""
        if self.kind.asks_unet:
            kept = patched_weights(self.model)
            unet_content = material.digest(kept, self._unet_dtype(), poll=_poll)
        prepared = material.prepare(
            self.dataset,
            self.start.tower,
            wants,
            model=self.model,
            clip=self.clip,
            vae=self.vae,
            base=self.base,
            unet_content=unet_content,
            resolution=choice.resolution,
            held_out=choice.watch.held_out,
            banks=self.banks,
            device=self.device,
            poll=_poll,
            tell=lambda what, done, of: self.watcher.say(f"encoding {what}: {done} / {of}"),
        )
        self.prepared = prepared
        self.source = prepared.source
        if choice.epochs:
            epoch = Order(self.source.groups, choice.settings.effective, choice.settings.seed).epoch
            counted = dataclasses.replace(choice.settings, steps=choice.epochs * epoch)
            self.choice = choice = dataclasses.replace(choice, settings=counted)
        settings = choice.settings
        if not management.is_device_cpu(self.device):
            management.unload_all_models()
        method = self._method()
        facts = {
            **prepared.facts,
            "base": self.base.name,
            "kind": self.start.bridge.kind,
            "spec": json.dumps(dataclasses.asdict(self.start.bridge.spec), sort_keys=True),
            "began_with": self.start.content(),
            "learns": choice.learns,
        }
        trainer = Trainer(
            method,
            self.source,
            settings,
            self.folder,
            facts=facts,
            device=self.device,
            poll=_poll,
            out_of_memory=_out_of_memory(),
            relieve=_relieve,
        )
        self.trainer, self.method = trainer, method
        resumed = trainer.resume()
        memory = self._memory()
        self.watcher.say(memory)
        logging.info("Language Bridge, run %s: %s", self.name, memory)
        RUNNING[self.name] = trainer
        last: Report | None = None
        self.sheet: Image.Image | None = None
        # Closed at once however it is left, so that the last whole step is saved before anything else.
        with closing(cast(Any, trainer.train())) as reports:
            for report in reports:
                last = report
                self._tell(report)
        with trainer.averaged():
            if choice.watch.samples and self._paints():
                self.sheet = self._samples()
            judged = self._judged()
            trained = self._trained(last, judged)
        picture = self._picture()
        self._keep(picture)
        self.watcher.show(trainer.step, settings.steps, picture)
        text = self._report(resumed, memory, judged)
        return Outcome(
            trained,
            preview.pixels(picture),
            tuple(loss for _, loss in trainer.history),
            text,
        )

    # What learns, and from what.

    def _wants(self) -> material.Wants:
        kind, start = self.kind, self.start
        pooled = bool(self.base.pooled) and (kind.asks_unet or kind is AlignMethod)
        if kind is AlignMethod and self.choice.options.rows == "cls":
            pooled = True
        spec: BridgeSpec = start.bridge.spec
        wide = getattr(spec, "tower_pooled", 0) or (spec.pooled if start.bridge.kind in _READ_POOLED else 0)
        if wide and start.tower.encoder.pooled_width == 0:
            raise BridgeError(
                "This bridge reads a pooled vector that the text tower does not give.",
                f"the tower {start.tower.encoder.identity!r} without one",
                "a tower with a pooled vector",
                "Choose another tower, or another kind of bridge.",
            )
        return material.Wants(
            pictures=kind.pictures,
            rows=kind.parallel or kind is BranchMethod,
            pooled=pooled,
            without_english=not kind.parallel or kind is PeaMethod,
            tower_pooled=bool(wide),
        )

    def _method(self) -> Method:
        options, start = self.choice.options, self.start
        start.bridge.to(self.device).float()
        encoder = None
        if start.tower.learns:
            encoder = start.tower.encoder.to(self.device).float()
        student = Student(start.bridge, encoder)
        if self.kind is AlignMethod:
            return AlignMethod(student, options.rows, options.length)
        frozen = self._frozen()
        if self.kind is PeaMethod:
            self._require_plain_unet()
            return PeaMethod(student, frozen, options.weight, options.skip_odd)
        if self.kind is IapMethod:
            self._require_plain_unet()
            settings = IapSettings(
                cast(Any, options.compare),
                cast(Any, options.distance),
                options.scaled,
                _numbers(options.attentions),
            )
            return IapMethod(student, frozen, settings, options.pixels)
        if self.kind is BranchMethod:
            return self._branch(student, frozen)
        if start.part == BRANCH:
            raise self._odd_part("a branch")
        if start.part in UNET_PARTS:
            self._put(frozen.unet)
        if self.kind is KvMethod:
            part = cast(Literal["kv", "attn2"], options.part)
            if start.part in UNET_PARTS and start.part != part:
                raise self._odd_part(f"the part {start.part!r}")
            self.learning = learning_keys(frozen.unet, part)
            self.origin = {name: each.detach().clone() for name, each in self.original(part).items()}
            student.unet = self.learning
            return KvMethod(student, frozen, options.weighting)
        return ResampleMethod(student, frozen, options.weighting)

    def original(self, part: str) -> dict[str, Tensor]:
        """The MODEL's own weights of a U-Net part, in float32 on the CPU."""
        names = set(learning_keys(self._frozen().unet, cast(Literal["kv", "attn2"], part)))
        return {
            name: value.detach().to("cpu", torch.float32, copy=True)
            for name, value in patched_weights(self.model)
            if name in names
        }

    def _branch(self, student: Student, frozen: Backbone) -> Method:
        start, settings = self.start, self.choice.settings
        if start.bridge.kind != BRANCH:
            raise BridgeError(
                "This bridge has no branch.",
                f"a bridge of kind {start.bridge.kind!r}",
                f"one of kind {BRANCH!r}",
                "Continue a branch, or begin a new one: choose a tower and continue nothing.",
            )
        net = branch_copy(
            frozen.unet,
            self.model.model.model_config.unet_config,
            start.bridge.spec.context,
            generator=generator(settings.seed, "branch"),
            checkpointing=settings.checkpointing,
        )
        if start.unet:
            net.load_state_dict({name: value.float() for name, value in start.unet.items()})
        nothing = self.source.empty()
        assert nothing.english is not None
        beside = backbones.Beside(frozen.unet, net, nothing.english.float(), nothing.english_pooled)
        student.unet = dict(net.named_parameters())
        student.bridge_learns = any(True for _ in start.bridge.parameters())
        self.net = net
        both = Backbone(frozen.unet, frozen.abar, frozen.prediction, beside)
        self._backbone = both
        return BranchMethod(student, both, self.choice.options.weighting)

    def _frozen(self) -> Backbone:
        if self._backbone is None:
            if not management.is_device_cpu(self.device):
                size = management.module_size(self.model.model.diffusion_model)
                management.free_memory(int(1.2 * size), self.device)
            self._backbone = frozen_copy(
                self.model,
                device=self.device,
                dtype=self._unet_dtype(),
                checkpointing=self.choice.settings.checkpointing,
            )
        return self._backbone

    def _unet_dtype(self) -> torch.dtype:
        """On a CPU the copy stays in float32, where autocast chooses what is worth computing in less."""
        if management.is_device_cpu(self.device):
            return torch.float32
        return DTYPES.get(self.choice.settings.precision, torch.float32)

    def _put(self, unet: torch.nn.Module) -> None:
        """Puts the U-Net part that is there into the copy, where it stays or learns on."""
        own = dict(unet.named_parameters())
        with torch.no_grad():
            for name, value in self.start.unet.items():
                given = value.to(own[name])
                own[name].copy_(own[name] + given if self.start.how == DELTA else given)

    def _require_plain_unet(self) -> None:
        if self.start.part != "none":
            raise self._odd_part("a U-Net part")

    def _odd_part(self, what: str) -> BridgeError:
        return BridgeError(
            f"The objective {self.choice.objective} cannot continue this bridge.",
            f"a bridge with {what} ({self.start.part})",
            "one whose U-Net part the objective can hear",
            "Continue it with the objective that it was trained with, or continue another bridge.",
        )

    # While it goes on.

    def _memory(self) -> str:
        """What the training will take, in words."""
        trainer, method, source, settings = self.trainer, self.method, self.source, self.choice.settings
        numbers = trainer.order.at(trainer.step)[:1]
        draw = trainer.chance.at(trainer.step, numbers, source.shape(numbers[0])).to(self.device)

        def example() -> Tensor:
            with computing(settings, self.device):
                batch = source.batch(draw)
                taught = method.teach(batch, draw, trainer.empty) if method.teaches else ()
                return method.loss(batch, trainer.empty, draw, taught).total

        held: list[torch.nn.Module] = [method.student.bridge]
        if method.student.encoder is not None:
            held.append(method.student.encoder)
        if self._backbone is not None:
            held.append(self._backbone.unet)
        told = backbones.memory(
            held,
            trainer.weights.values(),
            example,
            batch=settings.batch,
            states=_STATES.get(settings.optimiser, 2),
            averaged=settings.average > 0,
            device=self.device,
        )
        learning = sum(each.numel() for each in trainer.weights.values())
        text = (
            f"{learning:,} weights learn; memory: {told.weights / _MEBI:.0f} MiB weights, about "
            f"{told.still / _MEBI:.0f} MiB more to train (activations {told.activations / _MEBI:.0f}, "
            f"gradients {told.gradients / _MEBI:.0f}, optimiser {told.optimiser / _MEBI:.0f}, "
            f"average {told.average / _MEBI:.0f}), {told.free / _MEBI:.0f} MiB free"
        )
        if not told.fits:
            text += (
                "; that is more than is free: the batch will be cut smaller, or use gradient checkpointing"
            )
        return text

    def _tell(self, report: Report) -> None:
        settings, watch = self.choice.settings, self.choice.watch
        sampled = settings.sample_every and report.step % settings.sample_every == 0
        if sampled and watch.samples and self._paints():
            with self.trainer.averaged():
                self.sheet = self._samples()
        picture = None
        if sampled or report.held_out is not None:
            picture = self._picture()
            self._keep(picture)
        if picture is not None or report.step % _TELL_EVERY == 0 or report.step in (1, report.steps):
            held = f", held out {report.held_out:.4g}" if report.held_out is not None else ""
            self.watcher.say(
                f"step {report.step} / {report.steps}, loss {report.loss:.4g}{held}, "
                f"{1 / max(report.seconds, 1e-9):.1f} steps/s"
            )
        self.watcher.show(report.step, report.steps, picture)

    def _paints(self) -> bool:
        return self.vae is not None and self._backbone is not None

    def _samples(self) -> Image.Image:
        numbers = [number for group in (self.source.held_out or self.source.groups) for number in group]
        captions = [
            self.source.rows[number].example.native for number in numbers[: self.choice.watch.samples]
        ]
        self.captions = captions
        return preview.grid(self._painted(captions, 1))

    def _painted(self, captions: Sequence[str], seed: int) -> Tensor:
        """Pictures [B, H, W, 3] of native captions, at the size that is trained most."""
        assert self._backbone is not None
        watch, settings = self.choice.watch, self.choice.settings
        group = max(self.source.groups, key=len)
        shape = self.source.shape(group[0]) or self._square()
        width, height = shape[2] * material.PIXELS, shape[1] * material.PIXELS
        with computing(settings, self.device):
            latents = painting.paint(
                self.method.student,
                self._backbone,
                self.source.captions(captions, self.prepared.native),
                self.trainer.empty,
                shape,
                sizes=backbones.size_embedding(self.model, width, height),
                steps=watch.sample_steps,
                guidance=watch.guidance or (2.0 if self.base.name == "pocket" else 7.0),
                seed=seed,
                poll=_poll,
            )
        return painting.decoded(self.model, self.vae, latents)

    def _square(self) -> tuple[int, int, int]:
        side = self.choice.resolution // material.PIXELS
        return 4, side, side

    def _judged(self) -> dict[str, float]:
        """What the pocket judge says of held-out captions; nothing for other bases."""
        if self.base.name != "pocket" or not self.choice.watch.judged or None in (self.vae, self.model):
            return {}
        self.watcher.say("the judge looks at pictures of held-out captions")
        self._frozen()
        return painting.accuracy(lambda captions: self._painted(captions, 1), self.choice.watch.judged)

    def _picture(self) -> Image.Image:
        return preview.beside(preview.curve(self.trainer.history, self.trainer.held_out), self.sheet)

    def _keep(self, picture: Image.Image) -> None:
        """Writes the picture into the folder of the run; a disk that refuses does not end a training."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            picture.save(self.folder / "progress.png")
        except OSError as error:
            logging.warning("Language Bridge: the picture of the run was not saved: %s", error)

    # What comes out.

    def _trained(self, last: Report | None, judged: Mapping[str, float]) -> Trained:
        start, choice, trainer = self.start, self.choice, self.trainer
        unet, part = dict(start.unet), start.part
        how = start.how if part in UNET_PARTS else None
        if self.kind is KvMethod:
            part, how = choice.options.part, DELTA
            unet = {
                name: (each.detach().cpu() - self.origin[name]).float()
                for name, each in self.learning.items()
            }
        if self.kind is BranchMethod:
            part = BRANCH
            unet = {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}
        record: dict[str, object] = {
            **self.method.record(),
            **choice.settings.to_json(),
            "steps": trainer.step,
            "cpu_minutes": _rounded(trainer.cpu_seconds / 60),
            "weights": sum(each.numel() for each in trainer.weights.values()),
            "examples": self.prepared.facts["examples"],
            "learns": choice.learns,
            "dataset": self.dataset.name[:120],
        }
        if trainer.history:
            record["loss"] = _rounded(trainer.history[-1][1])
        if trainer.held_out:
            record["held_out_loss"] = _rounded(trainer.held_out[-1][1])
        if judged:
            record["accuracy"] = {**judged, "n": choice.watch.judged}
        if how is not None:
            record["unet"] = how
        if any(start.template):
            record[TEMPLATE] = {"before": start.template[0], "after": start.template[1]}
        if start.record:
            record["after"] = {key: value for key, value in start.record.items() if key != TEMPLATE}
        owns = start.owns_tower or start.tower.learns
        return Trained(
            bridge=at_rest(start.bridge),
            encoder=at_rest(start.tower.encoder) if owns else None,
            reference=start.reference,
            base=self.base.name,
            languages=start.languages,
            unet=unet,
            part=part,
            training=record,
            run=self.name,
        )

    def _report(self, resumed: int, memory: str, judged: Mapping[str, float]) -> str:
        trainer, prepared, settings = self.trainer, self.prepared, self.choice.settings
        lines = [
            f"run {self.name}: {self.choice.objective}, {trainer.step} of {settings.steps} steps"
            + (f", gone on from step {resumed}" if resumed else ""),
            f"data: {prepared.facts['examples']} examples, {prepared.facts['held_out']} only measured",
        ]
        if trainer.history:
            recent = [loss for _, loss in trainer.history[-max(1, len(trainer.history) // 10) :]]
            lines.append(
                f"loss: {trainer.history[0][1]:.4g} at first, {sum(recent) / len(recent):.4g} at the end"
            )
        if trainer.held_out:
            lines.append(f"held-out loss: {trainer.held_out[-1][1]:.4g}")
        if judged:
            shares = ", ".join(f"{name} {value:.1%}" for name, value in judged.items())
            lines.append(f"judge: {shares} (n = {self.choice.watch.judged} each)")
        lines.append(memory)
        if trainer.micro != settings.batch:
            lines.append(f"memory ran out: {trainer.micro} examples at once instead of {settings.batch}")
        made = {name: count for name, count in prepared.made.items() if count}
        lines.append(
            "encoded: "
            + (", ".join(f"{count} {name}" for name, count in made.items()) or "nothing, all was kept")
        )
        if prepared.cut_short:
            lines.append(
                f"{prepared.cut_short} captions are longer than the tower's window; their ends are not read"
            )
        problems = [*self.dataset.problems, *prepared.problems]
        if problems:
            lines.append(f"left out: {len(problems)}")
            lines += [f"  {each.place}: {each.what}" for each in problems[:_SHOWN_PROBLEMS]]
            if len(problems) > _SHOWN_PROBLEMS:
                lines.append(f"  and {len(problems) - _SHOWN_PROBLEMS} more")
        if self.sheet is not None:
            lines.append("samples: " + " / ".join(self.captions))
        lines.append(f"checkpoints: {self.folder}")
        return "\n".join(lines)


_READ_POOLED = {"identity", BRANCH}
"""Kinds whose pooled vector is the tower's own."""


def _method_class(objective: str) -> type[Method]:
    if objective not in METHODS:
        raise BridgeError(
            "There is no such objective.", repr(objective)[:80], ", ".join(METHODS), "Choose one of the list."
        )
    return METHODS[objective]


def _numbers(text: str) -> tuple[int, ...] | None:
    parts = [part for part in re.split(r"[\s,;]+", text.strip()) if part]
    if not all(part.isdigit() for part in parts):
        raise BridgeError(
            "The numbers of the attentions cannot be read.",
            repr(text)[:80],
            "numbers such as 0, 2, 5, or nothing for all",
            "Write numbers with commas between them.",
        )
    return tuple(int(part) for part in parts) or None


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _poll() -> None:
    management.throw_exception_if_processing_interrupted()


def _relieve() -> None:
    management.unload_all_models()
    management.soft_empty_cache()


def _out_of_memory() -> tuple[type[BaseException], ...]:
    own = management.OOM_EXCEPTION
    known: list[type[BaseException]] = [torch.OutOfMemoryError, MemoryError]
    return tuple(known if own is Exception else dict.fromkeys([own, *known]))
