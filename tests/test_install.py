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


def test_it_imports_the_standard_library_alone_until_something_is_converted(checkout: Path) -> None:
    tree = ast.parse((checkout / "install.py").read_text(encoding="utf-8"))
    late = {
        inner
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "convert"
        for inner in ast.walk(node)
    }
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and not getattr(node, "level", 0)
        and node not in late
    }
    assert roots <= set(sys.stdlib_module_names) | {"manifest"}


# -- convert -------------------------------------------------------------------------------------------


def convert(comfyui: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `install.py convert` as a user types it, with the libraries that ComfyUI has."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COMFYUI"))}
    return subprocess.run(
        [sys.executable, "install.py", "convert", *map(str, arguments)],
        cwd=comfyui / "custom_nodes" / "language-bridge",
        env=kept | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def pea_p2(path: Path) -> Path:
    """OPPOer/PEA-Diffusion's pytorch_model.bin in layout and size, random in its numbers."""
    import torch

    from language_bridge.tests.conversion.layouts import pea, random, save

    shapes = pea("P2", hidden=1024, width=1024, pooled=1280, context=2048)
    return save(path, random(shapes, dtype=torch.float16))


def test_convert_without_torch_says_which_python_to_take(comfyui: Path) -> None:
    done = install(comfyui, "convert", "x.bin")
    assert done.returncode == 1
    assert "Python that ComfyUI runs in" in done.stdout


def test_convert_writes_where_comfyui_looks(comfyui: Path, tmp_path: Path) -> None:
    from language_bridge.bridges.file import read_header

    source = pea_p2(tmp_path / "pytorch_model.bin")
    done = convert(comfyui, source)
    assert done.returncode == 1
    assert "found: pea-sdxl-xlm-roberta, pea-sdxl-chinese-clip" in done.stderr
    assert not (comfyui / "models").exists()
    done = convert(comfyui, source, "--as", "pea-sdxl-xlm-roberta")
    assert done.returncode == 0, done.stderr
    path = comfyui / "models" / "language_bridges" / "pea-sdxl-xlm-roberta.safetensors"
    assert str(path) in done.stdout and "was not among the files" in done.stdout
    header = read_header(path)
    assert header is not None and header.encoder.identity == "open-clip-xlm-roberta-large-vit-h-14"


def test_convert_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from language_bridge import install as script

    source, out = pea_p2(tmp_path / "pytorch_model.bin"), tmp_path / "out"
    arguments = ["convert", str(source), "--out", str(out), "--as", "pea-sdxl-chinese-clip"]
    assert script.main([*arguments, "--name", "mine"]) == 0
    assert (out / "mine.safetensors").is_file()
    assert script.main([*arguments, "--name", "mine"]) == 1
    assert "already" in capsys.readouterr().err
    assert script.main([*arguments, "--name", "mine", "--force"]) == 0
    source.write_bytes(b"<html>")
    assert script.main(arguments) == 1
    assert "web page" in capsys.readouterr().err
    assert script.main(["convert"]) == 2
    assert script.main(["convert", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "pea-sdxl-xlm-roberta" in listed and "altdiffusion-m18" in listed
    with pytest.raises(SystemExit):
        script.main(["convert", "x", "--unet", "all"])


def test_convert_takes_a_table_of_ones_own(tmp_path: Path) -> None:
    import json

    from language_bridge import install as script
    from language_bridge.tests.conversion.layouts import pea, random, save

    tower = {"name": "t", "family": "bert", "match": {"width": 16}, "window": 8, "mask_rule": "pad"}
    method = {"name": "m", "base": "sd1", "kind": "mlp", "match": {"hidden": 16}, "tower": "t"}
    table = tmp_path / "mine.json"
    table.write_text(json.dumps({"format": 1, "towers": [tower], "methods": [method]}), encoding="utf-8")
    source = save(tmp_path / "x.bin", random(pea("P3")))
    assert script.main(["convert", str(source), "--out", str(tmp_path), "--presets", str(table)]) == 0
    assert (tmp_path / "m.safetensors").is_file()
    table.write_text("{", encoding="utf-8")
    assert script.main(["convert", str(source), "--out", str(tmp_path), "--presets", str(table)]) == 1
