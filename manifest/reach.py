"""Says whether the sources can be reached from here, when the user asks for it, and what to do where not."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from . import sources
from .connection import Answer, Broken, Exchange, Refused, Wire
from .download import AGENT

WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Reached:
    """One source: its word, its address, why it was not reached ("" = it was), seconds to the answer."""

    source: str
    url: str
    problem: str
    seconds: float

    def __str__(self) -> str:
        if not self.problem:
            return f"{self.source:11s} {self.url}: answers in {self.seconds:.1f} s"
        said = f"{self.source:11s} {self.url}: NOT reached, {self.problem}"
        return f"{said}\n{'':11s} what to do: {self._advice()}"

    def _advice(self) -> str:
        if "certificate" in self.problem:
            return "set SSL_CERT_FILE to your network's own certificate, or use another network"
        if "proxies" in self.problem:
            return "set HTTPS_PROXY to an HTTP proxy"
        return "set LANGUAGE_BRIDGE_SOURCES to the sources that answer, or HTTPS_PROXY"


def places(environ: Mapping[str, str] | None = None) -> tuple[tuple[str, str], ...]:
    """Word and address of each source, in the user's order; FetchError on a variable that is wrong."""
    known = {"hub": sources.HUB, "mirror": sources.mirror(environ), "modelscope": sources.MODELSCOPE}
    return tuple((source, known[source]) for source in sources.order(environ))


def reach(
    environ: Mapping[str, str] | None = None,
    *,
    wire: Wire | None = None,
    asked: tuple[tuple[str, str], ...] | None = None,
    seconds: float = WAIT_SECONDS,
) -> tuple[Reached, ...]:
    """Ask each source for its first page's head; any answer counts.

    Raises:
        FetchError: a variable of the environment cannot be used.
    """
    allowed = wire or sources.wire(environ)
    return tuple(_reached(allowed, source, url, seconds) for source, url in (asked or places(environ)))


def _reached(wire: Wire, source: str, url: str, seconds: float) -> Reached:
    start = time.monotonic()
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity", "Connection": "close"}
    try:
        with Exchange(wire, f"{url}/", lambda parts: headers, method="HEAD", follow=False) as exchange:
            answer = exchange.next(seconds)
            if not isinstance(answer, Answer):
                raise Broken(f"no answer for {seconds:g} seconds")
    except (Refused, Broken) as error:
        return Reached(source, url, str(error), time.monotonic() - start)
    return Reached(source, url, "", time.monotonic() - start)
