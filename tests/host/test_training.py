"""Laws of a training in the graph: a bridge comes out, nothing else changes, and nothing learnt is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from language_bridge.bridges.base import Hidden
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import load_bridge
from language_bridge.encoders.file import load_encoder
from language_bridge.host import bridging, folders, material, preview, training
from language_bridge.host.base import base_of
from language_bridge.host.beginning import tower_file
from language_bridge.host.pocket import load_pocket
from language_bridge.pocket import captions
from language_bridge.pocket.painter import paint_many, random_scene
from language_bridge.prompt import normalise
from language_bridge.tests.fixtures.graph import Checkpoint
from language_bridge.tests.fixtures.stock import encode, same
from language_bridge.training.chance import Chance
from language_bridge.training.dataset import Dataset, read_folder, read_pairs
from language_bridge.training.methods import METHODS
from language_bridge.training.settings import Settings

TOWER = "pocket-zh"
COUNT = 14


class Watcher:
    """Remembers what it is told; `at` is called with the number of each step."""

    def __init__(self, at: Callable[[int], None] = lambda step: None) -> None:
        self.said: list[str] = []
        self.steps: list[int] = []
        self.pictures: list[Image.Image] = []
        self._at = at

    def say(self, text: str) -> None:
        self.said.append(text)

    def show(self, step: int, steps: int, picture: Image.Image | None) -> None:
        self.steps.append(step)
        if picture is not None:
            self.pictures.append(picture)
        self._at(step)


@dataclasses.dataclass(frozen=True)
class World:
    """The pocket checkpoint, and a folder of pictures with captions in both languages."""

    model: Any
    clip: Any
    vae: Any
    folder: Path

    @property
    def dataset(self) -> Dataset:
        return read_folder(self.folder, "zh")

    def train(
        self, choice: training.Choice, watcher: Watcher | None = None, **other: Any
    ) -> training.Outcome:
        given: dict[str, Any] = {"model": self.model, "clip": self.clip, "vae": self.vae} | other
        dataset = given.pop("dataset", None) or self.dataset
        with torch.inference_mode():
            return training.train(choice, dataset, watcher=watcher or Watcher(), **given)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    folder.mkdir()
    write_pictures(folder, COUNT)
    with torch.inference_mode():
        return World(*load_pocket(), folder)


@pytest.fixture(autouse=True)
def own_folders(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user directory of this module's own; bridges and towers that ship are there, too."""
    before = folder_paths.get_user_directory()
    bridges = folder_paths.folder_names_and_paths[folders.FOLDER]
    own = tmp_path_factory.getbasetemp() / "training-user"
    folder_paths.set_user_directory(str(own))
    folder_paths.folder_names_and_paths[folders.FOLDER] = (
        [*bridges[0], str(folders._ASSETS / "bridges")],
        bridges[1],
    )
    yield
    folder_paths.set_user_directory(before)
    folder_paths.folder_names_and_paths[folders.FOLDER] = bridges


def write_pictures(folder: Path, count: int, seed: int = 5) -> None:
    """Painted scenes, with a list of their captions."""
    random = np.random.default_rng(seed)
    scenes = [random_scene(random, held_out=False) for _ in range(count)]
    rows: list[dict[str, str]] = []
    for number, (scene, picture) in enumerate(zip(scenes, paint_many(scenes, random), strict=True)):
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(folder / f"{number}.png")
        both = captions.parallel(scene, random)
        rows.append({"image": f"{number}.png", "zh": both["zh"].text, "en": both["en"].text})
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")


def choice_of(objective: str, run: str, steps: int = 3, **other: Any) -> training.Choice:
    """A short training; `settings` and `watch` are fields to change."""
    settings: dict[str, Any] = {"batch": 4, "warmup": 1, "learning_rate": 1e-3, "save_every": 0}
    watch: dict[str, Any] = {"held_out": 0.2, "samples": 0, "judged": 0, "sample_steps": 2}
    settings |= other.pop("settings", {})
    watch |= other.pop("watch", {})
    given: dict[str, Any] = {"tower": TOWER, "kind": "linear", "resolution": 64} | other
    return training.Choice(
        objective=objective,
        run=run,
        settings=Settings(steps=steps, **settings),
        watch=training.Watch(**watch),
        **given,
    )


def weights_of(trained: training.Trained) -> dict[str, Tensor]:
    """Everything that learns."""
    tower = {} if trained.encoder is None else trained.encoder.state_dict()
    named = {f"bridge.{key}": value for key, value in trained.bridge.state_dict().items()}
    named |= {f"tower.{key}": value for key, value in tower.items()}
    return named | {f"unet.{key}": value for key, value in trained.unet.items()}


def state_of(world: World) -> list[Any]:
    """Every weight of the graph's models, and whose patches they carry."""
    modules = (world.model.model, world.clip.cond_stage_model, world.vae.first_stage_model)
    return [
        # As bytes: some weights that the host never fills are no numbers.
        [
            {key: value.reshape(-1).view(torch.uint8).clone() for key, value in module.state_dict().items()}
            for module in modules
        ],
        [world.model.patches_uuid, sorted(world.model.patches), sorted(world.model.backup)],
        [world.clip.patcher.patches_uuid, sorted(world.clip.patcher.model_options["transformer_options"])],
        getattr(management, "in_training", None),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    ]


@pytest.mark.parametrize("objective", METHODS)
def test_every_objective_gives_a_bridge_that_the_node_opens(world: World, objective: str) -> None:
    kind = "omni" if objective == "resample" else "mlp"
    learns = "bridge and tower" if objective == "iap" else "bridge"
    settings = {"sample_every": 3, "validate_every": 3, "draws": 2 if objective in ("pea", "iap") else 0}
    choice = choice_of(
        objective, f"all {objective}", kind=kind, learns=learns, settings=settings, watch={"samples": 2}
    )
    before, watcher = state_of(world), Watcher()
    outcome = world.train(choice, watcher)
    assert same(state_of(world), before)
    assert watcher.steps[:3] == [1, 2, 3] and watcher.pictures
    assert len(outcome.losses) == 3 and all(np.isfinite(outcome.losses))
    assert outcome.picture.shape[0] == 1 and outcome.picture.shape[3] == 3
    wide = outcome.picture.shape[2]
    assert wide > 600 if objective != "align" else wide < 600  # samples stand beside the curve
    assert "MiB free" in outcome.report and "held-out loss" in outcome.report
    trained = outcome.trained
    assert not any(value.is_inference() or value.requires_grad for value in weights_of(trained).values())
    assert (trained.encoder is not None) == (objective == "iap")
    assert trained.part == {"kv": "kv", "branch": "branch"}.get(objective, "none")
    with torch.inference_mode():
        path = training.save(trained, f"my {objective}")
        model, clip = bridging.bridge(world.model, world.clip, path.name, 1.0, "native only")
        heard = encode(clip, world.dataset.examples[0].native)
    assert (model is world.model) == (trained.part == "none")
    assert torch.isfinite(heard[0][0]).all()
    header = folders.bridge_header(path)
    assert header.languages == ("zh",) and header.training["objective"] == objective
    assert header.training["steps"] == 3 and header.training["examples"] == COUNT
    with pytest.raises(BridgeError, match="already"):
        training.save(trained, f"my {objective}")
    training.save(trained, f"my {objective}", overwrite=True, half=False)
    loaded = load_bridge(path)
    assert same(dict(loaded.bridge.state_dict()), dict(trained.bridge.state_dict()))


def test_a_second_run_encodes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.train(choice_of("pea", "once"))
    asked: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def ask(*_: Any, **__: Any) -> Any:
            asked.append(name)
            raise AssertionError(name)

        return ask

    monkeypatch.setattr(comfy.sd.VAE, "encode", refuse("VAE"))
    monkeypatch.setattr(comfy.sd.CLIP, "encode_from_tokens", refuse("CLIP"))
    monkeypatch.setattr(material.Native, "_hidden", refuse("tower"))
    second = world.train(choice_of("pea", "twice"))
    assert not asked and "nothing, all was kept" in second.report
    assert same(weights_of(first.trained), weights_of(second.trained))


def test_sentence_pairs_need_neither_u_net_nor_vae(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pairs.tsv"
    rows = [f"{each.english}\t{each.native}" for each in world.dataset.examples]
    file.write_text("en\tzh\n" + "\n".join(rows), encoding="utf-8")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the U-Net was asked")

    monkeypatch.setattr(training, "frozen_copy", refuse)
    monkeypatch.setattr(training, "patched_weights", refuse)
    dataset = read_pairs(file, "zh")
    for compare in ("tokens", "cls", "cosine"):
        choice = choice_of("align", f"pairs {compare}", options=training.Options(rows=compare))
        outcome = world.train(choice, dataset=dataset, model=None, vae=None)
        assert outcome.losses[-1] < outcome.losses[0] * 1.5
    with pytest.raises(BridgeError, match="nothing to train on"):
        monkeypatch.undo()
        world.train(choice_of("pea", "pairs"), dataset=dataset)


def stop_at(number: int) -> Callable[[int], None]:
    return lambda step: management.interrupt_current_processing(True) if step == number else None


@pytest.mark.parametrize("objective", ["pea", "kv"])
def test_a_cancelled_run_goes_on_as_if_nothing_had_been(world: World, objective: str) -> None:
    settings = {"average": 0.9, "optimiser": "Muon", "draws": 2 if objective == "pea" else 0}
    whole = world.train(choice_of(objective, f"whole {objective}", 5, settings=settings))
    choice = choice_of(objective, f"cut {objective}", 5, settings=settings)
    before, watcher = state_of(world), Watcher(stop_at(2))
    with pytest.raises(management.InterruptProcessingException):
        world.train(choice, watcher)
    assert same(state_of(world), before) and not training.RUNNING
    assert watcher.steps == [1, 2]
    kept = material.folder("runs", choice.run)
    assert [path.name for path in kept.glob("step-*")] == ["step-00000002"]
    with pytest.raises(BridgeError, match="a run 'cut") as caught:
        world.train(dataclasses.replace(choice, resume=False))
    assert "resume" in str(caught.value)
    with pytest.raises(BridgeError, match="learning_rate"):
        world.train(choice_of(objective, choice.run, 5, settings={**settings, "learning_rate": 0.5}))
    again = Watcher()
    rest = world.train(choice, again)
    assert again.steps[0] == 3 and "gone on from step 2" in rest.report
    assert same(weights_of(rest.trained), weights_of(whole.trained))
    assert rest.losses == whole.losses
    done = world.train(choice)  # nothing is left to do
    assert same(weights_of(done.trained), weights_of(whole.trained))


def test_cancel_while_samples_are_painted_keeps_the_last_step(world: World) -> None:
    def stop(step: int) -> None:
        management.interrupt_current_processing(step == 2)

    choice = choice_of("pea", "painting", 4, settings={"sample_every": 2}, watch={"samples": 1})
    watcher = Watcher()
    tell = training._Job._tell

    def told(job: Any, report: Any) -> None:
        stop(report.step)
        tell(job, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Job, "_tell", told)
        with pytest.raises(management.InterruptProcessingException):
            world.train(choice, watcher)
    kept = material.folder("runs", choice.run)
    assert [path.name for path in kept.glob("step-*")] == ["step-00000002"]


@pytest.mark.parametrize("objective", ["pea", "iap", "kv"])
def test_half_precision_and_checkpointing_learn_the_same(
    world: World, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.train(choice_of(objective, f"fp32 {objective}"))
    half = choice_of(objective, f"bf16 {objective}", settings={"precision": "bf16", "checkpointing": True})
    monkeypatch.setattr(training._Job, "_unet_dtype", lambda job: torch.bfloat16)  # as on a GPU
    outcome = world.train(half)
    assert outcome.losses == pytest.approx(whole.losses, rel=0.02)
    for key, value in weights_of(outcome.trained).items():
        assert value.dtype == torch.float32 and torch.isfinite(value).all(), key


def test_finish_now_ends_after_the_present_step(world: World) -> None:
    answers: list[bool] = []
    watcher = Watcher(
        lambda step: answers.append(training.finish("enough")) if step == 2 and not answers else None
    )
    outcome = world.train(choice_of("align", "enough", 50), watcher)
    assert answers == [True] and len(outcome.losses) == 2
    assert outcome.trained.training["steps"] == 2
    assert not training.finish("enough") and not training.finish("never")


def test_a_picture_that_breaks_on_the_way_is_left_out_by_name(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(world.folder, folder)
    write_pictures(folder, COUNT, seed=77)  # pictures that no bank knows
    dataset = read_folder(folder, "zh")
    assert len(dataset.examples) == COUNT
    data = (folder / "3.png").read_bytes()
    middle = len(data) // 2
    (folder / "3.png").write_bytes(data[:middle] + b"\0" * 40 + data[middle + 40 :])
    (folder / "5.png").unlink()
    outcome = world.train(choice_of("kv", "broken"), dataset=dataset)
    assert "left out: 2" in outcome.report
    assert "3.png" in outcome.report and "5.png" in outcome.report
    assert outcome.trained.training["examples"] == COUNT - 2


def test_stages_follow_each_other_and_leave_the_one_before_alone(world: World) -> None:
    first = world.train(choice_of("align", "stage 1", learns="bridge and tower", kind="mlp")).trained
    kept = {key: value.clone() for key, value in weights_of(first).items()}
    second = world.train(choice_of("kv", "stage 2", tower=training.OF_THE_BRIDGE), before=first).trained
    assert same(weights_of(first), kept)
    assert second.part == "kv" and second.encoder is not None
    assert same(dict(second.encoder.state_dict()), dict(first.encoder.state_dict()))
    assert second.training["after"]["objective"] == "align"
    third = world.train(choice_of("kv", "stage 3", tower=training.OF_THE_BRIDGE, steps=1), before=second)
    assert third.trained.training["after"]["after"]["objective"] == "align"
    with pytest.raises(BridgeError, match="cannot continue this bridge"):
        world.train(choice_of("pea", "stage 4", tower=training.OF_THE_BRIDGE), before=second)


def test_a_continued_bridge_begins_where_its_file_ended(world: World) -> None:
    begun = world.train(choice_of("kv", "begun")).trained
    with torch.inference_mode():
        name = training.save(begun, "begun", half=False).name
    other = {"tower": training.OF_THE_BRIDGE, "continue_from": name, "settings": {"learning_rate": 1e-12}}
    again = world.train(choice_of("kv", "begun again", 1, **other)).trained
    for key, value in weights_of(begun).items():
        torch.testing.assert_close(weights_of(again)[key], value, rtol=0, atol=1e-6)
    branch = world.train(choice_of("branch", "begun branch")).trained
    with torch.inference_mode():
        other["continue_from"] = training.save(branch, "begun branch", half=False).name
    again = world.train(choice_of("branch", "branch again", 1, **other)).trained
    for key, value in weights_of(branch).items():
        torch.testing.assert_close(weights_of(again)[key], value, rtol=0, atol=1e-6)
    with pytest.raises(BridgeError, match="two bridges"):
        world.train(choice_of("kv", "x", **other), before=begun)
    with pytest.raises(BridgeError, match="keeps its text tower"):
        world.train(choice_of("kv", "x", **{**other, "tower": "pocket-zh-lm"}))


def source_of(world: World, wants: material.Wants, **other: Any) -> material.Prepared:
    path, header = tower_file(TOWER)
    encoder = load_encoder(path)
    tower = material.Tower(encoder, encoder, header.digest)
    given: dict[str, Any] = {
        "model": world.model,
        "clip": world.clip,
        "vae": world.vae,
        "base": base_of(world.model, world.clip),
        "unet_content": "",
        "resolution": 64,
        "held_out": 0.2,
        "banks": material.Banks(),
        "device": torch.device("cpu"),
        "poll": lambda: None,
        "tell": lambda what, done, of: None,
    }
    return material.prepare(world.dataset, tower, wants, **given | other)


def test_what_training_reads_is_what_the_graph_will_say(world: World) -> None:
    """English rows are CLIP Text Encode's, native rows those of the node, latents those of VAE Encode."""
    prepared = source_of(world, material.Wants(True, True, True, True, False))
    source = prepared.source
    numbers = source.groups[0][:3]
    draw = Chance(Settings(steps=1, drop=0.0)).at(0, numbers, source.shape(numbers[0]))
    batch = source.batch(draw)
    trained = world.train(choice_of("align", "rows", 1)).trained
    with torch.inference_mode():
        name = training.save(trained, "rows", half=False).name
        _, bridged = bridging.bridge(world.model, world.clip, name, 1.0, "native only")
    assert batch.english is not None and batch.hidden is not None and batch.latents is not None
    assert batch.english_pooled is not None and batch.native_only is not None
    for place, number in enumerate(numbers):
        example = source.rows[number].example
        rows = encode(world.clip, example.english)[0][0]
        torch.testing.assert_close(batch.english[place], rows[0], rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            tokens = world.clip.tokenize(example.english)
            _, pooled = world.clip.encode_from_tokens(tokens, return_pooled="unprojected")
        torch.testing.assert_close(batch.english_pooled[place], pooled[0], rtol=1e-5, atol=1e-5)
        one = Hidden(batch.hidden.states[place : place + 1], batch.hidden.mask[place : place + 1])
        said = trained.bridge(one).context
        heard = encode(bridged, normalise(example.native).text)[0][0]
        torch.testing.assert_close(said[0], heard[0], rtol=1e-4, atol=1e-4)
        pixels = torch.from_numpy(np.asarray(Image.open(example.picture), dtype=np.float32) / 255)
        with torch.inference_mode():
            latent = world.model.model.process_latent_in(world.vae.encode(pixels[None, :, :, :3]))
        torch.testing.assert_close(batch.latents[place], latent[0], rtol=1e-5, atol=1e-5)
    assert not batch.native_only.any()
    empty = source.empty()
    torch.testing.assert_close(empty.english, encode(world.clip, "")[0][0], rtol=1e-5, atol=1e-5)


def test_a_bridged_clip_teaches_what_its_checkpoint_teaches(world: World) -> None:
    base = base_of(world.model, world.clip)
    with torch.inference_mode():
        _, bridged = bridging.bridge(world.model, world.clip, "pocket-pea.safetensors", 1.0, "two streams")
    ours, theirs = (material.English(clip, base, lambda: None) for clip in (bridged, world.clip))
    assert type(ours.clip) is comfy.sd.CLIP and ours.digest == theirs.digest
    assert bridged.patcher.model_options["transformer_options"]["patches"]["language_bridge"]
    assert not ours.clip.patcher.model_patches_models()
    with torch.inference_mode():
        shifted = world.clip.clone()
        shifted.clip_layer(-2)
        texts = ["a (red:1.5) circle", ""]
        assert torch.equal(ours.rows(texts), theirs.rows(texts))
        twin = load_pocket()[1]
    assert material.English(shifted, base, lambda: None).digest != ours.digest
    assert material.English(twin, base, lambda: None).digest == ours.digest


def test_the_split_is_decided_by_content_alone(world: World) -> None:
    wants = material.Wants(False, False, False, True, False)
    first = source_of(world, wants).source
    natives = {first.rows[number].example.native for group in first.held_out for number in group}
    assert len(natives) == round(0.2 * COUNT)
    turned = dataclasses.replace(world.dataset, examples=world.dataset.examples[::-1])
    path, header = tower_file(TOWER)
    encoder = load_encoder(path)
    second = material.prepare(
        turned,
        material.Tower(encoder, encoder, header.digest),
        wants,
        model=None,
        clip=world.clip,
        vae=None,
        base=base_of(world.model, world.clip),
        unet_content="",
        resolution=64,
        held_out=0.2,
        banks=material.Banks(),
        device=torch.device("cpu"),
        poll=lambda: None,
        tell=lambda what, done, of: None,
    ).source
    assert natives == {second.rows[number].example.native for group in second.held_out for number in group}


def test_every_base_can_be_trained(checkpoint: Checkpoint, world: World) -> None:
    objective = "pea"
    small = World(checkpoint.model, checkpoint.clip, checkpoint.vae, world.folder)
    choice = choice_of(objective, f"{objective} {checkpoint.name}", 1, tower="tiny-zh", settings={"batch": 1})
    choice = dataclasses.replace(choice, watch=training.Watch(held_out=0.0, samples=0, judged=0))
    dataset = dataclasses.replace(world.dataset, examples=world.dataset.examples[:2])
    outcome = small.train(choice, dataset=dataset)
    assert np.isfinite(outcome.losses[0]) and outcome.trained.base == checkpoint.name
    assert outcome.trained.bridge.spec.pooled == (1280 if checkpoint.name == "sdxl" else 0)
    management.unload_all_models()


def test_the_judge_reports_on_the_pocket_world(world: World) -> None:
    outcome = world.train(choice_of("align", "judged", 1, watch={"judged": 2}))
    accuracy = outcome.trained.training["accuracy"]
    assert set(accuracy) == {"seen", "combinations", "templates", "synonyms", "n"} and accuracy["n"] == 2
    assert "judge: seen" in outcome.report


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "", ".hidden", "con", "x" * 65, "end.", "a\\b", "C:x", "nul.txt"]
)
def test_a_name_never_leads_anywhere(name: str) -> None:
    with pytest.raises(BridgeError, match="cannot be the name"):
        training.check_name(name, "run")
    assert training.check_name(" \u6211\u7684 bridge-1.2 ", "run") == "\u6211\u7684 bridge-1.2"


def test_what_is_missing_is_said_before_anything_is_loaded(world: World) -> None:
    for changes, other, words in (
        ({"tower": training.OF_THE_BRIDGE}, {}, "needs a text tower"),
        ({"tower": "nobody"}, {}, "no text tower called"),
        ({}, {"model": None}, "input model"),
        ({}, {"vae": None}, "input vae"),
        ({"objective": "guess"}, {}, "no such objective"),
        ({"continue_from": "mlp-sd1.safetensors", "tower": training.OF_THE_BRIDGE}, {}, "not made for this"),
    ):
        choice = dataclasses.replace(choice_of("pea", "missing"), **changes)
        dataset = dataclasses.replace(world.dataset, examples=world.dataset.examples[:3])
        if "vae" in other:  # latents that are kept need none
            fresh = [dataclasses.replace(each, picture=torch.rand(64, 64, 3)) for each in dataset.examples]
            dataset = dataclasses.replace(dataset, examples=tuple(fresh))
        with pytest.raises(BridgeError, match=words):
            world.train(choice, dataset=dataset, **other)


def test_the_curve_shows_steps_mean_and_what_was_held_out() -> None:
    history = [(step, 1 / step + 0.1 * (step % 3)) for step in range(1, 400)]
    plain = np.asarray(preview.curve(history, []))
    both = np.asarray(preview.curve(history, [(100, 0.5), (300, 0.2)]))

    def has(pixels: Any, colour: tuple[int, ...]) -> bool:
        return bool((pixels[40:-40] == colour).all(-1).any())

    assert has(plain, preview.AVERAGE) and has(plain, preview.FAINT) and not has(plain, preview.MEASURED)
    assert has(both, preview.MEASURED)
    assert preview.curve([], []).size == plain.shape[1::-1]
    assert preview.curve([(1, 0.5)], []).size == preview.curve([(1, float("nan"))], []).size
    sheet = preview.grid(torch.zeros(3, 64, 32, 3), cell=64)
    assert sheet.size == (32 + 4 + 32, 64 + 4 + 64)
    joined = preview.pixels(preview.beside(preview.curve(history, []), None, sheet))
    assert joined.shape[3] == 3 and float(joined.min()) >= 0 and float(joined.max()) <= 1
