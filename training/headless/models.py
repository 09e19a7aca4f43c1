"""A model folder in diffusers' layout as training sees it: U-Net, picture encoder, English text encoders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...bridges.base import TIMESTEPS
from ...bridges.errors import BridgeError
from ..backbone import Backbone

BASES = {768: "sd1", 1024: "sd2"}
"""Width of the context -> base, for checkpoints without a pooled vector; with one it is SDXL."""
_PREDICTIONS: dict[object, Literal["eps", "v"]] = {"epsilon": "eps", "v_prediction": "v"}


@dataclass(frozen=True, eq=False)
class English:
    """The checkpoint's own text encoders, as the published pipelines of diffusers ask them.

    One encoder: its last states, normed (StableDiffusionPipeline, SD1.x and SD2.x). Two: the states before
    the last layer of each, side by side, and the projected vector of the second as the pooled one
    (StableDiffusionXLPipeline). Texts are cut off at the encoders' window.
    """

    tokenizers: tuple[Any, ...]
    encoders: tuple[nn.Module, ...]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Rows [B, T, C] float32 and pooled [B, P] float32 or None."""
        rows: list[Tensor] = []
        pooled: Tensor | None = None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                list(texts),
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            device = next(encoder.parameters()).device
            said: Any = encoder(ids.to(device), output_hidden_states=True)
            if len(self.encoders) == 1:
                return cast(Tensor, said.last_hidden_state).float(), None
            rows.append(said.hidden_states[-2])
            pooled = cast(Tensor, said[0])
        return torch.cat(rows, dim=-1).float(), None if pooled is None else pooled.float()


@dataclass(frozen=True, eq=False)
class Latents:
    """The checkpoint's picture encoder, in single precision as the authors of PEA-Diffusion run it.

    What it says is the mean of the posterior, times the scale that the U-Net was trained with: the same
    picture always gives the same latents.
    """

    encoder: Any

    @property
    def factor(self) -> int:
        """Pixels along a side of the picture for one of the latents."""
        return 2 ** (len(self.encoder.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.encoder.config.latent_channels)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] in 0..1 to latents [B, 4, H / factor, W / factor]."""
        device = next(self.encoder.parameters()).device
        pixels = pictures.to(device, torch.float32).movedim(-1, 1) * 2 - 1
        mean = self.encoder.encode(pixels).latent_dist.mode()
        shift = self.encoder.config.get("shift_factor") or 0.0
        return (mean - shift) * self.encoder.config.scaling_factor


@dataclass(frozen=True, eq=False)
class Model:
    """What training needs of a model folder; what a method does not need stays on the disk and is None.

    base: as a bridge file names it. context, pooled: widths that the U-Net reads; sizes: width of the
    embedding of each of SDXL's six sizes. The last two are 0 without them.
    """

    base: str
    context: int
    pooled: int
    sizes: int
    english: English
    backbone: Backbone | None = None
    latents: Latents | None = None

    def weights(self) -> Iterator[Tensor]:
        """Every weight of what was opened."""
        modules = [*self.english.encoders]
        modules += [] if self.backbone is None else [self.backbone.unet]
        modules += [] if self.latents is None else [cast(nn.Module, self.latents.encoder)]
        for module in modules:
            yield from module.parameters()


def open_model(
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    unet: bool = True,
    pictures: bool = True,
    checkpointing: bool = False,
    variant: str | None = None,
) -> Model:
    """Open a folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/, on this machine's disk alone.

    dtype: of the U-Net and the text encoders. variant: "fp16" where the files are named so. BridgeError when
    a part is missing or is not of SD1.x, SD2.x or SDXL.
    """
    import diffusers
    import transformers

    models, texts = cast(Any, diffusers), cast(Any, transformers)

    def load(kind: Any, part: str, **given: Any) -> Any:
        try:
            return kind.from_pretrained(folder / part, local_files_only=True, **given)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BridgeError(
                f"The model folder {folder.name!r} cannot be opened.",
                f"{part}: {error!s:.300}",
                "a model in diffusers' layout, its weights as safetensors",
                "Name the folder that holds model_index.json; convert a single-file checkpoint first.",
            ) from error

    weights: dict[str, Any] = {"use_safetensors": True, "variant": variant}
    config = load_config(models.UNet2DConditionModel, folder)
    context, pooled = widths(config)
    two = (folder / "text_encoder_2").is_dir()
    if bool(pooled) != two:
        raise _odd_model("a pooled vector" if pooled else "no pooled vector", f"{1 + two} text encoders")
    tokenizers = [load(texts.CLIPTokenizer, "tokenizer")]
    encoders = [load(texts.CLIPTextModel, "text_encoder", dtype=dtype, **weights)]
    if two:
        tokenizers.append(load(texts.CLIPTokenizer, "tokenizer_2"))
        encoders.append(load(texts.CLIPTextModelWithProjection, "text_encoder_2", dtype=dtype, **weights))
    english = English(tuple(tokenizers), tuple(frozen(encoder, device) for encoder in encoders))
    backbone, latents = None, None
    if unet:
        network = load(models.UNet2DConditionModel, "unet", torch_dtype=dtype, **weights)
        if checkpointing:
            network.enable_gradient_checkpointing()
        schedule = load(models.DDPMScheduler, "scheduler")
        backbone = backbone_of(frozen(network, device), schedule)
    if pictures:
        latents = Latents(
            frozen(load(models.AutoencoderKL, "vae", torch_dtype=torch.float32, **weights), device)
        )
    sizes = int(config["addition_time_embed_dim"]) if pooled else 0
    return Model(_base(context, pooled), context, pooled, sizes, english, backbone, latents)


def quiet() -> None:
    """Let the libraries draw no progress bars; in several processes they only cover each other."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        cast(Any, library).utils.logging.disable_progress_bar()


def load_config(kind: Any, folder: Path) -> dict[str, Any]:
    """The U-Net's config.json; BridgeError without one."""
    try:
        return dict(kind.load_config(folder / "unet", local_files_only=True))
    except (OSError, ValueError) as error:
        raise _odd_model("a model in diffusers' layout", f"unet: {error!s:.200}") from error


def widths(config: dict[str, Any]) -> tuple[int, int]:
    """Width of the context and of the pooled vector (0 = none) that a U-Net of this configuration reads.

    BridgeError when it reads something else beside.
    """
    added, context = config.get("addition_embed_type"), config.get("cross_attention_dim")
    plain = config.get("encoder_hid_dim") is None and config.get("class_embed_type") is None
    if config.get("in_channels") != 4 or not isinstance(context, int) or not plain:
        raise _odd_model("4 latent channels and one text", f"{config.get('in_channels')} channels, {context}")
    if added is None:
        return context, 0
    each, whole = config.get("addition_time_embed_dim"), config.get("projection_class_embeddings_input_dim")
    if added != "text_time" or not isinstance(each, int) or not isinstance(whole, int) or whole <= 6 * each:
        raise _odd_model("no added condition, or SDXL's", f"{added!r}, {each} and {whole}")
    return context, whole - 6 * each


def backbone_of(unet: nn.Module, scheduler: Any) -> Backbone:
    """A diffusers U-Net with the noise schedule and the prediction of a scheduler, as a `Backbone`.

    SDXL's sizes come already embedded, as in the LDM layout (see `embedded`), so the U-Net's own embedding of
    them is replaced by nothing. BridgeError on a schedule that is none of SD's.
    """
    said: dict[str, object] = dict(scheduler.config)
    abar = cast(Tensor, scheduler.alphas_cumprod).float()
    kind = said.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS or len(abar) != TIMESTEPS:
        raise _odd_model(f"epsilon or v_prediction over {TIMESTEPS} steps", f"{kind!r} over {len(abar)}")
    network = cast(Any, unet)
    _, pooled = widths(dict(network.config))
    if pooled:
        network.add_time_proj = nn.Identity()

    def denoise(noisy: Tensor, timestep: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
        return ask(unet, noisy, timestep, context, y, pooled)[0]

    return Backbone(unet, abar, _PREDICTIONS[kind], denoise)


def ask(
    network: nn.Module,
    noisy: Tensor,
    timestep: Tensor,
    context: Tensor,
    y: Tensor | None,
    pooled: int,
    **given: Any,
) -> Any:
    """What a diffusers U-Net, or a ControlNet, says as a tuple, computed in the dtype of its weights.

    y: SDXL's pooled vector, `pooled` wide, and the embedding of the sizes behind it; given: what the network
    reads beside.
    """
    dtype = next(network.parameters()).dtype
    if y is not None:
        given["added_cond_kwargs"] = {"text_embeds": y[:, :pooled].to(dtype), "time_ids": y[:, pooled:]}
    return cast(Any, network)(
        noisy.to(dtype), timestep, encoder_hidden_states=context.to(dtype), return_dict=False, **given
    )


def _base(context: int, pooled: int) -> str:
    if not pooled and context not in BASES:
        raise _odd_model("a context 768 (SD1.x) or 1024 (SD2.x) wide, or SDXL", f"a context {context} wide")
    return "sdxl" if pooled else BASES[context]


def embedded(sizes: Tensor, width: int) -> Tensor:
    """SDXL's embedding of sizes [B, 6] to [B, 6 width]: cosines, then sines (arXiv 2307.01952)."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=sizes.device) / half)
    angles = sizes.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)


def frozen(module: nn.Module, device: torch.device | str) -> nn.Module:
    """The module on the device, in its mode for use, with nothing to learn."""
    return module.to(device).eval().requires_grad_(False)


def _odd_model(expected: str, found: str) -> BridgeError:
    return BridgeError(
        "The model cannot be trained on.",
        found,
        expected,
        "Name the folder of an SD1.x, SD2.x or SDXL model in diffusers' layout (no inpainting, no refiner).",
    )
