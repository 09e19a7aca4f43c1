"""Takes a graph from another machine: which file here is the bridge that is meant there, and what to say.

The name decides where nothing else is known. Where the graph keeps a record, the content decides: the same
content under another name is taken as if it had that name; another content under the same name is said.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths

from ..bridges.errors import BridgeError
from ..bridges.file import BridgeHeader
from ..manifest.schema import Manifest
from ..manifest.schema import parse as parse_manifest
from . import folders
from .identity import DIGITS, Record, about, content, id_of, is_cheap, plain, record_of
from .language import LANGUAGES, words

MANIFEST = Path(__file__).parent.parent / "weights_manifest.json"
NODE = "LanguageBridge"
NAME, IDENTITY = "bridge", "identity"
"""The node with a bridge, and its inputs: file name and record."""

OF_GRAPH = "language_bridge"
"""Key of records in the `extra` of a saved graph."""

EVENT = "language_bridge.identity"
"""What web/identity.js listens for."""

_HELD_BY_SYSTEMS = set('<>:"|?*')


@dataclass(frozen=True)
class Found:
    """The bridge that is meant: its name in the list here, and its file.

    note: the sentence of `locales/*/reports.json` that people must hear of it, with its values; None when it
    is what was meant.
    """

    name: str
    path: Path
    note: tuple[str, dict[str, str]] | None = None

    def say(self, language: str = LANGUAGES[0]) -> str:
        """The note in a language of `language.LANGUAGES`; "" without one."""
        return words(language)(self.note[0], **self.note[1]) if self.note else ""


def resolve(name: str, identity: object = "") -> Found:
    """The bridge that a graph means by a file name and the record beside it.

    BridgeError, the one message for people, when it is not here: name, size, source and command.
    """
    listed = folders.find(name)
    record = about(name, identity)
    if listed is not None:
        here, path = listed
        if record is None or not record.hash or content(path)[:DIGITS] == record.hash:
            return Found(here, path)
        twin = _twin(record, here)
        if twin is not None:
            note = {"name": name, "other": twin.name, "meant": str(record)}
            return Found(twin.name, twin.path, ("travel_moved", note))
        own = _record(here, path, folders.bridge_header(path))
        if own.id != record.id:
            raise _another(name, record, own)
        return Found(here, path, ("travel_changed", {"name": name, "meant": str(record), "is": str(own)}))
    if not _is_name(name):
        raise _missing(name, None)
    twin = _twin(record, "")
    if twin is not None:
        return twin
    wanted = record.id if record is not None else _stem(name)
    alike = [found for found in folders.headers() if id_of(found[2], found[0]) == wanted]
    if len(alike) != 1:
        raise _missing(name, record, [found[0] for found in alike])
    other, path, header = alike[0]
    if record is None or not record.hash:
        return Found(other, path, ("travel_named", {"name": name, "other": other, "id": wanted}))
    note = {"name": name, "other": other, "meant": str(record), "is": str(_record(other, path, header))}
    return Found(other, path, ("travel_other", note))


def fingerprint(name: str | None, identity: object = "") -> str:
    """Follows what the node would read: the bridge by its content, the tower by its header, size and time.

    name: None where it comes over a link, and is not known yet; then every bridge is followed.
    """
    if name is None:
        facts = [(n, path.stat().st_size, path.stat().st_mtime_ns) for n, path, _ in folders.headers()]
        return repr(facts)
    try:
        found = resolve(name, identity)
        own, *tower = folders.files_of(found.name)
        # What lies in the bridge's own file and is not hashed is followed by the file's size and time.
        unread = tower or ([own] if folders.read_encoder_header(own) is not None else [])
        facts = [(path.stat().st_size, path.stat().st_mtime_ns) for path in unread]
        return f"{content(found.path)} {facts}"
    except (OSError, ValueError):
        return name


def records(pack: str) -> dict[str, str]:
    """For the page: the record of every bridge whose content is known or soon known, by its name."""
    found: dict[str, str] = {}
    for name, path, header in folders.headers():
        if is_cheap(path):
            try:
                found[name] = record_of(name, header, path, pack).to_json()
            except BridgeError as error:
                logging.debug("Language Bridge passes over %s: %s", path.name, error)
    return found


# -- what a saved graph carries ------------------------------------------------------------------------------


def stamp(data: dict[str, Any], pack: str) -> list[Found]:
    """Writes the record of every bridge into a graph that was queued, as pictures will carry it.

    data: the body of a request to /prompt, in either or both of its forms, changed in place. Answers what has
    to be said. A record that another content has under the same name here is replaced by the true one; of a
    bridge that is not here it stays, and the node will say what is missing.
    """
    said: dict[str, Found] = {}
    extra = data.get("extra_data")
    info = extra.get("extra_pnginfo") if isinstance(extra, dict) else None
    workflow = info.get("workflow") if isinstance(info, dict) else None
    spoken = _spoken(workflow)
    written: dict[str, str] = {}
    for inputs in _queued(data.get("prompt")):
        name, kept = inputs.get(NAME), inputs.get(IDENTITY, "")
        if isinstance(name, str) and isinstance(kept, str):
            if about(name, kept) is None:
                kept = spoken.get(plain(name), kept)
            inputs[IDENTITY], found = _settle(name, kept, pack)
            written[plain(name)] = inputs[IDENTITY]
            if found is not None and found.note is not None:
                said.setdefault(name, found)
    for values in _saved(workflow):
        values[3] = _settle(values[0], values[3], pack)[0]
        written.pop(plain(values[0]), None)
    _speak(workflow, {name: kept for name, kept in written.items() if kept})
    return list(said.values())


def _spoken(workflow: object) -> dict[str, Any]:
    """Records of a saved graph by file name, for names that stand in no node of ours: an outer node of a
    subgraph shows them.
    """
    extra = workflow.get("extra") if isinstance(workflow, dict) else None
    found = extra.get(OF_GRAPH) if isinstance(extra, dict) else None
    return found if isinstance(found, dict) else {}


def _speak(workflow: object, written: dict[str, str]) -> None:
    extra = workflow.get("extra") if isinstance(workflow, dict) else None
    if isinstance(workflow, dict) and written and (extra is None or isinstance(extra, dict)):
        workflow["extra"] = {**(extra or {}), OF_GRAPH: written}


def _settle(name: str, identity: object, pack: str) -> tuple[str, Found | None]:
    try:
        found = resolve(name, identity)
        record = record_of(name, folders.bridge_header(found.path), found.path, pack)
    except (OSError, ValueError) as error:
        logging.debug("Language Bridge: no record of %r: %s", name, error)
        return identity if isinstance(identity, str) else "", None
    kept = about(name, identity)
    if kept is not None and (kept.id, kept.hash) == (record.id, record.hash):
        return str(identity), found
    return record.to_json(), found


def _queued(prompt: object) -> Iterator[dict[str, Any]]:
    """Inputs of our nodes in a graph of the API form."""
    for node in prompt.values() if isinstance(prompt, dict) else ():
        if isinstance(node, dict) and node.get("class_type") == NODE and isinstance(node.get("inputs"), dict):
            yield node["inputs"]


def _saved(workflow: object) -> Iterator[list[Any]]:
    """Values of our nodes in a graph as the page saves it, also in subgraphs: bridge first, record fourth."""
    if not isinstance(workflow, dict):
        return
    definitions = workflow.get("definitions")
    inner = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    for graph in (workflow, *(inner if isinstance(inner, list) else ())):
        nodes = graph.get("nodes") if isinstance(graph, dict) else None
        for node in nodes if isinstance(nodes, list) else ():
            if not isinstance(node, dict) or node.get("type") != NODE:
                continue
            values = node.get("widgets_values")
            if isinstance(values, list) and len(values) in (3, 4) and isinstance(values[0], str):
                values += [""] * (4 - len(values))
                yield values


def watch(pack: str) -> None:
    """Has every graph that is queued stamped, and tells the page what was written and what has to be said.

    Does nothing where no server runs.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return

    def on_prompt(data: Any) -> Any:
        if isinstance(data, dict):
            said = stamp(data, pack)
            for found in said:
                logging.warning("Language Bridge: %s", found.say("English"))
            written = {inputs.get(NAME): inputs.get(IDENTITY) for inputs in _queued(data.get("prompt"))}
            if written:
                notes = [found.say() for found in said]
                server.send_sync(EVENT, {"records": written, "notes": notes}, data.get("client_id"))
        return data

    server.add_on_prompt_handler(on_prompt)


def model_path(folder: str, name: str, what: str) -> Path:
    """The file of another kind of model by its name, with the slashes of whatever system.

    folder: of ComfyUI's models; what: the word for it. BridgeError, as for a bridge, when it is not here.
    """
    names = folder_paths.get_filename_list(folder)
    here = folders.listed(name, names)
    path = folder_paths.get_full_path(folder, here) if here is not None else None
    if path is not None:
        return Path(path)
    expected, action = _offer(plain(name), kind=folder)
    found = f"{len(names)} {what}s: {', '.join(names[:8]) or 'none'}"
    raise BridgeError(f"There is no {what} called {name!r:.120}.", found, expected, action)


# -- looking, and what is said -------------------------------------------------------------------------------


def _twin(record: Record | None, besides: str) -> Found | None:
    """A bridge with the very content of a record, under another name; those with its id are read first."""
    if record is None or not record.hash:
        return None
    others = [found for found in folders.headers() if found[0] != besides]
    for name, path, _ in sorted(others, key=lambda found: id_of(found[2], found[0]) != record.id):
        try:
            if content(path)[:DIGITS] == record.hash:
                return Found(name, path)
        except BridgeError as error:
            logging.debug("Language Bridge passes over %s: %s", path.name, error)
    return None


def _record(name: str, path: Path, header: BridgeHeader) -> Record:
    return record_of(name, header, path, "")


def _stem(name: str) -> str:
    return plain(name).rpartition("/")[2].rpartition(".")[0]


def _is_name(name: str) -> bool:
    """Whether a text can be a file name of a list, and no path, address or device."""
    parts = plain(name).split("/")
    plausible = name.isprintable() and len(name) <= 1024 and not _HELD_BY_SYSTEMS & set(name)
    return plausible and all(part.strip(". ") for part in parts)


def _another(name: str, record: Record, own: Record) -> BridgeError:
    return BridgeError(
        f"The bridge {name!r:.120} is not the one that this workflow was made with.",
        f"{own}, another bridge under the same file name",
        f"{record}",
        f"{_offer(record.id, '')[1]} If you mean the file that is here, choose it again in the node (in a "
        f"graph of a program: leave {IDENTITY!r} empty).",
    )


def _missing(name: str, record: Record | None, alike: list[str] | None = None) -> BridgeError:
    names = folders.bridge_names()
    found = f"{len(names)} bridges: {', '.join(names[:8]) or 'none'}"
    if alike:
        found = (
            f"{len(alike)} files that say they are {record.id if record else _stem(name)}: {', '.join(alike)}"
        )
    elif record is not None:
        found += f"; none is {record}"
    expected, action = _offer(record.id if record else "", _stem(name))
    if alike:
        action = "Choose one of them in the node."
    return BridgeError(f"There is no bridge called {name!r:.120}.", found, expected, action)


def _offer(*ids: str, kind: str = folders.FOLDER) -> tuple[str, str]:
    """What is meant and how to get it, for the first id that the manifest knows: (expected, what to do)."""
    manifest = _manifest()
    for wanted in filter(None, ids):
        for entry in manifest.entries:
            if entry.name == wanted:
                size = sum(file.bytes for file in entry.files)
                return (
                    f"{wanted}, {size / 1e6:.1f} MB, which ships with Language Bridge",
                    "Install the pack again: python install.py verify, in its folder, says what is damaged.",
                )
        for item in manifest.published:
            names = {item.name, *(file.to.partition("/")[2] for file in item.files)}
            if item.conversion is not None:
                names.add(item.conversion.preset)
            if wanted not in names:
                continue
            if item.by_hand:
                return f"{item.name}, from {item.card}", f"Fetch it by hand: {item.by_hand}"
            sets = manifest.with_needs(item)
            known = [file.most_bytes for one in sets for file in one.files]
            more = "more than " if None in known or any(one.by_hand for one in sets) else ""
            size = sum(filter(None, known)) / 1e6
            return (
                f"{item.name}, {more}{size:.0f} MB to fetch, from {item.card}",
                f"Type in the pack's folder: python install.py get {item.name}. Then press R in the browser.",
            )
    return (
        f"a file of the folder models/{kind}",
        "Ask for the file where the workflow comes from, put it there, and press R in the browser; or choose "
        "another one in the node.",
    )


@lru_cache(maxsize=1)
def _manifest() -> Manifest:
    return parse_manifest(MANIFEST.read_text(encoding="utf-8"))
