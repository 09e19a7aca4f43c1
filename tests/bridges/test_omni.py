"""OmniDiffusion's resampler beside torch.nn.Transformer."""

from __future__ import annotations

import pytest
import torch

from language_bridge.bridges.base import Hidden, create
from language_bridge.bridges.errors import BridgeError
from language_bridge.tests.bridges import references
from language_bridge.tests.bridges.references import assert_equal, single, texts, twin

SIZES = {"hidden": 12, "context": 32, "pooled": 10, "queries": 9, "layers": 2}


@pytest.mark.parametrize("double", [True, False])
def test_the_numbers_are_those_of_unpadded_texts_one_by_one(double: bool) -> None:
    reference = references.Omni(**SIZES)
    bridge, hidden = twin("omni", reference), texts(3, 11, 12)
    alone = [reference(hidden.states[row : row + 1, : int(hidden.mask[row].sum())]) for row in range(3)]
    context, pooled = (torch.cat(parts) for parts in zip(*alone, strict=True))
    cond = bridge(hidden) if double else bridge.float()(single(hidden))
    assert context.abs().max() > 1
    assert_equal(cond, context, pooled)


def test_one_token_is_enough_and_none_is_refused() -> None:
    """The empty prompt is the start token alone."""
    reference = references.Omni(**SIZES)
    bridge, hidden = twin("omni", reference), texts(2, 5, 12)
    one = torch.arange(5) < torch.tensor([[1], [1]])
    context, pooled = reference(hidden.states[:1, :1])
    cond = bridge(Hidden(hidden.states, one))
    torch.testing.assert_close(cond.context[:1], context)
    torch.testing.assert_close(cond.pooled[:1], pooled)
    with pytest.raises(BridgeError, match="a text without tokens"):
        bridge(Hidden(hidden.states, torch.arange(5) < torch.tensor([[1], [0]])))


@pytest.mark.parametrize("odd", [{"queries": 2}, {"layers": 0}, {"heads": 0}, {"heads": 3}])
def test_impossible_sizes_are_refused(odd: dict[str, int]) -> None:
    with pytest.raises(BridgeError):
        create("omni", SIZES | odd, device="meta")


def test_a_trained_one_starts_with_lively_queries() -> None:
    bridge = create("omni", SIZES)
    bridge.reset_parameters(torch.Generator().manual_seed(1))
    assert 0.8 < bridge.state_dict()["t2i_decoder_prompt"].std() < 1.2
