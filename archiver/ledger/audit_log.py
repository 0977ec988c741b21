"""The audit log: who did what to the archive, and why. Append-only; contains no content and no secrets."""

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, insert, select, text

from archiver.database import tables

ADOPT = "adopt"
ARCHIVER = "archiver"  # the actor of background tasks
MAX_TEXT = 1_000  # characters of an actor or a reason that a person gives


# All kinds that this version writes.
KINDS = (
    ADOPT,
    *("console.login", "console.view", "console.search", "console.download"),
    *("erase", "erase.refused", "erase.replay", "erase.replay.refused"),
    *("export", "export.done"),
    *(f"followups.{each}" for each in ("add", "pause", "remove", "resume", "retry", "rotate", "test")),
    *("hold.add", "hold.release"),
    "quarantine.retry",
    "retention",
    "settings.changed",
    *("users.add", "users.disable", "users.enable", "users.reset"),
)


def actor() -> str:
    """Return the operating system user and the machine that run this command, as `user@machine`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may use a user id without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def insert_entry(
    connection: Connection, kind: str, who: str, reason: str | None = None, detail: Mapping[str, Any] | None = None
) -> int:
    """Insert an audit entry in the transaction of the action, and return its id.

    `detail`: targets and result, stored as JSON. Postgres adds the time and the database user, and rejects kinds that
    this user's commands do not write. A new kind needs a migration of `archiver.guard_act`.
    """
    if kind not in KINDS:
        raise ValueError(f"audit_log.KINDS lacks {kind}")
    audit = tables.acts
    row = {"actor": who, "kind": kind, "reason": reason, "detail": dict(detail or {})}
    return int(connection.execute(insert(audit).returning(audit.c.id), row).scalar_one())


def select_entries(
    connection: Connection,
    *,
    after: int = 0,
    limit: int = 500,
    kind: str | None = None,
    since: datetime | None = None,
) -> Sequence[RowMapping]:
    """Return up to `limit` entries after this id, oldest first. `kind` and `since`: None for all."""
    return connection.execute(_of(kind, since).where(tables.acts.c.id > after).limit(limit)).mappings().all()


def select_oldest_of_newest(
    connection: Connection, count: int, *, kind: str | None = None, since: datetime | None = None
) -> int:
    """Return the id of the oldest of the newest `count` entries; 0 if there are fewer."""
    audit = tables.acts
    newest = _of(kind, since).order_by(None).order_by(audit.c.id.desc()).with_only_columns(audit.c.id)
    return int(connection.scalar(newest.offset(count - 1).limit(1)) or 0)


def _of(kind: str | None, since: datetime | None) -> Select[Any]:
    audit = tables.acts
    query = select(audit).order_by(audit.c.id)
    if kind is not None:
        query = query.where(audit.c.kind == kind)
    return query if since is None else query.where(audit.c.at >= since)


def select_kinds(connection: Connection) -> list[str]:
    """Return the kinds that the audit log contains. Reads the whole log."""
    return sorted(connection.scalars(select(tables.acts.c.kind).distinct()))


SETTINGS_CHANGED = "settings.changed"

_LATEST_SETTINGS = text(
    "SELECT detail FROM archiver.acts WHERE kind = 'settings.changed' AND detail ->> 'part' = :part"
    " ORDER BY id DESC LIMIT 1"
)


def insert_settings_change(connection: Connection, who: str, part: str, values: Mapping[str, Any]) -> None:
    """Record the start settings of `part` (serve or worker) if they differ from the last record."""
    detail = {"part": part, **values}
    if connection.scalar(_LATEST_SETTINGS, {"part": part}) != detail:
        insert_entry(connection, SETTINGS_CHANGED, who, None, detail)
