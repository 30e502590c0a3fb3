"""One process on its way from settings to work: probes, the database, the log, an end in order.

Left out: what each role does (`deploy.roles`) and the command line.
"""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import asyncpg

from deploy.database import prepare
from deploy.generation import READER_ROLE, Generation, Guard, active_generation, open_generation
from runtime.errors import UnavailableError
from runtime.health import Check, Health
from runtime.http.server import HttpSettings
from runtime.lifecycle import LifecycleSettings, Teardown, first_of
from runtime.log import LateLog, LogSettings
from runtime.log.port import Log
from runtime.metrics import VARIABLE as METRICS_VARIABLE
from runtime.metrics import MetricsServer, MetricsSettings, Render, metrics_tls, render_own
from runtime.postgres import PostgresSettings, Probe, connect, open_pool
from runtime.role_metrics import LOG_PARTITIONS, HealthMetrics
from runtime.settings import Settings
from runtime.sockets import address_of, listen
from runtime.supervisor import Inherited, Supervisor, report
from runtime.tls import TlsSettings

_log = logging.getLogger("sluice.process")

T = TypeVar("T")
RETRY_S: Final = 1.0
#: Young objects, and younger rounds, before garbage is looked for: few requests leave cycles behind.
_GC_THRESHOLDS: Final = (50_000, 20, 50)


class Process:
    """The parts that every role has; what is opened here is closed by `end`, last opened first."""

    def __init__(self, name: str, settings: Settings, stop: asyncio.Event) -> None:
        self.name = name
        self.settings = settings
        self.stop = stop
        self.health = Health()
        self.teardown = Teardown(settings.get(LifecycleSettings).shutdown_timeout_ms / 1000)
        self.tasks: list[asyncio.Task[Any]] = []
        self._forget_log_check: Callable[[], None] = lambda: None

    async def serve(self, start: Callable[["Process"], Coroutine[Any, Any, None]]) -> None:
        """Start, work until told to stop or a part fails, end. Raises what made the start or the work fail."""
        # Not ready until the work has begun: a parent, or an orchestrator, may end a predecessor on that word.
        begun = self.health.register(self.name, lambda: "it is starting")
        self.run_beside("health metrics", HealthMetrics(self.health).run())
        starting = asyncio.create_task(start(self), name="start")
        stopping = asyncio.create_task(self.stop.wait(), name="stop")
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                _let_stand()
                begun()
                _log.info("ready", extra={"role": self.name})
                await first_of(self.stop, *self.tasks)
        finally:
            self.health.stopping()
            await cancel(starting)
            await cancel(stopping)
            await self.teardown.run()

    def run_beside(self, name: str, work: Coroutine[Any, Any, Any], *, stop: asyncio.Event | None = None) -> None:
        """A task that lives as long as the process, and ends it if it fails.

        When its turn to end comes it is cancelled, or with a `stop` asked by that and awaited.
        """
        task = asyncio.create_task(work, name=name)
        self.tasks.append(task)

        async def end() -> None:
            if stop is None:
                await cancel(task)
            else:
                stop.set()
                await task

        self.teardown.add(name, end)

    async def patiently(self, name: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat `attempt` while what it needs is away; meanwhile the process lives and is not ready."""
        reason: str | None = "it is being opened"
        forget = self.health.register(name, lambda: reason)
        try:
            while True:
                try:
                    return await attempt()
                except UnavailableError as error:
                    _log.warning("waiting", extra={"for": name, "reason": str(error)})
                    reason = str(error)
                await asyncio.sleep(RETRY_S)
        finally:
            forget()

    # ------------------------------------------------------------ parts

    async def expose(self, port_default: int, render: Render = render_own) -> None:
        """Serve probes and metrics, from now until everything else has ended."""
        settings = self.settings.get(MetricsSettings)
        tls = metrics_tls(settings, self.settings.get(TlsSettings))
        listener = listen(METRICS_VARIABLE, settings.metrics_listen or f"127.0.0.1:{port_default}")
        server = MetricsServer(listener, self.health, render, settings=self.settings.get(HttpSettings), tls=tls)
        await server.start()
        self.teardown.add("metrics", server.stop)

    def report_to_parent(self, inherited: Inherited) -> None:
        self.run_beside("report", report(inherited.channel, self.health, self.stop))

    async def prepare_database(self, *, may_change: bool) -> None:
        await self.patiently("database", lambda: prepare(self.settings, may_change=may_change))

    async def pool(self, role: str, **overrides: str) -> "asyncpg.Pool[asyncpg.Record]":
        """Sessions as `role`, whose database is one of the health checks."""
        settings = self.settings.get(PostgresSettings)
        application = f"sluice {self.name}"
        pool = await self.patiently(
            f"pool of {role}",
            lambda: open_pool(settings, role=role, application=application, size_max=None, **overrides),
        )
        self.teardown.add(f"pool of {role}", pool.close)
        return pool

    def watch_database(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        probe = Probe(pool)
        self.health.register("database", probe.check)
        self.run_beside("database probe", probe.run())

    async def log(self) -> tuple[Generation, Log]:
        """The active generation, which nobody closes while we use it, and its log, which is a health check."""
        generation, log = await self.patiently("log", self._open_log)
        self._use_log(log)
        await self._guard(generation)
        return generation, log

    async def log_that_may_be_away(self) -> Log:
        """The same for who can do without the log for a while; where it cannot be reached, it is opened beside."""
        generation = await self.patiently("generation", self._find_generation)
        await self._guard(generation)
        try:
            _, log = await self._open_log()
        except UnavailableError as error:
            late = LateLog(self.settings.get(LogSettings), generation.expected, str(error))
            self._use_log(late)
            self.run_beside("log", late.keep_opening(self.open_log_alone))
            return late
        self._use_log(log)
        return log

    def _use_log(self, log: Log) -> None:
        LOG_PARTITIONS.set(log.partitions)
        self.teardown.add("log", log.close)
        self._forget_log_check = self.health.register("log", lambda: log.trouble)

    def check_log_by(self, check: Check) -> None:
        """Ask `check` whether the log's trouble makes the process unready."""
        self._forget_log_check()
        self._forget_log_check = self.health.register("log", check)

    async def _guard(self, generation: Generation) -> None:
        guard = Guard(self.settings.get(PostgresSettings), generation.source, f"sluice {self.name}")
        self.teardown.add("guard", guard.release)
        await self.patiently("generation", guard.take)
        self.run_beside("guard", guard.keep())

    async def _find_generation(self) -> Generation:
        connection = await connect(
            self.settings.get(PostgresSettings), role=READER_ROLE, application=f"sluice {self.name} start"
        )
        try:
            return await active_generation(connection, self.settings.get(LogSettings).log_url)
        finally:
            await connection.close()

    async def open_log_alone(self) -> Log:
        """For who only reads it, and lets it be closed meanwhile. Raises as `open_generation`."""
        return (await self._open_log())[1]

    async def _open_log(self) -> tuple[Generation, Log]:
        connection = await connect(
            self.settings.get(PostgresSettings), role=READER_ROLE, application=f"sluice {self.name} start"
        )
        try:
            return await open_generation(connection, self.settings.get(LogSettings), client_id=f"sluice-{self.name}")
        finally:
            await connection.close()

    def supervise(self, argv: Sequence[str], count: int, listeners: Sequence[socket.socket]) -> Supervisor:
        """Children that will do the work, replaced one by one on SIGHUP."""
        lifecycle = self.settings.get(LifecycleSettings)
        supervisor = Supervisor(
            argv,
            count=count,
            listeners=listeners,
            health=self.health,
            ready_timeout_s=lifecycle.process_ready_timeout_ms / 1000,
            # Less than the parent's own: a child that does not end is killed while there is somebody to do it.
            stop_timeout_s=lifecycle.shutdown_timeout_ms / 1000 * 0.8,
        )
        self.teardown.add("processes", supervisor.stop)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, supervisor.replace)
        return supervisor

    def ignore_hangup(self) -> None:
        """A single process has nobody to be replaced by, and a hang-up is no reason to end."""
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGHUP, _log.warning, "SIGHUP replaces processes only where there are several"
        )

    def listen(self, variable: str, address: str) -> socket.socket:
        """Raises `ConfigurationError` naming `variable`."""
        listener = listen(variable, address)
        _log.info("listening", extra={"role": self.name, "address": str(address_of(listener))})
        return listener


def _let_stand() -> None:
    """What a role has made by now stands for good: garbage is not looked for among it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


async def cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
