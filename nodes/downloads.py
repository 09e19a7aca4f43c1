"""The node that lists published weights, and fetches, checks and converts a set when the user asks for it.

What `install.py list | get | verify` does, through the same functions; the settings panel of the page queues
this node. No input is an address or a path: sets come from the manifest, everything else from fixed lists.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..bridges.errors import BridgeError
from ..host import folders, page
from ..host.doctor import PACK, roots
from ..host.language import LANGUAGES
from ..manifest import bring, fetch, sources
from ..manifest.download import Progress
from ..manifest.errors import FetchError, Stopped
from ..manifest.lock import Lock, read_lock
from ..manifest.schema import DOWNLOADS, Manifest, ManifestError, PublishedSet, RemoteFile, parse

LIST, GET, VERIFY = ACTIONS = ["list", "get", "verify"]
NOTHING = "none"
AS_SET = "as set"
ORDERS = (
    "hub,mirror,modelscope",
    "mirror,modelscope,hub",
    "modelscope,mirror,hub",
    "mirror,modelscope",
    "hub",
)
"""What the node and the page offer; any other order can be set in the environment, which goes first."""
SETTING = "LanguageBridge.Downloads.Sources"
"""Under this name the page keeps the user's order."""
USUAL = "usual"
"""What it keeps for the order that is used where nobody chose one."""
PRECISIONS = ["as published", "float16"]
FACTS = "language_bridge_sets"
"""Where the page finds the list: beside the options of `set`, and in what a run shows."""

_CHECKPOINTS = "checkpoints"


class Downloads(io.ComfyNode):
    """The name of a set in; the graph gets the report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Everything is chosen from lists; consent is given in the node, for each run, and nowhere else."""
        manifest = read_manifest()
        names = [item.name for item in manifest.published]
        facts = {FACTS: facts_of(manifest)}
        return io.Schema(
            node_id="LanguageBridgeDownloads",
            display_name="Language Bridge Downloads",
            category="Language Bridge",
            description="Lists published weights, fetches one set, checks its hashes and converts it. "
            "Nothing is fetched before you choose get and queue.",
            search_aliases=["download", "fetch weights", "model manager", "\u4e0b\u8f7d"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Combo.Input(
                    "set",
                    options=names,
                    tooltip="A published set of weights; what it needs comes with it.",
                    extra_dict=facts,
                ),
                io.Combo.Input(
                    "action",
                    options=ACTIONS,
                    default=LIST,
                    tooltip="list: what there is, and what of it is here. get: fetch, check and convert the "
                    "set. verify: hash its files again.",
                ),
                io.Combo.Input(
                    "sources",
                    options=[AS_SET, *ORDERS],
                    default=AS_SET,
                    tooltip="Which sources are asked, in which order. as set: the settings of the page. "
                    "LANGUAGE_BRIDGE_SOURCES goes before both.",
                ),
                io.Combo.Input(
                    "reference",
                    options=[NOTHING, *folder_paths.get_filename_list(_CHECKPOINTS)],
                    default=NOTHING,
                    tooltip="For AltDiffusion: the SD 1.4 checkpoint that its U-Net was trained from.",
                ),
                io.Combo.Input(
                    "precision",
                    options=PRECISIONS,
                    default=PRECISIONS[0],
                    tooltip="float16 halves the files of models published in float32.",
                ),
                io.Boolean.Input(
                    "clean", default=False, tooltip="Delete what was fetched once it is converted."
                ),
                io.Boolean.Input(
                    "again", default=False, tooltip="Convert again, and overwrite what was converted."
                ),
                io.Combo.Input(
                    "language",
                    options=LANGUAGES,
                    default=LANGUAGES[0],
                    tooltip="Of the report. auto is the language of the page.",
                ),
                io.Boolean.Input(
                    "agree",
                    default=False,
                    tooltip="I have read the licences of this set, and agree. Never saved with a workflow.",
                ),
                io.Boolean.Input(
                    "trust_first_use",
                    default=False,
                    tooltip="Fetch pickles whose hash nobody has verified. They are opened weights-only. "
                    "Never saved with a workflow.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="What was found, fetched and written.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> float:
        """Files change without the graph: every run looks again."""
        return time.time()

    @classmethod
    def execute(
        cls,
        set: str,
        action: str,
        sources: str,
        reference: str,
        precision: str,
        clean: bool,
        again: bool,
        language: str,
        agree: bool,
        trust_first_use: bool,
    ) -> io.NodeOutput:
        """Looks every choice up in its list again, because a linked text was never compared with it."""
        from ..host.language import words

        _require(action, ACTIONS)
        _require(precision, PRECISIONS)
        manifest, models, say = read_manifest(), models_folder(), words(language)
        environ, why = environment(sources)
        with stoppable() as stopped, _without_places(models):
            if action == LIST:
                lines = list_lines(manifest, models, environ, why, say)
            elif action == VERIFY:
                lines = _verify(manifest, set, models, stopped, say)
            else:
                wish = bring.Wish(
                    agreed=agree is True,
                    trusting=trust_first_use is True,
                    reference=_checkpoint(reference),
                    cleans=bool(clean),
                    again=bool(again),
                    roots=roots(bring.LOOKED_AT),
                )
                half = precision == PRECISIONS[1]
                node = getattr(cls.hidden, "unique_id", None)
                lines = _get(manifest, set, models, wish, half, environ, node, stopped, say)
        text = "\n".join(lines)
        return io.NodeOutput(text, ui={"text": (text,), FACTS: facts_of(manifest)})


def read_manifest() -> Manifest:
    """The pack's own manifest, empty where it is damaged: the doctor then says so."""
    try:
        return parse((PACK / "weights_manifest.json").read_text(encoding="utf-8"))
    except (OSError, ManifestError) as error:
        logging.warning("Language Bridge: %s", error)
        return Manifest(())


def models_folder() -> Path:
    """ComfyUI's models folder, which everything is fetched into."""
    return Path(folder_paths.models_dir)


def environment(chosen: str = AS_SET) -> tuple[Mapping[str, str], str]:
    """The environment that the downloader reads, with the chosen order of sources, and who chose it.

    chosen: an order of `ORDERS`, or `AS_SET` for the one in the settings of the page. The real environment
    goes before both. Read anew for every run.
    """
    values = dict(os.environ)
    if values.get("LANGUAGE_BRIDGE_SOURCES", "").strip(" ,"):
        return values, "environment"
    asked, why = (chosen, "node") if chosen != AS_SET else (page.chosen(SETTING), "page")
    if asked not in ("", USUAL):
        _require(asked, ORDERS)
        return values | {"LANGUAGE_BRIDGE_SOURCES": asked}, why
    return values, "environment" if values.get("HF_ENDPOINT") else "default"


@contextmanager
def stoppable() -> Generator[Callable[[], bool], None, None]:
    """Whether the user has stopped the run; what then raises Stopped ends as every stopped node does."""
    import comfy.model_management as management  # late: it looks for devices

    try:
        yield management.processing_interrupted
    except Stopped:
        management.throw_exception_if_processing_interrupted()  # takes the mark away
        raise management.InterruptProcessingException() from None


def facts_of(manifest: Manifest) -> list[dict[str, object]]:
    """What the page shows of each set: no path, no address but the page of its licence."""
    models, known, converted = models_folder(), roots(bring.LOOKED_AT), converted_here()
    try:
        lock = read_lock(models)
    except FetchError:
        lock = Lock()
    facts: list[dict[str, object]] = []
    for item in manifest.published:
        sets = manifest.with_needs(item)
        size, whole = bring.size_of(sets)
        facts.append(
            {
                "name": item.name,
                "base": item.base,
                "bytes": size,
                "all_sizes_known": whole and bool(item.files),
                "licence": item.licence,
                "asks": [
                    {"name": one.name, "licence": one.licence, "card": one.card}
                    for one in sets
                    if one.consent and one.files
                ],
                "trust": bool(fetch.unknown_pickles([f for one in sets for f in one.files], lock)),
                "reference": item.conversion.reference if item.conversion else "",
                "card": item.card,
                "state": bring.state_of(manifest, item, lock, models, known, converted),
            }
        )
    return facts


def converted_here() -> frozenset[str]:
    """What the bridges and towers here say that they were converted as; their file names do not matter."""
    names = {tower.identity for _, tower in folders.towers()}
    for _, _, header in folders.headers():
        record = header.training.get("conversion")
        if isinstance(record, Mapping):
            names.add(str(record.get("preset")))
    return frozenset(names)


def list_lines(
    manifest: Manifest, models: Path, environ: Mapping[str, str], why: str, say: Callable[..., str]
) -> list[str]:
    """The list of published sets with their states, and the sources that would be asked."""
    lock, known = read_lock(models), roots(bring.LOOKED_AT)
    converted = converted_here()
    states = {
        item.name: bring.state_of(manifest, item, lock, models, known, converted)
        for item in manifest.published
    }
    count = {state: list(states.values()).count(state) for state in bring.STATES}
    lines = [
        say(
            "downloads_head",
            here=count[bring.HERE] + count[bring.OWN],
            fetchable=count[bring.FETCHABLE] + count[bring.BEGUN] + count[bring.FETCHED],
            by_hand=count[bring.BY_HAND],
        ),
        say(
            "downloads_sources",
            order=", ".join(sources.order(environ)),
            why=say(f"downloads_why_{why}"),
        ),
        "",
    ]
    for item in manifest.published:
        state = states[item.name]
        lines.append(
            say(
                "downloads_line",
                mark="+" if state in (bring.HERE, bring.OWN) else "-",
                name=item.name,
                base=item.base or say("downloads_tower"),
                size=_size(item),
                licence=item.licence or say("downloads_no_licence"),
                state=say(f"downloads_state_{state.replace(' ', '_')}"),
            )
        )
    return lines


def _size(item: PublishedSet) -> str:
    size, whole = bring.size_of([item])
    return "" if not item.files else f"{'' if whole else '> '}{size / 1e9:.2f} GB"


def _verify(
    manifest: Manifest, name: str, models: Path, stopped: Callable[[], bool], say: Callable[..., str]
) -> list[str]:
    wanted = fetch.find(manifest, name)
    wrong = list(fetch.set_problems(manifest, name, models, stopped))
    if not wrong:
        count = sum(len(item.files) for item in manifest.with_needs(wanted))
        return [say("downloads_verified", name=name, count=count)]
    lines = [say("downloads_wrong", name=name, count=len(wrong))]
    lines += [
        "  " + say("downloads_problem", path=one.path, found=one.found, expected=one.expected)
        for one in wrong
    ]
    return [*lines, say("downloads_wrong_do")]


def _get(
    manifest: Manifest,
    name: str,
    models: Path,
    wish: bring.Wish,
    half: bool,
    environ: Mapping[str, str],
    node: str | None,
    stopped: Callable[[], bool],
    say: Callable[..., str],
) -> list[str]:
    import torch

    from ..conversion.convert import convert, report

    meter = _Meter(node, stopped, say)

    def converter() -> bring.Converter:
        meter.tell(say("downloads_converting", name=name))
        return functools.partial(convert, dtype=torch.float16 if half else None)

    done = bring.bring(
        manifest,
        name,
        models,
        wish,
        converter=converter,
        environ=environ,
        say=lambda line: logging.info("Language Bridge: %s", line),
        progress=meter.of,
        stopped=meter.stopped,
    )
    if done.already:
        return [say("downloads_already", name=name)]
    lines = [say("downloads_fetched", name=name)]
    lines += [say("downloads_unverified", path=file.place) for file in done.unverified]
    lines += [say("downloads_left", name=item.name, why=item.by_hand, card=item.card) for item in done.left]
    if done.written:
        lines += [line.replace(str(models), models.name) for line in report(done.written)]
        lines.append(say("downloads_cleaned") if done.cleaned else say("downloads_spare", folder=DOWNLOADS))
        lines.append(say("downloads_refresh"))
    return lines


class _Meter:
    """Progress of one file after the other, in the node and on the console."""

    def __init__(self, node: str | None, stopped: Callable[[], bool], say: Callable[..., str]) -> None:
        self._node, self._asked, self._say = node, stopped, say
        self._interrupted = False

    def stopped(self) -> bool:
        """Whether the user has stopped the run. The host's mark vanishes when a progress bar has seen it."""
        return self._interrupted or self._asked()

    def of(self, file: RemoteFile) -> Progress:
        """The callback of one file."""
        import comfy.utils
        from comfy.model_management import InterruptProcessingException

        bar, tenth = comfy.utils.ProgressBar(file.most_bytes or 1, node_id=self._node), [-1]

        def show(done: int, total: int) -> None:
            try:
                bar.update_absolute(done, max(total, done, 1))
            except InterruptProcessingException:
                self._interrupted = True
            text = self._say(
                "downloads_file",
                path=file.path,
                done=f"{done / 1e6:.1f}",
                total=f"{total / 1e6:.1f}" if total else "?",
            )
            self.tell(text, log=False)
            step = 10 * done // total if total else done >> 28
            if step != tenth[0]:
                tenth[0] = step
                logging.info("Language Bridge: %s", text)

        return show

    def tell(self, text: str, *, log: bool = True) -> None:
        """A line below the node, and on the console."""
        if log:
            logging.info("Language Bridge: %s", text)
        # Not imported: where the host's server does not run, there is no page to tell.
        running: Any = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if running is not None and self._node is not None:
            running.send_progress_text(text, self._node)


@contextmanager
def _without_places(models: Path) -> Generator[None, None, None]:
    """Errors name files below the models folder, not where that folder is."""
    try:
        yield
    except (FetchError, BridgeError) as error:
        parts = (error.what, error.found, error.expected, error.action)
        raise type(error)(*(part.replace(str(models), models.name) for part in parts)) from None


def _checkpoint(name: str) -> Path | None:
    if name == NOTHING:
        return None
    _require(name, folder_paths.get_filename_list(_CHECKPOINTS))
    path = folder_paths.get_full_path(_CHECKPOINTS, name)
    if path is None:
        _require(name, [])
    return Path(str(path))


def _require(value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise BridgeError(
            "The choice is not in the list of this node.",
            repr(value)[:120],
            f"one of {', '.join(allowed)}"[:400],
            "Press R in the browser to refresh, and choose again.",
        )
