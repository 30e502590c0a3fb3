"""The statements of retention; how a chunk is dropped stands in the schema. Left out: their order (`keeper`)."""

from typing import Final

#: Of the session: who has it does the work, all others stand by.
LEAD: Final = "SELECT pg_try_advisory_lock(hashtextextended('sluice retention', 0))"

NOW: Final = "SELECT now()"
ORGANISATIONS: Final = """
SELECT organisation_id, raw_retention_days, rollups_5m_days, rollups_1h_days, rollups_1d_days
FROM organisations ORDER BY organisation_id"""
HORIZONS: Final = """
SELECT organisation_id, tier, refused_through, dropped_through, deleted_through FROM retention_horizons"""
CHUNKS: Final = "SELECT tier, relation, chunk, first, stop, bytes FROM retention_chunks()"
ANNOUNCE: Final = "SELECT announce_horizons($1::uuid[], $2::text[], $3::timestamptz[])"
STATE: Final = """
SELECT announced_epoch, announced_xid IS NOT NULL AS is_numbered,
       coalesce(announced_xid < pg_snapshot_xmin(pg_current_snapshot()), false) AS is_settled
FROM retention_state"""
# Only what has been read as committed is numbered: the id is then younger than the announcement.
NUMBER: Final = """
UPDATE retention_state SET announced_xid = pg_current_xact_id()
WHERE announced_epoch = $1 AND announced_xid IS NULL"""
#: What was announced and is settled, all of one moment.
SETTLED: Final = """
SELECT h.organisation_id, h.tier, h.refused_through FROM retention_horizons h, retention_state s
WHERE h.dropped_through < h.refused_through AND s.announced_xid < pg_snapshot_xmin(pg_current_snapshot())
ORDER BY h.organisation_id, array_position('{raw,5m,1h,1d}', h.tier)"""
# Locked first, and then looked at the marks: whoever erases reads horizons under the same lock once its marks stand.
HOLD: Final = "SELECT FROM retention_horizons WHERE organisation_id = $1 AND tier = $2 FOR UPDATE"
ADVANCE: Final = """
UPDATE retention_horizons h SET dropped_through = $3
WHERE h.organisation_id = $1 AND h.tier = $2 AND h.refused_through = $3
  AND (SELECT computed_through FROM rollup_state) >= $3
  AND NOT EXISTS (SELECT FROM rollup_marks m JOIN series s USING (series_id)
                  WHERE s.organisation_id = $1 AND m.first_bucket < $3)
  AND ($4::text IS NULL OR EXISTS (
      SELECT FROM retention_horizons f
      WHERE f.organisation_id = $1 AND f.tier = $4 AND f.dropped_through >= $3))"""
COMPUTED: Final = "SELECT computed_through FROM rollup_state"
DROP: Final = "SELECT drop_retired($1)"

SERIES: Final = """
SELECT series_id FROM series WHERE organisation_id = $1 AND series_id > $2 ORDER BY series_id LIMIT $3"""
_DELETE: Final = """
WITH doomed AS MATERIALIZED (
    SELECT r.series_id, r.{time} FROM {table} r
    WHERE r.series_id = ANY ($1::int[]) AND r.{time} >= $2 AND r.{time} < $3 LIMIT $4)
DELETE FROM {table} r USING doomed d
WHERE r.series_id = d.series_id AND r.{time} = d.{time} AND r.{time} >= $2 AND r.{time} < $3"""
_COUNT: Final = """
SELECT count(*) FROM (
    SELECT FROM series s CROSS JOIN LATERAL (
        SELECT FROM {table} r WHERE r.series_id = s.series_id AND r.{time} >= $2 AND r.{time} < $3) r
    WHERE s.organisation_id = $1 LIMIT $4) n"""
_TIMES: Final = {
    "readings": "ts",
    "text_readings": "ts",
    "reading_notes": "ts",
    "rollups_5m": "bucket",
    "rollups_1h": "bucket",
    "rollups_1d": "bucket",
}
#: By table: removes some rows of some series in [$2, $3), and counts an organisation's there, up to a bound.
DELETE: Final = {table: _DELETE.format(table=table, time=time) for table, time in _TIMES.items()}
COUNT: Final = {table: _COUNT.format(table=table, time=time) for table, time in _TIMES.items()}
DELETED: Final = """
UPDATE retention_horizons SET deleted_through = $4
WHERE organisation_id = $1 AND tier = $2 AND deleted_through = $3 AND dropped_through >= $4"""

_COMMANDS_OVER: Final = """
SELECT command_id FROM commands
WHERE state IN ('SUCCESS', 'FAILED', 'TIMEOUT') AND finished_at < now() - make_interval(days => $1)
ORDER BY finished_at LIMIT $2"""
#: Commands that ended more than so many days ago, the first of them: removes them, and counts them up to a bound.
FORGET_COMMANDS: Final = f"DELETE FROM commands WHERE command_id = ANY (ARRAY({_COMMANDS_OVER}))"  # noqa: S608
COUNT_COMMANDS: Final = f"SELECT count(*) FROM ({_COMMANDS_OVER}) n"  # noqa: S608

IS_EXTENDED: Final = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
ENSURE_WEEK: Final = "SELECT ensure_week($1)"
