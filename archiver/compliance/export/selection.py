"""Queries for the selected sessions and unassigned turns."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from psycopg import sql
from sqlalchemy import BigInteger, Connection, bindparam, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY

from archiver.compliance.erasure import Criteria
from archiver.database import as_json, tables
from archiver.errors import ArchiverError

_BEGAN = "coalesce(t.created_at, t.occurred_at, t.first_received_at)"


class UnknownSelectionError(ArchiverError):
    """The selection names something that does not exist, or matches nothing."""


class Selection(msgspec.Struct, frozen=True):
    """The selected sessions: by id, by any of the criteria, or all."""

    session_ids: Sequence[str] = ()
    criteria: Sequence[Criteria] = ()
    is_all: bool = False

    def prepare(self, connection: Connection) -> None:
        """Pass variable values as transaction-local settings, because they may be personal.

        As part of a statement, they would be visible in pg_stat_activity and in the log of slow statements.
        """
        for place, each in enumerate(self.criteria):
            if each.variable is not None:
                connection.execute(_SET, {"name": _setting(place), "value": each.value or ""})

    def sessions(self) -> sql.Composable:
        """Return a query for the ids of the sessions."""
        if self.is_all:
            return sql.SQL("SELECT session_id FROM archiver.sessions WHERE session_id <> ''")
        session_ids = {*self.session_ids, *(each.session_id for each in self.criteria if _is_of_one(each))} - {
            None,
            "",
        }
        parts: list[sql.Composable] = [_listed(sorted(filter(None, session_ids)))]
        parts += [_sessions_of(each, n) for n, each in enumerate(self.criteria) if not _is_of_one(each)]
        return _union(parts)

    def turns(self) -> sql.Composable:
        """Return a query for the chat ids of the selected unassigned turns, which follow the rules of holds."""
        if self.is_all:
            return sql.SQL("SELECT chat_id FROM archiver.chats WHERE session_id = ''")
        of_sessions = sql.SQL("SELECT c.chat_id FROM archiver.chats c WHERE c.session_id IN ({})")
        return _union(
            [of_sessions.format(self.sessions()), *(_unassigned_of(each, n) for n, each in enumerate(self.criteria))]
        )

    def where(self, alias: str = "e") -> sql.Composable:
        """Return the condition that selects rows of a table with `session_id` and `chat_id`."""
        if self.is_all:
            return sql.SQL("true")
        return sql.SQL("({e}.session_id IN ({}) OR ({e}.session_id = '' AND {e}.chat_id IN ({})))").format(
            self.sessions(), self.turns(), e=sql.Identifier(alias)
        )


def _is_of_one(criteria: Criteria) -> bool:
    """Return whether the criteria name only a session, which may be in the ledger without being in the archive."""
    return criteria == Criteria(session_id=criteria.session_id)


def _union(parts: Iterable[sql.Composable]) -> sql.Composable:
    return sql.SQL(" UNION ").join(parts)


def _listed(session_ids: Sequence[str]) -> sql.Composable:
    return sql.SQL("SELECT unnest({}::text[])").format(sql.Literal(list(session_ids)))


def _sessions_of(criteria: Criteria, place: int) -> sql.Composable:
    rules: list[sql.Composable] = [sql.SQL("s.session_id <> ''")]
    if criteria.session_id is not None:
        rules.append(_is("s.session_id", criteria.session_id))
    if criteria.assistant_id is not None:
        rules.append(
            sql.SQL("({} OR {})").format(
                _is("s.assistant_id", criteria.assistant_id), _any_turn(_assistant(criteria))
            )
        )
    if criteria.variable is not None:
        rules.append(_any_turn(_variable(criteria, place)))
    if criteria.since is not None or criteria.until is not None:
        rules.append(
            sql.SQL("({} OR (NOT {} AND {}))").format(
                _any_turn(_within(_BEGAN, criteria)),
                _any_turn(sql.SQL("true")),
                _within("coalesce(s.created_at, s.first_event_at)", criteria),
            )
        )
    return sql.SQL("SELECT s.session_id FROM archiver.sessions s WHERE {}").format(sql.SQL(" AND ").join(rules))


def _unassigned_of(criteria: Criteria, place: int) -> sql.Composable:
    """Return a query for the unassigned turns whose own fields match the criteria."""
    rules: list[sql.Composable] = [sql.SQL("t.session_id = ''" if criteria.session_id is None else "false")]
    if criteria.assistant_id is not None:
        rules.append(_assistant(criteria))
    if criteria.variable is not None:
        rules.append(_variable(criteria, place))
    rules.append(_within(_BEGAN, criteria))
    return sql.SQL("SELECT t.chat_id FROM archiver.chats t WHERE {}").format(sql.SQL(" AND ").join(rules))


def _any_turn(rule: sql.Composable) -> sql.Composable:
    turns = "SELECT FROM archiver.chats t WHERE t.session_id = s.session_id AND t.chat_id <> E'\\x1f'"
    return sql.SQL(f"EXISTS ({turns} AND {{}})").format(rule)


def _assistant(criteria: Criteria) -> sql.Composable:
    return _is("t.assistant_id", criteria.assistant_id)


_SET = text("SELECT set_config(:name, :value, true)")


def _setting(place: int) -> str:
    return f"archiver.exported_value_{place}"


def _variable(criteria: Criteria, place: int) -> sql.Composable:
    value = sql.SQL("t.variables ->> {} = current_setting({})")
    return value.format(sql.Literal(criteria.variable), sql.Literal(_setting(place)))


def _is(column: str, value: str | None) -> sql.Composable:
    return sql.SQL("{} = {}").format(sql.SQL(column), sql.Literal(value))


def _within(moment: str, criteria: Criteria) -> sql.Composable:
    rules: list[sql.Composable] = [sql.SQL("true")]
    for limit, comparison in ((criteria.since, ">="), (criteria.until, "<")):
        if limit is not None:
            rules.append(sql.SQL(f"{moment} {comparison} {{}}").format(sql.Literal(limit)))
    return sql.SQL(" AND ").join(rules)


def count(connection: Connection, selection: Selection) -> tuple[int, int]:
    """Return the number of selected sessions in the archive, and of selected unassigned turns."""
    selection.prepare(connection)
    driver: Any = connection.connection.driver_connection
    query = sql.SQL(
        "SELECT (SELECT count(*) FROM archiver.sessions WHERE session_id <> '' AND session_id IN ({})),"
        " (SELECT count(*) FROM archiver.chats WHERE session_id = '' AND chat_id IN ({}))"
    ).format(selection.sessions(), selection.turns())
    sessions, turns = connection.exec_driver_sql(query.as_string(driver)).one()
    return sessions, turns


_HOLD_FIELDS = Criteria.__struct_fields__


def select_held(connection: Connection, hold_ids: Sequence[int]) -> list[Criteria]:
    """Return the criteria of these holds, including released holds. Raises `UnknownSelectionError`."""
    holds = tables.holds
    query = select(holds).where(holds.c.id == func.any(bindparam("ids", type_=ARRAY(BigInteger))))
    found = connection.execute(query.order_by(holds.c.id), {"ids": list(hold_ids)})
    rows = {row["id"]: row for row in found.mappings()}
    if missing := sorted(set(hold_ids) - rows.keys()):
        ids = ", ".join(map(str, missing))
        what = f"hold {ids} does" if len(missing) == 1 else f"holds {ids} do"
        raise UnknownSelectionError(f"{what} not exist; see `archiver hold list --all`")
    for row in rows.values():
        if row["variable"] is not None and row["value"] is None:
            raise UnknownSelectionError(
                f"the value of hold {row['id']} was deleted when the hold was released;"
                " select its sessions with --session"
            )
    return [Criteria(**{name: row[name] for name in _HOLD_FIELDS}) for row in rows.values()]


_UNKNOWN = text(
    """
    SELECT requested.session_id FROM json_array_elements_text(:session_ids) AS requested (session_id)
     WHERE NOT EXISTS (SELECT FROM archiver.sessions s WHERE s.session_id = requested.session_id)
       AND NOT EXISTS (SELECT FROM archiver.events e WHERE e.session_id = requested.session_id)
       AND NOT EXISTS (SELECT FROM archiver.erasures x WHERE x.session_id = requested.session_id)
    """
)


def check_known(connection: Connection, session_ids: Sequence[str]) -> None:
    """Raise `UnknownSelectionError` if a session is unknown to archive, ledger and erasures."""
    ids_json = as_json(session_ids)
    if unknown := sorted(connection.scalars(_UNKNOWN, {"session_ids": ids_json})):
        raise UnknownSelectionError(f"unknown session {', '.join(unknown)}; nothing was exported")
