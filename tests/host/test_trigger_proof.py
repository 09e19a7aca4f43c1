"""A trigger inside a Chinese prompt draws what the LoRA learned, and what the Chinese asks for stays.

The direction of each claim of docs/pocket-world.md, on a few prompts with fixed seeds; the figures are made
by benchmarks/triggers.py.
"""

from __future__ import annotations

import folder_paths
import pytest

from language_bridge.benchmarks import triggers
from language_bridge.pocket import concepts

COUNT, SEED = 16, 7
BRIDGE = "pocket-iap"
Table = dict[str, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def table() -> Table:
    """Every row of the benchmark; the LoRA and the embedding are offered to the host for its time alone."""
    before = dict(folder_paths.folder_names_and_paths)
    for name in ("loras", "embeddings"):
        paths, suffixes = before[name]
        folder_paths.folder_names_and_paths[name] = (list(paths), set(suffixes))
    try:
        return triggers.measure(COUNT, SEED, (BRIDGE,))["table"]
    finally:
        folder_paths.folder_names_and_paths.clear()
        folder_paths.folder_names_and_paths.update(before)
        folder_paths.filename_list_cache.clear()


def test_the_trigger_draws_the_concept_and_the_attributes_stay(table: Table) -> None:
    row = table["lora"][f"{BRIDGE}, streams"]
    assert row["drawn"] >= 0.7 * table["lora"]["english"]["drawn"] > 0.5
    assert row["kept"] >= 0.9


def test_without_trigger_or_lora_nothing_new_is_drawn(table: Table) -> None:
    assert table["lora"][f"{BRIDGE}, no trigger"]["drawn"] <= 0.2
    assert table["lora"]["english, without"]["drawn"] == 0.0


def test_streams_beat_a_bridge_without_them_and_a_word_for_word_translation(table: Table) -> None:
    rows = table["lora"]
    streams = rows[f"{BRIDGE}, streams"]
    assert streams["drawn"] >= rows[f"{BRIDGE}, no streams"]["drawn"] + 0.3
    assert streams["kept"] >= rows["word for word"]["kept"] + 0.03


def test_an_embedding_adds_its_thing_to_a_chinese_prompt(table: Table) -> None:
    rows = table["embedding"]
    streams = rows[f"{BRIDGE}, streams"]
    assert streams["drawn"] >= rows[f"{BRIDGE}, no trigger"]["drawn"] + 0.4
    assert streams["kept"] >= 0.85


def test_the_proof_asks_for_the_shipped_files() -> None:
    assert concepts.LORA.is_file() and concepts.EMBEDDING.is_file()
    asked = triggers.tests(3, SEED)
    assert all(
        one.chinese.startswith(concepts.TRIGGER) and concepts.TRIGGER not in one.plain for one in asked
    )
