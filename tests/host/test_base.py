"""Each base is recognised by the widths of its U-Net and its towers."""

from __future__ import annotations

import pytest

from language_bridge.host.base import Base, base_of
from language_bridge.tests.fixtures.graph import Checkpoint

BASES = {
    "sd1": Base("sd1", 768, 0, ("l",)),
    "sd2": Base("sd2", 1024, 0, ("h",)),
    "sdxl": Base("sdxl", 2048, 1280, ("g", "l")),
}


def test_base(checkpoint: Checkpoint) -> None:
    assert base_of(checkpoint.model, checkpoint.clip) == BASES[checkpoint.name]


@pytest.mark.parametrize("text", ["", "a red cat", "one two three " * 40])
def test_the_keys_are_those_of_the_tokens(checkpoint: Checkpoint, text: str) -> None:
    assert set(checkpoint.clip.tokenize(text)) == set(BASES[checkpoint.name].keys)
