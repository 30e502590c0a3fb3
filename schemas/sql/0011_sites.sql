-- Sites as the API has them: one that is to be erased is nobody's from that moment on, whichever way it is asked for.

-- Lists go by site_id, which is the order in which sites were made.
CREATE INDEX sites_listed ON sites (organisation_id, site_id);
DROP INDEX sites_by_organisation;

-- What may be read and changed through the API; the owner's functions and the workers see what is to be erased too.
DROP POLICY tenant ON sites;
CREATE POLICY tenant ON sites TO sluice_app, sluice_reader
    USING (organisation_id = current_organisation() AND erasing_since IS NULL);
CREATE POLICY owner ON sites TO sluice_owner
    USING (organisation_id = current_organisation()) WITH CHECK (organisation_id = current_organisation());

-- Hides a site of the session's organisation and ends every token of its gateways, in the transaction of the caller.
-- Whether there was one to hide.
CREATE FUNCTION begin_site_erasure(p_site_id uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE sites SET erasing_since = now(), updated_at = now(), version = version + 1
        WHERE site_id = p_site_id AND erasing_since IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE credentials SET revoked_at = now() WHERE site_id = p_site_id AND revoked_at IS NULL;
    RETURN true;
END $$;
REVOKE ALL ON FUNCTION begin_site_erasure FROM PUBLIC;
GRANT EXECUTE ON FUNCTION begin_site_erasure TO sluice_app;

-- What a server or an edge device runs; heard again and again, so its row stays where it is.
ALTER TABLE edge_devices ADD COLUMN process_count int NOT NULL DEFAULT 0 CHECK (process_count BETWEEN 0 AND 100000);
ALTER TABLE edge_devices SET (fillfactor = 80);
ALTER TABLE site_servers SET (fillfactor = 80);
CREATE INDEX edge_devices_by_credential ON edge_devices (credential_id);
CREATE INDEX site_servers_by_credential ON site_servers (credential_id);

-- Which gateway presents one of p_hashes (one token's, under each key); the transaction then acts for its organisation.
CREATE FUNCTION authenticate_gateway(p_hashes bytea[])
RETURNS TABLE (credential_id uuid, organisation_id uuid, site_id uuid)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE v_hash bytea;
BEGIN
    FOREACH v_hash IN ARRAY p_hashes LOOP
        PERFORM set_config('sluice.token_hash', encode(v_hash, 'hex'), true);
        SELECT c.credential_id, c.organisation_id, c.site_id INTO credential_id, organisation_id, site_id
            FROM credentials c
            WHERE c.token_hash = v_hash AND c.kind = 'gateway' AND c.revoked_at IS NULL
              AND (c.expires_at IS NULL OR c.expires_at > now());
        IF FOUND THEN
            PERFORM set_config('sluice.organisation', organisation_id::text, true),
                    set_config('sluice.credential', credential_id::text, true);
            RETURN NEXT;
            RETURN;
        END IF;
    END LOOP;
END $$;

-- The keys that sign the tokens of servers and edge devices. Those live until they are revoked, and so do the keys.
CREATE TABLE gateway_signing_keys (
    kid            text PRIMARY KEY CHECK (length(kid) BETWEEN 1 AND 64),
    public_key     bytea NOT NULL,    -- DER
    sealed_private text NOT NULL,     -- AES-GCM under SLUICE_SECRET_KEYS
    created_at     timestamptz NOT NULL DEFAULT now()
);
GRANT SELECT, INSERT ON gateway_signing_keys TO sluice_app;
