"""Family `gemma`: Gemma 2 and Gemma 3 read as text towers, and the encoder of T5Gemma.

Gemma Team 2024 and 2025, Zhang et al. 2025 (T5Gemma): root-mean-square norms whose scale is 1 + weight before
and behind each half of a layer, embeddings times the square root of their width, rotary positions, fewer keys
than queries (GQA), gated feed-forward with the tanh form of GELU, and layers that see a sliding window only
(local) between layers that see all (global). Gemma 3 has norms on queries and keys, and rotary positions of
their own in local layers; Gemma 2 and T5Gemma bend the scores by softcap * tanh(scores / softcap) instead.
T5Gemma's encoder looks ahead as well. Tensors carry Hugging Face's names of Gemma 3.

Published towers run in bfloat16, where the factor of the embeddings is rounded (33.94 becomes 34 at width
1152). transformers rounds it to the type of the weights; here the spec says whether it is bfloat16's, so that
a tower read in float32 says what its authors heard. The states of Gemma 3 can leave the range of float16, so
such a tower computes in bfloat16 wherever less than float32 is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..bridges.base import Hidden, require_sizes
from ..bridges.errors import BridgeError
from .base import (
    PARTS_OF_CONFIGS,
    Config,
    Encoder,
    EncoderSpec,
    Layers,
    Marks,
    Origin,
    RootMeanSquareNorm,
    Shapes,
    count_layers,
    find_stem,
    marker_id,
)
from .vocabulary import (
    checked,
    need,
    read_sentencepiece,
    sentencepiece_json,
    settings_of,
    token_setting,
    with_padding,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORDS = "embed_tokens.weight"
FIRST = "layers.0."
BEFORE_DECODER, BEFORE_ENCODER = "input_layernorm.weight", "pre_self_attn_layernorm.weight"
RENAMED = {
    "input_layernorm.": "pre_self_attn_layernorm.",
    "post_attention_layernorm.": "post_self_attn_layernorm.",
}
"""Our names (Gemma 2 and 3) and what T5Gemma calls the same norms."""

PADDING = "<pad>"
ABSENT = -1
ACTIVATION = "gelu_pytorch_tanh"
LOCAL, GLOBAL = "sliding_attention", "full_attention"
PICTURES = ("<image_soft_token>", "<end_of_image>")
"""Tokens that published tokenizers add behind the vocabulary; towers of text alone have no rows for them."""


@dataclass(frozen=True)
class _Layout:
    """One published layout: the model types of its configs, and what a config means where it is silent.

    The values are the defaults of transformers' configuration classes, which leave out of a config.json what
    equals them. softcap 0 = none; reach is the sliding window, `every` the distance of the global layers.
    """

    models: tuple[str, ...]
    theta: float
    every: int
    softcap: float
    window: int
    reach: int = 4096
    scalar: float = 256.0
    head: int = 256


GEMMA_2 = _Layout(("gemma2",), 1e4, 2, 50.0, 8192)
GEMMA_3 = _Layout(("gemma3_text", "gemma3"), 1e6, 6, 0.0, 131_072)
T5_GEMMA = _Layout(("t5_gemma_module", "t5gemma"), 1e4, 2, 50.0, 8192)
LOCAL_THETA = 1e4


@dataclass(frozen=True, kw_only=True)
class GemmaSpec(EncoderSpec):
    """Sizes: `heads` queries and `pairs` keys and values of width `head`, `inner` of the feed-forward part.

    causal: nobody looks ahead. normed: queries and keys have norms. Every `every`-th layer is global, the
    others see `reach` tokens (0 = all). theta and near_theta are the bases of the rotary positions of global
    and local layers, stretch divides the positions of global ones. scalar: scores are divided by its square
    root. softcap: bends the scores, 0 = not.
    start, end: ids put around a text (-1 = none). left: padding stands before the text.
    bfloat16: computes as published models run, see the top of this file.
    """

    heads: int
    pairs: int
    head: int
    inner: int
    causal: bool = True
    normed: bool = True
    every: int = 6
    reach: int = 512
    theta: float = 1_000_000.0
    near_theta: float = LOCAL_THETA
    stretch: float = 1.0
    scalar: float = 256.0
    softcap: float = 0.0
    start: int = 2
    end: int = ABSENT
    left: bool = False
    bfloat16: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, heads=1, pairs=1, head=2, inner=1, every=1, reach=0, start=ABSENT, end=ABSENT)
        fits = self.heads % self.pairs == 0 and self.head % 2 == 0 and self.layers <= 512
        real = 0 < self.eps < 1 and 0 < self.scalar < 1e9 and 0 <= self.softcap < 1e9
        turns = all(1 < theta < 1e12 for theta in (self.theta, self.near_theta)) and 1 <= self.stretch < 1e6
        if not (fits and real and turns):
            raise BridgeError(
                "The sizes of this Gemma tower do not fit together.",
                f"heads {self.heads} over {self.pairs} pairs of width {self.head}, layers {self.layers}, "
                f"eps {self.eps}, theta {self.theta} and {self.near_theta}, stretch {self.stretch}, "
                f"scalar {self.scalar}, softcap {self.softcap}",
                "pairs dividing the heads, an even width, at most 512 layers, eps below 1, theta above 1, "
                "stretch from 1, scalar above 0, softcap 0 or more",
                "The file is damaged or was made by another version; fetch or save it again.",
            )
        if max(self.start, self.end) >= self.vocab:
            raise BridgeError(
                "The special tokens of this Gemma tower are outside of its vocabulary.",
                f"start {self.start}, end {self.end}",
                f"ids below {self.vocab}",
                "The file is damaged or was made by another version; fetch or save it again.",
            )

    def local(self, number: int) -> bool:
        """Whether layer `number`, counted from 0, sees a sliding window only."""
        return bool(self.reach) and (number + 1) % self.every != 0


class GemmaNorm(RootMeanSquareNorm):
    """(1 + weight) * x / sqrt(mean(x^2) + eps), all of it in float32 before the result is rounded."""

    def forward(self, states: Tensor) -> Tensor:
        """states [..., width] -> the same shape and dtype; the scale is moved to wherever the states are."""
        wide = states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.to(wide))).to(states.dtype)


class Gemma(Encoder, family="gemma"):
    """Gemma: states of the chosen layer; no pooled vector.

    Layers are numbered as in transformers' `hidden_states`: 0 = the scaled embeddings. The last layer (-1)
    comes out through the final norm, as `last_hidden_state` does; every other layer is taken raw.
    """

    Spec = GemmaSpec

    def find_marks(self, tokenizer: Tokenizer, filler: int | None) -> Marks:
        """Start and end as the spec says; the filler is the JSON's own, or <pad>."""
        spec = cast(GemmaSpec, self.spec)
        start, end = ((number,) if number >= 0 else () for number in (spec.start, spec.end))
        return Marks(start, end, marker_id(tokenizer, PADDING) if filler is None else filler)

    def build(self, spec: EncoderSpec, layers: Layers) -> None:
        """Embeddings, layers and the final norm."""
        assert isinstance(spec, GemmaSpec)
        if spec.bfloat16 and layers.dtype == torch.float16:
            layers = dataclasses.replace(layers, dtype=torch.bfloat16)
        self.embed_tokens = layers.embedding(spec.vocab, spec.width)
        self.layers = nn.ModuleList(_Layer(spec, layers) for _ in range(spec.layers))
        self.norm = GemmaNorm(spec.width, spec.eps, layers)

    @property
    def pooled_width(self) -> int:
        """Gemma has no pooled vector."""
        return 0

    def frame(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Special tokens and padding, which stands before the text where the spec says so."""
        framed, mask = super().frame(ids)
        if cast(GemmaSpec, self.spec).left:
            empty = self.window - int(mask.sum())
            framed, mask = framed.roll(empty), mask.roll(empty)
        return framed, mask

    def mask_of(self, ids: Tensor) -> Tensor:
        """The mask [B, T] bool of framed ids [B, T]: False in the padding at one end of each row."""
        if cast(GemmaSpec, self.spec).left:
            return (ids != self.marks.padding).long().cumsum(-1) > 0
        return super().mask_of(ids)

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read ids [B, T] under mask [B, T] bool: states [B, T, D] of the chosen layer.

        Under the `bfloat16` rule the states come out as float32.
        """
        spec = cast(GemmaSpec, self.spec)
        mask = mask.bool()
        states: Tensor = self.embed_tokens(ids)
        if spec.bfloat16 and states.dtype.itemsize < 4:
            states = states.to(torch.bfloat16)
        rounded = torch.bfloat16 if spec.bfloat16 else states.dtype
        states = states * torch.tensor(math.sqrt(spec.width), dtype=rounded).to(states)
        places = torch.arange(ids.shape[1], device=ids.device)
        views = {local: _View(places, mask, self.mask_rule, spec, local) for local in (False, True)}
        layers = cast("Sequence[_Layer]", self.layers[: self.depth])
        for number, layer in enumerate(layers):
            states = layer(states, views[spec.local(number)])
        if self.depth == spec.layers:
            states = self.norm(states)
        return Hidden(states.float() if spec.bfloat16 else states, mask)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The usual start; the weights of the norms are zero, because 1 is added to them."""
        super().reset_parameters(generator)
        for module in self.modules():
            if isinstance(module, GemmaNorm):
                nn.init.zeros_(module.weight)

    @classmethod
    def measure(cls, shapes: Shapes, config: Config) -> EncoderSpec | None:
        """Sizes from the shapes; positions, window, pattern, scale and softcap from the config.

        What a config.json does not say is what transformers' class takes for granted. BridgeError without a
        config.json, and for relatives that compute something else.
        """
        stem, encoder = _stem(shapes)
        if stem is None:
            return None
        own = stem + FIRST
        query, key, inner = (
            shapes.get(f"{own}{name}.weight")
            for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
        )
        if query is None or key is None or inner is None:
            return None
        if not config:
            raise BridgeError(
                "A Gemma cannot be read from its weights alone.",
                f"{len(shapes)} tensors and no config.json",
                "the config.json of the same model: rotary positions, sliding window and scale of the "
                "attention stand there alone",
                "Name the model's whole folder, or its config.json beside the weights.",
            )
        norm = shapes.get(f"{own}self_attn.q_norm.weight")
        layout = T5_GEMMA if encoder else GEMMA_2 if norm is None else GEMMA_3
        facts = _Facts.of(config)
        head = norm[0] if norm is not None else facts.whole("head_dim", layout.head)
        words, layers = shapes[stem + WORDS], count_layers(shapes, stem + "layers.")
        _refuse_strangers(shapes, own, facts, layout)
        theta, near_theta, stretch = facts.turns(layout)
        return GemmaSpec(
            vocab=words[0],
            width=words[1],
            layers=layers,
            window=facts.whole("max_position_embeddings", layout.window),
            heads=max(query[0] // max(head, 1), 1),
            pairs=max(key[0] // max(head, 1), 1),
            head=head,
            inner=inner[0],
            causal=not encoder,
            normed=norm is not None,
            every=facts.every(layout, layers),
            reach=facts.whole("sliding_window", layout.reach, null=0),
            theta=theta,
            near_theta=near_theta,
            stretch=stretch,
            scalar=facts.real("query_pre_attn_scalar", layout.scalar),
            softcap=facts.real("attn_logit_softcapping", layout.softcap, null=0.0),
            start=facts.whole("bos_token_id", 2),
            bfloat16="bfloat16" in (facts.values.get("dtype"), facts.values.get("torch_dtype")),
            eps=facts.real("rms_norm_eps", 1e-6),
        )

    @classmethod
    def origins(cls, spec: EncoderSpec, names: Iterable[str]) -> dict[str, Origin]:
        """Stems: none, `model.`, `language_model.model.`, `encoder.`, `model.encoder.` and the like."""
        stem, encoder = _stem(names)
        origins: dict[str, Origin] = {}
        for key in cls.own_shapes(spec):
            name = key
            for ours, theirs in RENAMED.items() if encoder else ():
                name = name.replace(ours, theirs)
            origins[key] = Origin((stem or "") + name)
        return origins

    @classmethod
    def tokenizer_from(cls, files: Mapping[str, bytes]) -> bytes:
        """From tokenizer.json or tokenizer.model; tokens for pictures behind the vocabulary are left out."""
        name = need(files, cls.family, ("tokenizer.json",), ("tokenizer.model",))
        if name == "tokenizer.json":
            made = _without_pictures(checked(files[name]))
        else:
            made = sentencepiece_json(read_sentencepiece(files[name], name), name)
        return with_padding(made, token_setting(settings_of(files), "pad_token"))


@dataclass(frozen=True)
class _Facts:
    """A config.json, with what it says of its text part over what it says of all."""

    values: Mapping[str, object]

    @staticmethod
    def of(config: Config) -> _Facts:
        """The facts of a config.json, whose text part may be its own `encoder` or one of the usual parts."""
        values = dict(config)
        for part in ("encoder", *PARTS_OF_CONFIGS):
            inside = config.get(part)
            if isinstance(inside, dict):
                values |= cast("dict[str, object]", inside)
        return _Facts(values)

    def whole(self, name: str, default: int, null: int | None = None) -> int:
        """A whole number, `default` where there is none, `null` where the config says null."""
        if null is not None and name in self.values and self.values[name] is None:
            return null
        value = self.values.get(name)
        return value if type(value) is int else default

    def real(self, name: str, default: float, null: float | None = None) -> float:
        """A number, `default` where there is none, `null` where the config says null."""
        if null is not None and name in self.values and self.values[name] is None:
            return null
        value = self.values.get(name)
        return float(cast(float, value)) if type(value) in (int, float) else default

    def kinds(self) -> list[object]:
        """What the config says layer for layer, empty when it says nothing."""
        value = self.values.get("layer_types")
        return cast("list[object]", value) if isinstance(value, list) else []

    def every(self, layout: _Layout, layers: int) -> int:
        """The distance of the global layers."""
        kinds = self.kinds()
        if kinds:
            return kinds.index(GLOBAL) + 1 if GLOBAL in kinds else layers + 1
        older = self.whole("_sliding_window_pattern", layout.every)
        return max(self.whole("sliding_window_pattern", older), 1) if layout is GEMMA_3 else layout.every

    def rotary(self) -> tuple[dict[str, object], dict[str, object]]:
        """What the config says of the rotary positions of global and of local layers."""
        newer = self.values.get("rope_parameters")
        older = self.values.get("rope_scaling")
        near: dict[str, object] = {"rope_theta": self.values.get("rope_local_base_freq")}
        wide: dict[str, object] = {"rope_theta": self.values.get("rope_theta")}
        wide |= cast("dict[str, object]", older) if isinstance(older, dict) else {}
        if isinstance(newer, dict):
            fields = cast("dict[str, object]", newer)
            parts = [fields.get(kind) for kind in (GLOBAL, LOCAL)]
            if any(isinstance(part, dict) for part in parts):
                wide, near = (
                    said | (cast("dict[str, object]", part) if isinstance(part, dict) else {})
                    for said, part in zip((wide, near), parts, strict=True)
                )
            else:
                wide |= fields
        return wide, near

    def turns(self, layout: _Layout) -> tuple[float, float, float]:
        """Bases of global and local layers, and how far the positions of global ones are stretched."""
        wide, near = (_Facts(said) for said in self.rotary())
        theta = wide.real("rope_theta", layout.theta)
        linear = wide.values.get("rope_type", wide.values.get("type")) == "linear"
        stretch = wide.real("factor", 0.0) if linear else 1.0
        return theta, near.real("rope_theta", LOCAL_THETA) if layout is GEMMA_3 else theta, stretch


def _stem(names: Iterable[str]) -> tuple[str | None, bool]:
    """What stands before the tower's names, and whether it is T5Gemma's encoder; its decoder is none."""
    known = {name for name in names if not name.startswith("decoder.") and ".decoder." not in name}
    stem = find_stem(known, WORDS, FIRST + BEFORE_ENCODER)
    if stem is not None:
        return stem, True
    stem = find_stem(known, WORDS, FIRST + BEFORE_DECODER)
    # Llama's names, and norms of the feed-forward part besides: since Gemma 2.
    norms = {f"{stem}{FIRST}{place}_feedforward_layernorm.weight" for place in ("pre", "post")}
    return (stem, False) if norms & known else (None, False)


_LAYER = {
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"{place}_feedforward_layernorm.weight" for place in ("pre", "post")),
    *(f"{name}weight" for pair in RENAMED.items() for name in pair),
}
_BUFFERS = "self_attn.rotary_emb."


def _refuse_strangers(shapes: Shapes, own: str, facts: _Facts, layout: _Layout) -> None:
    """Raise BridgeError for relatives that have Gemma's names and compute something else."""
    values, kinds = facts.values, facts.kinds()
    odd: list[str] = []
    model = values.get("model_type")
    if isinstance(model, str) and model not in layout.models:
        odd.append(f"model type {model!r:.40} with the layers of {layout.models[0]}")
    inside = {name[len(own) :] for name in shapes if name.startswith(own)}
    more = sorted(name for name in inside if name not in _LAYER and not name.startswith(_BUFFERS))
    if more:
        odd.append(f"tensors {', '.join(more[:4])}")
    activation = values.get("hidden_activation") or ACTIVATION
    if activation != ACTIVATION:
        odd.append(f"activation {activation!r:.40}")
    if values.get("use_bidirectional_attention") or values.get("attention_bias"):
        odd.append("a decoder that looks ahead, or biases")
    every = facts.every(layout, len(kinds))
    if kinds and kinds != [LOCAL if (number + 1) % every else GLOBAL for number in range(len(kinds))]:
        odd.append("global layers at uneven distances")
    wide, near = facts.rotary()
    for said, known in (
        (wide, ("default", "linear") if layout is GEMMA_3 else ("default",)),
        (near, ("default",)),
    ):
        kind = said.get("rope_type", said.get("type", "default")) or "default"
        if kind not in known:
            odd.append(f"rotary positions of type {kind!r:.40}")
    if odd:
        raise BridgeError(
            "This language model is a relative of Gemma that computes something else.",
            "; ".join(odd),
            "Gemma 2, Gemma 3 (text) or T5Gemma as published",
            "Take the model that the bridge was trained with; Language Bridge does not read this one.",
        )


def _without_pictures(tokenizer_json: bytes) -> bytes:
    """The same tokenizer JSON without the tokens that stand for pictures behind its vocabulary."""
    fields = cast("dict[str, Any]", json.loads(tokenizer_json))
    model = cast("dict[str, Any]", fields.get("model") or {})
    count = len(cast("Sequence[object]", model.get("vocab") or ()))
    added = cast("list[dict[str, Any]]", fields.get("added_tokens") or [])
    kept = [token for token in added if token.get("content") not in PICTURES or token.get("id", 0) < count]
    if len(kept) == len(added):
        return tokenizer_json
    return json.dumps(fields | {"added_tokens": kept}, ensure_ascii=False).encode("utf-8")


class _View:
    """What the tokens of one kind of layer see of each other, and how their places turn them.

    Tokens that may see nothing (padding far from the text) see everything: what they say is heard by nobody,
    but must be a number.
    """

    def __init__(self, places: Tensor, mask: Tensor, rule: str, spec: GemmaSpec, local: bool) -> None:
        ahead = places[None, :] - places[:, None]  # [T, T], how far the key stands behind the query
        visible = ahead <= 0 if spec.causal else torch.ones_like(ahead, dtype=torch.bool)
        if local and spec.reach:
            # A decoder counts the token itself, T5Gemma's encoder sees `reach` more on either side.
            visible = visible & (ahead > -spec.reach if spec.causal else ahead.abs() <= spec.reach)
        visible = visible[None, None]
        if rule == "pad":
            visible = visible & mask[:, None, None, :]
        self.visible = visible | ~visible.any(-1, keepdim=True)  # [B or 1, 1, T, T]
        theta, stretch = (spec.near_theta, 1.0) if local else (spec.theta, spec.stretch)
        half = torch.arange(0, spec.head, 2, device=places.device, dtype=torch.float32) / spec.head
        angles = places.float()[:, None] * (1.0 / theta**half / stretch)[None]
        angles = torch.cat([angles, angles], dim=-1)[None, None]
        self.turns = angles.cos(), angles.sin()  # each [1, 1, T, head], float32

    def turned(self, states: Tensor) -> Tensor:
        """states [B, H, T, head], turned by their places."""
        cosines, sines = (part.to(states.dtype) for part in self.turns)
        first, second = states.chunk(2, dim=-1)
        return states * cosines + torch.cat([-second, first], dim=-1) * sines


class _Attention(nn.Module):
    def __init__(self, spec: GemmaSpec, layers: Layers) -> None:
        super().__init__()
        self.head, self.repeats, self.normed = spec.head, spec.heads // spec.pairs, spec.normed
        self.scale, self.softcap = spec.scalar**-0.5, spec.softcap
        self.q_proj = layers.linear(spec.width, spec.heads * spec.head, bias=False)
        self.k_proj = layers.linear(spec.width, spec.pairs * spec.head, bias=False)
        self.v_proj = layers.linear(spec.width, spec.pairs * spec.head, bias=False)
        self.o_proj = layers.linear(spec.heads * spec.head, spec.width, bias=False)
        if spec.normed:
            self.q_norm = GemmaNorm(spec.head, spec.eps, layers)
            self.k_norm = GemmaNorm(spec.head, spec.eps, layers)

    def forward(self, states: Tensor, view: _View) -> Tensor:
        query, key, value = (
            project(states).unflatten(-1, (-1, self.head)).transpose(1, 2)  # [B, H, T, head]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.normed:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = view.turned(query), view.turned(key)
        if self.repeats > 1:
            key, value = (part.repeat_interleave(self.repeats, dim=1) for part in (key, value))
        if self.softcap:
            scores = query @ key.transpose(-1, -2) * self.scale
            scores = torch.tanh(scores / self.softcap) * self.softcap
            scores = scores.float().masked_fill(~view.visible, torch.finfo(torch.float32).min)
            mixed = scores.softmax(dim=-1).to(value.dtype) @ value
        else:
            mixed = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=view.visible, scale=self.scale
            )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _Inner(nn.Module):
    def __init__(self, spec: GemmaSpec, layers: Layers) -> None:
        super().__init__()
        self.gate_proj = layers.linear(spec.width, spec.inner, bias=False)
        self.up_proj = layers.linear(spec.width, spec.inner, bias=False)
        self.down_proj = layers.linear(spec.inner, spec.width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        gate = nn.functional.gelu(self.gate_proj(states), approximate="tanh")
        return self.down_proj(gate * self.up_proj(states))


class _Layer(nn.Module):
    """states + norm(attention(norm(states))), then states + norm(inner(norm(states)))."""

    def __init__(self, spec: GemmaSpec, layers: Layers) -> None:
        super().__init__()
        self.input_layernorm = GemmaNorm(spec.width, spec.eps, layers)
        self.self_attn = _Attention(spec, layers)
        self.post_attention_layernorm = GemmaNorm(spec.width, spec.eps, layers)
        self.pre_feedforward_layernorm = GemmaNorm(spec.width, spec.eps, layers)
        self.mlp = _Inner(spec, layers)
        self.post_feedforward_layernorm = GemmaNorm(spec.width, spec.eps, layers)

    def forward(self, states: Tensor, view: _View) -> Tensor:
        heard = self.self_attn(self.input_layernorm(states), view)
        states = states + self.post_attention_layernorm(heard)
        return states + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(states)))
