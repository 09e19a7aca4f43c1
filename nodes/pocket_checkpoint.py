"""Loads the pocket checkpoint that ships with the pack, to try everything without a download."""

from __future__ import annotations

from comfy_api.latest import io


class PocketCheckpoint(io.ComfyNode):
    """A tiny model that paints coloured shapes: MODEL, CLIP and VAE like any checkpoint's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """No inputs; the three outputs of Load Checkpoint."""
        return io.Schema(
            node_id="LanguageBridgePocketCheckpoint",
            display_name="Pocket Checkpoint",
            category="Language Bridge/pocket",
            description="A tiny model that ships with the pack and paints coloured shapes at 64x64. "
            "Sample it with cfg 2.",
            search_aliases=["pocket", "demo checkpoint", "tiny model"],
            inputs=[],
            outputs=[
                io.Model.Output("MODEL", tooltip="The tiny U-Net, SD1.x in everything but size."),
                io.Clip.Output("CLIP", tooltip="Its English text encoder."),
                io.Vae.Output("VAE", tooltip="Its picture decoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Loads the file that lies inside the pack."""
        from ..host.pocket import load_pocket

        return io.NodeOutput(*load_pocket())
