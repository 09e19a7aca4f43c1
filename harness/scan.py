"""The self-scan: what a registry scanner would object to in the shipped Python files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .server import shipped_files

FORBIDDEN_MODULES = {
    "asyncio.subprocess",
    "cffi",
    "cloudpickle",
    "code",
    "ctypes",
    "dill",
    "ftplib",
    "http.server",
    "joblib",
    "marshal",
    "multiprocessing",
    "paramiko",
    "pexpect",
    "pickle",
    "pip",
    "pty",
    "requests",
    "shelve",
    "smtplib",
    "socket",
    "socketserver",
    "subprocess",
    "telnetlib",
    "xmlrpc",
}
NETWORK_MODULES = {
    "aiohttp",
    "http.client",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "imaplib",
    "modelscope",
    "nntplib",
    "poplib",
    "ssl",
    "urllib.request",
    "urllib3",
    "websocket",
    "websockets",
}
"""What can reach a network, beside those that are forbidden everywhere."""
NETWORK_FILE = "manifest/connection.py"
"""The one shipped file that opens connections, when the user asks for a download; nothing else may."""
NETWORK_ALLOWED = {"http.client", "ssl", "urllib.request"}
"""What it may import for that: no sockets of its own, no library that is not Python's."""
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_CALLS = {
    "os.system",
    "os.popen",
    "os.fork",
    "os.kill",
    "os.startfile",
    "os.execv",
    "os.execve",
    "os.execvp",
    "os.spawnv",
    "os.spawnve",
    "os.putenv",
    "base64.b64decode",
    "base64.b85decode",
    "codecs.decode",
    "importlib.import_module",
    "torch.hub.load",
    "torch.classes.load_library",
    "torch.ops.load_library",
}
ALLOWED = {("bridges/base.py", "importlib.import_module"), ("encoders/base.py", "importlib.import_module")}
"""The registries import the files of their own folder by name; nothing a user types reaches them."""


@dataclass(frozen=True)
class Finding:
    """One objection: where, and to what."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def findings(checkout: Path) -> list[Finding]:
    """Every objection to the shipped Python files of *checkout*, in path order."""
    found: list[Finding] = []
    for path in shipped_files(checkout):
        if path.suffix == ".py":
            source = (checkout / path).read_bytes()
            found += list(objections(path.as_posix(), source))
    return found


def objections(path: str, source: bytes) -> Iterator[Finding]:
    """Objections to one file: forbidden modules, names and calls, unsafe loading, non-ASCII text."""
    try:
        text = source.decode("ascii")
    except UnicodeDecodeError as error:
        line = source[: error.start].count(b"\n") + 1
        yield Finding(path, line, "not ASCII; a cp1252 console cannot show it. Use a data file or an escape")
        text = source.decode("utf-8")
    names: dict[str, str] = {}
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield from _module(path, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            yield from _module(path, node.lineno, module)
            for alias in node.names:
                names[alias.asname or alias.name] = f"{module}.{alias.name}"
                yield from _module(path, node.lineno, f"{module}.{alias.name}", exact=True)
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield Finding(path, node.lineno, f"{node.id} is not allowed in shipped files")
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Call):
            called = _dotted(node.func, names)
            if called in FORBIDDEN_CALLS and (path, called) not in ALLOWED:
                yield Finding(path, node.lineno, f"{called}() is not allowed in shipped files")
            if called == "torch.load" and not _says(node, "weights_only", True):
                yield Finding(path, node.lineno, "torch.load without weights_only=True")
            if any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
                yield Finding(path, node.lineno, "trust_remote_code is not allowed in shipped files")


def _module(path: str, line: int, name: str, exact: bool = False) -> Iterator[Finding]:
    network = NETWORK_MODULES - (NETWORK_ALLOWED if path == NETWORK_FILE else set())
    for forbidden in FORBIDDEN_MODULES | network:
        if name == forbidden or (not exact and name.startswith(forbidden + ".")):
            yield Finding(path, line, f"import of {name} is not allowed in shipped files")


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The dotted name that a call goes to, imports resolved; "" where it is no plain name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def _says(call: ast.Call, name: str, value: object) -> bool:
    return any(
        keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value is value
        for keyword in call.keywords
    )
