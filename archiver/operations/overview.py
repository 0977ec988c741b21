"""Figures about an archive: content, freshness, and items that need attention."""

from datetime import datetime

import msgspec
from sqlalchemy import Connection, text


class Overview(msgspec.Struct, frozen=True):
    """Figures about an archive. Counts are rows; `sizes`: bytes by table, including indexes."""

    events: int
    deliveries: int
    last_event_at: datetime | None
    sessions: int
    chats: int
    deleted_chats: int
    messages: int
    coverage: dict[str, int]
    quarantine: int
    quarantine_reasons: dict[str, int]
    seals: int
    sealed_at: datetime | None
    unsealed: int
    sizes: dict[str, int]


def select_overview(connection: Connection) -> Overview:
    """Return the figures. Counts are exact, so tables are read completely."""
    ledger = connection.execute(
        text(
            "SELECT count(*) AS events, coalesce(sum(delivery_count), 0)::bigint AS deliveries,"
            " max(last_received_at) AS last_event_at,"
            " count(*) FILTER (WHERE id > (SELECT coalesce(max(events_through), 0) FROM archiver.seals)) AS unsealed"
            " FROM archiver.events"
        )
    ).one()
    seals = connection.execute(
        text("SELECT coalesce(max(id), 0) AS newest, max(sealed_at) AS sealed_at FROM archiver.seals")
    ).one()
    chats = connection.execute(
        text("SELECT count(*) AS chats, count(deleted_at) AS deleted FROM archiver.chats WHERE chat_id <> E'\\x1f'")
    ).one()
    coverage = _counts(
        connection, "SELECT coverage, count(*) FROM archiver.sessions WHERE session_id <> '' GROUP BY 1 ORDER BY 1"
    )
    reasons = _counts(connection, "SELECT reason, count(*) FROM archiver.quarantine GROUP BY 1 ORDER BY 1")
    return Overview(
        events=ledger.events,
        deliveries=ledger.deliveries,
        last_event_at=ledger.last_event_at,
        sessions=sum(coverage.values()),
        chats=chats.chats,
        deleted_chats=chats.deleted,
        messages=connection.scalar(text("SELECT count(*) FROM archiver.messages")) or 0,
        coverage=coverage,
        quarantine=sum(reasons.values()),
        quarantine_reasons=reasons,
        seals=seals.newest,
        sealed_at=seals.sealed_at,
        unsealed=ledger.unsealed,
        sizes=_counts(
            connection,
            "SELECT CASE n.nspname WHEN 'archiver' THEN c.relname ELSE 'search' END,"
            " sum(pg_total_relation_size(c.oid))"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname IN ('archiver', 'archiver_search') AND c.relkind = 'r' GROUP BY 1 ORDER BY 1",
        ),
    )


def _counts(connection: Connection, query: str) -> dict[str, int]:
    return {str(name): int(count) for name, count in connection.execute(text(query))}


class Silence(msgspec.Struct, frozen=True):
    """Turns in histories that no webhook delivered: since the latest webhook of a turn, or ever if there was none.

    `read_since` is the time of the first reading of a history; None if the ledger contains webhooks, or no history.
    """

    since: datetime | None
    turns: int
    sessions: int
    has_webhooks: bool = False  # of any type
    read_since: datetime | None = None

    @property
    def is_certain(self) -> bool:
        """Return whether so many turns are missing that webhooks have stopped, rather than some being lost."""
        return self.turns >= SILENT_TURNS


SILENT_TURNS = 3
ADVICE = (
    "Check that the platform sends its webhooks here (the assistant's page, Server Messaging), and"
    " that this receiver does not reject them: archiver_received_total by status."
)
_MAX_EXAMINED = 1_000  # newest readings and registrations

# After a webhook, counts a turn only if it certainly began later: its session is newer, or was read in between
# without the turn. A turn whose webhook was lost earlier and that a later reading supplied is not counted, nor
# is any turn if only deletions were ever sent. Without any webhook, counts every turn.
_SILENCE = text(
    """
    WITH latest AS MATERIALIZED (
        SELECT id, received_at FROM archiver.events
         WHERE source = 'webhook' AND type <> 'chat.deleted' AND starts_with(type, 'chat.') ORDER BY id DESC LIMIT 1
    ), start AS MATERIALIZED (
        SELECT id, received_at, true AS has_webhooks FROM latest
        UNION ALL
        SELECT 0, NULL, EXISTS (SELECT FROM archiver.events WHERE source = 'webhook')
         WHERE NOT EXISTS (SELECT FROM latest)
    ), heard AS MATERIALIZED (
        SELECT DISTINCT session_id
          FROM (SELECT e.session_id FROM archiver.events e
                 WHERE e.id > (SELECT id FROM start) AND e.source <> 'webhook' AND e.session_id <> ''
                 ORDER BY e.id DESC LIMIT :most) AS newest
    )
    SELECT l.received_at AS since, l.has_webhooks,
           count(c.chat_id) AS turns, count(DISTINCT c.session_id) AS sessions,
           CASE WHEN NOT l.has_webhooks
                THEN (SELECT received_at FROM archiver.events WHERE source = 'history' ORDER BY id LIMIT 1)
           END AS read_since
      FROM start l LEFT JOIN (heard h
           JOIN archiver.chats c ON c.session_id = h.session_id AND c.source = 'history' AND c.chat_id <> E'\\x1f'
           JOIN archiver.sessions s ON s.session_id = h.session_id)
        ON NOT l.has_webhooks
           OR (c.first_received_at > l.received_at
               AND (s.first_event_at > l.received_at
                    OR EXISTS (SELECT FROM archiver.events r
                                WHERE r.session_id = c.session_id AND r.source = 'history'
                                  AND r.last_received_at > l.received_at
                                  AND r.last_received_at < c.first_received_at)))
     GROUP BY l.received_at, l.has_webhooks
    """
).bindparams(most=_MAX_EXAMINED)


def select_silence(connection: Connection) -> Silence:
    """Return when the latest webhook of a turn arrived, and the undelivered turns that histories have shown since."""
    row = connection.execute(_SILENCE).one()
    return Silence(row.since, row.turns, row.sessions, row.has_webhooks, row.read_since)
