"""The statements of `sluice verify`, all of them reading. Left out: who asks them (`store`)."""

from typing import Final

# ---------------------------------------------------------------- the beginning

SOURCE: Final = """
SELECT g.created_at, NOT EXISTS (SELECT FROM log_generations o WHERE o.source <> g.source) AS is_first,
       pg_snapshot_xmax(s.snapshot)::text::bigint AS transactions,
       ARRAY(SELECT (pg_snapshot_xip(s.snapshot)::text::bigint & 4294967295)::text::xid) AS open, now() AS now
FROM log_generations g, pg_current_snapshot() AS s (snapshot) WHERE g.source = $1"""
POSITIONS: Final = """
SELECT partition, greatest(position, landed_until) AS position FROM log_positions WHERE source = $1"""
LOSSES: Final = """
SELECT source, partition, first_position, end_position, noticed_at FROM log_losses
WHERE noticed_at >= $1 AND noticed_at < $2 ORDER BY noticed_at LIMIT 10000"""
ORGANISATIONS: Final = """
SELECT organisation_id FROM organisations WHERE $1::uuid IS NULL OR organisation_id = $1 ORDER BY organisation_id"""
LEDGER: Final = """
SELECT organisation_id, hour, source, partition, received, stored, duplicates, conflicts, quarantined, erased
FROM ledger
WHERE hour >= $1 AND hour < $2 AND ($3::uuid IS NULL OR organisation_id = $3)"""

# What the ledger says of the quarantine beside what stands there; by organisation, which both have indexes on.
SET_ASIDE: Final = """
SELECT date_bin('1 hour', at, timestamptz '2000-01-01 00:00:00Z') AS hour, source, partition,
       sum(set_aside)::bigint, sum(replayed)::bigint, sum(discarded)::bigint, sum(expired)::bigint,
       sum(lost)::bigint, count(*) FILTER (WHERE state = 'in'),
       count(*) FILTER (WHERE state = 'released'), count(*) FILTER (WHERE state = 'discarded'),
       count(*) FILTER (WHERE state = 'expired')
FROM (
    SELECT hour AS at, source, partition, conflicts + quarantined + taken_over - handed_over AS set_aside, replayed,
           discarded, expired, lost, NULL AS state
    FROM ledger WHERE organisation_id = $1 AND hour >= $2 AND hour < $3
        AND (conflicts, quarantined, taken_over, replayed, discarded, expired, lost) <> (0, 0, 0, 0, 0, 0, 0)
    UNION ALL
    SELECT received_at, source, partition, 0, 0, 0, 0, 0, 'in'
    FROM quarantine WHERE organisation_id = $1 AND received_at >= $2 AND received_at < $3 AND state = 'held'
    UNION ALL
    SELECT received_at, source, partition, 0, 0, 0, 0, 0,
           CASE state WHEN 'replaying' THEN 'in' ELSE state END
    FROM quarantine WHERE organisation_id = $1 AND received_at >= $2 AND received_at < $3 AND state <> 'held'
) AS told GROUP BY 1, source, partition"""

# ---------------------------------------------------------------- of records

_OF_LOG: Final = " WHERE source = $1 AND partition = $2 AND position >= $3 AND position < $4"
_OF_SPOOLS: Final = """
JOIN unnest($1::uuid[], $2::int[], $3::bigint[]) AS n (source, partition, position)
    USING (source, partition, position)"""
_OUTCOMES: Final = """
SELECT source, partition, position, unreadable, duplicates, conflicts, conflicts + quarantined AS set_aside, refused,
       erased
FROM outcomes"""
_QUARANTINE: Final = "SELECT source, partition, position, item, code, state FROM quarantine"
OUTCOMES: Final = _OUTCOMES + _OF_LOG
SPOOLED_OUTCOMES: Final = _OUTCOMES + _OF_SPOOLS
QUARANTINE: Final = _QUARANTINE + _OF_LOG
SPOOLED_QUARANTINE: Final = _QUARANTINE + _OF_SPOOLS

MOVED: Final = "SELECT record_id, item, ts FROM moved_readings WHERE record_id = ANY ($1::uuid[])"
REPLAYS: Final = "SELECT quarantine_id, state, replay_id FROM quarantine WHERE quarantine_id = ANY ($1::uuid[])"
NAMED: Final = """
SELECT n.source, n.partition, n.position
FROM unnest($1::uuid[], $2::bytea[], $3::bytea[], $4::timestamptz[]) AS k (device_id, key, scope, received_at)
JOIN idempotency_keys n USING (device_id, key, scope, received_at)"""
FIND: Final = """
SELECT k.number - 1 AS number, s.series_id
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[]) WITH ORDINALITY
    AS k (organisation_id, device_id, metric, label, number)
JOIN series s ON s.device_id = k.device_id AND s.metric = k.metric AND s.label = k.label
    AND (s.organisation_id = k.organisation_id OR EXISTS (
        SELECT FROM former_owners f WHERE f.device_id = k.device_id AND f.organisation_id = k.organisation_id))"""

# ---------------------------------------------------------------- what is erased

FINISHED: Final = """
SELECT t.device_id, t.organisation_id, t.from_ts, t.to_ts FROM tombstones t JOIN erasures e USING (site_id)
WHERE e.state = 'done' AND ($1::uuid IS NULL OR t.organisation_id = $1) ORDER BY t.device_id, t.from_ts"""
# Those of a device that it still has, and those that went with it.
SERIES_OF: Final = """
SELECT s.device_id, s.series_id FROM series s WHERE s.device_id = ANY ($1::uuid[])
UNION ALL SELECT s.device_id, s.series_id FROM erased_series s WHERE s.device_id = ANY ($1::uuid[])"""
ERASED_SERIES: Final = "SELECT series_id, device_id FROM erased_series WHERE series_id = ANY ($1::int[])"
_LEFT: Final = """
SELECT k.number - 1 AS number, r.ts, r.content
FROM unnest($1::int[], $2::timestamptz[], $3::timestamptz[]) WITH ORDINALITY AS k (series_id, first, stop, number)
CROSS JOIN LATERAL (
    SELECT r.ts, {content} FROM {table} r
    WHERE r.series_id = k.series_id AND r.ts >= k.first AND r.ts < k.stop ORDER BY r.ts LIMIT $4) r
LIMIT $4"""
LEFT_QUARANTINED: Final = """
SELECT q.quarantine_id, q.device_id, coalesce(q.original_payload, q.payload), q.received_at, q.item
FROM (SELECT * FROM quarantine WHERE state = 'held' AND organisation_id = ANY ($1::uuid[])
      UNION ALL SELECT * FROM quarantine WHERE state = 'replaying' AND organisation_id = ANY ($1::uuid[])) q
WHERE q.device_id = ANY ($2::uuid[])"""

# ---------------------------------------------------------------- of rows

SERIES: Final = """
SELECT s.series_id, s.organisation_id, s.device_id, s.metric, s.label, o.raw_retention_days
FROM series s JOIN organisations o USING (organisation_id)
WHERE s.series_id > $1 AND ($2::uuid IS NULL OR s.organisation_id = $2) ORDER BY s.series_id LIMIT $3"""
SERIES_IDS: Final = "SELECT series_id FROM series WHERE series_id > $1 ORDER BY series_id LIMIT $2"

# In the byte order of claims: times with their sign bit turned round.
_KEY: Final = (
    "set_byte(int4send(r.series_id) || timestamptz_send(r.ts), 4, get_byte(timestamptz_send(r.ts), 0) # 128) AS key"
)
# As plain claims have it: the value, the flags, and no flag of the claim's own.
_CONTENT: Final = "{value} || int4send(r.quality::int << 16) AS content"
_VALUES: Final = {"readings": "float8send(r.value)", "text_readings": "convert_to(r.value, 'UTF8')"}
_OTHERS: Final = {"readings": "text_readings", "text_readings": "readings"}
# xmin has 32 bits: how far a row's transaction lies before those that came after the first snapshot, on the circle of
# them. Those that were open then are not seen either.
_SEEN: Final = """(($6::bigint - r.xmin::text::bigint) & 4294967295) BETWEEN 1 AND 2147483647
        AND r.xmin <> ALL ($7::xid[]) AS seen"""
# Series by series, each in the order of its index: nothing is sorted, and LIMIT ends it where it stands.
_ROWS: Final = """
SELECT r.key, r.content, r.seen
FROM unnest($1::int[]) WITH ORDINALITY AS s (series_id, nth) CROSS JOIN LATERAL (
    SELECT {key}, {content}, {seen} FROM {table} r
    WHERE r.series_id = s.series_id AND r.ts >= $3 AND r.ts < $4 AND (s.nth > 1 OR r.ts > $2)
    ORDER BY r.ts LIMIT $5) r
LIMIT $5"""
# The same for ids that no series has, from one up to another.
_STRAYS: Final = """
SELECT r.key, r.content, r.seen
FROM unnest($1::int[], $8::int[]) WITH ORDINALITY AS s (first_id, last_id, nth) CROSS JOIN LATERAL (
    SELECT {key}, {content}, {seen} FROM {table} r
    WHERE r.series_id >= s.first_id AND r.series_id <= s.last_id AND r.ts >= $3 AND r.ts < $4
        AND (s.nth > 1 OR r.series_id > s.first_id OR r.ts > $2)
    ORDER BY r.series_id, r.ts LIMIT $5) r
LIMIT $5"""
_LOOK_UP: Final = """
SELECT {key}, {content}
FROM unnest($1::int[], $2::timestamptz[]) AS k (series_id, ts)
JOIN {table} r ON r.series_id = k.series_id AND r.ts = k.ts
WHERE r.ts >= $3 AND r.ts < $4"""
# The first note on a series and time stays: where a number and a text stand side by side, it may be the other's.
_NOTES: Final = """
SELECT n.number - 1 AS number, r.series_id IS NOT NULL AS stands
FROM unnest($1::int[], $2::timestamptz[], $3::uuid[], $4::timestamptz[], $5::text[], $6::text[], $7::text[])
    WITH ORDINALITY
    AS n (series_id, ts, organisation_id, received_at, original_time, original_unit, metadata, number)
LEFT JOIN series s ON s.series_id = n.series_id
LEFT JOIN reading_notes r ON r.series_id = n.series_id AND r.ts = n.ts
WHERE (r.organisation_id, r.received_at, r.original_time, r.original_unit, r.metadata) IS DISTINCT FROM
      (coalesce(s.organisation_id, n.organisation_id), n.received_at, n.original_time, n.original_unit,
       n.metadata::jsonb)
  AND (r.series_id IS NULL
       OR NOT EXISTS (SELECT FROM {other} o WHERE o.series_id = n.series_id AND o.ts = n.ts))"""


def _by_table(statement: str) -> dict[str, str]:
    return {
        table: statement.format(
            table=table, other=_OTHERS[table], key=_KEY, content=_CONTENT.format(value=value), seen=_SEEN
        )
        for table, value in _VALUES.items()
    }


ROWS: Final = _by_table(_ROWS)
STRAYS: Final = _by_table(_STRAYS)
LOOK_UP: Final = _by_table(_LOOK_UP)
NOTES: Final = _by_table(_NOTES)
LEFT: Final = _by_table(_LEFT)
