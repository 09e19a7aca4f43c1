"""What ComfyUI-Manager runs after installing the pack: prepares folders, says what is next, installs nothing.

python install.py              prepare the model folder, say what is next
python install.py list         what weights_manifest.json names: shipped, and published elsewhere
python install.py get ID       fetch a published set, check it, convert it; get --help says how
python install.py verify [ID]  compare files with their hashes: the shipped and fetched ones, or those of ID
python install.py doctor       what is wrong, and what to do; with --hosts, which sources answer
python install.py convert      make published weights into our own files; convert --help says how
python install.py pin [ID]     for maintainers: fill the manifest from the Hub's own metadata
python install.py demo|test    the command to type for it

Nothing opens a network connection but get, pin and doctor --hosts.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import locale
import os
import re
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

if __package__:
    from .manifest import bring, fetch, lock, pin, roots, sources
    from .manifest.connection import Wire
    from .manifest.download import Pace, Progress
    from .manifest.errors import FetchError, Stopped
    from .manifest.part import write_whole
    from .manifest.schema import DOWNLOADS, Manifest, RemoteFile, WeightFile, dump, parse
    from .manifest.verify import Problem, check, problems
else:
    from manifest import bring, fetch, lock, pin, roots, sources
    from manifest.connection import Wire
    from manifest.download import Pace, Progress
    from manifest.errors import FetchError, Stopped
    from manifest.part import write_whole
    from manifest.schema import DOWNLOADS, Manifest, RemoteFile, WeightFile, dump, parse
    from manifest.verify import Problem, check, problems

PACK = Path(__file__).resolve().parent
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
    folder = tree / "models" / bring.BRIDGES
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Language Bridge: bridge files go into {folder}")
    print("  Nothing else needs to be installed. Restart ComfyUI, then open Workflow > Browse Templates >")
    print(
        "  language-bridge: the pocket workflow works at once, with the small model that ships with the pack."
    )
    return 0


def show_list() -> int:
    """Print the manifest as a table: what ships, then what `get` fetches and what of it is here."""
    manifest = read_manifest()
    tree = find_comfyui()
    for entry in manifest.entries:
        size = f"{sum(file.bytes for file in entry.files) / 1e6:8.2f} MB"
        print(f"{entry.name:38s} {entry.base:6s} {size}  ships       {entry.licence:29s} {entry.about}")
    known, folders = lock.Lock(), dict[str, tuple[Path, ...]]()
    if tree is not None:
        try:
            folders = _folders(bring.LOOKED_AT, tree / "models", tree)
            known = lock.read_lock(tree / "models")
        except FetchError as error:
            print(error, file=sys.stderr)
    for item in manifest.published:
        total, whole = bring.size_of([item])
        size = f"{total / 1e6:8.0f} MB" if whole else f"{f'> {total / 1e6:.0f}':>8s} MB"
        weights = [file for file in item.files if file.is_pickle or file.path.endswith(".safetensors")]
        state = "verified" if all(file.sha256 for file in weights) else "unverified"
        here = bring.state_of(manifest, item, known, tree / "models", folders) if tree is not None else ""
        if item.by_hand:
            size = " " * 11
        if here in (bring.HERE, bring.FETCHED, bring.BEGUN, bring.BY_HAND) or item.by_hand:
            state = here or bring.BY_HAND
        licence = item.licence or "none declared"
        print(f"{item.name:38s} {item.base or 'tower':6s} {size}  {state:11s} {licence:29s} {item.about}")
    return 0


def verify(name: str = "") -> int:
    """Hash the shipped files and those that were fetched, or those of one name; 1 when one is wrong.

    Name: a shipped entry, or a published set with all that it needs.
    """
    manifest = read_manifest()
    entries = tuple(entry for entry in manifest.entries if name in ("", entry.name))
    wrong = list(problems(PACK, Manifest(entries)))
    count = sum(len(entry.files) for entry in entries)
    tree = find_comfyui()
    try:
        if name and not entries:
            wanted = fetch.find(manifest, name)
            if tree is None:
                print("This folder is not in a ComfyUI's custom_nodes, and COMFYUI_PATH is not set.")
                return 1
            count = sum(len(item.files) for item in manifest.with_needs(wanted))
            wrong = list(fetch.set_problems(manifest, name, tree / "models"))
        elif not name and tree is not None:
            fetched = list(_fetched_problems(manifest, tree / "models"))
            count += len(fetched)
            wrong += [problem for problem in fetched if problem is not None]
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    for problem in wrong:
        print(problem)
    print(f"{count - len(wrong)} of {count} files are as the manifest says")
    if wrong and entries:
        print("  what to do: install the pack again, or fetch the set again: a file was changed, cut off,")
        print("  or is a Git LFS pointer")
    elif wrong:
        print(f"  what to do: python install.py get {name}")
    return int(bool(wrong))


def _fetched_problems(manifest: Manifest, models: Path) -> Iterator[Problem | None]:
    """The state of every file that was fetched, and still lies there, and of what was made of it."""
    known = lock.read_lock(models)
    places = {file.place: file for item in manifest.published for file in item.files}
    for place in known.files:
        if place in places and (models / place).exists():
            yield fetch.file_problem(places[place], known, models)
    for made in known.made.values():
        for item in made:
            if (models / item.path).exists():
                yield check(models, WeightFile(item.path, item.bytes, item.sha256))


def get(
    arguments: list[str],
    *,
    manifest: Manifest | None = None,
    wire: Wire | None = None,
    pace: Pace | None = None,
) -> int:
    """Fetch a published set, check it, convert it; 1 when something is refused.

    The keywords are for tests; without them the pack's manifest, and the connections that the environment
    allows.
    """
    options = get_parser().parse_args(arguments)
    tree = find_comfyui()
    if tree is None and options.models is None:
        print("Say where ComfyUI's models folder is (--models DIR): this is not in a ComfyUI's custom_nodes.")
        return 2
    models = (options.models or (cast(Path, tree) / "models")).resolve()
    manifest = manifest or read_manifest()
    room: list[Room] = []

    def converter() -> bring.Converter | None:
        found = _room()
        if found is None:
            return None
        room.append(found)
        return functools.partial(found.convert.convert, dtype=found.float16 if options.half else None)

    try:
        wish = bring.Wish(
            agreed=options.agree,
            trusting=options.trust_first_use,
            converts=not options.no_convert,
            reference=options.reference,
            form="delta" if options.delta else "replace",
            cleans=options.clean,
            again=options.force,
            roots=_folders(bring.LOOKED_AT, models, tree),
            look=tuple(options.look),
        )
        done = bring.bring(
            manifest,
            options.name,
            models,
            wish,
            converter=converter,
            wire=wire,
            pace=pace,
            say=print,
            progress=_progress,
        )
    except (Stopped, KeyboardInterrupt):
        print("\nStopped. What has arrived is kept; the same command goes on.", file=sys.stderr)
        return 1
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:  # BridgeError: the converter refuses
        if not room or not isinstance(error, room[0].error):
            raise
        print(error, file=sys.stderr)
        return 1
    if done.already:
        print(f"{options.name} was fetched and converted already. To do it again: --force.")
    for item in done.left:
        print(f"Not fetched: {item.name}. {item.by_hand}\n  {item.card}")
    for line in room[0].convert.report(done.written) if done.written else ():
        print(line)
    if done.cleaned:
        print("What was fetched is deleted.")
    elif done.written:
        print(f"What was fetched lies in {models / DOWNLOADS} and is not needed any longer.")
    return 0


def get_parser() -> argparse.ArgumentParser:
    """The command line of get."""
    parser = argparse.ArgumentParser(
        prog="install.py get",
        description="Fetch a published set of weights (install.py list names them), compare it with its "
        "hashes, and convert it. Order of sources: LANGUAGE_BRIDGE_SOURCES=hub,mirror,modelscope; address of "
        "the mirror: HF_ENDPOINT.",
    )
    parser.add_argument("name", metavar="ID", help="name of the set")
    parser.add_argument("--agree", action="store_true", help="you have read its licence, and agree")
    parser.add_argument(
        "--trust-first-use", action="store_true", help="fetch pickles of which nobody has verified the hash"
    )
    parser.add_argument("--models", type=Path, metavar="DIR", help="ComfyUI's models folder")
    parser.add_argument(
        "--look",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with files that you fetched yourself, under whatever names; can be given again",
    )
    parser.add_argument("--no-convert", action="store_true", help="fetch and check only")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="checkpoint that the U-Net came from")
    parser.add_argument("--delta", action="store_true", help="U-Net part as a difference from the reference")
    parser.add_argument("--half", action="store_true", help="write float16")
    parser.add_argument("--clean", action="store_true", help="delete what was fetched once it is converted")
    parser.add_argument("--force", action="store_true", help="do it again, and overwrite what was converted")
    return parser


def _progress(file: RemoteFile) -> Progress:
    """A line that is written over on a terminal, and a line for each tenth elsewhere."""
    shown = [-1]

    def show(done: int, total: int) -> None:
        step = 100 * done // total if total else done >> 24
        if step == shown[0] or (not sys.stderr.isatty() and step // 10 == shown[0] // 10):
            return
        shown[0] = step
        text = f"{file.path}: {done / 1e6:.1f} of {f'{total / 1e6:.1f}' if total else '?'} MB"
        print(text, end="\r" if sys.stderr.isatty() and done != total else "\n", file=sys.stderr)

    return show


def refresh(
    arguments: list[str], *, path: Path | None = None, wire: Wire | None = None, hub: Any = None
) -> int:
    """Fill the manifest from the Hub's metadata; 1 when the Hub contradicts it. Keywords: for tests."""
    parser = argparse.ArgumentParser(
        prog="install.py pin",
        description="Ask the Hub for commit, size and SHA-256 of published files; write what was not known.",
    )
    parser.add_argument("name", nargs="?", default="", metavar="ID", help="one set (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    path = path or PACK / "weights_manifest.json"
    try:
        found = pin.pin(
            parse(path.read_text(encoding="utf-8")), wire or sources.wire({}), options.name, hub=hub
        )
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    for line in found.lines:
        print(line)
    if not options.check:
        write_whole(path, dump(found.manifest).encode("ascii"))
    return int(found.contradicted)


def doctor(arguments: Sequence[str] = (), *, asked: Any = None, wire: Wire | None = None) -> int:
    """Print versions and everything that is wrong, each with what to do; 1 when something has to be mended.

    With --hosts the sources are asked whether they answer; the keywords are for tests of that.
    """
    parser = argparse.ArgumentParser(prog="install.py doctor", description="What was found on this machine.")
    parser.add_argument(
        "--hosts", action="store_true", help="ask the sources of downloads whether they answer"
    )
    parser.add_argument("--lang", choices=("en", "zh"), help="language of the report (default: the system's)")
    options = parser.parse_args(list(arguments))
    doctors, words = _reports()
    missing = doctors.needed_missing()
    tree = find_comfyui()
    models = tree / "models" if tree is not None else None
    folders: dict[str, tuple[Path, ...]] = {}
    unread: dict[tuple[str, str], None] = {}
    if models is not None and tree is not None:
        for category in doctors.CATEGORIES:
            folders[category], problem = _roots(category, models, tree)
            unread |= {problem: None} if problem else {}
    shown = [("Python", f"{sys.version.split()[0]}  {sys.executable}"), ("pack", str(PACK))]
    shown += [("ComfyUI", f"{comfyui_version(tree)}  {tree or 'not in custom_nodes, COMFYUI_PATH not set'}")]
    shown += [(name, _version(name)) for name in REPORTED]
    choices = [("models", str(models))] if models is not None else []
    choices += [("device", _device())] if "torch" not in missing else []
    choices += doctors.places()
    machine = doctors.Machine(
        pack=PACK,
        models=models,
        roots=folders,
        versions=shown,
        choices=choices,
        comfyui=comfyui_version(tree).strip("-"),
        missing=missing,
        unread=list(unread),
        whole_paths=True,
    )
    findings = doctors.examine(machine, hosts=options.hosts, wire=wire, asked=asked)
    told = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    code = options.lang or words.code_of(next(filter(None, told), locale.getlocale()[0] or ""))
    print(doctors.report(machine, findings, words.words_of(code)))
    return int(any(not finding.note for finding in findings))


def _roots(category: str, models: Path, tree: Path) -> tuple[tuple[Path, ...], tuple[str, str] | None]:
    """The folders of a category, ComfyUI's own alone where the YAML cannot be read, and why that is so."""
    try:
        return roots.roots(category, models, tree=tree), None
    except FetchError as error:
        return roots.roots(category, models), (error.what, error.found)


def _folders(categories: Sequence[str], models: Path, tree: Path | None) -> dict[str, tuple[Path, ...]]:
    """The folders of each category, those of extra_model_paths.yaml too; FetchError when it is unreadable."""
    return {name: roots.roots(name, models, tree=tree) for name in categories}


def _device() -> str:
    """What torch would run on; ComfyUI's own choice is shown by the node Language Bridge Doctor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return "mps" if torch.backends.mps.is_available() else "cpu"


def convert(arguments: list[str]) -> int:
    """Convert published weights; 1 when they are refused, 2 when the command line is not understood."""
    options = convert_parser().parse_args(arguments)
    room = _room()
    if room is None:
        return 1
    try:
        table = room.presets.read_presets(options.presets) if options.presets else room.presets.published()
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
        written = room.convert.convert(
            options.files,
            options.out or models / bring.BRIDGES,
            towers=options.out or models / bring.TOWERS,
            preset=options.preset,
            reference=options.reference,
            unet=options.unet,
            form="delta" if options.delta else "replace",
            name=options.name,
            dtype=room.float16 if options.half else None,
            overwrite=options.force,
            presets=table,
        )
    except room.error as error:
        print(error, file=sys.stderr)
        return 1
    for line in room.convert.report(written):
        print(line)
    return 0


@dataclass(frozen=True)
class Room:
    """What this file needs of the conversion room, which needs torch: two modules, the error, a dtype."""

    convert: Any
    presets: Any
    error: type[Exception]
    float16: Any


def _room() -> Room | None:
    """The conversion room; None, and a line on the console, where there is no torch."""
    if importlib.util.find_spec("torch") is None:
        print(f"torch is missing in {sys.executable}. Run this with the Python that ComfyUI runs in.")
        return None
    _name_the_pack()
    import torch

    from language_bridge.bridges.errors import BridgeError  # pyright: ignore[reportMissingImports]
    from language_bridge.conversion import convert as converter  # pyright: ignore[reportMissingImports]
    from language_bridge.conversion import presets  # pyright: ignore[reportMissingImports]

    return Room(converter, presets, BridgeError, torch.float16)


def _reports() -> tuple[Any, Any]:
    """The modules of the doctor and of its sentences, which need no torch."""
    _name_the_pack()
    from language_bridge.reports import doctor, words  # pyright: ignore[reportMissingImports]

    return doctor, words


def _name_the_pack() -> None:
    """Let the pack's rooms find each other, where this file is run as a script."""
    if "language_bridge" not in sys.modules:
        package = types.ModuleType("language_bridge")
        package.__path__ = [str(PACK)]
        sys.modules["language_bridge"] = package


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


COMMANDS = {"list": show_list, "verify": verify, "demo": demo, "test": test}
WITH_ARGUMENTS = {"get": get, "doctor": doctor, "convert": convert, "pin": refresh}


def main(arguments: list[str]) -> int:
    """Run one command, or prepare when there is none; returns the exit code."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a console that has no sign for a file's name still shows the rest
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not arguments:
        return prepare()
    if arguments[0] in WITH_ARGUMENTS:
        return WITH_ARGUMENTS[arguments[0]](arguments[1:])
    if arguments[0] == "verify" and len(arguments) == 2:
        return verify(arguments[1])
    command = COMMANDS.get(arguments[0])
    if command is None or len(arguments) > 1:
        print((__doc__ or "").strip())
        return 2
    return command()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
