"""`sluice bench live`: what streams of readings cost the API, and how soon a reading is told once it is acknowledged.

Each listener is a connection of its own about a device of its own; every device sends a request a second. Clients
share the machine with what they measure. Left out: listeners about many devices, and clients that resume.
"""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, cast
from uuid import UUID

import asyncpg
import uvloop

from bench.api import add_key
from bench.errors import BenchError
from bench.load import HEAD_END, LOOPBACK
from bench.parts import Parts, progress, real_parts, workshop
from bench.registry import Registered, register
from bench.usage import cpu_s, free_port, memory_bytes
from bench.workload import json_post

SENDERS: Final = 32
OPENING_AT_ONCE: Final = 50
SETTLE_S: Final = 3.0
PATIENCE_S: Final = 60.0
_VALUE: Final = re.compile(rb'"value":(\d+)\.0')


@dataclass(frozen=True)
class Options:
    """What is measured."""

    listeners: int
    readings_per_request: int
    seconds: int


@dataclass(frozen=True)
class LiveFigures:
    """`delays_s`: from a request's acknowledgement to its event, of each; CPU and bytes of the API's process."""

    readings: int
    seconds: float
    delays_s: Sequence[float]
    idle_cpu_s_per_s: float
    cpu_s_per_s: float
    alone_bytes: int
    bytes: int


@dataclass
class _Times:
    """Of a device's requests, by number."""

    acknowledged: dict[int, float] = field(default_factory=dict)
    told: dict[int, float] = field(default_factory=dict)


class _Listener(asyncio.Protocol):
    """One stream: notes when the first reading of a request is told of."""

    def __init__(self, request: bytes, times: _Times) -> None:
        self._request = request
        self._told = times.told
        self.begun = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.begun.done() and b"event: position" in data:
            self.begun.set_result(None)
        for found in _VALUE.findall(data):
            self._told.setdefault(int(found), now)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.begun.done():
            self.begun.set_exception(BenchError("a stream was refused"))


def measure(options: Options, services: Path) -> LiveFigures:
    """Raises `BenchError` when a run cannot be made, or an event does not come."""
    with real_parts(services) as parts, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(options, parts))


async def _measure(options: Options, parts: Parts) -> LiveFigures:
    progress(f"registering {options.listeners} devices")
    connection = await asyncpg.connect(parts.database_url)
    try:
        registered = await register(connection, parts.environment["SLUICE_SECRET_KEYS"], options.listeners)
        async with connection.transaction():
            await connection.execute("SET LOCAL ROLE sluice_app")
            await connection.execute(
                "SELECT set_config('sluice.organisation', $1, true)", str(registered.organisation)
            )
            key = await add_key(connection, registered, parts)
    finally:
        await connection.close()
    async with workshop(parts) as shop:
        ports = free_port(), free_port()
        await shop.role("worker")
        await shop.role("ingest", SLUICE_HTTP_LISTEN=f"{LOOPBACK}:{ports[0]}")
        api = await shop.role("api", SLUICE_API_LISTEN=f"{LOOPBACK}:{ports[1]}")
        alone = memory_bytes(api.pid, "VmRSS")
        times = {device: _Times() for device in registered.devices}
        progress(f"opening {options.listeners} streams")
        await _listen(ports[1], key, times)
        await asyncio.sleep(SETTLE_S)
        idle_cpu_s = await _cpu_over(api.pid, SETTLE_S)
        progress(f"sending {options.listeners * options.readings_per_request} readings a second")
        used_s, began = cpu_s(api.pid), time.perf_counter()
        await _send(ports[0], registered, times, options)
        seconds = time.perf_counter() - began
        used_s = cpu_s(api.pid) - used_s
        await _all_told(times, options)
        delays = [one.told[n] - at for one in times.values() for n, at in one.acknowledged.items()]
        readings = len(delays) * options.readings_per_request
        size = memory_bytes(api.pid, "VmRSS")
        return LiveFigures(readings, seconds, delays, idle_cpu_s, used_s / seconds, alone, size)


async def _cpu_over(pid: int, seconds: float) -> float:
    """CPU seconds a second."""
    before, began = cpu_s(pid), time.perf_counter()
    await asyncio.sleep(seconds)
    return (cpu_s(pid) - before) / (time.perf_counter() - began)


async def _listen(port: int, key: str, times: dict[UUID, _Times]) -> None:
    at_once = asyncio.Semaphore(OPENING_AT_ONCE)

    async def open_one(device: UUID, one: _Times) -> None:
        head = (
            f"GET /api/v1/readings/stream?device_id={device} HTTP/1.1\r\nHost: {LOOPBACK}\r\n"
            f"Authorization: Bearer {key}\r\n\r\n"
        )
        async with at_once, asyncio.timeout(PATIENCE_S):
            loop = asyncio.get_running_loop()
            _, listener = await loop.create_connection(lambda: _Listener(head.encode(), one), LOOPBACK, port)
            await listener.begun

    async with asyncio.TaskGroup() as group:
        for device, one in times.items():
            group.create_task(open_one(device, one))


async def _send(port: int, registered: Registered, times: dict[UUID, _Times], options: Options) -> None:
    """Each device in its turn of the second."""
    devices = list(zip(registered.devices, registered.tokens, strict=True))
    began = time.perf_counter()

    async def send_some(sender: int) -> None:
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        for second in range(options.seconds):
            for place in range(sender, len(devices), SENDERS):
                device, token = devices[place]
                wait_s = began + second + place / len(devices) - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                writer.write(json_post(token, _body(second, options.readings_per_request)))
                head = await reader.readuntil(HEAD_END)
                times[device].acknowledged[second] = time.perf_counter()
                length = re.search(rb"Content-Length: (\d+)", head)
                if b" 202 " not in head or length is None:
                    raise BenchError(f"ingest answered {head[:100]!r}")
                await reader.readexactly(int(length[1]))
        writer.close()

    async with asyncio.TaskGroup() as group:
        for sender in range(SENDERS):
            group.create_task(send_some(sender))


def _body(number: int, count: int) -> bytes:
    """Readings of one metric whose value is the request's number."""
    now = datetime.now(UTC)
    measurements = [
        {"type": "co2", "value": number, "ts": (now - timedelta(milliseconds=count - n)).isoformat()}
        for n in range(count)
    ]
    return json.dumps({"measurements": measurements}).encode()


async def _all_told(times: dict[UUID, _Times], options: Options) -> None:
    deadline = time.perf_counter() + PATIENCE_S
    while any(len(one.told) < options.seconds for one in times.values()):
        if time.perf_counter() > deadline:
            missing = sum(options.seconds - len(one.told) for one in times.values())
            raise BenchError(f"{missing} requests were not told of")
        await asyncio.sleep(0.05)
