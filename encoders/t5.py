"""Family `t5`: encoders of T5, Flan-T5, mT5 and umT5 with their SentencePiece tokenizer.

Raffel et al. 2019: pre-norm with root-mean-square norms, unscaled attention, positions as a learned bias on
the scores by distance (in the first layer for all layers; umT5 has one in each layer), gated feed-forward
from version 1.1 on. Tensors carry Hugging Face's names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..bridges.base import Hidden, require_sizes
from ..bridges.errors import BridgeError
from .base import (
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
    real_setting,
    setting,
    whole_setting,
)
from .vocabulary import UNIGRAM, checked, need, read_sentencepiece, sentencepiece_json, settings_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING, END = "<pad>", "</s>"
ACTIVATIONS = ("relu", "gelu_new", "silu")
FEED_FORWARDS = {"relu": "relu", "gated-gelu": "gelu_new", "gated-silu": "silu"}
LONGEST_WINDOW = 512  # of training; the bias by distance has no end of its own

WORDS, WORDS_AGAIN = "shared.weight", "encoder.embed_tokens.weight"
BIAS = "relative_attention_bias.weight"
FIRST = "encoder.block.0.layer."


@dataclass(frozen=True, kw_only=True)
class T5Spec(EncoderSpec):
    """Sizes: heads of width `head`, `inner` of the feed-forward part, `buckets` for up to `distance` tokens.

    `gated` has two inner matrices; `every` has a bias in each layer (umT5). `half` computes in float16
    whatever dtype is asked for, infinities clamped as transformers does: ELLA was trained on such states.
    """

    heads: int
    head: int
    inner: int
    buckets: int = 32
    distance: int = 128
    gated: bool = True
    every: bool = False
    activation: str = "gelu_new"
    half: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, heads=1, head=1, inner=1, buckets=4, distance=2)
        if (
            self.layers > 256
            or not 0 < self.eps < 1
            or self.buckets % 4
            or self.distance <= self.buckets // 4
        ):
            raise BridgeError(
                "The sizes of this T5 tower do not fit together.",
                f"layers {self.layers}, eps {self.eps}, buckets {self.buckets}, distance {self.distance}",
                "at most 256 layers, eps between 0 and 1, buckets in fours, distance above a quarter of them",
                "The file is damaged or was made by another version; fetch or save it again.",
            )
        if self.activation not in ACTIVATIONS:
            raise BridgeError(
                "This T5 tower has an activation that this version does not know.",
                repr(self.activation)[:80],
                ", ".join(ACTIVATIONS),
                "Update Language Bridge, or use a file made for this version.",
            )


class T5(Encoder, family="t5"):
    """T5's encoder: states of the chosen layer; no pooled vector.

    Layers are numbered as in transformers' `hidden_states`: 0 = the embeddings (not scaled). The last layer
    (-1) comes out through the final norm, as `last_hidden_state` does; every other layer is taken raw.
    """

    Spec = T5Spec

    def find_marks(self, tokenizer: Tokenizer, filler: int | None) -> Marks:
        """text </s> <pad> ..."""
        return Marks((), (marker_id(tokenizer, END),), marker_id(tokenizer, PADDING))

    def build(self, spec: EncoderSpec, layers: Layers) -> None:
        """Embeddings, blocks and the final norm."""
        assert isinstance(spec, T5Spec)
        if spec.half:
            layers = dataclasses.replace(layers, dtype=torch.float16)
        self.shared = layers.embedding(spec.vocab, spec.width)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(
            _Block(spec, spec.every or number == 0, layers) for number in range(spec.layers)
        )
        self.encoder.final_layer_norm = layers.scale(spec.width, spec.eps)

    @property
    def pooled_width(self) -> int:
        """T5 has no pooled vector."""
        return 0

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read ids [B, T] under mask [B, T] bool: states [B, T, D] of the chosen layer.

        Under the `half` rule everything runs in float16, and the states come out as float32.
        """
        spec = cast(T5Spec, self.spec)
        states: Tensor = self.shared(ids)
        if spec.half:
            states = states.half()
        hidden = ~mask.bool()[:, None, None, :] if self.mask_rule == "pad" else None  # [B, 1, 1, T]
        buckets = _buckets(ids.shape[1], spec, ids.device)
        encoder = cast(Any, self.encoder)
        bias = states  # replaced in the first block
        for number, block in enumerate(encoder.block[: self.depth]):
            if number == 0 or spec.every:
                table = block.layer[0].SelfAttention.relative_attention_bias
                bias = cast(Tensor, table(buckets)).permute(2, 0, 1)[None].to(states)  # [1, H, T, T]
                if hidden is not None:
                    bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
            states = block(states, bias)
        if self.depth == spec.layers:
            states = encoder.final_layer_norm(states)
        return Hidden(states.float() if spec.half else states, mask.bool())

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start as T5 does: deviations that fit an attention without scale; norms one."""
        spec = cast(T5Spec, self.spec)
        inner = spec.heads * spec.head
        deviations = {
            "shared.weight": 1.0,
            "q.weight": (spec.width * spec.head) ** -0.5,
            "o.weight": inner**-0.5,
            "wo.weight": spec.inner**-0.5,
        }
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            own = (value for end, value in deviations.items() if name.endswith(end))
            nn.init.normal_(parameter, std=next(own, spec.width**-0.5), generator=generator)

    @classmethod
    def measure(cls, shapes: Shapes, config: Config) -> EncoderSpec | None:
        """Sizes from the shapes; feed-forward kind, distance and eps from the config.

        Without a config a gated tower has gelu_new and an ungated one relu, as every published one has.
        """
        stem = find_stem(shapes, f"{FIRST}0.SelfAttention.{BIAS}")
        if stem is None:
            return None
        words = shapes.get(stem + WORDS) or shapes.get(stem + WORDS_AGAIN)
        bias, query = (shapes.get(f"{stem}{FIRST}0.SelfAttention.{name}") for name in (BIAS, "q.weight"))
        feeding = f"{stem}{FIRST}1.DenseReluDense."
        gated = feeding + "wi_0.weight" in shapes
        inner = shapes.get(feeding + ("wi_0.weight" if gated else "wi.weight"))
        if words is None or bias is None or query is None or inner is None or len(words) != 2:
            return None
        feed_forward = setting(config, "feed_forward_proj")
        activation = FEED_FORWARDS.get(str(feed_forward), "gelu_new" if gated else "relu")
        if isinstance(feed_forward, str) and feed_forward not in FEED_FORWARDS:
            activation = feed_forward.removeprefix("gated-")
        return T5Spec(
            vocab=words[0],
            width=words[1],
            layers=count_layers(shapes, stem + "encoder.block."),
            window=LONGEST_WINDOW,
            heads=bias[1],
            head=query[0] // bias[1],
            inner=inner[0],
            buckets=bias[0],
            distance=whole_setting(config, "relative_attention_max_distance", default=128),
            gated=gated,
            every=f"{stem}encoder.block.1.layer.0.SelfAttention.{BIAS}" in shapes,
            activation=activation,
            eps=real_setting(config, "layer_norm_epsilon", default=1e-6),
        )

    @classmethod
    def origins(cls, spec: EncoderSpec, names: Iterable[str]) -> dict[str, Origin]:
        """Stems: none, `text_encoder.`, `model.` and the like; the words are `shared` or `embed_tokens`."""
        known = set(names)
        stem = find_stem(known, f"{FIRST}0.SelfAttention.{BIAS}") or ""
        origins = {key: Origin(stem + key) for key in cls.own_shapes(spec)}
        if stem + WORDS not in known:
            origins[WORDS] = Origin(stem + WORDS_AGAIN)
        return origins

    @classmethod
    def tokenizer_from(cls, files: Mapping[str, bytes]) -> bytes:
        """From tokenizer.json or spiece.model; `extra_ids` of tokenizer_config.json adds T5's sentinels."""
        name = need(files, cls.family, ("tokenizer.json",), ("spiece.model",))
        if name == "tokenizer.json":
            return checked(files[name])
        extra = settings_of(files).get("extra_ids")
        return t5_tokenizer(files[name], extra if type(extra) is int and 0 <= extra <= 1000 else 0)


def t5_tokenizer(model: bytes, extra: int = 0) -> bytes:
    """Tokenizer JSON of a spiece.model, numbered as it is, then `extra` sentinels, the last one first."""
    name = "spiece.model"
    read = read_sentencepiece(model, name)
    listed = [(piece, score) for piece, score, _ in read.pieces]
    if read.kind != UNIGRAM or not {PADDING, END} <= {piece for piece, _ in listed}:
        raise BridgeError(
            f"The tokenizer file {name!r} is not T5's.",
            f"model type {read.kind}, {len(listed)} pieces",
            f"a Unigram model with {PADDING} and {END}",
            "Take the spiece.model that lies beside the weights.",
        )
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra))]
    listed += [(token, 0.0) for token in sentinels]
    return sentencepiece_json(read, name, pieces=listed, special=sentinels)


def _buckets(tokens: int, spec: T5Spec, device: torch.device) -> Tensor:
    """Bucket [T, T] of the distance from each token (row) to each other: half for each direction, exact up to
    a quarter of them, then ever wider up to `distance`."""
    places = torch.arange(tokens, device=device)
    away = places[None, :] - places[:, None]
    side = spec.buckets // 2
    exact = side // 2
    far = away.abs()
    ratio = torch.log(far.float().clamp(min=1) / exact) / math.log(spec.distance / exact)
    wide = (exact + (ratio * (side - exact)).long()).clamp(max=side - 1)
    return torch.where(far < exact, far, wide) + (away > 0).long() * side


class _Attention(nn.Module):
    def __init__(self, spec: T5Spec, biased: bool, layers: Layers) -> None:
        super().__init__()
        self.heads = spec.heads
        inner = spec.heads * spec.head
        self.q = layers.linear(spec.width, inner, bias=False)
        self.k = layers.linear(spec.width, inner, bias=False)
        self.v = layers.linear(spec.width, inner, bias=False)
        self.o = layers.linear(inner, spec.width, bias=False)
        if biased:
            self.relative_attention_bias = layers.embedding(spec.buckets, spec.heads)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            project(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, head]
            for project in (self.q, self.k, self.v)
        )
        if query.dtype == torch.float16:
            # Rounded where T5's own code rounds: the scores are kept in float16, the softmax is not.
            scores = query @ key.transpose(-1, -2) + bias
            mixed = scores.float().softmax(dim=-1).to(value.dtype) @ value
        else:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(2))


class _Dense(nn.Module):
    def __init__(self, spec: T5Spec, layers: Layers) -> None:
        super().__init__()
        self.gated, self.activation = spec.gated, spec.activation
        if spec.gated:
            self.wi_0 = layers.linear(spec.width, spec.inner, bias=False)
            self.wi_1 = layers.linear(spec.width, spec.inner, bias=False)
        else:
            self.wi = layers.linear(spec.width, spec.inner, bias=False)
        self.wo = layers.linear(spec.inner, spec.width, bias=False)

    def active(self, states: Tensor) -> Tensor:
        if self.activation == "relu":
            return nn.functional.relu(states)
        if self.activation == "silu":
            return nn.functional.silu(states)
        if states.dtype == torch.float16:  # rounded after each step, as T5's own code does
            curve = states + 0.044715 * torch.pow(states, 3.0)
            return 0.5 * states * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * curve))
        return nn.functional.gelu(states, approximate="tanh")

    def forward(self, states: Tensor) -> Tensor:
        if self.gated:
            return self.wo(self.active(self.wi_0(states)) * self.wi_1(states))
        return self.wo(self.active(self.wi(states)))


class _Attending(nn.Module):
    def __init__(self, spec: T5Spec, biased: bool, layers: Layers) -> None:
        super().__init__()
        self.SelfAttention = _Attention(spec, biased, layers)
        self.layer_norm: RootMeanSquareNorm = layers.scale(spec.width, spec.eps)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        return states + self.SelfAttention(self.layer_norm(states), bias)


class _Feeding(nn.Module):
    def __init__(self, spec: T5Spec, layers: Layers) -> None:
        super().__init__()
        self.DenseReluDense = _Dense(spec, layers)
        self.layer_norm: RootMeanSquareNorm = layers.scale(spec.width, spec.eps)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.DenseReluDense(self.layer_norm(states))


class _Block(nn.Module):
    def __init__(self, spec: T5Spec, biased: bool, layers: Layers) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_Attending(spec, biased, layers), _Feeding(spec, layers)])

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        states = _clamped(self.layer[0](states, bias))
        return _clamped(self.layer[1](states))


def _clamped(states: Tensor) -> Tensor:
    """In float16, infinities back to what the type can hold (less 1000 when there are any)."""
    if states.dtype != torch.float16:
        return states
    largest = torch.finfo(torch.float16).max
    limit = largest - 1000 if bool(torch.isinf(states).any()) else largest
    return states.clamp(-limit, limit)
