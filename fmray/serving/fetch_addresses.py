"""Which web addresses pictures are fetched from: how they are read, which hosts are listed, what a public address is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal
from urllib.parse import quote, urljoin, urlsplit

import idna

from fmray.errors import ConfigError, RequestError

LONGEST_ADDRESS = 8192
"""Characters; signed addresses of object stores have about 2,000."""
PORTS = {"http": 80, "https": 443}

_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
"""Parsers disagree about these: none of them stands in an address that is fetched."""
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_VISIBLE = "".join(map(chr, range(0x21, 0x7F)))

IPAddress = IPv4Address | IPv6Address


# ------------------------------------------------------------------------------------------- numbers of the network

_V4_SPECIAL = [
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by a provider's customers
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, and the metadata of clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
]
_V6_UNICAST = IPv6Network("2000::/3")
_V6_SPECIAL = [
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocols: Teredo, ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",  # documentation
    )
]
_NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: IPAddress) -> bool:
    """Whether an address is global unicast: RFC 6890 and IANA's registries of special-purpose addresses.

    Written out, as `ipaddress.is_global` changes between Python's versions and takes multicast for global. An IPv4
    address within an IPv6 one is judged in its stead where networks translate it (mapped, NAT64), else refused.
    """
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _V4_SPECIAL)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _V6_UNICAST and not any(address in network for network in _V6_SPECIAL)


# ------------------------------------------------------------------------------------------------------- addresses


@dataclass(frozen=True, slots=True)
class WebAddress:
    """Where a picture is. `WebAddress("https", "images.example.org", 443, "/cat.png?size=2")`"""

    scheme: Literal["http", "https"]
    host: str
    """Lower case, IDNA, without a final dot; or four decimal numbers."""
    port: int
    target: str
    """Path and query, in ASCII."""

    @property
    def host_header(self) -> str:
        """The host, with the port where it is not the scheme's own."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"

    def joined(self, location: str) -> str:
        """The address that a redirect's `location` means from here."""
        return urljoin(f"{self.scheme}://{self.host_header}{self.target}", location)


def not_allowed(name: str, facts: str) -> RequestError:
    """`input[0]: only http and https are fetched`"""
    return RequestError(400, "url_not_allowed", f"{name}: {facts}", name)


def read_address(url: str, name: str) -> WebAddress:
    """The address that a URL means; raises RequestError(400, `url_not_allowed`) where that may be doubted."""
    if len(url) > LONGEST_ADDRESS:
        raise not_allowed(name, f"the address has more than {LONGEST_ADDRESS:,} characters")
    if _UNSAFE.search(url):
        raise not_allowed(
            name, "the address has spaces, control characters or backslashes; percent-encode them"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise not_allowed(name, "the address cannot be read") from None
    scheme: Literal["http", "https"]
    if parts.scheme == "http":
        scheme = "http"
    elif parts.scheme == "https":
        scheme = "https"
    else:
        raise not_allowed(name, "only http and https are fetched")
    if "@" in parts.netloc:
        raise not_allowed(name, "the address has a user or a password")
    host = normal_host(parts.hostname or "")
    if host is None or port == 0:
        raise not_allowed(name, "the address has no host that could be listed")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return WebAddress(scheme, host, PORTS[scheme] if port is None else port, quote(target, safe=_VISIBLE))


def normal_host(host: str) -> str | None:
    """A host as it is compared: lower case, IDNA (UTS 46), no final dot; None where it is no name.

    IPv6 addresses cannot be listed. IPv4 addresses have four decimal numbers: 2130706433, 0x7f.1 and 010.0.0.1 are not read.
    """
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode("ascii")
        except idna.IDNAError:
            return None
    host = host.lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        return None
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(host))
        except AddressValueError:
            return None
    return host


# ----------------------------------------------------------------------------------------------------------- hosts


@dataclass(frozen=True, slots=True)
class _Listed:
    host: str
    below: bool
    """Every host below this one, not itself."""
    ports: frozenset[int]


class HostList:
    """`HostList(["images.example.org", "*.example.net", "example.com:8443"])`: ports are 80 and 443 unless one is said.

    Raises ConfigError for an entry that no host can match.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self._listed = [_read_entry(entry) for entry in entries]

    def __bool__(self) -> bool:
        return bool(self._listed)

    def allows(self, address: WebAddress) -> bool:
        """Whether host and port are listed."""
        return any(
            address.port in listed.ports
            and (address.host.endswith(f".{listed.host}") if listed.below else address.host == listed.host)
            for listed in self._listed
        )


def _read_entry(entry: str) -> _Listed:
    name, colon, port = entry.partition(":")
    host = normal_host(name.removeprefix("*."))
    sound = not colon or (port.isascii() and port.isdecimal() and 0 < int(port) < 65_536)
    below = name.startswith("*.")
    if host is None or not sound or (below and _NUMBER.fullmatch(host.rpartition(".")[2])):
        cure = "write a host as images.example.org, *.example.org or images.example.org:8443"
        raise ConfigError("fetch.hosts", entry, cure)
    return _Listed(host, below, frozenset([int(port)] if colon else PORTS.values()))
