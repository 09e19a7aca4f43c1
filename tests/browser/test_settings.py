"""The downloads in the settings of the stock frontend: list, consent, doctor, sources, two languages.

LANGUAGE_BRIDGE_SCREENSHOT_SETTINGS=FILE keeps the settings as they look with the list.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from language_bridge.harness.browser import Page
from language_bridge.harness.environment import CHECKOUT
from language_bridge.harness.server import Server
from language_bridge.tests.browser.test_page import open_workflow, our_trouble
from language_bridge.tests.fixtures.far import Far
from language_bridge.tests.fixtures.offers import dripping
from language_bridge.tests.manifest.hub import honest

pytestmark = pytest.mark.browser

PANEL = "document.querySelector('#language-bridge-downloads')"
TOLD = f"{PANEL}.querySelector('pre').textContent"
NODE = "window.app.graph.nodes.find(node => node.type === 'LanguageBridgeDownloads')"
NAMES = {"en": "Language Bridge", "zh": "\u8bed\u8a00\u6865"}
NEEDS_CONSENT = "pea-sdxl-chinese-clip"


def texts(language: str) -> dict[str, str]:
    path = CHECKOUT / "locales" / language / "main.json"
    loaded: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["languageBridgeDownloads"]
    return loaded


def press(page: Page, text: str, within: str = PANEL) -> None:
    page.wait_for(f"!![...{within}.querySelectorAll('button')].find(b => b.textContent === {text!r})", text)
    page.evaluate(f"[...{within}.querySelectorAll('button')].find(b => b.textContent === {text!r}).click()")


def open_settings(page: Page, server: Server, language: str = "en") -> None:
    """The settings of the page, at ours."""
    open_workflow(page, server)
    page.wait_for("!!window.app.extensionManager?.command", "the page")
    page.evaluate("window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    ours = (
        "[...document.querySelectorAll('[role=dialog] *')]"
        f".find(part => !part.children.length && part.textContent.trim() === '{NAMES[language]}')"
    )
    page.wait_for(f"!!{ours}", "our part of the settings")
    page.evaluate(f"{ours}.click()")
    page.wait_for(f"!!{PANEL}?.querySelector('button')", "the panel")


def test_the_settings_list_the_sets_ask_for_consent_and_call_the_doctor(
    page: Page, server: Server, tmp_path: Path
) -> None:
    queued = len(server.ask("/history"))
    open_settings(page, server)
    say = texts("en")
    press(page, say["show"])
    rows = page.wait_for(
        f"(rows => rows.length && rows.map(row => ({{...row.dataset}})))"
        f"([...{PANEL}.querySelectorAll('tr')])",
        "the list",
    )
    manifest = json.loads((CHECKOUT / "weights_manifest.json").read_text(encoding="utf-8"))
    assert [row["set"] for row in rows] == [item["name"] for item in manifest["published"]]
    assert {row["state"] for row in rows} == {"fetchable", "by hand"}
    assert len(server.ask("/history")) == queued, "a list costs no run"
    page.evaluate("new Promise(done => setTimeout(done, 800))")
    page.screenshot(Path(os.environ.get("LANGUAGE_BRIDGE_SCREENSHOT_SETTINGS") or tmp_path / "list.png"))
    press(page, say["get"], f"{PANEL}.querySelector('tr[data-set={json.dumps(NEEDS_CONSENT)}]')")
    assert page.evaluate(f"{PANEL}.querySelectorAll('input[type=checkbox]').length") == 2
    assert len(server.ask("/history")) == queued, "nothing is queued before the last button"
    press(page, say["fetch"])
    refused = page.wait_for(f"{TOLD}.includes('expected: your consent') && {TOLD}", "the refusal")
    assert "chinese-clip-vit-huge-patch14" in refused and "what to do" in refused
    press(page, say["doctor"])
    report = page.wait_for(f"{TOLD}.includes('ComfyUI:') && {TOLD}", "the report")
    assert "Nothing is wrong." in report
    assert not our_trouble(page)
    runs = [entry["prompt"][2] for entry in server.ask("/history").values()][queued:]
    assert [next(iter(run.values()))["class_type"] for run in runs] == [
        "LanguageBridgeDownloads",
        "LanguageBridgeDoctor",
    ]


def test_a_chinese_user_reads_the_settings_in_chinese(page: Page, server: Server, tmp_path: Path) -> None:
    server.ask("/settings/Comfy.Locale", "zh")
    try:
        open_settings(page, server, "zh")
        press(page, texts("zh")["show"])
        page.wait_for(f"{PANEL}.querySelectorAll('tr').length > 5", "the list")
        press(page, texts("zh")["doctor"])
        page.wait_for(f"{TOLD}.includes('\u6ca1\u6709\u53d1\u73b0\u95ee\u9898')", "the report")
        labels = page.evaluate("document.querySelector('[role=dialog]').textContent")
        page.screenshot(Path(os.environ.get("LANGUAGE_BRIDGE_SCREENSHOT_SETTINGS_ZH") or tmp_path / "zh.png"))
    finally:
        server.ask("/settings/Comfy.Locale", "en")
    settings = json.loads((CHECKOUT / "locales" / "zh" / "settings.json").read_text(encoding="utf-8"))
    assert all(setting["name"] in labels for setting in settings.values())
    usual = settings["LanguageBridge_Downloads_Sources"]["options"]["usual order"]
    assert usual in labels


def test_the_buttons_fetch_stop_go_on_and_verify(page: Page, far: Far, tmp_path: Path) -> None:
    say, row = texts("en"), f"{PANEL}.querySelector('tr[data-set=paged]')"
    open_settings(page, far.server)
    press(page, say["show"])
    far.hub.behave = dripping(far.body)
    press(page, say["get"], row)
    assert page.evaluate(f"{PANEL}.querySelectorAll('input[type=checkbox]').length") == 0, (
        "nothing to agree to"
    )
    press(page, say["fetch"])
    page.wait_for(f"{PANEL}.querySelector('progress').value > 0 && {TOLD}.includes('MB')", "progress")
    page.screenshot(Path(os.environ.get("LANGUAGE_BRIDGE_SCREENSHOT_FETCHING") or tmp_path / "fetching.png"))
    press(page, say["cancel"])
    page.wait_for(f"{TOLD} === {json.dumps(say['stopped'])}", "the end")
    page.wait_for(f"{row}?.dataset.state === 'begun'", "the state")
    far.hub.behave = honest(far.body, '"slow"')
    press(page, say["get"], row)
    press(page, say["fetch"])
    page.wait_for(f"{TOLD}.includes('paged is fetched and checked')", "the report")
    assert far.hub.log[-1].start, "it went on where it was"
    page.wait_for(f"{row}?.dataset.state === 'here'", "the new state")
    press(page, say["verify"], row)
    page.wait_for(f"{TOLD}.includes('as the manifest and the lock file say')", "the verdict")
    assert not our_trouble(page)


def test_the_order_that_is_set_on_the_page_reaches_the_downloader(page: Page, server: Server) -> None:
    inputs: dict[str, Any] = {
        "set": NEEDS_CONSENT,
        "action": "list",
        "sources": "as set",
        "reference": "none",
    }
    inputs |= {"precision": "as published", "language": "English"}
    inputs |= dict.fromkeys(("clean", "again", "agree", "trust_first_use"), False)
    graph = {"1": {"class_type": "LanguageBridgeDownloads", "inputs": inputs}}

    def said() -> str:
        return str(server.run(graph)["outputs"]["1"]["text"][0])

    def choose(order: str) -> None:
        page.evaluate(
            f"window.app.extensionManager.setting.set('LanguageBridge.Downloads.Sources', {order!r})"
        )
        page.evaluate("new Promise(done => setTimeout(done, 500))")

    open_settings(page, server)
    assert "hub, mirror, modelscope (the usual order)" in said()
    try:
        choose("mirror,modelscope")
        assert "mirror, modelscope (set on the page)" in said()
        press(page, texts("en")["show"])
        press(page, texts("en")["get"], f"{PANEL}.querySelector('tr[data-set={json.dumps(NEEDS_CONSENT)}]')")
        press(page, texts("en")["fetch"])
        page.wait_for(f"{TOLD}.includes('your consent')", "the refusal")
        last = list(server.ask("/history").values())[-1]["prompt"][2]
        assert next(iter(last.values()))["inputs"]["sources"] == "mirror,modelscope"
    finally:
        choose("usual")


def assert_only_clean_is_on(page: Page) -> None:
    page.evaluate("new Promise(done => setTimeout(done, 300))")
    page.wait_for(f"!!{NODE}", "the loaded node")
    values = page.evaluate(f"Object.fromEntries({NODE}.widgets.map(widget => [widget.name, widget.value]))")
    assert values["clean"] is True and values["agree"] is values["trust_first_use"] is False


def test_consent_is_queued_but_neither_saved_nor_loaded(page: Page, server: Server) -> None:
    open_workflow(page, server)
    page.evaluate(
        "(async () => { const node = LiteGraph.createNode('LanguageBridgeDownloads');"
        " window.app.graph.add(node); await new Promise(done => setTimeout(done, 50));"
        " for (const widget of node.widgets)"
        " if (['agree', 'trust_first_use', 'clean'].includes(widget.name)) widget.value = true; })()"
    )
    queued = page.evaluate("window.app.graphToPrompt().then(made => JSON.stringify(made.output))")
    (inputs,) = [
        node["inputs"]
        for node in json.loads(queued).values()
        if node["class_type"] == "LanguageBridgeDownloads"
    ]
    assert inputs["agree"] is inputs["trust_first_use"] is inputs["clean"] is True
    saved = json.loads(page.evaluate("JSON.stringify(window.app.graph.serialize())"))
    (node,) = [node for node in saved["nodes"] if node["type"] == "LanguageBridgeDownloads"]
    assert node["widgets_values"].count(True) == 1, "clean alone"
    node["widgets_values"] = [*node["widgets_values"][:8], True, True]
    page.evaluate(f"window.app.loadGraphData({json.dumps(saved)})")
    assert_only_clean_is_on(page)
    page.evaluate(f"window.app.loadApiJson({queued}, 'from elsewhere')")
    assert_only_clean_is_on(page)
    assert not our_trouble(page)
