"""Single readings sent beside whatever else happens, each followed from its request until a query returns its row.

Left out: what happens beside it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from bench.books import Books
from bench.errors import BenchError
from bench.load import Clients
from bench.parts import Parts
from bench.workload import METRICS, json_post

TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.05
METRIC: Final = METRICS[0][0]
EACH_LATER: Final = timedelta(seconds=1)

_STORED: Final = """
SELECT series_id, ts FROM readings WHERE series_id = ANY ($1::int[]) AND ts = ANY ($2::timestamptz[])"""


class Pace(NamedTuple):
    """How long after one reading the next is sent, in turn, and how often the rows are looked for."""

    pauses_s: tuple[float, ...]
    poll_s: float


#: Landing begins a batch every 50 ms at most: further apart than that, no reading waits for the one before it.
IDLE: Final = Pace((0.06, 0.11, 0.17, 0.23), 0.001)
#: In no step with those 50 ms; looked for so seldom that it takes nothing from the load.
LOADED: Final = Pace((0.031, 0.059, 0.083, 0.047, 0.071), 0.02)


#: Sends the reading of a device, named by its token or its topic; returns once it is acknowledged.
Send = Callable[[str, bytes], Awaitable[object]]


class Probe:
    """Sends readings of some devices in turn, over one connection, and looks for their rows over another."""

    def __init__(self, send: Send, connection: Any, names: Mapping[int, str], begin_s: int) -> None:
        """`names`: of the devices, by their series. None of them has sent a time later than `begin_s`."""
        self._send_one = send
        self._connection = connection
        self._names = cycle(names.items())
        # Each has a time of its own, by which it is found again.
        self._moment = datetime.fromtimestamp(begin_s, UTC)
        self._waiting: dict[tuple[int, datetime], float] = {}
        """When those were sent that have not been found yet, by series and time."""
        self.sent = 0

    async def follow(self, until: "asyncio.Future[Any]", pace: Pace) -> list[float]:
        """Send readings until that is done: for each, the seconds from sending it until a query returned its row.

        Raises `BenchError` when one is not there in time.
        """
        samples: list[float] = []
        sending = asyncio.create_task(self._send(until, pace))
        try:
            while self._waiting or not sending.done():
                await self._look(samples)
                await asyncio.sleep(pace.poll_s)
            await sending
        finally:
            sending.cancel()
        return samples

    async def _send(self, until: "asyncio.Future[Any]", pace: Pace) -> None:
        for pause_s in cycle(pace.pauses_s):
            series, name = next(self._names)
            self._moment += EACH_LATER
            self._waiting[series, self._moment] = time.perf_counter()
            await self._send_one(name, _reading(self._moment))
            self.sent += 1
            await asyncio.wait([until], timeout=pause_s)
            if until.done():
                return

    async def _look(self, samples: list[float]) -> None:
        if not self._waiting:
            return
        if time.perf_counter() - min(self._waiting.values()) > TIMEOUT_S:
            raise BenchError(f"a reading is not in the database {TIMEOUT_S:g} s after it was sent")
        series, moments = zip(*self._waiting, strict=True)
        rows = await self._connection.fetch(_STORED, set(series), moments)
        samples += [time.perf_counter() - self._waiting.pop((row["series_id"], row["ts"])) for row in rows]


def _reading(moment: datetime) -> bytes:
    reading = b'{"type":"%s","value":21.5,"ts":%d}' % (METRIC.encode(), moment.timestamp())
    return b'{"measurements":[%s]}' % reading


@asynccontextmanager
async def open_probe(
    parts: Parts, books: Books, port: int, tokens: Mapping[UUID, str], begin_s: int
) -> AsyncIterator[Probe]:
    """A probe over HTTP of these devices, which have sent nothing yet."""
    async with Clients(port, 1) as clients:

        async def send(token: str, body: bytes) -> None:
            await clients.send([[json_post(token, body)]], 1, TIMEOUT_S)

        async with probing(parts, books, send, tokens, begin_s) as probe:
            yield probe


@asynccontextmanager
async def probing(
    parts: Parts, books: Books, send: Send, names: Mapping[UUID, str], begin_s: int
) -> AsyncIterator[Probe]:
    """A probe of these devices, which have sent nothing yet: their series are made first."""
    first = datetime.fromtimestamp(begin_s, UTC)
    for name in names.values():
        await send(name, _reading(first))
    deadline = time.perf_counter() + TIMEOUT_S
    by_series: dict[int, str] = {}
    while len(by_series) < len(names):
        if time.perf_counter() > deadline:
            raise BenchError(f"the first readings of a probe have not landed after {TIMEOUT_S:g} s")
        await asyncio.sleep(POLL_S)
        found = {await books.find_series(device, METRIC): name for device, name in names.items()}
        by_series = {series: name for series, name in found.items() if series is not None}
    connection: Any = await asyncpg.connect(parts.database_url, server_settings={"role": "sluice_worker"})
    try:
        probe = Probe(send, connection, by_series, begin_s)
        probe.sent = len(names)
        yield probe
    finally:
        await connection.close()
