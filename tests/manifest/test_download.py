"""The downloader against a hub that misbehaves: whatever happens, no wrong file gets the target's name."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from language_bridge.manifest import connection, download, part
from language_bridge.manifest.connection import Refused, Wire
from language_bridge.manifest.download import Fetched, Pace, Wanted
from language_bridge.manifest.errors import FetchError, Stopped
from language_bridge.manifest.sources import Address
from language_bridge.tests.manifest.hub import (
    BODY,
    SHA256,
    Behaviour,
    Hub,
    LoopbackWire,
    Request,
    cut_after,
    first,
    head,
    honest,
    raw,
    redirect,
    running,
    status,
)

QUICK = Pace(
    stall_seconds=10.0,
    least_bytes=64,
    tries=3,
    first_pause=0.01,
    longest_pause=0.02,
    longest_wait=1.0,
    save_bytes=32_768,
    progress_bytes=32_768,
)
HASTY = replace(QUICK, stall_seconds=0.4, tries=2)
"""For faults that show in nothing but silence; every other must not depend on how busy this machine is."""
SIZE = len(BODY)
PINNED = Wanted("a/b@main/file", SIZE, SIZE, SHA256)
BOUNDED = Wanted("a/b@main/file", SIZE - 1000, SIZE + 1000)
UNKNOWN = Wanted("a/b@main/file")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running(honest()) as started:
        yield started


def wire_to(*hubs: Hub) -> LoopbackWire:
    """The policy that lets these hubs be asked, under both names of this machine."""
    return LoopbackWire({name for hub in hubs for name in (hub.host, f"localhost:{hub.port}")})


def fetch(target: Path, hubs: list[Hub], wanted: Wanted = PINNED, **more: Any) -> Fetched:
    places = [Address(f"source {number}", hub.url()) for number, hub in enumerate(hubs)]
    options = {"wire": wire_to(*hubs), "pace": QUICK} | more
    return download.download(places, target, wanted, **options)


def is_whole(target: Path) -> bool:
    return hashlib.sha256(target.read_bytes()).hexdigest() == SHA256


def unfinished(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


# -- what a hub does when all is well ---------------------------------------------------------------


@pytest.mark.parametrize("wanted", [PINNED, BOUNDED, UNKNOWN])
def test_a_file_arrives_whole_and_leaves_nothing_beside_it(tmp_path: Path, hub: Hub, wanted: Wanted) -> None:
    target = tmp_path / "\u6a21\u578b one" / "x.bin"
    seen: list[tuple[int, int]] = []
    got = fetch(target, [hub], wanted, progress=lambda done, total: seen.append((done, total)))
    assert is_whole(target) and not unfinished(target)
    assert (got.bytes, got.sha256, got.source, got.kept_bytes) == (SIZE, SHA256, "source 0", 0)
    assert seen[-1] == (SIZE, SIZE) and seen == sorted(seen)
    assert hub.log[0].headers["accept-encoding"] == "identity"
    assert not {"authorization", "range", "if-range", "cookie"} & set(hub.log[0].headers)


def test_a_file_that_is_there_is_checked_and_not_fetched(tmp_path: Path, hub: Hub) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(BODY)
    assert fetch(target, [hub]).source == ""
    target.write_bytes(BODY[:-1] + b"\0")
    with pytest.raises(FetchError, match="Another file lies"):
        fetch(target, [hub])
    target.write_bytes(BODY[:-1])
    with pytest.raises(FetchError, match="Another file lies"):
        fetch(target, [hub])
    target.unlink()
    target.mkdir()
    with pytest.raises(FetchError, match="no file"):
        fetch(target, [hub])
    assert not hub.log


def test_what_the_source_tells_of_the_hash_is_held_against_it(tmp_path: Path, hub: Hub) -> None:
    hub.behave = honest(X_Linked_Etag=f'"{SHA256}"', X_Linked_Size=str(SIZE))
    assert fetch(tmp_path / "x", [hub], UNKNOWN).told
    hub.behave = honest(BODY[::-1], X_Linked_Etag=f'"{SHA256}"', X_Linked_Size=str(SIZE))
    with pytest.raises(FetchError, match="instead of"):
        fetch(tmp_path / "y", [hub], UNKNOWN)
    assert not (tmp_path / "y").exists()


# -- faults -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One way to misbehave. says: what the refusal says, "" when the file arrives whole all the same.

    unpinned: what happens without a known hash; None = the same. limits: what is known then. lies: a wrong
    content under right headers, which nothing but a hash can tell. silent: it has to be waited for.
    """

    name: str
    behave: Callable[[Hub], Behaviour]
    says: str = ""
    unpinned: str | None = None
    limits: Wanted = BOUNDED
    lies: bool = False
    silent: bool = False


def always(behaviour: Behaviour) -> Callable[[Hub], Behaviour]:
    return lambda hub: behaviour


def once(*behaviours: Behaviour) -> Callable[[Hub], Behaviour]:
    return lambda hub: first(*behaviours, honest())


def chunks(request: Request, pieces: list[bytes], end: bytes = b"0\r\n\r\n") -> None:
    head(request, 200, {"Transfer-Encoding": "chunked", "ETag": '"v1"'})
    for piece in pieces:
        request.send(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    request.send(end)


def endless(chunked: bool) -> Behaviour:
    def behave(request: Request) -> None:
        head(request, 200, {"Transfer-Encoding": "chunked"} if chunked else {"ETag": '"e"'})
        piece = b"x" * 65_536
        while True:
            request.send(b"10000\r\n" + piece + b"\r\n" if chunked else piece)

    return behave


def with_headers(**headers: str) -> Behaviour:
    """The file under headers of which some are wrong."""

    def behave(request: Request) -> None:
        head(request, 200, {name.replace("_", "-"): value for name, value in headers.items()})
        request.send(BODY)

    return behave


def second_answer(**headers: str) -> Callable[[Hub], Behaviour]:
    """A cut, then status 206 with wrong headers, then honesty."""

    def behave(request: Request) -> None:
        start = request.start or 0
        said = {name.replace("_", "-"): value.format(start=start) for name, value in headers.items()}
        head(request, 206, {"Content-Length": str(SIZE - start)} | said)
        request.send(BODY[start:])

    return lambda hub: first(cut_after(100_000), behave, honest())


def drip(seconds: float, piece: int) -> Behaviour:
    def behave(request: Request) -> None:
        head(request, 200, {"Content-Length": str(SIZE)})
        for at in range(0, SIZE, piece):
            request.send(BODY[at : at + piece])
            time.sleep(seconds)

    return behave


HTML = b"<!doctype html><title>Log in</title>" * 9000
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + SHA256.encode() + b"\nsize 300000\n"
LEN = {"Content_Length": str(SIZE)}

FAULTS = [
    # content
    Fault("wrong hash", always(honest(BODY[:-1] + b"?")), "SHA-256", lies=True),
    Fault("wrong hash told", always(honest(X_Linked_Etag='"' + "0" * 64 + '"')), "0000", lies=True),
    Fault("wrong hash once after a cut", once(cut_after(100_000, body=BODY[::-1])), lies=True),
    Fault("another size told", always(honest(X_Linked_Size="299999")), "299999"),
    Fault("longer than it should be", always(honest(BODY + b"x" * 5000)), "305000 bytes instead of"),
    Fault("shorter than it should be", always(honest(BODY[:5000])), "5000 bytes instead of"),
    Fault("empty, with a length", always(status(200, Content_Length="0")), "bytes instead|different|empty"),
    Fault("empty body", always(honest(b"")), "empty"),
    Fault("a page", always(honest(HTML, Content_Type="text/html; charset=utf-8")), "page", limits=UNKNOWN),
    Fault("a stand-in", always(honest(LFS)), "bytes instead of", "stand-in", UNKNOWN),
    Fault("gzip", always(with_headers(**LEN, Content_Encoding="gzip")), "gzip"),
    Fault("gzip in transfer", always(with_headers(Transfer_Encoding="gzip, chunked")), "gzip, chunked"),
    Fault("multipart", always(with_headers(**LEN, Content_Type="multipart/byteranges; boundary=x")), "page"),
    # lengths
    Fault("no length", always(with_headers(ETag='"x"')), "", "no size"),
    Fault("negative length", always(with_headers(Content_Length="-1")), "Content-Length"),
    Fault("length that is no number", always(with_headers(Content_Length="3e5")), "Content-Length"),
    Fault("length and chunks", always(with_headers(**LEN, Transfer_Encoding="chunked")), "as well"),
    Fault("endless body", always(endless(False)), "more than", "no size"),
    Fault("endless chunks", always(endless(True)), "more than"),
    Fault("chunks", always(lambda request: chunks(request, [BODY[:70_000], BODY[70_000:]]))),
    Fault("chunks that end early", once(lambda request: chunks(request, [BODY[:70_000]], b""))),
    Fault("chunks of a wrong size", always(lambda request: chunks(request, [b"ab"], b"zz\r\n")), "tries"),
    Fault(
        "two lengths",
        always(raw(b"HTTP/1.1 200 x\r\nContent-Length: 300000\r\nContent-Length: 7\r\n\r\n")),
        "different values",
    ),
    # the road
    Fault("cut again and again", always(cut_after(100_000))),
    Fault("reset in the middle", once(cut_after(100_000, "reset"), cut_after(50_000, "reset"))),
    Fault("silence in the middle", once(cut_after(100_000, "silence")), silent=True),
    Fault("silence from the start", always(lambda request: time.sleep(1)), "no answer", silent=True),
    Fault("closed at once", always(raw(b"")), "tries"),
    Fault("slow", always(drip(0.02, 10_000))),
    Fault("slower than slow", always(drip(0.1, 1)), "seconds", silent=True),
    Fault("no HTTP", always(raw(b"SSH-2.0-OpenSSH\r\n")), "tries"),
    Fault("headers without end", always(raw(b"A: b\r\n", repeat=200)), "tries"),
    Fault(
        "a header of a megabyte", always(raw(b"HTTP/1.1 200 x\r\nA: " + b"b" * 10**6 + b"\r\n\r\n")), "tries"
    ),
    Fault(
        "continue for ever",
        always(raw(b"HTTP/1.1 100 x\r\n\r\n", repeat=60, pause=0.02)),
        "no answer|tries",
        silent=True,
    ),
    # ranges
    Fault("the whole for a piece", once(cut_after(100_000), with_headers(**LEN, ETag='"v1"'))),
    Fault("a changed file", once(cut_after(100_000, body=BODY[::-1], etag='"old"'))),
    Fault(
        "a changed file that does not mind If-Range",
        lambda hub: first(
            cut_after(100_000, body=BODY[::-1], etag='"old"'), honest(honour_if_range=False), honest()
        ),
    ),
    Fault("416 behind a piece", once(cut_after(100_000), status(416))),
    Fault("416 from the start", always(status(416)), "status 416"),
    Fault("206 that nobody asked for", always(lambda request: request.reply(206, BODY)), "not asked for"),
    Fault("206 without a place", second_answer(), "Content-Range"),
    Fault("206 with nonsense", second_answer(Content_Range="bytes a-b/c"), "Content-Range"),
    Fault("206 from elsewhere", second_answer(Content_Range="bytes 0-299999/300000")),
    Fault("206 of another size", second_answer(Content_Range="bytes {start}-399999/400000")),
    Fault("206 with another end", second_answer(Content_Range="bytes {start}-200000/300000")),
    Fault(
        "206 with another length",
        second_answer(Content_Range="bytes {start}-299999/300000", Content_Length="9"),
    ),
    Fault(
        "206 of a changed file",
        second_answer(Content_Range="bytes {start}-299999/300000", ETag='"v2"'),
    ),
    # answers
    *(
        Fault(f"status {code}", always(status(code)), f"status {code}")
        for code in (400, 401, 403, 404, 410, 451)
    ),
    *(Fault(f"status {code}", always(status(code)), f"status {code}") for code in (204, 304, 500, 502, 503)),
    Fault("429 once", once(status(429, Retry_After="0"))),
    Fault("429 with a date", once(status(429, Retry_After="Sat, 01 Jan 2000 00:00:00 GMT"))),
    Fault("429 with nonsense", once(status(429, Retry_After="soon"))),
    Fault("429 for a day", always(status(429, Retry_After="86400")), "come back in 86400"),
    Fault("503 once", once(status(503), status(500))),
    # redirects
    Fault("redirect", lambda hub: first(redirect(hub.url("/cdn")), honest())),
    Fault("redirect without a host", lambda hub: first(redirect("/cdn"), honest())),
    Fault("redirect to another host", lambda hub: first(redirect(f"http://localhost:{hub.port}/"), honest())),
    Fault("redirect to a host that is not listed", always(redirect("http://example.org/x")), "list of hosts"),
    Fault("redirect to the cloud's metadata", always(redirect("http://169.254.169.254/x")), "list of hosts"),
    Fault("redirect to a listed name in a private net", lambda hub: redirect("http://127.0.0.2:9/x"), "list"),
    Fault("redirect to another port", always(redirect("http://127.0.0.1:1/x")), "list of hosts"),
    Fault("redirect to a file", always(redirect("file:///etc/passwd")), "file instead of http"),
    Fault("redirect with a password", lambda hub: redirect(f"http://a:b@{hub.host}/x"), "password"),
    Fault("redirect with a blank", lambda hub: redirect(f"http://{hub.host}/a b"), "blanks"),
    Fault("redirect to nonsense", always(redirect("http://[::1")), "none"),
    Fault("redirect to nowhere", always(status(302)), "leads nowhere"),
    Fault("redirect in a circle", lambda hub: redirect(hub.url()), "redirects"),
]


def test_there_are_faults_enough_and_each_is_told_once() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "unpinned"])
def test_no_fault_lets_a_wrong_file_through(tmp_path: Path, hub: Hub, fault: Fault, pinned: bool) -> None:
    target, wanted = tmp_path / "x.bin", PINNED if pinned else fault.limits
    pace = HASTY if fault.silent else QUICK
    says = fault.says if pinned or fault.unpinned is None else fault.unpinned
    hub.behave = fault.behave(hub)
    if not pinned and fault.lies:
        wanted = replace(BOUNDED, sha256=SHA256)
    if says:
        with pytest.raises(FetchError, match=says) as error:
            fetch(target, [hub], wanted, pace=pace)
        assert not target.exists()
        assert error.value.action and "expected:" in str(error.value)
        hub.behave = fault.behave(hub)
        with running(honest()) as good:
            assert fetch(target, [hub, good], wanted, pace=pace).source == "source 1"
    else:
        fetch(target, [hub], wanted, pace=pace)
    assert is_whole(target) and not unfinished(target)


def test_a_source_whose_port_is_closed_gives_way_to_the_next(tmp_path: Path, hub: Hub) -> None:
    with running(honest()) as closed:
        pass
    assert fetch(tmp_path / "x", [closed, hub]).source == "source 1"


def test_a_listed_name_with_a_private_address_is_refused(tmp_path: Path) -> None:
    with running(honest(), "127.0.0.2") as private:
        wire = LoopbackWire({f"127.0.0.2:{private.port}"})
        places = [Address("hub", f"http://127.0.0.2:{private.port}/x")]
        with pytest.raises(FetchError, match="not a public one"):
            download.download(places, tmp_path / "x", PINNED, wire=wire, pace=QUICK)
        assert not private.log


def test_the_advice_fits_what_was_found(tmp_path: Path, hub: Hub) -> None:
    advice = {
        status(401): "HF_TOKEN",
        status(404): "gone",
        redirect("http://example.org/"): "LANGUAGE_BRIDGE_HOSTS",
        honest(BODY[::-1]): "report it",
        raw(b""): "LANGUAGE_BRIDGE_SOURCES=mirror",
    }
    for behaviour, says in advice.items():
        hub.behave = behaviour
        with pytest.raises(FetchError) as error:
            fetch(tmp_path / "x.bin", [hub])
        assert says in error.value.action
    with pytest.raises(FetchError) as error:
        fetch(tmp_path / "x.bin", [])
    assert "LANGUAGE_BRIDGE_SOURCES" in error.value.action


# -- secrets ----------------------------------------------------------------------------------------

TOKEN = "hf_secret"


def test_a_token_goes_to_the_source_it_is_for_and_to_nobody_else(tmp_path: Path, hub: Hub) -> None:
    with running(honest()) as mirror, running(honest()) as cdn:
        hub.behave = redirect(f"http://localhost:{cdn.port}/cdn")
        mirror.behave = status(404)
        places = [Address("mirror", mirror.url()), Address("hub", hub.url(), may_have_token=True)]
        wire = wire_to(hub, mirror, cdn)
        download.download(places, tmp_path / "x", PINNED, wire=wire, pace=QUICK, token=TOKEN)
        assert [request.headers.get("authorization") for request in hub.log] == [f"Bearer {TOKEN}"]
        for other in (mirror, cdn):
            assert other.log
            assert TOKEN not in str([request.headers for request in other.log])
    assert TOKEN not in "".join(path.read_text("latin-1") for path in tmp_path.iterdir())


def test_no_error_tells_a_token_or_an_address_with_a_signature(tmp_path: Path, hub: Hub) -> None:
    hub.behave = first(redirect(hub.url("/cdn?Signature=secret")), status(403))
    with pytest.raises(FetchError) as error:
        download.download(
            [Address("hub", hub.url(), True)],
            tmp_path / "x",
            PINNED,
            wire=wire_to(hub),
            token=TOKEN,
            pace=QUICK,
        )
    assert "secret" not in str(error.value) and TOKEN not in str(error.value)
    assert "HF_TOKEN" in error.value.action


# -- going on -----------------------------------------------------------------------------------------


def begun(target: Path, hub: Hub, wanted: Wanted, count: int = 100_000, **body: Any) -> None:
    """Leave an unfinished download with `count` bytes behind."""
    hub.behave = first(cut_after(count, **body), status(404))
    with pytest.raises(FetchError, match="404"):
        fetch(target, [hub], wanted)
    assert unfinished(target) == ["x.bin.part", "x.bin.part.json"]
    hub.log.clear()


@pytest.mark.parametrize("wanted", [PINNED, BOUNDED, UNKNOWN])
def test_a_later_call_goes_on_where_the_last_one_ended(tmp_path: Path, hub: Hub, wanted: Wanted) -> None:
    target = tmp_path / "x.bin"
    begun(target, hub, wanted)
    hub.behave = honest()
    assert fetch(target, [hub], wanted).kept_bytes == 100_000
    assert hub.log[0].headers["range"] == "bytes=100000-"
    assert hub.log[0].headers["if-range"] == '"v1"'
    assert is_whole(target)


def test_another_source_goes_on_only_with_a_file_of_known_hash(tmp_path: Path, hub: Hub) -> None:
    with running(honest(etag='"other"')) as other:
        for wanted, kept in ((PINNED, 100_000), (UNKNOWN, 0)):
            target = tmp_path / str(kept) / "x.bin"
            begun(target, hub, wanted)
            places = [Address("elsewhere", other.url())]
            got = download.download(places, target, wanted, wire=wire_to(other), pace=QUICK)
            assert got.kept_bytes == kept and is_whole(target)
            assert "if-range" not in other.log[-1].headers


def test_a_validator_is_not_taken_to_another_host(tmp_path: Path, hub: Hub) -> None:
    target = tmp_path / "x.bin"
    with running(cut_after(100_000, etag='"cdn"')) as cdn:
        hub.behave = first(redirect(f"http://localhost:{cdn.port}/x"), status(404))
        with pytest.raises(FetchError):
            fetch(target, [hub], UNKNOWN, wire=wire_to(hub, cdn))
        hub.behave, cdn.behave = redirect(f"http://localhost:{cdn.port}/x"), honest(etag='"cdn"')
        hub.log.clear()
        assert fetch(target, [hub], UNKNOWN, wire=wire_to(hub, cdn)).kept_bytes == 100_000
        assert "if-range" not in hub.log[0].headers and "range" not in hub.log[0].headers
        assert cdn.log[-1].headers["if-range"] == '"cdn"'


def test_without_validator_and_hash_it_begins_anew(tmp_path: Path, hub: Hub) -> None:
    target = tmp_path / "x.bin"
    begun(target, hub, UNKNOWN, etag='W/"weak"')
    hub.behave = honest()
    assert fetch(target, [hub], UNKNOWN).kept_bytes == 0
    assert "range" not in hub.log[0].headers and is_whole(target)


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "state", "nonsense", "other", "huge", "list"])
def test_a_damaged_unfinished_download_is_not_believed(tmp_path: Path, hub: Hub, damage: str) -> None:
    target = tmp_path / "x.bin"
    begun(target, hub, UNKNOWN)
    data, state = tmp_path / "x.bin.part", tmp_path / "x.bin.part.json"
    content = data.read_bytes()
    if damage == "flip":
        data.write_bytes(b"?" + content[1:])
    elif damage == "cut":
        data.write_bytes(content[:-1])
    elif damage == "grow":
        data.write_bytes(content + b"behind")
    elif damage == "state":
        state.unlink()
    elif damage == "other":
        state.write_text(state.read_text(encoding="utf-8").replace("a/b@main", "a/c@main"), encoding="utf-8")
    else:
        state.write_bytes({"nonsense": b"{", "huge": b" " * 100_000, "list": b"[]"}[damage])
    hub.behave = honest()
    assert fetch(target, [hub], UNKNOWN).kept_bytes == (100_000 if damage == "grow" else 0)
    assert is_whole(target) and not unfinished(target)


def test_two_downloads_of_one_file_do_not_meet(tmp_path: Path, hub: Hub) -> None:
    with part.Part(tmp_path / "x.bin", "k"), pytest.raises(FetchError, match="being fetched already"):
        fetch(tmp_path / "x.bin", [hub])
    assert fetch(tmp_path / "x.bin", [hub]).source == "source 0"


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")
def test_nothing_is_written_through_a_link(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "victim").write_bytes(b"keep")
    (tmp_path / "x.bin.part").symlink_to(tmp_path / "victim")
    with pytest.raises(FetchError, match="link"):
        fetch(tmp_path / "x.bin", [hub])
    (tmp_path / "y.bin").symlink_to(tmp_path / "nothing")
    with pytest.raises(FetchError, match="no file"):
        fetch(tmp_path / "y.bin", [hub])
    assert (tmp_path / "victim").read_bytes() == b"keep"


# -- the disk -----------------------------------------------------------------------------------------


def test_without_room_nothing_is_fetched(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, SIZE))
    with pytest.raises(FetchError, match="no room"):
        fetch(tmp_path / "x.bin", [hub])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, SIZE * 2))
    assert fetch(tmp_path / "x.bin", [hub]).bytes == SIZE


def test_every_failing_call_of_the_disk_is_a_typed_error_and_harmless(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Nth call fails, for N = 1, 2, ... until the download passes."""
    real = {name: getattr(os, name) for name in ("fsync", "replace", "open")}
    for number in range(1, 200):
        target, left = tmp_path / str(number) / "x.bin", [number]

        def failing(name: str, left: list[int] = left) -> Callable[..., Any]:
            def failed(*given: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real[name](*given, **named)

            return failed

        for name in real:
            monkeypatch.setattr(part.os, name, failing(name))
        try:
            fetch(target, [hub])
        except FetchError as error:
            assert "No space left" in error.found
        for name, call in real.items():
            monkeypatch.setattr(part.os, name, call)
        if left[0] > 0:
            break
        assert not target.exists() or is_whole(target)
        fetch(target, [hub])
        assert is_whole(target)
    assert 10 < number < 199, "some calls failed, and in the end none did"


# -- stopping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behaviour",
    [
        lambda request: time.sleep(3),
        cut_after(100_000, "silence"),
        drip(0.1, 1000),
        status(429, Retry_After="60"),
        endless(True),
    ],
    ids=["no answer", "silence", "slow", "waiting", "fast"],
)
def test_stopping_takes_less_than_a_second_and_keeps_what_came(
    tmp_path: Path, hub: Hub, behaviour: Behaviour
) -> None:
    hub.behave = behaviour
    asked: list[float] = []

    def stopped() -> bool:
        asked.append(time.monotonic())
        return len(hub.log) > 0 and asked[-1] - asked[0] > 0.3

    patient = replace(QUICK, stall_seconds=30.0, longest_wait=100.0)
    before = threading.active_count()
    with pytest.raises(Stopped):
        fetch(tmp_path / "x.bin", [hub], UNKNOWN, pace=patient, stopped=stopped)
    assert time.monotonic() - asked[-1] < 1.0
    assert max(later - sooner for sooner, later in zip(asked, asked[1:], strict=False)) < 1.0
    assert not (tmp_path / "x.bin").exists()
    names = [thread.name for thread in threading.enumerate()]
    assert threading.active_count() <= before + len(hub.log) and "language-bridge-download" not in names
    if behaviour is not status:
        hub.behave = honest()
        assert is_whole(fetch(tmp_path / "x.bin", [hub]).path)


def test_stopping_while_old_bytes_are_hashed_loses_nothing(tmp_path: Path, hub: Hub) -> None:
    target = tmp_path / "x.bin"
    begun(target, hub, PINNED)
    with pytest.raises(Stopped):
        fetch(target, [hub], stopped=lambda: True)
    assert not hub.log
    hub.behave = honest()
    assert fetch(target, [hub]).kept_bytes == 100_000
    with pytest.raises(Stopped):
        fetch(target, [hub], stopped=lambda: True)


# -- which connections are allowed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://huggingface.co/x", "http instead of https"),
        ("ftp://huggingface.co/x", "ftp instead"),
        ("file:///etc/passwd", "file instead"),
        ("//huggingface.co/x", "no scheme"),
        ("https://huggingface.co.evil.example/x", "list of hosts"),
        ("https://evilhuggingface.co/x", "list of hosts"),
        ("https://hf.co/x", "list of hosts"),
        ("https://huggingface.co:8443/x", "list of hosts"),
        ("https://cdn.hf.co:22/x", "list of hosts"),
        ("https://127.0.0.1/x", "list of hosts"),
        ("https://[::1]/x", "no name"),
        ("https://evil.example\\.hf.co/x", "no name"),
        ("https://evil.example%2e.hf.co/x", "no name"),
        ("https://0x7f000001/x", "list of hosts"),
        ("https://user@huggingface.co/x", "password"),
        ("https://huggingface.co@evil.example/x", "password"),
        ("https://huggingface.co/a\r\nHost: x", "instead|blanks|list"),
        ("https://huggingface.co/\u4e2d", "odd letters"),
        ("https://huggingface.co:99999/x", "none"),
        ("https://", "no name"),
        ("", "no scheme"),
    ],
)
def test_what_may_not_be_asked_is_refused(url: str, says: str) -> None:
    with pytest.raises(Refused, match=says):
        Wire({"huggingface.co", ".hf.co"}).require(url)


def test_what_may_be_asked() -> None:
    wire = Wire({"huggingface.co", ".hf.co", "my.mirror:8443"})
    for url in (
        "https://huggingface.co/a",
        "https://HuggingFace.co:443/a",
        "https://cdn-lfs.hf.co/a?b=c",
        "https://a.b.hf.co/",
        "https://my.mirror:8443/a",
    ):
        wire.require(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "::1",
        "fe80::1%eth0",
    ]
    + [
        "fc00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "100.64.0.1",
        "",
        "x",
    ],
)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(Refused):
        Wire(()).require_public(address)


def test_public_addresses_and_those_of_proxy_programs_pass() -> None:
    for address in ("1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "198.18.0.7"):
        Wire(()).require_public(address)


def test_a_proxy_comes_from_the_environment_and_must_speak_http(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(())
    found: dict[str, str] = {}
    monkeypatch.setattr(connection.urllib.request, "getproxies", lambda: found)
    monkeypatch.setattr(connection.urllib.request, "proxy_bypass", lambda host: host == "near")
    assert wire.proxy("far") is None
    found["https"] = "http://127.0.0.1:7890"
    proxy = wire.proxy("far")
    assert proxy is not None and (proxy.hostname, proxy.port) == ("127.0.0.1", 7890)
    assert wire.proxy("near") is None
    found["https"] = "socks5://127.0.0.1:7890"
    with pytest.raises(Refused, match="HTTP proxies"):
        wire.proxy("far")
