"""Where published files are asked for: the Hub, a mirror, ModelScope, in the order that the user sets.

Environment variables, read anew for every file and never at import:

LANGUAGE_BRIDGE_SOURCES  order, for example "mirror,modelscope,hub"; what is not named is not asked
HF_ENDPOINT              address of a mirror of the Hub, in the place of https://hf-mirror.com; asked first
LANGUAGE_BRIDGE_HOSTS    further hosts that a source may redirect to, separated by commas
HF_TOKEN                 sent to https://huggingface.co alone, and only for files that need an account
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from .connection import Wire
from .errors import FetchError
from .schema import RemoteFile

HUB = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://www.modelscope.cn"
SOURCES = ("hub", "mirror", "modelscope")
HOSTS = (
    "huggingface.co",
    ".huggingface.co",
    ".hf.co",
    "hf-mirror.com",
    ".hf-mirror.com",
    "modelscope.cn",
    ".modelscope.cn",
)
_HOST = re.compile(r"\.?[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)+(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Address:
    """One place to ask: the word for the source, the address, and whether a token may be sent there."""

    source: str
    url: str
    may_have_token: bool = False


def order(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The sources in the order in which they are asked.

    Raises:
        FetchError: LANGUAGE_BRIDGE_SOURCES names something else.
    """
    values = os.environ if environ is None else environ
    words = [word.strip().lower() for word in values.get("LANGUAGE_BRIDGE_SOURCES", "").split(",")]
    words = list(dict.fromkeys(word for word in words if word))
    for word in words:
        if word not in SOURCES:
            raise FetchError(
                "The variable LANGUAGE_BRIDGE_SOURCES cannot be understood.",
                _shown(word),
                f"some of {', '.join(SOURCES)}, separated by commas",
                "Set it again, or remove it.",
            )
    if words:
        return tuple(words)
    return ("mirror", "hub", "modelscope") if values.get("HF_ENDPOINT") else SOURCES


def is_chosen(source: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether the user named this source: a file without a known hash comes from no other but the Hub."""
    values = os.environ if environ is None else environ
    named = bool(values.get("LANGUAGE_BRIDGE_SOURCES", "").strip(" ,")) and source in order(values)
    return source == "hub" or named or (source == "mirror" and bool(values.get("HF_ENDPOINT")))


def addresses(file: RemoteFile, environ: Mapping[str, str] | None = None) -> tuple[Address, ...]:
    """Every place to ask for a file, in the user's order.

    Raises:
        FetchError: a variable of the environment cannot be used.
    """
    found: list[Address] = []
    path, revision = quote(file.path), quote(file.revision, safe="")
    for source in order(environ):
        if source == "hub":
            found.append(Address(source, f"{HUB}/{file.repo}/resolve/{revision}/{path}", True))
        elif source == "mirror":
            found.append(Address(source, f"{mirror(environ)}/{file.repo}/resolve/{revision}/{path}"))
        elif file.modelscope:
            found.append(Address(source, f"{MODELSCOPE}/models/{file.modelscope}/resolve/master/{path}"))
    return tuple(found)


def mirror(environ: Mapping[str, str] | None = None) -> str:
    """The mirror's address without a slash at its end.

    Raises:
        FetchError: HF_ENDPOINT is no plain https address.
    """
    values = os.environ if environ is None else environ
    endpoint = values.get("HF_ENDPOINT", "").strip().rstrip("/") or MIRROR
    parts = urlsplit(endpoint)
    # What stands before the first colon may be a user's name.
    scheme = f"the scheme {parts.scheme!r}" if parts.scheme in ("https", "http", "") else "another scheme"
    if parts.scheme != "https" or not _HOST.fullmatch(parts.netloc) or parts.query or parts.fragment:
        raise FetchError(
            "The variable HF_ENDPOINT cannot be used.",
            f"an address with {scheme}, or with more than a host and a path",
            f"an https address such as {MIRROR}",
            "Set it again, or remove it.",
        )
    return endpoint


def wire(environ: Mapping[str, str] | None = None) -> Wire:
    """The connections that are allowed now: the known hosts, the mirror's, and those that the user added.

    Raises:
        FetchError: a variable of the environment cannot be used.
    """
    values = os.environ if environ is None else environ
    extra = [host.strip() for host in values.get("LANGUAGE_BRIDGE_HOSTS", "").split(",") if host.strip()]
    for host in extra:
        if not _HOST.fullmatch(host):
            raise FetchError(
                "The variable LANGUAGE_BRIDGE_HOSTS cannot be understood.",
                _shown(host),
                "host names, separated by commas",
                "Set it again, or remove it.",
            )
    return Wire({*HOSTS, *extra, urlsplit(mirror(values)).netloc})


def _shown(word: str) -> str:
    """A word of a variable for an error; one that could hold a password is only counted."""
    return repr(word) if re.fullmatch(r"[\w.-]{1,40}", word) else f"an entry of {len(word)} characters"


def token(environ: Mapping[str, str] | None = None) -> str:
    """The user's token for the Hub, "" without one; never logged, never written to a file."""
    values = os.environ if environ is None else environ
    given = values.get("HF_TOKEN", "").strip()
    return given if re.fullmatch(r"[\x21-\x7e]{1,400}", given) else ""
