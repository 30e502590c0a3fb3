-- What a dashboard asks in SQL: views of one organisation, which the name of the login decides and nothing it could set.
-- The group sluice_dashboard and the owner of the views, sluice_dashboard_views, come from deploy/sql/bootstrap.sql.

CREATE SCHEMA dashboards;
GRANT USAGE, CREATE ON SCHEMA dashboards TO sluice_dashboard_views;
GRANT USAGE ON SCHEMA public TO sluice_dashboard_views;
-- Logins of dashboards have no USAGE on public: they cannot name its tables and functions.
GRANT USAGE ON SCHEMA dashboards TO sluice_dashboard;

-- The organisation of the login (sluice_dashboard_ and its id without dashes); null for any other. session_user, because
-- unlike current_user it stays what it is under SET ROLE and in functions.
CREATE FUNCTION dashboards.organisation() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE WHEN session_user ~ '^sluice_dashboard_[0-9a-f]{32}$' THEN right(session_user::text, 32)::uuid END;
REVOKE ALL ON FUNCTION dashboards.organisation FROM PUBLIC;
GRANT EXECUTE ON FUNCTION dashboards.organisation TO sluice_dashboard, sluice_dashboard_views;

DO $$
DECLARE v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['devices', 'device_sites', 'series'] LOOP
        EXECUTE format('CREATE POLICY dashboard ON %I FOR SELECT TO sluice_dashboard_views
                        USING (organisation_id = dashboards.organisation())', v_table);
    END LOOP;
END $$;
CREATE POLICY dashboard ON sites FOR SELECT TO sluice_dashboard_views
    USING (organisation_id = dashboards.organisation() AND erasing_since IS NULL);
GRANT SELECT ON devices, device_sites, sites, series, readings, text_readings TO sluice_dashboard_views;

SET LOCAL ROLE sluice_dashboard_views;

CREATE VIEW dashboards.sites WITH (security_barrier) AS
    SELECT s.site_id, s.name AS site, s.timezone, s.latitude, s.longitude FROM public.sites s;

CREATE VIEW dashboards.devices WITH (security_barrier) AS
    SELECT d.device_id, d.name AS device, d.local_id, d.model, d.fw_version, d.status, d.site_id, s.name AS site,
        coalesce(d.online_until > now(), false) AS online, d.last_seen_at, d.created_at, d.deleted_at AS removed_at
    FROM public.devices d LEFT JOIN public.sites s USING (site_id);

-- Where each device stood, in [valid_from, valid_until): what it measured there is what it measured meanwhile.
CREATE VIEW dashboards.stays WITH (security_barrier) AS
    SELECT h.device_id, h.site_id, s.name AS site, h.valid_from,
        lead(h.valid_from, 1, 'infinity') OVER (PARTITION BY h.device_id ORDER BY h.valid_from) AS valid_until
    FROM public.device_sites h LEFT JOIN public.sites s USING (site_id);

CREATE VIEW dashboards.readings WITH (security_barrier) AS
    SELECT x.device_id, d.name AS device, x.metric, x.label, x.unit, r.ts AS time, r.value, r.quality
    FROM public.series x JOIN public.devices d USING (device_id) JOIN public.readings r USING (series_id);

CREATE VIEW dashboards.text_readings WITH (security_barrier) AS
    SELECT x.device_id, d.name AS device, x.metric, x.label, r.ts AS time, r.value, r.quality
    FROM public.series x JOIN public.devices d USING (device_id) JOIN public.text_readings r USING (series_id);

-- The newest of each series, number or text.
CREATE VIEW dashboards.latest WITH (security_barrier) AS
    SELECT x.device_id, d.name AS device, x.metric, x.label, x.unit, n.time, n.value, n.text_value
    FROM public.series x JOIN public.devices d USING (device_id) CROSS JOIN LATERAL (
        SELECT e.* FROM (
            (SELECT r.ts AS time, r.value, NULL::text AS text_value FROM public.readings r
             WHERE r.series_id = x.series_id ORDER BY r.ts DESC LIMIT 1)
            UNION ALL
            (SELECT t.ts, NULL, t.value FROM public.text_readings t
             WHERE t.series_id = x.series_id ORDER BY t.ts DESC LIMIT 1)) e
        ORDER BY e.time DESC LIMIT 1) n
    WHERE d.status <> 'deleted';

GRANT SELECT ON ALL TABLES IN SCHEMA dashboards TO sluice_dashboard;

RESET ROLE;
