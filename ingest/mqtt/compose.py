"""How one process's bridge is put together from what its role has opened. Left out: opening it."""

from collections.abc import Callable
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ingest.credentials import Credentials, Listener
from ingest.limits import Limits
from ingest.mqtt.bridge import Bridge
from ingest.mqtt.connection import Address
from ingest.mqtt.intake import Announcement, Intake
from ingest.mqtt.leases import Leases
from ingest.mqtt.metrics import BridgeMetrics
from ingest.mqtt.session import Broker
from ingest.mqtt.settings import BridgeSettings
from ingest.mqtt.topics import FAMILIES
from ingest.registry import Connections
from ingest.retention import RetentionGuard
from ingest.settings import IngestSettings
from runtime.clock import Clock
from runtime.errors import ConfigurationError
from runtime.log.port import Log
from runtime.tls import client_context

_PORTS = {"mqtt": 1883, "mqtts": 8883}


def make_bridge(
    *,
    log: Log,
    pool: Connections,
    listener: Listener,
    limits: Limits,
    settings: BridgeSettings,
    ingest: IngestSettings,
    clock: Clock,
    metrics: BridgeMetrics,
    hear: Callable[[Announcement], None] = lambda _: None,
) -> Bridge:
    """A bridge ready to be started; `pool` and `listener` act as the role sluice_ingest.

    `hear` is told of wills and of what devices say of themselves. Raises `ConfigurationError`.
    """
    credentials = Credentials(pool, listener, ingest, clock, metrics)
    return Bridge(
        make_broker(settings),
        log=log,
        guard=RetentionGuard(log, pool, ingest.log_retention_share, metrics),
        leases=Leases(pool, settings, [family.name for family in FAMILIES], clock),
        credentials=credentials,
        intake=Intake(
            log=log,
            credentials=credentials,
            limits=limits,
            settings=settings,
            ingest=ingest,
            clock=clock,
            metrics=metrics,
            hear=hear,
        ),
        settings=settings,
        clock=clock,
        metrics=metrics,
    )


def make_broker(settings: BridgeSettings) -> Broker:
    """Raises `ConfigurationError` for a URL that names none, or for files that are not what they should be."""
    if not settings.mqtt_url:
        raise ConfigurationError("SLUICE_MQTT_URL is not set: a bridge needs a broker, mqtt://host:port")
    parts = urlsplit(settings.mqtt_url)
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    return Broker(_address(parts), user, password, settings)


def _address(parts: SplitResult) -> Address:
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "mqtt" and options:
        raise ConfigurationError("SLUICE_MQTT_URL: options need TLS: mqtts://")
    tls = client_context("SLUICE_MQTT_URL", options) if parts.scheme == "mqtts" else None
    return Address(parts.hostname or "", parts.port or _PORTS[parts.scheme], tls)
