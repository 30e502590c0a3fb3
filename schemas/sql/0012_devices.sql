-- Requests that their clients named with an Idempotency-Key, and what they were answered: a day long, sealed, because an
-- answer may hold a secret that is shown once.

CREATE TABLE repeats (
    organisation_id uuid NOT NULL REFERENCES organisations,
    caller_id       uuid NOT NULL,                                           -- the API key or the person
    key             bytea NOT NULL CHECK (octet_length(key) = 16),           -- a digest: keys may be secrets
    fingerprint     bytea NOT NULL CHECK (octet_length(fingerprint) = 16),   -- a digest of what was asked
    answer          text NOT NULL DEFAULT '' CHECK (length(answer) <= 1000000),
    made_at         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (organisation_id, caller_id, key)
);
CREATE INDEX repeats_by_age ON repeats (made_at);

ALTER TABLE repeats ENABLE ROW LEVEL SECURITY;
ALTER TABLE repeats FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON repeats TO sluice_app, sluice_owner
    USING (organisation_id = current_organisation()) WITH CHECK (organisation_id = current_organisation());
CREATE POLICY pipeline ON repeats TO sluice_worker USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON repeats TO sluice_app;
GRANT SELECT, DELETE ON repeats TO sluice_worker;

-- Like readings_page, of each series in a span of its own [p_from, p_to): a series comes as often as its device stood
-- somewhere.
CREATE FUNCTION readings_of_stays(p_series int[], p_from timestamptz[], p_to timestamptz[], p_descending boolean,
    p_after_ts timestamptz, p_after_series int, p_after_kind int, p_each int)
RETURNS TABLE (series_id int, kind int, ts timestamptz, quality smallint, value float8, text_value text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF p_descending THEN
        RETURN QUERY SELECT r.* FROM unnest(p_series, p_from, p_to) u(series_id, first, stop)
        JOIN series s ON s.series_id = u.series_id CROSS JOIN LATERAL (
            (SELECT s.series_id, 0, x.ts, x.quality, x.value, NULL::text FROM readings x
             WHERE x.series_id = s.series_id AND x.ts >= u.first AND x.ts < u.stop AND x.ts <= p_after_ts
               AND (x.ts < p_after_ts OR (s.series_id, 0) < (p_after_series, p_after_kind))
             ORDER BY x.ts DESC LIMIT p_each)
            UNION ALL
            (SELECT s.series_id, 1, x.ts, x.quality, NULL::float8, x.value FROM text_readings x
             WHERE x.series_id = s.series_id AND x.ts >= u.first AND x.ts < u.stop AND x.ts <= p_after_ts
               AND (x.ts < p_after_ts OR (s.series_id, 1) < (p_after_series, p_after_kind))
             ORDER BY x.ts DESC LIMIT p_each)) r;
    ELSE
        RETURN QUERY SELECT r.* FROM unnest(p_series, p_from, p_to) u(series_id, first, stop)
        JOIN series s ON s.series_id = u.series_id CROSS JOIN LATERAL (
            (SELECT s.series_id, 0, x.ts, x.quality, x.value, NULL::text FROM readings x
             WHERE x.series_id = s.series_id AND x.ts >= u.first AND x.ts < u.stop AND x.ts >= p_after_ts
               AND (x.ts > p_after_ts OR (s.series_id, 0) > (p_after_series, p_after_kind))
             ORDER BY x.ts LIMIT p_each)
            UNION ALL
            (SELECT s.series_id, 1, x.ts, x.quality, NULL::float8, x.value FROM text_readings x
             WHERE x.series_id = s.series_id AND x.ts >= u.first AND x.ts < u.stop AND x.ts >= p_after_ts
               AND (x.ts > p_after_ts OR (s.series_id, 1) > (p_after_series, p_after_kind))
             ORDER BY x.ts LIMIT p_each)) r;
    END IF;
END $$;
REVOKE ALL ON FUNCTION readings_of_stays FROM PUBLIC;
GRANT EXECUTE ON FUNCTION readings_of_stays TO sluice_app, sluice_reader;
