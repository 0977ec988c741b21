"""A copy of the archive that is kept by following the feed equals the archive, after whatever has happened."""

import json
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from archiver import ledger
from archiver.archive.rebuild import rebuild
from archiver.compliance.erasure import AuditEntry, Target, order, sweep
from archiver.compliance.erasure.deleted import order_deleted
from archiver.compliance.erasure.retention import Rules
from archiver.database import transaction
from archiver.events import Delivery, Event, responses
from tests.support.feeds import cursor, publish
from tests.support.histories import TIMING, answer
from tests.support.observations import NOW, observe
from tests.support.payloads import created, deleted
from tests.support.retention import run as run_retention
from tests.support.rows import empty, execute, rows
from tests.support.versions import on_one_version

DOCS = Path(__file__).parents[2] / "docs"
# The columns that no change announces: when the history was read, and when it is due.
UNANNOUNCED = {
    "conversations": {"reconciled_at"},
    "coverage": {"reconciled_at", "next_reading_at"},
    "sessions": {"changed_cursor"},  # of the change itself
}
VIEWS = ("chats", "messages", "conversations", "coverage", "sessions")
FEW = 3  # changes in one page

Rows = dict[str, list[str]]  # by view, each row as JSON


class Copy:
    """The rows of each session as they were when its last change was followed."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._cursor = engine, cursor(engine)
        self.sessions: dict[str, Rows] = {}

    def follow(self) -> None:
        publish(self._engine)
        page = "SELECT session_id, cursor FROM analytics.changed_sessions({}, {})"
        while changed := rows(self._engine, page.format(self._cursor, FEW)):
            whole = archived(self._engine, [session_id for session_id, _ in changed])
            for session_id, self._cursor in changed:
                self.sessions.pop(session_id, None)
            self.sessions |= whole

    def renew(self) -> None:
        """Copy everything, as after an upgrade."""
        publish(self._engine)
        self._cursor, self.sessions = cursor(self._engine), archived(self._engine)


def archived(engine: Engine, sessions: Sequence[str] | None = None) -> dict[str, Rows]:
    """The visible rows of these sessions, or of all."""
    result: dict[str, Rows] = {}
    for view in VIEWS:
        query = f"SELECT session_id, to_jsonb(v) FROM analytics.{view} v WHERE session_id <> ''"
        chosen = "" if sessions is None else " AND session_id = ANY (:sessions)"
        with transaction(engine) as connection:
            found = connection.execute(text(query + chosen), {} if sessions is None else {"sessions": list(sessions)})
            for session_id, row in found:
                kept = {name: value for name, value in row.items() if name not in UNANNOUNCED.get(view, ())}
                of_session = result.setdefault(session_id, {each: [] for each in VIEWS})
                of_session[view].append(json.dumps(kept, sort_keys=True))
    return {session_id: {view: sorted(each[view]) for view in VIEWS} for session_id, each in result.items()}


# What may happen


class Said(NamedTuple):
    """A webhook; `revision` None: of a deletion. `at`: when it was sent, `minute`: when it arrived."""

    chat: int
    session: str | None
    revision: int | None
    at: int
    minute: int


class Read(NamedTuple):
    """A history that shows these chats in this order, some worded otherwise; None: it is gone."""

    session: str
    chats: tuple[int, ...] | None
    wording: int
    minute: int


class Registered(NamedTuple):
    session: str
    name: str | None
    minute: int


class Erased(NamedTuple):
    """`is_purged`: the content too, and not only ordered."""

    session: str
    chat: int | None
    is_purged: bool


class Done(NamedTuple):
    """What has no choice: see `ACTS`."""

    what: str


Step = Said | Read | Registered | Erased | Done
REVISIONS: Sequence[dict[str, Any]] = (
    {},
    {"createdAt": None, "updatedAt": None},
    {"updatedAt": "2024-01-15T09:31:00Z", "output": "better"},
    {"output": []},
    {"status": "open", "sessionName": "a name"},
    {"input": "question of c1"},
)


def text_of(chat: int, wording: int) -> list[tuple[str, str]]:
    question = f"question of c{chat}" + ("", "\r\n", " again")[wording]
    return [("user", question), ("assistant", f"answer to c{chat}")]


def delivery(step: Said | Read | Registered) -> Delivery[Event]:
    moment = NOW + timedelta(minutes=step.minute)
    match step:
        case Said():
            at = 1_705_311_000_000 + step.at * 1000
            chat_id = f"c{step.chat}"
            if step.revision is None:
                return observe(deleted(chat_id, step.session, at), step.minute * 60)
            return observe(created(chat_id, step.session, at, **REVISIONS[step.revision]), step.minute * 60)
        case Read():
            lines = [line for chat in step.chats or () for line in text_of(chat, step.wording)]
            body = answer(*lines, session_id=step.session)
            event = responses.parse_history(step.session, 404 if step.chats is None else 200, body)
            return Delivery(event, moment, None, responses.SOURCE)
        case Registered():
            named = {} if step.name is None else {"name": step.name}
            return Delivery(responses.register({"id": step.session} | named), moment, None, "application")


def seal(engine: Engine) -> None:
    execute(
        engine,
        "INSERT INTO archiver.seals SELECT coalesce(max(s.id), 0) + 1, now(),"
        " (SELECT coalesce(max(id), 0) FROM archiver.events), 0, 0, 0, 0, '', '', '', '' FROM archiver.seals s",
        unguarded=True,
    )


def rebuild_all(engine: Engine, _: Copy) -> None:
    list(rebuild(engine, TIMING))


def realign(engine: Engine, copy: Copy) -> None:
    """As after a version that placed, dated and divided messages otherwise, when a copy existed already."""
    execute(
        engine,
        "UPDATE archiver.messages SET place = 9 - place WHERE place % 2 = 0",
        "UPDATE archiver.chats SET began_at = began_at + interval '1 s' WHERE source = 'history'",
        "DELETE FROM archiver.messages WHERE source = 'history' AND ordinal = 1",
        unguarded=True,
    )
    copy.renew()
    rebuild_all(engine, copy)


def join(engine: Engine, copy: Copy) -> None:
    """As after a version that archived the lines of a history twice."""
    columns = "role, content, content_kind, source, place, in_history"
    execute(
        engine,
        f"INSERT INTO archiver.messages (session_id, chat_id, ordinal, {columns})"
        f" SELECT session_id, chat_id, ordinal + 10, {columns} FROM archiver.messages WHERE source = 'history'",
        unguarded=True,
    )
    copy.renew()
    rebuild_all(engine, copy)


def sweep_all(engine: Engine, _: Copy) -> None:
    list(sweep(engine, TIMING))


def erase_deleted(engine: Engine, copy: Copy) -> None:
    list(order_deleted(engine, NOW + timedelta(days=40)))
    sweep_all(engine, copy)


def expire_content(engine: Engine, _: Copy) -> None:
    run_retention(engine, Rules(30, {}, 0))


def remove_metadata(engine: Engine, _: Copy) -> None:
    execute(
        engine,
        "INSERT INTO archiver.seals SELECT coalesce(max(s.id), 0) + 1, now(),"
        " (SELECT coalesce(max(id), 0) FROM archiver.events), 0, 0, 0, 0, '', '', '', '' FROM archiver.seals s",
        unguarded=True,
    )
    run_retention(engine, Rules(0, {}, 30))


ACTS: dict[str, Callable[[Engine, Copy], None]] = {
    "rebuild": rebuild_all,
    "realign": realign,
    "join": join,
    "sweep": sweep_all,
    "erase deleted": erase_deleted,
    "expire": expire_content,
    "remove": remove_metadata,
}


def do(engine: Engine, batch: Sequence[Step], copy: Copy) -> None:
    """Neighbouring deliveries are one batch."""
    deliveries = [delivery(step) for step in batch if isinstance(step, Said | Read | Registered)]
    if deliveries:
        with transaction(engine) as connection:
            ledger.record(connection, deliveries, TIMING)
    for step in batch:
        if isinstance(step, Done):
            ACTS[step.what](engine, copy)
        elif isinstance(step, Erased):
            target = Target(step.session, "" if step.chat is None else f"c{step.chat}")
            if target != Target(""):
                order(engine, [target], "request", AuditEntry("erase", "anna", "asked"), skip_held=True)
            if step.is_purged:
                sweep_all(engine, copy)


SESSIONS = st.sampled_from(["s1", "s1", "s2"])
CHATS = st.integers(1, 4)
MINUTES = st.integers(0, 60)
STEPS = st.one_of(
    st.builds(
        Said,
        chat=CHATS,
        session=st.sampled_from(["s1", "s1", "s2", None]),
        revision=st.sampled_from([*range(len(REVISIONS)), None]),
        at=st.integers(0, 3),
        minute=MINUTES,
    ),
    st.builds(
        Read,
        session=SESSIONS,
        chats=st.none() | st.lists(CHATS, max_size=4, unique=True).map(tuple),
        wording=st.integers(0, 2),
        minute=MINUTES,
    ),
    st.builds(Registered, session=SESSIONS, name=st.sampled_from([None, "one", "two"]), minute=MINUTES),
    st.builds(Erased, session=st.sampled_from(["s1", "s2", ""]), chat=st.none() | CHATS, is_purged=st.booleans()),
    st.builds(Done, what=st.sampled_from(sorted(ACTS))),
)
HISTORIES = st.lists(st.lists(STEPS, min_size=1, max_size=3), min_size=1, max_size=10)


@on_one_version
def test_i11_a_copy_that_follows_the_feed_equals_the_archive(engine: Engine) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(batches=HISTORIES)
    @example([[Said(1, "s1", 1, 2, 10)], [Said(1, "s1", 1, 1, 20)]])  # the same, sent earlier
    @example([[Said(1, "s1", 0, 0, 10)], [Said(1, "s1", None, 3, 20)], [Said(1, "s1", None, 2, 30)]])
    @example([[Registered("s1", None, 10)], [Read("s1", None, 0, 20)]])
    @example([[Registered("s1", None, 10)], [Registered("s1", "one", 20)], [Registered("s1", None, 5)]])
    @example([[Said(1, "s1", 0, 0, 10), Said(2, "s1", 0, 0, 11)], [Read("s1", (1, 3), 0, 20)], [Done("realign")]])
    @example([[Said(1, "s1", 0, 0, 10)], [Read("s1", (1, 2), 0, 20)], [Done("join")]])
    @example([[Said(1, "s1", 0, 0, 10)], [Erased("s1", 1, is_purged=False)], [Done("sweep")], [Done("remove")]])
    @example([[Said(1, "s1", 0, 0, 10)], [Done("expire")], [Done("remove")]])
    @example(
        [
            [Said(1, None, 0, 0, 10), Said(2, "s1", 0, 0, 10)],
            [Erased("", 1, is_purged=True)],
            [Said(1, "s1", 0, 0, 20)],
        ]
    )
    def check(batches: list[list[Step]]) -> None:
        empty(engine, "outbox", "removals", "events", "pieces", "erasures", "seals", "messages", "chats", "summaries")
        execute(engine, "DELETE FROM archiver.sessions WHERE session_id <> ''", unguarded=True)
        copy = Copy(engine)
        for batch in batches:
            do(engine, batch, copy)
            copy.follow()
            assert copy.sessions == archived(engine), batch

    check()


# The example of the page


def example_of(name: str) -> str:
    page = (DOCS / "changes.md").read_text()
    (script,) = re.findall(rf"```sql\n-- {name}\n(.*?)```", page, re.DOTALL)
    return str(script)


def missing(connection: psycopg.Connection[Any], table: str) -> set[str]:
    """The turns of which the table does not have the row that the archive has."""
    query = (
        "SELECT turn_id FROM (SELECT * FROM analytics.chats WHERE session_id <> '' EXCEPT ALL"
        f" SELECT * FROM {table}) AS missing"
    )
    return {turn_id for (turn_id,) in connection.execute(query)}


def test_the_extract_of_the_page_misses_nothing_and_one_by_update_time_does(
    database_url: str, engine: Engine
) -> None:
    def extract() -> None:
        publish(engine)
        for _ in range(2):  # the second one finds nothing
            connection.execute(example_of("copy: each time"))
        connection.execute(example_of("by updated_at"))

    copy = Copy(engine)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(example_of("copy: once"))
        connection.execute("CREATE TABLE by_updated_at AS SELECT * FROM analytics.chats WITH NO DATA")
        do(engine, [Said(chat, "s1", 2, 0, chat) for chat in (1, 2, 4)], copy)
        extract()
        assert missing(connection, "by_updated_at") == set() == missing(connection, "extract.chats")
        do(engine, [Said(3, "s1", 0, 1, 5), Said(2, "s1", None, 2, 6)], copy)
        do(engine, [Read("s1", (1, 2, 3, 4, 5), 0, 10), Erased("s1", 4, is_purged=True)], copy)
        extract()
        assert missing(connection, "extract.chats") == set()
        missed = missing(connection, "by_updated_at")
        assert {"c2", "c3", "c4"} < missed  # deleted, late, erased
        assert any("#" in turn_id for turn_id in missed)  # known only from history
        kept = connection.execute("SELECT count(*), min(turn_id) FROM extract.messages").fetchone()
        assert kept == connection.execute("SELECT count(*), min(turn_id) FROM analytics.messages").fetchone()
