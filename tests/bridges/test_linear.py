"""AltDiffusion's heads: which one speaks, what surrounds it, and the formula."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch

from language_bridge.bridges.base import Hidden, create, identify
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.linear import Linear, LinearSpec
from language_bridge.encoders import guard

HIDDEN, CONTEXT = 12, 10
Shapes = dict[str, tuple[int, ...]]


def matrix(name: str, width: int = CONTEXT) -> Shapes:
    return {f"{name}.weight": (width, HIDDEN), f"{name}.bias": (width,)}


NORM: Shapes = {"pre_LN.weight": (HIDDEN,), "pre_LN.bias": (HIDDEN,)}
TOWER: Shapes = {
    "roberta.embeddings.word_embeddings.weight": (50, HIDDEN),
    "roberta.encoder.layer.0.output.dense.weight": (HIDDEN, 4 * HIDDEN),
    "roberta.pooler.dense.bias": (HIDDEN,),
}
REST: Shapes = {
    "model.diffusion_model.out.2.weight": (4, 3, 3, 3),
    "first_stage_model.decoder.conv_in.bias": (5,),
    "betas": (1000,),
}
M9 = matrix("transformation")
M18 = matrix("transformation", HIDDEN) | matrix("transformation_pre", HIDDEN) | NORM
PLAIN = LinearSpec(hidden=HIDDEN, context=CONTEXT)
NORMED = LinearSpec(hidden=HIDDEN, context=HIDDEN, norm=True)
M18_ALONE = matrix("transformation_pre", HIDDEN) | NORM
HEADS = [(M9, PLAIN), (M9 | NORM, PLAIN), (M18, NORMED), (M18_ALONE, NORMED)]
PLACES = [
    ("", {}),
    ("", TOWER),
    ("text_model.", TOWER),
    ("text_encoder.", TOWER),
    ("cond_stage_model.", TOWER),
    ("cond_stage_model.text_encoder.", TOWER),
]


def published(head: Shapes, place: str, tower: Shapes) -> Shapes:
    return {place + key: shape for key, shape in (head | tower).items()} | (REST if place else {})


def filled(shapes: Shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {
        key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("head", "spec"), HEADS, ids=["m2/m9", "m2/m9 with pre_LN", "m18", "m18 without retrieval"]
)
@pytest.mark.parametrize(("place", "tower"), PLACES)
def test_a_head_is_recognised_alone_and_inside_a_whole_file(
    head: Shapes, spec: LinearSpec, place: str, tower: Shapes
) -> None:
    shapes = published(head, place, tower)
    assert identify(shapes) == (Linear, spec)
    tensors = filled(shapes)
    own = Linear.adopt(tensors, spec)
    assert {key: tuple(value.shape) for key, value in own.items()} == Linear.shapes(spec)
    speaks = "transformation_pre" if spec.norm else "transformation"
    assert own["context.weight"] is tensors[f"{place}{speaks}.weight"]
    assert own["context.bias"] is tensors[f"{place}{speaks}.bias"]
    if spec.norm:
        assert own["norm.weight"] is tensors[f"{place}pre_LN.weight"]


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        TOWER,
        matrix("transformation_pre", HIDDEN),
        NORM,
        M9 | {"stranger.weight": (3,)},
        M9 | {"context.weight": (CONTEXT, HIDDEN)},
        {"context.bias": (CONTEXT,)} | M9,
        M9 | REST,
        {key: shape for key, shape in M9.items() if "bias" not in key},
        M9 | {"transformation.weight": (CONTEXT,)},
        M9 | {"transformation.weight": (CONTEXT, 1 << 40)},
        M9 | {"transformation.bias": (HIDDEN,)},
        {key: shape for key, shape in M18.items() if "pre_LN.bias" not in key},
        {key: shape for key, shape in M18.items() if "pre_LN" not in key},
        {f"other.{key}": shape for key, shape in M9.items()},
        {f"cond_stage_model.{key}": shape for key, shape in (M9 | {"stranger.weight": (3,)}).items()},
        # AltCLIP-m18: its square matrix serves retrieval, and AltDiffusion-m18 does not use it.
        matrix("transformation", HIDDEN) | NORM,
    ],
)
def test_other_layouts_are_not_claimed(shapes: Shapes) -> None:
    assert Linear.recognise(shapes) is None
    with pytest.raises(BridgeError, match="nobody"):
        identify(shapes)


def test_published_sizes() -> None:
    """XLM-R large in front of SD1.x (m2, m9) and SD2.x (m18)."""
    m9 = create("linear", {"hidden": 1024, "context": 768}, device="meta")
    m18 = create("linear", {"hidden": 1024, "context": 1024, "norm": True}, device="meta")
    assert sum(value.numel() for value in m9.parameters()) == 768 * 1025
    assert sum(value.numel() for value in m18.parameters()) == 1024 * 1025 + 2 * 1024
    shapes = {"transformation.weight": (768, 1024), "transformation.bias": (768,)}
    assert identify(shapes)[1] == m9.spec
    square = {"weight": (1024, 1024), "bias": (1024,)}
    heads = {
        f"{name}.{key}": s for name in ("transformation", "transformation_pre") for key, s in square.items()
    }
    assert identify(heads | {"pre_LN.weight": (1024,), "pre_LN.bias": (1024,)})[1] == m18.spec


@pytest.mark.parametrize(("head", "spec"), [(M9, PLAIN), (M9 | NORM, PLAIN), (M18, NORMED)])
def test_the_formula(head: Shapes, spec: LinearSpec) -> None:
    """m2, m9: the matrix alone; m18: transformation_pre(pre_LN(states)), eps 1e-5."""
    tensors = filled(head)
    bridge = create("linear", spec).double()
    bridge.load_state_dict(Linear.adopt(tensors, spec), strict=True)
    states = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
    for scale in (1, 1e-2):
        x = states * scale
        if spec.norm:
            centred = x - x.mean(-1, keepdim=True)
            x = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
            x = x * tensors["pre_LN.weight"] + tensors["pre_LN.bias"]
        name = "transformation_pre" if spec.norm else "transformation"
        context = x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        cond = bridge(Hidden(states * scale, torch.ones(2, 7, dtype=torch.bool)))
        torch.testing.assert_close(cond.context, context, rtol=1e-9, atol=1e-12)
        assert cond.pooled is None


def test_a_file_of_the_other_head_is_not_adopted() -> None:
    with pytest.raises(BridgeError, match=r"norm\.weight missing"):
        Linear.adopt(filled(M9), LinearSpec(hidden=HIDDEN, context=CONTEXT, norm=True))


def test_keys_with_the_norm() -> None:
    bridge = create("linear", {"hidden": 4, "context": 6, "pooled": 5, "norm": True}, device="meta")
    assert set(guard.shapes_of(bridge)) == {
        *("norm.weight", "norm.bias", "context.weight", "context.bias", "pooled.weight", "pooled.bias")
    }


def test_with_the_norm_the_pooled_vector_is_of_the_normed_states() -> None:
    bridge = create("linear", {"hidden": 4, "context": 6, "pooled": 5, "norm": True}).double()
    bridge.reset_parameters(torch.Generator().manual_seed(1))
    states = torch.randn(2, 3, 4, dtype=torch.float64) * 7 + 1
    x = torch.nn.functional.layer_norm(states, (4,))
    weights = bridge.state_dict()
    cond = bridge(Hidden(states, torch.ones(2, 3, dtype=torch.bool)))
    torch.testing.assert_close(cond.pooled, x.mean(1) @ weights["pooled.weight"].T + weights["pooled.bias"])


def test_of_a_whole_checkpoint_only_the_head_is_read() -> None:
    class OnDisk(dict[str, torch.Tensor]):
        def __getitem__(self, key: str) -> torch.Tensor:
            looked_up.append(key)
            return super().__getitem__(key)

        def items(self) -> NoReturn:
            raise AssertionError("every tensor was read")

    looked_up: list[str] = []
    tensors = OnDisk(filled(published(M9, "cond_stage_model.", TOWER)))
    Linear.adopt(tensors, PLAIN)
    assert sorted(looked_up) == [f"cond_stage_model.{key}" for key in sorted(M9)]
