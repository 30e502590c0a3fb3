"""Readings that may stand in the database already: staged, inserted where new, else told apart.

Equal within 1e-9 of the larger one is a duplicate (texts: equal), anything else a conflict; the first to come stays,
and what has a time of our making moves on. Left out: which readings these are (`plan`), where those that move go
(`moving`) and the transaction around it (`store`).
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from runtime.postgres import copying
from schemas.record import TIME_MADE_UP
from workers.landing import columns
from workers.landing.failures import MiscountError
from workers.landing.moving import Met, move_on
from workers.landing.plan import Plan

_WEEK_US: Final = 7 * 86_400_000_000

_STAGED: Final = ("series_id", "quality", "ts", "value", "record", "item")

#: Once a session; empty again after each transaction.
CREATE: Final = "".join(
    f"""
CREATE TEMP TABLE landing_{table} (
    series_id int NOT NULL, quality smallint NOT NULL, ts timestamptz NOT NULL, value {kind} NOT NULL,
    record int NOT NULL, item int NOT NULL) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE landing_{table}_stored (
    series_id int NOT NULL, ts timestamptz NOT NULL, value {kind} NOT NULL) ON COMMIT DELETE ROWS;"""
    for table, kind in (("readings", "float8"), ("text_readings", "text"))
)

# The rows returned by the insert are those that were not there before: its count tells whether anything was.
_INSERT: Final = """
WITH stored AS (
    INSERT INTO {table} (series_id, quality, ts, value)
    SELECT DISTINCT ON (series_id, ts) series_id, quality, ts, value
    FROM landing_{table} ORDER BY series_id, ts, record, item
    ON CONFLICT DO NOTHING
    RETURNING series_id, ts, value)
INSERT INTO landing_{table}_stored SELECT series_id, ts, value FROM stored"""

# A (series, ts) that was stored just now leads its group as record -1: the first staged after it is that very row,
# the others meet it. Of any other the row that stands is looked up, by week, so that few chunks are looked into.
_MET: Final = """
WITH marked AS (
    SELECT *, first_value(record) OVER same < 0 AS stored_now, first_value(value) OVER same AS first_value,
           row_number() OVER same AS nth
    FROM (SELECT series_id, quality, ts, value, record, item FROM landing_{table} WHERE ts >= $1 AND ts < $2
          UNION ALL
          SELECT series_id, 0, ts, value, -1, 0 FROM landing_{table}_stored WHERE ts >= $1 AND ts < $2) AS seen
    WINDOW same AS (PARTITION BY series_id, ts ORDER BY record, item)
), met AS (
    SELECT record, item, series_id, quality, ts, value, first_value AS standing
    FROM marked WHERE stored_now AND nth > 2
    UNION ALL
    SELECT m.record, m.item, m.series_id, m.quality, m.ts, m.value, r.value
    FROM marked m JOIN {table} r ON r.series_id = m.series_id AND r.ts = m.ts
    WHERE NOT m.stored_now AND r.ts >= $1 AND r.ts < $2
), judged AS (
    SELECT *, {same} AS same, quality & {made_up} <> 0 AS moves FROM met
)"""

_JUDGE: Final = """
SELECT record, coalesce(array_agg(item) FILTER (WHERE same), '{}') AS duplicates,
       coalesce(array_agg(item) FILTER (WHERE NOT same), '{}') AS conflicts
FROM judged WHERE NOT moves GROUP BY record"""

_MOVING: Final = """
SELECT record, item, series_id, quality, ts, value, same FROM judged WHERE moves ORDER BY record, item"""

# Neither a difference nor a product that could leave the range of float8.
_SAME_NUMBER: Final = """(value = standing OR (value < 0) = (standing < 0)
    AND least(abs(value), abs(standing)) >= greatest(abs(value), abs(standing)) * (1 - 1e-9::float8))"""


_CROWDED: Final = "at the time it was given, and as far beyond as it may move on, other readings of this series stand"


class _Table(NamedTuple):
    name: str
    insert: str
    judge: str
    moving: str


def _table(name: str, same: str) -> _Table:
    met = _MET.format(table=name, same=same, made_up=TIME_MADE_UP)
    return _Table(name, _INSERT.format(table=name), met + _JUDGE, met + _MOVING)


_READINGS: Final = _table("readings", _SAME_NUMBER)
_TEXTS: Final = _table("text_readings", "(value = standing)")


class Judgement(NamedTuple):
    """Of the readings staged, how many were new and how many stood there already."""

    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0


async def land_suspects(connection: Any, plan: Plan) -> Judgement:
    """Within the caller's transaction. Tells `plan` of every reading that is not stored."""
    if not plan.suspects.times:
        return Judgement()
    staged = plan.suspects.in_order()
    rows = columns.stream(columns.SUSPECT, staged)
    with copying(connection):
        await connection.copy_to_table("landing_readings", source=rows, columns=_STAGED, format="binary")
    times = struct.unpack(f">{staged.count}q", staged.times)
    return await _judge(connection, plan, _READINGS, times)


async def land_texts(connection: Any, plan: Plan) -> Judgement:
    """The same for texts."""
    if not plan.texts:
        return Judgement()
    with copying(connection):
        await connection.copy_records_to_table("landing_text_readings", records=plan.texts, columns=_STAGED)
    return await _judge(connection, plan, _TEXTS, [reading.ts for reading in plan.texts])


async def _judge(connection: Any, plan: Plan, table: _Table, times: Iterable[int]) -> Judgement:
    stamps = list(times)
    judgement = Judgement(int((await connection.execute(table.insert)).rpartition(" ")[2]))
    if judgement.stored < len(stamps):
        # A plan made without knowing the week would look into every chunk.
        await connection.execute("SET LOCAL plan_cache_mode = force_custom_plan")
        weeks = sorted({time // _WEEK_US for time in stamps})
        judgement = await _tell(connection, plan, table, weeks, judgement)
        if sum(judgement) < len(stamps):
            judgement = await _move(connection, plan, table, weeks, judgement)
    if sum(judgement) != len(stamps):
        raise MiscountError(f"{table.name}: of {len(stamps)} staged {judgement}")
    return judgement


async def _tell(connection: Any, plan: Plan, table: _Table, weeks: Sequence[int], judgement: Judgement) -> Judgement:
    """Of the readings with times of their own: duplicates and conflicts."""
    stored, duplicates, conflicts = judgement
    for week in weeks:
        for told in await connection.fetch(table.judge, week * _WEEK_US, (week + 1) * _WEEK_US):
            plan.judged(told["record"], told["duplicates"], told["conflicts"])
            duplicates += len(told["duplicates"])
            conflicts += len(told["conflicts"])
    return Judgement(stored, duplicates, conflicts)


async def _move(connection: Any, plan: Plan, table: _Table, weeks: Sequence[int], judgement: Judgement) -> Judgement:
    """Of the readings with times of our making: stored at another time, known, or without a place."""
    met: list[Met] = []
    for week in weeks:
        met += [Met(*row) for row in await connection.fetch(table.moving, week * _WEEK_US, (week + 1) * _WEEK_US)]
    verdict = await move_on(connection, plan, table.name, met)
    for one, time in verdict.placed:
        plan.moved(one.outcome, one.number, time)
    for one in verdict.known:
        plan.judged(one.outcome, [one.number], [])
    for one in verdict.crowded:
        plan.judged(one.outcome, [], [one.number], _CROWDED)
    stored, duplicates, conflicts = judgement
    return Judgement(stored + len(verdict.placed), duplicates + len(verdict.known), conflicts + len(verdict.crowded))
