-- Devices that name themselves as their site does, over MQTT: whose a prefix is, who may publish under it, and the tray
-- of names that no device has yet. What such a name sends stands in quarantine as `unassigned_device`, under the id
-- that it has in the tray.

-- ---------------------------------------------------------------- who may publish for a site

-- A site's prefix stays its own for good; without a password nobody publishes under it.
CREATE TABLE site_brokers (
    site_id          uuid PRIMARY KEY,
    organisation_id  uuid NOT NULL,
    prefix           text NOT NULL UNIQUE CHECK (prefix ~ '^[a-z2-7]{8}$'),   -- the user name, and a level of topics
    password_hash    text NOT NULL CHECK (password_hash LIKE '$7$%'),         -- as Mosquitto hashes
    temperature_unit text NOT NULL DEFAULT 'C' CHECK (temperature_unit IN ('C', 'F')),
    issued_at        timestamptz NOT NULL DEFAULT now(),
    revoked_at       timestamptz,
    FOREIGN KEY (organisation_id, site_id) REFERENCES sites (organisation_id, site_id) ON DELETE CASCADE
);

CREATE FUNCTION on_site_broker_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM credential_changed(convert_to(coalesce(NEW.prefix, OLD.prefix), 'UTF8'), NULL);
    PERFORM pg_notify('sluice_plants', coalesce(NEW.site_id, OLD.site_id)::text);
    RETURN NULL;
END $$;
CREATE TRIGGER site_brokers_changed AFTER INSERT OR UPDATE OR DELETE ON site_brokers
    FOR EACH ROW EXECUTE FUNCTION on_site_broker_change();

-- Local times of its devices are read in it.
CREATE FUNCTION on_site_zone_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM credential_changed(convert_to(b.prefix, 'UTF8'), NULL) FROM site_brokers b WHERE b.site_id = NEW.site_id;
    RETURN NULL;
END $$;
CREATE TRIGGER sites_zone_changed AFTER UPDATE OF timezone ON sites
    FOR EACH ROW WHEN (OLD.timezone <> NEW.timezone) EXECUTE FUNCTION on_site_zone_change();

-- ---------------------------------------------------------------- the tray

CREATE TABLE unassigned_devices (
    unassigned_id   uuid PRIMARY KEY,      -- and the device's id, where one is made of it
    organisation_id uuid NOT NULL,
    site_id         uuid NOT NULL,
    name            text NOT NULL CHECK (length(name) BETWEEN 1 AND 64),
    format          text NOT NULL,
    first_seen_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at    timestamptz NOT NULL DEFAULT now(),
    -- The device that it turned out to be; null while it waits. No reference: that device may go its own ways.
    device_id       uuid,
    claimed_at      timestamptz,
    FOREIGN KEY (organisation_id, site_id) REFERENCES sites (organisation_id, site_id) ON DELETE CASCADE
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX unassigned_devices_waiting ON unassigned_devices (site_id, name) WHERE device_id IS NULL;
CREATE INDEX unassigned_devices_listed ON unassigned_devices (organisation_id, unassigned_id) WHERE device_id IS NULL;

CREATE INDEX quarantine_unassigned ON quarantine (device_id, received_at)
    WHERE state = 'held' AND code = 'unassigned_device';

-- What a name means is kept by processes: one that leaves the tray means something else.
CREATE FUNCTION on_unassigned_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM credential_changed(NULL, OLD.unassigned_id);
    RETURN NULL;
END $$;
CREATE TRIGGER unassigned_devices_left AFTER UPDATE OF device_id OR DELETE ON unassigned_devices
    FOR EACH ROW EXECUTE FUNCTION on_unassigned_change();

-- The id that a name has in a site's tray, now that it is heard; null where the tray holds p_most others.
CREATE FUNCTION note_unassigned(
    p_id uuid, p_organisation_id uuid, p_site_id uuid, p_name text, p_format text, p_most int
) RETURNS uuid
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE v_id uuid;
BEGIN
    UPDATE unassigned_devices SET last_seen_at = now(), format = p_format
        WHERE site_id = p_site_id AND name = p_name AND device_id IS NULL RETURNING unassigned_id INTO v_id;
    IF FOUND THEN
        RETURN v_id;
    END IF;
    IF (SELECT count(*) FROM unassigned_devices WHERE site_id = p_site_id AND device_id IS NULL) >= p_most THEN
        RETURN NULL;
    END IF;
    INSERT INTO unassigned_devices (unassigned_id, organisation_id, site_id, name, format)
        VALUES (p_id, p_organisation_id, p_site_id, p_name, p_format)
        ON CONFLICT (site_id, name) WHERE device_id IS NULL DO UPDATE SET last_seen_at = now()
        RETURNING unassigned_id INTO v_id;
    RETURN v_id;
END $$;

-- Has what is held of a name replayed as a device's, in the order in which it came: how many rows.
CREATE FUNCTION replay_unassigned(p_unassigned_id uuid, p_device_id uuid) RETURNS int
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE v_rows int;
BEGIN
    UPDATE quarantine q SET device_id = p_device_id, state = 'replaying', changed_at = now(),
        replay_requested_at = now(), replay_id = gen_random_uuid(), replay_due_at = now() + n.nth * interval '1 microsecond'
    FROM (SELECT h.quarantine_id, row_number() OVER (ORDER BY h.received_at, h.item) AS nth FROM quarantine h
          WHERE h.device_id = p_unassigned_id AND h.state = 'held' AND h.code = 'unassigned_device') n
    WHERE q.quarantine_id = n.quarantine_id AND q.state = 'held';
    GET DIAGNOSTICS v_rows = ROW_COUNT;
    IF v_rows > 0 THEN
        PERFORM pg_notify('sluice_replay', '');
    END IF;
    RETURN v_rows;
END $$;

-- The same of a name in the tray of the session's organisation, which leaves it: how many rows, null without such a name.
CREATE FUNCTION claim_unassigned(p_unassigned_id uuid, p_device_id uuid) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE unassigned_devices SET device_id = p_device_id, claimed_at = now()
        WHERE unassigned_id = p_unassigned_id AND device_id IS NULL
          AND EXISTS (SELECT FROM devices d WHERE d.device_id = p_device_id);
    RETURN CASE WHEN FOUND THEN replay_unassigned(p_unassigned_id, p_device_id) END;
END $$;

-- A worker's, every now and then: names that a device of their site has got some other way leave the tray, and what came
-- under way of a name that had left it is replayed. How many rows.
CREATE FUNCTION settle_unassigned() RETURNS int
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE v_rows int;
BEGIN
    UPDATE unassigned_devices u SET device_id = d.device_id, claimed_at = now()
    FROM devices d
    WHERE u.device_id IS NULL AND d.site_id = u.site_id AND d.local_id = u.name AND d.status <> 'deleted';
    SELECT coalesce(sum(replay_unassigned(u.unassigned_id, u.device_id)), 0) INTO v_rows FROM unassigned_devices u
    WHERE u.device_id IS NOT NULL AND EXISTS (
        SELECT FROM quarantine q
        WHERE q.device_id = u.unassigned_id AND q.state = 'held' AND q.code = 'unassigned_device');
    RETURN v_rows;
END $$;

-- A site that is erased takes its tray with it: nobody publishes for it any more, and nothing that is held of its names,
-- or is on its way, stays.
CREATE FUNCTION on_site_erased() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE v_epoch bigint;
BEGIN
    UPDATE site_brokers SET revoked_at = now() WHERE site_id = NEW.site_id AND revoked_at IS NULL;
    UPDATE tombstone_epoch SET epoch = epoch + 1 RETURNING epoch INTO v_epoch;
    INSERT INTO tombstones (site_id, device_id, from_ts, to_ts, organisation_id, epoch)
    SELECT NEW.site_id, u.unassigned_id, '-infinity', 'infinity', NEW.organisation_id, v_epoch
    FROM unassigned_devices u
    WHERE u.site_id = NEW.site_id AND u.device_id IS DISTINCT FROM u.unassigned_id;
    RETURN NULL;
END $$;
CREATE TRIGGER erasures_begun AFTER INSERT ON erasures FOR EACH ROW EXECUTE FUNCTION on_site_erased();

-- ---------------------------------------------------------------- who sees what

DO $$
DECLARE v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['site_brokers', 'unassigned_devices'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format('CREATE POLICY tenant ON %I TO sluice_app, sluice_owner
                        USING (organisation_id = current_organisation())
                        WITH CHECK (organisation_id = current_organisation())', v_table);
        EXECUTE format('CREATE POLICY pipeline ON %I TO sluice_ingest, sluice_worker USING (true) WITH CHECK (true)',
                       v_table);
    END LOOP;
END $$;

REVOKE ALL ON FUNCTION on_site_broker_change, on_site_zone_change, on_unassigned_change, on_site_erased, note_unassigned,
    replay_unassigned, claim_unassigned, settle_unassigned FROM PUBLIC;
GRANT EXECUTE ON FUNCTION note_unassigned TO sluice_ingest;
GRANT EXECUTE ON FUNCTION claim_unassigned TO sluice_app;
GRANT EXECUTE ON FUNCTION settle_unassigned, replay_unassigned TO sluice_worker;

GRANT SELECT, INSERT ON site_brokers TO sluice_app;
GRANT UPDATE (password_hash, temperature_unit, issued_at, revoked_at) ON site_brokers TO sluice_app;
GRANT SELECT ON site_brokers TO sluice_ingest, sluice_worker;
GRANT SELECT, DELETE ON unassigned_devices TO sluice_app;
GRANT SELECT, INSERT, UPDATE (last_seen_at, format) ON unassigned_devices TO sluice_ingest;
GRANT SELECT, DELETE, UPDATE (device_id, claimed_at) ON unassigned_devices TO sluice_worker;
