"""Reads what a bridge learns from: pictures with captions, or sentence pairs, and says what is wrong by file.

A folder holds pictures (also in sub-folders), and their captions in

- `cat.txt` beside `cat.png`: the native caption, and on a second line the English one, if there is any; or
  the two as `cat.zh.txt` and `cat.en.txt`;
- lists: `.jsonl`, `.csv` or `.tsv` whose rows name pictures (relative to the list) and their captions.

A sentence-pair file is such a list without pictures. Nothing is guessed in silence: a row that is not clear
becomes a `Problem`, and the other rows stay usable.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from torch import Tensor

from ..bridges.errors import BridgeError
from .languages import ANY, LANGUAGES, NAMES, has_latin, is_latin, require_language, speaks, stands_out
from .pictures import SUFFIXES, fault_of
from .published import FOUND, Rules

if TYPE_CHECKING:
    from _typeshed import StrPath

LIST_SUFFIXES = (".jsonl", ".csv", ".tsv")
"""Files with one row for each picture or sentence pair."""
LARGEST_LIST_BYTES = 2 << 30
LARGEST_CAPTION_BYTES = 64 << 10
LONGEST_TEXT = 8_000
"""Characters of one caption; a longer one is a page, not a caption."""

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "no_caption": "there is no caption",
        "no_english": "there is no English sentence",
        "no_picture": "the row names no picture",
        "absent": "the picture is not there: {found}",
        "unreadable": "the picture cannot be read: {found}",
        "leaves": "the name leads out of the folder: {found}",
        "empty": "the file is empty",
        "encoding": "the text is not UTF-8: {found}. Save the file as UTF-8",
        "broken": "the text holds broken characters: {found}",
        "language": "the caption has no letter of its language: {found}",
        "english": "the English text has no Latin letter: {found}",
        "long": "the text is too long for a caption: {found}",
        "lines": "{found} lines; the first is the native caption, a second the English one, and no more",
        "duplicate": "the same as {found}",
        "row": "the row cannot be read: {found}",
        "columns": "it is not clear which column is what: {found}",
        "pairs": "the list names no pictures; choose it as a file of sentence pairs",
        "unused": "not used: {found}",
        "file": "the file cannot be read: {found}",
        "tensor": "what came in cannot be used: {found}",
    }
)
"""What can be wrong with a row, by the names that translations go by."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row or a file: where, one of `KINDS`, and what was found there."""

    place: str
    kind: str
    found: str = ""

    @property
    def what(self) -> str:
        """The problem in words."""
        return KINDS[self.kind].format(found=self.found)


@dataclass(frozen=True, eq=False)
class Example:
    """One row of data.

    native: the caption in the bridge's language, never empty. english: the same in English; "" where there
    is none to be trusted. picture: its file, or [H, W, 3] in 0..1; None for a sentence pair. place: where the
    row was found. latent [4, h, w], as the host's VAE gives it, rows [N, C] (what the checkpoint's own CLIP
    says of the English text) and pooled [P] are there only where somebody computed them already.
    """

    native: str
    english: str = ""
    picture: Path | Tensor | None = None
    place: str = ""
    latent: Tensor | None = None
    rows: Tensor | None = None
    pooled: Tensor | None = None

    @property
    def native_only(self) -> bool:
        """Whether nothing English stands beside the caption (flag z of PEA-Diffusion)."""
        return not self.english and self.rows is None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in a fixed order, what is wrong with the rows that are not among them, and their language."""

    name: str
    examples: tuple[Example, ...]
    problems: tuple[Problem, ...] = ()
    language: str = ANY


def _no_poll() -> None:
    pass


def read_folder(folder: StrPath, language: str = ANY, poll: Callable[[], None] = _no_poll) -> Dataset:
    """Pictures with their captions; a list goes before the `.txt` files of the pictures that it names.

    language: one of `LANGUAGES`. poll: called every few hundred files or rows; what it raises ends the
    reading. Pictures are looked at (first and last bytes) and not decoded. BridgeError when the folder
    cannot be read or nothing in it is usable.
    """
    require_language(language)
    root = _real_folder(folder)
    reading = _Reading(language, poll)
    files = _walk(root, reading)
    lists = [name for name in files.others if _suffix(name) in LIST_SUFFIXES]
    for name in lists:
        _read_picture_list(name, files, reading)
    _read_beside(files, reading)
    return reading.finish(
        root.name,
        f"pictures ({', '.join(SUFFIXES)}) with a caption beside them (.txt), or named in a list "
        f"({', '.join(LIST_SUFFIXES)})",
    )


def read_pairs(file: StrPath, language: str = ANY, poll: Callable[[], None] = _no_poll) -> Dataset:
    """Sentence pairs of a `.tsv`, `.csv` or `.jsonl` file.

    Which column is English is said by the header or, where there is none, by the letters of the first rows.
    Arguments and errors are those of `read_folder`.
    """
    require_language(language)
    path = Path(file)
    reading = _Reading(language, poll)
    if _suffix(path.name) not in LIST_SUFFIXES:
        raise BridgeError(
            f"{path.name} is no file of sentence pairs.",
            f"the suffix {path.suffix!r}",
            f"one of {', '.join(LIST_SUFFIXES)}",
            "Save the pairs as English<TAB>native, one pair in a line, in a .tsv file.",
        )
    try:
        rows = _rows_of(path.name, _decode(_bytes_of(path, LARGEST_LIST_BYTES)), reading, pictures=False)
        for place, row in rows:
            try:
                columns = _columns_of(tuple(row), language)
                native, english = columns.texts(row)
                _check(native, english, language)
                if not english:
                    raise _Odd("no_english")
            except _Odd as odd:
                reading.report(place, odd)
                continue
            reading.take(Example(native, english, None, place), "")
    except _Odd as odd:
        reading.report(path.name, odd)
    return reading.finish(path.name, "rows with an English and a native sentence")


def from_lists(
    natives: Sequence[str],
    english: Sequence[str] = (),
    *,
    pictures: Sequence[Tensor] = (),
    latents: Sequence[Tensor] = (),
    rows: Sequence[Tensor] = (),
    pooled: Sequence[Tensor | None] = (),
    language: str = ANY,
    name: str = "lists",
) -> Dataset:
    """A dataset of what other nodes have loaded or computed: the n-th of each list belong together.

    pictures: [H, W, 3] in 0..1. latents: [C, h, w]. rows: [N, C], pooled: [P]. An empty list is one that was
    not given. BridgeError when lengths differ or nothing is usable.
    """
    require_language(language)
    given: dict[str, Sequence[object]] = {
        "english": english,
        "images": pictures,
        "latents": latents,
        "conditioning": rows,
    }
    odd_lengths = {key: len(value) for key, value in given.items() if value and len(value) != len(natives)}
    if odd_lengths:
        raise BridgeError(
            "The lists do not belong together.",
            ", ".join(f"{count} {key}" for key, count in odd_lengths.items()) + f", {len(natives)} texts",
            "as many of each as there are native texts, or none",
            "Connect lists that come from the same folder in the same order.",
        )
    reading = _Reading(language, _no_poll)
    for number, text in enumerate(natives):
        place = f"item {number + 1}"
        try:
            parts = [_text(text), _text(english[number]) if english else ""]
            _check(parts[0], parts[1], language)
            example = Example(
                parts[0],
                parts[1],
                _finite(pictures[number], 3, "picture") if pictures else None,
                place,
                _finite(latents[number], 3, "latent") if latents else None,
                _finite(rows[number], 2, "conditioning") if rows else None,
                pooled[number] if pooled else None,
            )
        except _Odd as odd:
            reading.report(place, odd)
            continue
        reading.examples.append(example)
    return reading.finish(name, "native texts, with images, latents or English beside them")


def _finite(tensor: Tensor, dimensions: int, noun: str) -> Tensor:
    if tensor.ndim != dimensions or not tensor.numel():
        raise _Odd("tensor", f"a {noun} of shape {list(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise _Odd("tensor", f"a {noun} with numbers that are not finite")
    return tensor


def fingerprint(path: StrPath) -> str:
    """A hex digest that changes when a file of the dataset does: names, sizes and times of change."""
    target = Path(path)
    total = hashlib.sha256()

    def note(name: str, facts: os.stat_result) -> None:
        total.update(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))

    if target.is_dir():
        files = _walk(target.resolve(), _Reading(ANY, _no_poll))
        for name, where in sorted((files.pictures | files.others).items()):
            note(name, os.stat(where))
    else:
        note(target.name, target.stat())
    return total.hexdigest()


# -- which column is what --------------------------------------------------------------------------

_IMAGES = ("image", "file_name", "filename", "picture", "image_path", "image_file", "img", "path", "file")
_RULES = Rules()
_GENERIC = ("caption", "text", "prompt", "description", "sentence")
_FORMS = ("{}", "caption_{}", "text_{}", "prompt_{}", "{}_caption", "{}_text", "{}_prompt")
_ENGLISH = tuple(form.format(name) for form in _FORMS for name in ("english", "en", "eng"))
_NATIVE: Mapping[str, str] = {
    form.format(name): code
    for form in _FORMS
    for name, code in (("native", ""), *((code, code) for code in LANGUAGES[1:]), *NAMES.items())
    if name != "id"  # a number of the row far more often than Indonesian
}
"""Name of a column -> the language that it speaks; "" where the name does not say which."""


class _Odd(Exception):
    """Why a row or a file is not used: the kind and the finding of a `Problem`."""

    def __init__(self, kind: str, found: str = "") -> None:
        super().__init__(kind, found)
        self.kind = kind
        self.found = found


@dataclass(frozen=True)
class _Columns:
    """Which column is what; published: the row has the fields of PEA's layout."""

    image: str | None
    native: str
    english: str | None
    published: bool = False

    def texts(self, row: Mapping[str, object]) -> tuple[str, str]:
        """Native and English text of a row, stripped; _Odd where one is no text."""
        if self.published:
            found = _RULES.read(row)
            return found.native, "" if found.native_only else found.english
        return _text(row.get(self.native)), "" if self.english is None else _text(row.get(self.english))


@lru_cache(maxsize=256)
def _columns_of(names: tuple[str, ...], language: str) -> _Columns:
    """Which column is what, by the names; _Odd when they do not say it."""
    plain = {_plain(name): name for name in names}
    image = next((plain[name] for name in _IMAGES if name in plain), None)
    if any(name in names for name in FOUND):
        return _Columns(image, "", None, published=True)
    english = next((plain[name] for name in _ENGLISH if name in plain), None)
    natives = {name: _NATIVE[name] for name in plain if name in _NATIVE}
    generic = [name for name in _GENERIC if name in plain]
    wanted = [name for name, code in natives.items() if code in ("", language)] or (
        list(natives) if language == ANY else []
    )
    wanted = [name for name in wanted if not natives[name]] or wanted
    if len(wanted) == 1:
        if english is None and len(generic) == 1:
            english = plain[generic[0]]
        return _Columns(image, plain[wanted[0]], english)
    if not natives and len(generic) == 1:
        return _Columns(image, plain[generic[0]], english)
    raise _Odd("columns", _few(names))


def _plain(name: str) -> str:
    return re.sub(r"[\s\-.]+", "_", name.strip().casefold())


def _known(name: str) -> bool:
    name = _plain(name)
    return name in _IMAGES or name in _GENERIC or name in _ENGLISH or name in _NATIVE or name in FOUND


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Odd("row", f"{value!r:.60} is no text")
    return value.strip()


def _check(native: str, english: str, language: str) -> None:
    """_Odd when a caption is missing, broken, too long or in the wrong language."""
    if not native:
        raise _Odd("no_caption")
    for text in (native, english):
        if len(text) > LONGEST_TEXT:
            raise _Odd("long", f"{len(text)} characters, at most {LONGEST_TEXT}")
        if not text.isascii() or "\0" in text:
            odd = next((c for c in text if c in "\0\ufffd" or "\ud800" <= c <= "\udfff"), None)
            if odd is not None:
                raise _Odd("broken", f"U+{ord(odd):04X}")
    if not speaks(native, language):
        raise _Odd("language", _shown(native))
    if english and not has_latin(english):
        raise _Odd("english", _shown(english))


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:39] + "\u2026"


def _few(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(_shown(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


# -- bytes, text, rows -----------------------------------------------------------------------------


def _bytes_of(path: StrPath, most: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise _Odd("file", getattr(error, "strerror", None) or str(error)) from error
    if len(data) > most:
        raise _Odd("file", f"more than {most} bytes")
    return data


def _decode(data: bytes) -> str:
    """UTF-8 with or without its mark, or UTF-16 with its mark; _Odd on anything else and on an empty file."""
    if data[:4] in (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"):
        raise _Odd("encoding", "it is UTF-32")
    name = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        if name == "utf-16":
            raise _Odd("encoding", f"damaged UTF-16 at byte {error.start}") from error
        found = f"byte 0x{data[error.start]:02X} at {error.start}"
        try:
            data.decode("gb18030")
            found += ", perhaps GBK"
        except UnicodeDecodeError:
            pass
        raise _Odd("encoding", found) from error
    if not text.strip():
        raise _Odd("empty")
    if "\0" in text:
        raise _Odd("encoding", "it holds zero bytes, as UTF-16 without a mark does")
    other = _mistaken(data, text)
    if other:
        raise _Odd("encoding", f"it makes sense as {other} alone")
    return text


_ALPHABETS = (
    "\u00c0-\u024f",
    "\u0384-\u03ce",
    "\u0400-\u045f\u0490\u0491",
    "\u0531-\u0587",
    "\u05d0-\u05f4",
    "\u0600-\u06ff",
)
"""Latin beyond ASCII, Greek, Cyrillic, Armenian, Hebrew, Arabic: what UTF-8 writes in two bytes."""
_OLDER = ("gb2312", "big5", "euc_kr", "euc_jp")


def _mistaken(data: bytes, text: str) -> str | None:
    """The older encoding of a short text whose bytes happen to be UTF-8 as well; None where they do not.

    In GBK "a cat" is D2BB D6BB C3A8, which as UTF-8 is one letter each of Bashkir, a Hebrew point and French.
    Only such a medley is doubted, and only when all of it is text in the older encoding.
    """
    beyond = {character for character in text if character > "\x7f"}
    letters = "".join(character for character in beyond if character > "\xbf" and character not in "\xd7\xf7")
    if not letters or max(beyond) > "\u07ff":
        return None
    alphabet = next((n for n, each in enumerate(_ALPHABETS) if re.fullmatch(f"[{each}]+", letters)), None)
    if alphabet is not None and (alphabet or re.search("[A-Za-z]", text)):
        return None
    for name in _OLDER:
        try:
            data.decode(name)
        except UnicodeDecodeError:
            continue
        return name
    return None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # str.splitlines would also cut at characters that captions may hold, such as U+2028.
    for number, line in enumerate(re.split("\r\n|\n|\r", text), 1):
        if line.strip():
            yield number, line


Row = Mapping[str, object]


def _rows_of(name: str, text: str, reading: _Reading, pictures: bool) -> Iterator[tuple[str, Row]]:
    """(place, row by column) of a list; what cannot be read is reported there."""
    if _suffix(name) == ".jsonl":
        yield from _json_rows(name, text, reading)
        return
    cells = _tabs(text) if _suffix(name) == ".tsv" else _commas(text)
    waiting: list[tuple[int, list[str]]] = []
    try:
        for numbered in islice(cells, 1000):
            waiting.append(numbered)
    except _Odd as odd:
        reading.report(name, odd)
    if not waiting:
        return
    if sum(map(_known, waiting[0][1])) >= 2:
        head = waiting.pop(0)[1]
        if len(set(map(_plain, head))) != len(head):
            raise _Odd("columns", _few(head))
    else:
        head = _guessed([row for _, row in waiting], reading, name, pictures)
    try:
        for number, row in (*waiting, *cells):
            place = f"{name} line {number}"
            if len(row) < len(head):
                reading.report(place, _Odd("row", f"{len(row)} columns, {len(head)} expected"))
                continue
            yield place, dict(zip(head, row, strict=False))
    except _Odd as odd:
        reading.report(name, odd)


def _guessed(rows: list[list[str]], reading: _Reading, name: str, pictures: bool) -> list[str]:
    """Names for the columns of a table without a header: pictures by their suffix, the rest by letters."""
    width = len(rows[0])
    heads = [f"column {number + 1}" for number in range(width)]
    texts = list(range(width))
    if pictures:
        shown = next((i for i, cell in enumerate(rows[0]) if _suffix(cell.strip()) in SUFFIXES), None)
        if shown is not None:
            heads[shown] = _IMAGES[0]
            texts.remove(shown)
    if len(texts) > 2:
        # Sentence collections put the licence or the author behind the pair.
        reading.report(name, _Odd("unused", _few([heads[i] for i in texts[2:]])))
        texts = texts[:2]
    if len(texts) == 1 and pictures:
        heads[texts[0]] = "native"
    elif len(texts) == 2:
        first, second = (
            sum(stands_out(row[i], reading.language) for row in rows if len(row) > i) for i in texts
        )
        if first == second:
            why = "the letters do not tell" if is_latin(reading.language) or not first else "both are native"
            raise _Odd("columns", f"no header, and {why}; a first line english<TAB>native would")
        native = texts[0] if first > second else texts[1]
        heads[native] = "native"
        heads[texts[1] if native == texts[0] else texts[0]] = "english"
    else:
        raise _Odd("columns", f"{width} column(s) without a header")
    return heads


def _tabs(text: str) -> Iterator[tuple[int, list[str]]]:
    # Text between tabs is taken as it is (IANA text/tab-separated-values): sentences may begin with a quote.
    for number, line in _lines(text):
        yield number, line.split("\t")


def _commas(text: str) -> Iterator[tuple[int, list[str]]]:
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _Odd("row", f"line {reader.line_num} and what follows: {error}") from error
        if any(cell.strip() for cell in row):
            yield reader.line_num, row


def _json_rows(name: str, text: str, reading: _Reading) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(text):
        place = f"{name} line {number}"
        try:
            value: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.report(place, _Odd("row", f"{type(error).__name__}: {error!s:.80}"))
            continue
        if not isinstance(value, dict):
            reading.report(place, _Odd("row", "it is no JSON object"))
            continue
        row = cast("dict[str, object]", value)
        pair = row.get("translation")  # as the datasets library writes sentence pairs
        if isinstance(pair, dict):
            row = {key: inner for key, inner in row.items() if key != "translation"}
            row |= cast("dict[str, object]", pair)
        yield place, row


# -- the folder ------------------------------------------------------------------------------------


@dataclass
class _Files:
    """Files below a folder by their name relative to it ("/" between the parts, composed characters)."""

    pictures: dict[str, str] = field(default_factory=lambda: dict[str, str]())
    others: dict[str, str] = field(default_factory=lambda: dict[str, str]())
    outside: set[str] = field(default_factory=lambda: set[str]())


class _Reading:
    """What has been read so far."""

    def __init__(self, language: str, poll: Callable[[], None]) -> None:
        self.language = language
        self.examples: list[Example] = []
        self.problems: list[Problem] = []
        self.faults: dict[str, str | None] = {}
        self.named: set[str] = set()
        self._seen: dict[tuple[str, str, str], str] = {}
        self._poll = poll
        self._beats = 0

    def beat(self) -> None:
        """Let the caller look up every few hundred files or rows."""
        self._beats += 1
        if self._beats % 256 == 0:
            self._poll()

    def report(self, place: str, odd: _Odd) -> None:
        """Note what is wrong."""
        self.beat()
        self.problems.append(Problem(place, odd.kind, odd.found))

    def take(self, example: Example, picture: str) -> None:
        """Keep an example, unless the same was there before."""
        self.beat()
        first = self._seen.setdefault((picture, example.native, example.english), example.place)
        if first != example.place:
            self.report(example.place, _Odd("duplicate", first))
            return
        self.examples.append(example)

    def finish(self, name: str, expected: str) -> Dataset:
        """The dataset; BridgeError when it is empty."""
        self._poll()
        if not self.examples:
            first = [f"{problem.place}: {problem.what}" for problem in self.problems[:8]]
            more = len(self.problems) - len(first)
            raise BridgeError(
                f"Nothing in {name} can be trained on.",
                "; ".join(first) + (f"; and {more} more" if more else "") or "no files",
                expected,
                "Mend what is named here, and queue again.",
            )
        return Dataset(name, tuple(self.examples), tuple(self.problems), self.language)


def _real_folder(folder: StrPath) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise BridgeError(
            f"There is no folder {path.name!r}.",
            "no such folder",
            "a folder with pictures",
            "Check its name.",
        )
    return path.resolve()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _walk(root: Path, reading: _Reading) -> _Files:
    """Every file that counts below a folder, hidden ones aside; links that lead out of it are reported."""
    files = _Files()
    folders = [("", str(root))]
    while folders:
        prefix, folder = folders.pop()
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            reading.report(prefix or root.name, _Odd("file", error.strerror or str(error)))
            continue
        for entry in entries:
            reading.beat()
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            name = unicodedata.normalize("NFC", prefix + entry.name)
            if entry.is_symlink() and not _inside(root, entry.path):
                files.outside.add(name)
                reading.report(name, _Odd("leaves", "a link"))
            elif entry.is_dir(follow_symlinks=False):
                folders.append((name + "/", entry.path))
            elif entry.is_file():
                suffix = _suffix(name)
                if suffix in SUFFIXES:
                    files.pictures[name] = entry.path
                elif suffix in (*LIST_SUFFIXES, ".txt"):
                    files.others[name] = entry.path
    files.pictures = dict(sorted(files.pictures.items()))
    files.others = dict(sorted(files.others.items()))
    return files


def _inside(root: Path, path: str) -> bool:
    try:
        return Path(path).resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # a link to nowhere, or to itself
        return False


_DEVICES = re.compile(
    r"(con|prn|aux|nul|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])", re.IGNORECASE
)


def _place_of(folder: str, value: object) -> str:
    """The name below the dataset's folder that a row means; _Odd where it could lead anywhere else.

    Both kinds of slashes part folders, whatever system wrote the list. Refused are absolute names, drives,
    streams (`:`), steps upwards, and the device names of Windows.
    """
    if value is None or value == "":
        raise _Odd("no_picture")
    if not isinstance(value, str):
        raise _Odd("row", f"{value!r:.60} is no file name")
    parts = re.split(r"[/\\]", unicodedata.normalize("NFC", value.strip()))
    if not parts[0] or ":" in value or "\0" in value:
        raise _Odd("leaves", _shown(value))
    kept = [part for part in parts if part not in ("", ".")]
    for part in kept:
        # Windows drops dots and blanks at the end, so ".. " is a step upwards there.
        bare = part.rstrip(". ")
        if not bare or _DEVICES.fullmatch(bare.split(".")[0].rstrip()):
            raise _Odd("leaves", _shown(value))
    if not kept:
        raise _Odd("no_picture")
    return folder + "/".join(kept)


def _read_picture_list(name: str, files: _Files, reading: _Reading) -> None:
    """The rows of one list."""
    folder = name.rpartition("/")[0]
    folder += "/" if folder else ""
    try:
        rows = _rows_of(
            name, _decode(_bytes_of(files.others[name], LARGEST_LIST_BYTES)), reading, pictures=True
        )
        kept = list(rows)
    except _Odd as odd:
        reading.report(name, odd)
        return
    faults: list[tuple[str, _Odd]] = []
    found = False
    for place, row in kept:
        try:
            columns = _columns_of(tuple(row), reading.language)
            if columns.image is None:
                raise _Odd("no_picture")
            found = True
            picture = _place_of(folder, row.get(columns.image))
            where = _picture(picture, files, reading)
            native, english = columns.texts(row)
            _check(native, english, reading.language)
        except _Odd as odd:
            faults.append((place, odd))
            continue
        reading.take(Example(native, english, Path(where), place), picture)
    if kept and not found and all(odd.kind == "no_picture" for _, odd in faults):
        faults = [(name, _Odd("pairs"))]
    for place, odd in faults:
        reading.report(place, odd)


def _picture(name: str, files: _Files, reading: _Reading) -> str:
    """The file of a picture; _Odd when there is none, or none that can be read."""
    where = files.pictures.get(name)
    if where is None:
        if name in files.outside or any(name.startswith(link + "/") for link in files.outside):
            raise _Odd("leaves", _shown(name))
        raise _Odd("absent", name)
    reading.named.add(name)
    if name not in reading.faults:
        reading.faults[name] = fault_of(where)
    fault = reading.faults[name]
    if fault is not None:
        raise _Odd("unreadable", f"{name}, {fault}")
    return where


_OTHER_CODES = tuple(f".{code}" for code in LANGUAGES[1:])


def _read_beside(files: _Files, reading: _Reading) -> None:
    """Pictures that no list names, with the text files beside them."""
    texts = {name[:-4]: name for name in files.others if _suffix(name) == ".txt"}
    used: set[str] = set()
    skipped = 0
    for name in files.pictures:
        stem = os.path.splitext(name)[0]
        wanted = (f".{reading.language}",) if reading.language != ANY else _OTHER_CODES
        native = [stem + code for code in wanted if stem + code in texts]
        mine = [key for key in (*native, stem, stem + ".en") if key in texts]
        used.update(mine)
        if name in reading.named:
            skipped += bool(mine)
            continue
        reading.beat()
        place = texts[mine[0]] if mine else name
        try:
            where = _picture(name, files, reading)
            if len(native) > 1:
                raise _Odd("columns", _few([texts[key] for key in native]))
            if not native and stem not in texts:
                raise _Odd("no_caption")
            lines = _caption_lines(files.others[texts[native[0] if native else stem]])
            english = ""
            if stem + ".en" in texts:
                place = texts[stem + ".en"]
                english = " ".join(_caption_lines(files.others[place]))
                place = texts[mine[0]]
            elif len(lines) == 2:
                english = lines.pop()
            if len(lines) != 1:
                raise _Odd("lines", str(len(lines)))
            _check(lines[0], english, reading.language)
        except _Odd as odd:
            reading.report(place if odd.kind != "unreadable" else name, odd)
            continue
        reading.take(Example(lines[0], english, Path(where), place), name)
    if skipped:
        reading.report("*.txt", _Odd("unused", f"{skipped} files whose pictures a list names"))
    for stem, name in texts.items():
        if stem not in used:
            reading.report(name, _Odd("unused", "no picture of that name"))


def _caption_lines(path: str) -> list[str]:
    return [line.strip() for _, line in _lines(_decode(_bytes_of(path, LARGEST_CAPTION_BYTES)))]
