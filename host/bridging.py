"""Takes a bridge by name to a bridged CLIP, with every check of the headers before the first weight."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_base
import comfy.ops
import torch

from ..bridges.base import Bridge, kind_class, parse_spec
from ..bridges.errors import BridgeError
from ..bridges.file import BRANCH, UNET_PREFIX, BridgeHeader, load_bridge
from ..encoders import guard
from ..encoders.base import Encoder
from ..encoders.file import load_encoder, read_encoder_header
from ..prompt import MODES
from . import branch, carried, folders, travel
from .base import NAMES, Base, base_of
from .borrowed import FAMILY, BorrowedEncoder, BorrowedTower, borrow, refuse
from .branch_clip import BranchedClip, Voice
from .cache import EMBEDDINGS
from .clip import BridgedClip, Speech
from .pseudo import CLIP_INPUT, SAYS
from .tower import NativeTower, tower_dtype
from .unet import DELTA, REPLACE, UnetPart, add_to, has_addition, part_shapes, patcher_of

OWN = "own"
"""In a bridge's training record, under "unet": the bridge fits the U-Net of its own checkpoint alone."""

TEMPLATE = "template"
"""In a bridge's training record: {"before": text, "after": text} that the method puts around a prompt."""

_TEMPLATES = {"mulan": {"before": "summarize:"}}
"""What stands in the published programs of a kind."""

TOWERS: WeakValueDictionary[tuple[str, torch.dtype], NativeTower] = WeakValueDictionary()
PARTS: WeakValueDictionary[tuple[str, torch.dtype], Any] = WeakValueDictionary()
BRANCHES: WeakValueDictionary[tuple[str, torch.dtype], Any] = WeakValueDictionary()
"""What living graphs hold, by digest of the bridge and dtype; of what stands at a MODEL, the patchers."""


def bridge(
    model: Any, clip: Any, name: str, strength: float, route: str, tower: Any = None, identity: str = ""
) -> tuple[Any, BridgedClip | BranchedClip]:
    """MODEL with what the bridge adds to it (the very same object when that is nothing), and a bridged CLIP.

    name: a bridge of the folders; strength: weight of the native text, > 0, or of a branch's residuals;
    route: one of `prompt.MODES`; tower: a CLIP of the host, for bridges that read one; identity: what the
    graph says of the bridge beside its name (`travel`). BridgeError, in words and before sampling, when base,
    bridge and text tower do not belong together or a file is damaged or missing.
    """
    if route not in MODES:
        raise BridgeError(
            "There is no such route.", repr(route), " or ".join(MODES), "Choose one of the list."
        )
    base = base_of(model, clip)
    meant = travel.resolve(name, identity)
    if meant.note is not None:
        logging.warning("Language Bridge: %s", meant.say("English"))
    elif meant.name != name:
        logging.info("Language Bridge: %r is called %r here", name, meant.name)
    name, path = meant.name, meant.path
    header = folders.bridge_header(path)
    _check(header, base, name)
    _check_unet(header, guard.read_layout(path).shapes, model, name)
    if header.unet != BRANCH and (isinstance(clip, BranchedClip) or branch.branches_of(model)):
        raise _alone(name)
    files = folders.files_of(name)
    digest = _digest(header, files)
    EMBEDDINGS.claim(name, digest)
    if header.unet == BRANCH:
        if isinstance(clip, BridgedClip) or has_addition(model) or tower is not None:
            raise _alone(name) if tower is None else refuse(header, name)
        return _branched(model, clip, files, digest, name, strength, route)
    template = template_of(header, name)
    lent = borrow(tower, header, name) if header.encoder.family == FAMILY else None
    if lent is None and tower is not None:
        raise refuse(header, name)
    native, part = _open(files, digest, model, name, lent, template)
    adds = part is not None or native.bridge.timed
    if adds and has_addition(model):
        raise BridgeError(
            "This MODEL already has a language bridge.",
            "a MODEL that comes out of a Language Bridge node",
            "the checkpoint's own MODEL",
            "Use one Language Bridge node for each checkpoint: remove one of the two.",
        )
    inside = header.training.get(SAYS) == CLIP_INPUT
    speech = Speech(native, route, strength, base, name, marks=adds, inside=inside)
    bridged = BridgedClip.over(clip, speech, carried.carried_by(model, clip.patcher))
    return (add_to(model, native, part, name) if adds else model), bridged


def _branched(
    model: Any, clip: Any, files: Sequence[Path], digest: str, name: str, strength: float, route: str
) -> tuple[Any, BranchedClip]:
    """MODEL with a branch beside its U-Net and a CLIP that speaks to it; a further branch stands beside."""
    if any(beside.digest == digest for beside in branch.branches_of(model)):
        raise BridgeError(
            "This MODEL has this branch already.",
            f"{name} twice",
            "each branch once",
            "Remove one of the two nodes, or choose another branch in it.",
        )
    ops, dtype, unet_dtype = comfy.ops.manual_cast, tower_dtype(), model.model.get_dtype_inference()
    native, patcher = TOWERS.get((digest, dtype)), BRANCHES.get((digest, unet_dtype))
    if native is None or patcher is None:
        ledger = folders.ledger()
        loaded = load_bridge(files[0], ops=ops, dtype=dtype, ledger=ledger)
        if native is None:
            encoder = loaded.encoder or load_encoder(files[-1], ops=ops, dtype=dtype, ledger=ledger)
            _check_width(encoder, loaded.bridge, name)
            TOWERS[digest, dtype] = native = NativeTower(encoder, loaded.bridge, digest)
        if patcher is None:
            patcher = patcher_of(branch.build(model, loaded.unet, unet_dtype), model)
            BRANCHES[digest, unet_dtype] = patcher
    beside = branch.Beside(name, digest, patcher, strength)
    loras = carried.carried_by(model, clip.patcher)
    return branch.add_to(model, beside), BranchedClip.over(clip, Voice(native, route, name), loras)


def _alone(name: str) -> BridgeError:
    return BridgeError(
        "A branch and a bridge of another kind do not go together.",
        f"{name} behind a Language Bridge node of the other sort",
        "branches alone, or one other bridge alone",
        "Use one Language Bridge node for each checkpoint, or further ones with branches only.",
    )


def _open(
    files: Sequence[Path],
    digest: str,
    model: Any,
    name: str,
    lent: BorrowedEncoder | None,
    template: tuple[str, str],
) -> tuple[NativeTower, Any]:
    """Tower of a bridge, and patcher of its U-Net part or None; a living graph's are shared, not read."""
    ops, dtype, ledger = comfy.ops.manual_cast, tower_dtype(), folders.ledger()
    unet_dtype = model.model.get_dtype_inference()
    tower = None if lent else TOWERS.get((digest, dtype))
    part = PARTS.get((digest, unet_dtype))
    header = folders.bridge_header(files[0])
    if tower is not None and (part is not None or header.unet == "none"):
        return tower, part
    loaded = load_bridge(files[0], ops=ops, dtype=dtype, ledger=ledger)
    if lent is not None:
        tower = BorrowedTower(lent, loaded.bridge, digest, template)
    if tower is None:
        encoder = loaded.encoder or load_encoder(files[-1], ops=ops, dtype=dtype, ledger=ledger)
        _check_width(encoder, loaded.bridge, name)
        TOWERS[digest, dtype] = tower = NativeTower(encoder, loaded.bridge, digest, template)
    if loaded.unet and part is None:
        weights = UnetPart(loaded.unet, str(header.training["unet"]), unet_dtype)
        PARTS[digest, unet_dtype] = part = patcher_of(weights, model)
    return tower, part


def _digest(header: BridgeHeader, files: Sequence[Path]) -> str:
    """Names the content of a bridge and its tower: what the headers say, and size and time of each file.

    The tower's header holds the digest of its weights; hashing the bridge's too would cost more than reading.
    """
    tower = read_encoder_header(files[-1])
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    parts = [header.to_json(), tower.to_json() if tower else "", json.dumps(facts)]
    return hashlib.sha256("\n".join(parts).encode("ascii")).hexdigest()


def template_of(header: BridgeHeader, name: str) -> tuple[str, str]:
    """Texts that the method puts before and after a prompt; BridgeError when it needs some and has none."""
    known = header.training.get(TEMPLATE, _TEMPLATES.get(header.kind))
    spec = parse_spec(kind_class(header.kind).Spec, header.spec, f"bridge of kind {header.kind!r}")
    if known is None and getattr(spec, "skip", 0):
        raise BridgeError(
            f"The bridge {name} does not say which template stands around a prompt.",
            f"{getattr(spec, 'skip', 0)} rows to be dropped, and no {TEMPLATE!r} in its training record",
            'a training record with "template": {"before": .., "after": ..}',
            "Convert the bridge again with its template, or write it into the header.",
        )
    texts = known if isinstance(known, dict) else {}
    return str(texts.get("before", "")), str(texts.get("after", ""))


def _check(header: BridgeHeader, base: Base, name: str) -> None:
    if header.base != base.name:
        raise BridgeError(
            f"The bridge {name} is not made for this checkpoint.",
            f"a bridge for {NAMES[header.base]} in front of a checkpoint of {NAMES[base.name]}",
            f"a bridge for {NAMES[base.name]}",
            f"Choose a bridge for {NAMES[base.name]}, or load a checkpoint of {NAMES[header.base]}.",
        )
    context, pooled = header.spec.get("context"), header.spec.get("pooled", 0)
    if kind_class(header.kind).beside != (header.unet == BRANCH):
        raise BridgeError(
            f"The bridge {name} is not whole.",
            f"kind {header.kind!r} with the U-Net part {header.unet!r}",
            f"kind 'branch' and the U-Net part {BRANCH!r} together",
            "Convert or save the bridge again.",
        )
    if header.unet == BRANCH:
        return  # its network reads text of a width of its own
    if context != base.context or pooled not in (0, base.pooled):
        raise BridgeError(
            f"The bridge {name} speaks to another width.",
            f"text rows of width {context}, pooled vector of width {pooled}",
            f"text rows of width {base.context} and pooled width {base.pooled}, as {NAMES[base.name]} reads",
            "Fetch or save the bridge again; its header does not fit its base.",
        )
    if header.training.get(SAYS) == CLIP_INPUT:
        tokenwise = kind_class(header.kind).tokenwise
        if len(base.keys) != 1 or pooled or not tokenwise or header.unet != "none":
            raise BridgeError(
                f"The bridge {name} cannot speak to the text model of this checkpoint.",
                f"a bridge of kind {header.kind!r}, U-Net part {header.unet!r}, pooled width {pooled}, "
                f"that says input embeddings, and {len(base.keys)} text model(s)",
                "one row for each token, no U-Net part, no pooled vector, and one text model",
                "Use a bridge that says rows for the U-Net.",
            )


def _check_unet(header: BridgeHeader, shapes: Mapping[str, tuple[int, ...]], model: Any, name: str) -> None:
    """Refuses a U-Net part that this MODEL cannot take whole, before any weight is read."""
    how = header.training.get("unet")
    found = {key[len(UNET_PREFIX) :]: shape for key, shape in shapes.items() if key.startswith(UNET_PREFIX)}
    if header.unet == BRANCH:
        branch.check(model, found, name)
        return
    if header.unet == "none":
        if how == OWN:
            _check_own(model, name)
        return
    if header.unet == "full":
        raise BridgeError(
            f"The bridge {name} needs a whole U-Net of its own.",
            "U-Net part 'full'",
            "a bridge that leaves the U-Net alone, or changes its cross-attention ('kv' or 'attn2')",
            "Load the method's own checkpoint, and a bridge without a U-Net part behind it.",
        )
    if how not in (DELTA, REPLACE):
        raise BridgeError(
            f"The bridge {name} does not say how its U-Net part is meant.",
            f"U-Net part {header.unet!r} with unet = {how!r:.40} in the training record",
            f"{DELTA!r} or {REPLACE!r}",
            "Convert or save the bridge again.",
        )
    if header.training.get("unet_complete") is False:
        logging.warning("%s: the method also changed other parts of the U-Net than %s", name, header.unet)
    expected = part_shapes(model, header.unet)
    if found != expected:
        odd = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise BridgeError(
            f"The U-Net part of the bridge {name} does not fit this checkpoint.",
            f"{len(found)} tensors, {odd[0]} {found.get(odd[0], 'missing')}",
            f"{len(expected)} tensors, {odd[0]} {expected.get(odd[0], 'not there')}",
            "Use a checkpoint of the base that the bridge was made for, or convert the bridge again.",
        )


def _check_own(model: Any, name: str) -> None:
    """A bridge for one U-Net alone: what can be told of a MODEL is told, the rest is said in the log."""
    if model.model.model_type != comfy.model_base.ModelType.EPS:
        raise BridgeError(
            f"The bridge {name} belongs to the U-Net of its own checkpoint.",
            f"a MODEL of the type {model.model.model_type.name}",
            "the method's own U-Net, which predicts the noise (EPS)",
            "Load the checkpoint of the method, with Language Bridge Checkpoint where it is a single file.",
        )
    logging.warning(
        "%s was trained with the U-Net of its own checkpoint and paints well with that alone", name
    )


def _check_width(encoder: Encoder, bridge: Bridge, name: str) -> None:
    if encoder.width != bridge.spec.hidden:
        raise BridgeError(
            f"The text tower {encoder.identity!r} does not fit the bridge {name}.",
            f"states of width {encoder.width}",
            f"states of width {bridge.spec.hidden}",
            "Fetch the tower that belongs to this bridge into models/text_encoders.",
        )
