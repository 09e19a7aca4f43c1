"""Kills a training with signal 9 wherever it hurts, and counts what is lost. POSIX only.

    python bootstrap.py run benchmarks/kill_training.py [--json] [--points N] [--seed N]

A real `Trainer` (Muon, moving average, two micro-batches a step, a checkpoint every second step) over random
tensors runs in a process of its own, and dies: before or after its Nth call that changes the disk, in the
middle of its Nth write, or after some microseconds. Each run dies up to three times, takes itself up again
each time, and is at last left alone until its end. After every death all that is claimed to be a checkpoint
is looked at with nothing but hashlib and json, and compared with that of a run that nobody disturbed.

Keys: kills (that met a living process), runs; torn (checkpoints that were not whole, or whose bytes were not
those of the undisturbed run), lost (saves that the training had reported and that were gone), unequal (runs
whose last checkpoint was not the undisturbed one's, byte for byte): must be 0. repeated_steps (the most that
a death cost), leftovers (deaths that left a temporary folder, which the next save removes), calls (that
change the disk, in one undisturbed run), by (kills by their kind).
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from language_bridge.encoders import guard
from language_bridge.tests.training.toy import Toy, method_of
from language_bridge.training.settings import Settings
from language_bridge.training.trainer import Trainer

SETTINGS = Settings(
    steps=16,
    batch=2,
    accumulation=2,
    learning_rate=1e-2,
    warmup=3,
    schedule="cosine",
    optimiser="Muon",
    average=0.9,
    drop=0.3,
    save_every=2,
    validate_every=8,
    keep=2,
)
CHANGING = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
KINDS = ("before", "after", "inside", "moment")


@dataclass(frozen=True)
class Death:
    """How a process ends: at its `number`th call or write, or after so many microseconds."""

    kind: str
    number: int


class Killer:
    """Counts the calls that change the disk, and ends the process in the one that is meant."""

    def __init__(self, death: Death | None) -> None:
        self.death = death or Death("never", 0)
        self.calls = self.writes = 0
        for name in CHANGING:
            setattr(os, name, self._counting(getattr(os, name)))
        guard.open = self._open  # type: ignore[attr-defined]

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            self.calls += 1
            if self.death == Death("before", self.calls):
                die()
            answer = call(*given, **named)
            if self.death == Death("after", self.calls):
                die()
            return answer

        return counted

    def _open(self, path: Any, mode: str) -> Any:
        file = open(path, mode, buffering=0)  # noqa: SIM115 (the caller closes it)
        write = file.write

        def counted(data: bytes) -> int:
            self.writes += 1
            if self.death == Death("inside", self.writes):
                write(data[: len(data) // 2])
                die()
            return write(data)

        return Wrapped(file, counted)


class Wrapped:
    """An open file with another `write`."""

    def __init__(self, file: Any, write: Callable[[bytes], int]) -> None:
        self.file = file
        self.write = write

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(self, *reason: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def die() -> None:
    """End at once, with nothing flushed and nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Life:
    """What a process said: where it began, the last step that it had done and the last that it had saved, its
    calls and writes, how long it trained (seconds), and whether it was killed.
    """

    begun: int
    done: int
    saved: int
    calls: int
    writes: int
    seconds: float
    killed: bool


def live(run: Path, death: Death | None) -> Life:
    """Train in a process of its own until its end or its death; it takes up what is there."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            train(run, death, writer)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, encoding="ascii") as said:
        first = said.readline()
        started = time.perf_counter()
        if first and death is not None and death.kind == "moment":
            time.sleep(death.number / 1e6)
            os.kill(child, signal.SIGKILL)
        lines = [json.loads(line) for line in said if line.endswith("\n")]
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - started
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the training failed")
    told = {"begun": 0, "calls": 0, "writes": 0}
    for line in [json.loads(first) if first else {}, *lines]:
        told |= line
    begun = told["begun"]
    done, saved = told.get("done", begun), told.get("saved", begun)
    return Life(begun, done, saved, told["calls"], told["writes"], seconds, os.WIFSIGNALED(status))


def train(run: Path, death: Death | None, writer: int) -> None:
    """What the process does, telling the writer each thing when it has happened."""

    def say(**fields: int) -> None:
        os.write(writer, json.dumps(fields).encode("ascii") + b"\n")

    torch.set_num_threads(1)
    killer = Killer(death)
    trainer = trainer_of(run)
    say(begun=trainer.resume())
    for report in trainer.train():
        say(done=report.step, **({} if report.saved is None else {"saved": report.step}))
    say(calls=killer.calls, writes=killer.writes)


def trainer_of(run: Path | None) -> Trainer:
    """The training that all of them do."""
    return Trainer(method_of("align", None), Toy(), SETTINGS, run)


def warm_up() -> None:
    """Do once what a first step imports, so that children need not; nothing that starts threads."""
    trainer = trainer_of(None)
    for weight in trainer.weights.values():
        weight.grad = torch.ones_like(weight)
    trainer.optimiser.step(0)


Snapshot = dict[str, Any]


def whole(folder: Path) -> Snapshot | None:
    """What a checkpoint holds, by nothing of ours: bytes by file, and facts; None when it is not whole."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="ascii"))
        held: Snapshot = {name: (folder / name).read_bytes() for name in state["files"]}
    except (OSError, ValueError, KeyError):
        return None
    for name, entry in state["files"].items():
        found = {"bytes": len(held[name]), "sha256": hashlib.sha256(held[name]).hexdigest()}
        if found != entry:
            return None
    state["facts"]["settings"].pop("keep")
    state["facts"].pop("cpu_seconds")  # the one thing that no two runs share
    return {**held, "facts": state["facts"], "step": state["step"]}


def checkpoints(run: Path) -> dict[Path, Snapshot | None]:
    """Everything in a run that claims to be a checkpoint."""
    if not run.is_dir():
        return {}
    return {path: whole(path) for path in run.iterdir() if path.name.startswith("step-")}


def undisturbed(work: Path) -> tuple[dict[int, Snapshot], Life]:
    """The checkpoints of a run that is left alone, by step, and its life as the others live."""
    global SETTINGS
    life = live(work / "alone", None)
    settings = SETTINGS
    SETTINGS = Settings(**{**settings.to_json(), "keep": 1000})  # type: ignore[arg-type]
    live(work / "all", None)
    SETTINGS = settings
    kept = {held["step"]: held for held in checkpoints(work / "all").values() if held}
    assert set(kept) == set(range(settings.save_every, settings.steps + 1, settings.save_every))
    return kept, life


def deaths(points: int, life: Life, chance: random.Random) -> list[Death]:
    """So many ends, as many of each kind, spread over a whole life."""
    made: list[Death] = []
    for point in range(points):
        kind, share = KINDS[point % len(KINDS)], (point + 0.5) / points
        if kind == "moment":
            made.append(Death(kind, int(1e6 * life.seconds * share * chance.uniform(0.5, 1))))
        else:
            whole = life.writes if kind == "inside" else life.calls
            made.append(Death(kind, max(1, round(whole * share))))
    chance.shuffle(made)
    return made


def measure(points: int, seed: int, work: Path) -> dict[str, Any]:
    """Kill so often, and count."""
    chance = random.Random(seed)
    warm_up()
    expected, alone = undisturbed(work)
    waiting = deaths(points, alone, chance)
    counts: collections.Counter[str] = collections.Counter()
    by: collections.Counter[str] = collections.Counter()
    repeated = number = 0
    while counts["kills"] < points:
        run = work / str(number)
        number += 1
        newest = 0
        for _ in range(1 + number % 3):
            death = waiting.pop() if waiting else Death("before", chance.randint(1, alone.calls))
            # A run that is taken up is shorter, and so is its life.
            share = (SETTINGS.steps - newest) / SETTINGS.steps
            death = Death(death.kind, max(1, int(death.number * share)))
            life = live(run, death)
            counts["kills"] += life.killed
            by[death.kind] += life.killed
            found = checkpoints(run)
            counts["torn"] += sum(held is None or held != expected[held["step"]] for held in found.values())
            newest = max((held["step"] for held in found.values() if held), default=0)
            counts["lost"] += newest < life.saved
            repeated = max(repeated, life.done - newest)
            counts["leftovers"] += life.killed and any(run.glob(".*"))
            if not life.killed:
                break
        life = live(run, None)
        found = checkpoints(run)
        last = [held for held in found.values() if held and held["step"] == SETTINGS.steps]
        counts["unequal"] += not last or any(held != expected[SETTINGS.steps] for held in last)
        counts["torn"] += sum(held is None for held in found.values())
        shutil.rmtree(run)
    return {
        "kills": counts["kills"],
        "runs": number,
        **{name: counts[name] for name in ("torn", "lost", "unequal", "leftovers")},
        "repeated_steps": repeated,
        "calls": alone.calls,
        "by": dict(sorted(by.items())),
    }


def main() -> int:
    """Kill and count; 1 when anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--points", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options.points, options.seed, Path(folder))
    if options.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:12} {value}")
    return int(report["torn"] or report["lost"] or report["unequal"] or report["kills"] < options.points)


if __name__ == "__main__":
    sys.exit(main())
