-- Requests that their clients named: which of them have landed, for as long as a copy can still arrive.

CREATE TABLE idempotency_keys (
    organisation_id uuid NOT NULL,
    scope           bytea NOT NULL CHECK (octet_length(scope) = 16),         -- stands for the credential
    device_id       uuid NOT NULL,
    key             bytea NOT NULL CHECK (octet_length(key) = 16),           -- a digest: keys may be secrets
    fingerprint     bytea NOT NULL CHECK (octet_length(fingerprint) = 16),   -- a digest of the request's content
    received_at     timestamptz NOT NULL,
    source          uuid NOT NULL,
    partition       int NOT NULL,
    position        bigint NOT NULL,
    -- After 24 hours the same name may be used again: each use is a row.
    PRIMARY KEY (device_id, key, scope, received_at)
);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (received_at);

ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE idempotency_keys FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON idempotency_keys TO sluice_app, sluice_reader, sluice_owner
    USING (organisation_id = current_organisation()) WITH CHECK (organisation_id = current_organisation());
CREATE POLICY pipeline ON idempotency_keys TO sluice_ingest, sluice_worker USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, DELETE ON idempotency_keys TO sluice_worker;
