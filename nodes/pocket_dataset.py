"""Paints a dataset of the pocket world, to try training without pictures of your own."""

from __future__ import annotations

from comfy_api.latest import io

from .dataset import DATASET


class PocketDataset(io.ComfyNode):
    """Coloured shapes with Chinese and English captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """How many, and which."""
        return io.Schema(
            node_id="LanguageBridgePocketDataset",
            display_name="Pocket Dataset",
            category="Language Bridge/pocket",
            description="Paints coloured shapes with captions in Chinese and English, for training a bridge "
            "of the pocket checkpoint.",
            search_aliases=["pocket", "demo data", "training data"],
            inputs=[
                io.Int.Input("count", default=1500, min=1, max=20_000, tooltip="Pictures of 64x64."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Another seed gives other pictures.",
                ),
            ],
            outputs=[DATASET.Output("dataset", tooltip="For Language Bridge Train, at resolution 64.")],
        )

    @classmethod
    def execute(cls, count: int, seed: int) -> io.NodeOutput:
        """Paints them into memory."""
        from ..host.pocket_scenes import scenes

        return io.NodeOutput(scenes(count, seed))
