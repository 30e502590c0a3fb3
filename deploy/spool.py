"""What an operator may ask of the spools: how far each has landed, and to go on where records are lost for good.

Left out: the spools themselves, which are files of ingest (`ingest.spool`).
"""

from typing import Any, Final
from uuid import UUID

from runtime.errors import ConfigurationError
from workers.landing.store import ROLE

_STANDING: Final = """
SELECT s.spool, s.partition, s.next, s.updated_at,
       coalesce((SELECT sum(l.end_sequence - l.first_sequence) FROM spool_losses l
                 WHERE l.spool = s.spool AND l.partition = s.partition), 0)::bigint AS lost
FROM spool_positions s ORDER BY s.updated_at DESC, s.spool, s.partition LIMIT 1000"""

_SKIP: Final = """
WITH skipped AS (
    UPDATE spool_positions SET next = $3, updated_at = now()
    WHERE spool = $1 AND partition = $2 AND next = $4 RETURNING spool)
INSERT INTO spool_losses (spool, partition, first_sequence, end_sequence) SELECT spool, $2, $4, $3 FROM skipped"""


async def standing(connection: Any) -> list[dict[str, Any]]:
    """How far each partition of each spool has landed, newest first; `connection` is a session of the login."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL ROLE {ROLE}")
        return [dict(row) for row in await connection.fetch(_STANDING)]


async def skip(connection: Any, spool: UUID, partition: int, sequence: int) -> int:
    """Let landing go on at `sequence`, and count what lies before it as lost; how many records that is.

    Raises `ConfigurationError` for a spool that does not stand before it.
    """
    async with connection.transaction():
        await connection.execute(f"SET LOCAL ROLE {ROLE}")
        # Of a spool whose first record is missing nothing has landed.
        await connection.execute(
            "INSERT INTO spool_positions (spool, partition, next) VALUES ($1, $2, 0) ON CONFLICT DO NOTHING",
            spool,
            partition,
        )
        query = "SELECT next FROM spool_positions WHERE spool = $1 AND partition = $2 FOR UPDATE"
        expected: int = await connection.fetchval(query, spool, partition)
        if expected >= sequence:
            raise ConfigurationError(f"partition {partition} of spool {spool} stands at {expected} already")
        await connection.execute(_SKIP, spool, partition, sequence, expected)
        return sequence - expected
