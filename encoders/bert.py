"""Family `bert`: BERT text towers (Chinese-CLIP, Taiyi, our own pocket tower) with their WordPiece tokenizer.

Tensors carry the names of Hugging Face's BertModel; the numbers are those of Devlin et al. 2018 (post-norm,
erf-GELU). Dropout is left out: the tower is read or fine-tuned, and a reader must not be noisy.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
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
    whole_setting,
)
from .vocabulary import checked, need, settings_of, word_list

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
WORDS = "embeddings.word_embeddings.weight"
PLACES = "embeddings.position_embeddings.weight"


@dataclass(frozen=True, kw_only=True)
class BertSpec(EncoderSpec):
    """Sizes: `inner` of the feed-forward part, token `types`, `projection` of the pooled vector (0 = no)."""

    heads: int
    inner: int
    types: int = 2
    projection: int = 0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, heads=1, inner=1, types=1, projection=0)
        if self.width % self.heads or self.layers > 256 or not 0 < self.eps < 1:
            raise BridgeError(
                "The sizes of this BERT tower do not fit together.",
                f"width {self.width}, heads {self.heads}, layers {self.layers}, eps {self.eps}",
                "heads dividing the width, at most 256 layers, eps between 0 and 1",
                "The file is damaged or was made by another version; fetch or save it again.",
            )


class Bert(Encoder, family="bert"):
    """BERT: states of the chosen layer; pooled = the raw [CLS] state, or its projection if there is one.

    Layers are numbered as in transformers' `hidden_states`: 0 = the normalised embeddings, -1 = the last
    layer. BERT normalises inside each layer and has no final norm, so every layer is taken as it is.
    """

    Spec = BertSpec

    def find_marks(self, tokenizer: Tokenizer, filler: int | None) -> Marks:
        """[CLS] text [SEP] [PAD] ..."""
        marker_id(tokenizer, UNKNOWN)
        start, end, padding = (marker_id(tokenizer, token) for token in (START, END, PADDING))
        return Marks((start,), (end,), padding)

    def build(self, spec: EncoderSpec, layers: Layers) -> None:
        """Embeddings, layers and, if the spec has one, the projection."""
        assert isinstance(spec, BertSpec)
        self.embeddings = BertEmbeddings(spec, spec.window, layers)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(BertLayer(spec, layers) for _ in range(spec.layers))
        if spec.projection:
            self.text_projection = layers.linear(spec.width, spec.projection, bias=False)

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled vector: the projection's, or the states' own."""
        return cast(BertSpec, self.spec).projection or self.spec.width

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read ids [B, T] under mask [B, T] bool: states [B, T, D] of the chosen layer, pooled [B, P]."""
        places = torch.arange(ids.shape[1], device=ids.device)[None]  # [1, T]
        projected = bool(cast(BertSpec, self.spec).projection)
        # A projection was trained on the last layer, wherever the states are taken from.
        until = self.spec.layers if projected else self.depth
        chosen, last = run_bert(self, self.embeddings(ids, places), mask.bool(), until)
        pooled = self.text_projection(last[:, 0]) if projected else chosen[:, 0]
        return Hidden(chosen, mask.bool(), pooled)

    @classmethod
    def measure(cls, shapes: Shapes, config: Config) -> EncoderSpec | None:
        """Two token types tell BERT from RoBERTa; heads and eps come from the config, or are BERT's own."""
        stem = find_stem(shapes, WORDS)
        sizes = None if stem is None else measure_bert(shapes, stem)
        if stem is None or sizes is None or sizes["types"] != 2:
            return None
        projection = cls.origins_of_projection(stem, shapes)
        shape = None if projection is None else projection.shape(shapes)
        return BertSpec(
            **sizes,
            window=shapes[stem + PLACES][0],
            heads=whole_setting(config, "num_attention_heads", default=max(sizes["width"] // 64, 1)),
            eps=real_setting(config, "layer_norm_eps", default=1e-12),
            projection=0 if shape is None else shape[0],
        )

    @classmethod
    def origins(cls, spec: EncoderSpec, names: Iterable[str]) -> dict[str, Origin]:
        """Stems: none, `bert.`, `module.bert.`, `text_model.`, `cond_stage_model.transformer.`, others."""
        known = set(names)
        stem = find_stem(known, WORDS) or ""
        origins = {key: published_bert_key(stem + key, known) for key in cls.own_shapes(spec)}
        projection = cls.origins_of_projection(stem, known)
        if projection is not None:
            origins["text_projection.weight"] = projection
        return origins

    @staticmethod
    def origins_of_projection(stem: str, names: Iterable[str]) -> Origin | None:
        """The projection stands outside the stem; cn_clip's is a matrix [in, out] without '.weight'."""
        known = set(names)
        outer = stem.removesuffix("bert.").removesuffix("text_model.")
        if outer + "text_projection.weight" in known:
            return Origin(outer + "text_projection.weight")
        if outer != stem and outer + "text_projection" in known:
            return Origin(outer + "text_projection", turned=True)
        return None

    @classmethod
    def tokenizer_from(cls, files: Mapping[str, bytes]) -> bytes:
        """From tokenizer.json, or vocab.txt with `do_lower_case` of tokenizer_config.json (default true)."""
        if need(files, cls.family, ("tokenizer.json",), ("vocab.txt",)) == "tokenizer.json":
            return checked(files["tokenizer.json"])
        lowercase = settings_of(files).get("do_lower_case", True)
        return bert_tokenizer(word_list(files["vocab.txt"]), lowercase=lowercase is not False)


def measure_bert(shapes: Shapes, stem: str) -> dict[str, int] | None:
    """Sizes that BERT and RoBERTa share (vocab, width, layers, inner, types), or None when one is missing."""
    words, types = shapes[stem + WORDS], shapes.get(stem + "embeddings.token_type_embeddings.weight")
    inner = shapes.get(stem + "encoder.layer.0.intermediate.dense.weight")
    if types is None or inner is None or stem + PLACES not in shapes or len(words) != 2:
        return None
    layers = count_layers(shapes, stem + "encoder.layer.")
    return {"vocab": words[0], "width": words[1], "layers": layers, "inner": inner[0], "types": types[0]}


def published_bert_key(key: str, names: Container[str]) -> Origin:
    """Old files say gamma and beta for the scale and the shift of a norm."""
    old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return Origin(old if key not in names and old in names else key)


def run_bert(tower: Encoder, states: Tensor, mask: Tensor, until: int) -> tuple[Tensor, Tensor]:
    """Run `until` layers over embeddings [B, T, D]: states after `tower.depth` of them, and after all."""
    visible = mask[:, None, None, :] if tower.mask_rule == "pad" else None  # [B, 1, 1, T]
    chosen = states
    layers = cast(nn.ModuleList, cast(Any, tower).encoder.layer)
    for number, layer in enumerate(layers[:until], start=1):
        states = layer(states, visible)
        if number == tower.depth:
            chosen = states
    return chosen, states


def bert_tokenizer(vocabulary: Sequence[str], *, lowercase: bool = True) -> bytes:
    """Return the JSON of a BERT WordPiece tokenizer; ids are places in `vocabulary`.

    `vocabulary` must hold [PAD], [UNK], [CLS] and [SEP]; pieces inside a word start with "##". BridgeError
    when one of the four is missing or an entry appears twice.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {token: number for number, token in enumerate(vocabulary)}
    missing = [token for token in (PADDING, UNKNOWN, START, END) if token not in ids]
    if missing or len(ids) != len(vocabulary):
        raise BridgeError(
            "This vocabulary cannot make a BERT tokenizer.",
            f"missing {missing}, {len(vocabulary) - len(ids)} entries twice",
            "[PAD], [UNK], [CLS], [SEP], and every entry once",
            "Mend the vocabulary list.",
        )
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token=UNKNOWN, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [token for token in (PADDING, UNKNOWN, START, END, "[MASK]") if token in ids]
    cast(Any, tokenizer).add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    return tokenizer.to_str().encode("utf-8")


class BertEmbeddings(nn.Module):
    """Word + place + type, normalised: ids [B, T] and places [B or 1, T] to [B, T, D]."""

    def __init__(self, spec: BertSpec, places: int, make: Layers) -> None:
        super().__init__()
        self.word_embeddings = make.embedding(spec.vocab, spec.width)
        self.position_embeddings = make.embedding(places, spec.width)
        self.token_type_embeddings = make.embedding(spec.types, spec.width)
        self.LayerNorm = make.norm(spec.width, spec.eps)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        words = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids))
        return self.LayerNorm(words + self.position_embeddings(places))


class _SelfAttention(nn.Module):
    def __init__(self, spec: BertSpec, make: Layers) -> None:
        super().__init__()
        self.heads = spec.heads
        self.query = make.linear(spec.width, spec.width)
        self.key = make.linear(spec.width, spec.width)
        self.value = make.linear(spec.width, spec.width)

    def forward(self, states: Tensor, visible: Tensor | None) -> Tensor:
        query, key, value = (
            project(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D / H]
            for project in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return mixed.transpose(1, 2).flatten(2)  # [B, T, D]


class _Residual(nn.Module):
    """LayerNorm(dense(new) + old)."""

    def __init__(self, width: int, spec: BertSpec, make: Layers) -> None:
        super().__init__()
        self.dense = make.linear(width, spec.width)
        self.LayerNorm = make.norm(spec.width, spec.eps)

    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(new) + old)


class _Attention(nn.Module):
    def __init__(self, spec: BertSpec, make: Layers) -> None:
        super().__init__()
        self.self = _SelfAttention(spec, make)
        self.output = _Residual(spec.width, spec, make)

    def forward(self, states: Tensor, visible: Tensor | None) -> Tensor:
        return self.output(self.self(states, visible), states)


class _Intermediate(nn.Module):
    def __init__(self, spec: BertSpec, make: Layers) -> None:
        super().__init__()
        self.dense = make.linear(spec.width, spec.inner)

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.gelu(self.dense(states))


class BertLayer(nn.Module):
    """Attention and feed-forward, each with its norm after the sum: [B, T, D] to [B, T, D]."""

    def __init__(self, spec: BertSpec, make: Layers) -> None:
        super().__init__()
        self.attention = _Attention(spec, make)
        self.intermediate = _Intermediate(spec, make)
        self.output = _Residual(spec.inner, spec, make)

    def forward(self, states: Tensor, visible: Tensor | None) -> Tensor:
        attended = self.attention(states, visible)
        return self.output(self.intermediate(attended), attended)
