"""One page of a private Chromium for each test of the stock frontend."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from language_bridge.harness.browser import Page, find_chromium


@pytest.fixture
def page() -> Iterator[Page]:
    """An empty page; where there is no Chromium the test is skipped, in CI it fails."""
    chromium = find_chromium()
    if chromium is None:
        text = "no chromium found (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    with Page(chromium) as opened:
        yield opened
