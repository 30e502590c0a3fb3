-- Erasing a site: what was asked for and how far it has come, and the tombstones that landing consults for good. They
-- hold ids and times, no names, and outlive the site and its devices.

-- ---------------------------------------------------------------- what is erased

-- One row a site; a site is erased once.
CREATE TABLE erasures (
    site_id         uuid PRIMARY KEY,
    organisation_id uuid NOT NULL REFERENCES organisations,
    requested_at    timestamptz NOT NULL DEFAULT now(),
    state           text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'erasing', 'done')),
    -- Where the log ended, by partition, once its tokens were dead: what lands beyond knows the tombstones.
    source          uuid,
    ends            jsonb,
    -- The devices up to this one have nothing left in the tombstoned times.
    erased_through  uuid,
    -- What was removed so far.
    readings        bigint NOT NULL DEFAULT 0,
    text_readings   bigint NOT NULL DEFAULT 0,
    notes           bigint NOT NULL DEFAULT 0,
    quarantined     bigint NOT NULL DEFAULT 0,
    devices         bigint NOT NULL DEFAULT 0,
    finished_at     timestamptz
);
CREATE INDEX erasures_open ON erasures (requested_at) WHERE state <> 'done';
CREATE INDEX erasures_listed ON erasures (organisation_id, requested_at, site_id);

-- Each move of it is a site to be erased: landing writes nothing that was planned before.
CREATE TABLE tombstone_epoch (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    epoch    bigint NOT NULL
) WITH (fillfactor = 20);
INSERT INTO tombstone_epoch (epoch) VALUES (0);

-- No reading of the device with a time in [from_ts, to_ts) is stored, nor kept in quarantine.
CREATE TABLE tombstones (
    site_id         uuid NOT NULL REFERENCES erasures,
    device_id       uuid NOT NULL,
    from_ts         timestamptz NOT NULL,
    to_ts           timestamptz NOT NULL CHECK (to_ts > from_ts),
    organisation_id uuid NOT NULL,
    epoch           bigint NOT NULL,
    PRIMARY KEY (site_id, device_id, from_ts)
);
CREATE INDEX tombstones_by_device ON tombstones (device_id);
CREATE INDEX tombstones_by_epoch ON tombstones (epoch);

-- Series that are gone with their device: rows under such an id are left-overs, and whose is still known.
CREATE TABLE erased_series (
    series_id       int PRIMARY KEY,
    device_id       uuid NOT NULL,
    organisation_id uuid NOT NULL
);

-- The books. A reading that landing drops is `erased`; so is, from then on, what is taken out of the quarantine. What
-- was stored stays booked as stored: how much of it was removed, `erasures` tells.
ALTER TABLE outcomes ADD COLUMN erased int NOT NULL DEFAULT 0;   -- of the readings accepted

DO $$
DECLARE v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['erasures', 'tombstones', 'erased_series'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format('CREATE POLICY tenant ON %I TO sluice_app, sluice_owner
                        USING (organisation_id = current_organisation())
                        WITH CHECK (organisation_id = current_organisation())', v_table);
        EXECUTE format('CREATE POLICY pipeline ON %I TO sluice_worker USING (true) WITH CHECK (true)', v_table);
    END LOOP;
END $$;
GRANT SELECT ON erasures, tombstones TO sluice_app;
GRANT SELECT ON erasures, tombstones, tombstone_epoch, erased_series TO sluice_worker;
GRANT UPDATE (state, source, ends, erased_through, readings, text_readings, notes, quarantined, finished_at)
    ON erasures TO sluice_worker;
GRANT DELETE ON readings, text_readings, reading_notes TO sluice_worker;

-- ---------------------------------------------------------------- told together

-- A site may have any number of devices. Whoever changes many at once tells of their organisation, sets this for the
-- transaction, and spares the processes with caches a change for each.
CREATE FUNCTION changes_are_told() RETURNS boolean LANGUAGE sql STABLE AS
$$ SELECT coalesce(current_setting('sluice.changes_told', true), '') = 'on' $$;

CREATE OR REPLACE FUNCTION on_credential_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF changes_are_told() THEN
        RETURN NULL;
    END IF;
    PERFORM credential_changed(coalesce(NEW.token_hash, OLD.token_hash), NULL);
    IF TG_OP = 'UPDATE' AND NEW.token_hash <> OLD.token_hash THEN
        PERFORM credential_changed(OLD.token_hash, NULL);
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION on_device_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT changes_are_told() THEN
        PERFORM credential_changed(NULL, coalesce(NEW.device_id, OLD.device_id));
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION on_limit_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF changes_are_told() THEN
        RETURN NULL;
    END IF;
    IF coalesce(NEW.device_id, OLD.device_id) IS NOT NULL THEN
        PERFORM credential_changed(NULL, coalesce(NEW.device_id, OLD.device_id));
    ELSE
        PERFORM organisation_changed(coalesce(NEW.organisation_id, OLD.organisation_id));
    END IF;
    RETURN NULL;
END $$;

-- ---------------------------------------------------------------- how it begins

-- Held shared by whoever lets devices stand at sites of the organisation, and alone by whoever erases one: taken first
-- of all, so that neither waits for the other with a device or a site in hand.
CREATE FUNCTION sites_lock() RETURNS bigint LANGUAGE sql STABLE AS
$$ SELECT hashtextextended('sluice sites ' || current_organisation()::text, 0) $$;

-- In the transaction of the caller: hides a site of the session's organisation, writes its tombstones, removes the
-- devices that stand there for good, and ends its tokens and theirs. Whether there was one to hide.
CREATE OR REPLACE FUNCTION begin_site_erasure(p_site_id uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_organisation uuid := current_organisation();
    v_removed uuid[];
    v_epoch bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(sites_lock());
    UPDATE sites SET erasing_since = now(), updated_at = now(), version = version + 1
        WHERE site_id = p_site_id AND erasing_since IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM set_config('sluice.changes_told', 'on', true);
    -- What was to move there will stand nowhere from then on.
    UPDATE device_sites SET site_id = NULL WHERE site_id = p_site_id AND valid_from > now();
    v_removed := ARRAY(
        SELECT h.device_id FROM device_sites h
        WHERE h.site_id = p_site_id AND NOT EXISTS (
            SELECT FROM device_sites n WHERE n.device_id = h.device_id AND n.valid_from > h.valid_from)
        ORDER BY h.device_id);
    UPDATE devices d SET status = 'deleted', deleted_at = now(), online = false, version = d.version + 1,
        updated_at = now()
    FROM (SELECT device_id FROM devices WHERE device_id = ANY (v_removed) ORDER BY device_id FOR NO KEY UPDATE) r
    WHERE d.device_id = r.device_id AND d.status <> 'deleted';
    DELETE FROM device_group_members WHERE device_id = ANY (v_removed);
    UPDATE credentials SET revoked_at = now()
        WHERE revoked_at IS NULL AND (site_id = p_site_id OR device_id = ANY (v_removed));

    INSERT INTO erasures (site_id, organisation_id) VALUES (p_site_id, v_organisation);
    UPDATE tombstone_epoch SET epoch = epoch + 1 RETURNING epoch INTO v_epoch;
    -- What a device measured before it stood anywhere belongs to where it stood first.
    INSERT INTO tombstones (site_id, device_id, from_ts, to_ts, organisation_id, epoch)
    SELECT p_site_id, h.device_id, CASE WHEN h.nth = 1 THEN '-infinity' ELSE h.valid_from END,
           coalesce(h.valid_until, 'infinity'), v_organisation, v_epoch
    FROM (SELECT s.device_id, s.site_id, s.valid_from, row_number() OVER stays AS nth,
                 lead(s.valid_from) OVER stays AS valid_until
          FROM device_sites s
          WHERE s.device_id IN (SELECT o.device_id FROM device_sites o WHERE o.site_id = p_site_id)
          WINDOW stays AS (PARTITION BY s.device_id ORDER BY s.valid_from)) h
    WHERE h.site_id = p_site_id;
    PERFORM organisation_changed(v_organisation);
    PERFORM set_config('sluice.changes_told', '', true);
    RETURN true;
END $$;

-- ---------------------------------------------------------------- how it goes on

-- Takes rows out of the quarantine, held and replaying ones as erased in the books of the hour they came in, and what
-- their records' outcomes say with them. Of those that have left already it removes the words; what is left of them is
-- forgotten with the others of their age. Ledger rows are locked in the order in which landing locks them. How many.
CREATE FUNCTION erase_quarantined(p_site_id uuid, p_ids uuid[]) RETURNS int
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_book record;
    v_gone int := 0;
BEGIN
    UPDATE quarantine SET message = '', request_id = '', note = NULL
        WHERE quarantine_id = ANY (p_ids) AND state NOT IN ('held', 'replaying');
    FOR v_book IN
        WITH gone AS (
            DELETE FROM quarantine q
            WHERE q.quarantine_id = ANY (p_ids) AND q.state IN ('held', 'replaying')
            RETURNING q.source, q.partition, q.position, q.item, q.code = 'conflict' AS met, q.organisation_id,
                date_bin('1 hour', q.received_at, timestamptz '2000-01-01 00:00:00Z') AS hour),
        told AS (
            UPDATE outcomes o
            SET conflicts = o.conflicts - greatest(n.behind - o.quarantined, least(n.met, o.conflicts)),
                quarantined = o.quarantined - n.behind + greatest(n.behind - o.quarantined, least(n.met, o.conflicts)),
                refused = o.refused - n.refused, erased = o.erased + n.behind
            FROM (SELECT g.source, g.partition, g.position, count(*) FILTER (WHERE g.item < 0)::int AS behind,
                         count(*) FILTER (WHERE g.item < 0 AND g.met)::int AS met,
                         count(*) FILTER (WHERE g.item >= 0)::int AS refused
                  FROM gone g GROUP BY 1, 2, 3) n
            WHERE o.source = n.source AND o.partition = n.partition AND o.position = n.position AND NOT o.unreadable)
        SELECT g.source, g.partition, g.organisation_id, g.hour, count(*)::int AS readings,
               count(*) FILTER (WHERE g.met)::int AS met
        FROM gone g GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
    LOOP
        v_gone := v_gone + v_book.readings;
        UPDATE ledger l
        SET conflicts = l.conflicts - greatest(v_book.readings - l.quarantined, least(v_book.met, l.conflicts)),
            quarantined = l.quarantined - v_book.readings
                + greatest(v_book.readings - l.quarantined, least(v_book.met, l.conflicts)),
            erased = l.erased + v_book.readings
        WHERE l.organisation_id = v_book.organisation_id AND l.hour = v_book.hour
          AND l.source = v_book.source AND l.partition = v_book.partition;
    END LOOP;
    UPDATE erasures SET quarantined = quarantined + v_gone WHERE site_id = p_site_id;
    RETURN v_gone;
END $$;

-- One step of taking a site out of the registry, up to p_rows devices or stays of it; true once nothing is left, and
-- the erasure is done. A device of which no time is outside tombstones goes with everything about it; of any other the
-- stays there become stays nowhere, so that the one before ends where it ended. For an erasure whose readings are gone.
CREATE FUNCTION erase_site_rows(p_organisation_id uuid, p_site_id uuid, p_rows int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_requested_at timestamptz;
    v_devices uuid[];
BEGIN
    PERFORM set_config('sluice.organisation', p_organisation_id::text, true),
            set_config('sluice.changes_told', 'on', true);
    SELECT e.requested_at INTO v_requested_at FROM erasures e
        WHERE e.site_id = p_site_id AND e.state = 'erasing' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN true;
    END IF;

    -- Landing holds on to the devices whose series it is making.
    v_devices := ARRAY(
        SELECT d.device_id FROM devices d
        WHERE d.status = 'deleted' AND EXISTS (
            SELECT FROM tombstones t WHERE t.site_id = p_site_id AND t.device_id = d.device_id)
          AND (SELECT range_agg(tstzrange(t.from_ts, t.to_ts)) FROM tombstones t WHERE t.device_id = d.device_id)
              = tstzmultirange(tstzrange('-infinity', 'infinity'))
        ORDER BY d.device_id LIMIT p_rows FOR UPDATE);
    IF v_devices <> '{}' THEN
        INSERT INTO erased_series (series_id, device_id, organisation_id)
            SELECT s.series_id, s.device_id, s.organisation_id FROM series s WHERE s.device_id = ANY (v_devices);
        DELETE FROM series WHERE device_id = ANY (v_devices);
        DELETE FROM device_group_members WHERE device_id = ANY (v_devices);
        DELETE FROM limit_overrides WHERE device_id = ANY (v_devices);
        DELETE FROM credentials WHERE device_id = ANY (v_devices);
        DELETE FROM device_sites WHERE device_id = ANY (v_devices);
        DELETE FROM devices WHERE device_id = ANY (v_devices);
        UPDATE erasures SET devices = devices + cardinality(v_devices) WHERE site_id = p_site_id;
        RETURN false;
    END IF;

    -- The device before its stays, as whoever moves one has it.
    v_devices := ARRAY(
        SELECT d.device_id FROM devices d
        WHERE EXISTS (SELECT FROM device_sites h WHERE h.device_id = d.device_id AND h.site_id = p_site_id)
        ORDER BY d.device_id LIMIT p_rows FOR NO KEY UPDATE);
    IF v_devices <> '{}' THEN
        UPDATE device_sites SET site_id = NULL WHERE site_id = p_site_id AND device_id = ANY (v_devices);
        RETURN false;
    END IF;
    -- Those whose move away has come due and was not settled yet.
    PERFORM settle_device(d.device_id) FROM (
        SELECT device_id FROM devices WHERE site_id = p_site_id ORDER BY device_id LIMIT p_rows) d;
    IF FOUND THEN
        RETURN false;
    END IF;

    -- Nobody can tell which of the answers kept for repeated requests are about the site. That it was done stays known.
    UPDATE repeats SET answer = '' WHERE organisation_id = p_organisation_id AND made_at <= v_requested_at;
    DELETE FROM site_servers WHERE site_id = p_site_id;
    DELETE FROM edge_devices WHERE site_id = p_site_id;
    DELETE FROM limit_overrides WHERE site_id = p_site_id;
    DELETE FROM credentials WHERE site_id = p_site_id;
    DELETE FROM sites WHERE site_id = p_site_id;
    UPDATE erasures SET state = 'done', finished_at = now() WHERE site_id = p_site_id;
    RETURN true;
END $$;

REVOKE ALL ON FUNCTION erase_quarantined, erase_site_rows FROM PUBLIC;
GRANT EXECUTE ON FUNCTION erase_quarantined, erase_site_rows TO sluice_worker;
