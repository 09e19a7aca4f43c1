"""Malformed safetensors files, each with what has to become of it: a phrase of the refusal, or "" = accepted.

Lists: the container itself, which goes to every reader of the pack; headers of a bridge; headers of a tower;
tokenizers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Case:
    """One file: its name in the report, its bytes, a phrase of the refusal ("" = a whole file)."""

    name: str
    data: bytes
    phrase: str


def pack(header: object, payload: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file; `length` is what the first eight of them say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """A tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOUR = b"\0\0\x80\x3f"
ONE = {"a": entry()}
WHOLE = pack(ONE, FOUR)


def numbers(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


CONTAINERS = (
    # the file as a whole
    Case("whole", WHOLE, ""),
    Case("empty", b"", "a header of 0 bytes"),
    Case("one byte", b"\x08", "a header of 0 bytes"),
    Case("seven bytes", WHOLE[:7], "a header of 0 bytes"),
    Case("length alone", WHOLE[:8], "damaged"),
    Case("header cut", WHOLE[:20], "damaged"),
    Case("data cut", WHOLE[:-1], "damaged"),
    Case("no data", WHOLE[:-4], "damaged"),
    Case("trailing byte", WHOLE + b"\0", "bytes of data"),
    Case("two files in one", WHOLE + WHOLE, "bytes of data"),
    Case("zeros", b"\0" * 4096, "a header of 0 bytes"),
    Case("BOM before all", BOM + WHOLE, "damaged"),
    Case("pickle", b"\x80\x02}q\x00." * 40, "damaged"),
    Case("zip", b"PK\x03\x04" + b"\0" * 400, "damaged"),
    Case("GGUF", b"GGUF\x03\0\0\0" + b"\0" * 400, "damaged"),
    Case("web page", b"<!DOCTYPE html><html><body>Sign in</body></html>", "damaged"),
    # the length of the header
    Case("length zero", pack(ONE, FOUR, 0), "a header of 0 bytes"),
    Case("length one", pack(ONE, FOUR, 1), "a header of 1 bytes"),
    Case("length too short", pack(ONE, FOUR, 12), "JSON"),
    Case("length too long", pack(ONE, FOUR, 60), "damaged"),
    Case("length past the end", pack(ONE, FOUR, 4096), "a header of 4096 bytes"),
    Case("length a terabyte", pack(ONE, FOUR, 1 << 40), "a header of 1099511627776 bytes"),
    Case("length 2^63", pack(ONE, FOUR, 1 << 63), "a header of 9223372036854775808 bytes"),
    Case("length all ones", b"\xff" * 8 + WHOLE[8:], "a header of 18446744073709551615 bytes"),
    Case("length big-endian", struct.pack(">Q", 60) + WHOLE[8:], "a header of"),
    Case("header of 9 MiB", pack(b"{" + b" " * (9 << 20) + b"}"), "a header of"),
    Case("header of 8 MiB of blanks", pack(b"{" + b" " * ((8 << 20) - 2) + b"}"), ""),
    # the text of the header
    Case("no JSON", pack(b"{]"), "JSON"),
    Case("two objects", pack(b"{}{}"), "JSON"),
    Case("a list", pack([]), "a JSON object"),
    Case("a number", pack(b"12"), "a JSON object"),
    Case("null", pack(b"null"), "a JSON object"),
    Case("BOM in the header", pack(BOM + b"{}"), "damaged"),
    Case("UTF-16", pack("{}".encode("utf-16-le")), "damaged"),
    Case("bytes that are no UTF-8", pack(b'{"\xff\xfe": 1}'), "UnicodeDecodeError"),
    Case("overlong UTF-8", pack(b'{"\xc0\xae": 1}'), "UnicodeDecodeError"),
    Case("half of a letter", pack(b'{"__metadata__": {"a": "\\ud800"}}'), "UnicodeEncodeError"),
    Case("NaN", pack(b'{"a": NaN}'), "not JSON"),
    Case("a number without end", pack(b'{"a": ' + b"9" * 100_000 + b"}"), "ValueError"),
    Case("a number too large", pack(b'{"a": 1e999}'), "too large"),
    Case("deep objects", pack(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "Recursion"),
    Case("deep lists", pack(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "Recursion"),
    Case("four million numbers", pack(b'{"a":[' + b"1," * 4_000_000 + b"1]}"), "tensor 'a'"),
    Case("two million lists", pack(b'{"a":[' + b"[]," * 2_500_000 + b"[]]}"), "2500003 lists"),
    Case("a name of seven million letters", pack(b'{"' + b"a" * 7_000_000 + b'": 1}'), "tensor 'aaa"),
    Case("a tensor twice", pack(b'{"a":1,"a":1}'), "a name appears twice"),
    Case("a field twice", pack(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "a name appears twice"),
    Case("metadata twice", pack(b'{"__metadata__":{},"__metadata__":{}}'), "a name appears twice"),
    # the metadata
    Case("metadata a list", pack({"__metadata__": []}), "metadata that is not text"),
    Case("metadata a text", pack({"__metadata__": "x"}), "metadata that is not text"),
    Case("metadata null", pack({"__metadata__": None}), "metadata that is not text"),
    Case("metadata of numbers", pack({"__metadata__": {"a": 1}}), "metadata that is not text"),
    Case("metadata nested", pack({"__metadata__": {"a": {"b": "c"}}}), "metadata that is not text"),
    Case("metadata of 8 MB", pack({"__metadata__": {"a": "x" * 8_000_000}}), ""),
    Case("300,000 metadata", pack({"__metadata__": {str(n): "" for n in range(300_000)}}), ""),
    # the tensors of the header
    Case("no tensors", pack({}), ""),
    Case("20,000 tensors", pack({f"t{n}": entry(shape=[0], offsets=[0, 0]) for n in range(20_000)}), ""),
    Case("20,001 tensors", pack({f"t{n}": entry(shape=[0], offsets=[0, 0]) for n in range(20_001)}), "20001"),
    Case("an empty name", pack({"": entry()}, FOUR), "tensor ''"),
    Case("a path as a name", pack({"../../etc/passwd": entry()}, FOUR), "etc/passwd"),
    Case("a NUL in a name", pack({"a\0b": entry()}, FOUR), "tensor"),
    Case("a line end in a name", pack({"a\n": entry()}, FOUR), "tensor"),
    Case("an escape in a name", pack({"\x1b[2J": entry()}, FOUR), "tensor"),
    Case("letters beyond ASCII in a name", pack({"\u7ea2": entry()}, FOUR), "tensor"),
    Case("a name of 257 letters", pack({"a" * 257: entry()}, FOUR), "tensor"),
    Case("a tensor that is a number", pack({"a": 1}), "tensor 'a'"),
    Case("a tensor that is a list", pack({"a": []}), "tensor 'a'"),
    Case("no dtype", pack({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR), "tensor 'a'"),
    Case("no shape", pack({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR), "tensor 'a'"),
    Case("no offsets", pack({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "tensor 'a'"),
    Case("one field more", pack({"a": entry() | {"x": 1}}, FOUR), "tensor 'a'"),
    # dtypes
    Case("an unknown dtype", pack({"a": entry("F31")}, FOUR), "tensor 'a'"),
    Case("dtype in small letters", pack({"a": entry("f32")}, FOUR), "tensor 'a'"),
    Case("dtype a number", pack({"a": entry(32)}, FOUR), "tensor 'a'"),
    Case("dtype a list", pack({"a": entry(["F32"])}, FOUR), "tensor 'a'"),
    Case("dtype that is half as wide", pack({"a": entry("F16")}, FOUR), "tensor 'a'"),
    Case("dtype that is twice as wide", pack({"a": entry("F64")}, FOUR), "tensor 'a'"),
    Case("float8", pack({"a": entry("F8_E4M3", [4])}, FOUR), "tensor 'a'"),
    Case("four bits", pack({"a": entry("F4", [8])}, FOUR), "tensor 'a'"),
    Case("complex", pack({"a": entry("C64", [1], [0, 8])}, FOUR * 2), "tensor 'a'"),
    # shapes
    Case("a scalar", pack({"a": entry(shape=[])}, FOUR), ""),
    Case("a dimension of zero", pack({"a": entry(shape=[0, 7], offsets=[0, 0])}), ""),
    Case("zero times a terabyte", pack({"a": entry(shape=[0, 1 << 40], offsets=[0, 0])}), ""),
    Case("zero dimensions that hide data", pack({"a": entry(shape=[0])}, FOUR), "tensor 'a'"),
    Case("a negative dimension", pack({"a": entry(shape=[-1])}, FOUR), "tensor 'a'"),
    Case("two negative dimensions", pack({"a": entry(shape=[-1, -1])}, FOUR), "tensor 'a'"),
    Case("a dimension of true", pack({"a": entry(shape=[True])}, FOUR), "tensor 'a'"),
    Case("a dimension of 1.0", pack({"a": entry(shape=[1.0])}, FOUR), "tensor 'a'"),
    Case("a dimension that is a text", pack({"a": entry(shape=["1"])}, FOUR), "tensor 'a'"),
    Case("a shape that is a text", pack({"a": entry(shape="1")}, FOUR), "tensor 'a'"),
    Case("nine dimensions", pack({"a": entry(shape=[1] * 9)}, FOUR), "tensor 'a'"),
    Case("a shape larger than the data", pack({"a": entry(shape=[2])}, FOUR), "tensor 'a'"),
    Case(
        "a shape smaller than the data", pack({"a": entry(shape=[1], offsets=[0, 8])}, FOUR * 2), "tensor 'a'"
    ),
    Case(
        "a product of 2^64 that is 0 in 64 bits", pack({"a": entry(shape=[1 << 32, 1 << 32])}, FOUR), "tensor"
    ),
    Case("a product of 2^64 + 4 bytes", pack({"a": entry(shape=[(1 << 62) + 1])}, FOUR), "tensor 'a'"),
    Case("a dimension of 2^80", pack({"a": entry(shape=[1 << 80])}, FOUR), "tensor 'a'"),
    # offsets
    Case("offsets backwards", pack({"a": entry(offsets=[4, 0])}, FOUR), "tensor 'a'"),
    Case("a negative offset", pack({"a": entry(offsets=[-4, 0])}, FOUR), "tensor 'a'"),
    Case("offsets into the header", pack({"a": entry(offsets=[-12, -8])}, FOUR), "tensor 'a'"),
    Case("offsets past the end", pack({"a": entry(offsets=[4, 8])}, FOUR), "tensor 'a'"),
    Case("offsets of 2^63", pack({"a": entry(offsets=[1 << 63, (1 << 63) + 4])}, FOUR), "tensor 'a'"),
    Case("one offset", pack({"a": entry(offsets=[0])}, FOUR), "tensor 'a'"),
    Case("three offsets", pack({"a": entry(offsets=[0, 4, 4])}, FOUR), "tensor 'a'"),
    Case("offsets of floats", pack({"a": entry(offsets=[0.0, 4.0])}, FOUR), "tensor 'a'"),
    Case("offsets null", pack({"a": entry(offsets=None)}, FOUR), "tensor 'a'"),
    Case("two tensors over each other", pack({"a": entry(), "b": entry()}, FOUR), "overlap"),
    Case(
        "one tensor half over another",
        pack({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(shape=[2], offsets=[4, 12])}, FOUR * 3),
        "overlap",
    ),
    Case("a gap", pack({"a": entry(), "b": entry(offsets=[8, 12])}, FOUR * 3), "a hole"),
    Case("a gap at the start", pack({"a": entry(offsets=[4, 8])}, FOUR * 2), "a hole"),
    Case("data that nobody names", pack({"a": entry()}, FOUR * 2), "bytes of data"),
    Case(
        "an empty tensor in the middle of another",
        pack({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(shape=[0], offsets=[4, 4])}, FOUR * 2),
        "overlap",
    ),
    # the numbers
    Case("NaN among the numbers", pack(ONE, numbers(float("nan"))), "not finite"),
    Case("infinity among the numbers", pack(ONE, numbers(float("inf"))), "not finite"),
    Case("a signalling NaN", pack(ONE, b"\x01\0\xa0\x7f"), "not finite"),
    Case("NaN in float16", pack({"a": entry("F16", [2])}, b"\x01\x7e\0\x3c"), "not finite"),
    Case("infinity in bfloat16", pack({"a": entry("BF16", [2])}, b"\x80\x7f\x80\x3f"), "not finite"),
    Case(
        "infinities that cancel",
        pack({"a": entry(shape=[2], offsets=[0, 8])}, numbers(float("inf"), float("-inf"))),
        "not finite",
    ),
    Case("the largest numbers", pack({"a": entry(shape=[2], offsets=[0, 8])}, numbers(3.4e38, 3.4e38)), ""),
    Case("a truth value of 7", pack({"a": entry("BOOL", [1], [0, 1])}, b"\x07"), ""),
)


def changed(header: Mapping[str, Any], **fields: Any) -> str:
    """A header as JSON with other fields; `...` takes one out."""
    return json.dumps({name: value for name, value in (dict(header) | fields).items() if value is not ...})


def bridge_headers(good: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> (text of a bridge's header, phrase), for the toy `mlp` bridge."""
    spec, tower = good["spec"], good["encoder"]
    cases: dict[str, tuple[str, str]] = {
        "no JSON": ("{", "header of the bridge is damaged"),
        "empty": ("", "header of the bridge is damaged"),
        "a list": ("[]", "a JSON object"),
        "NaN": ('{"format": NaN}', "not JSON"),
        "a field twice": ('{"format": 1, "format": 1}', "appears twice"),
        "deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, "Recursion"),
        "newer": (changed(good, format=2), "Update Language Bridge"),
        "far newer": (changed(good, format=1 << 70), "Update Language Bridge"),
        "format 0": (changed(good, format=0), "format 0"),
        "format -1": (changed(good, format=-1), "format -1"),
        "format a text": (changed(good, format="1"), "format '1'"),
        "no kind": (changed(good, kind=...), "no field 'kind'"),
        "an unknown kind": (changed(good, kind="perceiver"), "'perceiver'"),
        "a kind that is a path": (changed(good, kind="../errors"), "'../errors'"),
        "a kind that is a module": (changed(good, kind="base"), "'base'"),
        "a kind of a million letters": (changed(good, kind="a" * 1_000_000), "kind that this version"),
        "a kind in capitals": (changed(good, kind="MLP"), "'MLP'"),
        "the kind of another": (changed(good, kind="linear"), "fields"),
        "an unknown base": (changed(good, base="flux"), "'flux'"),
        "a base that is a path": (changed(good, base="../sd1"), "'../sd1'"),
        "an unknown U-Net part": (changed(good, unet="all"), "'all'"),
        "a U-Net part that is not there": (changed(good, unet="kv"), "no U-Net tensors"),
        "a spec that is a list": (changed(good, spec=[]), "spec"),
        "a spec with a field more": (changed(good, spec=spec | {"x": 1}), "fields"),
        "a spec of a million fields": (changed(good, spec={f"f{n}": 1 for n in range(200_000)}), "fields"),
        "no width": (changed(good, spec={k: v for k, v in spec.items() if k != "width"}), "fields"),
        "training a list": (changed(good, training=[]), "training"),
        "training of 4 MB": (changed(good, training={"x": "y" * 4_000_000}), ""),
        "languages a text": (changed(good, languages="zh"), "languages"),
        "languages of numbers": (changed(good, languages=[1]), "languages"),
        "no encoder": (changed(good, encoder=...), "encoder"),
        "an encoder without family": (changed(good, encoder={}), "fields"),
        "a window of a text": (changed(good, encoder=tower | {"window": "77"}), "window"),
        "a name with half of a letter": (changed(good, name="\ud800"), "Unicode"),
        "a name that is a path": (changed(good, name="../../x"), ""),
        "a source that is a path": (changed(good, source="C:\\x"), ""),
        "an identity that is a path": (changed(good, encoder=tower | {"identity": "../../x"}), ""),
    }
    for number in (0, -1, 1 << 24, (1 << 24) + 1, 1 << 31, 1 << 63, 1 << 200, 0.5, True, None, "8", [8]):
        for field in ("width", "depth", "hidden", "pooled"):
            if not (field == "pooled" and number == 0) and number is not None:
                cases[f"{field} = {str(number)[:20]}"] = changed(good, spec=spec | {field: number}), "found:"
    cases["width = null"] = changed(good, spec=spec | {"width": None}), "width"
    return cases


def tower_headers(good: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> (text of a tower's header, phrase), for the toy BERT."""
    spec = good["spec"]
    cases: dict[str, tuple[str, str]] = {
        "no JSON": ("{]", "header of the text tower is damaged"),
        "newer": (changed(good, format=99), "Update Language Bridge"),
        "an unknown family": (changed(good, family="elmo"), "'elmo'"),
        "a family that is a path": (changed(good, family="../bert"), "'../bert'"),
        "a family that is no family": (changed(good, family="guard"), "'guard'"),
        "family host": (changed(good, family="host"), "'host'"),
        "another family": (changed(good, family="t5"), "fields"),
        "a mask rule that is none": (changed(good, mask_rule="causal"), "mask rule"),
        "another digest": (changed(good, digest="0" * 64), "digest"),
        "no digest": (changed(good, digest=""), "digest"),
        "a digest in capitals": (changed(good, digest=good["digest"].upper()), "digest"),
        "eps of infinity": (changed(good, spec=spec | {"eps": 12345}).replace("12345", "1e999"), "too large"),
        "eps a text": (changed(good, spec=spec | {"eps": "1"}), "eps"),
    }
    for number in (0, -3, 1, 4096, 1 << 24, 1 << 80, 0.5):
        cases[f"window = {number}"] = changed(good, window=number), "found:"
        cases[f"heads = {number}"] = (
            changed(good, spec=spec | {"heads": number}),
            "found:" if number != 1 else "",
        )
        for field in ("vocab", "width", "layers", "inner"):
            cases[f"{field} = {number}"] = changed(good, spec=spec | {field: number}), "found:"
    for number in (9, -9, 1 << 40, 0.5):
        cases[f"layer = {number}"] = changed(good, layer=number), "found:"
    return cases


def tokenizers(good: bytes) -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes of a tokenizer.json, phrase), in the place of a whole one."""
    whole: dict[str, Any] = json.loads(good)

    def other(**fields: Any) -> bytes:
        return json.dumps(whole | fields, ensure_ascii=False).encode()

    def model(**fields: Any) -> bytes:
        return other(model=whole["model"] | fields)

    def replacing(content: str, times: int = 1) -> bytes:
        step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
        return other(normalizer={"type": "Sequence", "normalizers": [step] * times})

    def cutting(pattern: str) -> bytes:
        return other(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
        )

    def mapped(text: str) -> bytes:
        return other(normalizer={"type": "Precompiled", "precompiled_charsmap": text})

    vocabulary: dict[str, int] = whole["model"]["vocab"]
    many = {**vocabulary, **{f"w{n}": len(vocabulary) + n for n in range(100_000)}}
    return {
        "empty": (b"{}", "tokenizer cannot be used"),
        "no JSON": (b"{", "tokenizer cannot be used"),
        "no UTF-8": (b"\xff\xfe" + good, "UnicodeDecodeError"),
        "a BOM": (BOM + good, "tokenizer cannot be used"),
        "a list": (b"[]", "tokenizer cannot be used"),
        "deep": (b'{"normalizer":' * 100_000, "recursion limit"),
        "deep lists": (b"[" * 1_000_000, "tokenizer cannot be used"),
        "no model": (other(model=None), "tokenizer cannot be used"),
        "an unknown model": (model(type="Neural"), "tokenizer cannot be used"),
        "a vocabulary that is a list": (model(vocab=[]), "tokenizer cannot be used"),
        "a negative id": (model(vocab=vocabulary | {"x": -1}), "tokenizer cannot be used"),
        "an id of 2^32": (model(vocab=vocabulary | {"x": 1 << 32}), "tokenizer cannot be used"),
        "an id beyond the tower": (model(vocab=vocabulary | {"[SEP]": 10_000}), "ids up to 10000"),
        "too many words": (model(vocab=many), "ids up to"),
        "no end token": (
            other(model=whole["model"] | {"vocab": {"a": 0, "[UNK]": 1}}, added_tokens=[]),
            "found:",
        ),
        "a pattern that is none": (cutting("("), "tokenizer cannot be used"),
        "a pattern of 20,000 groups": (cutting("(" * 20_000 + ")" * 20_000), "depth limit"),
        "a map that is no base64": (mapped("!!!!"), "odd place"),
        "an empty map": (mapped(""), "a map of characters of 0 bytes"),
        "a map that announces 4 GiB": (mapped("/////wAAAAA="), "announces 4294967295"),
        "a map that announces 16 TiB": (mapped("/P///wAAAAA="), "announces"),
        "a map of an odd size": (mapped("AwAAAAAAAAA="), "announces 3"),
        "a map hidden by escapes": (
            mapped("/////wAAAAA=").replace(b"precompiled_charsmap", b"precompiled_ch\\u0061rsmap"),
            "written as escapes",
        ),
        "a map with an escaped line": (mapped("AA/A").replace(b"AA/A", b"AA\\/A"), "odd place"),
        "doubling forty times": (replacing("aa", 40), "times as long"),
        "a letter that becomes a million": (replacing("a" * 1_000_000), "times as long"),
        "prepending in rings": (
            other(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "xx"}] * 9}),
            "times as long",
        ),
        "padding to a gigabyte": (
            other(
                padding={
                    "strategy": {"Fixed": 10**9},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "[PAD]",
                }
            ),
            "",
        ),
        "padding with an id beyond": (
            other(
                padding={
                    "strategy": "BatchLongest",
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 4_000_000_000,
                    "pad_type_id": 0,
                    "pad_token": "[PAD]",
                }
            ),
            "padding with id",
        ),
        "dropout": (
            other(
                model={"type": "BPE", "dropout": 0.5, "unk_token": "[UNK]", "vocab": vocabulary, "merges": []}
            ),
            "dropout",
        ),
    }
