"""The session in which roll-ups are written: who leads, which slice is held, and the one way a bucket is computed.

Its timestamps go in and out as microseconds since 2000; the least int64 stands for no time at all. A slice is locked
for the session before the transaction begins: a lock taken in it would come after its snapshot. If the session
breaks, its transaction and its locks go with it, so nobody writes who does not hold them. Left out: which buckets.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from runtime.errors import UnavailableError
from runtime.postgres import PostgresSettings, connect, transaction
from workers.rollups import sql
from workers.rollups.metrics import RollupsMetrics

ROLE: Final = "sluice_worker"

MINUTES_5: Final = 300_000_000
HOUR: Final = 12 * MINUTES_5
DAY: Final = 24 * HOUR
NEVER: Final = -(2**63)
LATEST: Final = 2**63 - 1
#: Long in which partitions are made ahead, and how long a slice is waited for.
_SPAN: Final = 28 * DAY
_HELD_TRIES: Final = 200
_HELD_WAIT_S: Final = 0.1
#: Of one statement, far beyond any in health. An index look-up a series is right for all of them.
_SESSION: Final = {
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_custom_plan",
    "work_mem": "32MB",
    "statement_timeout": "60000ms",
    "lock_timeout": "10000ms",
    "idle_in_transaction_session_timeout": "10000ms",
}


class Range(NamedTuple):
    """Buckets of a series, by the starts of the first and the last."""

    series_id: int
    first: int
    last: int


def floored(time: int, width: int = MINUTES_5) -> int:
    return time - time % width


class Session:
    """One connection. Every call may raise what the database raises, and may be repeated in a new session."""

    def __init__(self, connection: Any, metrics: RollupsMetrics) -> None:
        self.connection = connection
        self._metrics = metrics
        self._ensured: set[int] = set()

    async def leads(self, name: str) -> bool:
        """Whether this session is the one that does `name` from now on, until it ends."""
        return bool(await self.connection.fetchval(sql.LEAD, name))

    @asynccontextmanager
    async def holding(self, number: int) -> AsyncIterator[None]:
        """Alone with a slice, in one snapshot taken since. Raises `UnavailableError` if it stays held by others."""
        for _ in range(_HELD_TRIES):
            if await self.connection.fetchval(sql.HOLD, number):
                break
            await asyncio.sleep(_HELD_WAIT_S)
        else:
            raise UnavailableError(f"slice {number} of the roll-ups is held by another session")
        try:
            async with transaction(self.connection, isolation="repeatable_read"):
                yield
        finally:
            if not self.connection.is_closed():
                await self.connection.execute(sql.LET_GO, number)

    async def ensure(self, first: int, stop: int) -> None:
        """Make what partitions buckets of `[first, stop)` need, outside of any transaction."""
        for span in range(first // _SPAN, -(-stop // _SPAN)):
            if span not in self._ensured:
                await self.connection.execute(sql.ENSURE, span * _SPAN, (span + 1) * _SPAN)
                self._ensured.add(span)

    async def compute(self, tier: int, ranges: Sequence[Range]) -> int:
        """What stands in these buckets of a tier, from what stands below it, within `holding`: how many there are."""
        if not ranges:
            return 0
        name, forget, write = sql.TIERS[tier]
        width = (MINUTES_5, HOUR, DAY)[tier]
        # Given apart from the ranges, so that only the chunks they lie in are looked into.
        first, last = min(one.first for one in ranges), max(one.last for one in ranges)
        span = floored(first, width), floored(last, width) + width
        columns = [list(column) for column in zip(*ranges, strict=True)]
        await self.connection.execute(forget, *columns, *span)
        rows = int((await self.connection.execute(write, *columns, *span)).rpartition(" ")[2])
        self._metrics.rows.labels(name).inc(rows)
        return rows


@asynccontextmanager
async def open_session(postgres: PostgresSettings, metrics: RollupsMetrics) -> AsyncIterator[Session]:
    connection: Any = await connect(postgres, role=ROLE, application="sluice rollups", **_SESSION)
    try:
        await connection.set_type_codec(
            "timestamptz", schema="pg_catalog", format="tuple", encoder=lambda us: (us,), decoder=lambda row: row[0]
        )
        yield Session(connection, metrics)
    finally:
        connection.terminate()
