"""Whole lives of sessions under faults, deterministic by seed: a platform, two receivers, two workers, one database.

Each seed is one session. Webhooks are lost, doubled, delayed, reordered and come without output; turns are deleted;
receivers die with their transaction; workers die between question and answer; histories are cut, empty, gone or
garbage. When all has been said and a last reading was made, the archive tells the truth. A failure names the seed.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from archiver import events, ledger
from archiver.archive import Timing
from archiver.archive.rebuild import rebuild
from archiver.database import transaction
from archiver.events import Delivery, Event, responses
from tests.conftest import Cluster
from tests.support.payloads import chat, event

UNTRACED = True

START = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)
TIMING = Timing()
SEEDS = 2_000
SEEDS_OF_A_TEST = 200
AT_ONCE = 100  # sessions that share the transactions of their steps
COMMON = ["ok", "thanks", "yes"]

Said = list[tuple[str, str]]


@dataclass
class Turn:
    """One chat as the platform has it."""

    chat_id: str
    input: str
    output: list[str]
    at: datetime
    is_deleted: bool = False
    arrived: bool = False  # a webhook with its whole content was committed
    deletion_arrived: bool = False

    def said(self) -> Said:
        return [("user", self.input), *(("assistant", content) for content in self.output)]


@dataclass
class Sent:
    """A webhook on its way."""

    turn: Turn
    kind: str
    body: bytes
    is_whole: bool


@dataclass
class Life:
    """One session: what the platform holds, what is under way, and the next thing that happens to it."""

    seed: int
    random: Random = field(init=False)
    turns: list[Turn] = field(default_factory=list)
    under_way: list[Sent] = field(default_factory=list)
    asked: list[tuple[datetime, int, bytes]] = field(default_factory=list)  # answers that no worker has recorded yet

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.session_id = f"s-{self.seed}"
        self.shrinks = self.random.random() < 0.7
        self.loss = self.random.choice([0.0, 0.3, 0.7])
        self.is_distinct = self.random.random() < 0.6
        self.read: set[tuple[str, str]] = set()  # whatever a recorded answer showed

    def step(self, now: datetime) -> list[Delivery[Event]]:
        """What reaches the archive now: nothing, webhooks or an answer."""
        act = self.random.choices(
            [self._talk, self._deliver, self._delete, self._ask, self._record], weights=[4, 6, 1, 1, 2]
        )[0]
        return act(now)

    def _talk(self, now: datetime) -> list[Delivery[Event]]:
        number = len(self.turns)
        unique = self.is_distinct or self.random.random() < 0.3
        output = [f"answer {number}" if unique else self.random.choice(COMMON)]
        if self.random.random() < 0.2:
            output.append("Anything else?")
        turn = Turn(f"c-{self.seed}-{number}", self.random.choice([*COMMON, f"question {number}"]), output, now)
        self.turns.append(turn)
        if self.random.random() < 0.15:  # told before it was answered; the revision may be lost
            self._send(turn, "chat.created", output=False)
        self._send(turn, "chat.created", output=True)
        return []

    def _delete(self, now: datetime) -> list[Delivery[Event]]:
        del now
        if living := [turn for turn in self.turns if not turn.is_deleted]:
            turn = self.random.choice(living)
            turn.is_deleted = True
            self._send(turn, "chat.deleted", output=False, may_be_lost=False)
        return []

    def _send(self, turn: Turn, kind: str, *, output: bool, may_be_lost: bool = True) -> None:
        fields = {
            "input": turn.input,
            "output": [{"role": "assistant", "content": content} for content in turn.output] if output else [],
            "createdAt": turn.at.isoformat(),
            "updatedAt": (turn.at + timedelta(seconds=1 if output else 0)).isoformat(),
        }
        result = (
            chat(turn.chat_id, self.session_id, **fields)
            if kind == "chat.created"
            else {
                "id": turn.chat_id,
                "sessionId": self.session_id,
            }
        )
        moment = round(turn.at.timestamp() * 1000)
        copies = 0 if may_be_lost and self.random.random() < self.loss else self.random.choice([1, 1, 1, 2, 3])
        for copy in range(copies):
            body = event(kind, moment + copy, result)
            self.under_way.append(Sent(turn, kind, body, is_whole=output))

    def _deliver(self, now: datetime) -> list[Delivery[Event]]:
        if not self.under_way:
            return []
        # Mostly in order, at times not; some wait until the very end.
        index = 0 if self.random.random() < 0.7 else self.random.randrange(len(self.under_way))
        return [self._observe(self.under_way.pop(index), now)]

    def _observe(self, delivery: Sent, now: datetime) -> Delivery[Event]:
        parsed = events.parse(delivery.body)
        assert isinstance(parsed, Event)
        delivery.turn.arrived |= delivery.is_whole
        delivery.turn.deletion_arrived |= delivery.kind == "chat.deleted"
        return Delivery(parsed, now, None)

    def shown(self) -> Said:
        """What the platform's history shows."""
        turns = [turn for turn in self.turns if not (self.shrinks and turn.is_deleted)]
        return [message for turn in turns for message in turn.said()]

    def answer(self) -> bytes:
        messages = [{"role": role, "content": content} for role, content in self.shown()]
        return json.dumps({"session": {"id": self.session_id, "messages": messages}}).encode()

    def _ask(self, now: datetime) -> list[Delivery[Event]]:
        fault = self.random.choices(["none", "cut", "gone", "empty", "garbage"], weights=[6, 1, 1, 1, 1])[0]
        whole = json.loads(self.answer())
        if fault == "cut":
            messages = whole["session"]["messages"]
            at = self.random.randrange(len(messages) + 1)
            whole["session"]["messages"] = messages[at:] if self.random.random() < 0.5 else messages[:at]
        elif fault == "empty":
            whole["session"]["messages"] = []
        status, body = {"gone": (404, b""), "garbage": (200, b"<html>")}.get(fault, (200, json.dumps(whole).encode()))
        self.asked = [(now, status, body)]  # one reader at a time: the lease sees to that
        return []

    def _record(self, now: datetime) -> list[Delivery[Event]]:
        del now
        answers, self.asked = self.asked, []
        if self.random.random() < 0.2:
            return []  # the worker died with the answer
        for _, status, body in answers:
            result = (
                responses.parse_snapshot(responses.READ, self.session_id, body).messages if status == 200 else None
            )
            self.read |= {(message.role, message.content) for message in result or ()}
        return [
            Delivery(responses.parse_history(self.session_id, status, body), began, None, "history")
            for began, status, body in answers
        ]

    def end(self, now: datetime) -> Iterator[list[Delivery[Event]]]:
        """All that is still under way arrives, but for some of it before a last reading that sees everything."""
        late = self.random.choice([0, 0, 1, 2])
        while len(self.under_way) > late:
            yield [self._observe(self.under_way.pop(self.random.randrange(len(self.under_way))), now)]
        later = now + timedelta(minutes=10)
        yield [Delivery(responses.parse_history(self.session_id, 200, self.answer()), later, None, "history")]
        while self.under_way:
            yield [self._observe(self.under_way.pop(), later + timedelta(minutes=1))]


class CrashError(Exception):
    """A receiver or worker dies before its commit."""


def record(connection: Connection, observations: list[Delivery[Event]], *, dies: bool) -> None:
    ledger.record(connection, observations, TIMING)
    if dies:
        raise CrashError


def commit(engines: list[Engine], random: Random, observations: list[Delivery[Event]]) -> None:
    """By one of two processes, that may die in between; what was sent to it is sent again."""
    if not observations:
        return
    dies = random.random() < 0.1
    for attempt in (dies, False) if dies else (False,):
        try:
            with transaction(random.choice(engines)) as connection:
                record(connection, observations, dies=attempt)
        except CrashError:
            continue


def live(engines: list[Engine], seeds: Iterable[int]) -> list[Life]:
    lives = [Life(seed) for seed in seeds]
    random = Random(min(life.seed for life in lives))
    now = START
    for _ in range(random.randint(15, 45)):
        now += timedelta(minutes=1)
        commit(engines, random, [each for life in lives for each in life.step(now)])
    now += timedelta(minutes=1)
    ends = [life.end(now) for life in lives]
    while ends:
        result = [(end, observations) for end in ends if (observations := next(end, None)) is not None]
        commit(engines, random, [each for _, observations in result for each in observations])
        ends = [end for end, _ in result]
    return lives


Row = tuple[Any, ...]


def archived(engine: Engine) -> dict[str, list[Row]]:
    """Messages by session, in true order: chat id, role, content, source, whether history shows it."""
    query = (
        "SELECT session_id, chat_id, role, content, source, in_history FROM analytics.messages"
        " ORDER BY session_id, position"
    )
    values: dict[str, list[Row]] = {}
    with transaction(engine) as connection:
        for row in connection.execute(text(query)):
            values.setdefault(row.session_id, []).append(tuple(row)[1:])
    return values


def check(life: Life, rows: list[Row], coverage: tuple[str, int], deleted: set[str]) -> None:
    assert {turn.chat_id for turn in life.turns if turn.deletion_arrived} == deleted, "a deletion leaves a tombstone"
    shown = [(role, content) for _, role, content, _, in_history in rows if in_history]
    assert shown == life.shown(), "I6: what history shows, in order and once"
    by_chat: dict[str | None, Said] = {}
    for chat_id, role, content, *_ in rows:
        by_chat.setdefault(chat_id, []).append((role, content))
    for turn in life.turns:
        if turn.arrived:
            own = by_chat.get(turn.chat_id, [])
            assert is_within(turn.said(), own), "I3, I7: a turn that arrived, whole"
            assert own == turn.said() or not is_unambiguous(life), "I3: and once"
    if is_unambiguous(life):
        remaining = {(role, content) for _, role, content, _, _ in rows}
        assert life.read <= remaining, "I7: whatever a reading showed stays"
        known = [turn for turn in life.turns if turn.arrived or is_shown(life, turn)]
        truth = [message for turn in known for message in turn.said()]
        left = Counter(truth)
        left.subtract((role, content) for _, role, content, _, _ in rows)
        assert not +left, "I6: nothing that is known is missing"
        head = next((n for n, row in enumerate(rows) if row[0] is not None or row[1] == "user"), len(rows))
        assert coverage[1] == sum(source == "history" for *_, source, _ in rows[head:]), "repairs are counted"
        if all(turn.arrived for turn in life.turns):
            # Of two readings that were cut and have nothing in common nobody knows which comes first: what one of
            # them showed may stand at a second place, marked as no longer shown.
            result = [(role, content) for chat_id, role, content, _, in_history in rows if chat_id or in_history]
            assert result == truth, "I6: the truth, in order"


def is_shown(life: Life, turn: Turn) -> bool:
    return not (life.shrinks and turn.is_deleted)


def is_within(part: Said, whole: Said) -> bool:
    rest = iter(whole)
    return all(message in rest for message in part)


def is_unambiguous(life: Life) -> bool:
    """No turn said the same as the beginning of another; none that nobody told of vanished from the history."""
    texts = [turn.said() for turn in life.turns]
    are_distinct = not any(one is not other and other[: len(one)] == one for one in texts for other in texts)
    return are_distinct and all(turn.arrived for turn in life.turns if turn.is_deleted)


@pytest.mark.parametrize("cluster", ["18"], indirect=True)
@pytest.mark.parametrize("start", range(0, SEEDS, SEEDS_OF_A_TEST))
def test_i3_i5_i6_i7_i10_hold_at_the_end_of_every_life(start: int, cluster: Cluster) -> None:
    for first in range(start, start + SEEDS_OF_A_TEST, AT_ONCE):
        url = cluster.clone()
        engines = [cluster.engine(url), cluster.engine(url)]
        lives = live(engines, range(first, first + AT_ONCE))
        rows = archived(engines[0])
        with transaction(engines[0]) as connection:
            coverage = {
                row.session_id: (row.state, row.repaired_messages)
                for row in connection.execute(text("SELECT * FROM analytics.coverage"))
            }
        deleted = tombstones(engines[0])
        for each in lives:
            result = coverage.get(each.session_id, ("complete", 0))
            try:
                check(each, rows.get(each.session_id, []), result, deleted.get(each.session_id, set()))
            except AssertionError as failure:
                raise AssertionError(f"seed {each.seed}: {failure}") from failure
        before = derived(engines[0])
        list(rebuild(engines[0], TIMING))
        assert derived(engines[0]) == before, f"I10, seeds from {first}"
        for engine in engines:
            engine.dispose()
        cluster.drop(url)


def tombstones(engine: Engine) -> dict[str, set[str]]:
    """The deleted chats by session."""
    values: dict[str, set[str]] = {}
    with transaction(engine) as connection:
        query = "SELECT session_id, chat_id FROM analytics.chats WHERE deleted_at IS NOT NULL"
        for session_id, chat_id in connection.execute(text(query)):
            values.setdefault(session_id, set()).add(chat_id)
    return values


def derived(engine: Engine) -> dict[str, list[Row]]:
    orders = {"sessions": "1", "chats": "1, 2", "messages": "1, 2, 3"}
    with transaction(engine) as connection:
        return {
            table: [
                tuple(row) for row in connection.execute(text(f"SELECT * FROM archiver.{table} ORDER BY {order}"))
            ]
            for table, order in orders.items()
        }
