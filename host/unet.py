"""What a bridge adds to a MODEL: cross-attention weights for native rows, and rows said anew at each step.

Nothing of the checkpoint is patched. The MODEL carries keyed wrappers and the bridge's own models; around a
call of the U-Net with native rows in it, the projections of its cross-attention are stood in for, each by its
own answer with the bridge's put into the native places. LoRA patches, offloading, and other packs' patches of
the cross-attention act on that own answer as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..bridges.base import Cond
from ..bridges.errors import BridgeError
from .cache import EMBEDDINGS, Said
from .rows import MARK, Mark
from .tower import FIRST_TIMESTEP, NativeTower

KEY = "language_bridge"
ROWS = "language_bridge_rows"
"""Under this name each conditioning tells the U-Net how many of its rows are native, and how many it has."""

DELTA, REPLACE = "delta", "replace"
BY_ROW = (".to_k", ".to_v")
"""Projections of text rows; the others, of picture places, go with a whole batch entry."""

_NAMES = {
    "kv": ("to_k.weight", "to_v.weight"),
    "attn2": ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"),
}
Shapes = Mapping[str, tuple[int, ...]]


def part_shapes(model: Any, part: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the cross-attention weights that a U-Net part of `kv` or `attn2` has for this MODEL."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in _attentions(model.model.diffusion_model):
        for key in _NAMES[part]:
            layer, weight = key.rsplit(".", 1)
            shapes[f"{name}.{key}"] = tuple(getattr(module.get_submodule(layer), weight).shape)
    return shapes


class UnetPart(torch.nn.Module):
    """The cross-attention layers of a bridge, in the order of `names` (relative to the U-Net).

    how: `delta` adds to the checkpoint's own answer, its LoRA patches and all; `replace` stands instead of
    it. Layers come from the host's casting ops, in `dtype`.
    """

    def __init__(self, weights: Mapping[str, Tensor], how: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.how = how
        self.names = sorted({key.rsplit(".", 1)[0] for key in weights})
        self.layers = torch.nn.ModuleList()
        for name in self.names:
            weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
            layer: torch.nn.Module = comfy.ops.manual_cast.Linear(
                weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype
            )
            state = {"weight": weight.to(dtype)} | ({} if bias is None else {"bias": bias.to(dtype)})
            layer.load_state_dict(state)
            self.layers.append(layer)
        self.eval().requires_grad_(False)

    def mix(self, own: Tensor, given: Tensor, layer: torch.nn.Module, places: Tensor) -> Tensor:
        """`own` [M, .., W] with answers to `given` [M, .., V] added or put in at `places` [K]."""
        said = layer(given[places]).to(own.dtype)
        mixed = own.index_add if self.how == DELTA else own.index_copy
        return mixed(0, places, said)


@dataclass(frozen=True, eq=False)
class Addition:
    """The wrappers of one bridge on one MODEL.

    patcher: of its cross-attention weights, one for all MODELs, or none: the host takes weights without their
    patcher for lost; tower: asked again at each step when its bridge is timed.
    """

    name: str
    digest: str
    patcher: Any
    tower: NativeTower

    @property
    def part(self) -> UnetPart | None:
        """The cross-attention weights, which the patcher keeps."""
        return None if self.patcher is None else self.patcher.model

    def outer_sample(self, executor: Any, *arguments: Any, **options: Any) -> Any:
        """Tells the U-Net of each conditioning how many of its rows are native; silent when none is."""
        conds: dict[str, list[dict[str, Any]]] = executor.class_obj.conds
        counts = {key: [self._rows(entry) for entry in entries] for key, entries in conds.items()}
        if self.part is not None and any(any(native for native, _ in each) for each in counts.values()):
            for key, entries in conds.items():
                conds[key] = [
                    _with(entry, ROWS, comfy.conds.CONDRegular(torch.tensor([pair])))
                    for entry, pair in zip(entries, counts[key], strict=True)
                ]
        return executor(*arguments, **options)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Sequence[Any], x: Tensor, sigma: Tensor, options: Any
    ) -> Any:
        """Says the native rows of each conditioning anew for this step."""
        times = [int(time) for time in model.model_sampling.timestep(sigma).flatten().tolist()]
        anew = [
            entries if entries is None else [self._at(entry, times) for entry in entries] for entries in conds
        ]
        return executor(model, anew, x, sigma, options)

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Calls the U-Net; its cross-attention reads native rows with the bridge's weights."""
        counts = options.pop(ROWS, None)
        call = (x, t, c_concat, c_crossattn, *arguments)
        if self.part is None or counts is None or c_crossattn is None or not bool(counts[:, 0].any()):
            return executor(*call, **options)
        native = _native(counts.cpu(), c_crossattn.shape[1])
        text = _Text(c_crossattn, native, self.name)
        with _standing_in(executor.class_obj.diffusion_model, self.part, text):
            return executor(*call, **options)

    def _rows(self, entry: Mapping[str, Any]) -> tuple[int, int]:
        """Native rows and all rows of a conditioning; BridgeError when another bridge has marked it."""
        mark, text = Mark.of(entry, self.digest), entry.get("cross_attn")
        if mark is None and entry.get(MARK) is not None:
            raise BridgeError(
                "MODEL and conditioning come from two different bridges.",
                f"a MODEL behind the bridge {self.name}, and text that another bridge has encoded",
                "both outputs of the same Language Bridge node",
                "Connect MODEL and CLIP of one Language Bridge node, not of two.",
            )
        return (0 if mark is None else mark.rows, 1 if text is None else int(text.shape[1]))

    def _at(self, entry: dict[str, Any], times: list[int]) -> dict[str, Any]:
        mark, text = Mark.of(entry, self.digest), entry["model_conds"].get("c_crossattn")
        if mark is None or mark.hidden is None or text is None:
            return entry
        own: Tensor = text.cond
        first = self._say(mark, FIRST_TIMESTEP).to(own)
        if own.shape[1] < mark.rows or not torch.allclose(own[:, : mark.rows], first, rtol=1e-2, atol=1e-3):
            return (
                entry  # a node has averaged, multiplied or zeroed these rows; its word stands at every step
            )
        said = {time: self._say(mark, time) for time in dict.fromkeys(times)}
        rows = torch.cat([said[time] for time in (times if len(said) > 1 else times[:1])]).to(own)
        rest = own[:, mark.rows :]
        batch = max(len(rows), len(rest))
        both = torch.cat([rows.expand(batch, -1, -1), rest.expand(batch, -1, -1)], dim=1)
        return _with(entry, "c_crossattn", comfy.conds.CONDCrossAttn(both))

    def _say(self, mark: Mark, time: int) -> Tensor:
        """Rows [1, N, C] of a marked conditioning at one timestep, from memory where possible."""
        assert mark.hidden is not None and mark.weights is not None
        known = EMBEDDINGS.get(self.digest, (mark.words, time))
        if known is not None:
            return known.cond.context
        bridge = self.tower.bridge
        rows, _ = mark.weights.apply(self.tower.speak(mark.hidden, time), tokenwise=bridge.tokenwise)
        EMBEDDINGS.put(self.digest, (mark.words, time), Said(Cond(rows)))
        return rows


def patcher_of(network: torch.nn.Module, model: Any) -> Any:
    """A patcher that makes the host load and offload the network like the MODEL."""
    return comfy.model_patcher.ModelPatcher(
        network, load_device=model.load_device, offload_device=model.offload_device
    )


def add_to(model: Any, tower: NativeTower, part: Any, name: str) -> Any:
    """A clone of MODEL with what the bridge adds to it; part: the patcher of a `UnetPart`, or None."""
    clone = model.clone()
    addition = Addition(name, tower.digest, part, tower)
    models: list[Any] = []
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, addition.outer_sample)
    if part is not None:
        models.append(part)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, addition.apply_model)
    if tower.bridge.timed:
        models.append(tower.bridge_patcher)
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, addition.calc_cond_batch)
    clone.set_additional_models(KEY, models)
    return clone


def has_addition(model: Any) -> bool:
    """Whether a bridge has added something to this MODEL already."""
    return bool(model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY))


def _attentions(unet: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            yield name, module


def _with(entry: dict[str, Any], name: str, cond: Any) -> dict[str, Any]:
    return {**entry, "model_conds": {**entry["model_conds"], name: cond}}


def _native(counts: Tensor, length: int) -> Tensor:
    """Which rows are native, [B, length] bool, of counts [B, 2] (native, all).

    The host repeats a shorter text as a whole until all of a batch are equally long.
    """
    native, rows = counts[:, :1], counts[:, 1:]
    return (torch.arange(length, device=counts.device)[None] % rows) < native


class _Text:
    """The text rows of one call of the U-Net, [B, N, C], and which of them are `native` [B, N] bool."""

    def __init__(self, rows: Tensor, native: Tensor, bridge: str) -> None:
        self.native = native
        self.bridge = bridge
        self._rows = rows
        # Kept, so that no other text can come to lie at the address of one of them.
        self._known: dict[tuple[int, torch.Size], Tensor] = {}
        self._places: dict[int, Tensor] = {}

    def places(self, text: Tensor) -> Tensor:
        """Where native rows are in the flattened `text` [B, M, C], M >= N: others may put rows behind it.

        BridgeError when it is not this text: other packs let the projections read texts of their own.
        """
        length = text.shape[1]
        if text.shape[0] != len(self.native) or length < self.native.shape[1]:
            raise self.rearranged(text)
        # One comparison for each text and not for each layer, because it makes the device wait.
        key = (text.data_ptr(), text.shape)
        if key not in self._known:
            if not torch.equal(text[:, : self.native.shape[1]], self._rows.to(text)):
                raise self.rearranged(text)
            self._known[key] = text
        if length not in self._places:
            longer = torch.nn.functional.pad(self.native, (0, length - self.native.shape[1]))
            self._places[length] = longer.flatten().nonzero()[:, 0].to(text.device)
        return self._places[length]

    def rearranged(self, found: Tensor) -> BridgeError:
        """What to say of rows that are not these."""
        return BridgeError(
            f"The bridge {self.bridge} cannot tell any more which text rows are native.",
            f"text rows {list(found.shape[:2])} in the cross-attention of the U-Net, or other text",
            f"{list(self.native.shape)}, as they were encoded, or more rows behind them",
            "Take away the node that rearranges the text inside the U-Net, "
            "or use a bridge without a U-Net part.",
        )


@contextmanager
def _standing_in(unet: torch.nn.Module, part: UnetPart, text: _Text) -> Iterator[None]:
    """While inside, the part's projections in `unet` answer for the native rows of `text`."""
    # Places are found on the CPU, so that the device is not waited for.
    before: list[tuple[torch.nn.Module, Any]] = []
    entries = text.native.any(1).nonzero()[:, 0]
    try:
        for name, layer in zip(part.names, part.layers, strict=True):
            module = unet.get_submodule(name)
            before.append((module, module.__dict__.get("forward")))
            own = module.forward
            if name.endswith(BY_ROW):
                module.forward = _rowwise(own, part, layer, text)
            else:
                module.forward = _entrywise(own, part, layer, text, entries)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


def _rowwise(
    own: Callable[..., Tensor], part: UnetPart, layer: torch.nn.Module, text: _Text
) -> Callable[..., Tensor]:
    def forward(rows: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """rows [B, N, C] to keys or values [B, N, W]; rows that others put behind the text stay their own."""
        places = text.places(rows)
        said = own(rows, *arguments, **options)
        mixed = part.mix(said.flatten(0, 1), rows.flatten(0, 1), layer, places)
        return mixed.view(said.shape)

    return forward


def _entrywise(
    own: Callable[..., Tensor], part: UnetPart, layer: torch.nn.Module, text: _Text, entries: Tensor
) -> Callable[..., Tensor]:
    def forward(picture: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """picture [B, P, V] to [B, P, W]; an entry with native rows goes over the bridge's weights."""
        if picture.shape[0] != len(text.native):
            raise text.rearranged(picture)
        said = own(picture, *arguments, **options)
        return part.mix(said, picture, layer, entries.to(picture.device))

    return forward
