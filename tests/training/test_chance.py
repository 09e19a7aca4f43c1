"""The chance of a step depends on the seed and the step's number, and on nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from language_bridge.training.chance import Chance, Draw
from language_bridge.training.settings import Settings

SHAPE = (4, 6, 5)


def chance(**changes: Any) -> Chance:
    return Chance(Settings(**{"steps": 10, **changes}))


def same(ours: Draw, theirs: Draw) -> bool:
    pairs = [
        (getattr(ours, name), getattr(theirs, name))
        for name in ("timestep", "dropped", "noise", "extra", "fixed")
    ]
    return ours.numbers == theirs.numbers and all(
        (a is None and b is None) or (a is not None and torch.equal(a, b)) for a, b in pairs
    )


@pytest.mark.parametrize("changes", [{}, {"draws": 3}, {"perturbation": 0.1, "noise_offset": 0.5}])
def test_a_step_is_the_same_whenever_it_is_drawn(changes: dict[str, Any]) -> None:
    numbers = [5, 2, 9, 2]
    first = chance(**changes).at(3, numbers, SHAPE)
    torch.manual_seed(4)
    other = chance(**changes)
    other.at(2, numbers, SHAPE)
    assert same(other.at(3, numbers, SHAPE), first)
    assert not same(other.at(4, numbers, SHAPE), first)
    assert not same(chance(seed=1, **changes).at(3, numbers, SHAPE), first)


def test_parts_are_what_the_whole_is_made_of() -> None:
    whole = chance(draws=2, perturbation=0.1).at(0, range(7), SHAPE)
    parts = [whole.part(start, start + 3) for start in (0, 3, 6)]
    assert sum((part.numbers for part in parts), ()) == whole.numbers
    for name in ("timestep", "dropped", "noise", "extra", "fixed"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_fixed_draws_come_again_for_the_same_example() -> None:
    """Two draws an example: over many steps no third noise is seen, and a drop belongs to its draw."""
    drawn = chance(draws=2, drop=0.5)
    seen: dict[tuple[int, int], tuple[float, int, bool]] = {}
    for step in range(40):
        draw = drawn.at(step, [0, 1, 2], SHAPE)
        assert draw.noise is not None and draw.fixed is not None
        for place, number in enumerate(draw.numbers):
            key = (number, int(draw.fixed[place]))
            facts = (float(draw.noise[place].sum()), int(draw.timestep[place]), bool(draw.dropped[place]))
            assert seen.setdefault(key, facts) == facts
    assert len(seen) == 6 and len({facts[0] for facts in seen.values()}) == 6


def test_shares_are_what_the_settings_say() -> None:
    draw = chance(drop=0.25, high_noise=0.5).at(0, range(4000), None)
    assert draw.noise is None
    assert abs(float(draw.dropped.float().mean()) - 0.25) < 0.03
    # A half anywhere in 0..999 and a half from 600 on: 0.5 x 0.4 + 0.5.
    assert abs(float((draw.timestep >= 600).float().mean()) - 0.7) < 0.03
    assert int(draw.timestep.min()) >= 0 and int(draw.timestep.max()) < 1000


def test_offset_noise_is_level_over_a_channel_and_perturbation_stays_apart() -> None:
    plain, offset = chance().at(0, range(3), SHAPE), chance(noise_offset=0.5).at(0, range(3), SHAPE)
    assert plain.noise is not None and offset.noise is not None
    level = offset.noise - plain.noise
    assert torch.allclose(level, level[:, :, :1, :1].expand_as(level), atol=1e-6) and float(level.std()) > 0.1
    perturbed = chance(perturbation=0.1).at(0, range(3), SHAPE)
    assert perturbed.noise is not None and perturbed.extra is not None
    assert torch.equal(perturbed.noise, plain.noise)
    assert 0.05 < float(perturbed.extra.std()) < 0.2


def test_what_is_held_out_is_measured_alike_and_whole() -> None:
    first, second = chance(drop=1.0), chance(drop=1.0, seed=9)
    ours, theirs = first.held_out([3, 4], SHAPE), second.held_out([3, 4], SHAPE)
    assert same(ours, theirs) and not bool(ours.dropped.any())
    assert not bool(chance(drop=1.0, draws=2).held_out([3, 4], SHAPE).dropped.any())
