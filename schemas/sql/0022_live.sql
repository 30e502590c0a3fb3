-- What a stream of readings asks of what has landed. Both act with the owner's rights, through series of the session's
-- organisation alone.

-- Of readings by series, time and whether it is a text: those that stand, by their place in the request.
CREATE FUNCTION stored_readings(p_series int[], p_times timestamptz[], p_texts boolean[])
RETURNS TABLE (item int, quality smallint, value float8, text_value text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    -- Apart from the keys, so that only the chunks they lie in are looked into.
    v_first timestamptz := (SELECT min(t) FROM unnest(p_times) t);
    v_last timestamptz := (SELECT max(t) FROM unnest(p_times) t);
BEGIN
    RETURN QUERY
    SELECT w.item::int, r.quality, r.value, r.text_value
    FROM unnest(p_series, p_times, p_texts) WITH ORDINALITY AS w (series_id, ts, is_text, item)
    JOIN series s ON s.series_id = w.series_id
    CROSS JOIN LATERAL (
        SELECT x.quality, x.value, NULL::text AS text_value FROM readings x
        WHERE NOT w.is_text AND x.series_id = w.series_id AND x.ts = w.ts AND x.ts BETWEEN v_first AND v_last
        UNION ALL
        SELECT x.quality, NULL::float8, x.value FROM text_readings x
        WHERE w.is_text AND x.series_id = w.series_id AND x.ts = w.ts AND x.ts BETWEEN v_first AND v_last) r;
END $$;

-- Where the readings of these records stand that could not stand at their own time.
CREATE FUNCTION readings_moved(p_records uuid[])
RETURNS TABLE (record_id uuid, item int, ts timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    SELECT m.record_id, m.item, m.ts FROM moved_readings m JOIN series s USING (series_id)
    WHERE m.record_id = ANY (p_records)
$$;

REVOKE ALL ON FUNCTION stored_readings, readings_moved FROM PUBLIC;
GRANT EXECUTE ON FUNCTION stored_readings, readings_moved TO sluice_app;
