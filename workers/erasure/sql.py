"""The statements of erasing; the registry's part stands in the schema. Left out: their order (`eraser`)."""

from typing import Final

from workers.landing.marks import LEAVE

OPEN: Final = """
SELECT site_id, organisation_id, state, source, ends, erased_through FROM erasures WHERE state <> 'done'
ORDER BY requested_at, site_id LIMIT 1000"""
# The transaction has its id before the statements after it ask what the roll-ups have closed.
ALONE: Final = """
SELECT pg_try_advisory_xact_lock(hashtextextended('sluice erasure ' || $1::uuid::text, 0)),
       pg_current_xact_id()::text"""
CAPTURE: Final = """
UPDATE erasures SET source = $2, ends = $3::jsonb WHERE site_id = $1 AND state = 'waiting' AND ends IS NULL"""
# A generation that was closed has no positions to come.
LANDED: Final = """
SELECT NOT EXISTS (
    SELECT FROM jsonb_each_text($2::jsonb) e
    LEFT JOIN log_positions p ON p.source = $1 AND p.partition = e.key::int
    JOIN log_generations g ON g.source = $1
    WHERE g.closed_at IS NULL AND coalesce(p.position, 0) < e.value::bigint)"""
BEGIN_ERASING: Final = "UPDATE erasures SET state = 'erasing' WHERE site_id = $1 AND state = 'waiting'"

DEVICES: Final = """
SELECT t.device_id, array_agg(t.from_ts ORDER BY t.from_ts) AS firsts, array_agg(t.to_ts ORDER BY t.from_ts) AS ends,
       ARRAY(SELECT s.series_id FROM series s WHERE s.device_id = t.device_id) AS series
FROM tombstones t WHERE t.site_id = $1 AND t.device_id > $2 GROUP BY t.device_id ORDER BY t.device_id LIMIT $3"""
THROUGH: Final = "UPDATE erasures SET erased_through = $2 WHERE site_id = $1"

# Series by series, each in the order of its index: the first row is all that is read.
_NEXT: Final = """
SELECT min(n.ts) FROM unnest($1::int[]) AS s (series_id) CROSS JOIN LATERAL (
    SELECT r.ts FROM {table} r
    WHERE r.series_id = s.series_id AND r.ts >= $2 AND r.ts < $3 ORDER BY r.ts LIMIT 1) n"""
_ERASE: Final = """
WITH doomed AS MATERIALIZED (
    SELECT r.series_id, r.ts FROM {table} r WHERE r.series_id = ANY ($2::int[]) AND r.ts >= $3 AND r.ts < $4 LIMIT $5
), gone AS (
    DELETE FROM {table} r USING doomed d
    WHERE r.series_id = d.series_id AND r.ts = d.ts AND r.ts >= $3 AND r.ts < $4 RETURNING r.series_id, r.ts
){marked}, told AS (
    UPDATE erasures SET {column} = {column} + (SELECT count(*) FROM gone) WHERE site_id = $1
)
SELECT count(*) FROM gone"""
#: By the column of `erasures` that counts them; readings before what is noted of them.
COLUMNS: Final = {"readings": "readings", "text_readings": "text_readings", "notes": "reading_notes"}
NEXT: Final = {column: _NEXT.format(table=table) for column, table in COLUMNS.items()}
_MARKED: Final = LEAVE.format(found="gone", closing="(SELECT closing_through FROM rollup_state)")
ERASE: Final = {
    column: _ERASE.format(
        table=table, column=column, marked="" if table == "reading_notes" else f", marked AS ({_MARKED}\n)"
    )
    for column, table in COLUMNS.items()
}

#: What each tier of roll-ups is computed from, from the finest tier on.
TIERS: Final = ("raw", "5m", "1h")
HORIZONS: Final = "SELECT tier, dropped_through FROM retention_horizons WHERE organisation_id = $1"
#: The same once nobody is about to move one.
WAIT_FOR_HORIZONS: Final = f"{HORIZONS} FOR SHARE"
#: The first day from one on that has any roll-up, which has one of the day.
NEXT_DAY: Final = """
SELECT min(n.bucket) FROM unnest($1::int[]) AS s (series_id) CROSS JOIN LATERAL (
    SELECT r.bucket FROM rollups_1d r
    WHERE r.series_id = s.series_id AND r.bucket >= $2 AND r.bucket < $3 ORDER BY r.bucket LIMIT 1) n"""
_ERASE_ROLLED_UP: Final = """
DELETE FROM {table} r
WHERE r.series_id = ANY ($1::int[]) AND r.bucket > $2::timestamptz - interval '{width}'
  AND r.bucket >= $3 AND r.bucket < $4"""
#: By tier: the buckets of a day from $3 on, before $4, that end after $2.
ERASE_ROLLED_UP: Final = tuple(
    _ERASE_ROLLED_UP.format(table=table, width=width)
    for table, width in (("rollups_5m", "5 minutes"), ("rollups_1h", "1 hour"), ("rollups_1d", "1 day"))
)

_QUARANTINED: Final = """
SELECT q.quarantine_id, q.device_id, q.received_at, q.item, coalesce(q.original_payload, q.payload) AS payload
FROM quarantine q
WHERE q.organisation_id = $2 AND {state} AND (q.received_at, q.quarantine_id) > ($3, $4::uuid)
  AND q.device_id IN (SELECT t.device_id FROM tombstones t WHERE t.site_id = $1)
ORDER BY q.received_at, q.quarantine_id LIMIT $5"""
#: An index each.
QUARANTINED: Final = (_QUARANTINED.format(state="q.state = 'held'"), _QUARANTINED.format(state="q.state <> 'held'"))
SPANS: Final = "SELECT from_ts, to_ts FROM tombstones WHERE site_id = $1 AND device_id = $2"
ERASE_QUARANTINED: Final = "SELECT erase_quarantined($1, $2::uuid[])"
ERASE_ROWS: Final = "SELECT erase_site_rows($1, $2, $3)"
