"""What an artist can choose about a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management as management

from ..training.settings import Settings

NOTHING = "none"
OF_THE_BRIDGE = "of the bridge"
KINDS = ("mlp", "linear", "omni", "ella", "identity")
"""Kinds of bridge that can be begun with; any kind can be continued."""
LEARNERS = ("bridge", "bridge and tower")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
UNET_PARTS = ("kv", "attn2")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What only one objective or one kind of bridge asks; the words are those of `training.methods`.

    weight, skip_odd: pea. compare, distance, scaled, attentions (numbers such as "0, 2", "" for all), pixels:
    iap. rows, length: align. part: kv. weighting: kv, branch and resample. width, depth: mlp. queries,
    layers, heads: omni and ella. 0 stands for what suits the base.
    """

    weight: float = 0.1
    skip_odd: bool = False
    compare: str = "output"
    distance: str = "squared"
    scaled: bool = True
    attentions: str = ""
    pixels: int = 64
    rows: str = "tokens"
    length: float = 2e-5
    part: str = UNET_PARTS[0]
    weighting: str = "plain"
    width: int = 0
    depth: int = 3
    queries: int = 0
    layers: int = 0
    heads: int = 0


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is shown of a training beside its loss.

    held_out: share of the examples that are only measured. samples: how many captions are painted, with
    sample_steps and guidance (0 = what suits the base). judged: captions of each sort that the pocket judge
    looks at.
    """

    held_out: float = 0.05
    samples: int = 4
    sample_steps: int = 15
    guidance: float = 0.0
    judged: int = 32


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the artist has chosen.

    tower: identity of a tower file, or `OF_THE_BRIDGE`; continue_from: a bridge of the folders, or `NOTHING`;
    epochs: how often the training goes over all examples, in the place of the settings' steps; 0 for these.
    """

    objective: str
    run: str
    settings: Settings
    tower: str = OF_THE_BRIDGE
    kind: str = KINDS[0]
    continue_from: str = NOTHING
    learns: str = LEARNERS[0]
    resolution: int = 512
    resume: bool = True
    epochs: int = 0
    options: Options = Options()
    watch: Watch = Watch()


def settings_of(precision: str, **values: Any) -> Settings:
    """Settings with what "auto" means on this machine; BridgeError on odd values."""
    if precision == PRECISIONS[0]:
        device = management.get_torch_device()
        half = "bf16" if management.should_use_bf16(device) else "fp16"
        precision = "fp32" if management.is_device_cpu(device) else half
    return Settings(precision=precision, **values)
