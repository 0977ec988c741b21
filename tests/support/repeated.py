"""A large archive in minutes: the sessions of an archive, repeated by SQL with other ids."""

from collections.abc import Mapping

from sqlalchemy import ARRAY, Engine, Table

from archiver.database import tables
from archiver.events import INTERNAL_PREFIX

# How repetition `n` of a row differs from it; its times are the same.
_VALUES: Mapping[str, str] = {
    "session_id": "session_id || '~' || n",
    "chat_id": f"CASE WHEN starts_with(chat_id, U&'\\{ord(INTERNAL_PREFIX):04x}') THEN chat_id"
    " ELSE chat_id || '~' || n END",
    "cursor": "cursor + n * CAST($2 AS bigint)",
    "changed_cursor": "changed_cursor + n * CAST($2 AS bigint)",
}
_REPEATED = (
    *(tables.events, tables.sessions, tables.chats, tables.messages, tables.pieces, tables.changes),
    *(tables.summaries, tables.contributions, tables.search),
)
_SUMS = (tables.rollups, tables.days)


def repeat_sessions(engine: Engine, times: int) -> None:
    """Add each session so many times, with all its rows, as if it had been recorded, published, indexed and summed.

    For an archive in which all changes are. Bodies in the ledger name the ids of the original sessions.
    """
    with engine.begin() as connection:
        # Neither guards nor foreign keys are checked for each row.
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        newest = connection.exec_driver_sql("SELECT max(cursor) FROM archiver.changes").scalar_one()
        for table in _REPEATED:
            connection.exec_driver_sql(_repeat(table), (times, newest))
        for table in _SUMS:
            connection.exec_driver_sql(_multiply(table), (times,))
        connection.exec_driver_sql(
            "UPDATE archiver.search_state SET cursor = (SELECT max(cursor) FROM archiver.changes)"
        )


def _repeat(table: Table) -> str:
    names = [column.name for column in table.c if column.identity is None]
    values = [_VALUES.get(name, name) for name in names]
    # The series depends on the row, so that the repetitions of a row are written together: rows are in order of time.
    return (
        f"INSERT INTO archiver.{table.name} ({', '.join(names)})"
        f" SELECT {', '.join(values)} FROM archiver.{table.name}"
        " CROSS JOIN LATERAL generate_series(1, CAST($1 AS int) + 0 * length(session_id)) AS n"
        " WHERE CAST($2 AS bigint) > 0 AND session_id <> ''"
    )


def _multiply(table: Table) -> str:
    changes = [
        f"{column.name} = ARRAY(SELECT each * (1 + CAST($1 AS int)) FROM unnest({column.name}) AS each)"
        if isinstance(column.type, ARRAY)
        else f"{column.name} = {column.name} * (1 + CAST($1 AS int))"
        for column in table.c
        if not column.primary_key
    ]
    return f"UPDATE archiver.{table.name} SET {', '.join(changes)}"
