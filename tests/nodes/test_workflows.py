"""Every shipped workflow runs on the real server; templates run behind random checkpoints of true layout."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from language_bridge.conversion import VERSION
from language_bridge.harness.server import PromptError
from language_bridge.host import folders, identity
from language_bridge.manifest.schema import parse
from language_bridge.manifest.sources import HUB
from language_bridge.tests.encoders.toys import tokenizer_files
from language_bridge.tests.fixtures.branches import TINY, random_branch, write_branch
from language_bridge.tests.fixtures.checkpoints import (
    FAMILIES,
    write_checkpoint,
    write_controlnet,
    write_lora,
)
from language_bridge.tests.fixtures.towers import TOWER, tiny_bridge, tiny_tower, write_bridge
from language_bridge.tests.fixtures.workflows import Graph, api_graph
from language_bridge.tests.host.test_checkpoint import TEXT, body, head, write, xlmr

if TYPE_CHECKING:
    from language_bridge.harness.server import Server

MANIFEST = parse((Path(__file__).parent.parent.parent / "weights_manifest.json").read_text(encoding="utf-8"))
SHIPPED = Path(__file__).parent.parent.parent / "pocket" / "assets" / "bridges"
WORKFLOWS = Path(__file__).parent.parent.parent / "workflows"
SAVED, API = sorted(WORKFLOWS.glob("*.json")), sorted((WORKFLOWS / "api").glob("*.json"))
BASES = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
"""Start of a checkpoint's name in a workflow -> base."""


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def object_info(server: Server) -> Any:
    return server.ask("/object_info")


def test_there_is_a_workflow_for_the_pocket_world_and_for_each_template() -> None:
    assert {path.name.split("_")[0] for path in SAVED} >= {"pocket", "sd15", "sdxl"}
    assert [path.name for path in SAVED] == [path.name for path in API]


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_the_saved_workflow_is_the_graph_beside_it(path: Path, object_info: Any) -> None:
    graph = read(WORKFLOWS / "api" / path.name)
    plain = {number: {key: node[key] for key in ("class_type", "inputs")} for number, node in graph.items()}
    assert api_graph(read(path), object_info) == plain


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_a_workflow_fits_the_schema_of_its_nodes(path: Path, object_info: Any) -> None:
    for node in read(path)["nodes"]:
        facts = object_info.get(node["type"])
        if facts is None:
            assert node["type"] in {"MarkdownNote", "Note"}
            continue
        types = [output["type"] for output in node["outputs"]]
        assert types == facts["output"][: len(types)]  # newer hosts add outputs behind


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_a_workflow_says_which_bridge_it_means(path: Path) -> None:
    """A bridge that ships by its content, a published one by its id; a placeholder means any."""
    for node in read(path).values():
        if node["class_type"] != "LanguageBridge":
            continue
        name, text = node["inputs"]["bridge"], node["inputs"]["identity"]
        shipped, known = SHIPPED / name, MANIFEST.find(Path(name).stem)
        record = identity.about(name, text)
        if shipped.is_file():
            assert record == identity.record_of(name, folders.bridge_header(shipped), shipped, VERSION)
        elif known is not None:
            assert record == identity.Record(name, known.name, "", VERSION)
        else:
            assert Path(name).stem in ("sd15-bridge", "sdxl-bridge") and text == ""


def test_the_page_is_offered_exactly_what_it_can_fetch_and_use_as_it_is() -> None:
    offered: set[str] = set()
    for path in SAVED:
        for node in read(path)["nodes"]:
            for entry in node["properties"].get("models", ()):
                (file,) = (
                    file
                    for item in MANIFEST.published
                    for file in item.files
                    if file.to == f"{entry['directory']}/{entry['name']}"
                )
                assert entry["url"] == f"{HUB}/{file.repo}/resolve/{file.revision}/{file.path}"
                assert (entry["hash"], entry["hash_type"]) == (file.sha256, "SHA256") and file.sha256
                assert entry["name"] in node["widgets_values"]
                offered.add(entry["name"])
    assert offered == {"Alt-Diffusion-M9.safetensors"}  # bridges are converted first, pocket files ship


@pytest.mark.parametrize(
    "path", [path for path in API if not path.stem.startswith("train")], ids=lambda path: path.stem
)
def test_a_workflow_paints(path: Path, server: Server) -> None:
    graph = read(path)
    add_models(graph, server.base / "models")
    shrink(graph)
    pictures = server.pictures(server.run(graph))
    assert len(pictures) == sum(
        node["class_type"] in {"SaveImage", "PreviewImage"} for node in graph.values()
    )
    for picture in pictures:
        pixels = pixels_of(picture)
        side = 64 * round(_enlarged(graph))
        assert pixels.shape == (side, side, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 16  # neither black nor one colour


def _enlarged(graph: Any) -> float:
    factors = [node["inputs"]["scale_by"] for node in graph.values() if node["class_type"] == "ImageScaleBy"]
    return factors[0] if factors else 1.0


def test_an_english_prompt_paints_the_same_picture_with_and_without_the_node(server: Server) -> None:
    graph = read(WORKFLOWS / "api" / "sd15_text_to_image.json")
    add_models(graph, server.base / "models")
    shrink(graph)
    number, bridge = only(graph, "LanguageBridge")
    texts = [node for node in graph.values() if node["class_type"] == "CLIPTextEncode"]
    for node, text in zip(texts, ("a (red:1.2) cat", "blurry"), strict=True):
        node["inputs"]["text"] = text

    without = copy.deepcopy(graph)
    del without[number]
    sources = [bridge["inputs"]["model"], bridge["inputs"]["clip"]]
    for node in without.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == number:
                node["inputs"][name] = sources[value[1]]
    (stock,) = server.pictures(server.run(without))
    for change in ({}, {"strength": 0.0}, {"route": "english only"}):
        changed = copy.deepcopy(graph)
        changed[number]["inputs"].update(change)
        (picture,) = server.pictures(server.run(changed))
        assert np.array_equal(pixels_of(picture), pixels_of(stock)), change
    native = copy.deepcopy(graph)
    native[number]["inputs"]["route"] = "native only"
    (picture,) = server.pictures(server.run(native))
    assert not np.array_equal(pixels_of(picture), pixels_of(stock))


def test_the_server_shows_what_is_wrong_and_samples_nothing(server: Server) -> None:
    graph = read(WORKFLOWS / "api" / "sd15_text_to_image.json")
    add_models(graph, server.base / "models")
    tower = tiny_tower(f"{TOWER}-other")
    path = server.base / "models" / "language_bridges" / "for-sdxl.safetensors"
    write_bridge(path, "sdxl", tiny_bridge("linear", "sdxl", tower), tower, inside=True)
    only(graph, "LanguageBridge")[1]["inputs"]["bridge"] = path.name
    with pytest.raises(PromptError) as caught:
        server.run(graph)
    text = str(caught.value)
    assert text.startswith("LanguageBridge (node ")
    for part in ("not made for this checkpoint", "\n  found: ", "\n  expected: ", "\n  what to do: "):
        assert part in text


def only(graph: Graph, kind: str) -> tuple[str, dict[str, Any]]:
    """Number and node of the one node of this class."""
    (found,) = ((number, node) for number, node in graph.items() if node["class_type"] == kind)
    return found


def shrink(graph: Graph) -> None:
    """Makes pictures small and sampling short; what the graph does stays the same."""
    for node in graph.values():
        for name, least in (("width", 64), ("height", 64), ("steps", 2)):
            if isinstance(node["inputs"].get(name), int):
                node["inputs"][name] = least


def pixels_of(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)))


def write_altdiffusion(path: Path) -> None:
    """A random checkpoint in the layout of AltDiffusion's single files, with its tokenizer beside it."""
    tower = {f"{TEXT}roberta.{key}": value for key, value in xlmr().state_dict().items()}
    state = body(FAMILIES["sd1"])
    last = max(
        (key for key in state if "taesd_decoder" in key and key.endswith("weight")),
        key=lambda key: int(key.split(".")[2]),
    )
    state[last], state[last.replace("weight", "bias")] = (
        state[last] * 50,
        torch.full((3,), 0.5),
    )  # else it fades
    write(path, state | tower | head("transformation", 768), tokenizer_files("xlmr"))


def add_models(graph: Graph, models: Path) -> None:
    """Puts random models where the graph looks for some; what the pack ships stays what it is."""
    for folder in ("loras", "controlnet"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    bases: set[str] = set()
    for node in graph.values():
        if "ckpt_name" in node["inputs"]:
            name = Path(node["inputs"]["ckpt_name"]).with_suffix(
                ".ckpt"
            )  # only this format can be that small
            node["inputs"]["ckpt_name"] = str(name)
            base = BASES[name.stem[:4]]
            bases.add(base)
            if not (models / "checkpoints" / name).exists():
                write_checkpoint(models / "checkpoints" / name, FAMILIES[base])
        if node["class_type"] == "LanguageBridgeCheckpoint":
            path = models / "checkpoints" / Path(node["inputs"]["checkpoint"]).with_suffix(".ckpt").name
            node["inputs"]["checkpoint"] = path.name
            if not path.exists():
                write_altdiffusion(path)
        if "lora_name" in node["inputs"]:
            write_lora(models / "loras" / node["inputs"]["lora_name"], FAMILIES["sd1"])
        if "control_net_name" in node["inputs"]:
            name = Path(node["inputs"]["control_net_name"]).with_suffix(".ckpt").name
            node["inputs"]["control_net_name"] = name
            write_controlnet(models / "controlnet" / name, FAMILIES["sd1"])
        if node["class_type"] == "LoadImage":
            picture = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
            picture.save(models.parent / "input" / node["inputs"]["image"])
    for node in graph.values():
        if bases and node["class_type"] == "LanguageBridge":
            (base,) = bases
            path = models / "language_bridges" / node["inputs"]["bridge"]
            if path.name.startswith("bdm"):
                tower = tiny_tower("tiny-branch", width=TINY[base].context)
                write_branch(path, base, tower, random_branch(TINY[base]), inside=True)
                continue
            tower = tiny_tower(f"{TOWER}-{base}")
            write_bridge(path, base, tiny_bridge("mlp", base, tower), tower, inside=True)
