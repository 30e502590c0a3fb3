"""Readings with a time of our making that met another of their series: each goes on to the next free microsecond.

Several ingest processes stamp readings of one device without knowing of each other. What has landed once is known
again and stays where it is. Left out: which readings met what (`staging`), and the telling (`plan`).
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

from runtime.postgres import copying
from workers.landing.plan import Plan

_COLUMNS: Final = ("series_id", "quality", "ts", "value")
_STORED: Final = ("series_id", "ts", "value")

# The span is given apart from the windows, so that only the chunks it lies in are looked into.
_TAKEN: Final = """
SELECT r.series_id, r.ts
FROM unnest($1::int[], $2::timestamptz[], $3::timestamptz[]) AS w (series_id, first, last)
JOIN {table} r ON r.series_id = w.series_id AND r.ts >= w.first AND r.ts <= w.last
WHERE r.ts >= $4 AND r.ts <= $5"""

_STANDING: Final = """
SELECT m.record_id, m.item
FROM moved_readings m JOIN {table} r ON r.series_id = m.series_id AND r.ts = m.ts
WHERE m.record_id = ANY ($1::uuid[]) AND r.ts >= $2 AND r.ts <= $3"""

_REMEMBER: Final = """
INSERT INTO moved_readings (record_id, item, series_id, ts)
SELECT * FROM unnest($1::uuid[], $2::int[], $3::int[], $4::timestamptz[])
ON CONFLICT (record_id, item) DO UPDATE SET series_id = EXCLUDED.series_id, ts = EXCLUDED.ts"""


class Met(NamedTuple):
    """A staged reading whose place was taken; `same`: by an equal value."""

    outcome: int
    number: int
    series_id: int
    quality: int
    ts: int
    value: Any
    same: bool


class Window(NamedTuple):
    """Times of a series, both ends included."""

    series_id: int
    first: int
    last: int


class Verdict(NamedTuple):
    """What becomes of readings that met others."""

    placed: list[tuple[Met, int]]
    """With the time at which each stands now."""
    known: list[Met]
    """Landed before."""
    crowded: list[Met]
    """No time within reach is free."""


async def move_on(connection: Any, plan: Plan, table: str, met: Sequence[Met]) -> Verdict:
    """Within the caller's transaction: write what finds a place."""
    reach = plan.move_max_us
    span = min(one.ts for one in met), max(one.ts for one in met) + reach
    records = {_identity(plan, one)[0] for one in met}
    standing = {tuple(row) for row in await connection.fetch(_STANDING.format(table=table), records, *span)}
    known: list[Met] = []
    moving: list[Met] = []
    for one in met:
        identity = _identity(plan, one)
        is_known = identity in standing or (one.same and plan.may_have_landed(one.outcome))
        (known if is_known else moving).append(one)
        standing.add(identity)
    moving.sort(key=lambda one: (one.series_id, one.ts, one.outcome, one.number))
    columns = [list(column) for column in zip(*windows(moving, reach), strict=True)]
    rows = await connection.fetch(_TAKEN.format(table=table), *columns, *span) if columns else []
    taken = {tuple(row) for row in rows}
    placed, crowded = place(moving, taken, reach, lambda one, time: plan.is_erased(one.outcome, time))
    await _write(connection, plan, table, placed)
    return Verdict(placed, known, crowded)


def windows(moving: Iterable[Met], reach: int) -> list[Window]:
    """Where places may be free for these readings, which are in the order of series and time."""
    found: list[Window] = []
    for one in moving:
        first, last = one.ts + 1, one.ts + reach
        if found and found[-1].series_id == one.series_id and first <= found[-1].last:
            first = found.pop().first
        found.append(Window(one.series_id, first, last))
    return found


def place(
    moving: Iterable[Met],
    taken: Collection[tuple[int, int]],
    reach: int,
    is_erased: Callable[[Met, int], bool] = lambda *_: False,
) -> tuple[list[tuple[Met, int]], list[Met]]:
    """Each of these readings, in the order of series and time, at the first free time; and those without any.

    None is moved to a time that is erased.
    """
    placed: list[tuple[Met, int]] = []
    crowded: list[Met] = []
    series_id, free = -1, 0
    for one in moving:
        # From the time of the reading before it up to `free` all are taken.
        free = max(free, one.ts + 1) if one.series_id == series_id else one.ts + 1
        series_id = one.series_id
        while (series_id, free) in taken:
            free += 1
        if free - one.ts > reach or is_erased(one, free):
            crowded.append(one)
        else:
            placed.append((one, free))
            free += 1
    return placed, crowded


async def _write(connection: Any, plan: Plan, table: str, placed: Sequence[tuple[Met, int]]) -> None:
    if placed:
        rows = [(one.series_id, one.quality, time, one.value) for one, time in placed]
        stored = [(series_id, time, value) for series_id, _, time, value in rows]
        with copying(connection):
            await connection.copy_records_to_table(table, records=rows, columns=_COLUMNS)
            await connection.copy_records_to_table(f"landing_{table}_stored", records=stored, columns=_STORED)
        moves = [(*_identity(plan, one), one.series_id, time) for one, time in placed]
        await connection.execute(_REMEMBER, *(list(column) for column in zip(*moves, strict=True)))


def _identity(plan: Plan, one: Met) -> tuple[UUID, int]:
    return UUID(bytes=plan.outcomes[one.outcome].record.record_id), one.number
