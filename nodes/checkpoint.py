"""Opens checkpoints whose own text encoder speaks another language: AltDiffusion and Taiyi."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..host import travel

FOLDER = "checkpoints"


class BridgeCheckpoint(io.ComfyNode):
    """Load Checkpoint for single files that bring a multilingual text encoder instead of CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One file; the three outputs of Load Checkpoint."""
        return io.Schema(
            node_id="LanguageBridgeCheckpoint",
            display_name="Language Bridge Checkpoint",
            category="Language Bridge",
            description="Opens single files of AltDiffusion and Taiyi with their own text encoder.",
            search_aliases=["altdiffusion", "taiyi", "multilingual checkpoint", "\u592a\u4e59"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file of the folder models/checkpoints.",
                )
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The checkpoint's U-Net."),
                io.Clip.Output("CLIP", tooltip="The checkpoint's own text encoder; all text goes over it."),
                io.Vae.Output("VAE", tooltip="The checkpoint's picture decoder."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: object = None) -> bool | str:
        """Any name passes: the node itself says what is missing, and knows the slashes of other systems."""
        known = checkpoint is None or isinstance(checkpoint, str)
        return True if known else "the name of a checkpoint is a text"

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None) -> str:
        """A checkpoint that was replaced is read again."""
        try:
            facts = travel.model_path(FOLDER, checkpoint or "", "checkpoint").stat()
        except (OSError, ValueError):
            return checkpoint or ""
        return f"{checkpoint} {facts.st_size} {facts.st_mtime_ns}"

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        """Recognises the checkpoint and opens it."""
        from ..host.checkpoint import open_checkpoint

        return io.NodeOutput(*open_checkpoint(travel.model_path(FOLDER, checkpoint, "checkpoint")))
