-- Retention: how long each organisation keeps what, up to where it has gone, and dropping what nobody keeps any more as
-- whole chunks or partitions. A horizon is a midnight of UTC at which a chunk ends, and never goes back.

-- ---------------------------------------------------------------- how long

-- Of roll-ups, in days; 0: for ever, NULL: as the installation has it. raw_retention_days stands since 0001. None is
-- kept for less long than what it is computed from.
ALTER TABLE organisations
    ADD COLUMN rollups_5m_days int CHECK (rollups_5m_days BETWEEN 0 AND 36600),
    ADD COLUMN rollups_1h_days int CHECK (rollups_1h_days BETWEEN 0 AND 36600),
    ADD COLUMN rollups_1d_days int CHECK (rollups_1d_days BETWEEN 0 AND 36600);

-- ---------------------------------------------------------------- up to where

-- Of times before refused_through nothing is stored any more: landing refuses it as too old. Of those before
-- dropped_through rows may be gone or going: nothing is computed from them again. Of those before deleted_through no
-- row is left but in chunks that go as a whole. What is computed from a tier reaches back as far as it does, at least.
CREATE TABLE retention_horizons (
    organisation_id uuid NOT NULL REFERENCES organisations,
    tier            text NOT NULL CHECK (tier IN ('raw', '5m', '1h', '1d')),
    refused_through timestamptz NOT NULL,
    dropped_through timestamptz NOT NULL DEFAULT '-infinity' CHECK (dropped_through <= refused_through),
    deleted_through timestamptz NOT NULL DEFAULT '-infinity' CHECK (deleted_through <= dropped_through),
    epoch           bigint NOT NULL,   -- of tombstone_epoch, when refused_through moved last
    PRIMARY KEY (organisation_id, tier)
);
CREATE INDEX retention_horizons_by_epoch ON retention_horizons (epoch) WHERE tier = 'raw';

-- announced_xid is an id given out after refused_through was committed everywhere: once no older transaction is in
-- flight, nobody stores anything before it any more.
CREATE TABLE retention_state (
    only_row        boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    announced_epoch bigint NOT NULL DEFAULT 0,
    announced_xid   xid8
);
INSERT INTO retention_state DEFAULT VALUES;

ALTER TABLE retention_horizons ENABLE ROW LEVEL SECURITY;
ALTER TABLE retention_horizons FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON retention_horizons TO sluice_app, sluice_reader, sluice_owner
    USING (organisation_id = current_organisation()) WITH CHECK (organisation_id = current_organisation());
CREATE POLICY pipeline ON retention_horizons TO sluice_worker USING (true) WITH CHECK (true);

-- Moves refused_through on to what is wanted, and with it the epoch of what landing may not store. Whether anything
-- moved: whoever announces it waits until nobody can know less.
CREATE FUNCTION announce_horizons(p_organisations uuid[], p_tiers text[], p_through timestamptz[]) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_epoch bigint;
    v_moved int := 0;
    v_wanted record;
BEGIN
    UPDATE tombstone_epoch SET epoch = epoch + 1 RETURNING epoch INTO v_epoch;
    FOR v_wanted IN
        SELECT * FROM unnest(p_organisations, p_tiers, p_through) AS w (organisation_id, tier, through) ORDER BY 1, 2
    LOOP
        PERFORM set_config('sluice.organisation', v_wanted.organisation_id::text, true);
        INSERT INTO retention_horizons AS h (organisation_id, tier, refused_through, epoch)
            VALUES (v_wanted.organisation_id, v_wanted.tier, v_wanted.through, v_epoch)
            ON CONFLICT (organisation_id, tier) DO UPDATE
            SET refused_through = EXCLUDED.refused_through, epoch = EXCLUDED.epoch
            WHERE h.refused_through < EXCLUDED.refused_through;
        v_moved := v_moved + CASE WHEN FOUND THEN 1 ELSE 0 END;
    END LOOP;
    PERFORM set_config('sluice.organisation', '', true);
    IF v_moved > 0 THEN
        UPDATE retention_state SET announced_epoch = v_epoch, announced_xid = NULL;
    END IF;
    RETURN v_moved > 0;
END $$;

-- ---------------------------------------------------------------- chunks

CREATE FUNCTION retention_tables() RETURNS TABLE (tier text, relation text) LANGUAGE sql IMMUTABLE AS
$$ VALUES ('raw', 'readings'), ('raw', 'text_readings'), ('5m', 'rollups_5m'), ('1h', 'rollups_1h'), ('1d', 'rollups_1d') $$;

-- What those tables consist of, by whichever means they are partitioned: each chunk's name, from when to when, and
-- what it takes on disk.
CREATE FUNCTION retention_chunks()
RETURNS TABLE (tier text, relation text, chunk text, first timestamptz, stop timestamptz, bytes bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp SET datestyle = 'ISO' AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        RETURN QUERY EXECUTE '
            SELECT t.tier, t.relation, format(''%I.%I'', c.chunk_schema, c.chunk_name), c.range_start, c.range_end,
                   coalesce(pg_total_relation_size(to_regclass(format(''%I.%I'', c.chunk_schema, c.chunk_name))), 0)
            FROM retention_tables() t JOIN timescaledb_information.chunks c
                ON c.hypertable_schema = ''public'' AND c.hypertable_name = t.relation
            ORDER BY c.range_start, t.relation';
    ELSE
        RETURN QUERY
            SELECT p.tier, p.relation, p.name, (p.bounds)[1]::timestamptz, (p.bounds)[2]::timestamptz,
                   coalesce(pg_total_relation_size(to_regclass(p.name)), 0)
            FROM (SELECT t.tier, t.relation, format('%I.%I', n.nspname, c.relname) AS name,
                         regexp_match(pg_get_expr(c.relpartbound, c.oid), $x$FROM \('(.+)'\) TO \('(.+)'\)$x$) AS bounds
                  FROM retention_tables() t
                  JOIN pg_inherits i ON i.inhparent = to_regclass(t.relation)
                  JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace) p
            WHERE p.bounds IS NOT NULL ORDER BY 4, 2;
    END IF;
END $$;

-- Alone with a chunk until the end of the transaction, or an error after lock_timeout; false if there is none of that
-- name. A partition cannot go without its table being locked for that moment.
CREATE FUNCTION lock_chunk(p_chunk text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE v_relation text;
BEGIN
    SELECT c.relation INTO v_relation FROM retention_chunks() c WHERE c.chunk = p_chunk;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        EXECUTE format('LOCK TABLE ONLY %I IN ACCESS EXCLUSIVE MODE', v_relation);
    END IF;
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', p_chunk);
    RETURN true;
END $$;

CREATE FUNCTION drop_chunk(p_chunk text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE v_chunk record;
BEGIN
    SELECT * INTO STRICT v_chunk FROM retention_chunks() c WHERE c.chunk = p_chunk;
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        PERFORM drop_chunks(v_chunk.relation::regclass, older_than => v_chunk.stop, newer_than => v_chunk.first);
    ELSE
        EXECUTE format('DROP TABLE %s', p_chunk);
    END IF;
END $$;

-- Drops a chunk before which every organisation's horizon has passed: how many bytes that was, NULL if it is not so or
-- there is none. The horizons are looked at once the chunk is locked, with the rights of whoever sees them all.
CREATE FUNCTION drop_retired(p_chunk text) RETURNS bigint
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE v_chunk record;
BEGIN
    IF NOT lock_chunk(p_chunk) THEN
        RETURN NULL;
    END IF;
    SELECT * INTO v_chunk FROM retention_chunks() c WHERE c.chunk = p_chunk;
    IF NOT FOUND OR EXISTS (
        SELECT FROM organisations o
        LEFT JOIN retention_horizons h ON h.organisation_id = o.organisation_id AND h.tier = v_chunk.tier
        WHERE coalesce(h.dropped_through, '-infinity') < v_chunk.stop
    ) THEN
        RETURN NULL;
    END IF;
    PERFORM drop_chunk(p_chunk);
    RETURN v_chunk.bytes;
END $$;

REVOKE ALL ON FUNCTION announce_horizons, retention_chunks, lock_chunk, drop_chunk, drop_retired FROM PUBLIC;
GRANT EXECUTE ON FUNCTION announce_horizons, retention_chunks, lock_chunk, drop_chunk, drop_retired TO sluice_worker;
GRANT SELECT ON retention_horizons TO sluice_app, sluice_reader;
GRANT SELECT ON retention_horizons, retention_state TO sluice_worker;
GRANT UPDATE (dropped_through, deleted_through) ON retention_horizons TO sluice_worker;
GRANT UPDATE (announced_xid) ON retention_state TO sluice_worker;
