"""Trainable maps from a text tower's hidden states to a checkpoint's conditioning: one file, one kind.

Files on disk are the business of `bridges.file`, which is imported on its own because it also knows towers.
"""

from .base import Bridge, BridgeSpec, Cond, Hidden, Ops, create, identify, kinds
from .errors import BridgeError

__all__ = [
    "Bridge",
    "BridgeError",
    "BridgeSpec",
    "Cond",
    "Hidden",
    "Ops",
    "create",
    "identify",
    "kinds",
]
