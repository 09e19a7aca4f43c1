"""Laws of the private copy of a U-Net: it answers as the host does, and the MODEL never notices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from torch import Tensor

import nodes
from language_bridge.bridges.errors import BridgeError
from language_bridge.host import backbone, branch
from language_bridge.host.backbone import frozen_copy
from language_bridge.host.pocket import UNET_CONFIG, load_pocket
from language_bridge.host.unet import KEY, patcher_of
from language_bridge.tests.fixtures.graph import Checkpoint
from language_bridge.tests.fixtures.stock import call, same
from language_bridge.training.taps import BlockTaps

CPU = torch.device("cpu")


def with_lora(checkpoint: Checkpoint, strength: float = 0.7) -> Any:
    """MODEL of a checkpoint behind two LoRAs of the stock loader."""
    model = checkpoint.model
    for name in (f"{checkpoint.name}.safetensors", f"{checkpoint.name}-other.safetensors"):
        model, _ = call(
            nodes.LoraLoader,
            model=model,
            clip=checkpoint.clip,
            lora_name=name,
            strength_model=strength,
            strength_clip=0.0,
        )
    return model


def loaded_weights(model: Any) -> dict[str, Tensor]:
    """The U-Net's weights as the host's own loading leaves them, patched in place."""
    with torch.inference_mode():
        management.load_models_gpu([model], force_full_load=True)
    return dict(model.model.diffusion_model.state_dict())


def state_of(model: Any) -> tuple[Any, ...]:
    """Everything of a MODEL that training could disturb, every weight of it too."""
    return (
        {key: value.clone() for key, value in model.model.state_dict().items()},
        sorted(id(loaded.model) for loaded in management.current_loaded_models),
        model.patches_uuid,
        {key: len(each) for key, each in model.patches.items()},
        sorted(model.backup),
        str(model.model.device),
        model.model.current_weight_patches_uuid,
        model.model.model_loaded_weight_memory,
    )


@pytest.fixture(scope="module")
def pocket() -> Any:
    with torch.inference_mode():
        return load_pocket()[0]


def test_the_weights_are_those_that_the_host_loads_and_the_model_stays(checkpoint: Checkpoint) -> None:
    model = with_lora(checkpoint)
    management.unload_all_models()
    fresh = dict(backbone.patched_weights(model))
    expected = loaded_weights(model)
    for loaded in (True, False)[: 1 if checkpoint.name == "sdxl" else 2]:  # patched in place, and not
        if not loaded:
            management.unload_all_models()
        before = state_of(model)
        taken = dict(backbone.patched_weights(model))
        with torch.inference_mode():
            copied = frozen_copy(model, device=CPU, dtype=torch.float32, checkpointing=False)
        assert same(state_of(model), before)
        assert not any(weight.is_inference() or weight.requires_grad for weight in copied.unet.parameters())
        assert same(taken, expected) and same(fresh, expected)
        assert same(dict(copied.unet.state_dict()), {name: value.float() for name, value in taken.items()})
    assert not same(dict(backbone.patched_weights(checkpoint.model)), fresh)


def test_half_precision_is_rounded_as_the_host_rounds(sd1: Checkpoint) -> None:
    model = with_lora(sd1)
    unet = model.model.diffusion_model
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    try:
        with torch.inference_mode():
            unet.half()
        taken = {name: value.clone() for name, value in backbone.patched_weights(model)}
        assert {value.dtype for value in taken.values()} == {torch.float16}
        assert same(taken, loaded_weights(model))
    finally:
        management.unload_all_models()
        with torch.inference_mode():
            unet.float()
            unet.load_state_dict(before)


def host_says(model: Any, noisy: Tensor, times: Tensor, context: Tensor, extra: dict[str, Any]) -> Tensor:
    """What the host's own apply_model takes the U-Net to have said, from the picture that it gives."""
    sampling = model.get_model_object("model_sampling")
    with torch.inference_mode():
        management.load_models_gpu([model], force_full_load=True)
        model.patch_model(load_weights=False)
        sigma = sampling.sigmas[times]
        wide = sigma.view(-1, 1, 1, 1)
        x = noisy * (1 + wide.square()).sqrt()
        clean = model.model.apply_model(x, sigma, c_crossattn=context, transformer_options={}, **extra)
        model.unpatch_model(unpatch_weights=False)
    if "V_PREDICTION" in [base.__name__ for base in type(sampling).__mro__]:
        return (x / (1 + wide.square()) - clean) * (1 + wide.square()).sqrt() / wide
    return (x - clean) / wide


@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
def test_it_says_what_the_host_makes_the_u_net_say(checkpoint: Checkpoint, prediction: str) -> None:
    model = with_lora(checkpoint)
    if prediction != "eps":
        model = call(ModelSamplingDiscrete, model=model, sampling=prediction, zsnr=False)
    elif checkpoint.name == "sd2":
        assert backbone.schedule_of(model)[1] == "eps"
    random = torch.Generator().manual_seed(3)
    width = model.model.model_config.unet_config["context_dim"]
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=random)
    context, times = torch.randn(2, 77, width, generator=random), torch.tensor([700, 41])
    copied = frozen_copy(model, device=CPU, dtype=torch.float32, checkpointing=False)
    assert copied.prediction == ("eps" if prediction == "eps" else "v")
    noisy = copied.noised(latents, noise, times)
    extra: dict[str, Any] = {}
    given: dict[str, Any] = {}
    sizes = backbone.size_embedding(model, 96, 64)
    assert (sizes is None) == (checkpoint.name != "sdxl")
    if sizes is not None:
        pooled = torch.randn(2, 1280, generator=random)
        given = {"pooled": pooled, "sizes": sizes.expand(2, -1)}
        extra["y"] = model.model.encode_adm(pooled_output=pooled, width=96, height=64)
    with torch.no_grad():
        ours = copied(noisy, times, context=context, **given)
    theirs = host_says(model, noisy, times, context, extra)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    clean, heard = copied.clean(noisy, ours, times)
    torch.testing.assert_close(copied.noised(clean, heard, times), noisy, rtol=1e-4, atol=1e-4)
    management.unload_all_models()


def test_the_schedule_is_read_through_a_node_that_changes_it(pocket: Any) -> None:
    plain, _ = backbone.schedule_of(pocket)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(plain, torch.cumprod(1 - betas, 0).float(), rtol=1e-5, atol=1e-7)
    zeroed = call(ModelSamplingDiscrete, model=pocket, sampling="v_prediction", zsnr=True)
    abar, prediction = backbone.schedule_of(zeroed)
    assert prediction == "v" and abar[-1] < 1e-6 < plain[-1]


@pytest.mark.parametrize("sampling", ["lcm", "x0"])
def test_other_ways_of_sampling_are_refused(pocket: Any, sampling: str) -> None:
    changed = call(ModelSamplingDiscrete, model=pocket, sampling=sampling, zsnr=False)
    with pytest.raises(BridgeError, match="noise schedule"):
        backbone.frozen_copy(changed, device=CPU, dtype=torch.float32, checkpointing=False)


CARRIERS: dict[str, Callable[[Any], Any]] = {
    "language bridge": lambda m: m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, print),
    "bypass_lora": lambda m: m.set_injections("bypass_lora", [object()]),
    "diffusion_model.out": lambda m: m.add_object_patch("diffusion_model.out", torch.nn.Identity()),
    "attn2_patch": lambda m: m.set_model_attn2_patch(print),
    "attn1": lambda m: m.set_model_attn1_replace(print, "middle", 0),
    "set_model_unet_function_wrapper": lambda m: m.set_model_unet_function_wrapper(print),
    "a_pack": lambda m: m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "a_pack", print),
    "functions around weights": lambda m: m.add_weight_wrapper("diffusion_model.out.0.weight", print),
}


@pytest.mark.parametrize("what", CARRIERS)
def test_what_a_copy_cannot_hold_is_refused_by_name(sd1: Checkpoint, what: str) -> None:
    model = sd1.model.clone()
    CARRIERS[what](model)
    with pytest.raises(BridgeError) as caught:
        backbone.check(model)
    text = str(caught.value)
    assert "cannot take along" in text and "before that node" in text and what in text
    backbone.check(sd1.model)


def test_a_branch_at_the_model_is_refused_by_name(pocket: Any) -> None:
    net = branch.BranchNet({**UNET_CONFIG, "context_dim": 24}, torch.float32, "meta")
    beside = branch.Beside("bdm.safetensors", "0" * 64, patcher_of(net, pocket), 1.0)
    with pytest.raises(BridgeError, match=r"bdm\.safetensors"):
        backbone.check(branch.add_to(pocket, beside))


def test_a_model_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(BridgeError, match=r"SD1\.x"):
        backbone.check(torch.nn.Identity())


def gradients(copied: Any, taps: bool = False) -> tuple[Tensor, int, list[tuple[int, ...]]]:
    """Gradient of a loss at the context, bytes kept for it, shapes of the features that taps saw."""
    random = torch.Generator().manual_seed(4)
    noisy = torch.randn(2, 4, 16, 16, generator=random)
    context = torch.randn(2, 77, 96, generator=random).requires_grad_(True)
    kept = backbone.KeptBytes(copied.unet.parameters())
    with kept.counting(), BlockTaps(copied.unet) as seen:
        said = copied(noisy, torch.tensor([5, 900]), context=context)
        loss = said.square().sum() + sum(each.square().mean() for each in seen.features)
    loss.backward()
    assert context.grad is not None
    return context.grad, kept.total, [tuple(each.shape) for each in seen.features]


def test_checkpointing_keeps_less_and_changes_nothing(pocket: Any) -> None:
    plain = frozen_copy(pocket, device=CPU, dtype=torch.float32, checkpointing=False)
    recomputed = frozen_copy(pocket, device=CPU, dtype=torch.float32, checkpointing=True)
    (ours, less, seen), (theirs, more, usual) = gradients(recomputed), gradients(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert seen == usual and len(seen) >= 4
    assert less < 0.5 * more
    # A copy of the copy, as a student whose cross-attention learns, must not run the first one's blocks.
    twin = copy.deepcopy(recomputed.unet)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    again, _, _ = gradients(recomputed)
    assert torch.equal(again, ours)
    changed = type(recomputed)(twin, recomputed.abar, recomputed.prediction)
    assert not torch.allclose(gradients(changed)[0], ours)


def test_half_precision_computes_in_its_own_dtype_and_answers_in_the_callers(pocket: Any) -> None:
    half = frozen_copy(pocket, device=CPU, dtype=torch.bfloat16, checkpointing=False)
    whole = frozen_copy(pocket, device=CPU, dtype=torch.float32, checkpointing=False)
    noisy, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 96)
    times = torch.tensor([500])
    with torch.no_grad(), BlockTaps(half.unet) as seen:
        said = half(noisy, times, context=context)
    assert {each.dtype for each in seen.features} == {torch.bfloat16} and said.dtype == torch.float32
    with torch.no_grad():
        exact = whole(noisy, times, context=context)
    assert (said - exact).norm() < 0.05 * exact.norm()


def test_a_branch_that_has_learned_nothing_leaves_the_u_net_as_it_is(pocket: Any) -> None:
    copied = frozen_copy(pocket, device=CPU, dtype=torch.float32, checkpointing=False)
    english, native = torch.randn(1, 77, 96), torch.randn(2, 40, 24)
    random = torch.Generator().manual_seed(1)
    denoise, net = backbone.branch_beside(pocket, copied, 24, english, generator=random)
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 990.0])
    with torch.no_grad():
        alone = copied(noisy, times.long(), context=english.expand(2, -1, -1))
        torch.testing.assert_close(denoise(noisy, times, native), alone, rtol=1e-6, atol=1e-6)
    theirs = copied.unet.state_dict()
    for key, value in net.state_dict().items():
        if key.startswith(("zero_convs.", "middle_block_out.")):
            assert not value.any()
        elif key.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")):
            assert value.shape[1] == 24 and 0.8 < float(value.std() / theirs[key].std()) < 1.25
        else:
            assert torch.equal(value, theirs[key])
    denoise(noisy, times, native).square().sum().backward()
    learning = dict(net.named_parameters())
    assert learning and all(weight.requires_grad for weight in learning.values())
    assert learning["zero_convs.0.0.weight"].grad is not None
    assert all(weight.grad is None for weight in copied.unet.parameters())
    branch.check(pocket, {key: tuple(value.shape) for key, value in net.state_dict().items()}, "ours")


def test_a_trained_branch_acts_as_it_will_when_the_host_samples(sdxl: Checkpoint) -> None:
    copied = frozen_copy(sdxl.model, device=CPU, dtype=torch.float32, checkpointing=False)
    random = torch.Generator().manual_seed(2)
    english, pooled = torch.randn(1, 77, 2048, generator=random), torch.randn(1, 1280, generator=random)
    denoise, net = backbone.branch_beside(sdxl.model, copied, 2048, english, pooled, generator=random)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.startswith(("zero_convs.", "middle_block_out.")):
                weight.normal_(0, 0.02, generator=random)
    noisy, native = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 77, 2048, generator=random)
    own = torch.randn(1, 1280, generator=random)
    sizes = backbone.size_embedding(sdxl.model, 64, 64)
    assert sizes is not None
    times = torch.tensor([300.0])
    with torch.no_grad():
        said = denoise(noisy, times, native, torch.cat([own, sizes], dim=1))
        beside = branch.Beside("ours", "1" * 64, patcher_of(net, sdxl.model), 1.0)
        told = {beside.key: None}

        def unet(x: Tensor, t: Tensor, context: Any, y: Any, control: Any, told: Any, **more: Any) -> Tensor:
            return copied.unet(x, t, context=context, y=y, transformer_options=told)

        expected = beside.diffusion_model(
            unet,
            noisy,
            times,
            english,
            torch.cat([pooled, sizes], dim=1),
            None,
            told,
            **{f"{beside.key}_rows": native, f"{beside.key}_pooled": own},
        )
    assert (said - expected).norm() <= 1e-5 * expected.norm()
    alone = copied(noisy, times.long(), context=english, pooled=pooled, sizes=sizes)
    assert (said - alone).norm() > 0.01 * alone.norm()


def test_the_memory_of_a_training_is_told_before_it_begins(pocket: Any) -> None:
    copied = frozen_copy(pocket, device=CPU, dtype=torch.float32, checkpointing=False)
    rows = torch.nn.Parameter(torch.randn(1, 77, 96))

    def example() -> Tensor:
        return copied(torch.zeros(1, 4, 8, 8), torch.tensor([1]), context=rows).sum()

    told = backbone.memory(
        [copied.unet], [rows], example, batch=4, states=2, averaged=True, device=torch.device("cpu")
    )
    size = 77 * 96 * 4
    assert (told.gradients, told.optimiser, told.average) == (size, 2 * size, size)
    assert told.weights == sum(4 * weight.numel() for weight in copied.unet.parameters())
    kept = backbone.KeptBytes([*copied.unet.parameters(), rows])
    with kept.counting():
        example()
    assert told.activations == 4 * kept.total > 0
    assert told.fits and told.free > 1 << 20
    assert rows.grad is None
