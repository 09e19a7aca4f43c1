"""AltDiffusion and Taiyi single files open whole, and say what transformers' own classes say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management as management
import folder_paths
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch import load as open_pickle

import nodes
from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders.file import save_encoder
from language_bridge.host import travel
from language_bridge.host.checkpoint import open_checkpoint
from language_bridge.nodes.checkpoint import BridgeCheckpoint
from language_bridge.tests.encoders.toys import VOCABULARY, single_tower, tokenizer_files
from language_bridge.tests.fixtures.checkpoints import FAMILIES, Family, shapes_of, unet_shapes, windows
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, encode, same, sample

CAT = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"
WIDTH, LAYERS = 128, 3
UNET, TEXT = "model.diffusion_model.", "cond_stage_model."
V_MARK = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""The norm by whose spread the host tells v-prediction."""

SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 96}
State = dict[str, Tensor]


def shaken(module: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return module.eval()


def xlmr() -> Any:
    config = transformers.XLMRobertaConfig(
        vocab_size=90, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **SIZES
    )
    return shaken(transformers.XLMRobertaModel(config), 1)


def bert() -> Any:
    sizes = SIZES | {"hidden_size": 768, "num_attention_heads": 12}
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), layer_norm_eps=1e-12, **sizes)
    return shaken(transformers.BertModel(config), 2)


def body(family: Family) -> State:
    """U-Net and autoencoder of a small random checkpoint."""
    from comfy.taesd.taesd import TAESD

    shapes = {f"{UNET}{key}": shape for key, shape in unet_shapes(family).items()}
    shapes |= {f"first_stage_model.{key}": shape for key, shape in shapes_of(TAESD()).items()}
    return windows(shapes, 5) | {
        "first_stage_model.vae_scale": torch.tensor(1.0),
        "first_stage_model.vae_shift": torch.tensor(0.0),
    }


def head(name: str, outputs: int) -> State:
    generator = torch.Generator().manual_seed(len(name))
    return {
        f"{TEXT}{name}.weight": torch.randn(outputs, WIDTH, generator=generator) * 0.1,
        f"{TEXT}{name}.bias": torch.randn(outputs, generator=generator) * 0.1,
    }


def write(path: Path, state: State, words: dict[str, bytes] | None) -> Path:
    torch.save({"state_dict": state}, path)
    if words:
        path.with_suffix("").mkdir()
        for name, content in words.items():
            (path.with_suffix("") / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def roberta() -> Any:
    return xlmr()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, roberta: Any) -> dict[str, Path]:
    """A checkpoint of each kind in the published single-file layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tower = {f"{TEXT}roberta.{key}": value for key, value in roberta.state_dict().items()}
    tower[f"{TEXT}roberta.embeddings.position_ids"] = torch.arange(514)[None]
    norm = {f"{TEXT}pre_LN.{key}": torch.rand(WIDTH) + 0.5 for key in ("weight", "bias")}
    m9 = body(FAMILIES["sd1"]) | tower | head("transformation", 768)
    m9["model_ema.decay"] = torch.tensor(0.9)
    m18 = body(FAMILIES["sd2"]) | tower | norm
    m18 |= head("transformation", 1024) | head("transformation_pre", 1024)
    m18[V_MARK] = torch.linspace(-1, 1, 320)
    taiyi = body(FAMILIES["sd1"])
    taiyi |= {f"{TEXT}transformer.{key}": value for key, value in bert().state_dict().items()}
    words = tokenizer_files("xlmr")
    return {
        "m9": write(folder / "m9.ckpt", m9, words),
        "m18": write(folder / "m18.ckpt", m18, words),
        "taiyi": write(folder / "taiyi.ckpt", taiyi, {"vocab.txt": "\n".join(VOCABULARY).encode("utf-8")}),
    }


@pytest.fixture(scope="module")
def opened(files: dict[str, Path], models: Path) -> Callable[[str], Any]:
    """MODEL, CLIP, VAE of a checkpoint, opened once."""
    known: dict[str, Any] = {}

    def open_once(name: str) -> Any:
        if name not in known:
            with torch.inference_mode():
                known[name] = open_checkpoint(files[name])
        return known[name]

    return open_once


def tokens_of(clip: Any, text: str) -> tuple[Tensor, Tensor]:
    ((_, chunks),) = clip.tokenize(text).items()
    return torch.tensor([[token for token, _ in chunk] for chunk in chunks]), torch.tensor(
        [[weight for _, weight in chunk] for chunk in chunks]
    )


@torch.no_grad()
def by_transformers(name: str, clip: Any, state: State, tower: Any, text: str) -> Tensor:
    """The published formula on transformers' own class, windows one behind the other."""
    ids, _ = tokens_of(clip, text)
    if name == "taiyi":
        return bert()(ids).last_hidden_state.flatten(0, 1)[None]
    states = tower(ids, attention_mask=(ids != 1).long(), output_hidden_states=True).hidden_states
    if name == "m9":
        rows = torch.nn.functional.linear(
            states[-1], state[f"{TEXT}transformation.weight"], state[f"{TEXT}transformation.bias"]
        )
    else:
        normed = torch.nn.functional.layer_norm(
            states[-2], (WIDTH,), state[f"{TEXT}pre_LN.weight"], state[f"{TEXT}pre_LN.bias"], 1e-5
        )
        rows = torch.nn.functional.linear(
            normed, state[f"{TEXT}transformation_pre.weight"], state[f"{TEXT}transformation_pre.bias"]
        )
    return rows.flatten(0, 1)[None]


@pytest.mark.parametrize("name", ["m9", "m18", "taiyi"])
def test_the_text_is_what_the_published_formula_gives(
    opened: Any, files: dict[str, Path], roberta: Any, name: str
) -> None:
    _, clip, _ = opened(name)
    state = open_pickle(files[name], weights_only=True)["state_dict"]
    window, width = (512, 768) if name == "taiyi" else (77, 1024 if name == "m18" else 768)
    for text in (CAT, f"{CAT}, a red cat", "", CAT * 20):
        rows = encode(clip, text)[0][0]
        expected = by_transformers(name, clip, state, roberta, text)
        assert rows.shape[1] % window == 0 and rows.shape[2] == width
        assert (rows - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (encode(clip, CAT * 20)[0][0].shape[1] > window) == (name != "taiyi")


@pytest.mark.parametrize("name", ["m9", "m18", "taiyi"])
def test_it_paints_with_the_stock_nodes(opened: Any, name: str) -> None:
    model, clip, vae = opened(name)
    assert model.model.model_type == comfy.model_base.ModelType.EPS
    latents = sample(model, encode(clip, CAT), encode(clip, ""), steps=1)
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, sample(model, encode(clip, "dog"), encode(clip, ""), steps=1))
    picture = call(nodes.VAEDecode, vae=vae, samples={"samples": latents})
    assert picture.shape == (1, 64, 64, 3)


def test_m18_predicts_the_noise_although_the_host_would_guess_otherwise(
    opened: Any, files: dict[str, Path]
) -> None:
    import comfy.sd

    state = open_pickle(files["m18"], weights_only=True)["state_dict"]
    with torch.inference_mode():
        guessed = comfy.sd.load_state_dict_guess_config(state, output_clip=False, output_vae=False)[0]
    assert guessed.model.model_type == comfy.model_base.ModelType.V_PREDICTION
    model, _, _ = opened("m18")
    x = torch.randn(1, 4, 8, 8)
    sigma = torch.tensor([2.0])
    assert torch.allclose(
        model.model.model_sampling.calculate_denoised(sigma, torch.ones_like(x), x), x - 2.0
    )


def test_ids_and_mask_are_xlm_robertas(opened: Any) -> None:
    _, clip, _ = opened("m9")
    ids, _ = tokens_of(clip, CAT)
    real = (ids != 1).sum()
    assert ids.shape == (1, 77) and ids[0, 0] == 0 and ids[0, real - 1] == 2
    assert bool((ids[0, real:] == 1).all()) and 3 < real < 77


def test_weights_are_written_and_act_as_in_the_host(opened: Any) -> None:
    _, clip, _ = opened("m9")
    plain, empty = encode(clip, CAT)[0][0], encode(clip, "")[0][0]
    heavy = encode(clip, f"({CAT}:1.3)")[0][0]
    assert same(encode(clip, f"\uff08{CAT}\uff1a1.3\uff09")[0][0], heavy)
    _, weights = tokens_of(clip, f"({CAT}:1.3)")
    expected = empty + weights[..., None] * (plain - empty)
    assert torch.allclose(heavy, expected, atol=1e-5)
    assert not torch.allclose(heavy, plain)


def test_the_clip_is_a_clip(opened: Any) -> None:
    _, clip, _ = opened("m9")
    skipped = call(nodes.CLIPSetLastLayer, clip=clip, stop_at_clip_layer=-2)
    assert same(encode(skipped, CAT), encode(clip, CAT))  # the method knows no clip skip
    clone = clip.clone()
    assert clone.cond_stage_model is clip.cond_stage_model and same(encode(clone, CAT), encode(clip, CAT))
    management.unload_all_models()
    encode(clip, CAT)
    loaded = [entry.model.model for entry in management.current_loaded_models if entry.model is not None]
    assert loaded == [clip.cond_stage_model]
    with pytest.raises(BridgeError, match="cannot work on this CLIP"):
        bridged(Checkpoint("sd1", opened("m9")[0], clip, None))


def test_a_unet_lora_acts(opened: Any, models: Path) -> None:
    model, clip, _ = opened("m9")
    inputs = {"lora_name": "sd1.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    other, other_clip = call(nodes.LoraLoader, model=model, clip=clip, **inputs)
    conds = encode(clip, CAT), encode(clip, "")
    assert same(encode(other_clip, CAT), conds[0])
    assert not torch.equal(sample(other, *conds, steps=1), sample(model, *conds, steps=1))


def test_words_from_a_converted_tower(
    files: dict[str, Path], models: Path, tmp_path: Path, opened: Any
) -> None:
    path = tmp_path / "alone.ckpt"
    path.symlink_to(files["m9"])
    with pytest.raises(BridgeError, match="tokenizer of alone.ckpt is missing") as caught:
        open_checkpoint(path)
    assert "Make the folder alone" in str(caught.value)
    tower = models / "text_encoders" / "any-xlmr.safetensors"
    save_encoder(tower, single_tower("xlmr", vocab=90))
    try:
        with torch.inference_mode():
            _, clip, _ = open_checkpoint(path)
        assert same(encode(clip, CAT), encode(opened("m9")[1], CAT))
    finally:
        tower.unlink()


@pytest.mark.parametrize("what", ["stock", "no head", "wrong base", "not a number", "diffusion only"])
def test_other_files_are_refused_in_words(files: dict[str, Path], tmp_path: Path, what: str) -> None:
    state = open_pickle(files["m9"], weights_only=True)["state_dict"]
    if what == "stock":
        state = {key: value for key, value in state.items() if not key.startswith(TEXT)}
        state |= windows({f"{TEXT}transformer.text_model.final_layer_norm.weight": (768,)}, 1)
    elif what == "no head":
        state = {key: value for key, value in state.items() if "transformation" not in key}
    elif what == "wrong base":
        state = {k: v for k, v in state.items() if not k.startswith(UNET)} | {
            key: value for key, value in body(FAMILIES["sd2"]).items() if key.startswith(UNET)
        }
    elif what == "not a number":
        key = f"{TEXT}transformation.weight"
        state[key] = state[key].clone()
        state[key][0, 0] = float("nan")
    else:
        state = {key: value for key, value in state.items() if key.startswith(UNET)}
    with pytest.raises(BridgeError) as caught:
        open_checkpoint(write(tmp_path / "other.ckpt", state, tokenizer_files("xlmr")))
    assert len(str(caught.value).split("\n")) == 4


def test_a_safetensors_file_opens_too(files: dict[str, Path], tmp_path: Path, opened: Any) -> None:
    state = open_pickle(files["m9"], weights_only=True)["state_dict"]
    path = tmp_path / "m9.safetensors"
    save_file({key: value.half().contiguous().clone() for key, value in state.items()}, str(path))
    path.with_suffix("").mkdir()
    for name, content in tokenizer_files("xlmr").items():
        (path.with_suffix("") / name).write_bytes(content)
    with torch.inference_mode():
        _, clip, _ = open_checkpoint(path)
    rows, expected = encode(clip, CAT)[0][0], encode(opened("m9")[1], CAT)[0][0]
    assert (rows - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_node_opens_only_what_the_folder_lists(
    files: dict[str, Path], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(files["m9"].parent)
    known = {**folder_paths.folder_names_and_paths, "checkpoints": ([folder], {".ckpt"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    model, clip, vae = call(BridgeCheckpoint, checkpoint="m9.ckpt")
    assert encode(clip, CAT)[0][0].shape == (1, 77, 768) and model is not None and vae is not None
    print1 = BridgeCheckpoint.fingerprint_inputs(checkpoint="m9.ckpt")
    assert print1 != "m9.ckpt" and BridgeCheckpoint.fingerprint_inputs(checkpoint="gone") == "gone"
    for name in ("../x.ckpt", "gone.ckpt", str(files["m9"])):
        with pytest.raises(BridgeError, match="no checkpoint called"):
            call(BridgeCheckpoint, checkpoint=name)


def test_a_checkpoint_of_another_system_is_the_same_and_a_missing_one_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {**folder_paths.folder_names_and_paths, "checkpoints": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m9.safetensors").write_bytes(b"x")
    here = travel.model_path("checkpoints", "sub\\m9.safetensors", "checkpoint")
    assert here == tmp_path / "sub" / "m9.safetensors"
    assert BridgeCheckpoint.validate_inputs(checkpoint="sub\\m9.safetensors") is True
    assert BridgeCheckpoint.validate_inputs(checkpoint=None) is True  # it comes over a link
    assert BridgeCheckpoint.validate_inputs(checkpoint=3) is not True
    with pytest.raises(BridgeError, match="no checkpoint called") as caught:
        call(BridgeCheckpoint, checkpoint="Alt-Diffusion-M9.safetensors")
    text = str(caught.value)
    for part in ("6021 MB", "huggingface.co/webui/AltDiffusion-m9", "get altdiffusion-m9-checkpoint"):
        assert part in text
    for name in ("../m9.safetensors", str(here), "sub/../sub/m9.safetensors", "m9\0"):
        with pytest.raises(BridgeError, match="no checkpoint called"):
            call(BridgeCheckpoint, checkpoint=name)
