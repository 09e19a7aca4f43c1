"""Objectives are zero exactly where the student equals its teacher, and reach the student alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.training.objectives import (
    Align,
    Diffusion,
    Iap,
    IapSettings,
    Pea,
    PeaBatch,
    PlainAttention,
)
from language_bridge.training.taps import CrossAttention, QueryTaps


@pytest.fixture
def batch() -> PeaBatch:
    """Four noisy latents, the first two with English parallels, the others native only."""
    generator = torch.Generator().manual_seed(1)
    return PeaBatch(
        noisy=torch.randn(4, 4, 8, 8, generator=generator),
        noise=torch.randn(4, 4, 8, 8, generator=generator),
        timestep=torch.tensor([3.0, 250.0, 600.0, 999.0]),
        teacher=torch.randn(4, 7, 24, generator=generator),
        native_only=torch.tensor([0.0, 0.0, 1.0, 1.0]),
    )


def test_iap_is_zero_for_equal_text_and_grows_with_distance(unet: Any, batch: PeaBatch) -> None:
    """The same context, or the same context said twice, attends alike; another one does not."""
    with QueryTaps(unet) as taps:
        unet(batch.noisy, batch.timestep, context=batch.teacher)
    objective = Iap(CrossAttention.of(unet))
    assert float(objective(taps.queries, batch.teacher, batch.teacher).total) == 0.0
    twice = torch.cat([batch.teacher, batch.teacher], dim=1)
    assert float(objective(taps.queries, twice, batch.teacher).total) < 1e-9
    near = objective(taps.queries, batch.teacher + 0.01, batch.teacher).total
    far = objective(taps.queries, batch.teacher + 1.0, batch.teacher).total
    assert 0 < float(near) < float(far)


@pytest.mark.parametrize("compare", ["output", "heads", "weights"])
@pytest.mark.parametrize("distance", ["squared", "absolute", "cosine"])
@pytest.mark.parametrize("scaled", [True, False])
def test_every_choice_that_the_paper_leaves_open_is_a_distance(
    unet: Any, batch: PeaBatch, compare: Any, distance: Any, scaled: bool
) -> None:
    """Zero at the English text, positive elsewhere, and its gradient leads there."""
    with QueryTaps(unet) as taps:
        unet(batch.noisy, batch.timestep, context=batch.teacher)
    objective = Iap(CrossAttention.of(unet), IapSettings(compare, distance, scaled))
    assert abs(float(objective(taps.queries, batch.teacher, batch.teacher).total)) < 1e-6
    other = torch.randn(batch.teacher.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    before = objective(taps.queries, other, batch.teacher).total
    (slope,) = torch.autograd.grad(before, other)
    step = 1e-3 * float(before) / float(slope.square().sum())
    after = objective(taps.queries, other - step * slope, batch.teacher).total
    assert 0 < float(after) < float(before)


def test_the_choices_say_what_they_say(unet: Any, batch: PeaBatch) -> None:
    with QueryTaps(unet) as taps:
        unet(batch.noisy, batch.timestep, context=batch.teacher)
    layers, native = CrossAttention.of(unet), batch.teacher + 0.3
    layer, query = layers[1], taps.queries[1]
    ours, target = (layer.attend(query, text) for text in (native, batch.teacher))

    def only(**settings: Any) -> float:
        return float(
            Iap(layers, IapSettings(layers=(1,), **settings))(taps.queries, native, batch.teacher).total
        )

    assert only(scaled=False) == pytest.approx(float((ours - target).square().mean()))
    assert only() == pytest.approx(float((ours - target).square().mean() / target.var()))
    assert only(distance="absolute", scaled=False) == pytest.approx(float((ours - target).abs().mean()))
    cosine = torch.nn.functional.cosine_similarity(ours, target, dim=-1)
    assert only(distance="cosine") == pytest.approx(float(1 - cosine.mean()), rel=1e-4)
    found = layer.attend(query, native, projected=False)
    torch.testing.assert_close(layer.module.to_out[0](found), ours)
    weights = layer.weights(query, native)
    value = layer.module.to_v(native).unflatten(-1, (layer.module.heads, -1)).transpose(1, 2)
    torch.testing.assert_close((weights @ value).transpose(1, 2).flatten(2), found)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_image_and_text_can_meet_without_a_unet(batch: PeaBatch) -> None:
    """Queries of an image encoder: the textbook's attention, with the text as keys and values."""
    image = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(3))
    plain = PlainAttention()
    weights = (image @ batch.teacher.transpose(1, 2) / 24**0.5).softmax(-1)
    torch.testing.assert_close(plain.weights(image, batch.teacher)[:, 0], weights)
    torch.testing.assert_close(plain.attend(image, batch.teacher), weights @ batch.teacher)
    native = batch.teacher.flip(0).clone().requires_grad_()
    objective = Iap([plain])
    assert float(objective([image], batch.teacher, batch.teacher).total) == 0.0
    loss = objective([image], native, batch.teacher).total
    assert float(loss) > 0
    loss.backward()
    assert native.grad is not None and bool(native.grad.abs().sum() > 0)


def test_choices_that_cannot_be_are_refused(unet: Any, batch: PeaBatch) -> None:
    wrong: Any = "sum"
    for settings in ({"compare": wrong}, {"distance": wrong}):
        with pytest.raises(BridgeError, match="IAP"):
            IapSettings(**settings)
    layers = CrossAttention.of(unet)
    for chosen in ((), (len(layers),), (-1,)):
        with pytest.raises(BridgeError, match="layers"):
            Iap(layers, IapSettings(layers=chosen))
    with QueryTaps(unet) as taps:
        unet(batch.noisy, batch.timestep, context=batch.teacher)
    longer = torch.cat([batch.teacher, batch.teacher], dim=1)
    with pytest.raises(BridgeError, match="texts"):
        Iap(layers, IapSettings(compare="weights"))(taps.queries, longer, batch.teacher)


def test_pea_terms_follow_the_flag(unet: Any, batch: PeaBatch) -> None:
    """With native = teacher the distillation terms vanish; z = 1 leaves the noise term, z = 0 removes it."""
    objective = Pea(unet)
    equal = objective(batch.teacher, batch).parts
    assert float(equal["logit"]) == float(equal["feature"]) == 0.0
    assert float(equal["noise"]) > 0
    other = torch.randn_like(batch.teacher)
    parallel = objective(
        other, PeaBatch(batch.noisy, batch.noise, batch.timestep, batch.teacher, torch.zeros(4))
    ).parts
    assert float(parallel["noise"]) == 0.0 and float(parallel["logit"]) > 0 and float(parallel["feature"]) > 0
    native = objective(
        other, PeaBatch(batch.noisy, batch.noise, batch.timestep, batch.teacher, torch.ones(4))
    ).parts
    assert float(native["logit"]) == float(native["feature"]) == 0.0 and float(native["noise"]) > 0


def test_pea_equals_its_formula(unet: Any, batch: PeaBatch) -> None:
    """Total and noise terms against a restatement; the divisor is the full batch, whatever the flag."""
    native = torch.randn_like(batch.teacher)
    loss = Pea(unet, weight=0.1)(native, batch)
    student = unet(batch.noisy, batch.timestep, context=native)
    teacher = unet(batch.noisy, batch.timestep, context=batch.teacher)
    torch.testing.assert_close(
        loss.parts["noise"], ((student - batch.noise)[2:] ** 2).sum() / student.numel()
    )
    torch.testing.assert_close(loss.parts["logit"], ((student - teacher)[:2] ** 2).sum() / student.numel())
    expected = loss.parts["noise"] + loss.parts["logit"] + 0.1 * loss.parts["feature"]
    torch.testing.assert_close(loss.total, expected)


def test_gradients_reach_the_native_text_and_nothing_else(unet: Any, batch: PeaBatch) -> None:
    """Through the frozen U-Net into the context; teacher, U-Net and queries stay without gradient."""
    native = torch.randn_like(batch.teacher).requires_grad_()
    teacher = batch.teacher.clone().requires_grad_()
    Pea(unet)(
        native, PeaBatch(batch.noisy, batch.noise, batch.timestep, teacher, batch.native_only)
    ).total.backward()
    assert native.grad is not None and bool(native.grad.abs().sum() > 0)
    assert teacher.grad is None
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_diffusion_equals_its_formula_and_weighs_each_timestep(unet: Any, batch: PeaBatch) -> None:
    """Without weights it is the mean squared error; with weights each sample counts by its own."""
    native = batch.teacher
    guess = unet(batch.noisy, batch.timestep, context=native)
    each = (guess - batch.noise).square().flatten(1).mean(1)
    arguments = (native, batch.noisy, batch.noise, batch.timestep)
    torch.testing.assert_close(Diffusion(unet)(*arguments).total, each.mean())
    weight = torch.zeros(1000)
    weight[250] = 3.0
    torch.testing.assert_close(Diffusion(unet, weight)(*arguments).total, 3.0 * each[1] / 4)


def test_diffusion_reaches_text_and_whatever_learns_in_the_unet(unet: Any, batch: PeaBatch) -> None:
    """The recipe of AltDiffusion lets keys and values learn, and the gradient must come to nothing else."""
    learning = {name: p for name, p in unet.named_parameters() if ".attn2.to_k." in name}
    for parameter in learning.values():
        parameter.requires_grad_(True)
    native = batch.teacher.clone().requires_grad_(True)
    Diffusion(unet)(native, batch.noisy, batch.noise, batch.timestep).total.backward()
    assert native.grad is not None and native.grad.abs().sum() > 0
    touched = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for parameter in learning.values():
        parameter.grad = None
        parameter.requires_grad_(False)
    assert touched == set(learning)


def test_align_wants_direction_and_length() -> None:
    """Equal rows cost nothing; a longer row costs length, a turned one costs angle."""
    rows = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    objective = Align(length=0.5)
    assert float(objective(rows, rows).total) < 1e-6
    longer = objective(2 * rows, rows).parts
    assert float(longer["cosine"]) < 1e-6
    torch.testing.assert_close(longer["length"], rows.norm(dim=-1).square().mean())
    turned = objective(-rows, rows)
    torch.testing.assert_close(turned.total, torch.tensor(2.0))
