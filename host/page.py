"""Reads what the user chose in the settings of the page; the host keeps it in a file for each user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths

_LARGEST_BYTES = 4 << 20


def chosen(name: str) -> str:
    """The text that the user `default` set under this name, "" when there is none or it cannot be read."""
    try:
        path = Path(folder_paths.get_public_user_directory("default") or "") / "comfy.settings.json"
        if path.stat().st_size > _LARGEST_BYTES:
            return ""
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
        found = settings.get(name)
    except (OSError, ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""
