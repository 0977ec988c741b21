"""Full-text search: a table of lexemes, partitioned by month, and the function that searches it."""

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

# The partitions are in a schema of their own, because a worker adds them.
TABLES = """
    CREATE TABLE archiver.search (
        session_id text NOT NULL,
        chat_id text NOT NULL,
        ordinal integer NOT NULL,
        began_at timestamptz NOT NULL,
        assistant_id text,
        digest bigint NOT NULL,
        page bigint NOT NULL,
        lexemes tsvector NOT NULL,
        CONSTRAINT search_pkey PRIMARY KEY (session_id, chat_id, ordinal, began_at)
    ) PARTITION BY RANGE (began_at);
    ALTER TABLE archiver.search ALTER COLUMN lexemes SET STATISTICS 0, ALTER COLUMN digest SET STATISTICS 0;
    CREATE INDEX search_lexemes_idx ON archiver.search USING gin (lexemes) WITH (fastupdate = off);
    CREATE SCHEMA archiver_search;
    CREATE TABLE archiver_search.other PARTITION OF archiver.search DEFAULT;
    ALTER TABLE archiver_search.other ALTER COLUMN lexemes SET STATISTICS 0, ALTER COLUMN digest SET STATISTICS 0;
    CREATE TABLE archiver.search_partitions (
        name text NOT NULL,
        since timestamptz,
        until timestamptz,
        stale_at timestamptz,
        rebuilt_at timestamptz,
        CONSTRAINT search_partitions_pkey PRIMARY KEY (name)
    );
    INSERT INTO archiver.search_partitions (name) VALUES ('other');
    CREATE TABLE archiver.search_state (
        id integer NOT NULL,
        language text,
        cursor bigint NOT NULL,
        page bigint NOT NULL,
        backlog_session text,
        backlog_chat text,
        CONSTRAINT search_state_pkey PRIMARY KEY (id)
    );
    INSERT INTO archiver.search_state (id, cursor, page) VALUES (1, 0, 0);
    CREATE TABLE archiver_jobs.lock_indexing ()
"""

# Not CREATE TABLE ... PARTITION OF, which blocks every search while it waits for its lock.
ADD_MONTH = """
    CREATE FUNCTION archiver.add_search_month(month timestamptz) RETURNS void
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
    DECLARE
        since timestamptz := date_trunc('month', month);
        until timestamptz := since + interval '1 month';
        name text := to_char(since, '"y"YYYY"m"MM');
    BEGIN
        LOCK TABLE archiver_jobs.lock_indexing IN EXCLUSIVE MODE;
        INSERT INTO archiver.search_partitions (name, since, until) VALUES (name, since, until)
            ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            RETURN;
        END IF;
        EXECUTE format('CREATE TABLE archiver_search.%I (LIKE archiver.search INCLUDING STORAGE)', name);
        EXECUTE format(
            'ALTER TABLE archiver_search.%I ADD PRIMARY KEY (session_id, chat_id, ordinal, began_at),'
            ' ALTER COLUMN lexemes SET STATISTICS 0, ALTER COLUMN digest SET STATISTICS 0', name);
        EXECUTE format(
            'WITH moved AS (DELETE FROM archiver_search.other WHERE began_at >= %L AND began_at < %L RETURNING *)'
            ' INSERT INTO archiver_search.%I SELECT * FROM moved', since, until, name);
        EXECUTE format('CREATE INDEX ON archiver_search.%I USING gin (lexemes) WITH (fastupdate = off)', name);
        EXECUTE format('ALTER TABLE archiver.search ATTACH PARTITION archiver_search.%I FOR VALUES FROM (%L) TO (%L)',
                       name, since, until);
    END
    $$
"""

# The copy has no dead row and no lexeme of one: an index that is only vacuumed or rebuilt in place may keep both.
# Others write while the rows are copied; then they wait until the differences are copied too.
REBUILD = """
    CREATE FUNCTION archiver.rebuild_search(partition text) RETURNS boolean
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
    DECLARE
        old archiver.search_partitions;
        copied bigint;
        bounds text;
    BEGIN
        -- One rebuild at a time; erasures may update the rows.
        LOCK TABLE archiver.search_partitions IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
        SELECT * INTO old FROM archiver.search_partitions WHERE name = partition AND stale_at IS NOT NULL;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        SELECT page INTO copied FROM archiver.search_state;
        bounds := CASE WHEN old.since IS NULL THEN 'DEFAULT'
                       ELSE format('FOR VALUES FROM (%L) TO (%L)', old.since, old.until) END;
        CREATE TABLE archiver_search.copy (LIKE archiver.search INCLUDING STORAGE);
        ALTER TABLE archiver_search.copy ALTER COLUMN lexemes SET STATISTICS 0, ALTER COLUMN digest SET STATISTICS 0;
        IF old.since IS NOT NULL THEN
            -- So that Postgres need not read the rows again when it attaches them.
            EXECUTE format('ALTER TABLE archiver_search.copy ADD CONSTRAINT bounds'
                           ' CHECK (began_at >= %L AND began_at < %L)', old.since, old.until);
        END IF;
        EXECUTE format('INSERT INTO archiver_search.copy SELECT * FROM archiver_search.%I', old.name);
        ALTER TABLE archiver_search.copy ADD PRIMARY KEY (session_id, chat_id, ordinal, began_at);
        CREATE INDEX ON archiver_search.copy USING gin (lexemes) WITH (fastupdate = off);

        LOCK TABLE archiver_jobs.lock_indexing IN EXCLUSIVE MODE;
        EXECUTE format(
            'DELETE FROM archiver_search.copy c WHERE NOT EXISTS ('
            ' SELECT FROM archiver_search.%I o WHERE o.session_id = c.session_id AND o.chat_id = c.chat_id'
            ' AND o.ordinal = c.ordinal AND o.began_at = c.began_at AND o.page = c.page)', old.name);
        EXECUTE format(
            'INSERT INTO archiver_search.copy SELECT * FROM archiver_search.%I o WHERE o.page > %L AND NOT EXISTS ('
            ' SELECT FROM archiver_search.copy c WHERE o.session_id = c.session_id AND o.chat_id = c.chat_id'
            ' AND o.ordinal = c.ordinal AND o.began_at = c.began_at)', old.name, copied);
        EXECUTE format('ALTER TABLE archiver.search DETACH PARTITION archiver_search.%I', old.name);
        EXECUTE format('DROP TABLE archiver_search.%I', old.name);
        EXECUTE format('ALTER TABLE archiver_search.copy RENAME TO %I', old.name);
        EXECUTE format('ALTER TABLE archiver.search ATTACH PARTITION archiver_search.%I %s', old.name, bounds);
        IF old.since IS NOT NULL THEN
            EXECUTE format('ALTER TABLE archiver_search.%I DROP CONSTRAINT bounds', old.name);
        END IF;
        -- Rows that were deleted while the others were copied are in the copy, too.
        UPDATE archiver.search_partitions p
           SET rebuilt_at = clock_timestamp(),
               stale_at = CASE WHEN p.stale_at <> old.stale_at THEN p.stale_at END
         WHERE p.name = old.name;
        RETURN true;
    END
    $$
"""

# With the privileges of the owner, so that readers need none on the table. They may read every message anyway.
SEARCH = """
    CREATE FUNCTION analytics.search(
        query text, since timestamptz DEFAULT NULL, until timestamptz DEFAULT NULL, assistant_id text DEFAULT NULL,
        before timestamptz DEFAULT NULL, most integer DEFAULT 100
    ) RETURNS TABLE (session_id text, turn_id text, ordinal integer, role text, began_at timestamptz, snippet text)
        LANGUAGE plpgsql STABLE SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
    #variable_conflict use_column
    DECLARE
        language regconfig := (SELECT s.language FROM archiver.search_state s);
        wanted tsquery;
        span record;
        upper timestamptz;
        missing integer := most;
        keys archiver.search[];
        returned bigint;
        is_last boolean;
    BEGIN
        IF language IS NULL THEN
            RAISE EXCEPTION 'search is off'
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'Start "archiver worker" with ARCHIVER_SEARCH=on.';
        END IF;
        IF most IS NULL OR most NOT BETWEEN 1 AND 1000 THEN
            RAISE EXCEPTION 'invalid most: %; it must be between 1 and 1000', most
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        wanted := websearch_to_tsquery(language, $1);
        IF coalesce(numnode(wanted), 0) = 0 THEN
            RETURN;
        END IF;
        -- Each partition, and each gap between two of them, whose rows are in the default partition; newest first.
        FOR span IN
            SELECT greatest(s.since, $2) AS since, least(s.until, $3, $5) AS until
              FROM (SELECT e.at AS since, lead(e.at, 1, 'infinity') OVER (ORDER BY e.at) AS until
                      FROM (SELECT timestamptz '-infinity' AS at
                            UNION SELECT p.since FROM archiver.search_partitions p WHERE p.since IS NOT NULL
                            UNION SELECT p.until FROM archiver.search_partitions p WHERE p.until IS NOT NULL) e) s
             WHERE greatest(s.since, $2) < least(s.until, $3, $5)
             ORDER BY 1 DESC
        LOOP
            upper := span.until;
            LOOP
                SELECT array_agg(CAST(ROW(f.session_id, f.chat_id, f.ordinal, f.began_at, NULL, 0, 0, NULL)
                                      AS archiver.search)) INTO keys
                  FROM (SELECT s.session_id, s.chat_id, s.ordinal, s.began_at
                          FROM archiver.search s
                         WHERE s.lexemes @@ wanted AND s.began_at >= span.since AND s.began_at < upper
                           AND ($4 IS NULL OR s.assistant_id = $4
                                OR s.assistant_id IS NULL AND s.session_id <> ''
                                   AND (EXISTS (SELECT FROM archiver.chats c
                                                 WHERE c.session_id = s.session_id AND c.assistant_id = $4)
                                        OR EXISTS (SELECT FROM archiver.sessions c
                                                    WHERE c.session_id = s.session_id AND c.assistant_id = $4)))
                         ORDER BY s.began_at DESC FETCH FIRST missing ROWS WITH TIES) f;
                EXIT WHEN keys IS NULL;
                RETURN QUERY
                    SELECT k.session_id,
                           CASE WHEN starts_with(k.chat_id, E'\\x1f')
                                THEN k.session_id || '#' || coalesce(nullif(substr(k.chat_id, 2), ''), '0')
                                ELSE k.chat_id END,
                           k.ordinal, m.role, k.began_at,
                           ts_headline(language, left(m.content, 100000), wanted,
                                       'StartSel=**, StopSel=**, MaxFragments=2, MinWords=5, MaxWords=20,'
                                       ' FragmentDelimiter=" … "')
                      FROM unnest(keys) k
                      JOIN archiver.messages m
                        ON m.session_id = k.session_id AND m.chat_id = k.chat_id AND m.ordinal = k.ordinal
                     ORDER BY k.began_at DESC, k.session_id, k.chat_id, k.ordinal;
                GET DIAGNOSTICS returned = ROW_COUNT;
                is_last := cardinality(keys) < missing;
                missing := missing - returned;
                IF missing <= 0 THEN
                    RETURN;
                END IF;
                EXIT WHEN is_last;
                upper := (SELECT min(k.began_at) FROM unnest(keys) k);
            END LOOP;
        END LOOP;
    END
    $$
"""

FUNCTIONS = (
    "archiver.add_search_month(timestamptz)",
    "archiver.rebuild_search(text)",
    "analytics.search(text, timestamptz, timestamptz, text, timestamptz, integer)",
)

TURN = "CallHQ''s chat id; U+001F and a number: known only from history; U+001F: lines before any turn."
COMMENTS = {
    "TABLE archiver.search": "The words of each message, for analytics.search; derived from messages by a worker.",
    "COLUMN archiver.search.session_id": "Conversation; empty for an unassigned turn.",
    "COLUMN archiver.search.chat_id": TURN,
    "COLUMN archiver.search.ordinal": "0, 1, 2 … within the turn.",
    "COLUMN archiver.search.began_at": "When the turn began, as in analytics.messages; selects the partition.",
    "COLUMN archiver.search.assistant_id": "Assistant of the turn; null if the turn names none.",
    "COLUMN archiver.search.digest": "Digest of the text, by which a changed text is found.",
    "COLUMN archiver.search.page": "Number of the transaction that wrote the row.",
    "COLUMN archiver.search.lexemes": "Words of the text and their positions.",
    "TABLE archiver.search_partitions": "The partitions of search: one for each month, and one for other times.",
    "COLUMN archiver.search_partitions.name": "Its table in the schema archiver_search.",
    "COLUMN archiver.search_partitions.since": "First time of the month, in UTC; null: times of no other partition.",
    "COLUMN archiver.search_partitions.until": "End of the month, exclusive; null: times of no other partition.",
    "COLUMN archiver.search_partitions.stale_at": (
        "When words of erased messages were last removed; null: its files have none."
    ),
    "COLUMN archiver.search_partitions.rebuilt_at": "When it was last rewritten without such words; null: never.",
    "TABLE archiver.search_state": "One row: how far search follows the archive.",
    "COLUMN archiver.search_state.id": "1.",
    "COLUMN archiver.search_state.language": "Text search configuration of Postgres; null: search is off.",
    "COLUMN archiver.search_state.cursor": "The change feed is followed up to this cursor.",
    "COLUMN archiver.search_state.page": "Transactions that wrote rows of search.",
    "COLUMN archiver.search_state.backlog_session": "Earlier turns are indexed up to this session; null: all are.",
    "COLUMN archiver.search_state.backlog_chat": "The turn of that session.",
    "TABLE archiver_jobs.lock_indexing": (
        "Always empty; it is only locked. For transactions that write archiver.search."
    ),
    "SCHEMA archiver_search": "Partitions of archiver.search.",
    "FUNCTION archiver.add_search_month(timestamptz)": "Add the partition of a month to archiver.search.",
    "FUNCTION archiver.rebuild_search(text)": (
        "Rewrite a partition of archiver.search without deleted rows; false if it is not stale."
    ),
    "FUNCTION analytics.search(text, timestamptz, timestamptz, text, timestamptz, integer)": (
        "Messages that match the query, newest first; for the next page, before is began_at of the last row."
    ),
}


def upgrade() -> None:
    for statement in TABLES.split(";"):
        op.execute(statement)
    for function in (ADD_MONTH, REBUILD, SEARCH):
        op.execute(function)
    for name in FUNCTIONS:
        op.execute(f"REVOKE EXECUTE ON FUNCTION {name} FROM PUBLIC")
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")


def downgrade() -> None:
    for name in reversed(FUNCTIONS):
        op.execute(f"DROP FUNCTION {name}")
    op.execute("DROP TABLE archiver.search, archiver.search_partitions, archiver.search_state")
    op.execute("DROP TABLE archiver_jobs.lock_indexing")
    op.execute("DROP SCHEMA archiver_search")
