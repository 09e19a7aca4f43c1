"""install.py as ComfyUI-Manager runs it: a bare interpreter in the pack's folder, nothing installed."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from language_bridge.harness.server import install_pack
from language_bridge.tests.fixtures.offers import pea_p2

if TYPE_CHECKING:
    from language_bridge.manifest.schema import Manifest, RemoteFile
    from language_bridge.tests.manifest.hub import Hub, LoopbackWire, Request


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
    manifest = parse((checkout / "weights_manifest.json").read_text(encoding="utf-8"))
    names = [item.name for item in (*manifest.entries, *manifest.published)]
    assert [line.split()[0] for line in done.stdout.splitlines()] == names


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
        if isinstance(node, ast.FunctionDef) and node.name in ("_room", "_reports", "_device")
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


# -- get, verify, pin ----------------------------------------------------------------------------------


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """A hub on this machine that has PEA-Diffusion's adapter (random), and a manifest that names it."""
    from language_bridge.manifest import sources
    from language_bridge.manifest.schema import Conversion, Manifest, PublishedSet, RemoteFile
    from language_bridge.tests.manifest.hub import LoopbackWire, honest, running

    body = pea_p2(tmp_path / "source.bin").read_bytes()
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("LANGUAGE_BRIDGE_SOURCES", "hub")
    file = RemoteFile(
        "who/pea", "main", "pytorch_model.bin", len(body), sha256=hashlib.sha256(body).hexdigest()
    )
    card = "https://huggingface.co/who/pea"
    empty = (".", "sdxl", (), "MIT", "permissive", False, False, card)
    tower = PublishedSet("tower", *empty, (), (), None, "Fetch it from its page.")
    conversion = Conversion("pea-sdxl-chinese-clip", ("pytorch_model.bin",))
    adapter = PublishedSet("mine", *empty, ("tower",), (file,), conversion, "")
    with running(honest(body)) as hub:
        monkeypatch.setattr(sources, "HUB", hub.url("").rstrip("/"))
        yield Offer(Manifest((), (adapter, tower)), LoopbackWire({hub.host}), hub, tmp_path / "models", file)


@dataclass
class Offer:
    """What a test of get needs: manifest, connections, hub, models folder, the one file."""

    manifest: Manifest
    wire: LoopbackWire
    hub: Hub
    models: Path
    file: RemoteFile

    def get(self, *arguments: str) -> int:
        from language_bridge import install as script

        given = ["mine", "--models", str(self.models), *arguments]
        return script.get(given, manifest=self.manifest, wire=self.wire)


def test_get_fetches_checks_and_converts(offer: Offer, capsys: pytest.CaptureFixture[str]) -> None:
    from language_bridge.bridges.file import read_header
    from language_bridge.manifest.fetch import set_problems

    assert offer.get() == 0
    said = capsys.readouterr().out
    assert "verified" in said and "Not fetched: tower. Fetch it from its page." in said
    bridge = offer.models / "language_bridges" / "mine.safetensors"
    header = read_header(bridge)
    assert header is not None and header.name == "mine"
    fetched = offer.models / offer.file.place
    assert fetched.is_file() and "not needed any longer" in said
    assert offer.get() == 0 and "already" in capsys.readouterr().out and len(offer.hub.log) == 1
    fetched.unlink()
    assert not list(set_problems(offer.manifest, "mine", offer.models))
    bridge.write_bytes(bridge.read_bytes()[:-1] + b"?")
    assert offer.get("--clean") == 1, "another file lies there"
    assert "already" in capsys.readouterr().err
    assert offer.get("--clean", "--force") == 0
    assert not fetched.exists() and read_header(bridge) == header


def test_get_tells_what_is_wrong_and_writes_nothing(offer: Offer, capsys: pytest.CaptureFixture[str]) -> None:
    from language_bridge import install as script
    from language_bridge.tests.manifest.hub import honest

    assert script.get(["other", "--models", str(offer.models)], manifest=offer.manifest) == 1
    assert "one of mine, tower" in capsys.readouterr().err
    assert script.get(["tower", "--models", str(offer.models)], manifest=offer.manifest) == 1
    offer.hub.behave = honest(b"x" * offer.file.bytes)
    assert offer.get() == 1
    assert "instead of" in capsys.readouterr().err
    assert not [path for path in offer.models.rglob("*") if path.is_file()]


def test_get_may_fetch_without_converting(offer: Offer) -> None:
    assert offer.get("--no-convert") == 0
    assert [path.name for path in offer.models.rglob("*") if path.is_file()] == ["lock.json", offer.file.path]


def test_get_asks_for_the_reference_before_it_fetches(
    offer: Offer, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = offer.manifest.published
    assert first.conversion is not None
    compared = replace(first, conversion=replace(first.conversion, reference="SD 1.4"))
    offer.manifest = replace(offer.manifest, published=(compared, second))
    assert offer.get() == 1
    assert "--reference" in capsys.readouterr().err and not offer.hub.log
    assert offer.get("--no-convert") == 0


def test_doctor_asks_the_sources_only_when_told_to(offer: Offer, capsys: pytest.CaptureFixture[str]) -> None:
    from language_bridge import install as script
    from language_bridge.tests.manifest.hub import running

    with running(lambda request: None) as silent:
        asked = (("hub", offer.hub.url("")), ("mirror", silent.url("")), ("modelscope", "http://example.org"))
        wire = type(offer.wire)({*offer.wire.hosts, silent.host})
        script.doctor([], asked=asked, wire=wire)
        assert not offer.hub.log and "download source: hub http://127.0.0.1" in capsys.readouterr().out
        assert script.doctor(["--hosts"], asked=asked, wire=wire) == 1
    assert [request.method for request in offer.hub.log] == ["HEAD"]
    said = capsys.readouterr().out
    assert "answers in" in said and said.count("was not reached") == 2 and "list of hosts" in said


def test_doctor_names_a_wrong_variable_and_what_was_not_finished(comfyui: Path) -> None:
    place = (
        comfyui / "models" / "language_bridge_downloads" / "OPPOer--PEA-Diffusion" / "pytorch_model.bin.part"
    )
    place.parent.mkdir(parents=True)
    place.write_bytes(b"x" * 200_000)
    done = install(comfyui, "doctor", HF_ENDPOINT="http://hf-mirror.com")
    assert "HF_ENDPOINT cannot be used" in done.stdout and done.returncode == 1
    assert "pytorch_model.bin is not fetched whole: 0.2 MB are there" in done.stdout
    assert "Go on: python install.py get pea-sdxl" in done.stdout


@pytest.mark.parametrize(
    ("locale", "arguments", "expected"),
    [
        ("zh_CN.UTF-8", (), "\u4f53\u68c0\u62a5\u544a"),
        ("zh_CN.UTF-8", ("--lang", "en"), ": the doctor"),
        ("en_US.UTF-8", (), ": the doctor"),
        ("C", ("--lang", "zh"), "\u4f53\u68c0\u62a5\u544a"),
    ],
)
def test_doctor_speaks_the_language_of_the_system_or_the_one_asked_for(
    comfyui: Path, locale: str, arguments: tuple[str, ...], expected: str
) -> None:
    done = install(comfyui, "doctor", *arguments, LC_ALL=locale, PYTHONIOENCODING="utf-8")
    assert expected in done.stdout


def test_a_console_without_chinese_letters_does_not_end_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from language_bridge import install as script

    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    script.main(["doctor", "--lang", "zh"])
    console.flush()
    said = console.detach().getvalue().decode("cp1252")
    assert "\\u4f53\\u68c0" in said and "Python: " in said


def test_doctor_looks_into_the_folders_of_extra_model_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from language_bridge import install as script
    from language_bridge.tests.fixtures.towers import tiny_bridge, tiny_tower, write_bridge

    tree, shared = tmp_path / "ComfyUI", tmp_path / "\u5171\u4eab disk"
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").write_text("", encoding="utf-8")
    (shared / "Lora").mkdir(parents=True)
    yaml = tree / "extra_model_paths.yaml"
    yaml.write_text(f"other:\n  base_path: {shared}\n  loras: Lora\n", encoding="utf-8")
    tower = tiny_tower()
    path = shared / "Lora" / "b.safetensors"
    write_bridge(path, "sd1", tiny_bridge("linear", "sd1", tower), tower, inside=True)
    monkeypatch.setenv("COMFYUI_PATH", str(tree))
    assert script.doctor(["--lang", "en"]) == 1
    assert f"{path} is a bridge" in capsys.readouterr().out
    yaml.write_text("- odd", encoding="utf-8")
    assert script.doctor(["--lang", "en"]) == 1
    said = capsys.readouterr().out
    assert said.count("extra_model_paths.yaml cannot be understood") == 1 and "is a bridge" not in said
    assert script.get(["pea-sdxl-xlm-roberta", "--agree"]) == 1
    assert "Mend the file" in capsys.readouterr().err


def test_list_says_what_is_here(
    offer: Offer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from language_bridge import install as script

    monkeypatch.setattr(script, "read_manifest", lambda: offer.manifest)
    monkeypatch.setattr(script, "find_comfyui", lambda: offer.models.parent)

    def state() -> str:
        script.show_list()
        return capsys.readouterr().out.splitlines()[0].split("MB")[1].split("MIT")[0].strip()

    assert state() == "verified"
    assert offer.get("--no-convert") == 0
    capsys.readouterr()
    assert state() == "fetched"
    assert offer.get("--clean") == 0
    capsys.readouterr()
    assert state() == "here"


def test_get_without_a_comfyui_asks_for_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from language_bridge import install as script

    assert script.main(["get", "pea-sdxl-xlm-roberta"]) == 2
    assert "--models" in capsys.readouterr().out


def test_verify_looks_at_what_was_fetched_too(comfyui: Path) -> None:
    from language_bridge.manifest.lock import Lock, Record, write_lock

    assert "nothing" in install(comfyui, "verify", "mulan-sd15").stdout
    assert install(comfyui, "verify", "pocket-pea").returncode == 0
    done = install(comfyui, "verify", "other")
    assert done.returncode == 1 and "no published set" in done.stderr
    place = "language_bridge_downloads/mulanai--mulan-lang-adapter/sdxl_aesthetic.pth"
    path = comfyui / "models" / place
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    key = "mulanai/mulan-lang-adapter@d07b411645172c582f5ca5f90733ba2d14de5d5f/sdxl_aesthetic.pth"
    record = Record(key, 3, hashlib.sha256(b"abc").hexdigest(), "hub", False, False)
    write_lock(comfyui / "models", Lock({place: record}))
    assert install(comfyui, "verify").returncode == 0
    path.write_bytes(b"abd")
    done = install(comfyui, "verify")
    assert done.returncode == 1 and place in done.stdout


def test_pin_writes_what_the_hub_tells(
    offer: Offer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from language_bridge import install as script
    from language_bridge.manifest.schema import dump, parse
    from language_bridge.manifest.sources import Address
    from language_bridge.tests.manifest.hub import COMMIT

    def told(request: Request) -> None:
        sha = offer.file.sha256
        more = {"X_Linked_Etag": f'"{sha}"', "X_Linked_Size": str(offer.file.bytes), "X_Repo_Commit": COMMIT}
        request.reply(302, Location="https://cdn.example/x", **more)

    path = tmp_path / "weights_manifest.json"
    offer.hub.behave = told
    options = {"path": path, "wire": offer.wire, "hub": lambda file: Address("hub", offer.hub.url())}
    unknown = replace(offer.manifest.published[0], files=(replace(offer.file, bytes=0, sha256=""),))
    path.write_text(
        dump(replace(offer.manifest, published=(unknown, offer.manifest.published[1]))), encoding="utf-8"
    )
    before = path.read_bytes()
    assert script.refresh(["--check"], **options) == 0 and path.read_bytes() == before
    assert script.refresh([], **options) == 0
    assert parse(path.read_text(encoding="utf-8")).published[0].files == (
        replace(offer.file, revision=COMMIT),
    )
    assert offer.file.sha256 in capsys.readouterr().out
