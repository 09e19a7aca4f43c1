"""Says whether the sources can be reached from here, when the user asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import sources
from .connection import Answer, Broken, Exchange, Refused, Wire
from .download import AGENT, TICK_SECONDS
from .errors import Stopped

WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Reached:
    """One source: its word, its address, why it was not reached ("" = it was), seconds to the answer."""

    source: str
    url: str
    problem: str
    seconds: float

    @property
    def cause(self) -> str:
        """What kind of problem it is: "certificate", "proxy" or "silent"; "" without one."""
        if "certificate" in self.problem:
            return "certificate"
        return "proxy" if "proxies" in self.problem else "silent" if self.problem else ""


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
    stopped: Callable[[], bool] | None = None,
) -> tuple[Reached, ...]:
    """Ask each source for its first page's head; any answer counts.

    Raises:
        FetchError: a variable of the environment cannot be used. Stopped: `stopped` said so.
    """
    allowed = wire or sources.wire(environ)
    return tuple(
        _reached(allowed, source, url, seconds, stopped) for source, url in (asked or places(environ))
    )


def _reached(
    wire: Wire, source: str, url: str, seconds: float, stopped: Callable[[], bool] | None
) -> Reached:
    start = time.monotonic()
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity", "Connection": "close"}
    try:
        with Exchange(wire, f"{url}/", lambda parts: headers, method="HEAD", follow=False) as exchange:
            while not isinstance(exchange.next(TICK_SECONDS), Answer):
                if stopped is not None and stopped():
                    raise Stopped(f"while {source} was asked")
                if time.monotonic() - start > seconds:
                    raise Broken(f"no answer for {seconds:g} seconds")
    except (Refused, Broken) as error:
        return Reached(source, url, str(error), time.monotonic() - start)
    return Reached(source, url, "", time.monotonic() - start)
