"""A real ComfyUI server with the pack installed: starts it, talks to it over HTTP, always stops it.

Standard library only. The user's ComfyUI is not touched: the server runs with a base directory of its own,
which holds a copy of the shipped files under ``custom_nodes/language-bridge``.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .environment import CHECKOUT, BootstrapError, Environment, tail

PACK = "language-bridge"
MODEL_FOLDERS = (
    "checkpoints",
    "configs",
    "loras",
    "vae",
    "text_encoders",
    "clip",
    "diffusion_models",
    "unet",
    "embeddings",
    "controlnet",
    "vae_approx",
    "language_bridges",
)
"""Folders of a user's own ComfyUI that a server of ours may read models from."""

PAGE_SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
"""A new user of the stock frontend is met by its tour; ours has come for something else."""

NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PromptError(RuntimeError):
    """The server refused a graph or a node of it failed; the text is the server's own."""


def shipped_files(checkout: Path = CHECKOUT) -> Iterator[Path]:
    """Paths, relative to *checkout*, of the files that a published archive holds.

    A file is left out when ``.comfyignore`` or ``.gitignore`` says so. The patterns understood are the ones
    in use there: a folder with a closing slash, a file name, or a glob over the file name; with a leading
    slash only at the top.
    """
    lines: list[str] = [".git/"]
    for name in (".comfyignore", ".gitignore"):
        if (checkout / name).is_file():
            lines += (checkout / name).read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    def left_out(path: str, name: str) -> bool:
        """Both with a closing slash when they are a folder; *path* begins with a slash."""
        return any(fnmatch.fnmatchcase(path if pattern[0] == "/" else name, pattern) for pattern in patterns)

    for place, inner, files in os.walk(checkout):
        here = Path(place).relative_to(checkout)
        top = "/" if here == Path() else f"/{here.as_posix()}/"
        inner[:] = sorted(name for name in inner if not left_out(f"{top}{name}/", f"{name}/"))
        yield from (here / name for name in sorted(files) if not left_out(f"{top}{name}", name))


def install_pack(base: Path, checkout: Path = CHECKOUT) -> Path:
    """Copy the shipped files to ``base/custom_nodes/language-bridge`` and return that folder."""
    target = base / "custom_nodes" / PACK
    for path in shipped_files(checkout):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(checkout / path, target / path)
    return target


def free_port() -> int:
    """A loopback port that is free at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running ComfyUI; a context manager that starts it on entry and stops it on exit."""

    environment: Environment
    say: Callable[[str], None]
    options: Sequence[str] = ()
    models: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    patience: float = 300.0
    base: Path = field(init=False)
    url: str = field(init=False, default="")
    startup_seconds: float = field(init=False, default=0.0)
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)

    def __enter__(self) -> Server:
        runs = self.environment.root / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        _sweep(runs)
        self.base = Path(tempfile.mkdtemp(prefix="server-", dir=runs))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.base, ignore_errors=True)

    @property
    def log(self) -> Path:
        return self.base / "server.log"

    @property
    def output(self) -> Path:
        return self.base / "output"

    def page(self, workflow: str = "pocket_text_to_image") -> str:
        """Address of the stock frontend with one of the pack's workflows opened."""
        return f"{self.url}/?template={workflow}&source={PACK}"

    def _start(self) -> None:
        base = self.base
        for name in (
            "custom_nodes",
            "models/checkpoints",
            "models/language_bridges",
            "input",
            "output",
            "temp",
        ):
            (base / name).mkdir(parents=True)
        (base / "user" / "default" / "workflows").mkdir(parents=True)
        install_pack(base)
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.write_text(json.dumps(PAGE_SETTINGS | dict(self.settings)), encoding="utf-8")
        for graph in sorted((CHECKOUT / "workflows").glob("*.json")):
            shutil.copy2(graph, base / "user" / "default" / "workflows" / graph.name)
        for folder, files in self.models.items():
            for file in files:
                link_or_copy(file, base / "models" / folder / file.name)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        database = (base / "user" / "comfyui.db").as_posix()
        command = [str(self.environment.python), "-u", str(Path(__file__).with_name("leash.py"))]
        command += [str(self.environment.comfyui / "main.py"), "--base-directory", str(base)]
        command += ["--listen", "127.0.0.1", "--port", str(port), "--database-url", f"sqlite:///{database}"]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        command += ["--extra-model-paths-config", str(self._model_paths())]
        if not has_cuda(self.environment):
            command.append("--cpu")
        began = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *self.options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment.variables(),
                cwd=base,
                start_new_session=os.name != "nt",
            )
        self._wait_until_ready(began)
        self.startup_seconds = time.monotonic() - began

    def _model_paths(self) -> Path:
        """Let the server also read the models of the ComfyUI that it runs from."""
        models = self.environment.comfyui / "models"
        lines = ["language_bridge:", f"    base_path: {json.dumps(str(models))}"]
        lines += [f"    {name}: {name}" for name in MODEL_FOLDERS if (models / name).is_dir()]
        path = self.base / "model_paths.yaml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _wait_until_ready(self, began: float) -> None:
        process = self._process
        assert process is not None
        spoken = began
        while True:
            if process.poll() is not None:
                raise BootstrapError(f"the server ended with code {process.returncode}\n{tail(self.log, 40)}")
            try:
                self.ask("/system_stats", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                pass
            now = time.monotonic()
            if now - began > self.patience:
                raise BootstrapError(
                    f"no answer from the server in {self.patience:.0f} s\n{tail(self.log, 40)}"
                )
            if now - spoken > 10:
                spoken = now
                self.say(f"  ... waiting for the server: {now - began:.0f} s")
            time.sleep(0.3)

    def stop(self) -> None:
        """End the server and everything it started; harmless when it has ended already."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # the leash
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        if os.name != "nt":
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            process.kill()
        process.wait()

    def alive(self) -> bool:
        """Whether the server process is still running."""
        return self._process is not None and self._process.poll() is None

    # -- talking --------------------------------------------------------------------------------

    def ask(self, path: str, body: object = None, timeout: float = 60.0) -> Any:
        """GET *path*, or POST *body* as JSON, and return the decoded answer (None for an empty one)."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        with NO_PROXY.open(request, timeout=timeout) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def download(self, path: str, timeout: float = 60.0) -> bytes:
        """GET *path* and return its bytes."""
        with NO_PROXY.open(self.url + path, timeout=timeout) as answer:
            return bytes(answer.read())

    def run(self, graph: Mapping[str, Any], timeout: float = 600.0) -> dict[str, Any]:
        """Queue an API-format graph, wait for it, return its history entry.

        Raises:
            PromptError: the server refused the graph, a node failed, or *timeout* seconds passed.
        """
        try:
            identity = self.ask("/prompt", {"prompt": graph})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptError(_refusal(error)) from error
        began = time.monotonic()
        while time.monotonic() - began < timeout:
            if not self.alive():
                raise PromptError(f"the server ended while a graph ran\n{tail(self.log, 40)}")
            entry = self.ask(f"/history/{identity}").get(identity)
            if entry is not None:
                status = entry["status"]
                if status["status_str"] != "success":
                    raise PromptError(_failure(status["messages"]))
                return entry
            time.sleep(0.1)
        raise PromptError(f"no result in {timeout:.0f} s\n{tail(self.log, 20)}")

    def pictures(self, entry: Mapping[str, Any]) -> list[bytes]:
        """The PNG files that a finished graph saved, in the order of its nodes."""
        found: list[bytes] = []
        for node in entry["outputs"].values():
            for image in node.get("images", []):
                found.append(self.download("/view?" + urllib.parse.urlencode(image)))
        return found

    def import_seconds(self) -> float | None:
        """Import time of the pack as ComfyUI itself printed it; None when it was not loaded."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(encoding="utf-8", errors="replace"))
        pattern = rf"^(?:\[INFO\])?\s*([0-9.]+) seconds( \(IMPORT FAILED\))?: .*[/\\]{PACK}\s*$"
        for seconds, failed in re.findall(pattern, text, re.MULTILINE):
            return None if failed else float(seconds)
        return None


def _sweep(runs: Path, age: float = 86400.0) -> None:
    """Remove what killed processes left behind more than *age* seconds ago."""
    for folder in runs.glob("server-*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > age:
                shutil.rmtree(folder, ignore_errors=True)


def has_cuda(environment: Environment) -> bool:
    """Whether torch in *environment* sees a CUDA device."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    done = subprocess.run([str(environment.python), "-c", code], capture_output=True)
    return done.returncode == 0


def link_or_copy(source: Path, target: Path) -> None:
    """Make *target* the file *source*: a link where the system allows, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copy2(source, target)


def _refusal(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", "replace")
    try:
        answer = json.loads(text)
    except ValueError:
        return text
    lines = [str(answer.get("error", {}).get("message", "the server refused the graph"))]
    for node, report in (answer.get("node_errors") or {}).items():
        for item in report.get("errors", []):
            lines.append(
                f"  node {node} ({report.get('class_type')}): {item.get('message')}: {item.get('details')}"
            )
    return "\n".join(lines)


def _failure(messages: Sequence[Sequence[Any]]) -> str:
    for kind, data in messages:
        if kind == "execution_error":
            return f"{data.get('node_type')} (node {data.get('node_id')}): {data.get('exception_message')}"
        if kind == "execution_interrupted":
            return f"interrupted at {data.get('node_type')} (node {data.get('node_id')})"
    return "the graph failed without a message"
