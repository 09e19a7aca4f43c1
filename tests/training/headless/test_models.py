"""Models in diffusers' layout say in training what they say in diffusers, and what the host's own say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.utils
import pytest
import torch

from language_bridge.bridges.errors import BridgeError
from language_bridge.training.backbone import Backbone
from language_bridge.training.headless.models import backbone_of, embedded, frozen, open_model, widths
from language_bridge.training.objectives import Pea, PeaBatch
from language_bridge.training.taps import QueryTaps, cross_attentions, level_ends

from .toys import UNET, XL, scheduler_of, unet_of

TEXTS = ["a red cat", "", "the cat " * 30]
HOST: dict[str, Any] = {
    "num_res_blocks": [2, 2],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 0, 0, 0],
    "num_heads": 2,
}
"""The U-Net of `UNET` as the host describes it."""
HOST_XL = HOST | {
    "adm_in_channels": 40 + 6 * 16,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
}


def opened(folder: Path, **changes: Any) -> Any:
    return open_model(folder, **{"device": "cpu", "dtype": torch.float32} | changes)


def test_sd1_text_is_what_the_published_pipeline_encodes(small: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        **parts(small / "sd1"), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    expected, _ = pipeline.encode_prompt(TEXTS, "cpu", 1, False)
    rows, pooled = opened(small / "sd1", unet=False, pictures=False).english(TEXTS)
    assert torch.equal(rows, expected)
    assert pooled is None


def test_sdxl_text_is_what_the_published_pipeline_encodes(small: Path) -> None:
    """States before the last layer of both encoders, and the projected vector of the second."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline(**parts(small / "xl"), add_watermarker=False)
    expected, _, expected_pooled, _ = pipeline.encode_prompt(
        TEXTS, device="cpu", do_classifier_free_guidance=False
    )
    rows, pooled = opened(small / "xl", unet=False, pictures=False).english(TEXTS)
    assert torch.equal(rows, expected)
    assert torch.equal(pooled, expected_pooled)


def parts(folder: Path) -> dict[str, Any]:
    """The parts of a pipeline, read as diffusers reads them."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "scheduler": DDPMScheduler,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    return {
        name: kind.from_pretrained(folder / name) for name, kind in kinds.items() if (folder / name).is_dir()
    }


@pytest.mark.parametrize("width", [16, 256])
def test_sizes_are_embedded_as_diffusers_embeds_them(width: int) -> None:
    from diffusers.models.embeddings import Timesteps

    sizes = torch.tensor([[1024, 683, 0, 57, 768, 512], [8, 9, 10, 11, 12, 13]])
    own = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(embedded(sizes, width), own(sizes.flatten()).view(2, -1), rtol=0, atol=1e-6)


def test_a_backbone_answers_as_its_unet_does(small: Path) -> None:
    """SDXL: pooled vector and embedded sizes come as one `y`, as in the LDM layout."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(small / "xl" / "unet").eval()
    noisy, timestep = torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    context, pooled = torch.randn(2, 7, 64), torch.randn(2, 40)
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64], [100, 90, 3, 4, 64, 64]])
    added = {"text_embeds": pooled, "time_ids": sizes}
    with torch.no_grad():
        expected = unet(noisy, timestep, encoder_hidden_states=context, added_cond_kwargs=added).sample
        model = opened(small / "xl", pictures=False)
        got = model.backbone(
            noisy, timestep, context=context, pooled=pooled, sizes=embedded(sizes, model.sizes)
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_computes_blocks_twice_and_gives_the_same(
    small: Path, checkpointing: bool
) -> None:
    """The U-Net is frozen and in its mode for use; gradients still reach the text."""
    model = opened(small / "sd1", pictures=False, checkpointing=checkpointing)
    plain = opened(small / "sd1", pictures=False)
    calls: list[object] = []
    inner = model.backbone.unet.up_blocks[1].resnets[0].conv1
    inner.register_forward_pre_hook(lambda *given: calls.append(given))
    noisy, timestep = torch.randn(1, 4, 8, 8), torch.tensor([400])
    gradients: list[Any] = []
    torch.manual_seed(1)
    context = torch.randn(1, 7, 768)
    for one in (model, plain):
        said = context.clone().requires_grad_(True)
        one.backbone(noisy, timestep, context=said).square().mean().backward()
        gradients.append(said.grad)
    assert len(calls) == 1 + checkpointing
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-9)
    assert not any(each.requires_grad for each in model.backbone.unet.parameters())


def test_latents_are_the_mean_that_diffusers_says(small: Path) -> None:
    pictures = torch.rand(2, 32, 40, 3)
    model = opened(small / "sd1", unet=False)
    vae = model.latents.encoder
    with torch.no_grad():
        expected = vae.encode(pictures.movedim(-1, 1) * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    assert torch.equal(model.latents(pictures), expected)
    assert (model.latents.factor, model.latents.channels, expected.shape) == (8, 4, (2, 4, 4, 5))


def test_the_noise_schedule_and_the_prediction_are_the_schedulers() -> None:
    """Noised latents and velocity as DDPMScheduler gives them."""
    scheduler = scheduler_of(prediction_type="v_prediction")
    backbone = backbone_of(unet_of(UNET, 24), scheduler)
    latents, noise, timestep = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0, 999])
    assert backbone.prediction == "v"
    torch.testing.assert_close(
        backbone.noised(latents, noise, timestep), scheduler.add_noise(latents, noise, timestep)
    )
    torch.testing.assert_close(
        backbone.target(latents, noise, timestep), scheduler.get_velocity(latents, noise, timestep)
    )


@pytest.mark.parametrize("change", [{"prediction_type": "sample"}, {"num_train_timesteps": 1100}])
def test_another_schedule_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(BridgeError, match="cannot be trained on"):
        backbone_of(unet_of(UNET, 24), scheduler_of(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"in_channels": 9},
        {"addition_embed_type": "text"},
        {"encoder_hid_dim": 5},
        {"class_embed_type": "timestep"},
        {"cross_attention_dim": [8, 8]},
        {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 90},
    ],
)
def test_a_unet_that_reads_something_else_is_an_error(change: dict[str, Any]) -> None:
    plain = {"in_channels": 4, "cross_attention_dim": 768, "addition_time_embed_dim": 16}
    assert widths(plain) == (768, 0)
    with pytest.raises(BridgeError, match="cannot be trained on"):
        widths(plain | change)


def test_a_folder_without_a_model_is_an_error_in_three_parts(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="unet"):
        opened(tmp_path)


# -- the host's layout and diffusers' ----------------------------------------------------------------


def pair(make_unet: Callable[..., Any], *, xl: bool, prediction: str) -> tuple[Backbone, Backbone]:
    """One random U-Net in both layouts, by the host's own table of keys."""
    config, described = (XL, HOST_XL) if xl else (UNET, HOST)
    theirs = frozen(unet_of(config, 24, seed=5), "cpu")
    ours = make_unet(**described).eval()
    table = comfy.utils.unet_to_diffusers({**described, "transformer_depth_middle": 1})
    state = theirs.state_dict()
    ours.load_state_dict({table[name]: value for name, value in state.items()}, strict=True)
    scheduler = scheduler_of(prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction])
    first = backbone_of(theirs, scheduler)
    return first, Backbone(frozen(ours, "cpu"), first.abar, first.prediction)


@pytest.mark.parametrize(("xl", "prediction"), [(False, "eps"), (False, "v"), (True, "eps")])
def test_pea_over_diffusers_is_pea_over_the_host(
    make_unet: Callable[..., Any], xl: bool, prediction: str
) -> None:
    """The same weights in both layouts give the same loss, parts and gradient, to 1e-5."""
    generator = torch.Generator().manual_seed(6)
    shape, timestep = (3, 4, 8, 8), torch.tensor([1, 500, 999])
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    teacher, native = (torch.randn(3, 7, 24, generator=generator) for _ in range(2))
    sizes = embedded(torch.tensor([[64, 64, 0, 0, 64, 64]] * 3), 16) if xl else None
    pooled, teacher_pooled = (torch.randn(3, 40, generator=generator) if xl else None for _ in range(2))
    losses: list[Any] = []
    gradients: list[Any] = []
    for backbone in pair(make_unet, xl=xl, prediction=prediction):
        said = native.clone().requires_grad_(True)
        batch = PeaBatch(
            backbone.noised(latents, noise, timestep),
            backbone.target(latents, noise, timestep),
            timestep.float(),
            teacher,
            torch.tensor([1.0, 0.0, 0.0]),
            teacher_pooled,
            sizes,
        )
        loss = Pea(backbone.unet, backbone)(said, batch, pooled)
        loss.total.backward()
        losses.append({"total": loss.total.detach(), **loss.parts})
        gradients.append(said.grad)
        assert len(level_ends(backbone.unet)) == 5
    assert losses[0].keys() == losses[1].keys() >= {"noise", "logit", "feature"}
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], rtol=1e-5, atol=1e-8, msg=name)
    largest = float(gradients[1].abs().max())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5 * largest)
    assert min(float(value.detach()) for value in losses[0].values()) > 0


def test_queries_of_both_layouts_come_in_one_order(make_unet: Callable[..., Any]) -> None:
    """What `cross_attentions` names is what `QueryTaps` takes, in the order of the run."""
    noisy, timestep, context = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 24)
    queries: list[Any] = []
    for backbone in pair(make_unet, xl=False, prediction="eps"):
        with torch.no_grad(), QueryTaps(backbone.unet) as taps:
            backbone(noisy, timestep, context=context)
        wide = [layer.to_q.out_features for layer in cross_attentions(backbone.unet)]
        assert wide == [each.shape[-1] for each in taps.queries] == [32, 32, 64, 32, 32, 32]
        queries.append(taps.queries)
    for mine, other in zip(*queries, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
