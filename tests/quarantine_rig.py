"""What the tests of the quarantine share: rows that stand in it, with the books that count them.

Left out: how rows get there (landing), and what is expected of them.
"""

import itertools
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import asyncpg

from runtime.ids import uuid7
from tests.databases import Database

SOURCE: Final = uuid7()
RECEIVED: Final = datetime.now(UTC).replace(microsecond=123_456) - timedelta(hours=3)
BAD_UNIT: Final = {"type": "temperature", "value": 21.5, "unit": "°R", "ts": "2026-11-02T00:00:00Z"}
_positions: Final = itertools.count()

_HOLD: Final = """
INSERT INTO quarantine (quarantine_id, organisation_id, device_id, code, message, payload, request_id, received_at,
                        source, partition, position, item)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 0, $10, $11)
"""
_LEDGER: Final = """
INSERT INTO ledger (organisation_id, hour, source, partition, received, quarantined)
VALUES ($1, date_trunc('hour', $2::timestamptz, 'UTC'), $3, 0, 1, 1)
ON CONFLICT (organisation_id, hour, source, partition) DO UPDATE
SET received = ledger.received + 1, quarantined = ledger.quarantined + 1
"""
_BOOKS: Final = """
SELECT coalesce(sum(quarantined), 0)::int, coalesce(sum(discarded), 0)::int, coalesce(sum(expired), 0)::int
FROM ledger WHERE organisation_id = $1
"""


@dataclass
class Quarantine:
    """The quarantine of a database, as landing fills it."""

    database: Database

    async def superuser(self, query: str, *arguments: Any) -> list[Any]:
        connection = await asyncpg.connect(self.database.superuser_url)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    async def hold(
        self,
        organisation: UUID | None,
        device: UUID | None,
        payload: Any = BAD_UNIT,
        *,
        code: str = "unknown_unit",
        message: str = "temperature takes °C",
        request_id: str = "request-1",
        received_at: datetime = RECEIVED,
        item: int = 0,
    ) -> UUID:
        """A held row; a payload that is no bytes is written as JSON. Below 0 is an `item` refused behind the log."""
        row = uuid7()
        raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        await self.superuser(
            _HOLD,
            row,
            organisation,
            device,
            code,
            message,
            raw,
            request_id,
            received_at,
            SOURCE,
            next(_positions),
            item,
        )
        if organisation is not None:
            await self.superuser(_LEDGER, organisation, received_at, SOURCE)
        return row

    async def row(self, quarantine_id: UUID) -> Any:
        (row,) = await self.superuser("SELECT * FROM quarantine WHERE quarantine_id = $1", quarantine_id)
        return row

    async def states(self, *ids: UUID) -> list[str]:
        return [(await self.row(one))["state"] for one in ids]

    async def books(self, organisation: UUID) -> tuple[int, int, int]:
        """Quarantined, discarded and expired, of all hours."""
        ((quarantined, discarded, expired),) = await self.superuser(_BOOKS, organisation)
        return quarantined, discarded, expired
