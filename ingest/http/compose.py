"""How one process's ingest is put together from what its role has opened. Left out: opening it."""

from collections.abc import Callable

from ingest.admit import Admission
from ingest.credentials import Credentials, Listener
from ingest.http.callers import Callers
from ingest.http.service import IngestService
from ingest.keeping import Keeper
from ingest.limits import Limits
from ingest.metrics import IngestMetrics
from ingest.paced.lane import PacedLane
from ingest.receipts import Receipts
from ingest.registry import Connections
from ingest.replay import Replayer
from ingest.retention import RetentionGuard
from ingest.settings import IngestSettings, ReplaySettings
from ingest.spool.spool import Spool
from runtime.clock import Clock
from runtime.http.cors import Origins
from runtime.log.port import Log
from runtime.secrets import KeyRing, Seal, TokenHasher


def make_service(
    *,
    log: Log,
    pool: Connections,
    listener: Listener,
    ring: KeyRing,
    limits: Limits,
    settings: IngestSettings,
    clock: Clock,
    metrics: IngestMetrics,
    spool: Spool | None = None,
    lane: PacedLane | None = None,
    origins: Origins | None = None,
) -> IngestService:
    """A service ready to be started; `pool` and `listener` act as the role sluice_ingest."""
    credentials = Credentials(pool, listener, settings, clock, metrics)
    guard = RetentionGuard(log, pool, settings.log_retention_share, metrics)
    return IngestService(
        keeper=Keeper(log, spool, guard, metrics, lane),
        callers=Callers(credentials, TokenHasher(ring), limits, settings.trusted_proxies, metrics),
        receipts=Receipts(Seal(ring, "receipts"), pool, clock, settings.receipt_ttl_s),
        limits=limits,
        settings=settings,
        clock=clock,
        metrics=metrics,
        origins=origins,
    )


def make_replayer(
    *,
    log: Log,
    pool: Connections,
    listener: Listener,
    ingest: IngestSettings,
    settings: ReplaySettings,
    clock: Clock,
    metrics: IngestMetrics,
    trouble: Callable[[], str | None] = lambda: None,
) -> Replayer:
    """What puts quarantined readings back onto the log; `pool` and `listener` act as the role sluice_ingest."""
    admission = Admission(future_us=round(ingest.reading_future_s * 1e6), year_floor=ingest.reading_year_floor)
    return Replayer(
        log=log,
        pool=pool,
        listener=listener,
        admission=admission,
        settings=settings,
        clock=clock,
        metrics=metrics,
        trouble=trouble,
    )
