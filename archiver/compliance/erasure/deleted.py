"""With `ARCHIVER_ON_DELETE=erase`, erase turns deleted upstream after a grace period, unless a hold covers them."""

from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import Engine, Row, text
from sqlalchemy.exc import DBAPIError

from archiver.compliance.erasure.ordering import AuditEntry, Ordered, order
from archiver.compliance.erasure.targets import Target
from archiver.database import transaction
from archiver.ledger import audit_log

PAGE = 200

_SELECT_DELETED = text(
    """
    SELECT c.session_id, c.chat_id, c.deleted_at FROM archiver.chats c
     WHERE c.deleted_at <= :before
       AND (c.deleted_at, c.session_id, c.chat_id)
           > (CAST(:after_time AS timestamptz), CAST(:after_session AS text), CAST(:after_chat AS text))
       AND NOT EXISTS (SELECT FROM archiver.erasures e
                        WHERE e.session_id = c.session_id
                          AND (e.chat_id = c.chat_id OR (e.chat_id = '' AND e.session_id <> '')))
     ORDER BY c.deleted_at, c.session_id, c.chat_id LIMIT :most
    """
)


def order_deleted(engine: Engine, before: datetime) -> Iterator[Ordered]:
    """Order the erasure of turns deleted before `before`, page by page; held turns are skipped.

    The next sweep deletes the content. A turn that is locked or takes too long is skipped; the first such error is
    raised at the end.
    """
    slow: list[DBAPIError] = []
    after: dict[str, object] = {"after_time": "-infinity", "after_session": "", "after_chat": ""}
    while True:
        with transaction(engine, statement_seconds=300) as connection:
            page = connection.execute(_SELECT_DELETED, {"before": before, "most": PAGE, **after}).all()
        if not page:
            break
        entry = AuditEntry("erase", audit_log.ARCHIVER, "chat.deleted", {"chats": len(page)})
        yield order(engine, [_target(row) for row in page], "chat.deleted", entry, skip_held=True, slow=slow)
        last = page[-1]
        after = {"after_time": last.deleted_at, "after_session": last.session_id, "after_chat": last.chat_id}
    if slow:
        raise slow[0]


def _target(row: Row[tuple[str, str, datetime]]) -> Target:
    return Target(row.session_id, row.chat_id)
