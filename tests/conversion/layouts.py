"""Small random weights in the layouts that methods are published in: same names, few layers, small sizes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.utils
import safetensors.torch
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from language_bridge.conversion.presets import MethodRow, Presets, TowerRow

Weights = dict[str, Tensor]

WIDTH, HEADS_WIDTH, CONTEXT = 64, 64, 24
CHARACTERS = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij,.", *CHARACTERS]
VOCAB_TXT = "\n".join([*WORDS, ""]).encode()
TEXT = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"
LDM = "model.diffusion_model."

UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_heads": 8,
    "num_head_channels": -1,
    "context_dim": CONTEXT,
}
"""SD1.x in its levels and blocks, a tenth of it in its width."""


def random(shapes: Mapping[str, Sequence[int]], seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Random tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, generator=generator).mul(0.1).to(dtype) for name, shape in shapes.items()
    }


# -- text towers ---------------------------------------------------------------------------------------


def bert(
    *,
    vocab: int = len(WORDS),
    width: int = WIDTH,
    layers: int = 2,
    places: int = 40,
    types: int = 2,
    pooler: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Shapes of Hugging Face's BertModel, or of its RobertaModel when `types` is 1."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab, width),
        "embeddings.position_embeddings.weight": (places, width),
        "embeddings.token_type_embeddings.weight": (types, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for number in range(layers):
        layer = f"encoder.layer.{number}"
        for name, (wide_out, wide_in) in {
            "attention.self.query": (width, width),
            "attention.self.key": (width, width),
            "attention.self.value": (width, width),
            "attention.output.dense": (width, width),
            "intermediate.dense": (2 * width, width),
            "output.dense": (width, 2 * width),
        }.items():
            shapes |= {f"{layer}.{name}.weight": (wide_out, wide_in), f"{layer}.{name}.bias": (wide_out,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
    if pooler:
        shapes |= {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    return shapes


def under(prefix: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same with `prefix` before every name."""
    return {prefix + name: value for name, value in weights.items()}


def xlmr(**sizes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of XLM-RoBERTa for the little SentencePiece model below."""
    return bert(vocab=len(PIECES) + 2, places=42, types=1, **sizes)


PIECES = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefghij,.", *CHARACTERS]


def sentencepiece() -> bytes:
    """A sentencepiece.bpe.model of a few characters, written as protobuf by hand."""
    pieces = b""
    for number, piece in enumerate(PIECES):
        kind = {0: 2, 1: 3, 2: 3}.get(number, 1)
        text = piece.encode()
        message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -float(number))
        message += b"\x18" + bytes([kind])
        pieces += b"\x0a" + bytes([len(message)]) + message
    return pieces + b"\x12\x02\x18\x01"  # the trainer's model type: Unigram


def heads(hidden: int, context: int, *, m18: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of AltDiffusion's heads: of m2 and m9, or all three of m18."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformation.weight": (context, hidden),
        "transformation.bias": (context,),
    }
    if m18:
        shapes |= {"transformation_pre.weight": (context, hidden), "transformation_pre.bias": (context,)}
        shapes |= {"pre_LN.weight": (hidden,), "pre_LN.bias": (hidden,)}
    return shapes


# -- PEA-Diffusion -------------------------------------------------------------------------------------


def pea(
    layout: str, *, hidden: int = 16, width: int = 20, pooled: int = 12, context: int = 24
) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter: "P2", "P3", "P4" (SDXL), or "SD1.5-3", "SD1.5-5"."""
    shapes: dict[str, tuple[int, ...]] = {"layernorm.weight": (hidden,), "layernorm.bias": (hidden,)}
    if layout == "P2":
        for name, sizes in {"fc1": (width, hidden), "fc2": (pooled, width), "fc3": (context, pooled)}.items():
            shapes |= {f"{name}.weight": sizes, f"{name}.bias": sizes[:1]}
        return shapes
    depth = {"P3": 3, "P4": 4, "SD1.5-3": 3, "SD1.5-5": 5}[layout]
    sdxl = layout.startswith("P")
    ends = [hidden, *[width] * (depth - 1), pooled if sdxl else context]
    shapes |= {f"projector.{2 * n}.weight": (ends[n + 1], ends[n]) for n in range(depth)}
    return shapes | ({"fc.weight": (context, pooled), "fc.bias": (context,)} if sdxl else {})


# -- U-Nets --------------------------------------------------------------------------------------------


def unet_shapes(context: int = CONTEXT, channels: int = 32) -> dict[str, tuple[int, ...]]:
    """Names (LDM) and shapes of a U-Net, asked of the host's own class."""
    config = {**UNET_CONFIG, "context_dim": context, "model_channels": channels}
    model = UNetModel(**config, dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def diffusers_names() -> dict[str, str]:
    """diffusers name -> LDM name, from the host's own table."""
    known = unet_shapes()
    return {name: ldm for name, ldm in comfy.utils.unet_to_diffusers(UNET_CONFIG).items() if ldm in known}


def trained(unet: Mapping[str, Tensor], *endings: str, seed: int = 9) -> Weights:
    """The same U-Net with the tensors of these endings trained further."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator) * 0.02
        if name.endswith(endings)
        else tensor
        for name, tensor in unet.items()
    }


# -- files ---------------------------------------------------------------------------------------------


def save(path: Path, weights: Mapping[str, Any], **around: Any) -> Path:
    """A pickle or a safetensors file, by the ending; `around` puts the weights under `state_dict`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(dict(weights), path)
    else:
        torch.save({"state_dict": dict(weights), **around} if around else dict(weights), path)
    return path


def model_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    name: str = "pytorch_model.bin",
    config: Mapping[str, object] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A transformers or diffusers folder."""
    save(folder / name, weights)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file, data in (files or {}).items():
        (folder / file).write_bytes(data)
    return folder


# -- the table -----------------------------------------------------------------------------------------


def table(towers: Sequence[TowerRow] = (), methods: Sequence[MethodRow] = ()) -> Presets:
    """A table of these rows; towers that a method names and that are missing are made up."""
    rows = {row.name: row for row in towers}
    for method in methods:
        rows.setdefault(
            method.tower,
            TowerRow(name=method.tower, family="bert", match={"width": -1}, window=8, mask_rule="pad"),
        )
    return Presets(rows, {row.name: row for row in methods})
