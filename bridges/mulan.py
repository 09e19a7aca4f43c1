"""Kind `mulan`: the language adapters of MuLan (arXiv 2412.01271, ICML 2025) for SD1.x, SD2.x and SDXL.

Learned queries read a multilingual tower through torch's own transformer (1 + 1 layers, 8 heads). Follows
mulankit/models/adapter.py and mulankit/patch.py of mulanai/MuLan (aa9e4c2) in its keys. Published: hidden
4096 (text side of InternVL-14B), 120 queries (77 in one variant), context 768 or 1024; SDXL has two adapters,
of 1280 and 768, side by side in that order, and a pooled vector of 1280 from the tower's own (768), or by
attention over the rows. Padding is read like text: the published adapters have no mask.

The authors put `summarize:` before a prompt and drop its three tokens after the tower; the spec says which
rows those are. Prompts without it, the negative ones of SD1.x and SD2.x, come in a shorter window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Transformer, attend
from .base import (
    Bridge,
    BridgeSpec,
    Cond,
    Hidden,
    Ops,
    Value,
    extent,
    require_depth,
    require_divisible,
    require_sizes,
)
from .errors import BridgeError

HEADS = 8
PREFIX_TOKENS = 3
BARE_WINDOW = 77
ADDED = "add_embedding."
ADDED_NAMES = {"add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2."}


@dataclass(frozen=True, kw_only=True)
class MulanSpec(BridgeSpec):
    """Sizes: `queries` rows out, `layers` in the encoder and as many in the decoder.

    second: width of the second adapter's rows, which are the last part of the context; 0 = one adapter.
    tower_pooled: width of the tower's pooled vector, from which ours is projected; 0 = by attention.
    skip: rows of the prefix, right after the start token, that are dropped; 0 = none.
    bare: a window of this many tokens has no prefix, so nothing is dropped from it; 0 = there is none such.
    """

    queries: int = 120
    layers: int = 1
    second: int = 0
    tower_pooled: int = 0
    skip: int = PREFIX_TOKENS
    bare: int = BARE_WINDOW

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, queries=1, layers=1, second=0, tower_pooled=0, skip=0, bare=0)
        require_depth(self, "layers")
        require_divisible(self, context=HEADS, second=HEADS)
        if self.second >= self.context:
            raise BridgeError(
                "The two adapters of a mulan bridge do not fit its context.",
                f"second {self.second}, context {self.context}",
                "a second adapter narrower than the context",
                "The file is damaged or was made by another version; fetch or save it again.",
            )


class _Adapter(nn.Module):
    """Queries that read the tower's states."""

    def __init__(
        self,
        spec: MulanSpec,
        width: int,
        ops: Ops,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.proj, self.queries, self.transformer = _parts(spec, width, ops, device, dtype)

    def start(self, generator: torch.Generator | None) -> None:
        """Start the queries as the authors do."""
        nn.init.normal_(self.queries, generator=generator)

    def forward(self, states: Tensor) -> Tensor:
        """states [B, T, D] to [B, N, W]."""
        return _read(self.proj, self.queries, self.transformer, states)


def _parts(
    spec: MulanSpec, width: int, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[nn.Sequential, nn.Parameter, Transformer]:
    return (
        nn.Sequential(
            ops.Linear(spec.hidden, width, device=device, dtype=dtype),
            nn.GELU(),
            ops.Linear(width, width, device=device, dtype=dtype),
        ),
        nn.Parameter(torch.empty(1, spec.queries, width, device=device, dtype=dtype)),
        Transformer(width, HEADS, spec.layers, ops=ops, device=device, dtype=dtype),
    )


def _read(proj: nn.Module, queries: Tensor, transformer: Transformer, states: Tensor) -> Tensor:
    source = proj(states)
    return transformer(source, queries.to(source).expand(len(source), -1, -1))


class _Projection(nn.Module):
    """The tower's pooled vector through two layers with a tanh-GELU between them."""

    def __init__(
        self, spec: MulanSpec, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(spec.tower_pooled, spec.pooled, device=device, dtype=dtype)
        self.linear_2 = ops.Linear(spec.pooled, spec.pooled, device=device, dtype=dtype)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled [B, Q] to [B, P]."""
        return self.linear_2(nn.functional.gelu(self.linear_1(pooled), approximate="tanh"))


class _AttentionPool(nn.Module):
    """The mean row, at a place of its own, attends to itself and to all rows."""

    def __init__(
        self, spec: MulanSpec, ops: Ops, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        width = spec.context
        self.positional_embedding = nn.Parameter(
            torch.empty(spec.queries + 1, width, device=device, dtype=dtype)
        )
        self.q_proj = ops.Linear(width, width, device=device, dtype=dtype)
        self.k_proj = ops.Linear(width, width, device=device, dtype=dtype)
        self.v_proj = ops.Linear(width, width, device=device, dtype=dtype)
        self.c_proj = ops.Linear(width, spec.pooled, device=device, dtype=dtype)
        # The same number added to each key's score: softmax does not hear it, so nothing can be learned.
        self.k_proj.bias.requires_grad_(False)

    def start(self, generator: torch.Generator | None) -> None:
        """Start the places as the authors do."""
        nn.init.normal_(
            self.positional_embedding, std=self.positional_embedding.shape[1] ** -0.5, generator=generator
        )

    def forward(self, rows: Tensor) -> Tensor:
        """rows [B, N, W] to [B, P]."""
        x = torch.cat([rows.mean(dim=1, keepdim=True), rows], dim=1) + self.positional_embedding.to(rows)
        return self.c_proj(attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), HEADS)[:, 0])


class Mulan(Bridge, kind="mulan"):
    """context = transformer(proj(states), queries), one adapter or two side by side; see MulanSpec."""

    Spec = MulanSpec
    tokenwise = False
    hears_padding = True

    def __init__(
        self,
        spec: BridgeSpec,
        *,
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert isinstance(spec, MulanSpec)
        super().__init__(spec, ops=ops, device=device, dtype=dtype)
        if spec.second:
            self.adapter1 = _Adapter(spec, spec.context - spec.second, ops, device, dtype)
            self.adapter2 = _Adapter(spec, spec.second, ops, device, dtype)
        else:  # published without a name of its own around it
            self.proj, self.queries, self.transformer = _parts(spec, spec.context, ops, device, dtype)
        if spec.pooled:
            pool = _Projection if spec.tower_pooled else _AttentionPool
            self.pool_caption_projection = pool(spec, ops, device, dtype)

    def start(self, generator: torch.Generator | None) -> None:
        """Start the queries of a lone adapter."""
        assert isinstance(self.spec, MulanSpec)
        if not self.spec.second:
            nn.init.normal_(self.queries, generator=generator)

    def forward(self, hidden: Hidden, timestep: Tensor | None = None) -> Cond:
        """Map states [B, T, D], prefix included, to context [B, 120, C] and, for SDXL, pooled [B, P]."""
        self.check(hidden)
        spec = self.spec
        assert isinstance(spec, MulanSpec)
        states = hidden.states
        if spec.skip and states.shape[1] != spec.bare:
            states = torch.cat([states[:, :1], states[:, 1 + spec.skip :]], dim=1)
        if spec.second:
            context = torch.cat([self.adapter1(states), self.adapter2(states)], dim=-1)
        else:
            context = _read(self.proj, self.queries, self.transformer, states)
        if not spec.pooled:
            return Cond(context)
        if not spec.tower_pooled:
            return Cond(context, self.pool_caption_projection(context))
        if hidden.pooled is None or hidden.pooled.shape[-1] != spec.tower_pooled:
            raise BridgeError(
                "This mulan bridge needs a pooled vector that the text tower does not give.",
                "none" if hidden.pooled is None else tuple(hidden.pooled.shape),
                f"[batch, {spec.tower_pooled}]",
                "Use the tower that the bridge file names in its header.",
            )
        return Cond(context, self.pool_caption_projection(hidden.pooled))

    @classmethod
    def part(cls, published: Mapping[str, Value]) -> dict[str, Value]:
        """All but the `add_embedding.*` of some SDXL files, which take the place of the U-Net's own."""
        return {key: value for key, value in published.items() if not key.startswith(ADDED)}

    @classmethod
    def unet_part(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The U-Net's new embedding of pooled vector and sizes (`label_emb.0.*`), where the file has one."""
        return {
            ours + key[len(theirs) :]: tensors[key]
            for theirs, ours in ADDED_NAMES.items()
            for key in tensors
            if key.startswith(theirs)
        }

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> MulanSpec | None:
        """Recognise the published layouts by their exact set of keys and shapes."""
        own = cls.part(shapes)
        added = {key for key in shapes if key.startswith(ADDED)}
        second = extent(own, "adapter2.proj.0.weight")
        place = "adapter1." if second else ""
        pool = "pool_caption_projection."
        if added and (
            not second or added != {f"{key}{end}" for key in ADDED_NAMES for end in ("weight", "bias")}
        ):
            return None
        return cls.exact(
            own,
            hidden=extent(own, f"{place}proj.0.weight", 1),
            context=extent(own, f"{place}proj.0.weight") + second,
            pooled=extent(own, f"{pool}linear_1.weight") or extent(own, f"{pool}c_proj.weight"),
            queries=extent(own, f"{place}queries", 1),
            layers=sum(
                key.startswith(place) and key.endswith(".multihead_attn.in_proj_weight") for key in own
            ),
            second=second,
            tower_pooled=extent(own, f"{pool}linear_1.weight", 1),
            bare=0 if second else BARE_WINDOW,
        )
