"""What the frozen U-Net says is asked once for each fixed draw, and is the same ever after."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.training.chance import Chance
from language_bridge.training.settings import Settings
from language_bridge.training.teaching import Teaching

from .toy import SHAPE, Toy, method_of


@pytest.mark.parametrize("name", ["pea", "iap"])
def test_remembered_is_what_was_said(name: str, unet: Any) -> None:
    """Within half precision of what the U-Net says now; and bit-equal to itself at every later time."""
    source, settings = Toy(), Settings(steps=5, draws=2, drop=0.5)
    method, empty = method_of(name, unet), source.empty()
    asked = 0

    def teach(batch: Any, draw: Any) -> Any:
        nonlocal asked
        asked += len(draw.numbers)
        return method.teach(batch, draw, empty)

    teaching, chance = Teaching(teach, source, settings, name), Chance(settings)
    said: dict[int, tuple[torch.Tensor, ...]] = {}
    for round_ in range(2):
        for step in range(6):
            draw = chance.at(step, [0, 3, 1, 0], SHAPE)
            batch = source.batch(draw)
            got = teaching.of(batch, draw)
            for ours, now in zip(got, method.teach(batch, draw, empty), strict=True):
                torch.testing.assert_close(ours, now, rtol=2e-3, atol=2e-3)
            if round_:
                assert all(torch.equal(a, b) for a, b in zip(got, said[step], strict=True))
            said[step] = got
        if not round_:
            before = asked
    assert asked == before <= 1 + 3 * 2 * 2
    other = Teaching(teach, source, settings, name)  # as after a restart: one question, for the shapes
    again = chance.at(2, [0, 3, 1, 0], SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(other.of(source.batch(again), again), said[2], strict=True))
    assert asked == before + 1


def test_without_fixed_draws_nothing_is_kept(unet: Any) -> None:
    source, settings = Toy(), Settings(steps=5)
    method, empty = method_of("pea", unet), source.empty()
    teaching = Teaching(lambda batch, draw: method.teach(batch, draw, empty), source, settings, "pea")
    draw = Chance(settings).at(0, [0, 1], SHAPE)
    got = teaching.of(source.batch(draw), draw)
    assert source.rows is not None and not source.rows.held
    assert all(
        torch.equal(a, b) for a, b in zip(got, method.teach(source.batch(draw), draw, empty), strict=True)
    )


def test_a_source_without_room_still_trains_alike(unet: Any) -> None:
    """No memory: asked each time, rounded as if it had been kept."""
    with_memory, without = Toy(), Toy()
    without.rows = None
    settings = Settings(steps=5, draws=1)
    method = method_of("iap", unet)
    draw = Chance(settings).at(0, [0, 1, 2], SHAPE)
    said = [
        Teaching(
            lambda batch, part, s=source: method.teach(batch, part, s.empty()), source, settings, "iap"
        ).of(source.batch(draw), draw)
        for source in (with_memory, without)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*said, strict=True))


def test_numbers_too_large_to_keep_are_refused() -> None:
    source, settings = Toy(), Settings(steps=5, draws=1)
    teaching = Teaching(lambda batch, draw: (torch.full((len(draw.numbers), 2), 1e6),), source, settings, "x")
    draw = Chance(settings).at(0, [0, 1], SHAPE)
    with pytest.raises(BridgeError, match="cannot be kept"):
        teaching.of(source.batch(draw), draw)
