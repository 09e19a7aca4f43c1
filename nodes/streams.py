"""The node that settles how the two streams of a prompt are joined, and which words stay English."""

from __future__ import annotations

from comfy_api.latest import io

JOINS = ["rows appended", "shared window"]


class Streams(io.ComfyNode):
    """A bridged CLIP in, one that speaks in another way out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The bridged CLIP, two lists of words, the way to join, and the blend with its part of the steps."""
        return io.Schema(
            node_id="LanguageBridgeStreams",
            display_name="Language Bridge Streams",
            category="Language Bridge",
            description="Put this node before CLIP Text Encode to set how the native and the English part of "
            "a prompt are mixed. Positive and negative prompt may have one each.",
            search_aliases=["trigger words", "keep words", "blend", "language mix", "\u89e6\u53d1\u8bcd"],
            inputs=[
                io.Clip.Input("clip", tooltip="A CLIP that comes from Language Bridge."),
                io.String.Input(
                    "triggers",
                    default="",
                    tooltip="Trigger words, separated by commas, for example those of LoRA Manager. "
                    "They always go to the checkpoint's own CLIP.",
                ),
                io.String.Input(
                    "keep",
                    default="",
                    multiline=True,
                    tooltip="More words that always go to the checkpoint's own CLIP, in any script, "
                    "separated by commas or lines.",
                ),
                io.Combo.Input(
                    "join",
                    options=JOINS,
                    default=JOINS[0],
                    tooltip="rows appended: the rows of both parts, one behind the other. shared window: "
                    "the words of both in one window.",
                ),
                io.Float.Input(
                    "blend",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 = English meaning alone, 0.5 = both as they are, 1 = native meaning alone. "
                    "It acts on prompts that have both.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Where in sampling the blend begins to hold; before, both are as they are.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Where in sampling the blend ends; behind, both are as they are.",
                ),
            ],
            outputs=[io.Clip.Output("CLIP", tooltip="The CLIP for CLIP Text Encode.")],
        )

    @classmethod
    def execute(
        cls,
        clip: object,
        triggers: str,
        keep: str,
        join: str,
        blend: float,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        """Hands out a clone; the CLIP that came in stays as it is."""
        from ..host import clip as bridged
        from ..host.joining import Joining

        words = bridged.listed(triggers, keep, "Language Bridge Streams")
        joining = Joining(join, blend, start_percent, end_percent)
        return io.NodeOutput(bridged.require_bridged(clip).with_speech(phrases=words, joining=joining))
