"""Each turn has an id and a time, also those known only from history; views of messages without a window function."""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

BEGAN = "coalesce(c.created_at, c.occurred_at, c.first_received_at)"
BEGAN_NOW = "coalesce(c.began_at, c.created_at, c.occurred_at, c.first_received_at)"
IS_TOLD = "coalesce(c.created_at, c.occurred_at) IS NOT NULL"
# The id of a turn known only from history, with the number of its first line; 0 for the lines before the first turn.
TURN_ID_OF = "{turn}.session_id || '#' || coalesce(nullif(substr({turn}.chat_id, 2), ''), '0')"

ERASED_AT = """
    (SELECT min(e.erased_at) FROM archiver.erasures e
      WHERE e.session_id = c.session_id AND (e.chat_id = c.chat_id OR (e.chat_id = '' AND e.session_id <> '')))
"""

# In two parts, so that a condition on chat_id or on a time uses the indexes of the turns that have it.
CHATS = f"""
    SELECT c.session_id, c.chat_id, c.assistant_id, c.status, c.cost, c.variables, c.created_at, c.updated_at,
           c.source, c.deleted_at, c.external_id, c.first_received_at, {ERASED_AT} AS erased_at,
           c.chat_id AS turn_id, {BEGAN_NOW} AS began_at, {IS_TOLD} AS began_is_told
      FROM archiver.chats c WHERE c.source <> 'history'
    UNION ALL
    SELECT c.session_id, NULL::text, NULL::text, NULL::text, NULL::numeric, NULL::jsonb, NULL::timestamptz,
           NULL::timestamptz, c.source, NULL::timestamptz, NULL::text, c.first_received_at, {ERASED_AT},
           {TURN_ID_OF.format(turn="c")}, {BEGAN_NOW}, false
      FROM archiver.chats c WHERE c.source = 'history' AND c.chat_id <> E'\\x1f'
"""

MESSAGES = f"""
    SELECT m.session_id,
           row_number() OVER (
               PARTITION BY m.session_id
               ORDER BY m.place, {BEGAN}, c.occurred_at, c.first_received_at, m.chat_id, m.ordinal
           ) AS position,
           CASE WHEN starts_with(m.chat_id, E'\\x1f') THEN NULL ELSE m.chat_id END AS chat_id,
           m.role, m.content, c.created_at, m.source, c.deleted_at, m.in_history, m.content_kind, m.history_content,
           CASE WHEN starts_with(m.chat_id, E'\\x1f')
                THEN {TURN_ID_OF.format(turn="m")} ELSE m.chat_id END AS turn_id,
           m.ordinal, {BEGAN_NOW} AS began_at, {IS_TOLD} AS began_is_told
      FROM archiver.messages m
      LEFT JOIN archiver.chats c ON c.session_id = m.session_id AND c.chat_id = m.chat_id
"""

LINES = f"""
    SELECT m.chat_id AS turn_id, m.session_id, m.ordinal, m.role, m.content, m.content_kind,
           {BEGAN_NOW} AS began_at, {IS_TOLD} AS began_is_told, m.source, c.deleted_at, m.history_content
      FROM archiver.messages m
      JOIN archiver.chats c ON c.session_id = m.session_id AND c.chat_id = m.chat_id
     WHERE c.source <> 'history'
    UNION ALL
    SELECT {TURN_ID_OF.format(turn="c")}, m.session_id, m.ordinal, m.role, m.content, m.content_kind,
           {BEGAN_NOW}, false, m.source, NULL::timestamptz, m.history_content
      FROM archiver.messages m
      JOIN archiver.chats c ON c.session_id = m.session_id AND c.chat_id = m.chat_id
     WHERE c.source = 'history'
"""

TRANSCRIPT = """
    CREATE FUNCTION analytics.transcript(session_id text)
        RETURNS TABLE ("position" bigint, turn_id text, ordinal integer, role text, content text, content_kind text,
                       began_at timestamptz, source text, deleted_at timestamptz)
        LANGUAGE sql STABLE PARALLEL SAFE AS $$
        SELECT m.position, m.turn_id, m.ordinal, m.role, m.content, m.content_kind, m.began_at, m.source, m.deleted_at
          FROM analytics.messages m WHERE m.session_id = $1 ORDER BY m.position
    $$
"""

CHANGED_SESSIONS = """
    CREATE FUNCTION analytics.changed_sessions(after bigint, most integer)
        RETURNS TABLE (session_id text, cursor bigint)
        LANGUAGE sql STABLE PARALLEL SAFE AS $$
        SELECT page.session_id, max(page.cursor)
          FROM (SELECT c.session_id, c.cursor FROM analytics.changes c
                 WHERE c.cursor > $1 AND c.session_id <> '' ORDER BY c.cursor LIMIT $2) AS page
         GROUP BY page.session_id ORDER BY max(page.cursor)
    $$
"""

# As they were before.
EARLIER_CHATS = f"""
    SELECT c.session_id, CASE WHEN starts_with(c.chat_id, E'\\x1f') THEN NULL ELSE c.chat_id END AS chat_id,
           c.assistant_id, c.status, c.cost, c.variables, c.created_at, c.updated_at, c.source, c.deleted_at,
           c.external_id, c.first_received_at, {ERASED_AT} AS erased_at
      FROM archiver.chats c
"""
EARLIER_MESSAGES = f"""
    SELECT m.session_id,
           row_number() OVER (
               PARTITION BY m.session_id
               ORDER BY m.place, {BEGAN}, c.occurred_at, c.first_received_at, m.chat_id, m.ordinal
           ) AS position,
           CASE WHEN starts_with(m.chat_id, E'\\x1f') THEN NULL ELSE m.chat_id END AS chat_id,
           m.role, m.content, c.created_at, m.source, c.deleted_at, m.in_history, m.content_kind, m.history_content
      FROM archiver.messages m
      LEFT JOIN archiver.chats c ON c.session_id = m.session_id AND c.chat_id = m.chat_id
"""

# {turns} is a condition on the turns c.
CONVERSATIONS = """
    SELECT s.session_id,
           coalesce(c.assistant_id, s.assistant_id) AS assistant_id,
           coalesce(c.name, s.name) AS name,
           coalesce(s.status, c.status) AS status,
           coalesce(least(c.started_at, s.created_at), s.first_event_at) AS started_at,
           coalesce(c.last_message_at, s.last_event_at) AS last_message_at,
           coalesce(c.chats, 0) AS chats,
           coalesce(m.messages, 0) AS messages,
           coalesce(m.user_messages, 0) AS user_messages,
           coalesce(m.assistant_messages, 0) AS assistant_messages,
           c.cost,
           coalesce(c.deleted_chats, 0) AS deleted_chats,
           s.coverage, {repaired}, s.reconciled_at,
           (SELECT e.erased_at FROM archiver.erasures e WHERE e.session_id = s.session_id AND e.chat_id = '')
               AS erased_at
      FROM archiver.sessions s
      LEFT JOIN (
          SELECT c.session_id,
                 min({began}) AS started_at,
                 max(greatest({began}, c.updated_at)) AS last_message_at,
                 count(*) AS chats,
                 sum(c.cost) AS cost,
                 count(c.deleted_at) AS deleted_chats,
                 (array_agg(c.assistant_id ORDER BY {began} DESC, c.chat_id DESC)
                     FILTER (WHERE c.assistant_id IS NOT NULL))[1] AS assistant_id,
                 (array_agg(c.session_name ORDER BY {began} DESC, c.chat_id DESC)
                     FILTER (WHERE c.session_name IS NOT NULL))[1] AS name,
                 (array_agg(c.session_status ORDER BY {began} DESC, c.chat_id DESC)
                     FILTER (WHERE c.session_status IS NOT NULL))[1] AS status
            FROM archiver.chats c {turns} GROUP BY c.session_id
      ) c ON c.session_id = s.session_id
      LEFT JOIN (
          SELECT session_id, count(*) AS messages,
                 count(*) FILTER (WHERE role = 'user') AS user_messages,
                 count(*) FILTER (WHERE role = 'assistant') AS assistant_messages
            FROM archiver.messages GROUP BY session_id
      ) m ON m.session_id = s.session_id
     WHERE s.session_id <> ''
"""
DAILY = """
    SELECT ({began} AT TIME ZONE 'UTC')::date AS day,
           coalesce(c.assistant_id, s.assistant_id) AS assistant_id,
           count(DISTINCT c.session_id) FILTER (WHERE c.session_id <> '' {turns}) AS conversations,
           {chats} AS chats,
           coalesce(sum(m.messages), 0)::bigint AS messages,
           sum(c.cost) AS cost,
           count(c.deleted_at) AS deleted_chats,
           coalesce(sum(m.repaired_messages) {repaired}, 0)::bigint AS repaired_messages {started}
      FROM {chats_table}
      LEFT JOIN (
          SELECT c.session_id,
                 coalesce((array_agg(c.assistant_id ORDER BY {began} DESC, c.chat_id DESC)
                     FILTER (WHERE c.assistant_id IS NOT NULL))[1], min(s.assistant_id)) AS assistant_id
            FROM archiver.chats c JOIN archiver.sessions s ON s.session_id = c.session_id
           WHERE c.session_id <> '' GROUP BY c.session_id
      ) s ON s.session_id = c.session_id
      LEFT JOIN (
          SELECT session_id, chat_id, count(*) AS messages,
                 count(*) FILTER (WHERE source = 'history') AS repaired_messages
            FROM archiver.messages GROUP BY session_id, chat_id
      ) m ON m.session_id = c.session_id AND m.chat_id = c.chat_id
     GROUP BY 1, 2
"""
IS_TURN = "c.chat_id <> E'\\x1f'"  # not the lines before the first turn
FIRST_TURN = f"""(
          SELECT c.*, {IS_TURN} AND c.session_id <> '' AND row_number() OVER (
                     PARTITION BY c.session_id, {IS_TURN} ORDER BY {BEGAN_NOW}, c.chat_id) = 1 AS is_first
            FROM archiver.chats c
      ) c"""
NOW = {
    "chats": CHATS,
    "messages": MESSAGES,
    "daily": DAILY.format(
        began=BEGAN_NOW,
        turns=f"AND {IS_TURN}",
        chats=f"count(*) FILTER (WHERE {IS_TURN})",
        repaired=f"FILTER (WHERE {IS_TURN})",
        started=", count(*) FILTER (WHERE c.is_first) AS conversations_started",
        chats_table=FIRST_TURN,
    ),
}
NOW_CONVERSATIONS = CONVERSATIONS.format(
    began=BEGAN_NOW, turns=f"WHERE {IS_TURN}", repaired="s.repaired_messages::bigint AS repaired_messages"
)
BEFORE = {
    "chats": EARLIER_CHATS,
    "messages": EARLIER_MESSAGES,
    "conversations": CONVERSATIONS.format(began=BEGAN, turns="", repaired="s.repaired_messages"),
    "daily": DAILY.format(
        began=BEGAN, turns="", chats="count(*)", repaired="", started="", chats_table="archiver.chats c"
    ),
}

TURN_ID = "Turn: its chat id, or for a turn known only from history session_id, # and the number of its first line."
COMMENTS = {
    "COLUMN archiver.chats.began_at": (
        "Estimated start of a turn known only from history, between its neighbours; null for other turns."
    ),
    "COLUMN analytics.chats.turn_id": TURN_ID,
    "COLUMN analytics.chats.began_at": (
        "When it began: created_at, else its envelope time, else its arrival; estimated if known only from history."
    ),
    "COLUMN analytics.chats.began_is_told": "Whether upstream reported began_at.",
    "COLUMN analytics.messages.turn_id": f"{TURN_ID} Lines before the first turn have number 0.",
    "COLUMN analytics.messages.ordinal": "0, 1, 2 … within the turn.",
    "COLUMN analytics.messages.began_at": "When its turn began; see analytics.chats.",
    "COLUMN analytics.messages.began_is_told": "Whether upstream reported began_at.",
    "COLUMN analytics.daily.conversations_started": "Conversations whose first turn began on this day; adds up.",
    "VIEW analytics.lines": (
        "One row per message, without position: fast with conditions on session_id, turn_id or began_at."
    ),
    "COLUMN analytics.lines.turn_id": f"{TURN_ID} Lines before the first turn have number 0.",
    "COLUMN analytics.lines.session_id": "CallHQ session id; empty for an unassigned turn.",
    "COLUMN analytics.lines.ordinal": "0, 1, 2 … within the turn.",
    "COLUMN analytics.lines.role": "user, assistant, system, tool …",
    "COLUMN analytics.lines.content": "Text of the message.",
    "COLUMN analytics.lines.content_kind": "Kind of content: text, refusal, tool_call or other.",
    "COLUMN analytics.lines.source": "Source: webhook or history.",
    "COLUMN analytics.lines.deleted_at": "When upstream deleted its turn; null if it was not.",
    "COLUMN analytics.lines.began_at": "When its turn began; see analytics.chats.",
    "COLUMN analytics.lines.began_is_told": "Whether upstream reported began_at.",
    "COLUMN analytics.lines.history_content": (
        "Text of the history where it differs from content; null where it does not."
    ),
    "FUNCTION analytics.transcript(text)": "The transcript of one conversation, in order.",
    "FUNCTION analytics.changed_sessions(bigint, integer)": (
        "Conversations among the next changes after a cursor, each with its last one; none: nothing has changed."
    ),
}
# Comments that change: now and before.
CHANGED_COMMENTS = {
    "archiver.chats.chat_id": (
        "CallHQ''s chat id; U+001F and a number: known only from history; U+001F: lines before any turn.",
        "CallHQ''s chat id; U+001F and a number: known only from history.",
    ),
    "analytics.daily.day": (
        "Day in UTC; for a turn known only from history, the day of its estimated start.",
        "Day in UTC; for a turn known only from history, the day of its first reading.",
    ),
    "analytics.daily.conversations": (
        "Conversations with a turn on this day; does not add up over days.",
        "Sessions with a turn on that day.",
    ),
}


def upgrade() -> None:
    # Every message has a row of chats from now on. Before the first exclusive lock, because it reads all messages
    # that history supplied.
    op.execute(
        "INSERT INTO archiver.chats (session_id, chat_id, first_received_at, source)"
        " SELECT DISTINCT m.session_id, m.chat_id, s.first_event_at, 'history'"
        " FROM archiver.messages m JOIN archiver.sessions s ON s.session_id = m.session_id"
        " WHERE m.source = 'history' AND m.chat_id = E'\\x1f' ON CONFLICT DO NOTHING"
    )
    op.execute("ALTER TABLE archiver.chats ADD COLUMN began_at timestamptz")
    op.execute("ALTER TABLE archiver.messages ALTER COLUMN role SET STATISTICS -1")
    _recreate("conversations", NOW_CONVERSATIONS)  # a column of it gets another type
    for name, query in NOW.items():
        op.execute(f"CREATE OR REPLACE VIEW analytics.{name} AS {query}")
    op.execute(f"CREATE VIEW analytics.lines AS {LINES}")
    op.execute(TRANSCRIPT)
    op.execute(CHANGED_SESSIONS)
    op.execute("ALTER FUNCTION analytics.complete_through() PARALLEL SAFE")
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")
    for name, (comment, _) in CHANGED_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN {name} IS '{comment}'")


def downgrade() -> None:
    op.execute("ALTER FUNCTION analytics.complete_through() PARALLEL UNSAFE")
    op.execute("DROP FUNCTION analytics.transcript(text)")
    op.execute("DROP FUNCTION analytics.changed_sessions(bigint, integer)")
    op.execute("DROP VIEW analytics.lines")
    for name, query in BEFORE.items():
        _recreate(name, query)
    for name, (_, comment) in CHANGED_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN {name} IS '{comment}'")
    op.execute("DELETE FROM archiver.chats WHERE chat_id = E'\\x1f'")
    op.execute("ALTER TABLE archiver.messages ALTER COLUMN role SET STATISTICS 0")
    op.execute("ALTER TABLE archiver.chats DROP COLUMN began_at")


def _recreate(name: str, query: str) -> None:
    """Replace a view by one with fewer columns or other types; the columns keep their comments."""
    comments = op.get_bind().exec_driver_sql(
        "SELECT a.attname, d.description FROM pg_description d JOIN pg_class c ON c.oid = d.objoid"
        " LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.objsubid"
        f" WHERE d.objoid = 'analytics.{name}'::regclass AND d.classoid = 'pg_class'::regclass"
    )
    found = {column: comment.replace("'", "''") for column, comment in comments}
    op.execute(f"DROP VIEW analytics.{name}")
    op.execute(f"CREATE VIEW analytics.{name} AS {query}")
    columns = op.get_bind().exec_driver_sql(
        f"SELECT attname FROM pg_attribute WHERE attrelid = 'analytics.{name}'::regclass"
    )
    for column in [None, *columns.scalars()]:
        if column in found:
            target = f"VIEW analytics.{name}" if column is None else f"COLUMN analytics.{name}.{column}"
            op.execute(f"COMMENT ON {target} IS '{found[column]}'")
