"""ELLA's connector beside torch.nn.MultiheadAttention, and its sense of time."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from language_bridge.bridges.base import Bridge, Hidden, create
from language_bridge.bridges.ella import sinusoids
from language_bridge.bridges.errors import BridgeError
from language_bridge.tests.bridges import references
from language_bridge.tests.bridges.references import assert_equal, single, texts, twin

SIZES = {"hidden": 12, "context": 24, "queries": 5, "layers": 2, "channels": 10}
STEPS = torch.tensor([0.0, 431.5, 999.0])


def pair(padding: bool = False) -> tuple[Bridge, references.Ella]:
    reference = references.Ella(**SIZES)
    spec = create("ella", SIZES | {"padding": padding}, device="meta").spec
    return twin("ella", reference, spec), reference


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_the_numbers_with_and_without_padding(padding: bool, double: bool) -> None:
    """With `padding`, noise behind the text is read too: the authors' fixed window of 128."""
    (bridge, reference), hidden = pair(padding), texts(3, 11, 12)
    lengths = [11] * 3 if padding else hidden.mask.sum(1).tolist()
    context = torch.cat(
        [reference(hidden.states[row : row + 1, : lengths[row]], float(STEPS[row])) for row in range(3)]
    )
    cond = bridge(hidden, STEPS) if double else bridge.float()(single(hidden), STEPS)
    assert context.abs().max() > 1
    assert_equal(cond, context)


def test_a_small_voice_is_heard_as_published() -> None:
    """Near silence the eps of the norms (1e-6) decides the numbers."""
    bridge, reference = pair()
    for module in (bridge.connector, reference.connector):
        module.latents.data.mul_(1e-3)
        module.time_aware_linear.weight.data.zero_()
        module.time_aware_linear.bias.data.zero_()
        module.proj_in.bias.data.zero_()
    states = texts(1, 6, 12).states * 1e-3
    cond = bridge(Hidden(states, torch.ones(1, 6, dtype=torch.bool)), STEPS[1:2])
    assert_equal(cond, reference(states, float(STEPS[1])))


def test_the_sinusoids_are_cosines_then_sines_of_the_published_periods() -> None:
    waves = sinusoids(torch.tensor([0.0, 1.0, 700.0]), 320)
    assert waves.shape == (3, 320) and waves.dtype == torch.float32
    for row, step in enumerate((0.0, 1.0, 700.0)):
        for channel in (0, 1, 80, 159):
            angle = step * 10_000 ** (-channel / 160)
            assert waves[row, channel] == pytest.approx(math.cos(angle), abs=2e-4)
            assert waves[row, 160 + channel] == pytest.approx(math.sin(angle), abs=2e-4)


def test_whole_steps_may_be_integers() -> None:
    (bridge, _), hidden = pair(), texts(2, 6, 12)
    whole = bridge(hidden, torch.tensor([3, 998])).context
    assert torch.equal(whole, bridge(hidden, torch.tensor([3.0, 998.0])).context)


def test_a_text_without_tokens_still_has_latents() -> None:
    (bridge, _), hidden = pair(), texts(2, 6, 12)
    silent = Hidden(hidden.states, torch.zeros(2, 6, dtype=torch.bool))
    assert torch.isfinite(bridge(silent, STEPS[:2]).context).all()


@pytest.mark.parametrize(
    "odd", [{"channels": 9}, {"channels": 0}, {"heads": 5}, {"layers": 0}, {"queries": 0}]
)
def test_impossible_sizes_are_refused(odd: dict[str, int]) -> None:
    with pytest.raises(BridgeError):
        create("ella", SIZES | odd, device="meta")


def test_padding_is_a_choice_that_the_weights_do_not_show() -> None:
    bridge, _ = pair()
    told = dataclasses.asdict(bridge.spec) | {"padding": True}
    assert create("ella", told, device="meta").state_dict().keys() == bridge.state_dict().keys()
