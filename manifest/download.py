"""Fetches one file: asks the sources in turn, resumes, checks what arrives, lets no wrong file through."""

from __future__ import annotations

import email.utils
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult

from .connection import Answer, Broken, Exchange, Refused, Wire
from .errors import FetchError, Stopped
from .part import Part, State
from .sources import Address
from .verify import sha256

CEILING_BYTES = 64 << 30
"""The most that a file of unknown size may have."""
TICK_SECONDS = 0.1
AGENT = "language-bridge (ComfyUI)"
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same question may be asked again."""

_DIGITS = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STRONG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')
_LFS = b"version https://git-lfs"

Progress = Callable[[int, int], None]
"""Called with bytes there and bytes of the whole file (0 = not known), at most five times a second."""


@dataclass(frozen=True)
class Pace:
    """How patient a download is.

    stall_seconds, least_bytes: a connection that brings fewer bytes in that time is given up. tries: without
    progress, for each source; blind_tries: of a source that never answered. pauses: before the second try,
    doubled each time. longest_wait: the most seconds that a server may ask to be left alone. save_bytes: how
    often the state goes to the disk, which is the most that a crash costs. progress_bytes: what counts as
    progress.
    """

    stall_seconds: float = 30.0
    least_bytes: int = 1024
    tries: int = 5
    blind_tries: int = 2
    first_pause: float = 1.0
    longest_pause: float = 30.0
    longest_wait: float = 120.0
    save_bytes: int = 8 << 20
    progress_bytes: int = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """What is asked for: what identifies it, its limits of size in bytes, its SHA-256 ("" = not known)."""

    key: str
    least_bytes: int = 1
    most_bytes: int | None = None
    sha256: str = ""


@dataclass(frozen=True)
class Fetched:
    """A file that is there and was checked.

    source: which source gave it, "" when it lay there before. told: whether that source told the same
    SHA-256. kept_bytes: how many bytes of an earlier, unfinished download were used.
    """

    path: Path
    bytes: int
    sha256: str
    source: str
    told: bool = False
    kept_bytes: int = 0


def download(
    addresses: Sequence[Address],
    target: Path,
    wanted: Wanted,
    *,
    wire: Wire,
    token: str = "",
    pace: Pace | None = None,
    progress: Progress | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Fetched:
    """Fetch a file from the first address that gives it whole; what has arrived survives every failure.

    A file that is there already is checked and kept. Nothing that failed a check ever has the name of the
    target. `stopped` is asked ten times a second.

    Raises:
        FetchError: no address gave the file, the disk is full, or another file lies there.
        Stopped: `stopped` said so; the next call goes on where this one ended.
    """
    if target.exists() or target.is_symlink():
        return check_present(target, wanted, stopped)
    failures: list[str] = []
    with Part(target, wanted.key, stopped) as part:
        kept = part.size
        job = _Job(part, wanted, wire, token, pace or Pace(), progress, stopped or _never)
        for address in addresses:
            try:
                told = job.fetch_from(address)
            except Refused as error:
                failures.append(f"{address.source}: {error}")
                continue
            part.finish()
            kept = min(kept, job.kept_bytes)
            return Fetched(target, part.size, part.sha256, address.source, told, kept)
    raise FetchError(
        f"{target.name} could not be fetched.",
        "; ".join(failures) or "no source that has it",
        "the file, whole",
        _advice(failures),
    )


def check_present(target: Path, wanted: Wanted, stopped: Callable[[], bool] | None = None) -> Fetched:
    """The file that lies there already, when it can be the one that is wanted; FetchError when it cannot."""
    if not target.is_file():
        found = "something that is no file"
    else:
        size, found = target.stat().st_size, ""
        if not wanted.least_bytes <= size <= (wanted.most_bytes or CEILING_BYTES):
            found = f"{size} bytes"
        else:
            digest = sha256(target, stopped)
            if wanted.sha256 in ("", digest):
                return Fetched(target, size, digest, "")
            found = f"SHA-256 {digest}"
    raise FetchError(
        f"Another file lies where {target.name} belongs.",
        f"{found}, {target}",
        f"SHA-256 {wanted.sha256}" if wanted.sha256 else f"{_limits(wanted)} bytes",
        "Move that file away, and fetch again.",
    )


def _never() -> bool:
    return False


class _Job:
    """One file on its way, whatever the number of sources and tries."""

    def __init__(
        self,
        part: Part,
        wanted: Wanted,
        wire: Wire,
        token: str,
        pace: Pace,
        progress: Progress | None,
        stopped: Callable[[], bool],
    ) -> None:
        self.part, self.wanted, self.wire, self.token, self.pace = part, wanted, wire, token, pace
        self.progress, self.stopped = progress, stopped
        self.kept_bytes = part.size
        self._shown = 0.0
        self._answered = False

    def fetch_from(self, address: Address) -> bool:
        """Bring the whole file into the part; whether the source told its hash.

        Raises:
            Refused: this source is of no use. FetchError, Stopped: nor is any other.
        """
        tries, wrong, self._answered = 0, 0, False
        while True:
            before = self.part.size
            try:
                self._transfer(address)
                expected = self.wanted.sha256 or (self.part.state.linked if self.part.state else "")
                found = self.part.sha256
                if expected in ("", found):
                    self._require_content()
                    return bool(self.part.state and self.part.state.linked == found)
                resumed = before > 0
                self._drop()
                wrong += 1
                if wrong > 1 or not resumed:
                    raise Refused(f"a file with SHA-256 {found} instead of {expected}")
            except Broken as error:
                self.part.save()
                tries = 1 if self.part.size - before >= self.pace.progress_bytes else tries + 1
                if tries >= (self.pace.tries if self._answered else self.pace.blind_tries):
                    raise Refused(f"{tries} tries, the last: {error}") from error
                pause = min(self.pace.first_pause * 2 ** (tries - 1), self.pace.longest_pause)
                self._wait(max(pause, error.seconds))
            except (Stopped, KeyboardInterrupt):
                self.part.save()
                raise

    def _drop(self) -> None:
        self.part.restart()
        self.kept_bytes = 0

    def _transfer(self, address: Address) -> None:
        """One question and its answer; returns when the body was whole."""
        part = self.part
        with Exchange(self.wire, address.url, lambda parts: self._headers(address, parts)) as exchange:
            answer = self._first(exchange)
            self._answered = True
            state, asked = part.state, part.size
            linked = _linked(answer)
            if self.wanted.sha256 and linked and linked != self.wanted.sha256:
                raise Refused(f"another file: it tells SHA-256 {linked} instead of {self.wanted.sha256}")
            if answer.status == 416 and asked:
                self._drop()
                raise Broken("status 416: what had arrived does not fit any longer")
            self._require_status(answer)
            self._require_plain(answer)
            length = _length(answer)
            if answer.status == 206:
                total = self._continued(answer, linked, length)
            else:
                if asked:
                    self._drop()
                total = length or 0
            told = answer.told_one("x-linked-size")
            if told and total and told != str(total):
                raise Refused(f"{total} bytes where it tells {told}")
            self._require_total(answer, total, linked)
            if part.size == asked and state is not None and state.source == address.source:
                linked = linked or state.linked
            host_validator = _validator(answer)
            part.begin(State("", address.source, answer.host, host_validator, linked, total, 0, ""))
            self._receive(exchange, total)

    def _first(self, exchange: Exchange) -> Answer:
        since = time.monotonic()
        while (item := exchange.next(TICK_SECONDS)) is None:
            self._ask_stopped()
            if time.monotonic() - since > self.pace.stall_seconds:
                raise Broken(f"no answer for {self.pace.stall_seconds:g} seconds")
        assert isinstance(item, Answer)
        return item

    def _receive(self, exchange: Exchange, total: int) -> None:
        part, pace = self.part, self.pace
        most = total or self.wanted.most_bytes or CEILING_BYTES
        saved, since, mark = part.size, time.monotonic(), part.size
        for block in self._blocks(exchange):
            if block:
                if part.size + len(block) > most:
                    self._drop()
                    raise Refused(f"more than {most} bytes")
                part.write(block)
                if part.size - saved >= pace.save_bytes:
                    part.save()
                    saved = part.size
                self._show(total)
            now = time.monotonic()
            if part.size - mark >= pace.least_bytes:
                since, mark = now, part.size
            elif now - since > pace.stall_seconds:
                raise Broken(f"{part.size - mark} bytes in {pace.stall_seconds:g} seconds")
        if total and part.size < total:
            raise Broken(f"the connection ended after {part.size} of {total} bytes")
        if part.size < self.wanted.least_bytes:
            self._drop()
            raise Broken("the file ended too early")
        self._show(total, last=True)

    def _blocks(self, exchange: Exchange) -> Iterator[bytes]:
        """Blocks of the body, b"" at each tick without one; ends with the body."""
        while True:
            item = exchange.next(TICK_SECONDS)
            self._ask_stopped()
            if item == b"":
                return
            assert not isinstance(item, Answer)
            yield item or b""

    def _headers(self, address: Address, parts: SplitResult) -> Mapping[str, str]:
        """What one host is told: never a token to another host, never a validator that another host gave."""
        headers = {"User-Agent": AGENT, "Accept": "*/*", "Accept-Encoding": "identity"}
        headers["Connection"] = "close"
        here = parts.netloc.lower()
        if self.token and address.may_have_token and here == _host(address.url):
            headers["Authorization"] = f"Bearer {self.token}"
        state = self.part.state
        if not self.part.size or state is None:
            return headers
        same = state.source == address.source and state.host == here
        known = bool(self.wanted.sha256) or (bool(state.linked) and state.source == address.source)
        if same and state.validator:
            headers["If-Range"] = state.validator
        elif not known:
            return headers
        headers["Range"] = f"bytes={self.part.size}-"
        return headers

    def _continued(self, answer: Answer, linked: str, length: int | None) -> int:
        """The whole size, of an answer that goes on where the part ends."""
        state, size = self.part.state, self.part.size
        if not size or state is None:
            raise Refused("a piece of the file (status 206) that was not asked for")
        found = _RANGE.fullmatch(answer.one("content-range"))
        if not found:
            raise Refused(f"status 206 with Content-Range {answer.one('content-range')!r:.80}")
        first, last, total = (int(number) for number in found.groups())
        fits = first == size and last == total - 1 and length in (None, total - size)
        if not fits or (state.total and total != state.total):
            self._drop()
            raise Broken(f"bytes {first} to {last} of {total}, where {size} of {state.total} were there")
        changed = bool(state.linked and linked and state.linked != linked)
        if state.validator and state.host == answer.host:
            changed |= _validator(answer) not in ("", state.validator)
        if changed and not self.wanted.sha256:
            self._drop()
            raise Broken("the file was changed while it was fetched")
        return total

    def _require_status(self, answer: Answer) -> None:
        status = answer.status
        if status in (200, 206):
            return
        if status in AGAIN:
            seconds = _retry_after(answer.one("retry-after"))
            if seconds > self.pace.longest_wait:
                raise Refused(f"status {status}, and to come back in {seconds:.0f} seconds")
            raise Broken(f"status {status}", seconds)
        raise Refused(f"status {status}")

    def _require_plain(self, answer: Answer) -> None:
        """The body must be the bytes of the file themselves."""
        encoding = answer.one("content-encoding").lower()
        if encoding not in ("", "identity"):
            raise Refused(f"the file packed as {encoding!r:.30}, although it was asked for as it is")
        transfer = answer.one("transfer-encoding").lower()
        if transfer not in ("", "chunked"):
            raise Refused(f"a transfer as {transfer!r:.30}")
        if transfer and answer.one("content-length"):
            raise Refused("a transfer in chunks that tells a length as well")
        kind = answer.one("content-type").lower()
        if kind.startswith(("text/html", "application/xhtml", "multipart/")):
            raise Refused(f"a page ({kind:.40}) in the place of the file")

    def _require_total(self, answer: Answer, total: int, linked: str) -> None:
        wanted = self.wanted
        if answer.status == 200 and answer.one("content-length") == "0":
            raise Refused("an empty file")
        if total and not wanted.least_bytes <= total <= (wanted.most_bytes or CEILING_BYTES):
            raise Refused(f"{total} bytes instead of {_limits(wanted)}")
        exact = wanted.least_bytes == wanted.most_bytes
        if not total and not answer.one("transfer-encoding") and not (wanted.sha256 or linked or exact):
            raise Refused("no size, so that nobody could tell whether the file is whole")
        folder = self.part.target.parent
        need = max((total or wanted.least_bytes) - self.part.size, 0)
        free = shutil.disk_usage(folder).free
        if free < need * 1.05:
            raise FetchError(
                f"There is no room for {self.part.target.name}.",
                f"{free / 1e9:.2f} GB free in {folder}",
                f"{need * 1.05 / 1e9:.2f} GB",
                "Free some space, and fetch again: what has arrived is kept.",
            )

    def _require_content(self) -> None:
        """Of a file without a known hash at least this: it is no stand-in."""
        if not self.wanted.sha256 and self.part.first_bytes(len(_LFS)) == _LFS:
            self._drop()
            raise Refused("a Git LFS pointer, a stand-in for the file")

    def _show(self, total: int, *, last: bool = False) -> None:
        now = time.monotonic()
        if self.progress is not None and (last or now - self._shown >= 0.2):
            self._shown = now
            self.progress(self.part.size, total)

    def _ask_stopped(self) -> None:
        if self.stopped():
            raise Stopped(f"{self.part.target.name}: {self.part.size} bytes are kept")

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._ask_stopped()
            time.sleep(min(left, TICK_SECONDS))


def _host(url: str) -> str:
    return url.split("/")[2].lower()


def _length(answer: Answer) -> int | None:
    text = answer.one("content-length")
    if text and not _DIGITS.fullmatch(text):
        raise Refused(f"Content-Length {text!r:.40}")
    return int(text) if text else None


def _linked(answer: Answer) -> str:
    """The SHA-256 that the source tells of a large file, "" where it tells none."""
    text = answer.told_one("x-linked-etag").removeprefix("W/").strip('"')
    return text if _SHA256.fullmatch(text) else ""


def _validator(answer: Answer) -> str:
    etag = answer.one("etag")
    return etag if _STRONG.fullmatch(etag) else answer.one("last-modified") if not etag else ""


def _retry_after(text: str) -> float:
    """Seconds from now; 0 where nothing sensible is said."""
    if _DIGITS.fullmatch(text):
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0) if text else 0.0
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _limits(wanted: Wanted) -> str:
    most = wanted.most_bytes or CEILING_BYTES
    return str(most) if wanted.least_bytes == most else f"{wanted.least_bytes} to {most}"


def _advice(failures: Sequence[str]) -> str:
    text = " ".join(failures)
    if not failures:
        return "Name a source that has it in LANGUAGE_BRIDGE_SOURCES, or remove that variable."
    if "status 401" in text or "status 403" in text:
        return (
            "The Hub asks for an account there: agree to the terms on the model's page and set HF_TOKEN, "
            "or fetch the file in a browser and put it into place."
        )
    if "SHA-256" in text or " bytes instead of " in text:
        return "The file was changed where it is published, or on the way. Do not use it; report it."
    if "list of hosts" in text:
        return (
            "The source sends us to a host that is not known. If you trust it, name it in "
            "LANGUAGE_BRIDGE_HOSTS; or choose another source with LANGUAGE_BRIDGE_SOURCES."
        )
    if "certificate" in text:
        return (
            "Something between you and the source answers in its place, or your system's certificates are "
            "old. If it is your network's own proxy, name its certificate in SSL_CERT_FILE."
        )
    if "status 404" in text:
        return "The file has gone from there. Update Language Bridge, or fetch it in a browser."
    return (
        "Look at your connection. Where the Hub cannot be reached, set "
        "LANGUAGE_BRIDGE_SOURCES=mirror,modelscope or HF_ENDPOINT; then fetch again, what arrived is kept."
    )
