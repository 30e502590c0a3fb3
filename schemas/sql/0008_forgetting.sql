-- What may be forgotten once nobody can ask for it, nor any copy of a record come: workers delete it by age.

-- Spools whose files are gone, drained to the last record: copies of their records stand in the log alone.
CREATE TABLE spool_ends (
    spool    uuid PRIMARY KEY,
    ended_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX spool_ends_by_age ON spool_ends (ended_at);
GRANT INSERT ON spool_ends TO sluice_ingest;
GRANT SELECT, DELETE ON spool_ends TO sluice_worker;
GRANT DELETE ON spool_positions TO sluice_worker;

-- An outcome is asked for by receipts, and by whoever reads the log again: a replay among it was received long ago.
ALTER TABLE outcomes ADD COLUMN landed_at timestamptz NOT NULL DEFAULT now();
CREATE INDEX outcomes_by_age ON outcomes (landed_at);
GRANT DELETE ON outcomes TO sluice_worker;
