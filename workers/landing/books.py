"""The books of what landed: notes, ledger, outcomes and quarantine, written within the landing's transaction.

Left out: readings (`store`, `staging`).
"""

from collections.abc import Iterable
from typing import Any, Final
from uuid import UUID

from runtime.ids import uuid7
from workers.landing.plan import Outcome, Plan

_HOUR_US: Final = 3_600_000_000
_QUARANTINE_ROWS: Final = 5_000

_NOTES: Final = """
INSERT INTO reading_notes (series_id, ts, organisation_id, received_at, original_time, original_unit, metadata)
SELECT series_id, ts, organisation_id, received_at, original_time, original_unit, metadata::jsonb
FROM unnest($1::int[], $2::timestamptz[], $3::uuid[], $4::timestamptz[], $5::text[], $6::text[], $7::text[])
    AS n (series_id, ts, organisation_id, received_at, original_time, original_unit, metadata)
ON CONFLICT DO NOTHING"""

_LEDGER: Final = """
INSERT INTO ledger AS l
    (source, partition, organisation_id, hour, received, stored, duplicates, conflicts, quarantined)
SELECT $1, n.*
FROM unnest($2::int[], $3::uuid[], $4::timestamptz[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[],
            $9::bigint[])
    AS n (partition, organisation_id, hour, received, stored, duplicates, conflicts, quarantined)
ORDER BY partition, organisation_id, hour
ON CONFLICT (organisation_id, hour, source, partition) DO UPDATE
SET received = l.received + EXCLUDED.received, stored = l.stored + EXCLUDED.stored,
    duplicates = l.duplicates + EXCLUDED.duplicates, conflicts = l.conflicts + EXCLUDED.conflicts,
    quarantined = l.quarantined + EXCLUDED.quarantined"""

# A log whose positions were set back by hand is landed again: what is told of it already stays.
_OUTCOMES: Final = """
INSERT INTO outcomes
    (source, partition, position, organisation_id, received_at, duplicates, conflicts, quarantined, refused)
SELECT $1, n.*
FROM unnest($2::int[], $3::bigint[], $4::uuid[], $5::timestamptz[], $6::int[], $7::int[], $8::int[], $9::int[])
    AS n (partition, position, organisation_id, received_at, duplicates, conflicts, quarantined, refused)
ON CONFLICT DO NOTHING"""

_UNREADABLE: Final = """
INSERT INTO outcomes (source, partition, position, received_at, unreadable)
SELECT $1, n.*, now(), true FROM unnest($2::int[], $3::bigint[]) AS n (partition, position)
ON CONFLICT DO NOTHING"""

_QUARANTINE: Final = """
INSERT INTO quarantine
    (source, quarantine_id, organisation_id, device_id, code, message, payload, request_id, received_at,
     partition, position, item)
SELECT $1, n.*
FROM unnest($2::uuid[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::bytea[], $8::text[], $9::timestamptz[],
            $10::int[], $11::bigint[], $12::int[])
    AS n (quarantine_id, organisation_id, device_id, code, message, payload, request_id, received_at,
          partition, position, item)
ON CONFLICT DO NOTHING"""


async def write(connection: Any, source: UUID, plan: Plan) -> None:
    """Everything that `plan` has to tell beside its readings, once they are judged."""
    await _write(connection, _NOTES, _notes(plan))
    await _write(connection, _LEDGER, _ledger(plan), source)
    await _write(connection, _OUTCOMES, map(_outcome, _told(plan)), source)
    await _write(connection, _UNREADABLE, plan.undecodable, source)
    for first in range(0, len(plan.quarantine), _QUARANTINE_ROWS):
        await _write(connection, _QUARANTINE, _quarantine(plan, first, first + _QUARANTINE_ROWS), source)


async def _write(connection: Any, statement: str, rows: Iterable[tuple[Any, ...]], *leading: Any) -> None:
    """One statement for all rows, each column an array; nothing for none."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    if columns:
        await connection.execute(statement, *leading, *columns)


def _told(plan: Plan) -> list[Outcome]:
    return [outcome for outcome in plan.outcomes if not outcome.is_plain]


def _notes(plan: Plan) -> Iterable[tuple[Any, ...]]:
    for row in plan.notes.values():
        head = (row.series_id, row.ts, UUID(bytes=row.organisation), row.received_at)
        metadata = None if row.note.metadata is None else row.note.metadata.decode()
        yield (*head, row.note.original_time, row.note.original_unit, metadata)


def _ledger(plan: Plan) -> Iterable[tuple[Any, ...]]:
    """Rows that add up: what is no exception was stored."""
    exceptions: dict[tuple[int, bytes, int], list[int]] = {}
    for told in _told(plan):
        sums = exceptions.setdefault((told.place.partition, *told.hour), [0, 0, 0])
        sums[0] += told.duplicates
        sums[1] += told.conflicts
        sums[2] += told.quarantined + told.refused
    for part in plan.parts.values():
        for (organisation, hour), received in part.received.items():
            sums = exceptions.get((part.partition, organisation, hour), [0, 0, 0])
            yield (part.partition, UUID(bytes=organisation), hour * _HOUR_US, received, received - sum(sums), *sums)


def _outcome(told: Outcome) -> tuple[Any, ...]:
    head = (*told.place, UUID(bytes=told.record.organisation), told.record.received_at)
    return (*head, told.duplicates, told.conflicts, told.quarantined, told.refused)


def _quarantine(plan: Plan, first: int, end: int) -> Iterable[tuple[Any, ...]]:
    for row in plan.quarantine[first:end]:
        yield (uuid7(), _uuid(row.organisation), _uuid(row.device), *row[2:])


def _uuid(raw: bytes | None) -> UUID | None:
    return None if raw is None else UUID(bytes=raw)
