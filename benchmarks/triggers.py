"""Measures the trigger proof: a LoRA's new concept, asked for by its trigger inside a Chinese prompt.

`bootstrap.py run benchmarks/triggers.py [--json] [--count N] [--seed N]`. The LoRA and the embedding of
pocket/assets are put on by the host's own loader, behind the bridge; pictures are sampled by its KSampler.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from language_bridge.benchmarks.pocket import Painter
from language_bridge.pocket import captions, concepts, judge
from language_bridge.pocket.captions import Caption

BRIDGES = ("pocket-iap", "pocket-pea", "pocket-alt")
WORDS = Path(__file__).with_name("word_for_word.json")


@dataclass(frozen=True)
class Asked:
    """One content in several wordings.

    chinese: with the trigger; plain: the same without it; english: proper English with the trigger;
    word_for_word: the Chinese sentence with each word put into English where it stands.
    """

    chinese: str
    plain: str
    english: str
    word_for_word: str
    caption: Caption
    seed: int


def tests(count: int, seed: int, form: concepts.Form = "first") -> list[Asked]:
    """Fresh captions about the concept, seen words and patterns, attributes left out at random as usual."""
    rng = np.random.default_rng([seed, concepts.FORMS.index(form)])
    found: list[Asked] = []
    for index in range(count):
        content = captions.describe(concepts.concept_scene(rng), rng)
        state = rng.bit_generator.state
        chinese = concepts.ask(content, "zh", rng, form).text
        rng.bit_generator.state = state  # the same sentence once more, without the trigger
        plain = concepts.ask(content, "zh", rng, "adjective", trigger="").text
        english = concepts.ask(content, "en", rng, form).text
        found.append(Asked(chinese, plain, english, word_for_word(chinese), content, seed * 100000 + index))
    return found


def signs(count: int, seed: int) -> list[Asked]:
    """Fresh captions with the embedding's name; `plain` is the Chinese sentence alone."""
    rng = np.random.default_rng([seed, 99])
    name = f"embedding:{concepts.EMBEDDING.stem}"
    found: list[Asked] = []
    for index in range(count):
        scene = concepts.sign_scene(rng)
        state = rng.bit_generator.state
        said = [concepts.ask_sign(scene, _again(rng, state), name, language) for language in ("zh", "en")]
        plain = said[0].text.replace(name, "").strip("\uff0c")
        chinese, english = said
        found.append(
            Asked(
                chinese.text,
                plain,
                english.text,
                word_for_word(chinese.text).replace(f"{name},", f"{name} ,"),
                chinese,
                seed * 100000 + index,
            )
        )
    return found


def _again(rng: np.random.Generator, state: Any) -> np.random.Generator:
    """The same draws once more: each language asks for the same content."""
    rng.bit_generator.state = state
    return rng


def word_for_word(chinese: str) -> str:
    """A Chinese sentence of the grammar with every word in English and in its place."""
    words = _dictionary()
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    text = re.sub(pattern, lambda match: f" {words[match[0]]} ", chinese)
    return re.sub(r"\s+([,;:'])", r"\1", " ".join(text.split()))


@lru_cache(maxsize=1)
def _dictionary() -> dict[str, str]:
    found: dict[str, str] = dict(json.loads(WORDS.read_text(encoding="utf-8"))["words"])
    for slot in ("shape", "colour", "size", "place", "ground"):
        for value, forms in captions.grammar()["zh"][slot].items():
            english = captions.grammar()["en"][slot][value]["seen"][0]
            found |= dict.fromkeys((*forms["seen"], *forms["held"]), english)
    return found


def offer(folder_name: str, folder: Path) -> None:
    """Lets the host's own loaders find a folder of the pack, in this process alone."""
    import folder_paths

    if str(folder) not in folder_paths.get_folder_paths(folder_name):
        folder_paths.add_model_folder_path(folder_name, str(folder))


def with_lora(model: Any, clip: Any, strength: float = 1.0) -> tuple[Any, Any]:
    """MODEL and CLIP behind the host's own LoRA loader, with the shipped LoRA."""
    import nodes

    offer("loras", concepts.LORA.parent)
    loaded: tuple[Any, Any] = nodes.LoraLoader().load_lora(
        model, clip, concepts.LORA.name, strength, strength
    )
    return loaded


def score(pictures: torch.Tensor, asked: Sequence[Asked]) -> dict[str, float]:
    """drawn: share of pictures with the concept, in its corner where one is named; kept: share of all other
    mentions that are right; each attribute of them; exact: pictures in which everything is right.
    """
    readings = _judge().read_many(pictures)
    drawn: list[bool] = []
    rest: list[dict[str, list[bool]]] = []
    exact: list[bool] = []
    for reading, one in zip(readings, asked, strict=True):
        marks = judge.score(reading, one.caption)
        exact.append(all(all(each) for each in marks.values()))
        shapes = [wanted.shape for wanted in one.caption.wanted]
        if concepts.SHAPE in shapes:
            drawn.append(marks["shape"].pop(shapes.index(concepts.SHAPE)))
        else:  # the sign stands last and is all of its shape, colour and size
            sign = [marks[name].pop() for name in ("shape", "colour", "size")]
            drawn.append(all(sign))
        rest.append(marks)
    shares = judge.accuracy(rest)
    kept = {name: share for name, share in shares.items() if name not in ("attributes", "exact")}
    return {
        "drawn": float(np.mean(drawn)),
        "kept": shares["attributes"],
        "exact": float(np.mean(exact)),
        **kept,
    }


@lru_cache(maxsize=1)
def _judge() -> judge.Judge:
    return judge.load(judge.NEW_FILE)


def measure(count: int, seed: int, bridges: Sequence[str] = BRIDGES) -> dict[str, Any]:
    """Every row: name -> shares, for the LoRA and for the embedding."""
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    offer("embeddings", concepts.EMBEDDING.parent)  # a tokenizer takes the list of folders along
    painter = Painter()  # decides whether the host runs on the CPU, before the host is imported
    from language_bridge.host import bridging

    start = time.process_time()
    bare = (painter.model, painter.clip)
    lora: dict[str, tuple[Any, str]] = {
        "english": (with_lora(*bare), "english"),
        "word for word": (with_lora(*bare), "word_for_word"),
        "english, without": (bare, "english"),
    }
    sign: dict[str, tuple[Any, str]] = {
        "english": (bare, "english"),
        "word for word": (bare, "word_for_word"),
    }
    for name in bridges:
        native = bridging.bridge(*bare, f"{name}.safetensors", 1.0, "native only")
        # On this route, too, a known trigger goes to the own CLIP; here nobody knows it.
        native = with_lora(*native)
        native[1].loras = ()
        lora[f"{name}, streams"] = (with_lora(*painter.bridged[name]), "chinese")
        lora[f"{name}, no streams"] = (native, "chinese")
        lora[f"{name}, no trigger"] = (with_lora(*painter.bridged[name]), "plain")
        sign[f"{name}, streams"] = (painter.bridged[name], "chinese")
        sign[f"{name}, no trigger"] = (painter.bridged[name], "plain")
    table: dict[str, dict[str, dict[str, float]]] = {}
    for kind, rows, asked in (("lora", lora, tests(count, seed)), ("embedding", sign, signs(count, seed))):
        for name, (both, wording) in rows.items():
            pictures = painter.paint(*both, [getattr(one, wording) for one in asked], seed)
            table.setdefault(kind, {})[name] = score(pictures, asked)
            print(f"{kind:10}{name:28}{_line(table[kind][name])}", file=sys.stderr, flush=True)

    def share(kind: str) -> dict[str, float]:
        best = table[kind]["english"]["drawn"]
        return {name: table[kind][f"{name}, streams"]["drawn"] / best for name in bridges}

    return {
        "trigger_share": max(share("lora").values()),
        "shares": {kind: share(kind) for kind in table},
        "n": count,
        "seed": seed,
        "cpu_seconds": round(time.process_time() - start, 1),
        "table": table,
    }


def _line(shares: dict[str, float]) -> str:
    return "  ".join(f"{name} {100 * share:5.1f}" for name, share in shares.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--bridges", nargs="*", default=list(BRIDGES))
    options = parser.parse_args()
    found = measure(options.count, options.seed, options.bridges)
    if options.json:
        print(json.dumps(found))
    else:
        for kind, rows in found["table"].items():
            for name, shares in rows.items():
                print(f"{kind:10}{name:28}{_line(shares)}")


if __name__ == "__main__":
    main()
