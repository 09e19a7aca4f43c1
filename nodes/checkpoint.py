"""Opens checkpoints whose own text encoder speaks another language: AltDiffusion and Taiyi."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

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
    def fingerprint_inputs(cls, checkpoint: str) -> str:
        """A checkpoint that was replaced is read again."""
        path = folder_paths.get_full_path(FOLDER, checkpoint)
        if path is None:
            return checkpoint
        facts = Path(path).stat()
        return f"{checkpoint} {facts.st_size} {facts.st_mtime_ns}"

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        """Recognises the checkpoint and opens it."""
        from ..bridges.errors import BridgeError
        from ..host.checkpoint import open_checkpoint

        names = folder_paths.get_filename_list(FOLDER)
        path = folder_paths.get_full_path(FOLDER, checkpoint) if checkpoint in names else None
        if path is None:
            raise BridgeError(
                f"There is no checkpoint called {checkpoint!r}.",
                f"{len(names)} checkpoints: {', '.join(names[:8]) or 'none'}",
                "a file of the folder models/checkpoints",
                "Put the file there, press R in the browser to refresh, and choose it again.",
            )
        return io.NodeOutput(*open_checkpoint(Path(path)))
