"""Names and paths that lead out of a folder, mean a device, or hide what they are: one list for every input.

`attacks(victim)` is made for a file that really lies outside: next to the folder that may be read, under the
victim's name. So a name that gets through reads something, and the test sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

UP = (
    "..",
    "../",
    "../{victim}",
    "../../{victim}",
    "../../../../../../../../../../etc/passwd",
    "./../{victim}",
    "x/../../{victim}",
    "x/./.././../{victim}",
    "x//..//..//{victim}",
    "../{folder}/../{victim}",
    "/{victim}",
    "//{victim}",
    "{absolute}",
    "/{absolute}",
    "/etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "/dev/stdin",
    "~/{victim}",
    "~root/{victim}",
    "$HOME/{victim}",
    "${{PWD}}/../{victim}",
    "%HOMEPATH%\\{victim}",
    "file://{absolute}",
    "http://169.254.169.254/{victim}",
    "hf://a/b/{victim}",
    "data:,{victim}",
    "zip://../{victim}",
)
WINDOWS = (
    "..\\{victim}",
    "..\\..\\{victim}",
    "x\\..\\..\\{victim}",
    "../..\\{victim}",
    "..\\../{victim}",
    ".\\..\\{victim}",
    "\\{victim}",
    "C:\\{victim}",
    "C:{victim}",
    "c:/{victim}",
    "C:..\\{victim}",
    "\\\\server\\share\\{victim}",
    "//server/share/{victim}",
    "\\\\?\\C:\\{victim}",
    "\\\\?\\UNC\\server\\share\\{victim}",
    "\\\\.\\C:\\{victim}",
    "\\\\.\\PhysicalDrive0",
    "\\\\.\\pipe\\{victim}",
    "\\??\\C:\\{victim}",
    "//?/C:/{victim}",
    "//./{victim}",
    "CON",
    "con.safetensors",
    "x/NUL",
    "NUL.txt",
    "nul",
    "PRN.safetensors",
    "AUX",
    "aux.bin",
    "COM1",
    "com9.safetensors",
    "LPT1.safetensors",
    "COM\u00b9.safetensors",
    "CONIN$",
    "CLOCK$",
    "{victim}:evil",
    "{victim}::$DATA",
    "x.safetensors:{victim}",
    ":{victim}",
    "..:x",
    "x/:$I30:$INDEX_ALLOCATION",
    "PROGRA~1",
    "{victim}.",
    "{victim} ",
    "{victim}. . .",
    "..../{victim}",
    "....//{victim}",
    "....\\\\{victim}",
    ".. /{victim}",
    "../{victim}.",
    "x./{victim}",
)
SPELLED = (
    "%2e%2e/{victim}",
    "%2e%2e%2f{victim}",
    "..%2f{victim}",
    "..%5c{victim}",
    "%252e%252e%252f{victim}",
    "..%c0%af{victim}",
    "..%ef%bc%8f{victim}",
    "%u002e%u002e/{victim}",
    "%00",
    "&#46;&#46;/{victim}",
    "\\u002e\\u002e/{victim}",
    "=?utf-8?q?..=2f{victim}?=",
    "..\uff0f{victim}",
    "..\u2215{victim}",
    "..\u2044{victim}",
    "..\uff3c{victim}",
    "..\u2216{victim}",
    "\uff0e\uff0e/{victim}",
    "\u2024\u2024/{victim}",
    "\u2025/{victim}",
    ".\u200b./{victim}",
    "..\u200b/{victim}",
    ".\u0300./{victim}",
    "\u202e{victim}/..",
    "\ufeff../{victim}",
    "\u00b7\u00b7/{victim}",
    "x\uff1a{victim}",
)
BROKEN = (
    "",
    " ",
    ".",
    "./",
    "...",
    "/",
    "\\",
    "\0",
    "../{victim}\0",
    "../{victim}\0.safetensors",
    "x\0/../../{victim}",
    "\n",
    "../{victim}\n",
    "x\r\n../{victim}",
    "\t../{victim}",
    "\x1b[2J../{victim}",
    "\x7f",
    "x\x08\x08../{victim}",
    "\ud800../{victim}",
    "a" * 256,
    "a" * 5000,
    "a/" * 3000,
    "../" * 3000 + "etc/passwd",
    "..\\" * 3000 + "{victim}",
    "a" * 1_000_000,
    "-rf",
    "--help",
    "*",
    "?",
    "[!x]*",
    "`id`",
    "$(id)",
    "; touch {victim}",
    "| cat",
    "{{0}}",
    "%s%n",
    "__import__('os')",
    "<script>",
)
TEMPLATES = UP + WINDOWS + SPELLED + BROKEN


def attacks(victim: Path, folder: str = "models") -> list[str]:
    """Every attack, for a file that lies beside (or above) the folder of that name."""
    return [
        template.format(victim=victim.name, absolute=victim.as_posix(), folder=folder)
        for template in TEMPLATES
    ]


def in_arguments(names: Iterable[str]) -> list[str]:
    """Those that can stand on a command line: no NUL, and nothing that the system refuses to hand over."""
    return [name for name in names if "\0" not in name and "\ud800" not in name and len(name) < 100_000]


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """What lies in these folders is the same afterwards, byte for byte, and nothing has come or gone."""
    before = {folder: _content(folder) for folder in folders}
    yield
    for folder, content in before.items():
        assert _content(folder) == content, f"{folder} was changed"


def _content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if not path.is_symlink()
    }
