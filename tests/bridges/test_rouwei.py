"""RouWei's adapter beside torch.nn.MultiheadAttention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from language_bridge.bridges.base import Hidden, create
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.rouwei import RouweiSpec
from language_bridge.tests.bridges import references
from language_bridge.tests.bridges.references import assert_equal, single, texts, twin

SIZES = {"hidden": 12, "context": 32, "pooled": 10, "window": 14, "queries": 6, "wide": 2, "narrow": 3}
SPEC = RouweiSpec(heads=16, **SIZES)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("skip", [0, 4])
def test_the_numbers_are_those_of_unpadded_texts_without_the_template(skip: int, double: bool) -> None:
    reference = references.Rouwei(**SIZES)
    bridge = twin("rouwei", reference, dataclasses.replace(SPEC, skip=skip))
    hidden = texts(3, 13, 12)
    alone = [reference(hidden.states[row : row + 1, skip : int(hidden.mask[row].sum())]) for row in range(3)]
    context, pooled = (torch.cat(parts) for parts in zip(*alone, strict=True))
    cond = bridge(hidden) if double else bridge.float()(single(hidden))
    assert context.abs().max() > 1 and pooled.abs().max() > 0.5
    assert_equal(cond, context, pooled)


@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("tokens", [14, 15, 18, 40])
def test_text_beyond_the_window_is_not_read(tokens: int, skip: int) -> None:
    """The window begins behind the template."""
    reference = references.Rouwei(**SIZES)
    bridge = twin("rouwei", reference, dataclasses.replace(SPEC, skip=skip))
    states = texts(1, tokens, 12).states
    cond = bridge(Hidden(states, torch.ones(1, tokens, dtype=torch.bool)))
    assert_equal(cond, *reference(states[:, skip:]))


@pytest.mark.parametrize("tokens", [1, 5, 14])
def test_padding_before_the_text_leaves_the_text_in_the_last_places(tokens: int) -> None:
    """T5Gemma's tokenizer pads so, and each place has a vector of its own."""
    reference = references.Rouwei(**SIZES)
    bridge = twin("rouwei", reference, SPEC)
    states = texts(1, 14, 12).states
    mask = torch.arange(14)[None] >= 14 - tokens
    context, pooled = reference(states[:, 14 - tokens :], start=14 - tokens)
    assert_equal(bridge(Hidden(states, mask)), context, pooled)
    front = bridge(Hidden(states.roll(tokens, dims=1), mask.roll(tokens, dims=1)))
    assert tokens == 14 or (front.context - context).abs().max() > 1e-2


def test_the_published_heads_are_sixteen() -> None:
    spec = twin("rouwei", references.Rouwei(**SIZES)).spec
    assert spec == SPEC


def test_a_text_shorter_than_the_template_is_refused() -> None:
    bridge = twin("rouwei", references.Rouwei(**SIZES), dataclasses.replace(SPEC, skip=5))
    for tokens in (3, 5):
        states = texts(1, tokens, 12).states
        with pytest.raises(BridgeError, match="nothing to read"):
            bridge(Hidden(states, torch.ones(1, tokens, dtype=torch.bool)))


@pytest.mark.parametrize("odd", [{"heads": 5}, {"heads": 0}, {"window": 0}, {"queries": 0}, {"skip": -1}])
def test_impossible_sizes_are_refused(odd: dict[str, int]) -> None:
    with pytest.raises(BridgeError):
        create("rouwei", dataclasses.asdict(SPEC) | odd, device="meta")


def test_all_places_and_queries_get_a_start() -> None:
    bridge = create("rouwei", SPEC)
    for value in bridge.parameters():
        value.data.fill_(torch.nan)
    bridge.reset_parameters(torch.Generator().manual_seed(1))
    assert all(bool(torch.isfinite(value).all()) for value in bridge.parameters())
