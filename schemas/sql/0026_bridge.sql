-- The bridges' sessions with MQTT brokers: who has which, and what of their messages landing may see once more.

CREATE TABLE mqtt_bridges (
    bridge     uuid PRIMARY KEY,
    broker     text NOT NULL,
    seen_until timestamptz NOT NULL
);

-- One session with a broker, for as long as there is this family of topics. Its id is part of the client identifier.
CREATE TABLE mqtt_slots (
    broker       text NOT NULL,
    slot         text NOT NULL,
    session      uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
    filters      text[] NOT NULL DEFAULT '{}',   -- what the broker is known to hold subscriptions to
    fence        bigint NOT NULL DEFAULT 0,      -- how often it was taken
    settled      bigint NOT NULL DEFAULT 0,      -- of what was delivered before this number nothing is sent again
    bridge       uuid,
    lease_until  timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (broker, slot)
) WITH (fillfactor = 20);

-- Renews what p_bridge holds, gives back what it says it gave up, and takes what is free up to its fair share. Slots that
-- are not there yet are made. The database's clock decides. One row a slot held; `taken`: not held without a break.
CREATE FUNCTION lease_mqtt_slots(p_broker text, p_slots text[], p_bridge uuid, p_ttl interval, p_releasing text[])
RETURNS TABLE (held text, fair_share int, taken boolean, session_id uuid, fence_number bigint,
              settled_number bigint, known_filters text[])
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_live int;
    v_share int;
    v_mine int;
BEGIN
    INSERT INTO mqtt_slots (broker, slot) SELECT p_broker, unnest(p_slots) ON CONFLICT DO NOTHING;
    INSERT INTO mqtt_bridges AS b (bridge, broker, seen_until) VALUES (p_bridge, p_broker, v_now + p_ttl)
        ON CONFLICT (bridge) DO UPDATE SET seen_until = EXCLUDED.seen_until;
    DELETE FROM mqtt_bridges WHERE seen_until < v_now - interval '1 hour';
    SELECT count(*) INTO v_live FROM mqtt_bridges b WHERE b.broker = p_broker AND b.seen_until >= v_now;
    v_share := ceil(cardinality(p_slots)::numeric / greatest(v_live, 1));

    UPDATE mqtt_slots s SET bridge = NULL, lease_until = '-infinity'
        WHERE s.broker = p_broker AND s.bridge = p_bridge AND s.slot = ANY (p_releasing);
    UPDATE mqtt_slots s SET lease_until = v_now + p_ttl
        WHERE s.broker = p_broker AND s.bridge = p_bridge AND s.lease_until >= v_now;
    SELECT count(*) INTO v_mine FROM mqtt_slots s
        WHERE s.broker = p_broker AND s.bridge = p_bridge AND s.lease_until >= v_now;

    RETURN QUERY
    WITH free AS (
        SELECT s.slot FROM mqtt_slots s
        WHERE s.broker = p_broker AND s.slot = ANY (p_slots) AND s.lease_until < v_now
          AND s.slot <> ALL (p_releasing)
        ORDER BY s.slot LIMIT greatest(v_share - v_mine, 0) FOR UPDATE SKIP LOCKED
    ), taken AS (
        UPDATE mqtt_slots s SET bridge = p_bridge, lease_until = v_now + p_ttl, fence = s.fence + 1
        FROM free f WHERE s.broker = p_broker AND s.slot = f.slot
        RETURNING s.slot, s.session, s.fence, s.settled, s.filters
    )
    SELECT t.slot, v_share, true, t.session, t.fence, t.settled, t.filters FROM taken t
    UNION ALL
    SELECT s.slot, v_share, false, s.session, s.fence, s.settled, s.filters FROM mqtt_slots s
        WHERE s.broker = p_broker AND s.bridge = p_bridge AND s.lease_until >= v_now;
END $$;

-- What landed of messages that a broker may send again: packets, digests and numbers, as `workers.landing.deliveries` packs
-- them, of one connection and one partition, up to the number `last`. Nobody's data: digests of 8 bytes.
CREATE TABLE mqtt_deliveries (
    source      uuid NOT NULL,
    partition   int NOT NULL,
    session     uuid NOT NULL,
    landing     bigint GENERATED ALWAYS AS IDENTITY,   -- in the order in which they landed
    began       bigint NOT NULL,
    last        bigint NOT NULL,
    last_place  bigint NOT NULL,
    last_packet int NOT NULL,
    floor       bigint NOT NULL,
    repeats_end bigint NOT NULL,
    edge        bigint NOT NULL,
    shift       bigint,
    awaited     bigint[],
    reached     bigint NOT NULL,
    packed      bytea NOT NULL,
    landed_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, partition, session, landing)
);
CREATE INDEX mqtt_deliveries_by_age ON mqtt_deliveries (landed_at);

REVOKE ALL ON FUNCTION lease_mqtt_slots FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lease_mqtt_slots TO sluice_ingest;
GRANT SELECT, INSERT, UPDATE ON mqtt_slots TO sluice_ingest;
GRANT SELECT, INSERT, UPDATE, DELETE ON mqtt_bridges TO sluice_ingest;
GRANT SELECT ON mqtt_slots, mqtt_bridges TO sluice_worker, sluice_reader;
GRANT SELECT, INSERT, UPDATE, DELETE ON mqtt_deliveries TO sluice_worker;
