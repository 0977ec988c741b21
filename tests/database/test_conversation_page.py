"""What the page of a conversation shows beside its messages: revisions, readings, holds, erasures, follow-ups."""

from sqlalchemy import Engine

from archiver.compliance.erasure import Target
from archiver.console.conversations import Conversation, select_conversation
from archiver.database import transaction
from tests.support.erasures import erase, hold, read, record, said
from tests.support.followups import change, subscribe
from tests.support.payloads import created
from tests.support.rows import execute

ON_ONE_VERSION = True


def page(engine: Engine) -> Conversation:
    with transaction(engine) as connection:
        found = select_conversation(connection, "session-1")
    assert found is not None
    return found


def test_a_revision_shows_the_words_and_fields_that_it_changed(engine: Engine) -> None:
    record(engine, created("chat-1", output="The answer is five.", cost=0.1))
    record(engine, created("chat-2"), minute=1)
    record(engine, created("chat-1", at=1_705_311_600_000, output="The answer is six.", cost=0.2), minute=2)
    (revision,) = page(engine).revisions
    assert revision.chat_id == "chat-1"
    marked = [(part.kind, part.text) for part in revision.parts if part.kind != "same"]
    assert marked == [("removed", "five"), ("added", "six")]
    assert revision.fields == [("cost", "0.1", "0.2")]


def test_each_reading_shows_how_many_messages_it_added_and_no_longer_shows(engine: Engine) -> None:
    record(engine, created("chat-1"))
    read(engine, "session-1", 1, *said("chat-1"))
    read(engine, "session-1", 2, *said("chat-1", "chat-2"))
    read(engine, "session-1", 3, *said("chat-2"))
    changes = [(each.messages, each.added, each.removed) for each in page(engine).readings]
    assert changes == [(2, 2, 0), (4, 2, 0), (2, 0, 2)]


def test_i12_a_reading_that_is_too_large_is_not_compared(engine: Engine) -> None:
    record(engine, created("chat-1"))
    read(engine, "session-1", 1, ("user", "x" * 300_000))
    assert [each.is_compared for each in page(engine).readings] == [False]


def test_i8_holds_erasures_and_follow_ups_are_beside_the_messages(engine: Engine) -> None:
    record(engine, created("chat-1"), created("chat-2"))
    erase(engine, Target("session-1", "chat-2"))
    hold_id = hold(engine, session_id="session-1")
    change(engine, ("chat.created", "session-1", "chat-1"))
    subscription_id = subscribe(engine, "http://127.0.0.1:9/")
    execute(
        engine,
        "INSERT INTO archiver.deliveries (subscription_id, cursor, type, session_id, chat_id, changed_at, created_at,"
        f" last_attempt, due_at) VALUES ({subscription_id}, 1, 'chat.created', 'session-1', 'chat-1', now(), now(),"
        " 14, now())",
    )
    related = page(engine).related
    assert related.holds == [hold_id]
    assert [(each["chat_id"], each["rule"]) for each in related.erasures] == [("chat-2", "request")]
    assert [each["type"] for each in related.followups] == ["chat.created"]
