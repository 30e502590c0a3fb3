"""Fills a store with history: series of many days, and their roll-ups.

Readings go straight into the database, by INSERT … SELECT as the workers' role, a day of some series in one
transaction, in order of time as they would have landed; ingest, log and landing are no part of it. Roll-ups are then
computed by the workers' own code. What stands already is not made again, so that a stopped run goes on where it was.
Left out: what is asked of it (`bench.queries`).
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast
from uuid import UUID

import asyncpg
from prometheus_client import CollectorRegistry

from api.readings.buckets import TIERS
from bench.errors import BenchError
from bench.parts import Parts, progress
from bench.registry import register
from runtime.clock import ManualClock
from runtime.log.port import Log
from runtime.postgres import PostgresSettings
from workers.rollups.closing import Closer
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.repairing import Repairer
from workers.rollups.session import Session, open_session
from workers.rollups.settings import RollupsSettings

DAY: Final = timedelta(days=1)
TELL_EVERY_S: Final = 5.0
TIMEOUT_S: Final = 600
#: Of one transaction, so that a stopped run loses seconds.
READINGS_A_STEP: Final = 500_000
TABLES: Final = (
    "readings",
    *(f"rollups_{tier}" for tier, _ in TIERS),
    "rollup_marks",
    "series",
    "device_sites",
    "devices",
)
#: Devices have one series each: a temperature, a counter that begins again now and then, a switch.
METRICS: Final = (("temperature", "°C"), ("energy", "Wh"), ("switch", ""))

_ACT: Final = "SELECT set_config('sluice.organisation', $1, true)"
_FOUND: Final = """
SELECT organisation_id, substr(name, length($1) + 1) AS until FROM organisations WHERE starts_with(name, $1)"""
_NAME: Final = "UPDATE organisations SET name = $2 WHERE organisation_id = $1"
_SERIES: Final = """
INSERT INTO series (organisation_id, device_id, metric, unit)
SELECT $1, device, ($3::text[])[1 + (n - 1) % 3], ($4::text[])[1 + (n - 1) % 3]
FROM unnest($2::uuid[]) WITH ORDINALITY AS d (device, n) ORDER BY n"""
_MEMBERS: Final = """
SELECT s.series_id, s.device_id, s.metric FROM series s WHERE s.organisation_id = $1 ORDER BY s.series_id"""
_SITE: Final = "SELECT site_id FROM sites WHERE organisation_id = $1"
_WEEK: Final = "SELECT ensure_week($1)"
_NEWEST: Final = "SELECT ts FROM readings WHERE series_id = $1 AND ts >= $2 AND ts < $3 ORDER BY ts DESC LIMIT 1"
_DAY: Final = """
INSERT INTO readings
SELECT series_id, 0, ts, CASE (n - 1) % 3
    WHEN 0 THEN 20 + 5 * sin(k * 0.0043 + n) + ((k * 7919 + n * 31) % 997)::float8 / 1000
    WHEN 1 THEN (k + n * 977) % 40000 * 12 + (k * 7919) % 11
    ELSE (k / 37 + n) % 3 / 2 END
FROM (SELECT t AS ts, (extract(epoch FROM t)::bigint / extract(epoch FROM $4::interval)::bigint) AS k
      FROM generate_series($2::timestamptz, $3::timestamptz - $4::interval, $4::interval) t) times
CROSS JOIN unnest($1::int[]) WITH ORDINALITY AS s (series_id, n)
ORDER BY ts"""
# What stands behind the closing has to be marked by whoever writes there, as landing does.
_MARK: Final = """
INSERT INTO rollup_marks (series_id, first_bucket, last_bucket)
SELECT series_id, $2, $3::timestamptz - interval '5 minutes' FROM unnest($1::int[]) AS s (series_id)
WHERE EXISTS (SELECT FROM rollup_state WHERE closing_through > $2)"""
_COMPUTED: Final = """
SELECT CASE WHEN isfinite(computed_through) THEN computed_through END AS computed,
       (SELECT count(*) FROM rollup_marks) AS marks FROM rollup_state"""


@dataclass(frozen=True)
class Scale:
    """How much there is to be."""

    series: int
    days: int
    every_s: int

    @property
    def readings_a_day(self) -> int:
        return self.series * 86_400 // self.every_s

    @property
    def readings(self) -> int:
        return self.readings_a_day * self.days

    @property
    def name(self) -> str:
        """Begins the name of the organisation that has it, followed by the time at which it ends."""
        return f"bench: {self.series} series, {self.days} days, every {self.every_s} s, until "

    def check(self) -> None:
        """Raises `BenchError` for readings that do not divide a day."""
        if 86_400 % self.every_s:
            raise BenchError("--every: seconds that divide a day")


@dataclass(frozen=True)
class History:
    """What stands there: of `series` the n-th is of the n-th of `devices`, its metric by `METRICS`."""

    organisation: UUID
    site: UUID
    series: Sequence[int]
    devices: Sequence[UUID]
    metrics: Sequence[str]
    start: datetime
    end: datetime

    def of(self, metric: str) -> list[int]:
        """Places of those that have it."""
        return [place for place, name in enumerate(self.metrics) if name == metric]


@dataclass(frozen=True)
class Filled:
    """What it took, as far as this run did it."""

    readings: int
    seconds: float
    rolled_up_s: float


async def fill(parts: Parts, scale: Scale) -> tuple[History, Filled]:
    """Raises `BenchError` when it cannot be made."""
    connection = await asyncpg.connect(parts.database_url)
    try:
        history = await _registered(connection, parts, scale)
        began = time.monotonic()
        readings = await _fill_days(connection, history, scale)
        seconds = time.monotonic() - began
        began = time.monotonic()
        await _roll_up(connection, parts, history)
        rolled_up_s = time.monotonic() - began
    finally:
        await connection.close()
    if readings:
        progress("VACUUM ANALYZE, as autovacuum does in time")
        await vacuum(parts)
    return history, Filled(readings, seconds, rolled_up_s)


async def vacuum(parts: Parts) -> None:
    owner = await asyncpg.connect(parts.owner_url)
    for table in TABLES:
        await owner.execute(f"VACUUM (ANALYZE) {table}", timeout=TIMEOUT_S)
    await owner.close()


@asynccontextmanager
async def acting(connection: Any, organisation: UUID, role: str) -> AsyncIterator[None]:
    async with connection.transaction():
        await connection.execute(_ACT, str(organisation))
        await connection.execute(f"SET LOCAL ROLE {role}")
        yield


async def _registered(connection: Any, parts: Parts, scale: Scale) -> History:
    """The organisation of this scale with its devices and series: that of a run before, or a new one."""
    async with connection.transaction():
        await connection.execute("SET LOCAL ROLE sluice_worker")
        row = await connection.fetchrow(_FOUND, scale.name)
    if row is not None:
        return await _history(connection, row["organisation_id"], datetime.fromisoformat(row["until"]), scale)
    progress(f"registering {scale.series} devices")
    registered = await register(connection, parts.environment["SLUICE_SECRET_KEYS"], scale.series)
    names, units = zip(*METRICS, strict=True)
    until = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    organisation = registered.organisation
    async with acting(connection, organisation, "sluice_worker"):
        await connection.execute(_SERIES, organisation, registered.devices, names, units)
    async with acting(connection, organisation, "sluice_app"):
        # Last of all: who is stopped before leaves nothing that a later run takes for whole.
        await connection.execute(_NAME, organisation, scale.name + until.isoformat())
    return await _history(connection, organisation, until, scale)


async def _history(connection: Any, organisation: UUID, until: datetime, scale: Scale) -> History:
    async with acting(connection, organisation, "sluice_app"):
        rows = await connection.fetch(_MEMBERS, organisation)
        site = await connection.fetchval(_SITE, organisation)
    series, devices, metrics = ([row[name] for row in rows] for name in ("series_id", "device_id", "metric"))
    return History(organisation, UUID(str(site)), series, devices, metrics, until - scale.days * DAY, until)


# ---------------------------------------------------------------- readings


async def _fill_days(connection: Any, history: History, scale: Scale) -> int:
    """Day after day, series after series; how many readings were not there."""
    step = max(1, READINGS_A_STEP * scale.every_s // 86_400)
    groups = [history.series[first : first + step] for first in range(0, len(history.series), step)]
    made, done, began, told = 0, 0, time.monotonic(), -math.inf
    for number in range(scale.days):
        first = history.start + number * DAY
        for group in groups:
            made += await _fill_step(connection, history.organisation, group, first, scale)
            done += len(group) * 86_400 // scale.every_s
            now = time.monotonic()
            if made and now > told + TELL_EVERY_S:
                told = now
                progress(f"filling: {done / scale.readings:.0%}, {made / (now - began):,.0f} readings/s")
    return made


async def _fill_step(
    connection: Any, organisation: UUID, series: Sequence[int], first: datetime, scale: Scale
) -> int:
    """One day of some series, all or nothing: the first one tells whether it stands."""
    stop, every = first + DAY, timedelta(seconds=scale.every_s)
    async with acting(connection, organisation, "sluice_worker"):
        if await connection.fetchval(_NEWEST, series[0], first, stop) is not None:
            return 0
        await connection.execute(_WEEK, first)
        await connection.execute(_WEEK, stop)
        done = await connection.execute(_DAY, series, first, stop, every, timeout=TIMEOUT_S)
        for day in _days(first, stop):
            await connection.execute(_MARK, series, *day)
    return int(done.rpartition(" ")[2])


def _days(first: datetime, stop: datetime) -> list[tuple[datetime, datetime]]:
    """A mark lies within one day."""
    midnight = stop.replace(hour=0, minute=0, second=0, microsecond=0)
    return [span for span in ((first, midnight), (midnight, stop)) if span[0] < span[1]]


# ---------------------------------------------------------------- roll-ups


class NoLog:
    """Stands for a log that has nothing: what was written past it has landed."""

    source = UUID(int=0)

    async def bounds(self) -> dict[int, Any]:
        return {}


@asynccontextmanager
async def rollups_session(parts: Parts) -> AsyncIterator[Session]:
    async with open_session(_postgres(parts), RollupsMetrics(CollectorRegistry())) as session:
        yield session


async def close_until(session: Session, parts: Parts, until: datetime, share: float = 1.0) -> None:
    """What the workers do once everything received before `until` has landed, and the clock has come so far."""
    settings = RollupsSettings(rollups_delay_s=0, rollups_share=share)
    clock = ManualClock(round(until.timestamp() * 1e6))
    metrics = RollupsMetrics(CollectorRegistry())
    closer = Closer(_postgres(parts), settings, cast("Log", NoLog()), clock, metrics)
    for _ in range(2):  # the first pass ends what an earlier one had begun
        await closer.follow(session)


async def repair_all(session: Session, parts: Parts) -> None:
    """What the workers do about marks."""
    settings = RollupsSettings(rollups_share=1)
    await Repairer(_postgres(parts), settings, RollupsMetrics(CollectorRegistry())).follow(session)


def _postgres(parts: Parts) -> PostgresSettings:
    return PostgresSettings(database_url=parts.database_url)


async def _roll_up(connection: Any, parts: Parts, history: History) -> None:
    """All that is not rolled up yet, through the end of the history."""
    watching = asyncio.create_task(_watch(connection, history))
    try:
        async with rollups_session(parts) as session:
            await close_until(session, parts, history.end)
            await repair_all(session, parts)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    row = await _state(connection)
    if row["computed"] is None or row["computed"] < history.end:
        raise BenchError("the roll-ups do not reach the end: is a worker running, or a transaction open for long?")


async def _watch(connection: Any, history: History) -> None:
    while True:
        await asyncio.sleep(TELL_EVERY_S)
        row = await _state(connection)
        if row["computed"] is not None:
            share = min(1.0, max(0.0, (row["computed"] - history.start) / (history.end - history.start)))
            progress(f"rolling up: {share:.0%}, {row['marks']} marks to repair")


async def _state(connection: Any) -> Any:
    async with connection.transaction():
        await connection.execute("SET LOCAL ROLE sluice_worker")
        return await connection.fetchrow(_COMPUTED)
