"""What every kind of bridge promises; a new kind is tested here the moment its file exists."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import language_bridge
from language_bridge.bridges.base import Cond, Hidden, create, identify, kinds
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import METADATA_KEY, PREFIX, load_bridge, read_header, save_bridge
from language_bridge.encoders import guard
from language_bridge.tests.bridges.toys import (
    WIDTH,
    MarkedOps,
    toy_bridge,
    toy_header,
    toy_hidden,
    toy_spec,
)

KINDS = sorted(kinds())
WITH_WEIGHTS = [kind for kind in KINDS if list(toy_bridge(kind).parameters())]


@pytest.fixture(params=[0, WIDTH], ids=["no-pooled", "pooled"])
def pooled(request: pytest.FixtureRequest) -> int:
    return request.param


def timestep(batch: int) -> torch.Tensor:
    return torch.linspace(1, 900, batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "real"), [(2, 2), (16, 2), (16, 16), (154, 120)])
def test_shapes_for_empty_short_and_long_text(kind: str, pooled: int, tokens: int, real: int) -> None:
    bridge = toy_bridge(kind, pooled)
    cond = bridge(toy_hidden(3, tokens, real), timestep(3))
    assert isinstance(cond, Cond)
    assert cond.context.shape[0] == 3 and cond.context.shape[2] == bridge.spec.context
    assert cond.context.ndim == 3 and cond.context.shape[1] >= 1
    assert (None if cond.pooled is None else tuple(cond.pooled.shape)) == ((3, pooled) if pooled else None)
    assert torch.isfinite(cond.context).all()


@pytest.mark.parametrize("kind", KINDS)
def test_alone_and_in_a_batch_are_the_same(kind: str, pooled: int) -> None:
    bridge, hidden = toy_bridge(kind, pooled), toy_hidden(4, 16, 9)
    together = bridge(hidden, timestep(4))
    for row in range(4):
        one = slice(row, row + 1)
        assert hidden.pooled is not None
        alone = bridge(Hidden(hidden.states[one], hidden.mask[one], hidden.pooled[one]), timestep(4)[one])
        torch.testing.assert_close(alone.context, together.context[one], rtol=1e-5, atol=1e-6)
        if pooled:
            torch.testing.assert_close(alone.pooled, together.pooled[one], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_leak_into_the_context_of_real_tokens(kind: str) -> None:
    bridge, hidden = toy_bridge(kind), toy_hidden(2, 16, 9)
    noise = torch.where(hidden.mask[..., None], hidden.states, torch.randn(2, 16, WIDTH))
    clean = bridge(hidden, timestep(2)).context
    noisy = bridge(Hidden(noise, hidden.mask, hidden.pooled), timestep(2)).context
    # A token-wise kind has a row for each token; any other kind must not hear the padding at all.
    rows = 9 if clean.shape[1] == 16 else clean.shape[1]
    torch.testing.assert_close(clean[:, :rows], noisy[:, :rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_then_load_is_bit_equal(kind: str, pooled: int, dtype: torch.dtype, tmp_path: Path) -> None:
    bridge = toy_bridge(kind, pooled).to(dtype)
    header = toy_header(bridge)
    path = tmp_path / "toy.safetensors"
    save_bridge(path, header, bridge)
    assert read_header(path) == header
    loaded = load_bridge(path, dtype=dtype)
    assert loaded.header == header and loaded.bridge.spec == bridge.spec and loaded.encoder is None
    assert type(loaded.bridge) is type(bridge)
    before, after = bridge.state_dict(), loaded.bridge.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == dtype for key in before)
    save_bridge(tmp_path / "again.safetensors", loaded.header, loaded.bridge)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_only_itself_recognises_its_own_foreign_file(kind: str, pooled: int) -> None:
    bridge = toy_bridge(kind, pooled)
    shapes = guard.shapes_of(bridge)
    claims = {other: cls.recognise(shapes) for other, cls in kinds().items()}
    assert {other for other, spec in claims.items() if spec} <= {kind}
    spec = claims[kind]
    if spec is not None:
        assert spec == bridge.spec
        assert identify(shapes) == (type(bridge), spec)
        assert type(bridge).recognise(shapes | {"stranger.weight": (3,)}) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_moves(kind: str, pooled: int) -> None:
    bridge = toy_bridge(kind, pooled)
    before = {name: value.detach().clone() for name, value in bridge.named_parameters()}
    if not before:
        pytest.skip("this kind has nothing to train")
    optimizer = torch.optim.SGD(bridge.parameters(), lr=0.1)
    cond = bridge(toy_hidden(2, 16, 9), timestep(2))
    loss = cond.context.square().mean() + (cond.pooled.square().mean() if pooled else 0)
    loss.backward()
    optimizer.step()
    for name, value in bridge.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, name
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_layers_come_from_ops_under_the_same_keys(kind: str, pooled: int) -> None:
    plain, hosted = toy_bridge(kind, pooled), toy_bridge(kind, pooled, ops=MarkedOps)
    assert guard.shapes_of(plain) == guard.shapes_of(hosted)
    layers = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding, torch.nn.Conv2d)
    own = {getattr(MarkedOps, layer.__name__) for layer in layers}
    assert all(type(m) in own for m in hosted.modules() if isinstance(m, layers))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_start(kind: str, pooled: int) -> None:
    first, second = toy_bridge(kind, pooled).state_dict(), toy_bridge(kind, pooled).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_of_another_width_is_refused(kind: str) -> None:
    with pytest.raises(BridgeError, match=rf"\[batch, tokens, {WIDTH}\]"):
        toy_bridge(kind)(Hidden(torch.zeros(1, 4, WIDTH + 1), torch.ones(1, 4, dtype=torch.bool)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_spec_is_refused(kind: str) -> None:
    good = toy_spec(kind)
    for odd in (
        good | {"stranger": 1},
        {name: value for name, value in good.items() if name != "hidden"},
        good | {"hidden": 0},
        good | {"hidden": -1},
        good | {"hidden": 1 << 40},
        good | {"hidden": "8"},
        good | {"hidden": True},
        good | {"pooled": -1},
        good | {"context": 8.0},
    ):
        with pytest.raises(BridgeError):
            create(kind, odd, device="meta")


def rewrite(path: Path, header: object = None, **tensors: torch.Tensor | None) -> None:
    """Change a valid file: another header, other tensors (None = taken out)."""
    layout = guard.read_layout(path)
    contents = guard.read_tensors(path, layout)
    for name, tensor in tensors.items():
        contents.pop(name, None)
        if tensor is not None:
            contents[name] = tensor
    metadata = dict(layout.metadata)
    if header is not None:
        metadata[METADATA_KEY] = header if isinstance(header, str) else json.dumps(header)
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in contents.items()}, path, metadata)


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str, torch.Tensor]:
    """A valid file of the kind, the name of its last tensor, and that tensor."""
    bridge = toy_bridge(request.param, WIDTH)
    path = tmp_path / "toy.safetensors"
    save_bridge(path, toy_header(bridge), bridge)
    name, tensor = [("none", torch.zeros(1)), *bridge.state_dict().items()][-1]
    return path, PREFIX + name, tensor


@pytest.mark.parametrize("saved", WITH_WEIGHTS, indirect=True)
def test_odd_tensors_are_refused_by_name(saved: tuple[Path, str, torch.Tensor]) -> None:
    path, name, tensor = saved
    original = path.read_bytes()
    spoilt = tensor.clone()
    spoilt.view(-1)[-1] = torch.nan
    endless = tensor.clone()
    endless.view(-1)[0] = -torch.inf
    for change, word in (
        ({name: None}, "missing"),
        ({name: None, PREFIX + "stranger": tensor}, "missing"),
        ({PREFIX + "stranger": tensor}, "surplus"),
        ({"unet.stranger": tensor}, "surplus"),
        ({"encoder.stranger": tensor}, "surplus"),
        ({"tokenizer": torch.zeros(3, dtype=torch.uint8)}, "surplus"),
        ({name: torch.zeros(*tensor.shape, 1)}, "wrong-shaped"),
        ({name: tensor[:-1]}, "wrong-shaped"),
        ({name: spoilt}, "not finite"),
        ({name: endless}, "not finite"),
        ({name: tensor.to(torch.int32)}, "odd type"),
        ({name: tensor.double() + 1e300}, "not finite"),
    ):
        path.write_bytes(original)
        rewrite(path, **change)
        with pytest.raises(BridgeError, match=word) as caught:
            load_bridge(path)
        assert all(changed in str(caught.value) for changed in change)
        assert "what to do:" in str(caught.value)


@pytest.mark.parametrize("saved", KINDS, indirect=True)
def test_a_newer_format_is_refused(saved: tuple[Path, str, torch.Tensor]) -> None:
    path = saved[0]
    header = json.loads(guard.read_layout(path).metadata[METADATA_KEY])
    rewrite(path, header | {"format": 2})
    for reader in (read_header, load_bridge):
        with pytest.raises(BridgeError, match="Update Language Bridge"):
            reader(path)


def test_the_heart_imports_no_host_and_no_heavy_library() -> None:
    """bridges, encoders and prompt stand alone: no ComfyUI, no transformers, no diffusers."""
    root = language_bridge.__path__[0]
    program = (
        "import sys, types\n"
        "pack = types.ModuleType('language_bridge'); pack.__path__ = [sys.argv[1]]\n"
        "sys.modules['language_bridge'] = pack\n"
        "import language_bridge.bridges.file, language_bridge.prompt\n"
        "from language_bridge.bridges import kinds\n"
        "from language_bridge.encoders import families\n"
        "kinds(); families()\n"
        "strangers = {'comfy', 'folder_paths', 'nodes', 'server', 'transformers', 'diffusers'}\n"
        "print(sorted(strangers & {name.split('.')[0] for name in sys.modules}))\n"
        "print([n for n in sys.modules if n.startswith(('language_bridge.host', 'language_bridge.nodes'))])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, root], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_values_are_frozen() -> None:
    hidden = toy_hidden(1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        hidden.states = hidden.states  # type: ignore[misc]
