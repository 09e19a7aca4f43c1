"""The report on a prompt: true to the tokens, complete, and free of charge."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import comfy.sd
import pytest

from language_bridge.host.clip import KEY, BridgedClip
from language_bridge.host.inspector import inspect
from language_bridge.host.language import words
from language_bridge.host.tower import NativeTower
from language_bridge.nodes.inspector import PromptInspector
from language_bridge.prompt import Phrase
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call

RED_CAT = "\u7ea2\u8272\u7684\u732b"
DRAGON = "\u9f98"
SAY = words("English")


@pytest.fixture
def clip(sd1: Checkpoint) -> Any:
    return bridged(sd1)[1]


def lines(clip: Any, text: str) -> list[str]:
    return inspect(clip, text, SAY).split("\n")


def line(clip: Any, text: str, part: str) -> str:
    found = [each for each in lines(clip, text) if part in each]
    assert len(found) == 1, found
    return found[0]


def test_nothing_is_loaded_and_nothing_encoded(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the inspector only reads tokens")

    monkeypatch.setattr(NativeTower, "load", refuse)
    monkeypatch.setattr(comfy.sd.CLIP, "load_model", refuse)
    monkeypatch.setattr(BridgedClip, "encode_from_tokens", refuse)
    assert "two streams" in inspect(clip, f"{RED_CAT}, a dog", SAY)


def test_english_is_said_to_be_untouched(clip: Any) -> None:
    said = inspect(clip, "a (red:1.2) cat BREAK \uff08x\uff09", SAY)
    assert "exactly as without the bridge" in said
    assert "Native stream: says nothing" in said


@pytest.mark.parametrize(
    "text", [RED_CAT, f"{RED_CAT}, a big (dog:1.3)", f"(({RED_CAT})), photo", f"{RED_CAT} " * 60]
)
def test_the_counts_are_those_of_the_tokens(checkpoint: Checkpoint, text: str) -> None:
    clip = bridged(checkpoint)[1]
    tokens = clip.tokenize(text, return_word_ids=True)
    used = sum(word != 0 for chunk in tokens[KEY] for *_, word in chunk)
    windows = len(tokens[KEY])
    room = windows * clip.speech.tower.words.capacity
    assert f"{used} of {room} tokens in {windows} window(s)" in line(clip, text, "Native stream")
    for key in clip.speech.base.keys:
        spoken = sum(word != 0 for chunk in tokens[key] for *_, word in chunk)
        named = [each for each in lines(clip, text) if f"CLIP-{key.upper()}:" in each]
        assert [f"{spoken} of {75 * len(tokens[key])}" in each for each in named] == [True] * (spoken > 0)


def test_pieces_stand_in_order_with_their_weights(clip: Any) -> None:
    said = lines(clip, f"{RED_CAT}, a (big:1.3) dog")
    assert f"  {' | '.join(RED_CAT)} | ," in said
    assert "  a | big\u00d71.3 | dog" in said


def test_every_part_stands_in_the_report_with_its_stream_and_reason(clip: Any) -> None:
    said = lines(clip, f"{RED_CAT} (photo:1.2) lang:en my house lang:zh embedding:sd1-word")
    parts = [each for each in said if re.match(r"  (native|english) ", each)]
    assert [part.split()[0] for part in parts] == ["native", "english", "english", "english"]
    assert "not Latin" in parts[0]
    assert "photo \u00d71.2" in parts[1] and "Latin letters" in parts[1]
    assert "my house" in parts[2] and "lang:en" in parts[2]
    assert "Textual Inversion" in parts[3]


def test_a_phrase_names_where_it_comes_from(clip: Any) -> None:
    phrases = (Phrase("zorb style", "trigger", "zorb.safetensors"), Phrase(RED_CAT, "kept"))
    spoken = clip.with_speech(phrases=phrases)
    said = inspect(spoken, f"{RED_CAT} Zorb_Style \u84dd\u8272", SAY)
    assert re.search(r"english +Zorb_Style +\(a trigger word, from zorb.safetensors\)", said)
    assert re.search(rf"english +{RED_CAT} +\(on the keep-list\)", said)


def test_what_was_typed_in_full_width_is_named_once_with_its_number(clip: Any) -> None:
    said = inspect(clip, f"\uff08{RED_CAT}\uff1a1.2\uff09\uff0c{RED_CAT}\uff0c", SAY)
    assert re.search("\uff0c \u2192 ,   2\u00d7", said)
    assert re.search("\uff08 \u2192 \\(   1\u00d7", said)
    assert "read as" not in inspect(clip, f"({RED_CAT}:1.2),", SAY)


def test_characters_without_a_token_are_named(clip: Any) -> None:
    assert f"no token for: {DRAGON}" in inspect(clip, f"{RED_CAT}{DRAGON}{DRAGON}", SAY)
    assert "no token" not in inspect(clip, RED_CAT, SAY)


def test_embeddings_are_found_or_missed(clip: Any) -> None:
    said = inspect(clip, f"{RED_CAT} embedding:sd1-word embedding:nowhere", SAY)
    rows = sum(not isinstance(token, int) for token, *_ in clip.tokenize("embedding:sd1-word")["l"][0])
    assert rows and f"embedding sd1-word: {rows} row(s)" in said
    assert "embedding nowhere: no such file" in said


def test_break_begins_windows(clip: Any) -> None:
    said = inspect(clip, f"{RED_CAT} BREAK {RED_CAT}", SAY)
    assert "2 window(s)" in said and "begins a new window" in said


def test_native_pieces_are_shown_where_the_clip_reads_them(clip: Any) -> None:
    inside = clip.with_speech(inside=True)
    said = lines(inside, f"a big {RED_CAT}, ({RED_CAT}:1.5) dog")
    pieces = " | ".join(RED_CAT)
    weighted = " | ".join(f"{piece}\u00d71.5" for piece in RED_CAT)
    assert f"  a | big | {pieces} | , | {weighted} | dog" in said
    assert "inside the checkpoint's own CLIP" in "\n".join(said)


def test_a_stock_clip_is_inspected_too(sd1: Checkpoint) -> None:
    said = inspect(sd1.clip, "a red cat", SAY)
    assert "no language bridge" in said and "3 of 75 tokens" in said


@pytest.mark.parametrize(
    "text", ["", " ", "(", "BREAK", "lang:en", "embedding:x", "\uff08\uff09", "\n\t", "1.5"]
)
@pytest.mark.parametrize("route", ["two streams", "native only"])
def test_odd_prompts_are_inspected(sd1: Checkpoint, text: str, route: str) -> None:
    assert inspect(bridged(sd1, route=route)[1], text, SAY)


def test_the_report_speaks_chinese(clip: Any) -> None:
    said = inspect(clip, f"\uff08{RED_CAT}\uff09, a dog", words("Chinese"))
    assert "\u82f1\u6587\u8def" in said and "stream" not in said


def test_the_node_gives_the_report_and_the_prompt(clip: Any) -> None:
    text = f"{RED_CAT}, a dog"
    output: Callable[..., Any] = PromptInspector.execute
    report = output(clip, text, "English")
    assert report.ui.as_dict() == {"text": (report.args[0],)}
    assert call(PromptInspector, clip=clip, text=text, language="English") == (inspect(clip, text, SAY), text)
