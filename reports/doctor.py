"""The doctor: what is wrong with this installation and its files, each finding with one thing to do.

It asks nobody on a network unless it is told to, and changes nothing. What knows the host (folders, versions,
devices) is handed in. Without torch, files are judged by the manifest alone.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion import VERSION
from ..manifest import fetch, reach, sources
from ..manifest.bring import BRIDGES, TOWERS
from ..manifest.errors import FetchError, Stopped
from ..manifest.lock import Lock, read_lock
from ..manifest.part import ENDING
from ..manifest.schema import DOWNLOADS, Manifest, ManifestError, PublishedSet, RemoteFile, WeightFile, parse
from ..manifest.verify import check, problems
from .words import Words

if TYPE_CHECKING:
    from ..bridges.file import BridgeHeader
    from ..encoders.file import EncoderHeader

OLDEST_COMFYUI = "0.20.1"
"""The oldest host that the tests run on; as in pyproject.toml."""
OLDEST_TORCH = "2.6"
"""Before it, the weights-only loader of pickles could be made to run a program (CVE-2025-32434)."""
CATEGORIES = (
    BRIDGES,
    TOWERS,
    "checkpoints",
    "loras",
    "vae",
    "diffusion_models",
    "controlnet",
    "embeddings",
    "clip_vision",
    "style_models",
    "hypernetworks",
    "model_patches",
)
"""Model folders that are looked through."""
NEEDED = ("torch", "numpy", "PIL", "safetensors", "tokenizers")
WEIGHTS = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")
LOOKED_IN = (BRIDGES, TOWERS, "controlnet")
"""Where the nodes find bridges and towers; and where a published adapter is known by its tensors, too."""
MOST_FILES = 50_000
"""The most files that are looked at in one category."""

_Asked = Callable[[], bool]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or (note) only worth knowing.

    code: the sentences `doctor_<code>` and `doctor_<code>_do`, with these values.
    """

    code: str
    values: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    note: bool = False

    def text(self, say: Words) -> str:
        """What is wrong, in words."""
        return say(f"doctor_{self.code}", **self.values)

    def action(self, say: Words) -> str:
        """The one thing to do."""
        return say(f"doctor_{self.code}_do", **self.values)


@dataclass(frozen=True)
class Machine:
    """What the doctor looks at.

    models: ComfyUI's models folder, None where there is no ComfyUI. roots: category -> model folders, also
    those of extra_model_paths.yaml. versions, choices: (name, value); a choice has the sentence
    `doctor_choice_<name>`. comfyui: its version, "" where unknown. missing: modules that cannot be imported.
    unread: what is wrong with an extra_model_paths.yaml, and what was found there. whole_paths: name files by
    their whole path, not by category and name.
    """

    pack: Path
    models: Path | None
    roots: Mapping[str, Sequence[Path]]
    versions: Sequence[tuple[str, str]]
    choices: Sequence[tuple[str, str]] = ()
    comfyui: str = ""
    missing: Sequence[str] = ()
    unread: Sequence[tuple[str, str]] = ()
    whole_paths: bool = False

    def named(self, category: str, root: Path, path: Path) -> str:
        """How a file is named to the user."""
        return str(path) if self.whole_paths else f"{category}/{path.relative_to(root).as_posix()}"


@dataclass(frozen=True)
class _Shelf:
    """What lies in the model folders: ours by name, and the names of published sets that were converted."""

    bridges: Mapping[str, tuple[BridgeHeader, EncoderHeader | None]]
    towers: Mapping[str, EncoderHeader]
    converted: frozenset[str]


def needed_missing() -> tuple[str, ...]:
    """Modules that the pack needs and that this Python does not have."""
    return tuple(name for name in NEEDED if importlib.util.find_spec(name) is None)


def examine(
    machine: Machine,
    *,
    hosts: bool = False,
    wire: Any = None,
    asked: tuple[tuple[str, str], ...] | None = None,
    environ: Mapping[str, str] | None = None,
    stopped: _Asked | None = None,
) -> list[Finding]:
    """Everything that is wrong, the gravest kinds first.

    hosts: ask the sources of downloads whether they answer; wire, asked: for tests of that.

    Raises:
        Stopped: `stopped` said so.
    """
    found = list(_versions(machine))
    try:
        manifest = read_manifest(machine.pack)
    except (OSError, ManifestError) as error:
        lines = str(error).split("\n")
        return [
            *found,
            Finding("shipped_damaged", {"path": "weights_manifest.json", "found": lines[0][:200]}),
        ]
    found += _shipped(machine, manifest)
    if machine.models is None:
        found.append(Finding("no_comfyui", note=True))
    else:
        lock, damaged = _lock(machine.models)
        found += damaged
        found += _fetched(manifest, lock, machine.models, stopped)
        found += _unfinished(manifest, machine.models)
        found += _files(machine, manifest, lock, stopped)
    return found + list(_sources(hosts, wire, asked, environ, stopped))


def places(environ: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """The sources in the user's order, as choices; none where a variable is wrong, which `examine` finds."""
    try:
        return [("source", f"{source} {url}") for source, url in reach.places(environ)]
    except FetchError:
        return []


def read_manifest(pack: Path) -> Manifest:
    """The pack's own weights_manifest.json."""
    return parse((pack / "weights_manifest.json").read_text(encoding="utf-8"))


def report(machine: Machine, findings: Iterable[Finding], say: Words) -> str:
    """Versions, choices and findings in words, each finding with what to do."""
    lines = [say("doctor_head", version=VERSION), ""]
    lines += [f"{name}: {value}" for name, value in machine.versions]
    lines += [say(f"doctor_choice_{name}", value=value) for name, value in machine.choices]
    found = list(findings)
    for title, group in (
        ("doctor_wrong", [item for item in found if not item.note]),
        ("doctor_notes", [item for item in found if item.note]),
    ):
        if group:
            lines += ["", say(title, count=len(group))]
        for number, item in enumerate(group, 1):
            lines += [f"{number}. {item.text(say)}", f"   {say('doctor_do', action=item.action(say))}"]
    if all(item.note for item in found):
        lines += ["", say("doctor_well")]
    return "\n".join(lines)


# -- the machine ---------------------------------------------------------------------------------------


def _versions(machine: Machine) -> Iterator[Finding]:
    if machine.missing:
        yield Finding("modules_missing", {"names": ", ".join(machine.missing)})
    if machine.comfyui and _number(machine.comfyui) < _number(OLDEST_COMFYUI):
        yield Finding("host_old", {"found": machine.comfyui, "expected": OLDEST_COMFYUI})
    for what, found in machine.unread:
        yield Finding("roots_unread", {"what": what, "found": found})
    torch = dict(machine.versions).get("torch", "")
    if _number(torch) and _number(torch) < _number(OLDEST_TORCH):
        yield Finding("torch_old", {"found": torch, "expected": OLDEST_TORCH})


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version.partition("+")[0])[:3])


def _shipped(machine: Machine, manifest: Manifest) -> Iterator[Finding]:
    for problem in problems(machine.pack, manifest):
        yield Finding("shipped_damaged", {"path": problem.path, "found": problem.found})


def _sources(
    hosts: bool,
    wire: Any,
    asked: tuple[tuple[str, str], ...] | None,
    environ: Mapping[str, str] | None,
    stopped: _Asked | None,
) -> Iterator[Finding]:
    try:
        reach.places(environ)
        sources.wire(environ)
        reached = reach.reach(environ, wire=wire, asked=asked, stopped=stopped) if hosts else ()
    except FetchError as error:
        yield Finding(
            "variable_wrong", {"what": error.what, "found": error.found, "expected": error.expected}
        )
        return
    for one in reached:
        if one.problem:
            values = {"source": one.source, "url": one.url, "problem": one.problem}
            yield Finding(f"host_{one.cause}", values)
        else:
            seconds = f"{one.seconds:.1f}"
            yield Finding("host_answers", {"source": one.source, "url": one.url, "seconds": seconds}, True)


# -- what was fetched ----------------------------------------------------------------------------------


def _lock(models: Path) -> tuple[Lock, list[Finding]]:
    try:
        return read_lock(models), []
    except FetchError as error:
        found = error.found.replace(str(models), models.name)[:200]
        return Lock(), [Finding("lock_damaged", {"path": f"{DOWNLOADS}/lock.json", "found": found})]


def _fetched(manifest: Manifest, lock: Lock, models: Path, stopped: _Asked | None) -> Iterator[Finding]:
    """Files that were fetched or made and are not what they were then; what is gone whole is no fault."""
    files = {file.place: (file, item) for item in manifest.published for file in item.files}
    for place in lock.files:
        if place in files and (models / place).exists():
            file, item = files[place]
            problem = fetch.file_problem(file, lock, models, stopped)
            if problem is not None:
                values = {"path": place, "found": problem.found, "expected": problem.expected}
                yield Finding("fetched_damaged", values | {"set": item.name})
    for name, made in lock.made.items():
        there = [item for item in made if (models / item.path).exists()]
        for item in made if there else ():
            problem = check(models, WeightFile(item.path, item.bytes, item.sha256), stopped)
            if problem is not None:
                code = "made_damaged" if item in there else "made_missing"
                yield Finding(code, {"path": item.path, "found": problem.found, "set": name})


def _unfinished(manifest: Manifest, models: Path) -> Iterator[Finding]:
    for item in manifest.published:
        for file in item.files:
            place = models / f"{file.place}{ENDING}"
            if place.is_file():
                size = f"{place.stat().st_size / 1e6:.1f} MB"
                yield Finding("unfinished", {"path": file.place, "size": size, "set": item.name}, True)


# -- what lies in the model folders --------------------------------------------------------------------


def _files(machine: Machine, manifest: Manifest, lock: Lock, stopped: _Asked | None) -> list[Finding]:
    """Where each file belongs, by its name, size and header; then what each bridge needs."""
    if "torch" in machine.missing or "safetensors" in machine.missing:
        return list(_unconverted(machine, manifest, frozenset(lock.made), {}))
    found: list[Finding] = []
    bridges: dict[str, tuple[BridgeHeader, EncoderHeader | None]] = {}
    towers: dict[str, EncoderHeader] = {}
    shapes: dict[Path, Mapping[str, tuple[int, ...]]] = {}
    presets = set(lock.made)
    for category, root, path in _weights_in(machine):
        if stopped is not None and stopped():
            raise Stopped("while the files were looked at")
        if path.suffix.lower() not in (".safetensors", ".sft"):
            continue
        name = machine.named(category, root, path)
        kind, value = _look(path)
        if kind == "bridge":
            bridges[name] = value
            record = value[0].training.get("conversion")
            presets |= {str(record.get("preset"))} if isinstance(record, dict) else set()
            if category not in LOOKED_IN:
                found.append(Finding("bridge_elsewhere", {"path": name, "folder": f"models/{BRIDGES}"}))
        elif kind == "tower":
            towers[name] = value
            presets.add(value.identity)
            if category not in LOOKED_IN:
                found.append(Finding("tower_elsewhere", {"path": name, "folder": f"models/{TOWERS}"}))
        elif kind == "newer":
            found.append(Finding("pack_old", {"path": name, "found": VERSION}))
        elif kind == "damaged" and category in (BRIDGES, TOWERS):
            found.append(Finding("file_damaged", {"path": name, "found": value}))
        elif kind == "shapes":
            shapes[path] = value
    shelf = _Shelf(bridges, towers, frozenset(presets))
    found += _unconverted(machine, manifest, shelf.converted, shapes)
    return found + list(_pairs(shelf, manifest))


def _weights_in(machine: Machine) -> Iterator[tuple[str, Path, Path]]:
    """Category, its folder and path of every weight file, each file once."""
    seen: set[str] = set()
    for category, roots in machine.roots.items():
        count = 0
        for root in roots:
            for folder, inner, names in os.walk(root, followlinks=True):
                real = os.path.realpath(folder)
                if real in seen:  # a root inside of another, or a link that leads in a circle
                    inner.clear()
                    continue
                seen.add(real)
                inner.sort()
                for name in sorted(names):
                    count += 1
                    if count > MOST_FILES:
                        break
                    if name.lower().endswith(WEIGHTS):
                        yield category, root, Path(folder, name)


def _look(path: Path) -> tuple[str, Any]:
    """What the header of a safetensors file says that it is: bridge, tower, newer, damaged, shapes."""
    from ..bridges import file as bridge_file
    from ..bridges.errors import BridgeError
    from ..encoders import file as tower_file
    from ..encoders import guard

    try:
        layout = guard.read_layout(path)
        bridge = layout.metadata.get(bridge_file.METADATA_KEY)
        tower = layout.metadata.get(tower_file.METADATA_KEY)
        if bridge is None and tower is None:
            return "shapes", layout.shapes
        for text, newest in ((bridge, bridge_file.FORMAT), (tower, tower_file.FORMAT)):
            number = guard.parse_json(text, "header").get("format") if text is not None else 0
            if isinstance(number, int) and number > newest:
                return "newer", number
        inside = tower_file.EncoderHeader.from_json(tower) if tower is not None else None
        if bridge is not None:
            return "bridge", (bridge_file.BridgeHeader.from_json(bridge), inside)
        return "tower", inside
    except (BridgeError, OSError) as error:
        return "damaged", getattr(error, "found", str(error))[:200]


def _unconverted(
    machine: Machine,
    manifest: Manifest,
    converted: frozenset[str],
    shapes: Mapping[Path, Mapping[str, tuple[int, ...]]],
) -> Iterator[Finding]:
    """Published files that nobody has converted yet, or that lie where nobody looks for them."""
    for category, root, path in _weights_in(machine):
        name = machine.named(category, root, path)
        owner = _published(path, manifest)
        if owner is not None:
            item, file = owner
            folder = file.to.split("/")[0]
            if folder and category != folder:
                yield Finding("published_elsewhere", {"path": name, "folder": f"models/{folder}"})
            elif not folder and item.conversion is not None and not _is_converted(item, converted):
                yield Finding("unconverted", {"path": name, "set": item.name}, True)
        elif path in shapes and category in LOOKED_IN:
            kind = _kind_of(shapes[path])
            if kind or category == BRIDGES:
                yield Finding("unknown_unconverted", {"path": name, "kind": kind or "-"}, not kind)
        elif category == BRIDGES and path.suffix.lower() != ".safetensors":
            yield Finding("unknown_unconverted", {"path": name, "kind": "-"})


def _published(path: Path, manifest: Manifest) -> tuple[PublishedSet, RemoteFile] | None:
    """The published file that this is by its name or exact size, where its size fits; no hash is taken."""
    try:
        size = path.stat().st_size
    except OSError:
        return None
    for item in manifest.published:
        for file in item.files:
            if not file.path.lower().endswith(WEIGHTS) or file.most_bytes is None:
                continue
            same = Path(file.path).name == path.name or (file.bytes and file.bytes == size)
            if same and file.least_bytes <= size <= file.most_bytes:
                return item, file
    return None


def _is_converted(item: PublishedSet, converted: frozenset[str]) -> bool:
    return item.name in converted or (item.conversion is not None and item.conversion.preset in converted)


def _kind_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The kind of bridge that claims published tensors, "" when none does."""
    from ..bridges.base import kinds

    return next((name for name, kind in kinds().items() if kind.recognise(shapes) is not None), "")


def _pairs(shelf: _Shelf, manifest: Manifest) -> Iterator[Finding]:
    """Bridges whose text tower is absent, or another one than they were trained with."""
    for name, (header, inside) in shelf.bridges.items():
        wanted = header.encoder
        if inside is not None or wanted.family == "host":
            continue
        near: list[tuple[str, str]] = []
        for place, tower in shelf.towers.items():
            if tower.identity == wanted.identity:
                difference = wanted.differs(tower)
                if difference is None:
                    near = []
                    break
                near.append((place, difference))
        else:
            values = {"path": name, "tower": wanted.identity}
            if near:
                yield Finding("tower_differs", values | {"other": near[0][0], "difference": near[0][1]})
                continue
            source = _set_of_tower(wanted.identity, manifest)
            if source is None:
                yield Finding("tower_missing", values)
            else:
                code = "tower_by_hand" if source.by_hand else "tower_fetchable"
                yield Finding(code, values | {"set": source.name, "card": source.card})


def _set_of_tower(identity: str, manifest: Manifest) -> PublishedSet | None:
    for item in manifest.published:
        preset = item.conversion.preset if item.conversion is not None else item.name
        if identity in (preset, item.name):
            return item
    return None
