"""What bridged text costs: encoding against the towers alone, a prompt that comes again, sampling, loading.

    python bootstrap.py run benchmarks/encode.py [--only encode|steady|load] [--json] [--rounds N] ...

Keys, each from one run in which the two sides take turns:
encode_over_towers    a mixed prompt behind the bridge, over the forwards of CLIP-L and the native tower alone
cached_ms             a native prompt that comes again, milliseconds of wall time
steady_over_stock     a step of sampling with bridged conditioning, over stock conditioning of the same length
steady_kv_over_stock, steady_timed_over_stock    the same with a U-Net part, and with a timed bridge
load_over_read        loading bridge and tower (float16) that were verified on this machine before, from files
                      in the page cache, over safetensors reading the same bytes into memory of its own
load_cold_over_read   the same after the files were dropped from the page cache, wall time; null where the
                      system cannot drop them
first_load_over_read, first_load_cold_over_read    the same with an empty ledger: every number is looked at,
                      and the tower is hashed
load_16_to_32_over_read, load_32_to_32_over_read, load_32_to_16_over_read    load_over_read with other types
                      in the file and in memory (a CPU computes in float32)

The towers have the published sizes (CLIP-L, BERT-base of Taiyi with 77 places, PEA's SD1.5 bridge) and random
weights; the U-Net is a small one of SD1.x. A ratio is the median over the rounds, CPU time over CPU time. In
a round the two sides take turns, A B B A or B A A B, so that what drifts hits both; `spread` gives the first
and the third quartile of the rounds. What a turn has freed goes back to
the system before the next turn of either side, for a load needs memory that the process does not have yet.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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


def turns(rounds: int, side: Callable[[], object], clock: Clock = time.process_time) -> list[float]:
    """Seconds in each round; the first round of all only warms up."""
    spent: list[float] = []
    for _ in range(rounds + 1):
        began = clock()
        side()
        spent.append(clock() - began)
    return spent[1:]


def ratios(
    rounds: int, over: Callable[[], object], under: Callable[[], object], clock: Clock = time.process_time
) -> list[float]:
    """Seconds of `over` by seconds of `under` in each round: A B B A, then B A A B, and so on."""
    found: list[float] = []
    for number in range(-1, rounds):
        spent = [0.0, 0.0]
        for side in (0, 1, 1, 0) if number % 2 else (1, 0, 0, 1):
            give_back()
            began = clock()
            (over, under)[side]()
            spent[side] += clock() - began
        if number >= 0:  # the round before the first only warms up
            found.append(spent[0] / spent[1])
    return found


def give_back() -> None:
    """Hands freed memory back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


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
        halves = (self.folder / "language_bridges" / "plain", self.folder / "text_encoders" / "tower")
        self.files = {
            "16": tuple(path.with_suffix(".safetensors") for path in halves),
            "32": tuple(self.folder / f"{path.name}-32.safetensors" for path in halves),
        }
        save_encoder(self.files["16"][1], tower, dtype=torch.float16)
        save_encoder(self.files["32"][1], tower)
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
            if name == "plain":
                save_bridge(self.files["32"][0], header, bridge)

    @torch.inference_mode()
    def encode(self, rounds: int) -> dict[str, list[float]]:
        """encode_over_towers, and cached_ms in each round."""
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

        over = ratios(rounds, bridged, towers)
        clip.encode_from_tokens_scheduled(clip.tokenize(NATIVE))
        again = turns(
            4 * rounds, lambda: clip.encode_from_tokens_scheduled(clip.tokenize(NATIVE)), time.perf_counter
        )
        return {"encode_over_towers": over, "cached_ms": [1000 * seconds for seconds in again]}

    @torch.inference_mode()
    def steady(self, rounds: int, size: int, steps: int) -> dict[str, list[float]]:
        """The three ratios of sampling; the encodes before it are not counted."""
        from nodes import common_ksampler

        latent = {"samples": torch.zeros(1, 4, size // 8, size // 8)}

        def run(model: Any, positive: Any, negative: Any) -> Callable[[], object]:
            return lambda: common_ksampler(
                model, 5, steps, 3.0, "euler", "normal", positive, negative, latent
            )

        found: dict[str, list[float]] = {}
        for key, name in (("steady", "plain"), ("steady_kv", "kv"), ("steady_timed", "timed")):
            model, clip = self.bridged[name]
            conds = [
                clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (NATIVE + ENGLISH, "")
            ]
            plain = [
                [[torch.randn_like(rows), {"pooled_output": None}] for rows, _ in cond] for cond in conds
            ]
            found[f"{key}_over_stock"] = ratios(rounds, run(model, *conds), run(self.model, *plain))
        return found

    def load(self, rounds: int) -> dict[str, list[float] | None]:
        """The ratios of loading."""
        from comfy.ops import manual_cast
        from safetensors.torch import load_file

        from language_bridge.bridges.file import load_bridge
        from language_bridge.encoders.file import load_encoder
        from language_bridge.encoders.ledger import REST_NS, Ledger

        ledger = Ledger(self.folder / "verified.json")
        time.sleep(REST_NS / 1e9 + 0.1)  # a file that was written just now would not be remembered

        def load(width: str, dtype: torch.dtype) -> None:
            bridge, tower = self.files[width]
            load_bridge(bridge, ops=manual_cast, dtype=dtype, ledger=ledger)
            load_encoder(tower, ops=manual_cast, dtype=dtype, ledger=ledger)

        def read(width: str) -> None:
            # The library maps the file; only the copy reads it, and a loaded model holds all of it at once.
            held = [value.clone() for path in self.files[width] for value in load_file(path).values()]
            del held

        def half() -> None:
            load("16", torch.float16)

        def first() -> None:
            ledger.path.unlink(missing_ok=True)
            half()

        def forget(then: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                for path in self.files["16"]:
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                then()

            return run

        def bare() -> None:
            read("16")

        found: dict[str, list[float] | None] = {"load_over_read": ratios(rounds, half, bare)}
        for stored, dtype in (("16", torch.float32), ("32", torch.float32), ("32", torch.float16)):
            found[f"load_{stored}_to_{8 * dtype.itemsize}_over_read"] = ratios(
                rounds, functools.partial(load, stored, dtype), functools.partial(read, stored)
            )
        found["first_load_over_read"] = ratios(rounds, first, bare)
        for key, side in (("load_cold_over_read", half), ("first_load_cold_over_read", first)):
            drops = hasattr(os, "posix_fadvise")
            cold = ratios(rounds, forget(side), forget(bare), time.perf_counter) if drops else None
            found[key] = cold
        return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("encode", "steady", "load"), help="this part alone")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layers", type=int, default=12, help="of the native tower")
    parser.add_argument("--size", type=int, default=256, help="pixels of the sampled picture")
    parser.add_argument("--steps", type=int, default=2, help="sampled in one turn of a round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="language-bridge-bench-") as folder:
        bench = Bench(Path(folder), options.layers)
        rounds: dict[str, list[float] | None] = {}
        if options.only in (None, "encode"):
            rounds |= bench.encode(options.rounds)
        if options.only in (None, "steady"):
            rounds |= bench.steady(options.rounds, options.size, options.steps)
        if options.only in (None, "load"):
            rounds |= bench.load(options.rounds)
    found: dict[str, Any] = {
        key: None if values is None else round(statistics.median(values), 4) for key, values in rounds.items()
    }
    found["spread"] = {
        key: [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")[::2]]
        for key, values in rounds.items()
        if values is not None
    }
    found |= {"rounds": options.rounds, "threads": torch.get_num_threads(), "size": options.size}
    found |= {"steps": options.steps, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    if options.json:
        print(json.dumps(found))
        return
    for key in rounds:
        target = f"   (target: at most {TARGETS[key]})" if key in TARGETS else ""
        print(f"{key:28}{found[key]}   {found['spread'].get(key, '')}{target}")
    missed = [key for key, most in TARGETS.items() if key in found and found[key] > most]
    print("missed: " + (", ".join(missed) or "none"), file=sys.stderr)


if __name__ == "__main__":
    main()
