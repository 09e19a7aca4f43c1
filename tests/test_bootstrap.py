"""The bootstrap's laws: nothing unpacked outside, nothing left running, exit codes and output handed on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from language_bridge.harness import environment as made
from language_bridge.harness.demo import (
    POCKET_GRAPH,
    ROWS,
    Options,
    all_rows,
    bridge_base,
    filled,
    real_model,
    titled,
    without_bridge,
)
from language_bridge.harness.environment import BootstrapError, Environment
from language_bridge.harness.server import PACK, PromptError, Server, shipped_files

# -- the archive -----------------------------------------------------------------------------------


def archive(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A tar archive; a member whose content is text is a link to it."""
    with tarfile.open(path, "w:gz") as out:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                out.addfile(info)
            else:
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    return path


def test_only_what_lies_below_the_prefix_is_unpacked(tmp_path: Path) -> None:
    source = archive(
        tmp_path / "a.tar.gz", ("p/v/C/main.py", b"1"), ("p/v/C/comfy/sd.py", b"2"), ("p/setup.py", b"3")
    )
    made.unpack(source, "p/v/C/", tmp_path / "tree")
    found = sorted(
        path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*.py")
    )
    assert found == ["comfy/sd.py", "main.py"]


@pytest.mark.parametrize(
    "member",
    [
        ("p/../../x", b""),
        ("p/a/../../../x", b""),
        ("p//etc/x", b""),
        ("p/link", "/etc/passwd"),
        ("p/..", b""),
        ("p/", b""),
    ],
)
def test_a_member_that_leads_outside_is_refused_and_nothing_is_left(tmp_path: Path, member: Any) -> None:
    source = archive(tmp_path / "a.tar.gz", ("p/good.py", b"1"), member)
    with pytest.raises(BootstrapError):
        made.unpack(source, "p/", tmp_path / "deep" / "tree")
    assert list((tmp_path / "deep").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "deep"]


def test_an_archive_without_the_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BootstrapError, match="nothing below"):
        made.unpack(archive(tmp_path / "a.tar.gz", ("q/x", b"")), "p/", tmp_path / "tree")


def test_too_large_an_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "LARGEST_TREE", 10)
    with pytest.raises(BootstrapError, match="larger"):
        made.unpack(archive(tmp_path / "a.tar.gz", ("p/x", b"0" * 11)), "p/", tmp_path / "tree")


# -- which ComfyUI ---------------------------------------------------------------------------------


def comfyui(place: Path) -> Path:
    (place / "comfy").mkdir(parents=True)
    (place / "main.py").touch()
    (place / "comfy" / "sd.py").touch()
    return place


def test_the_users_comfyui_is_found_by_name_or_by_place(tmp_path: Path) -> None:
    tree = comfyui(tmp_path / "C")
    checkout = tree / "custom_nodes" / "language-bridge"
    assert made.users_comfyui(tmp_path / "elsewhere", None) is None
    assert made.users_comfyui(tmp_path / "elsewhere", str(tree)) == tree
    assert made.users_comfyui(checkout, None) == tree
    assert made.users_comfyui(tmp_path / "no" / "custom_nodes" / "x", None) is None
    other = comfyui(tmp_path / "D")
    assert made.users_comfyui(checkout, str(other)) == other


def test_a_named_folder_that_is_no_comfyui_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BootstrapError, match="COMFYUI_PATH"):
        made.users_comfyui(tmp_path, str(tmp_path))


# -- what is shipped -------------------------------------------------------------------------------


def test_the_archive_holds_the_pack_and_none_of_its_tools(checkout: Path) -> None:
    shipped = {path.as_posix() for path in shipped_files(checkout)}
    assert {"__init__.py", "install.py", "pyproject.toml", "requirements.txt", "LICENSE"} <= shipped
    assert {
        "weights_manifest.json",
        "bridges/base.py",
        "nodes/extension.py",
        "pocket/captions.json",
    } <= shipped
    tools = ("tests/", "benchmarks/", "recipes/", "harness/", ".ci/", ".git", ".bootstrap/", "bootstrap.py")
    assert not [path for path in shipped if path.startswith(tools) or "__pycache__" in path]


# -- the demo's graphs -----------------------------------------------------------------------------

GRAPH: dict[str, Any] = {
    "1": {"class_type": "Load", "inputs": {}, "_meta": {"title": "load"}},
    "2": {
        "class_type": "LanguageBridge",
        "inputs": {"model": ["1", 0], "clip": ["1", 1], "bridge": "a"},
        "_meta": {"title": "bridge"},
    },
    "3": {
        "class_type": "CLIPTextEncode",
        "inputs": {"clip": ["2", 1], "text": ""},
        "_meta": {"title": "positive"},
    },
    "4": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "seed": 0}, "_meta": {"title": "sampler"}},
    "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0]}, "_meta": {"title": "save"}},
}


def test_without_bridge_every_wire_goes_straight() -> None:
    before = json.dumps(GRAPH)
    stock = without_bridge(GRAPH)
    assert "2" not in stock
    assert stock["3"]["inputs"]["clip"] == ["1", 1]
    assert stock["4"]["inputs"]["model"] == ["1", 0]
    assert json.dumps(GRAPH) == before


@pytest.mark.parametrize("row", ROWS)
def test_a_row_gets_its_prompt_and_seed_and_its_bridge_or_none(row: Any) -> None:
    graph = filled(GRAPH, row, "text", 3)
    assert titled(graph, "positive")["inputs"]["text"] == "text"
    assert titled(graph, "sampler")["inputs"]["seed"] == 3
    assert ("2" in graph) == row.bridged


def test_a_graph_without_the_title_is_an_error() -> None:
    with pytest.raises(BootstrapError, match="0 nodes titled 'checkpoint'"):
        titled(GRAPH, "checkpoint")


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"[]", b"\x02" + b"\x00" * 7 + b"{}"]
)
def test_a_file_that_is_no_bridge_names_no_base(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert bridge_base(tmp_path / "x.safetensors") == ""


def bridge_file(path: Path, base: str) -> Path:
    """A file whose header names *base*; it holds no tensors."""
    header = json.dumps({"__metadata__": {"language_bridge": json.dumps({"base": base})}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
def test_a_checkpoint_of_the_users_own_takes_the_template_of_the_bridges_base(
    environment: Environment, tmp_path: Path, base: str
) -> None:
    checkpoint = tmp_path / "mine.safetensors"
    checkpoint.touch()
    bridge = bridge_file(tmp_path / "bridge.safetensors", base)
    models, graph = real_model(environment, Options(checkpoint=checkpoint, bridge=str(bridge)))
    assert models == {"checkpoints": [checkpoint], "language_bridges": [bridge]}
    assert titled(graph, "checkpoint")["inputs"]["ckpt_name"] == "mine.safetensors"
    assert titled(graph, "bridge")["inputs"]["bridge"] == "bridge.safetensors"
    size = {node["inputs"]["width"] for node in graph.values() if node["class_type"] == "EmptyLatentImage"}
    assert size == {1024 if base == "sdxl" else 512}
    for row in ROWS:
        assert filled(graph, row, "text", 1)


@pytest.mark.parametrize(
    ("checkpoint", "bridge", "said"),
    [
        ("none", "x", "no such file"),
        ("mine", None, "needs --bridge"),
        ("mine", "nowhere", "--bridge nowhere"),
    ],
)
def test_a_missing_file_is_said_before_anything_starts(
    environment: Environment, tmp_path: Path, checkpoint: str, bridge: str | None, said: str
) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(BootstrapError, match=said):
        real_model(environment, Options(checkpoint=tmp_path / checkpoint, bridge=bridge))


# -- commands --------------------------------------------------------------------------------------


def bootstrap(environment: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(made.CHECKOUT / "bootstrap.py"),
        "--env",
        str(environment.root),
        *arguments,
    ]
    variables = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH"}}
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=variables, timeout=600
    )


def test_run_hands_on_output_arguments_and_exit_code(environment: Environment, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport comfy.cli_args, language_bridge.bridges\n"
        "sys.stdout.write(' '.join(sys.argv[1:]))\nsys.exit(7)\n",
        encoding="utf-8",
    )
    done = bootstrap(environment, "run", str(script), "--json", "-x", "a b")
    assert done.returncode == 7, done.stderr
    assert done.stdout == "--json -x a b"


@pytest.mark.slow
def test_demo_leaves_a_sheet_and_reports_every_row(environment: Environment, tmp_path: Path) -> None:
    done = bootstrap(environment, "demo", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert Path(report["sheet"]) == tmp_path / "sheet.png"
    assert report["import_seconds"] is not None
    drawn = all_rows(json.loads(POCKET_GRAPH.read_text(encoding="utf-8")))
    assert len(drawn) > len(ROWS)
    rows = {row.key: [p for p in report["pictures"] if p["row"] == row.key] for row in drawn}
    for key, pictures in rows.items():
        assert len(pictures) == len(report["prompts"]), key
        assert all(Path(picture["path"]).read_bytes().startswith(b"\x89PNG") for picture in pictures)

    def share(key: str) -> float:
        verdicts = [picture["judge"] for picture in rows[key]]
        return sum(v["right"] for v in verdicts) / sum(v["asked"] for v in verdicts)

    for row in drawn:
        if row.bridged:
            assert share(row.key) > share("chinese_stock"), row.key
            least = (
                0.5 if row.bridge == "pocket-llm.safetensors" else 0.9
            )  # docs/pocket-world.md has its figures
            assert share(row.key) >= least * share("english_stock"), row.key


# -- the server ------------------------------------------------------------------------------------


def is_running(process: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")
        return not stat.exists() or stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def gone(process: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not is_running(process):
            return True
        time.sleep(0.1)
    return False


def test_the_pack_loads(server: Server) -> None:
    assert server.import_seconds() is not None, server.log.read_text(encoding="utf-8")
    assert "LanguageBridge" in server.ask("/object_info")


def test_importing_the_nodes_costs_little(environment: Environment) -> None:
    """Processor time, in a process that has the host's own modules already: what starting ComfyUI waits for.

    The wall time that ComfyUI prints depends on who else is at work; benchmarks/import_time.py measures it.
    """
    source = """
import time
from comfy.cli_args import args
args.cpu = True
import comfy.sd, folder_paths, nodes
from comfy_api.latest import io
began = time.process_time()
import language_bridge.nodes.extension
print(time.process_time() - began)
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=environment.variables() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) <= 0.3


def test_the_server_serves_help_texts_and_workflows(server: Server, checkout: Path) -> None:
    assert server.ask("/i18n")["zh"]["nodeDefs"]["LanguageBridge"]["display_name"]
    assert server.download(f"/extensions/{PACK}/docs/LanguageBridge/zh.md")
    templates = set(server.ask("/workflow_templates")[PACK])
    assert templates == {path.stem for path in (checkout / "workflows").glob("*.json")}


def test_a_refused_graph_is_an_error_with_the_servers_words(server: Server) -> None:
    with pytest.raises(PromptError, match="NoSuchNode"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_a_server_that_fails_to_start_says_why_and_leaves_nothing(environment: Environment) -> None:
    failing = Server(environment, lambda text: None, options=["--no-such-option"])
    with pytest.raises(BootstrapError, match="no-such-option"), failing:
        pass
    assert not failing.alive()


@pytest.mark.skipif(os.name == "nt", reason="reads process ids the POSIX way")
def test_no_server_outlives_a_killed_bootstrap(environment: Environment, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from language_bridge.harness.environment import Environment\n"
        "from language_bridge.harness.server import Server\n"
        "class Told(Server):\n"
        "    def _wait_until_ready(self, began):\n"
        "        print(self._process.pid, flush=True)\n"
        "        sys.stdin.read()\n"
        "with Told(Environment(Path(sys.argv[1]), Path(sys.executable), Path(sys.argv[2])), print):\n"
        "    pass\n",
        encoding="utf-8",
    )
    command = [sys.executable, str(script), str(tmp_path), str(environment.comfyui)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        assert is_running(server)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone(server, 15)
