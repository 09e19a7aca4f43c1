"""A toy BERT tower with a small Chinese and English vocabulary."""

from __future__ import annotations

import torch

from language_bridge.encoders.bert import Bert, BertSpec, bert_tokenizer

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
    tower.reset_parameters(torch.Generator().manual_seed(seed))
    # The usual start has no biases and unit norms; a reader must prove that it uses them.
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
            else:
                parameter *= 6  # far enough from zero for attention to choose
    return tower
