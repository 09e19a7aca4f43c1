"""The PEA adapter against its published sizes and against the formula, written down once more by hand."""

from __future__ import annotations

import math

import pytest
import torch

from language_bridge.bridges.base import create, identify
from language_bridge.bridges.mlp import MlpSpec
from language_bridge.tests.bridges.toys import toy_bridge, toy_hidden

SDXL = {"context": 2048, "pooled": 1280}
SD1 = {"context": 768}
# Parameter counts of the published layouts: reference/encoders-pea-iap-llm.md, section 1.1.
PUBLISHED = {
    "P3 1024/1024": (MlpSpec(hidden=1024, width=1024, depth=3, **SDXL), 6_033_408),
    "P3 1024/2048": (MlpSpec(hidden=1024, width=2048, depth=3, **SDXL), 11_538_432),
    "P3 2048/2048": (MlpSpec(hidden=2048, width=2048, depth=3, **SDXL), 13_637_632),
    "P3 768/2048": (MlpSpec(hidden=768, width=2048, depth=3, **SDXL), 11_013_632),
    "P2 1024/1024": (MlpSpec(hidden=1024, width=1024, depth=2, bias=True, **SDXL), 4_987_136),
    "P4 1024/2048": (MlpSpec(hidden=1024, width=2048, depth=4, **SDXL), 15_732_736),
    "SD1.5 training": (MlpSpec(hidden=1024, width=2048, depth=3, **SD1), 7_866_368),
    "SD1.5 test": (MlpSpec(hidden=1024, width=3072, depth=5, **SD1), 33_818_624),
}


@pytest.mark.parametrize(("spec", "count"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_parameter_counts(spec: MlpSpec, count: int) -> None:
    bridge = create("mlp", spec, device="meta")
    assert sum(parameter.numel() for parameter in bridge.parameters()) == count


@pytest.mark.parametrize("layout", [name for name in PUBLISHED if not name.startswith("P2")])
def test_published_layouts_are_recognised(layout: str) -> None:
    spec, _ = PUBLISHED[layout]
    bridge = create("mlp", spec, device="meta")
    shapes = {key: tuple(value.shape) for key, value in bridge.state_dict().items()}
    assert set(shapes) == {
        "layernorm.weight",
        "layernorm.bias",
        *(f"projector.{2 * layer}.weight" for layer in range(spec.depth)),
        *(("fc.weight", "fc.bias") if spec.pooled else ()),
    }
    assert identify(shapes) == (type(bridge), spec)


def test_the_old_layout_is_recognised_and_its_keys_translated() -> None:
    spec, _ = PUBLISHED["P2 1024/1024"]
    shapes = {
        "layernorm.weight": (1024,),
        "layernorm.bias": (1024,),
        "fc1.weight": (1024, 1024),
        "fc1.bias": (1024,),
        "fc2.weight": (1280, 1024),
        "fc2.bias": (1280,),
        "fc3.weight": (2048, 1280),
        "fc3.bias": (2048,),
    }
    cls, recognised = identify(shapes)
    assert recognised == spec
    bridge = create("mlp", spec, device="meta")
    assert {cls.own_key(key) for key in shapes} == set(bridge.state_dict())
    adopted = cls.adopt({key: torch.zeros(shape, device="meta") for key, shape in shapes.items()}, spec)
    assert {key: tuple(value.shape) for key, value in adopted.items()} == cls.shapes(spec)


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"projector.0.weight": (8, 8)},
        {"layernorm.weight": (8,), "layernorm.bias": (8,), "projector.0.weight": (8,)},
        {"layernorm.weight": (8,), "layernorm.bias": (8,), "projector.0.weight": (8, 9)},
        {"layernorm.weight": (8,), "layernorm.bias": (8,), "projector.0.weight": (1 << 40, 8)},
        {"layernorm.weight": (0,), "layernorm.bias": (0,), "projector.0.weight": (0, 0)},
        {"layernorm.weight": (8,), "layernorm.bias": (8,), "projector.0.weight": (8, 8), "fc.weight": ()},
        {"layernorm.weight": (8,), "layernorm.bias": (8,), "projector.1.weight": (8, 8)},
        {"fc1.weight": (8, 8), "projector.0.weight": (8, 8)},
    ],
)
def test_other_layouts_are_not_claimed(shapes: dict[str, tuple[int, ...]]) -> None:
    assert type(toy_bridge("mlp")).recognise(shapes) is None


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def normalised(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * scale + shift


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("pooled", [0, 12])
def test_the_formula(depth: int, pooled: int) -> None:
    """x = W_n g(... g(W_1 LN(h))); SDXL: tokens = F g(x) + f, pooled = mean x; SD1: tokens = x."""
    bridge = create("mlp", {"hidden": 8, "context": 10, "pooled": pooled, "width": 16, "depth": depth})
    bridge.reset_parameters(torch.Generator().manual_seed(2))
    bridge.double()
    weights = bridge.state_dict()
    weights["layernorm.weight"].uniform_(0.5, 2)
    weights["layernorm.bias"].uniform_(-1, 1)
    hidden = toy_hidden(3, 7, 4)
    hidden = type(hidden)(hidden.states.double(), hidden.mask)

    x = normalised(hidden.states, weights["layernorm.weight"], weights["layernorm.bias"])
    for layer in range(depth):
        x = (gelu(x) if layer else x) @ weights[f"projector.{2 * layer}.weight"].T
    cond = bridge(hidden)
    if pooled:
        tokens = gelu(x) @ weights["fc.weight"].T + weights["fc.bias"]
        torch.testing.assert_close(cond.context, tokens, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(cond.pooled, x.sum(1) / 7, rtol=1e-9, atol=1e-12)
    else:
        torch.testing.assert_close(cond.context, x, rtol=1e-9, atol=1e-12)
        assert cond.pooled is None


def test_the_pooled_vector_hears_the_padding() -> None:
    """Published behaviour: another window gives another pooled vector."""
    bridge = toy_bridge("mlp", 8)
    hidden = toy_hidden(1, 16, 5)
    shorter = type(hidden)(hidden.states[:, :8], hidden.mask[:, :8])
    assert not torch.allclose(bridge(hidden).pooled, bridge(shorter).pooled)
    torch.testing.assert_close(bridge(hidden).context[:, :8], bridge(shorter).context)
