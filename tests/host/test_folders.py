"""Bridges and towers are found where the host keeps models, and nothing else is listed."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import folder_paths
import pytest

from language_bridge.bridges.file import BridgeHeader
from language_bridge.encoders import guard
from language_bridge.encoders.ledger import REST_NS, Ledger
from language_bridge.host import bridging, folders
from language_bridge.host.cache import EMBEDDINGS
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import encode, same


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[str], set[str]]]:
    """The host's list of model folders, as a copy."""
    copy = {
        name: (list(paths), set(suffixes))
        for name, (paths, suffixes) in folder_paths.folder_names_and_paths.items()
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", copy)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return copy


def test_register_adds_the_users_folder_and_the_packs_own(
    registry: dict, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    registry.pop("language_bridges", None)
    folders.register()
    folders.register()
    paths, suffixes = registry["language_bridges"]
    assert paths[0] == str(tmp_path / "language_bridges")
    assert [Path(path).parts[-3:] for path in paths[1:]] == [("pocket", "assets", "bridges")]
    assert suffixes == {".safetensors"}


def test_register_keeps_folders_of_extra_model_paths(registry: dict, tmp_path: Path) -> None:
    registry["language_bridges"] = ([str(tmp_path)], set())
    folders.register()
    paths, suffixes = registry["language_bridges"]
    assert paths[0] == str(tmp_path) and len(paths) == 3 and suffixes == {".safetensors"}


def test_only_safetensors_files_are_listed_and_folders_below_are(
    registry: dict, models: Path, tmp_path: Path
) -> None:
    registry["language_bridges"] = ([str(tmp_path)], set())
    folders.register()
    (tmp_path / "sub").mkdir()
    for name in ("note.txt", "weights.ckpt", ".sd1.safetensors.123.language-bridge.tmp"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    shutil.copy(models / "language_bridges" / "mlp-sd1.safetensors", tmp_path / "sub" / "mine.safetensors")
    listed = str(Path("sub") / "mine.safetensors")
    assert listed in folders.bridge_names()
    assert not {name for name in folders.bridge_names() if not name.endswith(".safetensors")}
    assert folders.bridge_path(listed) == tmp_path / "sub" / "mine.safetensors"
    header = folders.bridge_header(folders.bridge_path(listed))
    assert isinstance(header, BridgeHeader) and header.base == "sd1" and header.kind == "mlp"


def test_a_header_is_read_again_when_the_tower_file_changes(
    models: Path, tmp_path: Path, registry: dict
) -> None:
    from language_bridge.encoders.file import save_encoder
    from language_bridge.tests.fixtures.towers import reference, tiny_tower

    registry["text_encoders"] = ([str(tmp_path)], {".safetensors"})
    first, second = tiny_tower("first-zh"), tiny_tower("second-zh")
    path = tmp_path / "tower.safetensors"
    save_encoder(path, first)
    assert folders.encoder_path(reference(first), "any") == path
    save_encoder(path, second)
    assert folders.encoder_path(reference(second), "any") == path
    with pytest.raises(ValueError, match="first-zh"):
        folders.encoder_path(reference(first), "any")


def test_a_tower_of_the_same_name_and_another_training_is_refused(
    models: Path, tmp_path: Path, registry: dict
) -> None:
    from language_bridge.encoders.file import save_encoder
    from language_bridge.tests.fixtures.towers import reference, tiny_tower

    registry["text_encoders"] = ([str(tmp_path)], {".safetensors"})
    trained, other = tiny_tower("same-zh", seed=1), tiny_tower("same-zh", seed=2)
    path = tmp_path / "tower.safetensors"
    wanted = dataclasses.replace(reference(trained), digest=save_encoder(path, trained).digest)
    assert folders.encoder_path(wanted, "any") == path
    save_encoder(path, other)
    with pytest.raises(ValueError, match="not the one that the bridge any was trained with"):
        folders.encoder_path(wanted, "any")
    save_encoder(tmp_path / "right.safetensors", trained)
    assert folders.encoder_path(wanted, "any") == tmp_path / "right.safetensors"


def test_a_tower_inside_a_bridge_belongs_to_that_bridge_alone(
    models: Path, tmp_path: Path, registry: dict
) -> None:
    from language_bridge.tests.fixtures.towers import reference, tiny_bridge, tiny_tower, write_bridge

    tower = tiny_tower("inside-zh")
    registry["language_bridges"] = ([str(tmp_path)], {".safetensors"})
    bridge = tiny_bridge("mlp", "sd1", tower)
    own = write_bridge(tmp_path / "own.safetensors", "sd1", bridge, tower, inside=True)
    assert folders.files_of("own.safetensors") == [own]
    with pytest.raises(ValueError, match="inside-zh"):
        folders.encoder_path(reference(tower), "any")


def test_the_ledger_lies_where_no_request_over_http_reaches(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    ledger = folders.ledger()
    place = ledger.path.relative_to(tmp_path)
    assert place.parts[0].startswith(folder_paths.SYSTEM_USER_PREFIX)
    assert folder_paths.get_public_user_directory(place.parts[0]) is None
    assert folders.ledger() is ledger
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "other"))
    assert folders.ledger().path == tmp_path / "other" / place


def test_the_node_verifies_a_file_once(
    sd1: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "verified.json", clock=lambda: time.time_ns() + 2 * REST_NS)
    monkeypatch.setattr(folders, "ledger", lambda: ledger)
    hashed: list[str] = []
    take = guard._hash
    monkeypatch.setattr(guard, "_hash", lambda up, name, t: (hashed.append(name), take(up, name, t))[1])
    said = []
    for again in (False, True):
        bridging.TOWERS.clear()
        EMBEDDINGS.clear()
        hashed.clear()
        said.append(encode(bridged(sd1)[1], "\u7ea2\u8272\u7684\u732b"))
        assert bool(hashed) != again
    assert same(*said)
