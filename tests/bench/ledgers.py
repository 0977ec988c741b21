"""A large ledger, made by Postgres itself."""

import psycopg

_FILL = """
    INSERT INTO archiver.events (session_id, dedupe_key, type, source, chat_id, received_at, last_received_at,
                                 delivery_count, occurred_at, key_id, body, salt, body_digest)
    SELECT 'session-' || n / 4, sha256(body), 'chat.created', 'webhook', 'chat-' || n, at, at, 1, at, 'key', body,
           salt, sha256(salt || body)
      FROM (
          SELECT n, timestamptz '2026-01-01' + n * interval '1 second' AS at,
                 substr(sha256(n::text::bytea), 1, 16) AS salt,
                 convert_to(format('{"type": "chat.created", "chat": {"id": "chat-%s", "sessionId": "session-%s",'
                                   ' "input": "%s", "output": [{"role": "assistant", "content": "%s"}]}}', n, n / 4,
                                   repeat(md5(n::text) || ' ', 9), repeat(md5((-n)::text) || ' ', 9)), 'UTF8') AS body
            FROM generate_series(%s, %s) AS n
      ) AS made
"""


def fill(url: str, events: int) -> None:
    """So many events, four a session."""
    with psycopg.connect(url, autocommit=True) as connection:
        for start in range(1, events + 1, 50_000):
            made = _FILL.replace("%s, %s)", f"{start}, {min(start + 49_999, events)})")
            connection.execute(made.encode())
        connection.execute("VACUUM (ANALYZE) archiver.events")
