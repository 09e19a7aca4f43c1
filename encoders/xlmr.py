"""Family `xlmr`: XLM-RoBERTa text towers (AltDiffusion, AltCLIP, open_clip's frozen XLM-R, M-CLIP).

The layers are BERT's; positions count from 2 over the tokens that are not padding (padding sits at 1), there
is one token type, and the tokenizer is SentencePiece with fairseq's numbering: id = piece + 1, `<s>` 0,
`<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` last (Conneau et al. 2019). AltDiffusion's heads are bridges. The one
of AltCLIP, `transformation` with `pre_LN` before it or not, is part of the tower.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

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
    find_stem,
    marker_id,
    real_setting,
    setting,
    whole_setting,
)
from .bert import (
    PLACES,
    WORDS,
    BertEmbeddings,
    BertLayer,
    BertSpec,
    measure_bert,
    published_bert_key,
    run_bert,
)
from .vocabulary import UNIGRAM, checked, need, read_sentencepiece, sentencepiece_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, PADDING, END, UNKNOWN, MASKED = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
NUMBERS = {START: 0, PADDING: 1, END: 2, UNKNOWN: 3}
FIRST_PLACE = 2  # padding + 1, where fairseq starts to count
ALTCLIP = "text_model."  # where BAAI/AltCLIP keeps its text tower, the layers below it in `roberta.`
HEADS = ("transformation.", "pre_LN.")


@dataclass(frozen=True, kw_only=True)
class XlmrSpec(EncoderSpec):
    """Sizes: `inner` of the feed-forward part; the table of positions has `window` + 2 rows.

    inside: width of the layers where a head brings it to `width` (0 = no head, the layers are `width` wide).
    norm: the head begins with a LayerNorm.
    """

    heads: int
    inner: int
    types: int = 1
    eps: float = 1e-5
    inside: int = 0
    norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, heads=1, inner=1, types=1, inside=0)
        width = self.inside or self.width
        if width % self.heads or self.layers > 256 or not 0 < self.eps < 1 or self.norm > bool(self.inside):
            raise BridgeError(
                "The sizes of this XLM-RoBERTa tower do not fit together.",
                f"width {width}, heads {self.heads}, layers {self.layers}, eps {self.eps}, norm {self.norm}",
                "heads dividing the width, at most 256 layers, eps between 0 and 1, a norm only in a head",
                "The file is damaged or was made by another version; fetch or save it again.",
            )

    @property
    def bert(self) -> BertSpec:
        """The same sizes as BERT's layers take them."""
        return BertSpec(
            vocab=self.vocab,
            width=self.inside or self.width,
            layers=self.layers,
            window=self.window,
            heads=self.heads,
            inner=self.inner,
            types=self.types,
            eps=self.eps,
        )


class Xlmr(Encoder, family="xlmr"):
    """XLM-RoBERTa: states of the chosen layer; pooled = the raw state of `<s>`.

    Layers are numbered as in transformers' `hidden_states`: 0 = the normalised embeddings, -1 = the last
    layer; there is no final norm, so every layer is taken as it is (AltDiffusion m18 reads -2). A head reads
    the chosen layer, token by token: transformation(x), or transformation(pre_LN(x)) with `norm`.
    """

    Spec = XlmrSpec

    def find_marks(self, tokenizer: Tokenizer, filler: int | None) -> Marks:
        """<s> text </s> <pad> ...; BridgeError when the numbering is not fairseq's."""
        found = {token: marker_id(tokenizer, token) for token in NUMBERS}
        if found != NUMBERS:
            raise BridgeError(
                "The text tower's tokenizer cannot be used.",
                ", ".join(f"{token} {number}" for token, number in found.items()),
                ", ".join(f"{token} {number}" for token, number in NUMBERS.items()),
                "Its pieces are not shifted by one as XLM-RoBERTa's are; convert the published files again.",
            )
        return Marks((NUMBERS[START],), (NUMBERS[END],), NUMBERS[PADDING])

    def build(self, spec: EncoderSpec, layers: Layers) -> None:
        """Embeddings with two rows more than the window, BERT's layers and, if the spec has one, the head."""
        assert isinstance(spec, XlmrSpec)
        self.embeddings = BertEmbeddings(spec.bert, spec.window + FIRST_PLACE, layers)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(BertLayer(spec.bert, layers) for _ in range(spec.layers))
        if spec.norm:
            self.pre_LN = layers.norm(spec.inside, spec.eps)
        if spec.inside:
            self.transformation = layers.linear(spec.inside, spec.width)

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read ids [B, T] under mask [B, T] bool: states [B, T, D] of the chosen layer, pooled [B, D]."""
        real = (ids != self.marks.padding).long()
        places = real.cumsum(1) * real + FIRST_PLACE - 1  # padding sits at 1, whatever the mask rule
        chosen, _ = run_bert(self, self.embeddings(ids, places), mask.bool(), self.depth)
        spec = cast(XlmrSpec, self.spec)
        if spec.norm:
            chosen = self.pre_LN(chosen)
        if spec.inside:
            chosen = self.transformation(chosen)
        return Hidden(chosen, mask.bool(), chosen[:, 0])

    @classmethod
    def measure(cls, shapes: Shapes, config: Config) -> EncoderSpec | None:
        """One token type tells RoBERTa from BERT; heads and eps come from the config, or are XLM-R's own.

        A head is the tower's in AltCLIP's layout alone: elsewhere it is AltDiffusion's, a bridge.
        """
        stem = find_stem(shapes, WORDS)
        sizes = None if stem is None else measure_bert(shapes, stem)
        if stem is None or sizes is None or sizes["types"] != 1 or setting(config, "model_type") == "roberta":
            return None
        width = sizes.pop("width")
        heads = _heads(stem, shapes)
        return XlmrSpec(
            **sizes,
            width=shapes[heads + "transformation.weight"][0] if heads else width,
            inside=width if heads else 0,
            norm=bool(heads) and heads + "pre_LN.weight" in shapes,
            window=max(shapes[stem + PLACES][0] - FIRST_PLACE, 2),
            heads=whole_setting(config, "num_attention_heads", default=max(width // 64, 1)),
            eps=real_setting(config, "layer_norm_eps", default=1e-5),
        )

    @classmethod
    def origins(cls, spec: EncoderSpec, names: Iterable[str]) -> dict[str, Origin]:
        """Stems: none, `roberta.`, `text.transformer.`, `text_model.roberta.`, `cond_stage_model.roberta.`"""
        known = set(names)
        stem = find_stem(known, WORDS) or ""
        keys = list(cls.own_shapes(spec))
        outer = {key: Origin(ALTCLIP + key) for key in keys if key.startswith(HEADS)}
        return {key: published_bert_key(stem + key, known) for key in keys} | outer

    @classmethod
    def tokenizer_from(cls, files: Mapping[str, bytes]) -> bytes:
        """From tokenizer.json or sentencepiece.bpe.model."""
        name = need(files, cls.family, ("tokenizer.json",), ("sentencepiece.bpe.model",))
        return checked(files[name]) if name == "tokenizer.json" else xlmr_tokenizer(files[name])


def _heads(stem: str, names: Container[str]) -> str:
    """Where AltCLIP's retrieval head stands when the tower at `stem` is AltCLIP's; else nothing.

    AltDiffusion m18's own head, published in the same place, is a bridge.
    """
    whole = all(f"{ALTCLIP}transformation.{kind}" in names for kind in ("weight", "bias"))
    other = ALTCLIP + "transformation_pre.weight" in names
    return ALTCLIP if stem == ALTCLIP + "roberta." and whole and not other else ""


def xlmr_tokenizer(model: bytes) -> bytes:
    """Tokenizer JSON of a sentencepiece.bpe.model in fairseq's numbering; BridgeError when it is another."""
    name = "sentencepiece.bpe.model"
    read = read_sentencepiece(model, name)
    first = [piece for piece, _, _ in read.pieces[:3]]
    if read.kind != UNIGRAM or first != [UNKNOWN, START, END]:
        raise BridgeError(
            f"The tokenizer file {name!r} is not XLM-RoBERTa's.",
            f"model type {read.kind}, first pieces {first}",
            f"a Unigram model that begins with {UNKNOWN}, {START}, {END}",
            "Take the sentencepiece.bpe.model that lies beside the weights.",
        )
    numbered = [(token, 0.0) for token in NUMBERS]
    numbered += [(piece, score) for piece, score, _ in read.pieces[3:]]
    numbered.append((MASKED, 0.0))
    special = [*NUMBERS, MASKED]
    return sentencepiece_json(read, name, pieces=numbered, unknown=NUMBERS[UNKNOWN], special=special)
