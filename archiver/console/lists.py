"""The lists of the console other than that of conversations."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection, TextClause, text

from archiver import settings
from archiver.compliance import erasure
from archiver.console.conversations import CONVERSATIONS
from archiver.console.filters import FilterError
from archiver.console.listing import Column, Listing, Page, Query
from archiver.ledger import quarantine
from archiver.outbound.followups import review
from archiver.settings import Settings

_MAX_ID = 2**63 - 1
_MAX_DIGITS = 18  # of a key
EXAMINED = 10_000  # rows examined for a page of the audit log or of the exports
MAX_LISTED = 1_000  # holds or subscriptions


def _number(key: str, otherwise: int) -> int:
    if not key:
        return otherwise
    if not key.isascii() or not key.isdecimal() or len(key) > _MAX_DIGITS:
        raise FilterError("The address of this page is incomplete. Begin at the first page.")
    return int(key)


def _paged(rows: list[Mapping[str, Any]], query: Query) -> Page:
    shown = rows[: query.limit]
    return Page(shown, str(shown[-1]["id"]) if len(rows) > query.limit else "")


def _select_quarantine(connection: Connection, query: Query) -> Page:
    reason = query.parameters.get("reason") or None
    after = _number(query.after, 0)
    rows = quarantine.select_quarantine(connection, after=after, limit=query.limit + 1, reason=reason)
    return _paged([dict(row) for row in rows], query)


QUARANTINE = Listing(
    path="quarantine",
    title="Quarantine",
    permission="figures",
    columns=(
        Column("id", "Id", "id"),
        Column("received_at", "Received", "time"),
        Column("delivery_count", "Deliveries", "number"),
        Column("source", "Source"),
        Column("reason", "Reason", "state"),
        Column("detail", "Detail"),
        Column("bytes", "Bytes", "number"),
    ),
    select=_select_quarantine,
    link=lambda row: f"quarantine/{row['id']}",
    link_permission="bodies",
    parameters=("reason",),
    empty="Nothing is quarantined: every authenticated delivery was archived.",
)

_AUDIT = """
    SELECT id, at, actor, database_user, kind, reason, CAST(detail AS text) AS detail
      FROM (SELECT * FROM archiver.acts WHERE id < :before ORDER BY id DESC LIMIT :examined) a
     WHERE {of_kind} ORDER BY id DESC LIMIT :most
"""


_LAST_EXAMINED = text("SELECT id FROM archiver.acts WHERE id < :before ORDER BY id DESC OFFSET :examined - 1 LIMIT 1")


def _select_audit(connection: Connection, query: Query) -> Page:
    kind = query.parameters.get("kind", "")
    return _select_acts(connection, query, "kind = :kind" if kind else "true", {"kind": kind})


def _select_acts(connection: Connection, query: Query, of_kind: str, values: Mapping[str, Any]) -> Page:
    before = _number(query.after, _MAX_ID)
    bounds = {"before": before, "most": query.limit + 1, "examined": EXAMINED}
    rows = connection.execute(text(_AUDIT.format(of_kind=of_kind)), {**values, **bounds}).mappings()
    page = _paged([dict(row) for row in rows], query)
    if page.after:
        return page
    last = connection.scalar(_LAST_EXAMINED, {"before": before, "examined": EXAMINED})
    if last is None:
        return page
    return Page(page.rows, str(last), f"This page is about {EXAMINED:,} entries of the audit log, down to {last}.")


AUDIT = Listing(
    path="audit",
    title="Audit log",
    permission="evidence",
    columns=(
        Column("id", "Id", "id"),
        Column("at", "Time", "time"),
        Column("actor", "Actor"),
        Column("database_user", "Database user"),
        Column("kind", "Action", "state"),
        Column("reason", "Reason"),
        Column("detail", "Detail"),
    ),
    select=_select_audit,
    parameters=("kind",),
    empty="The audit log has no such entry.",
)

_SEALS = text(
    """
    SELECT id, sealed_at, octet_length(entries) / 41 AS leaves, events_through, encode(hash, 'hex') AS hash, key_id
      FROM archiver.seals WHERE id < :before ORDER BY id DESC LIMIT :most
    """
)


def _select_newest(statement: TextClause, connection: Connection, query: Query) -> Page:
    """Return a page of rows by descending id; the statement has the parameters `before` and `most`."""
    values = {"before": _number(query.after, _MAX_ID), "most": query.limit + 1}
    return _paged([dict(row) for row in connection.execute(statement, values).mappings()], query)


SEALS = Listing(
    path="seals",
    title="Seals",
    permission="evidence",
    columns=(
        Column("id", "Seal", "id"),
        Column("sealed_at", "Sealed", "time"),
        Column("leaves", "Leaves", "number"),
        Column("events_through", "Events through", "number"),
        Column("hash", "Hash", "id"),
        Column("key_id", "Signed with", "id"),
    ),
    select=partial(_select_newest, _SEALS),
    empty="There is no seal yet. A worker makes the first one within ARCHIVER_SEAL_EVERY seconds of the first event.",
)


def _select_holds(connection: Connection, _: Query) -> Page:
    return Page([*erasure.select_holds(connection, released=True)][-MAX_LISTED:])


HOLDS = Listing(
    path="holds",
    title="Holds",
    permission="evidence",
    columns=(
        Column("id", "Hold", "id"),
        Column("placed_at", "Placed", "time"),
        Column("author", "Author"),
        Column("reason", "Reason"),
        Column("session_id", "Session", "id"),
        Column("assistant_id", "Assistant", "id"),
        Column("variable", "Variable"),
        Column("value", "Value", is_content=True),
        Column("since", "Since", "time"),
        Column("until", "Until", "time"),
        Column("released_at", "Released", "time"),
        Column("released_by", "Released by"),
    ),
    link=lambda row: f"holds/{row['id']}",
    link_permission="evidence",
    select=_select_holds,
    actions=(("hold", "Place a hold", "preservation"),),
    command="archiver hold add --session ID --reason TEXT",
    empty="There are no holds.",
)


_ERASURES = text(
    """
    SELECT id, erased_at, rule, session_id, chat_id, act_id FROM archiver.erasures
     WHERE id < :before ORDER BY id DESC LIMIT :most
    """
)


ERASURES = Listing(
    path="erasures",
    title="Erasures",
    permission="evidence",
    columns=(
        Column("id", "Id", "id"),
        Column("erased_at", "Ordered", "time"),
        Column("rule", "Rule", "state"),
        Column("session_id", "Conversation", "id"),
        Column("chat_id", "Turn", "id"),
        Column("act_id", "Audit entry", "id"),
    ),
    select=partial(_select_newest, _ERASURES),
    actions=(("erase", "Erase a conversation or a turn", "preservation"),),
    command="archiver erase --session ID --reason TEXT",
    empty="Nothing was erased yet.",
)


def _select_followups(connection: Connection, _: Query) -> Page:
    return Page(review.select_subscriptions(connection)[:MAX_LISTED])


FOLLOWUPS = Listing(
    path="followups",
    title="Follow-ups",
    permission="operation",
    columns=(
        Column("id", "Id", "id"),
        Column("url", "Address"),
        Column("state", "State", "state"),
        Column("behind", "Behind", "number"),
        Column("pending", "Pending", "number"),
        Column("dead", "Dead", "number"),
        Column("last_status", "Last status", "number"),
        Column("last_fault", "Last fault"),
    ),
    select=_select_followups,
    link=lambda row: f"followups/{row['id']}",
    link_permission="operation",
    command="archiver followups add URL --event chat.created",
    empty="There is no subscription.",
)


def _select_exports(connection: Connection, query: Query) -> Page:
    return _select_acts(connection, query, "kind IN ('export', 'export.done')", {})


EXPORTS = Listing(
    path="exports",
    title="Exports",
    permission="evidence",
    columns=(
        Column("id", "Id", "id"),
        Column("at", "Time", "time"),
        Column("actor", "Actor"),
        Column("kind", "Step", "state"),
        Column("reason", "Reason"),
        Column("detail", "Detail"),
    ),
    select=_select_exports,
    command="archiver export --output DIR --all",
    empty="Nothing was exported yet.",
)


def settings_of(configuration: Settings) -> Listing:
    """Return the list of the settings of this process. Of a secret, the list shows only that it is set."""
    rows = [
        {"name": name, "value": _shown(getattr(configuration, field)), "default": default, "meaning": meaning}
        for field, (name, default, meaning) in zip(Settings.model_fields, settings.table(), strict=True)
    ]
    return Listing(
        path="settings",
        title="Settings",
        permission="operation",
        columns=(
            Column("name", "Setting", "code"),
            Column("value", "Value"),
            Column("default", "Default"),
            Column("meaning", "Meaning"),
        ),
        select=lambda _, __: Page(rows),
        links=(("doctor", "Check settings, spool and database now"),),
        empty="There are no settings.",
    )


def _shown(value: Any) -> str:
    if isinstance(value, SecretStr):
        return "set (secret)" if value.get_secret_value() else ""
    text = "" if value is None else str(value)
    return _USER_IN_URL.sub("//…@", text)


_USER_IN_URL = re.compile(r"//[^/@]*@")

OTHERS = (QUARANTINE, FOLLOWUPS, SEALS, AUDIT, HOLDS, ERASURES, EXPORTS)
LISTINGS = (CONVERSATIONS, *OTHERS)
