"""Thirty questions of analysts, an archive to ask, and plain tables made from its ledger with the same answers."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Literal

import msgspec
from psycopg import Connection as PlainConnection
from psycopg import sql
from psycopg.types.json import Jsonb
from sqlalchemy import Engine

from archiver import events, ledger
from archiver.archive import Timing
from archiver.database import transaction
from archiver.events import Delivery, Event, responses
from archiver.worker.summing import Summing
from tests.support.feeds import publish
from tests.support.payloads import created, deleted
from tests.support.repeated import repeat_sessions
from tests.support.rows import rows
from tests.support.searching import index

TIMING = Timing()
PAGE = Path(__file__).parents[2] / "docs" / "analytics.md"
COMMON = [
    f"{verb} my {thing}" for verb in ("Where is", "Cancel", "Change", "Explain") for thing in ("order", "invoice")
]
RECENT_DAYS = 90  # these are the same in archives of all sizes
DAYS = 900
NEWEST = 9_999_999  # number of the newest session
MESSAGES_PER_SESSION = 8  # on average
LARGE_PAGES = 100  # of a table


class Question(msgspec.Struct, frozen=True):
    """A question, asked of schema `{v}`; `{session}`, `{chat}` and `{cursor}` stand for literals.

    `window`: it concerns some days, so that its cost depends on them; `one`: one thing; `all`: its cost grows with
    the archive.
    `budget`: buffers that it may read. `is_plain`: the plain tables have what it asks for.
    """

    name: str
    kind: Literal["window", "one", "all"]
    query: str
    budget: int | None = None
    is_plain: bool = True


def _within(column: str, days: int) -> str:
    return f"{column} >= now() - interval '{days} days'"


# The views differ from those of the first version of the questions where another one serves them better.
QUESTIONS = (
    Question(
        "01 messages by hour in a time zone, by role, 7 days",
        "window",
        "SELECT date_trunc('hour', began_at, 'Europe/Berlin') AS hour, role, count(*) FROM {v}.lines"
        f" WHERE {_within('began_at', 7)} GROUP BY 1, 2 ORDER BY 1, 2",
    ),
    Question(
        "02 turns by day in a time zone, 30 days",
        "window",
        "SELECT day, sum(chats), sum(deleted_chats)"
        " FROM {v}.daily('Europe/Berlin', (now() AT TIME ZONE 'Europe/Berlin')::date - 30) GROUP BY 1 ORDER BY 1",
    ),
    Question(
        "03 cost by assistant and tier, 30 days",
        "window",
        "SELECT assistant_id, variables ->> 'customerTier', sum(cost), count(*) FROM {v}.chats"
        f" WHERE {_within('began_at', 30)} GROUP BY 1, 2 ORDER BY 3 DESC NULLS LAST, 1, 2",
    ),
    Question(
        "04 p50 and p95 of turns a conversation, 30 days",
        "window",
        "SELECT percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY turns) FROM {v}.sessions"
        f" WHERE {_within('started_at', 30)}",
    ),
    Question(
        "05 conversations of one turn, by week, 90 days",
        "window",
        "SELECT date_trunc('week', started_at, 'UTC'), avg((turns = 1)::int), count(*) FROM {v}.sessions"
        f" WHERE {_within('started_at', 90)} GROUP BY 1 ORDER BY 1",
    ),
    Question(
        "06 answers to the first questions, 24 hours",
        "window",
        "SELECT session_id, first_answer FROM {v}.sessions"
        f" WHERE {_within('started_at', 1)} AND first_answer IS NOT NULL ORDER BY 1",
    ),
    Question(
        "07 deletions by day, 90 days",
        "window",
        "SELECT date_trunc('day', deleted_at, 'UTC'), count(*) FROM {v}.chats"
        f" WHERE {_within('deleted_at', 90)} GROUP BY 1 ORDER BY 1",
    ),
    Question(
        "08 repaired conversations, by week, 90 days",
        "window",
        "SELECT date_trunc('week', started_at, 'UTC'), avg((coverage = 'repaired')::int), sum(repaired_messages)"
        f" FROM {{v}}.sessions WHERE {_within('started_at', 90)} GROUP BY 1 ORDER BY 1",
    ),
    Question(
        "09 the 20 longest conversations, 30 days",
        "window",
        "SELECT session_id, assistant_id, messages, cost FROM {v}.sessions"
        f" WHERE {_within('started_at', 30)} ORDER BY messages DESC, session_id LIMIT 20",
    ),
    Question(
        "10 the 20 most frequent first questions, 30 days",
        "window",
        "SELECT first_question, count(*) FROM {v}.sessions"
        f" WHERE {_within('started_at', 30)} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 20",
    ),
    Question(
        "11 the newest 50 conversations of a company",
        "all",
        "SELECT session_id, started_at, turns, cost FROM {v}.sessions"
        ' WHERE variables @> \'{{"companyName": "Company 7"}}\''
        " ORDER BY started_at DESC, session_id LIMIT 50",
    ),
    Question(
        "12 messages with two words, newest 50",
        "one",
        "SELECT session_id, turn_id, ordinal, role FROM {v}.search('chargeback dispute', most => 50)"
        " ORDER BY began_at DESC, 1, 2, 3",
        budget=3_000,
    ),
    Question(
        "13 messages with a part of a text",
        "all",
        "SELECT session_id, turn_id, ordinal, content FROM {v}.lines WHERE content ILIKE '%cancel my invoice%'"
        " ORDER BY 1, 2, 3 LIMIT 50",
    ),
    Question(
        "14 a page of conversations, 24 hours",
        "window",
        "SELECT session_id, assistant_id, last_message_at, turns, messages, cost FROM {v}.sessions"
        f" WHERE {_within('last_message_at', 1)}"
        " AND (last_message_at, session_id) < (now() - interval '3 hours', 'f')"
        " ORDER BY last_message_at DESC, session_id DESC LIMIT 50",
        budget=100,
    ),
    Question(
        "15 one transcript", "one", "SELECT position, role, content FROM {v}.transcript('{session}')", budget=30
    ),
    Question(
        "16 one conversation",
        "one",
        "SELECT session_id, assistant_id, started_at, last_message_at, turns, messages, user_messages,"
        " assistant_messages, cost, deleted_chats, repaired_messages, coverage, first_question, first_answer,"
        " variables"
        " FROM {v}.sessions WHERE session_id = '{session}'",
        budget=10,
    ),
    Question(
        "17 one turn by its chat id",
        "one",
        "SELECT session_id, turn_id, assistant_id, cost, variables, created_at, updated_at, began_at, deleted_at"
        " FROM {v}.chats WHERE chat_id = '{chat}'",
        budget=10,
    ),
    Question("18 complete through", "one", "SELECT {v}.complete_through()", budget=10),
    Question(
        "19 sessions by coverage and day, 90 days",
        "window",
        "SELECT date_trunc('day', started_at, 'UTC'), coverage, count(*) FROM {v}.sessions"
        f" WHERE {_within('started_at', 90)} GROUP BY 1, 2 ORDER BY 1, 2",
    ),
    Question(
        "20 funnel, 30 days",
        "window",
        "SELECT count(*), count(*) FILTER (WHERE assistant_messages > 0), count(*) FILTER (WHERE turns >= 2),"
        " count(*) FILTER (WHERE turns >= 5), count(*) FILTER (WHERE deleted_chats > 0) FROM {v}.sessions"
        f" WHERE {_within('started_at', 30)}",
    ),
    Question(
        "21 weekly retention of users, 8 weeks",
        "window",
        "WITH seen AS ("
        "SELECT DISTINCT variables ->> 'userId' AS user_id, date_trunc('week', created_at, 'UTC') AS week"
        f" FROM {{v}}.chats WHERE {_within('began_at', 56)} AND created_at IS NOT NULL),"
        " cohort AS (SELECT user_id, min(week) AS first FROM seen GROUP BY 1)"
        " SELECT first, (extract(epoch FROM week - first) / 604800)::int, count(*)"
        " FROM seen JOIN cohort USING (user_id) GROUP BY 1, 2 ORDER BY 1, 2",
    ),
    Question(
        "22 extract of turns by time, 1 day",
        "window",
        "SELECT session_id, turn_id, cost, variables, updated_at FROM {v}.chats"
        f" WHERE {_within('updated_at', 1)} ORDER BY updated_at, turn_id LIMIT 10000",
    ),
    Question(
        "23 extract of conversations by cursor",
        "one",
        "SELECT * FROM {v}.sessions WHERE changed_cursor > {cursor} ORDER BY changed_cursor LIMIT 250",
        budget=200,
        is_plain=False,
    ),
    Question(
        "24 changes by type, 1 day",
        "window",
        "SELECT type, count(*) FROM {v}.changes WHERE cursor > {cursor} GROUP BY 1",
        is_plain=False,
    ),
    Question(
        "25 daily figures, 90 days",
        "window",
        "SELECT day, sum(conversations), sum(conversations_started), sum(chats), sum(messages), sum(cost),"
        " sum(repaired_messages) FROM {v}.daily WHERE day >= current_date - 90 GROUP BY 1 ORDER BY 1",
        budget=100,
    ),
    Question(
        "26 today so far, and the last 5 minutes",
        "window",
        "SELECT sum(chats), sum(cost), sum(conversations),"
        " (SELECT count(*) FROM {v}.chats WHERE began_at >= now() - interval '5 minutes')"
        " FROM {v}.daily WHERE day = (now() AT TIME ZONE 'UTC')::date",
        budget=50,
    ),
    Question(
        "27 p50 and p95 of latency by assistant, 7 days",
        "window",
        "SELECT assistant_id, percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP"
        " (ORDER BY extract(epoch FROM updated_at - created_at)) FROM {v}.chats"
        f" WHERE {_within('began_at', 7)} AND created_at IS NOT NULL GROUP BY 1 ORDER BY 1",
    ),
    Question(
        "28 messages of yesterday's turns",
        "window",
        "SELECT session_id, turn_id, ordinal, role, content FROM {v}.lines"
        " WHERE began_at >= date_trunc('day', now(), 'UTC') - interval '1 day'"
        " AND began_at < date_trunc('day', now(), 'UTC') ORDER BY session_id, began_at, turn_id, ordinal",
    ),
    Question("29 number of messages", "all", "SELECT sum(messages) FROM {v}.sessions"),
    Question("30 first rows", "one", "SELECT * FROM {v}.lines LIMIT 100", is_plain=False),
)


def fill(engine: Engine, sessions: int, recent: int, now: datetime, repeated: int = 0) -> None:
    """Record so many sessions, `recent` of them within `RECENT_DAYS`, through the ledger; publish, index and sum.

    The recent sessions of archives of all sizes are the same. `repeated`: how often SQL repeats the older ones.
    """
    facts = sorted(_facts(sessions, recent, now), key=lambda each: each.received_at)
    first_recent = f"session-{NEWEST - recent + 1:07}"
    for is_recent in (False, True):
        _record(engine, [each for each in facts if (each.content.session_id >= first_recent) is is_recent])
        if not is_recent and repeated:
            repeat_sessions(engine, repeated)
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql("VACUUM (ANALYZE)")


def _record(engine: Engine, facts: Sequence[Delivery[Event]]) -> None:
    for start in range(0, len(facts), 500):
        with transaction(engine) as connection:
            ledger.record(connection, facts[start : start + 500], TIMING)
        publish(engine)
    index(engine, None if rows(engine, "SELECT FROM archiver.search_state WHERE language IS NOT NULL") else "simple")
    while rows(engine, "SELECT FROM archiver.stale_buckets LIMIT 1"):
        Summing(engine).sum(lambda: None)


def _facts(sessions: int, recent: int, now: datetime) -> Iterator[Delivery[Event]]:
    rng = random.Random(17)
    ages = [rng.uniform(0, RECENT_DAYS) for _ in range(recent)]
    ages += [rng.uniform(RECENT_DAYS, DAYS) for _ in range(sessions - recent)]
    # Ids grow with time, because the ledger writes a batch in the order of its keys: rows are then in the order of
    # time, as live traffic in small batches writes them.
    for number, days in zip(range(NEWEST, NEWEST - sessions, -1), sorted(ages), strict=True):
        yield from _session_facts(random.Random(number), number, now - timedelta(days=days, hours=1))


def _session_facts(rng: random.Random, number: int, began_at: datetime) -> Iterator[Delivery[Event]]:
    session_id, turns = f"session-{number:07}", rng.choice([1, 2, 3, 4, 4, 5, 6, 7])
    lost = rng.randrange(1, turns) if turns > 1 and rng.random() < 0.05 else None
    is_read = lost is not None or rng.random() < 0.2
    shown = [("assistant", "Welcome!")] if rng.random() < 0.1 else []
    moment = began_at
    for turn in range(turns):
        question = rng.choice(COMMON) if turn == 0 else f"Question {turn} of {number}"
        question += " chargeback dispute" if rng.random() < 0.01 else ""
        lines = [("user", question), ("assistant", f"Answer {turn} of {number}. " + "It is on its way. " * 6)]
        shown += lines
        if turn != lost:
            yield from _turn_facts(
                rng, (session_id, f"chat-{number:07}-{turn}", number), lines, moment, is_read=is_read
            )
        moment += timedelta(minutes=3)
    if is_read:
        body = json.dumps({"session": {"messages": [{"role": role, "content": text} for role, text in shown]}})
        event = responses.parse_history(session_id, 200, body.encode())
        yield Delivery(event, moment + timedelta(minutes=7), None, responses.SOURCE)


def _turn_facts(
    rng: random.Random, ids: tuple[str, str, int], lines: Sequence[tuple[str, str]], at: datetime, *, is_read: bool
) -> Iterator[Delivery[Event]]:
    session_id, chat_id, number = ids
    variables = {"customerTier": ("Free", "Premium")[number % 2], "companyName": f"Company {number % 97}"}
    body = created(
        chat_id,
        session_id,
        at=int(at.timestamp() * 1000),
        input=lines[0][1],
        output=[{"role": lines[1][0], "content": lines[1][1]}],
        createdAt=at.isoformat(),
        updatedAt=(at + timedelta(seconds=rng.randrange(1, 20))).isoformat(),
        cost=rng.randrange(1, 400) / 10_000,
        assistantId=f"assistant-{number % 40}",
        assistantOverrides={"variableValues": variables | {"userId": f"user-{number % 311}"}},
    )
    yield _delivery(body, at + timedelta(seconds=20))
    if not is_read and rng.random() < 0.03:
        later = at + timedelta(minutes=1)
        yield _delivery(deleted(chat_id, session_id, at=int(later.timestamp() * 1000)), later)


def _delivery(body: bytes, at: datetime) -> Delivery[Event]:
    event = events.parse(body)
    assert isinstance(event, Event)
    return Delivery(event, at, None)


# Plain tables

_PLAIN = """
    CREATE SCHEMA plain;
    CREATE TABLE plain.chats (session_id text, chat_id text, turn_id text, assistant_id text, cost numeric,
        variables jsonb, created_at timestamptz, updated_at timestamptz, began_at timestamptz,
        deleted_at timestamptz);
    CREATE TABLE plain.lines (session_id text, turn_id text, position int, ordinal int, role text, content text,
        began_at timestamptz, deleted_at timestamptz, is_lost boolean, is_greeting boolean);
    CREATE TABLE plain.coverage (session_id text, state text, first_event_at timestamptz)
"""
_AGGREGATED = """
    CREATE TABLE plain.sessions AS
    WITH question AS (
        SELECT DISTINCT ON (session_id) * FROM plain.lines WHERE role = 'user' ORDER BY session_id, position
    ), answer AS (
        SELECT DISTINCT ON (l.session_id) l.session_id, l.content
          FROM plain.lines l JOIN question q USING (session_id)
         WHERE l.role = 'assistant' AND l.position > q.position ORDER BY l.session_id, l.position
    ), turns AS (
        SELECT session_id, max(assistant_id) AS assistant_id, min(began_at) AS started_at, count(*) AS turns,
               max(greatest(began_at, updated_at)) AS last_message_at, sum(cost) AS cost,
               count(deleted_at) AS deleted_chats, (array_agg(variables) FILTER (WHERE chat_id IS NOT NULL))[1]
               AS variables FROM plain.chats GROUP BY 1
    ), lines AS (
        SELECT session_id, count(*) AS messages, count(*) FILTER (WHERE role = 'user') AS user_messages,
               count(*) FILTER (WHERE role = 'assistant') AS assistant_messages,
               count(*) FILTER (WHERE is_lost) AS repaired_messages FROM plain.lines GROUP BY 1
    )
    SELECT t.*, l.messages, l.user_messages, l.assistant_messages, l.repaired_messages, c.state AS coverage,
           q.content AS first_question, a.content AS first_answer
      FROM turns t JOIN lines l USING (session_id) JOIN plain.coverage c USING (session_id)
      LEFT JOIN question q USING (session_id) LEFT JOIN answer a USING (session_id);
    CREATE FUNCTION plain.daily(zone text, since date)
        RETURNS TABLE (day date, conversations bigint, conversations_started bigint, chats bigint, messages numeric,
                       cost numeric, deleted_chats bigint, repaired_messages numeric) LANGUAGE sql AS $$
    SELECT (t.began_at AT TIME ZONE $1)::date AS day, count(DISTINCT t.session_id),
           count(DISTINCT t.session_id) FILTER (WHERE t.began_at = s.started_at), count(*), sum(l.messages),
           sum(t.cost), count(t.deleted_at), sum(l.repaired)
      FROM plain.chats t JOIN plain.sessions s USING (session_id)
      JOIN (SELECT session_id, CASE WHEN is_greeting THEN first ELSE turn_id END AS turn_id, count(*) AS messages,
                   count(*) FILTER (WHERE is_lost) AS repaired
              FROM plain.lines
              JOIN (SELECT session_id, min(chat_id) AS first FROM plain.chats GROUP BY 1) f USING (session_id)
             GROUP BY 1, 2) l USING (session_id, turn_id)
     WHERE (t.began_at AT TIME ZONE $1)::date >= $2 GROUP BY 1 $$;
    CREATE TABLE plain.daily AS SELECT * FROM plain.daily('UTC', '-infinity');
    CREATE FUNCTION plain.transcript(text) RETURNS SETOF plain.lines LANGUAGE sql
        AS 'SELECT * FROM plain.lines WHERE session_id = $1 ORDER BY position';
    CREATE FUNCTION plain.search(text, most int) RETURNS SETOF plain.lines LANGUAGE sql
        AS 'SELECT * FROM plain.lines WHERE content LIKE ''%'' || $1 || ''%'' ORDER BY began_at DESC LIMIT $2';
    CREATE FUNCTION plain.complete_through() RETURNS timestamptz LANGUAGE sql
        AS 'SELECT min(first_event_at) FROM plain.coverage WHERE state = ''open''';
    GRANT USAGE ON SCHEMA plain TO PUBLIC;
    GRANT SELECT ON ALL TABLES IN SCHEMA plain TO PUBLIC
"""


def make_plain_tables(connection: PlainConnection[Any]) -> None:
    """Create schema `plain` from the bytes in the ledger: each text of a session occurs in it once."""
    connection.execute(_PLAIN)
    # Bodies without order: the ids of a batch follow its keys.
    sessions: dict[str, list[tuple[Any, ...]]] = {}
    for session_id, *rest in connection.execute(
        "SELECT session_id, received_at, source, coalesce(body, archiver.body_of(session_id, frame, runs))"
        " FROM archiver.events ORDER BY id"
    ):
        sessions.setdefault(session_id, []).append(tuple(rest))
    rows: dict[str, list[tuple[Any, ...]]] = {"chats": [], "lines": [], "coverage": []}
    for session_id, facts in sessions.items():
        _plain_session(session_id, facts, rows)
    for table, values in rows.items():
        with connection.cursor().copy(
            sql.SQL("COPY {} FROM STDIN").format(sql.Identifier("plain", table))
        ) as copying:
            for row in values:
                copying.write_row(row)
    connection.execute(_AGGREGATED)


def _plain_session(session_id: str, facts: Sequence[tuple[Any, ...]], rows: dict[str, list[tuple[Any, ...]]]) -> None:
    turns: dict[str, dict[str, Any]] = {}  # by question
    deletions: dict[str, datetime] = {}
    shown: list[dict[str, str]] = []
    for _, source, body in facts:
        document = json.loads(body)
        if source == "history":
            shown = document["session"]["messages"]
            continue
        message = document["message"]
        if message["type"] == "chat.created":
            turns[message["chat"]["input"]] = message["chat"]
        else:
            deletions[message["chat"]["id"]] = datetime.fromtimestamp(message["timestamp"] / 1000, UTC)
    delivered = [
        {"role": role, "content": text}
        for question, chat in sorted(turns.items(), key=lambda turn: str(turn[1]["createdAt"]))
        for role, text in (("user", question), ("assistant", chat["output"][0]["content"]))
    ]
    lines = shown or delivered
    times = {question: datetime.fromisoformat(chat["createdAt"]) for question, chat in turns.items()}
    key, began_at, deleted_at, lost = f"{session_id}#0", min(times.values()), None, 0
    ordinals: dict[str, Iterator[int]] = {}
    for position, line in enumerate(lines, 1):
        if line["role"] == "user" and line["content"] in turns:
            chat = turns[line["content"]]
            key, began_at = chat["id"], times[line["content"]]
            deleted_at = deletions.get(key)
            variables = Jsonb(chat["assistantOverrides"]["variableValues"])
            told = chat["assistantId"], chat["cost"], variables, began_at, chat["updatedAt"]
            rows["chats"].append((session_id, key, key, *told, began_at, deleted_at))
        elif line["role"] == "user":
            later = [moment for moment in times.values() if moment > began_at]
            key, deleted_at = f"{session_id}#{position}", None
            began_at += (min(later) - began_at) / 2 if later else timedelta(0)
            rows["chats"].append((session_id, None, key, *[None] * 5, began_at, None))
        is_lost = key.startswith(f"{session_id}#") and not key.endswith("#0")
        lost += is_lost
        ordinal = next(ordinals.setdefault(key, count()))
        values = (position, ordinal, line["role"], line["content"], began_at, deleted_at, is_lost, key.endswith("#0"))
        rows["lines"].append((session_id, key, *values))
    state = ("repaired" if lost else "complete") if shown else "open"
    rows["coverage"].append((session_id, state, min(fact[0] for fact in facts)))


# What a question costs


class Cost(msgspec.Struct, frozen=True):
    """Buffers read, rows read from tables and indexes, and large tables that were read whole."""

    buffers: int
    rows: int
    whole: frozenset[str]


def measure(connection: PlainConnection[Any], query: str) -> Cost:
    """Return what a query costs once its data is in memory."""
    explained = sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {}").format(sql.SQL(query))
    connection.execute(explained)
    ((plans,),) = connection.execute(explained).fetchall()
    plan = plans[0]["Plan"]
    nodes = list(_nodes(plan))
    rows = sum(
        int(node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)))
        for node in nodes
        if "Scan" in node["Node Type"] and "Relation Name" in node
    )
    return Cost(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], rows, _read_whole(connection, nodes))


def _read_whole(connection: PlainConnection[Any], nodes: Sequence[dict[str, Any]]) -> frozenset[str]:
    """Return the large tables of which a scan without an index read at least half: others end at a LIMIT."""
    scanned = {
        node["Relation Name"]: node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        for node in nodes
        if node["Node Type"] == "Seq Scan"
    }
    large = connection.execute(
        "SELECT relname, reltuples FROM pg_class WHERE relkind = 'r' AND relname = ANY (%s) AND relpages >= %s",
        [list(scanned), LARGE_PAGES],
    )
    return frozenset(name for name, rows in large if scanned[name] * 2 >= rows)


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get("Plans", ()):
        yield from _nodes(each)


def asked(connection: PlainConnection[Any], question: Question, schema: str = "analytics") -> str:
    """Return the query of a question about this archive."""
    session_id, chat_id = _newest_turn(connection)
    (cursor,) = connection.execute("SELECT coalesce(max(cursor), 0) - 2000 FROM analytics.changes").fetchone() or (0,)
    return question.query.format(v=schema, session=session_id, chat=chat_id, cursor=max(cursor, 0))


def worked_queries(connection: PlainConnection[Any]) -> dict[str, str]:
    """Return the worked queries of docs/analytics.md by their headings, about this archive."""
    section = PAGE.read_text().split("\n## Worked queries\n")[1].split("\n## ")[0]
    found = dict(re.findall(r"^### (.+?)\n.*?^```sql\n(.*?);\n```", section, re.DOTALL | re.MULTILINE))
    session_id, chat_id = _newest_turn(connection)
    values = {"session_id": session_id, "chat_id": chat_id, "company": "Company 7"}
    return {
        heading: re.sub(r":'(\w+)'", lambda name: f"'{values[name[1]]}'", query) for heading, query in found.items()
    }


def _newest_turn(connection: PlainConnection[Any]) -> tuple[str, str]:
    """Return its session and its chat id."""
    return connection.execute(
        "SELECT session_id, chat_id FROM analytics.chats WHERE chat_id IS NOT NULL ORDER BY began_at DESC LIMIT 1"
    ).fetchone() or ("", "")
