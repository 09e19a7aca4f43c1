"""Training without ComfyUI: `python -m training` in the pack's folder, or `accelerate launch -m training`."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, cast


def run() -> int:
    """Hand over to the command line, under the name that the pack has as a library."""
    name = "language_bridge"
    if name not in sys.modules:  # started from the folder itself, which is no package then
        package = types.ModuleType(name)
        package.__path__ = [str(Path(__file__).resolve().parent.parent)]
        sys.modules[name] = package
    from language_bridge.training.headless import command  # pyright: ignore

    return int(cast(Any, command).main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(run())
