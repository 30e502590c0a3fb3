"""The load generator: every answer is counted and checked, and nothing that fails passes for a result."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from bench.errors import BenchError
from bench.load import Clients, Load, percentiles_ms
from bench.workload import shelly_get
from tests.support import run

REQUEST = shelly_get("ds_live_x", 21.5, 45.0)
TIMEOUT_S = 5.0


def accepted(count: int, status: str = "202 Accepted") -> bytes:
    body = b'{"accepted":%d,"rejected":[]}' % count
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


class Server(asyncio.Protocol):
    """Answers every request in the pieces that `answer` cuts; none at all closes the connection."""

    def __init__(self, answer: Callable[[], list[bytes]]) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert data == REQUEST
        asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        for piece in (pieces := self._answer()):
            self._transport.write(piece)
            await asyncio.sleep(0.001)
        if not pieces:
            self._transport.close()


@asynccontextmanager
async def serving(answer: Callable[[], list[bytes]]) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(lambda: Server(answer), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def sent(answer: Callable[[], list[bytes]], *, timeout_s: float = TIMEOUT_S) -> Load:
    async def send() -> Load:
        async with serving(answer) as port, Clients(port, 2) as clients:
            return await clients.send([[REQUEST] * 3, [REQUEST]], 1, timeout_s)

    return run(send())


def test_everything_is_sent_and_counted() -> None:
    load = sent(lambda: [accepted(1)])

    assert (load.requests, load.readings, len(load.latencies_s)) == (4, 4, 4)
    assert load.readings_per_s == 4 / load.seconds


@pytest.mark.parametrize("cut", [1, 20, 40, 55])
def test_an_answer_in_pieces_is_one_answer(cut: int) -> None:
    assert sent(lambda: [accepted(1)[:cut], accepted(1)[cut:]]).requests == 4


@pytest.mark.parametrize("answer", [accepted(1, "503 Service Unavailable"), accepted(2)], ids=["status", "count"])
def test_an_unexpected_answer_is_no_result(answer: bytes) -> None:
    with pytest.raises(BenchError, match="other than expected"):
        sent(lambda: [answer])


def test_a_closed_connection_is_no_result() -> None:
    with pytest.raises(BenchError, match="closed by the server"):
        sent(list)


def test_a_server_that_does_not_answer_in_time_is_no_result() -> None:
    with pytest.raises(BenchError, match="0 of 4 requests"):
        sent(lambda: [b"HTTP/1.1 "], timeout_s=0.05)


def test_connections_serve_one_load_after_another() -> None:
    async def send_twice() -> list[int]:
        async with serving(lambda: [accepted(1)]) as port, Clients(port, 1) as clients:
            return [(await clients.send([[REQUEST] * count], 1, TIMEOUT_S)).requests for count in (1, 2)]

    assert run(send_twice()) == [1, 2]


def test_nobody_there_is_said() -> None:
    async def connect() -> None:
        async with serving(list) as port:
            pass
        async with Clients(port, 1):
            pass

    with pytest.raises(BenchError, match="nobody answers"):
        run(connect())


def test_percentiles_are_samples() -> None:
    assert percentiles_ms([number / 1000 for number in range(1, 101)], 50, 95, 99) == {
        "p50": 50,
        "p95": 95,
        "p99": 99,
    }
    assert percentiles_ms([0.007], 50, 99) == {"p50": 7, "p99": 7}
    with pytest.raises(BenchError):
        percentiles_ms([], 50)
