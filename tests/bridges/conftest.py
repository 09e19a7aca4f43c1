"""Fixtures of the bridge tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from language_bridge.bridges.file import save_bridge
from language_bridge.tests.bridges.toys import WIDTH, toy_bridge, toy_header


@pytest.fixture
def bridge_file(tmp_path: Path) -> Path:
    """A whole and valid file with an mlp bridge."""
    bridge = toy_bridge("mlp", WIDTH)
    path = tmp_path / "toy.safetensors"
    save_bridge(path, toy_header(bridge), bridge)
    return path
