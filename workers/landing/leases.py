"""Which partitions this worker may write to: leases in the database, renewed on a connection of their own.

A lease counts until the local clock says it may have ended: a process that was stopped leases again before it writes.
Left out: what is done with a partition (`worker`).
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from runtime.clock import Clock
from runtime.postgres import PostgresSettings, connect
from workers.landing.failures import Backoff, LeaseLapsedError, cause_of
from workers.landing.store import ROLE, Session
from workers.metrics import LandingMetrics
from workers.settings import LandingSettings

_log = logging.getLogger("sluice.landing.leases")

_LEASE: Final = "SELECT * FROM lease_partitions($1, $2, $3, $4::int[])"
_LEAVE: Final = """
WITH left_behind AS (DELETE FROM landing_workers WHERE worker = $2)
UPDATE partition_leases SET worker = NULL, lease_until = '-infinity', backend_pid = NULL, backend_start = NULL
WHERE source = $1 AND worker = $2"""
_NAME_SESSION: Final = """
UPDATE partition_leases SET backend_pid = $4, backend_start = $5
WHERE source = $1 AND worker = $2 AND partition = ANY ($3::int[]) AND lease_until >= clock_timestamp()"""

# Only the session's own user may end it, not the role it has taken.
_END_SESSION: Final = """
SELECT pg_terminate_backend(pid, $3) FROM pg_stat_activity
WHERE pid = $1 AND backend_start = $2 AND pid <> pg_backend_pid()"""


@dataclass(eq=False)
class Lease:
    """One partition, held without a break since it was taken. A lease taken again is another one."""

    partition: int
    previous: Session | None
    """The session that wrote to it before, until it is known to have ended."""


class Leases:
    """The leases of one worker. `run` keeps them; everyone else reads `held` and waits for `changed`."""

    def __init__(
        self,
        postgres: PostgresSettings,
        settings: LandingSettings,
        source: UUID,
        *,
        clock: Clock,
        metrics: LandingMetrics,
    ) -> None:
        self._postgres = postgres
        self._settings = settings
        self._source = source
        self._clock = clock
        self._metrics = metrics
        self._worker = uuid4()
        self._connection: Any = None
        self._valid_until = float("-inf")
        self._lock = asyncio.Lock()
        self._releasing: set[int] = set()
        self._wanted = asyncio.Event()
        self.held: dict[int, Lease] = {}
        self.surplus: frozenset[int] = frozenset()
        """Held beyond the fair share: to be given up when the transaction under way has ended."""
        self.changed = asyncio.Event()
        """`held` or `surplus` is not what it was; cleared by who acts on it."""
        self.silence = asyncio.Event()
        """A renewal was not answered: what else waits for the database may wait in vain; who acts on it clears it."""
        self.trouble: str | None = "no lease was asked for yet"

    @property
    def usable(self) -> dict[int, Lease]:
        """What is held and not about to be given up."""
        leaving = self.surplus | self._releasing
        return {partition: lease for partition, lease in self.held.items() if partition not in leaving}

    @property
    def is_valid(self) -> bool:
        """Whether no lease of this worker can have ended yet."""
        return self._clock.monotonic() < self._valid_until

    async def run(self) -> None:
        """Renew until cancelled. Raises only what no wait would cure."""
        backoff = Backoff(self._settings.landing_retry_min_ms / 1000, self._settings.landing_lease_renew_s)
        while True:
            try:
                await self._renew()
            except Exception as error:
                if cause_of(error) is None:
                    raise
                self._failed(error)
                wait = backoff.next()
            else:
                backoff.reset()
                wait = self._settings.landing_lease_renew_s
            try:
                async with asyncio.timeout(wait):
                    await self._wanted.wait()
            except TimeoutError:
                continue

    def release(self, partitions: Iterable[int]) -> None:
        """Give these up with the next renewal: nothing of this worker writes to them any more."""
        self._releasing |= set(partitions) & self.held.keys()
        self._wanted.set()

    async def name_session(self, session: Session, partitions: Iterable[int]) -> None:
        """Before a session's first write: end those that wrote before it, then let successors know whom to end.

        Raises `LeaseLapsedError`, and what the database raises.
        """
        leases = [self.held[partition] for partition in partitions if partition in self.held]
        for previous in {lease.previous for lease in leases if lease.previous is not None} - {session}:
            await self._end(previous)
        numbers = [lease.partition for lease in leases]
        named = await self._ask("execute", _NAME_SESSION, self._source, self._worker, numbers, *session)
        if named != f"UPDATE {len(leases)}":
            raise LeaseLapsedError("a lease ended before its partition could be written to")
        for lease in leases:
            lease.previous = session

    async def leave(self) -> None:
        """Give everything up at once; nothing of this worker may write any more."""
        self.held.clear()
        self._valid_until = float("-inf")
        try:
            await self._ask("execute", _LEAVE, self._source, self._worker)
        except Exception as error:
            if cause_of(error) is None:
                raise
            _log.warning(
                "leases could not be given back; others take them when they end",
                extra={"reason": str(error), "seconds": self._settings.landing_lease_ttl_s},
            )
        self.close()

    def close(self) -> None:
        """Cut the connection; leases that were not given back end by themselves."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _renew(self) -> None:
        self._wanted.clear()
        releasing = frozenset(self._releasing)
        began = self._clock.monotonic()
        ttl = self._settings.landing_lease_ttl_s
        rows = await self._ask("fetch", _LEASE, self._source, self._worker, timedelta(seconds=ttl), list(releasing))
        self._releasing -= releasing
        self._valid_until = began + ttl
        self._take(rows, releasing)
        if self.trouble is not None:
            _log.info("leases are renewed", extra={"partitions": sorted(self.held)})
        self.trouble = None
        self._metrics.lease_renewals.labels("renewed").inc()

    def _take(self, rows: Any, released: frozenset[int]) -> None:
        """Make `held` and `surplus` what the database says."""
        held = {row["held"] for row in rows}
        for partition in self.held.keys() - held:
            del self.held[partition]
            self._note("given_up" if partition in released else "lost", partition)
        for row in rows:
            if row["taken"]:
                start = row["old_start"]
                previous = None if row["old_pid"] is None or start is None else Session(row["old_pid"], start)
                self.held[row["held"]] = Lease(row["held"], previous)
                self._note("gained", row["held"])
        share = rows[0]["fair_share"] if rows else 0
        surplus = frozenset(sorted(held)[share:])
        if surplus != self.surplus:
            self.surplus = surplus
            self.changed.set()
        self._metrics.partitions_held.set(len(self.held))

    def _note(self, event: str, partition: int) -> None:
        self.changed.set()
        self._metrics.assignments.labels(event).inc()
        level = logging.WARNING if event == "lost" else logging.INFO
        _log.log(level, "a partition was %s", event.replace("_", " "), extra={"partition": partition})

    def _failed(self, error: Exception) -> None:
        self.close()
        self._metrics.lease_renewals.labels("failed").inc()
        reason = str(error) or f"the database does not answer ({type(error).__name__})"
        if self.trouble is None or not self.held:
            _log.warning("leases cannot be renewed, landing waits for the database", extra={"reason": reason})
        self.trouble = f"leases cannot be renewed: {reason}"
        if isinstance(error, TimeoutError):
            self.silence.set()

    async def _end(self, session: Session) -> None:
        """End another session. Raises `LeaseLapsedError` when it does not end in time."""
        connection: Any = await connect(self._postgres, role=None, application="sluice landing takeover")
        try:
            wait_ms = self._settings.landing_terminate_timeout_ms
            async with asyncio.timeout(wait_ms / 1000 + self._settings.landing_lease_ttl_s):
                ended = await connection.fetchval(_END_SESSION, session.pid, session.start, wait_ms)
        finally:
            connection.terminate()
        if ended is False:
            raise LeaseLapsedError(f"session {session.pid} of the previous holder did not end within {wait_ms} ms")
        if ended:
            self._metrics.sessions_ended.inc()
            _log.warning("the session of a partition's previous holder was ended", extra={"pid": session.pid})

    async def _ask(self, method: str, statement: str, *arguments: Any) -> Any:
        """One statement, on a connection that is replaced after any failure."""
        async with self._lock:
            try:
                # Half the time a lease lasts: a connection gone silent leaves time for another.
                async with asyncio.timeout(self._settings.landing_lease_ttl_s / 2):
                    if self._connection is None:
                        self._connection = await connect(self._postgres, role=ROLE, application="sluice leases")
                    return await getattr(self._connection, method)(statement, *arguments)
            except BaseException:
                self.close()
                raise
