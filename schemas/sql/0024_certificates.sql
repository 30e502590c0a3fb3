-- Certificates: the authorities that sign them, those of devices, what is revoked, and the one-time tokens with which a
-- device that keeps its key gets its first one.

-- ---------------------------------------------------------------- authorities

-- Those that this installation made or was given; of the issuing ones the newest signs.
CREATE TABLE certificate_authorities (
    authority_id uuid PRIMARY KEY,
    kind         text NOT NULL CHECK (kind IN ('root', 'issuing')),
    certificate  text NOT NULL,               -- PEM
    above        text NOT NULL DEFAULT '',    -- PEM: who vouches for it, the nearest first
    fingerprint  text NOT NULL UNIQUE CHECK (fingerprint ~ '^[0-9a-f]{64}$'),
    not_before   timestamptz NOT NULL,
    not_after    timestamptz NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (authority_id, kind)
);

-- Apart from them, since the API's role has to sign with an issuing key and must not reach a root's.
CREATE TABLE certificate_authority_keys (
    authority_id   uuid PRIMARY KEY,
    kind           text NOT NULL,
    sealed_private text NOT NULL,             -- AES-GCM under SLUICE_SECRET_KEYS
    FOREIGN KEY (authority_id, kind) REFERENCES certificate_authorities (authority_id, kind)
);
ALTER TABLE certificate_authority_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE certificate_authority_keys FORCE ROW LEVEL SECURITY;
CREATE POLICY signing ON certificate_authority_keys FOR SELECT TO sluice_app USING (kind = 'issuing');
CREATE POLICY operators ON certificate_authority_keys TO sluice_worker USING (true) WITH CHECK (true);

-- ---------------------------------------------------------------- of devices

CREATE TABLE certificates (
    fingerprint     text PRIMARY KEY CHECK (fingerprint ~ '^[0-9a-f]{64}$'),    -- SHA-256 of the DER
    authority_id    uuid NOT NULL REFERENCES certificate_authorities,
    serial          text NOT NULL CHECK (serial ~ '^[0-9a-f]{1,40}$'),
    organisation_id uuid NOT NULL,
    device_id       uuid NOT NULL,
    not_before      timestamptz NOT NULL,
    not_after       timestamptz NOT NULL,
    issued_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    replaced_by     text,                     -- the fingerprint of the device's next one
    revoked_at      timestamptz,              -- may lie ahead: one that was renewed stays good for a while
    reason          text CHECK (reason IN ('unspecified', 'keyCompromise', 'affiliationChanged', 'superseded',
                                           'cessationOfOperation', 'certificateHold', 'privilegeWithdrawn')),
    UNIQUE (authority_id, serial),
    CHECK ((revoked_at IS NULL) = (reason IS NULL)),
    FOREIGN KEY (organisation_id, device_id) REFERENCES devices (organisation_id, device_id)
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE INDEX certificates_by_device ON certificates (organisation_id, device_id, issued_at);
CREATE INDEX certificates_by_end ON certificates (organisation_id, not_after);

-- ---------------------------------------------------------------- what is revoked

-- Says nothing of whose a certificate was: everybody may read it, and it outlives devices that are erased.
CREATE TABLE certificate_revocations (
    authority_id uuid NOT NULL REFERENCES certificate_authorities,
    serial       text NOT NULL,
    revoked_at   timestamptz NOT NULL,
    reason       text NOT NULL,
    expires_at   timestamptz NOT NULL,
    PRIMARY KEY (authority_id, serial)
);
CREATE INDEX certificate_revocations_by_time ON certificate_revocations (authority_id, revoked_at);
CREATE INDEX certificate_revocations_by_end ON certificate_revocations (expires_at);

-- The newest list of each issuing authority (RFC 5280), the same for whoever asks whichever process.
CREATE TABLE certificate_revocation_lists (
    authority_id uuid PRIMARY KEY REFERENCES certificate_authorities,
    number       bigint NOT NULL DEFAULT 0,
    list         text NOT NULL DEFAULT '',    -- PEM
    entries      int NOT NULL DEFAULT 0,
    this_update  timestamptz NOT NULL DEFAULT 'epoch',
    next_update  timestamptz NOT NULL DEFAULT 'epoch',
    made_at      timestamptz NOT NULL DEFAULT 'epoch',
    is_stale     boolean NOT NULL DEFAULT true
) WITH (fillfactor = 50);

-- Deferred, so that the row that everybody who revokes locks is the last one, and for the length of a commit. Whoever
-- makes a list locks it first and reads what is revoked after that.
CREATE FUNCTION on_certificate_revoked() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.revoked_at IS NULL THEN
        DELETE FROM certificate_revocations WHERE authority_id = NEW.authority_id AND serial = NEW.serial;
    ELSE
        INSERT INTO certificate_revocations (authority_id, serial, revoked_at, reason, expires_at)
        VALUES (NEW.authority_id, NEW.serial, NEW.revoked_at, NEW.reason, NEW.not_after)
        ON CONFLICT (authority_id, serial) DO UPDATE SET revoked_at = EXCLUDED.revoked_at, reason = EXCLUDED.reason;
    END IF;
    UPDATE certificate_revocation_lists SET is_stale = true WHERE authority_id = NEW.authority_id;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER certificates_revoked AFTER UPDATE ON certificates
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (OLD.revoked_at IS DISTINCT FROM NEW.revoked_at OR OLD.reason IS DISTINCT FROM NEW.reason)
    EXECUTE FUNCTION on_certificate_revoked();

-- A device that is deleted, whoever deletes it, ends with its certificates.
CREATE FUNCTION on_device_deleted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE certificates SET revoked_at = now(), reason = 'cessationOfOperation'
        WHERE organisation_id = NEW.organisation_id AND device_id = NEW.device_id AND not_after > now()
          AND (revoked_at IS NULL OR revoked_at > now() OR reason = 'certificateHold');
    RETURN NULL;
END $$;
CREATE TRIGGER devices_deleted AFTER UPDATE OF status ON devices FOR EACH ROW
    WHEN (NEW.status = 'deleted' AND OLD.status <> 'deleted') EXECUTE FUNCTION on_device_deleted();

-- Long enough for each to have stood in a list that was made after its end.
CREATE FUNCTION forget_revocations() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS
$$ DELETE FROM certificate_revocations WHERE expires_at < now() - interval '30 days' $$;

-- ---------------------------------------------------------------- first certificates

CREATE TABLE device_registrations (
    registration_id uuid PRIMARY KEY,
    organisation_id uuid NOT NULL,
    device_id       uuid NOT NULL,
    token_hash      bytea NOT NULL UNIQUE CHECK (octet_length(token_hash) = 32),
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz NOT NULL,
    used_at         timestamptz,
    FOREIGN KEY (organisation_id, device_id) REFERENCES devices (organisation_id, device_id)
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE INDEX device_registrations_by_device ON device_registrations (organisation_id, device_id);
CREATE INDEX device_registrations_by_end ON device_registrations (organisation_id, expires_at);

-- Whose a token is, found while a transaction acts for nobody.
CREATE FUNCTION registration_presented(p_hashes bytea[])
RETURNS TABLE (registration_id uuid, organisation_id uuid, device_id uuid)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT r.registration_id, r.organisation_id, r.device_id FROM device_registrations r
   WHERE acts_for_nobody() AND r.token_hash = ANY (p_hashes) $$;

-- ---------------------------------------------------------------- who sees what

DO $$
DECLARE v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['certificates', 'device_registrations'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format('CREATE POLICY tenant ON %I TO sluice_app
                        USING (organisation_id = current_organisation())
                        WITH CHECK (organisation_id = current_organisation())', v_table);
    END LOOP;
END $$;
-- The owner's rights are used by the functions above alone.
CREATE POLICY ended ON certificates TO sluice_owner USING (true) WITH CHECK (true);
CREATE POLICY found ON device_registrations FOR SELECT TO sluice_owner USING (true);

REVOKE ALL ON FUNCTION on_certificate_revoked, on_device_deleted, forget_revocations, registration_presented FROM PUBLIC;
GRANT EXECUTE ON FUNCTION forget_revocations, registration_presented TO sluice_app;
GRANT EXECUTE ON FUNCTION forget_revocations TO sluice_worker;

GRANT SELECT ON certificate_authorities, certificate_authority_keys, certificate_revocations TO sluice_app;
GRANT SELECT, UPDATE ON certificate_revocation_lists TO sluice_app;
GRANT SELECT, INSERT ON certificates TO sluice_app;
GRANT UPDATE (replaced_by, revoked_at, reason) ON certificates TO sluice_app;
GRANT SELECT, INSERT, DELETE ON device_registrations TO sluice_app;
GRANT UPDATE (expires_at, used_at) ON device_registrations TO sluice_app;

-- An operator's, on the command line.
GRANT SELECT, INSERT ON certificate_authorities TO sluice_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON certificate_authority_keys TO sluice_worker;
GRANT SELECT, INSERT, UPDATE ON certificate_revocation_lists TO sluice_worker;
GRANT SELECT ON certificate_revocations TO sluice_worker;
