"""A hub on this machine that misbehaves on demand, and the connection policy that lets tests speak to it.

The policy is the only way to speak plain http or to a loopback address, and it exists in the tests alone:
shipped code has no such switch.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import random
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import SplitResult

from language_bridge.manifest.connection import Wire

BODY = random.Random(7).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
COMMIT = "c" * 40


class LoopbackWire(Wire):
    """http to this machine: 127.0.0.1 counts as public, 127.0.0.2 as the private address that it is."""

    scheme = "http"
    port = 80

    def require_public(self, address: str) -> None:
        if address not in ("127.0.0.1", "::1"):
            super().require_public(address)

    def connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
        connection.connect()
        try:
            self.require_public(connection.sock.getpeername()[0])
        except BaseException:
            connection.close()
            raise
        return connection


@dataclass
class Request:
    """One request as it came in; names of headers in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    send: Callable[[bytes], object]
    connection: socket.socket
    number: int

    @property
    def start(self) -> int | None:
        """The first byte that was asked for, None without a range."""
        found = self.headers.get("range", "")
        return int(found.removeprefix("bytes=").removesuffix("-")) if found else None

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A plain answer with a length; header names have _ for -."""
        head(self, status, {"Content-Length": str(len(body))} | named(headers))
        if self.method != "HEAD":
            self.send(body)


Behaviour = Callable[[Request], None]


@dataclass
class Hub:
    """The running hub: `behave` answers requests, `log` remembers them."""

    port: int
    behave: Behaviour
    log: list[Request] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str = "/file", host: str | None = None) -> str:
        return f"http://{host or self.host}{path}"


def named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def head(request: Request, status: int, headers: dict[str, str]) -> None:
    """Status line and headers."""
    lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    request.send("\r\n".join(lines).encode("latin-1"))


def honest(
    body: bytes = BODY, etag: str = '"v1"', *, honour_if_range: bool = True, **extra: str
) -> Behaviour:
    """Serves a body with ranges and validators, as a hub does."""

    def behave(request: Request) -> None:
        start = request.start
        if start is not None and honour_if_range and request.headers.get("if-range", etag) != etag:
            start = None
        headers = {"ETag": etag, "Accept-Ranges": "bytes"} | named(extra)
        if start is None:
            head(request, 200, {"Content-Length": str(len(body))} | headers)
        elif start >= len(body):
            request.reply(416, Content_Range=f"bytes */{len(body)}")
            return
        else:
            place = f"bytes {start}-{len(body) - 1}/{len(body)}"
            head(request, 206, {"Content-Length": str(len(body) - start), "Content-Range": place} | headers)
        if request.method != "HEAD":
            request.send(body[start or 0 :])

    return behave


def cut_after(count: int, then: str = "close", body: bytes = BODY, etag: str = '"v1"') -> Behaviour:
    """Serves `count` bytes of what was asked for, then closes, resets or says nothing more."""

    def behave(request: Request) -> None:
        start = request.start or 0
        headers = {"ETag": etag, "Content-Length": str(len(body) - start)}
        if request.start is not None:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        head(request, 200 if request.start is None else 206, headers)
        request.send(body[start : start + count])
        if start + count >= len(body):
            return
        if then == "reset":
            time.sleep(0.05)  # what was sent arrives before the reset does
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif then == "silence":
            time.sleep(0.8)

    return behave


def first(*behaviours: Behaviour) -> Behaviour:
    """The first request by the first behaviour, and so on; the last one answers all that follow."""
    calls = iter(range(1 << 30))
    return lambda request: behaviours[min(next(calls), len(behaviours) - 1)](request)


def raw(data: bytes, *, pause: float = 0.0, repeat: int = 1) -> Behaviour:
    """These very bytes, again and again."""

    def behave(request: Request) -> None:
        for _ in range(repeat):
            request.send(data)
            time.sleep(pause)

    return behave


def status(code: int, **headers: str) -> Behaviour:
    """A status with a short text."""
    return lambda request: request.reply(code, b"no", **headers)


def redirect(place: str, code: int = 302, **headers: str) -> Behaviour:
    """A redirect."""
    return lambda request: request.reply(code, b"", Location=place, **headers)


@contextlib.contextmanager
def running(
    behave: Behaviour, address: str = "127.0.0.1", context: ssl.SSLContext | None = None
) -> Iterator[Hub]:
    """A hub on a free port; with a context it speaks https."""

    class Handler(socketserver.StreamRequestHandler):
        def setup(self) -> None:
            if context is not None:
                self.request = context.wrap_socket(self.request, server_side=True)
            super().setup()

        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                line = self.rfile.readline().decode("latin-1").split()
                headers: dict[str, str] = {}
                while text := self.rfile.readline().decode("latin-1").strip():
                    name, _, value = text.partition(":")
                    headers[name.lower()] = value.strip()
                connection = self.connection
                request = Request(line[0], line[1], headers, connection.sendall, connection, len(hub.log))
                hub.log.append(request)
                hub.behave(request)

        def finish(self) -> None:
            with contextlib.suppress(OSError):
                super().finish()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

        def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
            request.close()  # not shut down first, so that SO_LINGER can reset

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    with Server((address, 0), Handler) as server:
        hub = Hub(server.server_address[1], behave)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(2)
