"""Check consistency between rows: counters only increase, and erased content has an erasure with an audit entry."""

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, text

from archiver.compliance.seals.chain import Seal
from archiver.compliance.seals.findings import Finding
from archiver.compliance.seals.restoring import check_in_pieces

# Without deliveries since the seal, the counters equal the sealed ones; otherwise they have increased. `r` is the
# newest recount; its columns are null if there is none.
_EXPECTED_COUNTERS = """
    CASE WHEN e.is_recounted THEN
        e.delivery_count > coalesce(r.delivery_count, 1)
        AND e.last_received_at >= coalesce(r.last_received_at, e.received_at)
        AND (e.earliest_at IS NOT DISTINCT FROM r.earliest_at
             OR coalesce(e.earliest_at < coalesce(r.earliest_at, e.occurred_at, 'infinity'), false))
    ELSE
        (e.delivery_count, e.last_received_at, e.earliest_at) IS NOT DISTINCT FROM
        (coalesce(r.delivery_count, 1), coalesce(r.last_received_at, e.received_at), r.earliest_at)
    END
"""
_RECOUNTED = text(
    f"""
    SELECT e.id
      FROM (
          SELECT DISTINCT ON (event_id) event_id, delivery_count, last_received_at, earliest_at
            FROM archiver.recounts ORDER BY event_id, id DESC
      ) r JOIN archiver.events e ON e.id = r.event_id
     WHERE e.id <= :through AND NOT {_EXPECTED_COUNTERS}
     ORDER BY e.id
    """  # noqa: S608  # only constant words are inserted, never input
)


def check_recounted(connection: Connection, head: Seal) -> Iterator[Finding]:
    """Check the counters of recounted events against their recounts, because a row does not show earlier values."""
    for event_id in connection.scalars(_RECOUNTED, {"through": head.through["events"]}):
        yield Finding("events", event_id, "counters_changed")


# Once a delivery has reported an earlier time, that time can only become earlier.
_DECREASED = text(
    """
    SELECT c.id FROM (
        SELECT id, event_id, earliest_at,
               delivery_count < lag(delivery_count) OVER earlier
               OR last_received_at < lag(last_received_at) OVER earlier
               OR coalesce(earliest_at > lag(earliest_at) OVER earlier,
                           earliest_at IS NULL AND lag(earliest_at) OVER earlier IS NOT NULL) AS went_back
          FROM archiver.recounts WINDOW earlier AS (PARTITION BY event_id ORDER BY id)
    ) AS c LEFT JOIN archiver.events e ON e.id = c.event_id AND c.earliest_at IS NOT NULL
     WHERE c.went_back OR c.earliest_at >= e.occurred_at ORDER BY c.id
    """
)


def check_recounts(connection: Connection, _: Seal) -> Iterator[Finding]:
    for recount_id in connection.scalars(_DECREASED):
        yield Finding("recounts", recount_id, "went_back")


# Events that need further checks than their row permits (`leaves.Run.unusual`), selected by id or up to an id.
_WHICH = {"these": "e.id = ANY (:ids)", "up_to": "e.id <= :last"}

_COUNTERS = {
    name: text(
        f"""
        SELECT e.id FROM archiver.events e LEFT JOIN archiver.recounts r ON r.event_id = e.id
         WHERE {rule} AND e.id <= :through AND r.event_id IS NULL AND NOT {_EXPECTED_COUNTERS}
         ORDER BY e.id
        """  # noqa: S608  # only constant words are inserted, never input
    )
    for name, rule in _WHICH.items()
}

# Salt and key must have their exact lengths; otherwise bytes of a body could be mistaken for them. Content may be
# missing only as `erasure.sweeping` deletes it: all of a session; or the facts of a turn, every reading of its
# session except one made without the turn, and events that mention the turn only in their body.
_CONTENT = {
    name: text(
        f"""
        SELECT e.id, NOT (e.body IS NULL OR e.salt IS NULL) AS is_there
          FROM archiver.events e
         WHERE {rule} AND (octet_length(e.salt) <> 16 OR octet_length(e.dedupe_key) <> 32
            OR ((e.salt IS NULL OR (e.body IS NULL AND e.runs IS NULL))
                AND (e.body IS NOT NULL OR e.salt IS NOT NULL OR NOT EXISTS (
                    SELECT FROM archiver.erasures x
                     WHERE x.session_id = e.session_id
                       AND (x.chat_id = e.chat_id
                            OR (x.session_id <> ''
                                AND (x.chat_id = ''
                                     OR (e.source = 'webhook' AND e.chat_id IS NULL)
                                     OR (e.source = 'history'
                                         AND NOT (e.type = 'history.redacted' AND e.occurred_at >= x.erased_at)))))
                ))))
         ORDER BY e.id
        """  # noqa: S608  # only constant words are inserted, never input
    )
    for name, rule in _WHICH.items()
}
PAGE = 10_000  # ids per query


def check_unusual(connection: Connection, event_ids: Sequence[int], through: int) -> Iterator[Finding]:
    """Check the counters (up to this id) and the content of these events, which differ from a single delivery."""
    for start in range(0, len(event_ids), PAGE):
        ids = list(event_ids[start : start + PAGE])
        yield from _check(connection, "these", {"ids": ids}, through)
        yield from check_in_pieces(connection, ids)


def check_before(connection: Connection, last: int, through: int) -> Iterator[Finding]:
    """Check all events up to `last`, which precede the seal after which the verification begins."""
    yield from _check(connection, "up_to", {"last": last}, through)


def _check(connection: Connection, which: str, values: dict[str, Any], through: int) -> Iterator[Finding]:
    for event_id in connection.scalars(_COUNTERS[which], {**values, "through": through}):
        yield Finding("events", event_id, "counters_changed")
    for event_id, is_there in connection.execute(_CONTENT[which], values):
        yield Finding("events", event_id, "changed" if is_there else "erased_without_record")


# An audit entry of another kind or rule cannot order an erasure. Only `retention` removes events, if its rules set a
# period.
_WITHOUT_ACT = text(
    """
    SELECT 'erasures' AS name, x.id, 'without_act' AS fault FROM archiver.erasures x
     WHERE NOT EXISTS (SELECT FROM archiver.acts a
                        WHERE a.id = x.act_id
                          AND (a.kind IN ('erase', 'erase.replay') AND a.detail ->> 'rule' = x.rule
                               OR a.kind = 'retention' AND x.rule = 'retention'))
    UNION ALL
    SELECT 'removals', r.id, 'without_act' FROM archiver.removals r
     WHERE NOT EXISTS (SELECT FROM archiver.acts a
                        WHERE a.id = r.act_id AND a.kind = 'retention'
                          AND coalesce(a.detail #>> '{rules,metadata}', '0') <> '0')
    UNION ALL
    SELECT 'removals', r.id, 'not_removed' FROM archiver.removals r
     WHERE EXISTS (SELECT FROM archiver.events e WHERE e.id = r.event_id)
     ORDER BY 1, 2
    """
)


def check_audit_entries(connection: Connection, _: Seal) -> Iterator[Finding]:
    for name, row_id, fault in connection.execute(_WITHOUT_ACT):
        yield Finding(name, row_id, fault)
