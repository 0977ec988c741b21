"""`archiver serve` with a slow event, and its real limits: events of other sessions do not wait (I4, I12)."""

from sqlalchemy import Engine

from tests.support.long_sessions import fill, webhook
from tests.support.payloads import created
from tests.support.receivers import AS_IN_PRODUCTION, Receiver, serving_with
from tests.support.rows import execute, rows
from tests.support.slowness import slow_rows
from tests.support.waiting import until

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres


def others(receiver: Receiver, first: int, last: int) -> None:
    for number in range(first, last):
        answer = receiver.post(created(f"other-{number}", f"other-session-{number}"))
        assert answer.json()["status"] in {"stored", "spooled"}


def has_others(engine: Engine, count: int) -> bool:
    return rows(engine, "SELECT count(*) FROM archiver.events WHERE chat_id LIKE 'other-%'") == [(count,)]


def test_i4_a_slow_row_delays_its_own_event_alone_and_one_that_is_too_slow_is_quarantined(
    engine: Engine, database_url: str
) -> None:
    action = "PERFORM pg_sleep(CASE WHEN new.session_id = 'endless' THEN 3600 ELSE 8 END)"
    slow_rows(engine, "archiver.messages", "content", "slow", action)
    with serving_with(AS_IN_PRODUCTION, database_url) as receiver:
        others(receiver, 0, 5)
        for number, name in enumerate(("eight", "endless")):
            assert receiver.post(created(name, name, input="slow")).json()["status"] == "spooled"
            others(receiver, 5 + 25 * number, 30 + 25 * number)
        until(lambda: has_others(engine, 55), "all others are archived")
        others(receiver, 55, 80)
        until(lambda: has_others(engine, 80), "and those that come later")
        reasons = "SELECT reason FROM archiver.quarantine"
        assert (
            rows(engine, reasons) == []
        )  # while the one that never ends is written: it has two attempts of 30 seconds
        assert receiver.get("/readyz").status_code == 200
        eight = "SELECT 1 FROM archiver.events WHERE chat_id = 'eight'"
        until(lambda: rows(engine, eight), "what takes 8 seconds is archived, too")
        until(lambda: rows(engine, reasons) == [("too_slow",)], "what never ends is quarantined")
        assert receiver.metric('archiver_slow_events_total{status="quarantined"}') == 1
        until(lambda: receiver.metric("archiver_spool_events") == 0, "and nothing is left on the spool")


def test_i4_events_of_a_long_conversation_delay_no_other(engine: Engine, database_url: str) -> None:
    fill(engine, 450)
    execute(engine, "UPDATE archiver.sessions SET append_after = NULL")  # every event is aligned with all of it
    with serving_with(AS_IN_PRODUCTION, database_url) as receiver:
        for number in range(20):
            late = webhook(20 * number, input=f"another question {number}")
            assert receiver.post(late.body).json()["status"] in {"stored", "spooled"}
            others(receiver, 5 * number, 5 * number + 5)
        until(lambda: has_others(engine, 100), "all others are archived")
        until(lambda: receiver.metric("archiver_spool_events") == 0, "and all of the conversation")
        assert receiver.metric('archiver_slow_events_total{status="quarantined"}') == 0
    counted = "SELECT count(*) FROM archiver.events WHERE session_id = 'session-1' AND type = 'chat.created'"
    assert rows(engine, counted) == [(470,)]
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(0,)]
