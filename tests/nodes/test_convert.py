"""The convert node: it lists what lies in the model folders, and writes where the other nodes look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import load_bridge, read_header
from language_bridge.conversion import presets
from language_bridge.encoders.file import read_encoder_header
from language_bridge.harness.server import Server
from language_bridge.host import folders
from language_bridge.nodes import convert as node
from language_bridge.nodes.convert import Convert
from language_bridge.tests.conversion.layouts import VOCAB_TXT, bert, model_folder, pea, random, save, under
from language_bridge.tests.conversion.test_convert import PEA, TABLE, TAIYI, chinese_clip
from language_bridge.tests.conversion.test_towers import PAIRS, adapter, first

PUBLISHED = presets.published


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Model folders of their own, with three downloads, and a table of their sizes."""
    known = dict(folder_paths.folder_names_and_paths)
    for category in (*node.CATEGORIES, "diffusers"):
        (tmp_path / category).mkdir()
        suffixes = {".safetensors"} if category == folders.FOLDER else folder_paths.supported_pt_extensions
        known[category] = ([str(tmp_path / category)], suffixes if category != "diffusers" else {"folder"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(node, "published", lambda: TABLE)
    monkeypatch.setattr("language_bridge.conversion.convert.published", lambda: TABLE)
    save(tmp_path / "text_encoders" / "pea.bin", random(pea("P3")))
    taiyi = tmp_path / "diffusers" / "Taiyi"
    model_folder(taiyi / "text_encoder", random(bert()), files={"vocab.txt": VOCAB_TXT})
    (taiyi / "model_index.json").write_text("{}", encoding="utf-8")
    save(tmp_path / "checkpoints" / "Taiyi.ckpt", under("cond_stage_model.transformer.", random(bert())))
    (tmp_path / "text_encoders" / "words").mkdir()
    (tmp_path / "text_encoders" / "words" / "vocab.txt").write_bytes(VOCAB_TXT)
    yield tmp_path


def run(source: str, **changes: Any) -> str:
    options: dict[str, Any] = {
        "together_with": node.NOTHING,
        "tokenizer": node.BESIDE,
        "preset": node.RECOGNISE,
        "reference": node.NOTHING,
        "unet": "auto",
        "form": "replace",
        "precision": node.PRECISIONS[0],
        "overwrite": False,
    }
    output = Convert.execute(source, **(options | changes))
    (text,) = output.result
    return text


def test_the_lists_hold_files_and_folders_of_the_model_folders(models: Path) -> None:
    model_folder(
        models / "text_encoders" / "deep" / "clip", random(bert()), name="model-00001-of-00001.safetensors"
    )
    model_folder(models / "checkpoints" / "Alt" / "text_encoder", random(bert()))
    assert node.source_names() == [
        "checkpoints/Alt/",
        "checkpoints/Alt/text_encoder/pytorch_model.bin",
        "checkpoints/Taiyi.ckpt",
        "diffusers/Taiyi/",
        "text_encoders/deep/clip/",
        "text_encoders/deep/clip/model-00001-of-00001.safetensors",
        "text_encoders/pea.bin",
    ]
    assert node.tokenizer_names() == ["text_encoders/words"]
    inputs = {given.id: given for given in Convert.define_schema().inputs}
    assert inputs["source"].options == node.source_names()
    assert inputs["preset"].options[0] == node.RECOGNISE


def test_a_bridge_is_written_where_the_language_bridge_node_looks(models: Path) -> None:
    text = run("text_encoders/pea.bin")
    assert "pea.safetensors" in text and "was not among the files" in text
    header = read_header(models / folders.FOLDER / "pea.safetensors")
    assert header is not None and header.encoder.identity == PEA.tower
    assert "pea.safetensors" in folders.bridge_names()
    with pytest.raises(BridgeError, match="already"):
        run("text_encoders/pea.bin")
    run("text_encoders/pea.bin", overwrite=True, precision="float16")


def test_a_download_among_controlnets_is_found_too(models: Path) -> None:
    (models / "text_encoders" / "pea.bin").rename(models / "controlnet" / "\u6211\u7684 pea.bin")
    assert "pea.safetensors" in run("controlnet/\u6211\u7684 pea.bin")


def test_a_tower_is_written_where_it_is_found_by_its_bridge(models: Path) -> None:
    run("diffusers/Taiyi/")
    header = read_header(models / folders.FOLDER / "taiyi.safetensors")
    assert header is not None
    found = folders.encoder_path(header.encoder, "taiyi.safetensors")
    assert found == models / "text_encoders" / "taiyi-tower.safetensors"
    tower = read_encoder_header(found)
    assert tower is not None and tower.digest == header.encoder.digest and TAIYI.tower == tower.identity


def test_a_single_file_takes_its_tokenizer_from_another_folder(models: Path) -> None:
    with pytest.raises(BridgeError, match="tokenizer"):
        run("checkpoints/Taiyi.ckpt")
    assert "text tower" in run("checkpoints/Taiyi.ckpt", tokenizer="text_encoders/words")


def test_three_downloads_make_a_bridge_with_its_two_towers(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "published", lambda: PAIRS)
    monkeypatch.setattr("language_bridge.conversion.convert.published", lambda: PAIRS)
    encoders = models / "text_encoders"
    first(encoders)
    save(encoders / "clip_cn_vit-h-14.pt", chinese_clip("pt"))
    adapter(encoders / "PEA")
    downloads = {
        "source": "text_encoders/PEA/",
        "together_with": "text_encoders/CLIP-ViT-H-14-xlm-roberta/",
        "tokenizer": "text_encoders/words",
    }
    with pytest.raises(BridgeError, match="One half of the text tower both is missing"):
        run(**downloads)
    text = run(**downloads, and_with="text_encoders/clip_cn_vit-h-14.pt")
    assert "pea-dual.safetensors" in text and "family dual" in text and "not among the files" not in text
    header = read_header(models / folders.FOLDER / "pea-dual.safetensors")
    assert header is not None
    tower = folders.encoder_path(header.encoder, "pea-dual.safetensors")
    assert tower == encoders / "both-tower.safetensors"
    with pytest.raises(BridgeError, match="not in the list"):
        run(**downloads, and_with="/etc/passwd")


@pytest.mark.parametrize(
    "change",
    [
        {"source": "../secret.bin"},
        {"source": "text_encoders/../../secret.bin"},
        {"source": "/etc/passwd"},
        {"source": ""},
        {"together_with": "text_encoders/../../secret.bin"},
        {"reference": "/etc/passwd"},
        {"tokenizer": "text_encoders/.."},
        {"tokenizer": ".."},
        {"preset": "nobody"},
        {"precision": "int4"},
        {"unet": "all"},
        {"form": "add"},
    ],
)
def test_a_linked_text_that_is_not_in_the_list_is_refused(models: Path, change: dict[str, Any]) -> None:
    save(models.parent / "secret.bin", random(pea("P3")))
    before = sorted(models.rglob("*"))
    with pytest.raises(BridgeError):
        run(**({"source": "text_encoders/pea.bin"} | change))
    assert sorted(models.rglob("*")) == before


def test_a_download_that_was_replaced_is_converted_again(models: Path) -> None:
    before = Convert.fingerprint_inputs("text_encoders/pea.bin", unet="auto", overwrite=True)
    assert before
    path = models / "text_encoders" / "pea.bin"
    torch.save({}, path)
    import os

    os.utime(path, ns=(1, 1))
    assert Convert.fingerprint_inputs("text_encoders/pea.bin", unet="auto", overwrite=True) != before
    assert Convert.fingerprint_inputs("missing") == ""


def test_the_choices_are_those_of_the_conversion() -> None:
    from language_bridge.conversion import convert, unet

    assert tuple(node.UNETS) == convert.UNET_CHOICES
    assert tuple(node.FORMS) == unet.FORMS
    assert set(node.preset_names()) == {*PUBLISHED().methods, *PUBLISHED().towers}


def test_a_server_converts_a_download_of_true_size_and_offers_the_bridge(server: Server) -> None:
    shapes = {"layernorm.weight": (1024,), "layernorm.bias": (1024,)}
    for name, size in (("fc1", (1024, 1024)), ("fc2", (1280, 1024)), ("fc3", (2048, 1280))):
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    weights = {name: tensor.half() for name, tensor in random(shapes).items()}
    assert sum(tensor.numel() for tensor in weights.values()) == 4_987_136  # PEA-Diffusion's first SDXL file
    source = server.base / "models" / "text_encoders" / "pytorch_model.bin"
    save(source, weights)
    try:
        options = server.ask("/object_info/LanguageBridgeConvert")["LanguageBridgeConvert"]["input"][
            "required"
        ]
        inputs = {name: _first(option) for name, option in options.items()}
        inputs |= {"source": "text_encoders/pytorch_model.bin", "preset": "pea-sdxl-xlm-roberta"}
        entry = server.run({"1": {"class_type": "LanguageBridgeConvert", "inputs": inputs}})
        report = "".join(entry["outputs"]["1"]["text"])
        offered = server.ask("/object_info/LanguageBridge")["LanguageBridge"]["input"]["required"]["bridge"]
        (made,) = [name for name in _options(offered) if "pea-sdxl" in name]
        path = server.base / "models" / "language_bridges" / made
        assert made in report
        assert read_header(path).base == "sdxl"
        loaded = load_bridge(path).bridge
        assert torch.equal(loaded.state_dict()["fc.weight"], weights["fc3.weight"].float())
        path.unlink()
    finally:
        source.unlink()


def _options(described: Any) -> list[Any]:
    kind, *more = described
    return kind if isinstance(kind, list) else more[0].get("options", [])


def _first(described: Any) -> Any:
    """What the page would send for an untouched input."""
    more = described[1] if len(described) > 1 else {}
    options = _options(described)
    return more.get("default", options[0] if options else None)
