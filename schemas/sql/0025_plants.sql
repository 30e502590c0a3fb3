-- Plants: devices with a serial number, a lifecycle and security of their own; the templates that say how what they
-- send is decoded; what they alarm of; and commands, which any device may be given.

-- ---------------------------------------------------------------- templates

-- Those that come with the system are everybody's to use and nobody's to change.
CREATE TABLE system_templates (
    template_id uuid PRIMARY KEY,
    name        text NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 200),
    level       text NOT NULL CHECK (level IN ('PLANT', 'DEVICE')),
    type        text NOT NULL CHECK (type IN ('CABINET', 'METER', 'INVERTER', 'BATTERY')),
    signals     jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(signals) = 'array'),
    actions     jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(actions) = 'array'),
    version     int NOT NULL DEFAULT 1,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE templates (
    template_id     uuid PRIMARY KEY,
    organisation_id uuid NOT NULL REFERENCES organisations,
    name            text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    level           text NOT NULL CHECK (level IN ('PLANT', 'DEVICE')),
    type            text NOT NULL CHECK (type IN ('CABINET', 'METER', 'INVERTER', 'BATTERY')),
    signals         jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(signals) = 'array'),
    actions         jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(actions) = 'array'),
    version         int NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    UNIQUE (organisation_id, name),
    UNIQUE (organisation_id, template_id)
);

-- Both, as whoever asks may see them.
CREATE VIEW known_templates WITH (security_invoker = true) AS
    SELECT template_id, organisation_id, false AS is_system, name, level, type, signals, actions, version,
           created_at, updated_at FROM templates
    UNION ALL
    SELECT template_id, NULL, true, name, level, type, signals, actions, version, created_at, updated_at
    FROM system_templates;

-- A signal is a bit of the raw mask, or a field of the values; an action is a bit that a command sets.
INSERT INTO system_templates (template_id, name, level, type, signals, actions) VALUES
('01900000-0000-7000-8000-000000000001', 'Cabinet', 'PLANT', 'CABINET',
 '[{"name": "grid_present", "bit": 0}, {"name": "main_breaker_closed", "bit": 1},
   {"name": "surge_protection_ok", "bit": 2}, {"name": "door_open", "bit": 3}, {"name": "smoke", "bit": 4},
   {"name": "leak", "bit": 5}, {"name": "over_temperature", "bit": 6}, {"name": "battery_backup", "bit": 7}]',
 '[{"name": "main_breaker", "bit": 0}, {"name": "load", "bit": 1}]'),
('01900000-0000-7000-8000-000000000002', 'Meter', 'DEVICE', 'METER',
 '[{"name": "power", "field": "power", "unit": "W"}, {"name": "energy_imported", "field": "imported", "unit": "kWh"},
   {"name": "energy_exported", "field": "exported", "unit": "kWh"}]', '[]'),
('01900000-0000-7000-8000-000000000003', 'Inverter', 'DEVICE', 'INVERTER',
 '[{"name": "power", "field": "power", "unit": "W"}, {"name": "energy_produced", "field": "produced", "unit": "kWh"}]',
 '[]'),
('01900000-0000-7000-8000-000000000004', 'Battery', 'DEVICE', 'BATTERY',
 '[{"name": "power", "field": "power", "unit": "W"}, {"name": "level", "field": "soc", "unit": "%"}]', '[]');

-- ---------------------------------------------------------------- plants

CREATE TABLE plants (
    device_id       uuid PRIMARY KEY,
    organisation_id uuid NOT NULL,
    serial_number   text NOT NULL CHECK (length(serial_number) BETWEEN 1 AND 50),
    type            text NOT NULL CHECK (type IN ('SENSOR', 'ACTUATOR', 'GATEWAY', 'CONTROLLER')),
    auth_method     text NOT NULL CHECK (auth_method IN ('MTLS', 'TOKEN', 'PASSWORD')),
    lifecycle       text NOT NULL DEFAULT 'PENDING'
        CHECK (lifecycle IN ('PENDING', 'ACTIVE', 'SUSPENDED', 'DECOMMISSIONED')),
    activated_at    timestamptz,
    deleted_at      timestamptz,          -- as its device's: its serial number is free again
    metadata        jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    external_id     text CHECK (length(external_id) BETWEEN 1 AND 120),
    template_id     uuid,
    system_template_id uuid REFERENCES system_templates,
    description     text CHECK (length(description) <= 4000),
    tag             text CHECK (length(tag) <= 120),
    latitude        float8 CHECK (latitude BETWEEN -90 AND 90),
    longitude       float8 CHECK (longitude BETWEEN -180 AND 180),
    capacity_kwh    float8 CHECK (capacity_kwh >= 0),
    fve_peak_power_kwp float8 CHECK (fve_peak_power_kwp >= 0),
    plant_with_load boolean,
    config_enabled  boolean,
    esi_state       text CHECK (length(esi_state) BETWEEN 1 AND 64),

    -- The keys of its signatures: sealed under SLUICE_SECRET_KEYS. The one before is good until that time.
    secret              text,
    former_secret       text,
    former_secret_until timestamptz,
    secret_rotated_at   timestamptz,
    -- What the broker knows it by, a password or the one token that lives, as Mosquitto hashes passwords.
    broker_password       text CHECK (broker_password LIKE '$7$%'),
    broker_password_until timestamptz,
    token_id              uuid,
    -- Of its newest certificate.
    certificate_fingerprint   text,
    certificate_serial_number text,
    certificate_expires_at    timestamptz,
    certificate_revoked_at    timestamptz,
    auth_failures         int NOT NULL DEFAULT 0 CHECK (auth_failures >= 0),
    last_auth_failure_at  timestamptz,

    FOREIGN KEY (organisation_id, device_id) REFERENCES devices (organisation_id, device_id)
        ON UPDATE CASCADE ON DELETE CASCADE,
    FOREIGN KEY (organisation_id, template_id) REFERENCES templates (organisation_id, template_id),
    CHECK (template_id IS NULL OR system_template_id IS NULL)
);
ALTER TABLE plants SET (fillfactor = 80);
CREATE UNIQUE INDEX plants_serial_number ON plants (organisation_id, serial_number) WHERE deleted_at IS NULL;
CREATE INDEX plants_listed ON plants (organisation_id, device_id) WHERE deleted_at IS NULL;
CREATE INDEX plants_by_method ON plants (organisation_id, auth_method, device_id) WHERE deleted_at IS NULL;
CREATE INDEX plants_with_certificates ON plants (organisation_id, certificate_expires_at)
    WHERE certificate_fingerprint IS NOT NULL AND deleted_at IS NULL;
CREATE INDEX plants_with_former_secrets ON plants (former_secret_until) WHERE former_secret IS NOT NULL;

-- What a plant was given when it was provisioned, sealed, for a day.
CREATE TABLE plant_packages (
    device_id       uuid PRIMARY KEY,
    organisation_id uuid NOT NULL,
    sealed          text NOT NULL CHECK (length(sealed) <= 100000),
    expires_at      timestamptz NOT NULL,
    FOREIGN KEY (organisation_id, device_id) REFERENCES devices (organisation_id, device_id)
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE INDEX plant_packages_by_age ON plant_packages (expires_at);

CREATE TABLE plant_alerts (
    alert_id        uuid PRIMARY KEY,
    organisation_id uuid NOT NULL,
    device_id       uuid NOT NULL,
    type            text NOT NULL CHECK (length(type) BETWEEN 1 AND 64),
    severity        text NOT NULL CHECK (severity IN ('INFO', 'WARNING', 'CRITICAL')),
    status          text NOT NULL DEFAULT 'ACTIVE' CHECK (status IN ('ACTIVE', 'ACKNOWLEDGED', 'RESOLVED')),
    message         text NOT NULL CHECK (length(message) <= 1000),
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    acknowledged_at timestamptz,
    acknowledged_by text CHECK (length(acknowledged_by) <= 254),
    resolved_at     timestamptz,
    FOREIGN KEY (organisation_id, device_id) REFERENCES devices (organisation_id, device_id)
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE INDEX plant_alerts_listed ON plant_alerts (device_id, created_at);
-- The same alarm again, as QoS 1 and impatient devices send it, is the same alert while that is open.
CREATE UNIQUE INDEX plant_alerts_open ON plant_alerts (device_id, type, md5(message)) WHERE status <> 'RESOLVED';

-- Opens an alert on a plant, under an id of the caller's, or finds the same one open: its id. NULL: no such plant.
CREATE FUNCTION open_plant_alert(p_alert_id uuid, p_device_id uuid, p_type text, p_severity text, p_message text)
RETURNS uuid LANGUAGE sql SET search_path = public, pg_temp AS $$
    INSERT INTO plant_alerts AS a (alert_id, organisation_id, device_id, type, severity, message)
    SELECT p_alert_id, p.organisation_id, p.device_id, p_type, p_severity, p_message FROM plants p
    WHERE p.device_id = p_device_id AND p.deleted_at IS NULL
    ON CONFLICT (device_id, type, md5(message)) WHERE status <> 'RESOLVED'
        DO UPDATE SET severity = EXCLUDED.severity, updated_at = now()
    RETURNING a.alert_id
$$;

-- ---------------------------------------------------------------- commands

CREATE TABLE commands (
    command_id      uuid PRIMARY KEY,      -- goes with it to the device, and comes back
    organisation_id uuid NOT NULL,
    device_id       uuid NOT NULL,
    command         text NOT NULL CHECK (length(command) BETWEEN 1 AND 255),
    payload         jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(payload) = 'object'),
    target          text CHECK (target ~ '^[A-Z0-9_-]{1,32}$'),
    state           text NOT NULL DEFAULT 'PENDING'
        CHECK (state IN ('PENDING', 'SENT', 'ACKNOWLEDGED', 'SUCCESS', 'FAILED', 'TIMEOUT')),
    response        jsonb,
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz NOT NULL,
    sent_at         timestamptz,
    acked_at        timestamptz,
    finished_at     timestamptz,
    FOREIGN KEY (organisation_id, device_id) REFERENCES devices (organisation_id, device_id)
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE INDEX commands_listed ON commands (device_id, command_id);
CREATE INDEX commands_waiting ON commands (command_id) WHERE state = 'PENDING';
CREATE INDEX commands_open ON commands (expires_at) WHERE state IN ('PENDING', 'SENT', 'ACKNOWLEDGED');
CREATE INDEX commands_open_of_device ON commands (device_id) WHERE state IN ('PENDING', 'SENT', 'ACKNOWLEDGED');

CREATE FUNCTION on_command() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('sluice_commands', NEW.command_id::text);
    RETURN NULL;
END $$;
CREATE TRIGGER commands_told AFTER INSERT ON commands FOR EACH ROW EXECUTE FUNCTION on_command();

-- The way of a command: each says whether it went that step. PENDING → SENT; again for one that is sent again.
CREATE FUNCTION command_sent(p_command_id uuid) RETURNS boolean
LANGUAGE sql SET search_path = public, pg_temp AS $$
    WITH gone AS (
        UPDATE commands SET state = 'SENT', sent_at = coalesce(sent_at, now())
        WHERE command_id = p_command_id AND state IN ('PENDING', 'SENT') RETURNING 1)
    SELECT EXISTS (SELECT FROM gone)
$$;

-- → ACKNOWLEDGED, by its device. It may answer sooner than it was noted that the command is sent.
CREATE FUNCTION command_acknowledged(p_device_id uuid, p_command_id uuid) RETURNS boolean
LANGUAGE sql SET search_path = public, pg_temp AS $$
    WITH gone AS (
        UPDATE commands SET state = 'ACKNOWLEDGED', sent_at = coalesce(sent_at, now()), acked_at = now()
        WHERE command_id = p_command_id AND device_id = p_device_id AND state IN ('PENDING', 'SENT') RETURNING 1)
    SELECT EXISTS (SELECT FROM gone)
$$;

-- → SUCCESS or FAILED, by its device, which need not have acknowledged it before.
CREATE FUNCTION command_finished(p_device_id uuid, p_command_id uuid, p_state text, p_response jsonb) RETURNS boolean
LANGUAGE sql SET search_path = public, pg_temp AS $$
    WITH gone AS (
        UPDATE commands SET state = p_state, response = p_response, finished_at = now(),
            sent_at = coalesce(sent_at, now()), acked_at = coalesce(acked_at, now())
        WHERE command_id = p_command_id AND device_id = p_device_id AND p_state IN ('SUCCESS', 'FAILED')
          AND state IN ('PENDING', 'SENT', 'ACKNOWLEDGED') RETURNING 1)
    SELECT EXISTS (SELECT FROM gone)
$$;

-- → TIMEOUT, up to p_rows whose time is over: how many.
CREATE FUNCTION commands_timed_out(p_rows int) RETURNS int
LANGUAGE sql SET search_path = public, pg_temp AS $$
    WITH gone AS (
        UPDATE commands c SET state = 'TIMEOUT', finished_at = now()
        FROM (SELECT command_id FROM commands
              WHERE state IN ('PENDING', 'SENT', 'ACKNOWLEDGED') AND expires_at <= now()
              ORDER BY expires_at LIMIT p_rows FOR NO KEY UPDATE SKIP LOCKED) due
        WHERE c.command_id = due.command_id RETURNING 1)
    SELECT count(*)::int FROM gone
$$;

-- ---------------------------------------------------------------- groups, as plants have them

ALTER TABLE device_groups ADD COLUMN description text NOT NULL DEFAULT '' CHECK (length(description) <= 1000);

-- ---------------------------------------------------------------- who sees what

DO $$
DECLARE v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['templates', 'plants', 'plant_packages', 'plant_alerts', 'commands'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format('CREATE POLICY tenant ON %I TO sluice_app, sluice_owner
                        USING (organisation_id = current_organisation())
                        WITH CHECK (organisation_id = current_organisation())', v_table);
        EXECUTE format('CREATE POLICY pipeline ON %I TO sluice_ingest, sluice_worker USING (true) WITH CHECK (true)',
                       v_table);
    END LOOP;
END $$;

GRANT SELECT ON system_templates, known_templates TO sluice_app, sluice_ingest, sluice_worker;
GRANT SELECT, INSERT, DELETE ON templates TO sluice_app;
GRANT SELECT ON templates TO sluice_ingest, sluice_worker;
GRANT SELECT, INSERT ON plants TO sluice_app;
GRANT UPDATE (serial_number, type, auth_method, lifecycle, activated_at, deleted_at, metadata, external_id, template_id,
    system_template_id, description, tag, latitude, longitude, capacity_kwh, fve_peak_power_kwp, plant_with_load,
    config_enabled, esi_state, secret, former_secret, former_secret_until, secret_rotated_at, broker_password,
    broker_password_until, token_id, certificate_fingerprint, certificate_serial_number, certificate_expires_at,
    certificate_revoked_at) ON plants TO sluice_app;
GRANT SELECT ON plants TO sluice_ingest, sluice_worker;
GRANT UPDATE (auth_failures, last_auth_failure_at) ON plants TO sluice_ingest, sluice_worker;
GRANT UPDATE (former_secret, former_secret_until, config_enabled, esi_state, description, capacity_kwh,
    fve_peak_power_kwp, plant_with_load) ON plants TO sluice_worker;
GRANT SELECT, INSERT, DELETE ON plant_packages TO sluice_app;
GRANT SELECT, DELETE ON plant_packages TO sluice_worker;
GRANT SELECT ON plant_alerts TO sluice_app;
GRANT SELECT, INSERT, UPDATE ON plant_alerts TO sluice_worker;
GRANT SELECT, INSERT, UPDATE (state, response, finished_at) ON commands TO sluice_app;
GRANT SELECT, UPDATE ON commands TO sluice_worker;

-- ---------------------------------------------------------------- what follows from a change

-- Whoever keeps what the broker or a signature needs is told: processes with caches by the epoch, the broker's by name.
CREATE FUNCTION on_plant_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NOT changes_are_told() THEN
        PERFORM credential_changed(NULL, NEW.device_id);
    END IF;
    PERFORM pg_notify('sluice_plants', coalesce(NEW.device_id, OLD.device_id)::text);
    RETURN NULL;
END $$;
REVOKE ALL ON FUNCTION on_plant_change FROM PUBLIC;
CREATE TRIGGER plants_told AFTER INSERT OR DELETE OR UPDATE OF organisation_id, auth_method, lifecycle, deleted_at,
    template_id, system_template_id, secret, former_secret, broker_password, broker_password_until,
    certificate_fingerprint, certificate_revoked_at
    ON plants FOR EACH ROW EXECUTE FUNCTION on_plant_change();

-- A plant goes with its device, whichever face it was deleted on, and so does all that is secret of it.
CREATE FUNCTION on_plant_device_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE plants SET deleted_at = now(), lifecycle = 'DECOMMISSIONED', secret = NULL, former_secret = NULL,
        former_secret_until = NULL, broker_password = NULL, broker_password_until = NULL, token_id = NULL,
        certificate_revoked_at = CASE WHEN certificate_fingerprint IS NULL THEN NULL
                                      ELSE coalesce(certificate_revoked_at, now()) END
    WHERE device_id = NEW.device_id AND deleted_at IS NULL;
    IF FOUND THEN
        DELETE FROM plant_packages WHERE device_id = NEW.device_id;
    END IF;
    UPDATE commands SET state = 'FAILED', finished_at = now(), response = '{"reason": "the device was deleted"}'
    WHERE device_id = NEW.device_id AND state IN ('PENDING', 'SENT', 'ACKNOWLEDGED');
    RETURN NULL;
END $$;
CREATE TRIGGER devices_plant_deleted AFTER UPDATE OF status ON devices FOR EACH ROW
    WHEN (NEW.status = 'deleted' AND OLD.status <> 'deleted') EXECUTE FUNCTION on_plant_device_deleted();

-- ---------------------------------------------------------------- to another organisation

-- Which organisations a device was of before: what they sent for it may still be in the log, and is its own.
CREATE TABLE former_owners (
    device_id       uuid NOT NULL,
    organisation_id uuid NOT NULL REFERENCES organisations,
    until           timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (device_id, organisation_id)
);
ALTER TABLE former_owners ENABLE ROW LEVEL SECURITY;
ALTER TABLE former_owners FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON former_owners TO sluice_owner
    USING (organisation_id = current_organisation()) WITH CHECK (organisation_id = current_organisation());
CREATE POLICY pipeline ON former_owners TO sluice_worker USING (true);
GRANT SELECT ON former_owners TO sluice_worker;

-- The books tell under whose name a reading was received, for good. What stands in quarantine goes with its device, and
-- with it the part of the books that its leaving is told in.
ALTER TABLE ledger
    ADD COLUMN handed_over bigint NOT NULL DEFAULT 0,   -- of conflicts and quarantined: gone with their device
    ADD COLUMN taken_over  bigint NOT NULL DEFAULT 0;   -- beside them: come with a device, received by another

-- Whatever refers to a device as its organisation's follows it.
DO $$
DECLARE
    v_key record;
    v_table text;
    v_tables text[];
BEGIN
    SELECT array_agg(DISTINCT c.conrelid::regclass::text) INTO v_tables FROM pg_constraint c
        WHERE c.contype = 'f' AND c.confrelid = 'devices'::regclass AND cardinality(c.conkey) = 2
          AND c.confupdtype <> 'c';
    -- Otherwise the owner would see no row, and look them up one by one.
    FOREACH v_table IN ARRAY v_tables || 'devices'::text LOOP
        EXECUTE format('ALTER TABLE %s NO FORCE ROW LEVEL SECURITY', v_table);
    END LOOP;
    FOR v_key IN
        SELECT c.conrelid::regclass::text AS referring, c.conname, pg_get_constraintdef(c.oid) AS definition
        FROM pg_constraint c
        WHERE c.contype = 'f' AND c.confrelid = 'devices'::regclass AND cardinality(c.conkey) = 2
          AND c.confupdtype <> 'c' ORDER BY 1, 2
    LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I, ADD CONSTRAINT %I %s ON UPDATE CASCADE',
                       v_key.referring, v_key.conname, v_key.conname, v_key.definition);
    END LOOP;
    FOREACH v_table IN ARRAY v_tables || 'devices'::text LOOP
        EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', v_table);
    END LOOP;
END $$;

-- What arrives at an organisation is written by the function below alone, with the owner's rights.
CREATE FUNCTION arriving_organisation() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE AS
$$ SELECT nullif(current_setting('sluice.arriving', true), '')::uuid $$;
DO $$
DECLARE v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['devices', 'quarantine', 'ledger', 'reading_notes', 'idempotency_keys'] LOOP
        EXECUTE format('CREATE POLICY arriving ON %I TO sluice_owner USING (organisation_id = arriving_organisation())
                        WITH CHECK (organisation_id = arriving_organisation())', v_table);
    END LOOP;
END $$;

-- In the transaction of a super-admin who acts for its organisation, and holds the device: gives it to another one, with
-- all that was ever measured by it. What says where it stood and with whom stays behind: it stands nowhere. `moved`, or
-- why not: `forbidden`, `unknown`, `template` (one of the organisation's own), `erasing` (a site where it stood), or
-- `retention` (readings that the other organisation keeps are gone already: what is late would be rolled up without).
CREATE FUNCTION hand_over_device(p_device_id uuid, p_organisation_id uuid) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_from uuid := current_organisation();
    v_book record;
    v_horizons jsonb;
    v_is_gone boolean;
BEGIN
    IF NOT EXISTS (SELECT FROM users u WHERE u.user_id = current_user_id() AND u.super_admin) THEN
        RETURN 'forbidden';
    END IF;
    IF NOT EXISTS (SELECT FROM devices d WHERE d.device_id = p_device_id AND d.organisation_id = v_from) THEN
        RETURN 'unknown';
    END IF;
    IF EXISTS (SELECT FROM plants p WHERE p.device_id = p_device_id AND p.template_id IS NOT NULL) THEN
        RETURN 'template';
    END IF;
    IF EXISTS (SELECT FROM tombstones t JOIN erasures e USING (site_id)
               WHERE t.device_id = p_device_id AND e.state <> 'done') THEN
        RETURN 'erasing';
    END IF;
    SELECT coalesce(jsonb_object_agg(h.tier, h.dropped_through), '{}') INTO v_horizons FROM retention_horizons h
        WHERE h.dropped_through > (SELECT min(s.created_at) FROM series s WHERE s.device_id = p_device_id);
    PERFORM set_config('sluice.organisation', p_organisation_id::text, true);
    SELECT EXISTS (
        SELECT FROM jsonb_each_text(v_horizons) g LEFT JOIN retention_horizons h ON h.tier = g.key
        WHERE coalesce(h.dropped_through, '-infinity') < g.value::timestamptz) INTO v_is_gone;
    IF NOT EXISTS (SELECT FROM organisations o WHERE o.organisation_id = p_organisation_id) THEN
        PERFORM set_config('sluice.organisation', v_from::text, true);
        RETURN 'unknown';
    END IF;
    PERFORM set_config('sluice.organisation', v_from::text, true);
    IF v_is_gone THEN
        RETURN 'retention';
    END IF;

    DELETE FROM device_group_members WHERE device_id = p_device_id;
    DELETE FROM device_sites WHERE device_id = p_device_id;
    INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)
        VALUES (p_device_id, v_from, NULL, '-infinity');
    INSERT INTO former_owners (device_id, organisation_id) VALUES (p_device_id, v_from)
        ON CONFLICT (device_id, organisation_id) DO UPDATE SET until = now();
    PERFORM set_config('sluice.arriving', p_organisation_id::text, true);
    UPDATE reading_notes n SET organisation_id = p_organisation_id
        FROM series s WHERE s.device_id = p_device_id AND n.series_id = s.series_id;
    UPDATE idempotency_keys SET organisation_id = p_organisation_id WHERE device_id = p_device_id;
    FOR v_book IN
        WITH gone AS (
            UPDATE quarantine q SET organisation_id = p_organisation_id
            WHERE q.organisation_id = v_from AND q.device_id = p_device_id
            RETURNING q.source, q.partition, q.state,
                date_bin('1 hour', q.received_at, timestamptz '2000-01-01 00:00:00Z') AS hour)
        SELECT g.source, g.partition, g.hour, count(*) AS readings, count(*) FILTER (WHERE g.state = 'released') AS released,
               count(*) FILTER (WHERE g.state = 'discarded') AS discarded,
               count(*) FILTER (WHERE g.state = 'expired') AS expired
        FROM gone g GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
    LOOP
        UPDATE ledger l SET handed_over = l.handed_over + v_book.readings, replayed = l.replayed - v_book.released,
            discarded = l.discarded - v_book.discarded, expired = l.expired - v_book.expired
        WHERE l.organisation_id = v_from AND l.hour = v_book.hour AND l.source = v_book.source
          AND l.partition = v_book.partition;
        INSERT INTO ledger AS l (organisation_id, hour, source, partition, taken_over, replayed, discarded, expired)
        VALUES (p_organisation_id, v_book.hour, v_book.source, v_book.partition, v_book.readings, v_book.released,
                v_book.discarded, v_book.expired)
        ON CONFLICT (organisation_id, hour, source, partition) DO UPDATE
        SET taken_over = l.taken_over + EXCLUDED.taken_over, replayed = l.replayed + EXCLUDED.replayed,
            discarded = l.discarded + EXCLUDED.discarded, expired = l.expired + EXCLUDED.expired;
    END LOOP;
    -- Waits for landing to have made the series that it is making; all that refers to the device follows.
    UPDATE devices SET organisation_id = p_organisation_id, version = version + 1, updated_at = now()
        WHERE device_id = p_device_id;
    PERFORM set_config('sluice.arriving', '', true);
    RETURN 'moved';
END $$;
REVOKE ALL ON FUNCTION hand_over_device FROM PUBLIC;
GRANT EXECUTE ON FUNCTION hand_over_device TO sluice_app;
