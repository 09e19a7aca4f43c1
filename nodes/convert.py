"""The node that turns downloaded weights into files of Language Bridge, inside of the model folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..bridges.errors import BridgeError
from ..conversion.containers import PICKLES, SAFETENSORS, TOKENIZER_FILES
from ..conversion.presets import published
from ..host import folders

CATEGORIES = ("text_encoders", "checkpoints", "controlnet", folders.FOLDER)
NOTHING = "none"
BESIDE = "beside the source"
RECOGNISE = "recognise"
UNETS = ["auto", "none", "kv", "attn2", "full"]
FORMS = ["replace", "delta"]
PRECISIONS = ["as published", "float16"]

_MODEL_PARTS = ("text_encoder", "text_encoder_adapter", "unet", "unet_ema", "vae", "safety_checker")
_MODEL_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "open_clip_pytorch_model")


class Convert(io.ComfyNode):
    """Published weights in, a bridge and a text tower out; the graph gets the report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Everything is chosen from lists of what lies in the model folders."""
        sources = source_names()
        return io.Schema(
            node_id="LanguageBridgeConvert",
            display_name="Language Bridge Convert",
            category="Language Bridge",
            description="Makes downloaded weights of a published method into files that the Language Bridge "
            "node can choose. Needed once for each download.",
            search_aliases=[
                "import bridge",
                "AltDiffusion",
                "Taiyi",
                "PEA-Diffusion",
                "Chinese-CLIP",
                "ELLA",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input("source", options=sources, tooltip="The downloaded file or model folder."),
                io.Combo.Input(
                    "together_with",
                    options=[NOTHING, *sources],
                    default=NOTHING,
                    tooltip="A second download of the same method, such as the text encoder of an adapter.",
                ),
                io.Combo.Input(
                    "tokenizer",
                    options=[BESIDE, *tokenizer_names()],
                    default=BESIDE,
                    tooltip="The folder with vocab.txt, tokenizer.json or sentencepiece.bpe.model, where it "
                    "is not part of the source.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[RECOGNISE, *preset_names()],
                    default=RECOGNISE,
                    tooltip="Which published model it is. Only needed when several look alike.",
                ),
                io.Combo.Input(
                    "reference",
                    options=[NOTHING, *sources],
                    default=NOTHING,
                    tooltip="For AltDiffusion: the SD 1.4 checkpoint that its U-Net was trained from.",
                ),
                io.Combo.Input(
                    "unet",
                    options=UNETS,
                    default=UNETS[0],
                    tooltip="What the bridge takes from the U-Net; auto is what the method asks for.",
                ),
                io.Combo.Input(
                    "form",
                    options=FORMS,
                    default=FORMS[0],
                    tooltip="replace: the published weights. delta: their difference from the reference.",
                ),
                io.Combo.Input(
                    "precision",
                    options=PRECISIONS,
                    default=PRECISIONS[0],
                    tooltip="float16 halves the files of models published in float32.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace files of the same name from an earlier run."
                ),
                io.Combo.Input(
                    "and_with",
                    options=[NOTHING, *sources],
                    default=NOTHING,
                    optional=True,
                    tooltip="A third download: the other text encoder of a method that reads two.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="What was written, and what to know about it.")],
        )

    @classmethod
    def fingerprint_inputs(cls, source: str, **others: object) -> str:
        """A download that was replaced is converted again."""
        stamps: list[str] = []
        for name in (source, *(value for value in others.values() if isinstance(value, str))):
            place = _places().get(name)
            if place is not None and place.exists():
                stamps.append(f"{name} {place.stat().st_mtime_ns}")
        return "; ".join(stamps)

    @classmethod
    def execute(
        cls,
        source: str,
        together_with: str,
        tokenizer: str,
        preset: str,
        reference: str,
        unet: str,
        form: str,
        precision: str,
        overwrite: bool,
        and_with: str = NOTHING,
    ) -> io.NodeOutput:
        """Looks every name up in the lists again, because a linked text was never compared with them."""
        import torch

        from ..conversion.convert import convert, report

        paths = [_listed(source)]
        paths += [_listed(name) for name in (together_with, and_with) if name != NOTHING]
        if tokenizer != BESIDE:
            paths += _tokenizer_files(tokenizer)
        if precision not in PRECISIONS or preset not in (RECOGNISE, *preset_names()):
            raise _unknown(f"{precision}, {preset}")
        written = convert(
            paths,
            _first_folder(folders.FOLDER),
            towers=_first_folder("text_encoders"),
            preset=None if preset == RECOGNISE else preset,
            reference=None if reference == NOTHING else _listed(reference),
            unet=unet,
            form=form,
            dtype=torch.float16 if precision == PRECISIONS[1] else None,
            overwrite=bool(overwrite),
        )
        text = "\n".join(report(written))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def preset_names() -> list[str]:
    """Names of the table, methods first, each once."""
    return list(dict.fromkeys([*published().methods, *published().towers]))


def source_names() -> list[str]:
    """Every weight file and model folder that can be chosen, as "category/name"."""
    return sorted(_places())


def _places() -> dict[str, Path]:
    """Name -> path of what lies in the model folders; folders are known by the files in them."""
    places: dict[str, Path] = {}
    for category in CATEGORIES:
        for name in folder_paths.get_filename_list(category):
            path = folder_paths.get_full_path(category, name)
            if path is None or not name.lower().endswith((SAFETENSORS, *PICKLES)):
                continue
            plain = name.replace("\\", "/")
            places[f"{category}/{plain}"] = Path(path)
            inside = Path(plain).parent
            if Path(plain).name.split(".")[0].split("-0")[0] in _MODEL_STEMS and inside.parts:
                model = inside.parent if inside.name in _MODEL_PARTS and len(inside.parts) > 1 else inside
                up = len(Path(plain).parts) - len(model.parts)
                places[f"{category}/{model.as_posix()}/"] = Path(path).parents[up - 1]
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder in _subfolders(Path(root), 1):
            if (folder / "model_index.json").is_file():
                places[f"diffusers/{folder.name}/"] = folder
    return places


def tokenizer_names() -> list[str]:
    """Folders of the text encoders that hold tokenizer files, as "text_encoders/name"."""
    return sorted(_tokenizer_folders())


def _tokenizer_folders() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths("text_encoders")):
        for folder in _subfolders(root, 3):
            if any((folder / file).is_file() for file in TOKENIZER_FILES):
                found.setdefault(f"text_encoders/{folder.relative_to(root).as_posix()}", folder)
    return found


def _tokenizer_files(name: str) -> list[Path]:
    folder = _tokenizer_folders().get(name)
    if folder is None:
        raise _unknown(name)
    return [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]


def _subfolders(root: Path, depth: int) -> Iterator[Path]:
    try:
        inner = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        return
    for path in map(Path, inner):
        yield path
        if depth > 1:
            yield from _subfolders(path, depth - 1)


def _listed(name: str) -> Path:
    place = _places().get(name)
    if place is None:
        raise _unknown(name)
    return place


def _first_folder(category: str) -> Path:
    return Path(folder_paths.get_folder_paths(category)[0])


def _unknown(name: str) -> BridgeError:
    return BridgeError(
        "The choice is not in the list of this node.",
        repr(name)[:120],
        "a file or folder below models/text_encoders, models/checkpoints, models/controlnet, "
        f"models/diffusers or models/{folders.FOLDER}",
        "Put the download there, press R in the browser to refresh, and choose it again.",
    )
