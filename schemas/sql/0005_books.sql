-- What becomes of a reading after it landed or was set aside, in the row of the hour in which it was received.

ALTER TABLE ledger
    ADD COLUMN replayed  bigint NOT NULL DEFAULT 0,   -- of conflicts and quarantined: released, and landed again
    ADD COLUMN discarded bigint NOT NULL DEFAULT 0,   -- of the same: thrown away by somebody, with a note
    ADD COLUMN expired   bigint NOT NULL DEFAULT 0,   -- of the same: gone by a bound of the quarantine
    ADD COLUMN erased    bigint NOT NULL DEFAULT 0,   -- of all: gone with the site they belonged to
    ADD COLUMN lost      bigint NOT NULL DEFAULT 0;   -- known to be gone against every rule

-- For what is asked of all organisations together: the metrics of the last day.
CREATE INDEX ledger_by_hour ON ledger (hour);
