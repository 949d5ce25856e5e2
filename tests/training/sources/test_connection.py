"""Where connections may go: names, addresses, and what lies behind a name."""

import ssl

import pytest

from training.sources.base import SourceError
from training.sources.connection import allow_hosts, is_public, transport_error, usable_addresses


def test_allowed_names():
    allow = allow_hosts("Hub.example", ".cdn.example")
    assert allow("hub.example") and allow("a.cdn.example")
    assert not allow("x.hub.example") and not allow("cdn.example")
    assert not allow("evilcdn.example") and not allow("hub.example.evil.net") and not allow("")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:10.0.0.1",
        "ff02::1",
    ],
)
def test_special_addresses_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are(address):
    assert is_public(address)


def fake_lookup(*addresses):
    return lambda host, port, **_: [(0, 0, 0, "", (address, port)) for address in addresses]


def test_private_addresses_of_a_name_are_left_out(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", fake_lookup("10.0.0.1", "1.1.1.1", "1.1.1.1"))
    allow = allow_hosts("hub.example")
    assert usable_addresses("hub.example", 443, allow=allow) == ["1.1.1.1"]
    named = allow_hosts("hub.example", "10.0.0.1")
    assert usable_addresses("hub.example", 443, allow=named) == ["10.0.0.1", "1.1.1.1"]
    monkeypatch.setattr("socket.getaddrinfo", fake_lookup("169.254.169.254"))
    with pytest.raises(SourceError, match="private network") as caught:
        usable_addresses("hub.example", 80, allow=allow)
    assert not caught.value.transient


def test_a_name_that_is_not_found_may_be_found_later(monkeypatch):
    def lose(*_, **__):
        raise OSError("no such name")

    monkeypatch.setattr("socket.getaddrinfo", lose)
    with pytest.raises(SourceError) as caught:
        usable_addresses("hub.example", 80, allow=allow_hosts("hub.example"))
    assert caught.value.reason == "dns" and caught.value.transient


def test_a_wrong_certificate_is_final():
    error = transport_error("https://a/b?c=d", ssl.SSLCertVerificationError("self-signed"))
    assert error.reason == "certificate" and not error.transient and "c=d" not in str(error)
    assert transport_error("https://a/", TimeoutError()).reason == "timeout"
    assert transport_error("https://a/", ssl.SSLError("alert")).transient
