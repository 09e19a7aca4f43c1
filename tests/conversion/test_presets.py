"""The table of published models: well formed, agreeing with families and kinds, exact in known sizes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from language_bridge.bridges.base import create, identify, kinds
from language_bridge.bridges.errors import BridgeError
from language_bridge.conversion import VERSION
from language_bridge.conversion.presets import DUAL, HOST, published, read_presets
from language_bridge.encoders.base import families
from language_bridge.encoders.clip import ClipSpec
from language_bridge.tests.conversion.layouts import pea

TOWERS, METHODS = published().towers, published().methods


def test_every_row_speaks_of_a_family_a_kind_and_sizes_that_exist() -> None:
    for tower in TOWERS.values():
        assert tower.family == HOST or tower.family in families(), tower.name
        if tower.family != HOST:
            fields = {field.name for field in dataclasses.fields(families()[tower.family].Spec)}
            assert {*tower.match, *tower.change} <= fields, tower.name
            assert bool(tower.match) != bool(tower.halves), tower.name
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
        tower = published().tower_of(method)
        parts = [TOWERS[half] for half in tower.halves] or [tower]
        widths = [part.match.get("width") for part in parts]
        if None not in widths:
            assert sum(int(str(width)) for width in widths) == method.match["hidden"], method.name


def test_a_dual_tower_reads_no_further_than_its_halves_say() -> None:
    """Its window is the one that counts; that of a half is longer or the same."""
    pairs = [tower for tower in TOWERS.values() if tower.family == DUAL]
    assert [tower.name for tower in pairs] == ["pea-dual-xlm-roberta-chinese-clip"]
    for tower in pairs:
        assert tower.layer == -1 and tower.window <= min(TOWERS[half].window for half in tower.halves)


@pytest.mark.parametrize(
    ("method", "layer", "window", "mask_rule"),
    [
        ("pea-sdxl-xlm-roberta", -1, 77, "pad"),
        ("pea-sdxl-chinese-clip", -1, 64, "pad"),
        ("pea-sd15-chinese-clip", -1, 77, "pad"),
        ("pea-sdxl-mt5", -1, 77, "pad"),
        ("pea-sdxl-altclip", -1, 77, "pad"),
        ("altdiffusion-m2", -1, 77, "pad"),
        ("altdiffusion-m9", -1, 77, "pad"),
        ("altdiffusion-m18", -2, 77, "pad"),
        ("taiyi-sd-1b-chinese-v0.1", -1, 512, "none"),
        ("taiyi-sd-1b-chinese-v0.1-77", -1, 77, "none"),
        ("taiyi-sd-1b-anime-chinese-v0.1", -1, 512, "none"),
        ("miaobi-beta-0.9", -1, 77, "none"),
    ],
)
def test_towers_are_read_as_published(method: str, layer: int, window: int, mask_rule: str) -> None:
    row = published().tower_of(METHODS[method])
    assert (row.layer, row.window, row.mask_rule) == (layer, window, mask_rule)


def test_a_reading_that_is_not_the_published_one_says_so() -> None:
    short = METHODS["taiyi-sd-1b-chinese-v0.1-77"]
    for row in (short, published().tower_of(short)):
        assert "NOT as published" in row.about
    assert "may not be the whole method" in METHODS["miaobi-beta-0.9-any-unet"].about


def test_a_wide_adapter_of_pea_fits_mt5_and_both_towers_together() -> None:
    shapes = pea("P3", hidden=2048, width=2048, pooled=1280, context=2048)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 13_637_632
    kind, spec = identify(shapes)
    fitting = [row for row in METHODS.values() if row.fits(kind.kind, spec)]
    assert [row.name for row in fitting] == ["pea-sdxl-mt5", "pea-sdxl-dual"]
    kind, spec = identify(pea("P3", hidden=768, width=2048, pooled=1280, context=2048))
    fitting = [row for row in METHODS.values() if row.fits(kind.kind, spec)]
    assert [row.name for row in fitting] == ["pea-sdxl-altclip", "pea-sdxl-altclip-normed"]


def test_a_row_that_names_a_tokenizer_fits_with_that_file_alone() -> None:
    row = TOWERS["miaobi-beta-0.9"]
    spec = create_encoder_spec(row.match)
    names = ["text_model.final_layer_norm.weight"]
    assert row.fits("clip", spec, names, {"vocab.txt", "tokenizer_config.json"})
    for files in (set(), {"vocab.json", "merges.txt"}, {"vocab.txt", "tokenizer.json"}):
        assert not row.fits("clip", spec, names, files)


def create_encoder_spec(sizes: Mapping[str, object]) -> Any:
    return ClipSpec(window=77, heads=12, inner=3072, **sizes)  # type: ignore[arg-type]


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
    for name in [f"rouwei-gemma-{version}{host}" for version in ("v0", "v0.1") for host in ("", "-host")]:
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
PAIR = TOWER | {"name": "p", "family": "dual", "match": {}, "halves": ["t", "t"]}
METHOD: dict[str, Any] = {"name": "m", "base": "sd1", "kind": "mlp", "match": {"hidden": 4}, "tower": "t"}


def write(path: Path, towers: list[Any], methods: list[Any], **more: Any) -> Path:
    table = {"format": 1, "towers": towers, "methods": methods} | more
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def test_a_table_may_pair_towers(tmp_path: Path) -> None:
    assert read_presets(write(tmp_path / "t.json", [PAIR, TOWER], [])).towers["p"].halves == ("t", "t")


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
        ([TOWER | {"tokenizer": "words.txt"}], [], {}),
        ([TOWER | {"halves": ["t"]}], [], {}),
        ([TOWER, TOWER | {"name": "u", "halves": ["t", "t"]}], [], {}),
        ([TOWER, PAIR | {"halves": []}], [], {}),
        ([TOWER, PAIR | {"halves": ["t", "nobody"]}], [], {}),
        ([TOWER, PAIR | {"halves": ["t", "p"]}], [], {}),
        ([TOWER, TOWER | {"name": "h", "family": "host"}, PAIR | {"halves": ["t", "h"]}], [], {}),
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
