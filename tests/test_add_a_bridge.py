"""docs/add-a-bridge.md, followed to the letter: its files are put into a checkout, and everything is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = (CHECKOUT / "docs" / "add-a-bridge.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^`([\w./]+)`:\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with what the page needs of ours, and the files of the page; importable like ours."""
    top = tmp_path_factory.mktemp("page").resolve()
    checkout = top / "checkout"
    for room in ("bridges", "encoders", "tests/bridges"):
        shutil.copytree(CHECKOUT / room, checkout / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(CHECKOUT / file, checkout / file)
    for name, text in BLOCKS.items():
        assert not (checkout / name).exists(), f"the page writes over {name}"
        (checkout / name).write_text(text, encoding="utf-8")
    alias = top / "alias" / "language_bridge"
    alias.mkdir(parents=True)
    (alias / "__init__.py").write_text(f"__path__ = [{str(checkout)!r}]\n", encoding="utf-8")
    return checkout


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [
        str(checkout.parent / "alias"),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )


def test_the_page_holds_the_files_it_speaks_of() -> None:
    assert list(BLOCKS) == ["bridges/gated.py", "tests/bridges/test_gated.py", "make_gated.py"]
    assert PAGE.count("```python") == len(BLOCKS)


@pytest.mark.slow
def test_the_kind_of_the_page_keeps_the_contract_and_its_own_tests(copy: Path) -> None:
    arguments = ("tests/bridges/test_contract.py", "tests/bridges/test_gated.py", "-k", "gated")
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 25, done.stdout[-2000:]


def test_the_file_of_the_page_is_a_bridge_file(copy: Path) -> None:
    done = run(copy, "make_gated.py")
    assert (done.returncode, done.stdout) == (0, "gated-zh\n"), done.stderr[-2000:]
    assert (copy / "gated-zh.safetensors").stat().st_size > 1 << 20


def test_our_own_checkout_has_no_such_kind() -> None:
    from language_bridge.bridges import kinds

    assert "gated" not in kinds()
