"""Fetches a published set with all that it needs, and compares with manifest and lock file what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .adopt import adopt
from .connection import Wire
from .download import Fetched, Pace, Progress, Wanted, download
from .errors import FetchError
from .lock import Lock, Made, Record, read_lock, write_lock
from .schema import DOWNLOADS, Manifest, PublishedSet, RemoteFile, WeightFile
from .sources import addresses, is_chosen, token
from .sources import wire as allowed_wire
from .verify import Problem, check, measure


@dataclass(frozen=True)
class Haul:
    """What a fetched set consists of: the sets (the wanted one first) and each file as it lies there."""

    sets: tuple[PublishedSet, ...]
    files: tuple[tuple[RemoteFile, Fetched], ...]

    @property
    def unverified(self) -> tuple[RemoteFile, ...]:
        """Files whose hash the manifest does not know."""
        return tuple(file for file, _ in self.files if not file.sha256)


def fetch_set(
    manifest: Manifest,
    name: str,
    models: Path,
    *,
    agreed: bool = False,
    trusting: bool = False,
    environ: Mapping[str, str] | None = None,
    wire: Wire | None = None,
    pace: Pace | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[RemoteFile], Progress] | None = None,
    stopped: Callable[[], bool] | None = None,
    look: Sequence[Path] = (),
) -> Haul:
    """Fetch a published set, and the sets that it needs, below ComfyUI's `models` folder.

    agreed: the user has read the licences of sets that ask for consent. trusting: the user accepts pickles
    whose hash nobody has verified. Sources and token come from the environment at each file. `say` gets a
    line for each file, `progress` makes the callback of one file. look: folders in which a file of known hash
    is looked for first, whatever its name there.

    Raises:
        FetchError: unknown name, consent or trust is missing, or a file could not be fetched whole.
        Stopped: `stopped` said so; the next call goes on there.
    """
    wanted = find(manifest, name)
    if wanted.by_hand:
        raise FetchError(
            f"{name} cannot be fetched by this command.", wanted.by_hand, "a list of its files", wanted.card
        )
    sets = tuple(item for item in manifest.with_needs(wanted) if item.files)
    _require_consent(sets, agreed)
    lock = read_lock(models)
    files = tuple(dict.fromkeys(file for item in sets for file in item.files))
    _require_trust(files, lock, trusting)
    gated = {file for item in sets if item.gated for file in item.files}
    got: list[tuple[RemoteFile, Fetched]] = []
    for file in files:
        known = lock.files.get(file.place)
        digest = file.sha256 or (known.sha256 if known and known.key == file.key else "")
        places = addresses(file, environ)
        if not digest:
            places = [place for place in places if is_chosen(place.source, environ)]
        asked = Wanted(file.key, file.least_bytes, file.most_bytes, digest)
        fetched = adopt(look, models / file.place, asked, stopped=stopped) or download(
            places,
            models / file.place,
            asked,
            wire=wire or allowed_wire(environ),
            token=token(environ) if file in gated else "",
            pace=pace,
            progress=progress(file) if progress else None,
            stopped=stopped,
        )
        told = fetched.told or bool(known and known.told)
        source = fetched.source or (known.source if known else "was there")
        record = Record(file.key, fetched.bytes, fetched.sha256, source, bool(file.sha256), told)
        if lock.files.get(file.place) != record:
            lock = read_lock(models).with_file(file.place, record)
            write_lock(models, lock)
        if say is not None:
            say(f"{file.place}: {fetched.bytes} bytes from {source}, {_trust(record, known)}")
        got.append((file, fetched))
    return Haul((wanted, *(item for item in sets if item != wanted)), tuple(got))


def find(manifest: Manifest, name: str) -> PublishedSet:
    """The published set of that name; FetchError with the known names when there is none."""
    found = manifest.find(name)
    if found is None:
        raise FetchError(
            "There is no published set of that name.",
            repr(name)[:80],
            f"one of {', '.join(item.name for item in manifest.published)}",
            "Choose one of them: install.py list.",
        )
    return found


def unknown_pickles(files: Sequence[RemoteFile], lock: Lock) -> list[RemoteFile]:
    """Pickles whose hash nobody knows: neither the manifest nor the lock file."""
    return [
        file
        for file in files
        if file.is_pickle and not file.sha256 and getattr(lock.files.get(file.place), "key", "") != file.key
    ]


def given_to_converter(wanted: PublishedSet, sets: Sequence[PublishedSet], models: Path) -> list[Path]:
    """The paths that belong together for the converter, of a set and those that it needs.

    A path below a file of the set is found where that file lies; "." is the folder of its repository.
    """
    paths: list[Path] = []
    for item in (wanted, *(one for one in sets if one != wanted)):
        if item.conversion is None:
            continue
        for given in item.conversion.give:
            for file in item.files:
                folder = models / DOWNLOADS / file.repo.replace("/", "--")
                if given == file.path:
                    paths.append(models / file.place)
                    break
                if given == "." or file.path.startswith(f"{given}/"):
                    paths.append(folder if given == "." else folder / given)
                    break
    return paths


def record_made(models: Path, name: str, written: Sequence[Path]) -> None:
    """Write into the lock file what was made of a set."""
    made = tuple(
        Made(path.relative_to(models).as_posix(), path.stat().st_size, measure(path.parent, path.name).sha256)
        for path in written
        if path.is_relative_to(models)
    )
    write_lock(models, read_lock(models).with_made(name, made))


def set_problems(
    manifest: Manifest, name: str, models: Path, stopped: Callable[[], bool] | None = None
) -> Iterator[Problem]:
    """What is wrong with the files of a set. Published files may be gone when what was made of them is whole.

    Raises:
        FetchError: no set of that name, or the lock file is damaged. Stopped: `stopped` said so.
    """
    wanted, lock = find(manifest, name), read_lock(models)
    made = lock.made.get(name, ())
    whole = [check(models, WeightFile(item.path, item.bytes, item.sha256), stopped) for item in made]
    yield from (problem for problem in whole if problem is not None)
    spare = bool(made) and not any(whole)
    for item in manifest.with_needs(wanted):
        for file in item.files:
            problem = file_problem(file, lock, models, stopped)
            if problem is not None and not (spare and not (models / file.place).exists()):
                yield problem


def file_problem(
    file: RemoteFile, lock: Lock, models: Path, stopped: Callable[[], bool] | None = None
) -> Problem | None:
    """What is wrong with one published file as it lies below the models folder."""
    known = lock.files.get(file.place)
    if not (models / file.place).is_file():
        return Problem(
            file.place, "nothing", file.shown or f"a file of {file.bytes or 'any number of'} bytes"
        )
    size = (models / file.place).stat().st_size
    digest = file.sha256 or (known.sha256 if known and known.key == file.key else "")
    if not digest:
        return Problem(
            file.place, "a file that was never fetched and has no known hash", "one that was fetched"
        )
    if file.bytes and size != file.bytes:
        return Problem(file.place, f"{size} bytes", f"{file.bytes} bytes")
    return check(models, WeightFile(file.place, size, digest), stopped)


def _trust(record: Record, before: Record | None) -> str:
    if record.pinned:
        return "verified"
    if before is not None and before.key == record.key:
        return "the same as when it was first fetched"
    told = ", as its source told it" if record.told else ""
    return f"NOT verified: trusted on first use{told} (SHA-256 {record.sha256})"


def _require_consent(sets: Sequence[PublishedSet], agreed: bool) -> None:
    asking = [item for item in sets if item.consent]
    if asking and not agreed:
        raise FetchError(
            "The licence has to be read first.",
            "; ".join(
                f"{item.name}: {item.licence or 'no licence declared'}, {item.card}" for item in asking
            ),
            "your consent",
            "Read the pages. If you agree, say so: --agree, or the box of the node.",
        )


def _require_trust(files: Sequence[RemoteFile], lock: Lock, trusting: bool) -> None:
    unknown = unknown_pickles(files, lock)
    if unknown and not trusting:
        raise FetchError(
            "The hash of a pickle is not known to this version.",
            ", ".join(file.key for file in unknown),
            "a file that somebody has verified, or your word that you trust it",
            "Compare it with its page, and say that you trust what is fetched first: --trust-first-use, "
            "or the box of the node. "
            "It is opened weights-only, and its hash is kept in the lock file.",
        )
