"""One command from a bare Python to pictures or test results: makes a private environment, then works in it.

    python bootstrap.py demo [--prompt TEXT ...] [--seed N] [--out DIR] [--serve] [--json]
    python bootstrap.py test [--host newest|older] [PYTEST ARGS ...]
    python bootstrap.py run FILE [ARGS ...]

Standard library only. Everything that is made lies in .bootstrap/ beside this file (or in --env DIR);
delete it to undo all of it. ComfyUI is the one that COMFYUI_PATH names, or the one whose custom_nodes folder
holds this checkout, or a pinned release from PyPI whose hash is checked; none of them is changed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.checks import HOST_TESTS, Beside, run_checks, run_pytest
from harness.demo import Options, run_demo
from harness.environment import CHECKOUT, BootstrapError, Progress, prepare
from harness.server import PromptError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="bootstrap.py", description=(__doc__ or "").splitlines()[0])
    top.add_argument(
        "--env", type=Path, default=CHECKOUT / ".bootstrap", metavar="DIR", help="where to make it"
    )
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="draw the shipped demo, or your prompts, on a real ComfyUI server"
    )
    demo.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="draw this; repeatable")
    demo.add_argument("--seed", type=int, default=7)
    demo.add_argument("--out", type=Path, metavar="DIR", help="where the pictures and the sheet go")
    demo.add_argument("--serve", action="store_true", help="leave the server up afterwards")
    demo.add_argument("--checkpoint", type=Path, metavar="FILE", help="draw with your own SD checkpoint")
    demo.add_argument(
        "--bridge", metavar="NAME", help="a bridge file, or its name in models/language_bridges"
    )
    demo.add_argument("--json", action="store_true", help="make the last line one JSON object")

    test = commands.add_parser("test", help="lint, type check, self-scan, and the tests on the real ComfyUI")
    test.add_argument("--host", choices=("newest", "older"), help="pytest alone, on one ComfyUI release")
    test.add_argument("arguments", nargs=argparse.REMAINDER, help="pytest alone, with these arguments")

    run = commands.add_parser("run", help="run a script in the environment, ComfyUI on the path")
    run.add_argument("file", type=Path)
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    return top


def demo(options: argparse.Namespace, say: Progress) -> int:
    """Draw the demo; the report goes to standard output."""
    environment = prepare(options.env.resolve(), say)

    def show(report: dict[str, Any]) -> None:
        report |= {"seconds_with_setup": round(say.seconds(), 2), "peak_memory_mb": peak_memory_mb()}
        for picture in report["pictures"]:
            verdict = picture["judge"]
            mark = f"{verdict['right']}/{verdict['asked']} right" if verdict else ""
            _write(f"{picture['row']:15s} {mark:12s} {picture['prompt']}")
        _write(f"sheet: {report['sheet']}")
        if options.json:
            _write(json.dumps(report))

    wanted = Options(
        tuple(options.prompt), options.seed, options.out, options.serve, options.checkpoint, options.bridge
    )
    run_demo(environment, wanted, say, show)
    return 0


def test(options: argparse.Namespace, say: Progress) -> int:
    """Everything; or, with pytest arguments or a host named, pytest alone."""
    environment = prepare(options.env.resolve(), say, tests=True)
    if options.host or options.arguments:
        return run_pytest(environment, options.arguments, older=options.host == "older")
    failed = run_checks(environment, say)
    say("tests on the newest ComfyUI; beside them those of the host, and on the older one host and nodes")
    beside = Beside(environment)
    try:
        code = run_pytest(environment, ["tests", f"--ignore={HOST_TESTS}"], failed=failed)
        say("host and nodes on the older ComfyUI, then the host on the newest, said")
        if beside.result():
            failed.append("tests of the host, or on the older ComfyUI")
    finally:
        beside.stop()
    for name in failed:
        say(f"FAILED: {name}")
    return code or int(bool(failed))


def run(options: argparse.Namespace, say: Progress) -> int:
    """Run a script; its standard output and exit code are handed on untouched."""
    environment = prepare(options.env.resolve(), say)
    command = [str(environment.python), str(options.file), *options.arguments]
    return subprocess.call(command, env=environment.variables())


def peak_memory_mb() -> float | None:
    """Largest resident memory of any finished child process so far; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _terminated(*_: object) -> None:
    raise SystemExit(143)


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if os.name != "nt":
        signal.signal(signal.SIGTERM, _terminated)
    options = parser().parse_args(arguments)
    say = Progress()
    try:
        return {"demo": demo, "test": test, "run": run}[options.command](options, say)
    except (BootstrapError, PromptError) as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bootstrap: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
