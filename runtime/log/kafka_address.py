"""The Kafka forms of a log URL: brokers, and how to be let in. Left out: connections."""

from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from runtime.errors import ConfigurationError
from runtime.tls import client_context

PORT_DEFAULT: Final = 9092
MECHANISM_DEFAULT: Final = "SCRAM-SHA-512"
MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
OPTIONS: Final = ("mechanism", "cafile", "certfile", "keyfile")


class Address(NamedTuple):
    """Where the brokers are, and what a connection needs besides a host and a port."""

    hosts: tuple[tuple[str, int], ...]
    access: dict[str, Any]


def parse_address(url: str) -> Address:
    """Read `kafka://…` or `kafkas://…`. Raises `ConfigurationError`, without the password in it."""
    parts = urlsplit(url)
    login, _, brokers = parts.netloc.rpartition("@")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.path not in ("", "/") or parts.fragment:
        raise _bad(f"{parts.path!r} after the brokers means nothing")
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise _bad(f"unknown option {unknown[0]!r}, known are {', '.join(OPTIONS)}")
    hosts = tuple(_parse_host(broker) for broker in brokers.split(","))
    if parts.scheme == "kafkas":
        return Address(hosts, _access(login, options))
    if login or options:
        raise _bad("credentials and options need TLS: kafkas://")
    return Address(hosts, {"security_protocol": "PLAINTEXT"})


def _parse_host(broker: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{broker}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise _bad(f"{broker!r} is no host:port")
    return host, PORT_DEFAULT if port is None else port


def _access(login: str, options: dict[str, str]) -> dict[str, Any]:
    access: dict[str, Any] = {"security_protocol": "SSL", "ssl_context": client_context("SLUICE_LOG_URL", options)}
    if not login:
        return access
    user, separator, password = login.partition(":")
    mechanism = options.get("mechanism", MECHANISM_DEFAULT)
    if not separator or not user or not password:
        raise _bad("user and password go together: kafkas://user:password@host:port")
    if mechanism not in MECHANISMS:
        raise _bad(f"mechanism={mechanism} is none of {', '.join(MECHANISMS)}")
    return access | {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": mechanism,
        "sasl_plain_username": unquote(user),
        "sasl_plain_password": unquote(password),
    }


def _bad(text: str) -> ConfigurationError:
    return ConfigurationError(f"SLUICE_LOG_URL: {text}")
