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
import comfy.text_encoders.t5
import pytest
import torch
import transformers
from comfy.text_encoders.aura_t5 import AuraT5Model, AuraT5Tokenizer
from safetensors.torch import save_file

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


# -- Flan-T5 in the host's class for Pile-T5 ------------------------------------------------------------

FLAN = {"d_model": 16, "d_kv": 8, "d_ff": 5120, "num_heads": 2, "num_layers": 24}
"""So narrow that the rest stays small: the host knows a T5-XL by its 24 layers and the 5120."""
FLAN_WINDOW = 40
SPOKEN = (
    "a red cat on the mat",
    "Two astronauts, riding a horse (at night)! 1.3",
    "caf\u00e9 d\u00e9j\u00e0 vu \u732b <extra_id_0>",
    "",
)


@pytest.fixture(scope="module")
def flan() -> torch.nn.Module:
    """transformers' own encoder with random weights, T5's one table of positions among them."""
    config = transformers.T5Config(**FLAN, vocab_size=32128, feed_forward_proj="gated-gelu")
    model = transformers.T5EncoderModel(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            table = weight.ndim == 1 or name.endswith(("shared.weight", "bias.weight"))
            weight.normal_(generator=generator).mul_(1.0 if table else weight.shape[-1] ** -0.5)
    return model


def write_flan(path: Path, flan: torch.nn.Module, **more: torch.Tensor) -> Path:
    state = {key: value.contiguous() for key, value in flan.state_dict().items() if "embed_tokens" not in key}
    save_file(state | more, str(path))
    return path


def table(layer: int) -> str:
    return f"encoder.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight"


def load_t5(path: Path) -> Any:
    """CLIPLoader's own function, with the small sizes."""
    options = {"pile_t5xl_model_config": FLAN, "dtype": torch.float32}
    with torch.inference_mode():
        return comfy.sd.load_clip(ckpt_paths=[str(path)], model_options=options)


def write_reader(path: Path, kind: str = "linear") -> str:
    bridge = create(
        kind,
        {"hidden": 16, "context": 768}
        | ({"queries": 4, "layers": 1, "channels": 16} if kind == "ella" else {}),
    )
    bridge.reset_parameters(torch.Generator().manual_seed(1))
    tower = EncoderRef("host", "flan-t5-xl-host", -1, FLAN_WINDOW, "pad")
    header = BridgeHeader(kind=kind, spec=dataclasses.asdict(bridge.spec), base="sd1", encoder=tower)
    save_bridge(path, header, bridge)
    return path.name


def test_flan_in_the_hosts_class_gives_the_ids_and_states_of_transformers(
    sd1: Checkpoint, folder: Path, flan: torch.nn.Module, tmp_path: Path
) -> None:
    clip = load_t5(write_flan(tmp_path / "flan.safetensors", flan))
    words = Path(comfy.text_encoders.t5.__file__).with_name("t5_tokenizer")
    judge = transformers.T5TokenizerFast.from_pretrained(str(words))
    name = write_reader(folder / "flan.safetensors")
    _, bridged_clip = bridged(sd1, bridge=name, tower=clip, route="native only")
    encoder = bridged_clip.speech.tower.encoder
    plain = load_bridge(folder / name).bridge
    for text in SPOKEN:
        asked = judge(text, padding="max_length", max_length=FLAN_WINDOW, return_tensors="pt")
        ids, mask = encoder.frame([piece.id for piece in encoder.tokenize(text)])
        assert ids.tolist() == asked["input_ids"][0].tolist()
        assert mask.tolist() == asked["attention_mask"][0].bool().tolist()
        with torch.inference_mode():
            states = flan(**asked).last_hidden_state
            found = encoder(ids[None], mask[None]).states
            rows = plain(Hidden(states, mask[None])).context
        assert states.abs().max() > 1
        torch.testing.assert_close(found, states, rtol=1e-5, atol=1e-5)
        if text.isascii() and "(" not in text:  # the others mean something in a prompt
            torch.testing.assert_close(encode(bridged_clip, text)[0][0], rows, rtol=1e-5, atol=1e-5)
    assert [piece.start for piece in encoder.tokenize("a red cat")] == [0, 0, 1, 5]


def test_the_hosts_clip_is_left_as_it_was(
    sd1: Checkpoint, folder: Path, flan: torch.nn.Module, tmp_path: Path
) -> None:
    clip = load_t5(write_flan(tmp_path / "flan.safetensors", flan))
    inner = clip.cond_stage_model.pile_t5xl
    tables = [
        block.layer[0].SelfAttention.relative_attention_bias for block in inner.transformer.encoder.block
    ]
    with torch.inference_mode():
        for number, module in enumerate(tables[1:]):
            module.weight.fill_(0.1 * number)  # the file has none, so they hold whatever was in memory
    before, facts = stock(clip, "a red cat"), dict(inner.special_tokens)
    _, bridged_clip = bridged(sd1, bridge=write_reader(folder / "flan.safetensors"), tower=clip)
    assert torch.isfinite(encode(bridged_clip, "\u732b")[0][0]).all()
    after = [
        block.layer[0].SelfAttention.relative_attention_bias for block in inner.transformer.encoder.block
    ]
    assert all(one is other for one, other in zip(after, tables, strict=True))
    assert inner.special_tokens == facts and inner.enable_attention_masks and inner.zero_out_masked
    assert torch.equal(stock(clip, "a red cat"), before)


def test_ella_reads_a_borrowed_flan_at_every_step(
    sd1: Checkpoint, folder: Path, flan: torch.nn.Module, tmp_path: Path
) -> None:
    clip = load_t5(write_flan(tmp_path / "flan.safetensors", flan))
    model, bridged_clip = bridged(
        sd1, bridge=write_reader(folder / "ella.safetensors", "ella"), tower=clip, route="native only"
    )
    conds = encode(bridged_clip, "a red cat"), encode(bridged_clip, "")
    assert conds[0][0][0].shape == (1, 4, 768) and not same(*conds)
    assert torch.isfinite(sample(model, *conds)).all()


def test_what_cannot_be_shown_to_be_flan_is_refused_with_the_road_that_works(
    sd1: Checkpoint, folder: Path, flan: torch.nn.Module, lent: Any, tmp_path: Path
) -> None:
    name = write_reader(folder / "flan.safetensors")

    def refusal(clip: Any) -> str:
        with pytest.raises(BridgeError, match="cannot be shown") as caught:
            bridged(sd1, bridge=name, tower=clip)
        assert "ella-sd1.5-tsc-t5xl" in caught.value.action and "CLIPLoader" in caught.value.action
        return caught.value.found

    pile = {table(layer): torch.randn(32, 2) for layer in range(1, 24)}
    assert "24 tables" in refusal(load_t5(write_flan(tmp_path / "pile.safetensors", flan, **pile)))
    one = {table(23): torch.randn(32, 2)}
    assert "2 tables" in refusal(load_t5(write_flan(tmp_path / "one.safetensors", flan, **one)))
    assert "does not say which file" in refusal(lent)
    assert "CLIPTextModel" in refusal(sd1.clip)
    state = {key: value.clone() for key, value in flan.state_dict().items() if key != "shared.weight"}
    save_file(
        {key: value for key, value in state.items() if "embed_tokens" not in key},
        str(tmp_path / "no.safetensors"),
    )
    assert "without ['shared.weight']" in refusal(load_t5(tmp_path / "no.safetensors"))
    torch.save(flan.state_dict(), tmp_path / "flan.pt")
    assert "flan.pt" in refusal(load_t5(tmp_path / "flan.pt"))


def test_a_t5_is_not_read_as_pile_t5_either(
    sd1: Checkpoint, folder: Path, flan: torch.nn.Module, tmp_path: Path
) -> None:
    """The host fills one of its 24 tables, says so in the log, and would paint."""
    name = write(folder / "own.safetensors", hidden=16, window=40)
    with pytest.raises(BridgeError, match="cannot serve as a text tower") as caught:
        bridged(sd1, bridge=name, tower=load_t5(write_flan(tmp_path / "flan.safetensors", flan)))
    assert "all but 23 tables" in caught.value.found
    pile = {table(layer): torch.randn(32, 2) for layer in range(1, 24)}
    whole = load_t5(write_flan(tmp_path / "pile.safetensors", flan, **pile))
    _, clip = bridged(sd1, bridge=name, tower=whole, route="native only")
    assert encode(clip, "un gatto")[0][0].shape == (1, 40, 768)


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
