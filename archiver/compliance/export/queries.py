"""Build the COPY statements for the files of an export."""

from collections.abc import Iterator

from psycopg import sql

from archiver.compliance.export.selection import Selection

# Session by session: indexes return the rows in order, so that Postgres sorts nothing large.
_OF_SESSIONS = """
    SELECT {what} FROM ({sessions}) s CROSS JOIN LATERAL ({rows} WHERE v.session_id = s.session_id OFFSET 0) v
     ORDER BY s.session_id{order}
"""
_OF_NONE = (
    "SELECT {what} FROM ({rows} WHERE v.session_id = '' AND v.chat_id IN ({turns})) v ORDER BY v.session_id{order}"
)
_ROWS = {
    "conversations": (
        "SELECT v.*, (SELECT k.reason FROM analytics.coverage k WHERE k.session_id = v.session_id) AS reason"
        " FROM analytics.conversations v"
    ),
    "chats": "SELECT v.* FROM analytics.chats v",
    "messages": "SELECT v.* FROM analytics.messages v",
}
_ORDER = {
    "conversations": "",
    "chats": ", coalesce(v.created_at, v.first_received_at), v.first_received_at, v.chat_id",
    "messages": ", v.position",
}
TRANSCRIPTS = tuple(_ROWS)
_JSON = sql.SQL("row_to_json(v)::text")
_BINARY = "COPY ({}) TO STDOUT (FORMAT BINARY, ENCODING 'UTF8')"


def as_json(selection: Selection, name: str) -> Iterator[sql.Composable]:
    """Return queries whose rows have one text column, a JSON object; unassigned turns come first."""
    return (sql.SQL(_BINARY).format(query) for query in rows_of(selection, name, _JSON))


def as_csv(selection: Selection, name: str) -> Iterator[sql.Composable]:
    """Return queries for the same rows as CSV (RFC 4180), with one header."""
    for number, query in enumerate(rows_of(selection, name, sql.SQL("v.*"))):
        header = sql.SQL("" if number else ", HEADER")
        yield sql.SQL("COPY ({}) TO STDOUT (FORMAT CSV, ENCODING 'UTF8'{})").format(query, header)


def view(name: str) -> sql.Composable:
    """Return the query for all rows of this file, to which a condition on `v` can be added."""
    return sql.SQL(_ROWS[name])


def columns(name: str) -> sql.Composable:
    """Return a query that returns no rows but has the columns of this file."""
    return sql.SQL(_ROWS[name] + " LIMIT 0")


def rows_of(selection: Selection, name: str, what: sql.Composable) -> Iterator[sql.Composable]:
    """Yield the queries that together select the content of this file."""
    order = sql.SQL(_ORDER[name])
    rows = sql.SQL(_ROWS[name])
    if name != "conversations":
        yield sql.SQL(_OF_NONE).format(what=what, rows=rows, turns=selection.turns(), order=order)
    yield sql.SQL(_OF_SESSIONS).format(what=what, sessions=_named(selection), rows=rows, order=order)


def _named(selection: Selection) -> sql.Composable:
    return sql.SQL("SELECT * FROM ({}) AS named (session_id)").format(selection.sessions())


# The messages of a conversation that are not deleted, in true order.
_CHAT = """
    SELECT row_to_json(v)::text
      FROM ({}) s CROSS JOIN LATERAL (
          SELECT json_agg(row_to_json((SELECT r FROM (SELECT m.role, m.content) r)) ORDER BY m.position) AS messages
            FROM analytics.messages m WHERE m.session_id = s.session_id AND m.deleted_at IS NULL
      ) v
     WHERE v.messages IS NOT NULL ORDER BY s.session_id
"""


def as_openai(selection: Selection) -> sql.Composable:
    """Return a query with one row per conversation: `{"messages": [{"role", "content"}]}`."""
    return sql.SQL(_BINARY).format(sql.SQL(_CHAT).format(_named(selection)))


# The id, the line without its byte fields, and then these fields: to encode them in Postgres would double the time.
_EVENT = """
    SELECT v.id, row_to_json((SELECT r FROM (SELECT
               v.id, v.type, v.source, v.session_id, v.chat_id, v.received_at, v.last_received_at, v.delivery_count,
               v.occurred_at, v.earliest_at, v.key_id) r))::text, v.body_digest, v.dedupe_key, v.salt,
           CASE WHEN v.runs IS NULL THEN v.body ELSE archiver.body_of(v.session_id, v.frame, v.runs) END
      FROM ({}) v
"""


def events(selection: Selection) -> sql.Composable:
    """Return the query for ledger rows by id: id, JSON without byte fields, body_digest, dedupe_key, salt, body."""
    return sql.SQL(_BINARY).format(sql.SQL(_EVENT).format(ledger(selection)))


def ledger(selection: Selection) -> sql.Composable:
    """Return a query for the rows of the ledger in order of their ids."""
    if selection.is_all:
        return sql.SQL("SELECT * FROM archiver.events ORDER BY id")
    # Two queries, so that each can use its index.
    return sql.SQL(
        "SELECT * FROM archiver.events WHERE session_id IN ({}) UNION ALL"
        " SELECT * FROM archiver.events WHERE session_id = '' AND chat_id IN ({}) ORDER BY id"
    ).format(selection.sessions(), selection.turns())


def erasures(selection: Selection) -> sql.Composable:
    """Return the query for the erasures of the selection: id and JSON object."""
    query = sql.SQL(
        "SELECT v.id, row_to_json(v)::text FROM (SELECT e.id, e.session_id, e.chat_id, e.erased_at, e.rule, e.act_id,"
        " e.recorded_at, e.database_user"
        " FROM archiver.erasures e WHERE {}) v ORDER BY v.id"
    )
    return sql.SQL(_BINARY).format(query.format(selection.where()))


def acts(selection: Selection) -> sql.Composable:
    """Return the query for the audit entries of these erasures, or all for a full export: id and JSON object."""
    ordered = sql.SQL("a.id IN (SELECT e.act_id FROM archiver.erasures e WHERE {})").format(selection.where())
    query = sql.SQL(
        "SELECT v.id, row_to_json(v)::text FROM (SELECT a.id, a.at, a.actor, a.kind, a.reason, a.detail,"
        " a.database_user"
        " FROM archiver.acts a WHERE {}) v ORDER BY v.id"
    )
    return sql.SQL(_BINARY).format(query.format(sql.SQL("true") if selection.is_all else ordered))
