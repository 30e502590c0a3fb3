-- Readings by the block, for answers that stream a whole span; and how many a span holds, before one begins.

-- Up to p_each readings of each (p_series, p_from, p_to), in order of time: numbers packed as the protocol sends them
-- (8 bytes a time, microseconds since 2000; 2 a quality; 8 a value), and texts beside them. Null where there are none,
-- no row for a series that is not the organisation's.
CREATE FUNCTION readings_blocks(p_series int[], p_from timestamptz[], p_to timestamptz[], p_descending boolean,
    p_each int)
RETURNS TABLE (item int, ts bytea, quality bytea, value bytea, text_ts bytea, text_quality bytea, texts text[])
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF p_descending THEN
        RETURN QUERY SELECT w.item::int, n.*, t.*
        FROM unnest(p_series, p_from, p_to) WITH ORDINALITY AS w (series_id, start, stop, item)
        JOIN series s ON s.series_id = w.series_id
        CROSS JOIN LATERAL (
            SELECT string_agg(timestamptz_send(r.ts), ''), string_agg(int2send(r.quality), ''),
                   string_agg(float8send(r.value), '')
            FROM (SELECT x.ts, x.quality, x.value FROM readings x
                  WHERE x.series_id = s.series_id AND x.ts >= w.start AND x.ts < w.stop
                  ORDER BY x.ts DESC LIMIT p_each) r) n
        CROSS JOIN LATERAL (
            SELECT string_agg(timestamptz_send(r.ts), ''), string_agg(int2send(r.quality), ''), array_agg(r.value)
            FROM (SELECT x.ts, x.quality, x.value FROM text_readings x
                  WHERE x.series_id = s.series_id AND x.ts >= w.start AND x.ts < w.stop
                  ORDER BY x.ts DESC LIMIT p_each) r) t;
    ELSE
        RETURN QUERY SELECT w.item::int, n.*, t.*
        FROM unnest(p_series, p_from, p_to) WITH ORDINALITY AS w (series_id, start, stop, item)
        JOIN series s ON s.series_id = w.series_id
        CROSS JOIN LATERAL (
            SELECT string_agg(timestamptz_send(r.ts), ''), string_agg(int2send(r.quality), ''),
                   string_agg(float8send(r.value), '')
            FROM (SELECT x.ts, x.quality, x.value FROM readings x
                  WHERE x.series_id = s.series_id AND x.ts >= w.start AND x.ts < w.stop
                  ORDER BY x.ts LIMIT p_each) r) n
        CROSS JOIN LATERAL (
            SELECT string_agg(timestamptz_send(r.ts), ''), string_agg(int2send(r.quality), ''), array_agg(r.value)
            FROM (SELECT x.ts, x.quality, x.value FROM text_readings x
                  WHERE x.series_id = s.series_id AND x.ts >= w.start AND x.ts < w.stop
                  ORDER BY x.ts LIMIT p_each) r) t;
    END IF;
END $$;

-- How many readings these are. Counted by index up to p_most and one more; where the roll-ups of whole days come to
-- more already, only those are asked. Beyond p_most, what is told is what there are at least, and no more than p_most
-- of them lie before fits_until.
CREATE FUNCTION readings_estimated(p_series int[], p_from timestamptz[], p_to timestamptz[], p_most bigint)
RETURNS TABLE (readings bigint, fits_until timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_share bigint := greatest(p_most / greatest(cardinality(p_series), 1), 1);
BEGIN
    -- Of days whose readings were dropped for their age, the roll-ups still tell.
    SELECT coalesce(sum(d.count), 0)::bigint INTO readings
        FROM unnest(p_series, p_from, p_to) AS w (series_id, start, stop)
        JOIN series s ON s.series_id = w.series_id
        CROSS JOIN LATERAL (SELECT x.ts FROM readings x
                            WHERE x.series_id = s.series_id AND x.ts >= w.start AND x.ts < w.stop
                            ORDER BY x.ts LIMIT 1) f
        CROSS JOIN LATERAL (SELECT sum(x.count) AS count FROM rollups_1d x
                            WHERE x.series_id = s.series_id AND x.bucket >= f.ts
                              AND x.bucket <= w.stop - interval '1 day') d;
    IF readings <= p_most THEN
        SELECT count(*) INTO readings FROM (
            SELECT FROM unnest(p_series, p_from, p_to) AS w (series_id, start, stop)
            JOIN series s ON s.series_id = w.series_id
            CROSS JOIN LATERAL (
                SELECT FROM readings x WHERE x.series_id = s.series_id AND x.ts >= w.start AND x.ts < w.stop
                UNION ALL
                SELECT FROM text_readings x
                WHERE x.series_id = s.series_id AND x.ts >= w.start AND x.ts < w.stop) r
            LIMIT p_most + 1) counted;
    END IF;
    IF readings > p_most THEN
        SELECT min(r.ts) INTO fits_until
            FROM unnest(p_series, p_from, p_to) AS w (series_id, start, stop)
            JOIN series s ON s.series_id = w.series_id
            CROSS JOIN LATERAL (
                SELECT u.ts FROM (
                    SELECT x.ts FROM readings x WHERE x.series_id = s.series_id AND x.ts >= w.start AND x.ts < w.stop
                    UNION ALL
                    SELECT x.ts FROM text_readings x
                    WHERE x.series_id = s.series_id AND x.ts >= w.start AND x.ts < w.stop) u
                ORDER BY u.ts OFFSET v_share LIMIT 1) r;
    END IF;
    RETURN NEXT;
END $$;

REVOKE ALL ON FUNCTION readings_blocks, readings_estimated FROM PUBLIC;
GRANT EXECUTE ON FUNCTION readings_blocks, readings_estimated TO sluice_app, sluice_reader;
