"""Every published layout: its size, and that it is recognised as itself and as nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from language_bridge.bridges.base import Bridge, BridgeSpec, create, identify, kinds
from language_bridge.bridges.ella import EllaSpec
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.mulan import MulanSpec
from language_bridge.bridges.omni import OmniSpec
from language_bridge.bridges.rouwei import RouweiSpec
from language_bridge.tests.bridges import references
from language_bridge.tests.bridges.references import shapes_of

with torch.device("meta"):
    XL = {"hidden": 4096, "first": 1280, "second": 768, "pooled": 1280, "queries": 120}
    ROUWEI = {"context": 2048, "pooled": 1280, "window": 512, "queries": 308, "narrow": 3}
    LAYOUTS: dict[str, tuple[nn.Module, BridgeSpec, int]] = {
        "OmniDiffusion": (
            references.Omni(4096, 2048, 1280, 227, 4),
            OmniSpec(hidden=4096, context=2048, pooled=1280),
            487_346_688,
        ),
        "ELLA": (
            references.Ella(2048, 768, 64, 6, 320),
            EllaSpec(hidden=2048, context=768),
            66_820_608,
        ),
        "MuLan SD1.5": (
            references.MulanAdapter(4096, 768, 120, 1),
            MulanSpec(hidden=4096, context=768, skip=3, bare=77),
            20_371_968,
        ),
        "MuLan SD1.5 direct": (
            references.MulanAdapter(4096, 768, 77, 1),
            MulanSpec(hidden=4096, context=768, queries=77, skip=3, bare=77),
            20_338_944,
        ),
        "MuLan SD2.1": (
            references.MulanAdapter(4096, 1024, 120, 1),
            MulanSpec(hidden=4096, context=1024, skip=3, bare=77),
            34_764_800,
        ),
        **{
            f"MuLan SDXL {name}, {'with' if added else 'without'} add_embedding": (
                references.MulanXl(**XL, tower_pooled=tower_pooled, added=added),
                MulanSpec(
                    hidden=4096,
                    context=2048,
                    pooled=1280,
                    second=768,
                    tower_pooled=tower_pooled,
                    skip=3,
                    bare=0,
                ),
                count,
            )
            for name, tower_pooled, count in (("projected", 768, 75_954_688), ("attended", 0, 88_790_272))
            for added in (False, True)
        },
        "RouWei-Gemma": (
            references.Rouwei(hidden=1152, wide=2, **ROUWEI),
            RouweiSpec(hidden=1152, context=2048, pooled=1280, heads=16, wide=2, skip=27),
            305_253_632,
        ),
        "RouWei-T5Gemma": (
            references.Rouwei(hidden=2304, wide=3, **ROUWEI),
            RouweiSpec(hidden=2304, context=2048, pooled=1280, heads=16, wide=3),
            357_971_200,
        ),
    }
BESIDE = "add_embedding."  # not the bridge's: it goes into the U-Net


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[dict[str, tuple[int, ...]], BridgeSpec, int]:
    reference, spec, count = LAYOUTS[request.param]
    return shapes_of(reference), spec, count


Layout = tuple[dict[str, tuple[int, ...]], BridgeSpec, int]


def kind_of(spec: BridgeSpec) -> type[Bridge]:
    return next(cls for cls in kinds().values() if cls.Spec is type(spec))


def test_parameter_counts(layout: Layout) -> None:
    _, spec, count = layout
    bridge = create(kind_of(spec).kind, spec, device="meta")
    assert sum(parameter.numel() for parameter in bridge.parameters()) == count


def test_the_keys_are_the_published_ones(layout: Layout) -> None:
    shapes, spec, _ = layout
    assert kind_of(spec).shapes(spec) == {k: v for k, v in shapes.items() if not k.startswith(BESIDE)}


def test_each_is_recognised_as_itself_and_nothing_else(layout: Layout) -> None:
    shapes, spec, _ = layout
    assert identify(shapes) == (kind_of(spec), spec)


def test_no_layout_is_recognised_with_a_tensor_more_less_or_different(layout: Layout) -> None:
    shapes, _, _ = layout
    keys = [key for key in shapes if not key.startswith(BESIDE)]
    some = {*keys[:3], *keys[-3:], *keys[:: max(1, len(keys) // 12)]}
    odd = [shapes | {"stranger.weight": (3,)}, shapes | {"encoder.layers.0.norm1.weight": (8,)}]
    for key in some:
        odd.append({other: shape for other, shape in shapes.items() if other != key})
        odd.append(shapes | {key: (*shapes[key], 1)})
        odd.append(shapes | {key: shapes[key][:-1]})
        odd.append(shapes | {key: ()})
        odd.append(shapes | {key: (0,) * len(shapes[key])})
        odd.append(shapes | {key: (1 << 40,) * len(shapes[key])})
    for shapes_changed in odd:
        with pytest.raises(BridgeError, match="claimed by"):
            identify(shapes_changed)


def test_half_an_embedding_of_the_unet_is_not_recognised() -> None:
    """Nor one beside a lone adapter, which never had it."""
    shapes = shapes_of(LAYOUTS["MuLan SDXL projected, with add_embedding"][0])
    added = {key: shape for key, shape in shapes.items() if key.startswith(BESIDE)}
    assert len(added) == 4
    for key in added:
        with pytest.raises(BridgeError, match="nobody"):
            identify({other: shape for other, shape in shapes.items() if other != key})
    for beside in (added, {f"{BESIDE}linear_3.weight": (3, 3)}):
        with pytest.raises(BridgeError, match="nobody"):
            identify(shapes_of(LAYOUTS["MuLan SD1.5"][0]) | beside)
    with pytest.raises(BridgeError, match="nobody"):
        identify(shapes | {f"{BESIDE}linear_3.weight": (3, 3)})
