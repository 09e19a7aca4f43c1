"""Family `clip`: CLIP text towers, whatever tokenizer they were given (stock BPE, BERT's vocabulary, others).

Radford et al. 2021: pre-norm, causal, learned positions, a final norm. Tensors carry the names of Hugging
Face's CLIPTextModel; open_clip's and OpenAI's own layout is split and turned on adoption.
"""

from __future__ import annotations

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
    Shapes,
    count_layers,
    find_stem,
    marker_id,
    real_setting,
    setting,
    whole_setting,
)
from .bert import bert_tokenizer
from .vocabulary import (
    checked,
    clip_json,
    need,
    settings_of,
    token_setting,
    with_padding,
    word_list,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STARTS = ("<|startoftext|>", "[CLS]", "<s>")
ENDS = ("<|endoftext|>", "[SEP]", "</s>")
PADDINGS = ("[PAD]", "<pad>", *ENDS)
ACTIVATIONS = ("gelu", "quick_gelu")
ABSENT = -1
CLIP_VOCABULARY = 49408  # rows of OpenAI's table: the last two are its start and end

WORDS = "embeddings.token_embedding.weight"
PLACES = "embeddings.position_embedding.weight"
OPEN_WORDS = "token_embedding.weight"
OPEN_PLACES = "positional_embedding"
OPEN_LAYERS = "transformer.resblocks."
OPEN_NAMES = (
    ("embeddings.token_embedding.weight", OPEN_WORDS),
    ("embeddings.position_embedding.weight", OPEN_PLACES),
    ("final_layer_norm.", "ln_final."),
    ("encoder.layers.", OPEN_LAYERS),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)
OPEN_PARTS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


@dataclass(frozen=True, kw_only=True)
class ClipSpec(EncoderSpec):
    """Sizes: `inner` of the feed-forward part, `projection` of the pooled vector (0 = no), `activation`.

    start, end: ids around a text where the tokenizer does not hold them (-1 = its own special tokens).
    """

    heads: int
    inner: int
    projection: int = 0
    activation: str = "quick_gelu"
    eps: float = 1e-5
    start: int = ABSENT
    end: int = ABSENT

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, heads=1, inner=1, projection=0, start=ABSENT, end=ABSENT)
        if self.width % self.heads or self.layers > 256 or not 0 < self.eps < 1:
            raise BridgeError(
                "The sizes of this CLIP tower do not fit together.",
                f"width {self.width}, heads {self.heads}, layers {self.layers}, eps {self.eps}",
                "heads dividing the width, at most 256 layers, eps between 0 and 1",
                "The file is damaged or was made by another version; fetch or save it again.",
            )
        if max(self.start, self.end) >= self.vocab or (self.start < 0) != (self.end < 0):
            raise BridgeError(
                "The start and end tokens of this CLIP tower do not fit its vocabulary.",
                f"start {self.start}, end {self.end}",
                f"two ids below {self.vocab}, or {ABSENT} for both: those of the tokenizer",
                "The file is damaged or was made by another version; fetch or save it again.",
            )
        if self.activation not in ACTIVATIONS:
            raise BridgeError(
                "This CLIP tower has an activation that this version does not know.",
                repr(self.activation)[:80],
                " or ".join(ACTIVATIONS),
                "Update Language Bridge, or use a file made for this version.",
            )


class Clip(Encoder, family="clip"):
    """CLIP: states of the chosen layer; pooled = the state of the first end token, projected if it can be.

    Layers are numbered as in transformers' `hidden_states`: 0 = the embeddings. The last layer (-1) comes out
    through the final norm, as `last_hidden_state` does; every other layer is taken raw, as in
    `hidden_states`. Pooled is always read from the normed last layer.
    """

    Spec = ClipSpec

    def find_marks(self, tokenizer: Tokenizer, filler: int | None) -> Marks:
        """Start, end, and the filler: what the JSON's padding section names, else [PAD], else the end.

        BridgeError when CLIP's own table of words stands beside another vocabulary, and the spec does not say
        which ids frame a text: the vocabulary's marks, or CLIP's (as in MiaoBi).
        """
        spec = cast(ClipSpec, self.spec)
        filler = marker_id(tokenizer, *PADDINGS) if filler is None else filler
        if spec.start >= 0:
            return Marks((spec.start,), (spec.end,), filler)
        start, end = marker_id(tokenizer, *STARTS), marker_id(tokenizer, *ENDS)
        if spec.vocab == CLIP_VOCABULARY and tokenizer.token_to_id(STARTS[0]) is None:
            raise BridgeError(
                "It is not known which tokens this CLIP tower expects around a text.",
                f"CLIP's table of {spec.vocab} words, and a tokenizer with another vocabulary",
                f"start and end in its sizes: {start} and {end}, the tokenizer's, or CLIP's 49406 and 49407",
                "Convert it by a row of the table that says which (change: start and end).",
            )
        return Marks((start,), (end,), filler)

    def build(self, spec: EncoderSpec, layers: Layers) -> None:
        """Embeddings, layers, final norm and, if the spec has one, the projection."""
        assert isinstance(spec, ClipSpec)
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = layers.embedding(spec.vocab, spec.width)
        self.embeddings.position_embedding = layers.embedding(spec.window, spec.width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Layer(spec, layers) for _ in range(spec.layers))
        self.final_layer_norm = layers.norm(spec.width, spec.eps)
        if spec.projection:
            self.text_projection = layers.linear(spec.width, spec.projection, bias=False)

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled vector: the projection's, or the states' own."""
        return cast(ClipSpec, self.spec).projection or self.spec.width

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read ids [B, T] under mask [B, T] bool: states [B, T, D] of the chosen layer, pooled [B, P]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        visible = (places[None, :] <= places[:, None])[None, None]  # [1, 1, T, T], nobody looks ahead
        if self.mask_rule == "pad":
            visible = visible & mask.bool()[:, None, None, :]
        embeddings = cast(Any, self.embeddings)
        states: Tensor = embeddings.token_embedding(ids) + embeddings.position_embedding(places[None])
        chosen = states
        layers = cast(nn.ModuleList, self.encoder.layers)
        for number, layer in enumerate(layers, start=1):
            states = layer(states, visible)
            if number == self.depth:
                chosen = states
        last = self.final_layer_norm(states)
        if self.depth == self.spec.layers:
            chosen = last
        ends = (ids == self.marks.end[0]).int().argmax(dim=1)  # [B], the first one
        pooled = last[torch.arange(len(ids), device=ids.device), ends]
        if cast(ClipSpec, self.spec).projection:
            pooled = self.text_projection(pooled)
        return Hidden(chosen, mask.bool(), pooled)

    @classmethod
    def measure(cls, shapes: Shapes, config: Config) -> EncoderSpec | None:
        """Sizes from either layout; heads, eps and activation from the config.

        Without a config heads are 64 wide, and the activation is OpenAI's quick_gelu up to width 768 and
        gelu above, which holds for OpenAI's towers and open_clip's H, g and bigG.
        """
        stem = find_stem(shapes, WORDS, PLACES)
        if stem is not None:
            words, places, layers = shapes[stem + WORDS], shapes[stem + PLACES], stem + "encoder.layers."
            inner = shapes.get(layers + "0.mlp.fc1.weight")
        else:
            stem = find_stem(shapes, OPEN_WORDS, OPEN_PLACES)
            if stem is None:
                return None
            words, places, layers = shapes[stem + OPEN_WORDS], shapes[stem + OPEN_PLACES], stem + OPEN_LAYERS
            inner = shapes.get(layers + "0.mlp.c_fc.weight")
        if inner is None or len(words) != 2:
            return None
        width = words[1]
        projection = cls._projection(shapes)
        shape = None if projection is None else projection.shape(shapes)
        activation = setting(config, "hidden_act")
        return ClipSpec(
            vocab=words[0],
            width=width,
            layers=count_layers(shapes, layers),
            window=places[0],
            heads=whole_setting(config, "num_attention_heads", "heads", default=max(width // 64, 1)),
            inner=inner[0],
            projection=0 if shape is None else shape[0],
            activation=activation if isinstance(activation, str) else ACTIVATIONS[width <= 768],
            eps=real_setting(config, "layer_norm_eps", default=1e-5),
        )

    @classmethod
    def origins(cls, spec: EncoderSpec, names: Iterable[str]) -> dict[str, Origin]:
        """Stems: none, `text_model.`, `cond_stage_model.transformer.text_model.`; open_clip: none, `text.`"""
        known = set(names)
        stem = find_stem(known, WORDS, PLACES)
        if stem is not None:
            origins = {key: Origin(stem + key) for key in cls.own_shapes(spec)}
        else:
            stem = find_stem(known, OPEN_WORDS, OPEN_PLACES) or ""
            origins = {key: _open_origin(stem, key) for key in cls.own_shapes(spec)}
        projection = cls._projection(known)
        if projection is not None:
            origins["text_projection.weight"] = projection
        return origins

    @staticmethod
    def _projection(names: Iterable[str]) -> Origin | None:
        known = set(names)
        stem = find_stem(known, WORDS, PLACES)
        if stem is not None:
            name = stem.removesuffix("text_model.") + "text_projection.weight"
            return Origin(name) if name in known else None
        stem = find_stem(known, OPEN_WORDS, OPEN_PLACES) or ""
        if stem + "text_projection" in known:
            return Origin(stem + "text_projection", turned=True)
        name = stem + "text_projection.weight"
        return Origin(name) if name in known else None

    @classmethod
    def tokenizer_from(cls, files: Mapping[str, bytes]) -> bytes:
        """From tokenizer.json, vocab.json with merges.txt, or vocab.txt (a BERT vocabulary).

        The padding token is the one that tokenizer_config.json or special_tokens_map.json names.
        """
        name = need(files, cls.family, ("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
        settings = settings_of(files)
        if name == "tokenizer.json":
            made = checked(files[name])
        elif name == "vocab.json":
            made = clip_json(files["vocab.json"], files["merges.txt"])
        else:
            lowercase = settings.get("do_lower_case", True)
            made = bert_tokenizer(word_list(files[name]), lowercase=lowercase is not False)
        return with_padding(made, token_setting(settings, "pad_token"))


def _open_origin(stem: str, key: str) -> Origin:
    """Our key in OpenAI's layout, where the three projections of an attention are one matrix."""
    for ours, theirs in OPEN_NAMES:
        key = key.replace(ours, theirs)
    for name, part in OPEN_PARTS.items():
        for kind in ("weight", "bias"):
            if key.endswith(f".self_attn.{name}.{kind}"):
                packed = key.removesuffix(f"self_attn.{name}.{kind}") + f"attn.in_proj_{kind}"
                return Origin(stem + packed, part, len(OPEN_PARTS))
    return Origin(stem + key)


class _Attention(nn.Module):
    def __init__(self, spec: ClipSpec, layers: Layers) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q_proj = layers.linear(spec.width, spec.width)
        self.k_proj = layers.linear(spec.width, spec.width)
        self.v_proj = layers.linear(spec.width, spec.width)
        self.out_proj = layers.linear(spec.width, spec.width)

    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        query, key, value = (
            project(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D / H]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _Inner(nn.Module):
    def __init__(self, spec: ClipSpec, layers: Layers) -> None:
        super().__init__()
        self.quick = spec.activation == "quick_gelu"
        self.fc1 = layers.linear(spec.width, spec.inner)
        self.fc2 = layers.linear(spec.inner, spec.width)

    def forward(self, states: Tensor) -> Tensor:
        states = self.fc1(states)
        active = states * torch.sigmoid(1.702 * states) if self.quick else nn.functional.gelu(states)
        return self.fc2(active)


class _Layer(nn.Module):
    """states + attention(norm(states)), then states + inner(norm(states))."""

    def __init__(self, spec: ClipSpec, layers: Layers) -> None:
        super().__init__()
        self.self_attn = _Attention(spec, layers)
        self.layer_norm1 = layers.norm(spec.width, spec.eps)
        self.mlp = _Inner(spec, layers)
        self.layer_norm2 = layers.norm(spec.width, spec.eps)

    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        states = states + self.self_attn(self.layer_norm1(states), visible)
        return states + self.mlp(self.layer_norm2(states))
