"""Runs a script that cannot outlive its parent: when standard input closes, the process ends.

``python leash.py SCRIPT ARGS...`` behaves as ``python SCRIPT ARGS...``. The parent holds the other end of
standard input and never writes; the system closes it however the parent ends, also by kill -9.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os._exit(143)


if __name__ == "__main__":
    threading.Thread(target=_watch, name="leash", daemon=True).start()
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")
