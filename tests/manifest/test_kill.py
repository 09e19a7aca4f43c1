"""kill -9 at many points of a download: no wrong file is ever there, and the rest goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from language_bridge.tests.manifest.hub import SHA256, Hub, honest, running
from language_bridge.tests.manifest.test_download import (
    PINNED,
    QUICK,
    SIZE,
    UNKNOWN,
    fetch,
    is_whole,
    unfinished,
)

CHECKOUT = Path(__file__).resolve().parents[2]
SAVED = 16_384


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running(honest()) as started:
        yield started


def dying(hub: Hub, target: Path, digest: str, kind: str, number: int) -> subprocess.CompletedProcess[str]:
    script = str(Path(__file__).with_name("dying.py"))
    given = [str(CHECKOUT), str(hub.port), str(target), digest, kind, str(number)]
    command = [sys.executable, "-S", "-s", "-E", "-B", script, *given]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)


def goes_on(hub: Hub, target: Path, digest: str) -> int:
    """What is true after every death; returns how many bytes of the dead download were used."""
    assert not target.exists() or is_whole(target)
    hub.log.clear()
    wanted = UNKNOWN if digest == "-" else PINNED
    got = fetch(target, [hub], wanted, pace=replace(QUICK, save_bytes=SAVED))
    assert is_whole(target) and got.sha256 == SHA256
    assert not unfinished(target) or not [name for name in unfinished(target) if name.endswith(".part")]
    return SIZE if not hub.log else got.kept_bytes


@pytest.mark.slow
def test_killed_wherever_the_bytes_stand(tmp_path: Path, hub: Hub) -> None:
    """40 points, with and without a known hash; a death costs at most one saved step and a block."""
    for point in range(40):
        target, digest = tmp_path / str(point) / "x.bin", "-" if point % 2 else SHA256
        count = 1 + point * (SIZE - 1) // 39
        done = dying(hub, target, digest, "bytes", count)
        assert done.returncode not in (0, 1), done.stderr
        kept = goes_on(hub, target, digest)
        assert kept >= count - SAVED - 4096, f"{kept} of {count} bytes were used"


@pytest.mark.slow
def test_killed_before_and_after_every_call_that_changes_the_disk(tmp_path: Path, hub: Hub) -> None:
    target = tmp_path / "all" / "x.bin"
    lived = dying(hub, target, SHA256, "never", 0)
    assert lived.returncode == 0 and is_whole(target), lived.stderr
    calls = int(lived.stdout)
    assert calls >= 40
    points = sorted({*range(1, 9), *range(calls - 8, calls + 1), *range(9, calls - 8, 5)})
    assert len(points) >= 20
    died = 0
    for number in points:
        for kind in ("before", "after"):
            target, digest = tmp_path / f"{kind}{number}" / "x.bin", SHA256 if number % 2 else "-"
            done = dying(hub, target, digest, kind, number)
            died += done.returncode != 0
            goes_on(hub, target, digest)
    assert died >= 40
