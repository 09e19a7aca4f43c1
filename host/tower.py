"""Keeps a native tower and its bridge as one model under the host's memory management."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import torch
from torch import Tensor

from ..bridges.base import Bridge, Cond, Hidden
from ..bridges.errors import BridgeError
from ..encoders.base import Encoder
from .cache import EMBEDDINGS, Said
from .words import Framed

FIRST_TIMESTEP = 999
"""Where a timed bridge speaks outside of sampling: at the first step, as pure noise."""


def load_device() -> torch.device:
    """Where the host runs text towers."""
    return management.text_encoder_device()


def tower_dtype() -> torch.dtype:
    """fp32 on a CPU; elsewhere what the host chooses for text towers: fp16, bf16, or fp8 on demand."""
    device = load_device()
    return torch.float32 if management.is_device_cpu(device) else management.text_encoder_dtype(device)


def patcher_of(module: torch.nn.Module) -> Any:
    """A patcher that makes the host load and offload `module` like a text tower."""
    # Not CoreModelPatcher: its delegates reload a model from one file, which a pair of files is not.
    return comfy.model_patcher.ModelPatcher(
        module, load_device=load_device(), offload_device=management.text_encoder_offload_device()
    )


class _Reader(torch.nn.Module):
    """Encoder and bridge one after the other; a timed bridge stays outside."""

    def __init__(self, encoder: Encoder, bridge: Bridge | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.bridge = bridge


class NativeTower:
    """Encoder and bridge with a patcher of their own; the CLIP's patcher carries it as a patch.

    Attached that way (`attach`), the host loads both together with the CLIP, counts both, and moves both off
    the GPU when it needs room; `at_rest` leaves them where they are while only the CLIP is wanted. A timed
    bridge is asked at every step of sampling, where nobody needs its tower, so it has a patcher of its own.

    digest: names the content of encoder and bridge; what they say is then kept in `EMBEDDINGS`. "": never.
    template: texts that the method puts before and after a prompt.
    """

    def __init__(
        self, encoder: Encoder, bridge: Bridge, digest: str = "", template: tuple[str, str] = ("", "")
    ) -> None:
        self.encoder = encoder
        self.words = Framed(encoder, *template) if any(template) else encoder
        if bridge.lead:
            _require_lead(self.words, bridge.lead, encoder.identity)
        self.bridge = bridge
        self.digest = digest
        bridge.eval().requires_grad_(False)
        self.reader = self._reader()
        self.patcher = self._patcher()
        self.bridge_patcher = patcher_of(bridge) if self.apart else self.patcher
        self._resting = False

    @property
    def apart(self) -> bool:
        """Whether the bridge is a model of its own beside the tower."""
        return self.bridge.timed

    def attach(self, patcher: Any) -> None:
        """Makes the host load this tower whenever it loads what `patcher` holds; survives clones of it."""
        patcher.set_model_patch(self, "language_bridge")

    def models(self) -> list[Any]:
        """What the host asks a patch for: further patchers to keep beside the patched model."""
        return [] if self._resting else self._patchers()

    @contextmanager
    def at_rest(self, resting: bool = True) -> Iterator[None]:
        """While inside, loading the CLIP does not load this tower; with False nothing is changed."""
        before, self._resting = self._resting, self._resting or resting
        try:
            yield
        finally:
            self._resting = before

    def load(self) -> None:
        """Brings tower and bridge to their device."""
        management.load_models_gpu(self._patchers())

    def knows(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether `hear` would answer from memory."""
        return bool(self.digest) and EMBEDDINGS.holds(self.digest, self._key(ids, mask))

    def read(self, ids: Tensor, mask: Tensor) -> Cond:
        """ids, mask [S, T] to context [S, N, C] and pooled [S, P], fp32 on the host's intermediate device."""
        return self.hear(ids, mask).cond

    def hear(self, ids: Tensor, mask: Tensor) -> Said:
        """What `read` gives, and for a timed bridge the states [S, T, D] before it.

        Loads nothing when the same content was heard before.
        """
        key = self._key(ids, mask)
        known = EMBEDDINGS.get(self.digest, key) if self.digest else None
        if known is not None:
            return known
        self.load()
        device = self.patcher.load_device
        with torch.no_grad():
            hidden = self._hidden(ids.to(device), mask.to(device))
            said = Said(self.speak(hidden, FIRST_TIMESTEP), _home(hidden) if self.bridge.timed else None)
        if self.digest:
            EMBEDDINGS.put(self.digest, key, said)
        return said

    def speak(self, hidden: Hidden, timestep: int) -> Cond:
        """The bridge alone, at a timestep 0..999 that only timed kinds hear; fp32 as `read` gives it."""
        device = self.bridge_patcher.load_device
        dtype = next((weight.dtype for weight in self.bridge.parameters()), hidden.states.dtype)
        pooled = None if hidden.pooled is None else hidden.pooled.to(device)
        states = hidden.states.to(device)
        if self.apart:  # states from memory or from the host come in fp32
            states = states.to(dtype)
            pooled = None if pooled is None else pooled.to(dtype)
        there = Hidden(states, hidden.mask.to(device), pooled)
        times = torch.full((len(states),), timestep, device=device) if self.bridge.timed else None
        with torch.no_grad():
            cond = self.bridge(there, times)
        home = management.intermediate_device()
        spoken = None if cond.pooled is None else cond.pooled.float().to(home)
        return Cond(cond.context.float().to(home), spoken)

    def _reader(self) -> torch.nn.Module:
        return _Reader(self.encoder, None if self.apart else self.bridge).eval().requires_grad_(False)

    def _patcher(self) -> Any:
        return patcher_of(self.reader)

    def _patchers(self) -> list[Any]:
        return [self.patcher, self.bridge_patcher] if self.apart else [self.patcher]

    def _hidden(self, ids: Tensor, mask: Tensor) -> Hidden:
        return self.encoder(ids, mask)

    def _key(self, ids: Tensor, mask: Tensor) -> Hashable:
        dtype = next((weight.dtype for weight in self.reader.parameters()), None)
        return (
            ids.numpy().tobytes(),
            mask.numpy().tobytes(),
            tuple(ids.shape),
            dtype,
            self.patcher.load_device,
        )


def _require_lead(words: Any, lead: int, identity: str) -> None:
    """Refuse a tower that cuts a template into other pieces than the bridge drops: rows of the prompt would
    be lost, or rows of the template heard, and nobody would see it."""
    found = int((words.frame([-1])[0] < 0).int().argmax())
    if found != lead:
        raise BridgeError(
            f"The text tower {identity!r} does not cut the bridge's template as its authors' tower does.",
            f"{found} tokens before the prompt",
            f"{lead} tokens, which the bridge drops",
            "Convert bridge and tower again from the published files, with the tokenizer of the same model.",
        )


def _home(hidden: Hidden) -> Hidden:
    home = management.intermediate_device()
    pooled = None if hidden.pooled is None else hidden.pooled.float().to(home)
    return Hidden(hidden.states.float().to(home), hidden.mask.to(home), pooled)
