"""The load generator: requests made beforehand, sent over connections that each wait for one answer at a time.

It stands on the bare protocol, because it shares the machine with what it measures. Every answer is checked. Left
out: what the requests hold (`bench.workload`).
"""

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, cast

from bench.errors import BenchError

ACCEPTED: Final = b"202"
LENGTH: Final = b"\r\nContent-Length: "
HEAD_END: Final = b"\r\n\r\n"
STATUS: Final = slice(9, 12)
LOOPBACK: Final = "127.0.0.1"
SHOWN_BYTES: Final = 500


@dataclass(frozen=True)
class Load:
    """What was sent and answered, all of it as expected."""

    requests: int
    readings: int
    seconds: float
    cpu_s: float
    latencies_s: "array[float]"

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds

    @property
    def readings_per_s(self) -> float:
        return self.readings / self.seconds

    @property
    def cpu_us_per_request(self) -> float:
        return self.cpu_s * 1e6 / self.requests


def percentiles_ms(seconds: Iterable[float], *wanted: int) -> dict[str, float]:
    """The nearest-rank percentiles, by names like `p95`. Raises `BenchError` for no samples."""
    ordered = sorted(seconds)
    if not ordered:
        raise BenchError("there are no samples to take percentiles of")
    ranks = {percent: max(0, -(-len(ordered) * percent // 100) - 1) for percent in wanted}
    return {f"p{percent}": ordered[rank] * 1000 for percent, rank in ranks.items()}


class _Tally:
    """What all connections have seen of one load."""

    def __init__(self, readings_per_request: int) -> None:
        self.begin = b'{"accepted":%d,' % readings_per_request
        self.latencies_s = array("d")
        self.statuses: Counter[str] = Counter()
        self.first_bad = b""

    def fail(self, answer: bytes) -> None:
        self.statuses[answer[STATUS].decode("ascii", "replace")] += 1
        self.first_bad = self.first_bad or answer[:SHOWN_BYTES]


class _Connection(asyncio.Protocol):
    """Sends requests one after another, each when the one before is answered."""

    def __init__(self) -> None:
        self._requests: Iterator[bytes] = iter(())
        self._tally = _Tally(0)
        self._pending = b""
        self._sent_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._lost: BenchError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def begin(self, requests: Iterator[bytes], tally: _Tally) -> "asyncio.Future[None]":
        """Send them all; the future is done with the last answer."""
        self._requests, self._tally = requests, tally
        self._done = asyncio.get_running_loop().create_future()
        if self._lost is not None:
            self._done.set_exception(self._lost)
        else:
            self._send_next()
        return self._done

    def _send_next(self) -> None:
        request = next(self._requests, None)
        if request is not None and self._transport is not None:
            self._sent_s = time.perf_counter()
            self._transport.write(request)
        elif self._done is not None and not self._done.done():
            self._done.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._pending:
            data = self._pending + data
        head = data.find(HEAD_END)
        length = data.find(LENGTH, 0, head)
        if head < 0 or length < 0:
            self._pending = data
            return
        begin = length + len(LENGTH)
        if len(data) < head + len(HEAD_END) + int(data[begin : data.find(b"\r", begin)]):
            self._pending = data
            return
        self._pending = b""
        self._tally.latencies_s.append(time.perf_counter() - self._sent_s)
        if data[STATUS] != ACCEPTED or not data.startswith(self._tally.begin, head + len(HEAD_END)):
            self._tally.fail(data)
        self._send_next()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = BenchError(f"a connection was closed by the server: {error or 'EOF'}")
        if self._done is not None and not self._done.done():
            self._done.set_exception(self._lost)

    def close(self) -> None:
        if self._done is not None:
            self._done.cancel()
        if self._transport is not None:
            self._transport.abort()


class Clients:
    """Connections to one port of loopback, open between `async with` and its end."""

    def __init__(self, port: int, connections: int) -> None:
        self._port = port
        self._connections = [_Connection() for _ in range(connections)]

    async def __aenter__(self) -> "Clients":
        loop = asyncio.get_running_loop()
        try:
            for connection in self._connections:
                await loop.create_connection(lambda made=connection: made, LOOPBACK, self._port)  # type: ignore[misc]
        except OSError as error:
            self._close()
            raise BenchError(f"nobody answers on port {self._port}: {error}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for connection in self._connections:
            connection.close()

    async def send(self, lanes: Sequence[Sequence[bytes]], readings_per_request: int, timeout_s: float) -> Load:
        """Send the requests of each lane, in order, over a connection of its own.

        Raises `BenchError` unless each is answered 202 with all its readings accepted, and all within `timeout_s`.
        """
        tally = _Tally(readings_per_request)
        began, cpu_began = time.perf_counter(), time.process_time()
        try:
            async with asyncio.timeout(timeout_s):
                pairs = zip(self._connections, lanes, strict=True)
                await asyncio.gather(*[connection.begin(iter(lane), tally) for connection, lane in pairs])
        except TimeoutError:
            sent, answered = sum(map(len, lanes)), len(tally.latencies_s)
            raise BenchError(f"{answered} of {sent} requests were answered within {timeout_s:g} s") from None
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        if tally.statuses:
            statuses = dict(tally.statuses)
            raise BenchError(f"answers other than expected, by status: {statuses}; one: {tally.first_bad!r}")
        requests = len(tally.latencies_s)
        return Load(requests, requests * readings_per_request, seconds, cpu_s, tally.latencies_s)
