"""Training through the real server: the shipped graph, the button Finish now, Cancel, and going on."""

from __future__ import annotations

import copy
import json
import time
import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from language_bridge.harness.server import PromptError
from language_bridge.nodes.training import ObjectiveOptions, Train, TrainingSettings
from language_bridge.tests.fixtures.stock import call

if TYPE_CHECKING:
    from language_bridge.harness.server import Server

WORKFLOW = Path(__file__).parents[2] / "workflows" / "api" / "train_pocket.json"
TRAIN, SAVE = "4", "5"


def graph_of(run: str, steps: int, **changes: Any) -> dict[str, Any]:
    """The shipped graph with a short training of its own name."""
    graph: dict[str, Any] = copy.deepcopy(json.loads(WORKFLOW.read_text(encoding="utf-8")))
    assert [graph[number]["class_type"] for number in (TRAIN, SAVE)] == [
        "LanguageBridgeTrain",
        "LanguageBridgeSave",
    ]
    graph["2"]["inputs"] = {"count": 24, "seed": 1}
    graph["3"]["inputs"] |= {"judged": 0, "sample_steps": 2, "samples": 2}
    graph[TRAIN]["inputs"] |= {"run": run, "steps": steps, "batch": 4, "save_every": 0, "sample_every": 0}
    graph[TRAIN]["inputs"] |= {"validate_every": 0, **changes}
    graph[SAVE]["inputs"]["name"] = run
    return graph


def checkpoints(server: Server, run: str) -> list[str]:
    runs = server.base / "user" / "__language_bridge" / "training" / "runs"
    return sorted(path.name for path in (runs / run).glob("step-*"))


def queue(server: Server, graph: dict[str, Any]) -> str:
    """Queues a graph and does not wait for it."""
    return server.ask("/prompt", {"prompt": graph})["prompt_id"]


def ended(server: Server, prompt: str) -> dict[str, Any]:
    """The entry of a prompt in the history, once it is there."""
    for _ in range(600):
        entry = server.ask(f"/history/{prompt}").get(prompt)
        if entry is not None:
            return entry
        time.sleep(0.1)
    raise AssertionError("the prompt never ended")


def begun(server: Server, run: str) -> None:
    """Waits until a run trains, which its first checkpoint shows."""
    for _ in range(600):
        if checkpoints(server, run):
            return
        time.sleep(0.05)
    raise AssertionError("the training never began")


def test_the_shipped_graph_trains_a_bridge_that_the_combo_lists(server: Server) -> None:
    entry = server.run(graph_of("shipped", 4, sample_every=2, validate_every=2))
    report = "".join(entry["outputs"][TRAIN]["text"])
    assert "4 of 4 steps" in report and "24 examples" in report and "held-out loss" in report
    assert len(server.pictures(entry)) == 1
    assert "shipped.safetensors" in "".join(entry["outputs"][SAVE]["text"])
    listed = server.ask("/object_info/LanguageBridge")["LanguageBridge"]["input"]["required"]["bridge"]
    assert "shipped.safetensors" in json.dumps(listed)
    paints = json.loads((WORKFLOW.parent / "pocket_text_to_image.json").read_text(encoding="utf-8"))
    for node in paints.values():
        if node["class_type"] == "LanguageBridge":
            node["inputs"]["bridge"] = "shipped.safetensors"
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    assert len(server.pictures(server.run(paints))) == 1
    with pytest.raises(PromptError, match="already"):
        server.run(graph_of("shipped", 5))  # the training goes on; the file stays as it is
    assert checkpoints(server, "shipped")[-1] == "step-00000005"


def test_finish_now_lets_the_graph_go_on_to_save(server: Server) -> None:
    prompt = queue(server, graph_of("enough", 100_000, save_every=1))
    begun(server, "enough")
    assert server.ask("/language_bridge/finish", {"run": "enough"}) == {"finishing": True}
    entry = ended(server, prompt)
    assert entry["status"]["status_str"] == "success"
    assert (server.base / "models" / "language_bridges" / "enough.safetensors").is_file()
    assert "of 100000 steps" in "".join(entry["outputs"][TRAIN]["text"])


def test_cancel_keeps_what_was_learnt_and_the_next_queue_goes_on(server: Server) -> None:
    prompt = queue(server, graph_of("stopped", 100_000, save_every=1))
    begun(server, "stopped")
    asked = time.monotonic()
    server.ask("/interrupt", {})
    entry = ended(server, prompt)
    assert time.monotonic() - asked < 20  # a loaded machine; benchmarks measure it
    assert entry["status"]["status_str"] == "error"
    assert "execution_interrupted" in json.dumps(entry["status"]["messages"])
    kept = int(checkpoints(server, "stopped")[-1].removeprefix("step-"))
    assert kept >= 1 and not (server.base / "models" / "language_bridges" / "stopped.safetensors").exists()
    done = server.run(graph_of("stopped", kept + 2))
    assert f"gone on from step {kept}" in "".join(done["outputs"][TRAIN]["text"])


@pytest.mark.parametrize("body", [{"run": 3}, {}, ["x"], {"run": "x" * 300}])
def test_the_route_of_the_button_takes_a_name_and_nothing_else(server: Server, body: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.ask("/language_bridge/finish", body)
    assert caught.value.code == 400
    assert server.ask("/language_bridge/finish", {"run": "nobody"}) == {"finishing": False}


def test_the_route_reads_no_broken_json_and_answers_no_get(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.ask("/language_bridge/finish")
    assert caught.value.code in (404, 405)


def test_the_settings_nodes_hand_on_what_they_show() -> None:
    for node in (TrainingSettings, ObjectiveOptions):
        values = {given.id: given.default for given in node.GET_SCHEMA().inputs}
        handed = call(node, **values)
        if node is TrainingSettings:
            assert handed == values
        else:
            from language_bridge.host.training import Options

            assert handed == Options()


def test_every_widget_of_the_training_node_has_a_value_of_its_own() -> None:
    from language_bridge.host import folders, training

    folders.register()
    inputs = {given.id: given for given in Train.GET_SCHEMA().inputs}
    assert inputs["kind"].options == list(training.KINDS)
    assert inputs["learns"].options == list(training.LEARNERS)
    assert inputs["precision"].options == list(training.PRECISIONS)
    assert inputs["tower"].options[0] == training.OF_THE_BRIDGE
    assert inputs["continue_from"].options[0] == training.NOTHING
