"""The node before CLIP Text Encode: words that stay English, the blend, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest

from language_bridge.bridges.errors import BridgeError
from language_bridge.host.joining import JOINS, Joining
from language_bridge.host.pocket import load_pocket
from language_bridge.nodes import streams
from language_bridge.nodes.language_bridge import LanguageBridge
from language_bridge.nodes.streams import Streams
from language_bridge.pocket import captions
from language_bridge.tests.fixtures.stock import call, encode, same

BRIDGES = Path(captions.__file__).parent / "assets" / "bridges"
MIXED = "\u7ea2\u8272\u5706\u5f62, a blue square"
DEFAULTS: dict[str, Any] = {
    "triggers": "",
    "keep": "",
    "join": JOINS[0],
    "blend": 0.5,
    "start_percent": 0.0,
    "end_percent": 1.0,
}


@pytest.fixture(scope="module")
def clips() -> Iterator[tuple[Any, Any]]:
    """The pocket checkpoint's own CLIP, and that CLIP behind the node Language Bridge."""
    known = dict(folder_paths.folder_names_and_paths)
    folder_paths.folder_names_and_paths["language_bridges"] = ([str(BRIDGES)], {".safetensors"})
    model, clip, _ = load_pocket()
    _, bridged = call(
        LanguageBridge,
        model=model,
        clip=clip,
        bridge="pocket-iap.safetensors",
        strength=1.0,
        route="two streams",
    )
    yield clip, bridged
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(known)


def run(clip: Any, **changes: Any) -> Any:
    return call(Streams, clip=clip, **{**DEFAULTS, **changes})


def test_the_inputs_are_those_of_the_joining() -> None:
    inputs = {given.id: given for given in Streams.define_schema().inputs}
    assert tuple(streams.JOINS) == JOINS and inputs["join"].default == Joining().join
    assert inputs["blend"].default == Joining().blend
    assert (inputs["start_percent"].default, inputs["end_percent"].default) == (0.0, 1.0)


def test_by_default_it_changes_nothing(clips: tuple[Any, Any]) -> None:
    _, bridged = clips
    for text in (MIXED, "a blue square", ""):
        assert same(encode(run(bridged), text), encode(bridged, text))


def test_the_clip_that_came_in_stays_as_it_is(clips: tuple[Any, Any]) -> None:
    _, bridged = clips
    before, speech = encode(bridged, MIXED), bridged.speech
    changed = run(bridged, keep="\u5706\u5f62", blend=0.9)
    assert not same(encode(changed, MIXED), before)
    assert bridged.speech is speech and same(encode(bridged, MIXED), before)


def test_a_clip_without_a_bridge_is_refused_in_three_parts(clips: tuple[Any, Any]) -> None:
    with pytest.raises(BridgeError) as refused:
        run(clips[0])
    assert refused.value.found and refused.value.expected and refused.value.action


@pytest.mark.parametrize("word", ["blue hat", "\u5706\u5f62", "zzw_style \\(v2\\)"])
def test_words_of_both_lists_reach_the_english_stream(clips: tuple[Any, Any], word: str) -> None:
    _, bridged = clips
    text = f"\u7ea2\u8272{word}, \u84dd"
    only = bridged.with_speech(route="native only")
    expected = bridged.tokenize(f"lang:en {word} lang:zh \u84dd")
    for lists in ({"triggers": f"other,, {word},, more"}, {"keep": f"other\n{word}\nmore"}):
        tokens = run(only, **lists).tokenize(text)
        assert tokens["l"] == expected["l"]
        assert tokens["native"] != only.tokenize(text)["native"]


def test_two_nodes_give_two_prompts_their_own_blend(clips: tuple[Any, Any]) -> None:
    clip, bridged = clips
    one, other = run(bridged, blend=1.0), run(bridged, blend=0.0)
    assert same(encode(one, MIXED), encode(bridged, MIXED.split(",")[0] + ", "))
    assert same(encode(other, MIXED), encode(clip, MIXED.split(", ")[1]))


def test_a_blend_for_a_part_of_the_steps_makes_entries(clips: tuple[Any, Any]) -> None:
    _, bridged = clips
    assert len(encode(run(bridged, blend=0.8, start_percent=0.2, end_percent=0.6), MIXED)) == 3
    assert len(encode(run(bridged, blend=0.8, end_percent=0.6), MIXED)) == 2
    assert len(encode(run(bridged, blend=0.8, start_percent=0.6, end_percent=0.2), MIXED)) == 1
