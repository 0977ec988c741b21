"""The rollups, by 15 minutes, hour and day, and by promoted variables.

They equal at any time the figures computed from the archive itself.
"""

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from archiver import ledger
from archiver.archive import derived_rows, rollups, variable_values
from archiver.archive.rebuild import rebuild
from archiver.archive.sessions import BEFORE_FIRST_TURN
from archiver.compliance import erasure
from archiver.database import Lock, schema, transaction
from archiver.events import Delivery, Event, responses
from archiver.outbound import feed
from archiver.outbound.feed.publishing import publish_some
from archiver.settings.variables import parse
from archiver.worker.summing import Summing
from tests.support.erasures import as_writer, erase, holds_text
from tests.support.feeds import publish
from tests.support.histories import TIMING, answer
from tests.support.observations import observe, record
from tests.support.payloads import chat, created, deleted, event
from tests.support.rows import empty, execute, rows
from tests.support.slowness import holding

# A quarter of an hour off whole hours, half an hour, and changes of the clock by one hour and by half of one.
ZONES = ("UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns", "Australia/Lord_Howe", "Pacific/Chatham")
# About changes of the clock in Berlin and on Lord Howe Island, and about midnights.
MOMENTS = tuple(
    datetime.fromisoformat(each)
    for each in (
        "2024-03-31T00:50:00+00:00",
        "2024-10-27T00:20:00+00:00",
        "2024-04-06T14:40:00+00:00",
        "2024-10-05T15:20:00+00:00",
        "2024-01-15T18:10:00+00:00",
        "2024-01-15T23:50:00+00:00",
    )
)
BOUNDS = (0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300)


class Turn(NamedTuple):
    """A row of chats, with its messages counted; in order of time within its session."""

    session_id: str
    chat_id: str
    assistant_id: str | None
    of_session: str | None
    began_at: datetime
    cost: Decimal | None
    is_deleted: bool
    messages: int
    repaired: int
    seconds: float | None


def turns(engine: Engine) -> dict[str, list[Turn]]:
    """All turns, by session."""
    result: dict[str, list[Turn]] = defaultdict(list)
    for row in rows(
        engine,
        """
        SELECT c.session_id, c.chat_id, c.assistant_id, s.assistant_id,
               coalesce(c.began_at, c.created_at, c.occurred_at, c.first_received_at),
               c.cost, c.deleted_at IS NOT NULL,
               (SELECT count(*) FROM archiver.messages m
                 WHERE m.session_id = c.session_id AND m.chat_id = c.chat_id),
               (SELECT count(*) FROM archiver.messages m
                 WHERE m.session_id = c.session_id AND m.chat_id = c.chat_id AND m.source = 'history'),
               CAST(extract(epoch FROM c.updated_at - c.created_at) AS float8)
          FROM archiver.chats c JOIN archiver.sessions s ON s.session_id = c.session_id
         ORDER BY 1, 5, 2
        """,
    ):
        result[row[0]].append(Turn(*row))
    return result


Key = tuple[Any, ...]  # a day, hour or bucket, an assistant, and perhaps a value


class Figures:
    """What is counted of one day, hour or bucket."""

    def __init__(self) -> None:
        self.sessions: set[str] = set()
        self.started = self.chats = self.messages = self.deleted = self.repaired = 0
        self.cost: Decimal | None = None
        self.latency = [0] * (len(BOUNDS) + 1)

    def add(self, turn: Turn, *, is_first: bool) -> None:
        self.messages += turn.messages
        if turn.chat_id != BEFORE_FIRST_TURN:
            self.sessions |= {turn.session_id} - {""}
            self.chats += 1
            self.repaired += turn.repaired
        self.started += is_first and turn.session_id != ""
        self.deleted += turn.is_deleted
        if turn.cost is not None:
            self.cost = turn.cost if self.cost is None else self.cost + turn.cost
        if turn.seconds is not None:
            self.latency[sum(bound <= turn.seconds for bound in BOUNDS)] += 1

    def sums(self) -> tuple[Any, ...]:
        return self.started, self.chats, self.messages, self.cost, self.deleted, self.repaired, self.latency

    def of_day(self) -> tuple[Any, ...]:
        figures = self.chats, self.messages, self.cost, self.deleted, self.repaired, self.started
        return len(self.sessions), *figures


def expected(
    engine: Engine, at: Callable[[datetime], Any], values: Mapping[str, str | None] | None = None
) -> dict[Key, Figures]:
    """The figures by `at` of the time of each turn, and assistant, and value of the session."""
    result: dict[Key, Figures] = defaultdict(Figures)
    for session_id, own in turns(engine).items():
        named = [turn.assistant_id for turn in own if turn.assistant_id] if session_id else []
        first = next((turn for turn in own if turn.chat_id != BEFORE_FIRST_TURN), None)
        for turn in own:
            of_session = (named[-1] if named else turn.of_session) if session_id else None
            key = at(turn.began_at), turn.assistant_id or of_session
            of_value = () if values is None else (values.get(session_id),)
            result[*key, *of_value].add(turn, is_first=turn is first)
    return result


OTHER = "(other)"


def values_of_sessions(engine: Engine, variable: str) -> dict[str, str | None]:
    """The value of a variable in each session; other than the kept ones of a full variable, and long ones: OTHER."""
    ((is_full,),) = rows(
        engine, f"SELECT is_full FROM archiver.promoted_variables WHERE name = '{variable}' AND state <> 'removed'"
    )
    kept = rows(
        engine,
        "SELECT value FROM archiver.variable_values v JOIN archiver.promoted_variables p ON p.id = v.variable_id"
        f" WHERE p.name = '{variable}' AND p.state <> 'removed'",
    )
    result = {}
    for session_id, value in rows(
        engine,
        f"SELECT session_id, variables ->> '{variable}' FROM archiver.chats"
        f" WHERE session_id <> '' AND variables ? '{variable}'"
        " ORDER BY coalesce(began_at, created_at, occurred_at, first_received_at), occurred_at, first_received_at,"
        " chat_id",
    ):
        is_other = value is not None and (len(value) > 200 or (is_full and (value,) not in kept))
        result[session_id] = OTHER if is_other else value
    return result


def promoted(engine: Engine) -> dict[str, str]:
    return dict(rows(engine, "SELECT name, state FROM analytics.variables"))


def bucket(moment: datetime) -> datetime:
    return moment.replace(minute=moment.minute // 15 * 15, second=0, microsecond=0)


def hour_in(zone: str) -> Callable[[datetime], datetime]:
    def hour(moment: datetime) -> datetime:
        local = moment.astimezone(ZoneInfo(zone))
        return moment - timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)

    return hour


def day_in(zone: str) -> Callable[[datetime], date]:
    return lambda moment: moment.astimezone(ZoneInfo(zone)).date()


def read(engine: Engine, relation: str, where: str = "true", keys: int = 2) -> dict[Key, tuple[Any, ...]]:
    result = {}
    for row in rows(engine, f"SELECT * FROM analytics.{relation} WHERE {where}"):
        assert row[:keys] not in result
        result[tuple(row[:keys])] = tuple(row[keys:])
    return result


def check_variables(engine: Engine, zone: str) -> None:
    """Compare the figures by each promoted variable with figures computed from the archive."""
    for name in promoted(engine):
        values = values_of_sessions(engine, name)
        buckets = {
            (at, assistant_id, name, value): figures.sums()
            for (at, assistant_id, value), figures in expected(engine, bucket, values).items()
        }
        assert read(engine, "variable_rollups", f"variable = '{name}'", 4) == buckets
        hours = {key: figures.sums() for key, figures in expected(engine, hour_in(zone), values).items()}
        assert read(engine, f"hourly_by('{name}', '{zone}')", keys=3) == hours, zone
        days = {key: figures.sums() for key, figures in expected(engine, day_in(zone), values).items()}
        assert read(engine, f"daily_by('{name}', '{zone}')", keys=3) == days, zone


def check_all(engine: Engine, zones: Sequence[str] = ZONES) -> None:
    """Compare each view and function with figures computed from the archive."""
    days = {key: figures.of_day() for key, figures in expected(engine, day_in("UTC")).items()}
    assert read(engine, "daily") == days
    buckets = {key: figures.sums() for key, figures in expected(engine, bucket).items()}
    assert read(engine, "rollups") == buckets
    for zone in zones:
        hours = {key: figures.sums() for key, figures in expected(engine, hour_in(zone)).items()}
        assert read(engine, f"hourly('{zone}')") == hours, zone
        days_there = {key: figures.sums() for key, figures in expected(engine, day_in(zone)).items()}
        assert read(engine, f"daily('{zone}')") == days_there, zone
    check_variables(engine, zones[0] if zones else "UTC")


class Scenario:
    """A random course of events of a few sessions, at a few moments."""

    SESSIONS = ("s1", "s2", "s3")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._sent: list[bytes] = []

    def observations(self, number: int) -> list[Delivery[Event]]:
        return [
            Delivery(each.content, each.received_at, None, each.source)
            for _ in range(self._rng.randint(1, 4))
            for each in self._observed(number * 600)
        ]

    def _observed(self, seconds: float) -> Iterator[Delivery[Event]]:
        rng, kind = self._rng, self._rng.random()
        now = observe(created(), seconds).received_at
        if kind < 0.25:
            session_id = rng.choice(self.SESSIONS)
            yield Delivery(
                responses.parse_history(session_id, *self._history(session_id)), now, None, responses.SOURCE
            )
        elif kind < 0.32:
            session = {"id": rng.choice(self.SESSIONS), "assistantId": rng.choice(["a1", "a3"])}
            for registration in responses.registrations(json.dumps({"sessions": [session]}).encode()):
                yield Delivery(registration, now, None, "application")
        else:
            yield observe(self._delivery(), seconds - (rng.random() < 0.15) * 3000)

    def _delivery(self) -> bytes:
        rng = self._rng
        if self._sent and rng.random() < 0.2:
            return rng.choice(self._sent)
        chat_id, session_id = f"c{rng.randint(1, 5)}", rng.choice([*self.SESSIONS, "s1", None])
        began = rng.choice(MOMENTS) + timedelta(minutes=rng.choice([0, 5, 16, 75]))
        at = int(began.timestamp() * 1000) + 2_000
        if rng.random() < 0.2:
            body = deleted(chat_id, session_id, at)
        else:
            updated = began + timedelta(seconds=rng.choice([0.25, 0.5, 7, 400]))
            body = created(
                chat_id,
                session_id,
                at,
                assistantId=rng.choice(["a1", "a2", None]),
                cost=rng.choice([None, 1, 0.25, 0.125]),
                createdAt=rng.choice([None, began.isoformat(), began.isoformat()]),
                updatedAt=rng.choice([None, updated.isoformat()]),
                assistantOverrides={"variableValues": self._variables()},
            )
        self._sent.append(body)
        return body

    def _variables(self) -> dict[str, Any]:
        rng = self._rng
        tiers = ["Gold", "Silver", "Bronze", None, 3, "long" * 60]
        chosen = {"customerTier": rng.choice(tiers), "isTrial": rng.choice([True, False, "true"])}
        return {name: value for name, value in chosen.items() if rng.random() < 0.6}

    def _history(self, session_id: str) -> tuple[int, bytes]:
        rng = self._rng
        if rng.random() < 0.1:
            return 404, b""
        chats = sorted(rng.sample(range(1, 7), rng.randint(0, 5)))
        lines = [line for n in chats for line in (("user", f"question of c{n}"), ("assistant", f"answer to c{n}"))]
        greeting = [("assistant", "Welcome")] * rng.randint(0, 1)
        return 200, answer(*greeting, *lines, session_id=session_id, assistantId=rng.choice([None, "a4"]))


def publish_page(engine: Engine, rng: random.Random) -> None:
    """Publish a page, or only what one session has in it; sometimes die before the commit."""
    chosen = rng.choice(["s1", "s2", None])
    with transaction(engine) as connection:
        if chosen is None:
            feed.publish(connection)
        else:
            publish_some(connection, {chosen}.__contains__, notifies=False)
        if rng.random() < 0.2:
            connection.rollback()


def sum_page(engine: Engine, rng: random.Random) -> None:
    """Sum one page of stale buckets; sometimes die before the commit."""
    with transaction(engine) as connection:
        Lock.PUBLISHING.take(connection, exclusive=True)
        derived_rows.add_missing(connection, 0)
        variable_values.collect(connection)
    with transaction(engine) as connection:
        rollups.sum_stale(connection, rollups.select_stale(connection))
        if rng.random() < 0.2:
            connection.rollback()


SETTINGS = ("", "customerTier", "isTrial:boolean", "customerTier,isTrial:boolean,seats:number")


def step(engine: Engine, rng: random.Random, scenario: Scenario, number: int) -> None:
    rare = ["rebuild", "erase", "uncontribute", "promote"]
    kind = rng.choice(["record"] * 10 + ["publish"] * 5 + ["sum"] * 3 + rare)
    if kind == "record":
        with transaction(engine) as connection:
            ledger.record(connection, scenario.observations(number), TIMING)
    elif kind == "publish":
        publish_page(engine, rng)
    elif kind == "sum":
        sum_page(engine, rng)
    elif kind == "rebuild":
        list(rebuild(engine, TIMING))
    elif kind == "erase":
        target = erasure.Target(*rng.choice([("s1", ""), ("s2", "c1"), ("s1", "c2"), ("", "c3")]))
        erasure.order(engine, [target], "request", erasure.AuditEntry("erase", "anna", "she asked for it"))
        list(erasure.sweep(engine, TIMING, 0))
    elif kind == "promote":
        schema.upgrade(engine, variables=parse(rng.choice(SETTINGS)))
    else:  # as after the upgrade of an archive with sessions
        execute(
            engine,
            "INSERT INTO archiver.uncontributed SELECT session_id FROM archiver.sessions WHERE session_id = 's2'"
            " ON CONFLICT DO NOTHING",
            "DELETE FROM archiver.contributions WHERE session_id = 's2'",
            "INSERT INTO archiver.stale_buckets (bucket, since) SELECT bucket, now() FROM archiver.rollups"
            " ON CONFLICT DO NOTHING",
        )


def test_the_views_equal_the_recomputed_figures_at_any_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollups, "BUCKETS_PER_PAGE", 2)
    monkeypatch.setattr(variable_values, "SESSIONS_PER_PAGE", 1)
    monkeypatch.setattr(variable_values, "DELETED_PER_PAGE", 2)
    monkeypatch.setattr(variable_values, "MAX_VALUES", 2)

    # Not shrunk: what is smaller is no simpler here, and the seed says it all.
    @settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        rng = random.Random(seed)
        empty(engine, "events", "erasures", "messages", "chats", "sessions")
        execute(
            engine,
            "TRUNCATE archiver.outbox, archiver.contributions, archiver.rollups, archiver.days,"
            " archiver.stale_buckets, archiver.uncontributed, archiver.summaries, archiver.promoted_variables,"
            " archiver.variable_values, archiver.session_values, archiver.variable_rollups",
        )
        schema.upgrade(engine, variables=parse(rng.choice(SETTINGS)))
        scenario = Scenario(rng)
        for number in range(14):
            step(engine, rng, scenario, number)
            check_all(engine, [rng.choice(ZONES)])
        publish(engine)
        check_all(engine, [])
        Summing(engine).sum(lambda: None)
        assert rows(engine, "SELECT FROM archiver.stale_buckets UNION ALL SELECT FROM archiver.uncontributed") == []
        assert set(promoted(engine).values()) <= {"complete"}
        check_all(engine)

    check()


# By promoted variables


def tier(name: str, value: Any, **fields: Any) -> bytes:
    return created(name, f"s-{name}", assistantOverrides={"variableValues": {"customerTier": value}}, **fields)


def by_tier(engine: Engine) -> dict[str | None, int]:
    query = "SELECT value, sum(chats)::int FROM analytics.daily_by('customerTier', 'Europe/Berlin') GROUP BY 1"
    return dict(rows(engine, query))


def test_a_promoted_variable_is_exact_while_a_worker_collects_it_and_its_rows_go_when_it_is_removed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variable_values, "SESSIONS_PER_PAGE", 2)
    schema.upgrade(engine, variables=())
    record(engine, *(tier(f"c{number}", ("Gold", "Silver", None)[number % 3]) for number in range(6)))
    publish(engine)
    Summing(engine).sum(lambda: None)
    assert by_tier(engine) == {}
    schema.downgrade(engine, "0032")  # the schema before
    schema.upgrade(engine, variables=parse("customerTier"))
    assert promoted(engine) == {"customerTier": "collecting"}
    figures = {"Gold": 2, "Silver": 2, None: 2}
    for _ in range(3):
        assert by_tier(engine) == figures
        with transaction(engine) as connection:
            Lock.PUBLISHING.take(connection, exclusive=True)
            assert variable_values.collect(connection)
    Summing(engine).sum(lambda: None)
    assert promoted(engine) == {"customerTier": "complete"}
    assert rows(engine, "SELECT FROM archiver.stale_buckets") == []
    assert by_tier(engine) == figures
    later = {"variableValues": {"customerTier": "Silver"}}
    record(engine, created("later", "s-c0", createdAt="2030-01-01T00:00:00Z", assistantOverrides=later))
    assert by_tier(engine) == figures | {"Gold": 1, "Silver": 4}
    publish(engine)
    assert by_tier(engine) == figures | {"Gold": 1, "Silver": 4}
    schema.upgrade(engine, variables=parse("customerTier:number"))
    assert (promoted(engine), by_tier(engine)) == ({}, {})
    assert rows(engine, "SELECT value FROM archiver.variable_values") == []
    Summing(engine).sum(lambda: None)
    for table in ("promoted_variables", "session_values", "variable_rollups"):
        assert rows(engine, f"SELECT FROM archiver.{table}") == [], table


def test_more_values_than_are_kept_count_as_other(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variable_values, "MAX_VALUES", 3)
    schema.upgrade(engine, variables=parse("customerTier"))
    record(engine, *(tier(f"c{number}", f"tier {number}") for number in range(5)))
    for _ in range(2):  # published, and then summed
        publish(engine)
        assert by_tier(engine) == {"tier 0": 1, "tier 1": 1, "tier 2": 1, OTHER: 2}
        Summing(engine).sum(lambda: None)
    assert rows(engine, "SELECT known_values, is_full FROM analytics.variables") == [(3, True)]


def test_i8_an_erased_value_is_gone_before_the_next_sums(engine: Engine) -> None:
    schema.upgrade(engine, variables=parse("customerTier"))
    record(engine, tier("a", "ERASED"), tier("b", "Kept"))
    publish(engine)
    Summing(engine).sum(lambda: None)
    assert by_tier(engine) == {"ERASED": 1, "Kept": 1}
    erase(engine, erasure.Target("s-a", ""))
    publish(engine)
    execute(engine, "ANALYZE archiver.variable_values")
    assert holds_text(engine, "ERASED", "Kept") == ["Kept"]
    assert "ERASED" not in by_tier(engine)
    figures = by_tier(engine)
    Summing(engine).sum(lambda: None)
    assert by_tier(engine) == figures


# What a worker does


START = datetime(2024, 3, 30, 22, tzinfo=UTC)  # in Berlin, its clock changes three hours later


def spread(engine: Engine, sessions: int = 12) -> None:
    """Sessions of two turns each, one session every 25 minutes."""
    for number in range(sessions):
        began = START + timedelta(minutes=25 * number)
        times = [began, began + timedelta(minutes=20)]
        record(
            engine,
            *(
                created(f"c{number}-{turn}", f"s{number}", assistantId=f"a{number % 2}", createdAt=each.isoformat())
                for turn, each in enumerate(times)
            ),
            created(f"u{number}", None, createdAt=began.isoformat()),
        )


def summed(engine: Engine) -> dict[str, list[Any]]:
    return {
        "days": rows(engine, "SELECT day, assistant_id, chats FROM archiver.days ORDER BY 1, 2"),
        "rollups": rows(engine, "SELECT bucket, assistant_id, chats FROM archiver.rollups ORDER BY 1, 2"),
        "stale": rows(engine, "SELECT bucket FROM archiver.stale_buckets"),
    }


def lag(engine: Engine) -> float:
    ((seconds,),) = rows(engine, "SELECT rollups_lag_seconds FROM analytics.health")
    return float(seconds)


def test_the_writer_sums_and_the_reader_reads(engine: Engine, database_url: str) -> None:
    spread(engine)
    with as_writer(database_url) as writer:
        assert publish(writer) > 0
        Summing(writer).sum(lambda: None)
    after = summed(engine)
    assert sum(chats for _, _, chats in after["days"]) == sum(chats for _, _, chats in after["rollups"]) == 24
    assert after["stale"] == []
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL ROLE archiver_reader"))
        for relation in ("rollups", "daily", "hourly()", "daily()", "hourly('Asia/Kathmandu')", "daily('UTC')"):
            assert connection.scalar(text(f"SELECT sum(chats) FROM analytics.{relation}")) == 36, relation


def test_a_bucket_that_changes_while_it_is_summed_stays_stale(engine: Engine) -> None:
    spread(engine, 1)
    publish(engine)
    with transaction(engine) as connection:
        stale = rollups.select_stale(connection)
    late = START + timedelta(minutes=21)
    record(engine, created("late", "s0", createdAt=late.isoformat()))
    publish(engine)
    with transaction(engine) as connection:
        rollups.sum_stale(connection, stale)
    assert summed(engine)["stale"] == [(bucket(late),)]
    assert lag(engine) > 0
    check_all(engine)
    Summing(engine).sum(lambda: None)
    assert summed(engine)["stale"] == []
    assert lag(engine) == 0
    check_all(engine)


def test_what_did_not_change_makes_no_bucket_stale(engine: Engine) -> None:
    spread(engine)
    publish(engine)
    Summing(engine).sum(lambda: None)
    before = rows(engine, "SELECT xmin, * FROM archiver.contributions ORDER BY session_id, bucket")
    times = {"createdAt": START.isoformat(), "updatedAt": "2024-01-15T09:31:00Z"}
    revised = chat("c0-0", "s0", assistantId="a0", status="other", **times)
    record(engine, event("chat.created", 1_705_311_000_000, revised))
    assert publish(engine) == 1
    assert summed(engine)["stale"] == []
    assert rows(engine, "SELECT xmin, * FROM archiver.contributions ORDER BY session_id, bucket") == before


def test_a_bucket_that_is_locked_keeps_no_other_from_being_summed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archiver.database.transactions.SPLIT_LOCK_SECONDS", 0.2)
    monkeypatch.setattr("archiver.database.transactions.SINGLE_LOCK_SECONDS", 0.5)
    spread(engine, 2)
    publish(engine)
    (first, *_) = [row[0] for row in rows(engine, "SELECT bucket FROM archiver.stale_buckets ORDER BY 1")]
    with (
        holding(engine, f"SELECT 1 FROM archiver.stale_buckets WHERE bucket = '{first.isoformat()}' FOR UPDATE"),
        pytest.raises(DBAPIError),
    ):
        Summing(engine).sum(lambda: None)
    assert summed(engine)["stale"] == [(first,)]
    check_all(engine)


# After an upgrade


BEFORE = "0025"


def test_the_figures_of_sessions_of_an_earlier_version_are_right_before_during_and_after_the_first_sums(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread(engine)
    publish(engine)
    Summing(engine).sum(lambda: None)
    days = read(engine, "daily")
    schema.downgrade(engine, BEFORE)
    assert read(engine, "daily") == days
    schema.upgrade(engine)
    assert rows(engine, "SELECT count(*) FROM archiver.uncontributed") == [(12,)]
    check_all(engine)
    monkeypatch.setattr(rollups, "SESSIONS_PER_PAGE", 5)
    with transaction(engine) as connection:
        Lock.PUBLISHING.take(connection, exclusive=True)
        assert derived_rows.add_missing(connection, 0) == 5
    check_all(engine)
    record(engine, created("late", "s9", createdAt=START.isoformat()))
    publish(engine)
    check_all(engine)
    Summing(engine).sum(lambda: None)
    assert rows(engine, "SELECT count(*) FROM archiver.uncontributed") == [(0,)]
    assert summed(engine)["stale"] == []
    check_all(engine)


# What a query reads


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Pacific/Chatham"])
def test_since_and_until_select_whole_hours_and_days_of_the_zone(engine: Engine, zone: str) -> None:
    spread(engine, 60)
    publish(engine)
    for hours in (0.0, 0.5, 5.25, 20.0):
        since = START + timedelta(hours=hours)
        until = since + timedelta(hours=7)
        whole = read(engine, f"hourly('{zone}')")
        part = read(engine, f"hourly('{zone}', '{since.isoformat()}', until => '{until.isoformat()}')")
        assert part == {key: value for key, value in whole.items() if since <= key[0] < until}
        assert part
    whole = read(engine, f"daily('{zone}')")
    days = sorted({day for day, _ in whole})
    for since, until in itertools.combinations([*days, days[-1] + timedelta(days=1)], 2):
        part = read(engine, f"daily('{zone}', '{since}', '{until}')")
        assert part == {key: value for key, value in whole.items() if since <= key[0] < until}


def blocks(engine: Engine, query: str) -> int:
    """The pages that a query reads."""
    with transaction(engine) as connection:
        ((plan,),) = connection.execute(text(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}")).one()
    return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


# Of 2,000 buckets; without `since`, all of them, and nothing else.
BLOCKS = {
    "analytics.daily WHERE day >= '2024-01-15'": 60,
    "analytics.hourly('Asia/Kathmandu', '2024-02-01', '2024-02-02')": 60,
    "analytics.daily('Europe/Berlin', '2024-02-01', '2024-02-03')": 60,
    "analytics.daily_by('customerTier', 'Europe/Berlin', '2024-02-01', '2024-02-03')": 70,
    "analytics.hourly('Asia/Kathmandu')": 100,
    "analytics.daily('Europe/Berlin')": 100,
    "analytics.daily_by('customerTier')": 110,
}


def test_queries_read_sums_and_no_turns_where_nothing_changed(engine: Engine) -> None:
    schema.upgrade(engine, variables=parse("customerTier"))
    execute(
        engine,
        "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at)"
        " SELECT 's' || n, '2024-01-01', '2024-01-01' FROM generate_series(1, 2000) n",
        "INSERT INTO archiver.chats (session_id, chat_id, created_at, first_received_at, source)"
        " SELECT 's' || n, 'c' || n, timestamptz '2024-01-01 00:00Z' + n * interval '1 hour', now(), 'webhook'"
        " FROM generate_series(1, 2000) n",
        "INSERT INTO archiver.uncontributed SELECT session_id FROM archiver.sessions WHERE session_id <> ''",
    )
    assert all(blocks(engine, f"SELECT * FROM {query}") > 2_000 for query in BLOCKS)
    unfinished = ("uncontributed", "stale_buckets", "promoted_variables WHERE state = 'collecting'")
    while any(rows(engine, f"SELECT FROM archiver.{each}") for each in unfinished):
        Summing(engine).sum(lambda: None)
    execute(engine, "ANALYZE archiver.contributions, archiver.rollups, archiver.days, archiver.variable_rollups")
    read = {query: blocks(engine, f"SELECT * FROM {query}") for query in BLOCKS}
    assert [query for query, most in BLOCKS.items() if read[query] > most] == [], read
