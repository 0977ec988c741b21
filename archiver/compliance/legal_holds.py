"""Read legal holds from the audit log, which takes precedence over the table.

The audit log never contains the value of a variable, which may identify a person: only a digest, salted with bytes
that the row in `archiver.holds` keeps until the release. Without that row a hold by variable covers every value.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any

import msgspec
from sqlalchemy import Connection, select, text

from archiver.database import tables

ADD, RELEASE = "hold.add", "hold.release"


class Criteria(msgspec.Struct, frozen=True):
    """The criteria of a hold, which covers the sessions that match all of them; a field that is None matches any.

    `since` and `until`: sessions with a turn that began at or after `since` and before `until`.
    """

    session_id: str | None = None
    assistant_id: str | None = None
    variable: str | None = None
    value: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_empty(self) -> bool:
        return all(each is None for each in msgspec.structs.astuple(self))


LOGGED = ("session_id", "assistant_id", "variable", "since", "until")  # criteria in an audit entry


class LoggedHold(msgspec.Struct, frozen=True):
    """A legal hold as recorded in the audit log."""

    id: int
    criteria: Criteria
    value_digest: str | None
    act_id: int
    placed_at: datetime
    author: str
    reason: str | None
    release_id: int | None = None
    released_at: datetime | None = None


class Hold(msgspec.Struct, frozen=True):
    """A hold in force. `is_any_value`: its value is lost, so it covers every value."""

    id: int
    session_id: str | None
    assistant_id: str | None
    variable: str | None
    value: str | None
    since: datetime | None
    until: datetime | None
    is_any_value: bool = False


def value_digest(salt: bytes, value: str) -> str:
    """Return the digest of a value for the audit log: hexadecimal SHA-256 over salt and UTF-8."""
    return sha256(salt + value.encode()).hexdigest()


def replay(entries: Sequence[Mapping[str, Any]]) -> tuple[dict[int, LoggedHold], list[int]]:
    """Return the holds by id, and the ids of the release entries without a hold; `entries` must be in order of id."""
    placed: dict[int, LoggedHold] = {}
    unknown: list[int] = []
    for entry in entries:
        hold_id = entry["detail"].get("hold") if isinstance(entry["detail"], dict) else None
        if entry["kind"] == ADD and isinstance(hold_id, int):
            placed.setdefault(hold_id, _placed(hold_id, entry))
        elif entry["kind"] == RELEASE:
            hold = placed.get(hold_id) if isinstance(hold_id, int) else None
            if hold is None:
                unknown.append(entry["id"])
            elif hold.release_id is None:
                placed[hold.id] = msgspec.structs.replace(hold, release_id=entry["id"], released_at=entry["at"])
    return placed, unknown


def _placed(hold_id: int, entry: Mapping[str, Any]) -> LoggedHold:
    detail = entry["detail"]
    fields: dict[str, Any] = {name: value for name in LOGGED[:3] if isinstance(value := detail.get(name), str)}
    fields |= {name: time for name in LOGGED[3:] if (time := _time(detail.get(name))) is not None}
    digest = detail.get("value_digest")
    return LoggedHold(
        hold_id,
        Criteria(**fields),
        digest if isinstance(digest, str) else None,
        entry["id"],
        entry["at"],
        entry["actor"],
        entry["reason"],
    )


def _time(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None


def is_same(placed: LoggedHold, row: Mapping[str, Any]) -> bool:
    """Return whether a row of `archiver.holds` matches the entry that placed the hold."""
    if any(row[name] != getattr(placed.criteria, name) for name in LOGGED):
        return False
    if placed.value_digest is None or row["released_at"] is not None:
        return True
    return (
        row["value"] is not None
        and row["salt"] is not None
        and value_digest(bytes(row["salt"]), row["value"]) == placed.value_digest
    )


def in_force(placed: Mapping[int, LoggedHold], rows: Sequence[Mapping[str, Any]]) -> list[Hold]:
    """Return the holds in force: those unreleased in the table, in the audit log, or in both."""
    logged = {row["id"]: row for row in rows if row["released_at"] is None}
    names = Criteria.__struct_fields__
    result = [Hold(row["id"], **{name: row[name] for name in names}) for row in logged.values()]
    for hold in placed.values():
        row = logged.get(hold.id)
        if hold.release_id is None and (row is None or not is_same(hold, row)):
            criteria = msgspec.structs.asdict(hold.criteria)
            is_any_value = hold.criteria.variable is not None
            result.append(Hold(hold.id, **criteria, is_any_value=is_any_value))
    return result


# A partial index has exactly this condition.
_SELECT_ENTRIES = text(
    "SELECT id, at, actor, kind, reason, detail FROM archiver.acts"
    " WHERE kind IN ('hold.add', 'hold.release') ORDER BY id"
)


def select_placed(connection: Connection) -> tuple[dict[int, LoggedHold], list[int]]:
    """Return the result of `replay` for the audit log."""
    return replay([dict(row) for row in connection.execute(_SELECT_ENTRIES).mappings()])


def select_in_force(connection: Connection) -> list[Hold]:
    """Return the holds in force. Exact under `Lock.RECORDING`, which blocks the placing of holds."""
    query = select(tables.holds).where(tables.holds.c.released_at.is_(None))
    rows = [dict(row) for row in connection.execute(query).mappings()]
    return in_force(select_placed(connection)[0], rows)
