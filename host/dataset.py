"""Finds training data in the host's folders, and turns the host's own lists of data into a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ..bridges.errors import BridgeError
from ..training.dataset import (
    LIST_SUFFIXES,
    Dataset,
    Problem,
    fingerprint,
    from_lists,
    read_folder,
    read_pairs,
)
from .language import Words

INPUT, DATASETS = "input", "datasets"
POOLED = "pooled_output"
MOST_PROBLEMS = 200
"""Problems that a report lists; what is beyond them is counted."""


def names() -> list[str]:
    """Folders and lists below ComfyUI's input folder, and below its `datasets` folders where it has any.

    A name begins with `input/` or `datasets/`. Hidden folders and links are passed over, as is what lies in
    the folder `input` itself.
    """
    return list(dict.fromkeys(name for name, _ in _found()))


def place_of(name: str) -> Path:
    """The folder or file of a name; only names that `names` lists are accepted, so none leads elsewhere."""
    known: dict[str, Path] = {}
    for each, path in _found():
        known.setdefault(each, path)
    if name not in known:
        raise BridgeError(
            f"There is no dataset called {name!r:.120}.",
            f"{len(known)} datasets: {', '.join(list(known)[:8]) or 'none'}",
            "a folder, or a .tsv, .csv or .jsonl file, below ComfyUI's folder input",
            "Put it there, press R in the browser to refresh, and choose it again.",
        )
    return known[name]


def open_dataset(name: str, language: str) -> Dataset:
    """Reads what a name stands for; BridgeError when nothing is usable."""
    import comfy.model_management

    place = place_of(name)
    poll = comfy.model_management.throw_exception_if_processing_interrupted
    return read_folder(place, language, poll) if place.is_dir() else read_pairs(place, language, poll)


def state_of(name: str) -> str:
    """What changes when the files behind a name do."""
    try:
        return fingerprint(place_of(name))
    except (BridgeError, OSError):
        return name  # running it says what is wrong


def _found() -> Iterator[tuple[str, Path]]:
    roots = [(INPUT, folder_paths.get_input_directory())]
    known: Any = folder_paths.folder_names_and_paths.get(DATASETS, ([], set()))[0]
    roots += [(DATASETS, root) for root in known]
    for label, root in roots:
        listed: list[tuple[str, Path]] = []
        for folder, below, files in os.walk(root):
            # A link to a folder is listed among the folders and never walked into.
            below[:] = [each for each in below if not each.startswith(".")]
            here = os.path.relpath(folder, root).replace(os.sep, "/")
            prefix = f"{label}/" if here == "." else f"{label}/{here}/"
            if here != ".":
                listed.append((f"{label}/{here}", Path(folder)))
            for file in files:
                path = Path(folder, file)
                suffix = path.suffix.lower()
                if suffix in LIST_SUFFIXES and not file.startswith(".") and not path.is_symlink():
                    listed.append((prefix + file, path))
        yield from sorted(listed)


def lines(dataset: Dataset, say: Words) -> Iterator[str]:
    """The report: what is there, and what is wrong by file name."""
    examples = dataset.examples
    pictures = sum(example.picture is not None or example.latent is not None for example in examples)
    alone = sum(example.native_only for example in examples)
    language = say("dataset_any_language") if dataset.language == "any" else dataset.language
    yield say("dataset_head", name=dataset.name, count=len(examples), language=language)
    yield say("dataset_pictures", count=pictures) if pictures else say("dataset_pairs")
    yield say("dataset_english", both=len(examples) - alone, alone=alone)
    if not dataset.problems:
        yield say("dataset_no_problems")
        return
    yield ""
    yield say("dataset_problems", count=len(dataset.problems))
    for problem in dataset.problems[:MOST_PROBLEMS]:
        yield f"  {problem.place}: {_what(problem, say)}"
    if len(dataset.problems) > MOST_PROBLEMS:
        yield say("dataset_more", count=len(dataset.problems) - MOST_PROBLEMS)


def _what(problem: Problem, say: Words) -> str:
    return say(f"dataset_problem_{problem.kind}", found=problem.found)


# -- the host's own lists --------------------------------------------------------------------------


def collect(
    natives: Sequence[str],
    english: Sequence[str],
    images: Sequence[Tensor],
    latents: Sequence[dict[str, Any]],
    conditioning: Sequence[list[Any]],
    language: str,
) -> Dataset:
    """A dataset of the lists that ComfyUI's dataset nodes give; an empty list is one that was not connected.

    images: each [B, H, W, C]. latents: each with samples [B, C, h, w]. conditioning: each one text of the
    checkpoint's own CLIP. Batches are taken apart. BridgeError when lists do not fit together.
    """
    rows, pooled = _rows(conditioning)
    return from_lists(
        natives,
        english,
        pictures=[frame for image in images for frame in _batch(image, "image")],
        latents=[one for latent in latents for one in _batch(latent.get("samples"), "latent")],
        rows=rows,
        pooled=pooled,
        language=language,
    )


def _batch(value: Any, noun: str) -> Iterator[Tensor]:
    """The entries of a batch with four dimensions."""
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise BridgeError(
            f"This {noun} cannot be trained on.",
            found,
            "a batch of pictures"
            if noun == "image"
            else "latents of pictures, [batch, channels, height, width]",
            "Connect the lists of ComfyUI's dataset nodes for pictures.",
        )
    yield from value


def _rows(conditioning: Sequence[list[Any]]) -> tuple[list[Tensor], list[Tensor | None]]:
    """English rows [N, C] and pooled vectors [P] or none."""
    rows: list[Tensor] = []
    pooled: list[Tensor | None] = []
    for number, entries in enumerate(conditioning, 1):
        odd = [f"{len(entries)} entries"] if len(entries) != 1 else []
        if not odd:
            context, more = entries[0]
            odd = [f"the entry {key!r}" for key, value in more.items() if key != POOLED and value is not None]
            if not odd and (not isinstance(context, torch.Tensor) or context.ndim != 3 or len(context) != 1):
                odd = [f"rows of shape {list(getattr(context, 'shape', ()))}"]
        if odd:
            raise BridgeError(
                f"Conditioning {number} is not the plain English text of one picture.",
                ", ".join(odd),
                "what CLIP Text Encode or Make Training Dataset gives for one English text",
                "Encode the English texts with the checkpoint's own CLIP, without a bridge, hooks or areas.",
            )
        context, more = entries[0]
        vector = more.get(POOLED)
        rows.append(context[0])
        pooled.append(None if vector is None else vector.reshape(-1))
    return rows, pooled
