"""What a training begins with: a new bridge, one of the folders, or one that was trained before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from torch import Tensor

from ..bridges.base import Bridge, create, kind_class
from ..bridges.errors import BridgeError
from ..bridges.file import BRANCH, EncoderRef, load_bridge
from ..encoders.base import Encoder
from ..encoders.file import load_encoder, pack_encoder, read_encoder_header
from ..training.chance import generator
from ..training.methods import BranchMethod
from . import folders, material
from .base import NAMES, Base
from .borrowed import FAMILY
from .bridging import template_of
from .choice import LEARNERS, NOTHING, OF_THE_BRIDGE, Choice
from .tower import tower_dtype
from .trained import Trained, template_in
from .unet import DELTA
from .words import Framed


@dataclass(eq=False)
class Beginning:
    """What a training begins with: a bridge of its own, its tower, and what stands in the U-Net already."""

    bridge: Bridge
    tower: material.Tower
    reference: EncoderRef
    languages: tuple[str, ...]
    template: tuple[str, str]
    unet: Mapping[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    part: str = "none"
    how: str = DELTA
    record: Mapping[str, object] = field(default_factory=lambda: dict[str, object]())
    owns_tower: bool = False
    continued: bool = False

    def content(self) -> str:
        """Names the weights that a training begins with."""
        if not self.continued:
            return "new"
        tensors = [*self.bridge.state_dict().items(), *self.unet.items()]
        return material.digest(sorted(tensors), self.part, self.how)


class Beginner:
    """Opens what a choice names; base: of the checkpoint; language: of the dataset; before: a training."""

    def __init__(self, choice: Choice, base: Base, language: str, before: Trained | None) -> None:
        self.choice = choice
        self.base = base
        self.language = language
        self.before = before

    def begin(self) -> Beginning:
        """The bridge that is to learn, whatever it comes from; BridgeError when something does not fit."""
        choice = self.choice
        if self.before is not None:
            return self._from_trained(self.before)
        if choice.continue_from != NOTHING:
            return self._from_file(choice.continue_from)
        if choice.tower == OF_THE_BRIDGE:
            raise BridgeError(
                "A new bridge needs a text tower.",
                f"{OF_THE_BRIDGE!r}, and no bridge to continue",
                f"one of {', '.join(tower_names()[:8]) or 'the towers in models/text_encoders'}",
                "Choose a tower, or a bridge at continue_from.",
            )
        path, header = tower_file(choice.tower)
        reference = EncoderRef(
            header.family, header.identity, header.layer, header.window, header.mask_rule, header.digest
        )
        tower = self._open_tower(lambda **how: load_encoder(path, **how), header.digest, ("", ""))
        kind = BRANCH if choice.objective == BranchMethod.name else choice.kind
        with torch.inference_mode(False):
            bridge = create(kind, self._spec(kind, tower.encoder))
            bridge.reset_parameters(generator(choice.settings.seed, "bridge"))
        return Beginning(bridge, tower, reference, self._languages(header.languages), ("", ""))

    def _from_file(self, name: str) -> Beginning:
        path = folders.bridge_path(name)
        header = folders.bridge_header(path)
        if header.base != self.base.name:
            raise BridgeError(
                f"The bridge {name} is not made for this checkpoint.",
                f"a bridge for {NAMES[header.base]}, a checkpoint of {NAMES[self.base.name]}",
                f"a bridge for {NAMES[self.base.name]}",
                "Choose another bridge at continue_from, or load another checkpoint.",
            )
        if header.encoder.family == FAMILY:
            raise BridgeError(
                f"The bridge {name} cannot be trained further.",
                "a bridge whose tower ComfyUI loads",
                "a bridge with a tower file of Language Bridge",
                "Convert the tower, or continue another bridge.",
            )
        self._require_tower(header.encoder.identity, name)
        ledger = folders.ledger()
        loaded = load_bridge(path, ledger=ledger)
        inside = read_encoder_header(path)
        template = template_of(header, name)
        if inside is not None:
            tower = self._open_tower(lambda **how: load_bridge(path, **how).encoder, inside.digest, template)
        else:
            other = folders.encoder_path(header.encoder, name)
            found = read_encoder_header(other)
            assert found is not None
            tower = self._open_tower(lambda **how: load_encoder(other, **how), found.digest, template)
        return Beginning(
            loaded.bridge,
            tower,
            header.encoder,
            self._languages(header.languages),
            template,
            loaded.unet,
            header.unet,
            str(header.training.get("unet", DELTA)),
            header.training,
            inside is not None,
            continued=True,
        )

    def _from_trained(self, before: Trained) -> Beginning:
        if before.base != self.base.name:
            raise BridgeError(
                "The training before this one was for another checkpoint.",
                f"a bridge for {NAMES[before.base]}, a checkpoint of {NAMES[self.base.name]}",
                "the same base in both",
                "Connect the same checkpoint to both trainings.",
            )
        self._require_tower(before.reference.identity, f"of the run {before.run}")
        template = template_in(before.training)
        if before.encoder is not None:
            own = before.encoder
            content = pack_encoder(own)[0].digest
            tower = self._open_tower(lambda **how: copy.deepcopy(own), content, template)
        else:
            path = folders.encoder_path(before.reference, before.run)
            tower = self._open_tower(
                lambda **how: load_encoder(path, **how), before.reference.digest, template
            )
        return Beginning(
            copy.deepcopy(before.bridge),
            tower,
            before.reference,
            self._languages(before.languages),
            template,
            before.unet,
            before.part,
            str(before.training.get("unet", DELTA)),
            before.training,
            before.encoder is not None,
            continued=True,
        )

    def _require_tower(self, identity: str, bridge: str) -> None:
        if self.choice.tower not in (OF_THE_BRIDGE, identity):
            raise BridgeError(
                "A bridge that is continued keeps its text tower.",
                f"the tower {self.choice.tower!r}, and the bridge {bridge} that reads {identity!r}",
                f"{OF_THE_BRIDGE!r}",
                f"Set tower to {OF_THE_BRIDGE!r}.",
            )

    def _open_tower(
        self, load: Callable[..., Encoder | None], content: str, template: tuple[str, str]
    ) -> material.Tower:
        learns = self.choice.learns == LEARNERS[1]
        with torch.inference_mode(False):
            encoder = load() if learns else load(ops=comfy.ops.manual_cast, dtype=tower_dtype())
        assert encoder is not None
        encoder.requires_grad_(False).eval()
        words = Framed(encoder, *template) if any(template) else encoder
        facts = (content, encoder.layer, encoder.window, encoder.mask_rule, template)
        return material.Tower(encoder, words, material.key_of(*facts), learns)

    def _spec(self, kind: str, encoder: Encoder) -> dict[str, object]:
        """Sizes of a new bridge; what is left at 0 suits the base."""
        options, small = self.choice.options, self.base.name == "pocket"
        spec: dict[str, object] = {"hidden": encoder.width, "context": self.base.context}
        if kind_class(kind).pools:
            spec["pooled"] = self.base.pooled
        if kind == BRANCH:
            spec["context"] = encoder.width
            if self.base.pooled and encoder.pooled_width != self.base.pooled:
                spec["tower_pooled"] = encoder.pooled_width
        if kind == "mlp":
            spec["width"] = options.width or max(encoder.width, self.base.context)
            spec["depth"] = options.depth
        if kind in ("omni", "ella"):
            spec["queries"] = options.queries or (material.WINDOW if kind == "omni" else 64)
            spec["layers"] = options.layers or (2 if small else 4 if kind == "omni" else 6)
            spec["heads"] = options.heads or (4 if small else 8)
        return spec

    def _languages(self, known: Sequence[str]) -> tuple[str, ...]:
        own = () if self.language in ("", "any") else (self.language,)
        return tuple(dict.fromkeys([*own, *known])) if self._continues() else own or tuple(known)

    def _continues(self) -> bool:
        return self.before is not None or self.choice.continue_from != NOTHING


def tower_names() -> list[str]:
    """Identities of the tower files, for a combo."""
    return sorted({header.identity for _, header in folders.towers()})


def tower_file(identity: str) -> tuple[Path, Any]:
    """File and header of a tower; BridgeError when there is none of that identity."""
    for path, header in folders.towers():
        if header.identity == identity:
            return path, header
    raise BridgeError(
        f"There is no text tower called {identity!r}.",
        f"{', '.join(tower_names()[:8]) or 'no tower files'}",
        "a tower file in models/text_encoders",
        "Put the tower file there, press R in the browser to refresh, and choose it again.",
    )
