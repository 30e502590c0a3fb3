"""What landing costs: planning and packing without I/O, then a whole log against a plain COPY of the same rows.

`pytest bench/test_landing.py --benchmark-only`; the last two print readings a second in `extra_info`.
"""

import asyncio
import random
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest
import uvloop
from pytest_benchmark.fixture import BenchmarkFixture

from runtime.ids import uuid7
from runtime.postgres import connect
from schemas.record import PLAIN_VERSION, Channel, Record, encode
from schemas.topics import partition_of
from tests.conftest import CHECKOUT, run_services
from tests.databases import Database, LocalServer
from tests.landing_rig import DAY, NOW, SECOND, Device, Rig, open_rig, sqlite_url
from workers.landing import columns
from workers.landing.columns import READING, Columns, Runs
from workers.landing.plan import Bounds, Limits, Part, Plan
from workers.landing.series import NEVER, Found, SeriesCache
from workers.settings import LandingSettings

CHANNELS: Final = 4
READINGS: Final = 25
DEVICES: Final = 1_250
PARTITIONS: Final = 8
LOG_READINGS: Final = 2_000_000
BATCH_READINGS: Final = 200_000

ORGANISATION: Final = uuid7()


def _record(device: Device, start: int, channels: int, readings: int) -> Record:
    times = struct.pack(f">{readings}q", *range(start, start + readings * SECOND, SECOND))
    values = [struct.pack(f">{readings}d", *(random.random() for _ in range(readings))) for _ in range(channels)]
    ids = uuid7().bytes, device.organisation.bytes, device.device.bytes
    found = [Channel(f"metric_{number}", "", "W", times, value) for number, value in enumerate(values)]
    return Record(PLAIN_VERSION, *ids, NOW, "http", "request-1", found)


def _plan(bodies: list[bytes], cache: SeriesCache) -> Plan:
    limits = {ORGANISATION.bytes: Limits(400 * DAY, 1_000_000)}
    plan = Plan(limits, Bounds(future_us=600 * SECOND, payload_max=1_000))
    part = plan.parts[0] = Part(0, 0, cache)
    for body in bodies:
        plan.add(part, body, NOW)
    plan.settle({key: Found(number, True) for number, key in enumerate(part.unknown)}, refusals_until=0.0)
    return plan


@pytest.mark.parametrize(("count", "channels", "readings"), [(1_000, CHANNELS, READINGS), (10_000, 1, 1)])
def test_decode_and_plan(benchmark: BenchmarkFixture, count: int, channels: int, readings: int) -> None:
    devices = [Device(ORGANISATION, uuid7()) for _ in range(DEVICES)]
    bodies = [
        encode(_record(devices[at % DEVICES], NOW - DAY + at // DEVICES * READINGS * SECOND, channels, readings))
        for at in range(count)
    ]
    cache = SeriesCache(NEVER)
    _plan(bodies, cache)
    plan = benchmark(_plan, bodies, cache)
    assert plan.rows == count * channels * readings
    assert not plan.suspects.times


def _runs(count: int, readings: int) -> Runs:
    runs = Runs()
    for number in range(count):
        runs.add(number * 7919 % count, random.randbytes(8 * readings), random.randbytes(8 * readings), 0)
    return runs


def _pack_strided(runs: Runs) -> int:
    return sum(map(len, columns.blocks(READING, runs.sorted())))


def _pack_each(runs: Runs) -> int:
    """The plain way, for comparison: `struct.pack` a row."""
    pack = struct.Struct(">hiiihi8si8s").pack
    rows = [
        pack(4, 4, series, 2, 0, 8, times[at : at + 8], 8, values[at : at + 8])
        for series, times, values in sorted(zip(runs.series_ids, runs.times, runs.values, strict=True))
        for at in range(0, len(times), 8)
    ]
    return len(b"".join(rows)) + len(columns.HEADER) + len(columns.TRAILER)


@pytest.mark.parametrize("pack", [_pack_strided, _pack_each])
@pytest.mark.parametrize(("count", "readings"), [(4_000, READINGS), (100_000, 1)])
def test_pack(benchmark: BenchmarkFixture, pack: Callable[[Runs], int], count: int, readings: int) -> None:
    assert benchmark(pack, _runs(count, readings)) == 40 * count * readings + 21


# ---------------------------------------------------------------- with a database


class Bench:
    """A log full of readings that nobody has landed, in a database of its own."""

    def __init__(self, directory: Path, repeated_every: int = 0) -> None:
        """`repeated_every`: one record of so many stands in the log a second time, a round later."""
        self._directory = directory
        self._repeated_every = repeated_every
        self._repeats: list[tuple[int, bytes]] = []
        self.appended = 0
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._stack = AsyncExitStack()
        self.rig: Rig
        self.batches: list[Columns] = []

    def open(self) -> None:
        run_services("start", "timescaledb")
        self._runner.run(self._open())

    def run(self, work: Callable[["Bench"], Any]) -> None:
        self._runner.run(work(self))

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    async def _open(self) -> None:
        server = LocalServer(CHECKOUT / ".services")
        template = await server.create_template()
        self._stack.push_async_callback(server.drop, template)
        database: Database = await server.create(f"bench_{uuid4().hex}", template)
        self._stack.push_async_callback(server.drop, database.name)
        url = sqlite_url(self._directory)
        self.rig = await self._stack.enter_async_context(open_rig(database, url, partitions=PARTITIONS))
        self.rig.settings = LandingSettings(landing_batch_rows_max=BATCH_READINGS)
        devices = await self.rig.register(DEVICES)
        runs = Runs()
        for at in range(LOG_READINGS // (DEVICES * CHANNELS * READINGS)):
            await self._append(devices, NOW - DAY + at * READINGS * SECOND, runs)
            if len(runs.times) * READINGS >= BATCH_READINGS:
                self.batches.append(runs.sorted())
                runs = Runs()
        if runs.times:
            self.batches.append(runs.sorted())

    async def _append(self, devices: list[Device], start: int, runs: Runs) -> None:
        futures = [self.rig.log.append(*one) for one in self._repeats]
        repeats: list[tuple[int, bytes]] = []
        for number, device in enumerate(devices):
            record = _record(device, start, CHANNELS, READINGS)
            partition, body = partition_of(record.device, PARTITIONS), encode(record)
            futures.append(self.rig.log.append(partition, body))
            if self._repeated_every and number % self._repeated_every == 0:
                repeats.append((partition, body))
            for ordinal, channel in enumerate(record.channels):
                assert isinstance(channel.values, bytes)
                runs.add(number * CHANNELS + ordinal, channel.times, channel.values, 0)
        self._repeats = repeats
        self.appended += len(futures) * CHANNELS * READINGS
        await asyncio.gather(*futures)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.open()
    yield bench
    bench.close()


async def _land(bench: Bench) -> None:
    async with bench.rig.worker():
        await bench.rig.landed()


async def _copy(bench: Bench) -> None:
    """The yardstick: the same rows in equal batches, sorted alike, into a table of the same shape."""
    connection: Any = await connect(bench.rig.postgres, role="sluice_worker", application="bench")
    names = ["series_id", "quality", "ts", "value"]
    for batch in bench.batches:
        source = columns.stream(READING, batch)
        await connection.copy_to_table("readings", source=source, columns=names, format="binary")
    await connection.close()


@pytest.mark.parametrize("work", [_land, _copy])
def test_a_log_of_two_million_readings(
    benchmark: BenchmarkFixture, bench: Bench, work: Callable[[Bench], Any]
) -> None:
    benchmark.pedantic(bench.run, args=(work,), rounds=1)  # type: ignore[no-untyped-call]
    assert benchmark.stats is not None
    seconds = benchmark.stats.stats.min
    benchmark.extra_info["readings_per_s"] = round(sum(batch.count for batch in bench.batches) / seconds)


def test_one_record_in_ten_sent_twice(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Against the rate without, in one run: `extra_info` has both and their ratio."""
    rates = {}
    for every in (0, 10):
        directory = tmp_path / str(every)
        directory.mkdir()
        bench = Bench(directory, repeated_every=every)
        bench.open()
        began = time.perf_counter()
        if every:
            benchmark.pedantic(bench.run, args=(_land,), rounds=1)  # type: ignore[no-untyped-call]
        else:
            bench.run(_land)
        rates[every] = bench.appended / (time.perf_counter() - began)
        bench.close()
    benchmark.extra_info |= {"without": round(rates[0]), "with": round(rates[10]), "ratio": rates[10] / rates[0]}
