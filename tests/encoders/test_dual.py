"""Two towers side by side: each reads what it would read alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders.dual import Dual, DualSpec, Half, join
from language_bridge.encoders.file import load_encoder, save_encoder
from language_bridge.tests.encoders.toys import SPEECH, TEXTS, TOYS


def halves(first: str = "xlmr", second: str = "bert", window: int = 24, **changes: object) -> tuple:
    return TOYS[first](window=window, **changes), TOYS[second](window=window, **changes)


@pytest.mark.parametrize(
    ("first", "second"), [("xlmr", "bert"), ("bert", "clip"), ("t5", "llama"), ("bert", "bert")]
)
def test_states_are_those_of_both_alone(first: str, second: str, tmp_path: Path) -> None:
    one, other = halves(first, second)
    save_encoder(tmp_path / "both", join(one, other, identity="both", window=24))
    both = load_encoder(tmp_path / "both")
    texts = [text for text in [*TEXTS, *SPEECH] if len(both.tokenize(text)) <= both.capacity]
    assert len(texts) > 10 and (both.width, both.identity) == (64, "both")
    with torch.no_grad():
        hidden = both(*both.batch(texts))
        left, right = one(*one.batch(texts)), other(*other.batch(texts))
    assert torch.equal(hidden.states, torch.cat([left.states, right.states], dim=-1))
    pooled = [half.pooled for half in (left, right) if half.pooled is not None]
    assert torch.equal(hidden.pooled, torch.cat(pooled, dim=-1))
    assert torch.equal(hidden.mask, left.mask | right.mask)


def test_each_half_keeps_its_layer_and_its_mask_rule() -> None:
    one, other = TOYS["xlmr"](layer=-2), TOYS["bert"](mask_rule="none")
    both = join(one, other, identity="both", window=24)
    texts = ["\u7ea2\u732b", "cat"]
    expected = torch.cat([t(*t.batch(texts)).states for t in (one, other)], dim=-1)
    torch.testing.assert_close(both(*both.batch(texts)).states, expected, rtol=0, atol=0)
    assert [half.layer for half in both.spec.halves] == [-2, -1]


def test_pieces_of_the_same_characters_are_paired() -> None:
    both = join(*halves(), identity="both", window=24)
    first, second = both.first, both.second
    text = "\u7ea2\u732b cat"
    pieces = both.tokenize(text)
    base = second.vocabulary_size + 1
    left = [p.id // base for p in pieces if p.id // base != first.vocabulary_size]
    right = [p.id % base for p in pieces if p.id % base != second.vocabulary_size]
    assert left == [p.id for p in first.tokenize(text)] and right == [p.id for p in second.tokenize(text)]
    assert len(pieces) < len(left) + len(right)
    for piece in pieces:
        assert 0 <= piece.id < both.vocabulary_size


def test_a_long_text_can_be_cut_anywhere() -> None:
    both = join(*halves(window=10), identity="both", window=10)
    text = "\u7ea2\u732b red cat " * 5
    pieces = both.tokenize(text)
    first = second = 0
    for start in range(0, len(pieces), both.capacity):
        group = [piece.id for piece in pieces[start : start + both.capacity]]
        ids, mask = both.frame(group)
        assert ids.shape == (10,) and torch.equal(both.mask_of(ids[None])[0], mask)
        base = both.second.vocabulary_size + 1
        first += int(both.first.mask_of(ids[None] // base).sum()) - 2
        second += int(both.second.mask_of(ids[None] % base).sum()) - 2
    assert (first, second) == (len(both.first.tokenize(text)), len(both.second.tokenize(text)))


def test_weights_are_shared_and_not_copied() -> None:
    one, other = halves()
    both = join(one, other, identity="both", window=24)
    name = "embeddings.word_embeddings.weight"
    assert both.first.state_dict()[name].data_ptr() == one.state_dict()[name].data_ptr()
    assert sorted(both.state_dict()) == sorted(
        f"{side}.{key}" for side, half in (("first", one), ("second", other)) for key in half.state_dict()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 63},
        {"vocab": 5},
        {"window": 30},
        {"first": "{}"},
        {"first": "["},
        {"first": '{"family": "dual", "spec": {}, "layer": -1, "mask_rule": "pad"}'},
        {"second": '{"family": "bert", "spec": {"vocab": 4}, "layer": -1, "mask_rule": "pad"}'},
    ],
)
def test_odd_sizes_are_refused(changes: dict[str, object]) -> None:
    spec = TOYS["dual"]().spec
    fields = {name: getattr(spec, name) for name in spec.__dataclass_fields__} | changes
    with pytest.raises(BridgeError, match="what to do:"):
        DualSpec(**fields)


def test_odd_halves_are_refused() -> None:
    tower = TOYS["dual"]()
    with pytest.raises(BridgeError, match="no layers of its own"):
        Dual(tower.spec, tower.tokenizer_json, identity="both", window=24, layer=0)
    with pytest.raises(BridgeError, match="tokenizers of both towers"):
        Dual(tower.spec, b'{"first": "{}"}', identity="both", window=24)
    with pytest.raises(BridgeError, match="mask rule"):
        odd = Half("bert", TOYS["bert"]().spec, -1, "causal")
        spec = tower.spec
        fields = {name: getattr(spec, name) for name in spec.__dataclass_fields__} | {"second": odd.to_json()}
        Dual(DualSpec(**fields), tower.tokenizer_json, identity="both", window=24)
