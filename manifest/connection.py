"""The only file of the pack that opens a network connection: https, to hosts on a list, and only when asked.

A connection is refused when its scheme is not https, its host is not on the list, the certificate does not
prove the host, or the address at the other end is not a public one. Every redirect is checked the same way.
The network is used on a thread of its own, so that the caller can stop within a moment whatever the network
does (a name that does not resolve, a server that says nothing).
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import queue
import re
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 1 << 18
QUEUED_BLOCKS = 64
MOST_REDIRECTS = 6
CONNECT_SECONDS = 15.0
_BOTH_WAYS = 2  # socket.SHUT_RDWR
_HOST = re.compile(r"[a-z0-9.-]{1,253}")
_REDIRECTS = (301, 302, 303, 307, 308)
_FAKE_ADDRESSES = ipaddress.ip_network("198.18.0.0/15")
"""Proxy programs on the user's machine answer every name with an address from here; TLS proves the host."""


class Refused(Exception):
    """A connection that must not be made, or an answer that must not be believed; another try cannot help."""


class Broken(Exception):
    """The network failed; another try may help, after `seconds`."""

    def __init__(self, text: str, seconds: float = 0.0) -> None:
        super().__init__(text)
        self.seconds = seconds


@dataclass(frozen=True)
class Answer:
    """What a server answered before the body: the last of the redirects, and what the first one told.

    headers: lower-case names, every value of each. told: the same of the first answer, which came from the
    host that was asked; after a redirect the two differ.
    """

    status: int
    url: str
    host: str
    headers: Mapping[str, tuple[str, ...]]
    told: Mapping[str, tuple[str, ...]]

    def one(self, name: str) -> str:
        """The value of a header that may stand only once, "" where it does not stand."""
        values = self.headers.get(name, ())
        if len(set(values)) > 1:
            raise Refused(f"the header {name} stands there with different values")
        return values[0].strip() if values else ""

    def told_one(self, name: str) -> str:
        """The same of the first answer."""
        values = self.told.get(name, ())
        return values[0].strip() if len(set(values)) == 1 else ""


class Wire:
    """Which hosts may be spoken to, and how. `hosts`: names; with a leading dot, everything below a name."""

    scheme = "https"
    port = 443

    def __init__(self, hosts: Collection[str]) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)

    def require(self, url: str) -> urllib.parse.SplitResult:
        """The parts of an address that may be asked; Refused otherwise."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise Refused(f"an address that is none ({error!s:.60})") from error
        host = (parts.hostname or "").rstrip(".").lower()
        if parts.scheme != self.scheme:
            raise Refused(f"{parts.scheme or 'no scheme'} instead of {self.scheme}, host {host!r:.80}")
        if parts.username is not None or parts.password is not None:
            raise Refused(f"an address with a name or a password in it, host {host!r:.80}")
        if any(ord(letter) <= 32 or ord(letter) > 126 for letter in url):
            raise Refused(f"an address with blanks or odd letters in it, host {host!r:.80}")
        if not _HOST.fullmatch(host):
            raise Refused(f"the host {host!r:.80}, which is no name")
        named = host if port in (None, self.port) else f"{host}:{port}"
        suffixes = {host[at:] for at, letter in enumerate(host) if letter == "."}
        if named not in self.hosts and (named != host or not suffixes & self.hosts):
            raise Refused(f"the host {named!r:.80}, which is not on the list of hosts")
        return parts

    def require_public(self, address: str) -> None:
        """Refused when the IP address at the other end is private, loopback, link-local or alike."""
        try:
            number = ipaddress.ip_address(address.partition("%")[0])
        except ValueError as error:
            raise Refused(f"the address {address!r:.60}, which is none") from error
        mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
        number = mapped or number
        faked = isinstance(number, ipaddress.IPv4Address) and number in _FAKE_ADDRESSES
        if number.is_multicast or not (number.is_global or faked):
            raise Refused(f"the address {number}, which is not a public one")

    def connect(self, parts: urllib.parse.SplitResult) -> http.client.HTTPConnection:
        """An open, encrypted and checked connection; the proxy of system or environment is used."""
        host = parts.hostname or ""
        context = ssl.create_default_context()
        proxy = self.proxy(host)
        if proxy is None:
            connection = http.client.HTTPSConnection(
                host, parts.port or self.port, timeout=CONNECT_SECONDS, context=context
            )
        else:
            connection = http.client.HTTPSConnection(
                proxy.hostname or "", proxy.port or 8080, timeout=CONNECT_SECONDS, context=context
            )
            name = urllib.parse.unquote(proxy.username or "")
            secret = f"{name}:{urllib.parse.unquote(proxy.password or '')}".encode()
            basic = {"Proxy-Authorization": f"Basic {base64.b64encode(secret).decode('ascii')}"}
            connection.set_tunnel(host, parts.port or self.port, basic if name else {})
        connection.connect()
        if proxy is None:
            # A proxy makes the connection itself, so there is nothing to look at behind one.
            try:
                self.require_public(str(connection.sock.getpeername()[0]))
            except BaseException:
                connection.close()
                raise
        return connection

    def proxy(self, host: str) -> urllib.parse.SplitResult | None:
        """The HTTP proxy that environment or system name for a host; Refused when it is of another kind."""
        found = urllib.request.getproxies()
        address = found.get("https") or found.get("all")
        if not address or urllib.request.proxy_bypass(host):
            return None
        proxy = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
        if proxy.scheme != "http" or not proxy.hostname:
            raise Refused(f"a proxy of the kind {proxy.scheme!r:.20}; only HTTP proxies can be used")
        return proxy


class Exchange:
    """One question and its answer, on a thread. Use it in a with statement; leaving it stops the network."""

    def __init__(
        self,
        wire: Wire,
        url: str,
        headers: Callable[[urllib.parse.SplitResult], Mapping[str, str]],
        *,
        method: str = "GET",
        follow: bool = True,
    ) -> None:
        """headers: the request's, asked anew for every host on the way, so that no secret travels on."""
        self._wire, self._url, self._headers = wire, url, headers
        self._method, self._follow = method, follow
        self._items: queue.Queue[Answer | bytes | Exception] = queue.Queue(QUEUED_BLOCKS)
        self._stop = threading.Event()
        self._socket: Any = None
        self._thread = threading.Thread(target=self._run, name="language-bridge-download", daemon=True)

    def __enter__(self) -> Exchange:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop. The thread ends at once, or, inside a look-up or a handshake, when that times out."""
        self._stop.set()
        self._hang_up()
        self._thread.join(0.3)

    def next(self, seconds: float) -> Answer | bytes | None:
        """The answer, then blocks of the body, b"" behind the last; None when nothing came in that time.

        Raises Refused or Broken, whatever ended the exchange.
        """
        try:
            item = self._items.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def _hang_up(self) -> None:
        held, self._socket = self._socket, None
        if held is not None:
            with contextlib.suppress(OSError, ValueError):
                held.shutdown(_BOTH_WAYS)
            with contextlib.suppress(OSError, ValueError):
                held.close()

    def _put(self, item: Answer | bytes | Exception) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._items.put(item, timeout=0.1)
                return

    def _run(self) -> None:
        connection: http.client.HTTPConnection | None = None
        reply: http.client.HTTPResponse | None = None
        try:
            connection, answer, reply = self._ask()
            self._put(answer)
            if self._method != "HEAD" and answer.status in (200, 206):
                while not self._stop.is_set() and (block := reply.read1(BLOCK_BYTES)):
                    self._put(block)
            self._put(b"")
        except (Refused, Broken) as error:
            self._put(error)
        except ssl.SSLCertVerificationError as error:
            self._put(Refused(f"a certificate that does not prove the host ({error.verify_message!s:.120})"))
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            # http.client raises ValueError and AttributeError, too, when it is hung up while it reads.
            self._put(Broken(f"{type(error).__name__}: {error!s:.160}"))
        finally:
            for end in (reply, connection):
                if end is not None:
                    with contextlib.suppress(OSError, ValueError):
                        end.close()

    def _ask(self) -> tuple[http.client.HTTPConnection, Answer, http.client.HTTPResponse]:
        url, told = self._url, None
        for _ in range(MOST_REDIRECTS + 1):
            parts = self._wire.require(url)
            connection = self._wire.connect(parts)
            self._socket = connection.sock
            if self._stop.is_set():
                self._hang_up()
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request(self._method, target, headers=dict(self._headers(parts)))
            reply = connection.getresponse()
            headers: dict[str, tuple[str, ...]] = {}
            for name, value in reply.getheaders():
                headers[name.lower()] = (*headers.get(name.lower(), ()), value)
            told = headers if told is None else told
            answer = Answer(reply.status, url, parts.netloc.lower(), headers, told)
            if not self._follow or reply.status not in _REDIRECTS:
                return connection, answer, reply
            connection.close()
            place = answer.one("location")
            if not place:
                raise Refused(f"status {reply.status} that leads nowhere")
            try:
                url = urllib.parse.urljoin(url, place)
            except ValueError as error:
                raise Refused(f"a redirect to an address that is none ({error!s:.60})") from error
        raise Refused(f"more than {MOST_REDIRECTS} redirects")
