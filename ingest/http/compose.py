"""How one process's ingest is put together from what its role has opened. Left out: opening it."""

from ingest.credentials import Credentials, Listener
from ingest.http.service import IngestService
from ingest.metrics import IngestMetrics
from ingest.receipts import Receipts
from ingest.registry import Connections
from ingest.settings import IngestSettings
from runtime.clock import Clock
from runtime.log.port import Log
from runtime.secrets import KeyRing, Seal, TokenHasher


def make_service(
    *,
    log: Log,
    pool: Connections,
    listener: Listener,
    ring: KeyRing,
    settings: IngestSettings,
    clock: Clock,
    metrics: IngestMetrics,
) -> IngestService:
    """A service ready to be started; `pool` and `listener` act as the role sluice_ingest."""
    return IngestService(
        log=log,
        credentials=Credentials(pool, listener, settings, clock, metrics),
        receipts=Receipts(Seal(ring, "receipts"), pool, clock, settings.receipt_ttl_s),
        hasher=TokenHasher(ring),
        settings=settings,
        clock=clock,
        metrics=metrics,
    )
