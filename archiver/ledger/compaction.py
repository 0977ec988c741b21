"""Store history responses in space that depends on the length of the transcript, not on the number of responses.

For each session the ledger stores at most `MIN_SPLIT_BYTES` of responses as received: a small response until a later
one contains it, or until others need the space. All others are stored in pieces (`pieces`), which reproduce the exact
bytes; the guard on the ledger compares them before it allows the bytes to be removed.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial

import msgspec
import structlog
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from archiver.archive import Timing, pieces
from archiver.archive.pieces import MIN_SPLIT_BYTES, Split
from archiver.archive.rows import lock_sessions, upsert_sessions
from archiver.database import RawStatement, explain, is_cancelled, is_lock_timeout, run, transaction
from archiver.events import Event
from archiver.events import responses as history

log = structlog.get_logger(__name__)

MAX_OLDER_RESPONSES = 16  # earlier responses stored in pieces together with a new one; the duty converts the rest
SESSIONS_PER_STEP = 200
RESPONSES_PER_STEP = 20
BYTES_PER_STEP = 4 * 1_048_576  # writers of the session wait this long

Key = tuple[str, bytes]  # session_id, dedupe_key


class StoredPieces(msgspec.Struct, frozen=True):
    """The ledger columns of a response that is stored in pieces."""

    frame: list[bytes]
    runs: list[int]


def is_response(event: Event, source: str) -> bool:
    """Return whether this fact is a history response with messages."""
    return source == history.SOURCE and event.type == history.READ


_IS_STORED = RawStatement("SELECT FROM archiver.events WHERE session_id = $1 AND dedupe_key = $2")


def store_in_pieces(
    connection: Connection, responses: Mapping[Key, tuple[bytes, datetime]], timing: Timing
) -> dict[Key, StoredPieces]:
    """Store in pieces the new responses that are too large to be kept as bytes; return their columns by key.

    Locks their sessions, in order of their ids.
    """
    large = {
        key: parts_of_body
        for key, parts_of_body in sorted(responses.items())
        if len(parts_of_body[0]) > MIN_SPLIT_BYTES
    }
    large = {key: parts_of_body for key, parts_of_body in large.items() if not _IS_STORED.execute(connection, *key)}
    if not large:
        return {}
    upsert_sessions(connection, {session_id: [arrived] for (session_id, _), (_, arrived) in large.items()}, timing)
    return {
        key: _write(connection, key[0], result)
        for key, (body, _) in large.items()
        if (result := pieces.split(key[0], body)) is not None
    }


def _write(connection: Connection, session_id: str, found: Split) -> StoredPieces:
    known = pieces.select_known(connection, session_id)
    runs = known.runs(found.messages)
    pieces.insert_new(connection, known)
    return StoredPieces(list(found.frame), pieces.numbers(runs))


# The newest responses first; a response has no chat.
_SELECT_OLDER = RawStatement(
    f"""
    SELECT e.dedupe_key, e.body FROM archiver.events e
     WHERE e.session_id = $1 AND e.chat_id IS NULL AND e.type = '{history.READ}' AND e.body IS NOT NULL
       AND e.dedupe_key <> $2
     ORDER BY e.received_at DESC LIMIT {MAX_OLDER_RESPONSES}
    """  # noqa: S608  # only constants are inserted, never input
)
_UPDATE = RawStatement(
    """
    UPDATE archiver.events SET body = NULL, frame = $3, runs = $4
     WHERE session_id = $1 AND dedupe_key = $2 AND body IS NOT NULL
    """
)


def replace_contained(connection: Connection, key: Key, body: bytes) -> None:
    """Replace earlier responses that the new one contains, or all if together they exceed the limit, with pieces.

    At most `MAX_OLDER_RESPONSES` are replaced. The caller has locked the session's row.
    """
    session_id, own = key
    older = [(bytes(row.dedupe_key), bytes(row.body)) for row in _SELECT_OLDER.execute(connection, session_id, own)]
    if not older:
        return
    is_full = len(body) + sum(len(each) for _, each in older) > MIN_SPLIT_BYTES
    new = None if is_full else pieces.split(session_id, body)
    for dedupe_key, each in reversed(older):
        result = pieces.split(session_id, each)
        if result is not None and (is_full or (new is not None and pieces.is_part(result.messages, new.messages))):
            made = _write(connection, session_id, result)
            _UPDATE.execute(connection, session_id, dedupe_key, made.frame, made.runs)


class Step(msgspec.Struct, frozen=True):
    """The number of responses stored in pieces by a step; `last`: the last session that is done, None at the end."""

    responses: int
    last: str | None


# A page of the sessions that have a history, and whether the responses stored as bytes exceed the limit.
_SELECT_SESSIONS = text(
    f"""
    WITH page AS MATERIALIZED (
        SELECT s.session_id FROM archiver.sessions s
         WHERE s.session_id > :after AND s.read_at IS NOT NULL ORDER BY s.session_id LIMIT :most
    )
    SELECT p.session_id, coalesce(sum(octet_length(e.body)), 0) > {MIN_SPLIT_BYTES} AS is_full
      FROM page p LEFT JOIN archiver.events e ON e.session_id = p.session_id AND e.chat_id IS NULL
           AND e.type = '{history.READ}' AND e.body IS NOT NULL
     GROUP BY p.session_id ORDER BY p.session_id
    """  # noqa: S608  # only constants are inserted, never input
)
_SELECT_WHOLE = text(
    f"""
    SELECT e.dedupe_key, octet_length(e.body) AS size, row_number() OVER (ORDER BY e.received_at DESC) AS age
      FROM archiver.events e
     WHERE e.session_id = :session_id AND e.chat_id IS NULL AND e.type = '{history.READ}' AND e.body IS NOT NULL
       AND NOT encode(e.dedupe_key, 'hex') = ANY (:passed)
     ORDER BY e.received_at LIMIT 1000
    """  # noqa: S608  # only constants are inserted, never input
)
_SELECT_BODY = RawStatement("SELECT body FROM archiver.events WHERE session_id = $1 AND dedupe_key = $2")


def compact(engine: Engine, after: str) -> Iterator[Step]:
    """Store the responses that exceed the limit in pieces, from the session after `after` on, in short steps."""
    while True:
        with transaction(engine) as connection:
            page = connection.execute(_SELECT_SESSIONS, {"after": after, "most": SESSIONS_PER_STEP}).all()
        for row in page:
            if row.is_full:
                try:
                    yield from _compact_session(engine, row.session_id, after)
                except DBAPIError as error:
                    if not is_lock_timeout(error) and not is_cancelled(error):
                        raise
                    # The responses only use more space than necessary; the next worker tries again.
                    log.warning("history response compaction failed", reason=explain(error))
            after = row.session_id
        if len(page) < SESSIONS_PER_STEP:
            yield Step(0, None)
            return
        yield Step(0, after)


def _compact_session(engine: Engine, session_id: str, after: str) -> Iterator[Step]:
    passed: list[str] = []  # responses that cannot be split and remain unchanged
    while True:
        # A redelivered response locks its own row before that of its session; on a deadlock one of the two is
        # retried.
        done, unsplit, is_last = run(engine, partial(_compact_some, session_id=session_id, passed=passed))
        passed += unsplit
        if is_last:
            return
        yield Step(done, after)


def _compact_some(connection: Connection, session_id: str, passed: Sequence[str]) -> tuple[int, list[str], bool]:
    """Store some responses in pieces; return their number, the keys of unsplittable ones, and whether all is done."""
    lock_sessions(connection, [session_id])
    rows = connection.execute(_SELECT_WHOLE, {"session_id": session_id, "passed": list(passed)}).all()
    older = [row for row in rows if row.age > 1 or row.size > MIN_SPLIT_BYTES]
    taken = _taken([(bytes(row.dedupe_key), row.size) for row in older])
    unsplit = [key.hex() for key in taken if not _store_body_in_pieces(connection, session_id, key)]
    return len(taken) - len(unsplit), unsplit, not taken


def _taken(found: Sequence[tuple[bytes, int]]) -> list[bytes]:
    size = 0
    taken: list[bytes] = []
    for key, length in found[:RESPONSES_PER_STEP]:
        size += length
        if taken and size > BYTES_PER_STEP:
            break
        taken.append(key)
    return taken


def _store_body_in_pieces(connection: Connection, session_id: str, key: bytes) -> bool:
    ((body,),) = _SELECT_BODY.execute(connection, session_id, key)
    result = None if body is None else pieces.split(session_id, bytes(body))
    if result is None:
        return False
    made = _write(connection, session_id, result)
    _UPDATE.execute(connection, session_id, key, made.frame, made.runs)
    return True
