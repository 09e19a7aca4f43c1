"""Downloads one file and kills its own process at a chosen point; run by test_kill.py.

    python dying.py CHECKOUT PORT TARGET SHA256 KIND NUMBER

KIND "bytes": when so many bytes have arrived. "before", "after": the NUMBERth call that changes the disk.
SHA256 may be -, for a file of unknown hash. Prints the number of such calls when it lives to the end.
"""

from __future__ import annotations

import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

checkout, port, target, digest, kind, number = sys.argv[1:]
package = types.ModuleType("language_bridge")
package.__path__ = [checkout]
sys.modules["language_bridge"] = package

from language_bridge.manifest import connection, download, part  # noqa: E402
from language_bridge.manifest.download import Pace, Wanted  # noqa: E402
from language_bridge.manifest.sources import Address  # noqa: E402
from language_bridge.tests.manifest.hub import LoopbackWire  # noqa: E402

calls = 0


def die() -> None:
    """End at once, with nothing flushed and nothing cleaned up."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def counting(call: Any) -> Any:
    """The call, with death before or after it when its number has come."""

    def counted(*given: Any, **named: Any) -> Any:
        global calls
        calls += 1
        if kind == "before" and calls == int(number):
            die()
        answer = call(*given, **named)
        if kind == "after" and calls == int(number):
            die()
        return answer

    return counted


class Dying(part.Part):
    """A part that dies when it has grown so far."""

    def write(self, block: bytes) -> None:
        super().write(block)
        if kind == "bytes" and self.size >= int(number):
            die()


def main() -> None:
    """One download."""
    connection.BLOCK_BYTES = 4096
    download.Part = Dying
    for name in ("fsync", "replace", "open"):
        setattr(os, name, counting(getattr(os, name)))
    Path.unlink = counting(Path.unlink)
    wanted = Wanted("a/b@main/file", sha256="" if digest == "-" else digest)
    wire = LoopbackWire({f"127.0.0.1:{port}"})
    place = Address("source 0", f"http://127.0.0.1:{port}/file")
    download.download([place], Path(target), wanted, wire=wire, pace=Pace(save_bytes=16_384))
    print(calls)


main()
