"""Kind `branch`: BDM's published layout is recognised whole, by names and shapes, and by nothing less."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from language_bridge.bridges.base import Hidden, create, identify
from language_bridge.bridges.branch import Branch
from language_bridge.bridges.errors import BridgeError
from language_bridge.tests.fixtures.branches import SD15, SDXL, TINY, PublishedBranch, random_branch

Shapes = dict[str, tuple[int, ...]]


def shapes_of(net: torch.nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


@pytest.fixture(scope="module")
def published() -> Shapes:
    with torch.device("meta"):
        return shapes_of(PublishedBranch(SD15))


@pytest.fixture(scope="module")
def xl() -> Shapes:
    with torch.device("meta"):
        return shapes_of(PublishedBranch(SDXL, token=1792, pooled=(1024, 1280)))


def test_the_published_file_has_324_tensors_and_363141760_numbers(published: Shapes) -> None:
    assert len(published) == 324
    assert sum(torch.Size(shape).numel() for shape in published.values()) == 363_141_760
    kind, spec = identify(published)
    assert kind is Branch
    assert dataclasses.asdict(spec) == {"hidden": 1024, "context": 1024, "pooled": 0, "tower_pooled": 0}
    assert Branch.part(published) == {}


def test_the_sdxl_option_is_known_by_its_shapes(xl: Shapes) -> None:
    kind, spec = identify(xl)
    assert kind is Branch
    assert dataclasses.asdict(spec) == {
        "hidden": 1792,
        "context": 2048,
        "pooled": 1280,
        "tower_pooled": 1024,
    }
    assert set(Branch.part(xl)) == {
        "prompt_embeds_projection.weight",
        "pooled_prompt_embeds_projection.weight",
    }


@pytest.mark.parametrize("name", TINY)
def test_the_width_of_the_text_is_the_files(name: str) -> None:
    with torch.device("meta"):
        for context in (16, 40):
            sizes = dataclasses.replace(TINY[name], context=context, added=0)
            spec = Branch.recognise(shapes_of(PublishedBranch(sizes)))
            assert spec is not None and (spec.hidden, spec.context) == (context, context)


def test_every_tensor_gets_one_name_in_the_network(published: Shapes, xl: Shapes) -> None:
    for shapes in (published, xl):
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        parts = Branch.unet_part(tensors)
        own = Branch.part(tensors)
        assert {id(tensor) for tensor in (*parts.values(), *own.values())} == {
            id(t) for t in tensors.values()
        }
        assert len(parts) + len(own) == len(shapes)


def test_a_file_that_is_not_whole_says_what_is_odd(published: Shapes) -> None:
    key = "down_blocks.1.resnets.0.conv_shortcut.weight"
    missing = {name: shape for name, shape in published.items() if name != key}
    for odd, found in (
        (missing, f"{key} missing"),
        ({**published, key: (640, 320, 3, 3)}, f"{key} [640, 320, 3, 3]"),
        ({**published, "down_blocks.0.surplus.weight": (3,)}, "down_blocks.0.surplus.weight [3]"),
        ({name: published[name] for name in ("controlnet_mid_block.weight", "conv_in.weight")}, "2 tensors"),
    ):
        with pytest.raises(BridgeError, match="not whole") as caught:
            Branch.recognise(odd)
        assert found in caught.value.found


def test_a_controlnet_for_pictures_is_sent_to_its_own_loader(published: Shapes) -> None:
    with pytest.raises(BridgeError, match="for pictures"):
        Branch.recognise({**published, "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)})


def test_a_unet_is_no_branch(published: Shapes) -> None:
    unet = {key: shape for key, shape in published.items() if not key.startswith("controlnet_")}
    assert Branch.recognise(unet) is None


def test_text_goes_to_the_network_as_it_is_or_through_the_published_matrices() -> None:
    states, pooled = torch.randn(2, 5, 6), torch.randn(2, 3)
    hidden = Hidden(states, torch.ones(2, 5, dtype=torch.bool), pooled)
    assert torch.equal(create("branch", {"hidden": 6, "context": 6})(hidden).context, states)
    bridge = create("branch", {"hidden": 6, "context": 4, "pooled": 2, "tower_pooled": 3})
    bridge.reset_parameters(torch.Generator().manual_seed(0))
    said, weights = bridge(hidden), bridge.state_dict()
    assert torch.allclose(said.context, states @ weights["prompt_embeds_projection.weight"].T)
    assert said.pooled is not None
    assert torch.allclose(said.pooled, pooled @ weights["pooled_prompt_embeds_projection.weight"].T)
    with pytest.raises(BridgeError, match="pooled vector"):
        bridge(Hidden(states, hidden.mask, torch.randn(2, 7)))


def test_tensors_are_handed_on_as_they_are() -> None:
    net = random_branch(TINY["pocket"])
    state = net.state_dict()
    part = Branch.unet_part(state)
    assert part["input_blocks.0.0.weight"] is state["conv_in.weight"]
    assert part["zero_convs.3.0.bias"] is state["controlnet_down_blocks.3.bias"]
    assert part["middle_block.2.out_layers.3.weight"] is state["mid_block.resnets.1.conv2.weight"]
