"""What ComfyUI-Manager runs after installing the pack: prepares folders, says what is next, installs nothing.

python install.py            prepare the model folder, say what is next
python install.py list       what weights_manifest.json names
python install.py verify     compare the shipped files with their hashes
python install.py doctor     what was found on this machine
python install.py convert    make published weights into our own files; convert --help says how
python install.py demo|test  the command to type for it
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import sys
import types
from pathlib import Path

if __package__:
    from .manifest.schema import Manifest, parse
    from .manifest.verify import problems
else:
    from manifest.schema import Manifest, parse
    from manifest.verify import problems

PACK = Path(__file__).resolve().parent
MODEL_FOLDER = "language_bridges"
TOWER_FOLDER = "text_encoders"
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


def convert(arguments: list[str]) -> int:
    """Convert published weights; 1 when they are refused, 2 when the command line is not understood."""
    options = convert_parser().parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        print(f"torch is missing in {sys.executable}. Run this with the Python that ComfyUI runs in.")
        return 1
    if "language_bridge" not in sys.modules:  # let the pack's rooms find each other
        package = types.ModuleType("language_bridge")
        package.__path__ = [str(PACK)]
        sys.modules["language_bridge"] = package
    import torch

    from language_bridge.bridges.errors import BridgeError  # pyright: ignore[reportMissingImports]
    from language_bridge.conversion import convert as room  # pyright: ignore[reportMissingImports]
    from language_bridge.conversion import presets  # pyright: ignore[reportMissingImports]

    try:
        table = presets.read_presets(options.presets) if options.presets else presets.published()
        if options.list:
            for method in table.methods.values():
                print(f"{method.name:38s} {method.base + ' ' + method.kind:14s} {method.about}")
            for tower in table.towers.values():
                print(f"{tower.name:38s} {tower.family:14s} {tower.about}")
            return 0
        tree = find_comfyui()
        if not options.files or (tree is None and options.out is None):
            print("Name the files to convert, and --out DIR where this is not in a ComfyUI.")
            return 2
        models = tree / "models" if tree is not None else PACK
        written = room.convert(
            options.files,
            options.out or models / MODEL_FOLDER,
            towers=options.out or models / TOWER_FOLDER,
            preset=options.preset,
            reference=options.reference,
            unet=options.unet,
            form="delta" if options.delta else "replace",
            name=options.name,
            dtype=torch.float16 if options.half else None,
            overwrite=options.force,
            presets=table,
        )
    except BridgeError as error:
        print(error, file=sys.stderr)
        return 1
    for line in room.report(written):
        print(line)
    return 0


def convert_parser() -> argparse.ArgumentParser:
    """The command line of convert."""
    parser = argparse.ArgumentParser(
        prog="install.py convert",
        description="Make published weights into files of Language Bridge. Name together what belongs "
        "together: weight files, model folders, tokenizer files (vocab.txt, sentencepiece.bpe.model, ...).",
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="file or folder as published")
    parser.add_argument("--as", dest="preset", metavar="NAME", help="which published model it is; see --list")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="checkpoint that the U-Net came from")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: ComfyUI's models)")
    parser.add_argument("--name", help="name of the bridge file (default: the published model's)")
    parser.add_argument("--unet", default="auto", choices=("auto", "none", "kv", "attn2", "full"))
    parser.add_argument("--delta", action="store_true", help="U-Net part as a difference from the reference")
    parser.add_argument("--half", action="store_true", help="write float16")
    parser.add_argument("--presets", type=Path, metavar="FILE", help="a table of your own")
    parser.add_argument("--force", action="store_true", help="overwrite files of the same name")
    parser.add_argument("--list", action="store_true", help="print the published models and stop")
    return parser


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
    if arguments[0] == "convert":
        return convert(arguments[1:])
    command = COMMANDS.get(arguments[0])
    if command is None or len(arguments) > 1:
        print((__doc__ or "").strip())
        return 2
    return command()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
