"""What a branch costs beside the host's own ControlNet of the same topology.

    python bootstrap.py run benchmarks/branch.py [--json] [--rounds N] [--size PIXELS] [--full]

Keys, each from one run in which the sides take turns; a step is one guided call of the U-Net (two texts):
branch_over_controlnet    a step with the branch, over a step with the ControlNet
branch_over_plain         a step with the branch, over a step without
controlnet_over_plain     a step with the ControlNet, over a step without
memory_over_controlnet    most memory held during a step with the branch, over that with the ControlNet, the
                          weights of U-Net and net included (by tensors on a CPU, by the allocator on CUDA)

All weights are random. The branch reads text of width 1024 in 52 places, as BDM's does; the ControlNet reads
the English text and a picture. `--full` takes the sizes of SD1.5 (a GPU, or patience); otherwise the U-Net is
a small one of SD1.x. Ratios are the medians over the rounds of CPU time over CPU time, on CUDA of wall time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NATIVE = "\u7ea2\u8272\u7684\u732b\u548c\u84dd\u8272\u7684\u72d7"
TARGETS = {"branch_over_controlnet": 1.02, "memory_over_controlnet": 1.02}
SD15: dict[str, Any] = {
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
}


class Held(TorchDispatchMode):
    """While inside, counts the bytes of all tensors that are made and still held, and keeps the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._holders: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return made

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        count, _ = self._holders.get(place, (0, size))
        self.now += 0 if count else size
        self.most = max(self.most, self.now)
        self._holders[place] = (count + 1, size)
        weakref.finalize(tensor, self._release, place)

    def _release(self, place: int) -> None:
        count, size = self._holders.pop(place)
        if count > 1:
            self._holders[place] = (count - 1, size)
        else:
            self.now -= size


class Bench:
    """A checkpoint, a branch, its tower and a ControlNet as files in a folder, opened by the host."""

    def __init__(self, folder: Path, size: int, full: bool) -> None:
        from comfy.cli_args import args

        args.cpu = args.cpu or not torch.cuda.is_available()
        import logging

        import comfy.utils
        import folder_paths

        logging.getLogger().setLevel(logging.WARNING)
        comfy.utils.PROGRESS_BAR_ENABLED = False
        import comfy.controlnet
        import comfy.sd

        import nodes
        from language_bridge.encoders.file import save_encoder
        from language_bridge.host import bridging
        from language_bridge.tests.fixtures import branches, checkpoints

        for name in ("language_bridges", "text_encoders"):
            (folder / name).mkdir()
            folder_paths.folder_names_and_paths[name] = ([str(folder / name)], {".safetensors"})
        family, sizes = checkpoints.FAMILIES["sd1"], dataclasses.replace(branches.TINY["sd1"], context=1024)
        if full:
            family = dataclasses.replace(family, unet={**family.unet, **SD15})
            sizes = branches.SD15
        path = checkpoints.write_checkpoint(folder / "sd1.ckpt", family, cut=True)
        self.model, clip = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=False, te_model_options=family.cut
        )[:2]
        net = comfy.controlnet.load_controlnet(str(checkpoints.write_controlnet(folder / "net.ckpt", family)))
        tower = _tower()
        save_encoder(folder / "text_encoders" / "tower.safetensors", tower)
        bridge = folder / "language_bridges" / "branch.safetensors"
        branches.write_branch(bridge, "sd1", tower, branches.random_branch(sizes))
        branched = bridging.bridge(self.model, clip, bridge.name, 1.0, "two streams")
        picture = torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(0))

        def conds(clip: Any, text: str) -> list[Any]:
            return [clip.encode_from_tokens_scheduled(clip.tokenize(each)) for each in (text, "")]

        english = conds(clip, "")
        controlled = nodes.ControlNetApplyAdvanced().apply_controlnet(*english, net, picture, 1.0, 0.0, 1.0)
        self.sides = {
            "branch": (branched[0], conds(branched[1], NATIVE)),
            "controlnet": (self.model, controlled),
            "plain": (self.model, english),
        }
        self.latent = {"samples": torch.zeros(1, 4, size // 8, size // 8)}

    def step(self, side: str) -> None:
        """One guided step."""
        from nodes import common_ksampler

        model, (positive, negative) = self.sides[side]
        common_ksampler(model, 5, 1, 3.0, "euler", "normal", positive, negative, self.latent)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def time(self, rounds: int) -> dict[str, float]:
        """The three ratios of time."""
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        spent: dict[str, list[float]] = {side: [] for side in self.sides}
        for number in range(-1, rounds):
            for side in list(self.sides)[:: 1 if number % 2 else -1]:
                began = clock()
                self.step(side)
                if number >= 0:  # the round before the first only warms up
                    spent[side].append(clock() - began)
        return {
            f"{over}_over_{under}": round(
                statistics.median(a / b for a, b in zip(spent[over], spent[under], strict=True)), 4
            )
            for over, under in (("branch", "controlnet"), ("branch", "plain"), ("controlnet", "plain"))
        }

    def memory(self) -> dict[str, float]:
        """The ratio of memory."""
        most = {side: self._most(side) for side in ("branch", "controlnet")}
        return {"memory_over_controlnet": round(most["branch"] / most["controlnet"], 4)}

    def _most(self, side: str) -> int:
        gc.collect()
        if torch.cuda.is_available():
            import comfy.model_management as management

            management.unload_all_models()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.step(side)
            return torch.cuda.max_memory_allocated()
        with Held() as held:
            self.step(side)
        return held.most + sum(_bytes(module) for module in self._modules(side))

    def _modules(self, side: str) -> list[torch.nn.Module]:
        model, conds = self.sides[side]
        beside = [patcher.model for patcher in model.get_nested_additional_models()]
        control = conds[0][0][1].get("control")
        nets = [] if control is None else [patcher.model for patcher in control.get_models()]
        return [model.model.diffusion_model, *beside, *nets]


def _tower() -> Any:
    from language_bridge.encoders.base import create_encoder
    from language_bridge.encoders.bert import BertSpec, bert_tokenizer
    from language_bridge.tests.fixtures.towers import vocabulary

    words = vocabulary()
    spec = BertSpec(vocab=len(words), width=1024, layers=1, window=52, heads=16, inner=64)
    tower = create_encoder(
        "bert", spec, bert_tokenizer(words), identity="bench-zh", window=52, mask_rule="none"
    )
    tower.reset_parameters(torch.Generator().manual_seed(0))
    return tower


def _bytes(module: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.state_dict().values())


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=256, help="pixels of the sampled picture")
    parser.add_argument("--full", action="store_true", help="the sizes of SD1.5")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="language-bridge-bench-") as folder, torch.inference_mode():
        bench = Bench(Path(folder), options.size, options.full)
        found: dict[str, Any] = bench.time(options.rounds) | bench.memory()
    found |= {"rounds": options.rounds, "threads": torch.get_num_threads(), "size": options.size}
    found |= {"full": options.full, "device": "cuda" if torch.cuda.is_available() else "cpu"}
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
