"""Model folders, shards and a tower for training without ComfyUI, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from language_bridge.encoders.file import save_encoder
from language_bridge.tests.fixtures.towers import tiny_tower

from . import toys


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: `sd1` and `xl` in diffusers' layout, `tower.safetensors`, and `shards`."""
    folder = tmp_path_factory.mktemp("small")
    toys.write_model(folder / "sd1", context=768)
    toys.write_model(folder / "xl", xl=True)
    save_encoder(folder / "tower.safetensors", tiny_tower(window=toys.WINDOW), languages=("zh",))
    toys.write_shards(folder / "shards", (7, 5, 6))
    return folder
