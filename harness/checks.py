"""The test command's steps: formatter, linter, type checker, self-scan of the shipped files, pytest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from .environment import CHECKOUT, BootstrapError, Environment
from .scan import findings

HOST_TESTS = "tests/host"
OLDER_TESTS = (HOST_TESTS, "tests/nodes")


def run_checks(environment: Environment, say: Callable[[str], None]) -> list[str]:
    """Run every check that is no test, print what they say, return the names of those that failed."""
    failed: list[str] = []
    ruff = str(environment.tool("ruff"))
    commands = {
        "ruff check": [ruff, "check", "--output-format", "concise", "."],
        "ruff format": [ruff, "format", "--check", "."],
        "pyright": [str(environment.python), "-m", "pyright", "--pythonpath", str(environment.python)],
    }
    for name, command in commands.items():
        say(name)
        if subprocess.call(command, cwd=CHECKOUT, env=_type_check_variables(environment)):
            failed.append(name)
    say("self-scan of the shipped files")
    for finding in findings(CHECKOUT):
        print(finding, flush=True)
        failed += [] if "self-scan" in failed else ["self-scan"]
    return failed


def run_pytest(
    environment: Environment,
    arguments: Sequence[str],
    *,
    older: bool = False,
    failed: Sequence[str] = (),
) -> int:
    """Run pytest on one ComfyUI release and return its exit code.

    Without *arguments* it runs everything, on the older release the folders of OLDER_TESTS. The names in
    *failed* are printed in pytest's summary, so that a failed check is not lost above it.
    """
    command, variables = _pytest(environment, arguments, older=older, failed=failed)
    return subprocess.call(command, cwd=CHECKOUT, env=variables)


class Beside:
    """The tests that run beside the others: those of the host on both releases, of the nodes on the older.

    They are one process of one thread after the other, and so are the others: on two cores both lanes go on
    at full speed, and each takes about as long.
    """

    def __init__(self, environment: Environment) -> None:
        self._passes = [_pytest(environment, [], older=True), _pytest(environment, [HOST_TESTS], older=False)]
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (until it ends)
        self._codes: list[int] = []
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> int:
        """Wait for the end, print what was said, return the first exit code that is not 0."""
        self._thread.join()
        self._said.seek(0)
        shutil.copyfileobj(self._said, sys.stdout)
        sys.stdout.flush()
        self._said.close()
        return next((code for code in self._codes if code), int(len(self._codes) < len(self._passes)))

    def stop(self) -> None:
        """End them now, if they still run."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()

    def _run(self) -> None:
        for command, variables in self._passes:
            if self._stopped:
                return
            self._process = subprocess.Popen(
                command, cwd=CHECKOUT, env=variables, stdout=self._said, stderr=subprocess.STDOUT, text=True
            )
            self._codes.append(self._process.wait())


def _pytest(
    environment: Environment, arguments: Sequence[str], *, older: bool, failed: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The command and its variables."""
    tree = environment.older if older else environment.comfyui
    if tree is None:
        raise BootstrapError("the older ComfyUI is not in this environment")
    wanted = list(arguments) or (list(OLDER_TESTS) if older else [])
    # One thread: the tensors are tiny, threads of several processes on few cores wait for each other, and how
    # a sum is split among threads shows in its last bits.
    variables = environment.variables(tree) | {"OMP_NUM_THREADS": "1"}
    variables["LANGUAGE_BRIDGE_FAILED_CHECKS"] = "; ".join(failed)
    return [str(environment.tool("pytest")), *wanted], variables


def _type_check_variables(environment: Environment) -> dict[str, str]:
    """pyright finds Node.js as a wheel in the environment and needs no ComfyUI on PYTHONPATH."""
    variables = environment.variables()
    del variables["PYTHONPATH"]
    return variables | {
        "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
        "PATH": os.pathsep.join([str(Path(environment.python).parent), os.environ.get("PATH", "")]),
    }
