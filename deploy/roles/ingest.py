"""The role `ingest`: readings over HTTP, into the log."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.process import Process
from deploy.roles.role import Role, serve
from deploy.settings import DeploySettings
from ingest.http.compose import make_replayer, make_service
from ingest.http.service import IngestService
from ingest.limits import Limits, LimitSettings
from ingest.metrics import IngestMetrics
from ingest.paced.lane import PacedLane
from ingest.registry import Connections, ask
from ingest.replay import Replayer
from ingest.settings import IngestSettings, PacedSettings, ReplaySettings, SpoolSettings
from ingest.spool.ends import ends_in
from ingest.spool.spool import Spool
from runtime.clock import SystemClock
from runtime.http.cors import CorsSettings, Origins
from runtime.log import LogSettings
from runtime.log.port import Log
from runtime.notifications import Notifications
from runtime.postgres import PostgresSettings
from runtime.secrets import KeyRing, SecretSettings

_GENERATIONS: Final = "SELECT source FROM log_generations ORDER BY created_at"
_GENERATIONS_WAIT_S: Final = 5.0


@dataclass(frozen=True)
class WayIn:
    """What all that takes readings in one process has in common."""

    pool: Connections
    limits: Limits
    metrics: IngestMetrics


async def way_in(process: Process, metrics: IngestMetrics) -> WayIn:
    """Sessions of its own; whoever uses it last closes its limits."""
    settings = process.settings
    pool = await process.pool("sluice_ingest")
    directory = Path(settings.get(DeploySettings).data_dir) / "limits"
    return WayIn(pool, Limits(settings.get(LimitSettings), SystemClock(), directory), metrics)


async def make_ingest(process: Process, log: Log, ring: KeyRing, common: WayIn) -> IngestService:
    """The ingest face, started; it ends with the process."""
    settings = process.settings
    clock, pool, limits, metrics = SystemClock(), common.pool, common.limits, common.metrics
    places = await _spool_places(process, log, pool)
    spool = make_spool(process, log, pool, places, metrics)
    lane = make_lane(process, log, spool, limits, pool, places, metrics)
    service = make_service(
        log=log,
        pool=pool,
        listener=Notifications(
            settings.get(PostgresSettings), role="sluice_ingest", application=f"sluice {process.name}"
        ),
        ring=ring,
        limits=limits,
        settings=settings.get(IngestSettings),
        clock=clock,
        metrics=metrics,
        spool=spool,
        lane=lane,
        origins=Origins(settings.get(CorsSettings).api_cors_origins),
    )
    await service.start()
    process.teardown.add("ingest", service.stop)
    process.run_beside("ingest tasks", service.watch())
    process.health.note("credentials", lambda: service.note)
    if spool is not None:
        process.check_log_by(lambda: service.trouble)
        process.health.note("spool", lambda: spool.note)
    if lane is not None:
        process.health.note("paced", lambda: lane.note)
    process.run_beside("replay", make_replay(process, log, pool, metrics, spool).run())
    return service


async def _spool_places(process: Process, log: Log, pool: Connections) -> list[Path]:
    """Where the spools of the log's earlier generations lie, and last that of its own.

    A spool lies by the generation of its log: another installation with the same directory does not drain it.
    """
    place = Path(process.settings.get(DeploySettings).data_dir, "spool")
    if directory := process.settings.get(SpoolSettings).spool_dir:
        place = Path(directory)
    rows = await process.patiently("generations", lambda: ask(pool, _GENERATIONS, timeout_s=_GENERATIONS_WAIT_S))
    return [*(place / str(row["source"]) for row in rows if row["source"] != log.source), place / str(log.source)]


def make_spool(
    process: Process, log: Log, pool: Connections, places: Sequence[Path], metrics: IngestMetrics
) -> Spool | None:
    """None where the settings want none."""
    settings = process.settings.get(SpoolSettings)
    if not settings.spool:
        return None
    return Spool(
        log=log,
        directory=places[-1],
        elders=places[:-1],
        end=ends_in(pool),
        settings=settings,
        log_settings=process.settings.get(LogSettings),
        clock=SystemClock(),
        metrics=metrics,
    )


def make_lane(
    process: Process,
    log: Log,
    spool: Spool | None,
    limits: Limits,
    pool: Connections,
    places: Sequence[Path],
    metrics: IngestMetrics,
) -> PacedLane | None:
    """None where the settings want none; its files lie beside the spool's."""
    settings = process.settings.get(PacedSettings)
    if not settings.paced:
        return None
    return PacedLane(
        log=log,
        spool=spool,
        limits=limits,
        pool=pool,
        directory=places[-1] / "paced",
        elders=[place / "paced" for place in places[:-1]],
        settings=settings,
        log_settings=process.settings.get(LogSettings),
        clock=SystemClock(),
        metrics=metrics,
    )


def make_replay(
    process: Process, log: Log, pool: Connections, metrics: IngestMetrics, spool: Spool | None
) -> Replayer:
    """Replays go straight to the log; they wait while the spool has what must go before them."""
    settings = process.settings
    return make_replayer(
        log=log,
        pool=pool,
        listener=Notifications(
            settings.get(PostgresSettings), role="sluice_ingest", application=f"sluice {process.name} replay"
        ),
        ingest=settings.get(IngestSettings),
        settings=settings.get(ReplaySettings),
        clock=SystemClock(),
        metrics=metrics,
        trouble=lambda: None if spool is None else spool.note,
    )


async def _work_ingest(process: Process, listeners: list[socket.socket]) -> None:
    ring = KeyRing.parse(process.settings.get(SecretSettings).secret_keys)
    if process.settings.get(SpoolSettings).spool:
        log = await process.log_that_may_be_away()
    else:
        _, log = await process.log()
    service = await make_ingest(process, log, ring, await way_in(process, IngestMetrics()))
    server = await serve(process, listeners[0], service.handle, service.refuse)
    service.connections = server.count


INGEST: Final = Role(
    "ingest",
    9461,
    lambda settings: settings.get(IngestSettings).http_processes,
    lambda settings: ("SLUICE_HTTP_LISTEN", settings.get(IngestSettings).http_listen),
    _work_ingest,
)
