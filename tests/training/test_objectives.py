"""Objectives are zero exactly where the student equals its teacher, and reach the student alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from language_bridge.training.objectives import Align, Diffusion, Iap, Pea, PeaBatch
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
