"""A training that is left, cut smaller or run out of memory ends where an undisturbed one ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from language_bridge.bridges.errors import BridgeError
from language_bridge.training import checkpoint
from language_bridge.training.settings import Settings
from language_bridge.training.trainer import MOST_ODD, Report, Trainer

from .toy import NAMES, Toy, method_of

PLAIN: dict[str, Any] = {
    "steps": 6,
    "batch": 4,
    "learning_rate": 1e-2,
    "warmup": 2,
    "drop": 0.3,
    "save_every": 2,
}


class Cancelled(Exception):
    """What a poll raises."""


def trainer_of(name: str, unet: Any, run: Path | None = None, **changes: Any) -> Trainer:
    options = {key: changes.pop(key) for key in ("poll", "out_of_memory", "facts") if key in changes}
    method, source = changes.pop("method", None), changes.pop("source", None)
    settings = Settings(**{**PLAIN, **changes})
    return Trainer(method or method_of(name, unet), source or Toy(), settings, run, **options)


def finished(trainer: Trainer) -> dict[str, Tensor]:
    for _ in trainer.train():
        pass
    return {key: value.detach().clone() for key, value in trainer.weights.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "extra", [{}, {"draws": 2, "average": 0.9, "precision": "bf16", "optimiser": "Muon"}]
)
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    name: str, extra: dict[str, Any], unet: Any, tmp_path: Path
) -> None:
    """Bit for bit, weights, averages, history and all, wherever it was left."""
    whole = trainer_of(name, unet, tmp_path / "whole", **extra)
    expected = finished(whole)
    first = trainer_of(name, unet, tmp_path / "cut", **extra)
    for report in first.train():
        if report.step == 3:
            break  # the generator is closed, which is how a node leaves it
    torch.manual_seed(99)  # another process has another state
    again = trainer_of(name, unet, tmp_path / "cut", **extra)
    assert again.resume() == 3
    assert_equal(finished(again), expected)
    assert again.history == whole.history
    if whole.average is not None and again.average is not None:
        assert_equal(again.average.tensors(), whole.average.tensors())
    saved = [checkpoint.latest(tmp_path / run) for run in ("whole", "cut")]
    assert saved[0] is not None and saved[1] is not None
    assert_equal(dict(saved[0].tensors["optimiser"]), dict(saved[1].tensors["optimiser"]))


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_moves_only_what_learns(name: str, unet: Any) -> None:
    """The U-Net of the graph stays bit-identical; every weight that learns has moved."""
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    trainer = trainer_of(name, unet, steps=40, learning_rate=5e-3, drop=0.0, draws=1, batch=10)
    start = {key: value.detach().clone() for key, value in trainer.weights.items()}
    first = trainer.validate()
    reports = list(trainer.train())
    assert reports[-1].loss < reports[0].loss
    assert all(not torch.equal(value, start[key]) for key, value in trainer.weights.items())
    assert_equal(unet.state_dict(), before)
    assert all(each.grad is None for each in unet.parameters())
    assert first is not None and len(trainer.held_out) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_cutting_a_batch_changes_rounding_alone(name: str, batch: int, unet: Any) -> None:
    """Four at once, or two and two, or one by one: the same examples, noise and drops."""
    settings = {"optimiser": "SGD", "learning_rate": 1e-3}
    expected = finished(trainer_of(name, unet, **settings))
    cut = finished(trainer_of(name, unet, batch=batch, accumulation=4 // batch, **settings))
    for key, value in expected.items():
        torch.testing.assert_close(cut[key], value, rtol=1e-5, atol=1e-6)


class Hungry:
    """A method that only has room for some examples at once."""

    def __init__(self, inner: Any, room: int) -> None:
        self.inner = inner
        self.room = room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def loss(self, batch: Any, *others: Any) -> Any:
        if len(batch.latents) > self.room:
            raise MemoryError("no room")
        return self.inner.loss(batch, *others)


def test_out_of_memory_halves_what_is_seen_at_once_and_changes_nothing_else(unet: Any) -> None:
    settings = {"optimiser": "SGD", "learning_rate": 1e-3}
    expected = finished(trainer_of("pea", unet, **settings))
    hungry: Any = Hungry(method_of("pea", unet), 1)
    trainer = trainer_of("pea", unet, method=hungry, **settings)
    got = finished(trainer)
    assert trainer.micro == 1 and trainer.retries == 2
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


def test_no_room_for_one_example_is_said_plainly_and_loses_nothing(unet: Any, tmp_path: Path) -> None:
    finished(trainer_of("pea", unet, tmp_path, steps=2))
    hungry: Any = Hungry(method_of("pea", unet), 0)
    trainer = trainer_of("pea", unet, tmp_path, method=hungry)
    trainer.resume()
    with pytest.raises(BridgeError, match="does not fit into memory") as error:
        finished(trainer)
    assert "gradient checkpointing" in str(error.value)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None and saved.step == 2


@pytest.mark.parametrize("call", range(1, 25))
def test_cancel_at_any_poll_keeps_the_last_whole_step(call: int, unet: Any, tmp_path: Path) -> None:
    """Four micro-batches a step, six steps: each poll is a place to cancel at."""
    settings: dict[str, Any] = {"batch": 1, "accumulation": 4}
    expected = finished(trainer_of("align", unet, **settings))
    polls = 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls == call:
            raise Cancelled

    with pytest.raises(Cancelled):
        finished(trainer_of("align", unet, tmp_path, poll=poll, **settings))
    again = trainer_of("align", unet, tmp_path, **settings)
    assert again.resume() == (call - 1) // 4
    assert_equal(finished(again), expected)


def test_finishing_early_keeps_the_step(unet: Any, tmp_path: Path) -> None:
    trainer = trainer_of("align", unet, tmp_path, save_every=0)
    reports: list[Report] = []
    for report in trainer.train():
        reports.append(report)
        if report.step == 3:
            trainer.finish()
    saved = checkpoint.latest(tmp_path)
    assert len(reports) == 3 and saved is not None and saved.step == 3


class Poisoned(Toy):
    """Some latents are not numbers."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.latents[:bad] = float("nan")
        self.flags[:] = 1.0


def test_a_step_that_is_not_finite_changes_nothing(unet: Any) -> None:
    trainer = trainer_of("pea", unet, source=Poisoned(1), batch=2, steps=5, optimiser="SGD", average=0.5)
    seen = 0
    before = {key: value.detach().clone() for key, value in trainer.weights.items()}
    for report in trainer.train():
        same = all(torch.equal(value, before[key]) for key, value in trainer.weights.items())
        assert same == report.skipped
        seen += report.skipped
        before = {key: value.detach().clone() for key, value in trainer.weights.items()}
    assert seen == sum(0 in trainer.order.at(step) for step in range(5)) > 0
    assert all(bool(torch.isfinite(each).all()) for each in trainer.weights.values())
    assert len(trainer.history) == 5 - seen


def test_nothing_but_odd_steps_ends_the_training(unet: Any) -> None:
    with pytest.raises(BridgeError, match="gone astray"):
        finished(trainer_of("pea", unet, source=Poisoned(14), steps=3 * MOST_ODD))


def test_half_precision_finds_its_scale(unet: Any) -> None:
    """fp16 gradients overflow at first; the scale falls until they do not."""
    trainer = trainer_of("align", unet, precision="fp16", steps=12, batch=8, optimiser="SGD")
    trainer._scale = 2.0**40
    reports = list(trainer.train())
    assert reports[0].skipped
    trainer = trainer_of("align", unet, precision="fp16", steps=12, batch=8, optimiser="SGD")
    assert not any(report.skipped for report in trainer.train())


@pytest.mark.parametrize(
    "change", [{"learning_rate": 2e-2}, {"batch": 2}, {"seed": 1}, {"facts": {"data": "other"}}]
)
def test_a_run_goes_on_only_as_it_was_begun(change: dict[str, Any], unet: Any, tmp_path: Path) -> None:
    finished(trainer_of("pea", unet, tmp_path, facts={"data": "cats"}))
    with pytest.raises(BridgeError, match="begun with other"):
        trainer_of("pea", unet, tmp_path, **{"facts": {"data": "cats"}, **change}).resume()


def test_a_run_may_be_made_longer(unet: Any, tmp_path: Path) -> None:
    plain = {"schedule": "constant"}  # the others depend on the number of steps
    expected = finished(trainer_of("pea", unet, **plain))
    finished(trainer_of("pea", unet, tmp_path, steps=4, **plain))
    longer = trainer_of("pea", unet, tmp_path, batch=2, accumulation=2, save_every=1, **plain)
    assert longer.resume() == 4
    for key, value in finished(longer).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_the_same_run_under_another_method_is_refused(unet: Any, tmp_path: Path) -> None:
    finished(trainer_of("pea", unet, tmp_path))
    with pytest.raises(BridgeError, match="method"):
        trainer_of("resample", unet, tmp_path).resume()


def test_held_out_loss_is_one_number_for_one_state(unet: Any) -> None:
    """The same chance each time, no drops, the averaged weights, and no effect on the training."""
    trainer = trainer_of("pea", unet, average=0.9, validate_every=3)
    assert trainer.validate() == trainer.validate()
    expected = finished(trainer_of("pea", unet, average=0.9))
    reports = list(trainer.train())
    assert [report.held_out is not None for report in reports] == [False, False, True] * 2
    assert_equal({key: value.detach() for key, value in trainer.weights.items()}, expected)


def test_a_checkpoint_tells_what_it_is(unet: Any, tmp_path: Path) -> None:
    trainer = trainer_of("iap", unet, tmp_path, facts={"data": "cats"})
    finished(trainer)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    facts = json.loads(json.dumps(saved.facts))
    assert facts["settings"] == trainer.settings.to_json()
    assert facts["about"] == {"data": "cats"} and facts["method"]["objective"] == "iap"
    assert saved.tensors["curves"]["loss"][:, 0].tolist() == list(range(1, 7))
