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
    """What all connections of a load have seen so far."""

    def __init__(self, readings_per_request: int) -> None:
        self.begin = b'{"accepted":%d,' % readings_per_request
        self.latencies_s = array("d")
        self.statuses: Counter[str] = Counter()
        self.first_bad = b""

    def fail(self, answer: bytes) -> None:
        self.statuses[answer[STATUS].decode("ascii", "replace")] += 1
        self.first_bad = self.first_bad or answer[:SHOWN_BYTES]


class _Connection(asyncio.Protocol):
    """Sends its requests one after another, each when the one before is answered."""

    def __init__(self, requests: Iterator[bytes], tally: _Tally) -> None:
        self._requests = requests
        self._tally = tally
        self._pending = b""
        self._sent_s = 0.0
        self._transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send_next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self.done.set_result(None)
        elif self._transport is not None:
            self._sent_s = time.perf_counter()
            self._transport.write(request)

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
        self.send_next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(
                BenchError(f"a connection was closed with a request unanswered: {error or 'EOF'}")
            )

    def close(self) -> None:
        if not self.done.done():
            self.done.cancel()
        if self._transport is not None:
            self._transport.abort()


async def send(port: int, lanes: Sequence[Sequence[bytes]], *, readings_per_request: int, timeout_s: float) -> Load:
    """Send the requests of each lane, in order, over a connection of its own.

    Raises `BenchError` unless every one is answered 202 with as many readings accepted as it had, within `timeout_s`.
    """
    tally = _Tally(readings_per_request)
    loop = asyncio.get_running_loop()
    connections: list[_Connection] = []
    try:
        async with asyncio.timeout(timeout_s):
            for lane in lanes:
                connection = _Connection(iter(lane), tally)
                connections.append(connection)
                await loop.create_connection(lambda made=connection: made, LOOPBACK, port)  # type: ignore[misc]
            began, cpu_began = time.perf_counter(), time.process_time()
            for connection in connections:
                connection.send_next()
            await asyncio.gather(*[connection.done for connection in connections])
            seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    except TimeoutError:
        sent = sum(map(len, lanes))
        raise BenchError(f"{len(tally.latencies_s)} of {sent} requests were answered in {timeout_s:g} s") from None
    except OSError as error:
        raise BenchError(f"the load cannot be sent to port {port}: {error}") from error
    finally:
        for connection in connections:
            connection.close()
    if tally.statuses:
        raise BenchError(f"answers other than expected, by status: {dict(tally.statuses)}; one: {tally.first_bad!r}")
    requests = len(tally.latencies_s)
    return Load(requests, requests * readings_per_request, seconds, cpu_s, tally.latencies_s)
