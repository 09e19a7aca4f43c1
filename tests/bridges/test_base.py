"""The registry, and the error in three parts."""

from __future__ import annotations

import pickle

import pytest
import torch

from language_bridge.bridges.base import Bridge, create, identify, kinds
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.identity import IdentitySpec
from language_bridge.tests.bridges.toys import toy_bridge, toy_hidden, toy_spec


def test_an_error_has_three_parts_and_travels() -> None:
    error = BridgeError("It broke.", 3, 4, "Mend it.")
    assert str(error) == "It broke.\n  found: 3\n  expected: 4\n  what to do: Mend it."
    assert isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.action) == (str(error), "Mend it.")


def test_the_folder_is_scanned() -> None:
    assert {"identity", "linear", "mlp"} <= set(kinds())
    assert all(cls.kind == kind for kind, cls in kinds().items())


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(BridgeError, match="'resampler-9000'.*\n.*identity, linear, mlp"):
        create("resampler-9000", {})


def test_a_kind_defined_twice_names_both_modules() -> None:
    before = dict(kinds())
    with pytest.raises(BridgeError, match=r"bridges\.mlp and in .*test_base"):

        class Impostor(Bridge, kind="mlp"):
            pass

    assert dict(kinds()) == before


def test_the_spec_of_another_kind_is_refused() -> None:
    with pytest.raises(BridgeError, match="MlpSpec"):
        create("mlp", IdentitySpec(hidden=8, context=8))


def test_a_spec_object_is_as_good_as_a_mapping() -> None:
    bridge = toy_bridge("mlp", 8)
    assert create("mlp", bridge.spec).spec == create("mlp", toy_spec("mlp", 8)).spec == bridge.spec


def test_a_foreign_file_that_nobody_claims_is_listed() -> None:
    with pytest.raises(BridgeError, match=r"claimed by nobody; 1 tensors: stranger\.weight \[3, 4\]"):
        identify({"stranger.weight": (3, 4)})


def test_identity_hands_through_and_asks_for_equal_widths() -> None:
    hidden = toy_hidden(2, 5)
    assert toy_bridge("identity")(hidden).context is hidden.states
    assert toy_bridge("identity", 8)(hidden).pooled is hidden.pooled
    with pytest.raises(BridgeError, match="two equal widths"):
        create("identity", {"hidden": 8, "context": 9})
    with pytest.raises(BridgeError, match="pooled vector"):
        create("identity", {"hidden": 8, "context": 8, "pooled": 9})(hidden)


def test_linear_is_one_matrix_and_pools_over_all_tokens() -> None:
    bridge, hidden = toy_bridge("linear", 8), toy_hidden(2, 5, 3)
    weights = bridge.state_dict()
    cond = bridge(hidden)
    context = hidden.states @ weights["context.weight"].T + weights["context.bias"]
    pooled = hidden.states.mean(1) @ weights["pooled.weight"].T + weights["pooled.bias"]
    torch.testing.assert_close(cond.context, context)
    torch.testing.assert_close(cond.pooled, pooled)
