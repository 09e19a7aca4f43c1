"""Keeps a native tower and its bridge as one model under the host's memory management."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import torch
from torch import Tensor

from ..bridges.base import Bridge, Cond
from ..encoders.base import Encoder


def load_device() -> torch.device:
    """Where the host runs text towers."""
    return management.text_encoder_device()


def tower_dtype() -> torch.dtype:
    """fp32 on a CPU; elsewhere what the host chooses for text towers (fp16 or bf16 where it can)."""
    device = load_device()
    return torch.float32 if management.is_device_cpu(device) else management.text_encoder_dtype(device)


class _Reader(torch.nn.Module):
    """Encoder and bridge one after the other."""

    def __init__(self, encoder: Encoder, bridge: Bridge) -> None:
        super().__init__()
        self.encoder = encoder
        self.bridge = bridge

    def forward(self, ids: Tensor, mask: Tensor) -> Cond:
        return self.bridge(self.encoder(ids, mask))


class NativeTower:
    """Encoder and bridge with a patcher of their own; the CLIP's patcher carries it as a patch.

    Attached that way (`attach`), the host loads both together, counts both, and moves both off the GPU when
    it needs room.
    """

    def __init__(self, encoder: Encoder, bridge: Bridge) -> None:
        self.reader = _Reader(encoder, bridge).eval().requires_grad_(False)
        # Not CoreModelPatcher: its delegates reload a model from one file, which a pair of files is not.
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.reader, load_device=load_device(), offload_device=management.text_encoder_offload_device()
        )

    @property
    def encoder(self) -> Encoder:
        """The text tower."""
        return self.reader.encoder

    @property
    def bridge(self) -> Bridge:
        """The bridge behind it."""
        return self.reader.bridge

    def attach(self, patcher: Any) -> None:
        """Makes the host load this tower whenever it loads what `patcher` holds; survives clones of it."""
        patcher.set_model_patch(self, "language_bridge")

    def models(self) -> list[Any]:
        """What the host asks a patch for: further patchers to keep beside the patched model."""
        return [self.patcher]

    def load(self) -> None:
        """Brings the tower to its device."""
        management.load_models_gpu([self.patcher])

    def read(self, ids: Tensor, mask: Tensor) -> Cond:
        """ids, mask [S, T] to context [S, N, C] and pooled [S, P], fp32 on the host's intermediate device."""
        device = self.patcher.load_device
        with torch.no_grad():
            cond = self.reader(ids.to(device), mask.to(device))
        home = management.intermediate_device()
        pooled = None if cond.pooled is None else cond.pooled.float().to(home)
        return Cond(cond.context.float().to(home), pooled)
