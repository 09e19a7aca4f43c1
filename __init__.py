"""Language Bridge for ComfyUI: one node after Load Checkpoint, and any SD checkpoint understands your
language.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The host's way in; everything else is imported here or later."""
    from .nodes.extension import LanguageBridgeExtension

    return LanguageBridgeExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
