-- What has landed of the spools that ingest keeps while the log is away. A spool's records are numbered from 0 in each
-- of its partitions; landing takes each number once and in order.

CREATE TABLE spool_positions (
    spool      uuid NOT NULL,
    partition  int NOT NULL,
    next       bigint NOT NULL,      -- the number of the record that must land next
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (spool, partition)
) WITH (fillfactor = 20);

-- Numbers that no record will come for: first_sequence up to end_sequence, which is not among them.
CREATE TABLE spool_losses (
    spool          uuid NOT NULL,
    partition      int NOT NULL,
    first_sequence bigint NOT NULL,
    end_sequence   bigint NOT NULL CHECK (end_sequence > first_sequence),
    noticed_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (spool, partition, first_sequence)
);

GRANT SELECT, INSERT, UPDATE ON spool_positions, spool_losses TO sluice_worker;
GRANT SELECT ON spool_positions, spool_losses TO sluice_ingest, sluice_app, sluice_reader;
