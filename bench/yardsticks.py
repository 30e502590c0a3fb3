"""What the same machine does without Sluice: COPY into a table of the same shape, and a bare aiohttp handler.

Left out: what is compared with them (`bench.pipeline`).
"""

import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from bench.parts import CHECKOUT, Parts, Workshop
from bench.usage import cpu_s, free_port
from bench.workload import Round

PIECE_BYTES: Final = 200_000
TIMEOUT_S: Final = 300.0

_TABLE: Final = """
CREATE TABLE {name} (series_id int NOT NULL, quality smallint NOT NULL, ts timestamptz NOT NULL,
                     value float8 NOT NULL, PRIMARY KEY (series_id, ts))"""
_HYPERTABLE: Final = """
SELECT create_hypertable('{name}', 'ts', chunk_time_interval => interval '7 days', create_default_indexes => false)"""


@dataclass(frozen=True)
class Copied:
    """What COPY took."""

    rows: int
    rows_per_copy: int
    seconds: float
    postgresql_cpu_s: float

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds

    @property
    def postgresql_us_per_row(self) -> float:
        return self.postgresql_cpu_s * 1e6 / self.rows


class CopyTable:
    """A hypertable with the key of `readings`, filled by one session, each COPY a transaction."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.name = f"bench_copy_{secrets.token_hex(6)}"
        self._connection: Any = None

    async def __aenter__(self) -> "CopyTable":
        self._connection = await asyncpg.connect(self._parts.owner_url, command_timeout=TIMEOUT_S)
        await self._connection.execute(_TABLE.format(name=self.name))
        await self._connection.execute(_HYPERTABLE.format(name=self.name))
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._connection.is_closed():
            await self._connection.execute(f"DROP TABLE {self.name}")
            await self._connection.close()

    async def fill(self, sent: Round, rows_per_copy: int) -> Copied:
        """COPY the rows of `sent`, packed beforehand."""
        copies = list(sent.copies(rows_per_copy))
        cpu_began, began = cpu_s(self._parts.postgresql), time.perf_counter()
        for body, _ in copies:
            await self._connection.copy_to_table(self.name, source=_pieces(body), format="binary")
        seconds = time.perf_counter() - began
        return Copied(
            sum(rows for _, rows in copies), rows_per_copy, seconds, cpu_s(self._parts.postgresql) - cpu_began
        )


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), PIECE_BYTES):
        yield body[begin : begin + PIECE_BYTES]


async def bare_handler(shop: Workshop) -> tuple[int, int]:
    """A bare handler that is ready: its port and its process, which ends with the workshop."""
    port = free_port()
    argv = [sys.executable, "-m", "bench.bare_server", str(port)]
    process = await shop.start("bare handler", argv, f"http://127.0.0.1:{port}/ready", {"PYTHONPATH": str(CHECKOUT)})
    return port, process.pid
