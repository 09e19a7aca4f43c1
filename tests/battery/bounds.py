"""A time and a memory within which every refusal has to come, whatever the file claims."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SECONDS = 3.0
MEBIBYTES = 768


@contextmanager
def bounded(seconds: float = SECONDS, mebibytes: int = MEBIBYTES) -> Iterator[None]:
    """Fail when what is done inside takes more processor time, or asks for more memory than that.

    The memory is a limit of the system, where it has one, so a claim cannot be taken even for a moment.
    """
    began = time.process_time()
    with _limited(mebibytes):
        yield
    took = time.process_time() - began
    assert took <= seconds, f"{took:.2f} seconds"


@contextmanager
def _limited(mebibytes: int) -> Iterator[None]:
    with suppress(ImportError, OSError):
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(
            resource.RLIMIT_AS, (pages * resource.getpagesize() + (mebibytes << 20), before[1])
        )
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        return
    yield
