"""PEA-Diffusion behind each of its towers, and MiaoBi, converted: the node gives the formula's own numbers.

The reference is transformers' class of the tower, and the adapter's formula by hand. Towers are small, rows
and pooled vector are as wide as the checkpoints', and the table is the published one with these sizes in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from language_bridge.conversion.convert import convert
from language_bridge.conversion.presets import Presets, read_presets
from language_bridge.encoders.base import Encoder
from language_bridge.encoders.dual import Dual
from language_bridge.encoders.file import load_encoder
from language_bridge.nodes.language_bridge import LanguageBridge
from language_bridge.tests.conversion.layouts import model_folder, pea, random, save, under
from language_bridge.tests.encoders.toys import VOCABULARY, shake, tokenizer_files
from language_bridge.tests.fixtures.graph import Checkpoint
from language_bridge.tests.fixtures.stock import call, encode, sample

CAT = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"
NEGATIVE = "\u7ea2\u8272\u7684\u5730\u6bef"
WIDTH, HEAD = 64, 40
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96}
ROBERTA = SIZES | {"vocab_size": 90, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
BERT = SIZES | {"vocab_size": len(VOCABULARY)}
T5 = {"d_model": 2 * WIDTH, "d_kv": 64, "d_ff": 96, "num_layers": 2, "num_heads": 2, "vocab_size": 100}
CLIP = SIZES | {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}
CLIP |= {"vocab_size": len(VOCABULARY) + 2, "max_position_embeddings": 77}
MARKS = {"start": len(VOCABULARY), "end": len(VOCABULARY) + 1}

Reads = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Published:
    """One tower as its authors publish it: files to name, and what transformers' class makes of ids."""

    files: list[Path]
    reads: Reads


@dataclass(frozen=True)
class Case:
    """A row of the table with an adapter of one layout, and the towers whose files are named with it."""

    method: str
    layout: str
    towers: tuple[str, ...]
    base: str = field(default="sdxl")


CASES = [
    *(Case("pea-sdxl-xlm-roberta", layout, ("xlmr",)) for layout in ("P2", "P3", "P4")),
    *(Case("pea-sdxl-chinese-clip", layout, ("hf",)) for layout in ("P2", "P3", "P4")),
    Case("pea-sdxl-chinese-clip", "P3", ("cn_clip",)),
    Case("pea-sdxl-mt5", "P3", ("mt5",)),
    Case("pea-sdxl-dual", "P3", ("xlmr", "cn_clip")),
    Case("pea-sdxl-dual", "P3", ("hf", "xlmr")),
    Case("pea-sdxl-altclip", "P3", ("altclip",)),
    Case("pea-sdxl-altclip-normed", "P3", ("altclip normed",)),
    *(Case("pea-sd15-chinese-clip", layout, ("hf",), "sd1") for layout in ("SD1.5-3", "SD1.5-5")),
    Case("pea-sd15-xlm-roberta", "SD1.5-5", ("xlmr",), "sd1"),
]
ORDER = {"xlmr": 0, "hf": 1, "cn_clip": 1}
WINDOWS = {"xlmr": 77, "hf": 64, "cn_clip": 64, "mt5": 77, "altclip": 77, "altclip normed": 77}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Presets:
    """The published table with the sizes of the small towers in the place of the true ones."""
    text = resources("language_bridge.conversion").joinpath("presets.json").read_text(encoding="utf-8")
    rows = json.loads(text)
    sizes: dict[str, dict[str, int]] = {
        "open-clip": {"vocab": 90, "width": WIDTH, "layers": 2},
        "chinese-clip-vit-huge": {"vocab": len(VOCABULARY), "width": WIDTH, "layers": 2, "projection": WIDTH},
        "mt5-xl": {"vocab": 100, "width": 2 * WIDTH, "layers": 2},
        "altclip": {"vocab": 90, "width": HEAD, "layers": 2, "inside": WIDTH},
        "miaobi": {"vocab": CLIP["vocab_size"], "width": 768, "layers": 1},
    }
    for row in rows["towers"]:
        for name, small in sizes.items():
            row["match"] |= small if row["name"].startswith(name) else {}
        row["change"] = MARKS if row["name"].startswith("miaobi") else row.get("change", {})
    widths = {1024: WIDTH, 2048: 2 * WIDTH, 768: HEAD}
    for row in rows["methods"]:
        if row["name"].startswith("pea-"):
            row["match"]["hidden"] = widths[row["match"]["hidden"]]
    path = tmp_path_factory.mktemp("table") / "presets.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return read_presets(path)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    """Every tower that PEA-Diffusion's scripts name, in the layouts that it is published in."""
    root = tmp_path_factory.mktemp("published")
    words = tokenizer_files("xlmr")

    def last(model: Any) -> Reads:
        return lambda ids, mask: model(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    roberta = shake(transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**ROBERTA)), 1)
    around = {"text.proj.0.weight": torch.ones(2, 2), "visual.conv1.weight": torch.ones(2)}
    tensors = under("text.transformer.", roberta.state_dict()) | around
    found = {
        "xlmr": Published(
            [model_folder(root / "open", tensors, name="open_clip_pytorch_model.bin", files=words)],
            last(roberta),
        )
    }

    bert = shake(transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False), 2)
    projection = torch.ones(WIDTH, WIDTH)
    tensors = under("text_model.", bert.state_dict()) | {"text_projection.weight": projection}
    folder = model_folder(
        root / "hf", tensors, config={"num_attention_heads": 1}, files=tokenizer_files("bert")
    )
    tensors = under("module.bert.", bert.state_dict()) | {"module.text_projection": projection}
    (root / "vocab.txt").write_bytes(tokenizer_files("bert")["vocab.txt"])
    weights = save(root / "clip_cn_vit-h-14.pt", tensors, epoch=1)
    found["hf"] = Published([folder], last(bert))
    found["cn_clip"] = Published([weights, root / "vocab.txt"], last(bert))

    config = transformers.MT5Config(**T5, feed_forward_proj="gated-gelu", relative_attention_num_buckets=8)
    mt5 = shake(transformers.MT5EncoderModel(config), 3)
    settings = {"num_heads": 2, "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu"}
    folder = model_folder(root / "mt5", mt5.state_dict(), config=settings, files=tokenizer_files("t5"))
    found["mt5"] = Published([folder], last(mt5))

    alt = shake(transformers.AltCLIPTextModel(transformers.AltCLIPTextConfig(project_dim=HEAD, **ROBERTA)), 4)
    tensors = {f"text_model.{key.replace('.layers.', '.layer.')}": v for key, v in alt.state_dict().items()}
    tensors |= {"text_projection.weight": torch.ones(HEAD, HEAD), "logit_scale": torch.ones(())}
    folder = model_folder(root / "AltCLIP", tensors, files=words)
    found["altclip normed"] = Published([folder], last(alt))

    def bare(ids: Tensor, mask: Tensor) -> Tensor:
        states = alt(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[-1]
        return alt.transformation(states)

    found["altclip"] = Published([folder], bare)
    return found


def adapter_says(weights: Mapping[str, Tensor], states: Tensor, sdxl: bool) -> tuple[Tensor, Tensor | None]:
    """The formula of OPPO's adapters: LayerNorm, linear layers with GELU between; pooled before the last."""
    x = functional.layer_norm(
        states, states.shape[-1:], weights["layernorm.weight"], weights["layernorm.bias"]
    )
    names = [key for key, weight in weights.items() if weight.ndim == 2]
    pooled = None
    for number, name in enumerate(names):
        if sdxl and number == len(names) - 1:
            pooled = x.mean(1)
        x = functional.gelu(x) if number else x
        x = functional.linear(x, weights[name], weights.get(name.replace("weight", "bias")))
    return x, pooled


@pytest.fixture
def bridged(
    models: Path, table: Presets, load: Callable[..., Checkpoint]
) -> Iterator[Callable[..., tuple[Any, Any, Encoder]]]:
    """Converts files by a row of the table and puts the node before a checkpoint; the files go afterwards."""
    written: list[Path] = []

    def make(files: list[Path], method: str, base: str) -> tuple[Any, Any, Encoder]:
        made = convert(
            files,
            models / "language_bridges",
            towers=models / "text_encoders",
            preset=method,
            presets=table,
        )
        written.extend(made)
        (tower,) = [path for path in made if path.parent.name == "text_encoders"]
        checkpoint = load(base)
        inputs = {"model": checkpoint.model, "clip": checkpoint.clip, "bridge": f"{method}.safetensors"}
        model, clip = call(LanguageBridge, **inputs, strength=1.0, route="native only")
        return model, clip, load_encoder(tower)

    yield make
    for path in written:
        path.unlink()


def adapter(layout: str, hidden: int, base: str, seed: int) -> dict[str, Tensor]:
    """Random weights whose layers neither fade nor burst."""
    context, pooled = {"sdxl": (2048, 1280), "sd1": (768, 0)}[base]
    shapes = pea(layout, hidden=hidden, width=48, pooled=pooled or 12, context=context)
    return {key: value * 2 if value.ndim == 2 else value for key, value in random(shapes, seed).items()}


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method} {case.layout} {case.towers[-1]}")
def test_pea_says_what_its_formula_says_of_the_towers_states(
    case: Case,
    published: dict[str, Published],
    bridged: Callable[..., tuple[Any, Any, Encoder]],
    load: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    towers = [published[name] for name in case.towers]
    hidden = {"pea-sdxl-mt5": 2 * WIDTH, "pea-sdxl-dual": 2 * WIDTH}.get(case.method, WIDTH)
    weights = adapter(case.layout, HEAD if "altclip" in case.method else hidden, case.base, 11)
    files = [save(tmp_path / "pytorch_model.bin", weights)]
    files += [file for tower in towers for file in tower.files]
    model, clip, tower = bridged(files, case.method, case.base)
    assert model is load(case.base).model

    halves = [tower.first, tower.second] if isinstance(tower, Dual) else [tower]
    order = sorted(case.towers, key=lambda name: ORDER.get(name, 0))
    window = 77 if case.base == "sd1" else min(WINDOWS[name] for name in case.towers)
    pooled: list[Tensor] = []
    for text in (CAT, NEGATIVE, ""):
        with torch.no_grad():
            parts = [
                published[name].reads(*half.batch([text])) for name, half in zip(order, halves, strict=True)
            ]
            expected, mean = adapter_says(weights, torch.cat(parts, dim=-1), sdxl=case.base == "sdxl")
        assert expected.shape == (1, window, {"sdxl": 2048, "sd1": 768}[case.base])
        ((context, said),) = encode(clip, text)
        close(context, expected)
        if mean is not None:
            close(said["pooled_output"], mean)
            pooled.append(mean)
    if pooled:  # the padding counts, so that the same word in a longer frame says something else
        assert (pooled[0] - pooled[2]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["pea-sdxl-dual", "pea-sdxl-altclip"])
def test_a_converted_pea_paints(
    method: str,
    published: dict[str, Published],
    bridged: Callable[..., tuple[Any, Any, Encoder]],
    sdxl: Checkpoint,
    tmp_path: Path,
) -> None:
    names = ("xlmr", "hf") if method == "pea-sdxl-dual" else ("altclip",)
    hidden = HEAD if method == "pea-sdxl-altclip" else 2 * WIDTH
    weights = adapter("P3", hidden, "sdxl", 12)
    files = [save(tmp_path / "pytorch_model.bin", weights), *(f for n in names for f in published[n].files)]
    model, clip, _ = bridged(files, method, "sdxl")
    plain = sample(model, encode(clip, CAT), encode(clip, ""))
    other = sample(model, encode(clip, CAT), encode(clip, NEGATIVE))
    assert torch.isfinite(plain).all() and (plain - other).abs().max() > 1e-4
    assert torch.equal(plain, sample(model, encode(clip, CAT), encode(clip, "")))


def test_miaobi_says_what_transformers_says(
    bridged: Callable[..., tuple[Any, Any, Encoder]], tmp_path: Path
) -> None:
    reference = shake(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)), 5)
    tensors = {
        key if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in reference.state_dict().items()
    }
    files = tokenizer_files("bert") | {"tokenizer_config.json": b'{"pad_token": "[PAD]"}'}
    folder = model_folder(
        tmp_path / "text_encoder", tensors, config={"hidden_act": "quick_gelu"}, files=files
    )
    _, clip, tower = bridged([folder], "miaobi-beta-0.9-any-unet", "sd1")
    for text, signs in ((CAT, list(CAT)), ("", [])):
        ids = [MARKS["start"], *(VOCABULARY.index(sign) for sign in signs), MARKS["end"]]
        ids += [VOCABULARY.index("[PAD]")] * (77 - len(ids))
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).last_hidden_state
        assert tower.batch([text])[0].tolist() == [ids]
        close(encode(clip, text)[0][0], expected)
