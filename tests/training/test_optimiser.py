"""Optimisers: torch's own numbers, what they remember through a checkpoint bit for bit, and refusals."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from language_bridge.bridges.errors import BridgeError
from language_bridge.training import checkpoint
from language_bridge.training.optimiser import OPTIMISERS, Average, Optimiser, scale_at
from language_bridge.training.settings import Settings

IN_TORCH = [kind for kind in OPTIMISERS if kind != "AdamW8bit"]
SHAPES = {
    "layer.weight": (8, 6),
    "layer.bias": (8,),
    "narrow.weight": (4, 12),
    "word_embeddings.weight": (11, 6),
    "conv.weight": (8, 6, 3, 3),
    "turned.weight": (8, 6, 3, 3),
    "seldom.weight": (6, 9),
    "never.weight": (7, 7),
}
"""Everything that is treated alike or not: `turned` lies in memory as channels last."""


def settings_of(kind: str = "AdamW", **changes: Any) -> Settings:
    given = {"steps": 20, "learning_rate": 3e-2, "warmup": 3, "schedule": "cosine", "weight_decay": 0.01}
    return Settings(**{**given, "optimiser": kind, **changes})


def parameters_of(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["turned.weight"] = made["turned.weight"].to(memory_format=torch.channels_last)
    return {name: nn.Parameter(value) for name, value in made.items()}


def give_gradients(parameters: Mapping[str, nn.Parameter], step: int, size: float = 1.0) -> None:
    """Gradients that the step alone decides; some have none in some steps."""
    generator = torch.Generator().manual_seed(100 + step)
    for name, parameter in parameters.items():
        gradient = size * torch.randn(parameter.shape, generator=generator)
        if name != "never.weight" and (name != "seldom.weight" or step % 3 == 2):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


def values_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether all bits are the same, also those of zeros and NaN."""
    pairs = ((one[name].contiguous(), other[name].contiguous()) for name in one)
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        for a, b in pairs
    )


class EightBit(torch.optim.Optimizer):
    """What the package's optimiser does to a state: plain numbers, bytes, tensors of other shapes."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["state1"] = torch.zeros(parameter.shape, dtype=torch.uint8)
                    state["absmax1"] = torch.zeros(1)
                state["step"] += 1
                mean = state["state1"].float() * state["absmax1"] * 0.9 + parameter.grad.abs()
                state["absmax1"] = mean.max()[None] / 255
                state["state1"] = (mean / state["absmax1"]).round().to(torch.uint8)
                parameter -= group["lr"] * parameter.grad.sign() * mean.sqrt() / state["step"]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of that name is installed."""
    made = types.ModuleType("bitsandbytes")
    made.optim = types.SimpleNamespace(AdamW8bit=EightBit)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", made)
    yield


def run(
    parameters: dict[str, nn.Parameter], settings: Settings, steps: range, saved: checkpoint.Saved | None
) -> tuple[Optimiser, Average]:
    trained, average = Optimiser(parameters, settings), Average(parameters, 0.9)
    if saved is not None:
        trained.load(saved.tensors["optimiser"], saved.facts["optimiser"])  # type: ignore[arg-type]
        average.load(saved.tensors["average"])
    for step in steps:
        give_gradients(parameters, step)
        trained.step(step)
        average.update()
    return trained, average


def saved_in(
    folder: Path, parameters: Mapping[str, nn.Parameter], trained: Optimiser, average: Average
) -> checkpoint.Saved:
    tensors = {"weights": dict(parameters), "optimiser": trained.tensors(), "average": average.tensors()}
    checkpoint.save(folder, 0, tensors, {"optimiser": trained.facts()})
    saved = checkpoint.latest(folder)
    assert saved is not None
    return saved


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_training_that_was_cut_and_taken_up_is_bit_for_bit_the_uncut_one(
    kind: str, cut: int, tmp_path: Path
) -> None:
    settings = settings_of(kind)
    uncut = parameters_of()
    whole = run(uncut, settings, range(9), None)

    first = parameters_of()
    saved = saved_in(tmp_path, first, *run(first, settings, range(cut), None))
    second = parameters_of(seed=1)
    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(saved.tensors["weights"][name])
    again = run(second, settings, range(cut, 9), saved)

    assert same(values_of(uncut), values_of(second))
    assert same(whole[0].tensors(), again[0].tensors()) and whole[0].facts() == again[0].facts()
    assert same(whole[1].tensors(), again[1].tensors())
    moved = {
        name for name, value in values_of(uncut).items() if not torch.equal(value, parameters_of()[name])
    }
    assert moved == SHAPES.keys() - {"never.weight"}


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_a_state_that_was_read_in_inference_mode_can_be_trained_on(kind: str, tmp_path: Path) -> None:
    """Nodes run in inference mode; what they read there must be no tensor of that mode afterwards."""
    parameters = parameters_of()
    saved_in(tmp_path, parameters, *run(parameters, settings_of(kind), range(3), None))
    with torch.inference_mode():
        saved = checkpoint.latest(tmp_path)
        trained, average = Optimiser(parameters, settings_of(kind)), Average(parameters, 0.9)
        assert saved is not None
        trained.load(saved.tensors["optimiser"], saved.facts["optimiser"])  # type: ignore[arg-type]
        average.load(saved.tensors["average"])
    give_gradients(parameters, 3)
    trained.step(3)
    average.update()


# -- the numbers ------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}


@pytest.mark.parametrize("kind", [kind for kind in IN_TORCH if kind != "Muon"])
def test_every_step_is_the_one_of_torch_at_the_rate_of_the_schedule(kind: str) -> None:
    settings = settings_of(kind, clip=0.0)
    ours, theirs = parameters_of(), parameters_of()
    trained = Optimiser(ours, settings)
    other = getattr(torch.optim, kind)(theirs.values(), lr=1.0, weight_decay=0.01, **OPTIONS.get(kind, {}))
    for step in range(6):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        trained.step(step)
        other.param_groups[0]["lr"] = settings.learning_rate * scale_at(step, settings)
        other.step()
        other.zero_grad()
    assert same(values_of(ours), values_of(theirs))


def test_muon_has_matrices_and_convolutions_and_adamw_the_rest() -> None:
    settings = settings_of("Muon", clip=0.0, schedule="constant", warmup=0)
    ours, theirs = parameters_of(), parameters_of()
    trained = Optimiser(ours, settings)
    matrices = ["layer.weight", "conv.weight", "turned.weight", "seldom.weight", "never.weight"]
    flat = {name: nn.Parameter(theirs[name].detach().flatten(1).clone()) for name in matrices}
    rest = [value for name, value in theirs.items() if name not in matrices]
    muon = torch.optim.Muon(flat.values(), lr=3e-2, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, lr=0.2 * 3e-2, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(6):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for name, matrix in flat.items():
            gradient = theirs[name].grad
            matrix.grad = None if gradient is None else gradient.flatten(1)
        trained.step(step)
        muon.step()
        adam.step()
        for value in theirs.values():
            value.grad = None
    for name, value in ours.items():
        expected = flat[name].view(SHAPES[name]) if name in flat else theirs[name]
        assert torch.equal(value, expected), name


def test_muon_trains_weights_that_were_moved_meanwhile() -> None:
    ours, theirs = parameters_of(), parameters_of()
    one, other = Optimiser(ours, settings_of("Muon")), Optimiser(theirs, settings_of("Muon"))
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step(step)
        other.step(step)
        for parameter in theirs.values():  # as a module does that goes to another device and back
            parameter.data = parameter.data.double().float()
    assert same(values_of(ours), values_of(theirs))


@pytest.mark.parametrize("kind", IN_TORCH)
def test_the_norm_is_that_before_clipping_and_the_gradients_are_gone(kind: str) -> None:
    clipped, scaled = parameters_of(), parameters_of()
    give_gradients(clipped, 2, 50.0)
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in clipped.values() if p.grad is not None))
    assert Optimiser(clipped, settings_of(kind, clip=0.5)).step(0) == pytest.approx(total, rel=1e-6)
    assert all(parameter.grad is None for parameter in clipped.values())
    give_gradients(scaled, 2, 50.0)
    for parameter in scaled.values():
        if parameter.grad is not None:
            parameter.grad *= 0.5 / total
    Optimiser(scaled, settings_of(kind, clip=0.0)).step(0)
    for name, value in clipped.items():
        assert torch.allclose(value, scaled[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("kind", IN_TORCH)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_gradients_that_are_not_finite_change_nothing(kind: str, clip: float, odd: float) -> None:
    parameters = parameters_of()
    trained, _ = run(parameters, settings_of(kind, clip=clip), range(2), None)
    before = values_of(parameters), {name: value.clone() for name, value in trained.tensors().items()}
    give_gradients(parameters, 2)
    gradient = parameters["layer.bias"].grad
    assert gradient is not None
    gradient[3] = odd
    assert not math.isfinite(trained.step(2))
    assert same(before[0], values_of(parameters)) and same(before[1], trained.tensors())
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 0), (10, 4), (10, 10), (10, 50), (1000, 100)])
def test_the_rate_rises_and_falls_as_it_is_told(schedule: str, steps: int, warmup: int) -> None:
    settings = settings_of(schedule=schedule, steps=steps, warmup=warmup)
    scales = [scale_at(step, settings) for step in range(steps)]
    rising = scales[: min(warmup, steps)]
    assert rising == [pytest.approx((step + 1) / warmup) for step in range(len(rising))]
    falling = scales[max(warmup - 1, 0) :]
    assert falling == sorted(falling, reverse=True)
    assert all(0 < scale <= 1 for scale in scales) and (warmup > steps or max(scales) == 1)
    if warmup < steps:
        last = {"constant": 1.0, "linear": 0.0, "cosine": 0.02}[schedule]
        assert scale_at(steps, settings) == pytest.approx(last)
        half = {"constant": 1.0, "linear": 0.5, "cosine": 0.51}[schedule]
        if not (steps - warmup) % 2:
            assert scale_at((steps + warmup) // 2, settings) == pytest.approx(half)
    trained = Optimiser({"a": nn.Parameter(torch.zeros(2))}, settings)
    assert trained.rate(steps // 2) == 3e-2 * scale_at(steps // 2, settings)


# -- refusals ---------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(BridgeError, match="nothing to train"):
        Optimiser({}, settings_of())
    one = nn.Parameter(torch.zeros(3))
    with pytest.raises(BridgeError, match="two names"):
        Optimiser({"a": one, "b": one}, settings_of())
    with pytest.raises(BridgeError, match="Adafactor, Muon"):
        Optimiser({"a": one}, settings_of("Lion"))


@pytest.mark.parametrize("kind", ["Muon", "Adafactor"])
def test_an_optimiser_that_this_torch_has_not_is_named_and_the_others_work(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.optim, kind)
    with pytest.raises(BridgeError, match=rf"{kind} is not part of this torch[\s\S]*or newer[\s\S]*AdamW"):
        Optimiser(parameters_of(), settings_of(kind))
    Optimiser(parameters_of(), settings_of("AdamW"))


def test_muon_alone_and_adamw_alone_are_enough() -> None:
    for name in ("layer.weight", "layer.bias"):
        parameters = {name: parameters_of()[name]}
        trained = Optimiser(parameters, settings_of("Muon"))
        give_gradients(parameters, 0)
        trained.step(0)
        assert set(trained.tensors()) >= {f"{name}.{key}" for key in trained.facts()["state"][name]}  # type: ignore[index]


@pytest.mark.parametrize("error", [ImportError("No module"), RuntimeError("no CUDA")])
def test_without_its_package_the_8_bit_optimiser_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "bitsandbytes":
                raise error

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    with pytest.raises(
        BridgeError, match=rf"AdamW8bit cannot be used[\s\S]*{error}[\s\S]*install bitsandbytes"
    ):
        Optimiser(parameters_of(), settings_of("AdamW8bit"))


def without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


Spoil = Callable[[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]
SPOILT: dict[str, Spoil] = {
    "another optimiser": lambda t, f: (t, {**f, "optimiser": "Adam"}),
    "no optimiser": lambda t, f: (t, without(f, "optimiser")),
    "another shape": lambda t, f: (t, {**f, "parameters": {**f["parameters"], "layer.weight": [6, 8]}}),
    "a parameter more": lambda t, f: (t, {**f, "parameters": {**f["parameters"], "new": [2]}}),
    "a parameter less": lambda t, f: (t, {**f, "parameters": without(f["parameters"], "layer.bias")}),
    "state of nobody": lambda t, f: (t, {**f, "state": {**f["state"], "new": {"step": 3}}}),
    "state in words": lambda t, f: (t, {**f, "state": {**f["state"], "layer.bias": {"step": "3"}}}),
    "a tensor less": lambda t, f: (without(t, "layer.bias.exp_avg"), f),
    "a tensor more": lambda t, f: ({**t, "layer.bias.more": torch.zeros(1)}, f),
    "a tensor cut": lambda t, f: ({**t, "layer.bias.exp_avg": torch.zeros(7)}, f),
    "nothing": lambda t, f: ({}, {}),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(how: str) -> None:
    parameters = parameters_of()
    trained, average = run(parameters, settings_of(), range(3), None)
    before = {name: value.clone() for name, value in trained.tensors().items()}, trained.facts()
    spoilt = SPOILT[how](trained.tensors(), trained.facts())
    with pytest.raises(BridgeError, match="what to do:"):
        trained.load(*spoilt)
    assert same(before[0], trained.tensors()) and before[1] == trained.facts()
    trained.load(*before)
    means = average.tensors()
    for odd in (without(means, "updates"), {**means, "weights.new": torch.zeros(1)}, {}):
        with pytest.raises(BridgeError, match="average of the weights"):
            average.load(odd)
    assert same(means, average.tensors())


# -- the average ------------------------------------------------------------------------------------


def test_the_average_is_the_formula() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    average = Average({"a": parameter}, 0.3)
    expected = parameter.detach().double()
    for update in range(8):
        with torch.no_grad():
            parameter += 0.5 * update
        average.update()
        kept = min(0.3, (1 + update) / (10 + update))
        expected = kept * expected + (1 - kept) * parameter.detach().double()
    assert torch.allclose(average.weights()["a"].double(), expected, rtol=1e-6)
    assert int(average.tensors()["updates"]) == 8


def test_an_average_of_coarse_numbers_still_moves() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = Average({"a": parameter}, 0.9999)
    average.load({"updates": torch.tensor(10**6), "weights.a": torch.ones(3)})
    with torch.no_grad():
        parameter += 1
    for _ in range(100):
        average.update()
    assert torch.allclose(average.tensors()["weights.a"], torch.full((3,), 2 - 0.9999**100), rtol=1e-4)
    assert average.weights()["a"].dtype == torch.bfloat16


class Stopped(Exception):
    """Whatever ends a sampling."""


@pytest.mark.parametrize("ends", [False, True])
def test_the_average_is_worn_and_taken_off_without_a_trace(ends: bool) -> None:
    parameters = parameters_of()
    with torch.no_grad():
        parameters["layer.bias"][:3] = torch.tensor([-0.0, math.nan, 1e-42])
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    average = Average(parameters, 0.9)
    average.load({**average.tensors(), **{f"weights.{n}": torch.full(s, 7.0) for n, s in SHAPES.items()}})
    before = values_of(parameters)
    try:
        with average.worn():
            assert all(bool((parameter == 7).all()) for parameter in parameters.values())
            if ends:
                raise Stopped
    except Stopped:
        pass
    assert same(before, values_of(parameters))
    assert places == {name: parameter.data_ptr() for name, parameter in parameters.items()}
