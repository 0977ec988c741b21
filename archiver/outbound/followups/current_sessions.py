"""The present session of a turn that was unassigned when it changed."""


def current_sessions(of: str, to: str) -> str:
    """CTEs: `to` holds cursor, session_id and chat_id of those of `of`, each with the session that it has by now."""
    return f"""
    homes AS MATERIALIZED (
        SELECT t.cursor, min(c.session_id) AS session_id
          FROM {of} t JOIN archiver.chats c ON c.chat_id = t.chat_id
         WHERE t.session_id = '' AND c.session_id <> '' GROUP BY t.cursor
    ), {to} AS MATERIALIZED (
        SELECT t.cursor, coalesce(h.session_id, t.session_id) AS session_id, t.chat_id
          FROM {of} t LEFT JOIN homes h ON h.cursor = t.cursor
    )
    """  # noqa: S608  # names of ours
