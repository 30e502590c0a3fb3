"""How one process's bridge is put together from what its role has opened. Left out: opening it."""

from collections.abc import Callable

from ingest.credentials import Credentials, Listener
from ingest.limits import Limits
from ingest.mqtt.bridge import Bridge
from ingest.mqtt.intake import Announcement, Intake
from ingest.mqtt.leases import Leases
from ingest.mqtt.metrics import BridgeMetrics
from ingest.mqtt.names import Names
from ingest.mqtt.session import Broker
from ingest.mqtt.settings import BridgeSettings
from ingest.mqtt.topics import FAMILIES
from ingest.registry import Connections
from ingest.retention import RetentionGuard
from ingest.settings import IngestSettings
from runtime.clock import Clock
from runtime.log.port import Log
from runtime.mqtt import Endpoint


def make_bridge(
    endpoint: Endpoint,
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

    `hear` is told of wills and of what devices say of themselves.
    """
    credentials = Credentials(pool, listener, ingest, clock, metrics)
    return Bridge(
        Broker(endpoint, settings),
        log=log,
        guard=RetentionGuard(log, pool, ingest.log_retention_share, metrics),
        leases=Leases(pool, settings, [family.name for family in FAMILIES], clock),
        credentials=credentials,
        intake=Intake(
            log=log,
            credentials=credentials,
            names=Names(credentials, pool, settings.mqtt_tray_names_max),
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
