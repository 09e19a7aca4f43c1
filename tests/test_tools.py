"""Benchmarks and recipes are run by hand; that they can still be opened is checked here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
TOOLS = sorted(
    f"{folder}.{path.stem}"
    for folder in ("benchmarks", "recipes")
    for path in (CHECKOUT / folder).glob("*.py")
)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_finds_what_it_imports(name: str) -> None:
    """Names that others have moved or taken away are missed here, and not in the middle of a long run."""
    assert importlib.import_module(f"language_bridge.{name}")
