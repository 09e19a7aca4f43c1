"""Family `llama`: decoders of Llama's layout read as text towers (Baichuan2-7B, InternVL's QLLaMA, Qwen).

Touvron et al. 2023: pre-norm with root-mean-square norms, causal, rotary positions, gated SiLU; fewer keys
than queries where a model has them so (GQA), biases on the projections (Qwen2), norms on queries and keys
(Qwen3). Tensors carry Hugging Face's names; Baichuan's packed W_pack is split on adoption. Cross-attention
layers of QLLaMA see pictures only and are left out, as its authors do for text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

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
    Shapes,
    count_layers,
    find_stem,
    real_setting,
    setting,
    whole_setting,
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
PACKED = "self_attn.W_pack.weight"
PROJECTIONS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
ABSENT = -1
GEMMAS = ("pre", "post")  # where Gemma 2 and 3 have norms of the feed-forward part


@dataclass(frozen=True, kw_only=True)
class LlamaSpec(EncoderSpec):
    """Sizes: `heads` queries and `pairs` keys and values of width `head`, `inner` of the feed-forward part.

    `theta` is the base of the rotary positions; `biased` and `normed` say what queries and keys have;
    `start` and `end` are the ids put around a text (-1 = none); `projection` of the pooled vector (0 = no).
    """

    heads: int
    pairs: int
    head: int
    inner: int
    theta: float = 10_000.0
    biased: bool = False
    normed: bool = False
    start: int = 1
    end: int = 2
    projection: int = 0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, heads=1, pairs=1, head=2, inner=1, start=ABSENT, end=ABSENT, projection=0)
        fits = self.heads % self.pairs == 0 and self.head % 2 == 0 and self.layers <= 512
        if not fits or not 0 < self.eps < 1 or not 1 < self.theta < 1e12:
            raise BridgeError(
                "The sizes of this Llama tower do not fit together.",
                f"heads {self.heads} over {self.pairs} pairs of width {self.head}, layers {self.layers}, "
                f"eps {self.eps}, theta {self.theta}",
                "pairs dividing the heads, an even width, at most 512 layers, eps below 1, theta above 1",
                "The file is damaged or was made by another version; fetch or save it again.",
            )
        if max(self.start, self.end) >= self.vocab:
            raise BridgeError(
                "The special tokens of this Llama tower are outside of its vocabulary.",
                f"start {self.start}, end {self.end}",
                f"ids below {self.vocab}",
                "The file is damaged or was made by another version; fetch or save it again.",
            )


class Llama(Encoder, family="llama"):
    """Llama: states of the chosen layer; pooled = the state of the last token that is not padding.

    Layers are numbered as in transformers' `hidden_states`: 0 = the embeddings. The last layer (-1) comes out
    through the final norm, as `last_hidden_state` does; every other layer is taken raw. Pooled is read from
    the normed last layer and projected if the file has a projection (InternVL's text_projection).
    """

    Spec = LlamaSpec

    def find_marks(self, tokenizer: Tokenizer, filler: int | None) -> Marks:
        """Start and end as the spec says; the filler is the padding token, or id 0."""
        spec = cast(LlamaSpec, self.spec)
        if filler is None:
            filler = tokenizer.token_to_id("<pad>") or 0
        start, end = ((number,) if number >= 0 else () for number in (spec.start, spec.end))
        return Marks(start, end, filler)

    def build(self, spec: EncoderSpec, layers: Layers) -> None:
        """Embeddings, layers, the final norm and, if the spec has one, the projection."""
        assert isinstance(spec, LlamaSpec)
        self.embed_tokens = layers.embedding(spec.vocab, spec.width)
        self.layers = nn.ModuleList(_Layer(spec, layers) for _ in range(spec.layers))
        self.norm = layers.scale(spec.width, spec.eps)
        if spec.projection:
            self.text_projection = layers.linear(spec.width, spec.projection, bias=False)

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled vector: the projection's, or the states' own."""
        return cast(LlamaSpec, self.spec).projection or self.spec.width

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read ids [B, T] under mask [B, T] bool: states [B, T, D] of the chosen layer, pooled [B, P]."""
        spec = cast(LlamaSpec, self.spec)
        mask = mask.bool()
        places = torch.arange(ids.shape[1], device=ids.device)
        visible = (places[None, :] <= places[:, None])[None, None]  # [1, 1, T, T], nobody looks ahead
        if self.mask_rule == "pad":
            visible = visible & mask[:, None, None, :]
        states: Tensor = self.embed_tokens(ids)
        turns = _turns(places, spec)
        chosen = states
        for number, layer in enumerate(self.layers, start=1):
            states = layer(states, turns, visible)
            if number == self.depth:
                chosen = states
        last: Tensor = self.norm(states)
        if self.depth == spec.layers:
            chosen = last
        ends = (mask.long() * (places + 1)).argmax(dim=1)  # [B], the last real token
        pooled = last[torch.arange(len(ids), device=ids.device), ends]
        return Hidden(chosen, mask, self.text_projection(pooled) if spec.projection else pooled)

    @classmethod
    def measure(cls, shapes: Shapes, config: Config) -> EncoderSpec | None:
        """Sizes from the shapes; heads, theta, eps and special tokens from the config.

        Without a config heads are 128 wide (or as old files' rotary table says), theta is 10000, eps 1e-6,
        start 1 and end 2: Llama's and Baichuan's own. BridgeError for scaled rotary positions and for layouts
        that only look like Llama's.
        """
        stem = find_stem(shapes, WORDS, FIRST + "input_layernorm.weight")
        if stem is None or any(
            f"{stem}{FIRST}{place}_feedforward_layernorm.weight" in shapes for place in GEMMAS
        ):
            return None  # nothing of this layout, or Gemma 2 and 3, which are a family of their own
        words, inner = shapes[stem + WORDS], shapes.get(f"{stem}{FIRST}mlp.gate_proj.weight")
        out = shapes.get(f"{stem}{FIRST}self_attn.o_proj.weight")
        packed = shapes.get(stem + FIRST + PACKED)
        keys = shapes.get(f"{stem}{FIRST}self_attn.k_proj.weight")
        if inner is None or out is None or len(out) != 2 or (packed is None and keys is None):
            return None
        _refuse_strangers(shapes, stem, config)
        reach = out[1]  # width of all heads together
        heads = setting(config, "num_attention_heads")
        turning = shapes.get(f"{stem}{FIRST}self_attn.rotary_emb.inv_freq", (64,))  # old files have it
        head = reach // heads if type(heads) is int and heads > 0 else 2 * turning[0]
        head = whole_setting(config, "head_dim", default=head)
        pairs = (packed[0] // 3 if packed is not None else cast("tuple[int, ...]", keys)[0]) // max(head, 1)
        scaling = setting(config, "rope_parameters")
        theta = cast("dict[str, object]", scaling).get("rope_theta") if isinstance(scaling, dict) else None
        projection = cls._projection(stem, shapes)
        shape = None if projection is None else projection.shape(shapes)
        layer = f"{stem}{FIRST}self_attn."
        return LlamaSpec(
            vocab=words[0],
            width=words[1],
            layers=count_layers(shapes, stem + "layers."),
            window=whole_setting(config, "max_position_embeddings", "model_max_length", default=2048),
            heads=max(reach // max(head, 1), 1),
            pairs=max(pairs, 1),
            head=head,
            inner=inner[0],
            theta=real_setting(
                {"rope_theta": theta} if theta is not None else config, "rope_theta", default=10_000.0
            ),
            biased=layer + "q_proj.bias" in shapes,
            normed=layer + "q_norm.weight" in shapes,
            start=_mark(config, "bos_token_id", 1),
            end=_mark(config, "eos_token_id", 2),
            projection=0 if shape is None else shape[0],
            eps=real_setting(config, "rms_norm_eps", default=1e-6),
        )

    @classmethod
    def origins(cls, spec: EncoderSpec, names: Iterable[str]) -> dict[str, Origin]:
        """Stems: none, `model.`, `qllama.model.`; W_pack holds queries, keys and values in this order."""
        known = set(names)
        stem = find_stem(known, WORDS, FIRST + "input_layernorm.weight") or ""
        origins: dict[str, Origin] = {}
        for key in cls.own_shapes(spec):
            before, _, name = key.removesuffix(".weight").rpartition("self_attn.")
            packed = f"{stem}{before}{PACKED}"
            if name in PROJECTIONS and packed in known:
                origins[key] = Origin(packed, PROJECTIONS[name], len(PROJECTIONS))
            else:
                origins[key] = Origin(stem + key)
        projection = cls._projection(stem, known)
        if projection is not None:
            origins["text_projection.weight"] = projection
        return origins

    @staticmethod
    def _projection(stem: str, names: Iterable[str]) -> Origin | None:
        """InternVL's text_projection [in, out] stands beside `qllama.`."""
        if not stem.endswith("qllama.model."):
            return None
        name = stem.removesuffix("qllama.model.") + "text_projection"
        return Origin(name, turned=True) if name in set(names) else None

    @classmethod
    def tokenizer_from(cls, files: Mapping[str, bytes]) -> bytes:
        """From tokenizer.json or tokenizer.model; the padding token is the one that the settings name."""
        name = need(files, cls.family, ("tokenizer.json",), ("tokenizer.model",))
        if name == "tokenizer.json":
            made = checked(files[name])
        else:
            made = sentencepiece_json(read_sentencepiece(files[name], name), name)
        return with_padding(made, token_setting(settings_of(files), "pad_token"))


def _mark(config: Config, name: str, default: int) -> int:
    value = setting(config, name)
    if name == "bos_token_id" and str(setting(config, "model_type")).startswith("qwen"):
        return ABSENT  # its config names one, its tokenizer never adds it
    if isinstance(value, list):
        value = next(iter(cast("list[object]", value)), None)
    return value if type(value) is int else default


def _refuse_strangers(shapes: Shapes, stem: str, config: Config) -> None:
    """Raise BridgeError for models of this layout that compute something else."""
    scaling = setting(config, "rope_scaling", "rope_parameters")
    kind: object = None
    if isinstance(scaling, dict):
        fields = cast("dict[str, object]", scaling)
        kind = fields.get("rope_type", fields.get("type"))
    sliding = setting(config, "use_sliding_window") is True
    model = setting(config, "model_type")
    strange = str(model) if str(model).startswith(("gemma", "phi", "cohere", "glm")) else None
    if stem + FIRST + PACKED in shapes and shapes[stem + WORDS][1] == 5120:
        strange = "Baichuan-13B (positions by ALiBi)"
    if strange is None and kind in (None, "default") and not sliding:
        return
    raise BridgeError(
        "This language model has Llama's layout but computes something else.",
        f"model {strange or model}, rotary positions of type {kind}, sliding window {sliding}",
        "plain rotary positions and full attention (Llama, Baichuan2-7B, QLLaMA, Qwen2, Qwen3)",
        "Take the whole folder of a Gemma 2, Gemma 3 or T5Gemma, with its config.json (family gemma). Load "
        "any other with ComfyUI's own CLIP loader and connect it to a bridge of the family host.",
    )


def _turns(places: Tensor, spec: LlamaSpec) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, 1, T, head] of the rotary positions, float32."""
    half = torch.arange(0, spec.head, 2, device=places.device, dtype=torch.float32) / spec.head
    angles = places.float()[:, None] * (1.0 / spec.theta**half)[None]
    angles = torch.cat([angles, angles], dim=-1)[None, None]
    return angles.cos(), angles.sin()


def _turned(states: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    crossed = torch.cat([-second, first], dim=-1)
    return states * turns[0].to(states.dtype) + crossed * turns[1].to(states.dtype)


class _Attention(nn.Module):
    def __init__(self, spec: LlamaSpec, layers: Layers) -> None:
        super().__init__()
        self.head, self.repeats, self.normed = spec.head, spec.heads // spec.pairs, spec.normed
        self.q_proj = layers.linear(spec.width, spec.heads * spec.head, bias=spec.biased)
        self.k_proj = layers.linear(spec.width, spec.pairs * spec.head, bias=spec.biased)
        self.v_proj = layers.linear(spec.width, spec.pairs * spec.head, bias=spec.biased)
        self.o_proj = layers.linear(spec.heads * spec.head, spec.width, bias=False)
        if spec.normed:
            self.q_norm = layers.scale(spec.head, spec.eps)
            self.k_norm = layers.scale(spec.head, spec.eps)

    def forward(self, states: Tensor, turns: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        query = self._split(self.q_proj(states))  # [B, T, H, head]
        key = self._split(self.k_proj(states))
        value = self._split(self.v_proj(states)).transpose(1, 2)
        if self.normed:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (_turned(part.transpose(1, 2), turns) for part in (query, key))  # [B, H, T, head]
        if self.repeats > 1:
            key, value = (part.repeat_interleave(self.repeats, dim=1) for part in (key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, states: Tensor) -> Tensor:
        return states.reshape(*states.shape[:-1], -1, self.head)


class _Inner(nn.Module):
    def __init__(self, spec: LlamaSpec, layers: Layers) -> None:
        super().__init__()
        self.gate_proj = layers.linear(spec.width, spec.inner, bias=False)
        self.up_proj = layers.linear(spec.width, spec.inner, bias=False)
        self.down_proj = layers.linear(spec.inner, spec.width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(states)) * self.up_proj(states))


class _Layer(nn.Module):
    """states + attention(norm(states)), then states + inner(norm(states))."""

    def __init__(self, spec: LlamaSpec, layers: Layers) -> None:
        super().__init__()
        self.input_layernorm = layers.scale(spec.width, spec.eps)
        self.self_attn = _Attention(spec, layers)
        self.post_attention_layernorm = layers.scale(spec.width, spec.eps)
        self.mlp = _Inner(spec, layers)

    def forward(self, states: Tensor, turns: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states), turns, visible)
        return states + self.mlp(self.post_attention_layernorm(states))
