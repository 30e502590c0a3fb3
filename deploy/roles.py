"""The roles, each in a process of its own or in several: what is opened for them, and in which order.

Left out: all of them in one process (`deploy.up`).
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from api.access.settings import AccessSettings
from api.metrics import ApiMetrics
from api.server import create_app
from api.serving import ApiFace
from api.settings import ApiSettings
from deploy.process import Process
from deploy.settings import DeploySettings, public_url
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
from runtime.addresses import Proxies
from runtime.clock import SystemClock
from runtime.errors import ConfigurationError
from runtime.http.refusals import count_refused
from runtime.http.server import Handler, HttpServer, HttpSettings, Refuse
from runtime.lifecycle import LifecycleSettings
from runtime.log import LogSettings
from runtime.log.port import Log
from runtime.notifications import Notifications
from runtime.postgres import PostgresSettings
from runtime.secrets import KeyRing, SecretSettings
from runtime.settings import Settings
from runtime.supervisor import Inherited
from runtime.tls import TlsSettings, server_tls
from workers.landing.worker import run_worker
from workers.ledger import LedgerTotals
from workers.metrics import LandingMetrics, LedgerMetrics, QuarantineMetrics
from workers.presence import Presence
from workers.quarantine import Bounds
from workers.settings import LandingSettings, LedgerSettings, PresenceSettings, QuarantineSettings

_GENERATIONS: Final = "SELECT source FROM log_generations ORDER BY created_at"
_GENERATIONS_WAIT_S: Final = 5.0


@dataclass(frozen=True)
class Role:
    """What one process of a role needs, and what it does."""

    name: str
    metrics_port: int
    processes: Callable[[Settings], int]
    #: The setting and the address that it listens on, if it does.
    address: Callable[[Settings], tuple[str, str] | None]
    work: Callable[[Process, list[socket.socket]], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Launch:
    """How this process was started: `argv` would start it again, `inherited` is what its parent gave it."""

    settings: Settings
    argv: Sequence[str]
    inherited: Inherited | None = None


async def run_role(role: Role, launch: Launch, stop: asyncio.Event) -> None:
    """Be a process of `role`, or the parent of several, until told to stop."""
    process = Process(role.name, launch.settings, stop)
    if launch.inherited is not None:
        await process.serve(_child(role, launch.inherited))
    elif role.processes(launch.settings) > 1:
        await process.serve(_parent(role, launch.argv))
    else:
        await process.serve(_alone(role))


def _alone(role: Role) -> Callable[[Process], Coroutine[Any, Any, None]]:
    async def start(process: Process) -> None:
        process.ignore_hangup()
        await process.expose(role.metrics_port)
        listeners = _listen(role, process)
        await process.prepare_database(may_change=True)
        await role.work(process, listeners)

    return start


def _parent(role: Role, argv: Sequence[str]) -> Callable[[Process], Coroutine[Any, Any, None]]:
    async def start(process: Process) -> None:
        listeners = _listen(role, process)
        supervisor = process.supervise(argv, role.processes(process.settings), listeners)
        # Closed before the children end: a connection that only the kernel accepts would never be answered.
        for listener in listeners:
            process.teardown.add("listener", _closer(listener))
        await process.expose(role.metrics_port, supervisor.metrics.render)
        await process.prepare_database(may_change=True)
        process.tasks.extend(supervisor.start())

    return start


def _child(role: Role, inherited: Inherited) -> Callable[[Process], Coroutine[Any, Any, None]]:
    async def start(process: Process) -> None:
        process.ignore_hangup()
        process.report_to_parent(inherited)
        await process.prepare_database(may_change=False)
        await role.work(process, inherited.listeners)

    return start


def _listen(role: Role, process: Process) -> list[socket.socket]:
    address = role.address(process.settings)
    if address is None:
        return []
    server_tls(process.settings.get(TlsSettings))  # a bad certificate is told before anything is waited for
    return [process.listen(*address)]


def _closer(listener: socket.socket) -> Callable[[], Coroutine[Any, Any, None]]:
    async def close() -> None:
        listener.close()

    return close


async def serve(
    process: Process, listener: socket.socket, handler: Handler, refuse: Refuse, request_factory: Any = None
) -> HttpServer:
    """Answer requests on `listener` until the process ends; those in flight are answered then."""
    settings = process.settings
    server = HttpServer(
        listener,
        handler,
        settings.get(HttpSettings),
        refuse,
        request_factory,
        tls=server_tls(settings.get(TlsSettings)),
        exempt=Proxies(settings.get(IngestSettings).trusted_proxies).networks,
        refused=count_refused(process.name),
    )
    timeout_s = process.settings.get(LifecycleSettings).shutdown_timeout_ms / 1000
    process.teardown.add("http", lambda: server.stop(timeout_s))
    await server.start()
    return server


# ---------------------------------------------------------------- api


async def make_api(process: Process, ring: KeyRing, ingest_address: str) -> ApiFace:
    """The API on sessions of its own, started; it ends with the process."""
    settings = process.settings.get(ApiSettings)
    settings = replace(settings, public_url=public_url(process.settings, ingest_address))
    pool = await process.pool("sluice_app", statement_timeout=str(settings.api_statement_timeout_ms))
    process.watch_database(pool)
    metrics = ApiMetrics()
    app = create_app(
        pool=pool,
        ring=ring,
        settings=settings,
        metrics=metrics,
        access=process.settings.get(AccessSettings),
        trusted_proxies=process.settings.get(IngestSettings).trusted_proxies,
    )
    face = ApiFace(app, metrics)
    await face.start()
    process.teardown.add("api", face.stop)
    return face


async def _work_api(process: Process, listeners: list[socket.socket]) -> None:
    ring = KeyRing.parse(process.settings.get(SecretSettings).secret_keys)
    face = await make_api(process, ring, process.settings.get(IngestSettings).http_listen)
    await serve(process, listeners[0], face.handler, face.refuse, face.request_factory)


API: Final = Role(
    "api",
    9463,
    lambda settings: settings.get(ApiSettings).api_processes,
    lambda settings: ("SLUICE_API_LISTEN", settings.get(ApiSettings).api_listen),
    _work_api,
)

# ---------------------------------------------------------------- ingest


async def make_ingest(process: Process, log: Log, ring: KeyRing) -> IngestService:
    """The ingest face on sessions of its own, started; it ends with the process."""
    settings = process.settings
    clock, metrics = SystemClock(), IngestMetrics()
    pool = await process.pool("sluice_ingest")
    places = await _spool_places(process, log, pool)
    spool = make_spool(process, log, pool, places, metrics)
    limits = Limits(settings.get(LimitSettings), clock, Path(settings.get(DeploySettings).data_dir) / "limits")
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
    service = await make_ingest(process, log, ring)
    server = await serve(process, listeners[0], service.handle, service.refuse)
    service.connections = server.count


INGEST: Final = Role(
    "ingest",
    9461,
    lambda settings: settings.get(IngestSettings).http_processes,
    lambda settings: ("SLUICE_HTTP_LISTEN", settings.get(IngestSettings).http_listen),
    _work_ingest,
)


# ---------------------------------------------------------------- worker


async def work_on(process: Process, log: Log) -> None:
    """Land the log beside whatever else the process does, until its turn to end comes."""
    stop = asyncio.Event()
    presence = Presence(process.settings.get(PostgresSettings), process.settings.get(PresenceSettings))
    work = run_worker(
        process.settings.get(PostgresSettings),
        process.settings.get(LandingSettings),
        log,
        stop=stop,
        clock=SystemClock(),
        metrics=LandingMetrics(),
        health=process.health,
        heard=presence.hear,
    )
    process.run_beside("landing", work, stop=stop)
    process.run_beside("presence", presence.run())
    process.run_beside("quarantine bounds", make_bounds(process.settings).run())
    postgres, ledger = process.settings.get(PostgresSettings), process.settings.get(LedgerSettings)
    process.run_beside("ledger totals", LedgerTotals(postgres, ledger, LedgerMetrics()).run())


def make_bounds(settings: Settings) -> Bounds:
    quarantine = settings.get(QuarantineSettings)
    check_memory(quarantine, settings.get(LogSettings), settings.get(SpoolSettings), settings.get(PacedSettings))
    check_receipts(quarantine, settings.get(IngestSettings))
    return Bounds(settings.get(PostgresSettings), quarantine, QuarantineMetrics())


def check_memory(
    quarantine: QuarantineSettings, log: LogSettings, spool: SpoolSettings, paced: PacedSettings
) -> None:
    """Raises `ConfigurationError` where it would be forgotten what became of records that can still come."""
    # What is paced goes from its lane straight to the log.
    waits_s = max(spool.spool_age_max_s, paced.paced_age_max_s)
    needed_h = 24 + waits_s / 3600 + log.log_retention_h
    if quarantine.books_memory_days * 24 <= needed_h:
        raise ConfigurationError(
            f"SLUICE_BOOKS_MEMORY_DAYS={quarantine.books_memory_days} is too short: a record can come up to "
            f"{needed_h:.0f} h after its request (a day, SLUICE_SPOOL_AGE_MAX_S or SLUICE_PACED_AGE_MAX_S, and "
            "SLUICE_LOG_RETENTION_H)"
        )


def check_receipts(quarantine: QuarantineSettings, ingest: IngestSettings) -> None:
    """Raises `ConfigurationError` where a receipt could be asked about longer than is known what became of it."""
    if quarantine.books_memory_days * 86_400 < ingest.receipt_ttl_s:
        raise ConfigurationError(
            f"SLUICE_RECEIPT_TTL_S={ingest.receipt_ttl_s:g} is too long: what became of a record is remembered for "
            f"SLUICE_BOOKS_MEMORY_DAYS={quarantine.books_memory_days}"
        )


async def _work_worker(process: Process, listeners: list[socket.socket]) -> None:
    _, log = await process.log()
    await work_on(process, log)


WORKER: Final = Role(
    "worker",
    9462,
    lambda settings: settings.get(DeploySettings).worker_processes,
    lambda settings: None,
    _work_worker,
)

ROLES: Final = {role.name: role for role in (API, INGEST, WORKER)}
