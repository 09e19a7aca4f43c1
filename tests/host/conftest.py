"""A folder of small models for the in-process host, and each tiny checkpoint loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import folder_paths
import pytest

from language_bridge.host import bridging
from language_bridge.host.cache import EMBEDDINGS
from language_bridge.tests.fixtures.checkpoints import (
    FAMILIES,
    POCKET,
    write_checkpoint,
    write_controlnet,
    write_embedding,
    write_lora,
)
from language_bridge.tests.fixtures.graph import Checkpoint, open_cut
from language_bridge.tests.fixtures.towers import write_all


@pytest.fixture(autouse=True)
def nothing_said_before() -> None:
    """Every test begins with an empty embedding cache, and with towers of its own."""
    EMBEDDINGS.clear()
    bridging.TOWERS.clear()
    bridging.PARTS.clear()
    bridging.BRANCHES.clear()


FOLDERS = ("checkpoints", "controlnet", "embeddings", "language_bridges", "loras", "text_encoders")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A models folder in the place of the host's: bridges, towers, LoRAs, embeddings and a ControlNet."""
    root = tmp_path_factory.mktemp("models")
    before = dict(folder_paths.folder_names_and_paths)
    for name in FOLDERS:
        (root / name).mkdir()
        folder_paths.folder_names_and_paths[name] = ([str(root / name)], {".safetensors", ".ckpt"})
    folder_paths.folder_names_and_paths["language_bridges"][1].discard(".ckpt")
    write_all(root / "language_bridges", root / "text_encoders")
    for name, family in FAMILIES.items():
        write_lora(root / "loras" / f"{name}.safetensors", family)
        write_lora(root / "loras" / f"{name}-other.safetensors", family, seed=20)
        write_embedding(root / "embeddings" / f"{name}-word.safetensors", family)
    write_lora(root / "loras" / "pocket.safetensors", POCKET)
    write_embedding(root / "embeddings" / "pocket-word.safetensors", POCKET)
    write_controlnet(root / "controlnet" / "sd1.ckpt", FAMILIES["sd1"])
    yield root
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(before)


@pytest.fixture(scope="session")
def load(models: Path) -> Callable[..., Checkpoint]:
    """Loads a tiny checkpoint with cut towers; the same one again when it was loaded before."""
    loaded: dict[tuple[str, int], Checkpoint] = {}

    def open_checkpoint(name: str, seed: int = 0) -> Checkpoint:
        if (name, seed) not in loaded:
            path = models / "checkpoints" / f"{name}-cut-{seed}.ckpt"
            write_checkpoint(path, FAMILIES[name], cut=True, seed=seed)
            loaded[name, seed] = Checkpoint(name, *open_cut(path, name))
        return loaded[name, seed]

    return open_checkpoint


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, load: Callable[..., Checkpoint]) -> Checkpoint:
    """Each base in turn."""
    return load(request.param)


@pytest.fixture(scope="session")
def sd1(load: Callable[..., Checkpoint]) -> Checkpoint:
    """The tiny SD1.5 checkpoint."""
    return load("sd1")


@pytest.fixture(scope="session")
def sdxl(load: Callable[..., Checkpoint]) -> Checkpoint:
    """The tiny SDXL checkpoint."""
    return load("sdxl")
