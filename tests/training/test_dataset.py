"""Every fault of a dataset is named by its file, and the other rows stay usable."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from language_bridge.bridges.errors import BridgeError
from language_bridge.training.dataset import (
    KINDS,
    LONGEST_TEXT,
    Dataset,
    Problem,
    fingerprint,
    from_lists,
    read_folder,
    read_pairs,
)

CAT = "\u4e00\u53ea\u732b"
DOG = "\u4e00\u53ea\u72d7"
BIRD = "\u4e00\u53ea\u9e1f"
RUSSIAN = "\u043a\u043e\u0442"
JAPANESE = "\u306d\u3053"
KOREAN = "\uace0\uc591\uc774"


@pytest.fixture(scope="session")
def png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (2, 2), (200, 10, 10)).save(file, "PNG")
    return file.getvalue()


Make = Callable[[Mapping[str, "bytes | str | None"]], Path]


@pytest.fixture
def make(tmp_path: Path, png: bytes) -> Make:
    """Makes a folder: name -> bytes, text (UTF-8), or None for a picture."""

    def made(files: Mapping[str, bytes | str | None]) -> Path:
        root = tmp_path / "set"
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                png if content is None else content.encode() if isinstance(content, str) else content
            )
        return root

    return made


def rows(dataset: Dataset) -> list[tuple[str, str, str]]:
    return [
        (example.picture.name if isinstance(example.picture, Path) else "", example.native, example.english)
        for example in dataset.examples
    ]


def faults(dataset: Dataset) -> set[tuple[str, str]]:
    return {(problem.place, problem.kind) for problem in dataset.problems}


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


# -- captions beside the pictures ------------------------------------------------------------------


def test_captions_beside_pictures(make: Make) -> None:
    read = read_folder(
        make(
            {
                "a.png": None,
                "a.txt": CAT,
                "b.PNG": None,
                "b.TXT": f"{DOG}\na dog\n",
                "in/c.png": None,
                "in/c.zh.txt": BIRD,
                "in/c.en.txt": "a bird",
                "d.png": None,
                "d.txt": CAT,
                "d.en.txt": "a cat",
                ".hidden/e.png": None,
                "notes.md": "x",
            }
        )
    )
    assert rows(read) == [
        ("a.png", CAT, ""),
        ("b.PNG", DOG, "a dog"),
        ("d.png", CAT, "a cat"),
        ("c.png", BIRD, "a bird"),
    ]
    assert not read.problems and read.name == "set"
    assert [example.native_only for example in read.examples] == [True, False, False, False]
    assert [example.place for example in read.examples] == ["a.txt", "b.TXT", "d.txt", "in/c.zh.txt"]


def test_every_fault_beside_a_picture_is_named_and_the_rest_is_read(make: Make, png: bytes) -> None:
    read = read_folder(
        make(
            {
                "good.png": None,
                "good.txt": CAT,
                "none.png": None,
                "empty.png": b"",
                "empty.txt": CAT,
                "fake.png": b"GIF89a" + bytes(40),
                "fake.txt": CAT,
                "cut.png": png[:-12],
                "cut.txt": CAT,
                "blank.png": None,
                "blank.txt": " \n\t\n",
                "void.png": None,
                "void.txt": b"",
                "old.png": None,
                "old.txt": CAT.encode("gbk"),
                "wrong.png": None,
                "wrong.txt": "a cat",
                "turned.png": None,
                "turned.txt": f"{CAT}\n{DOG}",
                "three.png": None,
                "three.txt": f"{CAT}\na cat\nanother",
                "lost.txt": CAT,
                "broken.png": None,
                "broken.txt": CAT + "\ufffd",
                "long.png": None,
                "long.txt": CAT * LONGEST_TEXT,
            }
        ),
        "zh",
    )
    assert rows(read) == [("good.png", CAT, "")]
    assert faults(read) == {
        ("none.png", "no_caption"),
        ("empty.png", "unreadable"),
        ("fake.png", "unreadable"),
        ("cut.png", "unreadable"),
        ("blank.txt", "empty"),
        ("void.txt", "empty"),
        ("old.txt", "encoding"),
        ("wrong.txt", "language"),
        ("turned.txt", "english"),
        ("three.txt", "lines"),
        ("lost.txt", "unused"),
        ("broken.txt", "broken"),
        ("long.txt", "file"),
    }
    assert all(problem.what and "{" not in problem.what for problem in read.problems)


def test_captions_in_two_languages_need_a_choice(make: Make) -> None:
    folder = make({"a.png": None, "a.zh.txt": CAT, "a.ja.txt": JAPANESE, "b.png": None, "b.txt": CAT})
    read = read_folder(folder)
    assert faults(read) == {("a.zh.txt", "columns")} and len(read.examples) == 1
    assert ("a.png", JAPANESE, "") in rows(read_folder(folder, "ja"))


# -- encodings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "list.jsonl", "list.csv", "list.tsv"])
def test_unicode_is_read_with_every_mark(make: Make, encoding: str, name: str) -> None:
    text = {
        "a.txt": f"{CAT}\na cat",
        "list.jsonl": json.dumps({"image": "a.png", "native": CAT, "english": "a cat"}, ensure_ascii=False),
        "list.csv": f"image,native,english\na.png,{CAT},a cat",
        "list.tsv": f"image\tnative\tenglish\na.png\t{CAT}\ta cat",
    }[name]
    assert rows(read_folder(make({"a.png": None, name: text.encode(encoding)}))) == [("a.png", CAT, "a cat")]


def test_utf_16_with_the_other_byte_first_is_read(make: Make) -> None:
    folder = make({"a.png": None, "a.txt": b"\xfe\xff" + CAT.encode("utf-16-be")})
    assert rows(read_folder(folder)) == [("a.png", CAT, "")]


@pytest.mark.parametrize(
    "data",
    [
        CAT.encode("gbk"),
        "\u8c93".encode("big5"),
        JAPANESE.encode("shift_jis"),
        KOREAN.encode("cp949"),
        RUSSIAN.encode("cp1251"),
        "caf\u00e9".encode("latin-1"),
        CAT.encode("utf-16-le"),
        "a cat".encode("utf-16-be"),
        CAT.encode("utf-32"),
        b"\xff\xfea",
        CAT.encode()[:-1],
    ],
)
@pytest.mark.parametrize("name", ["b.txt", "list.jsonl", "list.csv", "list.tsv"])
def test_any_other_encoding_is_a_problem_that_names_the_file(make: Make, data: bytes, name: str) -> None:
    read = read_folder(make({"a.png": None, "a.txt": CAT, "b.png": None, name: data}))
    assert rows(read) == [("a.png", CAT, "")]
    assert (name, "encoding") in faults(read)


@pytest.mark.parametrize(
    "text",
    [
        "\u043f\u0438\u0432\u043e",
        RUSSIAN,
        "caf\u00e9",
        "\u05e1\u05e2",
        "\u0393\u03ac\u03c4\u03b1",
        "\u0642\u0637\u0629",
        "na\u00efve, 25\u00b0",
    ],
)
def test_text_that_is_utf_8_is_not_taken_for_something_older(make: Make, text: str) -> None:
    assert rows(read_folder(make({"a.png": None, "a.txt": text}))) == [("a.png", text, "")]


@pytest.mark.parametrize("text", [CAT, "\u732b", "\u5c0f\u5b66"])
def test_short_gbk_that_happens_to_be_utf_8_is_noticed(make: Make, text: str) -> None:
    assert text.encode("gbk").decode("utf-8")
    read = read_folder(make({"a.png": None, "a.txt": text.encode("gbk"), "b.png": None, "b.txt": CAT}))
    assert faults(read) == {("a.txt", "encoding")}


# -- lists -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "native", "english"),
    [
        ({"image": "a.png", "native": CAT, "english": "a cat"}, CAT, "a cat"),
        ({"file_name": "a.png", "zh": CAT, "en": "a cat"}, CAT, "a cat"),
        ({"File Name": "a.png", "Chinese": CAT, "English": "a cat"}, CAT, "a cat"),
        ({"image": "a.png", "text": CAT}, CAT, ""),
        ({"image": "a.png", "caption": f"  {CAT} "}, CAT, ""),
        ({"image": "a.png", "caption": CAT, "caption_en": "a cat"}, CAT, "a cat"),
        ({"image": "a.png", "zh": CAT, "caption": "a cat"}, CAT, "a cat"),
        ({"image": "a.png", "native": CAT, "english": None}, CAT, ""),
        ({"image": "a.png", "caption_zh": CAT, "caption_en": "a cat"}, CAT, "a cat"),
        (
            {"image": "a.png", "caption_ori": f"{CAT} cat!", "caption_zh": DOG, "caption_en": "a dog"},
            f"{CAT}!",
            "",
        ),
        (
            {"image": "a.png", "caption_ori": "a cat", "caption_zh": CAT, "caption_en": "the cat"},
            CAT,
            "the cat",
        ),
        ({"image": "./a.png", "native": CAT, "id": 7, "size": [1, 2]}, CAT, ""),
    ],
)
def test_common_names_of_columns(make: Make, row: dict[str, object], native: str, english: str) -> None:
    assert rows(read_folder(make({"a.png": None, "list.jsonl": lines(row)}))) == [("a.png", native, english)]
    if all(isinstance(value, str) for value in row.values()):
        for name, delimiter in (("list.csv", ","), ("list.csv", ";"), ("list.tsv", "\t")):
            table = delimiter.join(row) + "\n" + delimiter.join(map(str, row.values()))
            read = read_folder(make({"a.png": None, "list.jsonl": "", name: table}))
            assert rows(read) == [("a.png", native, english)]
            assert ("list.jsonl", "empty") in faults(read)
            (make({}) / name).unlink()


def test_tables_without_a_header(make: Make) -> None:
    for text in (f"a.png\t{CAT}\ta cat\nb.png\t{DOG}\ta dog", f"a cat\ta.png\t{CAT}\na dog\tb.png\t{DOG}"):
        read = read_folder(make({"a.png": None, "b.png": None, "list.tsv": text}))
        assert rows(read) == [("a.png", CAT, "a cat"), ("b.png", DOG, "a dog")] and not read.problems
    read = read_folder(make({"a.png": None, "b.png": None, "list.tsv": f"a.png\t{CAT}\nb.png\t{DOG}"}))
    assert rows(read) == [("a.png", CAT, ""), ("b.png", DOG, "")]


def test_commas_and_line_ends_inside_quotes(make: Make) -> None:
    text = f'image,native,english\r\na.png,"{CAT},\n{DOG}","a ""cat"", a dog"\r\nb.png,{BIRD},\r\n'
    read = read_folder(make({"a.png": None, "b.png": None, "list.csv": text}))
    assert rows(read) == [("a.png", f"{CAT},\n{DOG}", 'a "cat", a dog'), ("b.png", BIRD, "")]
    read = read_folder(make({"a.png": None, "b.png": None, "list.csv": text + 'c.png,"open'}))
    assert len(read.examples) == 2 and ("list.csv", "row") in faults(read)


def test_every_fault_of_a_row_is_named_and_the_rest_is_read(make: Make) -> None:
    good = {"image": "a.png", "zh": CAT, "en": "a cat"}
    read = read_folder(
        make(
            {
                "a.png": None,
                "b.png": b"",
                "list.jsonl": lines(
                    good,
                    good,
                    {"image": "gone.png", "zh": CAT},
                    {"image": "b.png", "zh": CAT},
                    {"image": "a.png", "zh": "a cat", "en": CAT},
                    {"image": "a.png", "zh": CAT, "en": DOG},
                    {"image": "a.png", "zh": ""},
                    {"image": "a.png"},
                    {"zh": CAT},
                    {"image": 7, "zh": CAT},
                    {"image": "a.png", "zh": [CAT]},
                    {"image": "a.png", "zh": CAT + "\ud800"},
                    {"image": "a.png", "zh": CAT + "\0"},
                    [1],
                )
                + "{torn\n"
                + "[" * 100_000
                + "\n"
                + lines({"image": "a.png", "zh": DOG}),
            }
        ),
        "zh",
    )
    assert rows(read) == [("a.png", CAT, "a cat"), ("a.png", DOG, "")]
    kinds = (
        "duplicate absent unreadable language english no_caption columns no_picture row row broken broken row"
    )
    assert faults(read) == {
        (f"list.jsonl line {number}", kind) for number, kind in enumerate([*kinds.split(), "row", "row"], 2)
    }


def test_columns_that_do_not_say_what_they_are_are_not_guessed(make: Make) -> None:
    for row in (
        {"image": "a.png", "zh": CAT, "ja": JAPANESE},
        {"image": "a.png", "caption": CAT, "text": DOG},
        {"image": "a.png", "who": CAT},
    ):
        read = read_folder(make({"a.png": None, "b.png": None, "b.txt": CAT, "list.jsonl": lines(row)}))
        assert ("list.jsonl line 1", "columns") in faults(read) and len(read.examples) == 1
    row = {"image": "a.png", "zh": CAT, "ja": JAPANESE}
    assert rows(read_folder(make({"a.png": None, "list.jsonl": lines(row)}), "ja"))[0] == (
        "a.png",
        JAPANESE,
        "",
    )
    with pytest.raises(BridgeError, match="columns|column"):
        read_folder(make({"list.jsonl": lines({"image": "a.png", "zh": CAT}), "b.txt": ""}), "ko")


def test_a_list_goes_before_the_text_beside_a_picture_and_says_so(make: Make) -> None:
    read = read_folder(
        make(
            {
                "a.png": None,
                "a.txt": DOG,
                "b.png": None,
                "b.txt": BIRD,
                "l.jsonl": lines({"image": "a.png", "zh": CAT}),
            }
        )
    )
    assert rows(read) == [("a.png", CAT, ""), ("b.png", BIRD, "")]
    assert faults(read) == {("*.txt", "unused")}


def test_a_list_without_pictures_is_left_to_those_who_want_pairs(make: Make) -> None:
    read = read_folder(make({"a.png": None, "a.txt": CAT, "pairs.jsonl": lines({"zh": CAT, "en": "a cat"})}))
    assert len(read.examples) == 1 and ("pairs.jsonl", "pairs") in faults(read)


def test_line_separators_inside_a_caption_do_not_end_a_row(make: Make) -> None:
    row = json.dumps({"image": "a.png", "zh": CAT + "\u2028" + DOG + "\x85"}, ensure_ascii=False)
    assert rows(read_folder(make({"a.png": None, "l.jsonl": row})))[0][1] == CAT + "\u2028" + DOG


def test_names_in_lists_may_be_composed_or_not(make: Make) -> None:
    folder = make({"e\u0301.png": None, "l.jsonl": lines({"image": "\u00e9.png", "zh": CAT})})
    assert len(read_folder(folder).examples) == 1


# -- containment -----------------------------------------------------------------------------------

ESCAPES = [
    "../out.png",
    "..\\out.png",
    "in/../../out.png",
    "in\\..\\..\\out.png",
    "in/..\\../out.png",
    ".. /out.png",
    "... /out.png",
    "/etc/passwd",
    "/out.png",
    "//server/share/out.png",
    "\\\\server\\share\\out.png",
    "\\out.png",
    "C:\\out.png",
    "C:out.png",
    "c:/out.png",
    "\\\\?\\C:\\out.png",
    "file:///out.png",
    "https://example.org/out.png",
    "a.png:stream",
    "a.png::$DATA",
    "a.png\0.txt",
    "CON",
    "con.png",
    "in/NUL .png",
    "in\\COM1.png",
    "LPT\u00b9.png",
    "./../out.png",
    "in/...../out.png",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_in_a_list_leaves_the_folder(make: Make, tmp_path: Path, png: bytes, name: str) -> None:
    folder = make(
        {
            "a.png": None,
            "in/b.png": None,
            "l.jsonl": lines({"image": name, "zh": CAT}, {"image": "a.png", "zh": CAT}),
        }
    )
    (tmp_path / "out.png").write_bytes(png)
    read = read_folder(folder)
    assert rows(read) == [("a.png", CAT, "")]
    assert ("l.jsonl line 1", "leaves") in faults(read)


@settings(max_examples=300, deadline=None)
@given(name=st.text(st.sampled_from("./\\:~ ab\0.png\u2025\uff0e\uff0f"), max_size=24))
def test_whatever_a_name_is_a_picture_lies_in_the_folder(tmp_path_factory: Any, name: str) -> None:
    from language_bridge.training.dataset import _Odd, _place_of

    for folder in ("", "in/"):
        try:
            place = _place_of(folder, name)
        except _Odd:
            continue
        for system in (os.path, __import__("ntpath"), __import__("posixpath")):
            root = "C:\\set" if system.__name__ == "ntpath" else "/set"
            whole = system.normpath(system.join(root, place))
            assert system.commonpath([root, whole]) == root and whole != root


@pytest.mark.skipif(os.name != "posix", reason="making links needs a privilege on Windows")
def test_links_that_leave_the_folder_are_refused_and_others_are_followed(
    make: Make, tmp_path: Path, png: bytes
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.png").write_bytes(png)
    (outside / "x.txt").write_text(DOG, encoding="utf-8")
    folder = make(
        {
            "a.png": None,
            "a.txt": CAT,
            "c.txt": BIRD,
            "l.jsonl": lines({"image": "b.png", "zh": CAT}, {"image": "far/x.png", "zh": CAT}),
        }
    )
    (folder / "b.png").symlink_to(outside / "x.png")
    (folder / "b.txt").symlink_to(outside / "x.txt")
    (folder / "far").symlink_to(outside)
    (folder / "c.png").symlink_to(folder / "a.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "round").symlink_to(folder)
    read = read_folder(folder)
    assert rows(read) == [("a.png", CAT, ""), ("c.png", BIRD, "")]
    assert faults(read) == {
        (place, "leaves")
        for place in ("b.png", "b.txt", "far", "loop.png", "l.jsonl line 1", "l.jsonl line 2")
    }


# -- nothing usable --------------------------------------------------------------------------------


def test_a_folder_with_nothing_usable_is_an_error_that_lists_the_first_problems(make: Make) -> None:
    with pytest.raises(BridgeError) as caught:
        read_folder(make({f"{number:02}.png": None for number in range(12)}))
    assert "00.png: there is no caption" in caught.value.found and "and 4 more" in caught.value.found
    assert caught.value.action


def test_a_folder_that_is_none_and_a_language_that_is_none(make: Make, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="There is no folder"):
        read_folder(tmp_path / "gone")
    with pytest.raises(BridgeError, match="Nothing in set"):
        read_folder(make({"x.bin": b"x"}))
    with pytest.raises(BridgeError, match="language"):
        read_folder(make({"a.png": None, "a.txt": CAT}), "klingon")


# -- sentence pairs --------------------------------------------------------------------------------


def pairs(make: Make, name: str, text: str, language: str = "any") -> Dataset:
    return read_pairs(make({name: text}) / name, language)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.tsv", f"a cat\t{CAT}\na dog\t{DOG}\n"),
        ("p.tsv", f"{CAT}\ta cat\n\n{DOG}\ta dog\n"),
        ("p.tsv", f"english\tnative\na cat\t{CAT}\na dog\t{DOG}\n"),
        ("p.tsv", f"zh\ten\n{CAT}\ta cat\n{DOG}\ta dog\n"),
        ("p.csv", f"a cat,{CAT}\na dog,{DOG}\n"),
        ("p.csv", f"id;Chinese;English\n1;{CAT};a cat\n2;{DOG};a dog\n"),
        ("p.jsonl", lines({"en": "a cat", "zh": CAT}, {"zh": DOG, "en": "a dog"})),
        (
            "p.jsonl",
            lines(*({"translation": {"en": e, "zh": z}} for e, z in (("a cat", CAT), ("a dog", DOG)))),
        ),
    ],
)
@pytest.mark.parametrize("language", ["any", "zh"])
def test_sentence_pairs_in_either_order(make: Make, name: str, text: str, language: str) -> None:
    read = pairs(make, name, text, language)
    assert rows(read) == [("", CAT, "a cat"), ("", DOG, "a dog")] and not read.problems


def test_what_stands_behind_a_pair_is_not_used_and_said(make: Make) -> None:
    read = pairs(make, "p.tsv", f"a cat\t{CAT}\tCC-BY\na dog\t{DOG}\tCC-BY")
    assert len(read.examples) == 2 and faults(read) == {("p.tsv", "unused")}


def test_every_fault_of_a_pair_is_named(make: Make) -> None:
    text = f'a cat\t{CAT}\nalone\n{DOG}\ta dog\na cat\t{CAT}\n\t{BIRD}\na bird\t\n"quoted\t{BIRD}\n'
    read = pairs(make, "p.tsv", text)
    assert rows(read) == [("", CAT, "a cat"), ("", BIRD, '"quoted')]
    kinds = {2: "row", 3: "english", 4: "duplicate", 5: "no_english", 6: "no_caption"}
    assert faults(read) == {(f"p.tsv line {number}", kind) for number, kind in kinds.items()}


def test_languages_in_english_letters_need_a_header(make: Make) -> None:
    read = pairs(make, "p.tsv", "french\tenglish\nun chat\ta cat", "fr")
    assert rows(read) == [("", "un chat", "a cat")]
    with pytest.raises(BridgeError, match="header"):
        pairs(make, "p.tsv", "un chat\ta cat", "fr")
    with pytest.raises(BridgeError, match="header"):
        pairs(make, "p.tsv", f"{CAT}\t{JAPANESE}")


@pytest.mark.parametrize(
    ("language", "fits", "odd"),
    [
        ("zh", CAT, RUSSIAN),
        ("ja", JAPANESE, KOREAN),
        ("ja", CAT, RUSSIAN),
        ("ko", KOREAN, CAT),
        ("ru", RUSSIAN, CAT),
        ("ar", "\u0642\u0637", RUSSIAN),
        ("he", "\u05d7\u05ea\u05d5\u05dc", CAT),
        ("th", "\u0e41\u0e21\u0e27", CAT),
        ("hi", "\u092c\u093f\u0932\u094d\u0932\u0940", CAT),
        ("fr", "un chat", CAT),
        ("any", RUSSIAN, "123 !"),
    ],
)
def test_a_caption_in_the_wrong_language_is_named(make: Make, language: str, fits: str, odd: str) -> None:
    text = lines({"native": fits, "en": "a cat"}, {"native": odd, "en": "a cat"})
    read = pairs(make, "p.jsonl", text, language)
    assert [example.native for example in read.examples] == [fits]
    assert faults(read) == {("p.jsonl line 2", "language")}


def test_only_lists_are_files_of_pairs(make: Make) -> None:
    with pytest.raises(BridgeError, match="no file of sentence pairs"):
        pairs(make, "p.txt", f"a\t{CAT}")
    with pytest.raises(BridgeError, match="Nothing in p.tsv"):
        pairs(make, "p.tsv", "")
    with pytest.raises(BridgeError, match="No such file"):
        read_pairs(make({"x.tsv": ""}) / "gone.tsv")


# -- lists of other nodes --------------------------------------------------------------------------


def test_lists_of_other_nodes_become_examples() -> None:
    picture, latent, said = torch.rand(4, 4, 3), torch.randn(4, 2, 2), torch.randn(77, 8)
    read = from_lists(
        [CAT, "", DOG],
        pictures=[picture, picture, picture],
        latents=[latent, latent, latent.log()],
        rows=[said, said, said],
        pooled=[None, None, None],
    )
    (example,) = read.examples
    assert example.native == CAT and example.picture is picture and example.latent is latent
    assert example.rows is said and not example.native_only
    assert faults(read) == {("item 2", "no_caption"), ("item 3", "tensor")}
    assert len(from_lists([CAT, CAT], [" a cat", ""]).examples) == 2  # two pictures may have one caption


@pytest.mark.parametrize("odd", [{"english": ["a"]}, {"pictures": [torch.rand(2, 2, 3)] * 3}])
def test_lists_of_other_lengths_do_not_belong_together(odd: dict[str, Any]) -> None:
    with pytest.raises(BridgeError, match="do not belong together"):
        from_lists([CAT, DOG], **odd)


# -- fingerprint, polling, size --------------------------------------------------------------------


def test_the_fingerprint_follows_the_content(make: Make, png: bytes) -> None:
    folder = make({"a.png": None, "a.txt": CAT})
    seen = [fingerprint(folder)]
    assert fingerprint(folder) == seen[0]
    changes: list[Callable[[], object]] = [
        lambda: make({"a.txt": DOG + DOG}),
        lambda: make({"b.png": None}),
        lambda: (folder / "b.png").rename(folder / "c.png"),
        lambda: os.utime(folder / "a.png", ns=(1, 1)),
        lambda: (folder / "a.txt").unlink(),
    ]
    for change in changes:
        change()
        assert fingerprint(folder) not in seen
        seen.append(fingerprint(folder))
    assert fingerprint(make({"p.tsv": "x"}) / "p.tsv") != fingerprint(make({"p.tsv": "xy"}) / "p.tsv")


def test_reading_can_be_stopped(make: Make) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    text = lines(*({"en": f"cat {number}", "zh": CAT} for number in range(1000)))
    folder = make({"p.jsonl": text, **{f"{n}.png": None for n in range(300)}})
    with pytest.raises(Stop):
        read_pairs(folder / "p.jsonl", poll=stop)
    with pytest.raises(Stop):
        read_folder(folder, poll=stop)


def test_many_rows_are_read_in_seconds(make: Make) -> None:
    """10,000 rows; the limit is several times what they take, and a hundred thousand stay in seconds."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["image", "native", "english"])
    writer.writerows([f"{n % 50}.png", f"{CAT}{n}", f"cat {n}"] for n in range(10_000))
    folder = make({"l.csv": file.getvalue(), **{f"{n}.png": None for n in range(50)}})
    start = time.process_time()
    assert len(read_folder(folder, "zh").examples) == 10_000
    assert time.process_time() - start < 2


def test_the_pocket_world_as_a_users_folder_holds_nothing_that_is_tested_later(tmp_path: Path) -> None:
    from language_bridge.pocket import captions
    from language_bridge.pocket.painter import HELD_OUT_PAIRS
    from language_bridge.recipes import pocket_dataset

    for name in ("a", "b"):
        pocket_dataset.write(tmp_path / name, 40, 3)
    pocket_dataset.write(tmp_path / "c", 40, 4)
    held = {form for slot in captions.grammar()["zh"].values() for form in _held(slot)}
    for read in (
        read_folder(tmp_path / "a" / pocket_dataset.PICTURES, "zh"),
        read_pairs(tmp_path / "a" / pocket_dataset.PAIRS, "zh"),
    ):
        assert not read.problems and 38 <= len(read.examples) <= 40
        for example in read.examples:
            native, english = captions.parse(example.native), captions.parse(example.english)
            assert native is not None and english is not None
            assert sorted(thing.shape for thing in native.wanted) == sorted(t.shape for t in english.wanted)
            assert not {(thing.colour, thing.shape) for thing in native.wanted} & set(HELD_OUT_PAIRS)
            assert not [form for form in held if form in example.native]
    files = [sorted(path for path in (tmp_path / n).rglob("*") if path.is_file()) for n in "abc"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert [path.read_bytes() for path in files[0]] != [path.read_bytes() for path in files[2]]


def _held(slot: Any) -> list[str]:
    """Words that are held out and are part of no word that is not."""
    if not isinstance(slot, dict) or "seen" in slot:
        return []
    seen = [form for value in slot.values() for form in value["seen"]]
    return [form for value in slot.values() for form in value["held"] if not any(form in s for s in seen)]


def test_every_kind_of_problem_has_its_sentence() -> None:
    for kind in KINDS:
        assert Problem("x", kind, "y").what
