-- Attempts to log in that are being judged are told from those that failed.

ALTER TABLE login_attempts ADD COLUMN in_flight int NOT NULL DEFAULT 0;
COMMENT ON COLUMN login_attempts.in_flight IS 'begun and not judged yet; after a minute they count as failed';

-- Counts an attempt before it is judged, so that guesses made at once count as well: those that failed and those in
-- flight are together never more than may fail. Returns the seconds to wait, and whether that is only because of what
-- is in flight; or 0 and whose the e-mail is, with the hash to judge by. An account that many addresses fail at
-- (p_pressure within an hour) allows each but one failure.
DROP FUNCTION begin_login;
CREATE FUNCTION begin_login(p_email text, p_account bytea, p_address bytea, p_failures_max int, p_lockout interval,
    p_pressure int)
RETURNS TABLE (wait_s int, in_flight boolean, user_id uuid, password_hash text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_max int := p_failures_max;
    v_row login_attempts;
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
              AND a.failures + a.in_flight > 0
            LIMIT p_pressure) others) >= p_pressure THEN
        v_max := 1;
    END IF;
    -- Whoever comes at the same time waits here until this attempt is counted.
    INSERT INTO login_attempts AS a (account, address, failures, last_at) VALUES (p_account, p_address, 0, v_now)
        ON CONFLICT (account, address) DO UPDATE SET failures = a.failures
        RETURNING a.* INTO v_row;
    -- Of a process that ended before it had judged them.
    IF v_row.last_at < v_now - interval '1 minute' THEN
        v_row.failures := v_row.failures + v_row.in_flight;
        v_row.in_flight := 0;
    END IF;
    IF v_row.last_at < v_now - p_lockout THEN
        v_row.failures := 0;
    END IF;
    in_flight := false;
    IF v_row.failures >= v_max THEN
        -- Who tries while locked out is not locked out for longer.
        wait_s := greatest(1, ceil(extract(epoch FROM v_row.last_at + p_lockout - v_now)));
    ELSIF v_row.failures + v_row.in_flight >= v_max THEN
        wait_s := 1;
        in_flight := true;
    ELSE
        wait_s := 0;
        v_row.in_flight := v_row.in_flight + 1;
        v_row.last_at := v_now;
        SELECT u.user_id, u.password_hash INTO user_id, password_hash FROM users u
            WHERE lower(u.email) = lower(p_email);
    END IF;
    UPDATE login_attempts a
        SET failures = v_row.failures, in_flight = v_row.in_flight, last_at = v_row.last_at
        WHERE a.account = p_account AND a.address = p_address;
    RETURN NEXT;
END $$;

-- An attempt was wrong, or was given up before it was judged. One that was right is forgotten with those before it.
CREATE FUNCTION end_attempt(p_account bytea, p_address bytea, p_failed boolean) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    INSERT INTO login_attempts AS a (account, address, failures, last_at)
    SELECT p_account, p_address, p_failed::int, clock_timestamp() WHERE acts_for_nobody()
    ON CONFLICT (account, address) DO UPDATE
        SET failures = a.failures + EXCLUDED.failures, in_flight = greatest(a.in_flight - 1, 0)
$$;

REVOKE ALL ON FUNCTION begin_login, end_attempt FROM PUBLIC;
GRANT EXECUTE ON FUNCTION begin_login, end_attempt TO sluice_app;
