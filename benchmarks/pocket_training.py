"""Trains a bridge of each method in the pocket world, through the nodes, and measures what was learnt.

    python bootstrap.py run benchmarks/pocket_training.py [--json] [--methods NAMES] [--seeds NUMBERS]
                                                          [--pictures N] [--count N] [--scale X] [--keep FILE]

A real ComfyUI is started, a folder of painted pictures with captions and a file of sentence pairs are put
into its input folder, and each method's graph (Dataset, Train, Save) is queued as the page would queue it.
Base model and text towers are the shipped ones; what learns begins from nothing. The bridge that was saved is
then opened by the node Language Bridge and paints prompts that no training saw, as benchmarks/pocket.py does.

Key `methods`, name -> the first seed's row in full and, over the seeds, mean, least and most of `share`:
share        attribute accuracy over held-out combinations and templates, as a share of the English ceiling
cpu_minutes  processor time of the training's steps, all stages; pictures, captions and towers are encoded
             before (`prepared_minutes`, once for all methods, kept on disk)
peak_mb      most resident memory of the server's process during the graph
parameters   weights that learn

`--scale` multiplies the steps of every stage. `--keep` names a file to which each finished row is added, and
whose rows are not trained again, so that the table can be made in several runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from language_bridge.benchmarks.pocket import HEADLINE, Painter, tests
from language_bridge.harness.environment import Environment
from language_bridge.harness.server import Server
from language_bridge.pocket import captions
from language_bridge.recipes import pocket_dataset

PICTURES, PAIRS, BEST = "input/pictures", "input/pairs.tsv", "input/best"
BEST_COUNT = 500
HOURS = 3600.0

SETTINGS: dict[str, Any] = {
    "epochs": 0,
    "accumulation": 1,
    "optimiser": "Muon",
    "warmup": 20,
    "schedule": "cosine",
    "weight_decay": 0.01,
    "clip": 1.0,
    "average": 0.0,
    "checkpointing": False,
    "drop": 0.1,
    "draws": 0,
    "high_noise": 0.0,
    "noise_offset": 0.0,
    "perturbation": 0.0,
    "keep": 1,
    "held_out": 0.02,
    "samples": 4,
    "sample_steps": 15,
    "guidance": 0.0,
    "judged": 0,
}
OPTIONS: dict[str, Any] = {
    "pea_weight": 0.1,
    "pea_skip_odd": False,
    "iap_compare": "output",
    "iap_distance": "squared",
    "iap_scaled": True,
    "iap_layers": "",
    "iap_pixels": 64,
    "align_compare": "tokens",
    "align_length": 0.01,
    "unet_part": "kv",
    "weighting": "noisy",
    "width": 0,
    "depth": 3,
    "queries": 0,
    "layers": 0,
    "heads": 0,
}


@dataclass(frozen=True)
class Stage:
    """One Train node: what differs from the defaults of the three nodes."""

    steps: int
    train: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, tuple[Stage, ...]] = {
    "pea": (
        Stage(
            900,
            {"objective": "pea", "dataset": PICTURES, "learning_rate": 0.01},
            {"high_noise": 0.5},
            {"width": 512},
        ),
    ),
    "iap": (
        Stage(
            900,
            {
                "objective": "iap",
                "dataset": PICTURES,
                "learning_rate": 0.005,
                "learns": "bridge and tower",
            },
            {"draws": 2, "drop": 0.08},
            {"width": 256},
        ),
    ),
    "altdiffusion": (
        Stage(
            300,
            {"objective": "align", "dataset": PAIRS, "kind": "linear", "learning_rate": 0.005},
            {},
            {"align_compare": "cls"},
        ),
        Stage(1100, {"objective": "kv", "dataset": PICTURES, "learning_rate": 0.01, "batch": 64}),
    ),
    "bdm": (
        Stage(
            850,
            {"objective": "branch", "dataset": PICTURES, "learning_rate": 0.01, "batch": 64},
            {"high_noise": 0.5},
        ),
    ),
    "llm": (
        Stage(
            400,
            {
                "objective": "align",
                "dataset": PAIRS,
                "kind": "omni",
                "tower": "pocket-zh-lm",
                "learning_rate": 0.005,
            },
        ),
        Stage(
            280,
            {"objective": "resample", "dataset": PICTURES, "learning_rate": 0.005},
            {"high_noise": 0.5},
        ),
        Stage(60, {"objective": "resample", "dataset": BEST, "learning_rate": 0.001}, {"high_noise": 0.5}),
    ),
}
"""The published methods in the pocket world; steps are chosen for about five CPU minutes or less."""


def graph(method: str, seed: int, scale: float, name: str) -> dict[str, Any]:
    """The API graph of a method: a Dataset and a Train node for each stage, and a Save node."""
    nodes: dict[str, Any] = {"base": {"class_type": "LanguageBridgePocketCheckpoint", "inputs": {}}}
    before: list[Any] | None = None
    for number, stage in enumerate(METHODS[method]):
        train = dict(stage.train)
        data, settings, options, here = (f"{part}{number}" for part in ("data", "set", "opt", "train"))
        nodes[data] = {
            "class_type": "LanguageBridgeDataset",
            "inputs": {"dataset": train.pop("dataset"), "language": "zh"},
        }
        nodes[settings] = {
            "class_type": "LanguageBridgeTrainingSettings",
            "inputs": {**SETTINGS, **stage.settings},
        }
        nodes[options] = {
            "class_type": "LanguageBridgeObjectiveOptions",
            "inputs": {**OPTIONS, **stage.options},
        }
        inputs: dict[str, Any] = {
            "clip": ["base", 1],
            "model": ["base", 0],
            "vae": ["base", 2],
            "dataset": [data, 0],
            "settings": [settings, 0],
            "options": [options, 0],
            "tower": "pocket-zh",
            "kind": "mlp",
            "continue_from": "none",
            "learns": "bridge",
            "run": f"{name}-{number}",
            "resume": False,
            "steps": max(1, round(stage.steps * scale)),
            "batch": 48,
            "resolution": 64,
            "precision": "bf16",
            "seed": seed,
            "save_every": 0,
            "sample_every": 0,
            "validate_every": 0,
            **train,
        }
        if before is not None:
            inputs |= {"trained": before, "tower": "of the bridge"}
        nodes[here] = {"class_type": "LanguageBridgeTrain", "inputs": inputs}
        before = [here, 0]
    nodes["save"] = {
        "class_type": "LanguageBridgeSave",
        "inputs": {"trained": before, "name": name, "overwrite": True, "stored": "float16"},
    }
    return nodes


def write_data(folder: Path, count: int, seed: int) -> None:
    """Pictures, sentence pairs, and a small set of pictures whose captions leave nothing out."""
    pocket_dataset.write(folder, count, seed)
    whole = folder / "whole"
    pocket_dataset.write(whole, 12 * BEST_COUNT, seed + 1)
    source, best = whole / pocket_dataset.PICTURES, folder / "best"
    best.mkdir()
    lines = (source / pocket_dataset.CAPTIONS).read_text(encoding="utf-8").splitlines()
    # What is said of an object is left out with a chance of 0.15; the longest sentences leave out least.
    chosen = sorted(lines, key=lambda line: -len(json.loads(line)["english"].split()))[:BEST_COUNT]
    (best / pocket_dataset.CAPTIONS).write_text("\n".join(chosen) + "\n", encoding="utf-8")
    for line in chosen:
        shutil.copy2(source / json.loads(line)["image"], best)
    shutil.rmtree(whole)


def comfyui_of(server: Server) -> int:
    """Process number of the ComfyUI that a server started."""
    found = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _command(entry).find(str(server.base)) >= 0
    ]
    return max(found, key=_resident)


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _resident(process: int) -> int:
    return _status(process, "VmRSS")


def _status(process: int, name: str) -> int:
    """A size in KiB out of /proc."""
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name + ":")), 0)


def _spent(process: int) -> float:
    """Processor minutes of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") / 60


class Judge:
    """Paints with bridges and compares with the English ceiling."""

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        import comfy.utils
        import folder_paths

        comfy.utils.PROGRESS_BAR_ENABLED = False
        self.painter = Painter(shipped=False)
        folder_paths.folder_names_and_paths["language_bridges"] = (
            [str(folder), *folder_paths.get_folder_paths("language_bridges")],
            {".safetensors"},
        )
        self.seed = seed
        self.asked = {split: tests(split, count, seed) for split in captions.SPLITS}
        self.ceiling = self._accuracy(
            self.painter.model, self.painter.clip, lambda one: (one.english.text, one.english)
        )

    def row(self, name: str) -> dict[str, Any]:
        """Accuracy of each split, and its share of the ceiling."""
        from language_bridge.host.bridging import bridge

        model, clip = bridge(self.painter.model, self.painter.clip, name, 1.0, "two streams")[:2]
        accuracy = self._accuracy(model, clip, lambda one: (one.chinese.text, one.chinese))
        share = {split: accuracy[split] / self.ceiling[split] for split in accuracy}
        headline = _mean(accuracy) / _mean(self.ceiling)
        return {"share": headline, "accuracy": accuracy, "share_of_split": share}

    def _accuracy(self, model: Any, clip: Any, of: Any) -> dict[str, float]:
        return {
            split: self.painter.score(model, clip, [of(one) for one in asked], self.seed)["attributes"]
            for split, asked in self.asked.items()
        }


def _mean(accuracy: Mapping[str, float]) -> float:
    return float(np.mean([accuracy[split] for split in HEADLINE]))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method and seed."""
    rows: list[dict[str, Any]] = []
    if options.keep and options.keep.exists():
        rows = [json.loads(line) for line in options.keep.read_text(encoding="utf-8").splitlines()]
    done = {(row["method"], row["seed"]) for row in rows}
    wanted = [(m, s) for s in options.seeds for m in options.methods if (m, s) not in done]
    if not wanted:
        return rows
    environment = Environment(
        Path(os.environ["LANGUAGE_BRIDGE_ENV"]),
        Path(sys.executable),
        Path(os.environ["LANGUAGE_BRIDGE_COMFYUI"]),
    )
    with tempfile.TemporaryDirectory() as folder, Server(environment, _say) as server:
        bridges = Path(folder)
        write_data(server.base / "input", options.pictures, 0)
        judge = Judge(bridges, options.count, options.seed)
        _say(f"English ceiling {judge.ceiling}")
        process = comfyui_of(server)
        for method, seed in wanted:
            name = f"trained-{method}-{seed}"
            Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")
            before, began = _spent(process), time.time()
            server.run(graph(method, seed, options.scale, name), timeout=4 * HOURS)
            spent = _spent(process) - before
            saved = server.base / "models" / "language_bridges" / f"{name}.safetensors"
            stages = _stages(saved)
            shutil.copy2(saved, bridges / saved.name)
            row = {
                "method": method,
                "seed": seed,
                **judge.row(saved.name),
                "cpu_minutes": sum(stage["cpu_minutes"] for stage in stages),
                "prepared_minutes": spent - sum(stage["cpu_minutes"] for stage in stages),
                "wall_minutes": (time.time() - began) / 60,
                "peak_mb": _status(process, "VmHWM") / 1024,
                "parameters": max(stage["weights"] for stage in stages),
                "steps": [stage["steps"] for stage in stages],
                "ceiling": judge.ceiling,
                "n": options.count,
                "pictures": options.pictures,
            }
            rows.append(row)
            _say(json.dumps(row))
            if options.keep:
                with open(options.keep, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


def _stages(path: Path) -> list[dict[str, Any]]:
    """The training records in a bridge file, the last stage first."""
    from language_bridge.bridges.file import read_header

    header = read_header(path)
    assert header is not None
    record: Any = header.training
    stages: list[dict[str, Any]] = []
    while record:
        stages.append(dict(record))
        record = record.get("after")
    return stages


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Method -> its first seed's row, and the spread over all seeds."""
    methods: dict[str, Any] = {}
    for name in METHODS:
        own = sorted((row for row in rows if row["method"] == name), key=lambda row: row["seed"])
        if own:
            shares = [row["share"] for row in own]
            spread = {"mean": statistics.mean(shares), "least": min(shares), "most": max(shares)}
            minutes = [row["cpu_minutes"] for row in own]
            methods[name] = {
                **own[0],
                "seeds": [row["seed"] for row in own],
                "share_over_seeds": spread,
                "cpu_minutes_over_seeds": [min(minutes), max(minutes)],
            }
    return {"methods": methods}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Trains, measures, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument(
        "--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--count", type=int, default=100, help="prompts in each split")
    parser.add_argument("--seed", type=int, default=2026, help="of the prompts")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps")
    parser.add_argument("--keep", type=Path, help="file of finished rows")
    found = summary(run(parser.parse_args()))
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    print(f"{'method':14}{'share':>8}{'least':>8}{'most':>8}{'CPU min':>9}{'MB':>7}{'weights':>10}")
    for name, row in found["methods"].items():
        spread = row["share_over_seeds"]
        print(
            f"{name:14}{100 * spread['mean']:8.1f}{100 * spread['least']:8.1f}{100 * spread['most']:8.1f}"
            f"{row['cpu_minutes']:9.2f}{row['peak_mb']:7.0f}{row['parameters']:10}"
        )


if __name__ == "__main__":
    main()
