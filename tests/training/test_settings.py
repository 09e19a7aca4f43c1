"""Settings survive a checkpoint, and odd ones are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from language_bridge.bridges.errors import BridgeError
from language_bridge.training.settings import Settings


def test_what_is_written_is_read_back() -> None:
    settings = Settings(
        steps=7, learning_rate=1, optimiser="Muon", draws=2, seed=(1 << 63) - 1, checkpointing=True
    )
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 0},
        {"accumulation": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup": -1},
        {"drop": 1.5},
        {"average": 1.0},
        {"seed": -1},
        {"keep": 0},
        {"schedule": "exponential"},
        {"precision": "fp8"},
        {"clip": float("inf")},
    ],
)
def test_odd_values_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(BridgeError, match=next(iter(change))):
        Settings(**{"steps": 10, **change})


@pytest.mark.parametrize("change", [{"steps": "10"}, {"batch": 1.5}, {"colour": 1}, {"checkpointing": 1}])
def test_a_damaged_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BridgeError):
        Settings.from_json({**Settings(steps=3).to_json(), **change})
    with pytest.raises(BridgeError):
        Settings.from_json({})
