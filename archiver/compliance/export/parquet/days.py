"""Find the days whose files a run must write."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import msgspec
from psycopg import sql
from sqlalchemy import Connection, text

from archiver.archive.outbox import Change
from archiver.compliance.export import queries
from archiver.compliance.export.manifest import Manifest
from archiver.compliance.export.parquet.files import ChangedRows, FileColumn, Search, table_and_day
from archiver.compliance.export.parquet.staging import Staging
from archiver.errors import ArchiverError
from archiver.outbound.feed import Entry, select_changes, select_epochs, select_extent

PAGE_CHANGES, PAGE_TRANSACTIONS = 20_000, 1_000
_ERASURES = frozenset({"chat.erased", "session.erased"})


class WrongCursorError(ArchiverError):
    """The folder cannot be updated from this cursor, or belongs to another database."""


class Plan(msgspec.Struct):
    """The days to write. `cursor`, `epoch`: the newest change that the files will contain.

    `since`: the cursor after which changes were read; None if all days are written, for the reason `why`.
    `erased`: the days that contain rows of sessions with content erased since then.
    """

    cursor: int
    epoch: str | None
    since: int | None
    days: list[date]
    erased: list[date] = []
    why: str | None = None


Columns = dict[str, dict[str, str]]  # by table and name, the type in Arrow


def plan(connection: Connection, staging: Staging, since: int | None, columns: Columns) -> Plan:
    """Return the days to write so that the folder contains the state of this snapshot.

    `since`: read the changes after this cursor instead of the cursor in the manifest. Raises `WrongCursorError` if
    the folder lacks changes before it, or is an export of another database.
    """
    former = staging.former
    newest = select_extent(connection).newest
    epochs = [each.epoch for each in select_epochs(connection)]
    epoch = epochs[-1] if epochs else None
    if former is None:
        return Plan(newest, epoch, None, _select_all_days(connection), why="the folder is new")
    _check(former, since, epochs, staging)
    after = _parquet(former).cursor if since is None else since
    why = _reason_for_all(connection, former, after, epoch, columns)
    if why is not None:
        days = {*_select_all_days(connection), *(table_and_day(name)[1] for name in former.files)}
        return Plan(newest, epoch, None, sorted(days), why=why)
    found, erased = _select_changed_days(connection, staging, former, after)
    return Plan(newest, epoch, after, sorted(found | set(_damaged_days(staging, former))), sorted(erased))


def _parquet(former: Manifest) -> Any:
    return former.parquet


def _check(former: Manifest, since: int | None, epochs: Sequence[str], staging: Staging) -> None:
    state = _parquet(former)
    if state.epoch is not None and state.epoch not in epochs:
        raise WrongCursorError(f"{staging.target} is an export of another database; choose another --output")
    if since is not None and since > state.cursor:
        raise WrongCursorError(
            f"{staging.target} contains the changes up to cursor {state.cursor}; --since-cursor {since} would omit"
            " changes: give that cursor or a lower one, or omit --since-cursor"
        )


def _reason_for_all(
    connection: Connection, former: Manifest, after: int, epoch: str | None, columns: Columns
) -> str | None:
    """Return why all days must be written; None if it is sufficient to read the changes after the cursor."""
    extent = select_extent(connection)
    if _parquet(former).columns != columns:
        return "the columns of the views have changed"
    if _parquet(former).epoch != epoch or after > extent.newest:
        return "a new epoch of the feed has begun"
    if after < extent.newest and extent.oldest > after + 1:
        return f"changes after cursor {after} were deleted"
    return None


def _select_changed_days(
    connection: Connection, staging: Staging, former: Manifest, after: int
) -> tuple[set[date], set[date]]:
    """Return the days with rows of changed sessions, in the archive or in a file, and those of erased sessions."""
    days: set[date] = set()
    erased: set[date] = set()
    for page in _changes(connection, after):
        changed = _rows_of(page)
        gone = _rows_of(each for each in page if each.type in _ERASURES)
        days.update(_select_days(connection, changed))
        days.update(_days_of_files(staging, former, changed, days))
        erased.update(_days_of_files(staging, former, gone, erased))
    return days | erased, erased


def _changes(connection: Connection, after: int) -> Iterator[Sequence[Entry | Change]]:
    """Yield the changes after this cursor in pages, and then those that are not published yet.

    Unpublished changes have no cursor, so the next run reads them again.
    """
    while page := select_changes(connection, after, PAGE_CHANGES):
        after = page[-1].cursor
        yield page
    last = 0
    while rows := connection.execute(_UNPUBLISHED, {"after": last, "most": PAGE_TRANSACTIONS}).all():
        last = rows[-1].id
        yield [change for row in rows for change in msgspec.convert(row.changes, list[Change])]


_UNPUBLISHED = text("SELECT id, changes FROM archiver.outbox WHERE id > :after ORDER BY id LIMIT :most")


def _rows_of(page: Iterable[Entry | Change]) -> ChangedRows:
    result = ChangedRows()
    for change in page:
        if change.session_id:
            result.session_ids.add(change.session_id)
        if change.chat_id is not None:  # the turn may have been unassigned before
            result.chat_ids.add(change.chat_id)
    return result


def _days_of_files(staging: Staging, former: Manifest, rows: ChangedRows, known: set[date]) -> Iterator[date]:
    """Yield the days, except those in `known`, of the files that contain any of these rows."""
    search, found = Search(rows), set(known)
    for name in sorted(former.files):
        _, day = table_and_day(name)
        if day in found:
            continue
        if search.is_in(staging.target / name):
            found.add(day)
            yield day


def _damaged_days(staging: Staging, former: Manifest) -> Iterator[date]:
    """Yield the days of files that are missing or have another size than the manifest states."""
    for name, file in former.files.items():
        path = staging.target / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            yield table_and_day(name)[1]


_BEGAN = "coalesce(c.began_at, c.created_at, c.occurred_at, c.first_received_at)"
_ALL_DAYS = text(
    f"""
    SELECT ({_BEGAN} AT TIME ZONE 'UTC')::date AS day FROM archiver.chats c
     UNION SELECT (coalesce(s.created_at, s.first_event_at) AT TIME ZONE 'UTC')::date FROM archiver.sessions s
     WHERE s.session_id <> '' ORDER BY day
    """  # noqa: S608  # only constants are inserted, never input
)
_DAYS = text(
    f"""
    SELECT ({_BEGAN} AT TIME ZONE 'UTC')::date FROM archiver.chats c WHERE c.session_id = ANY (:session_ids)
     UNION SELECT ({_BEGAN} AT TIME ZONE 'UTC')::date FROM archiver.chats c
     WHERE c.session_id = '' AND c.chat_id = ANY (:chat_ids)
     UNION SELECT (coalesce(s.created_at, s.first_event_at) AT TIME ZONE 'UTC')::date FROM archiver.sessions s
     WHERE s.session_id = ANY (:session_ids)
    """  # noqa: S608  # only constants are inserted, never input
)


def _select_all_days(connection: Connection) -> list[date]:
    return list(connection.scalars(_ALL_DAYS))


def _select_days(connection: Connection, rows: ChangedRows) -> Iterator[date]:
    """Return the days on which these sessions or their turns began."""
    ids = {"session_ids": sorted(rows.session_ids), "chat_ids": sorted(rows.chat_ids)}
    return iter(connection.scalars(_DAYS, ids))


# Sessions with a turn, and so possibly a message, on a day; found by the index on this expression.
_SESSIONS_OF_DAY = (
    f"SELECT DISTINCT c.session_id FROM archiver.chats c WHERE {_BEGAN} >= {{first}} AND {_BEGAN} < {{end}}"  # noqa: S608  # only constants are inserted, never input
)
_ROWS_OF_DAY = {
    "chats": """
        SELECT {day}::date, {what} FROM analytics.chats v WHERE v.began_at >= {first} AND v.began_at < {end}
         ORDER BY v.session_id, v.began_at, v.turn_id
    """,
    "messages": """
        SELECT {day}::date, {what} FROM ({sessions}) s
         CROSS JOIN LATERAL (SELECT * FROM analytics.messages m WHERE m.session_id = s.session_id OFFSET 0) v
         WHERE v.began_at >= {first} AND v.began_at < {end} ORDER BY s.session_id, v.position
    """,
}
# A session begins on the day of one of its turns, or on the day of its creation or first event.
_CONVERSATIONS = """
    SELECT (v.started_at AT TIME ZONE 'UTC')::date AS day, {what} FROM (
           SELECT s.session_id FROM archiver.sessions s
            WHERE s.session_id <> ''
              AND ({is_all} OR (coalesce(s.created_at, s.first_event_at) AT TIME ZONE 'UTC')::date = ANY ({days}))
            UNION SELECT c.session_id FROM unnest({days}) AS d (day)
            CROSS JOIN LATERAL (
                SELECT o.session_id FROM analytics.chats o WHERE o.began_at >= d.day::timestamp AT TIME ZONE 'UTC'
                   AND o.began_at < (d.day + 1)::timestamp AT TIME ZONE 'UTC'
            ) c WHERE NOT {is_all}
    ) s CROSS JOIN LATERAL ({rows} WHERE v.session_id = s.session_id OFFSET 0) v
     WHERE {is_all} OR (v.started_at AT TIME ZONE 'UTC')::date = ANY ({days}) ORDER BY day, v.session_id
"""


def rows_of(found: Plan, table: str, described: Sequence[FileColumn]) -> Iterator[sql.Composable]:
    """Yield the queries for the rows of these days: the day, then the columns; sorted by day and session."""
    if not found.days:
        return
    what = sql.SQL(", ").join(each.value for each in described)
    if table == "conversations":
        yield sql.SQL(_CONVERSATIONS).format(
            what=what,
            rows=queries.view(table),
            is_all=sql.Literal(found.since is None),
            days=sql.SQL("{}::date[]").format(sql.Literal(found.days)),
        )
        return
    for day in found.days:
        times = {
            "first": sql.Literal(datetime.combine(day, time(), UTC)),
            "end": sql.Literal(datetime.combine(day, time(), UTC) + timedelta(days=1)),
        }
        yield sql.SQL(_ROWS_OF_DAY[table]).format(
            day=sql.Literal(day), what=what, sessions=sql.SQL(_SESSIONS_OF_DAY).format(**times), **times
        )
