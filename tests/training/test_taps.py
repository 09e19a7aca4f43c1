"""Taps see what the U-Net computes, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from language_bridge.training.taps import BlockTaps, CrossAttention, QueryTaps, cross_attentions, level_ends


def test_level_ends_are_the_nine_blocks_of_sd15_and_the_seven_of_sdxl(make_unet: Callable[..., Any]) -> None:
    """PEA compares down, middle and up level ends: 4 + 1 + 4 on SD1.5, 3 + 1 + 3 on SDXL (released code)."""
    sd15 = make_unet(
        device="meta",
        model_channels=320,
        channel_mult=[1, 2, 4, 4],
        num_res_blocks=[2, 2, 2, 2],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        context_dim=768,
        num_heads=8,
    )
    ends = level_ends(sd15)
    assert len(ends) == 9
    assert [sd15.input_blocks[i][-1] for i in (3, 6, 9, 11)] == ends[:4]
    assert ends[4] is sd15.middle_block[-1]
    assert [sd15.output_blocks[i][-1] for i in (2, 5, 8, 11)] == ends[5:]
    sdxl = make_unet(
        device="meta",
        model_channels=320,
        channel_mult=[1, 2, 4],
        num_res_blocks=[2, 2, 2],
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        transformer_depth_middle=10,
        context_dim=2048,
        num_heads=-1,
        num_head_channels=64,
        use_linear_in_transformer=True,
    )
    assert len(level_ends(sdxl)) == 7


def test_attention_from_ready_queries_equals_the_hosts_own(unet: Any) -> None:
    """attend(to_q(x), context) is what the host's module gives for (x, context)."""
    context = torch.randn(2, 7, 24)
    for layer, module in zip(CrossAttention.of(unet), cross_attentions(unet), strict=True):
        pixels = torch.randn(2, 5, module.to_q.in_features)
        expected = module(pixels, context=context)
        torch.testing.assert_close(layer.attend(module.to_q(pixels), context), expected, rtol=1e-5, atol=1e-6)


def test_taps_see_every_layer_and_leave_no_hook(unet: Any) -> None:
    """One feature for each level end, one query for each cross-attention, nothing registered afterwards."""
    noisy, timestep, context = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.randn(2, 7, 24)
    plain = unet(noisy, timestep, context=context)
    with BlockTaps(unet) as blocks, QueryTaps(unet) as queries:
        tapped = unet(noisy, timestep, context=context)
    assert torch.equal(plain, tapped)
    assert len(blocks.features) == len(level_ends(unet)) == 5
    assert len(queries.queries) == len(cross_attentions(unet)) == 4
    assert not any(module._forward_hooks for module in unet.modules())
