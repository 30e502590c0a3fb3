"""The bridge of one process: its leases, and a session for each of them.

Left out: what a message becomes (`intake`), and how the bridge is put together (`compose`).
"""

import asyncio
from contextlib import suppress
from typing import Final

from ingest.credentials import Credentials
from ingest.mqtt.failures import Failures
from ingest.mqtt.intake import Intake
from ingest.mqtt.leases import Lease, Leases
from ingest.mqtt.metrics import BridgeMetrics
from ingest.mqtt.session import Broker, Session
from ingest.mqtt.settings import BridgeSettings
from ingest.mqtt.topics import FAMILIES, Family, Router
from ingest.retention import RetentionGuard
from runtime.clock import Clock
from runtime.errors import UnavailableError
from runtime.log.port import Log

_PUBLISH_S: Final = 1.0


class Bridge:
    """`start` begins, `stop` ends in order: what was taken is acknowledged or left to the broker."""

    def __init__(
        self,
        broker: Broker,
        *,
        log: Log,
        guard: RetentionGuard,
        leases: Leases,
        credentials: Credentials,
        failures: Failures,
        intake: Intake,
        settings: BridgeSettings,
        clock: Clock,
        metrics: BridgeMetrics,
    ) -> None:
        self._broker = broker
        self._log = log
        self._guard = guard
        self._leases = leases
        self._credentials = credentials
        self._failures = failures
        self._intake = intake
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._families = {family.name: family for family in FAMILIES}
        self._routers = {family.name: Router(family, settings.mqtt_topics_cache_max) for family in FAMILIES}
        self._sessions: dict[str, tuple[Session, asyncio.Task[None]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._own: list[asyncio.Task[None]] = []
        """The intake's, which go on until all sessions have ended."""
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        for name in self._families:
            # From the start, so that the first one is an increase.
            self._metrics.sessions_lost.add((name,), 0)
            self._metrics.broken.add((name,), 0)
        await self._credentials.start()
        self._tasks = [
            asyncio.create_task(self._guard.run(), name="log retention"),
            asyncio.create_task(self._leases.run(), name="bridge leases"),
            asyncio.create_task(self._follow(), name="bridge sessions"),
            asyncio.create_task(self._keep_house(), name="bridge housekeeping"),
            asyncio.create_task(self._failures.run(), name="bridge failures"),
        ]
        self._own = self._intake.start()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(slot) for slot in [*self._sessions]))
        await self._intake.stop()
        with suppress(UnavailableError):
            await self._failures.tell()
        await self._leases.leave()
        self._publish()
        await self._credentials.stop()

    async def watch(self) -> None:
        """Until one of its tasks ends, which none does by itself. Raises what ended it."""
        every = {self._failure, *self._tasks, *self._own, *self._credentials.tasks}
        done, _ = await asyncio.wait(every, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    @property
    def trouble(self) -> str | None:
        """Why a session that this bridge is to have takes nothing; None also where others have them all."""
        for slot, (session, _) in sorted(self._sessions.items()):
            if session.trouble is not None:
                return f"{slot}: {session.trouble}"
        return None if self._sessions or self._leases.trouble is None else self._leases.trouble

    @property
    def note(self) -> str | None:
        """What keeps it from serving somebody, though not everybody."""
        return self._credentials.trouble or self._leases.trouble or self._intake.trouble

    @property
    def standing(self) -> str:
        """For an operator: which sessions it has."""
        return f"sessions of {', '.join(sorted(self._sessions)) or 'none: other bridges have them'}"

    # ------------------------------------------------------------ sessions follow leases

    async def _follow(self) -> None:
        leases = self._leases
        while True:
            leases.changed.clear()
            for slot in [*self._sessions]:
                if leases.held.get(slot) is not self._sessions[slot][0].lease:
                    # Somebody else may have it: the broker decides between two connections, and this one is late.
                    self._sessions[slot][0].abort("the session was leased to another bridge")
                    await self._end(slot)
            for slot in leases.surplus & self._sessions.keys():
                await self._end(slot)
                leases.release(slot)
            for slot, lease in [*leases.held.items()]:
                if slot not in self._sessions and slot not in leases.surplus:
                    self._begin(self._families[slot], lease)
            await leases.changed.wait()

    def _begin(self, family: Family, lease: Lease) -> None:
        session = Session(
            self._broker,
            family,
            lease,
            self._leases,
            intake=self._intake,
            router=self._routers[family.name],
            settings=self._settings,
            clock=self._clock,
            metrics=self._metrics,
            log_trouble=self._why_not,
        )
        task = asyncio.create_task(session.run(), name=f"bridge session {family.name}")
        task.add_done_callback(self._session_ended)
        self._sessions[family.name] = session, task

    def _session_ended(self, task: "asyncio.Task[None]") -> None:
        """A failure that no wait would cure ends the process, which says so."""
        if not task.cancelled() and (error := task.exception()) is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _end(self, slot: str) -> None:
        session, task = self._sessions[slot]
        await session.stop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._sessions.pop(slot, None)

    def _why_not(self) -> str | None:
        """Why nothing may be taken right now."""
        return self._guard.trouble or self._log.trouble

    # ------------------------------------------------------------ metrics

    async def _keep_house(self) -> None:
        while True:
            self._publish()
            await asyncio.sleep(_PUBLISH_S)

    def _publish(self) -> None:
        metrics, sessions = self._metrics, [session for session, _ in self._sessions.values()]
        metrics.sessions.set(sum(session.trouble is None for session in sessions))
        metrics.sessions_leased.set(len(sessions))
        metrics.in_flight.set(sum(session.in_flight for session in sessions))
        metrics.held.set(self._intake.held)
        came = [session.oldest_us for session in sessions if session.oldest_us is not None]
        metrics.oldest_seconds.set((self._clock.now_us() - min(came)) / 1e6 if came else 0)
        metrics.log_queued_bytes.set(self._log.queued_bytes)
        metrics.registry_age_seconds.set(self._credentials.age_s)
        metrics.publish()
