"""The statements of the roll-ups; what a bucket comes to stands in the schema. Left out: their order."""

from typing import Final

#: Series with consecutive ids that are computed, repaired and locked together.
SLICE: Final = 1_000

#: Of the session: who has it closes buckets, or repairs; all others stand by.
LEAD: Final = "SELECT pg_try_advisory_lock(hashtextextended('sluice rollups ' || $1, 0))"
# Of the session too, so that it is held before a transaction takes its snapshot and after it has ended.
HOLD: Final = "SELECT pg_try_advisory_lock(hashtext('sluice rollups slice'), $1)"
LET_GO: Final = "SELECT pg_advisory_unlock(hashtext('sluice rollups slice'), $1)"

STATE: Final = """
SELECT closing_through, computed_through, closing_xid IS NOT NULL AS is_numbered,
       coalesce(closing_xid < pg_snapshot_xmin(pg_current_snapshot()), false) AS is_settled
FROM rollup_state"""
LANDED: Final = """
SELECT p.partition, p.position, p.received_through
FROM log_positions p JOIN log_generations g USING (source)
WHERE p.source = $1 AND g.closed_at IS NULL"""
#: Before which readings are gone, of the organisation that keeps the least.
GONE: Final = "SELECT max(dropped_through) FROM retention_horizons WHERE tier = 'raw'"
CLOSE: Final = "UPDATE rollup_state SET closing_through = $1, closing_xid = NULL WHERE closing_through < $1"
LANDED_THROUGH: Final = "UPDATE rollup_state SET landed_through = $1 WHERE landed_through < $1"
# Only what has been read as committed is numbered: the id is then younger than the closing.
NUMBER: Final = """
UPDATE rollup_state SET closing_xid = pg_current_xact_id() WHERE closing_through = $1 AND closing_xid IS NULL"""
COMPUTED: Final = """
UPDATE rollup_state SET computed_through = $2 WHERE computed_through = $1 AND closing_through >= $2"""
ENSURE: Final = "SELECT ensure_rollups($1, $2)"

SLICES: Final = "SELECT DISTINCT series_id / $1 AS slice FROM series ORDER BY 1"
SERIES: Final = "SELECT array_agg(series_id) FROM series WHERE series_id >= $1 AND series_id < $2"
#: The first reading from a time on of some series, each in the order of its index.
NEXT: Final = """
SELECT min(n.ts) FROM series s CROSS JOIN LATERAL (
    SELECT r.ts FROM readings r WHERE r.series_id = s.series_id AND r.ts >= $3 AND r.ts < $4 ORDER BY r.ts LIMIT 1) n
WHERE s.series_id >= $1 AND s.series_id < $2"""

BEGINS: Final = "SELECT min(bucket) FROM rollups_1d"

MARKED: Final = "SELECT series_id / $1 FROM rollup_marks WHERE mark_id <= $2 ORDER BY mark_id LIMIT 1"
_MARKS: Final = "SELECT mark_id, series_id, first_bucket, last_bucket FROM rollup_marks WHERE"
MARKS: Final = f"{_MARKS} series_id >= $1 AND series_id < $2 ORDER BY mark_id LIMIT $3"
STILL_MARKED: Final = f"{_MARKS} mark_id = ANY ($1::bigint[])"
UNMARK: Final = """
WITH gone AS (DELETE FROM rollup_marks WHERE mark_id = ANY ($1::bigint[]) RETURNING series_id, mark_id)
INSERT INTO rollup_changes AS c (series_id, marks) SELECT series_id, sum(mark_id) FROM gone GROUP BY series_id
ON CONFLICT (series_id) DO UPDATE SET marks = c.marks + EXCLUDED.marks"""
WAITING: Final = """
SELECT (SELECT count(*) FROM (SELECT FROM rollup_marks LIMIT 100001) m) AS marks,
       (SELECT max(mark_id) FROM rollup_marks) AS newest,
       (SELECT extract(epoch FROM now() - m.marked_at)::float8 FROM rollup_marks m ORDER BY mark_id LIMIT 1) AS age"""

#: Marks on all of [$2, $3) of some series, day by day; none where readings are gone.
MARK: Final = """
INSERT INTO rollup_marks (series_id, first_bucket, last_bucket)
SELECT s.series_id, greatest(d, $2), least(d + interval '1 day', $3) - interval '5 minutes'
FROM unnest($1::int[]) AS n (series_id) JOIN series s USING (series_id)
LEFT JOIN retention_horizons h ON h.organisation_id = s.organisation_id AND h.tier = 'raw'
CROSS JOIN generate_series(bucket_of('1 day', $2), $3::timestamptz - interval '5 minutes', interval '1 day') AS d
WHERE d >= coalesce(h.dropped_through, '-infinity')"""
CHOSEN: Final = """
SELECT series_id FROM series
WHERE series_id > $1 AND ($2::int IS NULL OR series_id = $2) AND ($3::uuid IS NULL OR device_id = $3)
ORDER BY series_id LIMIT $4"""

# Ranges that overlap, as those of marks may, are computed once; never where what they are computed from is gone.
_RANGES: Final = """
WITH ranges AS MATERIALIZED (
    SELECT w.series_id, lower(r.span) AS first, upper(r.span) AS stop
    FROM (SELECT series_id, range_agg(tstzrange(bucket_of('{width}', first), bucket_of('{width}', last) + '{width}'))
              AS spans
          FROM unnest($1::int[], $2::timestamptz[], $3::timestamptz[]) AS n (series_id, first, last)
          GROUP BY series_id) w
    LEFT JOIN series s USING (series_id)
    LEFT JOIN retention_horizons h ON h.organisation_id = s.organisation_id AND h.tier = '{below}'
    CROSS JOIN LATERAL unnest(
        w.spans - tstzmultirange(tstzrange(NULL, coalesce(h.dropped_through, '-infinity')))) AS r (span)
)"""
_FORGET: Final = """
DELETE FROM {table} t USING ranges r
WHERE t.series_id = r.series_id AND t.bucket >= r.first AND t.bucket < r.stop AND t.bucket >= $4 AND t.bucket < $5"""
_COMPUTE: Final = """
INSERT INTO {table} (series_id, bucket, count, sum, min, max, first, first_ts, last, last_ts, increase, area,
                     seconds_true)
SELECT r.series_id, a.* FROM ranges r CROSS JOIN LATERAL {aggregate}(r.series_id, r.first, r.stop, '{width}') a
{only}"""


def _tier(name: str, width: str, below: str, aggregate: str) -> tuple[str, str, str]:
    ranges, table = _RANGES.format(width=width, below=below), f"rollups_{name}"
    only = "WHERE a.bucket >= $4 AND a.bucket < $5"
    compute = _COMPUTE.format(table=table, aggregate=aggregate, width=width, only=only)
    return name, ranges + _FORGET.format(table=table), ranges + compute


#: By tier, from the finest on: what removes the roll-ups of (series, first bucket, last bucket), and what computes
#: them out of the tier before. Both look only at buckets of [$4, $5).
TIERS: Final = (
    _tier("5m", "5 minutes", "raw", "aggregate_readings"),
    _tier("1h", "1 hour", "5m", "aggregate_rollups_5m"),
    _tier("1d", "1 day", "1h", "aggregate_rollups_1h"),
)
