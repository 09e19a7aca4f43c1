"""What every test stands on: the import alias, the host on its device, temporary folders, a real server."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
TREE = os.environ.get("LANGUAGE_BRIDGE_COMFYUI")
if TREE is None:
    pytest.exit(
        "Tests run in the environment that bootstrap.py makes: python bootstrap.py test [PYTEST ARGS]", 4
    )

import folder_paths  # noqa: E402
import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

import language_bridge  # noqa: E402

if TYPE_CHECKING:
    from language_bridge.harness.environment import Environment
    from language_bridge.harness.server import Server
    from language_bridge.tests.fixtures.far import Far

if list(language_bridge.__path__) != [str(CHECKOUT)]:
    pytest.exit(
        f"language_bridge is {list(language_bridge.__path__)}, not this checkout; run bootstrap.py test", 4
    )
if not torch.cuda.is_available():
    args.cpu = True  # before comfy.model_management is imported, which decides by it

_scratch = tempfile.TemporaryDirectory(prefix="language-bridge-tests-")
for _name in ("output", "temp", "input", "user"):
    (Path(_scratch.name) / _name).mkdir()
    getattr(folder_paths, f"set_{_name}_directory")(str(Path(_scratch.name) / _name))


def pytest_unconfigure() -> None:
    """Remove the folders that the in-process host wrote to."""
    _scratch.cleanup()


def pytest_report_header() -> list[str]:
    """Name the host under test."""
    from comfyui_version import __version__

    return [f"ComfyUI {__version__} at {TREE}", f"torch {torch.__version__}, Python {sys.version.split()[0]}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Repeat the checks that failed before pytest began, where the last lines show them."""
    for name in filter(None, os.environ.get("LANGUAGE_BRIDGE_FAILED_CHECKS", "").split("; ")):
        terminalreporter.write_line(f"FAILED before the tests: {name} (its report stands above)", red=True)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder of this checkout."""
    return CHECKOUT


@pytest.fixture(scope="session")
def environment() -> Environment:
    """The environment that these tests run in."""
    from language_bridge.harness.environment import Environment

    assert TREE is not None
    return Environment(Path(os.environ["LANGUAGE_BRIDGE_ENV"]), Path(sys.executable), Path(TREE))


@pytest.fixture(scope="session")
def server(environment: Environment) -> Iterator[Server]:
    """A real ComfyUI server with the shipped files of the pack installed, started as the demo starts it."""
    from language_bridge.harness.server import Server

    with Server(environment, lambda text: None) as running:
        yield running


@pytest.fixture(scope="session")
def far(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    """A second server, which downloads from a hub of the tests."""
    from language_bridge.tests.fixtures.far import far_server

    with far_server(environment, tmp_path_factory.mktemp("far")) as running:
        yield running
