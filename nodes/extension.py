"""Lists the pack's nodes for the host and registers its model folders."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..conversion import VERSION
from ..host import folders, travel
from . import finish
from .branch import BranchSettings
from .checkpoint import BridgeCheckpoint
from .convert import Convert
from .dataset import LanguageBridgeDataset, LanguageBridgeDatasetFromLists
from .doctor import Doctor
from .downloads import Downloads
from .inspector import PromptInspector
from .language_bridge import LanguageBridge
from .lora_report import LoraReport
from .pocket_checkpoint import PocketCheckpoint
from .pocket_dataset import PocketDataset
from .streams import Streams
from .training import ObjectiveOptions, Save, Train, TrainingSettings

NODES: tuple[type[io.ComfyNode], ...] = (
    LanguageBridge,
    PocketCheckpoint,
    Convert,
    BridgeCheckpoint,
    PromptInspector,
    Streams,
    LoraReport,
    BranchSettings,
    LanguageBridgeDataset,
    LanguageBridgeDatasetFromLists,
    Train,
    TrainingSettings,
    ObjectiveOptions,
    Save,
    PocketDataset,
    Downloads,
    Doctor,
)
"""Every node, in the order of the menu; their ids never change, because saved workflows name them."""


class LanguageBridgeExtension(ComfyExtension):
    """The pack as the host sees it."""

    async def on_load(self) -> None:
        """Registers models/language_bridges before the first schema lists it, the route of a button, and who
        watches what is queued.
        """
        folders.register()
        finish.register()
        travel.watch(VERSION)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes to offer."""
        return list(NODES)
