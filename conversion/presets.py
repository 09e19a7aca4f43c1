"""The table of what is published: for each name, what the weights themselves do not say.

The facts stand in presets.json beside this file; a user's own table in the same form can stand in for it. A
row never decides alone: family, kind and sizes come from the weights, and a row fits them or does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import cast

from ..bridges.errors import BridgeError
from ..bridges.file import BASES
from ..encoders import guard
from ..encoders.base import MASK_RULES

FORMAT = 1
DUAL = "dual"
"""Family of two towers side by side, which no file holds."""
HOST = "host"
"""Family of a tower that ComfyUI itself loads; there is nothing to convert, a bridge only names it."""
UNETS = ("none", "kv", "own")
"""What a method did to the U-Net: nothing; trained its cross-attention; trained all of it."""
VOCABULARIES = (
    "vocab.txt",
    "tokenizer.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
)
"""Files that hold a vocabulary; others beside a tokenizer only set it."""
LARGEST_TABLE_BYTES = 1 << 20

_OWNER = "table of published models"


@dataclass(frozen=True, kw_only=True)
class TowerRow:
    """One way of reading a published tower; `name` becomes its identity.

    match: fields of the family's spec and their values. starts: the published names of some tensor must begin
    with one of these (empty = any). tokenizer: the file that must be its tokenizer, where it tells the model
    from others of the same sizes (empty = any). change: fields of the spec that the file cannot say, set
    after it fits. halves: of a tower of family dual, the rows of its two towers, whose windows do not count.
    sha256: of published files; a hash that fits settles the choice.
    """

    name: str
    family: str
    match: Mapping[str, object]
    starts: tuple[str, ...] = ()
    tokenizer: str = ""
    halves: tuple[str, ...] = ()
    change: Mapping[str, object] = field(default_factory=lambda: dict[str, object]())
    layer: int = -1
    window: int
    mask_rule: str
    languages: tuple[str, ...] = ()
    licence: str = ""
    source: str = ""
    about: str = ""
    sha256: tuple[str, ...] = ()

    def fits(self, family: str, spec: object, names: Iterable[str], files: Iterable[str] = ()) -> bool:
        """Whether a tower of `family` and `spec`, published under tensor `names`, can be this one.

        files: bare names of the tokenizer files that came with it.
        """
        others = {*VOCABULARIES} - {self.tokenizer}
        return (
            family == self.family
            and _agrees(spec, self.match)
            and (not self.starts or any(name.startswith(self.starts) for name in names))
            and (not self.tokenizer or (self.tokenizer in files and others.isdisjoint(files)))
        )


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One published bridge: kind and sizes, its base, the tower it reads, what it did to the U-Net.

    template: texts "before" and "after" that the method puts around a prompt (empty = none).
    """

    name: str
    base: str
    kind: str
    match: Mapping[str, object]
    tower: str
    change: Mapping[str, object] = field(default_factory=lambda: dict[str, object]())
    unet: str = "none"
    template: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    languages: tuple[str, ...] = ()
    licence: str = ""
    source: str = ""
    about: str = ""
    sha256: tuple[str, ...] = ()

    def fits(self, kind: str, spec: object) -> bool:
        """Whether a bridge of `kind` and `spec` can be this one."""
        return kind == self.kind and _agrees(spec, self.match)


@dataclass(frozen=True)
class Presets:
    """All rows; names are unique among towers and among methods."""

    towers: Mapping[str, TowerRow]
    methods: Mapping[str, MethodRow]

    def tower_of(self, method: MethodRow) -> TowerRow:
        """The tower that a method reads."""
        return self.towers[method.tower]


def _agrees(spec: object, match: Mapping[str, object]) -> bool:
    return all(getattr(spec, name, None) == value for name, value in match.items())


@cache
def published() -> Presets:
    """The table that ships with the pack."""
    return read_presets(Path(__file__).with_name("presets.json"))


def read_presets(path: Path) -> Presets:
    """Read a table; BridgeError naming the row and the field that is wrong."""
    data = guard.read_small(path, LARGEST_TABLE_BYTES)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(path.name, str(error)[:200], "a readable table in UTF-8") from error
    fields = guard.parse_header(text, FORMAT, _OWNER)
    towers = {row.name: row for row in (_tower(row) for row in _rows(fields, "towers"))}
    methods = {row.name: row for row in (_method(row) for row in _rows(fields, "methods"))}
    for row in methods.values():
        if row.tower not in towers:
            raise _bad(row.name, f"tower {row.tower!r}", "the name of a row in towers")
    for row in towers.values():
        _require_halves(row, towers)
    count = len(_rows(fields, "towers")) + len(_rows(fields, "methods"))
    if count != len(towers) + len(methods):
        raise _bad(path.name, "a name that stands there twice", "every name once")
    return Presets(towers, methods)


def _rows(fields: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    rows = cast("list[object]", guard.field(fields, name, list, _OWNER))
    return [guard.record({name: row}, name, _OWNER) for row in rows]


def _tower(row: Mapping[str, object]) -> TowerRow:
    name = _name(row)
    _only(name, row, TowerRow.__dataclass_fields__)
    return TowerRow(
        name=name,
        family=guard.field(row, "family", str, name),
        match=_values(name, row, "match"),
        change=_values(name, {"change": {}, **row}, "change"),
        starts=_texts(row, "starts", name),
        tokenizer=guard.one_of(_text(row, "tokenizer", name), ("", *VOCABULARIES), "tokenizer", name),
        halves=_texts(row, "halves", name),
        layer=guard.field({"layer": -1, **row}, "layer", int, name),
        window=guard.field(row, "window", int, name),
        mask_rule=guard.one_of(guard.field(row, "mask_rule", str, name), MASK_RULES, "mask rule", name),
        languages=_texts(row, "languages", name),
        licence=_text(row, "licence", name),
        source=_text(row, "source", name),
        about=_text(row, "about", name),
        sha256=_texts(row, "sha256", name),
    )


def _require_halves(row: TowerRow, towers: Mapping[str, TowerRow]) -> None:
    """A tower of family dual names two others, and no other tower does."""
    if len(row.halves) != 2 * (row.family == DUAL):
        raise _bad(row.name, f"family {row.family}, halves {list(row.halves)}", "two halves in a dual tower")
    for half in row.halves:
        if half not in towers or towers[half].family in (DUAL, HOST):
            raise _bad(row.name, f"half {half!r}", "the name of a row in towers that has a file of its own")


def _method(row: Mapping[str, object]) -> MethodRow:
    name = _name(row)
    _only(name, row, MethodRow.__dataclass_fields__)
    return MethodRow(
        name=name,
        base=guard.one_of(guard.field(row, "base", str, name), BASES, "base", name),
        kind=guard.field(row, "kind", str, name),
        match=_values(name, row, "match"),
        change=_values(name, {"change": {}, **row}, "change"),
        tower=guard.field(row, "tower", str, name),
        unet=guard.one_of(_text({"unet": "none", **row}, "unet", name), UNETS, "U-Net word", name),
        template=_template(name, row),
        languages=_texts(row, "languages", name),
        licence=_text(row, "licence", name),
        source=_text(row, "source", name),
        about=_text(row, "about", name),
        sha256=_texts(row, "sha256", name),
    )


def _name(row: Mapping[str, object]) -> str:
    name = guard.field(row, "name", str, _OWNER)
    if not guard.TENSOR_NAME.fullmatch(name) or name.startswith("."):
        raise _bad(_OWNER, repr(name)[:80], "a plain name of letters, digits, dots and dashes")
    return name


def _only(name: str, row: Mapping[str, object], known: Iterable[str]) -> None:
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise _bad(name, f"fields {unknown}", f"fields {sorted(known)}")


def _values(name: str, row: Mapping[str, object], field: str) -> dict[str, object]:
    values = guard.record(row, field, name)
    if not all(type(value) in (int, float, bool, str) for value in values.values()):
        raise _bad(name, f"{field} {values}", "fields of a spec with numbers or texts")
    return values


def _template(name: str, row: Mapping[str, object]) -> dict[str, str]:
    given = guard.record({"template": {}, **row}, "template", name)
    if not set(given) <= {"before", "after"}:
        raise _bad(name, f"template {sorted(given)}", "the texts before and after")
    return {key: guard.field(given, key, str, name) for key in given}


def _text(row: Mapping[str, object], field: str, name: str) -> str:
    return guard.field({field: "", **row}, field, str, name)


def _texts(row: Mapping[str, object], field: str, name: str) -> tuple[str, ...]:
    return guard.texts({field: [], **row}, field, name)


def _bad(where: str, found: str, expected: str) -> BridgeError:
    return BridgeError(
        f"The table of published models cannot be used: {where}.", found, expected, "Mend the table."
    )
