"""The BERT tower against transformers: the same numbers, the same token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import create_encoder, families
from language_bridge.encoders.bert import Bert, BertSpec, bert_tokenizer
from language_bridge.tests.bridges.toys import MarkedOps
from language_bridge.tests.encoders.toys import TEXTS, VOCABULARY, toy_tower


def reference(tower: Bert) -> torch.nn.Module:
    """transformers' BertModel with the tower's weights."""
    from transformers import BertConfig, BertModel

    spec = tower.spec
    assert isinstance(spec, BertSpec)
    model = BertModel(
        BertConfig(
            vocab_size=spec.vocab,
            hidden_size=spec.width,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            intermediate_size=spec.inner,
            max_position_embeddings=spec.window,
            layer_norm_eps=spec.eps,
        ),
        add_pooling_layer=False,
    ).eval()
    left = model.load_state_dict(tower.state_dict(), strict=False)
    assert not left.unexpected_keys and not [key for key in left.missing_keys if "position_ids" not in key]
    return model


@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1, 2])
@pytest.mark.parametrize("mask_rule", ["pad", "none"])
def test_states_equal_the_reference(layer: int, mask_rule: str) -> None:
    tower = toy_tower(layer=layer, mask_rule=mask_rule)
    ids, mask = tower.batch(TEXTS)
    seen = mask if mask_rule == "pad" else torch.ones_like(mask)
    with torch.no_grad():
        hidden = tower(ids, mask)
        states = reference(tower)(ids, attention_mask=seen.long(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden.states, states[layer], rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden.pooled, states[layer][:, 0], rtol=0, atol=1e-5)
    assert torch.equal(hidden.mask, mask)


def test_states_without_padding_equal_the_reference() -> None:
    tower = toy_tower()
    ids = torch.randint(5, len(VOCABULARY), (3, 24), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        states = tower(ids, torch.ones_like(ids, dtype=torch.bool)).states
        expected = reference(tower)(ids).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def reference_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    from transformers import BertTokenizer

    path: Path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    try:
        return BertTokenizer(str(path))
    except TypeError:  # transformers 5 takes the vocabulary itself
        return BertTokenizer(vocab=dict(zip(VOCABULARY, range(len(VOCABULARY)), strict=True)))


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_equal_the_reference(text: str, reference_tokenizer: object) -> None:
    tower = toy_tower(window=40)
    ids = [piece.id for piece in tower.tokenize(text)]
    assert ids == reference_tokenizer(text, add_special_tokens=False)["input_ids"]
    framed, mask = tower.frame(ids[: tower.capacity])
    full = reference_tokenizer(text, padding="max_length", truncation=True, max_length=40)
    assert framed.tolist() == full["input_ids"] and mask.long().tolist() == full["attention_mask"]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.text(st.sampled_from("\u732b\u7ea2 ,.!()acdert1\u00e9\u0130\u3000\uff0c\U0001f431\u0301"), max_size=30)
)
def test_pieces_lie_in_the_text_in_order(text: str) -> None:
    tower = tower_for_text()
    pieces = tower.tokenize(text)
    assert all(0 <= piece.start < piece.end <= len(text) for piece in pieces)
    assert all(a.end <= b.start for a, b in zip(pieces, pieces[1:], strict=False) if a.end != b.end)


def tower_for_text(kept: list[Bert] = []) -> Bert:  # noqa: B006 (built once for all examples)
    if not kept:
        kept.append(toy_tower())
    return kept[0]


def test_pieces_say_where_they_come_from() -> None:
    text = "\u4e00 Cats\u732b"
    pieces = toy_tower().tokenize(text)
    assert [text[piece.start : piece.end] for piece in pieces] == ["\u4e00", "Cat", "s", "\u732b"]
    assert [VOCABULARY[piece.id] for piece in pieces] == ["\u4e00", "cat", "##s", "\u732b"]


def test_a_frame_holds_its_window_and_no_more() -> None:
    tower = toy_tower(window=6)
    ids, mask = tower.frame([7, 8])
    assert ids.tolist() == [2, 7, 8, 3, 0, 0] and mask.tolist() == [True] * 4 + [False] * 2
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    ids, mask = tower.frame([7] * 4)
    assert ids.tolist() == [2, 7, 7, 7, 7, 3] and mask.all()
    with pytest.raises(BridgeError, match="5 tokens"):
        tower.frame([7] * 5)
    assert tower.batch(["a " * 50, ""])[0].shape == (2, 6)


def test_padding_does_not_leak_under_the_pad_rule() -> None:
    tower = toy_tower()
    ids, mask = tower.batch(TEXTS[:1])
    other = torch.where(mask, ids, 9)
    changed, kept = tower(other, mask).states, tower(ids, mask).states
    torch.testing.assert_close(changed[mask], kept[mask], rtol=0, atol=1e-6)
    tower.mask_rule = "none"
    assert (tower(other, mask).states[mask] - tower(ids, mask).states[mask]).abs().max() > 1e-3


def test_alone_and_in_a_batch_are_the_same() -> None:
    tower = toy_tower()
    ids, mask = tower.batch(TEXTS)
    together = tower(ids, mask).states
    for row in range(len(TEXTS)):
        alone = tower(ids[row : row + 1], mask[row : row + 1]).states
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=2e-5)


def test_a_projection_reads_the_last_layer() -> None:
    tower, plain = toy_tower(projection=12, layer=-2), toy_tower()
    assert (tower.pooled_width, plain.pooled_width, tower.width) == (12, 32, 32)
    tower.load_state_dict(plain.state_dict() | {"text_projection.weight": torch.randn(12, 32)})
    ids, mask = tower.batch(TEXTS)
    hidden, last = tower(ids, mask), plain(ids, mask)
    assert hidden.pooled is not None and hidden.pooled.shape == (len(TEXTS), 12)
    expected = last.pooled @ tower.state_dict()["text_projection.weight"].T
    torch.testing.assert_close(hidden.pooled, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(hidden.states, last.states)


def test_it_learns() -> None:
    """Every parameter that is used gets a gradient; a few steps bring two captions apart."""
    tower = toy_tower()
    ids, mask = tower.batch(["\u7ea2\u732b", "\u732b\u7ea2"])
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-3)
    losses: list[float] = []
    for _ in range(12):
        states = tower(ids, mask).pooled
        loss = torch.nn.functional.cosine_similarity(states[0], states[1], dim=0)
        optimizer.zero_grad()
        loss.backward()
        assert not [name for name, value in tower.named_parameters() if value.grad is None]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2


def test_layers_come_from_ops_under_the_same_keys() -> None:
    plain, hosted = toy_tower(projection=4), toy_tower(projection=4, ops=MarkedOps)
    assert list(plain.state_dict()) == list(hosted.state_dict())
    layers = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding)
    assert {type(m).__qualname__ for m in hosted.modules() if isinstance(m, layers)} == {
        f"MarkedOps.{layer.__name__}" for layer in layers
    }


def test_the_start_is_the_usual_one_and_seeded() -> None:
    tower = toy_tower()
    for _ in range(2):
        tower.reset_parameters(torch.Generator().manual_seed(7))
        state = {key: value.clone() for key, value in tower.state_dict().items()}
        assert all(
            (value == ("LayerNorm.weight" in key)).all() for key, value in state.items() if value.ndim == 1
        )
        words = state["embeddings.word_embeddings.weight"]
        assert abs(float(words.std()) - 0.02) < 1e-3
    tower.reset_parameters(torch.Generator().manual_seed(7))
    assert all(torch.equal(value, state[key]) for key, value in tower.state_dict().items())


@pytest.mark.parametrize(
    "vocabulary", [[], VOCABULARY[1:], VOCABULARY + ["cat"], [t for t in VOCABULARY if t != "[SEP]"]]
)
def test_an_odd_vocabulary_is_refused(vocabulary: list[str]) -> None:
    with pytest.raises(BridgeError, match="cannot make a BERT tokenizer"):
        bert_tokenizer(vocabulary)


@pytest.mark.parametrize(
    "tokenizer",
    [
        b"",
        b"{}",
        b"\xff",
        b'{"model": {"type": "WordPiece"}}',
        bert_tokenizer(VOCABULARY)[:-20],
        bert_tokenizer(VOCABULARY).replace(b"[SEP]", b"[END]"),
        bert_tokenizer([*VOCABULARY, "one more"]),
    ],
)
def test_an_odd_tokenizer_is_refused(tokenizer: bytes) -> None:
    with pytest.raises(BridgeError, match="tokenizer cannot be used"):
        Bert(toy_tower().spec, tokenizer, identity="toy", window=24)


@pytest.mark.parametrize(
    "odd",
    [
        {"window": 41},
        {"window": 1},
        {"layer": 3},
        {"layer": -4},
        {"mask_rule": "causal"},
        {"heads": 5},
        {"width": 0},
        {"layers": 10_000},
        {"eps": 0.0},
        {"stranger": 1},
    ],
)
def test_odd_arguments_are_refused(odd: dict[str, object]) -> None:
    spec: dict[str, object] = {
        "vocab": len(VOCABULARY),
        "width": 32,
        "layers": 2,
        "heads": 4,
        "inner": 48,
        "window": 40,
    }
    build: dict[str, object] = {"identity": "toy", "window": 24}
    for name, value in odd.items():
        (build if name in ("window", "layer", "mask_rule") else spec)[name] = value
    with pytest.raises(BridgeError, match="what to do"):
        create_encoder("bert", spec, bert_tokenizer(VOCABULARY), device="meta", **build)


def test_the_folder_is_scanned_and_an_unknown_family_refused() -> None:
    assert families()["bert"] is Bert
    with pytest.raises(BridgeError, match="'elmo'"):
        create_encoder("elmo", {}, b"", identity="toy", window=24)
