"""`sluice bench mqtt`: from a broker to a committed row on the real parts.

Messages that the broker has kept are taken by a bridge with nothing else to do; then messages go end to end,
published while they are taken and landed; then at half of that rate, while single ones are followed to their rows;
then plants reconnect (`bench.reconnecting`). Everything is counted in the database. Left out: how figures are shown
(`bench.report`).
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import orjson
import uvloop

from bench.books import Books
from bench.errors import BenchError
from bench.parts import BROKER, Parts, Role, progress, real_parts, workshop
from bench.probe import LOADED, probing
from bench.publish import Published, Publishing, message, publish
from bench.reconnecting import Reconnected, reconnected
from bench.registry import Registered, register
from bench.usage import Meter, memory_bytes
from bench.workload import Fleet
from runtime.ids import uuid7
from runtime.log import Log
from runtime.mqtt import Address, Endpoint, connected

TIMEOUT_S: Final = 600.0
TURNS: Final = 3
CONNECTIONS: Final = 4
POLL_S: Final = 0.02
DEVICES_PROBED: Final = 10
HALF_LOAD_S: Final = 15.0
#: A bridge that is held while the broker is filled keeps its sessions.
HELD: Final = {"SLUICE_MQTT_KEEP_ALIVE_S": "3600", "SLUICE_MQTT_LEASE_TTL_S": "300", "SLUICE_MQTT_TIMEOUT_S": "300"}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    messages: int
    devices: int
    readings_per_message: int
    batches: int
    plants: int
    """That are connected at once; 0: that part is left out."""

    def check(self) -> None:
        """Raises `BenchError` for options that do not go together."""
        if self.messages < self.devices or self.batches < self.devices:
            raise BenchError("--messages and --batches: one a device at least")


@dataclass(frozen=True)
class Drained:
    """What the broker had kept, taken by one bridge that had nothing else to do; the middle of all turns."""

    name: str
    readings: int
    """Of each message."""
    messages: int
    """In all turns."""
    messages_per_s: float
    bridge_us: float
    """CPU a message; likewise below."""
    broker_us: float
    kafka_us: float


@dataclass(frozen=True)
class Whole:
    """Published, taken and landed at the same time."""

    readings_per_message: int
    messages: int
    publishing: Publishing
    committed_s: float
    cpu_s: Mapping[str, float]
    bridge_peak_bytes: int

    @property
    def readings(self) -> int:
        return self.messages * self.readings_per_message


@dataclass(frozen=True)
class Queryable:
    """Single readings followed until a query returned them, at half of the rate that is landed end to end."""

    messages_per_s: float
    seconds: Sequence[float]
    """From publishing each of them to its row."""


@dataclass(frozen=True)
class MqttFigures:
    """Everything a run has measured."""

    options: Options
    drained: Sequence[Drained]
    whole: Sequence[Whole]
    queryable: Queryable
    reconnected: Reconnected | None
    again: int
    """Messages that the broker may have sent before."""


def measure(options: Options, services: Path) -> MqttFigures:
    """Raises `BenchError` when a run cannot be made, or when its books do not add up."""
    options.check()
    with (
        real_parts(services, with_broker=True) as parts,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_measure(options, parts))


async def _measure(options: Options, parts: Parts) -> MqttFigures:
    connection = await asyncpg.connect(parts.database_url)
    try:
        count = options.devices + DEVICES_PROBED
        registered = await register(connection, parts.environment["SLUICE_SECRET_KEYS"], count)
    finally:
        await connection.close()
    async with workshop(parts) as shop, _books(parts, registered.organisation) as books:
        bridge = await shop.role("bridge", **HELD)
        run = _Run(options, parts, books, registered, bridge)
        drained = [await run.drain("one reading, no time", 1, timed=False), await run.drain("one reading", 1)]
        worker = await shop.role("worker")
        await books.landed(TIMEOUT_S)
        whole = [await run.whole(worker, 1, options.messages)]
        whole.append(await run.whole(worker, options.readings_per_message, options.batches))
        queryable = await run.queryable(whole[0].messages / whole[0].committed_s / 2)
        await books.check(run.sent)
        metrics = await bridge.metrics()
        again = sum(
            value for name, value in metrics.items() if name.startswith("sluice_mqtt_repeated_messages_total")
        )
        await bridge.stop()
        await worker.stop()
        back = await reconnected(parts, shop, options.plants, os.getpid()) if options.plants else None
        return MqttFigures(options, drained, whole, queryable, back, round(again))


@asynccontextmanager
async def _books(parts: Parts, organisation: UUID) -> AsyncIterator[Books]:
    books = Books(parts, organisation)
    await books.open()
    try:
        yield books
    finally:
        await books.close()


class _Run:
    """One run: the phases, whose readings follow each other in time."""

    def __init__(self, options: Options, parts: Parts, books: Books, registered: Registered, bridge: Role) -> None:
        assert parts.mosquitto is not None
        self._options = options
        self._parts = parts
        self._books = books
        self._registered = registered
        self._bridge = bridge
        self._broker_pid = parts.mosquitto
        url = urlsplit(parts.environment[BROKER])
        self._host, self._port = url.hostname or "127.0.0.1", url.port or 1883
        readings = (4 * TURNS + 1) * options.messages + options.batches * options.readings_per_message
        begin_s = int(time.time()) - readings // options.devices * 10 - 86_400
        self._fleet = Fleet(registered.tokens[: options.devices], begin_s)
        self._first = 0
        self.sent = 0
        """Readings."""

    def _lanes(self, count: int, each: int, *, timed: bool = True) -> list[list[Published]]:
        """A device keeps to one lane, so that its readings are in order."""
        lanes: list[list[Published]] = [[] for _ in range(CONNECTIONS)]
        devices = self._options.devices
        for number in range(count):
            device = number % devices
            first = self._first + number // devices * each
            payload = self._fleet.body(device, first, each) if timed else _untimed(number)
            lanes[device % CONNECTIONS].append(message(self._topic(device), payload))
        if timed:
            self._first += -(-count // devices) * each
        self.sent += count * each
        return lanes

    def _topic(self, device: int) -> str:
        return f"v1/readings/{self._registered.organisation}/{self._registered.devices[device]}"

    async def _publish(self, lanes: list[list[Published]], rate: float | None = None) -> Publishing:
        return await publish(self._host, self._port, lanes, TIMEOUT_S, rate)

    async def drain(self, name: str, each: int, *, timed: bool = True) -> Drained:
        """What the broker has kept while the bridge was held, one turn after another."""
        progress(
            f"{name}: the broker keeps {self._options.messages} messages, then a bridge takes them, {TURNS} times"
        )
        turns: list[tuple[float, dict[str, float]]] = []
        log = await self._books.open_log()
        try:
            for _ in range(TURNS):
                end = await _end(log) + self._options.messages
                with self._bridge.held():
                    await self._publish(self._lanes(self._options.messages, each, timed=timed))
                    meter = Meter(bridge=self._bridge.pid, broker=self._broker_pid, kafka=self._parts.kafka)
                    began = time.perf_counter()
                await _taken(log, end)
                turns.append((time.perf_counter() - began, meter.read()))
        finally:
            await log.close()
        count = self._options.messages
        us = {part: median(taken[part] * 1e6 / count for _, taken in turns) for part in ("bridge", "broker", "kafka")}
        rate = median(count / seconds for seconds, _ in turns)
        return Drained(name, each, count * TURNS, rate, us["bridge"], us["broker"], us["kafka"])

    async def whole(self, worker: Role, each: int, count: int) -> Whole:
        """Published, taken and landed at the same time."""
        progress(f"{count} messages of {each} readings, end to end")
        lanes = self._lanes(count, each)
        log = await self._books.open_log()
        try:
            end = await _end(log) + count
            meter = Meter(
                bridge=self._bridge.pid,
                broker=self._broker_pid,
                kafka=self._parts.kafka,
                worker=worker.pid,
                postgresql=self._parts.postgresql,
            )
            began = time.perf_counter()
            publishing = await self._publish(lanes)
            await _taken(log, end)
            await self._books.landed(TIMEOUT_S)
            seconds, taken = time.perf_counter() - began, meter.read()
        finally:
            await log.close()
        return Whole(each, count, publishing, seconds, taken, memory_bytes(self._bridge.pid, "VmHWM"))

    async def queryable(self, rate: float) -> Queryable:
        """Single readings of devices of their own, beside messages at that rate."""
        count = min(self._options.messages, max(self._options.devices, round(rate * HALF_LOAD_S)))
        progress(f"{count} messages at {rate:,.0f}/s, and single ones followed to their rows")
        lanes = self._lanes(count, 1)
        topics = {
            self._registered.devices[device]: self._topic(device)
            for device in range(self._options.devices, self._options.devices + DEVICES_PROBED)
        }
        to = Endpoint(Address(self._host, self._port, None), None, None)
        log = await self._books.open_log()
        try:
            end = await _end(log) + count
            async with connected(to, f"bench-{uuid7()}", timeout_s=TIMEOUT_S, messages_max=100) as client:

                async def send(topic: str, body: bytes) -> None:
                    await client.publish(topic, body, qos=1)

                async with probing(self._parts, self._books, send, topics, self._fleet.begin_s) as probe:
                    loading = asyncio.create_task(self._publish(lanes, rate))
                    found = await probe.follow(loading, LOADED)
                    publishing = await loading
            await _taken(log, end + probe.sent)
        finally:
            await log.close()
        await self._books.landed(TIMEOUT_S)
        self.sent += probe.sent
        return Queryable(count / publishing.seconds, found)


async def _taken(log: Log, end: int) -> None:
    """Once the log has so many records. Raises `BenchError` when that takes too long."""
    deadline = time.perf_counter() + TIMEOUT_S
    while await _end(log) < end:
        if time.perf_counter() > deadline:
            raise BenchError("the bridge did not take all that was published")
        await asyncio.sleep(POLL_S)


async def _end(log: Log) -> int:
    return sum(bound.end for bound in (await log.bounds()).values())


def _untimed(number: int) -> bytes:
    return orjson.dumps({"measurements": [{"type": "temperature", "value": round(18 + number % 800 / 100, 2)}]})
