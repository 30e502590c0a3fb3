"""A role in a process of its own or in several: what is opened for it, and in which order.

Left out: the roles themselves, each in a module beside; all of them in one process (`deploy.up`).
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.process import Process
from ingest.settings import IngestSettings
from runtime.addresses import Proxies
from runtime.http.refusals import count_refused
from runtime.http.server import Handler, HttpServer, HttpSettings, Refuse
from runtime.lifecycle import LifecycleSettings
from runtime.settings import Settings
from runtime.supervisor import Inherited
from runtime.tls import TlsSettings, server_tls


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
