"""What docs/streams.md measures, in small: which way the blend moves pictures, and what one reader binds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import comfy.utils
import folder_paths
import pytest

from language_bridge.benchmarks import streams
from language_bridge.benchmarks.pocket import Painter
from language_bridge.host.joining import Joining

SEED = 11


@pytest.fixture(scope="module")
def painter() -> Iterator[Painter]:
    """The pocket checkpoint with its bridges; the host's folders and switches as they were, afterwards."""
    known, bar = dict(folder_paths.folder_names_and_paths), comfy.utils.PROGRESS_BAR_ENABLED
    level = logging.getLogger().level
    comfy.utils.PROGRESS_BAR_ENABLED = False
    yield Painter()
    comfy.utils.PROGRESS_BAR_ENABLED = bar
    logging.getLogger().setLevel(level)
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(known)


def test_the_blend_moves_pictures_from_one_colour_to_the_other(painter: Painter) -> None:
    model, clip = painter.bridged["pocket-iap"]
    asked = streams.disagreeing(10, SEED)
    shown: list[tuple[int, int]] = []
    for blend in (0.0, 0.5, 1.0):
        joined = clip.with_speech(joining=Joining(blend=blend))
        pictures = painter.paint(model, joined, [text for text, _, _ in asked], SEED)
        seen = [{thing.colour for thing in each.things} for each in painter.judge.read_many(pictures)]
        shown.append(
            (
                sum(chinese in each for each, (_, chinese, _) in zip(seen, asked, strict=True)),
                sum(english in each for each, (_, _, english) in zip(seen, asked, strict=True)),
            )
        )
    native, english = zip(*shown, strict=True)
    assert list(native) == sorted(native) and native[-1] >= 8 and native[0] <= 1
    assert list(english) == sorted(english, reverse=True) and english[0] >= 8 and english[-1] <= 1


def test_a_word_in_the_other_language_is_bound_where_one_text_model_reads_both(painter: Painter) -> None:
    asked: list[tuple[str, Any]] = [(each.text, each) for each in streams.prompts("by word", 24, SEED)]
    inside = painter.score(*painter.bridged["pocket-pseudo"], asked, SEED)["attributes"]
    apart = painter.score(*painter.bridged["pocket-iap"], asked, SEED)["attributes"]
    assert inside > 0.85 and inside > apart + 0.1
