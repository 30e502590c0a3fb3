-- Limits that differ from the settings: of a device, of a site's gateways, or of a whole organisation.

CREATE TABLE limit_overrides (
    organisation_id uuid NOT NULL REFERENCES organisations,
    device_id       uuid REFERENCES devices ON DELETE CASCADE,
    site_id         uuid REFERENCES sites ON DELETE CASCADE,
    -- Whom it limits: the organisation itself where neither a device nor a site is named.
    subject_id      uuid GENERATED ALWAYS AS (coalesce(device_id, site_id, organisation_id)) STORED PRIMARY KEY,
    -- NULL: as the settings say; 0: no limit. Up to what the counters hold.
    requests_per_minute bigint CHECK (requests_per_minute BETWEEN 0 AND 1099511627775),
    readings_per_minute bigint CHECK (readings_per_minute BETWEEN 0 AND 1099511627775),
    bytes_per_day       bigint CHECK (bytes_per_day BETWEEN 0 AND 1099511627775),
    changed_at      timestamptz NOT NULL DEFAULT now(),
    CHECK (device_id IS NULL OR site_id IS NULL)
);
CREATE INDEX limit_overrides_by_organisation ON limit_overrides (organisation_id);

ALTER TABLE limit_overrides ENABLE ROW LEVEL SECURITY;
ALTER TABLE limit_overrides FORCE ROW LEVEL SECURITY;
-- The device or site must be one that the organisation sees: foreign keys look past row-level security.
CREATE POLICY tenant ON limit_overrides TO sluice_app, sluice_reader, sluice_owner
    USING (organisation_id = current_organisation())
    WITH CHECK (organisation_id = current_organisation()
        AND (device_id IS NULL OR EXISTS (SELECT FROM devices d WHERE d.device_id = limit_overrides.device_id))
        AND (site_id IS NULL OR EXISTS (SELECT FROM sites s WHERE s.site_id = limit_overrides.site_id)));
CREATE POLICY pipeline ON limit_overrides TO sluice_ingest USING (true) WITH CHECK (true);

GRANT SELECT, INSERT, UPDATE, DELETE ON limit_overrides TO sluice_app;
GRANT SELECT ON limit_overrides TO sluice_ingest;

-- ---------------------------------------------------------------- processes with caches must feel it

-- A change may touch every credential of an organisation, whose number has no bound: then it names the organisation.
ALTER TABLE credential_changes ADD COLUMN organisation_id uuid;

CREATE FUNCTION organisation_changed(p_organisation_id uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM credential_changed(NULL, NULL);
    -- Under the lock of the epoch's row, which is ours until the end of the transaction.
    UPDATE credential_changes SET organisation_id = p_organisation_id
        WHERE epoch = (SELECT epoch FROM credential_epoch);
END $$;
REVOKE ALL ON FUNCTION organisation_changed FROM PUBLIC;
GRANT EXECUTE ON FUNCTION organisation_changed TO sluice_app;

CREATE FUNCTION on_limit_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF coalesce(NEW.device_id, OLD.device_id) IS NOT NULL THEN
        PERFORM credential_changed(NULL, coalesce(NEW.device_id, OLD.device_id));
    ELSE
        PERFORM organisation_changed(coalesce(NEW.organisation_id, OLD.organisation_id));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER limit_overrides_changed AFTER INSERT OR UPDATE OR DELETE ON limit_overrides
    FOR EACH ROW EXECUTE FUNCTION on_limit_change();
