"""One quarantined delivery: its beginning, why it is in quarantine, and what to do."""

from collections.abc import Mapping

import msgspec
from sqlalchemy import Connection, RowMapping, text

from archiver import events
from archiver.console import shown_bytes
from archiver.console.shown_bytes import ShownBytes
from archiver.ledger import quarantine

EXPLANATIONS: Mapping[str, str] = {
    **events.REASONS,
    quarantine.NOT_STORABLE: "Postgres refused the event, or failed on it repeatedly.",
    quarantine.TOO_SLOW: "Postgres did not store the event within 30 seconds, in two attempts with nothing else in"
    " the transaction.",
    quarantine.NOT_PROCESSABLE: "The archiver failed on the event. This is a defect.",
}
_OF_SENDER = (
    "The sender must send the event in a form that can be read. A retry helps after an upgrade that reads this form."
)
ADVICE: Mapping[str, str] = {
    **dict.fromkeys(events.REASONS, _OF_SENDER),
    quarantine.NOT_STORABLE: "Find the fault with archiver doctor. Retry once it is repaired.",
    quarantine.TOO_SLOW: "Find what made Postgres slow with archiver doctor: a lock, a long transaction or the"
    " disk. Then retry.",
    quarantine.NOT_PROCESSABLE: "Report the defect. Retry after an upgrade that repairs it.",
}


class Quarantined(msgspec.Struct, frozen=True):
    """A row of the quarantine without its body, and the beginning of the body."""

    row: RowMapping
    body: ShownBytes

    @property
    def explanation(self) -> str:
        """Return what the reason means."""
        return EXPLANATIONS.get(self.row["reason"], "This version does not know the reason.")

    @property
    def advice(self) -> str:
        """Return what to do."""
        return ADVICE.get(self.row["reason"], "Retry it.")


_SELECT = text(
    """
    SELECT q.id, q.source, q.type, q.session_id, q.received_at, q.last_received_at, q.delivery_count, q.reason,
           q.detail, q.key_id, length(q.body) AS size, substring(q.body FOR :most) AS beginning
      FROM archiver.quarantine q WHERE q.id = :id
    """
)


def select_item(connection: Connection, quarantine_id: int) -> Quarantined | None:
    """Return a quarantined delivery; None if there is none with this id."""
    row = connection.execute(_SELECT, {"id": quarantine_id, "most": shown_bytes.MOST}).mappings().one_or_none()
    if row is None:
        return None
    return Quarantined(row, shown_bytes.shown_bytes(bytes(row["beginning"]), row["size"]))


def select_body(connection: Connection, quarantine_id: int) -> bytes | None:
    """Return the exact bytes of a quarantined delivery; None if there is none with this id."""
    row = quarantine.select_quarantined(connection, quarantine_id)
    return None if row is None else bytes(row["body"])
