"""The audit trail: what was done to the archive, by whom and why. Append-only; no content and no secret enters it."""

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, insert, select, text

from archiver import tables

ADOPT = "adopt"
ARCHIVER = "archiver"  # the actor of what our own tasks do


# All that are written, for whoever asks for one that there is not.
KINDS = (
    ADOPT,
    *("erase", "erase.refused", "erase.replay", "erase.replay.refused"),
    *("export", "export.done"),
    *(f"followups.{each}" for each in ("add", "pause", "remove", "resume", "retry", "rotate")),
    *("hold.add", "hold.release"),
    "quarantine.retry",
    "retention",
    "settings.changed",
)


def actor() -> str:
    """Who runs this command: the user of the operating system, and the machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def insert_act(
    connection: Connection, kind: str, who: str, reason: str | None = None, detail: Mapping[str, Any] | None = None
) -> int:
    """Record that this was done, in the transaction that does it. `detail`: to what, as JSON. Answers its id.

    Postgres adds when, and as which database user; it refuses kinds that this user's commands do not make. A new kind
    needs a migration of `archiver.guard_act`.
    """
    if kind not in KINDS:
        raise ValueError(f"acts.KINDS lacks {kind}")
    acts = tables.acts
    row = {"actor": who, "kind": kind, "reason": reason, "detail": dict(detail or {})}
    return int(connection.execute(insert(acts).returning(acts.c.id), row).scalar_one())


def select_acts(
    connection: Connection,
    *,
    after: int = 0,
    limit: int = 500,
    kind: str | None = None,
    since: datetime | None = None,
) -> Sequence[RowMapping]:
    """Return the entries after this id, oldest first: of this kind, and recorded at `since` or later."""
    return connection.execute(_of(kind, since).where(tables.acts.c.id > after).limit(limit)).mappings().all()


def select_newest_id(
    connection: Connection, count: int, *, kind: str | None = None, since: datetime | None = None
) -> int:
    """Return the id of the oldest of the newest `count` such entries; 0 where there are fewer."""
    acts = tables.acts
    newest = _of(kind, since).order_by(None).order_by(acts.c.id.desc()).with_only_columns(acts.c.id)
    return int(connection.scalar(newest.offset(count - 1).limit(1)) or 0)


def _of(kind: str | None, since: datetime | None) -> Select[Any]:
    acts = tables.acts
    query = select(acts).order_by(acts.c.id)
    if kind is not None:
        query = query.where(acts.c.kind == kind)
    return query if since is None else query.where(acts.c.at >= since)


def select_kinds(connection: Connection) -> list[str]:
    """The kinds of the acts that there are. Reads the whole trail."""
    return sorted(connection.scalars(select(tables.acts.c.kind).distinct()))


SETTINGS = "settings.changed"

_LATEST_SETTINGS = text(
    "SELECT detail FROM archiver.acts WHERE kind = 'settings.changed' AND detail ->> 'part' = :part"
    " ORDER BY id DESC LIMIT 1"
)


def insert_changed_settings(connection: Connection, who: str, part: str, values: Mapping[str, Any]) -> None:
    """Record the settings that `part` (serve or worker) starts with, if they are not those last recorded."""
    detail = {"part": part, **values}
    if connection.scalar(_LATEST_SETTINGS, {"part": part}) != detail:
        insert_act(connection, SETTINGS, who, None, detail)
