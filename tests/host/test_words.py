"""Windows of a tower: templates, places of words, and towers whose framed ids are not the pieces' own."""

from __future__ import annotations

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import BridgeHeader, EncoderRef
from language_bridge.host.bridging import _template
from language_bridge.host.words import Framed, ask, cut
from language_bridge.tests.encoders.toys import TOYS

FAMILIES = sorted(TOYS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [("", ""), ("a cat", ""), ("a cat", "the cat")])
def test_words_stand_between_what_is_no_word(family: str, template: tuple[str, str]) -> None:
    tower = TOYS[family]()
    framed = Framed(tower, *template)
    for text in ("red", "red cat red cat " * 9, ""):
        pieces = [piece.id for piece in framed.opening(text)]
        chunks = cut(framed, [(text, 1.5)])
        words = [word for chunk in chunks for _, _, word in chunk if word]
        assert words == list(range(1, len(pieces) + 1))
        assert all(len(chunk) == tower.window for chunk in chunks)
        for chunk in chunks:
            assert all(weight == (1.5 if word else 1.0) for _, weight, word in chunk)
        for start, chunk in zip(range(0, max(len(pieces), 1), framed.capacity), chunks, strict=True):
            ids, mask = framed.frame(pieces[start : start + framed.capacity])
            assert [token for token, *_ in chunk] == ids.tolist()
            assert torch.equal(framed.mask_of(ids[None])[0], mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_weights_only_the_text_is_asked(family: str) -> None:
    tower = TOYS[family]()
    plain = ask(tower, cut(tower, [("red cat", 1.0)]))
    heavy = ask(tower, cut(tower, [("red cat", 1.2)]))
    assert len(plain.ids) == 1 and len(heavy.ids) == 2
    assert torch.equal(heavy.ids[0], plain.ids[0]) and torch.equal(heavy.ids[1], tower.frame([])[0])
    assert plain.digest != heavy.digest != ask(tower, cut(tower, [("red cat", 1.3)])).digest


def test_a_template_longer_than_the_window_is_refused() -> None:
    with pytest.raises(BridgeError, match="no room for text"):
        Framed(TOYS["bert"](), "red cat " * 20, "")


def header(kind: str, spec: dict[str, object], **training: object) -> BridgeHeader:
    reference = EncoderRef("llama", "any", -1, 80, "pad")
    return BridgeHeader(kind=kind, spec=spec, base="sd1", encoder=reference, training=training)


def test_a_method_that_counts_on_a_template_is_not_used_without_it() -> None:
    sizes: dict[str, object] = {"hidden": 64, "context": 2048, "pooled": 1280, "heads": 16}
    assert _template(header("rouwei", sizes), "x") == ("", "")
    with pytest.raises(BridgeError, match="template"):
        _template(header("rouwei", sizes | {"skip": 27}), "x")
    given = header("rouwei", sizes | {"skip": 27}, template={"before": "one", "after": "two"})
    assert _template(given, "x") == ("one", "two")
    assert _template(header("mulan", {"hidden": 64, "context": 768}), "x") == ("summarize:", "")
    plain = header("mulan", {"hidden": 64, "context": 768}, template={"before": "", "after": ""})
    assert _template(plain, "x") == ("", "")
