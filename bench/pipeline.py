"""`sluice bench pipeline`: from a device's request to a committed row on the real parts, beside two yardsticks.

Readings of a fleet go end to end; as many again are landed from a full log; then single readings. Everything that was
acknowledged is counted in the database before a figure is given. Left out: how figures are shown (`bench.report`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
import uvloop

from bench.books import Books
from bench.errors import BenchError
from bench.load import Clients, Load
from bench.parts import Parts, Role, Workshop, progress, real_parts, workshop
from bench.probe import IDLE, LOADED, Probe, open_probe
from bench.registry import Registered, register
from bench.singles import Server, Single, Singles, Way
from bench.usage import Meter, cpu_s, free_port, memory_bytes
from bench.workload import INTERVAL_S, METRICS, Fleet, Round, shelly_get, single_post
from bench.yardsticks import Copied, CopyTable, bare_handler

TIMEOUT_S: Final = 600.0
TRICKLE_S: Final = 8.0
DEVICES_A_CONNECTION: Final = 10
#: Enough to be on all partitions.
DEVICES_PROBED: Final = 10
#: The longest there may be: the worker keeps its partitions while it is held.
LEASE_TTL_S: Final = 300
#: Of the run: long enough for the broker to compile what it runs most. At least each device once.
WARM_UP_SHARE: Final = 10
WAYS: Final = (
    Way("Shelly GET", 1, lambda token, number: shelly_get(token, 18 + number % 800 / 100)),
    Way("Shelly GET", 2, lambda token, number: shelly_get(token, 18 + number % 800 / 100, 40 + number % 300 / 10)),
    Way("JSON POST", 1, lambda token, number: single_post(token, 18 + number % 800 / 100)),
)


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
    probed_s: Sequence[float]
    """Of single readings sent meanwhile: from sending one until a query returned its row."""
    memory_peak_bytes: Mapping[str, int]


@dataclass(frozen=True)
class LandingAlone:
    """A full log, landed with nothing else to do, by a worker that was there already."""

    readings: int
    seconds: float
    batch_rows: float
    worker_us: float
    postgresql_us: float

    @property
    def readings_per_s(self) -> float:
        return self.readings / self.seconds


@dataclass(frozen=True)
class Figures:
    """Everything a run has measured."""

    options: Options
    end_to_end: EndToEnd
    landing: LandingAlone
    copied: Copied
    trickle_s: Sequence[float]
    """As `probed_s`, with nothing else to do."""
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
        probed = registered.devices[devices : devices + DEVICES_PROBED]
        self._probed = dict(zip(probed, self._single_tokens, strict=False))

    async def all(self, table: CopyTable) -> Figures:
        listen = {"SLUICE_HTTP_LISTEN": f"127.0.0.1:{self._port}"}
        ingest = await self._shop.role("ingest", SLUICE_HTTP_PROCESSES=str(self._options.processes), **listen)
        worker = await self._shop.role("worker", SLUICE_LANDING_LEASE_TTL_S=str(LEASE_TTL_S))
        async with open_probe(self._parts, self._books, self._port, self._probed, self._fleet.begin_s) as probe:
            end_to_end = await self._end_to_end(ingest, worker, probe)
            landing = await self._landing_alone(worker, table, round(end_to_end.batch_rows))
            copied = await table.fill(self._second, round(landing.batch_rows))
            progress("single readings, one at a time")
            trickle_s = await probe.follow(asyncio.create_task(asyncio.sleep(TRICKLE_S)), IDLE)
        await worker.stop()
        self._sent += probe.sent

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

    async def _end_to_end(self, ingest: Role, worker: Role, probe: Probe) -> EndToEnd:
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
            loading = asyncio.create_task(self._send_lanes(clients, lanes, self._first.each))
            probing = asyncio.create_task(probe.follow(loading, LOADED))
            try:
                load = await loading
                await self._books.landed(TIMEOUT_S)
                committed_s, taken = time.perf_counter() - began, meter.read()
                probed_s = await probing
            finally:
                probing.cancel()
        batch_rows = _batch_rows(before, await worker.metrics())
        settling = await self._settle("readings")
        await self._books.check(self._sent + probe.sent)
        peaks = {role: memory_bytes(pid, "VmHWM") for role, pid in (("ingest", ingest.pid), ("worker", worker.pid))}
        return EndToEnd(load, committed_s, taken, settling, batch_rows, probed_s, peaks)

    async def _landing_alone(self, worker: Role, table: CopyTable, rows_per_copy: int) -> LandingAlone:
        """The worker is held while the log is filled: neither its start nor its first looks are measured."""
        progress("filling the log, and the table of the yardstick")
        before = await worker.metrics()
        with worker.held():
            await self._send(self._second)
            await table.fill(self._warm_up, self._options.readings)
            await table.fill(self._first, rows_per_copy)
            # From here on both tables hold the same, and nothing is left to do for either.
            await self._settle(table.name)
            progress("landing what the log holds")
            meter = Meter(worker=worker.pid, postgresql=self._parts.postgresql)
            began = time.perf_counter()
        await self._books.landed(TIMEOUT_S)
        seconds, taken = time.perf_counter() - began, meter.read()
        batch_rows = _batch_rows(before, await worker.metrics())
        worker_us, postgresql_us = (taken[part] * 1e6 / self._second.readings for part in ("worker", "postgresql"))
        return LandingAlone(self._second.readings, seconds, batch_rows, worker_us, postgresql_us)

    async def _singles(self, ingest: Role) -> list[Single]:
        """Small requests, without a worker: over few connections, then over enough to keep ingest busy."""
        bare = Server(*await bare_handler(self._shop))
        singles = Singles(Server(self._port, ingest.pid), bare, self._parts.kafka, self._single_tokens)
        measured = []
        for connections in (self._options.connections, self._options.single_connections):
            for way in WAYS:
                progress(f"{way.name}, {connections} connections")
                count = self._options.singles
                measured.append(await singles.measure(way, count=count, connections=connections))
        self._sent += singles.sent
        return measured


def _batch_rows(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    rows, batches = (
        after[name] - before[name] for name in ("sluice_landing_batch_rows_sum", "sluice_landing_batch_rows_count")
    )
    if not batches:
        raise BenchError("the worker says that it landed nothing")
    return rows / batches
