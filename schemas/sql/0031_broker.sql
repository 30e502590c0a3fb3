-- Who the MQTT broker knows: what it checks passwords by, what brings a new one there, and whose certificate was revoked.

-- The token of a device is its password at the broker as well, as Mosquitto hashes passwords; plants have theirs.
ALTER TABLE credentials ADD COLUMN broker_password text
    CHECK (broker_password IS NULL OR (kind = 'device' AND broker_password LIKE '$7$%'));

-- On its way to the broker, which takes no hash from anybody who changes a password while it runs: sealed under
-- SLUICE_SECRET_KEYS, until the broker has it, for a day at most.
CREATE TABLE broker_handovers (
    subject_id      uuid PRIMARY KEY,                           -- a device or a site
    organisation_id uuid NOT NULL,
    device_id       uuid,
    site_id         uuid,
    hash            text NOT NULL CHECK (hash LIKE '$7$%'),     -- which password it is
    sealed          text NOT NULL CHECK (length(sealed) <= 10000),
    expires_at      timestamptz NOT NULL,
    CHECK (num_nonnulls(device_id, site_id) = 1 AND subject_id = coalesce(device_id, site_id)),
    FOREIGN KEY (organisation_id, device_id) REFERENCES devices (organisation_id, device_id)
        ON UPDATE CASCADE ON DELETE CASCADE,
    FOREIGN KEY (organisation_id, site_id) REFERENCES sites (organisation_id, site_id) ON DELETE CASCADE
);
CREATE INDEX broker_handovers_by_age ON broker_handovers (expires_at);
ALTER TABLE broker_handovers ENABLE ROW LEVEL SECURITY;
ALTER TABLE broker_handovers FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON broker_handovers TO sluice_app, sluice_owner
    USING (organisation_id = current_organisation()) WITH CHECK (organisation_id = current_organisation());
CREATE POLICY pipeline ON broker_handovers TO sluice_worker USING (true);

-- Whoever keeps the broker's identities sees which certificates were revoked, of whom.
CREATE POLICY brokers ON certificates FOR SELECT TO sluice_worker USING (true);
CREATE INDEX certificates_revoked ON certificates (device_id) WHERE revoked_at IS NOT NULL;

-- Whom the broker is to know, by user name. Enabled: its password is good now. `revoked`: when the last of its
-- certificates was that has not ended, so that a connection which is older must end. `changes_at`: when this row will
-- say something else though nobody changes anything.
CREATE VIEW broker_clients WITH (security_invoker = true) AS
SELECT d.device_id::text AS user_name, d.device_id AS subject_id,
       CASE WHEN p.device_id IS NULL THEN 'DEVICE' ELSE p.auth_method END AS kind,
       k.hash,
       k.hash IS NOT NULL AND d.status = 'active' AND (p.device_id IS NULL OR p.lifecycle = 'ACTIVE')
           AND coalesce(k.until > now(), true) AS enabled,
       k.until,
       r.revoked,
       least(CASE WHEN k.until > now() THEN k.until END, r.next) AS changes_at
FROM devices d
LEFT JOIN plants p USING (device_id)
-- The newest token alone, even where it was revoked: an older one was never brought to the broker again.
LEFT JOIN LATERAL (
    SELECT c.broker_password, c.expires_at, c.revoked_at FROM credentials c
    WHERE p.device_id IS NULL AND c.device_id = d.device_id AND c.broker_password IS NOT NULL
    ORDER BY c.credential_id DESC LIMIT 1) c ON true
CROSS JOIN LATERAL (SELECT
    CASE WHEN p.device_id IS NOT NULL THEN p.broker_password
         WHEN c.revoked_at IS NULL THEN c.broker_password END AS hash,
    CASE WHEN p.device_id IS NULL THEN c.expires_at ELSE p.broker_password_until END AS until) k
LEFT JOIN LATERAL (
    SELECT max(x.revoked_at) FILTER (WHERE x.revoked_at <= now()) AS revoked,
           min(x.revoked_at) FILTER (WHERE x.revoked_at > now()) AS next
    FROM certificates x WHERE x.device_id = d.device_id AND x.revoked_at IS NOT NULL AND x.not_after > now()) r ON true
WHERE (k.hash IS NOT NULL AND d.status <> 'deleted') OR r.revoked IS NOT NULL OR r.next IS NOT NULL
UNION ALL
-- Sites whose devices name themselves go by the prefix of their topics.
SELECT b.prefix, b.site_id, 'SITE', b.password_hash, b.revoked_at IS NULL, NULL, NULL, NULL FROM site_brokers b;

-- Devices are told of where plants are (`plants_told`).
CREATE FUNCTION on_broker_client_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('sluice_plants', coalesce(NEW.device_id, OLD.device_id)::text);
    RETURN NULL;
END $$;
CREATE TRIGGER credentials_told AFTER INSERT OR DELETE OR UPDATE OF broker_password, expires_at, revoked_at
    ON credentials FOR EACH ROW EXECUTE FUNCTION on_broker_client_change();
CREATE TRIGGER devices_told AFTER DELETE OR UPDATE OF status ON devices
    FOR EACH ROW EXECUTE FUNCTION on_broker_client_change();
CREATE TRIGGER certificates_told AFTER UPDATE OF revoked_at ON certificates
    FOR EACH ROW EXECUTE FUNCTION on_broker_client_change();

GRANT SELECT, INSERT, UPDATE (hash, sealed, expires_at) ON broker_handovers TO sluice_app;
GRANT SELECT, DELETE ON broker_handovers TO sluice_worker;
GRANT SELECT ON broker_clients TO sluice_worker;
GRANT SELECT (credential_id, device_id, broker_password, expires_at, revoked_at) ON credentials TO sluice_worker;
GRANT SELECT (device_id, revoked_at, not_after) ON certificates TO sluice_worker;
