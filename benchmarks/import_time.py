"""What the pack adds to ComfyUI's start: seconds as the host prints them, seconds exactly, modules pulled in.

    python bootstrap.py run benchmarks/import_time.py [--json] [--rounds N]

Keys: printed (as ComfyUI prints it, one per round), exact (load_custom_node in a fresh process, one per
round), worst, limit, modules (imported because of the pack), heavy (those that must not be there).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from language_bridge.harness.environment import Environment
from language_bridge.harness.server import Server, install_pack

LIMIT = 0.3
HEAVY = ("diffusers", "transformers.models", "accelerate", "peft", "tokenizers")

CHILD = """
import asyncio, json, sys, time
from comfy.cli_args import args
import torch
args.cpu = not torch.cuda.is_available()
import nodes, server, comfy_api.latest
from comfy_api.latest import io, ComfyExtension
before = set(sys.modules)
began = time.perf_counter()
loaded = asyncio.run(nodes.load_custom_node(sys.argv[1]))
seconds = time.perf_counter() - began
print(json.dumps({"loaded": loaded, "seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def exactly(pack: Path) -> tuple[float, list[str]]:
    """Seconds of the host's own import of the pack in a fresh process, and the modules it pulled in."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(pack)], capture_output=True, text=True, cwd=pack.parent
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    answer = json.loads(done.stdout.splitlines()[-1])
    if not answer["loaded"]:
        raise SystemExit(f"the pack was not loaded\n{done.stderr}")
    return answer["seconds"], answer["modules"]


def printed(environment: Environment) -> float:
    """Seconds that a starting ComfyUI prints for the pack."""
    with Server(environment, lambda text: None) as server:
        seconds = server.import_seconds()
    if seconds is None:
        raise SystemExit("ComfyUI did not load the pack")
    return seconds


def main() -> int:
    """Measure; 1 when the limit is passed or something heavy came along."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    root, tree = Path(os.environ["LANGUAGE_BRIDGE_ENV"]), Path(os.environ["LANGUAGE_BRIDGE_COMFYUI"])
    environment = Environment(root, Path(sys.executable), tree)
    with tempfile.TemporaryDirectory() as folder:
        pack = install_pack(Path(folder))
        rounds = [exactly(pack) for _ in range(options.rounds)]
    modules = [name for name in rounds[0][1] if not name.startswith(str(folder))]
    report = {
        "printed": [printed(environment) for _ in range(options.rounds)],
        "exact": [round(seconds, 4) for seconds, _ in rounds],
        "limit": LIMIT,
        "modules": modules,
        "heavy": [name for name in modules if name.startswith(HEAVY)],
    }
    report["worst"] = max(report["printed"] + report["exact"])
    for key in ("printed", "exact", "worst", "limit", "heavy"):
        print(f"{key:10s} {report[key]}")
    print(f"{'modules':10s} {len(modules)} beside the pack's own")
    if options.json:
        print(json.dumps(report))
    return int(report["worst"] > LIMIT or bool(report["heavy"]))


if __name__ == "__main__":
    sys.exit(main())
