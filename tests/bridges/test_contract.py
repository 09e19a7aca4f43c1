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
    pooled_widths,
    toy_bridge,
    toy_header,
    toy_hidden,
    toy_spec,
)

KINDS = sorted(kinds())
WITH_WEIGHTS = [kind for kind in KINDS if list(toy_bridge(kind).parameters())]
TIMED = [kind for kind in KINDS if kinds()[kind].timed]
CASES = [(kind, pooled) for kind in KINDS for pooled in pooled_widths(kind)]
with_and_without_pooled = pytest.mark.parametrize(("kind", "pooled"), CASES)


def toy_pooled(hidden: Hidden) -> torch.Tensor:
    assert hidden.pooled is not None
    return hidden.pooled


def timestep(batch: int) -> torch.Tensor:
    return torch.linspace(1, 900, batch)


@with_and_without_pooled
@pytest.mark.parametrize(("tokens", "real"), [(2, 2), (16, 2), (16, 16), (154, 120)])
def test_shapes_for_empty_short_and_long_text(kind: str, pooled: int, tokens: int, real: int) -> None:
    bridge = toy_bridge(kind, pooled)
    cond = bridge(toy_hidden(3, tokens, real), timestep(3))
    assert isinstance(cond, Cond)
    assert cond.context.shape[0] == 3 and cond.context.shape[2] == bridge.spec.context
    assert cond.context.ndim == 3 and cond.context.shape[1] >= 1
    if bridge.tokenwise:
        assert cond.context.shape[1] == tokens
    assert (None if cond.pooled is None else tuple(cond.pooled.shape)) == ((3, pooled) if pooled else None)
    assert torch.isfinite(cond.context).all()


@with_and_without_pooled
def test_alone_and_in_a_batch_are_the_same(kind: str, pooled: int) -> None:
    bridge, hidden = toy_bridge(kind, pooled).double(), toy_hidden(4, 16, 9)
    states, mask, own = hidden.states.double(), hidden.mask, toy_pooled(hidden).double()
    together = bridge(Hidden(states, mask, own), timestep(4))
    for row in range(4):
        one = slice(row, row + 1)
        alone = bridge(Hidden(states[one], mask[one], own[one]), timestep(4)[one])
        torch.testing.assert_close(alone.context, together.context[one], rtol=1e-9, atol=1e-12)
        if pooled:
            torch.testing.assert_close(alone.pooled, together.pooled[one], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_leak_into_the_context_of_real_tokens(kind: str) -> None:
    """Save where the published method has no mask: there it must leak."""
    bridge, hidden = toy_bridge(kind), toy_hidden(2, 16, 9)
    noise = torch.where(hidden.mask[..., None], hidden.states, torch.randn(2, 16, WIDTH))
    clean = bridge(hidden, timestep(2)).context
    noisy = bridge(Hidden(noise, hidden.mask, hidden.pooled), timestep(2)).context
    rows = 9 if bridge.tokenwise else clean.shape[1]
    if bridge.hears_padding:
        assert not torch.allclose(clean[:, :rows], noisy[:, :rows], rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(clean[:, :rows], noisy[:, :rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_tokenwise_kind_belong_to_their_tokens_and_other_rows_to_the_text(kind: str) -> None:
    """Another order of the real tokens is another order of the rows, or the same number of rows."""
    bridge, hidden = toy_bridge(kind), toy_hidden(1, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    context = bridge(hidden, timestep(1)).context
    moved = bridge(Hidden(hidden.states[:, order], hidden.mask, hidden.pooled), timestep(1)).context
    if bridge.tokenwise:
        torch.testing.assert_close(moved, context[:, order], rtol=1e-5, atol=1e-6)
    else:
        shorter = Hidden(hidden.states[:, :9], hidden.mask[:, :9], hidden.pooled)
        assert bridge(shorter, timestep(1)).context.shape == context.shape == moved.shape


@pytest.mark.parametrize("kind", KINDS)
def test_the_timestep_matters_to_timed_kinds_alone(kind: str) -> None:
    bridge, hidden = toy_bridge(kind), toy_hidden(2, 16, 9)
    early, late = (bridge(hidden, torch.full((2,), step)).context for step in (999.0, 0.0))
    if bridge.timed:
        assert not torch.allclose(early, late, rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(early, late) and torch.equal(early, bridge(hidden).context)


@pytest.mark.parametrize("kind", TIMED)
@pytest.mark.parametrize(
    "odd",
    [
        None,
        torch.tensor(500.0),
        torch.tensor([500.0]),
        torch.tensor([500.0, 500.0, 500.0]),
        torch.tensor([[500.0, 500.0]]),
        torch.tensor([500.0, -1.0]),
        torch.tensor([1000.0, 0.0]),
        torch.tensor([500.0, torch.nan]),
    ],
    ids=["none", "scalar", "short", "long", "matrix", "below", "above", "nan"],
)
def test_a_timed_kind_asks_for_a_timestep_for_each_text(kind: str, odd: torch.Tensor | None) -> None:
    with pytest.raises(BridgeError, match=r"for each of 2 texts, 0 to 999"):
        toy_bridge(kind)(toy_hidden(2, 16, 9), odd)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_a_pooled_vector_says_so(kind: str) -> None:
    if kinds()[kind].pools:
        assert toy_bridge(kind, WIDTH)(toy_hidden(1, 16), timestep(1)).pooled is not None
    else:
        with pytest.raises(BridgeError, match="makes no pooled vector"):
            create(kind, toy_spec(kind, WIDTH), device="meta")


@with_and_without_pooled
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


@with_and_without_pooled
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


@with_and_without_pooled
def test_a_bridge_adopts_its_own_weights_and_no_others(kind: str, pooled: int) -> None:
    bridge = toy_bridge(kind, pooled)
    weights = bridge.state_dict()
    adopted = type(bridge).adopt(weights, bridge.spec)
    assert set(adopted) == set(weights) and all(adopted[key] is weights[key] for key in weights)
    odd = [weights | {"stranger.weight": torch.zeros(3)}]
    if weights:
        last = list(weights)[-1]
        odd.append({key: value for key, value in weights.items() if key != last})
        odd.append(weights | {last: weights[last][:-1]})
    for tensors in odd:
        with pytest.raises(BridgeError, match="stranger.weight" if len(odd) == 1 else "stranger|" + last):
            type(bridge).adopt(tensors, bridge.spec)


@with_and_without_pooled
def test_every_parameter_gets_a_gradient_and_moves(kind: str, pooled: int) -> None:
    bridge = toy_bridge(kind, pooled)
    before = {name: value.detach().clone() for name, value in bridge.named_parameters()}
    if not before:
        pytest.skip("this kind has nothing to train")
    optimizer = torch.optim.SGD(bridge.parameters(), lr=0.1)
    cond = bridge(toy_hidden(2, 16, 9), timestep(2))
    said = [cond.context] if cond.pooled is None else [cond.context, cond.pooled]
    probe = torch.Generator().manual_seed(4)  # a square would say nothing about the last of a norm's inputs
    loss = sum((value * torch.randn(value.shape, generator=probe)).sum() for value in said)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    for name, value in bridge.named_parameters():
        if not value.requires_grad:
            continue
        assert value.grad is not None and value.grad.abs().sum() > 0, name
        assert not torch.equal(value, before[name]), name


@with_and_without_pooled
def test_layers_come_from_ops_under_the_same_keys(kind: str, pooled: int) -> None:
    plain, hosted = toy_bridge(kind, pooled), toy_bridge(kind, pooled, ops=MarkedOps)
    assert guard.shapes_of(plain) == guard.shapes_of(hosted)
    layers = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding, torch.nn.Conv2d)
    own = {getattr(MarkedOps, layer.__name__) for layer in layers}
    assert all(type(m) in own for m in hosted.modules() if isinstance(m, layers))


@with_and_without_pooled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_hosts_casting_layers_take_half_weights_and_full_input(
    kind: str, pooled: int, dtype: torch.dtype
) -> None:
    """Bare parameters must follow the input as the host's layers do, whatever they are stored in."""
    import comfy.ops

    plain, hidden = toy_bridge(kind, pooled), toy_hidden(2, 16, 9)
    rounded = {key: value.to(dtype) for key, value in plain.state_dict().items()}
    hosted = create(kind, toy_spec(kind, pooled), ops=comfy.ops.manual_cast, dtype=dtype)
    hosted.load_state_dict(rounded)
    plain.load_state_dict(rounded)
    expected, cond = (bridge(hidden, timestep(2)) for bridge in (plain, hosted))
    assert cond.context.dtype == torch.float32
    torch.testing.assert_close(cond.context, expected.context, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cond.pooled, expected.pooled, rtol=1e-4, atol=1e-4)
    half = hosted(Hidden(hidden.states.to(dtype), hidden.mask, toy_pooled(hidden).to(dtype)), timestep(2))
    assert half.context.dtype == dtype and torch.isfinite(half.context).all()


@with_and_without_pooled
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


@pytest.mark.parametrize("kind", KINDS)
def test_no_size_in_a_header_costs_time_before_the_weights_are_seen(kind: str) -> None:
    """Widths are free where there is no memory behind them; numbers of layers are not."""
    spec = toy_bridge(kind).spec
    for field in dataclasses.fields(spec):
        if field.type not in ("int", int):
            continue
        try:
            bridge = create(kind, dataclasses.asdict(spec) | {field.name: 4096}, device="meta")
        except BridgeError:
            continue
        assert len(list(bridge.modules())) < 1000, field.name


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
    bridge = toy_bridge(request.param, max(pooled_widths(request.param)))
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
