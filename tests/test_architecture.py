"""The drawing in docs/design.md, enforced: who imports whom, what sources hold, what each node comes with."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from language_bridge.harness.scan import NETWORK_FILE, findings, objections
from language_bridge.harness.server import shipped_files

CHECKOUT = Path(__file__).resolve().parent.parent

ARROWS: dict[str, set[str]] = {
    "bridges": {"bridges"},
    "encoders": {"encoders", "bridges.base", "bridges.errors"},
    "conversion": {"conversion", "bridges", "encoders"},
    "prompt": {"prompt"},
    "training": {"training", "bridges", "encoders", "prompt"},
    "manifest": {"manifest"},
    "pocket": {"pocket"},
    "host": {
        "host",
        "bridges",
        "encoders",
        "prompt",
        "pocket",
        "training",
        "manifest.schema",
        "reports.words",
    },
    "nodes": {"nodes", "host", "conversion", "training", "manifest", "reports", "bridges.errors"},
    "reports": {"reports", "manifest", "conversion", "bridges", "encoders"},
}
"""Room -> what its files may import of ours."""
EXCEPTIONS = {("bridges/file.py", "encoders"), ("training/headless/command.py", "conversion.unet")}
"""A bridge file can hold a text tower; what learns in a diffusers U-Net is written under LDM's names."""

LIBRARIES: dict[str, set[str]] = {
    "bridges": {"torch", "safetensors"},
    "encoders": {"torch", "safetensors", "tokenizers"},
    "conversion": {"torch", "safetensors"},
    "prompt": set(),
    "training": {"torch", "safetensors", "numpy", "PIL", "bitsandbytes"},
    "manifest": {"yaml"},
    "reports": set(),
    "pocket": {"torch", "safetensors", "numpy", "PIL"},
}
"""Room that knows no host -> what it may import beside the standard library."""
AT_SCALE = {
    "training/headless/": {"transformers", "diffusers", "accelerate", "opencc"},
    "training/__main__.py": {"language_bridge"},
}
"""Training without ComfyUI: started by hand, never by a node; the second one gives the folder its name."""
HEAVY = {"transformers", "diffusers", "accelerate", "peft", "open_clip"}
ROOMS = sorted(ARROWS)


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (CHECKOUT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import in a file, also inside functions, but not the typing-only ones."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            if node.module and node.level:  # from ..host import folders
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.level, name) for name in names if name)


def ours(path: Path, level: int, name: str) -> str:
    """The dotted name, from the checkout's root, that a relative import reaches."""
    package = path.relative_to(CHECKOUT).parent.parts
    return ".".join([*package[: len(package) - (level - 1)], *name.split(".")])


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_imports_only_along_the_arrows(room: str) -> None:
    wrong: list[str] = []
    for path in sources(room):
        here = path.relative_to(CHECKOUT).as_posix()
        for level, name in imports(path):
            if not level:
                continue
            target = ours(path, level, name)
            fits = any(target == allowed or target.startswith(allowed + ".") for allowed in ARROWS[room])
            excepted = any(here == file and target.startswith(to) for file, to in EXCEPTIONS)
            if not (fits or excepted):
                wrong.append(f"{here} imports {target}")
    assert not wrong


@pytest.mark.parametrize("room", sorted(LIBRARIES))
def test_a_room_without_host_imports_only_its_libraries(room: str) -> None:
    allowed = LIBRARIES[room] | set(sys.stdlib_module_names)
    wrong = [
        f"{path.relative_to(CHECKOUT)} imports {name}"
        for path in sources(room)
        for level, name in imports(path)
        if not level and name.split(".")[0] not in allowed | at_scale(path.relative_to(CHECKOUT))
    ]
    assert not wrong


def at_scale(path: Path) -> set[str]:
    """What a file may import because it trains without ComfyUI."""
    return {name for start, names in AT_SCALE.items() if path.as_posix().startswith(start) for name in names}


def test_nothing_shipped_imports_a_heavy_library() -> None:
    wrong = [
        f"{path} imports {name}"
        for path in shipped_files(CHECKOUT)
        if path.suffix == ".py"
        for level, name in imports(CHECKOUT / path)
        if not level and name.split(".")[0] in HEAVY - at_scale(path)
    ]
    assert not wrong


def test_nothing_but_its_own_command_leads_to_training_without_comfyui() -> None:
    leading = {
        path.relative_to(CHECKOUT).as_posix()
        for room in ROOMS
        for path in sources(room)
        for level, name in imports(path)
        if "headless" in name.split(".") or (level and "headless" in ours(path, level, name).split("."))
    }
    outside = {name for name in leading if not name.startswith("training/headless/")}
    assert outside == {"training/__main__.py"}


def test_the_root_imports_nothing_of_ours_before_the_host_asks() -> None:
    tree = ast.parse((CHECKOUT / "__init__.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
    assert names <= {"__future__", "typing"}


def test_every_shipped_folder_is_a_room_with_a_rule() -> None:
    folders = {
        path.parts[0] for path in shipped_files(CHECKOUT) if path.suffix == ".py" and len(path.parts) > 1
    }
    assert folders <= set(ARROWS)


def test_nothing_is_called_utils() -> None:
    assert not [path for path in shipped_files(CHECKOUT) if re.search(r"utils?\b|helpers?\b", path.stem)]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_do_not_print(room: str) -> None:
    wrong = [
        f"{path.relative_to(CHECKOUT)}:{node.lineno}"
        for path in sources(room)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert not wrong


def all_python() -> list[Path]:
    return [path for path in sources(".") if ".bootstrap" not in path.parts]


def test_every_python_file_is_ascii_and_says_what_it_is_for() -> None:
    for path in all_python():
        text = path.read_bytes().decode("ascii")
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(CHECKOUT)} has no docstring"


def test_every_file_is_opened_with_its_encoding() -> None:
    wrong: list[str] = []
    for path in all_python():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            said = {keyword.arg for keyword in node.keywords}
            text_call = name in {"read_text", "write_text"} and not (name == "read_text" and node.args)
            if text_call and "encoding" not in said:
                wrong.append(f"{path.relative_to(CHECKOUT)}:{node.lineno}")
    assert not wrong


NOT_NATIVE = (
    r"\.cuda\s*\(",
    r"torch\.load\s*\(",
    r"\.to\s*\(\s*(torch\.device\s*\(\s*)?[\"']cuda",
    r"torch\.(cuda\.)?(amp\.)?autocast\s*\(",
    r"(?<![\w.])(torch\.)?nn\.(Linear|Conv[123]d|ConvTranspose[12]d|LayerNorm|GroupNorm|Embedding)\s*\(",
)
"""What the registry's linter (comfy-test lint) finds fault with, in every file and line but comments."""


def test_no_line_is_what_the_registrys_linter_refuses() -> None:
    wrong = [
        f"{path.relative_to(CHECKOUT)}:{number}"
        for path in all_python()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if not line.lstrip().startswith("#") and any(re.search(pattern, line) for pattern in NOT_NATIVE)
    ]
    assert not wrong


def test_the_self_scan_finds_nothing() -> None:
    assert [str(finding) for finding in findings(CHECKOUT)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from os import system\nsystem('x')",
        "import os as o\no.popen('x')",
        "import multiprocessing.pool",
        "from concurrent import futures\nimport pickle as p",
        "eval('1')",
        "run = exec",
        "__import__('os')",
        "import importlib\nimportlib.import_module('x')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x', weights_only=False)",
        "load(trust_remote_code=False)",
        "import base64\nbase64.b64decode('')",
        "text = '\u4e2d'",
        "import urllib.request",
        "from urllib import request",
        "import http.client as h",
        "from http.client import HTTPSConnection",
        "import ssl",
        "import aiohttp.web",
        "from huggingface_hub import hf_hub_download",
    ],
)
def test_the_self_scan_finds_what_a_scanner_would(source: str) -> None:
    assert list(objections("nodes/x.py", source.encode("utf-8")))


def test_the_self_scan_lets_ordinary_code_pass() -> None:
    source = (
        b"import os, re, torch as t\nre.compile('x')\nx = t.load('x', weights_only=True)\nos.path.join('a')\n"
    )
    assert not list(objections("nodes/x.py", source))


# -- the one door to the network -------------------------------------------------------------------


def test_one_file_may_open_connections_and_it_may_do_no_more_than_that() -> None:
    assert not list(objections(NETWORK_FILE, b"import http.client, ssl, urllib.request"))
    for source in (
        b"import socket",
        b"import requests",
        b"import urllib3",
        b"import subprocess",
        b"eval('1')",
    ):
        assert list(objections(NETWORK_FILE, source))
    assert list(objections("manifest/download.py", b"import http.client"))


def test_nothing_shipped_loosens_what_may_be_connected_to() -> None:
    """No subclass of Wire, no second maker of one, no other scheme: tests alone can speak plain http."""
    for path in shipped_files(CHECKOUT):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse((CHECKOUT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert not {ast.unparse(base).split(".")[-1] for base in node.bases} & {"Wire"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Wire":
                assert path.as_posix() == "manifest/sources.py"
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert node.attr not in {"scheme", "require", "require_public", "connect"}, path
    connection = (CHECKOUT / NETWORK_FILE).read_text(encoding="utf-8")
    assert 'scheme = "https"' in connection and "unverified" not in connection


def test_importing_and_listing_touch_no_network(tmp_path: Path) -> None:
    """Python reports every use of a socket and every name that is looked up; none may come."""
    source = """
import sys
def hook(event, arguments):
    if event.startswith("socket."):
        raise SystemExit(f"network: {event} {arguments}")
sys.addaudithook(hook)
sys.path.insert(0, sys.argv[1])
import install
from manifest import connection, download, fetch, lock, part, pin, schema, sources, verify
for command in (["list"], ["verify"], ["doctor"], []):
    install.main(command)
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COMFYUI"))}
    command = [sys.executable, "-S", "-s", "-E", "-c", source, str(CHECKOUT)]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


# -- what every node comes with --------------------------------------------------------------------


def schemas() -> dict[str, Any]:
    from language_bridge.nodes.extension import LanguageBridgeExtension

    async def load() -> list[Any]:
        extension = LanguageBridgeExtension()
        await extension.on_load()
        return [node.GET_SCHEMA() for node in await extension.get_node_list()]

    return {schema.node_id: schema for schema in asyncio.run(load())}


def locale(language: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(
        (CHECKOUT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")
    )
    return loaded


def is_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_has_a_help_page(language: str) -> None:
    missing: list[str] = []
    for name in schemas():
        page = CHECKOUT / "web" / "docs" / (f"{name}.md" if language == "en" else f"{name}/zh.md")
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        if len(text) < 200 or is_chinese(text) != (language == "zh"):
            missing.append(page.relative_to(CHECKOUT).as_posix())
    assert not missing


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_has_its_texts(language: str) -> None:
    texts, known = locale(language), schemas()
    assert set(texts) == set(known)
    missing: list[str] = []
    for name, schema in known.items():
        entry = texts[name]
        wanted = {"display_name": entry.get("display_name"), "description": entry.get("description")}
        for number, output in enumerate(schema.outputs):
            said = entry.get("outputs", {}).get(str(number), {})
            wanted[f"outputs.{number}.name"] = said.get("name")
            if output.tooltip:
                wanted[f"outputs.{number}.tooltip"] = said.get("tooltip")
        for given in schema.inputs:
            said = entry.get("inputs", {}).get(given.id, {})
            wanted[f"inputs.{given.id}.name"] = said.get("name")
            if given.tooltip:
                wanted[f"inputs.{given.id}.tooltip"] = said.get("tooltip")
        missing += [f"{name}.{place}" for place, text in wanted.items() if not text]
        if language == "zh":
            sentences = [
                place for place in wanted if place.endswith(("tooltip", "description", "display_name"))
            ]
            missing += [
                f"{name}.{place} in Chinese" for place in sentences if not is_chinese(wanted[place] or "")
            ]
    assert not missing


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_is_left_over_from_an_old_input(language: str) -> None:
    for name, schema in schemas().items():
        entry = locale(language)[name]
        assert set(entry.get("inputs", {})) <= {given.id for given in schema.inputs}
        assert set(entry.get("outputs", {})) <= {str(number) for number in range(len(schema.outputs))}
