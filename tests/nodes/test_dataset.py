"""The dataset nodes: what they list, what they refuse, and that they take what ComfyUI's own nodes give."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras import nodes_dataset
from PIL import Image

from language_bridge.bridges.errors import BridgeError
from language_bridge.harness.server import PromptError, Server
from language_bridge.host import dataset as data
from language_bridge.host.language import words
from language_bridge.nodes.dataset import LanguageBridgeDataset, LanguageBridgeDatasetFromLists
from language_bridge.training.dataset import KINDS, Dataset, Problem
from language_bridge.training.pictures import read_picture

CAT, DOG = "\u4e00\u53ea\u732b", "\u4e00\u53ea\u72d7"


def picture(path: Path, red: int = 200) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 10, 10)).save(path)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An input folder and a datasets root of their own."""
    for name in ("input", "sets"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    known = dict(folder_paths.folder_names_and_paths)
    known[data.DATASETS] = ([str(tmp_path / "sets")], set())
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    for number, text in enumerate((f"{CAT}\na cat", DOG)):
        picture(tmp_path / "input" / "cats" / f"{number}.png", number)
        (tmp_path / "input" / "cats" / f"{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "input" / "pairs.tsv").write_text(f"a cat\t{CAT}\n", encoding="utf-8")
    picture(tmp_path / "sets" / "deep" / "er" / "x.png")
    (tmp_path / "sets" / "deep" / "er" / "x.txt").write_text(CAT, encoding="utf-8")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.tsv").write_text(f"a\t{CAT}\n", encoding="utf-8")
    yield tmp_path


def run(dataset: str, language: str = "any") -> Any:
    return LanguageBridgeDataset.execute(dataset, language)


# -- the list --------------------------------------------------------------------------------------


def test_folders_and_lists_below_input_and_datasets_are_offered(places: Path) -> None:
    picture(places / "input" / ".hidden" / "x.png")
    (places / "input" / "notes.txt").write_text("x", encoding="utf-8")
    if os.name == "posix":
        (places / "input" / "link").symlink_to(places / "secret")
        (places / "input" / "link.tsv").symlink_to(places / "secret" / "x.tsv")
    assert data.names() == ["input/cats", "input/pairs.tsv", "datasets/deep", "datasets/deep/er"]
    schema = LanguageBridgeDataset.GET_SCHEMA()
    assert schema.inputs[0].options == data.names()


def test_the_host_lists_the_same_folders_below_input(places: Path) -> None:
    (places / "input" / "a" / "b").mkdir(parents=True)
    ours = [name.removeprefix("input/") for name in data.names() if name.startswith("input/")]
    assert [name for name in ours if "." not in name] == folder_paths.get_input_subfolders()


def test_a_host_without_datasets_offers_what_is_below_input(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {k: v for k, v in folder_paths.folder_names_and_paths.items() if k != data.DATASETS}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    assert data.names() == ["input/cats", "input/pairs.tsv"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "input",
        "cats",
        "input/",
        "input/cats/",
        "input/../secret",
        "input/cats/../../secret/x.tsv",
        "../secret",
        "secret/x.tsv",
        "/etc",
        "input//etc",
        "input\\cats",
        "C:\\",
        "input/cats\0",
        "INPUT/CATS",
        "https://example.org/x.tsv",
    ],
)
def test_only_listed_names_are_opened(places: Path, name: str) -> None:
    with pytest.raises(BridgeError, match="There is no dataset") as caught:
        run(name)
    assert "input/cats" in caught.value.found
    with pytest.raises(BridgeError, match="There is no dataset"):
        run(str(places / "secret"))
    assert LanguageBridgeDataset.fingerprint_inputs(dataset=name, language="any")  # asking is no error


# -- reading ---------------------------------------------------------------------------------------


def test_a_folder_and_a_file_of_pairs_become_datasets_with_a_report(places: Path) -> None:
    (places / "input" / "cats" / "bad.png").write_bytes(b"")
    for name, count in (("input/cats", 2), ("input/pairs.tsv", 1), ("datasets/deep/er", 1)):
        out = run(name, "zh")
        made, report = out.args
        assert isinstance(made, Dataset) and len(made.examples) == count and made.language == "zh"
        assert report in str(out.ui.as_dict()["text"]) or out.ui.as_dict()["text"] == (report,)
        assert ("bad.png" in report) == (name == "input/cats")
    with pytest.raises(BridgeError, match=r"2\.txt|0\.txt"):
        run("input/cats", "ko")


def test_a_changed_dataset_is_read_again(places: Path) -> None:
    def state() -> str:
        return LanguageBridgeDataset.fingerprint_inputs(dataset="input/cats", language="zh")

    before = state()
    assert state() == before
    (places / "input" / "cats" / "1.txt").write_text(CAT + DOG, encoding="utf-8")
    assert state() != before
    assert LanguageBridgeDataset.fingerprint_inputs(dataset="input/cats", language="ja") != state()


@pytest.mark.parametrize("language", ["English", "Chinese"])
def test_the_report_says_every_kind_of_problem_in_both_languages(language: str) -> None:
    say = words(language)
    problems = tuple(Problem(f"x{number}.txt", kind, "FOUND") for number, kind in enumerate(KINDS))
    made = Dataset("cats", run_of(CAT), problems)
    text = "\n".join(data.lines(made, say))
    for number, problem in enumerate(problems):
        assert f"x{number}.txt: " in text
        assert ("FOUND" in problem.what) <= ("FOUND" in text)
    if language == "English":
        assert all(f"{problem.place}: {problem.what}" in text for problem in problems)
    assert "FOUND" not in "\n".join(data.lines(Dataset("cats", run_of(CAT)), say))


def run_of(*natives: str) -> Any:
    return data.collect(natives, [], [], [], [], "any").examples


def test_a_long_list_of_problems_is_cut_and_counted() -> None:
    made = Dataset(
        "cats", run_of(CAT), tuple(Problem(f"{n}.png", "no_caption") for n in range(data.MOST_PROBLEMS + 7))
    )
    text = list(data.lines(made, words("English")))
    assert len(text) < data.MOST_PROBLEMS + 10 and text[-1].strip() == "and 7 more"


# -- lists of ComfyUI's own nodes ------------------------------------------------------------------


def lists(**given: Any) -> Dataset:
    out = LanguageBridgeDatasetFromLists.execute(**{"language": ["any"], **given})
    assert isinstance(out.args[1], str)
    return out.args[0]


def test_what_load_image_text_from_folder_gives(places: Path) -> None:
    loaded = nodes_dataset.LoadImageTextDataSetFromFolderNode.execute("cats")
    images, texts = loaded.args
    made = lists(native=[text.split("\n")[0] for text in texts], images=images)
    assert [example.native for example in made.examples] == [text.split("\n")[0] for text in texts]
    for example, image in zip(made.examples, images, strict=True):
        assert isinstance(example.picture, torch.Tensor)
        assert torch.equal(read_picture(example.picture, (8, 8)), image[0])
        assert example.native_only


class Host:
    """A VAE and a CLIP as Make Training Dataset calls them."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.permute(0, 3, 1, 2)[:, :, ::2, ::2].repeat(1, 2, 1, 1)[:, :4]

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        return [[torch.full((1, 77, 8), float(len(tokens))), {"pooled_output": torch.full((1, 5), 2.0)}]]


def test_what_make_training_dataset_gives(places: Path) -> None:
    images = nodes_dataset.LoadImageDataSetFromFolderNode.execute("cats").args[0]
    made_by_host = nodes_dataset.MakeTrainingDataset.execute(images, [Host()], [Host()], ["a cat", "dog"])
    latents, conditioning = made_by_host.args
    made = lists(native=[CAT, DOG], latents=latents, conditioning=conditioning)
    for number, example in enumerate(made.examples):
        assert example.latent is not None and example.rows is not None and example.pooled is not None
        assert torch.equal(example.latent, latents[number]["samples"][0])
        assert torch.equal(example.rows, conditioning[number][0][0][0])
        assert example.pooled.shape == (5,) and not example.native_only


def test_batches_are_taken_apart_and_pairs_need_no_pictures() -> None:
    made = lists(native=[CAT, DOG, CAT], images=[torch.rand(2, 4, 4, 3), torch.rand(1, 4, 4, 3)])
    assert len(made.examples) == 3
    pairs = lists(native=[CAT, DOG], english=["a cat", ""])
    assert [example.native_only for example in pairs.examples] == [False, True]


def rows(**more: Any) -> list[Any]:
    return [[torch.zeros(1, 77, 8), more]]


@pytest.mark.parametrize(
    "odd",
    [
        {"conditioning": [rows(language_bridge=1)]},
        {"conditioning": [rows(hooks=1)]},
        {"conditioning": [rows() + rows()]},
        {"conditioning": [[[torch.zeros(2, 77, 8), {}]]]},
        {"conditioning": [[]]},
        {"latents": [{"samples": torch.zeros(1, 4, 2, 8, 8)}]},
        {"latents": [{}]},
        {"images": [torch.zeros(8, 8, 3)]},
        {"images": [torch.zeros(2, 8, 8, 3)]},
        {"english": ["a", "b"]},
        {"native": []},
    ],
)
def test_lists_that_do_not_fit_are_refused_in_three_parts(odd: dict[str, Any]) -> None:
    with pytest.raises(BridgeError) as caught:
        lists(**{"native": [CAT], **odd})
    assert caught.value.found and caught.value.expected and caught.value.action


def test_numbers_that_are_not_finite_are_a_problem_of_their_row() -> None:
    good, bad = torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), float(np.nan))
    made = lists(native=[CAT, DOG], latents=[{"samples": bad}, {"samples": good}])
    assert [example.native for example in made.examples] == [DOG]
    assert [(problem.place, problem.kind) for problem in made.problems] == [("item 1", "tensor")]


# -- in the real server ----------------------------------------------------------------------------


def test_both_nodes_run_in_the_real_server_beside_its_own(server: Server) -> None:
    folder = server.base / "input" / "bridge-set"
    try:
        for number, text in enumerate((CAT, DOG)):
            picture(folder / f"{number}.png", number)
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
        picture(folder / "lonely.png")
        asked = server.ask("/object_info/LanguageBridgeDataset")["LanguageBridgeDataset"]["input"]
        assert "input/bridge-set" in json.dumps(asked["required"]["dataset"])
        graph = {
            "1": {
                "class_type": "LanguageBridgeDataset",
                "inputs": {"dataset": "input/bridge-set", "language": "zh"},
            },
            "2": {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": "bridge-set"}},
            "3": {
                "class_type": "LanguageBridgeDatasetFromLists",
                "inputs": {"native": ["2", 1], "images": ["2", 0], "language": "zh"},
            },
        }
        outputs = server.run(graph)["outputs"]
        assert "lonely.png" in "".join(outputs["1"]["text"])
        assert "item 3" in "".join(outputs["3"]["text"]) or "item 1" in "".join(outputs["3"]["text"])
        (folder / "lonely.txt").write_text(CAT + DOG, encoding="utf-8")
        outputs = server.run(graph)["outputs"]
        assert "lonely.png" not in "".join(outputs["1"]["text"])
        for name in ("input/../bridge-set", "input/gone", str(folder)):
            graph["1"]["inputs"]["dataset"] = name
            with pytest.raises(PromptError):
                server.run({"1": graph["1"]})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
