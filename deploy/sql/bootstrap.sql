-- Roles and the schema's ownership, for a database that a superuser has just created. May be run
-- again. Passwords are set by the caller (ALTER ROLE … PASSWORD), so that this file holds none.

BEGIN;

-- Roles are the cluster's, not a database's: two runs at once would meet at their rows and one would fail.
LOCK TABLE pg_catalog.pg_authid IN SHARE ROW EXCLUSIVE MODE;

-- Creating and altering are two steps, because a role left by an older version is corrected too.
DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY[
        'sluice_owner', 'sluice_app', 'sluice_ingest', 'sluice_worker', 'sluice_reader', 'sluice',
        'sluice_dashboard', 'sluice_dashboard_views'
    ] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            EXECUTE format('CREATE ROLE %I', wanted);
        END IF;
    END LOOP;
END
$$;

-- Runs the migrations and owns what they make. No role here gets around row-level security. It makes the logins of
-- dashboards, and can neither give them more than it has nor touch a role that it has not made.
ALTER ROLE sluice_owner LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB CREATEROLE;

-- One for each kind of work; what each may touch is granted by the migrations.
ALTER ROLE sluice_app NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
ALTER ROLE sluice_ingest NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
ALTER ROLE sluice_worker NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
ALTER ROLE sluice_reader NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;

-- What processes log in as: it may do nothing until it takes one of the roles above.
ALTER ROLE sluice LOGIN NOINHERIT NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
GRANT sluice_app, sluice_ingest, sluice_worker, sluice_reader TO sluice
    WITH ADMIN FALSE, INHERIT FALSE, SET TRUE;

-- What logins of dashboards are members of, and who owns the views they look at. A login gets its rights without being
-- able to become the group; the owner becomes the views' owner to make them.
ALTER ROLE sluice_dashboard NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
ALTER ROLE sluice_dashboard_views NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
GRANT sluice_dashboard TO sluice_owner WITH ADMIN TRUE, INHERIT FALSE, SET FALSE;
GRANT sluice_dashboard_views TO sluice_owner WITH ADMIN FALSE, INHERIT FALSE, SET TRUE;

DO $$
BEGIN
    EXECUTE format('ALTER DATABASE %I OWNER TO sluice_owner', current_database());
    -- The embedded database comes without it and partitions by its own means.
    IF EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb')
       AND NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        CREATE EXTENSION timescaledb;
    END IF;
END
$$;

ALTER SCHEMA public OWNER TO sluice_owner;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO sluice_owner;
GRANT USAGE ON SCHEMA public
    TO sluice, sluice_app, sluice_ingest, sluice_worker, sluice_reader;

-- Whatever logs in could fill the disk with tables of its own, large objects or messages in the write-ahead log, and hold
-- landing up with locks of ours. Only our own roles may.
DO $$
DECLARE
    v_ours text := 'sluice_owner, sluice, sluice_app, sluice_ingest, sluice_worker, sluice_reader';
    v_function regprocedure;
BEGIN
    EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT TEMPORARY ON DATABASE %I TO %s', current_database(), v_ours);
    FOR v_function IN
        SELECT p.oid FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace AND (
            p.proname ~ '^pg_(try_)?advisory_(xact_)?lock(_shared)?$'
            OR p.proname IN ('lo_creat', 'lo_create', 'lo_from_bytea', 'pg_logical_emit_message'))
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', v_function);
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', v_function, v_ours);
    END LOOP;
END
$$;

COMMIT;
