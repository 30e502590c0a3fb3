"""Publishes messages at QoS 1, at a rate or as fast as a broker acknowledges them, over connections with a window.

It stands on the bare protocol, because it shares the machine with what it measures. Left out: what messages hold.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, cast

from bench.errors import BenchError
from ingest.mqtt import packets
from ingest.mqtt.packets import Login, Version

WINDOW: Final = 500
KEEP_ALIVE_S: Final = 600
PUBACK: Final = 0x40
CONNACK: Final = 0x20
PACKETS: Final = 65_535
#: How often those that are due are sent, where there is a rate.
PACE_S: Final = 0.005


class Published(NamedTuple):
    """One message as it stands in a packet: what comes before its packet identifier, and what comes behind."""

    head: bytes
    rest: bytes


@dataclass(frozen=True)
class Publishing:
    """What a broker acknowledged."""

    messages: int
    seconds: float
    cpu_s: float


def message(topic: str, payload: bytes) -> Published:
    raw = topic.encode()
    length, digits = 4 + len(raw) + len(payload), bytearray()
    while True:
        length, digit = length >> 7, length & 0x7F
        digits.append(digit | (0x80 if length else 0))
        if not length:
            break
    return Published(b"\x32" + bytes(digits) + len(raw).to_bytes(2, "big") + raw, payload)


async def publish(
    host: str, port: int, lanes: Sequence[Sequence[Published]], timeout_s: float, rate: float | None = None
) -> Publishing:
    """Every lane in its order, on a connection of its own; `rate`: messages a second, of all. Raises `BenchError`."""
    each = None if rate is None else rate / len(lanes)
    began, cpu = time.perf_counter(), time.process_time()
    loop = asyncio.get_running_loop()
    connections: list[_Publisher] = []
    try:
        async with asyncio.timeout(timeout_s):
            for number, lane in enumerate(lanes):
                _, one = await loop.create_connection(partial(_Publisher, lane, number, each), host, port)
                connections.append(one)
            await asyncio.gather(*(one.done for one in connections))
    except TimeoutError:
        raise BenchError(f"the broker did not acknowledge everything within {timeout_s:g} s") from None
    finally:
        for one in connections:
            one.end()
    count = sum(map(len, lanes))
    return Publishing(count, time.perf_counter() - began, time.process_time() - cpu)


class _Publisher(asyncio.Protocol):
    def __init__(self, lane: Sequence[Published], number: int, rate: float | None) -> None:
        self._lane = lane
        self._number = number
        self._rate = rate
        self._began_s = 0.0
        self._sent = self._acknowledged = 0
        self._rest = b""
        self._transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = opened = cast("asyncio.Transport", transport)
        name = f"bench-{time.time_ns():x}-{self._number}"
        opened.write(packets.connect(Version.V3_1_1, Login(name, None, None, KEEP_ALIVE_S, 0, 0)))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(BenchError(f"the broker ended a publisher's connection: {error}"))

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) // 4 * 4  # CONNACK and PUBACK of MQTT 3.1.1 are four bytes
        kinds = data[0:whole:4]
        self._acknowledged += kinds.count(PUBACK)
        if kinds.count(PUBACK) + kinds.count(CONNACK) != whole // 4:
            self.done.set_exception(BenchError("the broker answered a publisher with something else"))
            return
        self._rest = data[whole:]
        if self._rate is None:
            self._send()
        elif kinds.count(CONNACK):
            self._began_s = time.perf_counter()
            self._pace()
        self._end_if_done()

    def _pace(self) -> None:
        assert self._rate is not None
        if not self.done.done():
            due = int((time.perf_counter() - self._began_s) * self._rate) + 1
            self._write(min(len(self._lane), self._acknowledged + WINDOW, due))
            asyncio.get_running_loop().call_later(PACE_S, self._pace)

    def _send(self) -> None:
        end = min(len(self._lane), self._acknowledged + WINDOW)
        if end - self._sent < min(WINDOW // 4, len(self._lane) - self._sent):
            return
        self._write(end)

    def _write(self, end: int) -> None:
        assert self._transport is not None
        parts: list[bytes] = []
        for number in range(self._sent, end):
            head, rest = self._lane[number]
            parts += (head, (number % PACKETS + 1).to_bytes(2, "big"), rest)
        self._sent = max(self._sent, end)
        self._transport.write(b"".join(parts))

    def _end_if_done(self) -> None:
        if self._acknowledged == len(self._lane) and not self.done.done():
            self.done.set_result(None)

    def end(self) -> None:
        if self._transport is not None:
            self._transport.abort()
