-- The registry beyond what the pipeline needs: what sites and devices say of themselves, where a device stands now,
-- when it was heard last, the servers and edge boxes of a site, and groups of devices.

-- ---------------------------------------------------------------- sites

ALTER TABLE sites
    ADD COLUMN slug       text CHECK (slug ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    -- The first label of its address under the installation's suffix: nobody else's, of any organisation.
    ADD COLUMN host       text CHECK (host ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    ADD COLUMN latitude   float8 CHECK (latitude BETWEEN -90 AND 90),
    ADD COLUMN longitude  float8 CHECK (longitude BETWEEN -180 AND 180),
    ADD COLUMN address    text CHECK (length(address) BETWEEN 1 AND 500),
    ADD COLUMN version    int NOT NULL DEFAULT 1,
    ADD COLUMN updated_at timestamptz NOT NULL DEFAULT now(),
    -- Asked to be erased: from then on nobody sees it; its name and address are free again once it is done.
    ADD COLUMN erasing_since timestamptz,
    ADD CHECK ((latitude IS NULL) = (longitude IS NULL));

-- Who names neither, as the command line does, gets both from the site's id.
CREATE FUNCTION on_site_named() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.slug := coalesce(NEW.slug, 'site-' || right(replace(NEW.site_id::text, '-', ''), 12));
    NEW.host := coalesce(NEW.host, NEW.slug);
    RETURN NEW;
END $$;
CREATE TRIGGER sites_named BEFORE INSERT OR UPDATE ON sites FOR EACH ROW EXECUTE FUNCTION on_site_named();

ALTER TABLE sites NO FORCE ROW LEVEL SECURITY;
UPDATE sites SET version = 1;
ALTER TABLE sites FORCE ROW LEVEL SECURITY;
ALTER TABLE sites ALTER COLUMN slug SET NOT NULL, ALTER COLUMN host SET NOT NULL;
CREATE UNIQUE INDEX sites_slug ON sites (organisation_id, slug);
CREATE UNIQUE INDEX sites_host ON sites (host);

-- The one server that a site may have.
CREATE TABLE site_servers (
    site_id         uuid PRIMARY KEY REFERENCES sites ON DELETE CASCADE,
    organisation_id uuid NOT NULL REFERENCES organisations,
    hardware_id     text NOT NULL CHECK (length(hardware_id) BETWEEN 1 AND 200),
    hostname        text NOT NULL CHECK (length(hostname) BETWEEN 1 AND 253),
    version         text NOT NULL CHECK (length(version) BETWEEN 1 AND 64),
    process_count   int NOT NULL DEFAULT 0 CHECK (process_count BETWEEN 0 AND 100000),
    credential_id   uuid NOT NULL REFERENCES credentials ON DELETE CASCADE,
    registered_at   timestamptz NOT NULL DEFAULT now(),
    heard_at        timestamptz
);

CREATE TABLE edge_devices (
    edge_device_id  uuid PRIMARY KEY,
    site_id         uuid NOT NULL REFERENCES sites ON DELETE CASCADE,
    organisation_id uuid NOT NULL REFERENCES organisations,
    edge_id         text NOT NULL CHECK (length(edge_id) BETWEEN 1 AND 64),
    hardware_id     text NOT NULL CHECK (length(hardware_id) BETWEEN 1 AND 200),
    version         text NOT NULL CHECK (length(version) BETWEEN 1 AND 64),
    credential_id   uuid NOT NULL REFERENCES credentials ON DELETE CASCADE,
    registered_at   timestamptz NOT NULL DEFAULT now(),
    heard_at        timestamptz,
    UNIQUE (site_id, edge_id)
);

-- ---------------------------------------------------------------- devices

ALTER TABLE devices
    ADD COLUMN model        text CHECK (length(model) BETWEEN 1 AND 64),
    ADD COLUMN notes        text NOT NULL DEFAULT '' CHECK (length(notes) <= 4000),
    ADD COLUMN fw_version   text CHECK (length(fw_version) BETWEEN 1 AND 64),
    ADD COLUMN version      int NOT NULL DEFAULT 1,
    ADD COLUMN updated_at   timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN deleted_at   timestamptz,
    -- Where it stands now and until when, as device_sites says: kept here so that a list needs one index.
    ADD COLUMN site_id      uuid REFERENCES sites,
    ADD COLUMN site_until   timestamptz,
    -- When it was heard last, how far apart it is heard as a rule, and until when its silence is none.
    ADD COLUMN last_seen_at timestamptz,
    ADD COLUMN cadence_s    real CHECK (cadence_s >= 0),
    ADD COLUMN online_until timestamptz,
    ADD COLUMN online       boolean NOT NULL DEFAULT false;
ALTER TABLE devices SET (fillfactor = 80);

-- What is heard of a device changes nothing that processes keep of its credentials.
DROP TRIGGER devices_changed ON devices;
CREATE TRIGGER devices_changed AFTER UPDATE OF status, local_id, organisation_id OR DELETE ON devices
    FOR EACH ROW EXECUTE FUNCTION on_device_change();

-- A device's silence means something from then on: after twice as long as it is apart as a rule, a minute at least.
CREATE FUNCTION silent_after(p_last_seen_at timestamptz, p_cadence_s real) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE AS
$$ SELECT p_last_seen_at + greatest(2 * p_cadence_s, 60) * interval '1 second' $$;

-- How far apart it is heard, now that it is heard again: a long gap counts at once, but fourfold at most; a short one
-- little, so that what comes in bursts keeps the distance between them. Below 30 s it makes no difference.
CREATE FUNCTION next_cadence(p_last_seen_at timestamptz, p_cadence_s real, p_seen_at timestamptz) RETURNS real
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN p_last_seen_at IS NULL THEN NULL
        WHEN p_cadence_s IS NULL THEN extract(epoch FROM p_seen_at - p_last_seen_at)
        ELSE greatest(least(extract(epoch FROM p_seen_at - p_last_seen_at), greatest(4 * p_cadence_s, 30)),
                      0.9 * p_cadence_s)
    END::real
$$;

-- The device's name, kept with each of its stays: whose a name is at a site is then one index away.
ALTER TABLE device_sites ADD COLUMN local_id text;

CREATE FUNCTION on_device_stay() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.local_id := (SELECT d.local_id FROM devices d WHERE d.device_id = NEW.device_id);
    RETURN NEW;
END $$;
CREATE TRIGGER device_sites_named BEFORE INSERT ON device_sites FOR EACH ROW EXECUTE FUNCTION on_device_stay();

CREATE FUNCTION on_device_named() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE device_sites SET local_id = NEW.local_id WHERE device_id = NEW.device_id;
    RETURN NULL;
END $$;
CREATE TRIGGER devices_named AFTER UPDATE OF local_id ON devices FOR EACH ROW
    WHEN (OLD.local_id <> NEW.local_id) EXECUTE FUNCTION on_device_named();

DROP TRIGGER device_sites_changed ON device_sites;
CREATE TRIGGER device_sites_changed AFTER INSERT OR DELETE OR UPDATE OF device_id, site_id, valid_from ON device_sites
    FOR EACH ROW EXECUTE FUNCTION on_device_change();

CREATE FUNCTION settle_device(p_device_id uuid) RETURNS void
LANGUAGE sql SET search_path = public, pg_temp AS $$
    UPDATE devices d SET
        site_id = (SELECT h.site_id FROM device_sites h WHERE h.device_id = p_device_id AND h.valid_from <= now()
                   ORDER BY h.valid_from DESC LIMIT 1),
        site_until = (SELECT min(n.valid_from) FROM device_sites n
                      WHERE n.device_id = p_device_id AND n.valid_from > now())
    WHERE d.device_id = p_device_id
$$;

CREATE FUNCTION on_device_sites_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM settle_device(coalesce(NEW.device_id, OLD.device_id));
    RETURN NULL;
END $$;
CREATE TRIGGER device_sites_settled AFTER INSERT OR DELETE OR UPDATE OF device_id, site_id, valid_from ON device_sites
    FOR EACH ROW EXECUTE FUNCTION on_device_sites_change();

ALTER TABLE devices NO FORCE ROW LEVEL SECURITY;
ALTER TABLE device_sites NO FORCE ROW LEVEL SECURITY;
UPDATE devices SET deleted_at = now() WHERE status = 'deleted';
SELECT settle_device(device_id) FROM devices;
UPDATE device_sites h SET local_id = d.local_id FROM devices d WHERE d.device_id = h.device_id;
ALTER TABLE devices FORCE ROW LEVEL SECURITY;
ALTER TABLE device_sites FORCE ROW LEVEL SECURITY;

-- Lists go by device_id, which is the order in which devices were made; one index for each thing they are narrowed by.
CREATE INDEX devices_listed ON devices (organisation_id, device_id) WHERE status <> 'deleted';
CREATE INDEX devices_by_online ON devices (organisation_id, online, device_id) WHERE status <> 'deleted';
CREATE INDEX devices_by_model ON devices (organisation_id, model, online, device_id) WHERE status <> 'deleted';
CREATE INDEX devices_of_site ON devices (site_id, device_id)
    INCLUDE (organisation_id, site_until) WHERE status <> 'deleted';
CREATE INDEX devices_of_site_by_online ON devices (site_id, online, device_id)
    INCLUDE (organisation_id, site_until) WHERE status <> 'deleted';
CREATE INDEX devices_of_site_by_model ON devices (site_id, model, online, device_id)
    INCLUDE (organisation_id, site_until) WHERE status <> 'deleted';
CREATE INDEX device_sites_by_local_id ON device_sites (site_id, local_id);
-- What has come due, for whoever settles it, and for lists until then.
CREATE INDEX devices_moving ON devices (site_until) WHERE site_until IS NOT NULL;
CREATE INDEX devices_falling_silent ON devices (online_until) WHERE online;
DROP INDEX devices_by_organisation;

-- ---------------------------------------------------------------- groups of devices

CREATE TABLE device_groups (
    group_id        uuid PRIMARY KEY,
    organisation_id uuid NOT NULL REFERENCES organisations,
    name            text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    version         int NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    UNIQUE (organisation_id, name)
);
CREATE TABLE device_group_members (
    group_id        uuid NOT NULL REFERENCES device_groups ON DELETE CASCADE,
    device_id       uuid NOT NULL REFERENCES devices,
    organisation_id uuid NOT NULL REFERENCES organisations,
    PRIMARY KEY (group_id, device_id)
);
CREATE INDEX device_group_members_by_device ON device_group_members (device_id);

-- ---------------------------------------------------------------- who sees what

-- What they refer to must be seen as well: foreign keys look past row-level security.
DO $$
DECLARE
    v_table text;
    v_seen text;
BEGIN
    FOR v_table, v_seen IN VALUES
        ('site_servers', 'EXISTS (SELECT FROM sites s WHERE s.site_id = site_servers.site_id)'),
        ('edge_devices', 'EXISTS (SELECT FROM sites s WHERE s.site_id = edge_devices.site_id)'),
        ('device_groups', 'true'),
        ('device_group_members',
         'EXISTS (SELECT FROM device_groups g WHERE g.group_id = device_group_members.group_id)'
         ' AND EXISTS (SELECT FROM devices d WHERE d.device_id = device_group_members.device_id)')
    LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format('CREATE POLICY tenant ON %I TO sluice_app, sluice_reader, sluice_owner
                        USING (organisation_id = current_organisation())
                        WITH CHECK (organisation_id = current_organisation() AND %s)', v_table, v_seen);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %I TO sluice_app', v_table);
    END LOOP;
END $$;

-- A device stands at a site of its own organisation, and a credential belongs to one of its own.
DROP POLICY tenant ON device_sites;
CREATE POLICY tenant ON device_sites TO sluice_app, sluice_reader, sluice_owner
    USING (organisation_id = current_organisation())
    WITH CHECK (organisation_id = current_organisation()
        AND EXISTS (SELECT FROM devices d WHERE d.device_id = device_sites.device_id)
        AND (site_id IS NULL OR EXISTS (SELECT FROM sites s WHERE s.site_id = device_sites.site_id)));
DROP POLICY tenant ON credentials;
CREATE POLICY tenant ON credentials TO sluice_app, sluice_reader, sluice_owner
    USING (organisation_id = current_organisation())
    WITH CHECK (organisation_id = current_organisation()
        AND (device_id IS NULL OR EXISTS (SELECT FROM devices d WHERE d.device_id = credentials.device_id))
        AND (site_id IS NULL OR EXISTS (SELECT FROM sites s WHERE s.site_id = credentials.site_id)));

-- The worker hears devices, lets them fall silent, and settles the moves that have come due.
GRANT UPDATE (last_seen_at, cadence_s, online_until, online, site_id, site_until) ON devices TO sluice_worker;
