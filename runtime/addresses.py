"""Whose address a request comes from, where proxies stand in between: only what a trusted one says is believed.

Left out: what is done with an address.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from runtime.errors import ConfigurationError

VARIABLE: Final = "SLUICE_TRUSTED_PROXIES"
_MAPPED: Final = bytes(10) + b"\xff\xff"
#: More proxies in a row than anybody has; the rest of a longer list was made up.
_HOPS_MAX: Final = 16
_Address = IPv4Address | IPv6Address


class Proxies:
    """The proxies whose headers count: those in the networks given."""

    def __init__(self, networks: Iterable[str]) -> None:
        """Raises `ConfigurationError` for what is no network."""
        self._networks: list[IPv4Network | IPv6Network] = []
        for network in networks:
            try:
                self._networks.append(ip_network(network, strict=False))
            except ValueError as error:
                raise ConfigurationError(f"{VARIABLE}: {network!r} is no address or network: {error}") from None

    def client(self, peer: str | None, forwarded_for: Iterable[str], forwarded: Iterable[str]) -> bytes:
        """Who sent a request, as 16 bytes: an IPv4 address in its mapped form, an IPv6 address's first 64 bits.

        `forwarded_for` and `forwarded` are the values of X-Forwarded-For and of Forwarded (read where the first is
        missing), in order. Where they are garbage the peer is taken.
        """
        first = _parse(peer or "")
        if first is None:
            return _NOBODY
        if not self._networks or not self._trusts(first):
            return _key(first)
        hops = _hops(forwarded_for) or [_for_of(element) for element in _hops(forwarded)]
        address = first
        for hop in hops[: -_HOPS_MAX - 1 : -1]:
            found = _parse(hop)
            if found is None:
                return _key(first)
            address = found
            if not self._trusts(address):
                break
        return _key(address)

    @property
    def networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        return tuple(self._networks)

    def _trusts(self, address: _Address) -> bool:
        return any(address in network for network in self._networks)


_NOBODY: Final = bytes(15) + b"\1"


def _hops(values: Iterable[str]) -> list[str]:
    return [hop for value in values for hop in value.split(",")]


def _for_of(element: str) -> str:
    """The `for` of an element of Forwarded (RFC 7239)."""
    for pair in element.split(";"):
        name, _, value = pair.partition("=")
        if name.strip().lower() == "for":
            return value.strip().strip('"')
    return ""


def _parse(text: str) -> _Address | None:
    """An address with or without a port; IPv6 in brackets where a port follows."""
    text = text.strip()
    if text.startswith("["):
        text, _, port = text[1:].partition("]")
        if port and not (port.startswith(":") and port[1:].isdecimal()):
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not port.isdecimal():
            return None
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped


def _key(address: _Address) -> bytes:
    if isinstance(address, IPv4Address):
        return _MAPPED + address.packed
    return address.packed[:8] + bytes(8)
