-- The roles of callhq-archiver: run once for each Postgres server, as a superuser or a user with CREATEROLE.
-- Then run `archiver migrate`, as the owner of the database: it grants each of them what it needs, now and after
-- every upgrade. Let your users in by: GRANT archiver_writer TO your_user;
-- Set limits for each login that reads the archive: docs/data-model.md, "Limits of a login".

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'archiver_writer',   -- `archiver serve` and `archiver worker`: append to the ledger, derive the archive, seal
        'archiver_reader',   -- dashboards: the views of schema analytics, and nothing else
        'archiver_metrics',  -- dashboards of numbers: the same views without content, variables, names and external ids
        'archiver_auditor'   -- `archiver verify`, `prove` and `export`: read everything, change nothing
    ] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', name);
        END IF;
    END LOOP;
END
$$;
