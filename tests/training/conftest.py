"""U-Nets of the host's own class in the sizes that the training tests need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def unet_of(device: str = "cpu", **changes: Any) -> Any:
    """A U-Net of the host's class, tiny unless changed."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config: dict[str, Any] = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [0, 1],
        "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 24,
        "num_heads": 4,
        "use_spatial_transformer": True,
        "legacy": False,
        "dtype": torch.float32,
    }
    return UNetModel(**{**config, **changes}, device=device, operations=comfy.ops.disable_weight_init)


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., Any]:
    """`unet_of`, for tests that need other sizes."""
    return unet_of


@pytest.fixture(scope="session")
def unet() -> Any:
    """A tiny random U-Net, frozen."""
    made = unet_of()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return made.eval().requires_grad_(False)
