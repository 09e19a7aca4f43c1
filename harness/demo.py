"""The demo: English and Chinese prompts, with and without the bridge, drawn by a real ComfyUI server."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .environment import CHECKOUT, BootstrapError, Environment
from .server import PromptError, Server

GRAPHS = CHECKOUT / "workflows" / "api"
POCKET_GRAPH = GRAPHS / "pocket_text_to_image.json"
TEMPLATES = {"sdxl": GRAPHS / "sdxl_text_to_image.json", "": GRAPHS / "sd15_text_to_image.json"}
DEMO_PROMPTS = CHECKOUT / "pocket" / "demo.json"
PACK_NODE_TITLE = "bridge"


@dataclass(frozen=True)
class Row:
    """One way of prompting: key in the report, label, the wording it takes, bridge or not, and which.

    bridge: a file of the bridge folders, or None for the one that the graph names.
    """

    key: str
    label: str
    wording: str
    bridged: bool
    bridge: str | None = None


ROWS = (
    Row("english_stock", "English, stock CLIP", "en", False),
    Row("chinese_stock", "Chinese, stock CLIP", "zh", False),
    Row("chinese_bridge", "Chinese over the bridge", "zh", True),
    Row("mixed_bridge", "Mixed over the bridge", "mixed", True),
)


@dataclass(frozen=True)
class Options:
    """What the user asked of the demo; empty `prompts` means the shipped ones."""

    prompts: tuple[str, ...] = ()
    seed: int = 7
    out: Path | None = None
    serve: bool = False
    checkpoint: Path | None = None
    bridge: str | None = None


@dataclass(frozen=True)
class Picture:
    """One picture of the demo as the report names it."""

    row: str
    prompt: str
    meaning: str
    seed: int
    path: str
    seconds: float
    judge: dict[str, Any] | None


def run_demo(
    environment: Environment,
    options: Options,
    say: Callable[[str], None],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Start a server, draw every row for every prompt, write the sheet, show the report, stop the server.

    Raises:
        BootstrapError: the server did not start, or a file that the options name is missing.
        PromptError: a graph was refused or failed.
    """
    began = time.monotonic()
    pocket = options.checkpoint is None
    models, graph = real_model(environment, options) if not pocket else ({}, _read_graph(POCKET_GRAPH))
    if pocket and options.bridge is not None:
        titled(graph, PACK_NODE_TITLE)["inputs"]["bridge"] = options.bridge
    prompts = _prompts(environment, options, pocket)
    out = options.out or environment.root / "demo"
    out.mkdir(parents=True, exist_ok=True)
    rows = all_rows(graph) if pocket and options.bridge is None else list(ROWS)
    for row in rows:
        for old in out.glob(f"[0-9][0-9]-{row.key}.png"):
            old.unlink()
    say("start ComfyUI with the pack installed")
    with Server(environment, say, models=models) as server:
        say(f"ComfyUI answers at {server.url} after {server.startup_seconds:.1f} s")
        _require_pack(server, graph)
        pictures = _draw(server, graph, rows, prompts, options.seed, out, say)
        say("read the pictures and draw the sheet" if pocket else "draw the sheet")
        sheet = out / "sheet.png"
        labels = [row.label for row in rows]
        judged = _sheet(environment, labels, pictures, len(prompts), sheet, pocket)
        report: dict[str, Any] = {
            "sheet": str(sheet),
            "pictures": [asdict(picture) | {"judge": verdict} for picture, verdict in judged],
            "prompts": prompts,
            "seconds": round(time.monotonic() - began, 2),
            "server_seconds": round(server.startup_seconds, 2),
            "import_seconds": server.import_seconds(),
        }
        if options.serve:
            show(report)
            _serve(server, say)
    if not options.serve:
        show(report)


def all_rows(graph: Mapping[str, Any]) -> list[Row]:
    """The usual rows, and a Chinese one for each shipped pocket bridge that the graph does not name."""
    named = titled(graph, PACK_NODE_TITLE)["inputs"]["bridge"]
    shipped = sorted((CHECKOUT / "pocket" / "assets" / "bridges").glob("*.safetensors"))
    others = [path for path in shipped if path.name != named]
    return [
        *ROWS,
        *(Row(f"chinese_{p.stem}", f"Chinese over {p.stem}", "zh", True, p.name) for p in others),
    ]


def titled(graph: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The node of an API-format graph whose ``_meta.title`` is *title*.

    Raises:
        BootstrapError: there is not exactly one.
    """
    found = [node for node in graph.values() if node.get("_meta", {}).get("title") == title]
    if len(found) != 1:
        raise BootstrapError(f"the graph has {len(found)} nodes titled {title!r}; expected one")
    return found[0]


def without_bridge(graph: Mapping[str, Any]) -> dict[str, Any]:
    """The same graph with the bridge node taken out: its MODEL and CLIP go straight to where it sent them."""
    stock = copy.deepcopy(dict(graph))
    bridge = titled(stock, PACK_NODE_TITLE)
    identity = next(key for key, node in stock.items() if node is bridge)
    del stock[identity]
    straight = {0: bridge["inputs"]["model"], 1: bridge["inputs"]["clip"]}
    for node in stock.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value and value[0] == identity:
                node["inputs"][name] = straight[value[1]]
    return stock


def filled(graph: Mapping[str, Any], row: Row, prompt: str, seed: int) -> dict[str, Any]:
    """A copy of *graph* for one row with prompt, seed and file name put in."""
    mine = copy.deepcopy(dict(graph)) if row.bridged else without_bridge(graph)
    titled(mine, "positive")["inputs"]["text"] = prompt
    if row.bridge is not None:
        titled(mine, PACK_NODE_TITLE)["inputs"]["bridge"] = row.bridge
    sampler = titled(mine, "sampler")["inputs"]
    sampler["seed" if "seed" in sampler else "noise_seed"] = seed
    titled(mine, "save")["inputs"]["filename_prefix"] = row.key
    return mine


def _draw(
    server: Server,
    graph: Mapping[str, Any],
    rows: Sequence[Row],
    prompts: Sequence[Mapping[str, str]],
    seed: int,
    out: Path,
    say: Callable[[str], None],
) -> list[tuple[int, int, Picture]]:
    pictures: list[tuple[int, int, Picture]] = []
    for column, wordings in enumerate(prompts):
        meaning = wordings.get("en") or wordings.get("zh") or wordings.get("mixed", "")
        for index, row in enumerate(rows):
            prompt = _prompt_for(row, wordings)
            if prompt is None:
                continue
            began = time.monotonic()
            entry = server.run(filled(graph, row, prompt, seed))
            seconds = round(time.monotonic() - began, 2)
            images = server.pictures(entry)
            if not images:
                raise PromptError("the graph ran but saved no picture")
            path = out / f"{column + 1:02d}-{row.key}.png"
            path.write_bytes(images[0])
            say(f"{row.label}: {prompt}  ({seconds:.1f} s)")
            pictures.append(
                (index, column, Picture(row.key, prompt, meaning, seed, str(path), seconds, None))
            )
    return pictures


def _prompt_for(row: Row, wordings: Mapping[str, str]) -> str | None:
    """The wording a row draws. A prompt that only exists in English is also sent over the bridge."""
    if row.key == "mixed_bridge" and set(wordings) == {"en"}:
        return wordings["en"]
    return wordings.get(row.wording)


def _sheet(
    environment: Environment,
    labels: Sequence[str],
    pictures: Sequence[tuple[int, int, Picture]],
    columns: int,
    sheet: Path,
    pocket: bool,
) -> list[tuple[Picture, dict[str, Any] | None]]:
    job = {
        "labels": list(labels),
        "columns": columns,
        "title": "Language Bridge: the same seed, the same model",
        "sheet": str(sheet),
        "judge": pocket,
        "pictures": [
            {
                "row": row,
                "column": column,
                "path": picture.path,
                "prompt": picture.prompt,
                "gloss": picture.meaning,
                "meaning": picture.meaning,
            }
            for row, column, picture in pictures
        ],
    }
    judged = inside(environment, "draw", job)["judge"]
    return [(picture, verdict) for (_, _, picture), verdict in zip(pictures, judged, strict=True)]


def inside(environment: Environment, command: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run one command of pocket_side.py in the environment.

    Raises:
        BootstrapError: it failed; the text is its standard error.
    """
    script = Path(__file__).with_name("pocket_side.py")
    done = subprocess.run(
        [str(environment.python), str(script), command],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment.variables(),
    )
    if done.returncode:
        raise BootstrapError(f"{script.name} {command} failed\n{done.stderr.strip()}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _prompts(environment: Environment, options: Options, pocket: bool) -> list[dict[str, str]]:
    if not options.prompts:
        shipped: list[dict[str, str]] = json.loads(DEMO_PROMPTS.read_text(encoding="utf-8"))
        return shipped
    worded: list[dict[str, str]] = inside(
        environment, "word", {"prompts": list(options.prompts), "pocket": pocket}
    )["prompts"]
    return worded


def _read_graph(path: Path) -> dict[str, Any]:
    graph: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return graph


def real_model(environment: Environment, options: Options) -> tuple[dict[str, list[Path]], dict[str, Any]]:
    """Model files to show to the server, and the graph, for a checkpoint and a bridge of the user's own."""
    checkpoint, name = options.checkpoint, options.bridge
    assert checkpoint is not None
    if not checkpoint.is_file():
        raise BootstrapError(f"--checkpoint {checkpoint}\n  found: no such file")
    if name is None:
        raise BootstrapError(
            "--checkpoint needs --bridge\n  found: no bridge named\n"
            "  expected: a bridge file, or its name in models/language_bridges\n"
            "  what to do: add --bridge NAME"
        )
    models = {"checkpoints": [checkpoint.resolve()]}
    file = next((place for place in _bridge_places(environment, name) if place.is_file()), None)
    if file is None:
        raise BootstrapError(
            f"--bridge {name}\n  found: no such file\n"
            "  expected: a path, or a name in models/language_bridges"
        )
    if file == Path(name).resolve():
        models["language_bridges"] = [file]
    graph = _read_graph(TEMPLATES.get(bridge_base(file), TEMPLATES[""]))
    titled(graph, "checkpoint")["inputs"]["ckpt_name"] = checkpoint.name
    titled(graph, PACK_NODE_TITLE)["inputs"]["bridge"] = file.name if "language_bridges" in models else name
    return models, graph


def _bridge_places(environment: Environment, name: str) -> list[Path]:
    folder = environment.comfyui / "models" / "language_bridges"
    return [Path(name).resolve(), folder / name, CHECKOUT / "pocket" / "assets" / "bridges" / name]


def bridge_base(path: Path) -> str:
    """The base that a bridge file's header names ("sd1", "sdxl", ...), "" where it names none."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= 8 * 1024 * 1024:
            return ""
        try:
            metadata = json.loads(file.read(length)).get("__metadata__", {})
            return str(json.loads(metadata.get("language_bridge", "{}")).get("base", ""))
        except (ValueError, AttributeError):
            return ""


def _require_pack(server: Server, graph: Mapping[str, Any]) -> None:
    known = server.ask("/object_info")
    missing = sorted({node["class_type"] for node in graph.values()} - set(known))
    if missing:
        raise BootstrapError(f"ComfyUI does not know {', '.join(missing)}\n{pack_trouble(server)}")


def pack_trouble(server: Server) -> str:
    """What ComfyUI wrote about failing imports while it started."""
    lines = server.log.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines):
        if "Cannot import" in line or "Error while calling comfy_entrypoint" in line:
            return "\n".join(lines[max(0, number - 20) : number + 1])
    return "\n".join(lines[-20:])


def _serve(server: Server, say: Callable[[str], None]) -> None:
    say(f"the server stays up; open {server.page()} - Ctrl-C stops it")
    try:
        while server.alive():
            time.sleep(0.5)
    except KeyboardInterrupt:
        say("stopping the server")
