"""`fold` as a function of a set of facts: order, repetition and what may never be lost (I3, I5). Pure."""

import hashlib
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archiver import events
from archiver.archive import Fact, fold
from archiver.events import Chat, Event, Message

START = datetime(2024, 1, 15, tzinfo=UTC)

_many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Few moments, so that ties are common.
_times = st.integers(0, 4).map(lambda minutes: START + timedelta(minutes=minutes))
_maybe_time = st.none() | _times
_outputs = st.sampled_from(
    [
        (),
        (Message("assistant", ""),),
        (Message("assistant", " \n"),),
        (Message("assistant", "one"),),
        (Message("assistant", "two"), Message("tool", "")),
        (Message("assistant", "three"),),
    ]
)
_chats = st.builds(
    Chat,
    assistant_id=st.sampled_from([None, "a", "b"]),
    external_id=st.sampled_from([None, "x"]),
    status=st.sampled_from([None, "open", "completed"]),
    cost=st.sampled_from([None, Decimal(0), Decimal("0.5"), Decimal(2)]),
    variables=st.sampled_from([None, {"tier": 1}, {"tier": 2}]),
    input=st.sampled_from([(), (Message("user", "hello"),), (Message("user", "hello?"),)]),
    output=_outputs,
    created_at=_maybe_time,
    updated_at=_maybe_time,
    session_name=st.sampled_from([None, "one", "other"]),
    session_status=st.none(),
)


@st.composite
def facts(draw: st.DrawFn) -> Fact:
    """One ledger row about one chat; equal content has equal keys."""
    event_type = draw(st.sampled_from([events.CREATED, events.CREATED, events.DELETED]))
    chat = draw(_chats)
    return Fact(
        event=Event(
            type=event_type,
            body=b"",
            dedupe_key=hashlib.sha256(msgspec.json.encode([event_type, chat], order="deterministic")).digest(),
            session_id="s",
            chat_id="c",
            chat=chat,
            occurred_at=None,
        ),
        source=draw(st.sampled_from(["webhook", "history"])),
        received_at=draw(_times),
        occurred_at=draw(_maybe_time),
    )


def _is_a_ledger(given_facts: Sequence[Fact]) -> bool:
    """The ledger holds a fact of a session once."""
    return len({fact.event.dedupe_key for fact in given_facts}) == len(given_facts)


ledgers = st.lists(facts(), min_size=1, max_size=6).filter(_is_a_ledger)


def chats_of(given_facts: Sequence[Fact]) -> list[Chat]:
    return [fact.event.chat for fact in given_facts if fact.event.chat is not None]


def is_filled(output: Sequence[Message]) -> bool:
    return any(message.content.strip() for message in output)


@_many
@given(ledgers, st.randoms(use_true_random=False))
def test_i5_the_order_of_the_facts_does_not_matter(known: list[Fact], order: random.Random) -> None:
    shuffled = list(known)
    order.shuffle(shuffled)
    assert fold(shuffled) == fold(known)


@_many
@given(ledgers, st.randoms(use_true_random=False))
def test_i3_repeated_facts_change_nothing(known: list[Fact], order: random.Random) -> None:
    repeated = known + [order.choice(known) for _ in range(4)]
    order.shuffle(repeated)
    assert fold(repeated) == fold(known)


@_many
@given(ledgers)
def test_i3_an_empty_output_never_replaces_a_filled_one(known: list[Fact]) -> None:
    outputs = [chat.output for chat in chats_of(known)]
    messages = fold(known).messages
    if any(map(is_filled, outputs)):
        assert any(is_filled(output) and messages[-len(output) :] == output for output in outputs)


@_many
@given(ledgers, facts())
def test_i3_a_newer_fact_replaces_only_the_fields_that_it_holds(known: list[Fact], newer: Fact) -> None:
    chat = newer.event.chat
    assert chat is not None
    later = START + timedelta(minutes=5)  # all others are of the four minutes before
    chat = msgspec.structs.replace(chat, updated_at=later)
    newer = msgspec.structs.replace(newer, event=msgspec.structs.replace(newer.event, chat=chat))
    before, after = fold(known), fold([*known, newer])
    for name in ("assistant_id", "external_id", "status", "cost", "variables"):
        result = getattr(chat, name)
        assert getattr(after, name) == (getattr(before, name) if result is None else result)
    assert after.updated_at == later
    if is_filled(chat.output):
        assert after.messages[-len(chat.output) :] == chat.output
    if chat.input:
        assert after.messages[: len(chat.input)] == chat.input


@_many
@given(ledgers, facts())
def test_i5_a_deletion_is_never_undone(known: list[Fact], another: Fact) -> None:
    before, after = fold(known).deleted_at, fold([*known, another]).deleted_at
    assert (before is not None) == any(fact.event.type == events.DELETED for fact in known)
    if before is not None:
        assert after is not None
        assert after <= before


@_many
@given(ledgers, facts())
def test_i5_creation_is_the_earliest_and_update_the_latest_reported_time(known: list[Fact], another: Fact) -> None:
    turn = fold([*known, another])
    created = [chat.created_at for chat in chats_of([*known, another]) if chat.created_at]
    updated = [chat.updated_at for chat in chats_of([*known, another]) if chat.updated_at]
    occurred = [fact.occurred_at for fact in [*known, another] if fact.occurred_at]
    assert turn.created_at == min(created, default=None)
    assert turn.updated_at == max(updated, default=None)
    assert turn.occurred_at == min(occurred, default=None)
    assert turn.first_received_at == min(fact.received_at for fact in [*known, another])


@_many
@given(ledgers)
def test_a_turn_holds_only_content_of_its_facts(known: list[Fact]) -> None:
    turn, chats = fold(known), chats_of(known)
    assert turn.cost in {chat.cost for chat in chats}
    assert turn.assistant_id in {chat.assistant_id for chat in chats}
    assert turn.messages in {texts.input + answered.output for texts in chats for answered in chats}


def fact(minutes: int, event_type: str = events.CREATED, **told: Any) -> Fact:
    untold: dict[str, Any] = dict.fromkeys(Chat.__struct_fields__) | {"input": (), "output": ()}
    chat = Chat(**(untold | told))
    key = hashlib.sha256(msgspec.json.encode([event_type, chat], order="deterministic")).digest()
    event = Event(event_type, b"", key, "s", "c", chat, None)
    return Fact(event, "webhook", START, START + timedelta(minutes=minutes))


def test_the_time_of_update_outweighs_the_time_of_the_envelope() -> None:
    told_late = fact(9, status="old", updated_at=START)
    told_early = fact(1, status="new", updated_at=START + timedelta(minutes=1))
    assert fold([told_late, told_early]).status == "new"


def test_an_update_without_a_time_is_ordered_by_its_envelope() -> None:
    assert fold([fact(2, status="new"), fact(1, status="old")]).status == "new"


def test_a_deletion_that_carries_only_the_id_takes_nothing_away() -> None:
    created = fact(1, status="completed", cost=Decimal(1), input=(Message("user", "q"),))
    turn = fold([fact(2, events.DELETED), created])
    times = {"deleted_at": START + timedelta(minutes=2), "vanished_at": START}
    assert turn == msgspec.structs.replace(fold([created]), **times)


@pytest.mark.parametrize("cost", [Decimal(0), Decimal(-1)])
def test_a_cost_of_nothing_is_a_cost(cost: Decimal) -> None:
    assert fold([fact(1, cost=Decimal(5)), fact(2, cost=cost)]).cost == cost
