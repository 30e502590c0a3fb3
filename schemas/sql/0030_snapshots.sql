-- Plants' signed snapshots: nonces that are forgotten soon, and templates of devices that whoever reads them hears of.

-- A nonce is an idempotency key under the scope of nonces (NONCE_SCOPE of schemas/record.py). Each snapshot has one, so
-- they go within hours: found by age among keys that stay for weeks.
CREATE INDEX idempotency_keys_of_nonces ON idempotency_keys (received_at)
    WHERE scope = '\x6e6f6e6365206f66206120706c616e74';

-- By an organisation's newest template of a type its plants' devices are read: whoever remembers them is told.
CREATE FUNCTION on_template_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM organisation_changed(coalesce(NEW.organisation_id, OLD.organisation_id));
    RETURN NULL;
END $$;
REVOKE ALL ON FUNCTION on_template_change FROM PUBLIC;
CREATE TRIGGER templates_told AFTER INSERT OR DELETE ON templates FOR EACH ROW EXECUTE FUNCTION on_template_change();
CREATE INDEX templates_of_devices ON templates (organisation_id, type, template_id) WHERE level = 'DEVICE';
