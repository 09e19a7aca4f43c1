"""Native text of a branch: chunks as BDM's script cuts them, and one length for all texts of a sampling."""

from __future__ import annotations

import pytest
import torch

from language_bridge.encoders.base import create_encoder
from language_bridge.encoders.bert import BertSpec, bert_tokenizer
from language_bridge.host.branch_text import MOST_CHUNKS, BranchText, chunks_of, common_count, weighed
from language_bridge.tests.fixtures.towers import CHARACTERS, vocabulary

WORDS = vocabulary()
PAD, START, END = (WORDS.index(mark) for mark in ("[PAD]", "[CLS]", "[SEP]"))


def tower(window: int = 52):  # noqa: ANN201 - a family's own class
    spec = BertSpec(vocab=len(WORDS), width=8, layers=0, window=window, heads=2, inner=8)
    return create_encoder(
        "bert", spec, bert_tokenizer(WORDS), identity="tiny", window=window, mask_rule="none"
    )


def script(payload: list[int]) -> list[list[int]]:
    """The chunks of BDM's inference.py: pad the whole, cut, cover both ends, put the end at the first pad."""
    count = max(1, min(5, -(-len(payload) // 50)))
    whole = [START, *payload[:250], *[PAD] * (50 * count - len(payload[:250])), PAD]
    chunks = [whole[50 * number : 50 * number + 52] for number in range(count)]
    for chunk in chunks:
        chunk[0], chunk[-1] = START, PAD
        chunk[chunk.index(PAD)] = END
    return chunks


def text_of(rows: torch.Tensor, **facts: object) -> BranchText:
    usual = {"edges": (1, 1), "pooled": None, "empty_pooled": None, "speaks": True, "own_length": False}
    return BranchText(rows=rows, empty=torch.full((1, *rows.shape[-2:]), -1.0), **{**usual, **facts})


@pytest.mark.parametrize("length", [0, 3, 49, 50, 51, 100, 101, 120, 250, 251, 400])
def test_ids_are_the_scripts(length: int) -> None:
    text = (CHARACTERS * 40)[:length]
    payload = [WORDS.index(character) for character in text]
    chunks = chunks_of(tower(), [(text, 1.0)])
    assert [[token for token, *_ in chunk] for chunk in chunks] == script(payload)
    assert len(chunks) <= MOST_CHUNKS


def test_a_padding_that_was_typed_ends_the_chunk_as_in_the_script() -> None:
    payload = [WORDS.index(c) for c in CHARACTERS[:2]] + [PAD] + [WORDS.index(CHARACTERS[3])]
    text = f"{CHARACTERS[:2]}[PAD]{CHARACTERS[3]}"
    (chunk,) = chunks_of(tower(), [(text, 1.0)])
    assert [token for token, *_ in chunk] == script(payload)[0]


def test_pieces_keep_their_weights_and_count_as_words() -> None:
    chunks = chunks_of(tower(5), [(CHARACTERS[:2], 1.5), (CHARACTERS[2:4], 0.5)])
    assert [[weight for _, weight, _ in chunk] for chunk in chunks] == [
        [1.0, 1.5, 1.5, 0.5, 1.0],
        [1.0, 0.5, 1.0, 1.0, 1.0],
    ]
    assert [[word for *_, word in chunk] for chunk in chunks] == [[0, 1, 2, 3, 0], [0, 4, 0, 0, 0]]


@pytest.mark.parametrize(("payload", "length"), [(0, 52), (3, 52), (50, 52), (51, 102), (120, 152)])
def test_m_chunks_make_50_m_and_2_rows(payload: int, length: int) -> None:
    chunks = chunks_of(tower(), [((CHARACTERS * 20)[:payload], 1.0)])
    rows = torch.arange(len(chunks) * 52.0).view(len(chunks), 52, 1)
    said = text_of(rows).read(1)
    assert said.shape == (1, length, 1)
    kept = [row for row in rows.flatten().tolist() if row % 52 not in (0, 51)]
    assert said.flatten().tolist() == [0.0, *kept, float(len(chunks) * 52 - 1)]


def test_shorter_texts_are_filled_with_the_chunk_of_an_empty_text() -> None:
    short, long = text_of(torch.zeros(1, 4, 2)), text_of(torch.ones(3, 4, 2))
    count = common_count([short, None, long])
    assert count == 3
    assert short.read(count).shape == long.read(count).shape == (1, 8, 2)
    assert short.read(count)[0, :, 0].tolist() == [0, 0, 0, -1, -1, -1, -1, -1]
    assert short.nothing().read(2)[0, :, 0].tolist() == [-1] * 6


def test_a_length_of_its_own_neither_gives_nor_takes() -> None:
    own, other = text_of(torch.zeros(3, 4, 2), own_length=True), text_of(torch.zeros(1, 4, 2))
    assert common_count([own, other]) == 1
    assert own.read(1).shape[1] == 8 and own.read(5).shape[1] == 8
    assert common_count([None, own]) == 1


def test_a_batch_reads_as_each_of_its_texts() -> None:
    one, other = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    both = text_of(torch.stack([one, other]))
    assert both.count == 2
    expected = torch.cat([text_of(rows).read(3) for rows in (one, other)])
    assert torch.equal(both.read(3), expected)


def test_packed_and_taken_again_is_the_same() -> None:
    text = text_of(torch.randn(2, 4, 3), pooled=torch.randn(1, 5), empty_pooled=torch.randn(1, 5))
    found = BranchText.of({"language_bridge_branch": {"d": text.pack()}}, "d")
    assert found is not None and found.edges == text.edges and found.speaks
    assert torch.equal(found.rows, text.rows) and torch.equal(found.read(3), text.read(3))
    assert found.pooled is not None and torch.equal(found.pooled, text.pooled)
    for entry in ({}, {"language_bridge_branch": {}}, {"language_bridge_branch": {"other": text.pack()}}):
        assert BranchText.of(entry, "d") is None


def test_weights_move_rows_away_from_the_empty_ones() -> None:
    encoder = tower(6)
    chunks = chunks_of(encoder, [(CHARACTERS[:2], 2.0), (CHARACTERS[2], 1.0)])
    rows, empty = torch.randn(1, 6, 3), torch.randn(1, 6, 3)
    said = weighed(rows, empty, chunks)
    assert torch.equal(said[:, [0, 3, 4, 5]], rows[:, [0, 3, 4, 5]])
    torch.testing.assert_close(said[:, 1:3], empty[:, 1:3] + 2 * (rows[:, 1:3] - empty[:, 1:3]))
