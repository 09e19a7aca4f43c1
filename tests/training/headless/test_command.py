"""The command as people start it: one process and several give one bridge, and a run goes on where it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from language_bridge.bridges.file import load_bridge
from language_bridge.encoders.file import read_encoder_header
from language_bridge.training import checkpoint
from language_bridge.training.headless import command
from language_bridge.training.headless.command import main, simplifier
from language_bridge.training.headless.options import SHAPES, parser, published

from .toys import RESOLUTION, row, write_shard

CHECKOUT = Path(__file__).resolve().parents[3]
LEARNT = ("--learning-rate", "0.5", "--warmup", "0", "--optimiser", "SGD", "--clip", "0", "--drop", "0.3")


def arguments(small: Path, folder: Path, *extra: str, model: str = "sd1") -> list[str]:
    """A small training in `folder`."""
    return [
        *("--model", str(small / model), "--tower", str(small / "tower.safetensors")),
        *(
            "--shards",
            str(small / "shards"),
            "--run",
            str(folder / "run"),
            "--out",
            str(folder / "b.safetensors"),
        ),
        *("--shapes", f"{RESOLUTION}x{RESOLUTION}", "--least-area", "0", "--size", "width=16", "--cpu"),
        *LEARNT,
        *extra,
    ]


def outside(
    variables: dict[str, str], command: Sequence[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run in a process that knows no ComfyUI and no name of the pack's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LANGUAGE_"))}
    environment = kept | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )


def weights(file: Path) -> torch.Tensor:
    """All numbers of a bridge, one behind the other."""
    return torch.cat([value.flatten() for value in load_bridge(file).bridge.state_dict().values()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The length of the difference, as a share of the second's length."""
    return float((one - other).norm() / other.norm())


@pytest.mark.slow
def test_two_processes_give_the_bridge_of_one_with_twice_the_batch(small: Path, tmp_path: Path) -> None:
    """Gloo on the CPU, SGD, fp32, 6 steps. Bit for bit one process that adds up two batches; to 1e-6 of all
    weights, and 1e-5 of how far they moved, one with twice the batch.

    The two are started by Accelerate from the checkout's own folder, as `python -m training` is. They go on
    from the second step of a run that one process began, one of them speaks and writes, and one process goes
    on from what they wrote.
    """
    runs = {name: tmp_path / name for name in ("begun", "twice", "added", "two")}
    for folder in runs.values():
        folder.mkdir()
    assert (
        main(arguments(small, runs["begun"], "--batch", "4", "--steps", "1", "--learning-rate", "1e-12")) == 0
    )
    assert main(arguments(small, runs["twice"], "--batch", "4", "--steps", "6")) == 0
    assert main(arguments(small, runs["added"], "--batch", "2", "--accumulation", "2", "--steps", "6")) == 0
    once = ("--batch", "2", "--accumulation", "2", "--keep", "9")
    assert main(arguments(small, runs["two"], *once, "--steps", "2")) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "training"]
    given = ("--batch", "2", "--steps", "6", "--save-every", "1", "--keep", "9")
    done = outside({}, [*launch, *arguments(small, runs["two"], *given)], CHECKOUT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, 4 examples a step; 3 shards; from step 2 to 6" in done.stderr
    assert done.stderr.count("step 6 of 6") == 1
    assert checkpoint.steps(runs["two"] / "run") == [2, 3, 4, 5, 6]
    begun, twice, added, two = (weights(folder / "b.safetensors") for folder in runs.values())
    assert torch.equal(two, added)
    assert apart(two, twice) < 1e-6
    assert apart(two - begun, twice - begun) < 1e-5
    assert apart(begun, twice) > 1e-4, "there was something to learn"
    assert load_bridge(runs["two"] / "b.safetensors").header.training["batch"] == 4
    for step in (5, 6):
        shutil.rmtree(runs["two"] / "run" / f"step-{step:08d}")
    assert main(arguments(small, runs["two"], *once, "--steps", "6")) == 0
    assert torch.equal(weights(runs["two"] / "b.safetensors"), added)


@pytest.mark.parametrize("model", ["sd1", "xl"])
def test_a_run_that_was_left_gives_the_same_bridge_bit_for_bit(
    small: Path, tmp_path: Path, model: str
) -> None:
    given = (
        "--batch",
        "2",
        "--accumulation",
        "2",
        "--window",
        "1",
        "--average",
        "0.9",
        "--optimiser",
        "AdamW",
    )
    for folder, stops in (("whole", (6,)), ("parts", (2, 6))):
        (tmp_path / folder).mkdir()
        for steps in stops:
            assert main(arguments(small, tmp_path / folder, *given, "--steps", str(steps), model=model)) == 0
    whole, parts = (tmp_path / name / "b.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_signal_ends_the_run_after_a_whole_step(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM: the step is finished, the bridge written, and the run goes on later as if never left."""
    import signal

    given = ("--batch", "4", "--steps", "5", "--tell-every", "1")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert main(arguments(small, tmp_path / "whole", *given)) == 0
    told = command.Work._tell

    def tell(self: Any, report: Any, source: Any) -> None:
        told(self, report, source)
        if report.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(command.Work, "_tell", tell)
    before = signal.getsignal(signal.SIGTERM)
    assert main(arguments(small, tmp_path / "parts", *given)) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.steps(tmp_path / "parts" / "run") == [2]
    assert load_bridge(tmp_path / "parts" / "b.safetensors").header.training["steps"] == 2
    assert main(arguments(small, tmp_path / "parts", *given)) == 0
    whole, parts = (tmp_path / name / "b.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


METHODS = {
    "pea": (),
    "iap": ("--tower-learns", "--bridge-rests"),
    "align": ("--kind", "linear"),
    "kv": (),
    "attn2": (),
    "branch": (),
    "resample": (),
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_and_writes_what_the_node_reads(small: Path, tmp_path: Path, method: str) -> None:
    """The file says its tower, method and base; the checkpoint holds what learns and nothing else."""
    tower = read_encoder_header(small / "tower.safetensors")
    assert tower is not None
    given = [
        *METHODS[method],
        "--method",
        method,
        "--batch",
        "2",
        "--steps",
        "2",
        "--held-out",
        str(small / "shards"),
    ]
    made = arguments(small, tmp_path, *given, "--validate-every", "2", "--name", "mine")
    if "linear" in given or method == "branch":
        made = [each for each in made if each not in ("--size", "width=16")]
    assert main(made) == 0
    loaded = load_bridge(tmp_path / "b.safetensors")
    header = loaded.header
    assert (header.base, header.name, header.languages) == ("sd1", "mine", ("zh",))
    assert header.training["objective"] == ("kv" if method == "attn2" else method)
    learns = method == "iap"
    assert header.encoder.identity == ("mine-tower" if learns else tower.identity)
    assert (loaded.encoder is not None) == learns
    assert learns or header.encoder.digest == tower.digest
    assert bool(loaded.unet) == (method in ("kv", "attn2", "branch")) == (header.unet != "none")
    places = ("input_blocks.", "middle_block.", "output_blocks.")
    if method == "branch":
        places = ("input_blocks.", "middle_block.", "time_embed.", "zero_convs.", "middle_block_out.")
    assert all(name.startswith(places) for name in loaded.unet)
    saved = checkpoint.latest(tmp_path / "run")
    assert saved is not None
    prefixes = {name.split(".")[0] for name in saved.tensors["weights"]}
    expected = {"encoder"} if learns else {"bridge", "unet"} if loaded.unet else {"bridge"}
    assert prefixes == expected - ({"bridge"} if method == "branch" else set())
    assert len(saved.tensors["curves"]["held_out"]) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_as_single_does(small: Path, tmp_path: Path, precision: str) -> None:
    """The loss of a step is within a hundredth; what is saved is single precision unless it is asked for."""
    losses: list[float] = []
    for each in ("fp32", precision):
        (tmp_path / each).mkdir()
        given = ("--batch", "4", "--steps", "1", "--precision", each)
        assert main(arguments(small, tmp_path / each, *given, model="xl")) == 0
        saved = checkpoint.latest(tmp_path / each / "run")
        assert saved is not None
        losses.append(float(saved.tensors["curves"]["loss"][0, 1]))
    assert abs(losses[1] / losses[0] - 1) < 0.01
    assert {value.dtype for value in saved.tensors["weights"].values()} == {torch.float32}


def test_a_bridge_goes_on_from_a_file(small: Path, tmp_path: Path) -> None:
    assert main(arguments(small, tmp_path, "--batch", "4", "--steps", "1")) == 0
    made = weights(tmp_path / "b.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    start = ("--start", str(tmp_path / "b.safetensors"), "--learning-rate", "1e-12")
    assert main(arguments(small, other, "--batch", "4", "--steps", "1", *start)) == 0
    assert apart(weights(other / "b.safetensors"), made) < 1e-6


def test_a_part_of_the_unet_goes_on_from_a_file_or_is_refused(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was learnt in the U-Net stays learnt: a step that moves nothing writes it back as it was."""
    learnt = ("--batch", "4", "--method", "kv")
    assert main(arguments(small, tmp_path, *learnt, "--steps", "2")) == 0
    first = load_bridge(tmp_path / "b.safetensors").unet
    start = ("--start", str(tmp_path / "b.safetensors"), "--learning-rate", "1e-12", "--steps", "1")
    again = tmp_path / "again"
    again.mkdir()
    assert main(arguments(small, again, *learnt, *start)) == 0
    second = load_bridge(again / "b.safetensors").unet
    own = {name: value.float() for name, value in first.items()}
    assert own.keys() == second.keys() and own
    for name, value in own.items():
        torch.testing.assert_close(second[name].float(), value, rtol=0, atol=1e-6)
    other = tmp_path / "other"
    other.mkdir()
    assert main(arguments(small, other, "--batch", "4", "--method", "pea", *start)) != 0
    assert "part of the U-Net" in caplog.text


def test_a_run_goes_on_only_with_the_same_data_and_rules(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments(small, tmp_path, "--batch", "4", "--steps", "1")) == 0
    assert main(arguments(small, tmp_path, "--batch", "4", "--steps", "2", "--crop", "centre")) == 1
    assert "crop" in caplog.records[-1].getMessage()
    assert main(arguments(small, tmp_path, "--batch", "2", "--steps", "2")) == 1
    assert "batch" in caplog.records[-1].getMessage()


def test_what_was_left_out_is_told(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two of five rows fail the filters, one picture is broken: the log says so, and the run goes on."""
    rows = [row(0), row(1, watermark=0.9), row(2, aesthetic_score=1), (row(3)[0], b"broken"), row(4)]
    shard = write_shard(tmp_path / "a.tar", rows)
    given = ("--batch", "2", "--steps", "1", "--shards", str(shard))
    assert main(arguments(small, tmp_path, *given)) == 0
    told = "2 examples; left out: 1 aesthetic score too low, 1 damaged picture, 1 watermark"
    assert told in caplog.text


def test_help_needs_neither_torch_nor_comfyui(tmp_path: Path) -> None:
    """From the pack's folder, under whatever name it lies; nothing heavy is imported for it."""
    code = "import sys, runpy; sys.argv = ['training', '--help']"
    code += "\ntry: runpy.run_module('training', run_name='__main__')"
    code += "\nfinally: print(sorted({'torch', 'comfy', 'diffusers', 'transformers'} & set(sys.modules)))"
    done = outside({}, [sys.executable, "-c", code], CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert "--shards" in done.stdout and done.stdout.rstrip().endswith("[]")
    done = outside({}, [sys.executable, str(CHECKOUT / "training"), "--help"], tmp_path)
    assert done.returncode == 0 and "--shards" in done.stdout, done.stderr


def test_what_is_not_installed_is_said_before_anything_is_opened(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else real(name))
    assert main(arguments(small, tmp_path)) == 1
    assert "pip install diffusers" in caplog.text
    assert not (tmp_path / "run").exists()


def test_simplified_chinese_is_made_by_a_library_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging
    import types

    from language_bridge.bridges.errors import BridgeError

    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "opencc", None)
    assert simplifier("auto") is None
    assert "OpenCC is not installed" in caplog.text
    with pytest.raises(BridgeError, match="pip install opencc"):
        simplifier("yes")

    class OpenCC:
        def __init__(self, config: str) -> None:
            assert config == "t2s"

        def convert(self, text: str) -> str:
            return text + "s"

    library = types.ModuleType("opencc")
    library.OpenCC = OpenCC  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opencc", library)
    assert simplifier("auto")("x") == "xs"
    assert simplifier("no") is None


def test_the_defaults_are_the_published_values() -> None:
    """reference: train_sdxl_zh.py, train_sd_zh.py and their data loaders at e403b2a."""
    options = parser().parse_args(
        ["--model", "m", "--tower", "t", "--shards", "s", "--run", "r", "--out", "o"]
    )
    assert (options.least_aesthetic, options.most_watermark, options.drop, options.weight) == (
        6.0,
        0.5,
        0.1,
        0.1,
    )
    assert (options.weight_decay, options.optimiser, options.crop) == (0.0, "AdamW", "random")
    xl, small = published("sdxl"), published("sd1")
    assert (xl.batch, xl.offset, xl.area, xl.judged, xl.rate, xl.warmup) == (
        10,
        0.5,
        409_600,
        False,
        1e-5,
        100,
    )
    assert (small.batch, small.offset, small.area, small.judged, small.shapes) == (
        40,
        0,
        0,
        True,
        ((512, 512),),
    )
    assert len(SHAPES) == 9 and all(350_000 < width * height <= 409_600 for width, height in SHAPES)
