"""Writes the shipped workflows from one description: `workflows/*.json` for the page, `workflows/api/*.json`
for HTTP.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from language_bridge.conversion import VERSION
from language_bridge.host.folders import bridge_header
from language_bridge.host.identity import Record, record_of
from language_bridge.manifest.schema import Manifest, parse
from language_bridge.manifest.sources import HUB

CHECKOUT = Path(__file__).parent.parent
FOLDER = CHECKOUT / "workflows"
SHIPPED = CHECKOUT / "pocket" / "assets" / "bridges"

SOCKETS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "CheckpointLoaderSimple": ([], [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")]),
    "LanguageBridgePocketCheckpoint": ([], [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")]),
    "LanguageBridgeCheckpoint": ([], [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")]),
    "LanguageBridge": ([("model", "MODEL"), ("clip", "CLIP")], [("MODEL", "MODEL"), ("CLIP", "CLIP")]),
    "LanguageBridgeStreams": ([("clip", "CLIP")], [("CLIP", "CLIP")]),
    "LanguageBridgeInspector": ([("clip", "CLIP")], [("report", "STRING"), ("text", "STRING")]),
    "CLIPTextEncode": ([("clip", "CLIP")], [("CONDITIONING", "CONDITIONING")]),
    "EmptyLatentImage": ([], [("LATENT", "LATENT")]),
    "KSampler": (
        [
            ("model", "MODEL"),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent_image", "LATENT"),
        ],
        [("LATENT", "LATENT")],
    ),
    "VAEDecode": ([("samples", "LATENT"), ("vae", "VAE")], [("IMAGE", "IMAGE")]),
    "ImageScaleBy": ([("image", "IMAGE")], [("IMAGE", "IMAGE")]),
    "SaveImage": ([("images", "IMAGE")], []),
    "LoraLoader": ([("model", "MODEL"), ("clip", "CLIP")], [("MODEL", "MODEL"), ("CLIP", "CLIP")]),
    "ControlNetLoader": ([], [("CONTROL_NET", "CONTROL_NET")]),
    "LoadImage": ([], [("IMAGE", "IMAGE"), ("MASK", "MASK")]),
    "ControlNetApplyAdvanced": (
        [
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("control_net", "CONTROL_NET"),
            ("image", "IMAGE"),
        ],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING")],
    ),
}
"""Inputs that take a link and outputs of each node that the workflows use: (name, type)."""

PLACES: dict[str, tuple[int, int, int, int]] = {
    "checkpoint": (40, 120, 320, 110),
    "bridge": (400, 120, 330, 150),
    "positive": (770, 60, 420, 170),
    "negative": (770, 280, 420, 110),
    "latent": (770, 440, 320, 110),
    "sampler": (1230, 60, 320, 270),
    "decode": (1590, 60, 200, 50),
    "enlarge": (1820, 60, 300, 90),
    "save": (1590, 200, 530, 360),
    "streams": (400, 330, 330, 230),
    "inspector": (770, 600, 780, 420),
    "lora": (400, 600, 330, 130),
    "control net": (770, 600, 320, 60),
    "picture": (770, 710, 320, 320),
    "control": (1230, 600, 320, 190),
}
"""Left, top, width and height of each node by its title."""


def graph(
    checkpoint: dict[str, Any],
    bridge: str,
    identity: str,
    text: dict[str, str],
    picture: dict[str, Any],
    streams: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One text-to-image graph in the API form, with the bridge behind the checkpoint loader.

    identity: the record of the bridge, "" where any will do. streams: inputs of Language Bridge Streams for
    the positive prompt; a Prompt Inspector stands beside it.
    """
    sampler = {
        "seed": 1,
        "steps": 15,
        "cfg": 2.0,
        "sampler_name": "ddim",
        "scheduler": "ddim_uniform",
        "denoise": 1.0,
    }
    sampler |= {key: value for key, value in picture.items() if key in sampler}
    size = {"width": picture["side"], "height": picture["side"], "batch_size": 1}
    nodes: list[tuple[str, str, dict[str, Any]]] = [
        ("checkpoint", checkpoint["class"], checkpoint["inputs"]),
        (
            "bridge",
            "LanguageBridge",
            {
                "model": ["1", 0],
                "clip": ["1", 1],
                "bridge": bridge,
                "strength": 1.0,
                "route": "two streams",
                "identity": identity,
            },
        ),
        ("positive", "CLIPTextEncode", {"clip": ["2", 1], "text": text["positive"]}),
        ("negative", "CLIPTextEncode", {"clip": ["2", 1], "text": text["negative"]}),
        ("latent", "EmptyLatentImage", size),
        (
            "sampler",
            "KSampler",
            {
                "model": ["2", 0],
                "positive": ["3", 0],
                "negative": ["4", 0],
                "latent_image": ["5", 0],
                **sampler,
            },
        ),
        ("decode", "VAEDecode", {"samples": ["6", 0], "vae": ["1", 2]}),
    ]
    if "enlarge" in picture:  # 64 pixels are small on a page
        enlarge = {"image": ["7", 0], "upscale_method": "bicubic", "scale_by": picture["enlarge"]}
        nodes.append(("enlarge", "ImageScaleBy", enlarge))
    save = {"images": [str(len(nodes)), 0], "filename_prefix": picture["prefix"]}
    nodes.append(("save", "SaveImage", save))
    if streams is not None:
        nodes.append(("streams", "LanguageBridgeStreams", {"clip": ["2", 1], **streams}))
        clip = [str(len(nodes)), 0]
        nodes[2][2]["clip"] = clip
        inspector = {"clip": clip, "text": text["positive"], "language": "auto"}
        nodes.append(("inspector", "LanguageBridgeInspector", inspector))
    return {
        str(number): {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        for number, (title, kind, inputs) in enumerate(nodes, start=1)
    }


def without_bridge(api: dict[str, Any]) -> dict[str, Any]:
    """The same graph for a checkpoint that speaks the language itself; numbers close the gap."""
    numbers = {old: str(new) for new, old in enumerate((one for one in api if one != "2"), start=1)} | {
        "2": "1"
    }
    for node in api.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = [numbers[value[0]], value[1]]
    return {numbers[old]: node for old, node in api.items() if old != "2"}


def with_lora(api: dict[str, Any], lora: str) -> None:
    """Puts a LoRA behind the bridge: whoever read MODEL and CLIP there reads them here."""
    number = str(len(api) + 1)
    for node in api.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == "2":
                node["inputs"][name] = [number, value[1]]
    inputs = {"model": ["2", 0], "clip": ["2", 1], "lora_name": lora}
    inputs |= {"strength_model": 0.8, "strength_clip": 0.8}
    api[number] = {"class_type": "LoraLoader", "inputs": inputs, "_meta": {"title": "lora"}}


def with_control(api: dict[str, Any], control: dict[str, str]) -> None:
    """Puts a ControlNet and its picture between both prompts and the sampler."""
    loader, picture, apply = (str(len(api) + place) for place in (1, 2, 3))
    nodes: list[tuple[str, str, str, dict[str, Any]]] = [
        (loader, "control net", "ControlNetLoader", {"control_net_name": control["net"]}),
        (picture, "picture", "LoadImage", {"image": control["picture"]}),
        (
            apply,
            "control",
            "ControlNetApplyAdvanced",
            {
                "positive": api["6"]["inputs"]["positive"],
                "negative": api["6"]["inputs"]["negative"],
                "control_net": [loader, 0],
                "image": [picture, 0],
                "strength": 0.7,
                "start_percent": 0.0,
                "end_percent": 0.8,
            },
        ),
    ]
    api["6"]["inputs"] |= {"positive": [apply, 0], "negative": [apply, 1]}
    for number, title, kind, inputs in nodes:
        api[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def for_page(api: dict[str, Any], note: str, manifest: Manifest) -> dict[str, Any]:
    """The same graph as the page saves it: places, links and the values of widgets in their order.

    A node that names a published file also gets the page's own entry for missing models.
    """
    links: list[list[Any]] = []
    nodes: list[dict[str, Any]] = []
    outgoing: dict[tuple[str, int], list[int]] = {}
    for target, node in api.items():
        for slot, (name, kind) in enumerate(SOCKETS[node["class_type"]][0]):
            if name not in node["inputs"]:
                continue  # a socket that may stay empty
            source, output = node["inputs"][name]
            links.append([len(links) + 1, int(source), output, int(target), slot, kind])
            outgoing.setdefault((source, output), []).append(len(links))
    titles = {node["_meta"]["title"] for node in api.values()}
    for order, (number, node) in enumerate(api.items()):
        inputs, outputs = SOCKETS[node["class_type"]]
        left, top, width, height = PLACES[node["_meta"]["title"]]
        linked = {link[4]: link[0] for link in links if link[3] == int(number)}
        widgets: list[Any] = []
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                continue
            widgets.append(value)
            if name == "seed" and node["class_type"] == "KSampler":
                widgets.append("fixed")
        nodes.append(
            {
                "id": int(number),
                "type": node["class_type"],
                "pos": [left, top],
                "size": [width, height],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": [
                    {"name": n, "type": t, "link": linked.get(slot)} for slot, (n, t) in enumerate(inputs)
                ],
                "outputs": [
                    {"name": n, "type": t, "links": outgoing.get((number, slot), [])}
                    for slot, (n, t) in enumerate(outputs)
                ],
                "title": node["_meta"]["title"],
                "properties": {"Node name for S&R": node["class_type"]}
                | ({"models": models} if (models := published(widgets, manifest)) else {}),
                "widgets_values": widgets,
            }
        )
    nodes.append(
        {
            "id": len(api) + 1,
            "type": "MarkdownNote",
            "pos": [40, 720 if "train" in titles else 600 if "streams" in titles else 320],
            "size": [690, 230],
            "flags": {},
            "order": len(api),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [note],
        }
    )
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.7, "offset": [40, 80]}},
        "version": 0.4,
    }


# A training of the pocket world.

SOCKETS |= {
    "LanguageBridgePocketDataset": ([], [("dataset", "LANGUAGE_BRIDGE_DATASET")]),
    "LanguageBridgeTrainingSettings": ([], [("settings", "LANGUAGE_BRIDGE_SETTINGS")]),
    "LanguageBridgeTrain": (
        [
            ("clip", "CLIP"),
            ("dataset", "LANGUAGE_BRIDGE_DATASET"),
            ("model", "MODEL"),
            ("vae", "VAE"),
            ("trained", "LANGUAGE_BRIDGE_TRAINED"),
            ("settings", "LANGUAGE_BRIDGE_SETTINGS"),
            ("options", "LANGUAGE_BRIDGE_OBJECTIVE"),
        ],
        [
            ("trained", "LANGUAGE_BRIDGE_TRAINED"),
            ("picture", "IMAGE"),
            ("loss_map", "LOSS_MAP"),
            ("report", "STRING"),
        ],
    ),
    "LanguageBridgeSave": ([("trained", "LANGUAGE_BRIDGE_TRAINED")], [("bridge", "STRING")]),
}
PLACES |= {
    "data": (40, 280, 320, 110),
    "settings": (400, 120, 330, 560),
    "train": (770, 60, 620, 1000),
    "keep": (1430, 60, 330, 300),
}


def training(entry: dict[str, Any]) -> dict[str, Any]:
    """A graph that trains a bridge of the pocket checkpoint and saves it, in the API form."""
    train = {"clip": ["1", 1], "dataset": ["2", 0], **entry["train"]}
    train |= {"model": ["1", 0], "vae": ["1", 2], "settings": ["3", 0]}
    nodes: list[tuple[str, str, dict[str, Any]]] = [
        ("checkpoint", "LanguageBridgePocketCheckpoint", {}),
        ("data", "LanguageBridgePocketDataset", entry["data"]),
        ("settings", "LanguageBridgeTrainingSettings", entry["settings"]),
        ("train", "LanguageBridgeTrain", train),
        ("keep", "LanguageBridgeSave", {"trained": ["4", 0], **entry["save"]}),
    ]
    return {
        str(number): {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        for number, (title, kind, inputs) in enumerate(nodes, start=1)
    }


def published(widgets: list[Any], manifest: Manifest) -> list[dict[str, str]]:
    """What the page needs to offer the files that a node names: address and folder, and the hash where known.

    Only files that are used as they were published have an address that the page could fetch: a bridge is
    converted first (`install.py get`).
    """
    found: list[dict[str, str]] = []
    for item in manifest.published:
        for file in item.files:
            folder, _, name = file.to.partition("/")
            if not name or name not in widgets:
                continue
            entry = {"name": name, "url": f"{HUB}/{file.repo}/resolve/{file.revision}/{file.path}"}
            entry["directory"] = folder
            if file.sha256:
                entry |= {"hash": file.sha256, "hash_type": "SHA256"}
            found.append(entry)
    return found


def identity_of(bridge: str, manifest: Manifest) -> str:
    """The record of a bridge: by content where it ships, by its id where it is published, else none."""
    if (SHIPPED / bridge).is_file():
        path = SHIPPED / bridge
        return record_of(bridge, bridge_header(path), path, VERSION).to_json()
    name = bridge.removesuffix(".safetensors")
    return Record(bridge, name, pack=VERSION).to_json() if manifest.find(name) else ""


def main() -> None:
    manifest = parse((CHECKOUT / "weights_manifest.json").read_text(encoding="utf-8"))
    texts: dict[str, Any] = json.loads(
        Path(__file__).with_name("workflow_texts.json").read_text(encoding="utf-8")
    )
    for name, entry in texts.items():
        if "train" in entry:
            api = training(entry)
            write(FOLDER / "api" / f"{name}.json", api)
            write(FOLDER / f"{name}.json", for_page(api, entry["note"], manifest))
            continue
        bridge = entry.get("bridge", "")
        identity = identity_of(bridge, manifest)
        api = graph(
            entry["checkpoint"], bridge, identity, entry["text"], entry["picture"], entry.get("streams")
        )
        if not bridge:
            api = without_bridge(api)
        if "lora" in entry:
            with_lora(api, entry["lora"])
        if "control" in entry:
            with_control(api, entry["control"])
        write(FOLDER / "api" / f"{name}.json", api)
        write(FOLDER / f"{name}.json", for_page(api, entry["note"], manifest))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
