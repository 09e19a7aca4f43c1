"""The nodes that train a bridge inside the graph, settle how, and save it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io, ui

from ..host import folders
from ..training.methods import METHODS, WEIGHTINGS
from ..training.objectives import ALIGNED
from ..training.optimiser import OPTIMISERS
from ..training.settings import SCHEDULES
from .dataset import DATASET

TRAINED = io.Custom("LANGUAGE_BRIDGE_TRAINED")
"""Socket of a `host.training.Trained`."""
SETTINGS = io.Custom("LANGUAGE_BRIDGE_SETTINGS")
"""Socket of the advanced settings, a dict by name."""
OBJECTIVE = io.Custom("LANGUAGE_BRIDGE_OBJECTIVE")
"""Socket of a `host.training.Options`."""

NOTHING = "none"
OF_THE_BRIDGE = "of the bridge"
KINDS = ["mlp", "linear", "omni", "ella", "identity"]
LEARNERS = ["bridge", "bridge and tower"]
PRECISIONS = ["auto", "fp32", "bf16", "fp16"]
STORED = ["float16", "float32"]
_WATCHED = ("held_out", "samples", "sample_steps", "guidance", "judged")
_MOST_STEPS, _MOST_SEED = 10_000_000, 0x7FFFFFFFFFFFFFFF
_QUIET_S = 0.25


class Train(io.ComfyNode):
    """MODEL, CLIP, VAE and a dataset in, a trained bridge out; loss and samples are shown on the way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What everybody sets; the rest is in the two nodes at `settings` and `options`."""
        return io.Schema(
            node_id="LanguageBridgeTrain",
            display_name="Language Bridge Train",
            category="Language Bridge/training",
            description="Trains a bridge on your own pictures and captions, or on sentence pairs. The "
            "checkpoint stays as it is. Cancel keeps what was learnt; queue again to go on.",
            search_aliases=["train bridge", "PEA", "IAP", "AltDiffusion", "BDM", "\u8bad\u7ec3"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the checkpoint; it says what English means."),
                DATASET.Input("dataset", tooltip="Of Language Bridge Dataset."),
                io.Combo.Input(
                    "objective",
                    options=list(METHODS),
                    default="pea",
                    tooltip="align: sentence pairs, no pictures. iap, pea: pictures with both captions; the "
                    "U-Net stays as it is. kv, branch: pictures with native captions; a part for the U-Net "
                    "learns. resample: the bridge alone learns from pictures.",
                ),
                io.Combo.Input(
                    "tower",
                    options=[OF_THE_BRIDGE, *_towers()],
                    default=OF_THE_BRIDGE,
                    tooltip="The text encoder of a new bridge; one that is continued keeps its own.",
                ),
                io.Combo.Input(
                    "kind", options=KINDS, default=KINDS[0], tooltip="What a new bridge is built like."
                ),
                io.Combo.Input(
                    "continue_from",
                    options=[NOTHING, *folders.bridge_names()],
                    default=NOTHING,
                    tooltip="A bridge to go on with. The file itself stays as it is.",
                ),
                io.Combo.Input(
                    "learns",
                    options=LEARNERS,
                    default=LEARNERS[0],
                    tooltip="A tower that learns is saved inside the bridge.",
                ),
                io.String.Input(
                    "run",
                    default="my bridge",
                    tooltip="Name of this training. Its checkpoints are kept under this name.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="Go on from the latest checkpoint of this run, if there is one.",
                ),
                io.Int.Input(
                    "steps", default=2000, min=1, max=_MOST_STEPS, tooltip="Updates of the weights."
                ),
                io.Int.Input("batch", default=8, min=1, max=4096, tooltip="Examples at once."),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=0.0000001,
                    max=10.0,
                    step=0.00001,
                    round=0.0000001,
                    tooltip="The highest one, reached after the warm-up.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side of a square picture; others are cut to shapes of about as many pixels. "
                    "64 for the pocket checkpoint.",
                ),
                io.Combo.Input(
                    "precision",
                    options=PRECISIONS,
                    default=PRECISIONS[0],
                    tooltip="auto: half precision on a GPU that has it, fp32 on a CPU.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=_MOST_SEED,
                    control_after_generate=False,
                    tooltip="Of everything random; the same seed and data give the same bridge.",
                ),
                io.Int.Input(
                    "save_every", default=250, min=0, max=_MOST_STEPS, tooltip="Steps between checkpoints."
                ),
                io.Int.Input(
                    "sample_every",
                    default=250,
                    min=0,
                    max=_MOST_STEPS,
                    tooltip="Steps between sample pictures; 0 = none. Needs model and vae.",
                ),
                io.Int.Input(
                    "validate_every",
                    default=250,
                    min=0,
                    max=_MOST_STEPS,
                    tooltip="Steps between measurements of the loss over held-out examples; 0 = none.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The MODEL of the checkpoint, LoRAs and all. Only align can do without.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of the checkpoint. Only sentence pairs can do without.",
                ),
                TRAINED.Input(
                    "trained", optional=True, tooltip="Of a training before this one, to go on with."
                ),
                SETTINGS.Input("settings", optional=True, tooltip="Of Training Settings."),
                OBJECTIVE.Input("options", optional=True, tooltip="Of Objective Options."),
            ],
            outputs=[
                TRAINED.Output("trained", tooltip="For Language Bridge Save, or a further training."),
                io.Image.Output("picture", tooltip="Loss curve and samples."),
                io.LossMap.Output("loss_map", tooltip="For Plot Loss Graph."),
                io.String.Output("report", tooltip="What was trained on what, and how it went."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, continue_from: str = NOTHING, **_: object) -> str:
        """A bridge that was replaced is continued again."""
        if continue_from == NOTHING:
            return ""
        try:
            facts = folders.bridge_path(continue_from).stat()
        except (OSError, ValueError):
            return continue_from
        return f"{continue_from} {facts.st_size} {facts.st_mtime_ns}"

    @classmethod
    def execute(
        cls,
        clip: object,
        dataset: Any,
        objective: str,
        tower: str,
        kind: str,
        continue_from: str,
        learns: str,
        run: str,
        resume: bool,
        steps: int,
        batch: int,
        learning_rate: float,
        resolution: int,
        precision: str,
        seed: int,
        save_every: int,
        sample_every: int,
        validate_every: int,
        model: object = None,
        vae: object = None,
        trained: Any = None,
        settings: Mapping[str, Any] | None = None,
        options: Any = None,
    ) -> io.NodeOutput:
        """Checks, encodes what was not encoded before, trains, and shows all of it."""
        from ..host import training

        advanced = dict(settings or {})
        watched = {name: advanced.pop(name) for name in _WATCHED if name in advanced}
        epochs = int(advanced.pop("epochs", 0))
        choice = training.Choice(
            objective=objective,
            run=run,
            settings=training.settings_of(
                precision,
                **advanced,
                steps=steps,
                batch=batch,
                learning_rate=learning_rate,
                seed=seed,
                save_every=save_every,
                sample_every=sample_every,
                validate_every=validate_every,
            ),
            tower=tower,
            kind=kind,
            continue_from=continue_from,
            learns=learns,
            resolution=resolution,
            resume=resume,
            epochs=epochs,
            options=options or training.Options(),
            watch=training.Watch(**watched),
        )
        shown = _Shown(cls.hidden.unique_id, steps)
        outcome = training.train(
            choice, dataset, model=model, clip=clip, vae=vae, watcher=shown, before=trained
        )
        return io.NodeOutput(
            outcome.trained,
            outcome.picture,
            {"loss": list(outcome.losses)},
            outcome.report,
            ui={**ui.PreviewImage(outcome.picture, cls=cls).as_dict(), "text": (outcome.report,)},
        )


class TrainingSettings(io.ComfyNode):
    """Settings of a training that have good values already."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One widget for each; the training node has the others."""
        return io.Schema(
            node_id="LanguageBridgeTrainingSettings",
            display_name="Training Settings",
            category="Language Bridge/training",
            description="Everything about a training that you need not set: optimiser, schedule, average, "
            "memory, noise, and what is shown.",
            search_aliases=["optimizer", "EMA", "warmup", "gradient checkpointing"],
            inputs=[
                io.Int.Input(
                    "epochs", default=0, min=0, max=100_000, tooltip="In the place of steps; 0 = by steps."
                ),
                io.Int.Input(
                    "accumulation",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Batches that make one step: the same as a larger batch, in less memory.",
                ),
                io.Combo.Input(
                    "optimiser",
                    options=list(OPTIMISERS),
                    default=OPTIMISERS[0],
                    tooltip="Muon wants about ten times the rate of AdamW. AdamW8bit needs bitsandbytes.",
                ),
                io.Int.Input("warmup", default=100, min=0, max=_MOST_STEPS, tooltip="Steps of rising rate."),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="cosine",
                    tooltip="Of the learning rate after the warm-up.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    round=0.000001,
                    tooltip="Draws weights to zero; 0 = not at all.",
                ),
                io.Float.Input(
                    "clip", default=1.0, min=0.0, max=1000.0, step=0.1, tooltip="Of the gradients; 0 = none."
                ),
                io.Float.Input(
                    "average",
                    default=0.0,
                    min=0.0,
                    max=0.9999,
                    step=0.001,
                    round=0.0001,
                    tooltip="Decay of the moving average (EMA) of the weights, which is saved; 0 = none.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=False,
                    tooltip="Gradient checkpointing: less memory, about a third slower.",
                ),
                io.Float.Input(
                    "drop",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of captions replaced by the empty prompt, for guidance.",
                ),
                io.Int.Input(
                    "draws",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Fixed noises of each picture, so that what the U-Net says of them is computed "
                    "once (pea, iap). 0: new noise at each step.",
                ),
                io.Float.Input(
                    "high_noise",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of steps drawn from the noisier two fifths, where a picture is decided.",
                ),
                io.Float.Input(
                    "noise_offset",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Noise that is equal all over a channel, for darker and lighter pictures.",
                ),
                io.Float.Input(
                    "perturbation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Further noise on what the U-Net sees and need not predict.",
                ),
                io.Int.Input("keep", default=2, min=1, max=1000, tooltip="Checkpoints that stay."),
                io.Float.Input(
                    "held_out",
                    default=0.05,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    tooltip="Share of the examples that are only measured.",
                ),
                io.Int.Input("samples", default=4, min=0, max=64, tooltip="Pictures of each sampling."),
                io.Int.Input(
                    "sample_steps", default=15, min=1, max=1000, tooltip="Steps of sampling of a sample."
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.5,
                    tooltip="Of the samples; 0: what suits the checkpoint.",
                ),
                io.Int.Input(
                    "judged",
                    default=32,
                    min=0,
                    max=1000,
                    tooltip="Only for the pocket checkpoint: captions of each sort that its judge looks at.",
                ),
            ],
            outputs=[SETTINGS.Output("settings", tooltip="For Language Bridge Train.")],
        )

    @classmethod
    def execute(cls, **values: object) -> io.NodeOutput:
        """Hands the values on; they are checked where they are used."""
        return io.NodeOutput(dict(values))


class ObjectiveOptions(io.ComfyNode):
    """What only one objective, or one kind of bridge, asks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Widgets named after the objective or kind that reads them."""
        return io.Schema(
            node_id="LanguageBridgeObjectiveOptions",
            display_name="Objective Options",
            category="Language Bridge/training",
            description="Options of single objectives (pea, iap, align, kv, branch, resample) and sizes of a "
            "new bridge. Each says which objective reads it.",
            inputs=[
                io.Float.Input(
                    "pea_weight",
                    default=0.1,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="pea: weight of the block features.",
                ),
                io.Boolean.Input(
                    "pea_skip_odd",
                    default=False,
                    tooltip="pea: leave out blocks that are not finite, as the authors do in fp16.",
                ),
                io.Combo.Input(
                    "iap_compare",
                    options=["output", "heads", "weights"],
                    default="output",
                    tooltip="iap: what of the attention is compared.",
                ),
                io.Combo.Input(
                    "iap_distance",
                    options=["squared", "absolute", "cosine"],
                    default="squared",
                    tooltip="iap: how.",
                ),
                io.Boolean.Input("iap_scaled", default=True, tooltip="iap: let all layers count alike."),
                io.String.Input(
                    "iap_layers",
                    default="",
                    tooltip="iap: numbers of the cross-attentions that count, such as 0, 2, 5; empty = all.",
                ),
                io.Int.Input(
                    "iap_pixels", default=64, min=1, max=4096, tooltip="iap: places of a picture per layer."
                ),
                io.Combo.Input(
                    "align_compare",
                    options=list(ALIGNED),
                    default=ALIGNED[0],
                    tooltip="align: which rows are drawn to the English ones, and how.",
                ),
                io.Float.Input(
                    "align_length",
                    default=2e-5,
                    min=0.0,
                    max=100.0,
                    step=0.00001,
                    round=0.000001,
                    tooltip="align, tokens: weight of the rows' lengths.",
                ),
                io.Combo.Input(
                    "unet_part",
                    options=["kv", "attn2"],
                    default="kv",
                    tooltip="kv: keys and values of the cross-attention learn, or the whole of it (attn2).",
                ),
                io.Combo.Input(
                    "weighting",
                    options=list(WEIGHTINGS),
                    default=WEIGHTINGS[0],
                    tooltip="kv, branch, resample: noisy lets the noisier steps count for more.",
                ),
                io.Int.Input("width", default=0, min=0, max=16384, tooltip="mlp; 0: what suits."),
                io.Int.Input("depth", default=3, min=1, max=32, tooltip="mlp: layers."),
                io.Int.Input(
                    "queries", default=0, min=0, max=4096, tooltip="omni, ella: rows; 0: what suits."
                ),
                io.Int.Input("layers", default=0, min=0, max=32, tooltip="omni, ella; 0: what suits."),
                io.Int.Input("heads", default=0, min=0, max=256, tooltip="omni, ella; 0: what suits."),
            ],
            outputs=[OBJECTIVE.Output("options", tooltip="For Language Bridge Train.")],
        )

    @classmethod
    def execute(
        cls,
        pea_weight: float,
        pea_skip_odd: bool,
        iap_compare: str,
        iap_distance: str,
        iap_scaled: bool,
        iap_layers: str,
        iap_pixels: int,
        align_compare: str,
        align_length: float,
        unet_part: str,
        weighting: str,
        width: int,
        depth: int,
        queries: int,
        layers: int,
        heads: int,
    ) -> io.NodeOutput:
        """Hands the values on; they are checked where they are used."""
        from ..host.training import Options

        return io.NodeOutput(
            Options(
                weight=pea_weight,
                skip_odd=pea_skip_odd,
                compare=iap_compare,
                distance=iap_distance,
                scaled=iap_scaled,
                attentions=iap_layers,
                pixels=iap_pixels,
                rows=align_compare,
                length=align_length,
                part=unet_part,
                weighting=weighting,
                width=width,
                depth=depth,
                queries=queries,
                layers=layers,
                heads=heads,
            )
        )


class Save(io.ComfyNode):
    """A trained bridge in, a file in models/language_bridges out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Name and form of the file."""
        return io.Schema(
            node_id="LanguageBridgeSave",
            display_name="Language Bridge Save",
            category="Language Bridge/training",
            description="Writes a trained bridge into models/language_bridges, where the node Language "
            "Bridge finds it.",
            search_aliases=["save bridge", "\u4fdd\u5b58"],
            is_output_node=True,
            inputs=[
                TRAINED.Input("trained", tooltip="Of Language Bridge Train."),
                io.String.Input("name", default="my-bridge", tooltip="Of the file, without a folder."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a bridge of the same name."),
                io.Combo.Input(
                    "stored", options=STORED, default=STORED[0], tooltip="float16 halves the file."
                ),
            ],
            outputs=[io.String.Output("bridge", tooltip="The name that the Language Bridge node lists.")],
        )

    @classmethod
    def execute(cls, trained: Any, name: str, overwrite: bool, stored: str) -> io.NodeOutput:
        """Writes the file in one piece."""
        from ..host import training

        path = training.save(trained, name, overwrite=overwrite, half=stored == STORED[0])
        return io.NodeOutput(path.name, ui=ui.PreviewText(training.about(trained, path)))


class _Shown:
    """Shows a training in its node: a line of text, progress, and pictures."""

    def __init__(self, node: str | None, steps: int) -> None:
        import comfy.utils

        self._node = node
        self._bar = comfy.utils.ProgressBar(steps, node_id=node)
        self._told = 0.0

    def say(self, text: str) -> None:
        """Lines that follow each other at once are left out, but for the first."""
        now = time.monotonic()
        if now - self._told < _QUIET_S:
            return
        self._told = now
        try:
            from server import PromptServer
        except ImportError:  # no server around: a graph that runs by itself
            return
        server = getattr(PromptServer, "instance", None)
        if server is not None and self._node is not None:
            server.send_progress_text(text, self._node)

    def show(self, step: int, steps: int, picture: Any) -> None:
        """Progress, and a new picture where there is one."""
        self._bar.update_absolute(
            step, steps, None if picture is None else ("PNG", picture, max(picture.size))
        )


def _towers() -> list[str]:
    """Identities of the tower files, without loading what trains them."""
    return sorted({header.identity for _, header in folders.towers()})
