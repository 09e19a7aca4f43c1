"""U-Net parts: names of both layouts, what counts as moved, and what is taken out in which form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from language_bridge.bridges.errors import BridgeError
from language_bridge.conversion import unet
from language_bridge.conversion.containers import Weights
from language_bridge.tests.conversion.layouts import (
    LDM,
    diffusers_names,
    random,
    trained,
    under,
    unet_shapes,
)

KV = ("attn2.to_k.weight", "attn2.to_v.weight")
ATTN2 = (*KV, "attn2.to_q.weight", "attn2.to_out.0.weight", "attn2.to_out.0.bias")


def lazy(tensors: dict[str, Tensor]) -> Weights:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(shapes, {name: t.dtype for name, t in tensors.items()}, tensors.__getitem__)


def as_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[ldm] for name, ldm in diffusers_names().items()}


@pytest.fixture(scope="module")
def stock() -> dict[str, Tensor]:
    return random(unet_shapes())


def test_the_names_are_those_of_the_host() -> None:
    names = diffusers_names()
    assert len(names) == len(unet_shapes()) == 686
    assert {name: unet.ldm_name(name) for name in names} == names


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.4.resnets.0.conv1.weight",
        "down_blocks.0.resnets.2.conv1.weight",
        "down_blocks.3.downsamplers.0.conv.weight",
        "up_blocks.3.upsamplers.0.conv.weight",
        "mid_block.attentions.1.norm.weight",
        "down_blocks.0.resnets.0.conv9.weight",
        "add_embedding.linear_1.weight",
        "conv_in",
        "",
    ],
)
def test_a_name_outside_of_the_table_is_not_guessed(name: str) -> None:
    assert unet.ldm_name(name) is None


def test_a_unet_of_another_make_is_refused(stock: dict[str, Tensor]) -> None:
    weights = as_diffusers(stock) | {"add_embedding.linear_1.weight": torch.ones(1)}
    with pytest.raises(BridgeError, match="cannot be converted"):
        unet.find_unet(lazy(weights).shapes)


def test_both_layouts_are_found_and_text_encoders_are_not(stock: dict[str, Tensor]) -> None:
    for weights in (under(LDM, stock), as_diffusers(stock)):
        assert set(unet.find_unet(lazy(weights).shapes)) == set(stock)
    assert unet.find_unet({"embeddings.word_embeddings.weight": (3, 3)}) == {}


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("form", unet.FORMS)
@pytest.mark.parametrize(("part", "count", "endings"), [("kv", 32, KV), ("attn2", 80, ATTN2)])
def test_what_was_trained_is_taken_out(
    stock: dict[str, Tensor], layout: str, form: str, part: str, count: int, endings: tuple[str, ...]
) -> None:
    new = trained(stock, *endings)
    published = lazy(under(LDM, new) if layout == "ldm" else as_diffusers(new))
    started = lazy(as_diffusers(stock) if layout == "ldm" else under(LDM, stock))
    taken = unet.extract(published, started, form=form)
    assert (taken.part, taken.form, len(taken.tensors), taken.complete) == (part, form, count, True)
    assert set(taken.tensors) == {name for name in stock if name.endswith(endings)}
    for name, tensor in taken.tensors.items():
        assert torch.equal(tensor, new[name] if form == "replace" else new[name] - stock[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["ours", "theirs", "both"])
def test_rounding_to_half_precision_is_no_training(
    stock: dict[str, Tensor], dtype: torch.dtype, side: str
) -> None:
    half = {name: tensor.to(dtype) for name, tensor in stock.items()}
    ours = trained(half if side in ("ours", "both") else stock, *KV)
    theirs = half if side in ("theirs", "both") else stock
    taken = unet.extract(lazy(under(LDM, ours)), lazy(under(LDM, theirs)))
    assert (taken.part, taken.moved) == ("kv", ())


def test_a_change_of_more_than_a_rounding_is_seen() -> None:
    value = torch.tensor([1.0, 0.001, 0.0])
    assert unet.compare(value, value.half().float())
    assert unet.compare(value, value * (1 + 0.9 * unet.ROUNDING))
    assert not unet.compare(value, value * (1 + 2 * unet.ROUNDING))
    assert not unet.compare(value, value + torch.tensor([0.0, 0.0, 1e-6]))
    assert unet.compare(value.bfloat16(), value)
    assert not unet.compare(value, value * float("nan"))


def test_anything_else_that_moved_is_named_and_refused(stock: dict[str, Tensor]) -> None:
    new = trained(stock, *KV, "input_blocks.1.0.in_layers.2.weight", "out.2.bias")
    published, started = lazy(under(LDM, new)), lazy(under(LDM, stock))
    with pytest.raises(BridgeError) as caught:
        unet.extract(published, started)
    assert "2 other tensors" in caught.value.found
    assert "input_blocks.1.0.in_layers.2.weight" in caught.value.found
    taken = unet.extract(published, started, part="kv")
    assert not taken.complete
    assert taken.moved == ("input_blocks.1.0.in_layers.2.weight", "out.2.bias")


def test_asking_for_less_than_was_trained_is_not_complete(stock: dict[str, Tensor]) -> None:
    published = lazy(under(LDM, trained(stock, *ATTN2)))
    assert len(unet.extract(published, lazy(under(LDM, stock)), part="kv").moved) == 48


def test_nothing_trained_is_nothing_to_take(stock: dict[str, Tensor]) -> None:
    with pytest.raises(BridgeError, match="reference's own"):
        unet.extract(lazy(under(LDM, stock)), lazy(as_diffusers(stock)))


def test_another_network_is_no_reference(stock: dict[str, Tensor]) -> None:
    published = lazy(under(LDM, stock))
    other = random(unet_shapes(context=40))
    with pytest.raises(BridgeError, match="different networks"):
        unet.extract(published, lazy(under(LDM, other)))
    with pytest.raises(BridgeError, match="holds no U-Net"):
        unet.extract(published, lazy({"fc.weight": torch.ones(1)}))


def test_a_unet_of_two_levels_has_no_32_keys_and_values(stock: dict[str, Tensor]) -> None:
    few = {name: tensor for name, tensor in stock.items() if not name.startswith("output_blocks.11")}
    with pytest.raises(BridgeError, match="another number"):
        unet.extract(lazy(under(LDM, few)), lazy(under(LDM, few)))


def test_the_whole_unet_has_ldm_names(stock: dict[str, Tensor]) -> None:
    taken = unet.whole(lazy(as_diffusers(stock)))
    assert (taken.part, taken.form) == ("full", "replace")
    assert all(torch.equal(taken.tensors[name], tensor) for name, tensor in stock.items())
