"""The books of what landed: notes, ledger, outcomes and quarantine, written within the landing's transaction.

Left out: readings (`store`, `staging`).
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final
from uuid import UUID

from runtime.ids import uuid7
from workers.landing import late
from workers.landing.late import source_of
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
    (source, partition, organisation_id, hour, received, stored, duplicates, conflicts, quarantined, erased)
SELECT *
FROM unnest($1::uuid[], $2::int[], $3::uuid[], $4::timestamptz[], $5::bigint[], $6::bigint[], $7::bigint[],
            $8::bigint[], $9::bigint[], $10::bigint[])
    AS n (source, partition, organisation_id, hour, received, stored, duplicates, conflicts, quarantined, erased)
ORDER BY source, partition, organisation_id, hour
ON CONFLICT (organisation_id, hour, source, partition) DO UPDATE
SET received = l.received + EXCLUDED.received, stored = l.stored + EXCLUDED.stored,
    duplicates = l.duplicates + EXCLUDED.duplicates, conflicts = l.conflicts + EXCLUDED.conflicts,
    quarantined = l.quarantined + EXCLUDED.quarantined, erased = l.erased + EXCLUDED.erased"""

# A log whose positions were set back by hand is landed again: what is told of it already stays.
_OUTCOMES: Final = """
INSERT INTO outcomes
    (source, partition, position, organisation_id, received_at, duplicates, conflicts, quarantined, refused, erased)
SELECT *
FROM unnest($1::uuid[], $2::int[], $3::bigint[], $4::uuid[], $5::timestamptz[], $6::int[], $7::int[], $8::int[],
            $9::int[], $10::int[])
ON CONFLICT DO NOTHING"""

_UNREADABLE: Final = """
INSERT INTO outcomes (source, partition, position, received_at, unreadable)
SELECT $1, n.*, now(), true FROM unnest($2::int[], $3::bigint[]) AS n (partition, position)
ON CONFLICT DO NOTHING"""

_QUARANTINE: Final = """
INSERT INTO quarantine
    (quarantine_id, organisation_id, device_id, code, message, payload, request_id, received_at,
     source, partition, position, item)
SELECT *
FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::bytea[], $7::text[], $8::timestamptz[],
            $9::uuid[], $10::int[], $11::bigint[], $12::int[])
ON CONFLICT DO NOTHING"""


async def write(connection: Any, source: UUID, plan: Plan) -> None:
    """Everything that `plan` has to tell beside its readings, once they are judged."""
    await _write(connection, _NOTES, _notes(plan))
    await _write(connection, _LEDGER, _ledger(source, plan))
    await _write(connection, _OUTCOMES, (_outcome(source, told) for told in _told(plan)))
    await _write(connection, _UNREADABLE, plan.undecodable, source)
    for first in range(0, len(plan.quarantine), _QUARANTINE_ROWS):
        await _write(connection, _QUARANTINE, _quarantine(source, plan, first, first + _QUARANTINE_ROWS))
    await late.write(connection, source, plan)


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


def _ledger(source: UUID, plan: Plan) -> Iterable[tuple[Any, ...]]:
    """Rows that add up: what is no exception was stored."""
    exceptions: dict[tuple[bytes, int, bytes, int], list[int]] = {}
    for told in _told(plan):
        sums = exceptions.setdefault((told.place.spool, told.place.partition, *told.hour), [0, 0, 0, 0])
        sums[0] += told.duplicates
        sums[1] += told.conflicts
        sums[2] += told.quarantined + told.refused
        sums[3] += told.erased + told.erased_refused
    for spool, partition, counts in _received(plan):
        for (organisation, hour), received in counts.items():
            if received:
                sums = exceptions.get((spool, partition, organisation, hour), [0, 0, 0, 0])
                origin = UUID(bytes=spool) if spool else source, partition, UUID(bytes=organisation), hour * _HOUR_US
                yield (*origin, received, received - sum(sums), *sums)


def _received(plan: Plan) -> Iterable[tuple[bytes, int, Mapping[tuple[bytes, int], int]]]:
    """By spool (none for the log) and partition, the readings by organisation and hour."""
    for part in plan.parts.values():
        yield b"", part.partition, part.received
        for (spool, partition), counts in part.received_from.items():
            yield spool, partition, counts


def _outcome(source: UUID, told: Outcome) -> tuple[Any, ...]:
    place, record = told.place, told.record
    head = source_of(place, source), place.partition, place.position, UUID(bytes=record.organisation)
    counts = told.duplicates, told.conflicts, told.quarantined, told.refused, told.erased
    return (*head, record.received_at, *counts)


def _quarantine(source: UUID, plan: Plan, first: int, end: int) -> Iterable[tuple[Any, ...]]:
    for row in plan.quarantine[first:end]:
        place = row.place
        where = source_of(place, source), place.partition, place.position, row.item
        yield (uuid7(), _uuid(row.organisation), _uuid(row.device), *row[2:7], *where)


def _uuid(raw: bytes | None) -> UUID | None:
    return None if raw is None else UUID(bytes=raw)
