-- Commands on their way to devices, what devices answer and say of themselves, and whether they are there.

-- ---------------------------------------------------------------- sending

ALTER TABLE commands
    -- Which topics its device listens to; fixed with the command.
    ADD COLUMN way           text NOT NULL DEFAULT 'plant' CHECK (way IN ('plant', 'gateway', 'opensense')),
    -- What is published, and where: fixed before the first time, so that it is never sent again as something else.
    ADD COLUMN topic         text CHECK (length(topic) <= 512),
    ADD COLUMN message       text CHECK (octet_length(message) <= 8192),
    ADD COLUMN claimed_by    uuid,
    ADD COLUMN claimed_until timestamptz,
    ADD CHECK ((topic IS NULL) = (message IS NULL));

-- The first command that waits for each device that may be sent one, for `p_sender` alone until its claim ends. The next
-- of a device goes once that was noted. A device that is suspended is sent nothing: it waits for it, or times out.
CREATE FUNCTION claim_commands(p_sender uuid, p_ttl interval, p_rows int)
RETURNS TABLE (id uuid, organisation uuid, device uuid, action text, arguments text, behind text, by_way text,
               fixed_topic text, fixed_message text, sealed text, is_plant boolean, left_s float8)
LANGUAGE sql SET search_path = public, pg_temp AS $$
    WITH due AS (
        SELECT c.command_id FROM commands c
        WHERE c.state = 'PENDING' AND c.expires_at > now()
          AND (c.claimed_until IS NULL OR c.claimed_until <= now() OR c.claimed_by = p_sender)
          AND EXISTS (SELECT FROM devices d WHERE d.device_id = c.device_id AND d.status = 'active')
          AND NOT EXISTS (SELECT FROM plants p WHERE p.device_id = c.device_id AND p.lifecycle <> 'ACTIVE')
          AND NOT EXISTS (SELECT FROM commands e WHERE e.device_id = c.device_id AND e.state = 'PENDING'
                          AND e.expires_at > now() AND e.command_id < c.command_id)
        ORDER BY c.command_id LIMIT p_rows FOR NO KEY UPDATE SKIP LOCKED
    ), claimed AS (
        UPDATE commands c SET claimed_by = p_sender, claimed_until = clock_timestamp() + p_ttl
        FROM due WHERE c.command_id = due.command_id
        RETURNING c.command_id, c.organisation_id, c.device_id, c.command, c.payload::text AS payload, c.target, c.way,
                  c.topic, c.message, c.expires_at)
    SELECT c.command_id, c.organisation_id, c.device_id, c.command, c.payload, c.target, c.way, c.topic, c.message,
           p.secret, p.device_id IS NOT NULL, extract(epoch FROM c.expires_at - now())::float8
    FROM claimed c LEFT JOIN plants p ON p.device_id = c.device_id ORDER BY c.command_id
$$;

-- What is to be published of a command that still waits, and where: whoever comes first fixes it. No row: it is over.
CREATE FUNCTION fix_command(p_command_id uuid, p_topic text, p_message text)
RETURNS TABLE (fixed_topic text, fixed_message text) LANGUAGE sql SET search_path = public, pg_temp AS $$
    UPDATE commands SET topic = coalesce(topic, p_topic), message = coalesce(message, p_message)
    WHERE command_id = p_command_id AND state = 'PENDING' RETURNING topic, message
$$;

-- PENDING → FAILED: there is nothing that could be sent.
CREATE FUNCTION command_unsendable(p_command_id uuid, p_reason text) RETURNS boolean
LANGUAGE sql SET search_path = public, pg_temp AS $$
    WITH gone AS (
        UPDATE commands SET state = 'FAILED', finished_at = now(), response = jsonb_build_object('reason', p_reason)
        WHERE command_id = p_command_id AND state = 'PENDING' RETURNING 1)
    SELECT EXISTS (SELECT FROM gone)
$$;

-- ---------------------------------------------------------------- who is there

ALTER TABLE devices
    ADD COLUMN offline_at        timestamptz,   -- its broker said then that it is gone, and nothing was heard since
    ADD COLUMN online_changed_at timestamptz;   -- since when it is what `online` says

-- Heard at these times, in microseconds since 2000. Never back in time, and never ahead of it, whatever the clocks of
-- those who received it say. `online_until` is indexed: it stands until it has passed, or is too late, and only then
-- moves. What was said before a device's broker said that it is gone does not bring it back.
CREATE FUNCTION devices_heard(p_devices uuid[], p_received_us bigint[]) RETURNS void
LANGUAGE sql SET search_path = public, pg_temp AS $$
    UPDATE devices d SET last_seen_at = v.seen, cadence_s = next_cadence(d.last_seen_at, d.cadence_s, v.seen),
        online = (d.offline_at IS NULL OR d.offline_at < v.seen)
            AND silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen)) > now(),
        offline_at = CASE WHEN d.offline_at < v.seen THEN NULL ELSE d.offline_at END,
        online_until = CASE
            WHEN d.online AND d.online_until <= silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen))
            THEN d.online_until
            ELSE silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen)) END,
        online_changed_at = CASE
            WHEN d.offline_at >= v.seen THEN d.online_changed_at
            WHEN silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen)) <= now()
            THEN silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen))
            WHEN d.online AND silent_after(d.last_seen_at, d.cadence_s) >= v.seen
            THEN coalesce(d.online_changed_at, d.last_seen_at)
            ELSE v.seen END
    FROM (SELECT u.device_id, least(timestamptz '2000-01-01Z' + u.received_us * interval '1 microsecond', now()) AS seen
          FROM unnest(p_devices, p_received_us) u(device_id, received_us)) v
    WHERE d.device_id = v.device_id AND d.status <> 'deleted' AND (d.last_seen_at IS NULL OR d.last_seen_at < v.seen)
$$;

-- Said by their broker to be gone, at these times: nothing of one that was heard later.
CREATE FUNCTION devices_gone(p_devices uuid[], p_received_us bigint[]) RETURNS void
LANGUAGE sql SET search_path = public, pg_temp AS $$
    UPDATE devices d SET online = false, offline_at = v.gone,
        online_changed_at = CASE WHEN d.online THEN least(v.gone, silent_after(d.last_seen_at, d.cadence_s))
                                 ELSE coalesce(d.online_changed_at, v.gone) END
    FROM (SELECT u.device_id, least(timestamptz '2000-01-01Z' + u.received_us * interval '1 microsecond', now()) AS gone
          FROM unnest(p_devices, p_received_us) u(device_id, received_us)) v
    WHERE d.device_id = v.device_id AND d.status <> 'deleted'
      AND (d.last_seen_at IS NULL OR d.last_seen_at <= v.gone) AND (d.offline_at IS NULL OR d.offline_at < v.gone)
$$;

SET LOCAL ROLE sluice_dashboard_views;
CREATE OR REPLACE VIEW dashboards.devices WITH (security_barrier) AS
    SELECT d.device_id, d.name AS device, d.local_id, d.model, d.fw_version, d.status, d.site_id, s.name AS site,
        coalesce(d.online AND d.online_until > now(), false) AS online, d.last_seen_at, d.created_at,
        d.deleted_at AS removed_at
    FROM public.devices d LEFT JOIN public.sites s USING (site_id);
RESET ROLE;

-- ---------------------------------------------------------------- what devices say of themselves

-- The newest of each kind.
CREATE TABLE device_reports (
    device_id       uuid NOT NULL,
    kind            text NOT NULL CHECK (kind IN ('info', 'config', 'health')),
    organisation_id uuid NOT NULL,
    report          jsonb NOT NULL CHECK (jsonb_typeof(report) = 'object'),
    reported_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (device_id, kind),
    FOREIGN KEY (organisation_id, device_id) REFERENCES devices (organisation_id, device_id)
        ON UPDATE CASCADE ON DELETE CASCADE
);
ALTER TABLE device_reports SET (fillfactor = 80);
ALTER TABLE device_reports ENABLE ROW LEVEL SECURITY;
ALTER TABLE device_reports FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON device_reports TO sluice_app, sluice_owner
    USING (organisation_id = current_organisation()) WITH CHECK (organisation_id = current_organisation());
CREATE POLICY pipeline ON device_reports TO sluice_ingest, sluice_worker USING (true) WITH CHECK (true);

-- When the plant says that it was: the same alarm of that moment is told once, however often and late it is sent.
ALTER TABLE plant_alerts ADD COLUMN alarmed_at timestamptz;

-- One alarm of a plant, under an id of the caller's that is the message's; `noted`, `repeated`, or `no_plant`. Of one
-- plant 100 are open at most, the oldest of the least severe make way, and a thousand are kept.
CREATE FUNCTION plant_alarmed(p_alert_id uuid, p_device_id uuid, p_said jsonb) RETURNS text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_type text := p_said->>'type';
    v_message text := p_said->>'message';
    v_at timestamptz := timestamptz '1970-01-01Z' + (p_said->>'at_us')::bigint * interval '1 microsecond';
    v_opened uuid;
BEGIN
    IF v_at NOT BETWEEN now() - interval '7 days' AND now() + interval '10 minutes' THEN
        v_at := NULL;  -- no clock of its own: it would tell two alarms for one
    END IF;
    IF NOT EXISTS (SELECT FROM plants p WHERE p.device_id = p_device_id AND p.deleted_at IS NULL) THEN
        RETURN 'no_plant';
    END IF;
    IF (p_said->>'is_over')::boolean THEN
        UPDATE plant_alerts a SET status = 'RESOLVED', resolved_at = now(), updated_at = now()
        WHERE a.device_id = p_device_id AND a.type = v_type AND a.status <> 'RESOLVED'
          AND (v_message IS NULL OR a.message = v_message);
        RETURN CASE WHEN FOUND THEN 'noted' ELSE 'repeated' END;
    END IF;
    IF EXISTS (SELECT FROM plant_alerts a WHERE a.alert_id = p_alert_id)
       OR EXISTS (SELECT FROM plant_alerts a WHERE a.device_id = p_device_id AND a.type = v_type
                  AND a.message = v_message AND a.alarmed_at = v_at) THEN
        RETURN 'repeated';
    END IF;
    v_opened := open_plant_alert(p_alert_id, p_device_id, v_type, p_said->>'severity', v_message);
    UPDATE plant_alerts a SET alarmed_at = v_at WHERE a.alert_id = v_opened AND v_at IS NOT NULL;
    IF v_opened <> p_alert_id THEN
        RETURN 'repeated';
    END IF;
    -- By arrays, found once: a join went through the bounds again for every alert, before the table's first ANALYZE.
    UPDATE plant_alerts a SET status = 'RESOLVED', resolved_at = now(), updated_at = now()
    WHERE a.alert_id = ANY (ARRAY(
        SELECT o.alert_id FROM plant_alerts o WHERE o.device_id = p_device_id AND o.status <> 'RESOLVED'
        ORDER BY array_position(ARRAY['CRITICAL', 'WARNING', 'INFO'], o.severity), o.created_at DESC, o.alert_id DESC
        OFFSET 100));
    DELETE FROM plant_alerts a WHERE a.status = 'RESOLVED' AND a.alert_id = ANY (ARRAY(
        SELECT o.alert_id FROM plant_alerts o WHERE o.device_id = p_device_id
        ORDER BY o.created_at DESC, o.alert_id DESC OFFSET 1000));
    RETURN 'noted';
END $$;

-- What a device told of itself, and what of it its row, and its plant's, have a place for; what is absent stays.
CREATE FUNCTION device_reported(p_device_id uuid, p_kind text, p_said jsonb) RETURNS text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_told jsonb := p_said->'told';
    v_firmware text := v_told->>'fw_version';
    v_is_new boolean;
BEGIN
    INSERT INTO device_reports AS r (device_id, kind, organisation_id, report)
    SELECT d.device_id, p_kind, d.organisation_id, p_said->'report' FROM devices d WHERE d.device_id = p_device_id
    ON CONFLICT (device_id, kind) DO UPDATE SET report = EXCLUDED.report, reported_at = now();
    SELECT d.fw_version IS DISTINCT FROM coalesce(v_firmware, d.fw_version)
        OR p.config_enabled IS DISTINCT FROM coalesce((v_told->>'config_enabled')::boolean, p.config_enabled)
        OR p.esi_state IS DISTINCT FROM coalesce(v_told->>'esi_state', p.esi_state)
        OR p.capacity_kwh IS DISTINCT FROM coalesce((v_told->>'capacity_kwh')::float8, p.capacity_kwh)
        OR p.fve_peak_power_kwp IS DISTINCT FROM
           coalesce((v_told->>'fve_peak_power_kwp')::float8, p.fve_peak_power_kwp)
        OR p.plant_with_load IS DISTINCT FROM coalesce((v_told->>'plant_with_load')::boolean, p.plant_with_load)
    INTO v_is_new FROM devices d LEFT JOIN plants p ON p.device_id = d.device_id AND p.deleted_at IS NULL
    WHERE d.device_id = p_device_id;
    IF NOT coalesce(v_is_new, false) THEN
        RETURN 'noted';
    END IF;
    -- The device before its plant, as whoever changes either.
    UPDATE devices d SET fw_version = coalesce(v_firmware, d.fw_version), version = d.version + 1, updated_at = now()
    WHERE d.device_id = p_device_id AND d.status <> 'deleted';
    UPDATE plants p SET
        config_enabled = coalesce((v_told->>'config_enabled')::boolean, p.config_enabled),
        esi_state = coalesce(v_told->>'esi_state', p.esi_state),
        capacity_kwh = coalesce((v_told->>'capacity_kwh')::float8, p.capacity_kwh),
        fve_peak_power_kwp = coalesce((v_told->>'fve_peak_power_kwp')::float8, p.fve_peak_power_kwp),
        plant_with_load = coalesce((v_told->>'plant_with_load')::boolean, p.plant_with_load)
    WHERE p.device_id = p_device_id AND p.deleted_at IS NULL;
    RETURN 'noted';
END $$;

-- What a device answered to a command of its own; `noted`, `repeated` (it is no news), or `unknown_command`.
CREATE FUNCTION device_answered(p_device_id uuid, p_said jsonb) RETURNS text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_command uuid := (p_said->>'command')::uuid;
    v_state text := p_said->>'state';
    v_is_new boolean;
BEGIN
    IF v_state = 'ACKNOWLEDGED' THEN
        v_is_new := command_acknowledged(p_device_id, v_command);
    ELSE
        v_is_new := command_finished(p_device_id, v_command, v_state, p_said->'response');
    END IF;
    RETURN CASE
        WHEN v_is_new THEN 'noted'
        WHEN EXISTS (SELECT FROM commands c WHERE c.command_id = v_command AND c.device_id = p_device_id)
        THEN 'repeated' ELSE 'unknown_command' END;
END $$;

-- Any of these, as a bridge has read it. `p_id` is the message's own: the same again changes nothing more.
CREATE FUNCTION device_said(p_id uuid, p_device_id uuid, p_kind text, p_said jsonb) RETURNS text
LANGUAGE sql SET search_path = public, pg_temp AS $$
    SELECT CASE p_kind
        WHEN 'answer' THEN device_answered(p_device_id, p_said)
        WHEN 'alarm' THEN plant_alarmed(p_id, p_device_id, p_said)
        ELSE device_reported(p_device_id, p_kind, p_said) END
$$;

-- ---------------------------------------------------------------- who may

GRANT SELECT ON device_reports TO sluice_app;
GRANT SELECT, INSERT, UPDATE ON device_reports TO sluice_ingest;
GRANT SELECT, UPDATE ON commands TO sluice_ingest;
GRANT SELECT, INSERT, UPDATE, DELETE ON plant_alerts TO sluice_ingest;
GRANT UPDATE (config_enabled, esi_state, capacity_kwh, fve_peak_power_kwp, plant_with_load) ON plants TO sluice_ingest;
GRANT UPDATE (last_seen_at, cadence_s, online_until, online, offline_at, online_changed_at, fw_version, version,
    updated_at) ON devices TO sluice_ingest;
GRANT UPDATE (offline_at, online_changed_at) ON devices TO sluice_worker;
