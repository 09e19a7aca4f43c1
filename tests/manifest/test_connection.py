"""The shipped connection itself, over real TLS: certificates, addresses, proxies. Nothing is stood in for."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from language_bridge.manifest import connection, download, sources
from language_bridge.manifest.connection import Refused, Wire
from language_bridge.manifest.errors import FetchError, Stopped
from language_bridge.manifest.sources import Address
from language_bridge.tests.manifest.certificates import self_signed
from language_bridge.tests.manifest.hub import Hub, cut_after, honest, redirect, running
from language_bridge.tests.manifest.test_download import PINNED, QUICK, is_whole

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A certificate for the Hub's name and for this machine's, which nobody trusts yet."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return self_signed(tmp_path, "huggingface.co", "cdn.hf.co", "localhost")


@pytest.fixture
def hub(certificate: tuple[Path, Path]) -> Iterator[Hub]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with running(honest(), context=context) as started:
        yield started


@dataclass
class Proxy:
    """An HTTP proxy that leads every name to one port here; `asked` are the heads of its requests."""

    port: int
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def proxy_to(hub: Hub) -> Iterator[Proxy]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            lines = [self.rfile.readline().decode("ascii").strip()]
            while lines[-1]:
                lines.append(self.rfile.readline().decode("ascii").strip())
            proxy.asked.append("\n".join(lines))
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", hub.port)) as far:
                self.connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                ends = {self.connection: far, far: self.connection}
                while True:
                    for end in select.select(list(ends), [], [], 5)[0]:
                        data = end.recv(65_536)
                        if not data:
                            return
                        ends[end].sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy = Proxy(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join(2)


def test_through_a_proxy_a_file_arrives_over_https_as_in_a_users_network(
    tmp_path: Path, hub: Hub, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses, hosts and connections are those that a user has; the certificate alone was added."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    hub.behave = lambda request: (
        redirect("https://cdn.hf.co/x?Signature=1")(request)
        if "resolve" in request.path
        else honest()(request)
    )
    with proxy_to(hub) as proxy:
        monkeypatch.setenv("https_proxy", f"http://some:secret@127.0.0.1:{proxy.port}")
        places = [Address("hub", f"{sources.HUB}/a/b/resolve/main/c", may_have_token=True)]
        target = tmp_path / "x.bin"
        got = download.download(places, target, PINNED, wire=sources.wire({}), token="hf_t", pace=QUICK)
        assert is_whole(target) and got.source == "hub"
        assert [text.split()[1] for text in proxy.asked] == ["huggingface.co:443", "cdn.hf.co:443"]
        assert "Proxy-Authorization: Basic c29tZTpzZWNyZXQ=" in proxy.asked[0]
        assert "hf_t" not in "".join(proxy.asked)
        assert [request.headers.get("authorization") for request in hub.log] == ["Bearer hf_t", None]
        assert not [request for request in hub.log if "proxy-authorization" in request.headers]


def test_a_certificate_that_nobody_trusts_is_refused_at_once(
    tmp_path: Path, hub: Hub, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another pack has switched the check off for the whole process."""
    monkeypatch.setattr(ssl, "_create_default_https_context", ssl._create_unverified_context)
    with proxy_to(hub) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        places = [Address("hub", f"{sources.HUB}/a/b/resolve/main/c")]
        with pytest.raises(FetchError, match="certificate that does not prove the host"):
            download.download(places, tmp_path / "x.bin", PINNED, wire=sources.wire({}), pace=QUICK)
        assert not hub.log and len(proxy.asked) == 1


def test_a_certificate_of_another_host_is_refused(
    tmp_path: Path, hub: Hub, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with proxy_to(hub) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        places = [Address("mirror", f"{sources.MIRROR}/a/b/resolve/main/c")]
        with pytest.raises(FetchError, match="certificate"):
            download.download(places, tmp_path / "x.bin", PINNED, wire=sources.wire({}), pace=QUICK)
        assert not hub.log


def test_a_listed_name_that_leads_to_this_machine_is_refused_before_anything_is_asked(
    tmp_path: Path, hub: Hub, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate is good and the host is listed: the address alone is wrong."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    place = f"localhost:{hub.port}"
    with pytest.raises(FetchError, match="not a public one"):
        download.download(
            [Address("hub", f"https://{place}/x")], tmp_path / "x.bin", PINNED, wire=Wire({place}), pace=QUICK
        )
    assert not hub.log


def test_a_proxy_that_cannot_be_used_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.urllib.request, "getproxies", lambda: {"https": "socks5://127.0.0.1:1"})
    with pytest.raises(FetchError, match="only HTTP proxies"):
        download.download(
            [Address("hub", f"{sources.HUB}/x")], tmp_path / "x", PINNED, wire=sources.wire({}), pace=QUICK
        )
    with pytest.raises(Refused):
        Wire(()).proxy("huggingface.co")


def test_stopping_takes_less_than_a_second_inside_tls_too(
    tmp_path: Path, hub: Hub, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    hub.behave = cut_after(100_000, "silence")
    with proxy_to(hub) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        asked: list[float] = []

        def stopped() -> bool:
            asked.append(time.monotonic())
            return bool(hub.log) and asked[-1] - asked[0] > 0.3

        with pytest.raises(Stopped):
            download.download(
                [Address("hub", f"{sources.HUB}/x")],
                tmp_path / "x.bin",
                PINNED,
                wire=sources.wire({}),
                stopped=stopped,
            )
        assert time.monotonic() - asked[-1] < 1.0
    assert not [one for one in threading.enumerate() if one.name == "language-bridge-download"]
    assert (tmp_path / "x.bin.part").stat().st_size == 100_000
