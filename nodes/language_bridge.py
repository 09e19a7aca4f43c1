"""The one node: MODEL and CLIP in, MODEL and CLIP that understand another language out."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import folders

ROUTES = ["two streams", "native only", "english only"]


class LanguageBridge(io.ComfyNode):
    """Puts a published or self-trained bridge between a checkpoint and the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Two model sockets, the bridge, its strength and the route."""
        return io.Schema(
            node_id="LanguageBridge",
            display_name="Language Bridge",
            category="Language Bridge",
            description="Put this node after Load Checkpoint, "
            "and every node behind it understands your language.",
            search_aliases=[
                "chinese prompt",
                "multilingual",
                "translate prompt",
                "text encoder",
                "\u4e2d\u6587\u63d0\u793a\u8bcd",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of an SD1.x, SD2.x or SDXL checkpoint."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint; it is kept whole."),
                io.Combo.Input(
                    "bridge",
                    options=folders.bridge_names(),
                    tooltip="A bridge file of the folder models/language_bridges.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Weight of the native text. 0 is exactly as if this node were not there.",
                ),
                io.Combo.Input(
                    "route",
                    options=ROUTES,
                    default=ROUTES[0],
                    tooltip="two streams: native text goes over the bridge, "
                    "English words to the checkpoint's own CLIP.",
                ),
                io.Clip.Input(
                    "tower",
                    optional=True,
                    tooltip="Only for bridges that read a text encoder of ComfyUI: the CLIP of CLIPLoader.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The MODEL, with whatever the bridge adds to it."),
                io.Clip.Output("CLIP", tooltip="A CLIP that understands both languages."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, bridge: str, **_: object) -> str:
        """A bridge or tower file that was replaced is read again."""
        try:
            facts = [path.stat() for path in folders.files_of(bridge)]
        except (OSError, ValueError):
            return bridge
        return f"{bridge} {[(fact.st_size, fact.st_mtime_ns) for fact in facts]}"

    @classmethod
    def execute(
        cls, model: object, clip: object, bridge: str, strength: float, route: str, tower: object = None
    ) -> io.NodeOutput:
        """Checks that everything belongs together, then bridges clones of MODEL and CLIP."""
        if strength == 0.0 or route == "english only":
            return io.NodeOutput(model, clip)
        from ..host import bridging

        return io.NodeOutput(*bridging.bridge(model, clip, bridge, strength, route, tower))
