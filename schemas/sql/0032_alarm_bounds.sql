-- The bounds of a plant's alerts (0028), found once for each alarm: whatever is known of how many rows there are. As
-- subqueries to be joined, and before the table's first ANALYZE, they were gone through again for every alert.

CREATE OR REPLACE FUNCTION plant_alarmed(p_alert_id uuid, p_device_id uuid, p_said jsonb) RETURNS text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    v_type text := p_said->>'type';
    v_message text := p_said->>'message';
    v_at timestamptz := timestamptz '1970-01-01Z' + (p_said->>'at_us')::bigint * interval '1 microsecond';
    v_opened uuid;
BEGIN
    IF v_at NOT BETWEEN now() - interval '7 days' AND now() + interval '10 minutes' THEN
        v_at := NULL;  -- no clock of its own: it would tell two alarms for one
    END IF;
    IF NOT EXISTS (SELECT FROM plants p WHERE p.device_id = p_device_id AND p.deleted_at IS NULL) THEN
        RETURN 'no_plant';
    END IF;
    IF (p_said->>'is_over')::boolean THEN
        UPDATE plant_alerts a SET status = 'RESOLVED', resolved_at = now(), updated_at = now()
        WHERE a.device_id = p_device_id AND a.type = v_type AND a.status <> 'RESOLVED'
          AND (v_message IS NULL OR a.message = v_message);
        RETURN CASE WHEN FOUND THEN 'noted' ELSE 'repeated' END;
    END IF;
    IF EXISTS (SELECT FROM plant_alerts a WHERE a.alert_id = p_alert_id)
       OR EXISTS (SELECT FROM plant_alerts a WHERE a.device_id = p_device_id AND a.type = v_type
                  AND a.message = v_message AND a.alarmed_at = v_at) THEN
        RETURN 'repeated';
    END IF;
    v_opened := open_plant_alert(p_alert_id, p_device_id, v_type, p_said->>'severity', v_message);
    UPDATE plant_alerts a SET alarmed_at = v_at WHERE a.alert_id = v_opened AND v_at IS NOT NULL;
    IF v_opened <> p_alert_id THEN
        RETURN 'repeated';
    END IF;
    UPDATE plant_alerts a SET status = 'RESOLVED', resolved_at = now(), updated_at = now()
    WHERE a.alert_id = ANY (ARRAY(
        SELECT o.alert_id FROM plant_alerts o WHERE o.device_id = p_device_id AND o.status <> 'RESOLVED'
        ORDER BY array_position(ARRAY['CRITICAL', 'WARNING', 'INFO'], o.severity), o.created_at DESC, o.alert_id DESC
        OFFSET 100));
    DELETE FROM plant_alerts a WHERE a.status = 'RESOLVED' AND a.alert_id = ANY (ARRAY(
        SELECT o.alert_id FROM plant_alerts o WHERE o.device_id = p_device_id
        ORDER BY o.created_at DESC, o.alert_id DESC OFFSET 1000));
    RETURN 'noted';
END $$;
