"""Store one row per session for analysts (`archiver.summaries`), each recomputed whole from the archive.

The caller holds `Lock.PUBLISHING`: the publisher of the feed, in the transaction that numbers the changes of these
sessions; the transaction that erases their content; or the duty that adds missing rows. The caller acquires the lock
before the statements of `refresh`, which therefore see everything that the previous holder committed. So erased
content cannot be written again, and all changes up to the newest cursor are in the rows.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection

from archiver.database import RawStatement, as_json

_BEGAN = "coalesce(c.began_at, c.created_at, c.occurred_at, c.first_received_at)"
_HAS_TEXT = "m.content <> '' AND m.content_kind IN ('text', 'refusal')"
# The order of `analytics.messages`, as a row that can be compared. A message without a place is ordered by its turn,
# which is looked up by its key: a join would compare each message of a long session with each turn.
_PLACE = """ROW (
    coalesce(m.place, 2147483647),
    CASE WHEN m.place IS NULL THEN (
        SELECT ROW (coalesce(c.created_at, c.occurred_at, c.first_received_at), c.occurred_at, c.first_received_at)
          FROM archiver.chats c WHERE c.session_id = m.session_id AND c.chat_id = m.chat_id) END,
    m.chat_id, m.ordinal)
"""
_OF_TURN = "FROM archiver.chats c WHERE c.session_id = s.session_id AND c.chat_id ="
_COLUMNS = (
    "assistant_id",
    "started_at",
    "last_message_at",
    "turns",
    "messages",
    "user_messages",
    "assistant_messages",
    "cost",
    "deleted_chats",
    "repaired_messages",
    "coverage",
    "reason",
    "first_question",
    "first_answer",
    "answer_seconds",
    "variables",
)

# Lateral subqueries, because under the lock Postgres looks up rows by key and joins by nested loops. OFFSET 0: while
# Postgres has no statistics of the sessions, it might otherwise read all of them and compare each with the page.
_UPSERT = RawStatement(
    f"""
    WITH page AS MATERIALIZED (
        SELECT session_id, cursor FROM json_to_recordset($1) AS p (session_id text, cursor bigint)
    )
    INSERT INTO archiver.summaries AS known (session_id, {", ".join(_COLUMNS)}, changed_cursor)
    SELECT s.session_id, coalesce(turns.assistant_id, s.assistant_id),
           coalesce(least(turns.started_at, s.created_at), s.first_event_at),
           coalesce(turns.last_message_at, s.last_event_at),
           turns.count, messages.count, messages.of_user, messages.of_assistant, turns.cost, turns.deleted,
           s.repaired_messages, s.coverage, s.reason, question.content, answer.content,
           CAST(extract(epoch FROM (SELECT c.answered_at {_OF_TURN} answer.chat_id)
                                   - (SELECT c.created_at {_OF_TURN} question.chat_id)) AS double precision),
           variables.merged, page.cursor
      FROM page
     CROSS JOIN LATERAL (
         SELECT * FROM archiver.sessions s WHERE s.session_id = page.session_id OFFSET 0
     ) s
     CROSS JOIN LATERAL (
         SELECT count(*) AS count, min({_BEGAN}) AS started_at,
                max(greatest({_BEGAN}, c.updated_at)) AS last_message_at, sum(c.cost) AS cost,
                count(c.deleted_at) AS deleted,
                (array_agg(c.assistant_id ORDER BY {_BEGAN} DESC, c.chat_id DESC)
                    FILTER (WHERE c.assistant_id IS NOT NULL))[1] AS assistant_id
           FROM archiver.chats c WHERE c.session_id = s.session_id AND c.chat_id <> E'\\x1f'
     ) turns
     CROSS JOIN LATERAL (
         SELECT count(*) AS count, count(*) FILTER (WHERE m.role = 'user') AS of_user,
                count(*) FILTER (WHERE m.role = 'assistant') AS of_assistant
           FROM archiver.messages m WHERE m.session_id = s.session_id
     ) messages
      LEFT JOIN LATERAL (
         SELECT m.chat_id, m.content, {_PLACE} AS place FROM archiver.messages m
          WHERE m.session_id = s.session_id AND m.role = 'user' AND {_HAS_TEXT}
          ORDER BY place LIMIT 1
     ) question ON true
      LEFT JOIN LATERAL (
         SELECT m.chat_id, m.content, {_PLACE} AS place FROM archiver.messages m
          WHERE m.session_id = s.session_id AND m.role = 'assistant' AND {_HAS_TEXT} AND {_PLACE} > question.place
          ORDER BY place LIMIT 1
     ) answer ON true
     CROSS JOIN LATERAL (
         SELECT jsonb_object_agg(v.key, v.value ORDER BY {_BEGAN}, c.occurred_at, c.first_received_at, c.chat_id)
                    AS merged
           FROM archiver.chats c CROSS JOIN LATERAL jsonb_each(c.variables) v
          WHERE c.session_id = s.session_id
     ) variables
     ORDER BY s.session_id
    ON CONFLICT (session_id) DO UPDATE
       SET {", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)},
           changed_cursor = greatest(known.changed_cursor, excluded.changed_cursor)
    """  # noqa: S608  # only constants are inserted, never input
)
_DELETE_GONE = RawStatement(
    """
    DELETE FROM archiver.summaries
     WHERE session_id IN (SELECT json_array_elements_text($1))
       AND NOT EXISTS (SELECT FROM archiver.sessions s WHERE s.session_id = summaries.session_id)
    """
)


def refresh(connection: Connection, session_ids: Sequence[str], cursors: Mapping[str, int]) -> None:
    """Recompute the rows of these sessions, each with the cursor of its last change; delete rows of missing sessions.

    The cursor of a row never decreases.
    """
    _UPSERT.execute(connection, as_json([{"session_id": each, "cursor": cursors[each]} for each in session_ids]))
    _DELETE_GONE.execute(connection, as_json(session_ids))


_DELETE = RawStatement("DELETE FROM archiver.summaries WHERE session_id = $1")


def delete(connection: Connection, session_id: str) -> None:
    """Delete the row of a session."""
    _DELETE.execute(connection, session_id)
