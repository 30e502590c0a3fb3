"""How one process's bridge is put together from what its role has opened. Left out: opening it."""

from ingest.credentials import Credentials, Listener
from ingest.limits import Limits
from ingest.mqtt.bridge import Bridge
from ingest.mqtt.failures import Failures
from ingest.mqtt.intake import Intake
from ingest.mqtt.leases import Leases
from ingest.mqtt.metrics import BridgeMetrics
from ingest.mqtt.names import Names
from ingest.mqtt.session import Broker
from ingest.mqtt.settings import BridgeSettings
from ingest.mqtt.topics import FAMILIES
from ingest.plants import Plants
from ingest.registry import Connections
from ingest.retention import RetentionGuard
from ingest.settings import IngestSettings
from runtime.clock import Clock
from runtime.log.port import Log
from runtime.mqtt import Endpoint
from runtime.secrets import KeyRing, Seal
from schemas.plants import SECRET_SEAL


def make_bridge(
    endpoint: Endpoint,
    *,
    log: Log,
    pool: Connections,
    listener: Listener,
    ring: KeyRing,
    limits: Limits,
    settings: BridgeSettings,
    ingest: IngestSettings,
    clock: Clock,
    metrics: BridgeMetrics,
) -> Bridge:
    """A bridge ready to be started; `pool` and `listener` act as the role sluice_ingest.

    `ring` opens the secrets that plants sign with.
    """
    credentials = Credentials(pool, listener, ingest, clock, metrics, Plants(Seal(ring, SECRET_SEAL)))
    failures = Failures(pool)
    return Bridge(
        Broker(endpoint, settings),
        log=log,
        guard=RetentionGuard(log, pool, ingest.log_retention_share, metrics),
        leases=Leases(pool, settings, [family.name for family in FAMILIES], clock),
        credentials=credentials,
        failures=failures,
        intake=Intake(
            log=log,
            credentials=credentials,
            names=Names(credentials, pool, settings.mqtt_tray_names_max),
            limits=limits,
            settings=settings,
            ingest=ingest,
            clock=clock,
            metrics=metrics,
            failures=failures,
            events=pool,
        ),
        settings=settings,
        clock=clock,
        metrics=metrics,
    )
