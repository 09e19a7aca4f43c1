"""What every family of towers promises; a new family is tested here the moment its file exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import families, guard, identify_encoder
from language_bridge.encoders.base import RootMeanSquareNorm
from language_bridge.encoders.file import load_encoder, read_encoder_header, save_encoder
from language_bridge.tests.bridges.toys import MarkedOps
from language_bridge.tests.encoders.toys import SPEECH, TEXTS, TOYS, tokenizer_files

FAMILIES = sorted(families())
SINGLE = [family for family in FAMILIES if family != "dual"]
CONFIG = {"num_attention_heads": 4}
STRANGERS = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "visual.transformer.resblocks.0.attn.in_proj_weight": (96, 32),
    "vision_model.embeddings.class_embedding": (32,),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    "logit_scale": (),
}
ALL_TEXTS = [*TEXTS, *SPEECH]

family_parameter = pytest.mark.parametrize("family", FAMILIES)
single_parameter = pytest.mark.parametrize("family", SINGLE)


def test_every_family_has_a_toy() -> None:
    assert sorted(TOYS) == FAMILIES


@family_parameter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_then_load_is_bit_equal(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tower = TOYS[family]().to(dtype)
    header = save_encoder(tmp_path / "toy", tower, languages=["zh"])
    assert header.family == family and read_encoder_header(tmp_path / "toy") == header
    loaded = load_encoder(tmp_path / "toy", dtype=dtype)
    before, after = tower.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    first, second = tower(*tower.batch(ALL_TEXTS)), loaded(*loaded.batch(ALL_TEXTS))
    assert torch.equal(first.states, second.states)
    assert [p.start for p in tower.tokenize("a cat")] == [p.start for p in loaded.tokenize("a cat")]


@family_parameter
def test_shapes_are_the_ones_it_announces(family: str) -> None:
    tower = TOYS[family]()
    ids, mask = tower.batch(ALL_TEXTS)
    assert ids.shape == mask.shape == (len(ALL_TEXTS), 24) and ids.dtype == torch.int64
    assert int(ids.min()) >= 0 and int(ids.max()) < tower.vocabulary_size
    hidden = tower(ids, mask)
    assert hidden.states.shape == (len(ALL_TEXTS), 24, tower.width)
    pooled = None if hidden.pooled is None else tuple(hidden.pooled.shape)
    assert pooled == ((len(ALL_TEXTS), tower.pooled_width) if tower.pooled_width else None)
    assert torch.equal(hidden.mask, mask) and torch.isfinite(hidden.states).all()


@family_parameter
def test_a_frame_holds_its_capacity_and_no_more(family: str) -> None:
    tower = TOYS[family](window=8)
    number = tower.tokenize("cat")[-1].id
    ids, mask = tower.frame([number] * tower.capacity)
    assert ids.shape == mask.shape == (8,) and mask.all() and mask.dtype == torch.bool
    assert not tower.frame([])[1].all()
    with pytest.raises(BridgeError, match=f"{tower.capacity + 1} tokens"):
        tower.frame([number] * (tower.capacity + 1))


@family_parameter
def test_the_mask_can_be_read_off_framed_ids(family: str) -> None:
    tower = TOYS[family]()
    ids, mask = tower.batch(ALL_TEXTS)
    assert torch.equal(tower.mask_of(ids), mask)
    full, whole = tower.frame([tower.tokenize("cat")[-1].id] * tower.capacity)
    assert torch.equal(tower.mask_of(full[None])[0], whole)


@family_parameter
def test_pieces_lie_in_the_text_in_order(family: str) -> None:
    tower = TOYS[family]()
    for text in ALL_TEXTS:
        pieces = tower.tokenize(text)
        assert all(0 <= piece.start <= piece.end <= len(text) for piece in pieces)
        starts = [piece.start for piece in pieces]
        assert starts == sorted(starts)
    assert tower.tokenize("") == []


@family_parameter
def test_pieces_say_which_words_they_are(family: str) -> None:
    text = "red \u732b cat"
    spans = [text[piece.start : piece.end].strip() for piece in TOYS[family]().tokenize(text)]
    spoken = [span for span, before in zip(spans, ["", *spans], strict=False) if span and span != before]
    assert "".join(spoken).startswith("r") and "\u732b" in spoken and spoken[-1][-1] == "t"


@family_parameter
def test_a_longer_window_does_not_change_what_real_tokens_say(family: str) -> None:
    short, long = TOYS[family](), TOYS[family](window=36)
    text = "a red cat"
    (few, few_mask), (many, many_mask) = short.batch([text]), long.batch([text])
    real = int(few_mask.sum())
    assert real == int(many_mask.sum()) < 24
    with torch.no_grad():
        first, second = short(few, few_mask), long(many, many_mask)
    torch.testing.assert_close(first.states[:, :real], second.states[:, :real], rtol=0, atol=1e-4)


@family_parameter
def test_alone_and_in_a_batch_are_the_same(family: str) -> None:
    tower = TOYS[family]()
    ids, mask = tower.batch(ALL_TEXTS)
    with torch.no_grad():
        together = tower(ids, mask).states
        for row in range(0, len(ALL_TEXTS), 5):
            alone = tower(ids[row : row + 1], mask[row : row + 1]).states
            torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-4)


@family_parameter
def test_layers_come_from_ops_under_the_same_keys(family: str) -> None:
    plain, hosted = TOYS[family](), TOYS[family](ops=MarkedOps) if family != "dual" else None
    shapes = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
    assert type(plain).own_shapes(plain.spec) == shapes
    if hosted is None:
        return
    assert list(plain.state_dict()) == list(hosted.state_dict())
    layers = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding)
    made = {type(module).__qualname__ for module in hosted.modules() if isinstance(module, layers)}
    assert made and all(name.startswith("MarkedOps.") for name in made)
    # No weight hides in a module that the host does not know, but for the scales, which follow the states.
    known = (*layers, RootMeanSquareNorm)
    owners = [module for module in hosted.modules() if list(module.parameters(recurse=False))]
    assert all(isinstance(module, known) for module in owners)


@family_parameter
def test_every_weight_learns(family: str) -> None:
    tower = TOYS[family]()
    hidden = tower(*tower.batch(ALL_TEXTS))
    loss = (hidden.states * torch.randn(hidden.states.shape)).sum()
    if hidden.pooled is not None:
        loss = loss + (hidden.pooled * torch.randn(hidden.pooled.shape)).sum()
    loss.backward()
    assert not [name for name, value in tower.named_parameters() if value.grad is None]


@single_parameter
def test_every_layer_can_be_chosen(family: str) -> None:
    seen = []
    for layer in (0, 1, 2):
        by_start, by_end = TOYS[family](layer=layer), TOYS[family](layer=layer - 3)
        ids, mask = by_start.batch(TEXTS[:2])
        states = by_start(ids, mask).states
        assert torch.equal(states, by_end(ids, mask).states)
        seen.append(states)
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])


@single_parameter
@pytest.mark.parametrize("stem", ["", "text_encoder.", "a.b."])
def test_a_published_file_is_known_whatever_surrounds_it(family: str, stem: str) -> None:
    tower = TOYS[family]()
    state = {stem + key: value for key, value in tower.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()} | STRANGERS
    found, spec = identify_encoder(shapes, CONFIG)
    assert found is type(tower) and (spec.width, spec.layers, spec.vocab) == (32, 2, tower.spec.vocab)
    adopted = found.adopt(Spy(state), spec)
    assert list(adopted) == list(tower.state_dict())
    assert all(torch.equal(value, tower.state_dict()[key]) for key, value in adopted.items())


class Spy(Mapping[str, torch.Tensor]):
    """Tensors among strangers that must not be touched."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        assert name not in STRANGERS
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.tensors, *STRANGERS])

    def __len__(self) -> int:
        return len(self.tensors) + len(STRANGERS)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors or name in STRANGERS


@single_parameter
def test_a_tower_that_is_not_whole_is_refused(family: str) -> None:
    tower = TOYS[family]()
    state = tower.state_dict()
    for lost in list(state):
        if "projection" in lost:
            continue
        rest = {key: value for key, value in state.items() if key != lost}
        with pytest.raises(BridgeError, match="does not hold one text tower"):
            identify_encoder({key: tuple(value.shape) for key, value in rest.items()}, CONFIG)
    rest = {key: value for key, value in state.items() if key != lost}
    with pytest.raises(BridgeError, match=lost):
        type(tower).adopt(rest, tower.spec)
    with pytest.raises(BridgeError, match="odd tensor"):
        type(tower).adopt(state | {lost: torch.zeros(5)}, tower.spec)


@single_parameter
@pytest.mark.parametrize("shape", [(), (0, 0), (5, 7), (1 << 40, 1 << 40)])
def test_odd_shapes_never_raise_anything_else(family: str, shape: tuple[int, ...]) -> None:
    tower = families()[family]
    shapes = {key: tuple(value.shape) for key, value in TOYS[family]().state_dict().items()}
    for number, changed in enumerate(shapes):
        with contextlib.suppress(BridgeError):
            assert tower.recognise(shapes | {changed: shape}, CONFIG if number % 2 else {}) is None


@single_parameter
@pytest.mark.parametrize("value", [None, 0, -4, 7, 1e300, "four", True, [], {}, float("nan")])
def test_odd_configs_never_raise_anything_else(family: str, value: object) -> None:
    tower = families()[family]
    shapes = {key: tuple(value.shape) for key, value in TOYS[family]().state_dict().items()}
    names = (
        *("num_attention_heads", "layer_norm_eps", "hidden_act", "text_config", "rope_theta", "rope_scaling"),
        *("rope_parameters", "head_dim", "rms_norm_eps", "bos_token_id", "eos_token_id", "model_type"),
        *("max_position_embeddings", "feed_forward_proj", "relative_attention_max_distance"),
    )
    for name in names:
        try:
            tower.recognise(shapes, CONFIG | {name: value})
        except BridgeError as error:
            assert error.action


@single_parameter
def test_two_towers_in_one_file_are_refused(family: str) -> None:
    state = TOYS[family]().state_dict()
    shapes = {f"{stem}{key}": tuple(v.shape) for key, v in state.items() for stem in ("one.", "two.")}
    with pytest.raises(BridgeError, match="several text towers"):
        identify_encoder(shapes, CONFIG)


def test_a_file_without_tower_is_refused() -> None:
    with pytest.raises(BridgeError, match="claimed by nobody") as caught:
        identify_encoder(STRANGERS, {})
    assert "logit_scale []" in str(caught.value) and "what to do:" in str(caught.value)


@family_parameter
def test_a_missing_tokenizer_is_named(family: str) -> None:
    with pytest.raises(BridgeError, match="what to do:") as caught:
        families()[family].tokenizer_from({"preprocessor_config.json": b"{}"})
    assert "preprocessor_config.json" in caught.value.found


@single_parameter
def test_a_published_tokenizer_json_is_taken_as_it_is(family: str) -> None:
    tower = TOYS[family]()
    assert type(tower).tokenizer_from({"tokenizer.json": tower.tokenizer_json}) == tower.tokenizer_json
    with pytest.raises(BridgeError, match="tokenizer cannot be used"):
        type(tower).tokenizer_from({"tokenizer.json": b"{}"})
    with pytest.raises(BridgeError, match="what to do:"):
        type(tower).tokenizer_from(dict.fromkeys(tokenizer_files(family), b"\n\xff\x00broken"))


@family_parameter
@pytest.mark.parametrize("cut", [0, 1, 2, 100])
def test_a_damaged_tokenizer_is_refused(family: str, cut: int) -> None:
    tower = TOYS[family]()
    with pytest.raises(BridgeError, match="what to do:"):
        type(tower)(tower.spec, tower.tokenizer_json[:cut], identity="toy", window=24, device="meta")


@family_parameter
@pytest.mark.parametrize(
    "odd", [{"window": 41}, {"window": 1}, {"layer": 3}, {"layer": -4}, {"mask_rule": "causal"}]
)
def test_odd_arguments_are_refused(family: str, odd: dict[str, object]) -> None:
    tower = TOYS[family]()
    build = {"identity": "toy", "window": 24, "device": "meta"} | odd
    if family == "dual" and "mask_rule" in odd:
        return  # each half has its own
    with pytest.raises(BridgeError, match="what to do:"):
        type(tower)(tower.spec, tower.tokenizer_json, **build)


def test_the_meta_device_takes_no_memory() -> None:
    for family in SINGLE:
        shapes = guard.shapes_of(TOYS[family](device="meta"))
        assert shapes == families()[family].own_shapes(TOYS[family]().spec)
