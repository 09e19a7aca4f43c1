"""A toy tower of each family, with small vocabularies; SentencePiece models are trained on the spot."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping

import torch

from language_bridge.encoders.base import Encoder, EncoderSpec, families
from language_bridge.encoders.bert import Bert, BertSpec, bert_tokenizer
from language_bridge.encoders.clip import Clip
from language_bridge.encoders.dual import join
from language_bridge.encoders.gemma import Gemma
from language_bridge.encoders.llama import Llama
from language_bridge.encoders.t5 import T5
from language_bridge.encoders.xlmr import Xlmr

CHINESE = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b\u5728\u5730\u6bef\u4e0a\u3001\u3002\uff0c\u300c\u300d"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *CHINESE,
    *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *("cat", "red", "##ing", "draw", "the", "cafe"),
]
TEXTS = [
    "\u4e00\u53ea\u7ea2\u8272\u7684\u732b",
    "a red CAT drawing, the cat's",
    "\u4e00\u53ea red\u732b\uff0c\u5728the\u5730\u6bef\u4e0a\u3002 1.3\u732b",
    "Caf\u00e9 \u00c5 \u72d7\u732b \U0001f431",
    "",
    " \t\n ",
    "[MASK] [sep] [CLS]x",
    "a\u3000b\u00a0c\u200bd\ufeff\x07",
    "\uff21\uff22\uff43\uff08\u732b\uff1a\uff11\uff09",
    "supercalifragilistic" * 6,
    "\u304b\u306a \uace0\uc591\uc774 \u0e41\u0e21\u0e27",
]


def toy_tower(window: int = 24, seed: int = 0, **changes: object) -> Bert:
    """A tower of width 32 with two layers and a seeded random start."""
    sizes: dict[str, object] = {
        "vocab": len(VOCABULARY),
        "width": 32,
        "layers": 2,
        "heads": 4,
        "inner": 48,
        "window": 40,
    }
    build = {name: changes.pop(name) for name in ("layer", "mask_rule", "ops", "dtype") if name in changes}
    tower = Bert(
        BertSpec(**(sizes | changes)), bert_tokenizer(VOCABULARY), identity="toy", window=window, **build
    )
    return stirred(tower, seed)


def stirred(tower: Encoder, seed: int = 0) -> Encoder:
    """The usual start has no biases and unit norms; a reader must prove that it uses them."""
    tower.reset_parameters(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2
            elif tower.family != "t5":
                parameter *= 6  # far enough from zero for attention to choose
    return tower


SENTENCES = [
    "a red cat on the mat",
    "the quick brown fox jumps over the lazy dog",
    "draw the cats running in rain (1.3)",
    "caf\u00e9 d\u00e9j\u00e0 vu, best quality",
    "\u4e00\u53ea\u7ea2\u8272\u7684\u732b\u5728\u5730\u6bef\u4e0a",
    "\u5c71\u6c34\u753b\uff0c\u6c34\u58a8\u98ce\u683c",
    "\u732b\u3068\u72ac\u304c\u904a\u3076",
    "\uace0\uc591\uc774\uac00 \uc794\ub2e4",
    "\u043a\u043e\u0448\u043a\u0430 \u043d\u0430 \u043a\u043e\u0432\u0440\u0435",
]
KINDS: dict[str, dict[str, object]] = {
    "xlmr": {"vocab_size": 80, "model_type": "unigram"},
    "t5": {"vocab_size": 80, "model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "llama": {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
}
KINDS["baichuan"] = KINDS["llama"] | {"add_dummy_prefix": False}
KINDS["gemma"] = KINDS["baichuan"] | {
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "user_defined_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"],
}
SPEECH = [
    *TEXTS[:6],
    *TEXTS[7:],
    "  two  spaces here ",
    "line\nbreak\r\nnext",
    "e\u0301tude \ufb01ne \u00bd \u338f",
    "\U0001f431\U0001f436\u732b \U0001f468\u200d\U0001f469",
    "\u2581x",
    "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621 \u0928\u092e\u0938\u094d\u0924\u0947",
]
"""Texts without literal special tokens, on which SentencePiece itself is the judge."""


@functools.cache
def sentencepiece_model(kind: str) -> bytes:
    """A SentencePiece model as the family publishes it, trained on a few sentences."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=written,
        minloglevel=2,
        num_threads=1,
        character_coverage=0.995,
        **KINDS[kind],
    )
    return written.getvalue()


def clip_files() -> dict[str, bytes]:
    """vocab.json and merges.txt in CLIP's layout: bytes, bytes at the end of a word, merges, two specials."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("t", "h"), ("th", "e</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    return {
        "vocab.json": json.dumps({word: number for number, word in enumerate(words)}).encode(),
        "merges.txt": "\n".join(lines).encode(),
    }


def tokenizer_files(family: str) -> dict[str, bytes]:
    """What a published model of the family has beside its weights."""
    if family == "bert":
        return {"vocab.txt": "\n".join(VOCABULARY).encode() + b"\n"}
    if family == "clip":
        return clip_files()
    names = {"xlmr": "sentencepiece.bpe.model", "t5": "spiece.model"}
    return {names.get(family, "tokenizer.model"): sentencepiece_model(family)}


SIZES: dict[str, dict[str, object]] = {
    "bert": {"vocab": len(VOCABULARY), "heads": 4, "inner": 48},
    "xlmr": {"vocab": 90, "heads": 4, "inner": 48},
    "clip": {"vocab": 520, "heads": 4, "inner": 48},
    "t5": {"vocab": 100, "heads": 4, "head": 6, "inner": 48, "buckets": 8, "distance": 10},
    "llama": {"vocab": 420, "heads": 4, "pairs": 2, "head": 8, "inner": 48},
    "gemma": {"vocab": 420, "heads": 4, "pairs": 2, "head": 8, "inner": 48, "every": 2, "reach": 6},
}
CLASSES: Mapping[str, type[Encoder]] = {
    "bert": Bert,
    "xlmr": Xlmr,
    "clip": Clip,
    "t5": T5,
    "llama": Llama,
    "gemma": Gemma,
}


def toy_spec(family: str, **changes: object) -> EncoderSpec:
    sizes = {"width": 32, "layers": 2, "window": 40} | SIZES[family] | changes
    return families()[family].Spec(**sizes)


def single_tower(family: str, window: int = 24, seed: int = 0, **changes: object) -> Encoder:
    build = {
        name: changes.pop(name)
        for name in ("layer", "mask_rule", "ops", "dtype", "device")
        if name in changes
    }
    tokenizer = CLASSES[family].tokenizer_from(tokenizer_files(family))
    tower = CLASSES[family](toy_spec(family, **changes), tokenizer, identity="toy", window=window, **build)
    return tower if build.get("device") == "meta" else stirred(tower, seed)


def toy_dual(window: int = 24, seed: int = 0, **changes: object) -> Encoder:
    halves = [single_tower(family, window, seed, **changes) for family in ("xlmr", "bert")]
    return join(*halves, identity="toy", window=window)


TOYS: dict[str, Callable[..., Encoder]] = {
    **{family: functools.partial(single_tower, family) for family in SIZES},
    "dual": toy_dual,
}


def published(tensors: Mapping[str, torch.Tensor], config: Mapping[str, object], family: str) -> EncoderSpec:
    """What `identify_encoder` says of a file with these tensors; it must be of `family`."""
    from language_bridge.encoders import identify_encoder

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tower, spec = identify_encoder(shapes, config)
    assert tower.family == family
    return spec


def read(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, object], tower: Encoder, **build: object
) -> Encoder:
    """Take a tower out of published tensors, with the tokenizer and window of the toy `tower`."""
    spec = published(tensors, config, tower.family)
    given = {"identity": "toy", "window": tower.window} | build
    made = type(tower)(spec, tower.tokenizer_json, **given)
    made.load_state_dict(type(tower).adopt(tensors, spec), strict=True)
    return made


def shake(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Random weights for a reference model, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + 1 if parameter.ndim == 1 else noise * 0.15)
    return model.eval()
