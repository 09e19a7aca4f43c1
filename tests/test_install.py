"""install.py as ComfyUI-Manager runs it: a bare interpreter in the pack's folder, nothing installed."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from language_bridge.harness.server import install_pack


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder that looks like a ComfyUI and holds the shipped files of the pack."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").write_text("", encoding="utf-8")
    (tmp_path / "comfyui_version.py").write_text('__version__ = "9.8.7"\n', encoding="utf-8")
    install_pack(tmp_path)
    return tmp_path


def install(comfyui: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run install.py without site-packages (-I would also drop the script's own folder, so -S -s -E)."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COMFYUI"))}
    return subprocess.run(
        [sys.executable, "-S", "-s", "-E", "install.py", *arguments],
        cwd=comfyui / "custom_nodes" / "language-bridge",
        env=kept | variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_without_argument_it_prepares_the_model_folder(comfyui: Path) -> None:
    done = install(comfyui)
    assert done.returncode == 0, done.stderr
    assert (comfyui / "models" / "language_bridges").is_dir()
    assert str(comfyui / "models" / "language_bridges") in done.stdout
    assert install(comfyui).returncode == 0


def test_outside_of_a_comfyui_it_makes_nothing_and_says_so(comfyui: Path, tmp_path: Path) -> None:
    (comfyui / "main.py").unlink()
    done = install(comfyui)
    assert done.returncode == 0
    assert "COMFYUI_PATH" in done.stdout
    assert not (comfyui / "models").exists()


def test_comfyui_path_is_honoured(comfyui: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "comfy").mkdir(parents=True)
    shutil.copy(comfyui / "main.py", other)
    assert install(comfyui, COMFYUI_PATH=str(other)).returncode == 0
    assert (other / "models" / "language_bridges").is_dir()


def test_verify_passes_on_the_shipped_files_and_names_a_damaged_one(comfyui: Path) -> None:
    assert install(comfyui, "verify").returncode == 0
    asset = next((comfyui / "custom_nodes" / "language-bridge" / "pocket" / "assets").rglob("*.safetensors"))
    asset.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    done = install(comfyui, "verify")
    assert done.returncode == 1
    assert asset.name in done.stdout


def test_list_names_every_entry(comfyui: Path, checkout: Path) -> None:
    from language_bridge.manifest.schema import parse

    done = install(comfyui, "list")
    entries = parse((checkout / "weights_manifest.json").read_text(encoding="utf-8")).entries
    assert [line.split()[0] for line in done.stdout.splitlines()] == [entry.name for entry in entries]


def test_doctor_finds_the_host_and_says_what_is_missing(comfyui: Path) -> None:
    done = install(comfyui, "doctor")
    assert "9.8.7" in done.stdout
    assert "torch" in done.stdout
    assert done.returncode == 1, "without site-packages torch is missing, and that is an error"


@pytest.mark.parametrize("command", ["demo", "test"])
def test_demo_and_test_only_say_what_to_type(comfyui: Path, command: str) -> None:
    done = install(comfyui, command)
    assert done.returncode == 0
    assert f"bootstrap.py {command}" in done.stdout


def test_an_unknown_command_is_refused(comfyui: Path) -> None:
    assert install(comfyui, "remove").returncode == 2
    assert install(comfyui, "list", "more").returncode == 2


def test_it_imports_the_standard_library_alone(checkout: Path) -> None:
    tree = ast.parse((checkout / "install.py").read_text(encoding="utf-8"))
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
    }
    assert roots <= set(sys.stdlib_module_names) | {"manifest"}
