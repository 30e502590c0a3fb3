-- The pipeline's tables: who may send, what a series is, readings, and the books of what landed.
-- Roles (sluice_app, sluice_ingest, sluice_worker, sluice_reader) come from deploy/sql/bootstrap.sql.
-- Times are timestamptz; ids are UUIDv7 made by the application.

-- The organisation a session acts for. Unset means nothing is seen, never an error.
CREATE FUNCTION current_organisation() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE AS
$$ SELECT nullif(current_setting('sluice.organisation', true), '')::uuid $$;

-- ---------------------------------------------------------------- registry (as far as the pipeline needs it)

CREATE TABLE organisations (
    organisation_id uuid PRIMARY KEY,
    name            text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    -- Readings older than this are refused (too_old); whole days, so that every part computes the same edge.
    raw_retention_days int NOT NULL DEFAULT 396 CHECK (raw_retention_days BETWEEN 1 AND 36600),
    series_max      int NOT NULL DEFAULT 1000000 CHECK (series_max > 0),
    created_at      timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE sites (
    site_id         uuid PRIMARY KEY,
    organisation_id uuid NOT NULL REFERENCES organisations,
    name            text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    timezone        text NOT NULL DEFAULT 'UTC',
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX sites_by_organisation ON sites (organisation_id);

CREATE TABLE devices (
    device_id       uuid PRIMARY KEY,
    organisation_id uuid NOT NULL REFERENCES organisations,
    name            text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    local_id        text NOT NULL CHECK (length(local_id) BETWEEN 1 AND 64),
    status          text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended', 'deleted')),
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX devices_by_organisation ON devices (organisation_id);

-- Where a device stood and from when: moving a device adds a row and touches no reading.
CREATE TABLE device_sites (
    device_id       uuid NOT NULL REFERENCES devices,
    organisation_id uuid NOT NULL REFERENCES organisations,
    site_id         uuid REFERENCES sites,
    valid_from      timestamptz NOT NULL,
    PRIMARY KEY (device_id, valid_from)
);
CREATE INDEX device_sites_by_site ON device_sites (site_id, device_id);

CREATE TABLE credentials (
    credential_id   uuid PRIMARY KEY,
    organisation_id uuid NOT NULL REFERENCES organisations,
    kind            text NOT NULL CHECK (kind IN ('device', 'gateway', 'api_key')),
    device_id       uuid REFERENCES devices,
    site_id         uuid REFERENCES sites,
    token_hash      bytea NOT NULL UNIQUE CHECK (octet_length(token_hash) = 32),
    name            text NOT NULL DEFAULT '',
    scopes          text[] NOT NULL DEFAULT '{}',
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz,
    revoked_at      timestamptz,
    CHECK (CASE kind WHEN 'device' THEN device_id IS NOT NULL AND site_id IS NULL
                     WHEN 'gateway' THEN site_id IS NOT NULL AND device_id IS NULL
                     ELSE device_id IS NULL AND site_id IS NULL END)
);
CREATE INDEX credentials_by_organisation ON credentials (organisation_id);
CREATE INDEX credentials_by_device ON credentials (device_id) WHERE device_id IS NOT NULL;
CREATE INDEX credentials_by_site ON credentials (site_id) WHERE site_id IS NOT NULL;

-- ---------------------------------------------------------------- changes that processes with caches must feel

-- One row that every change locks: epochs become visible in the order they are numbered, which a
-- sequence would not promise.
CREATE TABLE credential_epoch (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    epoch    bigint NOT NULL
) WITH (fillfactor = 20);
INSERT INTO credential_epoch (epoch) VALUES (0);

-- What changed at each epoch: a device (its site or its status) or one credential. Old rows go; a reader
-- that finds a gap forgets everything it has cached.
CREATE TABLE credential_changes (
    epoch      bigint PRIMARY KEY,
    token_hash bytea,
    device_id  uuid,
    changed_at timestamptz NOT NULL DEFAULT now()
);

CREATE FUNCTION credential_changed(p_token_hash bytea, p_device_id uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE v_epoch bigint;
BEGIN
    UPDATE credential_epoch SET epoch = epoch + 1 RETURNING epoch INTO v_epoch;
    INSERT INTO credential_changes (epoch, token_hash, device_id) VALUES (v_epoch, p_token_hash, p_device_id);
    IF v_epoch % 256 = 0 THEN
        DELETE FROM credential_changes WHERE epoch < v_epoch - 10000;
    END IF;
    PERFORM pg_notify('sluice_credentials', v_epoch::text);
END $$;

CREATE FUNCTION on_credential_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM credential_changed(coalesce(NEW.token_hash, OLD.token_hash), NULL);
    IF TG_OP = 'UPDATE' AND NEW.token_hash <> OLD.token_hash THEN
        PERFORM credential_changed(OLD.token_hash, NULL);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER credentials_changed AFTER INSERT OR UPDATE OR DELETE ON credentials
    FOR EACH ROW EXECUTE FUNCTION on_credential_change();

CREATE FUNCTION on_device_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM credential_changed(NULL, coalesce(NEW.device_id, OLD.device_id));
    RETURN NULL;
END $$;
CREATE TRIGGER devices_changed AFTER UPDATE OR DELETE ON devices
    FOR EACH ROW EXECUTE FUNCTION on_device_change();
CREATE TRIGGER device_sites_changed AFTER INSERT OR UPDATE OR DELETE ON device_sites
    FOR EACH ROW EXECUTE FUNCTION on_device_change();

-- ---------------------------------------------------------------- series and readings

CREATE TABLE series (
    series_id       int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    organisation_id uuid NOT NULL REFERENCES organisations,
    device_id       uuid NOT NULL REFERENCES devices,
    metric          text NOT NULL,
    label           text NOT NULL DEFAULT '',
    unit            text NOT NULL DEFAULT '',
    created_at      timestamptz NOT NULL DEFAULT now(),
    UNIQUE (device_id, metric, label)
);
CREATE INDEX series_by_organisation ON series (organisation_id);

DO $$
DECLARE
    v_timescale boolean := EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb');
    v_tail text := CASE WHEN v_timescale THEN '' ELSE ' PARTITION BY RANGE (ts)' END;
BEGIN
    EXECUTE 'CREATE TABLE readings (
        series_id int NOT NULL, quality smallint NOT NULL, ts timestamptz NOT NULL, value float8 NOT NULL,
        PRIMARY KEY (series_id, ts))' || v_tail;
    EXECUTE 'CREATE TABLE text_readings (
        series_id int NOT NULL, quality smallint NOT NULL, ts timestamptz NOT NULL, value text NOT NULL,
        PRIMARY KEY (series_id, ts))' || v_tail;
    IF v_timescale THEN
        PERFORM create_hypertable('readings', 'ts', chunk_time_interval => interval '7 days', create_default_indexes => false);
        PERFORM create_hypertable('text_readings', 'ts', chunk_time_interval => interval '7 days', create_default_indexes => false);
    END IF;
END $$;

-- What a flagged reading loses in its plain row: the time it claimed, when it came, what came with it.
CREATE TABLE reading_notes (
    series_id     int NOT NULL,
    ts            timestamptz NOT NULL,
    organisation_id uuid NOT NULL,
    received_at   timestamptz NOT NULL,
    original_time text,
    original_unit text,
    metadata      jsonb,
    PRIMARY KEY (series_id, ts)
);

-- Without the extension a reading needs its week's partition; Monday to Monday, UTC. Idempotent. Attached, not
-- created in place, so that it neither waits for a landing under way nor holds readers up.
CREATE FUNCTION ensure_week(p_ts timestamptz) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_week timestamptz := date_trunc('week', p_ts, 'UTC');
    v_table text;
    v_name text;
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('sluice ensure_week'));
    FOREACH v_table IN ARRAY ARRAY['readings', 'text_readings'] LOOP
        v_name := v_table || to_char(v_week AT TIME ZONE 'UTC', '"_"IYYY"w"IW');
        CONTINUE WHEN to_regclass(quote_ident(v_name)) IS NOT NULL;
        EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', v_name, v_table);
        EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                       v_table, v_name, v_week, v_week + interval '7 days');
    END LOOP;
END $$;

-- ---------------------------------------------------------------- the log's generations and what has landed of them

CREATE TABLE log_generations (
    source     uuid PRIMARY KEY,
    engine     text NOT NULL CHECK (engine IN ('kafka', 'sqlite')),
    -- What the engine calls this very log (a topic id, a file's own UUID): tells a log made anew under
    -- the same name from the one whose positions stand below.
    identity   text NOT NULL,
    partitions int NOT NULL CHECK (partitions BETWEEN 1 AND 1024),
    created_at timestamptz NOT NULL DEFAULT now(),
    closed_at  timestamptz
);
CREATE UNIQUE INDEX log_generations_one_open ON log_generations ((closed_at IS NULL)) WHERE closed_at IS NULL;

CREATE TABLE log_positions (
    source           uuid NOT NULL REFERENCES log_generations,
    partition        int NOT NULL,
    position         bigint NOT NULL DEFAULT 0,   -- the next record to land
    high_water       timestamptz,                 -- no landed reading of this partition is newer
    received_through timestamptz,                 -- receive time of the newest landed record
    lost             bigint NOT NULL DEFAULT 0,   -- records the log no longer had
    updated_at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, partition)
) WITH (fillfactor = 20);

-- Which records those were: positions first_position up to end_position, which is not among them.
CREATE TABLE log_losses (
    source         uuid NOT NULL REFERENCES log_generations,
    partition      int NOT NULL,
    first_position bigint NOT NULL,
    end_position   bigint NOT NULL CHECK (end_position > first_position),
    noticed_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, partition, first_position)
);

CREATE TABLE landing_workers (
    worker     uuid PRIMARY KEY,
    seen_until timestamptz NOT NULL
);

CREATE TABLE partition_leases (
    source        uuid NOT NULL REFERENCES log_generations,
    partition     int NOT NULL,
    worker        uuid,
    lease_until   timestamptz NOT NULL DEFAULT '-infinity',
    backend_pid   int,           -- the session that writes for the holder; a successor ends it first
    backend_start timestamptz,   -- tells that session from a later one with the same pid
    PRIMARY KEY (source, partition)
) WITH (fillfactor = 20);

-- Renews what p_worker holds, gives back what it says it gave up, and takes what is free up to its fair share.
-- The database's clock decides, for every worker alike. Returns one row a partition held; `taken`: the lease has not
-- been this worker's without a break, and old_pid and old_start name the session that wrote for it last. That one
-- stays named until its successor has ended it and names its own.
CREATE FUNCTION lease_partitions(p_source uuid, p_worker uuid, p_ttl interval, p_releasing int[])
RETURNS TABLE (held int, fair_share int, taken boolean, old_pid int, old_start timestamptz)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_live int;
    v_total int;
    v_share int;
    v_mine int;
BEGIN
    INSERT INTO landing_workers AS w (worker, seen_until) VALUES (p_worker, v_now + p_ttl)
        ON CONFLICT (worker) DO UPDATE SET seen_until = EXCLUDED.seen_until;
    DELETE FROM landing_workers WHERE seen_until < v_now - interval '1 hour';
    SELECT count(*) INTO v_live FROM landing_workers WHERE seen_until >= v_now;
    SELECT count(*) INTO v_total FROM partition_leases l WHERE l.source = p_source;
    v_share := ceil(v_total::numeric / greatest(v_live, 1));

    UPDATE partition_leases l SET worker = NULL, lease_until = '-infinity', backend_pid = NULL, backend_start = NULL
        WHERE l.source = p_source AND l.worker = p_worker AND l.partition = ANY (p_releasing);
    UPDATE partition_leases l SET lease_until = v_now + p_ttl
        WHERE l.source = p_source AND l.worker = p_worker AND l.lease_until >= v_now;
    SELECT count(*) INTO v_mine FROM partition_leases l
        WHERE l.source = p_source AND l.worker = p_worker AND l.lease_until >= v_now;

    RETURN QUERY
    WITH free AS (
        SELECT l.partition FROM partition_leases l
        WHERE l.source = p_source AND l.lease_until < v_now AND l.partition <> ALL (p_releasing)
        ORDER BY l.partition LIMIT greatest(v_share - v_mine, 0) FOR UPDATE SKIP LOCKED
    ), taken AS (
        UPDATE partition_leases l SET worker = p_worker, lease_until = v_now + p_ttl
        FROM free f WHERE l.source = p_source AND l.partition = f.partition
        RETURNING l.partition, l.backend_pid, l.backend_start
    )
    SELECT t.partition, v_share, true, t.backend_pid, t.backend_start FROM taken t
    UNION ALL
    SELECT l.partition, v_share, false, NULL::int, NULL::timestamptz FROM partition_leases l
        WHERE l.source = p_source AND l.worker = p_worker AND l.lease_until >= v_now;
END $$;

-- ---------------------------------------------------------------- the books

-- What became of every reading, per organisation, hour of receipt and where it came from.
CREATE TABLE ledger (
    organisation_id uuid NOT NULL,
    hour            timestamptz NOT NULL,
    source          uuid NOT NULL,
    partition       int NOT NULL,
    received        bigint NOT NULL DEFAULT 0,
    stored          bigint NOT NULL DEFAULT 0,
    duplicates      bigint NOT NULL DEFAULT 0,
    conflicts       bigint NOT NULL DEFAULT 0,
    quarantined     bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (organisation_id, hour, source, partition)
);

-- One row for each record that has anything but stored readings.
CREATE TABLE outcomes (
    source          uuid NOT NULL,
    partition       int NOT NULL,
    position        bigint NOT NULL,
    organisation_id uuid,                     -- null only for a record that names none that can be read
    received_at     timestamptz NOT NULL,
    unreadable      boolean NOT NULL DEFAULT false,   -- the whole record stands in quarantine, however much it was
    duplicates      int NOT NULL DEFAULT 0,
    conflicts       int NOT NULL DEFAULT 0,
    quarantined     int NOT NULL DEFAULT 0,   -- behind the log, of the readings accepted
    refused         int NOT NULL DEFAULT 0,   -- at the door, never part of the accepted
    PRIMARY KEY (source, partition, position)
);

CREATE TABLE quarantine (
    quarantine_id   uuid PRIMARY KEY,
    organisation_id uuid,                -- null only for a record that names none that can be read
    device_id       uuid,
    code            text NOT NULL,
    message         text NOT NULL,
    payload         bytea NOT NULL,      -- what was refused, bounded, without secrets
    request_id      text NOT NULL DEFAULT '',
    received_at     timestamptz NOT NULL,
    quarantined_at  timestamptz NOT NULL DEFAULT now(),
    source          uuid NOT NULL,
    partition       int NOT NULL,
    position        bigint NOT NULL,
    item            int NOT NULL,        -- which reading of the record
    attempts        int NOT NULL DEFAULT 1,
    UNIQUE (source, partition, position, item)
);
CREATE INDEX quarantine_by_organisation ON quarantine (organisation_id, quarantined_at);

-- ---------------------------------------------------------------- who sees what

ALTER TABLE organisations ENABLE ROW LEVEL SECURITY;
ALTER TABLE organisations FORCE ROW LEVEL SECURITY;
DO $$
DECLARE v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['organisations', 'sites', 'devices', 'device_sites', 'credentials', 'series',
                                   'reading_notes', 'ledger', 'outcomes', 'quarantine'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format('CREATE POLICY tenant ON %I TO sluice_app, sluice_reader, sluice_owner
                        USING (organisation_id = current_organisation())
                        WITH CHECK (organisation_id = current_organisation())', v_table);
        EXECUTE format('CREATE POLICY pipeline ON %I TO sluice_ingest, sluice_worker USING (true) WITH CHECK (true)', v_table);
    END LOOP;
END $$;

-- A session of the API that presents a token may see that one credential, before it knows an organisation.
CREATE POLICY presented ON credentials FOR SELECT TO sluice_app
    USING (token_hash = decode(current_setting('sluice.token_hash', true), 'hex'));

-- Who presents one of p_hashes (one token's, under each key); the transaction then acts for its organisation.
CREATE FUNCTION authenticate_api_key(p_hashes bytea[])
RETURNS TABLE (credential_id uuid, organisation_id uuid, scopes text[])
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE v_hash bytea;
BEGIN
    FOREACH v_hash IN ARRAY p_hashes LOOP
        PERFORM set_config('sluice.token_hash', encode(v_hash, 'hex'), true);
        SELECT c.credential_id, c.organisation_id, c.scopes INTO credential_id, organisation_id, scopes
            FROM credentials c
            WHERE c.token_hash = v_hash AND c.kind = 'api_key' AND c.revoked_at IS NULL
              AND (c.expires_at IS NULL OR c.expires_at > now());
        IF FOUND THEN
            PERFORM set_config('sluice.organisation', organisation_id::text, true);
            RETURN NEXT;
            RETURN;
        END IF;
    END LOOP;
END $$;

-- Readings are reached only through the series the session's organisation owns.
CREATE VIEW organisation_readings WITH (security_barrier) AS
    SELECT r.series_id, r.quality, r.ts, r.value FROM readings r
    WHERE r.series_id IN (SELECT s.series_id FROM series s WHERE s.organisation_id = current_organisation());
CREATE VIEW organisation_text_readings WITH (security_barrier) AS
    SELECT r.series_id, r.quality, r.ts, r.value FROM text_readings r
    WHERE r.series_id IN (SELECT s.series_id FROM series s WHERE s.organisation_id = current_organisation());

-- Up to p_each readings of each of p_series in [p_from, p_to), in order of time, after the place (p_after_ts,
-- p_after_series, p_after_kind): kind 0 for numbers, 1 for texts. A function, because a security-barrier view
-- cannot pass ORDER BY and LIMIT on to the chunks: every reading of the span would be read and sorted.
CREATE FUNCTION readings_page(p_series int[], p_from timestamptz, p_to timestamptz, p_descending boolean,
    p_after_ts timestamptz, p_after_series int, p_after_kind int, p_each int)
RETURNS TABLE (series_id int, kind int, ts timestamptz, quality smallint, value float8, text_value text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF p_descending THEN
        RETURN QUERY SELECT r.* FROM series s CROSS JOIN LATERAL (
            (SELECT s.series_id, 0, x.ts, x.quality, x.value, NULL::text FROM readings x
             WHERE x.series_id = s.series_id AND x.ts >= p_from AND x.ts < p_to AND x.ts <= p_after_ts
               AND (x.ts < p_after_ts OR (s.series_id, 0) < (p_after_series, p_after_kind))
             ORDER BY x.ts DESC LIMIT p_each)
            UNION ALL
            (SELECT s.series_id, 1, x.ts, x.quality, NULL::float8, x.value FROM text_readings x
             WHERE x.series_id = s.series_id AND x.ts >= p_from AND x.ts < p_to AND x.ts <= p_after_ts
               AND (x.ts < p_after_ts OR (s.series_id, 1) < (p_after_series, p_after_kind))
             ORDER BY x.ts DESC LIMIT p_each)) r
        WHERE s.series_id = ANY (p_series);
    ELSE
        RETURN QUERY SELECT r.* FROM series s CROSS JOIN LATERAL (
            (SELECT s.series_id, 0, x.ts, x.quality, x.value, NULL::text FROM readings x
             WHERE x.series_id = s.series_id AND x.ts >= p_from AND x.ts < p_to AND x.ts >= p_after_ts
               AND (x.ts > p_after_ts OR (s.series_id, 0) > (p_after_series, p_after_kind))
             ORDER BY x.ts LIMIT p_each)
            UNION ALL
            (SELECT s.series_id, 1, x.ts, x.quality, NULL::float8, x.value FROM text_readings x
             WHERE x.series_id = s.series_id AND x.ts >= p_from AND x.ts < p_to AND x.ts >= p_after_ts
               AND (x.ts > p_after_ts OR (s.series_id, 1) > (p_after_series, p_after_kind))
             ORDER BY x.ts LIMIT p_each)) r
        WHERE s.series_id = ANY (p_series);
    END IF;
END $$;
-- Functions that act with the owner's rights are for the roles that need them.
REVOKE ALL ON FUNCTION readings_page, credential_changed, ensure_week FROM PUBLIC;
GRANT EXECUTE ON FUNCTION readings_page TO sluice_app, sluice_reader;
GRANT EXECUTE ON FUNCTION credential_changed TO sluice_app;
GRANT EXECUTE ON FUNCTION ensure_week TO sluice_worker;

GRANT SELECT, INSERT, UPDATE, DELETE ON organisations, sites, devices, device_sites, credentials TO sluice_app;
GRANT SELECT ON series, reading_notes, ledger, outcomes, quarantine TO sluice_app;
GRANT SELECT ON organisation_readings, organisation_text_readings TO sluice_app, sluice_reader;
GRANT SELECT ON organisations, sites, devices, device_sites, series TO sluice_reader;

GRANT SELECT ON organisations, sites, devices, device_sites, credentials, credential_epoch, credential_changes,
    outcomes TO sluice_ingest;

GRANT SELECT ON organisations, sites, devices, device_sites TO sluice_worker;
GRANT SELECT, INSERT, UPDATE ON series, ledger, outcomes, quarantine, reading_notes, log_positions,
    partition_leases TO sluice_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON landing_workers TO sluice_worker;
GRANT SELECT, INSERT ON readings, text_readings, log_losses TO sluice_worker;
GRANT SELECT ON log_generations, log_positions, log_losses TO sluice_ingest, sluice_app, sluice_worker, sluice_reader;
