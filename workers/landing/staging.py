"""Readings that may stand in the database already: staged, inserted where new, else told apart.

Equal within 1e-9 of the larger one is a duplicate (texts: equal), anything else a conflict; the first to come stays.
Left out: which readings these are (`plan`) and the transaction around it (`store`).
"""

import struct
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from workers.landing import columns
from workers.landing.failures import MiscountError
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
_JUDGE: Final = """
WITH marked AS (
    SELECT *, first_value(record) OVER same < 0 AS stored_now, first_value(value) OVER same AS first_value,
           row_number() OVER same AS nth
    FROM (SELECT series_id, ts, value, record, item FROM landing_{table} WHERE ts >= $1 AND ts < $2
          UNION ALL
          SELECT series_id, ts, value, -1, 0 FROM landing_{table}_stored WHERE ts >= $1 AND ts < $2) AS seen
    WINDOW same AS (PARTITION BY series_id, ts ORDER BY record, item)
), met AS (
    SELECT record, item, value, first_value AS standing FROM marked WHERE stored_now AND nth > 2
    UNION ALL
    SELECT m.record, m.item, m.value, r.value
    FROM marked m JOIN {table} r ON r.series_id = m.series_id AND r.ts = m.ts
    WHERE NOT m.stored_now AND r.ts >= $1 AND r.ts < $2
)
SELECT record, coalesce(array_agg(item) FILTER (WHERE {same}), '{{}}') AS duplicates,
       coalesce(array_agg(item) FILTER (WHERE NOT {same}), '{{}}') AS conflicts
FROM met GROUP BY record"""

# Neither a difference nor a product that could leave the range of float8.
_SAME_NUMBER: Final = """(value = standing OR (value < 0) = (standing < 0)
    AND least(abs(value), abs(standing)) >= greatest(abs(value), abs(standing)) * (1 - 1e-9::float8))"""


class _Table(NamedTuple):
    name: str
    insert: str
    judge: str


def _table(name: str, same: str) -> _Table:
    return _Table(name, _INSERT.format(table=name), _JUDGE.format(table=name, same=same))


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
    await connection.copy_to_table("landing_readings", source=rows, columns=_STAGED, format="binary")
    times = struct.unpack(f">{staged.count}q", staged.times)
    return await _judge(connection, plan, _READINGS, times)


async def land_texts(connection: Any, plan: Plan) -> Judgement:
    """The same for texts."""
    if not plan.texts:
        return Judgement()
    await connection.copy_records_to_table("landing_text_readings", records=plan.texts, columns=_STAGED)
    return await _judge(connection, plan, _TEXTS, [reading.ts for reading in plan.texts])


async def _judge(connection: Any, plan: Plan, table: _Table, times: Iterable[int]) -> Judgement:
    stamps = list(times)
    stored = int((await connection.execute(table.insert)).rpartition(" ")[2])
    duplicates = conflicts = 0
    if stored < len(stamps):
        # A plan made without knowing the week would look into every chunk.
        await connection.execute("SET LOCAL plan_cache_mode = force_custom_plan")
        for week in sorted({time // _WEEK_US for time in stamps}):
            for told in await connection.fetch(table.judge, week * _WEEK_US, (week + 1) * _WEEK_US):
                plan.judged(told["record"], told["duplicates"], told["conflicts"])
                duplicates += len(told["duplicates"])
                conflicts += len(told["conflicts"])
    if stored + duplicates + conflicts != len(stamps):
        raise MiscountError(
            f"{table.name}: of {len(stamps)} staged {stored} stored, {duplicates} duplicates, {conflicts} conflicts"
        )
    return Judgement(stored, duplicates, conflicts)
