"""Family `bert`: BERT text towers (Chinese-CLIP, Taiyi, our own pocket tower) with their WordPiece tokenizer.

Tensors carry the names of Hugging Face's BertModel; the numbers are those of Devlin et al. 2018 (post-norm,
erf-GELU). Dropout is left out: the tower is read or fine-tuned, and a reader must not be noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..bridges.base import Hidden, Ops, require_sizes
from ..bridges.errors import BridgeError
from .base import Encoder, EncoderSpec, Piece, too_long

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
STANDARD_DEVIATION = 0.02  # initializer_range of the published configurations


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
    """BERT: states of the chosen layer; pooled = the raw [CLS] state, or its projection if there is one."""

    Spec = BertSpec

    def __init__(
        self,
        spec: EncoderSpec,
        tokenizer_json: bytes,
        *,
        identity: str,
        window: int,
        layer: int = -1,
        mask_rule: str = "pad",
        ops: Ops = torch.nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert isinstance(spec, BertSpec)
        super().__init__(
            spec, tokenizer_json, identity=identity, window=window, layer=layer, mask_rule=mask_rule
        )
        self._tokenizer = _read_tokenizer(self.tokenizer_json, spec.vocab)
        self._padding, self._start, self._end = (
            cast(int, self._tokenizer.token_to_id(token)) for token in (PADDING, START, END)
        )
        make = _Maker(ops, device, dtype)
        self.embeddings = _Embeddings(spec, make)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(_Layer(spec, make) for _ in range(spec.layers))
        if spec.projection:
            self.text_projection = make.linear(spec.width, spec.projection, bias=False)

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled vector: the projection's, or the states' own."""
        return cast(BertSpec, self.spec).projection or self.spec.width

    @property
    def capacity(self) -> int:
        """Pieces in one window beside [CLS] and [SEP]."""
        return self.window - 2

    def tokenize(self, text: str) -> list[Piece]:
        """Cut `text` into WordPieces: lower-cased, each Chinese character by itself."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        pieces = zip(encoding.ids, encoding.offsets, strict=True)
        return [Piece(number, start, end) for number, (start, end) in pieces]

    def frame(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[CLS] ids [SEP] [PAD] ...: ids [window] int64 and mask [window] bool, True up to [SEP]."""
        if len(ids) > self.capacity:
            raise too_long(len(ids), self.capacity)
        room = self.capacity - len(ids)
        framed = torch.tensor([self._start, *ids, self._end, *[self._padding] * room], dtype=torch.int64)
        return framed, torch.arange(self.window) < len(ids) + 2

    def forward(self, ids: Tensor, mask: Tensor) -> Hidden:
        """Read ids [B, T] under mask [B, T] bool: states [B, T, D] of the chosen layer, pooled [B, P]."""
        mask = mask.bool()
        visible = mask[:, None, None, :] if self.mask_rule == "pad" else None  # [B, 1, 1, T]
        states = self.embeddings(ids)  # [B, T, D]
        chosen = states
        projected = bool(cast(BertSpec, self.spec).projection)
        layers = cast(nn.ModuleList, self.encoder.layer)
        for number, layer in enumerate(layers[: None if projected else self.depth], start=1):
            states = layer(states, visible)
            if number == self.depth:
                chosen = states
        # A projection was trained on the last layer, wherever the states are taken from.
        pooled = self.text_projection(states[:, 0]) if projected else chosen[:, 0]
        return Hidden(chosen, mask, pooled)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start as BERT does: matrices normal with deviation 0.02, biases zero, norms one."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=STANDARD_DEVIATION, generator=generator)
                bias = cast("Tensor | None", getattr(module, "bias", None))
                if bias is not None:
                    nn.init.zeros_(bias)


def bert_tokenizer(vocabulary: Sequence[str]) -> bytes:
    """Return the JSON of a lower-casing BERT WordPiece tokenizer; ids are places in `vocabulary`.

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
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [token for token in (PADDING, UNKNOWN, START, END, "[MASK]") if token in ids]
    cast(Any, tokenizer).add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    return tokenizer.to_str().encode("utf-8")


def _read_tokenizer(tokenizer_json: bytes, vocab: int) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.get_vocab().values()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the Rust library is not an Exception
        raise _bad_tokenizer(f"{type(error).__name__}: {error!s:.200}", "a tokenizer.json") from error
    missing = [token for token in (PADDING, UNKNOWN, START, END) if tokenizer.token_to_id(token) is None]
    if missing:
        raise _bad_tokenizer(f"no {', '.join(missing)}", "a BERT tokenizer with its special tokens")
    if max(ids) >= vocab:
        raise _bad_tokenizer(f"token ids up to {max(ids)}", f"ids below {vocab}, the tower's vocabulary")
    return tokenizer


def _bad_tokenizer(found: str, expected: str) -> BridgeError:
    return BridgeError(
        "The text tower's tokenizer cannot be used.",
        found,
        expected,
        "The file is damaged or does not belong to this tower; fetch or save it again.",
    )


@dataclass(frozen=True)
class _Maker:
    """Makes layers where and how the caller wants them."""

    ops: Ops
    device: torch.device | str | None
    dtype: torch.dtype | None

    def linear(self, width_in: int, width_out: int, *, bias: bool = True) -> nn.Module:
        return self.ops.Linear(width_in, width_out, bias=bias, device=self.device, dtype=self.dtype)

    def norm(self, spec: BertSpec) -> nn.Module:
        return self.ops.LayerNorm(spec.width, eps=spec.eps, device=self.device, dtype=self.dtype)

    def embedding(self, rows: int, width: int) -> nn.Module:
        return self.ops.Embedding(rows, width, device=self.device, dtype=self.dtype)


class _Embeddings(nn.Module):
    """Word + place + type, normalised."""

    def __init__(self, spec: BertSpec, make: _Maker) -> None:
        super().__init__()
        self.word_embeddings = make.embedding(spec.vocab, spec.width)
        self.position_embeddings = make.embedding(spec.window, spec.width)
        self.token_type_embeddings = make.embedding(spec.types, spec.width)
        self.LayerNorm = make.norm(spec)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)[None]  # [1, T]
        words = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids))
        return self.LayerNorm(words + self.position_embeddings(places))


class _SelfAttention(nn.Module):
    def __init__(self, spec: BertSpec, make: _Maker) -> None:
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

    def __init__(self, width: int, spec: BertSpec, make: _Maker) -> None:
        super().__init__()
        self.dense = make.linear(width, spec.width)
        self.LayerNorm = make.norm(spec)

    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(new) + old)


class _Attention(nn.Module):
    def __init__(self, spec: BertSpec, make: _Maker) -> None:
        super().__init__()
        self.self = _SelfAttention(spec, make)
        self.output = _Residual(spec.width, spec, make)

    def forward(self, states: Tensor, visible: Tensor | None) -> Tensor:
        return self.output(self.self(states, visible), states)


class _Intermediate(nn.Module):
    def __init__(self, spec: BertSpec, make: _Maker) -> None:
        super().__init__()
        self.dense = make.linear(spec.width, spec.inner)

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.gelu(self.dense(states))


class _Layer(nn.Module):
    def __init__(self, spec: BertSpec, make: _Maker) -> None:
        super().__init__()
        self.attention = _Attention(spec, make)
        self.intermediate = _Intermediate(spec, make)
        self.output = _Residual(spec.inner, spec, make)

    def forward(self, states: Tensor, visible: Tensor | None) -> Tensor:
        attended = self.attention(states, visible)
        return self.output(self.intermediate(attended), attended)
