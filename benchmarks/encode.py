"""What bridged text costs: encoding against the towers alone, a prompt that comes again, sampling, loading.

    python bootstrap.py run benchmarks/encode.py [--json] [--rounds N] [--layers N] [--size PIXELS]

Keys, each from one run in which the two sides take turns:
encode_over_towers    a mixed prompt behind the bridge, over the forwards of CLIP-L and the native tower alone
cached_ms             a native prompt that comes again, milliseconds of wall time
steady_over_stock     a step of sampling with bridged conditioning, over stock conditioning of the same length
steady_kv_over_stock, steady_timed_over_stock    the same with a U-Net part, and with a timed bridge
load_over_read        loading bridge and tower from files in the page cache, over safetensors reading the same
                      bytes into memory of its own
load_cold_over_read   the same after the files were dropped from the page cache, wall time; null where the
                      system cannot drop them

The towers have the published sizes (CLIP-L, BERT-base of Taiyi with 77 places, PEA's SD1.5 bridge) and random
weights; the U-Net is a small one of SD1.x. Ratios are the medians over the rounds of CPU time over CPU time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

NATIVE, ENGLISH = (
    "\u7ea2\u8272\u7684\u732b\u548c\u84dd\u8272\u7684\u72d7, ",
    "a photo of a round table, soft light",
)
TARGETS = {
    "encode_over_towers": 1.10,
    "cached_ms": 5.0,
    "steady_over_stock": 1.02,
    "load_over_read": 1.3,
}
Clock = Callable[[], float]


def turns(
    rounds: int, sides: Sequence[Callable[[], object]], clock: Clock = time.process_time
) -> list[list[float]]:
    """Seconds of each side in each round; every second round runs them backwards."""
    spent: list[list[float]] = [[0.0] * rounds for _ in sides]
    for number in range(-1, rounds):
        order = range(len(sides)) if number % 2 else reversed(range(len(sides)))
        for side in order:
            began = clock()
            sides[side]()
            if number >= 0:  # the round before the first only warms up
                spent[side][number] = clock() - began
    return spent


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the rounds' ratios."""
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 4)


class Bench:
    """A checkpoint, three bridges and their tower as files in a folder, opened by the host."""

    def __init__(self, folder: Path, layers: int) -> None:
        from comfy.cli_args import args

        args.cpu = args.cpu or not torch.cuda.is_available()
        import logging

        import comfy.utils
        import folder_paths

        logging.getLogger().setLevel(logging.WARNING)
        comfy.utils.PROGRESS_BAR_ENABLED = False
        from language_bridge.host import bridging
        from language_bridge.tests.fixtures.checkpoints import FAMILIES, write_checkpoint

        for name in ("language_bridges", "text_encoders"):
            (folder / name).mkdir()
            folder_paths.folder_names_and_paths[name] = ([str(folder / name)], {".safetensors"})
        import comfy.sd

        checkpoint = write_checkpoint(folder / "sd1.ckpt", FAMILIES["sd1"])
        self.model, self.clip = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)[:2]
        self.folder = folder
        self._write(layers)
        self.bridged = {
            name: bridging.bridge(self.model, self.clip, f"{name}.safetensors", 1.0, "two streams")
            for name in ("plain", "kv", "timed")
        }

    def _write(self, layers: int) -> None:
        from language_bridge.bridges.base import create
        from language_bridge.bridges.file import BridgeHeader, save_bridge
        from language_bridge.encoders.base import create_encoder
        from language_bridge.encoders.bert import BertSpec, bert_tokenizer
        from language_bridge.encoders.file import save_encoder
        from language_bridge.host.unet import part_shapes
        from language_bridge.tests.fixtures.towers import reference, vocabulary

        words = vocabulary()
        words += [f"[unused{number}]" for number in range(21128 - len(words))]
        spec = BertSpec(vocab=len(words), width=768, layers=layers, window=512, heads=12, inner=3072)
        tower = create_encoder("bert", spec, bert_tokenizer(words), identity="bench-zh", window=77)
        tower.reset_parameters(torch.Generator().manual_seed(0))
        save_encoder(self.folder / "text_encoders" / "tower.safetensors", tower, dtype=torch.float16)
        mlp = {"hidden": 768, "context": 768, "width": 2048, "depth": 3}
        kv = {key: torch.randn(shape) * 0.02 for key, shape in part_shapes(self.model, "kv").items()}
        for name, kind, sizes, unet in (
            ("plain", "mlp", mlp, None),
            ("kv", "mlp", mlp, kv),
            ("timed", "ella", {"hidden": 768, "context": 768}, None),
        ):
            bridge = create(kind, sizes)
            bridge.reset_parameters(torch.Generator().manual_seed(1))
            header = BridgeHeader(
                kind=kind,
                spec=dataclasses.asdict(bridge.spec),
                base="sd1",
                encoder=reference(tower),
                unet="kv" if unet else "none",
                training={"unet": "delta"},
            )
            path = self.folder / "language_bridges" / f"{name}.safetensors"
            save_bridge(path, header, bridge, unet=unet, dtype=torch.float16)

    @torch.inference_mode()
    def encode(self, rounds: int) -> dict[str, float]:
        """encode_over_towers and cached_ms."""
        from language_bridge.host.cache import EMBEDDINGS

        clip: Any = self.bridged["plain"][1]
        tower = clip.speech.tower
        ids, mask = tower.encoder.batch([NATIVE])
        words = self.clip.tokenize(ENGLISH)
        clip.load_model()

        def bridged() -> None:
            EMBEDDINGS.clear()
            clip.encode_from_tokens(clip.tokenize(NATIVE + ENGLISH), return_pooled=True)

        def towers() -> None:
            self.clip.cond_stage_model.encode_token_weights(words)
            tower.encoder(ids, mask)

        over, under = turns(rounds, (bridged, towers))
        clip.encode_from_tokens_scheduled(clip.tokenize(NATIVE))
        (again,) = turns(
            4 * rounds,
            (lambda: clip.encode_from_tokens_scheduled(clip.tokenize(NATIVE)),),
            time.perf_counter,
        )
        return {
            "encode_over_towers": ratio(over, under),
            "cached_ms": round(1000 * statistics.median(again), 3),
        }

    @torch.inference_mode()
    def steady(self, rounds: int, size: int, steps: int = 2) -> dict[str, float]:
        """The three ratios of sampling; the encodes before it are not counted."""
        from nodes import common_ksampler

        latent = {"samples": torch.zeros(1, 4, size // 8, size // 8)}

        def run(model: Any, positive: Any, negative: Any) -> Callable[[], object]:
            return lambda: common_ksampler(
                model, 5, steps, 3.0, "euler", "normal", positive, negative, latent
            )

        sides: list[Callable[[], object]] = []
        names = ("plain", "kv", "timed")
        for name in names:
            model, clip = self.bridged[name]
            conds = [
                clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (NATIVE + ENGLISH, "")
            ]
            plain = [
                [[torch.randn_like(rows), {"pooled_output": None}] for rows, _ in cond] for cond in conds
            ]
            sides += [run(model, *conds), run(self.model, *plain)]
        spent = turns(rounds, sides)
        keys = ("steady_over_stock", "steady_kv_over_stock", "steady_timed_over_stock")
        return {key: ratio(spent[2 * n], spent[2 * n + 1]) for n, key in enumerate(keys)}

    def load(self, rounds: int) -> dict[str, float | None]:
        """load_over_read and load_cold_over_read."""
        from comfy.ops import manual_cast
        from safetensors.torch import load_file

        from language_bridge.bridges.file import load_bridge
        from language_bridge.encoders.file import load_encoder

        files = (
            self.folder / "language_bridges" / "plain.safetensors",
            self.folder / "text_encoders" / "tower.safetensors",
        )

        def load() -> None:
            load_bridge(files[0], ops=manual_cast, dtype=torch.float16)
            load_encoder(files[1], ops=manual_cast, dtype=torch.float16)

        def read() -> None:
            # The library maps the file; only the copy reads it, and a loaded model holds all of it at once.
            held = [value.clone() for path in files for value in load_file(path).values()]
            del held

        def forget(then: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                for path in files:
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                then()

            return run

        warm = ratio(*turns(rounds, (load, read)))
        cold = None
        if hasattr(os, "posix_fadvise"):
            cold = ratio(*turns(rounds, (forget(load), forget(read)), time.perf_counter))
        return {"load_over_read": warm, "load_cold_over_read": cold}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=12, help="of the native tower")
    parser.add_argument("--size", type=int, default=256, help="pixels of the sampled picture")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="language-bridge-bench-") as folder:
        bench = Bench(Path(folder), options.layers)
        found: dict[str, Any] = bench.encode(options.rounds)
        found |= bench.steady(options.rounds, options.size)
        found |= bench.load(options.rounds)
    found |= {"rounds": options.rounds, "threads": torch.get_num_threads(), "size": options.size}
    found["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if options.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        target = f"   (target: at most {TARGETS[key]})" if key in TARGETS else ""
        print(f"{key:26}{value}{target}")
    missed = [key for key, most in TARGETS.items() if found[key] > most]
    print("missed: " + (", ".join(missed) or "none"), file=sys.stderr)


if __name__ == "__main__":
    main()
