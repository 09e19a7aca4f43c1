"""MuLan's adapters beside torch.nn.Transformer: one, two, both ways to pool, and the prefix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from language_bridge.bridges.base import Hidden, create
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.mulan import Mulan, MulanSpec
from language_bridge.tests.bridges import references
from language_bridge.tests.bridges.references import assert_equal, shapes_of, single, texts, twin

XL = {"hidden": 12, "first": 24, "second": 16, "pooled": 14, "queries": 7}
SPEC = {"hidden": 12, "context": 16}


def without_prefix(states: Tensor) -> Tensor:
    return states[:, [0, *range(4, states.shape[1])]]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_one_adapter_reads_all_rows_but_the_prefix(layers: int, double: bool) -> None:
    reference = references.MulanAdapter(12, 16, 7, layers)
    bridge, hidden = twin("mulan", reference), texts(2, 11, 12)
    context = reference(without_prefix(hidden.states))
    assert context.abs().max() > 0.5
    assert_equal(bridge(hidden) if double else bridge.float()(single(hidden)), context)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("tower_pooled", [10, 0], ids=["projected", "attended"])
def test_two_adapters_side_by_side_and_a_pooled_vector(tower_pooled: int, double: bool) -> None:
    reference = references.MulanXl(**XL, tower_pooled=tower_pooled, added=False)
    bridge, hidden = twin("mulan", reference), texts(2, 11, 12, pooled=10)
    context, pooled = reference(without_prefix(hidden.states), hidden.pooled)
    assert context.shape == (2, 7, 40) and pooled.abs().max() > 0.5
    assert_equal(bridge(hidden) if double else bridge.float()(single(hidden)), context, pooled)


def test_a_window_without_the_prefix_keeps_all_rows() -> None:
    """SD1.x and SD2.x: 80 tokens with the prefix, 77 without it."""
    reference = references.MulanAdapter(12, 16, 7, 1)
    bridge = twin("mulan", reference)
    assert (bridge.spec.skip, bridge.spec.bare) == (3, 77)
    for tokens in (76, 77, 78, 80):
        states = texts(1, tokens, 12).states
        read = states if tokens == 77 else without_prefix(states)
        assert_equal(bridge(Hidden(states, torch.ones(1, tokens, dtype=torch.bool))), reference(read))


def test_without_a_prefix_nothing_is_dropped() -> None:
    reference = references.MulanAdapter(12, 16, 7, 1)
    spec = MulanSpec(**SPEC, queries=7, skip=0, bare=0)
    hidden = texts(1, 11, 12)
    assert_equal(twin("mulan", reference, spec)(hidden), reference(hidden.states))


def test_sdxl_has_no_window_without_the_prefix() -> None:
    reference = references.MulanXl(**XL, tower_pooled=0, added=False)
    bridge, hidden = twin("mulan", reference), texts(1, 77, 12)
    context, pooled = reference(without_prefix(hidden.states), hidden.states)
    assert_equal(bridge(hidden), context, pooled)


def test_what_belongs_into_the_unet_is_handed_out_under_its_names() -> None:
    reference = references.MulanXl(**XL, tower_pooled=10, added=True)
    published = reference.state_dict()
    bridge = twin("mulan", reference)
    assert set(bridge.state_dict()) == {key for key in published if not key.startswith("add_embedding")}
    unet = Mulan.unet_part(published)
    assert {key: tuple(value.shape) for key, value in unet.items()} == {
        "label_emb.0.0.weight": (14, 1550),
        "label_emb.0.0.bias": (14,),
        "label_emb.0.2.weight": (14, 14),
        "label_emb.0.2.bias": (14,),
    }
    assert unet["label_emb.0.0.weight"] is published["add_embedding.linear_1.weight"]
    assert unet["label_emb.0.2.bias"] is published["add_embedding.linear_2.bias"]
    assert Mulan.unet_part(references.MulanAdapter(12, 16, 7, 1).state_dict()) == {}


def test_a_tower_without_the_pooled_vector_is_refused() -> None:
    bridge = twin("mulan", references.MulanXl(**XL, tower_pooled=10, added=False))
    for pooled in (0, 9):
        with pytest.raises(BridgeError, match=r"\[batch, 10\]"):
            bridge(texts(1, 11, 12, pooled=pooled))


@pytest.mark.parametrize(
    "odd", [{"context": 20}, {"second": 4}, {"second": 16}, {"second": 24}, {"queries": 0}, {"skip": -1}]
)
def test_impossible_sizes_are_refused(odd: dict[str, int]) -> None:
    with pytest.raises(BridgeError):
        create("mulan", SPEC | odd, device="meta")


def test_all_queries_and_places_get_a_start() -> None:
    for sizes in (SPEC | {"pooled": 8}, SPEC | {"pooled": 8, "second": 8, "tower_pooled": 8}):
        bridge = create("mulan", sizes)
        for value in bridge.parameters():
            value.data.fill_(torch.nan)
        bridge.reset_parameters(torch.Generator().manual_seed(1))
        assert all(bool(torch.isfinite(value).all()) for value in bridge.parameters())


def test_pixarts_projection_is_no_bridge_of_ours() -> None:
    reference = references.MulanProjection(4096, 1152).to("meta")
    assert Mulan.recognise(shapes_of(reference)) is None
    assert dataclasses.is_dataclass(Mulan.Spec)
