-- What is an organisation's refers to its own things alone, whoever writes it; who somebody is, is found only by a
-- transaction that acts for nobody yet; and the log of changes tells of every organisation.

-- ---------------------------------------------------------------- references stay with whom they belong to

-- What a row refers to is found by its id and whose it is: foreign keys look past row-level security.
ALTER TABLE devices ADD UNIQUE (organisation_id, device_id);
ALTER TABLE sites ADD UNIQUE (organisation_id, site_id);
DROP INDEX sites_listed;
ALTER TABLE credentials ADD UNIQUE (organisation_id, credential_id);
DROP INDEX credentials_by_organisation;
ALTER TABLE device_groups ADD UNIQUE (organisation_id, group_id);
ALTER TABLE erasures ADD UNIQUE (organisation_id, site_id);
ALTER TABLE sessions ADD UNIQUE (user_id, session_id);

CREATE TEMPORARY TABLE new_keys (
    referring text, referred text, id text, whose text DEFAULT 'organisation_id', on_delete text DEFAULT ''
) ON COMMIT DROP;
INSERT INTO new_keys (referring, referred, id) VALUES
    ('devices', 'sites', 'site_id'),
    ('device_sites', 'devices', 'device_id'),
    ('device_sites', 'sites', 'site_id'),
    ('credentials', 'devices', 'device_id'),
    ('credentials', 'sites', 'site_id'),
    ('series', 'devices', 'device_id'),
    ('device_group_members', 'devices', 'device_id'),
    ('tombstones', 'erasures', 'site_id');
INSERT INTO new_keys (referring, referred, id, whose, on_delete) VALUES
    ('limit_overrides', 'devices', 'device_id', DEFAULT, 'ON DELETE CASCADE'),
    ('limit_overrides', 'sites', 'site_id', DEFAULT, 'ON DELETE CASCADE'),
    ('site_servers', 'sites', 'site_id', DEFAULT, 'ON DELETE CASCADE'),
    ('site_servers', 'credentials', 'credential_id', DEFAULT, 'ON DELETE CASCADE'),
    ('edge_devices', 'sites', 'site_id', DEFAULT, 'ON DELETE CASCADE'),
    ('edge_devices', 'credentials', 'credential_id', DEFAULT, 'ON DELETE CASCADE'),
    ('device_group_members', 'device_groups', 'group_id', DEFAULT, 'ON DELETE CASCADE'),
    ('refresh_tokens', 'sessions', 'session_id', 'user_id', 'ON DELETE CASCADE');

-- Otherwise the owner would see no row, and find every one of them right.
DO $$
DECLARE v_table text;
BEGIN
    FOR v_table IN SELECT referring FROM new_keys UNION SELECT referred FROM new_keys
        UNION VALUES ('organisations')
    LOOP
        EXECUTE format('ALTER TABLE %I NO FORCE ROW LEVEL SECURITY', v_table);
    END LOOP;
END $$;

-- Names rows that stand in the way: only whoever runs the installation knows whose they are.
DO $$
DECLARE
    v_key new_keys;
    v_rows text;
    v_wrong text := '';
BEGIN
    FOR v_key IN SELECT * FROM new_keys ORDER BY referring, id LOOP
        EXECUTE format(
            $sql$ SELECT string_agg(format(E'\n%%s %%s of %%s: %%s %%s is of %%s', %1$L, (
                    SELECT jsonb_object_agg(a.attname, to_jsonb(r) -> a.attname)
                    FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
                    WHERE i.indrelid = %1$L::regclass AND i.indisprimary AND a.atttypid <> 'bytea'::regtype),
                r.whose, %3$L, r.id, r.other), '')
            FROM (SELECT r.*, r.%3$I AS id, r.%4$I AS whose, t.%4$I AS other FROM %1$I r JOIN %2$I t USING (%3$I)
                  WHERE r.%4$I <> t.%4$I LIMIT 20) r $sql$,
            v_key.referring, v_key.referred, v_key.id, v_key.whose) INTO v_rows;
        v_wrong := v_wrong || coalesce(v_rows, '');
    END LOOP;
    IF v_wrong <> '' THEN
        RAISE EXCEPTION USING ERRCODE = 'foreign_key_violation',
            MESSAGE = 'rows refer to what is another organisation''s, or another person''s',
            DETAIL = 'The first of them, by table:' || v_wrong,
            HINT = 'Put them right as a superuser, and run `sluice migrate` again: nothing was changed.';
    END IF;
END $$;

DO $$
DECLARE v_key new_keys;
BEGIN
    FOR v_key IN SELECT * FROM new_keys LOOP
        EXECUTE format('ALTER TABLE %1$I DROP CONSTRAINT %2$I, ADD CONSTRAINT %2$I
                        FOREIGN KEY (%3$I, %4$I) REFERENCES %5$I (%3$I, %4$I) %6$s',
                       v_key.referring, v_key.referring || '_' || v_key.id || '_fkey', v_key.whose, v_key.id,
                       v_key.referred, v_key.on_delete);
    END LOOP;
END $$;
-- What these always refer to has the same organisation, and refers to it.
ALTER TABLE device_sites DROP CONSTRAINT device_sites_organisation_id_fkey;
ALTER TABLE series DROP CONSTRAINT series_organisation_id_fkey;
ALTER TABLE site_servers DROP CONSTRAINT site_servers_organisation_id_fkey;
ALTER TABLE edge_devices DROP CONSTRAINT edge_devices_organisation_id_fkey;
ALTER TABLE device_group_members DROP CONSTRAINT device_group_members_organisation_id_fkey;

-- A membership shows its user's name and e-mail: people join by themselves, and what changes is the role.
CREATE POLICY oneself ON memberships AS RESTRICTIVE FOR INSERT TO sluice_app WITH CHECK (user_id = current_user_id());
REVOKE UPDATE ON memberships FROM sluice_app;
GRANT UPDATE (role) ON memberships TO sluice_app;

-- ---------------------------------------------------------------- who somebody is

-- Whoever lets people in does not act for anybody yet; once a transaction does, it learns of nobody else.
CREATE FUNCTION acts_for_nobody() RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE AS
$$ SELECT current_organisation() IS NULL AND current_user_id() IS NULL $$;

-- Attempts to log in are reached by the functions below alone.
REVOKE ALL ON login_attempts FROM sluice_app;
ALTER TABLE login_attempts ENABLE ROW LEVEL SECURITY;
ALTER TABLE login_attempts FORCE ROW LEVEL SECURITY;
CREATE POLICY counted ON login_attempts TO sluice_owner USING (true) WITH CHECK (true);

-- Counts an attempt before it is judged, so that guesses made at once count as well. Returns the seconds to wait, or
-- 0 and whose the e-mail is, with the hash to judge by. An account that many addresses fail at (p_pressure within an
-- hour) allows each but one failure.
DROP FUNCTION begin_login;
CREATE FUNCTION begin_login(p_email text, p_account bytea, p_address bytea, p_failures_max int, p_lockout interval,
    p_pressure int)
RETURNS TABLE (wait_s int, user_id uuid, password_hash text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_max int := p_failures_max;
    v_failures int;
    v_last timestamptz;
BEGIN
    IF NOT acts_for_nobody() THEN
        RETURN;
    END IF;
    DELETE FROM login_attempts a USING (
        SELECT o.account, o.address FROM login_attempts o WHERE o.last_at < v_now - interval '1 day'
        LIMIT 100 FOR UPDATE SKIP LOCKED) old
        WHERE a.account = old.account AND a.address = old.address;
    IF (SELECT count(*) FROM (SELECT FROM login_attempts a
            WHERE a.account = p_account AND a.address <> p_address AND a.last_at > v_now - interval '1 hour'
            LIMIT p_pressure) others) >= p_pressure THEN
        v_max := 1;
    END IF;
    INSERT INTO login_attempts AS a (account, address, failures, last_at) VALUES (p_account, p_address, 1, v_now)
    ON CONFLICT (account, address) DO UPDATE SET
        failures = CASE WHEN a.last_at < v_now - p_lockout THEN 1 ELSE least(a.failures, p_failures_max) + 1 END,
        -- Who tries while locked out is not locked out for longer.
        last_at = CASE WHEN a.last_at >= v_now - p_lockout AND a.failures >= v_max THEN a.last_at ELSE v_now END
    RETURNING a.failures, a.last_at INTO v_failures, v_last;
    IF v_failures > v_max THEN
        wait_s := greatest(1, ceil(extract(epoch FROM v_last + p_lockout - v_now)));
    ELSE
        wait_s := 0;
        SELECT u.user_id, u.password_hash INTO user_id, password_hash FROM users u
            WHERE lower(u.email) = lower(p_email);
    END IF;
    RETURN NEXT;
END $$;

-- The attempts of an address at an account count no longer: the last one was right.
CREATE FUNCTION forget_attempts(p_account bytea, p_address bytea) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS
$$ DELETE FROM login_attempts WHERE acts_for_nobody() AND account = p_account AND address = p_address $$;

-- Whether the user's password still is the one that was looked at.
CREATE FUNCTION has_password(p_hash text) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT EXISTS (SELECT FROM users u WHERE u.user_id = current_user_id() AND u.password_hash = p_hash) $$;

DROP FUNCTION user_of_email;
CREATE FUNCTION user_of_email(p_email text) RETURNS uuid
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT u.user_id FROM users u WHERE acts_for_nobody() AND lower(u.email) = lower(p_email) $$;

CREATE OR REPLACE FUNCTION refresh_token_presented(p_hashes bytea[])
RETURNS TABLE (token_hash bytea, session_id uuid, user_id uuid)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT t.token_hash, t.session_id, t.user_id FROM refresh_tokens t
   WHERE acts_for_nobody() AND t.token_hash = ANY (p_hashes) $$;

CREATE OR REPLACE FUNCTION password_reset_presented(p_hashes bytea[]) RETURNS TABLE (token_hash bytea, user_id uuid)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT r.token_hash, r.user_id FROM password_resets r WHERE acts_for_nobody() AND r.token_hash = ANY (p_hashes) $$;

CREATE OR REPLACE FUNCTION invitation_presented(p_hashes bytea[])
RETURNS TABLE (invitation_id uuid, organisation_id uuid, email text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT i.invitation_id, i.organisation_id, i.email FROM invitations i
   WHERE acts_for_nobody() AND i.token_hash = ANY (p_hashes) $$;

REVOKE ALL ON FUNCTION begin_login, forget_attempts, has_password, user_of_email FROM PUBLIC;
GRANT EXECUTE ON FUNCTION begin_login, forget_attempts, has_password, user_of_email TO sluice_app;

-- Processes with caches are told by what changes, and by nobody about what is another's.
ALTER FUNCTION on_credential_change SECURITY DEFINER SET search_path = public, pg_temp;
ALTER FUNCTION on_device_change SECURITY DEFINER SET search_path = public, pg_temp;
ALTER FUNCTION on_limit_change SECURITY DEFINER SET search_path = public, pg_temp;
REVOKE ALL ON FUNCTION on_credential_change, on_device_change, on_limit_change FROM PUBLIC;
REVOKE ALL ON FUNCTION credential_changed, organisation_changed FROM sluice_app;

-- ---------------------------------------------------------------- the log of changes

-- While no organisation is chosen a super-admin sees what belongs to none.
CREATE POLICY nobodys ON audit_log FOR SELECT TO sluice_app USING (
    organisation_id IS NULL AND current_organisation() IS NULL
    AND EXISTS (SELECT FROM users u WHERE u.user_id = current_user_id() AND u.super_admin));

-- Whoever checks the log asks whether everybody stands in it.
CREATE POLICY verified ON users FOR SELECT TO sluice_worker USING (true);
GRANT SELECT (user_id) ON users TO sluice_worker;

-- From now on the log has to tell of every organisation; of those that the command line made it did not. A chain
-- whose end is not where its head says is broken, and stays so.
DO $$
DECLARE v_organisation uuid;
BEGIN
    FOR v_organisation IN
        SELECT o.organisation_id FROM organisations o LEFT JOIN audit_heads h ON h.chain = o.organisation_id
        WHERE NOT EXISTS (
                SELECT FROM audit_log l WHERE l.chain = o.organisation_id AND l.action = 'organisation.created')
          AND coalesce(h.sequence, 0) = (
                SELECT coalesce(max(l.sequence), 0) FROM audit_log l WHERE l.chain = o.organisation_id)
        ORDER BY 1
    LOOP
        PERFORM set_config('sluice.organisation', v_organisation::text, true);
        PERFORM append_audit('organisation.found', v_organisation::text, '{}');
    END LOOP;
    PERFORM set_config('sluice.organisation', '', true);
END $$;

-- ---------------------------------------------------------------- the first stay of a device

-- Processes of the version before 0016 may have gone on for a while.
UPDATE device_sites h SET valid_from = '-infinity'
    WHERE h.valid_from > '-infinity'
      AND h.valid_from = (SELECT min(f.valid_from) FROM device_sites f WHERE f.device_id = h.device_id);

-- In the transaction of the caller: hides a site of the session's organisation, writes its tombstones, removes the
-- devices that stand there for good, and ends its tokens and theirs. Whether there was one to hide.
CREATE OR REPLACE FUNCTION begin_site_erasure(p_site_id uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_organisation uuid := current_organisation();
    v_removed uuid[];
    v_epoch bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(sites_lock());
    UPDATE sites SET erasing_since = now(), updated_at = now(), version = version + 1
        WHERE site_id = p_site_id AND erasing_since IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM set_config('sluice.changes_told', 'on', true);
    -- What was to move there will stand nowhere from then on.
    UPDATE device_sites SET site_id = NULL WHERE site_id = p_site_id AND valid_from > now();
    v_removed := ARRAY(
        SELECT h.device_id FROM device_sites h
        WHERE h.site_id = p_site_id AND NOT EXISTS (
            SELECT FROM device_sites n WHERE n.device_id = h.device_id AND n.valid_from > h.valid_from)
        ORDER BY h.device_id);
    UPDATE devices d SET status = 'deleted', deleted_at = now(), online = false, version = d.version + 1,
        updated_at = now()
    FROM (SELECT device_id FROM devices WHERE device_id = ANY (v_removed) ORDER BY device_id FOR NO KEY UPDATE) r
    WHERE d.device_id = r.device_id AND d.status <> 'deleted';
    DELETE FROM device_group_members WHERE device_id = ANY (v_removed);
    UPDATE credentials SET revoked_at = now()
        WHERE revoked_at IS NULL AND (site_id = p_site_id OR device_id = ANY (v_removed));

    INSERT INTO erasures (site_id, organisation_id) VALUES (p_site_id, v_organisation);
    UPDATE tombstone_epoch SET epoch = epoch + 1 RETURNING epoch INTO v_epoch;
    INSERT INTO tombstones (site_id, device_id, from_ts, to_ts, organisation_id, epoch)
    SELECT p_site_id, h.device_id, h.valid_from, coalesce(h.valid_until, 'infinity'), v_organisation, v_epoch
    FROM (SELECT s.device_id, s.site_id, s.valid_from,
                 lead(s.valid_from) OVER (PARTITION BY s.device_id ORDER BY s.valid_from) AS valid_until
          FROM device_sites s
          WHERE s.device_id IN (SELECT o.device_id FROM device_sites o WHERE o.site_id = p_site_id)) h
    WHERE h.site_id = p_site_id;
    PERFORM organisation_changed(v_organisation);
    PERFORM set_config('sluice.changes_told', '', true);
    RETURN true;
END $$;

DO $$
DECLARE v_table text;
BEGIN
    FOR v_table IN SELECT referring FROM new_keys UNION SELECT referred FROM new_keys
        UNION VALUES ('organisations')
    LOOP
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', v_table);
    END LOOP;
END $$;
