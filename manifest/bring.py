"""Brings a published set all the way, fetched, checked, converted once, remembered; says what is there.

This room knows no converter: the caller hands one over, and install.py and the node hand over the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from . import fetch
from .connection import Wire
from .download import Pace, Progress
from .errors import FetchError, Stopped
from .lock import Lock, read_lock
from .part import ENDING
from .schema import DOWNLOADS, Manifest, PublishedSet, RemoteFile, WeightFile
from .verify import check

BRIDGES = "language_bridges"
TOWERS = "text_encoders"
LOOKED_AT = (BRIDGES, TOWERS, DOWNLOADS, "checkpoints", "controlnet", "diffusion_models", "vae")
"""Model folders in which a file of known hash is looked for before it is fetched."""

HERE, OWN, FETCHED, BEGUN, FETCHABLE, BY_HAND = STATES = (
    "here",
    "own",
    "fetched",
    "begun",
    "fetchable",
    "by hand",
)
"""Of a set: fetched and usable; usable as a file that came another way; fetched and not converted; partly
there; on no disk of ours; not to be had from here."""

_TICK_SECONDS = 0.1
_CONVERTING = threading.Lock()


class Converter(Protocol):
    """What `conversion.convert.convert` is to this room."""

    def __call__(
        self,
        paths: Sequence[Path],
        out: Path,
        *,
        towers: Path,
        preset: str,
        reference: Path | None,
        unet: str,
        form: str,
        name: str,
        overwrite: bool,
        between: Callable[[], None],
    ) -> Sequence[Path]: ...


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    agreed: the licences were read; trusting: pickles of unknown hash are taken. converts: make our own files.
    reference: the checkpoint that a U-Net was trained from. form: "replace" or "delta". cleans: delete what
    was fetched once it is converted. again: convert again, and overwrite. roots: category -> model folders,
    for what was moved or put there by hand; look: further folders with files that the user fetched.
    """

    agreed: bool = False
    trusting: bool = False
    converts: bool = True
    reference: Path | None = None
    form: str = "replace"
    cleans: bool = False
    again: bool = False
    roots: Mapping[str, Sequence[Path]] = field(default_factory=lambda: dict[str, Sequence[Path]]())
    look: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Brought:
    """What became of a wish.

    already: it was whole before, and nothing was done. written: files that were made. left: needed sets that
    cannot be fetched from here. unverified: files that were trusted on first use. cleaned: whether what was
    fetched is deleted.
    """

    already: bool = False
    written: tuple[Path, ...] = ()
    left: tuple[PublishedSet, ...] = ()
    unverified: tuple[RemoteFile, ...] = ()
    cleaned: bool = False


def bring(
    manifest: Manifest,
    name: str,
    models: Path,
    wish: Wish,
    *,
    converter: Callable[[], Converter | None],
    environ: Mapping[str, str] | None = None,
    wire: Wire | None = None,
    pace: Pace | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[RemoteFile], Progress] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Brought:
    """Fetch a set and what it needs below `models`, check every file, convert it once.

    converter: called after everything was fetched and checked; None = there is none, which is an error then.
    The other keywords are those of `fetch.fetch_set`. When `stopped` says so during the conversion, this
    returns at once; the thread that converts ends at its next step, writes nothing, and the next call waits
    for it.

    Raises:
        FetchError: what `fetch.fetch_set` refuses; a reference or a converter is missing.
        Stopped: `stopped` said so; the next call goes on there.
    """
    wanted = fetch.find(manifest, name)
    if not wish.again and is_made(read_lock(models), wanted.name, models, wish.roots, stopped):
        return Brought(already=True)
    how = wanted.conversion if wish.converts else None
    if how is not None and how.reference and wish.reference is None:
        raise FetchError(
            f"{wanted.name} is compared with {how.reference}.",
            "no checkpoint named",
            "that checkpoint",
            "Name it (--reference FILE, or reference in the node), or fetch only (--no-convert).",
        )
    haul = fetch.fetch_set(
        manifest,
        wanted.name,
        models,
        agreed=wish.agreed,
        trusting=wish.trusting,
        environ=environ,
        wire=wire,
        pace=pace,
        say=say,
        progress=progress,
        stopped=stopped,
        look=[*_folders(models, wish.roots), *wish.look],
    )
    left = tuple(item for item in manifest.with_needs(wanted) if item.by_hand)
    if how is None:
        return Brought(left=left, unverified=haul.unverified)
    make = converter()
    if make is None:
        raise FetchError(
            f"{wanted.name} is fetched, and cannot be converted here.",
            "a Python without torch",
            "the Python that ComfyUI runs in",
            "Run the same command with it.",
        )
    conversion = how

    def work(between: Callable[[], None]) -> tuple[Path, ...]:
        known = read_lock(models)
        if not wish.again and is_made(
            known, wanted.name, models, wish.roots
        ):  # one that was stopped too late
            return tuple(models / item.path for item in known.made[wanted.name])
        written = make(
            fetch.given_to_converter(wanted, haul.sets, models),
            models / BRIDGES,
            towers=models / TOWERS,
            preset=conversion.preset,
            reference=wish.reference,
            unet=conversion.unet,
            form=wish.form,
            name=wanted.name,
            overwrite=wish.again,
            between=between,
        )
        fetch.record_made(models, wanted.name, written)
        return tuple(written)

    written = _convert(work, stopped)
    if wish.cleans:
        for file, fetched in haul.files:
            if not file.to:
                fetched.path.unlink()
    return Brought(False, written, left, haul.unverified, wish.cleans)


def is_made(
    lock: Lock,
    name: str,
    models: Path,
    roots: Mapping[str, Sequence[Path]],
    stopped: Callable[[], bool] | None = None,
) -> bool:
    """Whether what was made of a set is there, every byte of it; Stopped when `stopped` says so."""
    made = lock.made.get(name, ())
    for item in made:
        path = _found(item.path, models, roots)
        if check(path.parent, WeightFile(path.name, item.bytes, item.sha256), stopped) is not None:
            return False
    return bool(made)


def state_of(
    manifest: Manifest,
    item: PublishedSet,
    lock: Lock,
    models: Path,
    roots: Mapping[str, Sequence[Path]],
    known: Collection[str] = (),
) -> str:
    """One of `STATES`, by names and sizes alone: nothing is hashed.

    known: what headers of bridges and towers say that they are, by its name in the converter's table.
    """
    made = lock.made.get(item.name, ())
    if made and all(_size(_found(one.path, models, roots)) == one.bytes for one in made):
        return HERE
    if (item.conversion.preset if item.conversion else item.name) in known:
        return OWN
    if item.by_hand:
        return BY_HAND
    files = [file for one in manifest.with_needs(item) for file in one.files]
    there = [_fits(_found(file.place, models, roots), file) for file in files]
    if all(there):
        return HERE if item.conversion is None else FETCHED
    begun = any(there) or any(_size(models / f"{file.place}{ENDING}") for file in files)
    return BEGUN if begun else FETCHABLE


def size_of(sets: Iterable[PublishedSet]) -> tuple[int, bool]:
    """Bytes of all files of some sets as far as they are known, and whether all of them are."""
    known = [file.most_bytes for item in sets for file in item.files]
    return sum(size or 0 for size in known), all(known)


def _convert(
    work: Callable[[Callable[[], None]], tuple[Path, ...]], stopped: Callable[[], bool] | None
) -> tuple[Path, ...]:
    """What `work` returns; in a thread of its own where somebody may stop it: single steps are long."""
    if stopped is None:
        with _CONVERTING:
            return work(lambda: None)
    ended = threading.Event()
    outcome: list[tuple[Path, ...] | BaseException] = []

    def between() -> None:
        if ended.is_set():
            raise Stopped("while it was converted")

    def run() -> None:
        try:
            with _CONVERTING:
                between()
                outcome.append(work(between))
        except BaseException as error:  # handed to the one who waits
            outcome.append(error)

    thread = threading.Thread(target=run, name="language-bridge-conversion", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_TICK_SECONDS)
        if thread.is_alive() and stopped():
            ended.set()
            raise Stopped("while it was converted")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _folders(models: Path, roots: Mapping[str, Sequence[Path]]) -> list[Path]:
    return [path for name in LOOKED_AT for path in roots.get(name) or (models / name,)]


def _found(place: str, models: Path, roots: Mapping[str, Sequence[Path]]) -> Path:
    """Where a file lies that belongs to this place: there, or in another folder of the same category."""
    category, _, rest = place.partition("/")
    there = (root / rest for root in (models / category, *roots.get(category, ())))
    return next((path for path in there if path.is_file()), models / place)


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _fits(path: Path, file: RemoteFile) -> bool:
    size = _size(path)
    return bool(size) and file.least_bytes <= size <= (file.most_bytes or size)
