"""Where ComfyUI looks for models beside its own folder: the roots that extra_model_paths.yaml names.

The rules are those of ComfyUI's own reader: `base_path` may hold ~ and variables and is relative to the YAML
file, a value may have a path on each of its lines, `is_default` puts a root first, and the folders `unet` and
`clip` are old names of `diffusion_models` and `text_encoders`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from .errors import FetchError

FILE = "extra_model_paths.yaml"
"""Lies beside ComfyUI's main.py; others are named on its command line."""

OLD_NAMES = {"unet": "diffusion_models", "clip": "text_encoders"}
TWICE = {
    "text_encoders": ("text_encoders", "clip"),
    "diffusion_models": ("unet", "diffusion_models"),
    "controlnet": ("controlnet", "t2i_adapter"),
}
"""Folder of models -> its places below the models folder, where ComfyUI has two."""

LARGEST_BYTES = 1 << 20


def roots(
    folder: str, models: Path, *, tree: Path | None = None, files: Iterable[Path] = ()
) -> tuple[Path, ...]:
    """Every folder in which ComfyUI looks for files of one kind, in its order, whether it exists or not.

    folder: such as "text_encoders"; models: ComfyUI's models folder; tree: the folder of its main.py, whose
    extra_model_paths.yaml is read where there is one; files: further such files.

    Raises:
        FetchError: such a file cannot be read or understood.
    """
    folder = OLD_NAMES.get(folder, folder)
    found = [models / name for name in TWICE.get(folder, (folder,))]
    beside = [tree / FILE] if tree is not None and (tree / FILE).is_file() else []
    for file in (*beside, *files):
        for name, path, first in read(file):
            if name != folder:
                continue
            if first and path in found:
                found.remove(path)
            if path not in found:
                found.insert(0 if first else len(found), path)
    return tuple(found)


def read(file: Path) -> tuple[tuple[str, Path, bool], ...]:
    """What an extra_model_paths.yaml adds, in its order: (folder, path, whether it comes first).

    Raises:
        FetchError: it cannot be read, is not YAML, or not of the form that ComfyUI reads.
    """
    try:
        import yaml
    except ImportError as error:
        raise FetchError(
            f"{file.name} cannot be read.",
            "this Python has no PyYAML, which ComfyUI requires",
            "the Python that ComfyUI runs in",
            "Run the command with that one.",
        ) from error
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST_BYTES + 1)
        if len(text) > LARGEST_BYTES:
            raise _unclear(file, f"more than {LARGEST_BYTES} bytes")
        content: object = yaml.safe_load(text.decode("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise _unclear(file, " ".join(str(error).split())[:200]) from error
    if content is None:
        return ()
    here = Path(os.path.abspath(file)).parent
    found: list[tuple[str, Path, bool]] = []
    for name, section in _table(content, file, "the whole file").items():
        if section is not None:
            found += _section(_table(section, file, repr(name)[:80]), here, file)
    return tuple(found)


def _section(table: Mapping[str, object], here: Path, file: Path) -> list[tuple[str, Path, bool]]:
    base = here
    if "base_path" in table:
        base = here / os.path.expandvars(os.path.expanduser(_text(table["base_path"], file, "base_path")))
    first = bool(table.get("is_default", False))
    return [
        (OLD_NAMES.get(name, name), Path(os.path.normpath(base / line)), first)
        for name, lines in table.items()
        if name not in ("base_path", "is_default")
        for line in _text(lines, file, repr(name)[:80]).split("\n")
        if line
    ]


def _table(value: object, file: Path, place: str) -> Mapping[str, object]:
    kind = type(value).__name__
    if isinstance(value, dict):
        table = cast("dict[object, object]", value)
        if all(isinstance(name, str) for name in table):
            return cast("dict[str, object]", table)
    raise _unclear(file, f"{place} is {kind}, not names with values")


def _text(value: object, file: Path, place: str) -> str:
    if isinstance(value, str):
        return value
    raise _unclear(file, f"{place} is {type(value).__name__}, not a path")


def _unclear(file: Path, found: str) -> FetchError:
    return FetchError(
        f"{file.name} cannot be understood.",
        found,
        "names of model folders with their paths, as in ComfyUI's extra_model_paths.yaml.example",
        "Mend the file; ComfyUI itself does not start with it either.",
    )
