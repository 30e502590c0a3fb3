"""The roles, each in a process of its own or in several: what is opened for them, and in which order.

Left out: all of them in one process (`deploy.up`).
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from api.metrics import ApiMetrics
from api.server import create_app
from api.settings import ApiSettings
from deploy.process import Process
from runtime.lifecycle import LifecycleSettings
from runtime.secrets import KeyRing, SecretSettings
from runtime.settings import Settings
from runtime.supervisor import Inherited

#: Of a connection without a request; longer than common proxies keep one.
KEEPALIVE_S: Final = 75.0


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
        for listener in listeners:
            process.teardown.add("listener", _closer(listener))
        supervisor = process.supervise(argv, role.processes(process.settings), listeners)
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


async def serve_app(process: Process, app: web.Application, listener: socket.socket, **server: Any) -> None:
    """Answer requests on `listener` until the process ends; those in flight are answered then."""
    timeout_s = process.settings.get(LifecycleSettings).shutdown_timeout_ms / 1000
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        keepalive_timeout=KEEPALIVE_S,
        shutdown_timeout=timeout_s,
        **server,
    )
    await runner.setup()
    process.teardown.add("http", runner.cleanup)
    await web.SockSite(runner, listener).start()


# ---------------------------------------------------------------- api


async def make_api(process: Process, ring: KeyRing) -> web.Application:
    """The API's application on sessions of its own."""
    settings = process.settings.get(ApiSettings)
    pool = await process.pool("sluice_app", statement_timeout=str(settings.api_statement_timeout_ms))
    process.watch_database(pool)
    return create_app(pool=pool, ring=ring, settings=settings, metrics=ApiMetrics())


async def _work_api(process: Process, listeners: list[socket.socket]) -> None:
    ring = KeyRing.parse(process.settings.get(SecretSettings).secret_keys)
    await serve_app(process, await make_api(process, ring), listeners[0])


API: Final = Role(
    "api",
    9463,
    lambda settings: settings.get(ApiSettings).api_processes,
    lambda settings: ("SLUICE_API_LISTEN", settings.get(ApiSettings).api_listen),
    _work_api,
)

ROLES: Final = {role.name: role for role in (API,)}
