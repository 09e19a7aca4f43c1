"""A converted RouWei adapter and its Gemma before an SDXL checkpoint say what transformers and torch say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import Tensor

from language_bridge.bridges.base import create
from language_bridge.bridges.errors import BridgeError
from language_bridge.conversion.convert import convert
from language_bridge.conversion.presets import Presets, published
from language_bridge.host.tower import NativeTower
from language_bridge.tests.bridges import references
from language_bridge.tests.conversion.layouts import save
from language_bridge.tests.encoders.test_gemma import expected_states, reference, toy_files, uncapped
from language_bridge.tests.encoders.toys import TOYS, sentencepiece_model
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import encode, same, sample

WIDTH, PLACES = 32, 160
CAT = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b"
TEXTS = (CAT, "a red cat on the mat", f"{CAT}, 1.3 cats", "")


def sentence(text: str) -> list[int]:
    """The ids that SentencePiece itself gives a text."""
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("gemma")).encode(text)


@dataclass(frozen=True)
class World:
    """An adapter and a tower, converted; beside them torch's and transformers' own."""

    bridge: str
    adapter: references.Rouwei
    tower: torch.nn.Module
    before: str
    after: str
    skip: int
    left: bool

    def expected(self, text: str) -> tuple[Tensor, Tensor]:
        """Rows and pooled vector as the published program computes them: Gemma reads a text without padding,
        T5Gemma in all its places."""
        ids = [2, *sentence(self.before + text + self.after), *([1] if not self.before else [])]
        empty = [] if self.before else [0] * (PLACES - len(ids))
        framed = torch.tensor([empty + ids if self.left else ids + empty])
        start = len(empty) if self.left else 0
        states = expected_states(self.tower, framed, framed != 0)[-1][:, start : start + len(ids)]
        with torch.no_grad():
            return self.adapter(states[:, self.skip :], start)


@pytest.fixture(scope="module", params=["rouwei-gemma-v0", "rouwei-t5gemma", "rouwei-t5gemma-right"])
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Path
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("rouwei")
    preset: str = request.param
    method = published().methods[preset]
    kind = "T5Gemma" if "t5" in preset else "Gemma3"
    tower, config, tensors = reference(kind)
    tower = uncapped(tower) if kind == "T5Gemma" else tower
    config = json.loads(
        json.dumps(config).replace('"max_position_embeddings": 64', '"max_position_embeddings": 256')
    )
    save(folder / "tower" / "model.safetensors", tensors)
    text = json.dumps(config | {"torch_dtype": "bfloat16"})
    (folder / "tower" / "config.json").write_text(text, encoding="utf-8")
    for name, data in toy_files().items():
        (folder / "tower" / name).write_bytes(data)
    with torch.no_grad():  # a tower in bfloat16 hears 5.65625 for the root of 32
        tower.get_input_embeddings().weight.mul_(5.65625 / WIDTH**0.5)

    # SDXL's own widths; without the blocks, which are as large as all the rest.
    adapter = references.Rouwei(WIDTH, 2048, 1280, PLACES, 8, 0, 0).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in adapter.parameters():
            value.normal_(generator=generator).mul_(value.shape[-1] ** -0.5 if value.ndim > 1 else 0.3)
    save(folder / "adapter.safetensors", adapter.state_dict())

    before, after = method.template.get("before", ""), method.template.get("after", "")
    skip = 1 + len(sentence(before)) if before else 0
    rows = {
        row.name: dataclasses.replace(
            row, match={**row.match, "vocab": 420, "width": WIDTH, "layers": 5}, window=PLACES
        )
        for row in published().towers.values()
        if row.family == "gemma"
    }
    row = dataclasses.replace(method, match={"hidden": WIDTH}, change={"skip": skip})
    written = convert(
        [folder / "adapter.safetensors", folder / "tower"],
        models / "language_bridges",
        towers=models / "text_encoders",
        preset=preset,
        presets=Presets(rows, {preset: row}),
    )
    yield World(f"{preset}.safetensors", adapter, tower, before, after, skip, preset == "rouwei-t5gemma")
    for path in written:
        path.unlink()


def test_the_rows_are_the_published_programs(world: World, sdxl: Checkpoint) -> None:
    model, clip = bridged(sdxl, bridge=world.bridge, route="native only")
    assert model is sdxl.model
    for text in TEXTS:
        ((context, more),) = encode(clip, text)
        rows, pooled = world.expected(text)
        assert context.shape == (1, 8, 2048) and rows.abs().max() > 0.5
        torch.testing.assert_close(context, rows, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(more["pooled_output"], pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_a_template_that_is_cut_into_other_pieces_is_refused(surplus: int) -> None:
    """The published tower's 27 rows are dropped unseen; another tokenizer would shift the prompt."""
    before = "a red\n\n"
    encoder, lead = TOYS["gemma"](), 1 + len(sentence(before))
    sizes = {"hidden": WIDTH, "context": 32, "heads": 16, "window": 14, "queries": 6}
    bridge = create("rouwei", sizes | {"skip": lead + surplus})
    if not surplus:
        assert NativeTower(encoder, bridge, template=(before, "")).words.capacity == 24 - lead
        return
    with pytest.raises(BridgeError, match="does not cut") as caught:
        NativeTower(encoder, bridge, template=(before, ""))
    assert caught.value.found.startswith(f"{lead} tokens") and str(lead + surplus) in caught.value.expected


def test_it_paints_and_english_stays_the_checkpoints(world: World, sdxl: Checkpoint) -> None:
    model, clip = bridged(sdxl, bridge=world.bridge)
    assert same(encode(clip, "a red cat"), encode(sdxl.clip, "a red cat"))
    assert torch.isfinite(sample(model, encode(clip, CAT), encode(clip, ""))).all()
    assert not same(encode(clip, CAT), encode(clip, "\u732b"))


def test_a_long_prompt_is_several_windows(world: World, sdxl: Checkpoint) -> None:
    _, clip = bridged(sdxl, bridge=world.bridge, route="native only")
    words = clip.speech.tower.words
    text = "the quick brown fox " * 30
    pieces = len(sentence(text))
    frame = PLACES - len(sentence(world.before + world.after)) - (1 if world.before else 2)
    assert words.capacity == frame and pieces > frame
    assert encode(clip, text)[0][0].shape == (1, 8 * -(-pieces // frame), 2048)


def test_no_tower_of_the_host_is_taken_in_its_place(world: World, sdxl: Checkpoint) -> None:
    with pytest.raises(BridgeError, match="does not take a text tower"):
        bridged(sdxl, bridge=world.bridge, tower=sdxl.clip)
