"""Trigger words of LoRAs, from what their files say of themselves, and what became of each LoRA's keys.

Looked up in this order; the first place that names a word ends the search:

1. `modelspec.trigger_phrase` in the file's own header;
2. sidecars beside the file: NAME.json (A1111, "activation text"), NAME.civitai.info ("trainedWords"),
   NAME.metadata.json (LoRA Manager, "civitai" -> "trainedWords");
3. `ss_tag_frequency` in the header (kohya): see `frequent`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import comfy.lora

from ..encoders import guard
from ..prompt import Phrase, phrases_in
from . import carried
from .carried import Facts, Load

LARGEST_SIDECAR_BYTES = 4 << 20
MOST_WORDS = 32
"""Trigger words of one file; more is a list of tags and no trigger."""
LONGEST_CHARACTERS = 120
MOST_FREQUENT = 3

COMMON = {
    *("1girl", "1boy", "2girls", "2boys", "girl", "boy", "woman", "man", "person", "people", "solo"),
    *("female", "male", "no_humans", "multiple_girls", "multiple_boys", "looking_at_viewer"),
    *("simple_background", "white_background", "masterpiece", "best_quality", "high_quality", "highres"),
    *("absurdres", "photo", "image", "style"),
}
"""Tags that stand on most pictures of any set, so they mark no concept."""

Found = tuple[str, str]
"""A trigger word, and where it was found."""


@dataclass(frozen=True)
class Said:
    """What a file and its sidecars say: trigger words with their places, and what could not be read."""

    triggers: tuple[Found, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """Layers of a LoRA file that change nothing: why, and which.

    reason: "no such layer", "other shape", "not loaded" (the loader could have), "not here" (loaded, but
    neither this MODEL nor this CLIP carries it).
    """

    reason: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class LoraReport:
    """One LoRA: files (copies are named together; none when it was not found), and what became of it.

    unet, text: layers that it changes; strengths are None where it changes none. family: the base that it was
    made for, as far as that can be told.
    """

    files: tuple[str, ...]
    unet: int
    unet_strength: float | None
    text: int
    text_strength: float | None
    skipped: tuple[Skipped, ...]
    family: str | None
    triggers: tuple[Found, ...]
    unreadable: tuple[str, ...]
    scheduled: bool = False


def phrases_of(clip: Any) -> tuple[Phrase, ...]:
    """Trigger words of the LoRAs that a bridged CLIP has met, each once; never raises.

    Those are the LoRAs that MODEL and CLIP carried when they were bridged, those loaded into the CLIP since,
    U-Net-only ones among them, and those of its hooks.
    """
    try:
        loads: Sequence[Load] = (*getattr(clip, "loras", ()), *carried.scheduled(clip.patcher))
        phrases: dict[str, Phrase] = {}
        for load in loads:
            for facts in carried.files_of(load):
                for text, _ in said(facts).triggers:
                    phrases.setdefault(text.casefold(), Phrase(text, "trigger", facts.name))
        return tuple(phrases.values())
    except Exception as error:
        _log_once(f"cannot look for trigger words: {error}")
        return ()


def said(facts: Facts) -> Said:
    """Trigger words of a LoRA file; remembered until it or a sidecar changes."""
    return _said(facts, tuple(_stamp(path) for path, _ in _sidecars(facts)))


@lru_cache(maxsize=1024)
def _said(facts: Facts, stamps: tuple[object, ...]) -> Said:
    unreadable: list[str] = []
    try:
        metadata: Mapping[str, str] = facts.layout.metadata
    except ValueError as error:
        metadata = {}
        unreadable.append(f"{facts.name}: {_line(error)}")
    phrase = metadata.get("modelspec.trigger_phrase", "")
    triggers = _words([phrase], "modelspec.trigger_phrase")
    if not triggers:
        for path, keys in _sidecars(facts):
            try:
                triggers = _words(_texts(_read(path), keys), path.name)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError) as error:
                unreadable.append(f"{path.name}: {_line(error)}")
            if triggers:
                break
    if not triggers and "ss_tag_frequency" in metadata:
        try:
            triggers = _words(frequent(metadata), "ss_tag_frequency")
        except (ValueError, RecursionError) as error:
            unreadable.append(f"ss_tag_frequency: {_line(error)}")
    return Said(triggers, tuple(unreadable))


def frequent(metadata: Mapping[str, str]) -> list[str]:
    """What marks the concept in kohya's tag counts.

    In each set of pictures: the tags that come (nearly, 95 %) as often as the most frequent one, when that is
    in at least half of the pictures; tags of `COMMON` do not count, and more than `MOST_FREQUENT` equally
    frequent ones mark nothing. The number of pictures is that of `ss_dataset_dirs`, or else the count of the
    most frequent tag of all. ValueError when the texts are not what kohya writes.
    """
    sets, folders = _object(metadata["ss_tag_frequency"]), _object(metadata.get("ss_dataset_dirs", "{}"))
    found: list[str] = []
    for name, tags in sets.items():
        if not isinstance(tags, Mapping):
            raise ValueError(f"no tags in {name!r:.40}")
        counts = {str(tag).strip(): int(count) for tag, count in tags.items() if str(tag).strip()}
        folder = folders.get(name)
        pictures = folder.get("img_count") if isinstance(folder, Mapping) else None
        total = pictures if isinstance(pictures, int) and pictures > 0 else max(counts.values(), default=0)
        rare = {tag: n for tag, n in counts.items() if tag.casefold().replace(" ", "_") not in COMMON}
        most = max(rare.values(), default=0)
        top = [tag for tag, count in rare.items() if count >= 0.95 * most]
        if 2 * most >= total and len(top) <= MOST_FREQUENT:
            found += [tag for tag in top if tag not in found]
    return found


def _words(texts: Iterable[str], source: str) -> tuple[Found, ...]:
    """Trigger words in texts as people keep them: a list with commas, LoRA tags and weights among it."""
    found: dict[str, Found] = {}
    for text in texts:
        for phrase in phrases_in(re.sub(r"<[^<>]*>", ",", text), "trigger", source):
            if len(phrase.text) <= LONGEST_CHARACTERS:
                found.setdefault(phrase.text.casefold(), (phrase.text, source))
    return tuple(found.values())[:MOST_WORDS]


def _sidecars(facts: Facts) -> list[tuple[Path, tuple[str, ...]]]:
    """Files beside a LoRA, and under which keys each has its trigger words."""
    path = Path(facts.path)
    return [
        (path.with_suffix(".json"), ("activation text",)),
        (path.with_suffix(".civitai.info"), ("trainedWords",)),
        (path.with_suffix(".metadata.json"), ("civitai", "trainedWords")),
    ]


def _stamp(path: Path) -> object:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def _read(path: Path) -> Any:
    with open(path, "rb") as file:
        text = file.read(LARGEST_SIDECAR_BYTES + 1)
    if len(text) > LARGEST_SIDECAR_BYTES:
        raise ValueError(f"longer than {LARGEST_SIDECAR_BYTES >> 20} MiB")
    return json.loads(text.decode("utf-8-sig"))


def _texts(value: Any, keys: Sequence[str]) -> list[str]:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    listed: Any = value if isinstance(value, list) else [value]
    return [text for text in listed if isinstance(text, str)]


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where an object was expected")
    return value


def _line(error: object) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


def reports_of(model: Any, clip: Any) -> list[LoraReport]:
    """What became of each LoRA that MODEL or CLIP carries or that the bridge has met; never raises."""
    try:
        return _reports(model, clip)
    except Exception as error:
        logging.warning("Language Bridge cannot report the LoRAs: %s", error, exc_info=True)
        return []


def bypassed(model: Any, clip: Any) -> bool:
    """Whether a LoRA runs beside the layers (the host's bypass loaders), where it cannot be seen."""
    patchers = (model, getattr(clip, "patcher", None))
    return any("bypass_lora" in (getattr(patcher, "injections", None) or {}) for patcher in patchers)


def _reports(model: Any, clip: Any) -> list[LoraReport]:
    later = carried.scheduled(clip.patcher)
    known = carried.together(carried.carried_by(model, clip.patcher), getattr(clip, "loras", ()))
    unet = _Side(model, comfy.lora.model_lora_keys_unet(model.model, {}))
    text = _Side(clip.patcher, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
    found: dict[object, LoraReport] = {}
    for load in known:
        files = carried.files_of(load)
        report = _report(load, files, unet, text, any(load is one for one in later))
        key: object = tuple(facts.path for facts in files) or load.digest
        found[key] = _both(found[key], report) if key in found else report
    return list(found.values())


class _Side:
    """A patcher of the host and the names by which a LoRA file can call its layers."""

    def __init__(self, patcher: Any, names: Mapping[str, Any]) -> None:
        self.names = {name: key if isinstance(key, str) else key[0] for name, key in names.items()}
        self.patches: Mapping[str, Any] = patcher.patches
        weights = patcher.model.state_dict()
        self.shapes = {key: tuple(weights[key].shape) for key in self.patches if key in weights}

    def touched(self, load: Load) -> tuple[dict[str, float], list[str]]:
        """Weights that a LoRA changes, with its strength, and those that its tensors do not fit."""
        fits: dict[str, float] = {}
        other: list[str] = []
        for key, entries in self.patches.items():
            for strength, patch, *_ in entries:
                for adapter in carried.adapters(patch):
                    names = getattr(adapter, "loaded_keys", None)
                    if names is not None and (names is load.names or names == load.names):
                        if _fits(adapter, self.shapes.get(key)):
                            fits[key] = float(strength)
                        else:
                            other.append(key)
        return fits, other


def _fits(adapter: Any, shape: tuple[int, ...] | None) -> bool:
    """Whether an adapter's answer has a weight's shape, where that can be told from two factors."""
    if shape is None or getattr(adapter, "name", "") != "lora" or adapter.weights[3] is not None:
        return True
    up, down = adapter.weights[0], adapter.weights[1]
    size = 1
    for side in shape[1:]:
        size *= side
    if adapter.weights[5] is not None:
        return True  # it gives the weight another shape on purpose
    return up.shape[0] == shape[0] and down[0].numel() == size


def _report(load: Load, files: Sequence[Facts], unet: _Side, text: _Side, later: bool) -> LoraReport:
    on_unet, wrong_unet = unet.touched(load)
    on_text, wrong_text = text.touched(load)
    layout = files[0].layout if files else None
    layers = sorted({_layer(name) for name in layout.tensors}) if layout else []
    loaded = {_layer(name) for name in load.names}
    applied = {*on_unet, *on_text, *wrong_unet, *wrong_text}
    missing: list[str] = []
    unused: list[str] = []
    elsewhere: list[str] = []
    for layer in layers:
        target = unet.names.get(layer) or text.names.get(layer)
        if target is None:
            missing.append(layer)
        elif layer not in loaded:
            unused.append(layer)
        elif target not in applied and not later:
            elsewhere.append(layer)
    reasons = {
        "no such layer": missing,
        "other shape": [*wrong_unet, *wrong_text],
        "not loaded": unused,
        "not here": elsewhere,
    }
    spoken = [said(facts) for facts in files]
    triggers = {word.casefold(): (word, source) for one in spoken for word, source in one.triggers}
    return LoraReport(
        files=tuple(facts.name for facts in files),
        unet=len(on_unet),
        unet_strength=_common(on_unet.values()),
        text=len(on_text),
        text_strength=_common(on_text.values()),
        skipped=tuple(Skipped(why, tuple(each)) for why, each in reasons.items() if each),
        family=family_of(layout) if layout else None,
        triggers=tuple(triggers.values()),
        unreadable=tuple(dict.fromkeys(line for one in spoken for line in one.unreadable)),
        scheduled=later,
    )


def _both(first: LoraReport, second: LoraReport) -> LoraReport:
    """One report of a file that was loaded more than once, or by halves."""
    return replace(
        first,
        unet=max(first.unet, second.unet),
        unet_strength=_sum(first.unet_strength, second.unet_strength),
        text=max(first.text, second.text),
        text_strength=_sum(first.text_strength, second.text_strength),
        skipped=min(first.skipped, second.skipped, key=lambda skipped: sum(len(s.layers) for s in skipped)),
        scheduled=first.scheduled or second.scheduled,
    )


def _sum(first: float | None, second: float | None) -> float | None:
    return second if first is None else first if second is None else first + second


def _common(strengths: Iterable[float]) -> float | None:
    """The strength of a LoRA, or the largest where blocks have different ones."""
    return max(strengths, key=abs, default=None)


_PARTS = re.compile(
    r"(\.lora_(up|down|mid|A|B)(\.default)?(\.weight)?|_lora\.(up|down)\.weight|\.lora\.(up|down)\.weight"
    r"|\.lora_linear_layer\.(up|down)\.weight|\.alpha|\.dora_scale|\.hada_[wt][12](_[ab])?"
    r"|\.lokr_(w[12](_[ab])?|t[12])|\.(a1|a2|b1|b2)\.weight|\.oft_blocks|\.rescale|\.diff(_b)?|\.set_weight"
    r"|\.reshape_weight|\.[wb]_norm)$"
)


def _layer(name: str) -> str:
    """The layer that a tensor of a LoRA file belongs to."""
    return _PARTS.sub("", name)


_FAMILIES = (
    ("SDXL", r"stable-diffusion-xl|sdxl|sd_xl"),
    ("SD 3", r"stable-diffusion-v?3|sd3"),
    ("SD 2.x", r"stable-diffusion-v2|sd_v2|sd2"),
    ("SD 1.x", r"stable-diffusion-v1|sd_v1|sd1"),
    ("Flux", r"flux"),
)
_CONTEXTS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 96: "pocket"}


def family_of(layout: guard.Layout) -> str | None:
    """The base model that a LoRA was made for, by its header, or by the width of the text rows it reads."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        said_so = layout.metadata.get(key, "").lower()
        for family, pattern in _FAMILIES:
            if re.search(pattern, said_so):
                return family
    for name, entry in layout.tensors.items():
        reads = re.search(r"attn2[_.](processor[_.])?to_[kv].*(down|lora_A|w1_b)", name)
        if reads and len(entry.shape) == 2:
            return _CONTEXTS.get(entry.shape[1])
    if any(re.search(r"double_blocks|single_transformer_blocks", name) for name in layout.tensors):
        return "Flux"
    return None


def lines(reports: Sequence[LoraReport], bypass: bool, say: Any) -> Iterator[str]:
    """The report as a person reads it; say: `language.words(...)`."""
    yield say("lora_head", count=len(reports))
    for report in reports:
        yield ""
        yield say("lora_file", files=" = ".join(report.files)) if report.files else say("lora_unknown")
        if len(report.files) > 1:
            yield say("lora_copies", count=len(report.files))
        if report.scheduled:
            yield say("lora_scheduled")
        for part, count, strength in (
            ("unet", report.unet, report.unet_strength),
            ("text", report.text, report.text_strength),
        ):
            if strength is not None:
                yield say(f"lora_{part}", count=count, strength=f"{strength:g}")
            elif not report.scheduled:
                yield say(f"lora_{part}_none")
        for skipped in report.skipped:
            name = f"lora_skipped_{skipped.reason.replace(' ', '_')}"
            few = ", ".join(skipped.layers[:3]) + (" \u2026" if len(skipped.layers) > 3 else "")
            yield say(name, count=len(skipped.layers), layers=few)
        if report.family and report.skipped:
            yield say("lora_family", family=report.family)
        if report.triggers:
            for word, source in report.triggers:
                yield say("lora_trigger", word=word, source=source)
        elif report.files:
            yield say("lora_no_trigger")
        for line in report.unreadable:
            yield say("lora_unreadable", line=line)
    if bypass:
        yield ""
        yield say("lora_bypass")
    if reports:
        yield ""
        yield say("lora_native")
        yield say("lora_later")


@cache
def _log_once(what: str) -> None:
    logging.warning("Language Bridge %s", what)
