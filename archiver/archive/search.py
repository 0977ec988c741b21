"""Write the table of full-text search, which contains the lexemes of the messages without their text.

A worker follows the change feed and refreshes the turns that changed. Rows of messages that no longer exist are
deleted; their lexemes remain in the files of the partition until `rebuild` rewrites it.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, text

from archiver.archive.facts import UNASSIGNED
from archiver.database import Lock, as_json, privileges

CHANGES_PER_PAGE = 500
TURNS_PER_PAGE = 500
# Indexed characters of a message: their lexemes cannot exceed the limit of a tsvector, 1 MB.
MAX_CHARACTERS = 100_000
REBUILD_PAUSE_SECONDS = 3_600.0  # between two rebuilds of a partition
FAILED_PAUSE_SECONDS = 900.0  # after a rebuild that failed
REBUILD_LATE_SECONDS = 7_200.0


class Item(NamedTuple):
    """A turn to index; with `chat_id` None, all turns of the session."""

    session_id: str
    chat_id: str | None


class Page(msgspec.Struct, frozen=True):
    """Items to index. `cursor`, `backlog`: the state after them; the last turn of the backlog is None at its end.

    `size`: the number of changes or of turns of which these are the items.
    """

    number: int
    cursor: int
    backlog: Sequence[str] | None
    items: Sequence[Item]
    size: int


class Indexed(NamedTuple):
    """The number of messages indexed, and how many of them only in part."""

    messages: int
    partial: int


_RESOLVE = text(
    """
    SELECT format('%I.%I', n.nspname, c.cfgname)
      FROM pg_ts_config c JOIN pg_namespace n ON n.oid = c.cfgnamespace
     WHERE c.cfgname = :name AND pg_ts_config_is_visible(c.oid) OR n.nspname || '.' || c.cfgname = :name
     ORDER BY c.cfgname = :name DESC LIMIT 1
    """
)


def select_language(connection: Connection, name: str) -> str | None:
    """Return the qualified name of this text search configuration of Postgres; None if it does not exist."""
    found = connection.scalar(_RESOLVE, {"name": name})
    return None if found is None else str(found)


def unknown_language(name: str) -> tuple[str, str]:
    """Return what is wrong with a name that `select_language` does not find, and what to do."""
    return (
        f"ARCHIVER_SEARCH_LANGUAGE: Postgres has no text search configuration {name!r}.",
        "SELECT cfgname FROM pg_ts_config lists the names; write one in another schema as SCHEMA.NAME.",
    )


def other_language(name: str, present: str) -> tuple[str, str]:
    """Return the fault of a setting that names another language than that of the index, and what to do."""
    return (
        f"ARCHIVER_SEARCH_LANGUAGE is {name!r}, but the search index was started with {present!r} and keeps it.",
        "Set the same language for all workers. To change it, restart them with ARCHIVER_SEARCH=off, wait for the log"
        " line `search index deleted`, and restart them with on: this indexes all messages again.",
    )


def other_setting(own: str, workers: Sequence[str]) -> tuple[str, str]:
    """Return the fault of workers that run with the opposite of this setting of ARCHIVER_SEARCH, and what to do."""
    other = "on" if own == "off" else "off"
    return (
        f"ARCHIVER_SEARCH is {own} here, but {other} for the worker {', '.join(workers)}. The index is kept while a"
        " worker with on runs.",
        "Set the same value for all workers, and restart them.",
    )


# A rebuild acquires this lock before `Lock.INDEXING`, and so do transactions that empty the table.
_EXCLUDE_REBUILDS = text("LOCK TABLE archiver.search_partitions IN SHARE UPDATE EXCLUSIVE MODE")
_SELECT_LANGUAGE = text("SELECT language FROM archiver.search_state")
_EMPTY = text("TRUNCATE archiver.search")
_RESTART = text(
    """
    UPDATE archiver.search_state
       SET language = CAST(:language AS text), cursor = (SELECT coalesce(max(cursor), 0) FROM archiver.changes),
           page = page + 1, backlog_session = CAST(:start AS text), backlog_chat = CAST(:start AS text)
    """
)
_ALL_CLEAN = text(
    "UPDATE archiver.search_partitions SET stale_at = NULL, stale_since = NULL, rebuilt_at = clock_timestamp()"
)


def switch_on(connection: Connection, language: str) -> str:
    """Start the index in this language, as `select_language` returns it; return the language that it has.

    An index that was started in another language keeps it, because another worker may need it.
    """
    _lock(connection)
    present = connection.scalar(_SELECT_LANGUAGE)
    if present is None:
        _restart(connection, language)
    return present or language


def switch_off(connection: Connection) -> None:
    """Delete the index. It can then be started in another language."""
    _lock(connection)
    if connection.scalar(_SELECT_LANGUAGE) is not None:
        _restart(connection, None)


def _lock(connection: Connection) -> None:
    """Exclude everything that writes the table, rebuilds of its partitions included."""
    connection.execute(_EXCLUDE_REBUILDS)
    Lock.INDEXING.take(connection, exclusive=True)


def _restart(connection: Connection, language: str | None) -> None:
    connection.execute(_EMPTY)
    connection.execute(_ALL_CLEAN)
    connection.execute(_RESTART, {"language": language, "start": None if language is None else ""})


_SELECT_CHANGES = text(
    """
    SELECT c.cursor, c.type, c.session_id, c.chat_id, c.is_alone
      FROM archiver.changes c WHERE c.cursor > :after ORDER BY c.cursor LIMIT :most
    """
)
_SELECT_STATE = text(
    """
    SELECT page, cursor, language, backlog_session, backlog_chat,
           (SELECT min(c.cursor) FROM archiver.changes c) > cursor + 1 AS has_gap
      FROM archiver.search_state
    """
)
_SELECT_TURNS = text(
    """
    SELECT c.session_id, c.chat_id FROM archiver.chats c
     WHERE (c.session_id, c.chat_id) > (CAST(:session_id AS text), CAST(:chat_id AS text))
     ORDER BY c.session_id, c.chat_id LIMIT :most
    """
)


def select_page(connection: Connection) -> Page | None:
    """Return the next page of changes or of the backlog; None if both are done, or search is off.

    If there are both, they alternate. `close_gap` handles changes that retention deleted before they were indexed.
    """
    state = connection.execute(_SELECT_STATE).one()
    if state.language is None:
        return None
    backlog = None if state.backlog_session is None else (state.backlog_session, state.backlog_chat)
    is_turn_of_backlog = backlog is not None and state.page % 2 == 1
    bounds = {"after": state.cursor, "most": CHANGES_PER_PAGE}
    changes = [] if is_turn_of_backlog else connection.execute(_SELECT_CHANGES, bounds).all()
    if changes:
        items = [item for row in changes if (item := _item(row)) is not None]
        return Page(state.page, changes[-1].cursor, backlog, _distinct(items), len(changes))
    if backlog is None:
        return None
    values = {"session_id": backlog[0], "chat_id": backlog[1], "most": TURNS_PER_PAGE}
    turns = connection.execute(_SELECT_TURNS, values).all()
    last = (turns[-1].session_id, turns[-1].chat_id) if len(turns) == TURNS_PER_PAGE else None
    return Page(state.page, state.cursor, last, [Item(*row) for row in turns], len(turns))


def close_gap(connection: Connection) -> None:
    """Restart the index if retention deleted changes before they were indexed."""
    if _has_gap(connection):
        _lock(connection)
        if _has_gap(connection):  # another worker may have closed it
            _restart(connection, connection.scalar(_SELECT_LANGUAGE))


def _has_gap(connection: Connection) -> bool:
    state = connection.execute(_SELECT_STATE).one()
    return bool(state.language is not None and state.has_gap)


_OF_A_TURN = frozenset({"chat.created", "chat.updated", "chat.deleted"})
_WITHOUT_TEXT = frozenset({"session.coverage", "session.lost", "seal.created"})


def _item(change: Any) -> Item | None:
    if change.type in _WITHOUT_TEXT or (change.session_id == UNASSIGNED and change.chat_id is None):
        return None
    is_turn = (change.type in _OF_A_TURN and change.is_alone) or change.session_id == UNASSIGNED
    return Item(change.session_id, change.chat_id if is_turn else None)


def _distinct(items: Iterable[Item]) -> list[Item]:
    """Return each item once, without turns of sessions that are items as a whole."""
    known = dict.fromkeys(items)
    return [each for each in known if each.chat_id is None or Item(each.session_id, None) not in known]


_BEGAN = "coalesce(c.began_at, c.created_at, c.occurred_at, c.first_received_at)"
_DIGEST = "hashtextextended(m.content, 0)"
# An unassigned turn has the empty session id until its session is known.
_TURNS = """
    items AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:items) AS t (session_id text, chat_id text)
    ), turns AS MATERIALIZED (
        SELECT session_id, chat_id FROM items WHERE chat_id IS NOT NULL
        UNION SELECT '', chat_id FROM items WHERE chat_id IS NOT NULL
        UNION SELECT c.session_id, c.chat_id FROM items i CROSS JOIN LATERAL (
            SELECT c.session_id, c.chat_id FROM archiver.chats c WHERE c.session_id = i.session_id OFFSET 0
        ) c WHERE i.chat_id IS NULL
    )
"""
# OFFSET 0: while Postgres has no statistics of the table, it might otherwise read it whole and compare each row with
# the page.
_OF_TURN = "SELECT * FROM archiver.chats c WHERE c.session_id = t.session_id AND c.chat_id = t.chat_id OFFSET 0"
# Only months of plausible times get a partition.
_SELECT_MONTHS = text(
    f"""
    WITH {_TURNS}, months AS MATERIALIZED (
        SELECT DISTINCT date_trunc('month', {_BEGAN}, 'UTC') AS month
          FROM turns t CROSS JOIN LATERAL ({_OF_TURN}) c
    )
    SELECT month FROM months
     WHERE month BETWEEN '2015-01-01+00' AND clock_timestamp() + interval '1 day'
       AND month NOT IN (SELECT since FROM archiver.search_partitions WHERE since IS NOT NULL)
     ORDER BY month
    """  # noqa: S608  # only constants are inserted, never input
)


def select_new_months(connection: Connection, items: Iterable[Item]) -> list[datetime]:
    """Return the months of these items that have no partition yet."""
    return list(connection.scalars(_SELECT_MONTHS, {"items": _json(items)}))


_ADD_MONTH = text("SELECT archiver.add_search_month(:month)")


def add_month(connection: Connection, month: datetime) -> None:
    """Add the partition of this month."""
    connection.execute(_ADD_MONTH, {"month": month})


_IS_CURRENT = text("SELECT FROM archiver.search_state WHERE page = :number")
_ADVANCE = text(
    """
    UPDATE archiver.search_state
       SET page = page + 1, cursor = :cursor, backlog_session = :session_id, backlog_chat = :chat_id
    """
)


def index_page(connection: Connection, page: Page) -> Indexed | None:
    """Index a page, and record that it is complete; return None if another worker completed it in the meantime."""
    Lock.INDEXING.take(connection, exclusive=True)
    if connection.execute(_IS_CURRENT, {"number": page.number}).first() is None:
        return None
    indexed = _refresh(connection, page.items)
    _advance(connection, page)
    return indexed


def index_item(connection: Connection, page: Page, item: Item) -> Indexed:
    """Index an item of a page, unless another worker has completed the page."""
    Lock.INDEXING.take(connection, exclusive=True)
    if connection.execute(_IS_CURRENT, {"number": page.number}).first() is None:
        return Indexed(0, 0)
    return _refresh(connection, [item])


def delete_item(connection: Connection, item: Item) -> None:
    """Delete the outdated rows of an item that cannot be indexed."""
    Lock.INDEXING.take(connection, exclusive=True)
    delete_obsolete(connection, [item])


def finish_page(connection: Connection, page: Page) -> None:
    """Record that a page, whose items were indexed one by one, is complete."""
    Lock.INDEXING.take(connection, exclusive=True)
    if connection.execute(_IS_CURRENT, {"number": page.number}).first() is not None:
        _advance(connection, page)


_SELECT_OF_SESSION = text("SELECT session_id, chat_id FROM archiver.chats WHERE session_id = :session_id ORDER BY 2")


def select_turns(connection: Connection, session_id: str) -> list[Item]:
    """Return the turns of a session."""
    return [Item(*row) for row in connection.execute(_SELECT_OF_SESSION, {"session_id": session_id})]


def _advance(connection: Connection, page: Page) -> None:
    session_id, chat_id = (None, None) if page.backlog is None else page.backlog
    connection.execute(_ADVANCE, {"cursor": page.cursor, "session_id": session_id, "chat_id": chat_id})


_OBSOLETE = f"""
    NOT EXISTS (SELECT FROM archiver.messages m
                  JOIN archiver.chats c ON c.session_id = m.session_id AND c.chat_id = m.chat_id
                 WHERE m.session_id = s.session_id AND m.chat_id = s.chat_id AND m.ordinal = s.ordinal
                   AND {_DIGEST} = s.digest AND {_BEGAN} = s.began_at
                   AND c.assistant_id IS NOT DISTINCT FROM s.assistant_id)
    RETURNING CAST(s.tableoid AS bigint) AS partition, s.session_id, s.chat_id, s.digest
"""  # noqa: S608  # only constants are inserted, never input
# Two statements: for single turns, also without their session, and for whole sessions, which includes turns that no
# longer exist.
_DELETE = tuple(
    text(
        f"""
    WITH items AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:items) AS t (session_id text, chat_id text)
    ), keys AS MATERIALIZED ({keys})
    DELETE FROM archiver.search s USING keys t WHERE {condition} AND {_OBSOLETE}
    """  # noqa: S608  # only constants are inserted, never input
    )
    for keys, condition in (
        (
            "SELECT session_id, chat_id FROM items WHERE chat_id IS NOT NULL"
            " UNION SELECT '', chat_id FROM items WHERE chat_id IS NOT NULL"
            " UNION SELECT '', c.chat_id FROM items i CROSS JOIN LATERAL ("
            "SELECT c.chat_id FROM archiver.chats c WHERE c.session_id = i.session_id OFFSET 0) c"
            " WHERE i.chat_id IS NULL",
            "s.session_id = t.session_id AND s.chat_id = t.chat_id",
        ),
        ("SELECT DISTINCT session_id FROM items WHERE chat_id IS NULL", "s.session_id = t.session_id"),
    )
)
_INSERT = text(
    f"""
    WITH {_TURNS}, source AS MATERIALIZED (
        SELECT m.session_id, m.chat_id, m.ordinal, {_BEGAN} AS began_at, c.assistant_id, {_DIGEST} AS digest,
               (SELECT page + 1 FROM archiver.search_state) AS page,
               to_tsvector((SELECT CAST(language AS regconfig) FROM archiver.search_state),
                           left(m.content, :most)) AS lexemes,
               length(m.content) > :most AS is_partial
          FROM turns t CROSS JOIN LATERAL ({_OF_TURN}) c
         CROSS JOIN LATERAL (
             SELECT * FROM archiver.messages m WHERE m.session_id = t.session_id AND m.chat_id = t.chat_id OFFSET 0
         ) m
         WHERE NOT EXISTS (SELECT FROM archiver.search s
                            WHERE s.session_id = m.session_id AND s.chat_id = m.chat_id AND s.ordinal = m.ordinal
                              AND s.began_at = {_BEGAN})
    ), written AS (
        INSERT INTO archiver.search (session_id, chat_id, ordinal, began_at, assistant_id, digest, page, lexemes)
        SELECT session_id, chat_id, ordinal, began_at, assistant_id, digest, page, lexemes FROM source
    )
    SELECT count(*), count(*) FILTER (WHERE is_partial) FROM source
    """  # noqa: S608  # only constants are inserted, never input
)
# The partitions with a deleted row whose turn or text is no longer indexed there for the same session. The others
# need no mark yet: an erasure of the remaining row marks them.
_SELECT_UNCOVERED = text(
    """
    WITH items AS MATERIALIZED (
        SELECT session_id, chat_id FROM json_to_recordset(:items) AS t (session_id text, chat_id text)
    ), deleted AS MATERIALIZED (
        SELECT * FROM json_to_recordset(:deleted)
            AS t (partition bigint, session_id text, chat_id text, digest bigint)
    )
    SELECT DISTINCT d.partition FROM deleted d
     WHERE NOT EXISTS (SELECT FROM archiver.search s
                        WHERE s.session_id = d.session_id AND CAST(s.tableoid AS bigint) = d.partition
                          AND (s.chat_id = d.chat_id OR s.digest = d.digest AND d.session_id <> ''))
       AND NOT EXISTS (SELECT FROM items i JOIN archiver.search s
                           ON s.session_id = i.session_id AND s.chat_id = d.chat_id
                        WHERE d.session_id = '' AND CAST(s.tableoid AS bigint) = d.partition)
    """
)
_MARK = text(
    """
    UPDATE archiver.search_partitions p
       SET stale_at = clock_timestamp(), stale_since = coalesce(p.stale_since, clock_timestamp())
      FROM pg_class c
     WHERE p.name = c.relname
       AND CAST(c.oid AS bigint) IN (SELECT CAST(json_array_elements_text(:partitions) AS bigint))
    """
)


def _refresh(connection: Connection, items: Sequence[Item]) -> Indexed:
    deleted = _delete(connection, items)
    indexed = Indexed(*connection.execute(_INSERT, {"items": _json(items), "most": MAX_CHARACTERS}).one())
    if deleted:
        values = {"items": _json(items), "deleted": as_json(deleted)}
        _mark(connection, connection.scalars(_SELECT_UNCOVERED, values).all())
    return indexed


def delete_obsolete(connection: Connection, items: Sequence[Item]) -> None:
    """Delete the rows of these items whose messages have changed or no longer exist; mark their partitions.

    The caller holds `Lock.INDEXING`, so that no row is written from an earlier state.
    """
    _mark(connection, {row["partition"] for row in _delete(connection, items)})


def _mark(connection: Connection, partitions: Collection[Any]) -> None:
    if partitions:
        connection.execute(_MARK, {"partitions": as_json(sorted(partitions))})


def _delete(connection: Connection, items: Sequence[Item]) -> list[dict[str, Any]]:
    if not items:
        return []
    values = {"items": _json(items)}
    return [dict(row) for statement in _DELETE for row in connection.execute(statement, values).mappings()]


def _json(items: Iterable[Item]) -> str:
    return as_json([each._asdict() for each in items])


# Partitions without an attempt come first, so that one that fails repeatedly delays no other.
_SELECT_STALE = text(
    """
    WITH waiting AS (
        SELECT name, attempted_at, stale_at, greatest(attempted_at, rebuilt_at) AS last,
               CASE WHEN attempted_at > coalesce(rebuilt_at, '-infinity') THEN :failed_seconds
                    ELSE :seconds END AS pause
          FROM archiver.search_partitions WHERE stale_at IS NOT NULL
    )
    SELECT name FROM waiting
     WHERE last IS NULL OR last <= clock_timestamp() - make_interval(secs => pause) OR last > clock_timestamp()
     ORDER BY attempted_at NULLS FIRST, stale_at LIMIT 1
    """
)
_ATTEMPT = text("UPDATE archiver.search_partitions SET attempted_at = clock_timestamp() WHERE name = :name")
_REBUILD = text("SELECT archiver.rebuild_search(:name, :attempts, :pause)")


def select_stale(connection: Connection) -> str | None:
    """Return the partition to rebuild next; None if none is due."""
    values = {"seconds": REBUILD_PAUSE_SECONDS, "failed_seconds": FAILED_PAUSE_SECONDS}
    found = connection.scalar(_SELECT_STALE, values)
    return None if found is None else str(found)


def record_attempt(connection: Connection, name: str) -> None:
    """Record that the rebuild of a partition begins."""
    connection.execute(_ATTEMPT, {"name": name})


def rebuild(connection: Connection, name: str, attempts: int = 1, pause: float = 0.0) -> bool:
    """Rewrite a partition without deleted rows; return False if it is no longer stale.

    After copying the rows, it tries up to `attempts` times to get the locks for the exchange. Other sessions proceed
    in the pauses of `pause` seconds between the attempts. Raises the lock timeout of the last attempt.
    """
    return bool(connection.scalar(_REBUILD, {"name": name, "attempts": attempts, "pause": pause}))


class LateRebuild(msgspec.Struct, frozen=True):
    """A partition that has contained erased words since that time, and the session that has used it longest."""

    name: str
    since: datetime
    pid: int | None
    user: str | None
    application: str | None
    used_since: datetime | None


# Any session that has searched keeps its locks until its transaction ends.
_SELECT_LATE = text(
    """
    WITH late AS (
        SELECT name, coalesce(stale_since, stale_at) AS since FROM archiver.search_partitions
         WHERE stale_at IS NOT NULL
           AND coalesce(stale_since, stale_at) <= clock_timestamp() - make_interval(secs => :seconds)
         ORDER BY 2 LIMIT 1
    )
    SELECT late.name, late.since, a.pid, a.usename, a.application_name, a.xact_start
      FROM late LEFT JOIN LATERAL (
          SELECT l.pid, a.usename, a.application_name, a.xact_start
            FROM pg_locks l
            JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
            LEFT JOIN pg_stat_activity a ON a.pid = l.pid
           WHERE l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
             AND (n.nspname = 'archiver' AND c.relname = 'search'
                  OR n.nspname = 'archiver_search' AND c.relname = late.name)
           ORDER BY a.xact_start LIMIT 1
      ) a ON true
    """
)


def select_late_rebuild(connection: Connection) -> LateRebuild | None:
    """Return the partition that has waited longest to be rewritten; None if none is late."""
    found = connection.execute(_SELECT_LATE, {"seconds": REBUILD_LATE_SECONDS}).first()
    return None if found is None else LateRebuild(*found)


def may_select(connection: Connection) -> bool:
    """Return whether this user may read the state of the index."""
    return privileges.may_select(connection, "search_state")


class Lag(msgspec.Struct, frozen=True):
    """How far the index is behind the archive.

    `language`: None if search is off. `since`: the time of the oldest change that is not indexed; None if all are.
    `has_backlog`: whether turns from before the start of the index remain.
    """

    language: str | None
    since: datetime | None
    has_backlog: bool


_SELECT_LAG = text(
    """
    SELECT s.language,
           (SELECT c.changed_at FROM analytics.changes c WHERE c.cursor > s.cursor ORDER BY c.cursor LIMIT 1),
           s.backlog_session IS NOT NULL
      FROM archiver.search_state s
    """
)


def select_lag(connection: Connection) -> Lag:
    """Return how far the index is behind the feed."""
    return Lag(*connection.execute(_SELECT_LAG).one())
