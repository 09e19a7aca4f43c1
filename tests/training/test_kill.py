"""A training that is killed anywhere, even in the middle of a save, ends where an undisturbed one ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def killed(checkout: Path, points: int, seed: int) -> dict[str, Any]:
    """What benchmarks/kill_training.py counts."""
    script = str(checkout / "benchmarks" / "kill_training.py")
    command = [sys.executable, script, "--json", "--points", str(points), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["kills"] >= points and len(report["by"]) == 4, "it died in each way"
    assert (report["torn"], report["lost"], report["unequal"]) == (0, 0, 0), report
    assert done.returncode == 0
    return report


def test_killed_a_few_times(checkout: Path) -> None:
    killed(checkout, 6, 3)


@pytest.mark.slow
def test_killed_at_sixty_points(checkout: Path) -> None:
    """A death costs less than what lies between two saves, and happens inside a save as often as not."""
    report = killed(checkout, 60, 4)
    assert report["repeated_steps"] < 2 and report["leftovers"] >= 20
    assert min(report["by"].values()) >= 8
