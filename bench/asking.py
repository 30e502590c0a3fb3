"""Requests to the API made beforehand, asked by clients that each wait for one answer at a time, or in their turn.

Left out: what is asked (`bench.queries`).
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import orjson

from bench.errors import BenchError
from bench.load import HEAD_END, LOOPBACK
from bench.parts import Parts, Role
from bench.usage import cpu_s

_LENGTH: Final = re.compile(rb"\r\nContent-Length: (\d+)", re.IGNORECASE)
_STATUS: Final = slice(9, 12)
_SHOWN_BYTES: Final = 300


@dataclass(frozen=True)
class Asked:
    """Requests of one kind, all answered with success."""

    name: str
    clients: int
    seconds: Sequence[float]
    """Of each, as its client saw it."""
    server_s: float
    """Of one on the average, as the API's own metrics tell."""
    api_cpu_s: float
    """Of one, of the API's process; and PostgreSQL's."""
    postgresql_cpu_s: float
    bytes: int
    """Of the last answer's body."""


class Api:
    """One API process, and how much it and PostgreSQL take for what it is asked."""

    def __init__(self, parts: Parts, role: Role, port: int, key: str) -> None:
        self._parts = parts
        self._role = role
        self._port = port
        self._key = key

    def get(self, path: str) -> bytes:
        return self._head("GET", path) + b"\r\n"

    def post(self, path: str, body: Any) -> bytes:
        content = orjson.dumps(body)
        kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
        return self._head("POST", path) + kind + content

    def _head(self, method: str, path: str) -> bytes:
        return (
            f"{method} {path} HTTP/1.1\r\nHost: {LOOPBACK}\r\nAuthorization: Bearer {self._key}\r\n"
            "Accept: application/json\r\n"
        ).encode()

    def client(self) -> "Client":
        return Client(self._port)

    async def asked(self, name: str, request: Callable[[int], bytes], count: int, clients: int) -> Asked:
        """`count` requests, after a tenth of them that nobody measures. Raises `BenchError` unless all succeed."""
        open_clients = [await Client(self._port).opened() for _ in range(clients)]
        try:
            await self._ask(open_clients, request, range(max(5, count // 10)))
            before, taken = await self._role.metrics(), self._taken()
            seconds, size = await self._ask(open_clients, request, range(count))
            api_s, postgresql_s = (now - then for now, then in zip(self._taken(), taken, strict=True))
            after = await self._role.metrics()
        finally:
            for client in open_clients:
                client.close()
        return Asked(name, clients, seconds, server_seconds(before, after), api_s / count, postgresql_s / count, size)

    def _taken(self) -> tuple[float, float]:
        return cpu_s(self._role.pid), cpu_s(self._parts.postgresql)

    @staticmethod
    async def _ask(
        clients: "Sequence[Client]", request: Callable[[int], bytes], numbers: range
    ) -> tuple[list[float], int]:
        left, seconds, size = iter(numbers), list[float](), 0

        async def go(client: "Client") -> None:
            nonlocal size
            for number in left:
                made = request(number)
                began = time.perf_counter()
                body = await client.ask(made)
                seconds.append(time.perf_counter() - began)
                size = len(body)

        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(go(client))
        return seconds, size


def server_seconds(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Of one request between two looks at the API's metrics, on the average."""
    sums = [
        sum(found[name] - before.get(name, 0.0) for name in found if name.startswith(prefix))
        for found, prefix in ((after, "sluice_api_request_seconds_sum"), (after, "sluice_api_request_seconds_count"))
    ]
    return sums[0] / sums[1] if sums[1] else 0.0


class Client:
    """One connection to the API."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: Any = None
        self._writer: Any = None

    async def opened(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(LOOPBACK, self._port)
        return self

    async def ask(self, request: bytes) -> bytes:
        """The body of the answer. Raises `BenchError` for anything but success."""
        self._writer.write(request)
        head = await self._reader.readuntil(HEAD_END)
        length = _LENGTH.search(head)
        if length is None:
            raise BenchError(f"an answer has no length: {head[:_SHOWN_BYTES]!r}")
        body: bytes = await self._reader.readexactly(int(length[1]))
        if head[_STATUS] != b"200":
            raise BenchError(f"a question was answered {head[_STATUS].decode()}: {body[:_SHOWN_BYTES]!r}")
        return body

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
