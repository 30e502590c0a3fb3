"""The roles, each in a process of its own or in several: what is opened for them, and in which order.

Left out: all of them in one process (`deploy.up`).
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from api.metrics import ApiMetrics
from api.server import create_app
from api.serving import ApiFace
from api.settings import ApiSettings
from deploy.process import Process
from deploy.settings import DeploySettings
from ingest.http.compose import make_service
from ingest.http.service import IngestService
from ingest.metrics import IngestMetrics
from ingest.settings import IngestSettings
from runtime.clock import SystemClock
from runtime.http.server import Handler, HttpServer, HttpSettings, Refuse
from runtime.lifecycle import LifecycleSettings
from runtime.log.port import Log
from runtime.notifications import Notifications
from runtime.postgres import PostgresSettings
from runtime.secrets import KeyRing, SecretSettings
from runtime.settings import Settings
from runtime.supervisor import Inherited
from workers.landing.worker import run_worker
from workers.metrics import LandingMetrics
from workers.settings import LandingSettings


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
        # Not ready until the work has begun: the parent may end a predecessor on that word.
        begun = process.health.register(role.name, lambda: "it is starting")
        process.report_to_parent(inherited)
        await process.prepare_database(may_change=False)
        await role.work(process, inherited.listeners)
        begun()

    return start


def _listen(role: Role, process: Process) -> list[socket.socket]:
    address = role.address(process.settings)
    return [] if address is None else [process.listen(*address)]


def _closer(listener: socket.socket) -> Callable[[], Coroutine[Any, Any, None]]:
    async def close() -> None:
        listener.close()

    return close


async def serve(
    process: Process, listener: socket.socket, handler: Handler, refuse: Refuse, request_factory: Any = None
) -> HttpServer:
    """Answer requests on `listener` until the process ends; those in flight are answered then."""
    server = HttpServer(listener, handler, process.settings.get(HttpSettings), refuse, request_factory)
    timeout_s = process.settings.get(LifecycleSettings).shutdown_timeout_ms / 1000
    process.teardown.add("http", lambda: server.stop(timeout_s))
    await server.start()
    return server


# ---------------------------------------------------------------- api


async def make_api(process: Process, ring: KeyRing) -> ApiFace:
    """The API on sessions of its own, started; it ends with the process."""
    settings = process.settings.get(ApiSettings)
    pool = await process.pool("sluice_app", statement_timeout=str(settings.api_statement_timeout_ms))
    process.watch_database(pool)
    metrics = ApiMetrics()
    face = ApiFace(create_app(pool=pool, ring=ring, settings=settings, metrics=metrics), metrics)
    await face.start()
    process.teardown.add("api", face.stop)
    return face


async def _work_api(process: Process, listeners: list[socket.socket]) -> None:
    ring = KeyRing.parse(process.settings.get(SecretSettings).secret_keys)
    face = await make_api(process, ring)
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
    pool = await process.pool("sluice_ingest")
    service = make_service(
        log=log,
        pool=pool,
        listener=Notifications(
            settings.get(PostgresSettings), role="sluice_ingest", application=f"sluice {process.name}"
        ),
        ring=ring,
        settings=settings.get(IngestSettings),
        clock=SystemClock(),
        metrics=IngestMetrics(),
    )
    await service.start()
    process.teardown.add("ingest", service.stop)
    return service


async def _work_ingest(process: Process, listeners: list[socket.socket]) -> None:
    ring = KeyRing.parse(process.settings.get(SecretSettings).secret_keys)
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
    work = run_worker(
        process.settings.get(PostgresSettings),
        process.settings.get(LandingSettings),
        log,
        stop=stop,
        clock=SystemClock(),
        metrics=LandingMetrics(),
        health=process.health,
    )
    process.run_beside("landing", work, stop=stop)


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
