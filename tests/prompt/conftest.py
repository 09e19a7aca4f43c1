"""Runs the laws of prompt/ beside the text grammar of the real ComfyUI, which is their oracle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

# For whatever does not say it itself: the same cases each time, and no hurry on a busy machine.
settings.register_profile("steady", deadline=None, derandomize=True, database=None, max_examples=200)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def grammar_of_the_host() -> Any:
    """The module of ComfyUI that reads weights, escapes and embeddings."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sd1_clip

    return comfy.sd1_clip


@pytest.fixture(scope="session")
def stock_tokenizer(grammar_of_the_host: Any) -> Any:
    """The tokenizer of CLIP as ComfyUI makes it, with no folder of embeddings."""
    return grammar_of_the_host.SDTokenizer(embedding_directory=[])
