"""The nodes that gather what a bridge learns from, and say by file name what is wrong with it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..training.languages import LANGUAGES

DATASET = io.Custom("LANGUAGE_BRIDGE_DATASET")
"""Socket of a `training.dataset.Dataset`."""

_LANGUAGE = (
    "The language of the native captions: rows without a letter of it are listed as problems. any takes "
    "every text with a letter."
)


class LanguageBridgeDataset(io.ComfyNode):
    """A folder of pictures with captions, or a file of sentence pairs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One place and one language; the dataset and a report on it."""
        from ..host import dataset as data

        return io.Schema(
            node_id="LanguageBridgeDataset",
            display_name="Language Bridge Dataset",
            category="Language Bridge",
            description="Reads pictures with captions, or sentence pairs, for training a bridge, and lists "
            "by file name what is wrong. No picture is loaded yet.",
            search_aliases=[
                "training data",
                "captions",
                "sentence pairs",
                "\u8bad\u7ec3\u96c6",
                "\u6570\u636e\u96c6",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "dataset",
                    options=data.names(),
                    tooltip="A folder of pictures with captions, or a .tsv, .csv or .jsonl file of sentence "
                    "pairs, below ComfyUI's folder input (or datasets).",
                ),
                io.Combo.Input("language", options=list(LANGUAGES), default=LANGUAGES[0], tooltip=_LANGUAGE),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="For Language Bridge Train."),
                io.String.Output("report", tooltip="What was read, and every problem by file name."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, dataset: str | None = None, language: str | None = None) -> str:
        """A dataset whose files changed is read again."""
        from ..host import dataset as data

        return f"{language} {data.state_of(dataset) if dataset else ''}"

    @classmethod
    def execute(cls, dataset: str, language: str) -> io.NodeOutput:
        """Lists rows and problems; pictures are looked at and not loaded."""
        from ..host import dataset as data

        return _shown(data.open_dataset(dataset, language))


class LanguageBridgeDatasetFromLists(io.ComfyNode):
    """The same of lists that ComfyUI's own dataset nodes give."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Lists that belong together, item by item; only the native texts are needed."""
        return io.Schema(
            node_id="LanguageBridgeDatasetFromLists",
            display_name="Language Bridge Dataset From Lists",
            category="Language Bridge",
            description="Makes a dataset of lists that other nodes have loaded or encoded: the first text "
            "belongs to the first picture, and so on.",
            search_aliases=[
                "training data",
                "make training dataset",
                "\u8bad\u7ec3\u96c6",
                "\u6570\u636e\u96c6",
            ],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.String.Input("native", force_input=True, tooltip="Captions in the bridge's language."),
                io.Combo.Input("language", options=list(LANGUAGES), default=LANGUAGES[0], tooltip=_LANGUAGE),
                io.String.Input(
                    "english",
                    force_input=True,
                    optional=True,
                    tooltip="The same captions in English; an empty text where there is none to be trusted.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures, as Load Image-Text (from Folder) gives them."
                ),
                io.Latent.Input(
                    "latents", optional=True, tooltip="Encoded pictures, as Make Training Dataset gives them."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="The English captions, encoded by the checkpoint's own CLIP, as Make Training "
                    "Dataset gives them.",
                ),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="For Language Bridge Train."),
                io.String.Output("report", tooltip="What was read, and every problem by its number."),
            ],
        )

    @classmethod
    def execute(
        cls,
        native: list[str],
        language: list[str],
        english: list[str] | None = None,
        images: list[Any] | None = None,
        latents: list[Any] | None = None,
        conditioning: list[Any] | None = None,
    ) -> io.NodeOutput:
        """Puts the items together and checks their texts."""
        from ..host import dataset as data

        made = data.collect(
            native, english or [], images or [], latents or [], conditioning or [], language[0]
        )
        return _shown(made)


def _shown(made: Any) -> io.NodeOutput:
    from ..host import dataset as data
    from ..host.language import words

    report = "\n".join(data.lines(made, words()))
    return io.NodeOutput(made, report, ui=ui.PreviewText(report))
