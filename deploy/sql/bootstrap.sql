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
        'sluice_owner', 'sluice_app', 'sluice_ingest', 'sluice_worker', 'sluice_reader', 'sluice'
    ] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            EXECUTE format('CREATE ROLE %I', wanted);
        END IF;
    END LOOP;
END
$$;

-- Runs the migrations and owns what they make. No role here gets around row-level security.
ALTER ROLE sluice_owner LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;

-- One for each kind of work; what each may touch is granted by the migrations.
ALTER ROLE sluice_app NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
ALTER ROLE sluice_ingest NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
ALTER ROLE sluice_worker NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
ALTER ROLE sluice_reader NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;

-- What processes log in as: it may do nothing until it takes one of the roles above.
ALTER ROLE sluice LOGIN NOINHERIT NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE;
GRANT sluice_app, sluice_ingest, sluice_worker, sluice_reader TO sluice
    WITH ADMIN FALSE, INHERIT FALSE, SET TRUE;

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

COMMIT;
