"""Listening sockets from settings like `127.0.0.1:8080`. Left out: what listens on them."""

import errno
import socket
from typing import Final, NamedTuple

from runtime.errors import ConfigurationError

#: The kernel's own bound (somaxconn) applies as well: connections that wait while a process is busy.
BACKLOG: Final = 4096


class Address(NamedTuple):
    """A host and a port to listen on; port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(variable: str, text: str) -> Address:
    """`host:port`, `[v6]:port`, or `:port` for every interface. Raises `ConfigurationError` naming `variable`."""
    host, separator, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not port.isdecimal() or int(port) > 65_535 or (":" in host and not bracketed):
        raise ConfigurationError(f"{variable}={text} is not host:port, like 127.0.0.1:8080 or [::1]:8080")
    return Address(host.strip("[]"), int(port))


def listen(variable: str, text: str) -> socket.socket:
    """A bound socket that listens already. Raises `ConfigurationError` naming `variable` when that cannot be."""
    address = parse_address(variable, text)
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigurationError(f"{variable}={text}: no such address: {error}") from error
    # For every interface, the IPv6 one takes IPv4 as well.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET6 if not address.host else False)
    family, kind, protocol, _, target = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if address.host else 0)
        listener.bind(target)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(f"{variable}={text}: the port is taken by another program") from error
        raise ConfigurationError(f"{variable}={text} cannot be listened on: {error}") from error
    return listener


def address_of(listener: socket.socket) -> Address:
    """Where it listens: the port is the real one when any free one was asked for."""
    host, port, *_ = listener.getsockname()
    return Address(host, port)


def reachable(address: Address) -> Address:
    """An address that this machine can connect to, for one that may stand for every interface."""
    return Address({"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(address.host, address.host), address.port)  # noqa: S104
