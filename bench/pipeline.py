"""`sluice bench pipeline`: from a device's request to a committed row on the real parts, beside two yardsticks.

Readings of a fleet go end to end; as many again are landed from a full log; then single readings. Everything that was
acknowledged is counted in the database before a figure is given. Left out: how figures are shown (`bench.report`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import asyncpg
import uvloop

from bench.books import Books
from bench.errors import BenchError
from bench.load import Clients, Load
from bench.parts import Parts, Role, Workshop, progress, real_parts, workshop
from bench.registry import Registered, register
from bench.singles import Request, Server, Single, Singles
from bench.usage import Meter, cpu_s, free_port, memory_bytes
from bench.workload import INTERVAL_S, METRICS, Fleet, Round, json_post, shelly_get, single_post
from bench.yardsticks import Copied, CopyTable, bare_handler

TIMEOUT_S: Final = 600.0
TRICKLE_SAMPLES: Final = 60
TRICKLE_PAUSES_S: Final = (0.05, 0.11, 0.17, 0.23)
TRICKLE_TIMEOUT_S: Final = 10.0
DEVICES_A_CONNECTION: Final = 10
#: Of the run: long enough for the broker to compile what it runs most. At least each device once.
WARM_UP_SHARE: Final = 10
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
#: The ways of sending one reading.
SINGLES: Final[Mapping[str, Request]] = {
    "Shelly GET": lambda token, number: shelly_get(token, 18 + number % 800 / 100),
    "JSON POST": lambda token, number: single_post(token, 18 + number % 800 / 100),
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    readings: int
    readings_per_request: int
    connections: int
    processes: int
    series: int
    singles: int
    single_connections: int
    epoch_times: bool

    @property
    def devices(self) -> int:
        return self.series // len(METRICS)

    @property
    def requests(self) -> int:
        return self.readings // self.readings_per_request

    def check(self) -> None:
        """Raises `BenchError` for options that do not go together."""
        if self.series % len(METRICS) or self.devices < self.connections:
            raise BenchError(
                f"--series: a multiple of {len(METRICS)}, the metrics of a device; a device a connection"
            )
        if self.readings % self.readings_per_request or self.requests < self.devices:
            raise BenchError("--readings: a multiple of --readings-per-request, with a request a device at least")


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class EndToEnd:
    """The whole way under load."""

    load: Load
    committed_s: float
    """From the first request until the last row was committed."""
    cpu_s: Mapping[str, float]
    settling_cpu_s: float | None
    """PostgreSQL's, for what a run leaves to do, VACUUM ANALYZE and a checkpoint; None where it may not be asked."""
    batch_rows: float
    receipt_to_commit_ms: Mapping[str, float]
    """Of the oldest record of each batch, from the worker's own histogram."""
    memory_peak_bytes: Mapping[str, int]


@dataclass(frozen=True)
class LandingAlone:
    """A full log, landed with nothing else to do."""

    readings_per_s: float
    batch_rows: float
    worker_us: float
    postgresql_us: float


@dataclass(frozen=True)
class Figures:
    """Everything a run has measured."""

    options: Options
    end_to_end: EndToEnd
    landing: LandingAlone
    copied: Copied
    trickle_s: list[float]
    singles: Sequence[Single]


def measure(options: Options, services: Path) -> Figures:
    """Raises `BenchError` when a run cannot be made, or when its books do not add up."""
    options.check()
    with real_parts(services) as parts, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(options, parts))


async def _measure(options: Options, parts: Parts) -> Figures:
    async with workshop(parts) as shop, _run(options, parts, shop) as run, CopyTable(parts) as table:
        return await run.all(table)


@asynccontextmanager
async def _run(options: Options, parts: Parts, shop: Workshop) -> AsyncIterator["_Run"]:
    progress(f"registering {options.devices} devices")
    connection = await asyncpg.connect(parts.database_url)
    try:
        registered = await register(
            connection,
            parts.environment["SLUICE_SECRET_KEYS"],
            options.devices + options.single_connections * DEVICES_A_CONNECTION,
        )
    finally:
        await connection.close()
    books = Books(parts, registered.organisation)
    await books.open()
    try:
        yield _Run(options, parts, shop, books, registered)
    finally:
        await books.close()


class _Run:
    """One run: the phases, in an order in which none makes the readings of a later one look late."""

    def __init__(self, options: Options, parts: Parts, shop: Workshop, books: Books, registered: Registered) -> None:
        self._options = options
        self._parts = parts
        self._shop = shop
        self._books = books
        self._sent = 0
        self._port = free_port()
        each, devices = options.readings_per_request, options.devices
        warm_up = max(devices, options.requests // WARM_UP_SHARE)
        readings_a_device = (warm_up + 2 * options.requests + 3 * devices) * each // devices
        begin_s = int(time.time()) - readings_a_device // len(METRICS) * INTERVAL_S
        self._fleet = Fleet(registered.tokens[:devices], begin_s, epoch_times=options.epoch_times)
        self._warm_up = Round(self._fleet, 0, each, warm_up)
        self._first = Round(self._fleet, self._warm_up.next_first, each, options.requests)
        self._second = Round(self._fleet, self._first.next_first, each, options.requests)
        self._single_tokens = registered.tokens[devices:]
        self._single_devices = registered.devices[devices:]

    async def all(self, table: CopyTable) -> Figures:
        listen = {"SLUICE_HTTP_LISTEN": f"127.0.0.1:{self._port}"}
        ingest = await self._shop.role("ingest", SLUICE_HTTP_PROCESSES=str(self._options.processes), **listen)
        worker = await self._shop.role("worker")
        end_to_end = await self._end_to_end(ingest, worker)
        await worker.stop()

        progress("filling the log, and the table of the yardstick")
        await self._send(self._second)
        await table.fill(self._warm_up, self._options.readings)
        await table.fill(self._first, round(end_to_end.batch_rows))
        # From here on both tables hold the same, and nothing is left to do for either.
        await self._settle(table.name)
        worker, landing = await self._landing_alone()
        copied = await table.fill(self._second, round(landing.batch_rows))
        trickle_s = await self._trickle()
        await worker.stop()

        singles = await self._singles(ingest)
        await self._shop.role("worker")
        await self._books.landed(TIMEOUT_S)
        await self._books.check(self._sent)
        return Figures(self._options, end_to_end, landing, copied, trickle_s, singles)

    async def _send(self, sent: Round) -> Load:
        lanes = sent.lanes(self._options.connections)
        async with Clients(self._port, len(lanes)) as clients:
            return await self._send_lanes(clients, lanes, sent.each)

    async def _send_lanes(self, clients: Clients, lanes: list[list[bytes]], each: int) -> Load:
        load = await clients.send(lanes, each, TIMEOUT_S)
        self._sent += load.readings
        return load

    async def _settle(self, table: str) -> float | None:
        """Do what autovacuum and the checkpointer would do in their own time; CPU seconds, or None."""
        if self._parts.superuser_url is None:
            return None
        connection = await asyncpg.connect(self._parts.superuser_url)
        began = cpu_s(self._parts.postgresql)
        await connection.execute(f"VACUUM (ANALYZE) {table}")
        await connection.execute("CHECKPOINT")
        taken = cpu_s(self._parts.postgresql) - began
        await connection.close()
        return taken

    # ------------------------------------------------------------ phases

    async def _end_to_end(self, ingest: Role, worker: Role) -> EndToEnd:
        progress(f"warming up with {self._warm_up.readings} readings")
        await self._send(self._warm_up)
        await self._books.landed(TIMEOUT_S)
        lanes = self._first.lanes(self._options.connections)
        progress(f"sending {self._first.readings} readings")
        before = await worker.metrics()
        async with Clients(self._port, len(lanes)) as clients:
            meter = Meter(
                ingest=ingest.pid, worker=worker.pid, kafka=self._parts.kafka, postgresql=self._parts.postgresql
            )
            began = time.perf_counter()
            load = await self._send_lanes(clients, lanes, self._first.each)
            landing = await self._books.landed(TIMEOUT_S)
            taken = meter.read()
        after = await worker.metrics()
        settling = await self._settle("readings")
        await self._books.check(self._sent)
        gained = {name: value - before.get(name, 0.0) for name, value in after.items()}
        peaks = {role: memory_bytes(pid, "VmHWM") for role, pid in (("ingest", ingest.pid), ("worker", worker.pid))}
        receipt_to_commit = histogram_ms(gained, "sluice_landing_receipt_to_commit_seconds", 50, 95)
        return EndToEnd(
            load, landing.moments[-1][0] - began, taken, settling, _batch_rows(gained), receipt_to_commit, peaks
        )

    async def _landing_alone(self) -> tuple[Role, LandingAlone]:
        """The worker starts with the log full, and everything else idle."""
        progress("landing what the log holds")
        began = cpu_s(self._parts.postgresql)
        watching = asyncio.create_task(self._books.landed(TIMEOUT_S))
        worker = await self._shop.role("worker")
        landing = await watching
        readings = self._second.readings
        postgresql_us = (cpu_s(self._parts.postgresql) - began) * 1e6 / readings
        worker_us = cpu_s(worker.pid) * 1e6 / readings
        rate = landing.records_per_s * self._second.each
        return worker, LandingAlone(rate, _batch_rows(await worker.metrics()), worker_us, postgresql_us)

    async def _trickle(self) -> list[float]:
        """Single readings into a quiet system: seconds from sending one until a query returns its row."""
        progress("single readings, one at a time")
        token, device = self._single_tokens[0], self._single_devices[0]
        samples = []
        async with Clients(self._port, 1) as clients:
            await self._send_lanes(clients, [[single_post(token, 20.0)]], 1)
            await self._books.landed(TRICKLE_TIMEOUT_S)
            series = await self._books.series_of(device, METRICS[0][0])
            for number in range(TRICKLE_SAMPLES):
                await asyncio.sleep(TRICKLE_PAUSES_S[number % len(TRICKLE_PAUSES_S)])
                us = time.time_ns() // 1000
                body = b'{"measurements":[{"type":"temperature","value":21.5,"ts":%d}]}' % us
                began = time.perf_counter()
                await self._send_lanes(clients, [[json_post(token, body)]], 1)
                moment = EPOCH + timedelta(microseconds=us)
                samples.append(await self._books.visible(series, moment, TRICKLE_TIMEOUT_S) - began)
        return samples

    async def _singles(self, ingest: Role) -> list[Single]:
        """One reading a request, without a worker: over few connections, then over enough to keep ingest busy."""
        bare = Server(*await bare_handler(self._shop))
        singles = Singles(Server(self._port, ingest.pid), bare, self._parts.kafka, self._single_tokens)
        measured = []
        for connections in (self._options.connections, self._options.single_connections):
            for name, request in SINGLES.items():
                progress(f"{name}, one reading a request, {connections} connections")
                count = self._options.singles
                measured.append(await singles.measure(name, request, count=count, connections=connections))
        self._sent += singles.sent
        return measured


# ---------------------------------------------------------------- reading metrics


def _batch_rows(metrics: Mapping[str, float]) -> float:
    batches = metrics["sluice_landing_batch_rows_count"]
    if not batches:
        raise BenchError("the worker says that it landed nothing")
    return metrics["sluice_landing_batch_rows_sum"] / batches


def histogram_ms(metrics: Mapping[str, float], name: str, *wanted: int) -> dict[str, float]:
    """Percentiles of a Prometheus histogram of seconds: the upper bound of the bucket that each lies in."""
    buckets = sorted(
        (float(key.partition('le="')[2].rstrip('"}')), count)
        for key, count in metrics.items()
        if key.startswith(f"{name}_bucket")
    )
    total = buckets[-1][1] if buckets else 0.0
    if not total:
        raise BenchError(f"{name} has no observations")
    return {
        f"p{percent}": next(bound for bound, count in buckets if count * 100 >= total * percent) * 1000
        for percent in wanted
    }
