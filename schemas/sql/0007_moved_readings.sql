-- Readings whose time is of our making make way for others of their series: what landing needs to know such a
-- reading, and its record, again.

-- Positions before it have landed once: what is landed there again, after `position` was set back, is no new record.
ALTER TABLE log_positions ADD COLUMN landed_until bigint NOT NULL DEFAULT 0;
UPDATE log_positions SET landed_until = position;

-- Where the readings stand that could not stand at their own time.
CREATE TABLE moved_readings (
    record_id uuid NOT NULL,
    item      int NOT NULL,          -- which reading of the record
    series_id int NOT NULL,
    ts        timestamptz NOT NULL,
    landed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (record_id, item)
);
CREATE INDEX moved_readings_by_age ON moved_readings (landed_at);
GRANT SELECT, INSERT, UPDATE, DELETE ON moved_readings TO sluice_worker;
