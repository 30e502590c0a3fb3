-- The quarantine as a place to come back from: what was set aside is edited, replayed, discarded, or goes by a bound.
-- A row that has left it for good keeps what it was and why, without its payload, for as long as the books are checked
-- against the log.

ALTER TABLE quarantine
    ADD COLUMN state text NOT NULL DEFAULT 'held'
        CHECK (state IN ('held', 'replaying', 'released', 'discarded', 'expired')),
    ADD COLUMN note text CHECK (length(note) <= 1000),     -- why it was discarded or is gone
    ADD COLUMN changed_at timestamptz,
    ADD COLUMN original_payload bytea,                      -- as it came, once the payload has been edited
    ADD COLUMN replay_requested_at timestamptz,
    ADD COLUMN replay_id uuid,        -- of this request: the record that carries it has this record id
    ADD COLUMN replay_due_at timestamptz;   -- from then on an ingest process takes it up, for the first time or again

-- A row comes in as held, so that only the first of these costs landing anything; it takes the place of the former one.
DROP INDEX quarantine_by_organisation;
CREATE INDEX quarantine_held ON quarantine (organisation_id, received_at) WHERE state = 'held';
CREATE INDEX quarantine_not_held ON quarantine (organisation_id, received_at) WHERE state <> 'held';
CREATE INDEX quarantine_replaying ON quarantine (organisation_id, replay_due_at) WHERE state = 'replaying';
CREATE INDEX quarantine_gone ON quarantine (changed_at) WHERE state IN ('released', 'discarded', 'expired');
CREATE INDEX quarantine_unreadable ON quarantine (quarantined_at) WHERE organisation_id IS NULL;

-- What the API's role may do to a row by itself: change what is held, and ask for its replay.
CREATE POLICY held_only ON quarantine AS RESTRICTIVE FOR UPDATE TO sluice_app
    USING (state = 'held') WITH CHECK (state IN ('held', 'replaying'));

-- Takes held rows out for good, as discarded or expired, and says so in the books of the hour they came in. Ledger rows
-- are locked in the order in which landing locks them.
CREATE FUNCTION leave_quarantine(p_ids uuid[], p_state text, p_note text) RETURNS int
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_book record;
    v_left int := 0;
BEGIN
    IF p_state NOT IN ('discarded', 'expired') THEN
        RAISE EXCEPTION 'a row does not leave the quarantine as %', p_state;
    END IF;
    FOR v_book IN
        WITH gone AS (
            UPDATE quarantine q
            SET state = p_state, note = p_note, changed_at = now(), payload = '', original_payload = NULL
            WHERE q.quarantine_id = ANY (p_ids) AND q.state = 'held'
            RETURNING q.source, q.partition, q.organisation_id, date_trunc('hour', q.received_at, 'UTC') AS hour)
        SELECT g.source, g.partition, g.organisation_id, g.hour, count(*)::int AS readings FROM gone g
        GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
    LOOP
        v_left := v_left + v_book.readings;
        UPDATE ledger l
        SET discarded = l.discarded + CASE WHEN p_state = 'discarded' THEN v_book.readings ELSE 0 END,
            expired = l.expired + CASE WHEN p_state = 'expired' THEN v_book.readings ELSE 0 END
        WHERE l.organisation_id = v_book.organisation_id AND l.hour = v_book.hour
          AND l.source = v_book.source AND l.partition = v_book.partition;
    END LOOP;
    RETURN v_left;
END $$;

-- The same for the API's role, which may not write to the books itself. It acts under row-level security: the rows of
-- the session's organisation, and no others.
CREATE FUNCTION discard_quarantined(p_ids uuid[], p_note text) RETURNS int
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS
$$ SELECT leave_quarantine(p_ids, 'discarded', p_note) $$;

REVOKE ALL ON FUNCTION leave_quarantine, discard_quarantined FROM PUBLIC;
GRANT EXECUTE ON FUNCTION leave_quarantine TO sluice_worker;
GRANT EXECUTE ON FUNCTION discard_quarantined TO sluice_app;

GRANT UPDATE (state, payload, original_payload, changed_at, replay_requested_at, replay_id, replay_due_at)
    ON quarantine TO sluice_app;
GRANT SELECT, UPDATE (state, code, message, attempts, changed_at, replay_due_at) ON quarantine TO sluice_ingest;
GRANT DELETE ON quarantine TO sluice_worker;
