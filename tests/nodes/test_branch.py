"""The node that settles how a branch works hands its settings on, and refuses what has no branch."""

from __future__ import annotations

from typing import Any

import pytest

from language_bridge.bridges.errors import BridgeError
from language_bridge.host import branch_clip
from language_bridge.nodes.branch import LENGTHS, WEIGHTS, BranchSettings
from language_bridge.tests.fixtures.stock import call


class Branched(branch_clip.BranchedClip):
    """A CLIP that notes what its voices are told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def with_voices(self, **changes: Any) -> Any:
        self.told = changes
        return self


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_defaults_are_the_published_ones_and_the_others_are_handed_on(
    monkeypatch: pytest.MonkeyPatch, weights: str, length: str
) -> None:
    from language_bridge.host import branch

    limits: list[tuple[Any, float, float]] = []
    monkeypatch.setattr(branch, "limited", lambda *given: limits.append(given) or "limited")
    settings = {"start_percent": 0.2, "end_percent": 0.7, "weights": weights, "length": length}
    clip = Branched()
    model, changed = call(BranchSettings, model="model", clip=clip, **settings)
    assert model == "limited" and limits == [("model", 0.2, 0.7)]
    assert changed.told == {"weighted": weights == "act", "own_length": length == "own"}
    assert (WEIGHTS[0], LENGTHS[0]) == ("dropped", "shared")


def test_what_has_no_branch_is_refused_in_words() -> None:
    settings = {"start_percent": 0.0, "end_percent": 1.0, "weights": "dropped", "length": "shared"}

    class Plain:
        wrappers: dict[str, Any] = {}

    with pytest.raises(BridgeError, match="speaks to no branch"):
        call(BranchSettings, model=Plain(), clip=object(), **settings)
    with pytest.raises(BridgeError, match="has no branch"):
        call(BranchSettings, model=Plain(), clip=Branched(), **settings)
