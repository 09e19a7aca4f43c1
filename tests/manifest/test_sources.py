"""Where files are asked for: the user's order, read at each file; tokens to the Hub alone."""

from __future__ import annotations

import pytest

from language_bridge.manifest import sources
from language_bridge.manifest.errors import FetchError
from language_bridge.manifest.schema import RemoteFile

FILE = RemoteFile("who/what", "refs/pr/7", "unet/a.bin", modelscope="AI/what")


def asked(environ: dict[str, str], file: RemoteFile = FILE) -> list[str]:
    return [address.url for address in sources.addresses(file, environ)]


def test_without_a_word_the_hub_comes_first() -> None:
    assert asked({}) == [
        "https://huggingface.co/who/what/resolve/refs%2Fpr%2F7/unet/a.bin",
        "https://hf-mirror.com/who/what/resolve/refs%2Fpr%2F7/unet/a.bin",
        "https://www.modelscope.cn/models/AI/what/resolve/master/unet/a.bin",
    ]


def test_a_file_that_modelscope_does_not_have_is_not_asked_for_there() -> None:
    file = RemoteFile("who/what", "main", "a.bin")
    assert all("modelscope" not in url for url in asked({}, file))
    assert asked({"LANGUAGE_BRIDGE_SOURCES": "modelscope"}, file) == []


def test_the_user_sets_the_order_and_what_is_not_named_is_not_asked() -> None:
    order = sources.order({"LANGUAGE_BRIDGE_SOURCES": " ModelScope, hub,hub "})
    assert order == ("modelscope", "hub")
    assert sources.order({"LANGUAGE_BRIDGE_SOURCES": " , "}) == sources.SOURCES
    with pytest.raises(FetchError, match="LANGUAGE_BRIDGE_SOURCES"):
        sources.order({"LANGUAGE_BRIDGE_SOURCES": "hub;mirror"})


def test_an_endpoint_is_a_mirror_that_comes_first_and_gets_no_token() -> None:
    environ = {"HF_ENDPOINT": "https://my.mirror:8443/hf/"}
    first = sources.addresses(FILE, environ)[0]
    assert first.url.startswith("https://my.mirror:8443/hf/who/what/resolve/")
    assert (first.source, first.may_have_token) == ("mirror", False)
    sources.wire(environ).require(first.url)


def test_the_environment_is_read_at_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("LANGUAGE_BRIDGE_SOURCES", "mirror")
    assert [address.source for address in sources.addresses(FILE)] == ["mirror"]
    monkeypatch.setenv("HF_ENDPOINT", "https://other.mirror")
    assert sources.addresses(FILE)[0].url.startswith("https://other.mirror/")
    sources.wire().require("https://other.mirror/x")
    monkeypatch.delenv("HF_ENDPOINT")
    with pytest.raises(Exception, match="list of hosts"):
        sources.wire().require("https://other.mirror/x")


@pytest.mark.parametrize(
    "endpoint",
    ["http://hf-mirror.com", "https://user:pw@hf-mirror.com", "https://", "hf-mirror.com", "https://a b.com"]
    + [
        "https://hf-mirror.com?x=1",
        "https://hf-mirror.com/#x",
        "file:///x",
        "https://localhost",
        "https://[::1]",
    ],
)
def test_an_endpoint_that_cannot_be_used_is_refused_without_repeating_it(endpoint: str) -> None:
    with pytest.raises(FetchError, match="HF_ENDPOINT") as error:
        sources.addresses(FILE, {"HF_ENDPOINT": endpoint})
    assert "pw" not in str(error.value)


def test_further_hosts_are_names_that_the_user_gives() -> None:
    environ = {"LANGUAGE_BRIDGE_HOSTS": "cdn.example.org, .oss.example.com"}
    sources.wire(environ).require("https://cdn.example.org/x")
    sources.wire(environ).require("https://a.oss.example.com/x")
    with pytest.raises(FetchError, match="LANGUAGE_BRIDGE_HOSTS"):
        sources.wire({"LANGUAGE_BRIDGE_HOSTS": "https://cdn.example.org"})
    with pytest.raises(FetchError, match="LANGUAGE_BRIDGE_HOSTS"):
        sources.wire({"LANGUAGE_BRIDGE_HOSTS": "*"})


def test_only_the_hub_may_have_a_token_and_only_a_plain_one_is_sent() -> None:
    assert {a.source for a in sources.addresses(FILE, {}) if a.may_have_token} == {"hub"}
    assert sources.token({"HF_TOKEN": " hf_abc "}) == "hf_abc"
    assert sources.token({"HF_TOKEN": "hf\r\nHost: x"}) == ""
    assert sources.token({}) == ""


def test_a_file_without_a_known_hash_comes_from_the_hub_or_from_where_the_user_says() -> None:
    assert sources.is_chosen("hub", {}) and not sources.is_chosen("mirror", {})
    assert not sources.is_chosen("modelscope", {"HF_ENDPOINT": "https://my.mirror"})
    assert sources.is_chosen("mirror", {"HF_ENDPOINT": "https://my.mirror"})
    assert sources.is_chosen("modelscope", {"LANGUAGE_BRIDGE_SOURCES": "modelscope,hub"})


@pytest.mark.parametrize("name", ["LANGUAGE_BRIDGE_HOSTS", "LANGUAGE_BRIDGE_SOURCES", "HF_ENDPOINT"])
@pytest.mark.parametrize("value", ["reader:hidden@cdn.example", "https://reader:hidden@cdn.example/hub"])
def test_no_error_repeats_a_password(name: str, value: str) -> None:
    environ = {name: value}
    with pytest.raises(FetchError, match=name) as caught:
        sources.order(environ)
        sources.wire(environ)
    assert "hidden" not in str(caught.value) and "reader" not in str(caught.value)
