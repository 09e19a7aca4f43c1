"""The stock frontend in headless Chromium: the pocket workflow opens, runs, and its picture appears.

LANGUAGE_BRIDGE_SCREENSHOT=FILE keeps the page as it looks at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from language_bridge.harness.browser import Page, find_chromium
from language_bridge.harness.server import Server

pytestmark = pytest.mark.browser

NODE = "window.app.graph.nodes.find(node => node.type === '{}')"
PICTURE = NODE.format("SaveImage") + ".imgs?.[0]"


@pytest.fixture
def page() -> Iterator[Page]:
    chromium = find_chromium()
    if chromium is None:
        text = "no chromium found (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    with Page(chromium) as opened:
        yield opened


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
