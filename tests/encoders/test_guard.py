"""The one door: what is read, how odd numbers are found, and how a module gets its weights."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from language_bridge.bridges.errors import BridgeError
from language_bridge.encoders import guard

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
WIDE = [dtype for dtype in FLOATS if dtype.itemsize > 1]


def some_tensors() -> dict[str, torch.Tensor]:
    """A tensor of every type that a file may hold, and of odd shapes; some in the order of the file alone."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2, (3, 5), generator=generator)
    tensors = {f"z.{str(dtype)[6:]}": values.to(dtype) for dtype in guard._DTYPES.values()}
    tensors |= {"a.none": torch.zeros(0, 4), "b.one": torch.tensor(2.5), "c.word": torch.arange(7.0)}
    return tensors | {"d.large": torch.randn(300, 1000, generator=generator)}


@pytest.mark.parametrize("writer", ["ours", "the library"])
def test_tensors_are_read_as_the_library_reads_them(writer: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / "some.safetensors", some_tensors()
    if writer == "ours":
        guard.write(path, tensors, {"a": "b"})
    else:
        safetensors.torch.save_file(tensors, path, {"a": "b"})
    layout = guard.read_layout(path)
    read, theirs = guard.read_tensors(path, layout), safetensors.torch.load_file(path)
    assert set(read) == set(theirs) == set(tensors) and layout.metadata == {"a": "b"}
    for name, tensor in tensors.items():
        assert read[name].dtype == theirs[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor) and torch.equal(theirs[name], tensor)


def test_what_was_read_is_nobody_elses_memory(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    guard.write(path, {"a": torch.ones(4000)}, {})
    with guard.open_weights(path) as weights:
        first, second = weights["a"], weights["a"]
    second.zero_()
    with open(path, "r+b") as file:
        file.seek(-4000, 2)
        file.write(b"\0" * 4000)
    assert torch.equal(first, torch.ones(4000))


def test_a_file_that_ends_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    guard.write(path, {"a": torch.ones(40_000), "b": torch.ones(40_000)}, {})
    with guard.open_weights(path) as weights:
        whole = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(len(whole) - 5)
        assert torch.equal(weights["a"], torch.ones(40_000))
        with pytest.raises(BridgeError, match="159995 bytes in 'b'"):
            weights["b"]


def test_a_layout_of_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    guard.write(path, {"a": torch.ones(4)}, {})
    layout = guard.read_layout(path)
    guard.write(path, {"b": torch.ones(4)}, {})
    with pytest.raises(BridgeError, match="changed while it was being read"):
        guard.read_tensors(path, layout)


# -- odd numbers ---------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_odd_number_is_found_wherever_it_stands(dtype: torch.dtype, data: st.DataObject) -> None:
    """Also several that cancel out, and among numbers whose sum leaves the range."""
    numbers = st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, float(torch.finfo(dtype).max), float(torch.finfo(dtype).min)]
    )
    size = data.draw(st.integers(1, 300))
    base = data.draw(st.lists(numbers, min_size=1, max_size=8))
    values = torch.tensor((base * size)[:size], dtype=torch.float64).to(dtype)
    guard.require_finite({"x": values}, "This")
    odd = [torch.nan] if dtype == torch.float8_e4m3fn else [torch.nan, torch.inf, -torch.inf]
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True))
    wide = values.to(torch.float64)
    for place in places:
        wide[place] = data.draw(st.sampled_from(odd))
    with pytest.raises(BridgeError, match=f"{len(places)} of {size} numbers in 'x' are not finite"):
        guard.require_finite({"x": wide.to(dtype)}, "This")


@pytest.mark.parametrize("dtype", WIDE)
def test_huge_numbers_are_no_odd_ones(dtype: torch.dtype) -> None:
    guard.require_finite({"x": torch.full((70_000,), torch.finfo(dtype).max, dtype=dtype)}, "This")


# -- the digest ----------------------------------------------------------------------------------------------
def test_the_digest_taken_beside_the_reading_is_the_digest(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = tmp_path / "some.safetensors"
    guard.write(path, tensors, {})
    with guard.open_weights(path) as weights, guard.Hasher() as hasher:
        for name in sorted(weights):
            hasher.add(name, weights[name])
        assert hasher.hexdigest() == guard.digest(tensors)


def test_a_digest_out_of_order_is_a_fault() -> None:
    with guard.Hasher() as hasher:
        hasher.add("b", torch.ones(1))
        with pytest.raises(AssertionError):
            hasher.add("a", torch.ones(1))


# -- filling -------------------------------------------------------------------------------------------------
class QuietOps:
    """Layers without a random start, which torch has not for eight bits."""

    LayerNorm = torch.nn.LayerNorm

    class Linear(torch.nn.Linear):
        def reset_parameters(self) -> None:
            pass

    class Embedding(torch.nn.Embedding):
        def reset_parameters(self) -> None:
            pass


class Toy(torch.nn.Module):
    """A layer of each make, from anybody's ops."""

    def __init__(self, ops: Any, device: str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.words = ops.Embedding(7, 4, device=device, dtype=guard.wide(dtype))
        self.layer = ops.Linear(4, 3, device=device, dtype=dtype)
        self.norm = ops.LayerNorm(3, device=device, dtype=guard.wide(dtype))


def take(layer: Any, state_dict: Any, prefix: str, local: Any, *others: Any) -> None:
    """Keeps the tensors as they come, as layers do that have made none."""
    assert local["assign_to_params_buffers"]
    for name in ("weight", "bias"):
        if prefix + name in state_dict:
            setattr(layer, name, torch.nn.Parameter(state_dict[prefix + name], requires_grad=False))


class LateOps:
    """Layers that come without weights, as the host's may."""

    LayerNorm = torch.nn.LayerNorm

    class Linear(torch.nn.Linear):
        def __init__(self, width_in: int, width_out: int, device: Any = None, dtype: Any = None) -> None:
            super().__init__(width_in, width_out, device="meta")
            self.weight = self.bias = None

        _load_from_state_dict = take

    class Embedding(torch.nn.Embedding):
        def __init__(self, rows: int, width: int, device: Any = None, dtype: Any = None) -> None:
            super().__init__(rows, width, device="meta")
            self.weight = None

        _load_from_state_dict = take


def toy_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = Toy(torch.nn).state_dict()
    return {f"toy.{key}": torch.randn(v.shape, generator=generator).to(dtype) for key, v in state.items()}


Fill = Callable[..., None]


@pytest.fixture(params=["tensors", "file", "file in one mapping"])
def fill(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fill:
    """Gives weights to a module from memory, or over a file, into either make of memory."""
    monkeypatch.setattr(guard, "LEAST_ROOM_BYTES", 1 if "mapping" in request.param else 1 << 40)

    def over_a_file(
        module: torch.nn.Module, weights: dict[str, torch.Tensor], *others: Any, **more: Any
    ) -> None:
        path = tmp_path / "weights"
        safetensors.torch.save_file(weights, path)
        with guard.open_weights(path) as file:
            guard.fill(module, file, *others, **more)

    return guard.fill if request.param == "tensors" else over_a_file


def test_weights_outlive_each_other(fill: Fill) -> None:
    """Each has a storage of its own, and what is left keeps its numbers when the others have gone."""
    module = Toy(torch.nn)
    fill(module, toy_weights(), "toy.", None, "toy")
    last = module.layer.weight
    others = [value for value in module.state_dict().values() if value.data_ptr() != last.data_ptr()]
    assert last.untyped_storage().nbytes() == last.numel() * 4
    assert last.untyped_storage().data_ptr() not in {v.untyped_storage().data_ptr() for v in others}
    before = last.detach().clone()
    for value in others:
        value.fill_(7)
    del module, others
    gc.collect()
    assert torch.equal(last, before)
    with torch.no_grad():
        last += 1


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("ops", [QuietOps, LateOps])
@pytest.mark.parametrize("dtype", [None, *FLOATS[1:]])
@pytest.mark.parametrize("stored", WIDE)
def test_a_module_takes_its_weights_in_the_dtype_asked_for(
    stored: torch.dtype, dtype: torch.dtype | None, ops: Any, device: str | None, fill: Fill
) -> None:
    """Linear layers alone are kept in eight bits; who trains goes on training."""
    module, weights = Toy(ops, device, dtype), toy_weights(stored)
    fill(module, weights, "toy.", dtype, "toy", device="cpu")
    state = module.state_dict()
    assert {f"toy.{key}" for key in state} == set(weights)
    for key, value in state.items():
        expected = (dtype if key.startswith("layer.") else guard.wide(dtype)) or torch.float32
        assert value.dtype == expected and value.device.type == "cpu", key
        assert torch.equal(value.float(), weights[f"toy.{key}"].to(expected).float()), key
    assert all(parameter.requires_grad for parameter in module.norm.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_module_shares_no_memory_with_tensors_that_it_was_given(dtype: torch.dtype) -> None:
    module, weights = Toy(torch.nn), toy_weights(dtype)
    guard.fill(module, weights, "toy.", torch.float32, "toy")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for value in weights.values():
        value.zero_()
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert any(bool(value.any()) for value in before.values())


@pytest.mark.parametrize(
    ("stored", "dtype", "largest"),
    [
        (torch.float32, torch.float16, 65_520.0),
        (torch.bfloat16, torch.float16, 65_536.0),
        (torch.float32, torch.bfloat16, 3.4e38),
        (torch.float64, None, 1e39),
    ],
)
def test_numbers_that_leave_the_range_of_the_dtype_are_refused(
    stored: torch.dtype, dtype: torch.dtype | None, largest: float, fill: Fill
) -> None:
    weights = toy_weights(stored)
    weights["toy.layer.bias"][1] = largest
    assert bool(torch.isfinite(weights["toy.layer.bias"]).all())
    with pytest.raises(BridgeError, match="1 of 3 numbers in 'toy.layer.bias' are not finite"):
        fill(Toy(QuietOps, dtype=dtype), weights, "toy.", dtype, "toy")


def test_weights_that_are_no_numbers_of_that_kind_are_refused(fill: Fill) -> None:
    weights = toy_weights() | {"toy.layer.bias": torch.ones(3, dtype=torch.int32)}
    with pytest.raises(BridgeError, match=r"'toy\.layer\.bias' of int32"):
        fill(Toy(torch.nn), weights, "toy.", None, "toy")


def test_the_header_is_named_by_its_own_digest(tmp_path: Path) -> None:
    digests: set[str] = set()
    for text in ("one", "two"):
        guard.write(tmp_path / "x", {"a": torch.zeros(2)}, {"text": json.dumps(text)})
        digests.add(guard.read_layout(tmp_path / "x").digest)
    guard.write(tmp_path / "x", {"a": torch.ones(2)}, {"text": json.dumps("two")})
    assert guard.read_layout(tmp_path / "x").digest in digests and len(digests) == 2
