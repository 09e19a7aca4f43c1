"""The one node: MODEL and CLIP in, MODEL and CLIP that understand another language out."""

from __future__ import annotations

from comfy_api.latest import io

from ..conversion import VERSION
from ..host import folders, travel

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
                io.Model.Input(
                    "model", lazy=True, tooltip="The MODEL of an SD1.x, SD2.x or SDXL checkpoint."
                ),
                io.Clip.Input(
                    "clip", lazy=True, tooltip="The CLIP of the same checkpoint; it is kept whole."
                ),
                io.Combo.Input(
                    "bridge",
                    options=folders.bridge_names(),
                    tooltip="A bridge file of the folder models/language_bridges.",
                    extra_dict={
                        "records": travel.records(VERSION)
                    },  # what web/identity.js keeps in the graph
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
                    lazy=True,
                    tooltip="Only for bridges that read a text encoder of ComfyUI: the CLIP of CLIPLoader.",
                ),
                io.String.Input(
                    "identity",
                    default="",
                    optional=True,
                    socketless=True,
                    tooltip="What the bridge's file name means, for other machines: written by the pack.",
                    extra_dict={"hidden": True},
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The MODEL, with whatever the bridge adds to it."),
                io.Clip.Output("CLIP", tooltip="A CLIP that understands both languages."),
            ],
        )

    @classmethod
    def validate_inputs(cls, bridge: object = None) -> bool | str:
        """Any name passes, listed or not: on another machine the same bridge has another name (`travel`)."""
        return True if bridge is None or isinstance(bridge, str) else "the name of a bridge file is a text"

    @classmethod
    def check_lazy_status(
        cls, bridge: str, strength: float, route: str, identity: str = "", **sockets: object
    ) -> list[str]:
        """All that is connected; but first a bridge that is not here stops, before a checkpoint is loaded."""
        if not is_off(strength, route):
            travel.resolve(bridge, identity)
        return [name for name, value in sockets.items() if value is None]

    @classmethod
    def fingerprint_inputs(cls, bridge: str | None, identity: str = "", **_: object) -> str:
        """A bridge of another content, or a tower that was replaced, is read again."""
        return travel.fingerprint(bridge, identity)

    @classmethod
    def execute(
        cls,
        model: object,
        clip: object,
        bridge: str,
        strength: float,
        route: str,
        tower: object = None,
        identity: str = "",
    ) -> io.NodeOutput:
        """Checks that everything belongs together, then bridges clones of MODEL and CLIP."""
        if is_off(strength, route):
            return io.NodeOutput(model, clip)
        from ..host import bridging

        return io.NodeOutput(*bridging.bridge(model, clip, bridge, strength, route, tower, identity))


def is_off(strength: float, route: str) -> bool:
    """Whether the node hands on what it got; then no bridge is needed."""
    return strength == 0.0 or route == ROUTES[2]
