"""Opens the pocket checkpoint with the host's own classes: a small SD1.x in everything but size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bridges.errors import BridgeError
from ..encoders import guard
from ..pocket.autoencoder import TAESD_WIDTH, Autoencoder

FILE = Path(__file__).parent.parent / "pocket" / "assets" / "pocket-base.safetensors"
METADATA_KEY = "language_bridge_pocket"
FORMAT = 1
_OWNER = "pocket checkpoint"

CLIP_CONFIG: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 96,
    "eos_token_id": 49407,
}

UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 96,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}


def load_pocket(path: Path = FILE, *, disable_dynamic: bool = False) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the pocket checkpoint, each an object of the host's own class.

    The CLIP uses the stock CLIP tokenizer (49,408 words), a tower of 3 layers and width 96, key `l`; the
    U-Net is the host's own with 64 channels; the VAE is TAESD. LoRA key maps, clip skip, prompt weights,
    textual inversion (width 96) and saving work as on any SD1.x checkpoint.

    Raises BridgeError when the file is missing or damaged.
    """
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import comfy.supported_models_base
    import comfy.utils
    import folder_paths
    import torch
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDTokenizer

    state = _read(path)

    class PocketModel(comfy.supported_models.SD15):
        """SD1.x with the pocket sizes."""

        unet_config = UNET_CONFIG
        unet_extra_config = {"num_heads": UNET_CONFIG["num_heads"], "num_head_channels": -1}

    class PocketWords(SDTokenizer):
        """The stock CLIP tokenizer, with embeddings of the pocket width."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data or {},
                embedding_size=CLIP_CONFIG["hidden_size"],
            )

    class PocketTokenizer(SD1Tokenizer):
        """SD1.x's tokenizer object around `PocketWords`."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=PocketWords)

    config = PocketModel(UNET_CONFIG)
    load_device = management.get_torch_device()
    dtype = management.unet_dtype(
        model_params=0, supported_dtypes=[torch.float32], weight_dtype=torch.float32
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load_device, [torch.float32]))

    prefix = "model.diffusion_model."
    patcher_class: Any = (
        comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    )
    model = config.get_model(state, prefix, device=management.unet_offload_device())
    patcher = patcher_class(model, load_device=load_device, offload_device=management.unet_offload_device())
    unet = {key: value.float() for key, value in state.items() if key.startswith(prefix)}
    if patcher.is_dynamic() if hasattr(patcher, "is_dynamic") else False:
        model.load_model_weights(unet, prefix, assign=True)
    else:
        model.load_model_weights(unet, prefix)

    clip_state = config.process_clip_state_dict(
        {k: v for k, v in state.items() if k.startswith("cond_stage_model.")}
    )
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(PocketTokenizer, SD1ClipModel),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=clip_state,
        parameters=comfy.utils.calculate_parameters(clip_state),
        state_dict=clip_state,
        model_options={"clip_l_model_config": dict(CLIP_CONFIG)},
    )
    vae = comfy.sd.VAE(
        sd={
            k.removeprefix("first_stage_model."): v
            for k, v in state.items()
            if k.startswith("first_stage_model.")
        }
    )
    for index, part in enumerate((patcher, clip.patcher)):
        part.cached_patcher_init = (_part, (path, index))
    return patcher, clip, vae


def _read(path: Path) -> dict[str, Any]:
    """The weights of a pocket checkpoint; BridgeError unless whole: the host fills gaps with anything."""
    if not path.is_file():
        raise BridgeError(
            "The pocket checkpoint is not there.",
            f"no file at {path.name}",
            "the file that ships inside the pack, under pocket/assets",
            "Install the pack again (git pull, or Manager: Try fix).",
        )
    layout = guard.read_layout(path)
    text = layout.metadata.get(METADATA_KEY)
    if text is None:
        raise BridgeError(
            f"{path.name} is not a pocket checkpoint.",
            f"no {METADATA_KEY!r} in its header",
            "the file that ships inside the pack, under pocket/assets",
            "Install the pack again (git pull, or Manager: Try fix).",
        )
    guard.parse_header(text, FORMAT, _OWNER)
    guard.require_shapes(_shapes(), layout.shapes, _OWNER)
    return dict(guard.read_tensors(path, layout))


def _shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor by key, asked of the classes that will hold them; nothing is allocated."""
    import comfy.ops
    import torch
    from comfy.clip_model import CLIPTextModel
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    operations = comfy.ops.disable_weight_init
    with torch.device("meta"):
        autoencoder = Autoencoder(TAESD_WIDTH)
    parts = {
        "model.diffusion_model.": UNetModel(
            device="meta", dtype=torch.float32, operations=operations, **UNET_CONFIG
        ),
        "cond_stage_model.transformer.text_model.": CLIPTextModel(
            CLIP_CONFIG, None, "meta", operations
        ).text_model,
        "first_stage_model.": autoencoder,
    }
    shapes = {
        prefix + key: shape for prefix, part in parts.items() for key, shape in guard.shapes_of(part).items()
    }
    return shapes | {"first_stage_model.vae_scale": (), "first_stage_model.vae_shift": ()}


def _part(path: Path, index: int, disable_dynamic: bool = False) -> Any:
    """Factory that the host calls to rebuild the model (0) or the text encoder's patcher (1) from a file."""
    model, clip, _ = load_pocket(path, disable_dynamic=disable_dynamic)
    return model if index == 0 else clip.patcher
