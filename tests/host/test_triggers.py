"""Trigger words come from what a LoRA's file and its neighbours say; a report accounts for every layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nodes
from language_bridge.host import carried, language, triggers
from language_bridge.host.carried import Facts
from language_bridge.host.triggers import COMMON, LoraReport, frequent
from language_bridge.nodes.lora_report import LoraReport as Node
from language_bridge.prompt import Phrase
from language_bridge.tests.fixtures.checkpoints import FAMILIES, write_lora
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call
from language_bridge.tests.host.test_carried import loras, put_on

__all__ = ["loras"]


def write(folder: Path, name: str, base: str = "sd1", **metadata: str) -> Path:
    """A LoRA file with metadata in its header."""
    path = write_lora(folder / f"{name}.safetensors", FAMILIES[base], seed=len(name))
    save_file(load_file(str(path)), str(path), metadata=metadata)
    return path


def facts(path: Path) -> Facts:
    stamp = path.stat()
    return Facts(path.name, str(path), stamp.st_size, stamp.st_mtime_ns)


def words(path: Path) -> list[str]:
    return [word for word, _ in triggers.said(facts(path)).triggers]


def tags(**counts: int) -> str:
    return json.dumps({"10_x": {name.replace("_", " "): count for name, count in counts.items()}})


# -- where a word comes from ---------------------------------------------------------------------------------
def test_each_place_is_read_and_the_first_that_speaks_wins(tmp_path: Path) -> None:
    """modelspec, then the three sidecars, then kohya's counts: taken away one after the other."""
    path = write(
        tmp_path,
        "a",
        **{"modelspec.trigger_phrase": "from modelspec", "ss_tag_frequency": tags(from_counts=9)},
    )
    sidecars = {
        "a.json": {"activation text": "from a1111"},
        "a.civitai.info": {"trainedWords": ["from civitai, too", "and this"]},
        "a.metadata.json": {"civitai": {"trainedWords": ["from manager"]}},
    }
    for name, content in sidecars.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert triggers.said(facts(path)).triggers == (("from modelspec", "modelspec.trigger_phrase"),)
    tensors = load_file(str(path))
    save_file(tensors, str(path), metadata={"ss_tag_frequency": tags(from_counts=9)})
    expected = [["from a1111"], ["from civitai", "too", "and this"], ["from manager"]]
    for name, found in zip(sidecars, expected, strict=True):
        assert triggers.said(facts(path)).triggers == tuple((word, name) for word in found)
        (tmp_path / name).unlink()
    assert triggers.said(facts(path)).triggers == (("from counts", "ss_tag_frequency"),)
    save_file(tensors, str(path))
    assert triggers.said(facts(path)).triggers == ()


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe\x00",
        b'{"activation text": "x"',
        b"[" * 200_000,
        b'{"activation text": "' + b"x" * (triggers.LARGEST_SIDECAR_BYTES + 1) + b'"}',
    ],
    ids=["broken", "no text", "cut", "deep", "large"],
)
def test_a_sidecar_that_cannot_be_read_is_named_and_the_next_one_asked(
    tmp_path: Path, content: bytes
) -> None:
    path = write(tmp_path, "a")
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "a.civitai.info").write_text('{"trainedWords": ["zorb"]}', encoding="utf-8")
    said = triggers.said(facts(path))
    assert said.triggers == (("zorb", "a.civitai.info"),)
    (line,) = said.unreadable
    assert line.startswith("a.json: ") and len(line) < 200


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "null", '{"activation text": 3}', '{"activation text": null}', '{"activation text": " "}'],
)
def test_a_sidecar_without_words_says_nothing(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, "a", ss_tag_frequency=tags(zorb=3))
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert words(path) == ["zorb"]


def test_a_changed_sidecar_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, "a")
    assert words(path) == []
    (tmp_path / "a.json").write_text('{"activation text": "one"}', encoding="utf-8")
    assert words(path) == ["one"]
    (tmp_path / "a.json").write_text('{"activation text": "one, two"}', encoding="utf-8")
    assert words(path) == ["one", "two"]


def test_lists_are_cut_as_people_write_them(tmp_path: Path) -> None:
    """Commas of any width, weights, LoRA tags, a name with escaped brackets; Chinese words are words."""
    path = write(tmp_path, "a")
    typed = "(zorb:1.2),, <lora:a:0.8> big hat\uff0czorb \\(toy\\)\n\u6c34\u58a8, ZORB"
    (tmp_path / "a.json").write_text(json.dumps({"activation text": typed}), encoding="utf-8")
    assert words(path) == ["zorb", "big hat", "zorb (toy)", "\u6c34\u58a8"]


# -- kohya's counts ------------------------------------------------------------------------------------------
NAMES = st.text("abcdefgh", min_size=3, max_size=8).filter(lambda name: name not in COMMON)


@given(st.dictionaries(NAMES, st.integers(1, 94), max_size=8), st.sampled_from(sorted(COMMON)))
def test_the_tag_of_every_picture_marks_the_concept_and_a_common_one_never(
    others: dict[str, int], common: str
) -> None:
    counts = {**others, common.replace("_", " "): 100, "the trigger": 100}
    assert frequent({"ss_tag_frequency": json.dumps({"1_x": counts})}) == ["the trigger"]


@given(st.dictionaries(NAMES, st.integers(1, 49), max_size=8))
def test_what_is_in_fewer_than_half_of_the_pictures_marks_nothing(counts: dict[str, int]) -> None:
    header = {"ss_tag_frequency": json.dumps({"1_x": counts})}
    assert frequent({**header, "ss_dataset_dirs": json.dumps({"1_x": {"img_count": 100}})}) == []
    assert frequent({"ss_tag_frequency": json.dumps({"1_x": {**counts, "solo": 100}})}) == []


@given(st.lists(NAMES, unique=True, min_size=1, max_size=6), st.integers(2, 1000))
def test_tags_that_come_equally_often_are_a_trigger_up_to_three(names: list[str], count: int) -> None:
    found = frequent({"ss_tag_frequency": json.dumps({"1_x": dict.fromkeys(names, count)})})
    assert found == (names if len(names) <= 3 else [])


def test_every_set_of_pictures_has_its_own_words() -> None:
    counts = {"5_a": {"aaa": 10, "hat": 3}, "2_b": {"bbb": 4, "aaa": 1}, "1_empty": {}}
    assert frequent({"ss_tag_frequency": json.dumps(counts)}) == ["aaa", "bbb"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"a": {"b": "many"}}', "[" * 200_000])
def test_odd_counts_are_named(tmp_path: Path, text: str) -> None:
    said = triggers.said(facts(write(tmp_path, "a", ss_tag_frequency=text)))
    assert said.triggers == () and len(said.unreadable) == 1


# -- what a bridged CLIP knows -------------------------------------------------------------------------------
def phrases(clip: Any) -> list[tuple[str, str]]:
    return [(phrase.text, phrase.source) for phrase in triggers.phrases_of(clip)]


def behind(model: Any, clip: Any, name: str, text: float = 1.0) -> Any:
    """MODEL and CLIP behind the stock loader."""
    return put_on(Checkpoint("sd1", model, clip, None), f"{name}.safetensors", 1.0, text)


@pytest.mark.parametrize("unet_only", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_lora_speaks_wherever_the_bridge_stands(
    loras: Path, sd1: Checkpoint, before: bool, unet_only: bool
) -> None:
    path = write(loras, "mine", **{"modelspec.trigger_phrase": "zorbix"})
    if unet_only:
        write_lora(path, FAMILIES["sd1"], text=False)
        save_file(load_file(str(path)), str(path), metadata={"modelspec.trigger_phrase": "zorbix"})
    model, clip = sd1.model, sd1.clip
    if before:
        model, clip = behind(model, clip, "mine")
    model, clip = bridged(sd1, model=model, clip=clip)
    if not before:
        assert phrases(clip) == []
        model, clip = behind(model, clip, "mine")
    assert phrases(clip) == phrases(clip.clone()) == [("zorbix", "mine.safetensors")]
    assert triggers.phrases_of(clip) == (Phrase("zorbix", "trigger", "mine.safetensors"),)
    assert phrases(bridged(sd1)[1]) == []


def test_a_lora_for_the_model_alone_is_known_in_front_of_the_bridge_only(
    loras: Path, sd1: Checkpoint
) -> None:
    write(loras, "mine", **{"modelspec.trigger_phrase": "zorbix"})

    def alone(model: Any) -> Any:
        return call(nodes.LoraLoaderModelOnly, model=model, lora_name="mine.safetensors", strength_model=1.0)

    assert phrases(bridged(sd1, model=alone(sd1.model))[1]) == [("zorbix", "mine.safetensors")]
    model, clip = bridged(sd1)
    (report,) = triggers.reports_of(alone(model), clip)
    assert phrases(clip) == [] and report.triggers == (("zorbix", "modelspec.trigger_phrase"),)


def test_words_of_several_loras_are_kept_once(loras: Path, sd1: Checkpoint) -> None:
    write(loras, "one", **{"modelspec.trigger_phrase": "zorbix, hat"})
    write(loras, "other", **{"modelspec.trigger_phrase": "Hat, cape"})
    model, clip = bridged(sd1)
    clip = behind(*behind(model, clip, "one"), "other")[1]
    assert [text for text, _ in phrases(clip)] == ["zorbix", "hat", "cape"]


@pytest.mark.parametrize("clip", [None, object(), 3])
def test_nothing_is_raised(clip: Any) -> None:
    assert triggers.phrases_of(clip) == ()
    assert triggers.reports_of(clip, clip) == []


# -- the report ----------------------------------------------------------------------------------------------
def report(model: Any, clip: Any) -> LoraReport:
    (only,) = triggers.reports_of(model, clip)
    return only


def layers(path: Path) -> set[str]:
    return {name.split(".")[0] for name in load_file(str(path))}


def accounted(found: LoraReport) -> int:
    return found.unet + found.text + sum(len(skipped.layers) for skipped in found.skipped)


@pytest.mark.parametrize("made_for", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("through_bridge", [False, True])
def test_every_layer_of_a_file_is_accounted_for_once(
    loras: Path, sd1: Checkpoint, made_for: str, through_bridge: bool
) -> None:
    path = write(loras, "mine", made_for)
    model, clip = bridged(sd1) if through_bridge else (sd1.model, sd1.clip)
    model, clip = behind(model, clip, "mine")
    found = report(model, clip)
    assert found.files == ("mine.safetensors",) and accounted(found) == len(layers(path))
    if made_for == "sd1":
        assert (found.unet, found.text, found.skipped) == (1, 1, ())
        assert found.unet_strength == found.text_strength == 1.0
    else:
        assert found.family == {"sd2": "SD 2.x", "sdxl": "SDXL"}[made_for]
        assert {skipped.reason for skipped in found.skipped} <= {"no such layer", "other shape"}
        assert (found.unet, found.unet_strength) == (0, None)


def test_halves_that_are_not_here_are_told_apart(loras: Path, sd1: Checkpoint) -> None:
    """Left out by the loader; loaded into another MODEL; both halves here."""
    write(loras, "mine")
    model = call(nodes.LoraLoaderModelOnly, model=sd1.model, lora_name="mine.safetensors", strength_model=0.5)
    found = report(model, sd1.clip)
    assert (found.unet, found.unet_strength, found.text) == (1, 0.5, 0)
    assert [(s.reason, len(s.layers)) for s in found.skipped] == [("not loaded", 1)]
    both, clip = behind(sd1.model, sd1.clip, "mine")
    found = report(sd1.model, clip)
    assert (found.unet, found.text) == (0, 1)
    assert [(s.reason, len(s.layers)) for s in found.skipped] == [("not here", 1)]
    assert report(both, clip).skipped == ()


def test_a_lora_that_is_loaded_twice_is_one_with_both_strengths(loras: Path, sd1: Checkpoint) -> None:
    write(loras, "mine")
    model, clip = behind(*behind(sd1.model, sd1.clip, "mine"), "mine")
    found = report(model, clip)
    assert (found.unet, found.unet_strength, found.text_strength) == (1, 2.0, 2.0)


def shown(model: Any, clip: Any, tongue: str) -> tuple[str, str]:
    return call(Node, model=model, clip=clip, language=tongue)


@pytest.mark.parametrize("tongue", ["English", "Chinese"])
def test_the_node_shows_files_words_and_reasons(loras: Path, sd1: Checkpoint, tongue: str) -> None:
    path = write(loras, "mine", "sdxl", **{"modelspec.trigger_phrase": "zorbix, hat"})
    shutil.copy(path, loras / "copy.safetensors")
    (loras / "mine.json").write_text("{", encoding="utf-8")
    text, found = shown(*behind(*bridged(sd1), "mine"), tongue)
    say = language.words(tongue)
    assert found == "zorbix, hat"
    assert "copy.safetensors = mine.safetensors" in text and "SDXL" in text
    assert text.splitlines()[0] == say("lora_head", count=1)
    assert say("lora_trigger", word="zorbix", source="modelspec.trigger_phrase") in text.splitlines()
    assert say("lora_copies", count=2) in text.splitlines() and say("lora_native") in text.splitlines()
    assert ("\u8df3\u8fc7" in text) == (tongue == "Chinese")
    empty, none = shown(sd1.model, sd1.clip, tongue)
    assert none == "" and empty == say("lora_head", count=0)


def test_a_bypass_lora_is_said_to_be_out_of_sight(loras: Path, sd1: Checkpoint) -> None:
    write(loras, "mine")
    model = sd1.model.clone()
    model.set_injections("bypass_lora", [])
    text, _ = shown(model, sd1.clip, "English")
    assert language.words("English")("lora_bypass") in text


def test_a_lora_without_a_file_is_reported_without_a_name(loras: Path, sd1: Checkpoint) -> None:
    path = write(loras, "mine")
    model, clip = behind(sd1.model, sd1.clip, "mine")
    path.unlink()
    carried._FOUND.clear()
    found = report(model, clip)
    assert (found.files, found.unet, found.text, found.triggers) == ((), 1, 1, ())
    assert language.words("English")("lora_unknown") in shown(model, clip, "English")[0]
