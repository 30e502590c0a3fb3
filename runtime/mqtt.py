"""Where the MQTT broker is, and a client of it for what is not the hot path.

The bridge has a connection of its own (`ingest.mqtt.connection`), since an acknowledgement of its has to wait for the
log. Left out: topics, and what is said in them.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import aiomqtt

from runtime.errors import ConfigurationError, UnavailableError
from runtime.settings import setting
from runtime.tls import client_context
from runtime.urls import check_query, check_server, split_url

#: By scheme, where a URL names no port.
PORTS: Final = {"mqtt": 1883, "mqtts": 8883}
VARIABLE: Final = "SLUICE_MQTT_URL"
#: Of `mqtts://`, as of a `kafkas://` URL.
OPTIONS: Final = ("cafile", "certfile", "keyfile")
_KEEP_ALIVE_S: Final = 30


def check_url(url: str) -> None:
    """Raises `ValueError` for what is no URL of a broker."""
    parts = split_url(url, tuple(PORTS))
    check_server(parts)
    check_query(parts, OPTIONS)


@dataclass(frozen=True, kw_only=True)
class MqttSettings:
    """Which broker there is; every part that speaks with it reads this."""

    mqtt_url: str = setting(
        "",
        secret=True,
        check=check_url,
        why="mqtt://… or mqtts://… of the broker, user:password@ before the host; with it, `sluice up` runs a "
        "bridge. `?cafile=` names the authorities of mqtts, `certfile=` and `keyfile=` what is shown to the broker.",
    )


class Address(NamedTuple):
    """Where a broker is."""

    host: str
    port: int
    tls: ssl.SSLContext | None


class Endpoint(NamedTuple):
    """A broker, and who we are to it."""

    address: Address
    user: str | None
    password: str | None


def endpoint(url: str, variable: str = VARIABLE) -> Endpoint:
    """What the URL in the setting `variable` names.

    Raises `ConfigurationError` for a URL that names none, or for files that are not what they should be.
    """
    if not url:
        raise ConfigurationError(f"{variable} is not set: a broker is needed, mqtt://host:port")
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "mqtt" and options:
        raise ConfigurationError(f"{variable}: options need TLS: mqtts://")
    tls = client_context(variable, options) if parts.scheme == "mqtts" else None
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    return Endpoint(Address(parts.hostname or "", parts.port or PORTS[parts.scheme], tls), user, password)


@asynccontextmanager
async def connected(
    to: Endpoint, client: str, *, timeout_s: float, messages_max: int
) -> AsyncIterator[aiomqtt.Client]:
    """A client with a session that ends with it, MQTT 5. `messages_max` wait, either way; more are dropped.

    Raises `UnavailableError` when the broker cannot be reached or refuses us, and when the connection breaks.
    """
    try:
        async with aiomqtt.Client(
            to.address.host,
            to.address.port,
            username=to.user,
            password=to.password,
            identifier=client,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=True,
            timeout=timeout_s,
            keepalive=_KEEP_ALIVE_S,
            max_queued_incoming_messages=messages_max,
            max_queued_outgoing_messages=messages_max,
            tls_context=to.address.tls,
        ) as opened:
            yield opened
    except aiomqtt.MqttError as error:
        raise UnavailableError(f"the broker is not there: {error}") from error
