"""`sluice bench memory`: what ingest takes once it knows many devices, and a worker once it knows many series.

Each device sends real requests over real parts, twice: the first makes its series, the second finds them known.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
import orjson
import uvloop

from bench.books import Books
from bench.load import Clients
from bench.parts import Parts, Role, Workshop, progress, real_parts, workshop
from bench.registry import Registered, register
from bench.usage import free_port, memory_bytes
from bench.workload import json_post

CONNECTIONS: Final = 32
ROUNDS: Final = 2
TIMEOUT_S: Final = 900.0
LABELS: Final = tuple(f"sensor-{number}" for number in range(1000))


@dataclass(frozen=True)
class MemoryFigures:
    """Resident memory of both roles, by role."""

    devices: int
    series: int
    series_cached: int
    peak_bytes: Mapping[str, int]
    resident_bytes: Mapping[str, int]


def measure(devices: int, series: int, services: Path) -> MemoryFigures:
    """Raises `BenchError` when a run cannot be made, or when its books do not add up."""
    with real_parts(services) as parts, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(devices, series, parts))


async def _measure(devices: int, series: int, parts: Parts) -> MemoryFigures:
    progress(f"registering {devices} devices")
    connection = await asyncpg.connect(parts.database_url)
    try:
        keys = parts.environment["SLUICE_SECRET_KEYS"]
        registered = await register(connection, keys, devices, overrides=False)
    finally:
        await connection.close()
    books = Books(parts, registered.organisation)
    await books.open()
    try:
        async with workshop(parts) as shop:
            return await _fill(shop, books, registered, series // devices)
    finally:
        await books.close()


async def _fill(shop: Workshop, books: Books, registered: Registered, series_each: int) -> MemoryFigures:
    port = free_port()
    ingest = await shop.role("ingest", SLUICE_HTTP_LISTEN=f"127.0.0.1:{port}")
    worker = await shop.role("worker")
    for number in range(ROUNDS):
        progress(f"round {number + 1}: {len(registered.tokens) * series_each} readings")
        lanes = _lanes(registered.tokens, series_each, int(time.time()) - ROUNDS + number)
        async with Clients(port, CONNECTIONS) as clients:
            await clients.send(lanes, series_each, TIMEOUT_S)
        await books.landed(TIMEOUT_S)
    await books.check(ROUNDS * len(registered.tokens) * series_each)
    return await _figures(ingest, worker, len(registered.tokens), series_each)


async def _figures(ingest: Role, worker: Role, devices: int, series_each: int) -> MemoryFigures:
    metrics = await worker.metrics()
    roles = {"ingest": ingest.pid, "worker": worker.pid}
    return MemoryFigures(
        devices,
        devices * series_each,
        round(metrics["sluice_landing_series_cached"]),
        {role: memory_bytes(pid, "VmHWM") for role, pid in roles.items()},
        {role: memory_bytes(pid, "VmRSS") for role, pid in roles.items()},
    )


def _lanes(tokens: Sequence[str], series_each: int, second: int) -> list[list[bytes]]:
    """A request a device, with a reading of each of its series."""
    measurements = [
        {"type": "temperature", "label": label, "value": 20.5, "ts": second} for label in LABELS[:series_each]
    ]
    body = orjson.dumps({"measurements": measurements})
    return [[json_post(token, body) for token in tokens[lane::CONNECTIONS]] for lane in range(CONNECTIONS)]
