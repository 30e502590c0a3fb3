"""Reads ahead and lands, over partitions that stay the same: while one plan is written, the next one grows.

Ends when it is told to, or at the first failure, and leaves `holdings` as they stand; what was read ahead is dropped,
the log still has it. Left out: who holds which partition, and what follows a failure (`worker`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from runtime.clock import Clock
from runtime.log.port import BehindRetentionError, Reader, Slice
from schemas.record import PG_EPOCH_US, UnknownVersionError
from workers.landing.late import Memory, SpoolJumpError, SpoolPart
from workers.landing.leases import Lease
from workers.landing.plan import Bounds, Part, Plan
from workers.landing.registry import Registry
from workers.landing.series import NEVER, SeriesCache, SeriesName
from workers.settings import LandingSettings

_log = logging.getLogger("sluice.landing")

# A read that waits longer only delays what ends the pipeline.
_READ_WAIT_S: Final = 0.25
# Planned between two looks at the event loop: a few milliseconds, so that COPY is fed meanwhile.
_RECORDS_AT_ONCE: Final = 500
_WEIGHT_AT_ONCE: Final = 20_000


@dataclass
class Holding:
    """A partition that is held: where it stands, and what is remembered of it."""

    lease: Lease
    position: int = 0
    landed_until: int = 0
    """Records before it have landed before."""
    cache: SeriesCache = field(default_factory=lambda: SeriesCache(NEVER))
    is_clean: bool = False
    """Whether position and cache are those of the last COMMIT; if not, they are made anew from the database."""
    careful_until: int = 0
    """Records before it were in a transaction that met others' rows: all their readings are suspect."""
    rejected: dict[int, str] = field(default_factory=dict)
    """Records that the database refuses, by position, with what it said."""
    newer_version: int | None = None
    """Of the record it waits at."""
    jump: str | None = None
    """Why it waits for an operator: a spool's record came before one that it must follow."""
    spools: dict[SpoolPart, int] = field(default_factory=dict)
    """The next record of each spool that drains into it."""
    has_losses: bool = False
    """Whether the log has lost records of it."""

    @property
    def is_waiting(self) -> bool:
        return self.newer_version is not None or self.jump is not None


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
        records_max: Callable[[], int],
        clock: Clock,
        until: Mapping[int, int] | None = None,
    ) -> None:
        """`until`: if there are any, only these partitions are landed, up to these positions; then the run ends."""
        self._holdings = holdings
        self._reader = reader
        self._registry = registry
        self._settings = settings
        self._land = land
        self._records_max = records_max
        self._clock = clock
        self._bounds = Bounds(
            round(settings.landing_future_s * 1e6),
            settings.landing_quarantine_payload_max,
            round(settings.landing_move_max_ms * 1000),
        )
        self._until = until or {}
        wanted = self._until or holdings
        self._next = {partition: holdings[partition].position for partition in wanted}
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
            plan = await self._ready_plan()
            if plan is None:
                return
            begun = self._clock.monotonic()
            try:
                await self._land(plan)
            except Exception:
                self.failed = plan
                raise
            for part in plan.parts.values():
                part.apply()
                self._landed(part)
            self.landing = None
            self._room.set()

    async def _ready_plan(self) -> Plan | None:
        """What has grown, as soon as there is any; None at the end."""
        while not self._is_ending:
            if self._is_ready and self.growing is not None:
                self.landing, self.growing = self.growing, None
                self._is_ready = False
                self._room.set()
                for part in self.landing.parts.values():
                    part.ahead = part.memory.before = None
                return self.landing
            self._news.clear()
            await self._news.wait()
        return None

    def _landed(self, part: Part) -> None:
        holding = self._holdings[part.partition]
        holding.position = part.position
        holding.spools.update(part.memory.spools)
        for position in [position for position in holding.rejected if position < part.position]:
            del holding.rejected[position]

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
                if self._until and self._is_through():
                    await self._landed_all()
                    self.end()
                    return
        except BehindRetentionError:
            # What lies before the gap lands first: the log may no longer have that either.
            await self._landed_all()
            raise

    def _is_through(self) -> bool:
        return all(partition in self._waiting() or self._is_read(partition) for partition in self._until)

    def _is_read(self, partition: int) -> bool:
        return bool(self._until) and self._next[partition] >= self._until[partition]

    async def _landed_all(self) -> None:
        """Let what has been read be written, and wait for it."""
        await self._offer()
        while self.growing is not None or self.landing is not None:
            self._room.clear()
            await self._room.wait()

    async def _take(self, slices: list[Slice]) -> None:
        waiting = self._waiting()
        for read in slices:
            if read.partition not in self._waiting() and not self._is_read(read.partition):
                await self._plan(self._wanted(read))
        await self._offer()
        if self._waiting() != waiting:
            await self._assign()

    def _wanted(self, read: Slice) -> Slice:
        if not self._until:
            return read
        return read._replace(bodies=read.bodies[: self._until[read.partition] - read.first])

    def _waiting(self) -> set[int]:
        return {partition for partition, holding in self._holdings.items() if holding.is_waiting}

    async def _assign(self) -> None:
        """Read on from where planning stands, but for partitions that wait for an upgrade."""
        waiting = self._waiting()
        await self._reader.assign({partition: at for partition, at in self._next.items() if partition not in waiting})

    async def _plan(self, read: Slice) -> None:
        if read.first != self._next[read.partition]:
            raise BehindRetentionError(read.partition, self._next[read.partition], read.first)
        try:
            while self._next[read.partition] < read.next_position:
                plan = await self._roomy()
                self._fill(plan, read)
                await asyncio.sleep(0)
        except UnknownVersionError as error:
            self._holdings[read.partition].newer_version = error.version
            _log.error(
                "a record is newer than this worker: its partition waits for `sluice` to be upgraded",
                extra={"partition": read.partition, "position": self._next[read.partition], "version": error.version},
            )
        except SpoolJumpError as error:
            self._holdings[read.partition].jump = str(error)
            _log.error("a spool's records are missing", extra={"partition": read.partition, "reason": str(error)})

    async def _roomy(self) -> Plan:
        """The plan that grows, once it is not full."""
        while True:
            if self.growing is None:
                self.growing = Plan(self._registry.limits, self._bounds)
            if not self._is_full(self.growing):
                self._is_ready = False
                return self.growing
            self._room.clear()
            await self._offer()
            await self._room.wait()

    def _is_full(self, plan: Plan) -> bool:
        settings = self._settings
        return (
            plan.records >= self._records_max()
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
        end = begin + min(_RECORDS_AT_ONCE, self._records_max() - plan.records)
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
        return Part(
            partition,
            self._next[partition],
            cache,
            ahead=ahead,
            careful_until=holding.careful_until,
            landed_until=holding.landed_until,
            rejected=holding.rejected,
            memory=Memory(holding.spools, None if ahead is None else ahead.memory, expects_losses=holding.has_losses),
        )

    async def _offer(self) -> None:
        """Look up what the growing plan misses, then let it be written."""
        plan = self.growing
        if plan is None or not plan.records:
            return
        async with asyncio.timeout(self._settings.landing_transaction_timeout_s):
            while not plan.is_settled:
                await self._settle(plan)
            if not await self._registry.has_hypertables():
                await self._registry.ensure_weeks(plan.weeks())
        if self.growing is plan:
            self._is_ready = True
            self._news.set()

    async def _settle(self, plan: Plan) -> None:
        await self._registry.learn(plan.unknown_organisations)
        names: dict[bytes, SeriesName] = {}
        for part in plan.parts.values():
            names |= part.unknown
        found = await self._registry.resolve(list(names.values())) if names else []
        until = self._clock.monotonic() + self._settings.landing_refusal_ttl_s
        plan.settle(dict(zip(names, found, strict=True)), until)
        if plan.late.questions:
            plan.answer(await self._registry.answer(plan.late.questions))
