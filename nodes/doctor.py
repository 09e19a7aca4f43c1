"""The node that says what is wrong with this installation and its files, each with one thing to do."""

from __future__ import annotations

import time

from comfy_api.latest import io, ui

from ..host import doctor as facts
from ..host.language import LANGUAGES
from . import downloads


class Doctor(io.ComfyNode):
    """Nothing in; the report is shown in the node and given on as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The language of the report, and whether the sources of downloads are asked."""
        return io.Schema(
            node_id="LanguageBridgeDoctor",
            display_name="Language Bridge Doctor",
            category="Language Bridge",
            description="Says what is wrong: versions, missing and damaged files, files in the wrong folder, "
            "bridges without their text tower. Each with one thing to do. It changes nothing.",
            search_aliases=["diagnose", "check installation", "missing files", "\u4f53\u68c0"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "language",
                    options=LANGUAGES,
                    default=LANGUAGES[0],
                    tooltip="Of the report. auto is the language of the page.",
                ),
                io.Boolean.Input(
                    "hosts",
                    default=False,
                    tooltip="Ask the sources of downloads whether they answer. Nothing else here uses the "
                    "network.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="The report as text.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> float:
        """Files change without the graph: every run looks again."""
        return time.time()

    @classmethod
    def execute(cls, language: str, hosts: bool) -> io.NodeOutput:
        """Looks at headers, and at the hashes of what was fetched; stopped like any other node."""
        from ..host.language import words
        from ..reports import doctor

        environ, _ = downloads.environment()
        versions = facts.versions()
        machine = doctor.Machine(
            pack=facts.PACK,
            models=downloads.models_folder(),
            roots=facts.roots(doctor.CATEGORIES),
            versions=versions,
            choices=[*facts.choices(), *doctor.places(environ)],
            comfyui=dict(versions)["ComfyUI"],
            missing=doctor.needed_missing(),
        )
        with downloads.stoppable() as stopped:
            findings = doctor.examine(machine, hosts=bool(hosts), environ=environ, stopped=stopped)
        text = doctor.report(machine, findings, words(language))
        return io.NodeOutput(text, ui=ui.PreviewText(text))
