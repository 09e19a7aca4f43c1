"""Cancels a training in a real ComfyUI at many moments, and compares what comes out in the end.

    python bootstrap.py run benchmarks/cancel_training.py [--json] [--points N] [--seed N] [--objective NAME]

The same small training is queued again and again with `resume`, and cancelled at random moments: while
pictures are encoded, within a step, while a checkpoint is written. What is saved in the end is compared, byte
for byte, with the bridge of a training that nobody disturbed.

Keys:
points        how many times it was cancelled
slowest_s     longest time from the request to the end of the graph, in seconds
median_s      the median of these times
steps         the steps that the checkpoints stood at after each cancel; a run never goes back
lost          cancels after which a step that was done before was not there any more
equal         whether the bridge in the end equals the undisturbed one, every tensor bit for bit
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from language_bridge.benchmarks.pocket_training import METHODS, graph
from language_bridge.harness.environment import Environment
from language_bridge.harness.server import Server
from language_bridge.recipes import pocket_dataset

STEPS, PICTURES = 120, 64


def prepared(method: str, run: str, name: str) -> dict[str, Any]:
    """The graph of a method's first stage, small, with checkpoints."""
    nodes = graph(method, 0, 1.0, name)
    small = {"steps": STEPS, "batch": 8, "precision": "fp32", "save_every": 4, "resume": True, "run": run}
    nodes["train0"]["inputs"] |= small
    nodes["set0"]["inputs"] |= {"held_out": 0.1}
    nodes["save"]["inputs"]["trained"] = ["train0", 0]
    return {key: node for key, node in nodes.items() if not key.endswith("1") and not key.endswith("2")}


def cancel(server: Server, nodes: dict[str, Any], after: float) -> tuple[bool, float]:
    """Queue, wait, interrupt; whether it was still running, and the seconds until the graph had ended."""
    identity = server.ask("/prompt", {"prompt": nodes})["prompt_id"]
    time.sleep(after)
    began = time.monotonic()
    server.ask("/interrupt", {})
    while True:
        entry = server.ask(f"/history/{identity}").get(identity)
        if entry is not None:
            return entry["status"]["status_str"] != "success", time.monotonic() - began
        time.sleep(0.01)


def standing(server: Server, run: str) -> int:
    """The step of the newest checkpoint of a run, 0 without one."""
    from language_bridge.training import checkpoint

    for folder in server.base.rglob(run):
        if folder.is_dir():
            saved = checkpoint.latest(folder)
            return 0 if saved is None else saved.step
    return 0


def measure(points: int, seed: int, method: str) -> dict[str, Any]:
    """All of it in one server."""
    from safetensors.torch import load_file

    chance = random.Random(seed)
    environment = Environment(
        Path(os.environ["LANGUAGE_BRIDGE_ENV"]),
        Path(sys.executable),
        Path(os.environ["LANGUAGE_BRIDGE_COMFYUI"]),
    )
    with Server(environment, lambda text: print(text, file=sys.stderr, flush=True)) as server:
        pocket_dataset.write(server.base / "input", PICTURES, 0)
        whole, cut = prepared(method, "whole", "whole"), prepared(method, "cut", "cut")
        began = time.monotonic()
        server.run(whole)
        length = time.monotonic() - began
        steps: list[int] = []
        times: list[float] = []
        while len(times) < points:
            if steps and steps[-1] >= STEPS - 1:  # too near the end to be cancelled: begin another run
                server.run(cut)
                cut = prepared(method, f"cut{len(times)}", "cut")
                cut["save"]["inputs"]["overwrite"] = True
            running, seconds = cancel(server, cut, chance.uniform(0.05, 0.12 * length))
            if running:
                times.append(seconds)
                steps.append(standing(server, cut["train0"]["inputs"]["run"]))
        server.run(cut)
        folder = server.base / "models" / "language_bridges"
        ours, theirs = (load_file(str(folder / f"{name}.safetensors")) for name in ("cut", "whole"))
    lost = sum(after < before for before, after in zip(steps, steps[1:], strict=False) if before < STEPS - 1)
    equal = ours.keys() == theirs.keys() and all(bool((ours[key] == theirs[key]).all()) for key in ours)
    return {
        "points": points,
        "slowest_s": round(max(times), 3),
        "median_s": round(statistics.median(times), 3),
        "steps": steps,
        "lost": lost,
        "equal": equal,
        "undisturbed_s": round(length, 1),
    }


def main() -> None:
    """Cancels, compares, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--points", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objective", choices=sorted(METHODS), default="pea")
    options = parser.parse_args()
    found = measure(options.points, options.seed, options.objective)
    if options.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:14} {value}")


if __name__ == "__main__":
    main()
