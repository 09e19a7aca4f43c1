"""Toys for the bridge tests: a small spec for each kind, hidden states, layers of a strange make."""

from __future__ import annotations

import dataclasses

import torch

from language_bridge.bridges.base import Bridge, Hidden, create, kinds
from language_bridge.bridges.file import BridgeHeader, EncoderRef

WIDTH = 8


class MarkedOps:
    """Layers of a host's own make: same weights, other classes."""

    class Linear(torch.nn.Linear):
        pass

    class LayerNorm(torch.nn.LayerNorm):
        pass

    class Embedding(torch.nn.Embedding):
        pass

    class Conv2d(torch.nn.Conv2d):
        pass


def toy_spec(kind: str, pooled: int = 0) -> dict[str, object]:
    """Every size that a kind insists on is 8, so that a new kind is tested the moment its file exists."""
    fields = dataclasses.fields(kinds()[kind].Spec)
    spec: dict[str, object] = {f.name: WIDTH for f in fields if f.default is dataclasses.MISSING}
    return spec | {"pooled": pooled}


def pooled_widths(kind: str) -> tuple[int, ...]:
    """Widths of a pooled vector that a toy of this kind can be asked for."""
    return (0, WIDTH) if kinds()[kind].pools else (0,)


def toy_bridge(kind: str, pooled: int = 0, **keywords: object) -> Bridge:
    bridge = create(kind, toy_spec(kind, pooled), **keywords)
    bridge.reset_parameters(torch.Generator().manual_seed(1))
    return bridge


def toy_hidden(batch: int, tokens: int, real: int | None = None, seed: int = 0) -> Hidden:
    """Random states [batch, tokens, 8] of which the first `real` are not padding."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, tokens, WIDTH, generator=generator)
    mask = (torch.arange(tokens) < (tokens if real is None else real)).expand(batch, tokens)
    return Hidden(states, mask, torch.randn(batch, WIDTH, generator=generator))


def toy_header(bridge: Bridge, **changes: object) -> BridgeHeader:
    fields: dict[str, object] = {
        "kind": bridge.kind,
        "spec": dataclasses.asdict(bridge.spec),
        "base": "pocket",
        "encoder": EncoderRef("bert", "toy", -1, 16, "pad"),
        "languages": ("zh", "en"),
        "training": {"objective": "iap", "steps": 100, "loss": 0.5, "note": "\u7ea2\u732b"},
        "licence": "Apache-2.0",
        "source": "tests",
        "name": "toy",
    }
    return BridgeHeader(**(fields | changes))
