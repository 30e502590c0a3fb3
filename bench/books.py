"""What has landed, as the database and the log have it: when it is all there, and whether it is what was sent.

Left out: how it got there.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

import asyncpg

from bench.errors import BenchError
from bench.parts import Parts
from runtime.log import Bounds, Expected, Log, LogSettings, open_log
from schemas.topics import log_name

POLL_S: Final = 0.01
CONNECT_TIMEOUT_S: Final = 30.0
#: Of a statement; counting tens of millions of rows takes its time.
STATEMENT_TIMEOUT_S: Final = 300.0

_GENERATION: Final = "SELECT source, identity, partitions FROM log_generations WHERE closed_at IS NULL"
_POSITIONS: Final = "SELECT partition, position FROM log_positions WHERE source = $1"
_COUNT: Final = """
SELECT count(*) FROM readings r JOIN series s USING (series_id) WHERE s.organisation_id = $1"""
_LEDGER: Final = """
SELECT coalesce(sum(received), 0)::bigint AS received, coalesce(sum(stored), 0)::bigint AS stored,
       coalesce(sum(duplicates + conflicts + quarantined), 0)::bigint AS others
FROM ledger WHERE organisation_id = $1"""
_SERIES: Final = "SELECT series_id FROM series WHERE device_id = $1 AND metric = $2 AND label = ''"


async def connect(url: str, **session: str) -> Any:
    """A session that waits for no answer without end: its server may be killed, or stand still.

    Whoever has it ends it by `terminate`: `close` would wait for what that server says to it.
    """
    return await asyncpg.connect(
        url, timeout=CONNECT_TIMEOUT_S, command_timeout=STATEMENT_TIMEOUT_S, server_settings=session
    )


class Books:
    """Looks at one organisation's readings and at the active generation of the log."""

    def __init__(self, parts: Parts, organisation: UUID) -> None:
        self._parts = parts
        self._organisation = organisation
        self._connection: Any = None
        self._expected: Expected | None = None

    async def open(self) -> None:
        self._connection = await connect(self._parts.database_url, role="sluice_worker")
        row = await self._connection.fetchrow(_GENERATION)
        self._expected = Expected(row["source"], log_name(row["source"]), row["identity"], row["partitions"])

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()

    @property
    def _source(self) -> UUID:
        assert self._expected is not None
        return self._expected.source

    async def open_log(self) -> Log:
        """The log itself; whoever asks closes it."""
        assert self._expected is not None
        settings = LogSettings(log_url=self._parts.environment["SLUICE_LOG_URL"])
        return await open_log(settings, self._expected, client_id="sluice-bench")

    async def log_ends(self) -> dict[int, int]:
        log = await self.open_log()
        try:
            bounds: Mapping[int, Bounds] = await log.bounds()
            return {partition: bound.end for partition, bound in bounds.items()}
        finally:
            await log.close()

    async def positions(self) -> dict[int, int]:
        rows = await self._connection.fetch(_POSITIONS, self._source)
        return {row["partition"]: row["position"] for row in rows}

    async def landed(self, timeout_s: float) -> None:
        """Wait until everything the log holds now has landed. Raises `BenchError` when that takes too long."""
        ends = await self.log_ends()
        deadline = time.perf_counter() + timeout_s
        while True:
            positions = await self.positions()
            if all(positions[partition] >= end for partition, end in ends.items()):
                return
            if time.perf_counter() > deadline:
                raise BenchError(f"not all has landed after {timeout_s:g} s: {positions} of {ends}")
            await asyncio.sleep(POLL_S)

    async def check(self, readings: int) -> None:
        """Raises `BenchError` unless exactly so many are stored, and the ledger says the same."""
        stored = await self.stored()
        ledger = dict(await self._connection.fetchrow(_LEDGER, self._organisation))
        if stored != readings or ledger != {"received": readings, "stored": readings, "others": 0}:
            raise BenchError(f"{readings} readings were acknowledged, {stored} are stored, the ledger has {ledger}")

    async def find_series(self, device: UUID, metric: str) -> int | None:
        series: int | None = await self._connection.fetchval(_SERIES, device, metric)
        return series

    async def stored(self) -> int:
        """Readings."""
        count: int = await self._connection.fetchval(_COUNT, self._organisation)
        return count
