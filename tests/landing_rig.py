"""What the tests of landing share: a registry of devices, records, a log, a worker, and the books that must add up.

Left out: which database and which log (fixtures), and what is expected of them.
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from prometheus_client import CollectorRegistry

from deploy.generation import ensure_generation, open_generation
from runtime.clock import SystemClock
from runtime.ids import uuid7
from runtime.log import Log, LogSettings
from runtime.migrate import SESSION
from runtime.postgres import PostgresSettings, connect
from schemas.record import PG_EPOCH_US, PLAIN_VERSION, Channel, Note, Record, Refused, encode
from schemas.topics import partition_of
from tests.databases import Database
from workers.landing.worker import LandingWorker
from workers.metrics import LandingMetrics
from workers.settings import LandingSettings

NOW = SystemClock().now_us() - PG_EPOCH_US
SECOND = 1_000_000
DAY = 86_400 * SECOND
DEADLINE_S = 120.0

#: Quick enough that a test of a lost lease is not a wait.
SETTINGS = LandingSettings(
    landing_lease_ttl_s=1.5,
    landing_lease_renew_s=0.1,
    landing_retry_min_ms=10,
    landing_retry_max_ms=200,
    landing_batch_wait_ms=0,
    landing_lag_period_s=0.1,
)


def channel(
    metric: str,
    readings: Sequence[tuple[int, float]] | Sequence[tuple[int, str]],
    *,
    label: str = "",
    unit: str = "W",
    quality: int | bytes = 0,
) -> Channel:
    """A channel of (time, value)."""
    times = struct.pack(f">{len(readings)}q", *(time for time, _ in readings))
    values: list[Any] = [value for _, value in readings]
    texts = any(isinstance(value, str) for value in values)
    return Channel(metric, label, unit, times, values if texts else struct.pack(f">{len(values)}d", *values), quality)


def record(
    device: "Device",
    *channels: Channel,
    received_at: int = NOW,
    refused: Iterable[Refused] = (),
    notes: Iterable[Note] = (),
) -> Record:
    ids = uuid7().bytes, device.organisation.bytes, device.device.bytes
    return Record(PLAIN_VERSION, *ids, received_at, "http", "request-1", [*channels], [*refused], [*notes])


@dataclass(frozen=True)
class Device:
    """A registered device, and the organisation it belongs to."""

    organisation: UUID
    device: UUID


@dataclass
class Rig:
    """A migrated database with a generation of the log, and the log itself."""

    database: Database
    log: Log
    log_settings: LogSettings
    settings: LandingSettings = SETTINGS
    postgres: PostgresSettings = field(init=False)
    metrics: LandingMetrics = field(default_factory=lambda: LandingMetrics(CollectorRegistry()))

    def __post_init__(self) -> None:
        self.postgres = self.database.settings

    async def register(self, devices: int = 1, *, partition: int | None = None, **organisation: int) -> list[Device]:
        """Devices of one new organisation, all on `partition` if that is given."""
        owner = uuid7()
        found: list[Device] = []
        while len(found) < devices:
            device = Device(owner, uuid7())
            if partition in (None, partition_of(device.device.bytes, self.log.partitions)):
                found.append(device)
        columns = "".join(f", {name}" for name in organisation)
        values = "".join(f", {value}" for value in organisation.values())
        async with self.superuser() as connection:
            await connection.execute(
                f"INSERT INTO organisations (organisation_id, name{columns}) VALUES ($1, 'test'{values})", owner
            )
            await connection.executemany(
                "INSERT INTO devices (device_id, organisation_id, name, local_id) VALUES ($1, $2, 'test', $3)",
                [(device.device, owner, str(number)) for number, device in enumerate(found)],
            )
        return found

    @asynccontextmanager
    async def superuser(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self.database.superuser_url)
        try:
            yield connection
        finally:
            await connection.close()

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        async with self.superuser() as connection:
            return [tuple(row) for row in await connection.fetch(query, *arguments)]

    async def value(self, query: str, *arguments: Any) -> Any:
        return (await self.fetch(query, *arguments))[0][0]

    async def append(self, *records: Record) -> list[tuple[int, int]]:
        """Records at the end of the log: their partitions and positions."""
        places = [partition_of(record.device, self.log.partitions) for record in records]
        futures = [self.log.append(place, encode(record)) for place, record in zip(places, records, strict=True)]
        return list(zip(places, await asyncio.gather(*futures), strict=True))

    async def append_raw(self, partition: int, body: bytes) -> int:
        position: int = await self.log.append(partition, body)
        return position

    @asynccontextmanager
    async def worker(self, **changes: Any) -> AsyncIterator[LandingWorker]:
        """A worker that runs within the block, which it ends if it fails, and stops at its end as on a SIGTERM."""
        worker = LandingWorker(
            self.postgres, replace(self.settings, **changes), self.log, clock=SystemClock(), metrics=self.metrics
        )
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.run(stop))
            yield worker
            stop.set()

    async def landed(self) -> None:
        """Wait until everything that stands in the log has landed."""
        ends = {partition: bounds.end for partition, bounds in (await self.log.bounds()).items()}
        query = "SELECT partition, position FROM log_positions WHERE source = $1"
        async with self.superuser() as connection:

            async def done() -> bool:
                standing = dict(await connection.fetch(query, self.log.source))
                return all(standing[partition] >= end for partition, end in ends.items())

            await until(done)

    async def land(self, *records: Record, **changes: Any) -> None:
        """Append, and have a worker of its own land it."""
        await self.append(*records)
        async with self.worker(**changes):
            await self.landed()

    async def readings(self) -> list[tuple[str, str, int, float, int]]:
        """(metric, label, time, value, quality) of all that stand, in order."""
        rows = await self.fetch(
            "SELECT metric, label, ts, value, quality FROM readings JOIN series USING (series_id) ORDER BY 1, 2, 3"
        )
        return [(metric, label, microseconds(ts), value, quality) for metric, label, ts, value, quality in rows]

    async def ledger(self) -> tuple[int, int, int, int, int]:
        """Received, stored, duplicates, conflicts, quarantined; and what the tables hold agrees."""
        sums = (
            "sum(received)::int, sum(stored)::int, sum(duplicates)::int, sum(conflicts)::int, sum(quarantined)::int"
        )
        (books,) = await self.fetch(f"SELECT {sums} FROM ledger")
        received, stored, duplicates, conflicts, quarantined = (int(count or 0) for count in books)
        assert received == stored + duplicates + conflicts + quarantined
        tables = "(SELECT count(*) FROM readings) + (SELECT count(*) FROM text_readings)"
        assert stored == await self.value(f"SELECT {tables}")
        standing = await self.value("SELECT count(*) FROM quarantine WHERE organisation_id IS NOT NULL")
        assert standing == conflicts + quarantined
        (told,) = await self.fetch(
            "SELECT coalesce(sum(duplicates), 0)::int, coalesce(sum(conflicts), 0)::int,"
            " coalesce(sum(quarantined + refused), 0)::int FROM outcomes"
        )
        assert told == (duplicates, conflicts, quarantined)
        return received, stored, duplicates, conflicts, quarantined


def microseconds(time: Any) -> int:
    """Of a timestamptz, since 2000."""
    return round(float(time.timestamp()) * 1e6) - PG_EPOCH_US


def count(metric: Any) -> float:
    """What a counter or gauge has come to."""
    return float(metric._value.get())


async def until(look: Callable[[], Any], timeout_s: float = DEADLINE_S) -> None:
    """Wait for a condition; fails at the deadline."""
    async with asyncio.timeout(timeout_s):
        while not await look():  # noqa: ASYNC110 - nothing tells of it but asking
            await asyncio.sleep(0.01)


@asynccontextmanager
async def open_rig(
    database: Database, log_url: str, *, partitions: int = 2, keep_landed_h: float = 0
) -> AsyncIterator[Rig]:
    """A new generation of the log at `log_url`, known to `database`."""
    settings = LogSettings(log_url=log_url, log_linger_ms=0, log_keep_landed_h=keep_landed_h)
    owner = await connect(database.settings, role=None, application="test", url=database.owner_url, **SESSION)
    try:
        await ensure_generation(owner, settings, partitions)
        _, log = await open_generation(owner, settings, client_id="test")
    finally:
        await owner.close()
    try:
        yield Rig(database, log, settings)
    finally:
        await log.close()


def sqlite_url(directory: Path) -> str:
    return f"sqlite:///{directory}/log"
