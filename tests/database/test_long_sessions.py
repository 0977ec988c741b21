"""Long sessions: the cost of another turn and of another reading, and the same archive as after a rebuild."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text

from archiver import events
from archiver.archive import lock_and_rederive
from archiver.database import transaction
from archiver.events import Event, responses
from tests.support.long_sessions import TIMING, at, conversation, fill, reading, record, webhook
from tests.support.payloads import deleted, envelope
from tests.support.rows import DERIVED, empty

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres


# Rows that this connection has fetched and written, as far as Postgres has not published the numbers yet.
_TOUCHED = text(
    """
    SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::int AS fetched,
           sum(n_tup_ins + n_tup_upd + n_tup_del)::int AS written
      FROM pg_stat_xact_user_tables WHERE schemaname = 'archiver'
    """
)


class Cost(msgspec.Struct):
    """What recording a fact costs: rows fetched and written."""

    fetched: int
    written: int


def cost(engine: Engine, minute: float, event: Event, source: str) -> Cost:
    with transaction(engine) as connection:
        before = connection.execute(_TOUCHED).one()
        record(connection, minute, event, source)
        after = connection.execute(_TOUCHED).one()
        return Cost(after.fetched - before.fetched, after.written - before.written)


def dump(connection: Connection) -> list[Any]:
    """All that is derived."""
    return [
        sorted(str(row) for row in connection.execute(text(f"SELECT t::text FROM archiver.{table} t")))
        for table in DERIVED
    ]


def test_i12_a_turn_after_the_reading_costs_the_same_however_long_the_session_is(engine: Engine) -> None:
    fill(engine, 10)
    few = cost(engine, 10, webhook(10), events.WEBHOOK)
    empty(engine, *DERIVED, "events", "pieces")
    fill(engine, 300)
    assert cost(engine, 300, webhook(300), events.WEBHOOK) == few
    assert cost(engine, 301, webhook(301), events.WEBHOOK) == few
    with transaction(engine) as connection:
        assert dump(connection) == rebuilt(connection)


def test_i12_a_question_that_only_history_has_as_well_costs_the_same_however_long_the_session_is(
    engine: Engine,
) -> None:
    costs = []
    for turns in (10, 300):
        fill(engine, turns)
        lost = [("user", "ok"), ("assistant", "I am looking it up")]
        with transaction(engine) as connection:
            lines = [*conversation(3), *lost, *conversation(turns)[6:]]
            record(connection, turns - 0.25, reading(*lines), responses.SOURCE)
            connection.execute(text("ANALYZE archiver.messages, archiver.events, archiver.sessions, archiver.chats"))
        costs.append(cost(engine, turns + 1, webhook(turns + 1, input="ok"), events.WEBHOOK))
        with transaction(engine) as connection:
            assert dump(connection) == rebuilt(connection)
        empty(engine, *DERIVED, "events", "pieces")
    assert costs[0] == costs[1]


def test_i12_a_revision_of_the_last_turn_costs_the_same_however_long_the_session_is(engine: Engine) -> None:
    costs = []
    for turns in (10, 300):
        fill(engine, turns)
        with transaction(engine) as connection:
            record(connection, turns, webhook(turns, output=[]), events.WEBHOOK)
        costs.append(cost(engine, turns + 1, webhook(turns), events.WEBHOOK))
        with transaction(engine) as connection:
            assert dump(connection) == rebuilt(connection)
        empty(engine, *DERIVED, "events", "pieces")
    assert costs[0] == costs[1]


def test_i12_a_deletion_of_an_earlier_turn_costs_the_same_however_long_the_session_is(engine: Engine) -> None:
    costs = []
    for turns in (10, 300):
        fill(engine, turns)
        event = events.parse(deleted("chat-3", "session-1"))
        assert isinstance(event, Event)
        costs.append(cost(engine, turns, event, events.WEBHOOK))
        with transaction(engine) as connection:
            assert dump(connection) == rebuilt(connection)
        empty(engine, *DERIVED, "events", "pieces")
    assert costs[0] == costs[1]


def test_i12_a_status_of_an_earlier_turn_changes_that_turn_alone(engine: Engine) -> None:
    costs = []
    for turns in (10, 300):
        fill(engine, turns)
        times = {"createdAt": at(3).isoformat(), "updatedAt": at(turns).isoformat()}
        costs.append(cost(engine, turns, webhook(3, status="billed", cost=5, **times), events.WEBHOOK))
        with transaction(engine) as connection:
            assert dump(connection) == rebuilt(connection)
        empty(engine, *DERIVED, "events", "pieces")
    assert costs[0].written == costs[1].written
    assert costs[1].fetched - costs[0].fetched <= 290  # the time at which each turn began


def test_i12_an_exact_redelivery_is_counted_and_nothing_else(engine: Engine) -> None:
    fill(engine, 50)
    assert cost(engine, 60, webhook(7), events.WEBHOOK).written == 1


def test_i12_a_reading_that_shows_one_more_turn_writes_that_turn_alone(engine: Engine) -> None:
    costs = []
    for turns in (10, 200):
        fill(engine, turns)
        with transaction(engine) as connection:
            # The first response is kept as bytes until there is a second one.
            record(connection, turns, webhook(turns), events.WEBHOOK)
            record(connection, turns + 0.5, reading(*conversation(turns + 1)), responses.SOURCE)
            record(connection, turns + 1, webhook(turns + 1), events.WEBHOOK)
        costs.append(cost(engine, turns + 1.5, reading(*conversation(turns + 2)), responses.SOURCE).written)
        empty(engine, *DERIVED, "events", "pieces")
    assert costs[0] == costs[1]


# Steps of a session: a turn, whole or without its output, again or later, or one whose webhook is lost; a greeting; a
# deletion; and what history shows.
Step = (
    # Its number, what it says, and by how many minutes its times are too early.
    tuple[Literal["turn"], int, int, int]
    | tuple[Literal["draft"], int, int, int]
    | tuple[Literal["delete"], int, int, bool]  # number, minutes by which it is late, whether its session is named
    | tuple[Literal["bill"], int, int, bool, bool, int]  # the same, whether it has the texts, minutes in the spool
    | tuple[Literal["edit"], int]  # a line that history words in another way from then on
    | tuple[Literal["lost"], int, int]  # number, what it says
    | tuple[Literal["greeting"]]
    | tuple[Literal["read"], int, int]  # lines left out at the start, lines left out at the end
    | tuple[Literal["gone"]]
)
_numbers = st.integers(0, 7)
_late = st.sampled_from([0, 0, 0, 1, 3, 100_000])
_steps: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("turn"), _numbers, st.integers(0, 7), st.sampled_from([0, 0, 0, 1, 3, -1])),
    st.tuples(st.just("draft"), _numbers, st.integers(0, 7), st.just(0)),
    st.tuples(st.just("delete"), _numbers, _late, st.booleans()),
    st.tuples(st.just("bill"), _numbers, _late, st.booleans(), st.booleans(), st.sampled_from([0, 0, 0, 1, 3])),
    st.tuples(st.just("edit"), st.integers(0, 15)),
    st.tuples(st.just("lost"), _numbers, st.integers(0, 3)),
    st.tuples(st.just("greeting")),
    st.tuples(st.just("read"), st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from([0, 0, 0, 1, 2, 4])),
    st.tuples(st.just("gone")),
)
_TEXTS = [("ok", "ok"), ("ok", "done"), ("hello", "ok")]
_SEVERAL = 4  # from this number on, a turn has two answers
_WITH_CONTEXT = 6  # from this number on, its input repeats the conversation so far


class Conversation:
    """What upstream would say and show, step by step; one minute a step."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self._known: dict[int, dict[str, Any]] = {}  # what was reported last

    def _said(self, number: int, words: int) -> list[tuple[str, str]]:
        texts = _TEXTS[words] if words < len(_TEXTS) else (f"question {number}", f"answer {number}")
        more = [("assistant", f"more {number}")] if words >= _SEVERAL else []
        return [("user", texts[0]), ("assistant", texts[1]), *more]

    def is_undelivered(self, step: Step) -> bool:
        """Whether only a history shows what is said in this step."""
        match step:
            case ("lost", int(number), int(words)):
                self.lines += self._said(number, words)
            case ("greeting",):
                self.lines.insert(0, ("assistant", "Welcome!"))
            case _:
                return False
        return True

    def facts(self, minute: int, step: Step) -> tuple[Event, str]:
        match step:
            case ("turn" | "draft" as kind, int(number), int(words), int(skew)):
                lines = self._said(number, words)
                context = self.lines if words >= _WITH_CONTEXT else []
                sent = [{"role": role, "content": content} for role, content in [*context, lines[0]]]
                if number not in self._known:
                    self.lines += lines
                output = [{"role": role, "content": content} for role, content in lines[1:]] if kind == "turn" else []
                moment = at(minute - skew).isoformat()
                values: dict[str, Any] = {
                    "input": sent if context else lines[0][1],
                    "output": output,
                    "createdAt": moment,
                    "updatedAt": moment,
                }
                self._known[number] = values
                return webhook(number, **values), events.WEBHOOK
            case ("bill", int(number), int(late), bool(is_named), bool(is_whole), _):
                moment = at(minute - late).isoformat()
                known = self._known.get(number, {"createdAt": moment}) if is_whole else {"input": None, "output": []}
                values = known | {"cost": minute, "updatedAt": moment}
                return webhook(number, "session-1" if is_named else None, **values), events.WEBHOOK
            case ("delete", int(number), int(late), bool(is_named)):
                moment_ms = int(at(minute - late).timestamp() * 1_000)
                ids: dict[str, Any] = {"sessionId": "session-1"} if is_named else {}
                event = events.parse(envelope(events.DELETED, moment_ms, chat={"id": f"chat-{number}"}, **ids))
                assert isinstance(event, Event)
                return event, events.WEBHOOK
            case ("edit", int(line)):
                self.lines[line : line + 1] = [(role, f"{text} indeed") for role, text in self.lines[line : line + 1]]
                return responses.parse_history("session-1", 404, b""), responses.SOURCE
            case ("read", int(first), int(last)):
                return reading(*self.lines[first : len(self.lines) - last]), responses.SOURCE
            case _:
                return responses.parse_history("session-1", 404, b""), responses.SOURCE


def rebuilt(connection: Connection) -> list[Any]:
    """All that is derived, made again from the ledger alone; the archive stays as it is."""
    with connection.begin_nested() as nested:
        connection.execute(text("UPDATE archiver.messages SET place = 1, in_history = NULL WHERE session_id <> ''"))
        connection.execute(text("UPDATE archiver.chats SET began_at = now() WHERE session_id <> ''"))
        lock_and_rederive(connection, ["session-1"], TIMING)
        result = dump(connection)
        nested.rollback()
    return result


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_steps, min_size=3, max_size=12))
@example([("turn", 0, 3, 0), ("read", 0, 0), ("turn", 1, 3, 0), ("turn", 2, 3, 0), ("read", 0, 0), ("turn", 3, 0, 0)])
@example([("turn", 0, 0, 0), ("read", 0, 0), ("turn", 1, 0, 0), ("turn", 2, 0, 0), ("draft", 3, 1, 0)])
@example([("turn", 0, 3, 0), ("turn", 1, 3, 0), ("read", 0, 2), ("draft", 2, 3, 0), ("turn", 2, 3, 0)])
@example([("turn", 0, 3, 0), ("read", 0, 0), ("delete", 0, 0, True), ("delete", 0, 0, False)])
@example([("turn", 0, 3, 0), ("read", 0, 0), ("bill", 0, 0, True, True, 1)])
@example([("turn", 7, 3, 0), ("read", 0, 0), ("turn", 1, 3, 0), ("turn", 0, 3, 1), ("bill", 0, 0, True, True, 0)])
@example([("turn", 0, 3, 0), ("edit", 1), ("read", 0, 0), ("turn", 1, 3, 0), ("bill", 0, 0, True, True, 0)])
@example([("greeting",), ("read", 0, 0), ("turn", 0, 3, 0), ("turn", 1, 3, 0)])
@example([("greeting",), ("lost", 0, 3), ("read", 0, 0), ("turn", 1, 3, 0), ("lost", 2, 3), ("read", 0, 0)])
def test_i5_i10_after_each_fact_the_archive_is_what_the_ledger_makes_of_the_whole_session(
    engine: Engine, steps: Sequence[Step]
) -> None:
    empty(engine, *DERIVED, "events", "pieces")
    upstream = Conversation()
    for minute, step in enumerate(steps, 1):
        if upstream.is_undelivered(step):
            continue
        event, source = upstream.facts(minute, step)
        spooled = step[5] if step[0] == "bill" else 0
        with transaction(engine) as connection:
            record(connection, minute - spooled, event, source)
        with transaction(engine) as connection:
            if connection.scalar(text("SELECT read_at FROM archiver.sessions WHERE session_id <> ''")):
                assert dump(connection) == rebuilt(connection), (minute, step)
