"""Runs the command line of training at scale: opens models and shards, trains, writes the bridge."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from .options import parser, published

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...bridges.base import Bridge
    from ...encoders.base import Encoder
    from ..backbone import Backbone
    from ..methods import Method, Student
    from ..published import Rules
    from ..settings import Settings
    from ..trainer import Report, Trainer
    from .models import Model
    from .processes import Processes
    from .source import ShardSource
    from .stream import Stream

NO_PICTURES = {"align"}
NEEDS = {"pea": "either", "iap": "both", "align": "both"}
"""Which captions a method reads; the others read native ones alone."""
HELD_OUT_BATCHES = 8
LARGEST_STEM = 64


def main(arguments: Sequence[str]) -> int:
    """Run with these arguments: 0 when the training came to its end, 1 on an error, 130 when stopped."""
    options = parser().parse_args(arguments)
    from ...bridges.errors import BridgeError

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.INFO)
    missing = _missing()
    if missing:
        logging.error(
            "%s: not installed in this Python (%s). pip install %s", missing, sys.executable, missing
        )
        return 1
    from .models import quiet
    from .processes import Processes

    quiet()
    processes = Processes(options.cpu)
    if processes.index:
        logging.getLogger().setLevel(logging.WARNING)  # the first one speaks for all
    try:
        finished = Work(options, processes).train()
    except BridgeError as error:
        logging.error("%s", error)
        return 1
    finally:
        processes.end()
    return 0 if finished else 130


class Work:
    """One run of the command: everything that is opened, and how it is put together."""

    def __init__(self, options: argparse.Namespace, processes: Processes) -> None:
        import torch

        from ...bridges.errors import BridgeError
        from ...encoders.file import load_encoder, read_encoder_header
        from ..trainer import DTYPES
        from .models import open_model

        self.options, self.processes = options, processes
        self.device = processes.device
        self.dtype = DTYPES.get(options.precision, torch.float32)
        self.name = str(options.name or options.out.stem)[:LARGEST_STEM]
        method = str(options.method)
        self.model: Model = open_model(
            options.model,
            device=self.device,
            dtype=self.dtype,
            unet=method != "align",
            pictures=method not in NO_PICTURES,
            checkpointing=options.checkpointing,
            variant=options.variant,
        )
        header = read_encoder_header(options.tower)
        if header is None:
            raise BridgeError(
                "The text tower is no tower file of Language Bridge.",
                options.tower.name,
                "a tower that install.py get or convert has written",
                "Run: python install.py convert FILES...",
            )
        self.digest = header.digest
        self.tower: Encoder = load_encoder(options.tower, device=self.device).eval().requires_grad_(False)
        self.started: Mapping[str, Tensor] = {}
        self.added = False  # whether these are differences from the U-Net's own
        self.bridge: Bridge = self._bridge().to(self.device).train()
        self.told = published(self.model.base)

    # -- parts ---------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train to the last step, or until a signal; whether it came to the end."""
        from ..trainer import Trainer

        settings = self._settings()
        rules = self._rules()
        source = self._source(settings, rules)
        try:
            method = self._method()
            trainer = Trainer(
                method,
                source,
                settings,
                self.options.run,
                order=source,
                facts=self._facts(source.stream, rules),
                device=self.device,
                ranks=self.processes,
            )
            step = trainer.resume()
            self.processes.agree(step, "step to go on from")
            self.processes.agree(_digest(trainer.weights.values()), "weights")
            self._begin(trainer, step, source)
            finished = self._run(trainer, source)
            if self.processes.index == 0:
                with trainer.averaged():
                    self._write(method, trainer)
            self.processes.wait()
            return finished
        finally:
            source.close()

    def _run(self, trainer: Trainer, source: ShardSource) -> bool:
        every, left_out = self.options.tell_every, 0
        with _signals() as stopped:
            reports = cast("Generator[Report]", trainer.train())
            for report in reports:
                if report.step % every == 0 or report.held_out is not None or report.step == report.steps:
                    self._tell(report, source)
                if source.stream.left_out.total() != left_out:
                    left_out = source.stream.left_out.total()
                    self._tell_left_out(source.stream)
                # All of them leave after the same step, or those that stay would wait for ever.
                if self.processes.any(bool(stopped)):
                    reports.close()
                    logging.info("stopped after step %d; the same command goes on from there", report.step)
                    return report.step >= report.steps
        return True

    def _tell(self, report: Report, source: ShardSource) -> None:
        parts = ", ".join(f"{name} {value:.5g}" for name, value in sorted(report.parts.items()))
        notes = [f"held out {report.held_out:.5g}"] if report.held_out is not None else []
        notes += ["left out: gradients were not finite"] if report.skipped else []
        notes += [f"{source.unreadable} examples could not be read"] if source.unreadable else []
        logging.info(
            "step %d of %d: loss %.5g (%s), rate %.3g, %.2f s%s",
            report.step,
            report.steps,
            report.loss,
            parts,
            report.rate,
            report.seconds,
            "".join(f"; {note}" for note in notes),
        )

    def _tell_left_out(self, stream: Stream) -> None:
        reasons = (f"{count} {reason}" for reason, count in sorted(stream.left_out.items()))
        logging.info("shards read so far: %d examples; left out: %s", stream.usable, ", ".join(reasons))

    def _begin(self, trainer: Trainer, step: int, source: ShardSource) -> None:
        learning = sum(each.numel() for each in trainer.weights.values())
        processes, whole = self.processes.count, trainer.settings.effective * self.processes.count
        logging.info(
            "%s on %s: %d numbers learn; %d processes, %d examples a step; %d shards; from step %d to %d",
            self.options.method,
            self.model.base,
            learning,
            processes,
            whole,
            len(source.stream.shards),
            step,
            trainer.settings.steps,
        )

    def _bridge(self) -> Bridge:
        import torch

        from ...bridges.base import create, kind_class
        from ...bridges.errors import BridgeError
        from ...bridges.file import BRANCH, load_bridge

        options, model, tower = self.options, self.model, self.tower
        if options.start is not None:
            loaded = load_bridge(options.start)
            if (loaded.header.base, loaded.bridge.spec.hidden) != (model.base, tower.width):
                raise BridgeError(
                    "The bridge to go on from does not fit.",
                    f"base {loaded.header.base!r}, tower width {loaded.bridge.spec.hidden}",
                    f"base {model.base!r}, tower width {tower.width}",
                    "Choose a bridge for this model and this tower.",
                )
            self._require_kind(loaded.header.kind)
            if loaded.header.unet not in ("none", options.method):
                raise BridgeError(
                    "This method cannot go on with the bridge's part of the U-Net.",
                    f"--method {options.method} and a bridge with the part {loaded.header.unet!r}",
                    f"--method {loaded.header.unet}, which goes on with it",
                    "Change --method, or go on from a bridge without a part of the U-Net.",
                )
            self.started = loaded.unet
            self.added = loaded.header.training.get("unet") == "delta"
            return loaded.bridge
        kind = str(options.kind or (BRANCH if options.method == BRANCH else "mlp"))
        self._require_kind(kind)
        spec: dict[str, object] = {"hidden": tower.width, "context": model.context}
        if kind_class(kind).pools:
            spec["pooled"] = model.pooled
        if kind == BRANCH:
            spec["context"] = tower.width
            if model.pooled and tower.pooled_width != model.pooled:
                spec["tower_pooled"] = tower.pooled_width
        fields = {each.name for each in dataclasses.fields(kind_class(kind).Spec)}
        if "width" in fields:
            spec["width"] = tower.width
        bridge = create(kind, spec | dict(options.size))
        bridge.reset_parameters(torch.Generator().manual_seed(options.seed))
        return bridge

    def _require_kind(self, kind: str) -> None:
        """BridgeError unless the method trains bridges of this kind, and the tower gives what they read."""
        from ...bridges.errors import BridgeError
        from ...bridges.file import BRANCH

        method = self.options.method
        if (kind == BRANCH) != (method == BRANCH):
            raise BridgeError(
                "This method does not train a bridge of this kind.",
                f"--method {method} and a bridge of kind {kind!r}",
                f"--method {BRANCH} with a bridge of kind {BRANCH!r}, or both of them another",
                "Change --method, --kind or --start.",
            )
        if kind == BRANCH and self.model.pooled and not self.tower.pooled_width:
            raise BridgeError(
                "A branch beside SDXL reads a pooled vector that the text tower does not give.",
                f"the tower {self.tower.identity!r} without one",
                "a tower with a pooled vector",
                "Choose another tower, a model of SD1.x, or another --method.",
            )

    def _settings(self) -> Settings:
        from ..settings import Settings

        options, told = self.options, self.told
        return Settings(
            steps=options.steps,
            batch=options.batch or told.batch,
            accumulation=options.accumulation,
            learning_rate=told.rate if options.learning_rate is None else options.learning_rate,
            warmup=told.warmup if options.warmup is None else options.warmup,
            schedule=options.schedule,
            optimiser=options.optimiser,
            weight_decay=options.weight_decay,
            clip=options.clip,
            average=options.average,
            precision=options.precision,
            checkpointing=options.checkpointing,
            drop=options.drop,
            seed=options.seed,
            save_every=options.save_every,
            keep=options.keep,
            validate_every=options.validate_every,
            noise_offset=told.offset if options.noise_offset is None else options.noise_offset,
        )

    def _rules(self) -> Rules:
        from ..published import Rules

        options, told = self.options, self.told
        return Rules(
            native_field=options.native_field,
            english_field=options.english_field,
            clean=not options.no_cleaning,
            simplify=simplifier(options.simplify),
            least_area=told.area if options.least_area is None else options.least_area,
            least_aesthetic=options.least_aesthetic,
            most_watermark=options.most_watermark,
            native_judged=told.judged,
            needs=cast(Any, NEEDS.get(options.method, "native")),
            unnamed=options.keep_unnamed,
        )

    def _source(self, settings: Settings, rules: Rules) -> ShardSource:
        from .shards import find_shards
        from .source import Reading, ShardSource
        from .stream import Stream

        options = self.options
        shapes = () if self.model.latents is None else options.shapes or self.told.shapes
        common: dict[str, Any] = {
            "batch": settings.effective * self.processes.count,
            "seed": settings.seed,
            "window": options.window,
        }
        stream = Stream(
            find_shards(options.shards), rules.fault, shapes, agree=self.processes.agree, **common
        )
        self.processes.agree(int(stream.digest[:12], 16), "shards")
        aside = None
        if options.held_out:
            aside = Stream(find_shards(options.held_out), rules.fault, shapes, **common)
        return ShardSource(
            stream,
            rules,
            self.tower,
            self.model.english,
            self.model.latents,
            device=self.device,
            pooled=self.model.pooled,
            embedding=self.model.sizes,
            tower_learns=options.tower_learns,
            typed=self.bridge.beside,
            reading=Reading(options.crop, options.size_order, options.threads),
            seed=settings.seed,
            part=(self.processes.index, self.processes.count),
            held_out=aside,
            most_held_out=HELD_OUT_BATCHES * settings.batch,
        )

    def _method(self) -> Method:
        from ..methods import (
            AlignMethod,
            BranchMethod,
            IapMethod,
            KvMethod,
            PeaMethod,
            ResampleMethod,
            Student,
        )

        options, backbone = self.options, self.model.backbone
        student = Student(
            self.bridge,
            self.tower.train() if options.tower_learns else None,
            self._unet_part(),
            not options.bridge_rests,
        )
        if options.method == "align":
            return AlignMethod(student, options.compare)
        assert backbone is not None
        if options.method == "pea":
            return PeaMethod(student, backbone, options.weight, skip_odd=self.model.base == "sd1")
        if options.method == "iap":
            return IapMethod(student, backbone)
        if options.method == "resample":
            return ResampleMethod(student, backbone)
        if options.method == BranchMethod.name:
            return BranchMethod(student, self._beside(student, backbone))
        return KvMethod(student, backbone)

    def _beside(self, student: Student, backbone: Backbone) -> Backbone:
        """The U-Net over the empty English prompt with a branch beside it, which learns."""
        from ..chance import generator
        from .branch import beside, branch_copy, go_on, learning

        net = branch_copy(
            backbone.unet,
            self.bridge.spec.context,
            generator=generator(self.options.seed, "branch"),
            checkpointing=self.options.checkpointing,
        )
        if self.started:
            go_on(net, self.started)
        student.unet = learning(net)
        return beside(backbone, net, *self.model.english([""]))

    def _unet_part(self) -> dict[str, nn.Parameter] | None:
        """The weights of the U-Net that learn, under LDM's names, as a bridge file has them."""
        from ...bridges.errors import BridgeError
        from ...conversion.unet import ldm_name
        from ..methods import learning_keys

        if self.options.method not in ("kv", "attn2") or self.model.backbone is None:
            return None
        part: dict[str, nn.Parameter] = {}
        for name, each in learning_keys(self.model.backbone.unet, self.options.method).items():
            ours = ldm_name(name)
            if ours is None:
                raise BridgeError(
                    "This part of the U-Net has no place in a bridge file.",
                    name,
                    "the cross-attention of an SD1.x, SD2.x or SDXL U-Net",
                    "Train a bridge without a part of the U-Net.",
                )
            part[ours] = each
            if ours in self.started:
                given = self.started[ours].to(each)
                each.data = each.data + given if self.added else given
        return part

    def _facts(self, stream: Stream, rules: Rules) -> dict[str, object]:
        """What a run is about; it goes on only with the same."""
        read = dataclasses.asdict(dataclasses.replace(rules, simplify=None))
        read["simplify"] = rules.simplify is not None
        return {
            "model": f"{_digest(self.model.weights()):013x}",
            "base": self.model.base,
            "tower": self.digest,
            "kind": self.bridge.kind,
            "shards": stream.digest,
            "shapes": [list(shape) for shape in stream.shapes],
            "window": stream.window,
            "crop": self.options.crop,
            "size_order": self.options.size_order,
            "rules": read,
        }

    def _write(self, method: Method, trainer: Trainer) -> None:
        import torch

        from ...bridges.file import BridgeHeader, EncoderRef, save_bridge
        from ...encoders.file import pack_encoder

        options, tower = self.options, self.tower
        learns = method.student.encoder is not None
        digest = self.digest
        if learns:
            tower.identity = f"{self.name}-tower"
            dtype = torch.float16 if options.half else None
            digest = pack_encoder(tower, languages=(options.language,), licence=options.licence, dtype=dtype)[
                0
            ].digest
        part = method.student.unet
        record = {
            **method.record(),
            "steps": trainer.step,
            "batch": trainer.settings.effective * self.processes.count,
            "learning_rate": trainer.settings.learning_rate,
            "seed": trainer.settings.seed,
            "drop": trainer.settings.drop,
            "noise_offset": trainer.settings.noise_offset,
        }
        header = BridgeHeader(
            kind=self.bridge.kind,
            spec=dataclasses.asdict(self.bridge.spec),
            base=self.model.base,
            encoder=EncoderRef(
                tower.family, tower.identity, tower.layer, tower.window, tower.mask_rule, digest
            ),
            languages=(options.language,),
            unet=options.method if part else "none",
            training=record | ({"unet": "replace"} if part and not self.bridge.beside else {}),
            licence=options.licence,
            source="training at scale",
            name=self.name,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_bridge(
            options.out,
            header,
            self.bridge,
            tower if learns else None,
            unet={name: each.detach() for name, each in part.items()} if part else None,
            dtype=torch.float16 if options.half else None,
        )
        logging.info("the bridge of step %d is in %s", trainer.step, options.out)


def simplifier(choice: str) -> Any:
    """Traditional to simplified Chinese by OpenCC, or None; says so when it is wanted and not installed.

    choice: "auto", "yes" (BridgeError without the library) or "no".
    """
    from ...bridges.errors import BridgeError

    if choice == "no":
        return None
    try:
        import opencc  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if choice == "yes":
            raise BridgeError(
                "Captions cannot be turned into simplified Chinese.",
                "the package opencc is not installed",
                "OpenCC",
                "Run: pip install opencc. Or leave captions as they are: --simplify no.",
            ) from error
        logging.warning(
            "OpenCC is not installed: traditional characters in captions as found stay as they are"
        )
        return None
    return cast(Any, opencc).OpenCC("t2s").convert


def _missing() -> str:
    """Names of the packages that this entry needs and this Python lacks."""
    from importlib.util import find_spec

    wanted = ("torch", "safetensors", "tokenizers", "transformers", "diffusers", "accelerate", "PIL", "numpy")
    return " ".join({"PIL": "pillow"}.get(name, name) for name in wanted if find_spec(name) is None)


def _digest(tensors: Any) -> int:
    """52 bits of a SHA-256 over tensors."""
    from ...encoders import guard

    named = {f"{number:06d}": cast("Tensor", each).detach() for number, each in enumerate(tensors)}
    return int(guard.digest(named)[:13], 16)


@contextmanager
def _signals() -> Generator[list[int]]:
    """While inside, SIGINT and SIGTERM only put their number into the list."""
    caught: list[int] = []
    wanted = [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in wanted}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
