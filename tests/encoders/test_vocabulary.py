"""SentencePiece models are read without protobuf, and damaged ones are refused."""

from __future__ import annotations

import io

import pytest

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    open_tokenizer,
    read_sentencepiece,
    sentencepiece_json,
    word_list,
)
from language_bridge.tests.encoders.toys import KINDS, SENTENCES, sentencepiece_model


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_read_as_sentencepiece_reads_it(kind: str) -> None:
    import sentencepiece

    data = sentencepiece_model(kind)
    model, judge = read_sentencepiece(data, kind), sentencepiece.SentencePieceProcessor(model_proto=data)
    numbers = range(judge.get_piece_size())
    assert [piece for piece, _, _ in model.pieces] == [judge.id_to_piece(number) for number in numbers]
    assert [score for _, score, _ in model.pieces] == [judge.get_score(number) for number in numbers]
    for number, (_, _, found) in enumerate(model.pieces):
        assert (found == CONTROL) == judge.is_control(number)
        assert (found == UNKNOWN) == judge.is_unknown(number)
        assert (found == BYTE) == judge.is_byte(number)
    assert model.unknown == judge.unk_id() and (model.kind == UNIGRAM) == (kind in ("xlmr", "t5"))
    assert model.byte_fallback == model.tidy_spaces ^ True == (kind not in ("xlmr", "t5"))
    assert model.leading_space == (kind not in ("baichuan", "gemma"))
    assert any(k == NORMAL for *_, k in model.pieces)


def test_symbols_of_the_user_are_kept_whole() -> None:
    import sentencepiece
    from tokenizers import Tokenizer

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=written,
        minloglevel=2,
        num_threads=1,
        user_defined_symbols=["<reserved>"],
        add_dummy_prefix=False,
        **(KINDS["llama"] | {"vocab_size": 401}),
    )
    judge = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    made = sentencepiece_json(read_sentencepiece(written.getvalue(), "m"), "m")
    for text in ("a<reserved>b", "<reserved>", "red <reserved> cat"):
        assert Tokenizer.from_str(made.decode()).encode(text).ids == judge.encode(text)


def test_damaged_models_are_refused() -> None:
    whole = sentencepiece_model("llama")
    outcomes = set()
    for length in range(0, len(whole), 13):
        try:
            sentencepiece_json(read_sentencepiece(whole[:length], "tokenizer.model"), "tokenizer.model")
            outcomes.add("read")  # cut between two pieces: a smaller model, but a model
        except BridgeError as error:
            assert "tokenizer.model" in error.what
            outcomes.add("refused")
    assert "refused" in outcomes
    for data in (
        b"",
        b"\x0a\x05ab",
        b"\x0b",
        b"\xff" * 40,
        b"\x0a\x02\x18\x01" * 2,
        whole.replace(b"<unk>", b"\xff\xff\xff\xff\xff"),
    ):
        with pytest.raises(BridgeError, match="cannot be read"):
            sentencepiece_json(read_sentencepiece(data, "tokenizer.model"), "tokenizer.model")


def test_words_are_lines_and_nothing_else_is_a_line() -> None:
    assert word_list("a\r\nb\u2028c\n\x0bd\n".encode()) == ["a", "b\u2028c", "\x0bd"]
    assert word_list(b"a\n\nb") == ["a", "", "b"] and word_list(b"") == []


@pytest.mark.parametrize(
    "ids", [{"[UNK]": 0, "a": 1}, {"[UNK]": 0, "a": 9}, {"[UNK]": 3, "a": 1}, {"[UNK]": 0, "a": 1, "b": 1}]
)
@pytest.mark.parametrize("added", [(), ("[UNK]",), ("[UNK]", "new")])
def test_the_largest_id_is_found_with_gaps_and_without(ids: dict[str, int], added: tuple[str, ...]) -> None:
    """A tower with that many rows takes the tokenizer, one with a row less does not."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(added))
    text = tokenizer.to_str()  # which may drop a token that shares its id
    largest = max(Tokenizer.from_str(text).get_vocab().values())
    open_tokenizer(text.encode(), largest + 1)
    with pytest.raises(BridgeError, match=f"token ids up to {largest}"):
        open_tokenizer(text.encode(), largest)
