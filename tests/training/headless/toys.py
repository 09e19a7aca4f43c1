"""Small random models in diffusers' layout, and shards in the published layout of PEA-Diffusion's data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from language_bridge.tests.encoders.toys import clip_files

CAT = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"
DOG = "\u84dd\u8272\u7684\u5927\u72d7"
RESOLUTION = 32
WINDOW = 16

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 2,
    "norm_num_groups": 32,
}
"""SD1.x in small: attention on the first level and in the middle."""
XL: dict[str, Any] = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 40 + 6 * 16,
    "use_linear_projection": True,
}


def unet_of(config: Mapping[str, Any], context: int, seed: int = 0) -> Any:
    """A random U-Net that answers with numbers of ordinary size."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**config, cross_attention_dim=context).eval()


def scheduler_of(**changes: Any) -> Any:
    from diffusers import DDPMScheduler

    plain = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDPMScheduler(**plain, **changes)


def text_encoder(width: int, *, layers: int = 2, projection: int = 0, seed: int = 0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=520,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        projection_dim=projection or width,
        bos_token_id=518,
        eos_token_id=519,
        pad_token_id=519,
    )
    torch.manual_seed(seed)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def write_model(folder: Path, *, xl: bool = False, context: int = 48) -> Path:
    """A model folder as a diffusers pipeline saves it; with `xl` its text is 24 + 40 wide."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    for name, content in clip_files().items():
        for part in ("tokenizer", "tokenizer_2") if xl else ("tokenizer",):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / name).write_bytes(content)
    for part in ("tokenizer", "tokenizer_2") if xl else ("tokenizer",):
        made = CLIPTokenizer.from_pretrained(folder / part, model_max_length=WINDOW)
        made.save_pretrained(folder / part)
    if xl:
        text_encoder(24).save_pretrained(folder / "text_encoder")
        text_encoder(40, projection=40, seed=1).save_pretrained(folder / "text_encoder_2")
    else:
        text_encoder(context, layers=1).save_pretrained(folder / "text_encoder")
    unet_of(XL if xl else UNET, 64 if xl else context).save_pretrained(folder / "unet")
    scheduler_of().save_pretrained(folder / "scheduler")
    torch.manual_seed(2)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    return folder


def picture(width: int = RESOLUTION, height: int = RESOLUTION, seed: int = 0, kind: str = "JPEG") -> bytes:
    """A random picture, coarse enough for JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(written, kind)
    return written.getvalue()


def row(seed: int, **changes: Any) -> tuple[dict[str, Any], bytes]:
    """A parallel example that every filter lets pass, or a changed one; a field of None is left out."""
    size = (changes.pop("width", RESOLUTION), changes.pop("height", RESOLUTION))
    fields: dict[str, Any] = {
        "caption_zh": (CAT, DOG)[seed % 2] + str(seed),
        "caption_en": f"a red cat {seed}",
        "watermark": 0.1,
        "aesthetic_score": 6.5,
    } | changes
    return {name: value for name, value in fields.items() if value is not None}, picture(*size, seed=seed)


def member(out: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    out.addfile(info, io.BytesIO(content))


def write_shard(path: Path, rows: Iterable[tuple[Mapping[str, Any], bytes]], first: int = 0) -> Path:
    """A tar of jpg and json, as WebDataset has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for number, (fields, content) in enumerate(rows, first):
            member(out, f"{number:06d}.jpg", content)
            member(out, f"{number:06d}.json", json.dumps(fields).encode("utf-8"))
    return path


def write_shards(folder: Path, counts: Sequence[int], **changes: Any) -> list[Path]:
    """Shards of so many examples each, all different; every third has a caption as it was found (flag z)."""
    made: list[Path] = []
    at = 0
    for number, count in enumerate(counts):
        rows = []
        for seed in range(at, at + count):
            found = {"caption_ori": CAT + DOG * (seed % 4)} if seed % 3 == 2 else {}
            rows.append(row(seed, **found, **changes))
        made.append(write_shard(folder / f"part-{number:03d}.tar", rows, at))
        at += count
    return made
