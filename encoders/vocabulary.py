"""Published vocabularies made into the one form that our files carry, the JSON of the tokenizers library.

Read here: BERT's vocab.txt, CLIP's vocab.json with merges.txt, SentencePiece models (Unigram and BPE), and
tokenizer.json itself. SentencePiece models are read byte by byte (protobuf's wire format is small), because
neither protobuf nor sentencepiece can be expected where the pack runs. The tokenizers library cuts text as
SentencePiece does, but for a combining mark right after a compatibility character (a ligature, a full-width
letter): it drops the mark there, as every "fast" tokenizer of a SentencePiece model does.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..bridges.errors import BridgeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types of pieces
UNIGRAM, BPE = 1, 2  # SentencePiece's types of models
MOST_PIECES = 1 << 20
MOST_CUTS = 1 << 26
"""How many letters are compared to find the merges of a SentencePiece model; Gemma's asks for a tenth."""
LARGEST_GROWTH = 64
"""How many times as long a tokenizer's replacements may make a text."""

_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_CHARACTERS = re.compile(rb'"precompiled_charsmap"\s*:\s*"([A-Za-z0-9+/=]*)"')
_HIDDEN = re.compile(rb"\\u00(?:3\d|4[1-9a-fA-F]|5[0-9aAfF]|6[1-9a-fA-F]|7[0-9aA])")

_AGAIN = "Fetch the file again from where its authors published it."


def open_tokenizer(tokenizer_json: bytes, vocab: int) -> tuple[Tokenizer, int | None]:
    """Open tokenizer JSON for a tower with `vocab` rows, and say which padding id its own section names.

    BridgeError when it is damaged or too large for the tower.
    """
    tokenizer, largest = _open(tokenizer_json)
    if largest >= vocab:
        raise _unusable(f"token ids up to {largest}", f"ids below {vocab}, the tower's vocabulary")
    section = cast("dict[str, object] | None", cast(Any, tokenizer).padding)
    filler = None if section is None else section.get("pad_id")
    if filler is not None and not (type(filler) is int and filler < vocab):
        raise _unusable(f"padding with id {filler!r:.40}", f"an id below {vocab}, the tower's vocabulary")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, filler


def _open(tokenizer_json: bytes) -> tuple[Tokenizer, int]:
    """The tokenizer, and the largest id that it gives."""
    from tokenizers import Tokenizer

    _require_honest(tokenizer_json)
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        growth, dropout = _growth(tokenizer), getattr(tokenizer.model, "dropout", None)
        count = tokenizer.get_vocab_size()
        # As many ids without a gap as there are tokens: none is larger. A whole dictionary costs twice that.
        if count and None not in map(tokenizer.id_to_token, range(count)):
            largest = count - 1
        else:
            largest = max(tokenizer.get_vocab().values(), default=0)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the Rust library is not an Exception
        raise _unusable(f"{type(error).__name__}: {error!s:.200}", "a tokenizer.json") from error
    if growth > LARGEST_GROWTH:
        raise _unusable(f"a text that becomes {growth} times as long", f"at most {LARGEST_GROWTH} times")
    if dropout:
        raise _unusable(f"dropout {dropout!r:.20}, which cuts a text anew each time", "no dropout")
    return tokenizer, largest


def _require_honest(tokenizer_json: bytes) -> None:
    """Refuse a map of characters (Precompiled) whose sizes lie: the library would end the whole process.

    The JSON is searched, not parsed, which would take as long as opening it; so nothing may be spelled in
    escapes that would hide a word from the search.
    """
    if _HIDDEN.search(tokenizer_json):
        raise _unusable("ASCII letters written as escapes", "letters written as they are")
    for found in _CHARACTERS.finditer(tokenizer_json):
        text = found.group(1)
        length = len(text) // 4 * 3 - text.count(b"=")
        first = 0
        for letter in text[:8].ljust(8, b"A"):
            first = first << 6 | max(0, _BASE64.find(letter))
        _require_map(first.to_bytes(6, "big")[:4], length)
    if tokenizer_json.count(b"precompiled_charsmap") != len(_CHARACTERS.findall(tokenizer_json)):
        raise _unusable("a map of characters in an odd place", "one text in base64")


def _require_map(start: bytes, length: int) -> None:
    """Refuse SentencePiece's compiled map of characters unless its first number, a size, is true.

    start: its first bytes; length: how many it has.
    """
    size = int.from_bytes(start[:4], "little")
    if length < 4 or size % 4 or not 0 < size <= length - 4:
        raise _unusable(f"a map of characters of {length} bytes that announces {size}", "a whole map")


def _growth(tokenizer: Tokenizer) -> int:
    """How many times as long the replacements of the normaliser can make a text, at most."""
    normaliser = cast(Any, tokenizer).normalizer
    if normaliser is None:
        return 1
    growth, waiting = 1, [json.loads(normaliser.__getstate__())]
    while waiting:
        step = waiting.pop()
        waiting += step.get("normalizers", ())
        pattern = step.get("pattern")
        if isinstance(pattern, dict):
            length = len(cast("dict[str, str]", pattern).get("String", " "))
            growth *= max(1, -(-len(step.get("content", "")) // max(1, length)))
        growth *= 1 + len(step.get("prepend", ()))
    return growth


def unknown_id(tokenizer_json: bytes) -> int | None:
    """The id of the token for text that the vocabulary does not have; None where every text has tokens."""
    value: Any = json.loads(tokenizer_json)
    model: dict[str, Any] = value["model"]  # as the library has it: it has opened the same text
    if model.get("byte_fallback"):
        return None
    if "unk_id" in model:
        return cast("int | None", model["unk_id"])
    token, words = model.get("unk_token"), model.get("vocab", {})
    # Byte-level pieces (CLIP, Llama 3) spell every text; their models name an unknown token all the same.
    spelled = '"ByteLevel"' in json.dumps([value.get("pre_tokenizer"), value.get("normalizer")])
    return None if token is None or spelled else cast("int | None", words.get(token))


def pieces(tokenizer: Tokenizer, text: str) -> list[tuple[int, int, int]]:
    """(id, start, end) of each token of `text`, special tokens not added, offsets in characters."""
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the Rust library is not an Exception
        raise _unusable(f"{type(error).__name__}: {error!s:.200}", "one that can cut this text") from error
    return [(number, *span) for number, span in zip(encoding.ids, encoding.offsets, strict=True)]


def need(files: Mapping[str, bytes], family: str, *choices: Sequence[str]) -> str:
    """The first file of the first choice that is there whole; BridgeError naming what is missing."""
    for choice in choices:
        if all(name in files for name in choice):
            return choice[0]
    raise BridgeError(
        f"The tokenizer of this text tower (family {family!r}) is missing.",
        ", ".join(sorted(files)) or "no tokenizer files",
        " or ".join(" with ".join(choice) for choice in choices),
        "Put the tokenizer files of the same model beside its weights (its folder 'tokenizer').",
    )


def settings_of(files: Mapping[str, bytes]) -> dict[str, object]:
    """What tokenizer_config.json and special_tokens_map.json say, the former first; empty without them."""
    merged: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            merged.update(_object(files[name], name))
    return merged


def token_setting(settings: Mapping[str, object], name: str) -> str | None:
    """A token that the settings name, which may stand alone or as an object with `content`."""
    value = settings.get(name)
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) else None


def with_padding(tokenizer_json: bytes, token: str | None) -> bytes:
    """Write into the JSON's padding section that windows are filled with `token`; None leaves it alone."""
    if token is None:
        return tokenizer_json
    tokenizer, _ = _open(tokenizer_json)
    number = tokenizer.token_to_id(token)
    if number is None:
        raise _unusable(f"padding with {token!r:.80}", "a padding token that the tokenizer knows")
    cast(Any, tokenizer).enable_padding(pad_id=number, pad_token=token)
    return tokenizer.to_str().encode("utf-8")


def checked(tokenizer_json: bytes) -> bytes:
    """Return a published tokenizer.json unchanged, after opening it; BridgeError when it is damaged."""
    _open(tokenizer_json)
    return tokenizer_json


def word_list(vocab_txt: bytes) -> list[str]:
    """Lines of a vocab.txt: the id of a token is the number of its line."""
    try:
        lines = vocab_txt.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise _unreadable("vocab.txt", str(error), "UTF-8 text, one token a line") from error
    if len(lines) > MOST_PIECES:
        raise _unreadable("vocab.txt", f"{len(lines)} lines", f"at most {MOST_PIECES}")
    return lines[:-1] if not lines[-1] else lines


def clip_json(vocab_json: bytes, merges_txt: bytes) -> bytes:
    """Tokenizer JSON of OpenAI's CLIP (lower-cased byte-level BPE, Radford et al. 2021)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = _object(vocab_json, "vocab.json")
    try:
        lines = merges_txt.decode("utf-8").split("\n")
        merges = [cast("tuple[str, str]", tuple(line.split())) for line in lines if line.strip()]
        merges = [pair for pair in merges if pair and pair[0] != "#version:"]
        model = models.BPE(
            vocab=cast("dict[str, int]", vocabulary),
            merges=merges,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token="<|endoftext|>",
        )
    except Exception as error:
        raise _unreadable(
            "vocab.json or merges.txt", f"{error!s:.200}", "the two files of one BPE"
        ) from error
    tokenizer = Tokenizer(model)
    parts: list[Any] = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(parts)
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    cuts: list[Any] = [
        pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    marks = [token for token in ("<|startoftext|>", "<|endoftext|>") if token in vocabulary]
    cast(Any, tokenizer).add_special_tokens(
        [AddedToken(token, normalized=True, special=True) for token in marks]
    )
    return tokenizer.to_str().encode("utf-8")


@dataclass(frozen=True)
class SentencePieceModel:
    """What a SentencePiece model file says: (piece, score, type) by id, kind, how text is cleaned."""

    pieces: tuple[tuple[str, float, int], ...]
    kind: int
    unknown: int
    byte_fallback: bool
    characters: bytes  # the precompiled map of characters
    leading_space: bool
    tidy_spaces: bool


def read_sentencepiece(data: bytes, name: str) -> SentencePieceModel:
    """Read a SentencePiece model (sentencepiece_model.proto); BridgeError when it is not a whole one."""
    try:
        found: list[tuple[str, float, int]] = []
        trainer: dict[int, int | bytes] = {}
        normaliser: dict[int, int | bytes] = {}
        for field, value in _fields(data):
            if field == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, score = piece.get(1, b""), piece.get(2, b"\0\0\0\0")
                if not isinstance(text, bytes) or not isinstance(score, bytes):
                    raise ValueError("a piece without text or score")
                number = struct.unpack("<f", score)[0]
                found.append((text.decode("utf-8"), number, _number(piece.get(3, NORMAL))))
            elif field == 2 and isinstance(value, bytes):
                trainer.update(_fields(value))
            elif field == 3 and isinstance(value, bytes):
                normaliser.update(_fields(value))
            if len(found) > MOST_PIECES:
                raise ValueError(f"more than {MOST_PIECES} pieces")
        characters = normaliser.get(2, b"")
        model = SentencePieceModel(
            pieces=tuple(found),
            kind=_number(trainer.get(3, UNIGRAM)),
            unknown=_number(trainer.get(40, 0)),
            byte_fallback=bool(_number(trainer.get(35, 0))),
            characters=characters if isinstance(characters, bytes) else b"",
            leading_space=bool(_number(normaliser.get(3, 1))),
            tidy_spaces=bool(_number(normaliser.get(4, 1))),
        )
    except (ValueError, struct.error) as error:
        raise _unreadable(name, f"{error!s:.200}", "a SentencePiece model") from error
    if model.kind not in (UNIGRAM, BPE) or not found or not 0 <= model.unknown < len(found):
        raise _unreadable(
            name,
            f"{len(found)} pieces, model type {model.kind}, unknown piece {model.unknown}",
            "a Unigram or BPE model of SentencePiece",
        )
    return model


def sentencepiece_json(
    model: SentencePieceModel,
    name: str,
    *,
    pieces: Sequence[tuple[str, float]] | None = None,
    unknown: int | None = None,
    special: Sequence[str] = (),
) -> bytes:
    """Tokenizer JSON that cuts text like a SentencePiece model.

    `pieces` and `unknown` replace the model's own numbering (fairseq's shift by one); `special` are further
    special tokens beside the model's control pieces. Literal special tokens in a text count as such, as in
    transformers. BridgeError when the parts do not fit together.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers

    listed = [(piece, score) for piece, score, _ in model.pieces] if pieces is None else list(pieces)
    unknown = model.unknown if unknown is None else unknown
    ids = {piece: number for number, (piece, _) in enumerate(listed)}
    if len(ids) != len(listed):
        raise _unreadable(name, f"{len(listed) - len(ids)} pieces twice", "every piece once")
    if model.characters:
        _require_map(model.characters, len(model.characters))
    try:
        if model.kind == UNIGRAM:
            core: Any = models.Unigram(listed, unk_id=unknown, byte_fallback=model.byte_fallback)
        else:
            core = models.BPE(
                vocab=ids,
                merges=_merges(model, ids),
                unk_token=listed[unknown][0],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        tokenizer = Tokenizer(core)
        steps: list[Any] = [normalizers.Precompiled(model.characters)] if model.characters else []
        if model.tidy_spaces:
            steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
            steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        if model.leading_space:
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
        tokenizer.normalizer = normalizers.Sequence(steps)
        control = [piece for piece, _, kind in model.pieces if kind in (CONTROL, UNKNOWN) and piece in ids]
        own = [piece for piece, _, kind in model.pieces if kind == USER_DEFINED]
        marks = dict.fromkeys([*control, *special])
        adding = cast(Any, tokenizer)
        adding.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in marks])
        adding.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
        return tokenizer.to_str().encode("utf-8")
    except BridgeError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the Rust library is not an Exception
        raise _unreadable(name, f"{type(error).__name__}: {error!s:.200}", "a SentencePiece model") from error


def _merges(model: SentencePieceModel, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that join to a piece, best score first, as SentencePiece's BPE joins them."""
    cuts = sum(len(piece) ** 2 for piece, _, kind in model.pieces if kind in (NORMAL, UNUSED))
    if cuts > MOST_CUTS:
        raise _unusable(f"pieces so long that {cuts} letters must be compared", f"at most {MOST_CUTS}")
    joinable = {piece for piece, _, kind in model.pieces if kind in (NORMAL, USER_DEFINED, UNUSED)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, score, kind in model.pieces:
        if kind not in (NORMAL, UNUSED):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in joinable and right in joinable:
                ranked.append((-score, ids[piece], cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of one protobuf message; ValueError when it is cut short."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield field, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if place + length > len(data):
            raise ValueError("cut short")
        yield field, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number that does not end")


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes in place of a number")
    return value


def _object(data: bytes, name: str) -> dict[str, object]:
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _unreadable(name, f"{error!s:.200}", "a JSON object") from error
    if not isinstance(value, dict):
        raise _unreadable(name, type(value).__name__, "a JSON object")
    return cast("dict[str, object]", value)


def _unreadable(name: str, found: str, expected: str) -> BridgeError:
    return BridgeError(f"The tokenizer file {name!r} cannot be read.", found, expected, _AGAIN)


def _unusable(found: str, expected: str) -> BridgeError:
    return BridgeError(
        "The text tower's tokenizer cannot be used.",
        found,
        expected,
        "The file is damaged or does not belong to this tower; fetch or save it again.",
    )
