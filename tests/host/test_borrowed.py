"""A bridge can read a text tower that ComfyUI itself loaded: its numbers, its tokenizer, its memory."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import comfy.supported_models_base
import pytest
import torch
from comfy.text_encoders.aura_t5 import AuraT5Model, AuraT5Tokenizer

import nodes
from language_bridge.bridges.base import Hidden, create
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import BridgeHeader, EncoderRef, load_bridge, save_bridge
from language_bridge.nodes.language_bridge import LanguageBridge
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, encode, same, sample

WINDOW = 256
"""Where the stock tokenizer of this tower pads to, so that its own node gives the same states."""

RED_CAT = "un gatto rosso, (sic)"
WIDTH = 64


def t5(seed: int = 0) -> Any:
    """A real CLIP of the host around a tiny T5, as CLIPLoader makes it of T5-XL."""
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 2}
    with torch.inference_mode():
        clip = comfy.sd.CLIP(
            comfy.supported_models_base.ClipTarget(AuraT5Tokenizer, AuraT5Model),
            model_options={"pile_t5xl_model_config": sizes},
        )
        generator = torch.Generator().manual_seed(seed)
        for weight in clip.cond_stage_model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return clip


@pytest.fixture(scope="module")
def lent() -> Any:
    """The tower that the tests borrow."""
    return t5()


def write(
    path: Path, kind: str = "linear", *, hidden: int = WIDTH, window: int = WINDOW, **training: Any
) -> str:
    spec: dict[str, object] = {"hidden": hidden, "context": 768}
    if kind == "ella":
        spec |= {"queries": 64, "layers": 1, "channels": 16}
    bridge = create(kind, spec)
    bridge.reset_parameters(torch.Generator().manual_seed(1))
    header = BridgeHeader(
        kind=kind,
        spec=dataclasses.asdict(bridge.spec),
        base="sd1",
        encoder=EncoderRef("host", "tiny-t5", -1, window, "pad"),
        training=training,
    )
    save_bridge(path, header, bridge)
    return path.name


@pytest.fixture
def folder(models: Path) -> Iterator[Path]:
    """The bridge folder; what a test puts there is gone after it."""
    place = models / "language_bridges"
    before = set(place.iterdir())
    yield place
    for path in set(place.iterdir()) - before:
        path.unlink()


def stock(clip: Any, text: str) -> torch.Tensor:
    """The host's own encoding of a text without weights, [1, T, D]."""
    return call(nodes.CLIPTextEncode, clip=clip, text=text.replace("(", "\\(").replace(")", "\\)"))[0][0]


def test_the_rows_are_the_bridge_over_the_hosts_own_states(sd1: Checkpoint, folder: Path, lent: Any) -> None:
    name = write(folder / "lent.safetensors")
    _, clip = bridged(sd1, bridge=name, tower=lent, route="native only")
    plain = load_bridge(folder / name).bridge
    for text in ("un gatto rosso", ""):
        with torch.inference_mode():
            expected = torch.nn.functional.linear(
                stock(lent, text), plain.get_parameter("context.weight"), plain.get_parameter("context.bias")
            )
        got = encode(clip, text)[0][0]
        assert got.shape == (1, WINDOW, 768)
        assert torch.allclose(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2])
def test_the_layer_is_the_bridges_and_not_the_towers_own(
    sd1: Checkpoint, load: Callable[..., Checkpoint], folder: Path, layer: int
) -> None:
    tower = load("sd2").clip  # its class reads the last layer but one by itself
    bridge = create("linear", {"hidden": 1024, "context": 768})
    bridge.reset_parameters(torch.Generator().manual_seed(1))
    reference = EncoderRef("host", "clip-h", layer, 77, "none")
    spec = dataclasses.asdict(bridge.spec)
    header = BridgeHeader(kind="linear", spec=spec, base="sd1", encoder=reference)
    save_bridge(folder / "layer.safetensors", header, bridge)
    _, clip = bridged(sd1, bridge="layer.safetensors", tower=tower, route="native only")
    with torch.inference_mode():
        expected = bridge(Hidden(stock(tower, "a cat"), torch.ones(1, 77, dtype=torch.bool))).context
    assert torch.allclose(encode(clip, "a cat")[0][0], expected, atol=1e-5) == (layer == -2)
    assert torch.isfinite(encode(clip, "a cat")[0][0]).all()
    assert same(stock(tower, "a cat"), stock(load("sd2").clip, "a cat"))


def test_two_streams_weights_and_pictures(sd1: Checkpoint, folder: Path, lent: Any) -> None:
    model, clip = bridged(sd1, bridge=write(folder / "lent.safetensors"), tower=lent)
    assert same(encode(clip, "a big dog"), encode(sd1.clip, "a big dog"))
    mixed = encode(clip, "\u732b, a big dog")[0][0]
    assert torch.equal(mixed[:, WINDOW:], encode(sd1.clip, "a big dog")[0][0])
    assert not same(encode(clip, "(\u732b:1.3)"), encode(clip, "\u732b"))
    assert torch.isfinite(sample(model, encode(clip, "\u732b"), encode(clip, ""))).all()
    assert model is sd1.model


def test_long_prompts_are_several_windows(sd1: Checkpoint, folder: Path, lent: Any) -> None:
    _, clip = bridged(sd1, bridge=write(folder / "s.safetensors", window=8), tower=lent, route="native only")
    assert clip.speech.tower.encoder.capacity == 7  # this tokenizer ends a text with one token
    text = "uno due tre quattro cinque " * 5
    pieces = len(clip.speech.tower.encoder.tokenize(text))
    assert pieces > 14 and encode(clip, text)[0][0].shape[1] == 8 * -(-pieces // 7)


def test_a_timed_bridge_reads_a_borrowed_tower(sd1: Checkpoint, folder: Path, lent: Any) -> None:
    name = write(folder / "timed.safetensors", "ella")
    model, clip = bridged(sd1, bridge=name, tower=lent)
    conds = encode(clip, "\u732b"), encode(clip, "")
    management.unload_all_models()
    assert torch.isfinite(sample(model, *conds)).all()
    loaded = [entry.model.model for entry in management.current_loaded_models if entry.model is not None]
    assert clip.speech.tower.bridge in loaded and lent.cond_stage_model not in loaded


def test_the_tower_stays_the_hosts(
    sd1: Checkpoint, folder: Path, lent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stock(lent, "un gatto")
    _, clip = bridged(sd1, bridge=write(folder / "lent.safetensors"), tower=lent)
    tower = clip.speech.tower
    assert tower.patcher is lent.patcher and tower.patcher.model is lent.cond_stage_model
    loads: list[Any] = []
    load = management.load_models_gpu
    monkeypatch.setattr(
        management, "load_models_gpu", lambda models, *a, **o: loads.append(models) or load(models, *a, **o)
    )
    first = encode(clip, "\u732b")
    assert loads and lent.patcher in loads[0]
    loads.clear()
    assert same(encode(clip, "\u732b"), first) and not loads
    assert torch.equal(stock(lent, "un gatto"), before)


def test_another_tower_or_a_lora_on_it_is_heard_anew(sd1: Checkpoint, folder: Path, lent: Any) -> None:
    name = write(folder / "lent.safetensors")
    first = encode(bridged(sd1, bridge=name, tower=lent)[1], "\u732b")
    other = t5(seed=1)
    assert not same(encode(bridged(sd1, bridge=name, tower=other)[1], "\u732b"), first)
    patched = lent.clone()
    key = next(key for key in patched.cond_stage_model.state_dict() if key.endswith("SelfAttention.v.weight"))
    shape = patched.cond_stage_model.state_dict()[key].shape
    patched.add_patches({key: ("diff", (torch.ones(shape),))})
    assert not same(encode(bridged(sd1, bridge=name, tower=patched)[1], "\u732b"), first)
    assert same(encode(bridged(sd1, bridge=name, tower=lent)[1], "\u732b"), first)


def test_a_template_stands_around_the_prompt(sd1: Checkpoint, folder: Path, lent: Any) -> None:
    template = {"before": "una foto di", "after": "molto bella"}
    plain = write(folder / "plain.safetensors")
    around = write(folder / "around.safetensors", template=template)
    _, with_template = bridged(sd1, bridge=around, tower=lent, route="native only")
    _, without = bridged(sd1, bridge=plain, tower=lent, route="native only")
    assert same(encode(with_template, "gatto"), encode(without, "una foto di gatto molto bella"))
    chunk = with_template.tokenize("gatto", return_word_ids=True)["native"][0]
    assert [word for _, _, word in chunk].count(0) < len(chunk) < WINDOW + 1


def test_a_dropped_tower_is_let_go(sd1: Checkpoint, folder: Path) -> None:
    own = t5(seed=2)
    _, clip = bridged(sd1, bridge=write(folder / "lent.safetensors"), tower=own)
    encode(clip, "\u732b")
    model = weakref.ref(own.cond_stage_model)
    del own, clip
    gc.collect()
    management.cleanup_models_gc()
    management.cleanup_models()
    gc.collect()
    assert model() is None


def test_what_does_not_fit_is_refused_in_words(
    sd1: Checkpoint, sdxl: Checkpoint, folder: Path, lent: Any
) -> None:
    name = write(folder / "lent.safetensors")

    def refusal(**inputs: Any) -> str:
        with pytest.raises(BridgeError) as caught:
            bridged(sd1, **inputs)
        assert len(str(caught.value).split("\n")) == 4
        return str(caught.value)

    assert "CLIPLoader" in refusal(bridge=name)
    text = refusal(bridge=write(folder / "wide.safetensors", hidden=2048), tower=lent)
    assert "64" in text and "2048" in text
    assert "one text model" in refusal(bridge=name, tower=sdxl.clip)
    assert "bridged" in refusal(bridge=name, tower=bridged(sd1)[1])
    assert "Disconnect" in refusal(tower=lent)
    assert "room for" in refusal(bridge=write(folder / "small.safetensors", window=1), tower=lent)


def test_the_fingerprint_follows_the_bridge_file(folder: Path) -> None:
    name = write(folder / "lent.safetensors")
    before = LanguageBridge.fingerprint_inputs(bridge=name)
    write(folder / "lent.safetensors", hidden=32)
    assert LanguageBridge.fingerprint_inputs(bridge=name) != before != name
