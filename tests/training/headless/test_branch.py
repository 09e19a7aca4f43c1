"""A branch that is trained beside a diffusers U-Net: how it begins, learns, goes on, and acts in the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.utils
import pytest
import torch
from torch import Tensor, nn

from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import load_bridge
from language_bridge.encoders.file import load_encoder, save_encoder
from language_bridge.host import branch as hosts
from language_bridge.tests.fixtures.towers import tiny_tower
from language_bridge.training import checkpoint
from language_bridge.training.headless import branch
from language_bridge.training.headless.command import main
from language_bridge.training.headless.models import backbone_of, embedded, frozen, open_model

from .test_command import LEARNT
from .test_models import HOST, HOST_XL
from .toys import CAT, DOG, RESOLUTION, UNET, WINDOW, XL, scheduler_of, unet_of

ENDS = ("zero_convs.", "middle_block_out.")
KEYS_AND_VALUES = (".attn2.to_k.weight", ".attn2.to_v.weight")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tower for SD1.x, and two with a pooled vector: as wide as SDXL's, and not."""
    folder = tmp_path_factory.mktemp("towers")
    made: dict[str, Path] = {}
    for name, projection in (("sd1", 0), ("xl", 40), ("other", 20)):
        made[name] = folder / f"{name}.safetensors"
        tower = tiny_tower(f"tiny-{name}", window=WINDOW, projection=projection)
        save_encoder(made[name], tower, languages=("zh",))
    return made


def train(small: Path, folder: Path, tower: Path, *extra: str, model: str = "sd1") -> int:
    """A small training of a branch in `folder`."""
    folder.mkdir(exist_ok=True)
    given = ["--model", str(small / model), "--tower", str(tower), "--shards", str(small / "shards")]
    given += ["--run", str(folder / "run"), "--out", str(folder / "b.safetensors"), "--method", "branch"]
    given += ["--shapes", f"{RESOLUTION}x{RESOLUTION}", "--least-area", "0", "--cpu", "--batch", "2"]
    return main([*given, *LEARNT, *extra])


def inputs(xl: bool, width: int) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """What a pair reads, and the English text that its U-Net hears."""
    draw = torch.Generator().manual_seed(3)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    given: dict[str, Any] = {"noisy": some(2, 4, 8, 8), "timestep": torch.tensor([7, 900])}
    given["context"] = some(2, 11, width)
    english, pooled = some(1, 16, 64), some(1, 40) if xl else None
    if xl:
        sizes = embedded(torch.tensor([[64, 64, 0, 0, 64, 64], [90, 80, 3, 4, 64, 64]]), 16)
        given |= {"pooled": some(2, 40), "sizes": sizes}
    return given, english, pooled


@pytest.mark.parametrize("xl", [False, True])
def test_a_new_branch_changes_not_one_bit_and_is_a_copy_that_learns(xl: bool) -> None:
    unet = frozen(unet_of(XL if xl else UNET, 64), "cpu")
    alone = backbone_of(unet, scheduler_of())
    given, english, pooled = inputs(xl, 24)
    net = branch.branch_copy(unet, 24, generator=torch.Generator().manual_seed(1))
    both = branch.beside(alone, net, english, pooled)
    heard = {**given, "context": english.expand(2, -1, -1)}
    if pooled is not None:
        heard["pooled"] = pooled.expand(2, -1)
    said = both(**given)
    assert torch.equal(said, alone(**heard))
    theirs, part = unet.state_dict(), branch.learning(net)
    for name, value in net.state_dict().items():
        if name.startswith("controlnet_"):
            assert not value.any()
        elif name.endswith(KEYS_AND_VALUES):
            assert value.shape[1] == 24 and 0.8 < float(value.std() / theirs[name].std()) < 1.25
        else:
            assert torch.equal(value, theirs[name])
    said.square().sum().backward()
    assert all(part[name].grad is not None for name in part if name.startswith(ENDS))
    assert all(weight.grad is None for weight in unet.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_of_the_branch_gets_a_gradient_once_its_ends_speak(checkpointing: bool) -> None:
    """Gradient checkpointing keeps fewer activations and gives the same."""
    gradients: list[dict[str, Tensor]] = []
    for again in (False, checkpointing):
        unet = frozen(unet_of(UNET, 64), "cpu")
        given, english, _ = inputs(False, 24)
        net = branch.branch_copy(unet, 24, generator=torch.Generator().manual_seed(1), checkpointing=again)
        calls: list[object] = []
        inner: Any = net.get_submodule("down_blocks.0.resnets.0.conv1")
        inner.register_forward_pre_hook(lambda *given, calls=calls: calls.append(given))
        loud(net)
        branch.beside(backbone_of(unet, scheduler_of()), net, english)(**given).square().sum().backward()
        assert len(calls) == 1 + again
        found = {name: each.grad for name, each in branch.learning(net).items()}
        assert all(each is not None and bool(each.any()) for each in found.values())
        gradients.append({name: each for name, each in found.items() if each is not None})
    for name, each in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], each, rtol=1e-4, atol=1e-5 * float(each.abs().max()))


def loud(net: nn.Module) -> None:
    """Let the ends of a branch say something, as after some steps."""
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.startswith("controlnet_"):
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.1)


def losses(folder: Path) -> list[float]:
    saved = checkpoint.latest(folder / "run")
    assert saved is not None
    return saved.tensors["curves"]["loss"][:, 1].tolist()


def test_the_loss_falls(small: Path, towers: Mapping[str, Path], tmp_path: Path) -> None:
    """Over the same examples, noise and timesteps before and after; AdamW."""
    given = ("--optimiser", "AdamW", "--learning-rate", "0.002", "--clip", "1", "--drop", "0", "--batch", "6")
    held = ("--held-out", str(small / "shards"), "--validate-every", "1")
    assert (
        train(small, tmp_path, towers["sd1"], *given, *held, "--steps", "40", "--validate-every", "39") == 0
    )
    saved = checkpoint.latest(tmp_path / "run")
    assert saved is not None
    start = tmp_path / "start"
    assert train(small, start, towers["sd1"], *given, *held, "--steps", "1", "--learning-rate", "1e-12") == 0
    before = checkpoint.latest(start / "run")
    assert before is not None
    first = float(before.tensors["curves"]["held_out"][0, 1])
    last = float(saved.tensors["curves"]["held_out"][-1, 1])
    assert last < 0.9 * first, (first, last)


def test_a_run_that_was_left_gives_the_same_file_bit_for_bit(
    small: Path, towers: Mapping[str, Path], tmp_path: Path
) -> None:
    given = ("--accumulation", "2", "--average", "0.9", "--optimiser", "AdamW", "--learning-rate", "0.01")
    for folder, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            assert train(small, tmp_path / folder, towers["sd1"], *given, "--steps", str(steps)) == 0
    whole, parts = (tmp_path / name / "b.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize(("model", "tower"), [("sd1", "sd1"), ("xl", "xl"), ("xl", "other")])
def test_the_host_says_with_the_file_what_diffusers_say(
    small: Path,
    towers: Mapping[str, Path],
    tmp_path: Path,
    make_unet: Callable[..., Any],
    model: str,
    tower: str,
) -> None:
    """After some steps, when the ends are not zero any more, to 1e-5; without the branch it is another."""
    given = ("--optimiser", "AdamW", "--learning-rate", "0.01", "--steps", "4", "--clip", "1")
    assert train(small, tmp_path, towers[tower], *given, model=model) == 0
    loaded = load_bridge(tmp_path / "b.safetensors")
    assert (loaded.header.kind, loaded.header.unet) == ("branch", "branch")
    assert bool(list(loaded.bridge.parameters())) == (tower == "other")
    assert all(bool(each.any()) for name, each in loaded.unet.items() if name.startswith(ENDS))
    xl = model == "xl"
    context = 64 if xl else 768

    class Holder:
        class model:
            class model_config:
                unet_config: Any = {
                    **(HOST_XL if xl else HOST),
                    "image_size": 32,
                    "in_channels": 4,
                    "model_channels": 32,
                    "transformer_depth_middle": 1,
                    "context_dim": context,
                    "use_spatial_transformer": True,
                    "legacy": False,
                }

    opened = open_model(small / model, device="cpu", dtype=torch.float32, pictures=False)
    assert opened.backbone is not None
    encoder = load_encoder(towers[tower]).eval()
    noisy, timestep = torch.randn(2, 4, 8, 8), torch.tensor([30, 800])
    sizes = embedded(torch.tensor([[64, 64, 0, 0, 64, 64], [90, 80, 3, 4, 64, 64]]), 16) if xl else None
    with torch.no_grad():
        text = loaded.bridge(encoder(*encoder.batch([CAT, DOG])))
        english, pooled = opened.english([""])

        net = branch.branch_copy(opened.backbone.unet, loaded.bridge.spec.context)
        branch.go_on(net, loaded.unet)
        both = branch.beside(opened.backbone, net, english, pooled)
        said = both(noisy, timestep, context=text.context, pooled=text.pooled, sizes=sizes)

        config = Holder.model.model_config.unet_config
        unet = make_unet(**{key: value for key, value in config.items() if key != "legacy"}).eval()
        table = comfy.utils.unet_to_diffusers(config)
        state = opened.backbone.unet.state_dict()
        unet.load_state_dict({table[name]: value for name, value in state.items()}, strict=True)
        shapes = {name: tuple(value.shape) for name, value in loaded.unet.items()}
        hosts.check(Holder, shapes, "ours")
        theirs = hosts.build(Holder, loaded.unet, torch.float32)
        added, heard = {}, {}
        if sizes is not None and text.pooled is not None and pooled is not None:
            added = {"y": torch.cat([text.pooled, sizes], dim=1)}
            heard = {"y": torch.cat([pooled.expand(2, -1), sizes], dim=1)}
        residuals = theirs(noisy, timestep.float(), text.context, **added)
        rows = english.expand(2, -1, -1)
        told = hosts.with_residuals({}, residuals)
        expected = unet(noisy, timestep.float(), context=rows, transformer_options=told, **heard)
        alone = unet(noisy, timestep.float(), context=rows, **heard)
    largest = float(expected.abs().max())
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-5 * largest)
    assert float((expected - alone).abs().max()) > 1e-2 * largest


def test_a_branch_goes_on_from_a_file(small: Path, towers: Mapping[str, Path], tmp_path: Path) -> None:
    """With nothing more to learn it is the same branch; beside another tower's text it is an error."""
    assert train(small, tmp_path / "first", towers["sd1"], "--steps", "2") == 0
    made = tmp_path / "first" / "b.safetensors"
    start = ("--start", str(made), "--steps", "1", "--learning-rate", "1e-12")
    assert train(small, tmp_path / "second", towers["sd1"], *start) == 0
    first, second = load_bridge(made).unet, load_bridge(tmp_path / "second" / "b.safetensors").unet
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-9)
    net = branch.branch_copy(frozen(unet_of(UNET, 64), "cpu"), 24)
    with pytest.raises(BridgeError, match="to go on from does not fit"):
        branch.go_on(net, first)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_as_single_does(
    small: Path, towers: Mapping[str, Path], tmp_path: Path, precision: str
) -> None:
    found: list[float] = []
    for each in ("fp32", precision):
        given = ("--steps", "2", "--precision", each, "--checkpointing", "--learning-rate", "0.01")
        assert train(small, tmp_path / each, towers["xl"], *given, model="xl") == 0
        found += [losses(tmp_path / each)[-1]]
    assert abs(found[1] / found[0] - 1) < 0.02
    kept = checkpoint.latest(tmp_path / precision / "run")
    assert kept is not None
    assert {value.dtype for value in kept.tensors["weights"].values()} == {torch.float32}


def test_kinds_and_methods_that_do_not_go_together_are_refused(
    small: Path, towers: Mapping[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for extra in (("--kind", "mlp"), ("--kind", "branch", "--method", "pea")):
        caplog.clear()
        assert train(small, tmp_path, towers["sd1"], *extra, "--steps", "1") == 1
        assert "does not train a bridge of this kind" in caplog.text and "what to do" in caplog.text
    assert not (tmp_path / "run").exists()


def test_beside_sdxl_a_tower_without_a_pooled_vector_is_refused(
    small: Path,
    towers: Mapping[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(load_encoder(towers["sd1"])), "pooled_width", property(lambda self: 0))
    assert train(small, tmp_path, towers["sd1"], "--steps", "1", model="xl") == 1
    assert "reads a pooled vector" in caplog.text and "what to do" in caplog.text
    assert train(small, tmp_path, towers["sd1"], "--steps", "1") == 0


@pytest.mark.parametrize(
    "change",
    [
        {"mid_block_type": None},
        {"down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
        {"dual_cross_attention": True},
    ],
)
def test_a_unet_that_a_branch_cannot_copy_is_an_error(change: dict[str, Any]) -> None:
    unet = frozen(unet_of({**UNET, **change}, 64), "cpu")
    with pytest.raises(BridgeError, match="beside this U-Net"):
        branch.branch_copy(unet, 24)
