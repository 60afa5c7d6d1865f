"""Every address of serving.md 6.5: how it is read, whether its host is listed, whether its number is public."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fmray.config.serving import FetchConfig
from fmray.errors import ConfigError, RequestError
from fmray.serving.fetch_addresses import (
    HostList,
    WebAddress,
    is_public,
    normal_host,
    read_address,
)

PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "223.255.255.254",
    "172.15.0.1",
    "172.32.0.1",
    "192.0.1.1",
    "2606:4700::1111",
    "2a00::1",
]
PUBLIC += ["::ffff:8.8.8.8", "64:ff9b::808:808"]
NOT_PUBLIC = [
    "127.0.0.1",
    "127.255.255.255",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "169.254.170.2",
    "100.64.0.1",
    "100.100.100.200",
    "192.0.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "::8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::808:808",
    "2002:7f00:1::",
    "2002:808:808::",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:db8::1",
    "3fff::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "100::1",
    "5f00::1",
    "4000::1",
]


@pytest.mark.parametrize("text", PUBLIC)
def test_public_numbers(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_numbers_that_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_what_is_public_is_global_and_unicast_for_python_too(address: IPv4Address | IPv6Address) -> None:
    if is_public(address):
        inner = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        judged = inner or address
        assert judged.is_global
        assert not any((judged.is_multicast, judged.is_private, judged.is_loopback, judged.is_link_local))


# ---------------------------------------------------------------------------------------------------------- reading

READ = {
    "https://images.example.org/cat.png": WebAddress("https", "images.example.org", 443, "/cat.png"),
    "HTTP://IMAGES.Example.ORG": WebAddress("http", "images.example.org", 80, "/"),
    "https://a.b:8443/x?y=1&z=%20#part": WebAddress("https", "a.b", 8443, "/x?y=1&z=%20"),
    "https://a.b?y": WebAddress("https", "a.b", 443, "/?y"),
    "https://a.b.:443/": WebAddress("https", "a.b", 443, "/"),
    "https://bücher.example/ä.png?ö": WebAddress("https", "xn--bcher-kva.example", 443, "/%C3%A4.png?%C3%B6"),
    "https://BÜCHER。example/": WebAddress("https", "xn--bcher-kva.example", 443, "/"),
    "https://xn--bcher-kva.example/": WebAddress("https", "xn--bcher-kva.example", 443, "/"),
    "https://ｅxample.org/": WebAddress("https", "example.org", 443, "/"),
    "http://8.8.8.8/": WebAddress("http", "8.8.8.8", 80, "/"),
    "http://a.b/../../etc/passwd": WebAddress("http", "a.b", 80, "/../../etc/passwd"),
}


@pytest.mark.parametrize("url", READ)
def test_addresses_that_are_read(url: str) -> None:
    assert read_address(url, "input[0]") == READ[url]


CHARACTERS = "the address has spaces, control characters or backslashes; percent-encode them"
SCHEME = "only http and https are fetched"
USER = "the address has a user or a password"
HOST = "the address has no host that could be listed"
UNREAD = "the address cannot be read"
NOT_READ = {
    "file:///etc/passwd": SCHEME,
    "ftp://a.b/c": SCHEME,
    "gopher://a.b:70/_": SCHEME,
    "//a.b/c": SCHEME,
    "a.b/c": SCHEME,
    "": SCHEME,
    "https:a.b/c": HOST,
    "https:///a.b/c": HOST,
    "https://": HOST,
    "https://user@a.b/": USER,
    "https://user:secret@a.b/": USER,
    "https://a.b@evil.example/": USER,
    "https://@a.b/": USER,
    "https://evil.example\\@a.b/": CHARACTERS,
    "https://a.b\\.evil.example/": CHARACTERS,
    "https://a.b/c d": CHARACTERS,
    "https://a.b/\r\nHost: evil": CHARACTERS,
    "ht\ntps://a.b/": CHARACTERS,
    " https://a.b/": CHARACTERS,
    "https://a.b/\0": CHARACTERS,
    "https://a.b:0/": HOST,
    "https://a.b:65536/": UNREAD,
    "https://a.b:-1/": UNREAD,
    "https://a.b:８０/": UNREAD,
    "https://a.b:80:80/": UNREAD,
    "https://[::1/": UNREAD,
    "https://a.b？.evil.example/": UNREAD,
    "http://[::1]/": HOST,
    "http://[::ffff:127.0.0.1]/": HOST,
    "http://[fe80::1%25eth0]/": HOST,
    "http://2130706433/": HOST,
    "http://0x7f.1/": HOST,
    "http://0x7f000001/": HOST,
    "http://0177.0.0.1/": HOST,
    "http://127.1/": HOST,
    "http://127.0.0.1.1/": HOST,
    "http://a.b.0x/": HOST,
    "http://a..b/": HOST,
    "http://.a.b/": HOST,
    "http://a.b../": HOST,
    "http://-a.b/": HOST,
    "http://a%2eb/": HOST,
    "http://a*b/": HOST,
    "http://*.b/": HOST,
    f"http://{'a' * 64}.b/": HOST,
    f"http://{'a.' * 127}b/": HOST,
    f"http://a.b/{'x' * 8192}": "the address has more than 8,192 characters",
}


@pytest.mark.parametrize("url", NOT_READ)
def test_addresses_that_are_not_read(url: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_address(url, "input[3]")
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "url_not_allowed", "input[3]")
    assert error.message == f"input[3]: {NOT_READ[url]}"


@given(
    st.text(max_size=30) | st.text("ab.1:/@?#[]%\\x0 。ü-", max_size=30).map(lambda text: f"http://{text}")
)
def test_any_text_is_an_address_or_an_answer(url: str) -> None:
    try:
        address = read_address(url, "input[0]")
    except RequestError as error:
        assert error.code == "url_not_allowed"  # noqa: PT017
    else:
        assert normal_host(address.host) == address.host
        assert address.target.isascii()
        assert address.target.startswith("/")
        assert (
            read_address(f"{address.scheme}://{address.host}:{address.port}{address.target}", "x") == address
        )


# ------------------------------------------------------------------------------------------------------------ hosts

LISTED = ["images.example.org", "*.cdn.example", "Bücher.example", "odd.example:8443", "192.0.2.7"]
ALLOWED = {
    "https://images.example.org/": True,
    "http://images.example.org/": True,
    "https://images.example.org:80/": True,
    "https://IMAGES.example.org./": True,
    "https://images.example.org:8443/": False,
    "https://example.org/": False,
    "https://x.images.example.org/": False,
    "https://images.example.org.evil.example/": False,
    "https://evilimages.example.org/": False,
    "https://a.cdn.example/": True,
    "https://a.b.cdn.example/": True,
    "https://cdn.example/": False,
    "https://evilcdn.example/": False,
    "https://xn--bcher-kva.example/": True,
    "https://bücher.example/": True,
    "https://bucher.example/": False,
    "https://odd.example:8443/": True,
    "http://odd.example:8443/": True,
    "https://odd.example/": False,
    "http://192.0.2.7/": True,
    "http://192.0.2.8/": False,
    "http://localhost/": False,
    "http://127.0.0.1/": False,
    "http://169.254.169.254/": False,
}


@pytest.mark.parametrize("url", ALLOWED)
def test_the_list_of_hosts(url: str) -> None:
    assert HostList(LISTED).allows(read_address(url, "x")) is ALLOWED[url]
    assert not HostList([]).allows(read_address(url, "x"))


@pytest.mark.parametrize(
    "entry",
    [
        "https://a.b",
        "a.b/c",
        "a.b:",
        "a.b:99999999",
        "a.b:x",
        "*",
        "*.",
        "a.*.b",
        "user@a.b",
        "a b",
        "",
        "[::1]",
        "a..b",
        ".",
    ],
)
def test_entries_that_are_no_hosts(entry: str) -> None:
    cure = "write a host as images.example.org, *.example.org or images.example.org:8443"
    with pytest.raises(ValidationError, match=re.escape(f"fetch.hosts={entry!r}: {cure}")):
        FetchConfig(hosts=("a.b", entry))


@pytest.mark.parametrize(
    "entry", ["a.b:0", "a.b:65536", "*.2.3.4", "300.1.2.3", "0x7f.1", "-a.b", "a" * 64 + ".b", "ü" * 64]
)
def test_entries_that_only_the_fetcher_can_judge(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"fetch\.hosts="):
        HostList(FetchConfig(hosts=(entry,)).hosts)
