"""The stock frontend in headless Chromium: the pocket workflow opens, runs, and its picture appears.

LANGUAGE_BRIDGE_SCREENSHOT=FILE keeps the page as it looks at the end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from language_bridge.harness.browser import Page
from language_bridge.harness.server import Server
from language_bridge.tests.fixtures.travel import own_bridge, saved_workflow

pytestmark = pytest.mark.browser

NODE = "window.app.graph.nodes.find(node => node.type === '{}')"
PICTURE = NODE.format("SaveImage") + ".imgs?.[0]"


def open_workflow(page: Page, server: Server) -> None:
    page.open(server.page())
    page.wait_for("window.app?.graph && " + NODE.format("LanguageBridge") + " !== undefined", "the workflow")


def our_trouble(page: Page) -> list[str]:
    """What went wrong on the page, less the stock frontend's own complaints about an empty user folder."""
    ours = ("language-bridge", "LanguageBridge", "/api/prompt")
    return page.exceptions + [text for text in page.complaints if any(name in text for name in ours)]


def test_the_pocket_workflow_opens_runs_and_shows_its_picture(
    page: Page, server: Server, tmp_path: Path
) -> None:
    open_workflow(page, server)
    chinese = page.evaluate(NODE.format("CLIPTextEncode") + ".widgets[0].value")
    assert any("\u4e00" <= character <= "\u9fff" for character in chinese)
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.evaluate("window.app.queuePrompt(0, 1)")
    size = page.wait_for(
        f"{PICTURE}?.naturalWidth && [{PICTURE}.naturalWidth, {PICTURE}.naturalHeight]", "the picture"
    )
    assert size[0] == size[1] >= 64
    assert not our_trouble(page)
    history = list(server.ask("/history").values())[-1]
    assert history["status"]["status_str"] == "success"
    page.evaluate("new Promise(done => setTimeout(done, 1500))")  # the view's animation
    screenshot = Path(os.environ.get("LANGUAGE_BRIDGE_SCREENSHOT") or tmp_path / "page.png")
    page.screenshot(screenshot)
    assert screenshot.stat().st_size > 20_000


def test_a_chinese_user_reads_chinese(page: Page, server: Server) -> None:
    server.ask("/settings/Comfy.Locale", "zh")
    try:
        open_workflow(page, server)
        names = page.wait_for(
            "[LiteGraph.registered_node_types.LanguageBridge.title,"
            " ..." + NODE.format("LanguageBridge") + ".widgets.map(widget => widget.label)]",
            "the node's Chinese names",
        )
    finally:
        server.ask("/settings/Comfy.Locale", "en")
    expected = server.ask("/i18n")["zh"]["nodeDefs"]["LanguageBridge"]
    assert names[0] == expected["display_name"]
    assert names[1] == expected["inputs"]["bridge"]["name"]


def test_the_inspector_shows_its_report_in_the_node(page: Page, server: Server, tmp_path: Path) -> None:
    open_workflow(page, server)
    page.evaluate(
        "(() => { const node = LiteGraph.createNode('LanguageBridgeInspector'); window.app.graph.add(node);"
        + NODE.format("LanguageBridge")
        + ".connect(1, node, 0); node.pos = [400, 640];"
        " const set = (name, value) => { node.widgets.find(widget => widget.name === name).value = value; };"
        " set('text', '\uff08\u7ea2\u8272\uff1a1.2\uff09, zorb');"
        " set('language', 'English'); })()"
    )
    box = (
        NODE.format("LanguageBridgeInspector")
        + ".widgets.find(widget => widget.name === 'language_bridge_report')"
    )
    page.evaluate("window.app.queuePrompt(0, 1)")
    report = page.wait_for(f"{box}?.value", "the report in the node")
    assert "native" in report and "zorb" in report and "\uff08 \u2192 (" in report
    prompt = page.evaluate("window.app.graphToPrompt().then(made => JSON.stringify(made.output))")
    assert "zorb" in prompt and "language_bridge_report" not in prompt
    assert not our_trouble(page)
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.evaluate("new Promise(done => setTimeout(done, 1500))")
    page.screenshot(Path(os.environ.get("LANGUAGE_BRIDGE_SCREENSHOT_REPORT") or tmp_path / "report.png"))


def test_a_workflow_from_another_machine_shows_the_bridge_under_its_name_here(
    page: Page, server: Server
) -> None:
    """The same content under another name, with Windows separators, changed; nothing is called missing."""
    folder = server.base / "models" / "language_bridges" / "page"
    own_bridge(folder / "here.safetensors", "page")
    facts = server.ask("/object_info/LanguageBridge")["LanguageBridge"]["input"]["required"]["bridge"][1]
    record = json.loads(facts["records"]["page/here.safetensors"])
    away = saved_workflow("other/away.safetensors")
    values = next(node["widgets_values"] for node in away["nodes"] if node["type"] == "LanguageBridge")
    values.append(json.dumps(record | {"bridge": "other/away.safetensors"}))
    windows = saved_workflow("page\\here.safetensors")
    windows["extra"]["language_bridge"] = {"outer.safetensors": "as it was"}  # what travel.stamp may write
    try:
        open_workflow(page, server)
        bridge = NODE.format("LanguageBridge")
        show = f"(() => {{ const node = {bridge}; return node.widgets.map(widget => widget.value); }})()"
        for workflow in (away, windows):
            page.evaluate(f"window.app.loadGraphData({json.dumps(workflow)})")
            assert page.evaluate(show)[0] == "page/here.safetensors"
            assert json.loads(page.evaluate(show)[3]) == record
        kept = "window.app.graphToPrompt().then(made => made.workflow.extra.language_bridge)"
        assert page.evaluate(kept) == windows["extra"]["language_bridge"]
        hidden = f"{bridge}.widgets.find(widget => widget.name === 'identity')"
        assert page.evaluate(f"{hidden}.hidden") is True
        assert not page.evaluate("document.body.innerText.includes('away.safetensors')")

        own_bridge(folder / "here.safetensors", "page", seed=1)
        page.evaluate("window.app.queuePrompt(0, 1)")
        said = "document.body.innerText"
        page.wait_for(f"{said}.includes('here.safetensors has another content')", "the warning")
        assert json.loads(page.evaluate(show)[3]) == record  # still what was meant
        page.wait_for(f"{PICTURE}?.naturalWidth", "the picture")
        # Choosing the file again means the one that is there.
        page.evaluate(f"(() => {{ const {{ widgets: [w] }} = {bridge}; w.callback(w.value); }})()")
        chosen = f"{hidden}.value"
        page.wait_for(f"{chosen} && {chosen} !== {json.dumps(json.dumps(record))}", "the new record")
        assert json.loads(page.evaluate(chosen))["hash"] != record["hash"]
        assert not our_trouble(page)

        page.evaluate(f"window.app.loadGraphData({json.dumps(saved_workflow('gone.safetensors'))})")
        page.wait_for(f"{said}.includes('gone.safetensors')", "the page's own list of missing models")
    finally:
        (folder / "here.safetensors").unlink()


def test_a_published_file_that_is_missing_is_offered_by_the_page_itself(page: Page, server: Server) -> None:
    page.open(server.page("altdiffusion_m9"))
    page.wait_for("document.body.innerText.includes('Alt-Diffusion-M9.safetensors')", "the missing model")
    button = "[...document.querySelectorAll('button')].find(one => one.innerText.includes('View details'))"
    page.evaluate(f"{button}.click()")
    page.wait_for("/Download/.test(document.body.innerText)", "the page's own download")
    assert not page.exceptions  # the stock page asks its own services, which are not there
