"""The node that shows which stream hears which part of a prompt, in which tokens, and why."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.language import LANGUAGES


class PromptInspector(io.ComfyNode):
    """CLIP and a prompt in; the report is shown in the node and given on as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The inputs of CLIP Text Encode, and the language of the report."""
        return io.Schema(
            node_id="LanguageBridgeInspector",
            display_name="Prompt Inspector",
            category="Language Bridge",
            description="Shows what a prompt becomes: which words go over the bridge, which to the "
            "checkpoint's own CLIP, in which tokens, and why. Nothing is encoded.",
            search_aliases=["tokens", "token counter", "prompt debug", "\u63d0\u793a\u8bcd\u68c0\u67e5"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP that goes into CLIP Text Encode."),
                io.String.Input("text", multiline=True, tooltip="The prompt to look at."),
                io.Combo.Input(
                    "language",
                    options=LANGUAGES,
                    default=LANGUAGES[0],
                    tooltip="Of the report. auto is the language of the page.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="The report as text."),
                io.String.Output("text", tooltip="The prompt as it came in, for CLIP Text Encode."),
            ],
        )

    @classmethod
    def execute(cls, clip: object, text: str, language: str) -> io.NodeOutput:
        """Reads the tokens of the prompt; the text towers stay where they are."""
        from ..host.inspector import inspect
        from ..host.language import words

        report = inspect(clip, text, words(language))
        return io.NodeOutput(report, text, ui=ui.PreviewText(report))
