"""The table of published models: well formed, agreeing with families and kinds, exact in known sizes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from language_bridge.bridges.base import create, identify, kinds
from language_bridge.bridges.errors import BridgeError
from language_bridge.conversion import VERSION
from language_bridge.conversion.presets import HOST, published, read_presets
from language_bridge.encoders.base import families
from language_bridge.tests.conversion.layouts import pea

TOWERS, METHODS = published().towers, published().methods


def test_every_row_speaks_of_a_family_a_kind_and_sizes_that_exist() -> None:
    for tower in TOWERS.values():
        assert tower.family == HOST or tower.family in families(), tower.name
        if tower.family != HOST:
            fields = {field.name for field in dataclasses.fields(families()[tower.family].Spec)}
            assert {*tower.match, *tower.change} <= fields and tower.match, tower.name
    for method in METHODS.values():
        fields = {field.name for field in dataclasses.fields(kinds()[method.kind].Spec)}
        assert {*method.match, *method.change} <= fields, method.name
        assert {"hidden", "context"} <= set(method.match), method.name


def test_every_hash_is_one_and_every_source_a_page() -> None:
    for row in (*TOWERS.values(), *METHODS.values()):
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in row.sha256), row.name
        assert row.source.startswith("https://huggingface.co/"), row.name


def test_a_bridge_is_as_wide_as_its_tower_where_both_are_known() -> None:
    for method in METHODS.values():
        width = published().tower_of(method).match.get("width")
        assert width is None or width == method.match["hidden"], method.name


def test_an_identity_row_says_all_of_its_sizes() -> None:
    for method in METHODS.values():
        if method.kind == "identity":
            assert create("identity", method.match).spec.hidden == method.match["hidden"]


@pytest.mark.parametrize(
    ("layout", "width", "count"),
    [("P2", 1024, 4_987_136), ("P4", 2048, 15_732_736), ("P3", 2048, 11_538_432)],
)
def test_peas_published_sizes_fit_two_rows_that_differ_in_the_tower(
    layout: str, width: int, count: int
) -> None:
    shapes = pea(layout, hidden=1024, width=width, pooled=1280, context=2048)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    kind, spec = identify(shapes)
    fitting = [row for row in METHODS.values() if row.fits(kind.kind, spec)]
    assert [row.name for row in fitting] == ["pea-sdxl-xlm-roberta", "pea-sdxl-chinese-clip"]
    assert len({row.tower for row in fitting}) == 2


def test_the_version_in_the_provenance_is_the_packs(checkout: Path) -> None:
    text = (checkout / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.*)"$', text, re.MULTILINE).group(1) == VERSION  # type: ignore[union-attr]


def test_rows_to_be_dropped_come_with_the_text_that_makes_them() -> None:
    for name in ("rouwei-gemma-v0", "rouwei-gemma-v0.1"):
        template = METHODS[name].template
        assert template["before"].startswith("<start_of_turn>user\n") and template["before"].endswith("\n\n")
        assert template["after"] == "<end_of_turn>\n<start_of_turn>model\n"


TOWER: dict[str, Any] = {
    "name": "t",
    "family": "bert",
    "match": {"width": 4},
    "window": 8,
    "mask_rule": "pad",
}
METHOD: dict[str, Any] = {"name": "m", "base": "sd1", "kind": "mlp", "match": {"hidden": 4}, "tower": "t"}


def write(path: Path, towers: list[Any], methods: list[Any], **more: Any) -> Path:
    table = {"format": 1, "towers": towers, "methods": methods} | more
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def test_a_table_of_ones_own_is_read(tmp_path: Path) -> None:
    table = read_presets(write(tmp_path / "t.json", [TOWER], [METHOD]))
    assert table.tower_of(table.methods["m"]).layer == -1
    assert table.methods["m"].unet == "none"


@pytest.mark.parametrize(
    ("towers", "methods", "more"),
    [
        ([TOWER, TOWER], [], {}),
        ([TOWER], [METHOD, METHOD], {}),
        ([], [METHOD], {}),
        ([TOWER | {"more": 1}], [], {}),
        ([TOWER | {"name": "../x"}], [], {}),
        ([TOWER | {"name": ".x"}], [], {}),
        ([TOWER | {"window": "8"}], [], {}),
        ([TOWER | {"mask_rule": "some"}], [], {}),
        ([TOWER | {"match": {"width": [4]}}], [], {}),
        ([TOWER | {"languages": "zh"}], [], {}),
        ([TOWER | {"change": {"eps": None}}], [], {}),
        ([TOWER | {"change": 3}], [], {}),
        ([{key: value for key, value in TOWER.items() if key != "family"}], [], {}),
        ([TOWER], [METHOD | {"base": "sd9"}], {}),
        ([TOWER], [METHOD | {"unet": "some"}], {}),
        ([TOWER], [METHOD | {"template": {"around": "x"}}], {}),
        ([TOWER], [METHOD | {"template": {"before": 3}}], {}),
        ([TOWER], [3], {}),
        ([TOWER], {}, {}),
        ([TOWER], [], {"format": 2}),
    ],
)
def test_a_table_that_is_wrong_is_refused_in_words(
    tmp_path: Path, towers: Any, methods: Any, more: Any
) -> None:
    with pytest.raises(BridgeError):
        read_presets(write(tmp_path / "t.json", towers, methods, **more))


def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError):
        read_presets(tmp_path / "missing.json")
    (tmp_path / "t.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BridgeError):
        read_presets(tmp_path / "t.json")
    (tmp_path / "t.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(BridgeError):
        read_presets(tmp_path / "t.json")
