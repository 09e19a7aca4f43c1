"""Fills what the manifest does not know from the Hub's own metadata: commit, exact size, SHA-256.

For maintainers, on a machine with a network. Large files: the Hub tells the SHA-256 in X-Linked-Etag. Small
ones lie in git, whose hash is another one, so they are fetched, compared with git's hash, and hashed here.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from .connection import Answer, Broken, Exchange, Refused, Wire
from .download import AGENT
from .fetch import find
from .schema import Manifest, RemoteFile
from .sources import HUB, Address, addresses

LARGEST_GIT_BYTES = 64 << 20
WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Pinned:
    """The manifest with what was found, a line for each file, and whether something contradicted it."""

    manifest: Manifest
    lines: tuple[str, ...]
    contradicted: bool


def pin(
    manifest: Manifest,
    wire: Wire,
    name: str = "",
    *,
    hub: Callable[[RemoteFile], Address] | None = None,
) -> Pinned:
    """Ask the Hub (never a mirror) about every file of one set, or of all; nothing known is ever replaced.

    What the Hub tells and the manifest contradicts is said in a line that begins with CONTRADICTED; the
    manifest then stays as it was for that file.

    Raises:
        FetchError: no set of that name.
    """
    if name:
        find(manifest, name)
    lines: list[str] = []
    known: dict[RemoteFile, RemoteFile] = {}
    contradicted = False
    for item in manifest.published:
        for file in item.files:
            if (name and item.name != name) or file in known:
                continue
            try:
                known[file] = _asked(file, wire, (hub or _at_hub)(file))
                line = "as it was" if known[file] == file else f"{known[file].bytes} {known[file].sha256}"
            except (Refused, Broken) as error:
                contradicted = contradicted or "CONTRADICTED" in str(error)
                line = str(error)
            lines.append(f"{file.key}: {line}")
    # A file that several sets share is told alike in all of them, also when one set alone was asked about.
    published = tuple(
        replace(item, files=tuple(known.get(file, file) for file in item.files))
        for item in manifest.published
    )
    return Pinned(replace(manifest, published=published), tuple(lines), contradicted)


def _at_hub(file: RemoteFile) -> Address:
    address = addresses(file, {"LANGUAGE_BRIDGE_SOURCES": "hub"})[0]
    assert address.url.startswith(HUB)
    return address


def _asked(file: RemoteFile, wire: Wire, address: Address) -> RemoteFile:
    answer, _ = _exchange(wire, address.url, "HEAD", follow=False)
    if answer.status not in (200, 302, 307):
        raise Refused(f"status {answer.status}")
    commit = answer.told_one("x-repo-commit")
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise Refused("the Hub tells no commit")
    etag = (answer.told_one("x-linked-etag") or answer.told_one("etag")).removeprefix("W/").strip('"')
    size = answer.told_one("x-linked-size") or answer.told_one("content-length")
    if re.fullmatch(r"[0-9a-f]{64}", etag) and re.fullmatch(r"[0-9]{1,15}", size):
        digest, bytes_ = etag, int(size)
    elif re.fullmatch(r"[0-9a-f]{40}", etag):
        _, body = _exchange(wire, address.url, "GET", follow=True)
        blob = hashlib.sha1(f"blob {len(body)}\0".encode() + body, usedforsecurity=False).hexdigest()
        if blob != etag:
            raise Refused(f"git's hash is {blob}, the Hub tells {etag}")
        digest, bytes_ = hashlib.sha256(body).hexdigest(), len(body)
    else:
        raise Refused(f"the Hub tells neither SHA-256 nor git's hash ({etag!r:.80})")
    if file.sha256 not in ("", digest):
        raise Refused(f"CONTRADICTED: the Hub tells SHA-256 {digest} instead of {file.sha256}")
    if not file.least_bytes <= bytes_ <= (file.most_bytes or bytes_):
        raise Refused(f"CONTRADICTED: the Hub tells {bytes_} bytes instead of {file.shown or file.bytes}")
    return replace(file, revision=commit, bytes=bytes_, shown="", sha256=digest)


def _exchange(wire: Wire, url: str, method: str, *, follow: bool) -> tuple[Answer, bytes]:
    body, answer, end = bytearray(), None, time.monotonic() + WAIT_SECONDS
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity", "Connection": "close"}
    with Exchange(wire, url, lambda parts: headers, method=method, follow=follow) as exchange:
        while True:
            item = exchange.next(1.0)
            if time.monotonic() > end:
                raise Broken(f"no whole answer for {WAIT_SECONDS:g} seconds")
            if isinstance(item, Answer):
                answer = item
                if method == "GET" and answer.status != 200:
                    raise Refused(f"status {answer.status}")
            elif item == b"":
                assert answer is not None
                length = answer.one("content-length")
                if method == "GET" and length and length != str(len(body)):
                    raise Broken(f"{len(body)} of {length} bytes")
                return answer, bytes(body)
            elif item is not None:
                body += item
                if len(body) > LARGEST_GIT_BYTES:
                    raise Refused(f"more than {LARGEST_GIT_BYTES} bytes in git")
