"""Headless Chromium, driven over a pair of pipes by the DevTools protocol. POSIX only, standard library only.

Chromium ends by itself when the pipes close, so it cannot outlive the process that opened it.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class PageError(RuntimeError):
    """The page threw, the browser refused a command, or something did not happen in time."""


def find_chromium() -> str | None:
    """Path of a Chromium on this machine, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of one private Chromium; a context manager."""

    def __init__(self, chromium: str, width: int = 1600, height: int = 900) -> None:
        self.chromium = chromium
        self.size = (width, height)
        self.exceptions: list[str] = []
        self.complaints: list[str] = []
        self._number = 0
        self._session = ""
        self._rest = b""

    def __enter__(self) -> Page:
        self._profile = tempfile.TemporaryDirectory(prefix="lb-chromium-", ignore_cleanup_errors=True)
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--no-default-browser-check",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-proxy-server",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]
        # Chromium reads commands on descriptor 3 and answers on 4.
        script = f'exec "$0" "$@" 3<&{theirs_read} 4>&{theirs_write}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", script, self.chromium, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs_read, theirs_write),
            start_new_session=True,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        self._in, self._out = ours_read, ours_write
        try:
            target = self.command("Target.createTarget", url="about:blank", session=False)["targetId"]
            attached = self.command("Target.attachToTarget", targetId=target, flatten=True, session=False)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.command(f"{domain}.enable")
            width, height = self.size
            self.command(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        os.close(self._in)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._profile.cleanup()

    def command(self, method: str, *, session: bool = True, timeout: float = 60.0, **parameters: Any) -> Any:
        """Send one protocol command and return its result.

        Raises:
            PageError: the browser refused it or gave no answer in *timeout* seconds.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while True:
            answer = self._receive(end, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def open(self, url: str) -> None:
        """Go to *url*."""
        self.command("Page.navigate", url=url)

    def evaluate(self, script: str, timeout: float = 60.0) -> Any:
        """The JSON value of a JavaScript expression; a promise is awaited.

        Raises:
            PageError: the expression threw.
        """
        answer = self.command(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, timeout=timeout
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details.get("text")))
        return answer["result"].get("value")

    def wait_for(self, script: str, what: str, timeout: float = 90.0) -> Any:
        """Evaluate *script* until it is truthy, return its value; throwing counts as not yet.

        Raises:
            PageError: it did not become truthy in *timeout* seconds; the text names *what* and errors.
        """
        end = time.monotonic() + timeout
        last = ""
        while time.monotonic() < end:
            try:
                if value := self.evaluate(script):
                    return value
            except PageError as error:
                last = str(error)
            time.sleep(0.25)
        raise PageError(
            "\n".join(
                [f"{what}: not within {timeout:.0f} s", last, *self.exceptions[-5:], *self.complaints[-5:]]
            )
        )

    def screenshot(self, path: Path) -> None:
        """Write what the page shows as a PNG file."""
        data = self.command("Page.captureScreenshot", format="png")["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))

    def _receive(self, end: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise PageError(f"no answer from Chromium to {what}")
            block = os.read(self._in, 1 << 20)
            if not block:
                raise PageError(f"Chromium ended during {what}")
            self._rest += block
        line, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.exceptions.append(details.get("exception", {}).get("description", details.get("text", "")))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            entry = parameters["entry"]
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}")
