-- Plants, once more: who is cut off, commands that are over, and which certificate a plant has.

-- ---------------------------------------------------------------- who is cut off

-- `online` of a device that may send nothing is false with the step that forbade it: a broker sends no last will for whom
-- it throws out. Who is let in again is there once it is heard from then on: what was taken before, by a bridge that did
-- not know yet, and landed late, is no sign of it.
CREATE FUNCTION on_device_cut_off() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.online THEN
        NEW.online_changed_at := least(now(), silent_after(OLD.last_seen_at, OLD.cadence_s));
    END IF;
    NEW.online := false;
    NEW.offline_at := now();
    RETURN NEW;
END $$;
CREATE TRIGGER devices_cut_off BEFORE UPDATE OF status ON devices FOR EACH ROW
    WHEN (NEW.status <> OLD.status) EXECUTE FUNCTION on_device_cut_off();

-- As it was (0028), but for `status`: what is heard of a device that is cut off is noted, and does not bring it back.
CREATE OR REPLACE FUNCTION devices_heard(p_devices uuid[], p_received_us bigint[]) RETURNS void
LANGUAGE sql SET search_path = public, pg_temp AS $$
    UPDATE devices d SET last_seen_at = v.seen, cadence_s = next_cadence(d.last_seen_at, d.cadence_s, v.seen),
        online = d.status = 'active' AND (d.offline_at IS NULL OR d.offline_at < v.seen)
            AND silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen)) > now(),
        offline_at = CASE WHEN d.status = 'active' AND d.offline_at < v.seen THEN NULL ELSE d.offline_at END,
        online_until = CASE
            WHEN d.online AND d.online_until <= silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen))
            THEN d.online_until
            ELSE silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen)) END,
        online_changed_at = CASE
            WHEN d.status <> 'active' OR d.offline_at >= v.seen THEN d.online_changed_at
            WHEN silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen)) <= now()
            THEN silent_after(v.seen, next_cadence(d.last_seen_at, d.cadence_s, v.seen))
            WHEN d.online AND silent_after(d.last_seen_at, d.cadence_s) >= v.seen
            THEN coalesce(d.online_changed_at, d.last_seen_at)
            ELSE v.seen END
    FROM (SELECT u.device_id, least(timestamptz '2000-01-01Z' + u.received_us * interval '1 microsecond', now()) AS seen
          FROM unnest(p_devices, p_received_us) u(device_id, received_us)) v
    WHERE d.device_id = v.device_id AND d.status <> 'deleted' AND (d.last_seen_at IS NULL OR d.last_seen_at < v.seen)
$$;

ALTER TABLE devices NO FORCE ROW LEVEL SECURITY;
UPDATE devices SET online = false, offline_at = now(),
    online_changed_at = least(now(), silent_after(last_seen_at, cadence_s))
WHERE status <> 'active' AND online;
ALTER TABLE devices FORCE ROW LEVEL SECURITY;

-- ---------------------------------------------------------------- commands that are over

-- They are let go by their age (`sluice retention`).
CREATE INDEX commands_over ON commands (finished_at) WHERE state IN ('SUCCESS', 'FAILED', 'TIMEOUT');
GRANT DELETE ON commands TO sluice_worker;

-- ---------------------------------------------------------------- certificates of plants

-- A plant tells of its newest certificate and what became of that, whoever issues or revokes it. One that is held is not
-- revoked: its plant is suspended, and says so.
CREATE FUNCTION on_certificate_of_plant() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        UPDATE plants SET certificate_fingerprint = NEW.fingerprint, certificate_serial_number = NEW.serial,
            certificate_expires_at = NEW.not_after, certificate_revoked_at = NULL
        WHERE device_id = NEW.device_id AND deleted_at IS NULL;
    ELSE
        UPDATE plants SET certificate_revoked_at = CASE WHEN NEW.reason <> 'certificateHold' THEN NEW.revoked_at END
        WHERE device_id = NEW.device_id AND certificate_fingerprint = NEW.fingerprint AND deleted_at IS NULL;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER certificates_of_plants AFTER INSERT OR UPDATE OF revoked_at, reason ON certificates
    FOR EACH ROW EXECUTE FUNCTION on_certificate_of_plant();

ALTER TABLE plants NO FORCE ROW LEVEL SECURITY;
ALTER TABLE certificates NO FORCE ROW LEVEL SECURITY;
UPDATE plants p SET certificate_fingerprint = c.fingerprint, certificate_serial_number = c.serial,
    certificate_expires_at = c.not_after, certificate_revoked_at = c.revoked_at
FROM (SELECT DISTINCT ON (device_id) device_id, fingerprint, serial, not_after,
             CASE WHEN reason <> 'certificateHold' THEN revoked_at END AS revoked_at
      FROM certificates ORDER BY device_id, issued_at DESC, fingerprint) c
WHERE c.device_id = p.device_id AND p.deleted_at IS NULL
  AND (p.certificate_fingerprint IS DISTINCT FROM c.fingerprint
       OR (p.certificate_revoked_at IS NULL AND c.revoked_at IS NOT NULL));
ALTER TABLE certificates FORCE ROW LEVEL SECURITY;
ALTER TABLE plants FORCE ROW LEVEL SECURITY;
