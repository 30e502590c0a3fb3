"""What the tests of roll-ups share: answers computed from readings alone, and passes that can be taken step by step.

Left out: what lands (`tests.landing_rig`).
"""

import asyncio
import math
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import groupby, pairwise
from typing import Any, Final, NamedTuple
from uuid import UUID

import pytest
from prometheus_client import CollectorRegistry

from api.readings.aggregation import Aggregated, Question, aggregate
from api.readings.functions import FUNCTIONS
from api.readings.series import Found as FoundSeries
from api.readings.series import Series
from runtime.clock import SystemClock
from runtime.ids import uuid7
from runtime.postgres import PostgresSettings, connect
from schemas.record import Record, encode
from tests.landing_rig import NOW, SECOND, Device, Rig, microseconds
from workers.erasure import sql as erasure
from workers.landing.plan import Bounds, Limits, Part, Plan
from workers.landing.series import NEVER, Found, SeriesCache
from workers.landing.store import Store
from workers.rollups.closing import Closer
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.repairing import Repairer
from workers.rollups.session import DAY, HOUR, MINUTES_5, Session, open_session
from workers.rollups.settings import RollupsSettings

EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
MONDAY: Final = 2 * DAY
BOUNDS: Final = Bounds(future_us=600 * SECOND, payload_max=1_000, move_max_us=100_000)
SETTINGS: Final = RollupsSettings(rollups_delay_s=0, rollups_settle_s=0.02, rollups_share=1)
READINGS: Final = """
SELECT series_id, ts, value FROM organisation_readings WHERE series_id = ANY ($1::int[]) ORDER BY series_id, ts"""
WIDTHS: Final = (MINUTES_5, 3 * MINUTES_5, HOUR, 5 * HOUR, DAY, 7 * DAY)


def moment(us: int) -> datetime:
    return EPOCH + timedelta(microseconds=us)


class Answer(NamedTuple):
    """What a bucket of a series comes to."""

    series_id: int
    bucket: int
    readings: int
    sum: float
    min: float
    max: float
    first: float
    last: float
    delta: float
    delta_seconds: float
    area: float
    area_seconds: float
    seconds_true: float


class Stored(NamedTuple):
    """A reading."""

    time: int
    value: float


def expected(readings: Sequence[Stored], first: int, stop: int, edges: Sequence[int], series_id: int) -> list[Answer]:
    """From the readings of a series in order, by the plainest means."""
    found = []
    times = [one.time for one in readings]
    for low, high in pairwise(edges):
        at = range(bisect_left(times, max(low, first)), bisect_left(times, min(high, stop)))
        if at:
            found.append(_expected(readings, at, max(low, first), min(high, stop), (series_id, low)))
    return found


def _expected(readings: Sequence[Stored], at: range, low: int, high: int, name: tuple[int, int]) -> Answer:
    values = [readings[index].value for index in at]
    steps, seconds = [0.0], [0.0]
    for index in at:
        if index:
            before, now = readings[index - 1], readings[index]
            steps.append(now.value - before.value if now.value >= before.value else now.value)
            seconds.append((now.time - before.time) / SECOND)
    held = []  # each value until the next reading, as far as the bucket goes
    for index in range(max(at[0] - 1, 0), at[-1] + 1):
        if index + 1 < len(readings):
            since, until = max(readings[index].time, low), min(readings[index + 1].time, high)
            held.append((readings[index].value, (until - since) / SECOND))
    area = math.fsum(value * lasted for value, lasted in held)
    return Answer(
        *name, len(at), math.fsum(values), min(values), max(values), values[0], values[-1], math.fsum(steps),
        math.fsum(seconds), area, math.fsum(lasted for _, lasted in held),
        math.fsum(lasted for value, lasted in held if value),
    )  # fmt: skip


def given(answer: Aggregated, edges: Sequence[int]) -> list[Answer]:
    """What the engine told of everything, as rows."""
    rows = []
    for series_id, parts in sorted(answer.series.items()):
        columns = (
            parts.counts, parts.sums, parts.mins, parts.maxs, parts.firsts, parts.lasts, parts.deltas,
            parts.deltas_seconds, parts.areas, parts.areas_seconds, parts.seconds_true,
        )  # fmt: skip
        told = zip(parts.buckets, *columns, strict=True)
        rows += [Answer(series_id, edges[bucket], *values) for bucket, *values in told]
    return rows


def edges_between(first: int, stop: int, width: int) -> list[int]:
    start = first - (first - MONDAY) % width
    return list(range(start, stop + width, width))


#: All but those that readings alone tell.
TOLD: Final = tuple(name for name, function in FUNCTIONS.items() if function.fraction is None)


class Reader:
    """A session of the API for one organisation."""

    def __init__(self, connection: Any, series: Sequence[int]) -> None:
        self._connection = connection
        self.series = list(series)
        self.compared = 0
        """Buckets that were found equal, and of how many readings in them roll-ups told."""
        self.from_rollups = 0

    async def check(self, spans: Iterable[tuple[int, int, int]]) -> None:
        """In one snapshot: for each `[first, stop)` and width, what is answered is what the readings come to."""
        async with self._connection.transaction(isolation="repeatable_read", readonly=True):
            rows = await self._connection.fetch(READINGS, self.series)
            readings = {
                series_id: [Stored(microseconds(row["ts"]), row["value"]) for row in of_series]
                for series_id, of_series in groupby(rows, key=lambda row: row["series_id"])
            }
            for first, stop, width in spans:
                await self._check(readings, first, stop, width)

    async def _check(self, readings: Mapping[int, Sequence[Stored]], first: int, stop: int, width: int) -> None:
        edges = edges_between(first, stop, width)
        wanted = [
            answer
            for series_id, stored in readings.items()
            for answer in expected(stored, first, stop, edges, series_id)
        ]
        answer = await self.ask(first, stop, width)
        self._compare(given(answer, edges), wanted, (first, stop, width))
        narrow = await self.ask(first, stop, width, ("count", "sum", "min", "max"))
        for series_id, parts in answer.series.items():
            same = narrow.series[series_id]
            assert (same.buckets, same.counts, same.mins, same.maxs) == (
                parts.buckets, parts.counts, parts.mins, parts.maxs,
            )  # fmt: skip
            assert same.sums == pytest.approx(parts.sums, rel=1e-9, abs=1e-9)
        assert answer.from_readings + answer.from_rollups == sum(one.readings for one in wanted)
        self.compared += len(wanted)
        self.from_rollups += answer.from_rollups

    async def ask(self, first: int, stop: int, width: int, functions: tuple[str, ...] = TOLD) -> Aggregated:
        """The engine's answer."""
        found = FoundSeries({series_id: Series("", "", "", "") for series_id in self.series})
        edges = [moment(edge) for edge in edges_between(first, stop, width)]
        return await aggregate(self._connection, found, Question(moment(first), moment(stop), edges, functions))

    def _compare(self, got: Sequence[Answer], wanted: Sequence[Answer], asked: object) -> None:
        assert [one[:3] for one in got] == [one[:3] for one in wanted], asked
        for one, other in zip(got, wanted, strict=True):
            for name, left, right in zip(Answer._fields, one, other, strict=True):
                assert math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9), (asked, name, one, other)


@asynccontextmanager
async def open_reader(postgres: PostgresSettings, organisation: UUID, series: Sequence[int]) -> AsyncIterator[Reader]:
    connection: Any = await connect(postgres, role="sluice_app", application="test")
    try:
        await connection.execute("SELECT set_config('sluice.organisation', $1, false)", str(organisation))
        yield Reader(connection, series)
    finally:
        await connection.close()


# ---------------------------------------------------------------- taken step by step


class Actor:
    """A task that waits before each of its calls to the database until it is let go on, and that may be killed."""

    def __init__(self) -> None:
        self._may_go = asyncio.Event()
        self._waits = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connections: list[Any] = []
        self.calls = 0

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def waits(self) -> bool:
        """Whether it stands before a call; else it may be in one that waits for another actor."""
        return self._waits.is_set()

    def gated(self, connection: Any) -> Any:
        self._connections.append(connection)
        return _Gated(connection, self)

    async def gate(self) -> None:
        self.calls += 1
        self._waits.set()
        await self._may_go.wait()
        self._may_go.clear()
        self._waits.clear()

    async def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Up to its first call."""
        self._task, self.calls = asyncio.create_task(work), 0
        await self._until_it_waits()

    async def step(self) -> None:
        """One call, or as far as it comes within a while."""
        if self._waits.is_set():
            self._waits.clear()
            self._may_go.set()
        await self._until_it_waits()

    async def finish(self) -> None:
        """To its end. Raises what it raises."""
        while self.is_running:
            await self.step()
        assert self._task is not None
        await self._task

    async def kill(self) -> None:
        """As a SIGKILL does: whatever the database is at may yet go through."""
        for connection in self._connections:
            connection.terminate()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._connections.clear()
        self._reset()

    async def reap(self) -> BaseException | None:
        """How it ended, if it has."""
        assert self._task is not None
        error = None if self._task.cancelled() else self._task.exception()
        self._reset()
        return error

    def _reset(self) -> None:
        self._task = None
        self._may_go.clear()
        self._waits.clear()

    async def _until_it_waits(self) -> None:
        assert self._task is not None
        waiting = asyncio.create_task(self._waits.wait())
        await asyncio.wait({waiting, self._task}, timeout=0.005, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()


class _Gated:
    """A connection whose calls go through the gate of an actor."""

    def __init__(self, connection: Any, actor: Actor) -> None:
        self._connection = connection
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        if name not in ("execute", "fetch", "fetchval", "fetchrow", "copy_to_table", "copy_records_to_table"):
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            await self._actor.gate()
            return await found(*arguments, **options)

        return call

    def transaction(self, **options: Any) -> "_GatedTransaction":
        return _GatedTransaction(self._connection.transaction(**options), self._actor)


class _GatedTransaction:
    """Stops once more before it is committed."""

    def __init__(self, block: Any, actor: Actor) -> None:
        self._block = block
        self.start = block.start
        self.rollback = block.rollback
        self._actor = actor

    async def __aenter__(self) -> None:
        await self._block.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        if error[0] is None:
            await self._actor.gate()
        await self._block.__aexit__(*error)

    async def commit(self) -> None:
        await self._actor.gate()
        await self._block.commit()


class GatedCloser(Closer):
    """Follows a time that the test moves."""

    def __init__(self, rig: Rig, actor: Actor, now: Callable[[], int]) -> None:
        super().__init__(rig.postgres, SETTINGS, rig.log, SystemClock(), RollupsMetrics(CollectorRegistry()))
        self._actor = actor
        self._now = now

    async def _landed(self, connection: Any) -> int | None:
        return self._now()

    async def follow(self, session: Session) -> None:
        await super().follow(Session(self._actor.gated(session.connection), self._metrics))


class GatedRepairer(Repairer):
    def __init__(self, rig: Rig, actor: Actor) -> None:
        super().__init__(rig.postgres, SETTINGS, RollupsMetrics(CollectorRegistry()))
        self._actor = actor

    async def keep(self) -> None:
        """Though another one may be at it."""
        async with open_session(self._postgres, self._metrics) as session:
            await self.follow(Session(self._actor.gated(session.connection), self._metrics))


class Lander(Store):
    """Lands records on one partition, each in a transaction of its own, without a log."""

    def __init__(self, rig: Rig, partition: int, device: Device, series: Mapping[str, int], actor: Actor) -> None:
        super().__init__(rig.postgres, rig.settings, rig.log.source)
        self._partition = partition
        self.actor = actor
        self._limits = {device.organisation.bytes: Limits(400 * DAY, 1_000_000)}
        self.device = device
        self.series = series
        """By metric."""
        self._cache: SeriesCache | None = None
        self._position = 0

    async def land_one(self, one: Record) -> None:
        if self._cache is None or not self.is_open:
            await self._begin()
        plan = Plan(self._limits, BOUNDS)
        part = plan.parts[self._partition] = Part(self._partition, self._position, self._cache or SeriesCache(NEVER))
        plan.add(part, encode(one), NOW)
        plan.settle({key: Found(self.series[name.metric], False, "W") for key, name in part.unknown.items()}, 0.0)
        cache, self._cache = self._cache, None
        await self.land(plan)
        part.apply()
        self._cache, self._position = cache, part.position

    async def _begin(self) -> None:
        await self.open()
        standing = (await self.standing([self._partition]))[self._partition]
        self._cache, self._position = SeriesCache(standing.high_water), standing.position
        self._connection = self.actor.gated(self._connection)


async def erase(rig: Rig, actor: Actor, series: Sequence[int], first: int, stop: int) -> None:
    """As the eraser does it: one step."""
    async with open_session(rig.postgres, RollupsMetrics(CollectorRegistry())) as session:
        connection = actor.gated(session.connection)
        async with connection.transaction():
            await connection.fetchval(erasure.ALONE, uuid7())
            await connection.fetchval(erasure.ERASE["readings"], uuid7(), list(series), first, stop, 1_000)
