"""Reads ahead and lands, over partitions that stay the same: while one plan is written, the next one grows.

Ends when it is told to, or at the first failure, and leaves `holdings` as they stand; what was read ahead is dropped,
the log still has it. Left out: who holds which partition, and what follows a failure (`worker`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from runtime.clock import Clock
from runtime.log.port import BehindRetentionError, Reader, Slice
from schemas.record import PG_EPOCH_US, UnknownVersionError
from workers.landing.apart import Apart
from workers.landing.holding import Holding, bounds_of
from workers.landing.late import SpoolJumpError
from workers.landing.plan import Part, Plan
from workers.landing.registry import Registry, settle
from workers.landing.series import SeriesCache
from workers.landing.tombstones import Tombstones
from workers.settings import LandingSettings

_log = logging.getLogger("sluice.landing")

# A read that waits longer only delays what ends the pipeline.
_READ_WAIT_S: Final = 0.25
# Planned between two looks at the event loop: a few milliseconds, so that COPY is fed meanwhile.
_RECORDS_AT_ONCE: Final = 500
_WEIGHT_AT_ONCE: Final = 20_000


class Pipeline:
    """One run over `holdings`. `land` writes a plan and returns once it is committed."""

    def __init__(
        self,
        holdings: dict[int, Holding],
        reader: Reader,
        registry: Registry,
        settings: LandingSettings,
        *,
        land: Callable[[Plan], Awaitable[None]],
        apart: Apart,
        clock: Clock,
        tombstones: Tombstones,
    ) -> None:
        self._holdings = holdings
        self._reader = reader
        self._registry = registry
        self._settings = settings
        self._land = land
        self._apart = apart
        self._clock = clock
        self._tombstones = tombstones
        self._bounds = bounds_of(settings)
        self._next = {partition: holding.position for partition, holding in holdings.items()}
        self._resting: set[int] = set()
        self._is_ending = False
        self._error: Exception | None = None
        self._is_ready = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self.growing: Plan | None = None
        """What is read and not yet being written."""
        self.landing: Plan | None = None
        """What is being written."""
        self.failed: Plan | None = None
        """What the failure met, if it met a plan."""

    def end(self) -> None:
        """Finish the transaction under way and begin no other."""
        self._is_ending = True
        self._news.set()

    async def run(self) -> None:
        """Until `end`. Raises the first failure, after the transaction under way has ended."""
        for holding in self._holdings.values():
            holding.begin()
        await self._assign()
        reading = asyncio.create_task(self._read_ahead(), name="landing read-ahead")
        try:
            await self._land_all()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if self._error is not None:
            raise self._error

    # ------------------------------------------------------------ writing

    async def _land_all(self) -> None:
        pause = self._settings.landing_batch_wait_ms / 1000
        begun = float("-inf")
        while not self._is_ending:
            await asyncio.sleep(max(0.0, begun + pause - self._clock.monotonic()))
            await self._work()
            begun = self._clock.monotonic()
            if self._is_ready and self.growing is not None and not self._is_ending:
                await self._land_next(self.growing)
            if self._apart.has_work and not self._is_ending:
                await self._land_apart()
            self._room.set()

    async def _work(self) -> None:
        """Wait for something to land, or for the end."""
        while not (self._is_ending or (self._is_ready and self.growing is not None) or self._apart.has_work):
            self._news.clear()
            await self._news.wait()

    async def _land_next(self, plan: Plan) -> None:
        """While what has grown is written, the next grows."""
        self.landing, self.growing = plan, None
        self._is_ready = False
        self._room.set()
        for part in plan.parts.values():
            part.ahead = None
            part.memory.settled()
        try:
            await self._land(plan)
        except Exception:
            self.failed = plan
            raise
        for part in plan.parts.values():
            self._holdings[part.partition].landed(part)
        self.landing = None
        self._room.set()

    async def _land_apart(self) -> None:
        try:
            if not await self._apart.turn():
                self.end()
        except Exception:
            self.failed = self._apart.landing
            raise

    # ------------------------------------------------------------ reading

    async def _read_ahead(self) -> None:
        try:
            await self._read_on()
        except Exception as error:
            self._error, self.failed = error, self.growing
            self.end()

    async def _read_on(self) -> None:
        bytes_max = self._settings.landing_read_bytes_max
        try:
            while True:
                async with asyncio.timeout(self._settings.landing_transaction_timeout_s):
                    await self._registry.refresh()
                await self._take(await self._reader.read(bytes_max=bytes_max, wait_s=_READ_WAIT_S))
        except BehindRetentionError:
            # What lies before the gap lands first: the log may no longer have that either.
            await self._landed_all()
            raise

    async def _landed_all(self) -> None:
        """Let what has been read be written, and wait for it."""
        await self._offer()
        while self.growing is not None or self.landing is not None or self._apart.has_work:
            self._room.clear()
            await self._room.wait()

    async def _take(self, slices: list[Slice]) -> None:
        for read in slices:
            if not self._holdings[read.partition].is_waiting:
                await self._plan(read)
        await self._offer()
        if self._unread() != self._resting:
            await self._assign()

    def _unread(self) -> set[int]:
        """Partitions that wait for an operator or an upgrade, or of which enough has been read."""
        waiting = {partition for partition, holding in self._holdings.items() if holding.is_waiting}
        return waiting | self._apart.resting()

    async def _assign(self) -> None:
        """Read on from where planning stands."""
        self._resting = resting = self._unread()
        await self._reader.assign({partition: at for partition, at in self._next.items() if partition not in resting})

    async def _plan(self, read: Slice) -> None:
        if read.first != self._next[read.partition]:
            raise BehindRetentionError(read.partition, self._next[read.partition], read.first)
        if self._apart.keep(read):
            self._next[read.partition] = read.next_position
            self._news.set()
            return
        try:
            while self._next[read.partition] < read.next_position:
                plan = await self._roomy()
                self._fill(plan, read)
                await asyncio.sleep(0)
        except UnknownVersionError as error:
            holding = self._holdings[read.partition]
            holding.newer_version, holding.waits_at = error.version, self._next[read.partition]
            _log.error(
                "a record is newer than this worker: its partition waits for `sluice` to be upgraded",
                extra={"partition": read.partition, "position": self._next[read.partition], "version": error.version},
            )
        except SpoolJumpError as error:
            holding = self._holdings[read.partition]
            holding.jump, holding.waits_at = str(error), self._next[read.partition]
            _log.error("a spool's records are missing", extra={"partition": read.partition, "reason": str(error)})

    async def _roomy(self) -> Plan:
        """The plan that grows, once it is not full."""
        while True:
            if self.growing is None:
                self.growing = Plan(self._registry.limits, self._bounds, self._tombstones)
            if not self._is_full(self.growing):
                self._is_ready = False
                return self.growing
            self._room.clear()
            await self._offer()
            await self._room.wait()

    def _is_full(self, plan: Plan) -> bool:
        settings = self._settings
        return (
            plan.records >= settings.landing_batch_records_max
            or plan.weight >= settings.landing_batch_rows_max
            or plan.bytes >= settings.landing_batch_bytes_max
        )

    def _fill(self, plan: Plan, read: Slice) -> None:
        """Plan some more records of `read`. Raises `UnknownVersionError`, `SpoolJumpError` at one that must wait."""
        partition = read.partition
        part = plan.parts.get(partition)
        if part is None:
            part = plan.parts[partition] = self._open(partition)
        now = self._clock.now_us() - PG_EPOCH_US
        weight_max = min(plan.weight + _WEIGHT_AT_ONCE, self._settings.landing_batch_rows_max)
        begin = part.position - read.first
        end = begin + min(_RECORDS_AT_ONCE, self._settings.landing_batch_records_max - plan.records)
        try:
            for body in read.bodies[begin:end]:
                plan.add(part, body, now)
                if plan.weight >= weight_max:
                    break
        finally:
            self._next[partition] = part.position

    def _open(self, partition: int) -> Part:
        holding = self._holdings[partition]
        ahead = None if self.landing is None else self.landing.parts.get(partition)
        cache = holding.cache
        if cache.count > self._settings.landing_series_cache_max // len(self._holdings):
            _log.warning(
                "a partition has more series than are kept in memory and they are looked up again: add workers, or "
                "raise SLUICE_LANDING_SERIES_CACHE_MAX",
                extra={"partition": partition, "series": cache.count},
            )
            high_water = cache.high_water if ahead is None else max(cache.high_water, ahead.high_water)
            cache = holding.cache = SeriesCache(high_water)
        cache.forget_refused(self._clock.monotonic())
        return holding.part(self._next[partition], ahead=ahead)

    async def _offer(self) -> None:
        """Look up what the growing plan misses, then let it be written."""
        plan = self.growing
        if plan is None or not plan.records:
            return
        async with asyncio.timeout(self._settings.landing_transaction_timeout_s):
            until = self._clock.monotonic() + self._settings.landing_refusal_ttl_s
            await settle(plan, self._registry, until)
        if self.growing is plan:
            self._is_ready = True
            self._news.set()
