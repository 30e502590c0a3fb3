-- People and what they may: users, memberships, sessions and their tokens, invitations, keys that sign, and the log of
-- every change. A transaction names its user in `sluice.user` and its credential in `sluice.credential`, beside its
-- organisation. With an organisation that organisation's rows are seen; without one, the user's own.

CREATE FUNCTION current_user_id() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE AS
$$ SELECT nullif(current_setting('sluice.user', true), '')::uuid $$;

ALTER TABLE organisations
    ADD COLUMN version    int NOT NULL DEFAULT 1,
    ADD COLUMN updated_at timestamptz NOT NULL DEFAULT now();

-- ---------------------------------------------------------------- people

CREATE TABLE users (
    user_id       uuid PRIMARY KEY,
    email         text NOT NULL CHECK (length(email) BETWEEN 3 AND 254),
    name          text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    password_hash text CHECK (password_hash LIKE '$argon2id$%'),
    -- May do everything in every organisation; only the command line makes one.
    super_admin   boolean NOT NULL DEFAULT false,
    created_at    timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX users_email ON users (lower(email));

CREATE TABLE memberships (
    organisation_id uuid NOT NULL REFERENCES organisations,
    user_id         uuid NOT NULL REFERENCES users,
    role            text NOT NULL CHECK (role IN ('owner', 'admin', 'member', 'viewer')),
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (organisation_id, user_id)
);
CREATE INDEX memberships_by_user ON memberships (user_id);

-- A login, until it is ended.
CREATE TABLE sessions (
    session_id      uuid PRIMARY KEY,
    user_id         uuid NOT NULL REFERENCES users,
    organisation_id uuid REFERENCES organisations,      -- the one it acts for when it is refreshed
    user_agent      text NOT NULL DEFAULT '' CHECK (length(user_agent) <= 200),
    created_at      timestamptz NOT NULL DEFAULT now(),
    last_used_at    timestamptz NOT NULL DEFAULT now(),
    ended_at        timestamptz
);
CREATE INDEX sessions_by_user ON sessions (user_id, last_used_at);

-- Each is used once; a second use is a thief's, or the owner's after a thief's, and ends the session.
CREATE TABLE refresh_tokens (
    token_hash bytea PRIMARY KEY CHECK (octet_length(token_hash) = 32),
    session_id uuid NOT NULL REFERENCES sessions ON DELETE CASCADE,
    user_id    uuid NOT NULL REFERENCES users,
    issued_at  timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    used_at    timestamptz
);
CREATE INDEX refresh_tokens_by_session ON refresh_tokens (session_id, expires_at);

CREATE TABLE password_resets (
    token_hash bytea PRIMARY KEY CHECK (octet_length(token_hash) = 32),
    user_id    uuid NOT NULL REFERENCES users,
    issued_at  timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    used_at    timestamptz
);
CREATE INDEX password_resets_by_user ON password_resets (user_id);

CREATE TABLE invitations (
    invitation_id   uuid PRIMARY KEY,
    organisation_id uuid NOT NULL REFERENCES organisations,
    email           text NOT NULL CHECK (length(email) BETWEEN 3 AND 254),
    role            text NOT NULL CHECK (role IN ('owner', 'admin', 'member', 'viewer')),
    token_hash      bytea NOT NULL UNIQUE CHECK (octet_length(token_hash) = 32),
    invited_by      uuid REFERENCES users,
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz NOT NULL,
    accepted_at     timestamptz,
    revoked_at      timestamptz
);
CREATE INDEX invitations_open ON invitations (organisation_id, invitation_id)
    WHERE accepted_at IS NULL AND revoked_at IS NULL;

-- Failed logins by account (a hash of its e-mail) and address: who fails is locked out from there, and nobody else.
CREATE TABLE login_attempts (
    account  bytea NOT NULL CHECK (octet_length(account) = 32),
    address  bytea NOT NULL CHECK (octet_length(address) = 16),
    failures int NOT NULL,
    last_at  timestamptz NOT NULL,
    PRIMARY KEY (account, address)
);
CREATE INDEX login_attempts_by_age ON login_attempts (last_at);

-- Counts an attempt before it is judged, so that guesses made at once count as well. Returns the seconds to wait, 0 to
-- go on. An account that many addresses fail at (p_pressure within an hour) allows each but one failure.
CREATE FUNCTION begin_login(p_account bytea, p_address bytea, p_failures_max int, p_lockout interval, p_pressure int)
RETURNS int LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_max int := p_failures_max;
    v_failures int;
    v_last timestamptz;
BEGIN
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
    IF v_failures <= v_max THEN
        RETURN 0;
    END IF;
    RETURN greatest(1, ceil(extract(epoch FROM v_last + p_lockout - v_now)))::int;
END $$;

-- The keys that sign access tokens: the next one is published before it signs, an old one until no token of its lives.
CREATE TABLE signing_keys (
    kid            text PRIMARY KEY CHECK (length(kid) BETWEEN 1 AND 64),
    public_key     text NOT NULL,     -- PEM
    sealed_private text NOT NULL,     -- AES-GCM under SLUICE_SECRET_KEYS
    signs_from     timestamptz NOT NULL,
    retires_at     timestamptz NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT now()
);

-- ---------------------------------------------------------------- API keys

ALTER TABLE credentials
    ADD COLUMN last_used_at timestamptz,     -- to the hour
    ADD COLUMN created_by   uuid REFERENCES users;
CREATE INDEX credentials_api_keys ON credentials (organisation_id, credential_id) WHERE kind = 'api_key';

-- That one was used changes nothing that processes keep of it.
DROP TRIGGER credentials_changed ON credentials;
CREATE TRIGGER credentials_changed AFTER INSERT OR DELETE
    OR UPDATE OF kind, organisation_id, device_id, site_id, token_hash, scopes, expires_at, revoked_at ON credentials
    FOR EACH ROW EXECUTE FUNCTION on_credential_change();

-- Who presents one of p_hashes (one token's, under each key); the transaction then acts for its organisation. `unused`:
-- for an hour at least, or never.
DROP FUNCTION authenticate_api_key;
CREATE FUNCTION authenticate_api_key(p_hashes bytea[])
RETURNS TABLE (credential_id uuid, organisation_id uuid, scopes text[], unused boolean)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE v_hash bytea;
BEGIN
    FOREACH v_hash IN ARRAY p_hashes LOOP
        PERFORM set_config('sluice.token_hash', encode(v_hash, 'hex'), true);
        SELECT c.credential_id, c.organisation_id, c.scopes,
               c.last_used_at IS NULL OR c.last_used_at < now() - interval '1 hour'
            INTO credential_id, organisation_id, scopes, unused
            FROM credentials c
            WHERE c.token_hash = v_hash AND c.kind = 'api_key' AND c.revoked_at IS NULL
              AND (c.expires_at IS NULL OR c.expires_at > now());
        IF FOUND THEN
            PERFORM set_config('sluice.organisation', organisation_id::text, true),
                    set_config('sluice.credential', credential_id::text, true);
            RETURN NEXT;
            RETURN;
        END IF;
    END LOOP;
END $$;

-- Who holds an access token of p_session. No row: the session has ended. The transaction then acts for the user, and
-- for p_organisation where the user may be there: `role` is null otherwise, and for one that is not there alike.
CREATE FUNCTION authenticate_session(p_session uuid, p_user uuid, p_organisation uuid)
RETURNS TABLE (role text, super_admin boolean)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM set_config('sluice.user', p_user::text, true);
    SELECT m.role, u.super_admin INTO role, super_admin
        FROM sessions s JOIN users u ON u.user_id = s.user_id
        LEFT JOIN memberships m ON m.user_id = s.user_id AND m.organisation_id = p_organisation
        WHERE s.session_id = p_session AND s.user_id = p_user AND s.ended_at IS NULL;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    IF super_admin AND EXISTS (SELECT FROM organisations o WHERE o.organisation_id = p_organisation) THEN
        role := 'owner';
    END IF;
    IF role IS NOT NULL THEN
        PERFORM set_config('sluice.organisation', p_organisation::text, true);
    END IF;
    RETURN NEXT;
END $$;

-- ---------------------------------------------------------------- the log of changes

-- Each organisation has a chain of its own; what belongs to none is in the chain of the nil UUID.
CREATE TABLE audit_heads (
    chain    uuid PRIMARY KEY,
    sequence bigint NOT NULL,
    hash     bytea NOT NULL
) WITH (fillfactor = 20);

CREATE TABLE audit_log (
    chain           uuid NOT NULL,
    sequence        bigint NOT NULL,
    organisation_id uuid,
    at              timestamptz NOT NULL,
    user_id         uuid,              -- who did it; with neither, an operator on the command line
    credential_id   uuid,
    action          text NOT NULL CHECK (length(action) BETWEEN 1 AND 64),
    subject         text NOT NULL CHECK (length(subject) <= 200),
    details         jsonb NOT NULL,
    previous_hash   bytea NOT NULL,
    hash            bytea NOT NULL CHECK (octet_length(hash) = 32),
    PRIMARY KEY (chain, sequence)
);

-- What an entry's hash is taken over, after the hash of the entry before it.
CREATE FUNCTION audit_canonical(p audit_log) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_array(p.chain, p.sequence, p.organisation_id,
        to_char(p.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        p.user_id, p.credential_id, p.action, p.subject, p.details)::text
$$;

-- Appends what the transaction did, at its end: other changes of the same organisation wait from here to its commit.
CREATE FUNCTION append_audit(p_action text, p_subject text, p_details jsonb) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_head audit_heads;
    v_new audit_log;
BEGIN
    v_new.organisation_id := current_organisation();
    v_new.chain := coalesce(v_new.organisation_id, '00000000-0000-0000-0000-000000000000');
    INSERT INTO audit_heads (chain, sequence, hash) VALUES (v_new.chain, 0, sha256(''))
        ON CONFLICT (chain) DO NOTHING;
    SELECT * INTO v_head FROM audit_heads h WHERE h.chain = v_new.chain FOR UPDATE;
    v_new.sequence := v_head.sequence + 1;
    v_new.at := clock_timestamp();
    v_new.user_id := current_user_id();
    v_new.credential_id := nullif(current_setting('sluice.credential', true), '')::uuid;
    v_new.action := p_action;
    v_new.subject := p_subject;
    v_new.details := p_details;
    v_new.previous_hash := v_head.hash;
    v_new.hash := sha256(v_head.hash || convert_to(audit_canonical(v_new), 'UTF8'));
    INSERT INTO audit_log SELECT v_new.*;
    UPDATE audit_heads SET sequence = v_new.sequence, hash = v_new.hash WHERE chain = v_new.chain;
END $$;

-- ---------------------------------------------------------------- who sees what

DO $$
DECLARE
    v_table text;
    v_seen text;
    v_written text;
BEGIN
    FOR v_table, v_seen, v_written IN VALUES
        ('users',
         'user_id = current_user_id() OR EXISTS (SELECT FROM memberships m WHERE m.user_id = users.user_id
              AND m.organisation_id = current_organisation())',
         'user_id = current_user_id()'),
        ('memberships',
         'CASE WHEN current_organisation() IS NULL THEN user_id = current_user_id()
               ELSE organisation_id = current_organisation() END',
         'organisation_id = current_organisation()'),
        ('sessions', 'user_id = current_user_id()', 'user_id = current_user_id()'),
        ('refresh_tokens', 'user_id = current_user_id()', 'user_id = current_user_id()'),
        ('password_resets', 'user_id = current_user_id()', 'user_id = current_user_id()'),
        ('invitations', 'organisation_id = current_organisation()', 'organisation_id = current_organisation()'),
        ('audit_log', 'organisation_id = current_organisation()', 'false')
    LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', v_table);
        EXECUTE format('CREATE POLICY own ON %I TO sluice_app USING (%s) WITH CHECK (%s)', v_table, v_seen, v_written);
    END LOOP;
END $$;

-- While no organisation is chosen a user sees those that he is in; a super-admin, all.
CREATE POLICY own ON organisations FOR SELECT TO sluice_app USING (
    current_organisation() IS NULL AND (
        EXISTS (SELECT FROM memberships m WHERE m.organisation_id = organisations.organisation_id
                AND m.user_id = current_user_id())
        OR EXISTS (SELECT FROM users u WHERE u.user_id = current_user_id() AND u.super_admin)));

-- The owner's rights are used by the functions below alone, which find whose a secret is before anybody is known.
DO $$
DECLARE v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['users', 'refresh_tokens', 'password_resets', 'invitations', 'audit_log'] LOOP
        EXECUTE format('CREATE POLICY found ON %I FOR SELECT TO sluice_owner USING (true)', v_table);
    END LOOP;
END $$;
CREATE POLICY promoted ON users TO sluice_owner USING (true) WITH CHECK (true);
CREATE POLICY appended ON audit_log FOR INSERT TO sluice_owner WITH CHECK (true);
CREATE POLICY verified ON audit_log FOR SELECT TO sluice_worker USING (true);

CREATE FUNCTION user_of_email(p_email text) RETURNS TABLE (user_id uuid, password_hash text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT u.user_id, u.password_hash FROM users u WHERE lower(u.email) = lower(p_email) $$;

CREATE FUNCTION refresh_token_presented(p_hashes bytea[])
RETURNS TABLE (token_hash bytea, session_id uuid, user_id uuid)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT t.token_hash, t.session_id, t.user_id FROM refresh_tokens t WHERE t.token_hash = ANY (p_hashes) $$;

CREATE FUNCTION password_reset_presented(p_hashes bytea[]) RETURNS TABLE (token_hash bytea, user_id uuid)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT r.token_hash, r.user_id FROM password_resets r WHERE r.token_hash = ANY (p_hashes) $$;

CREATE FUNCTION invitation_presented(p_hashes bytea[])
RETURNS TABLE (invitation_id uuid, organisation_id uuid, email text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT i.invitation_id, i.organisation_id, i.email FROM invitations i WHERE i.token_hash = ANY (p_hashes) $$;

-- The command line's alone: no role that answers requests may do it.
CREATE FUNCTION make_super_admin(p_user_id uuid, p_email text, p_name text, p_password_hash text) RETURNS uuid
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    INSERT INTO users AS u (user_id, email, name, password_hash, super_admin)
    VALUES (p_user_id, p_email, p_name, p_password_hash, true)
    ON CONFLICT (lower(email)) DO UPDATE SET super_admin = true, password_hash = EXCLUDED.password_hash
    RETURNING u.user_id
$$;

REVOKE ALL ON FUNCTION append_audit, user_of_email, refresh_token_presented, password_reset_presented,
    invitation_presented, make_super_admin FROM PUBLIC;
GRANT EXECUTE ON FUNCTION append_audit, user_of_email, refresh_token_presented, password_reset_presented,
    invitation_presented TO sluice_app;
GRANT EXECUTE ON FUNCTION append_audit, make_super_admin TO sluice_worker;

GRANT SELECT (user_id, email, name, super_admin, created_at), INSERT (user_id, email, name, password_hash),
    UPDATE (name, password_hash) ON users TO sluice_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON memberships, sessions, refresh_tokens, password_resets, login_attempts
    TO sluice_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON invitations TO sluice_app;
GRANT SELECT, INSERT, DELETE ON signing_keys TO sluice_app;
GRANT SELECT ON audit_log TO sluice_app, sluice_worker;
GRANT SELECT ON audit_heads TO sluice_worker;
