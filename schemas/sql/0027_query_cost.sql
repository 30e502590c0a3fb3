-- Functions of 0021 again, for less of the processor's time: they answer the same.
--   * Functions in SQL that cannot become part of their caller are parsed and planned at each call; in PL/pgSQL, once.
--   * Counts are added up as float8, which is exact far beyond any of them: sum(bigint) goes through numeric.
--   * Pieces in the order in which buckets follow each other need no second sorting.
--   * What all spans have in common bounds each look-up too: chunks beyond are left out once, and not for each series.

CREATE OR REPLACE FUNCTION kept_from() RETURNS readings_kept LANGUAGE plpgsql STABLE AS $$
DECLARE v_kept readings_kept;
BEGIN
    SELECT coalesce(max(h.dropped_through) FILTER (WHERE h.tier = 'raw'), '-infinity'),
           coalesce(max(h.dropped_through) FILTER (WHERE h.tier = '5m'), '-infinity'),
           coalesce(max(h.dropped_through) FILTER (WHERE h.tier = '1h'), '-infinity'),
           coalesce(max(h.dropped_through) FILTER (WHERE h.tier = '1d'), '-infinity')
    INTO v_kept FROM retention_horizons h;
    RETURN v_kept;
END $$;

CREATE OR REPLACE FUNCTION readings_version(p_series int[], p_to timestamptz) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    RETURN (SELECT concat_ws('.',
        (SELECT coalesce(sum(c.marks), 0) FROM series s JOIN rollup_changes c ON c.series_id = s.series_id
         WHERE s.series_id = ANY (p_series))
        + (SELECT coalesce(sum(m.mark_id), 0) FROM series s JOIN rollup_marks m ON m.series_id = s.series_id
           WHERE s.series_id = ANY (p_series)),
        (SELECT string_agg(h.tier || h.dropped_through, ',' ORDER BY h.tier) FROM retention_horizons h),
        CASE WHEN p_to > t.computed_through THEN concat_ws('.',
            (SELECT coalesce(sum(p.position), 0) FROM log_positions p),
            (SELECT coalesce(sum(e.readings + e.text_readings), 0) FROM erasures e)) END)
    FROM rollup_state t);
END $$;

DROP FUNCTION readings_latest;
DROP FUNCTION readings_aggregated;
DROP FUNCTION whole_of_rollups_5m; DROP FUNCTION short_of_rollups_5m;
DROP FUNCTION whole_of_rollups_1h; DROP FUNCTION short_of_rollups_1h;
DROP FUNCTION whole_of_rollups_1d; DROP FUNCTION short_of_rollups_1d;
DROP FUNCTION readings_between;

-- Readings of one series in [p_from, p_to), by the buckets between p_edges (ascending; the n-th begins at the n-th):
-- what they come to, and what happened between them inside each bucket. p_low and p_high bound those of all
-- series.
CREATE FUNCTION readings_between(p_series int, p_from timestamptz, p_to timestamptz, p_edges timestamptz[],
    p_low timestamptz, p_high timestamptz)
RETURNS TABLE (bucket int, count bigint, sum float8, min float8, max float8, first float8,
    first_ts timestamptz, last float8, last_ts timestamptz, increase float8, area float8, seconds_true float8)
LANGUAGE sql STABLE AS $$
    SELECT b.bucket, count(*), coalesce(sum(addable(b.value)), 0), min(b.value), max(b.value),
           min(b.value) FILTER (WHERE b.is_first), min(b.ts), min(b.value) FILTER (WHERE b.is_last), max(b.ts),
           coalesce(sum(counter_step(b.before, b.value)) FILTER (WHERE NOT b.is_first), 0),
           coalesce(sum(area_of(b.before, b.seconds)) FILTER (WHERE NOT b.is_first), 0),
           coalesce(sum(b.seconds) FILTER (WHERE NOT b.is_first AND b.before <> 0), 0)
    FROM (SELECT r.ts, r.value, r.bucket, lag(r.value) OVER w AS before,
                 seconds_between(lag(r.ts) OVER w, r.ts) AS seconds,
                 coalesce(lag(r.bucket) OVER w < r.bucket, true) AS is_first,
                 coalesce(lead(r.bucket) OVER w > r.bucket, true) AS is_last
          FROM (SELECT x.ts, x.value, width_bucket(x.ts, p_edges) AS bucket FROM readings x
                WHERE x.series_id = p_series AND x.ts >= p_from AND x.ts < p_to
                  AND x.ts >= p_low AND x.ts < p_high ORDER BY x.ts OFFSET 0) r
          WINDOW w AS (ORDER BY r.ts)) b
    GROUP BY b.bucket
$$;

-- What readings_aggregated asks of a tier: whole, stepped (without what a value came to while it stood: the text of whole
-- with what stands behind "or" in the place of what stands behind "held"), and short: functions of their own, so that a
-- session plans each once, under the settings of readings_aggregated. Nothing is looked for in pieces that are not there:
-- what stands behind `OFFSET 0` is gone through from the outside in, and a slot's neighbours are looked up for its two
-- ends alone. The bounds that all series share, beside their own, let the executor leave out every chunk beyond them.
DO $$
DECLARE
    v_tier text;
    v_level text;
    v_whole text := $whole$
CREATE FUNCTION whole_of_%1$s(p_wanted readings_wanted[], p_edges timestamptz[], p_low timestamptz, p_high timestamptz,
    p_raw_low timestamptz, p_raw_high timestamptz, p_first_max timestamptz, p_stop_min timestamptz,
    p_kept readings_kept)
RETURNS TABLE (slot int, buckets int[], counts bigint[], sums float8[], mins float8[], maxs float8[], firsts float8[],
    firsts_ts timestamptz[], lasts float8[], lasts_ts timestamptz[], deltas float8[], deltas_seconds float8[],
    areas float8[], areas_seconds float8[], seconds_true float8[], from_raw bigint, from_rollups bigint,
    is_dirty boolean)
LANGUAGE plpgsql STABLE AS $f$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH wanted AS MATERIALIZED (SELECT * FROM unnest(p_wanted)), flat AS MATERIALIZED (SELECT p_edges AS edges),
        pieces AS (
            SELECT w.slot, width_bucket(t.bucket, (SELECT edges FROM flat)) AS bucket, t.count, t.sum, t.min, t.max,
                   t.first, t.first_ts, t.last, t.last_ts, t.increase, t.area, t.seconds_true, 0::bigint AS raw,
                   t.count AS rolled, w.first AS low, w.stop AS high
            FROM wanted w CROSS JOIN LATERAL (
                SELECT x.* FROM %1$I x WHERE x.series_id = w.series_id AND x.bucket >= w.head AND x.bucket < w.tail
                  AND x.bucket >= p_low AND x.bucket < p_high OFFSET 0) t
            WHERE NOT w.dirty @> t.bucket
            UNION ALL
            SELECT w.slot, width_bucket(x.bucket, (SELECT edges FROM flat)), x.count, x.sum, x.min, x.max, x.first,
                   x.first_ts, x.last, x.last_ts, x.increase, x.area, x.seconds_true, 0, x.count, w.first, w.stop
            FROM wanted w CROSS JOIN LATERAL unnest(w.gone) r CROSS JOIN LATERAL (
                SELECT y.* FROM rollups_5m y WHERE y.series_id = w.series_id AND y.bucket >= lower(r)
                  AND y.bucket <= upper(r) - interval '5 minutes' OFFSET 0) x
            UNION ALL
            SELECT w.slot, width_bucket(x.bucket, (SELECT edges FROM flat)), x.count, x.sum, x.min, x.max, x.first,
                   x.first_ts, x.last, x.last_ts, x.increase, x.area, x.seconds_true, 0, x.count, w.first, w.stop
            FROM wanted w CROSS JOIN LATERAL unnest(w.gone_hours) r CROSS JOIN LATERAL (
                SELECT y.* FROM rollups_1h y WHERE y.series_id = w.series_id AND y.bucket >= lower(r)
                  AND y.bucket <= upper(r) - interval '1 hour' OFFSET 0) x
            UNION ALL
            SELECT w.slot, a.*, a.count, 0, w.first, w.stop
            FROM wanted w CROSS JOIN flat f CROSS JOIN LATERAL unnest(w.raw) r
            CROSS JOIN LATERAL readings_between(w.series_id, lower(r), upper(r), f.edges, p_raw_low, p_raw_high) a
        ), stepped AS (
            SELECT p.*, lag(p.last) OVER o AS before, lag(p.last_ts) OVER o AS before_ts,
                   /*held*/lead(p.first_ts) OVER o AS after_ts,/*or*/
                   coalesce(lag(p.bucket) OVER o < p.bucket, true) AS is_first,
                   coalesce(lead(p.bucket) OVER o > p.bucket, true) AS is_last
            FROM pieces p
            WINDOW o AS (PARTITION BY p.slot ORDER BY p.bucket, p.first_ts
                         ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)
        ), neighbours AS MATERIALIZED (
            -- Each tier tells of what the finer ones before it have no more.
            SELECT w.slot, coalesce(b.value, e.last, f.last, g.last) AS before,
                   coalesce(b.ts, e.last_ts, f.last_ts, g.last_ts) AS before_ts
                   /*held*/, least(a.ts, c.first_ts, d.first_ts, h.first_ts) AS after_ts/*or*/
            FROM wanted w
            LEFT JOIN LATERAL (SELECT x.value, x.ts FROM readings x WHERE x.series_id = w.series_id AND x.ts < w.first
                                 AND x.ts < p_first_max AND x.ts >= (p_kept).readings ORDER BY x.ts DESC LIMIT 1) b ON true
            LEFT JOIN LATERAL (SELECT x.last, x.last_ts FROM rollups_5m x
                               WHERE b.ts IS NULL AND isfinite((p_kept).readings) AND x.series_id = w.series_id
                                 AND x.bucket < least(w.first, (p_kept).readings) AND x.bucket >= (p_kept).minutes
                               ORDER BY x.bucket DESC LIMIT 1) e ON true
            LEFT JOIN LATERAL (SELECT x.last, x.last_ts FROM rollups_1h x
                               WHERE b.ts IS NULL AND e.last_ts IS NULL AND isfinite((p_kept).minutes)
                                 AND x.series_id = w.series_id
                                 AND x.bucket < least(w.first, (p_kept).minutes) AND x.bucket >= (p_kept).hours
                               ORDER BY x.bucket DESC LIMIT 1) f ON true
            LEFT JOIN LATERAL (SELECT x.last, x.last_ts FROM rollups_1d x
                               WHERE b.ts IS NULL AND e.last_ts IS NULL AND f.last_ts IS NULL
                                 AND isfinite((p_kept).hours) AND x.series_id = w.series_id
                                 AND x.bucket < least(w.first, (p_kept).hours) AND x.bucket >= (p_kept).days
                               ORDER BY x.bucket DESC LIMIT 1) g ON true
            /*held*/LEFT JOIN LATERAL (SELECT x.ts FROM readings x WHERE x.series_id = w.series_id AND x.ts >= w.stop
                                         AND x.ts >= p_stop_min
                               ORDER BY x.ts LIMIT 1) a ON true
            LEFT JOIN LATERAL (SELECT x.first_ts FROM rollups_5m x
                               WHERE w.stop < (p_kept).readings AND x.series_id = w.series_id AND x.bucket >= w.stop
                                 AND x.bucket >= (p_kept).minutes
                               ORDER BY x.bucket LIMIT 1) c ON true
            LEFT JOIN LATERAL (SELECT x.first_ts FROM rollups_1h x
                               WHERE w.stop < (p_kept).minutes AND x.series_id = w.series_id AND x.bucket >= w.stop
                                 AND x.bucket >= (p_kept).hours
                               ORDER BY x.bucket LIMIT 1) d ON true
            LEFT JOIN LATERAL (SELECT x.first_ts FROM rollups_1d x
                               WHERE w.stop < (p_kept).hours AND x.series_id = w.series_id AND x.bucket >= w.stop
                                 AND x.bucket >= (p_kept).days
                               ORDER BY x.bucket LIMIT 1) h ON true/*or*/
        ), joined AS (
            -- Looked up for the two ends of a slot alone: as a join, every piece would go through all slots. OFFSET 0,
            -- here and below: each is computed once, not wherever it is used.
            SELECT p.slot, p.bucket, p.count, p.sum, p.min, p.max, p.first, p.first_ts, p.last, p.last_ts, p.increase,
                   p.area, p.seconds_true, p.raw, p.rolled, p.is_first, p.is_last,
                   CASE WHEN p.before_ts IS NULL THEN (SELECT n.before FROM neighbours n WHERE n.slot = p.slot)
                        ELSE p.before END AS value_before,
                   CASE WHEN p.before_ts IS NULL THEN (SELECT n.before_ts FROM neighbours n WHERE n.slot = p.slot)
                        ELSE p.before_ts END AS ts_before
                   /*held*/, CASE WHEN p.after_ts IS NULL THEN (SELECT n.after_ts FROM neighbours n WHERE n.slot = p.slot)
                        ELSE p.after_ts END AS ts_after,
                   greatest(p_edges[p.bucket], p.low) AS low, least(p_edges[p.bucket + 1], p.high) AS high/*or*/
            FROM stepped p ORDER BY p.slot, p.bucket OFFSET 0
        ), held AS (
            SELECT j.*
                   /*held*/, CASE WHEN j.ts_before IS NOT NULL
                        THEN seconds_between(greatest(j.ts_before, j.low), j.first_ts) ELSE 0 END AS seconds_in,
                   CASE WHEN j.is_last AND j.ts_after IS NOT NULL
                        THEN seconds_between(j.last_ts, least(j.ts_after, j.high)) ELSE 0 END AS seconds_out/*or*/
            FROM joined j ORDER BY j.slot, j.bucket OFFSET 0
        ), told AS (
            SELECT h.slot, h.bucket, sum(h.count::float8)::bigint AS count,
                   CASE WHEN addable(min(h.min)) IS NOT NULL AND addable(max(h.max)) IS NOT NULL
                        THEN sum(h.sum) END AS sum,
                   min(h.min) AS min, max(h.max) AS max, min(h.first) FILTER (WHERE h.is_first) AS first,
                   min(h.first_ts) AS first_ts, min(h.last) FILTER (WHERE h.is_last) AS last, max(h.last_ts) AS last_ts,
                   sum(h.increase + counter_step(h.value_before, h.first)) AS delta,
                   sum(seconds_between(coalesce(h.ts_before, h.first_ts), h.last_ts)) AS delta_seconds,
                   /*held*/CASE WHEN addable(min(h.min)) IS NOT NULL AND addable(max(h.max)) IS NOT NULL
                        THEN sum(h.area + coalesce(area_of(h.value_before, h.seconds_in), 0)
                                 + area_of(h.last, h.seconds_out)) END AS area,
                   sum(seconds_between(h.first_ts, h.last_ts) + h.seconds_in + h.seconds_out) AS area_seconds,
                   sum(h.seconds_true + CASE WHEN h.value_before <> 0 THEN h.seconds_in ELSE 0 END
                       + CASE WHEN h.last <> 0 THEN h.seconds_out ELSE 0 END) AS seconds_true,/*or*/
                   sum(h.raw::float8)::bigint AS raw, sum(h.rolled::float8)::bigint AS rolled
            FROM held h GROUP BY h.slot, h.bucket ORDER BY h.slot, h.bucket
        )
        SELECT t.slot, array_agg(t.bucket), array_agg(t.count), array_agg(t.sum), array_agg(t.min), array_agg(t.max),
               array_agg(t.first), array_agg(t.first_ts), array_agg(t.last), array_agg(t.last_ts), array_agg(t.delta),
               array_agg(t.delta_seconds),
               /*held*/array_agg(t.area), array_agg(t.area_seconds), array_agg(t.seconds_true),
               /*or NULL::float8[], NULL::float8[], NULL::float8[],*/
               sum(t.raw)::bigint, sum(t.rolled)::bigint,
               (SELECT NOT isempty(w.dirty) FROM wanted w WHERE w.slot = t.slot)
        FROM told t GROUP BY t.slot ORDER BY t.slot;
END $f$
$whole$;
    v_short text := $short$
CREATE FUNCTION short_of_%1$s(p_wanted readings_wanted[], p_edges timestamptz[], p_low timestamptz, p_high timestamptz,
    p_raw_low timestamptz, p_raw_high timestamptz, p_first_max timestamptz, p_stop_min timestamptz,
    p_kept readings_kept)
RETURNS TABLE (slot int, buckets int[], counts bigint[], sums float8[], mins float8[], maxs float8[], firsts float8[],
    firsts_ts timestamptz[], lasts float8[], lasts_ts timestamptz[], deltas float8[], deltas_seconds float8[],
    areas float8[], areas_seconds float8[], seconds_true float8[], from_raw bigint, from_rollups bigint,
    is_dirty boolean)
LANGUAGE plpgsql STABLE AS $f$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH wanted AS MATERIALIZED (SELECT * FROM unnest(p_wanted)), flat AS MATERIALIZED (SELECT p_edges AS edges),
        pieces AS (
            SELECT w.slot, width_bucket(t.bucket, (SELECT edges FROM flat)) AS bucket, t.count, t.sum, t.min, t.max,
                   0::bigint AS raw, t.count AS rolled
            FROM wanted w CROSS JOIN LATERAL (
                SELECT x.bucket, x.count, x.sum, x.min, x.max FROM %1$I x
                WHERE x.series_id = w.series_id AND x.bucket >= w.head AND x.bucket < w.tail
                  AND x.bucket >= p_low AND x.bucket < p_high OFFSET 0) t
            WHERE NOT w.dirty @> t.bucket
            UNION ALL
            SELECT w.slot, width_bucket(x.bucket, (SELECT edges FROM flat)), x.count, x.sum, x.min, x.max, 0,
                   x.count
            FROM wanted w CROSS JOIN LATERAL unnest(w.gone) r CROSS JOIN LATERAL (
                SELECT y.bucket, y.count, y.sum, y.min, y.max FROM rollups_5m y
                WHERE y.series_id = w.series_id AND y.bucket >= lower(r)
                  AND y.bucket <= upper(r) - interval '5 minutes' OFFSET 0) x
            UNION ALL
            SELECT w.slot, width_bucket(x.bucket, (SELECT edges FROM flat)), x.count, x.sum, x.min, x.max, 0,
                   x.count
            FROM wanted w CROSS JOIN LATERAL unnest(w.gone_hours) r CROSS JOIN LATERAL (
                SELECT y.bucket, y.count, y.sum, y.min, y.max FROM rollups_1h y
                WHERE y.series_id = w.series_id AND y.bucket >= lower(r)
                  AND y.bucket <= upper(r) - interval '1 hour' OFFSET 0) x
            UNION ALL
            SELECT w.slot, a.*, a.count, 0
            FROM wanted w CROSS JOIN LATERAL unnest(w.raw) r CROSS JOIN LATERAL (
                SELECT width_bucket(x.ts, (SELECT edges FROM flat)), count(*) AS count,
                       coalesce(sum(addable(x.value)), 0), min(x.value), max(x.value)
                FROM readings x WHERE x.series_id = w.series_id AND x.ts >= lower(r) AND x.ts < upper(r)
                  AND x.ts >= p_raw_low AND x.ts < p_raw_high GROUP BY 1) a
        ), told AS (
            SELECT p.slot, p.bucket, sum(p.count::float8)::bigint AS count,
                   CASE WHEN addable(min(p.min)) IS NOT NULL AND addable(max(p.max)) IS NOT NULL
                        THEN sum(p.sum) END AS sum,
                   min(p.min) AS min, max(p.max) AS max,
                   sum(p.raw::float8)::bigint AS raw, sum(p.rolled::float8)::bigint AS rolled
            FROM pieces p GROUP BY p.slot, p.bucket ORDER BY p.slot, p.bucket
        )
        SELECT t.slot, array_agg(t.bucket), array_agg(t.count), array_agg(t.sum), array_agg(t.min), array_agg(t.max),
               NULL::float8[], NULL::timestamptz[], NULL::float8[], NULL::timestamptz[], NULL::float8[], NULL::float8[],
               NULL::float8[], NULL::float8[], NULL::float8[], sum(t.raw)::bigint, sum(t.rolled)::bigint,
               (SELECT NOT isempty(w.dirty) FROM wanted w WHERE w.slot = t.slot)
        FROM told t GROUP BY t.slot ORDER BY t.slot;
END $f$
$short$;
    v_stepped text := regexp_replace(v_whole, '/\*held\*/.*?/\*or(.*?)\*/', '\1', 'g');
BEGIN
    FOREACH v_tier IN ARRAY ARRAY['rollups_5m', 'rollups_1h', 'rollups_1d'] LOOP
        EXECUTE format(v_short, v_tier);
        EXECUTE format(v_whole, v_tier);
        EXECUTE format(replace(v_stepped, 'whole_of', 'stepped_of'), v_tier);
        FOREACH v_level IN ARRAY ARRAY['whole', 'stepped', 'short'] LOOP
            EXECUTE format('REVOKE ALL ON FUNCTION %s_of_%s FROM PUBLIC', v_level, v_tier);
            -- Every piece is bounded for all series together: to look again, for each of them, which chunks its own
            -- bounds leave out, would take longer than looking into these.
            IF v_level <> 'short' AND EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
                EXECUTE format('ALTER FUNCTION %s_of_%s SET timescaledb.enable_runtime_exclusion = off',
                               v_level, v_tier);
            END IF;
        END LOOP;
    END LOOP;
END $$;

-- The n-th series in the n-th span [p_from, p_to), by the buckets between p_edges: from roll-ups of p_tier where those
-- are computed and unmarked, from readings everywhere else (everywhere, without a tier). All edges inside the spans are
-- multiples of the tier's width. All of it in the snapshot of the statement that asks. A row for each span in which
-- there is anything, with an element for each bucket that holds readings:
--   delta, delta_seconds   what a counter rose from the reading before each of the bucket's, wherever that one stands,
--                          and how long that took
--   area, area_seconds     value times seconds and seconds, each value until the next reading, as far as the bucket goes
--   seconds_true           the seconds of those during which the value was not 0
-- With p_level `short` only count, sum, min and max; `stepped` has all but area, area_seconds and seconds_true; `whole`
-- has all. Sums are null where a number is beyond all of them. is_dirty: some of it has a mark. A span is cut where
-- nothing tells of its beginning or end any more (earliest_told, latest_told).
CREATE FUNCTION readings_aggregated(p_series int[], p_from timestamptz[], p_to timestamptz[], p_edges timestamptz[],
    p_tier text, p_level text)
RETURNS TABLE (slot int, buckets int[], counts bigint[], sums float8[], mins float8[], maxs float8[], firsts float8[],
    firsts_ts timestamptz[], lasts float8[], lasts_ts timestamptz[], deltas float8[], deltas_seconds float8[],
    areas float8[], areas_seconds float8[], seconds_true float8[], from_raw bigint, from_rollups bigint,
    is_dirty boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    v_piece interval := CASE p_tier WHEN '5m' THEN interval '5 minutes' WHEN '1h' THEN interval '1 hour'
                                    WHEN '1d' THEN interval '1 day' END;
    v_computed timestamptz := '-infinity';
    v_from readings_kept := kept_from();
    v_kept tstzmultirange := tstzmultirange(tstzrange((v_from).readings, NULL));
    v_minutes tstzmultirange := tstzmultirange(tstzrange((v_from).minutes, NULL));
    v_wanted readings_wanted[];
    v_low timestamptz;
    v_high timestamptz;
    v_raw_low timestamptz;
    v_raw_high timestamptz;
    v_first_max timestamptz;
    v_stop_min timestamptz;
BEGIN
    IF p_level NOT IN ('short', 'stepped', 'whole') THEN
        RAISE invalid_parameter_value USING MESSAGE = 'there is no such level';
    END IF;
    IF p_tier IS NOT NULL THEN
        IF v_piece IS NULL THEN
            RAISE invalid_parameter_value USING MESSAGE = 'there is no such tier';
        END IF;
        SELECT s.computed_through INTO v_computed FROM rollup_state s;
    END IF;
    SELECT array_agg(w), min(w.head), max(w.tail), min(lower(w.raw)), max(upper(w.raw)), max(w.first), min(w.stop)
    INTO v_wanted, v_low, v_high, v_raw_low, v_raw_high, v_first_max, v_stop_min
    FROM (
        SELECT u.slot::int, s.series_id, u.first, u.stop, h.head, t.tail, d.dirty,
               (tstzmultirange(tstzrange(u.first, u.stop)) - tstzmultirange(tstzrange(h.head, t.tail))
                   + d.dirty * tstzmultirange(tstzrange(h.head, t.tail))) * v_kept AS raw,
               g.gone * v_minutes AS gone, g.gone - v_minutes AS gone_hours
        FROM (SELECT a.series_id, earliest_told(a.first, p_tier, v_from) AS first,
                     latest_told(a.stop, p_tier, v_from) AS stop, a.slot
              FROM unnest(p_series, p_from, p_to) WITH ORDINALITY AS a (series_id, first, stop, slot)
              WHERE isfinite(a.first) AND isfinite(a.stop) OFFSET 0) u
        JOIN series s ON s.series_id = u.series_id
        CROSS JOIN LATERAL (
            SELECT CASE WHEN p_tier IS NULL THEN u.first
                        WHEN bucket_of(v_piece, u.first) < u.first THEN bucket_of(v_piece, u.first) + v_piece
                        ELSE u.first END AS head) h
        CROSS JOIN LATERAL (
            SELECT CASE WHEN isfinite(v_computed)
                        THEN greatest(bucket_of(v_piece, least(u.stop, v_computed)), h.head) ELSE h.head END AS tail) t
        CROSS JOIN LATERAL (
            SELECT coalesce(range_agg(tstzrange(bucket_of(v_piece, m.first_bucket),
                                                bucket_of(v_piece, m.last_bucket) + v_piece)), '{}') * v_kept AS dirty
            FROM rollup_marks m
            WHERE p_tier IS NOT NULL AND m.series_id = s.series_id
              AND m.last_bucket + v_piece > u.first AND m.first_bucket < u.stop + v_piece) d
        CROSS JOIN LATERAL (
            SELECT CASE WHEN p_tier IS NULL OR u.first >= (v_from).readings THEN '{}' ELSE
                tstzmultirange(tstzrange(u.first, u.stop)) - tstzmultirange(tstzrange(h.head, t.tail)) - v_kept
            END AS gone) g
        WHERE u.first < u.stop) w;
    CASE WHEN p_level = 'whole' AND p_tier = '1d' THEN
        RETURN QUERY SELECT * FROM whole_of_rollups_1d(v_wanted, p_edges, v_low, v_high, v_raw_low, v_raw_high,
            v_first_max, v_stop_min, v_from);
    WHEN p_level = 'whole' AND p_tier = '1h' THEN
        RETURN QUERY SELECT * FROM whole_of_rollups_1h(v_wanted, p_edges, v_low, v_high, v_raw_low, v_raw_high,
            v_first_max, v_stop_min, v_from);
    WHEN p_level = 'whole' THEN
        RETURN QUERY SELECT * FROM whole_of_rollups_5m(v_wanted, p_edges, v_low, v_high, v_raw_low, v_raw_high,
            v_first_max, v_stop_min, v_from);
    WHEN p_level = 'stepped' AND p_tier = '1d' THEN
        RETURN QUERY SELECT * FROM stepped_of_rollups_1d(v_wanted, p_edges, v_low, v_high, v_raw_low, v_raw_high,
            v_first_max, v_stop_min, v_from);
    WHEN p_level = 'stepped' AND p_tier = '1h' THEN
        RETURN QUERY SELECT * FROM stepped_of_rollups_1h(v_wanted, p_edges, v_low, v_high, v_raw_low, v_raw_high,
            v_first_max, v_stop_min, v_from);
    WHEN p_level = 'stepped' THEN
        RETURN QUERY SELECT * FROM stepped_of_rollups_5m(v_wanted, p_edges, v_low, v_high, v_raw_low, v_raw_high,
            v_first_max, v_stop_min, v_from);
    WHEN p_tier = '1d' THEN
        RETURN QUERY SELECT * FROM short_of_rollups_1d(v_wanted, p_edges, v_low, v_high, v_raw_low, v_raw_high,
            v_first_max, v_stop_min, v_from);
    WHEN p_tier = '1h' THEN
        RETURN QUERY SELECT * FROM short_of_rollups_1h(v_wanted, p_edges, v_low, v_high, v_raw_low, v_raw_high,
            v_first_max, v_stop_min, v_from);
    ELSE
        RETURN QUERY SELECT * FROM short_of_rollups_5m(v_wanted, p_edges, v_low, v_high, v_raw_low, v_raw_high,
            v_first_max, v_stop_min, v_from);
    END CASE;
END $$;

-- The newest number and the newest text of each series in [p_from, p_to), if it has any: kind 0 and 1. Planned each
-- time, so that chunks beyond the span are left out once and not for each series again.
CREATE FUNCTION readings_latest(p_series int[], p_from timestamptz, p_to timestamptz)
RETURNS TABLE (series_id int, kind int, ts timestamptz, quality smallint, value float8, text_value text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
BEGIN
    RETURN QUERY EXECUTE '
        SELECT s.series_id, n.* FROM series s CROSS JOIN LATERAL (
            (SELECT 0, x.ts, x.quality, x.value, NULL::text FROM readings x
             WHERE x.series_id = s.series_id AND x.ts >= $2 AND x.ts < $3 ORDER BY x.ts DESC LIMIT 1)
            UNION ALL
            (SELECT 1, x.ts, x.quality, NULL::float8, x.value FROM text_readings x
             WHERE x.series_id = s.series_id AND x.ts >= $2 AND x.ts < $3 ORDER BY x.ts DESC LIMIT 1)) n
        WHERE s.series_id = ANY ($1)'
    USING p_series, p_from, p_to;
END $$;

-- The same, of each series in a span of its own, within bounds that all of them share.
CREATE FUNCTION readings_latest_of_stays(p_series int[], p_from timestamptz[], p_to timestamptz[])
RETURNS TABLE (series_id int, kind int, ts timestamptz, quality smallint, value float8, text_value text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
BEGIN
    RETURN QUERY EXECUTE '
        SELECT s.series_id, n.* FROM unnest($1, $2, $3) u (series_id, first, stop)
        JOIN series s ON s.series_id = u.series_id CROSS JOIN LATERAL (
            (SELECT 0, x.ts, x.quality, x.value, NULL::text FROM readings x
             WHERE x.series_id = s.series_id AND x.ts >= u.first AND x.ts < u.stop AND x.ts >= $4 AND x.ts < $5
             ORDER BY x.ts DESC LIMIT 1)
            UNION ALL
            (SELECT 1, x.ts, x.quality, NULL::float8, x.value FROM text_readings x
             WHERE x.series_id = s.series_id AND x.ts >= u.first AND x.ts < u.stop AND x.ts >= $4 AND x.ts < $5
             ORDER BY x.ts DESC LIMIT 1)) n'
    USING p_series, p_from, p_to, (SELECT min(f) FROM unnest(p_from) f), (SELECT max(t) FROM unnest(p_to) t);
END $$;

REVOKE ALL ON FUNCTION readings_aggregated, readings_latest, readings_latest_of_stays FROM PUBLIC;
GRANT EXECUTE ON FUNCTION readings_aggregated, readings_latest, readings_latest_of_stays TO sluice_app, sluice_reader;
