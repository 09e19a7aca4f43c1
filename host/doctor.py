"""What the doctor has to know of the host: versions, devices, number formats, model folders."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

import folder_paths
from comfyui_version import __version__ as comfyui_version

PACK = Path(__file__).resolve().parent.parent
SHIPPED = PACK / "pocket"
"""What comes with the pack; it is checked by its manifest."""
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "comfyui-frontend-package")


def versions() -> list[tuple[str, str]]:
    """Name and version of what the pack runs on, "-" where it is not installed."""
    return [
        ("Python", sys.version.split()[0]),
        ("ComfyUI", comfyui_version),
        *((name, _version(name)) for name in LIBRARIES),
    ]


def choices() -> list[tuple[str, str]]:
    """What the host chose: devices of the towers, at work and at rest, and the number formats."""
    import comfy.model_management as management  # late: it looks for devices

    from .tower import tower_dtype

    device = management.get_torch_device()
    return [
        ("device", str(management.get_torch_device_name(device))),
        ("offload", str(management.text_encoder_offload_device())),
        ("tower", f"{management.text_encoder_device()}, {str(tower_dtype()).removeprefix('torch.')}"),
        ("unet", str(management.unet_dtype()).removeprefix("torch.")),
    ]


def roots(categories: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """The model folders of each category in the host's order, without what ships with the pack."""
    known = folder_paths.folder_names_and_paths
    found = {name: map(Path, known[name][0]) for name in categories if name in known}
    return {
        name: tuple(path for path in paths if SHIPPED not in path.parents) for name, paths in found.items()
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"
