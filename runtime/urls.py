"""The shape of URLs in settings, told before anything is opened. Messages quote nothing that may be a secret.

Left out: what the parts of a URL mean to whoever opens it.
"""

from collections.abc import Collection
from urllib.parse import SplitResult, parse_qsl, urlsplit

_PORT_MAX = 65_535


def split_url(url: str, schemes: Collection[str]) -> SplitResult:
    """The parts of `url`, which begins with one of `schemes`. Raises `ValueError` for what is no such URL."""
    known = " or ".join(f"{scheme}://" for scheme in schemes)
    # Without it, what stands before a colon may be anything, a password too.
    if "://" not in url:
        raise ValueError(f"is no URL: it begins with {known}")
    try:
        parts = urlsplit(url)
    except ValueError:  # its words quote the host, and with it the login
        raise ValueError("is no URL: the host is none, or a bracket is missing") from None
    if parts.scheme not in schemes:
        raise ValueError(f"begins with {parts.scheme!r}, which is none of {known}")
    if not url.isprintable():
        raise ValueError("has a control character in it")
    return parts


def check_server(parts: SplitResult, *, several: bool = False, host_required: bool = True) -> None:
    """Raises `ValueError` unless a host is named that can be one, or with `several` a list of them."""
    login, _, hosts = parts.netloc.rpartition("@")
    if " " in parts.netloc:
        raise ValueError("has a space in it: write that as %20")
    if "@" in login or any("@" in part for part in (parts.path, parts.query, parts.fragment)):
        raise ValueError("has an @ in a login, or behind the host: write @ / ? # of a login as %40 %2F %3F %23")
    if not hosts and not host_required:
        return
    for number, host in enumerate(hosts.split(",") if several else [hosts], start=1):
        _check_host(host, f"host {number}" if several and "," in hosts else "the host")


def check_query(parts: SplitResult, known: Collection[str] | None = None) -> None:
    """Raises `ValueError` for options that are not name=value, or are none of `known`."""
    try:
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError("has options that are not ?name=value&name=value") from None
    if parts.fragment:
        raise ValueError("has a # in it: write that as %23")
    for name, _ in options:
        if known is not None and name not in known:
            raise ValueError(f"has an option {name!r}, which is none of {', '.join(known) or 'those that there are'}")


def _check_host(text: str, which: str) -> None:
    # A login without its @ looks like a host and a port: only what lies in front of the colon may be shown.
    host, separator, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not separator:
        host, port = text, ""
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not host.strip("[]") or (not is_bracketed and any(character in host for character in ":[],")):
        raise ValueError(f"names no host: {which} is not host:port, nor [v6]:port")
    if separator and not (port.isascii() and port.isdecimal() and 0 < int(port) <= _PORT_MAX):
        raise ValueError(f"names no port: {which} is not host:port with a port from 1 to {_PORT_MAX}")
