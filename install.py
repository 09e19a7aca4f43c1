"""What ComfyUI-Manager runs after installing the pack: prepares folders, says what is next, installs nothing.

python install.py            prepare the model folder, say what is next
python install.py list       what weights_manifest.json names
python install.py verify     compare the shipped files with their hashes
python install.py doctor     what was found on this machine
python install.py demo|test  the command to type for it
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

if __package__:
    from .manifest.schema import Manifest, parse
    from .manifest.verify import problems
else:
    from manifest.schema import Manifest, parse
    from manifest.verify import problems

PACK = Path(__file__).resolve().parent
MODEL_FOLDER = "language_bridges"
NEEDED = ("torch", "numpy", "PIL", "safetensors", "tokenizers")
REPORTED = ("torch", "transformers", "tokenizers", "safetensors", "comfyui-frontend-package")


def read_manifest() -> Manifest:
    """The pack's own weights_manifest.json."""
    return parse((PACK / "weights_manifest.json").read_text(encoding="utf-8"))


def find_comfyui(pack: Path = PACK) -> Path | None:
    """The ComfyUI that COMFYUI_PATH names or whose custom_nodes holds the pack; None without either."""
    named = os.environ.get("COMFYUI_PATH")
    tree = Path(named).expanduser().resolve() if named else pack.parent.parent
    if not named and pack.parent.name != "custom_nodes":
        return None
    return tree if (tree / "main.py").is_file() and (tree / "comfy").is_dir() else None


def prepare() -> int:
    """Make models/language_bridges and say what is next."""
    tree = find_comfyui()
    if tree is None:
        print("Language Bridge: this folder is not in a ComfyUI's custom_nodes, so no model folder was made.")
        print("  Put it there, or set COMFYUI_PATH, and run this file again.")
        return 0
    folder = tree / "models" / MODEL_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Language Bridge: bridge files go into {folder}")
    print("  Nothing else needs to be installed. Restart ComfyUI, then open Workflow > Browse Templates >")
    print(
        "  language-bridge: the pocket workflow works at once, with the small model that ships with the pack."
    )
    return 0


def show_list() -> int:
    """Print the manifest as a table."""
    for entry in read_manifest().entries:
        size = sum(file.bytes for file in entry.files)
        print(f"{entry.name:28s} {entry.base:7s} {size / 1e6:8.2f} MB  {entry.licence:18s} {entry.about}")
    return 0


def verify() -> int:
    """Hash every file of the manifest; 1 when one is wrong."""
    manifest = read_manifest()
    wrong = list(problems(PACK, manifest))
    for problem in wrong:
        print(problem)
    count = sum(len(entry.files) for entry in manifest.entries)
    print(f"{count - len(wrong)} of {count} files are as the manifest says")
    if wrong:
        print("  what to do: install the pack again; a file was changed, cut off, or is a Git LFS pointer")
    return int(bool(wrong))


def doctor() -> int:
    """Print versions and places; 1 when something that the pack needs is missing."""
    print(f"Python      {sys.version.split()[0]}  {sys.executable}")
    print(f"pack        {PACK}")
    tree = find_comfyui()
    print(f"ComfyUI     {comfyui_version(tree)}  {tree or 'not in custom_nodes, COMFYUI_PATH not set'}")
    for name in REPORTED:
        print(f"{name:26s} {_version(name)}")
    if tree is not None:
        folder = tree / "models" / MODEL_FOLDER
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        print(f"bridges     {folder}: {', '.join(files) or 'none yet'}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"missing     {', '.join(missing)}: this Python is not the one that ComfyUI runs in")
    return int(verify() or bool(missing))


def comfyui_version(tree: Path | None) -> str:
    """The version that a ComfyUI tree names, "-" where it names none."""
    file = tree / "comfyui_version.py" if tree is not None else None
    if file is None or not file.is_file():
        return "-"
    found = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text(encoding="utf-8"))
    return found.group(1) if found else "-"


def demo() -> int:
    """Say how to see the demo."""
    return _tell("demo")


def test() -> int:
    """Say how to run the tests."""
    return _tell("test")


def _tell(command: str) -> int:
    if (PACK / "bootstrap.py").is_file():
        print(f"Type:  {sys.executable} {PACK / 'bootstrap.py'} {command}")
    else:
        print(
            "bootstrap.py is not part of the published archive. Get the source repository, then type there:"
        )
        print(f"  python bootstrap.py {command}")
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


COMMANDS = {"list": show_list, "verify": verify, "doctor": doctor, "demo": demo, "test": test}


def main(arguments: list[str]) -> int:
    """Run one command, or prepare when there is none; returns the exit code."""
    if not arguments:
        return prepare()
    command = COMMANDS.get(arguments[0])
    if command is None or len(arguments) > 1:
        print((__doc__ or "").strip())
        return 2
    return command()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
