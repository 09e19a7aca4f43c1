"""The node that shows which LoRAs are in a MODEL and CLIP, what they change, and their trigger words."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.language import LANGUAGES


class LoraReport(io.ComfyNode):
    """MODEL and CLIP in; the report is shown in the node and given on as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Two model sockets and the language of the report."""
        return io.Schema(
            node_id="LanguageBridgeLoraReport",
            display_name="LoRA Report",
            category="Language Bridge",
            description="Shows every LoRA in this MODEL and CLIP: its file, strength, how many layers it "
            "changes in the U-Net and in the text encoder, which it cannot and why, and its trigger words.",
            search_aliases=["lora info", "trigger words", "lora keys", "\u89e6\u53d1\u8bcd"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL behind the last LoRA."),
                io.Clip.Input("clip", tooltip="The CLIP behind the last LoRA."),
                io.Combo.Input(
                    "language",
                    options=LANGUAGES,
                    default=LANGUAGES[0],
                    tooltip="Of the report. auto is the language of the page.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="The report as text."),
                io.String.Output("triggers", tooltip="The trigger words, separated by commas."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        """Always anew: files and sidecars may have changed."""
        return float("nan")

    @classmethod
    def execute(cls, model: object, clip: object, language: str) -> io.NodeOutput:
        """Compares patches with files; nothing is loaded or patched."""
        from ..host import triggers
        from ..host.language import words

        reports = triggers.reports_of(model, clip)
        report = "\n".join(triggers.lines(reports, triggers.bypassed(model, clip), words(language)))
        found = dict.fromkeys(word for each in reports for word, _ in each.triggers)
        return io.NodeOutput(report, ", ".join(found), ui=ui.PreviewText(report))
