"""Opens whole AltDiffusion and Taiyi checkpoints: U-Net and VAE as always, their own text tower as CLIP."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_base
import comfy.model_management as management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ..bridges.base import Bridge, create, identify
from ..bridges.errors import BridgeError
from ..encoders import guard
from ..encoders.base import Encoder, EncoderSpec, create_encoder, identify_encoder
from ..encoders.file import TOKENIZER
from ..prompt import normalise, split
from . import folders
from .tower import patcher_of, tower_dtype
from .words import Chunk, ask, cut

TEXT = "cond_stage_model."
UNET = "model.diffusion_model."
AVERAGED = "model_ema."
TOKENIZER_FILES = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt")
LARGEST_TOKENIZER_BYTES = 32 << 20


@dataclass(frozen=True)
class Method:
    """How a checkpoint reads text: window, mask rule and layer of its tower.

    key: where the stock CLIP of its base would put its tokens.
    """

    name: str
    window: int
    mask_rule: str
    layer: int
    key: str


class NativeText(torch.nn.Module):
    """The text model of the host's CLIP protocol around a tower and its head."""

    def __init__(self, encoder: Encoder, bridge: Bridge, key: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.bridge = bridge
        self.key = key
        self.dtypes = {next(encoder.parameters()).dtype}
        self._device: Any = None
        self.eval().requires_grad_(False)

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        """Clip skip has no meaning here, as in the method's own programs; only the device is taken."""
        self._device = options.get("execution_device", self._device)

    def reset_clip_options(self) -> None:
        """Back to where the weights are."""
        self._device = None

    @torch.no_grad()
    def encode_token_weights(self, tokens: Mapping[str, list[Chunk]]) -> tuple[Tensor, None]:
        """Chunks under `key` to context [1, N, C]; SD1.x and SD2.x read no pooled vector."""
        asked = ask(self.encoder, tokens[self.key])
        device = next(self.parameters()).device if self._device is None else self._device
        cond = self.bridge(self.encoder(asked.ids.to(device), asked.masks.to(device)))
        rows, _ = asked.weights.apply(cond, tokenwise=self.bridge.tokenwise)
        return rows.float().to(management.intermediate_device()), None

    def load_sd(self, state: Mapping[str, Tensor]) -> Any:
        """Loads weights of its own layout."""
        return self.load_state_dict(state, strict=False)


class NativeWords:
    """The tokenizer of the host's CLIP protocol: the whole prompt is native, weights as in the host."""

    def __init__(self, encoder: Encoder, key: str) -> None:
        self._encoder = encoder
        self._key = key

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **options: Any
    ) -> dict[str, list[Chunk]]:
        """Windows of (id, weight[, word id]) under the key of the base."""
        spans = [(span.text, span.weight) for span in split(normalise(text).text)]
        if "embedding:" in text:
            logging.warning("Textual inversions have no effect on this checkpoint; the name is read as text.")
        chunks = cut(self._encoder, spans)
        if not return_word_ids:
            chunks = [[token[:2] for token in chunk] for chunk in chunks]
        return {self._key: chunks}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the tokenizer is not saved with the weights."""
        return {}


def open_checkpoint(path: Path, *, disable_dynamic: bool = False) -> tuple[Any, Any, Any]:
    """MODEL, CLIP, VAE of an AltDiffusion (m2, m9, m18) or Taiyi single file; BridgeError when it is none."""
    state: dict[str, Tensor] = comfy.utils.load_torch_file(str(path), safe_load=True)
    state = {key: value for key, value in state.items() if not key.startswith(AVERAGED)}
    text = {key: value for key, value in state.items() if key.startswith(TEXT)}
    family, spec, bridge_class, bridge_spec, method = _recognise(state, text, path.name)
    guard.require_finite(text, f"The text tower in {path.name} cannot be used.")
    words = _tokenizer(path, family, spec, method)
    ops, dtype = comfy.ops.manual_cast, tower_dtype()
    encoder = create_encoder(
        family.family,
        spec,
        words,
        identity=method.name,
        window=method.window,
        layer=method.layer,
        mask_rule=method.mask_rule,
        ops=ops,
        dtype=dtype,
    )
    _fill(encoder, family.adopt(text, spec), dtype)
    bridge = create(bridge_class.kind, bridge_spec, ops=ops, dtype=dtype)
    if bridge.state_dict():
        _fill(bridge, bridge_class.adopt(text, bridge_spec), dtype)

    rest = {key: value for key, value in state.items() if key not in text}
    model, _, vae, _ = comfy.sd.load_state_dict_guess_config(
        rest, output_clip=False, disable_dynamic=disable_dynamic
    )
    _speak_epsilon(model)
    clip: Any = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = NativeText(encoder, bridge, method.key)
    clip.tokenizer = NativeWords(encoder, method.key)
    clip.patcher = patcher_of(clip.cond_stage_model)
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.layer_idx, clip.apply_hooks_to_conds = None, None
    clip.use_clip_schedule, clip.tokenizer_options = False, {}
    for index, part in enumerate((model, clip.patcher)):
        part.cached_patcher_init = (_part, (path, index))
    return model, clip, vae


def _recognise(
    state: Mapping[str, Tensor], text: Mapping[str, Tensor], name: str
) -> tuple[type[Encoder], EncoderSpec, type[Bridge], Any, Method]:
    shapes = {key: tuple(value.shape) for key, value in text.items()}
    reader = next(
        (tuple(v.shape) for k, v in state.items() if k.startswith(UNET) and k.endswith("attn2.to_k.weight")),
        (0, 0),
    )
    try:
        family, spec = identify_encoder(shapes, {})
    except BridgeError as error:
        raise _other(name, str(error).splitlines()[0]) from error
    if family.family == "xlmr":
        bridge, bridge_spec = identify(shapes)
        norm = bool(getattr(bridge_spec, "norm", False))
        title = "altdiffusion-m18" if norm else "altdiffusion"
        method = Method(title, 77, "pad", -2 if norm else -1, "h" if norm else "l")
    elif family.family == "bert":
        bridge, bridge_spec = _identity(spec.width)
        method = Method("taiyi", 512, "none", -1, "l")
    else:
        raise _other(name, f"a text tower of the family {family.family}")
    if bridge_spec.context != reader[1]:
        raise _other(name, f"text rows of width {bridge_spec.context}, a U-Net that reads {reader[1]}")
    return family, spec, bridge, bridge_spec, method


def _identity(width: int) -> tuple[type[Bridge], Any]:
    bridge = create("identity", {"hidden": width, "context": width})
    return type(bridge), bridge.spec


def _other(name: str, found: str) -> BridgeError:
    return BridgeError(
        f"{name} is not a checkpoint of AltDiffusion or Taiyi (Chinese).",
        found,
        "a single file with U-Net, VAE, and XLM-R with AltDiffusion's head, or BERT, under cond_stage_model",
        "Open ordinary checkpoints with Load Checkpoint; convert other text towers with install.py convert.",
    )


def _fill(module: torch.nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    guard.fill(module, {f"text.{key}": value for key, value in weights.items()}, "text.", dtype, "checkpoint")


def _speak_epsilon(model: Any) -> None:
    """Every one of these was trained to say the noise; the host guesses by one late norm of SD2.x."""
    kind = comfy.model_base.ModelType.EPS
    if model.model.model_type != kind:
        model.model.model_type = kind
        model.model.model_sampling = comfy.model_base.model_sampling(model.model.model_config, kind)


def _tokenizer(path: Path, family: type[Encoder], spec: EncoderSpec, method: Method) -> bytes:
    """Tokenizer JSON for a checkpoint, which has none inside.

    From the published files in a folder beside it that is named like it, or from a converted tower of the
    same family and vocabulary in models/text_encoders.
    """
    beside = path.with_suffix("")
    files = {
        name: (beside / name).read_bytes()
        for name in TOKENIZER_FILES
        if (beside / name).is_file() and (beside / name).stat().st_size <= LARGEST_TOKENIZER_BYTES
    }
    if files:
        return family.tokenizer_from(files)
    for tower in _towers(family, spec, method):
        return tower
    raise BridgeError(
        f"The tokenizer of {path.name} is missing; such checkpoints do not hold one.",
        f"no folder {beside.name} with {' or '.join(TOKENIZER_FILES)}, and no tower to take it from",
        f"the tokenizer that its authors publish, family {family.family}, {spec.vocab} words",
        f"Make the folder {beside.name} beside the checkpoint and put the tokenizer file into it.",
    )


def _towers(family: type[Encoder], spec: EncoderSpec, method: Method) -> Iterator[bytes]:
    from safetensors import safe_open

    for path, header in folders.towers():
        # XLM-R has one vocabulary; BERT's 21,128 Chinese words exist in several orders.
        akin = family.family == "xlmr" or header.identity.startswith(method.name)
        if akin and header.family == family.family and header.spec.get("vocab") == spec.vocab:
            with safe_open(str(path), framework="pt") as file:
                yield file.get_tensor(TOKENIZER).numpy().tobytes()


def _part(path: Path, index: int, disable_dynamic: bool = False) -> Any:
    """Factory that the host calls to rebuild the model (0) or the text encoder's patcher (1) from a file."""
    model, clip, _ = open_checkpoint(path, disable_dynamic=disable_dynamic)
    return model if index == 0 else clip.patcher
