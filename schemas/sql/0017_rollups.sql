-- Roll-ups: what a series came to in each 5 minutes, hour and day of UTC; how far they go, and where they must not be
-- believed. A row tells of what happened between readings inside its bucket alone: what crosses an edge is put
-- together by whoever reads, so that a late reading spoils its own bucket and no other.

-- ---------------------------------------------------------------- what stands there

DO $$
DECLARE
    v_timescale boolean := EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb');
    v_tier record;
BEGIN
    FOR v_tier IN SELECT * FROM (VALUES ('rollups_5m', interval '28 days'), ('rollups_1h', interval '364 days'),
                                        ('rollups_1d', interval '3640 days')) AS t (name, chunk) LOOP
        EXECUTE format('CREATE TABLE %I (
            series_id    int NOT NULL,
            bucket       timestamptz NOT NULL,
            count        bigint NOT NULL,
            sum          float8 NOT NULL,       -- of what can be added up, see addable()
            min          float8 NOT NULL,
            max          float8 NOT NULL,
            first        float8 NOT NULL,
            first_ts     timestamptz NOT NULL,
            last         float8 NOT NULL,
            last_ts      timestamptz NOT NULL,
            increase     float8 NOT NULL,       -- of a counter, from the first reading to the last
            area         float8 NOT NULL,       -- value times seconds, each value until the next reading
            seconds_true float8 NOT NULL,       -- during which the value was not 0
            PRIMARY KEY (series_id, bucket))', v_tier.name)
            || CASE WHEN v_timescale THEN '' ELSE ' PARTITION BY RANGE (bucket)' END;
        IF v_timescale THEN
            PERFORM create_hypertable(v_tier.name::regclass, 'bucket', chunk_time_interval => v_tier.chunk,
                                      create_default_indexes => false);
        END IF;
    END LOOP;
END $$;

-- The partitions for buckets of [p_from, p_to), where the extension does not make them: months, years and decades of
-- UTC. Idempotent. Attached, as ensure_week does.
CREATE FUNCTION ensure_rollups(p_from timestamptz, p_to timestamptz) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_tier record;
    v_first timestamptz;
    v_end timestamptz;
    v_name text;
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('sluice ensure_rollups'));
    FOR v_tier IN SELECT * FROM (VALUES ('rollups_5m', 'month', interval '1 month', 'YYYYMM'),
                                        ('rollups_1h', 'year', interval '1 year', 'YYYY'),
                                        ('rollups_1d', 'decade', interval '10 years', 'YYYY')) AS t (name, unit, span, spelt) LOOP
        v_first := date_trunc(v_tier.unit, p_from, 'UTC');
        WHILE v_first < p_to LOOP
            v_end := (v_first AT TIME ZONE 'UTC' + v_tier.span) AT TIME ZONE 'UTC';
            v_name := v_tier.name || '_' || to_char(v_first AT TIME ZONE 'UTC', v_tier.spelt);
            IF to_regclass(quote_ident(v_name)) IS NULL THEN
                EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', v_name, v_tier.name);
                EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                               v_tier.name, v_name, v_first, v_end);
            END IF;
            v_first := v_end;
        END LOOP;
    END LOOP;
END $$;

-- ---------------------------------------------------------------- how far it goes

-- Times before closing_through are closed: whoever writes or deletes a reading there leaves a mark in the same
-- transaction. Buckets that end at computed_through or before it have been computed. closing_xid is an id given out
-- after closing_through was committed: once no older transaction is in flight, whoever writes there leaves its mark.
CREATE TABLE rollup_state (
    only_row         boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    closing_through  timestamptz NOT NULL DEFAULT '-infinity',
    closing_xid      xid8,
    computed_through timestamptz NOT NULL DEFAULT '-infinity' CHECK (computed_through <= closing_through),
    landed_through   timestamptz NOT NULL DEFAULT '-infinity'   -- what the log received before has landed
) WITH (fillfactor = 20);
INSERT INTO rollup_state DEFAULT VALUES;

-- Where readings came or went behind closing_through: roll-ups of these buckets are not to be believed. First and last
-- are buckets of 5 minutes of one day. Nobody changes a mark, and a repair deletes exactly those that it saw.
CREATE TABLE rollup_marks (
    mark_id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    series_id    int NOT NULL,
    first_bucket timestamptz NOT NULL,
    last_bucket  timestamptz NOT NULL CHECK (last_bucket >= first_bucket),
    marked_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX rollup_marks_by_series ON rollup_marks (series_id) INCLUDE (first_bucket, last_bucket);

-- The sum of the ids of a series' marks that are repaired: with those that stand it tells whether it ever changed.
CREATE TABLE rollup_changes (
    series_id int PRIMARY KEY,
    marks     numeric NOT NULL
) WITH (fillfactor = 80);

-- ---------------------------------------------------------------- what a bucket comes to

-- Numbers that no sum, difference or product with seconds takes out of the range of float8: others are left out there.
CREATE FUNCTION addable(p_value float8) RETURNS float8 LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
$$ SELECT CASE WHEN abs(p_value) <= 1e290 THEN p_value END $$;

-- How far a counter came from one reading to the next: a drop means that it began again at 0.
CREATE FUNCTION counter_step(p_before float8, p_after float8) RETURNS float8 LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
$$ SELECT CASE WHEN addable(p_after) >= addable(p_before) THEN p_after - p_before
               WHEN addable(p_after) < addable(p_before) THEN p_after ELSE 0 END $$;

CREATE FUNCTION seconds_between(p_first timestamptz, p_last timestamptz) RETURNS float8
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
$$ SELECT date_part('epoch', p_last - p_first) $$;

-- Value times seconds. What is nearly nothing is nothing: a product below the range of float8 would be an error.
CREATE FUNCTION area_of(p_value float8, p_seconds float8) RETURNS float8 LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
$$ SELECT CASE WHEN abs(p_value) BETWEEN 1e-290 AND 1e290 THEN p_value * p_seconds ELSE 0 END $$;

-- Where buckets begin: a Monday, so that weeks do too.
CREATE FUNCTION bucket_of(p_width interval, p_ts timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
$$ SELECT date_bin(p_width, p_ts, timestamptz '2000-01-03 00:00:00Z') $$;

-- Readings of one series in [p_from, p_to), by buckets of p_width. Plain SQL, so that it becomes part of the query that
-- asks, with the rights of whoever asks.
CREATE FUNCTION aggregate_readings(p_series int, p_from timestamptz, p_to timestamptz, p_width interval)
RETURNS TABLE (bucket timestamptz, count bigint, sum float8, min float8, max float8, first float8,
    first_ts timestamptz, last float8, last_ts timestamptz, increase float8, area float8, seconds_true float8)
LANGUAGE sql STABLE AS $$
    SELECT b.bucket, count(*), coalesce(sum(addable(b.value)), 0), min(b.value), max(b.value),
           min(b.value) FILTER (WHERE b.is_first), min(b.ts), min(b.value) FILTER (WHERE b.is_last), max(b.ts),
           coalesce(sum(counter_step(b.before, b.value)) FILTER (WHERE NOT b.is_first), 0),
           coalesce(sum(area_of(b.before, b.seconds)) FILTER (WHERE NOT b.is_first), 0),
           coalesce(sum(b.seconds) FILTER (WHERE NOT b.is_first AND b.before <> 0), 0)
    FROM (SELECT r.ts, r.value, r.bucket, lag(r.value) OVER w AS before,
                 seconds_between(lag(r.ts) OVER w, r.ts) AS seconds,
                 coalesce(lag(r.ts) OVER w < r.bucket, true) AS is_first,
                 coalesce(lead(r.ts) OVER w >= r.bucket + p_width, true) AS is_last
          FROM (SELECT x.ts, x.value, bucket_of(p_width, x.ts) AS bucket FROM readings x
                WHERE x.series_id = p_series AND x.ts >= p_from AND x.ts < p_to) r
          WINDOW w AS (ORDER BY r.ts)) b
    GROUP BY b.bucket
$$;

-- The same out of the roll-ups of a finer tier: what their buckets come to, and what happened between two of them.
DO $$
DECLARE v_tier text;
BEGIN
    FOREACH v_tier IN ARRAY ARRAY['rollups_5m', 'rollups_1h'] LOOP
        EXECUTE format('
CREATE FUNCTION aggregate_%1$s(p_series int, p_from timestamptz, p_to timestamptz, p_width interval)
RETURNS TABLE (bucket timestamptz, count bigint, sum float8, min float8, max float8, first float8,
    first_ts timestamptz, last float8, last_ts timestamptz, increase float8, area float8, seconds_true float8)
LANGUAGE sql STABLE AS $f$
    SELECT b.wide, sum(b.count)::bigint, sum(b.sum), min(b.min), max(b.max),
           min(b.first) FILTER (WHERE b.is_first), min(b.first_ts), min(b.last) FILTER (WHERE b.is_last), max(b.last_ts),
           sum(b.increase + CASE WHEN b.is_first THEN 0 ELSE counter_step(b.before, b.first) END),
           sum(b.area + CASE WHEN b.is_first THEN 0 ELSE area_of(b.before, b.seconds) END),
           sum(b.seconds_true + CASE WHEN b.is_first OR b.before = 0 THEN 0 ELSE b.seconds END)
    FROM (SELECT r.*, lag(r.last) OVER w AS before, seconds_between(lag(r.last_ts) OVER w, r.first_ts) AS seconds,
                 coalesce(lag(r.bucket) OVER w < r.wide, true) AS is_first,
                 coalesce(lead(r.bucket) OVER w >= r.wide + p_width, true) AS is_last
          FROM (SELECT x.*, bucket_of(p_width, x.bucket) AS wide FROM %1$I x
                WHERE x.series_id = p_series AND x.bucket >= p_from AND x.bucket < p_to) r
          WINDOW w AS (ORDER BY r.bucket)) b
    GROUP BY b.wide
$f$', v_tier);
    END LOOP;
END $$;

REVOKE ALL ON FUNCTION ensure_rollups FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ensure_rollups TO sluice_worker;
GRANT SELECT ON rollup_state TO sluice_app, sluice_reader;
GRANT SELECT, UPDATE ON rollup_state TO sluice_worker;
GRANT SELECT, INSERT, UPDATE ON rollup_changes TO sluice_worker;
GRANT SELECT, INSERT, DELETE ON rollup_marks, rollups_5m, rollups_1h, rollups_1d TO sluice_worker;
