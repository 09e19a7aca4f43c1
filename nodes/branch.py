"""The node that settles when a branch acts, and how it reads a prompt."""

from __future__ import annotations

from comfy_api.latest import io

WEIGHTS = ["dropped", "act"]
LENGTHS = ["shared", "own"]


class BranchSettings(io.ComfyNode):
    """MODEL and CLIP behind a branch in, the same with other settings out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Both sockets of Language Bridge, the part of the steps, weights and length of native text."""
        return io.Schema(
            node_id="LanguageBridgeBranch",
            display_name="Language Bridge Branch",
            category="Language Bridge",
            description="Put this node behind a Language Bridge node with a branch in it, to set in which "
            "steps the branch acts and how it reads your prompts. Without it, all is as published.",
            search_aliases=["BDM", "native branch", "start percent", "prompt weights"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of a Language Bridge node with a branch in it."),
                io.Clip.Input("clip", tooltip="The CLIP of the same node."),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Where in sampling the branch begins to act.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Where in sampling the branch stops acting.",
                ),
                io.Combo.Input(
                    "weights",
                    options=WEIGHTS,
                    default=WEIGHTS[0],
                    tooltip="Weights such as (word:1.2) in native text. dropped: read and left out, as "
                    "published. act: they act on the native words. This is ours, not the authors'.",
                ),
                io.Combo.Input(
                    "length",
                    options=LENGTHS,
                    default=LENGTHS[0],
                    tooltip="shared: all prompts of a sampling are as long as the longest, as published. "
                    "own: each keeps its length. This is ours, and often slower.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The MODEL with the branch."),
                io.Clip.Output("CLIP", tooltip="The CLIP for CLIP Text Encode."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        clip: object,
        start_percent: float,
        end_percent: float,
        weights: str,
        length: str,
    ) -> io.NodeOutput:
        """Hands out clones; what came in stays as it is."""
        from ..host import branch, branch_clip

        voices = {"weighted": weights == WEIGHTS[1], "own_length": length == LENGTHS[1]}
        changed = branch_clip.require_branched(clip).with_voices(**voices)
        return io.NodeOutput(branch.limited(model, start_percent, end_percent), changed)
