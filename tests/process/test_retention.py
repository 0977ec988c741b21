"""Expiry by rule: deleted turns, old content, and in the end the remaining metadata."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from archiver import settings
from archiver.compliance.erasure import Target, release_hold
from archiver.compliance.erasure.deleted import order_deleted
from archiver.compliance.erasure.retention import Rules, preview
from archiver.database import transaction
from archiver.settings import Settings
from tests.support import servers
from tests.support.erasures import (
    archive,
    as_writer,
    erase,
    hold,
    holds_text,
    is_rebuilt_the_same,
    read,
    record,
    said,
    sweep,
    texts,
)
from tests.support.payloads import created, deleted
from tests.support.receivers import archiver, serving
from tests.support.retention import LATER, run
from tests.support.rows import execute, rows
from tests.support.waiting import until

on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)
DAY = 24 * 60
NEVER = datetime(2000, 1, 1, tzinfo=UTC)
FOREVER = datetime(2100, 1, 1, tzinfo=UTC)


def seal(engine: Engine) -> None:
    """As if all that there is had been sealed."""
    execute(
        engine,
        "INSERT INTO archiver.seals SELECT coalesce(max(s.id), 0) + 1, now(), (SELECT max(id) FROM archiver.events),"
        " 0, 0, 0, 0, '', '', '', '' FROM archiver.seals s",
        unguarded=True,
    )


def test_i8_deleted_turns_are_erased_after_their_grace_unless_held(engine: Engine) -> None:
    record(engine, *(created(f"c{number}", "s1") for number in range(4)), created("h", "held"), created("x", None))
    read(engine, "s1", 5, *said("c0", "c1", "c2", "c3"))
    at = int(datetime(2026, 1, 5, tzinfo=UTC).timestamp() * 1000)
    for number, chat_id in enumerate(["c0", "c1", "c2"]):
        record(engine, deleted(chat_id, "s1", at=at + number * 3_600_000), minute=240)
    record(engine, deleted("h", "held", at=at), deleted("x", None, at=at), minute=240)
    hold(engine, session_id="held")
    list(order_deleted(engine, NEVER))
    assert rows(engine, "SELECT count(*) FROM archiver.erasures") == [(0,)]
    for ordered in order_deleted(engine, datetime(2026, 1, 5, 1, 30, tzinfo=UTC)):
        assert ordered.held == {Target("held", "h"): [1]}
    sweep(engine)
    asked = [f"question of {each}" for each in ("c0", "c1", "c2", "c3", "h", "x")]
    assert holds_text(engine, *asked) == [f"question of {each}" for each in ("c2", "c3", "h")]
    result = "SELECT chat_id, erased_at IS NOT NULL FROM analytics.chats WHERE deleted_at IS NOT NULL ORDER BY 1"
    assert rows(engine, result) == [
        ("c0", True), ("c1", True), ("c2", False), ("h", False), ("x", True),
    ]  # fmt: skip
    assert {rule for (rule,) in rows(engine, "SELECT rule FROM archiver.erasures")} == {"chat.deleted"}
    # Nothing new: nothing is done, and no act says so.
    before = rows(engine, "SELECT count(*) FROM archiver.acts")
    list(order_deleted(engine, datetime(2026, 1, 5, 1, 30, tzinfo=UTC)))
    assert rows(engine, "SELECT count(*) FROM archiver.acts") == before
    with transaction(engine) as connection:
        release_hold(connection, 1, "judge", "closed")
    list(order_deleted(engine, FOREVER))
    sweep(engine)
    assert holds_text(engine, *asked) == ["question of c3"]
    assert is_rebuilt_the_same(engine)


def test_a_page_of_held_turns_keeps_none_behind_it_from_being_erased(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archiver.compliance.erasure.deleted.PAGE", 2)
    for number in range(5):
        record(engine, created(f"c{number}", f"s{number}"), deleted(f"c{number}", f"s{number}"))
        if number < 3:
            hold(engine, session_id=f"s{number}")
    list(order_deleted(engine, FOREVER))
    assert [session_id for (session_id,) in rows(engine, "SELECT session_id FROM archiver.erasures ORDER BY 1")] == [
        "s3",
        "s4",
    ]


def test_content_expires_by_assistant_and_holds_stop_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archiver.compliance.erasure.retention.PAGE", 2)
    for session_id, assistants in {
        "any": ["a0"], "short": ["a1"], "long": ["a2"], "ever": ["a3"], "both": ["a1", "a2"], "held": ["a1"],
    }.items():  # fmt: skip
        for number, assistant_id in enumerate(assistants):
            record(engine, created(f"{session_id}-{number}", session_id, assistantId=assistant_id))
    record(engine, created("new", "new"), minute=35 * DAY)
    record(engine, created("homeless", None, assistantId="a1"), b'{"broken')
    hold(engine, session_id="held")
    rules = Rules(30, {"a1": 10, "a2": 60, "a3": 0}, 0)
    before = archive(engine), rows(engine, "SELECT count(*) FROM archiver.acts")
    due = preview(engine, rules, LATER)
    assert (dict(due.content), due.held, due.quarantined) == ({"a0": 1, "a1": 2}, 1, 0)
    assert (archive(engine), rows(engine, "SELECT count(*) FROM archiver.acts")) == before
    assert run(engine, rules) == due
    erased = {tuple(row) for row in rows(engine, "SELECT session_id, chat_id FROM archiver.erasures")}
    assert erased == {("any", ""), ("short", ""), ("", "homeless")}
    assert texts(engine, "short") == texts(engine, "") == []
    assert texts(engine, "both") != []
    ((kind, detail),) = rows(engine, "SELECT kind, detail FROM archiver.acts WHERE kind <> 'hold.add'")
    assert (kind, detail["content"], detail["rules"]["by_assistant"]) == (
        "retention",
        {"a0": 1, "a1": 2},
        {"a1": 10, "a2": 60, "a3": 0},
    )
    assert run(engine, rules).is_empty
    assert record(engine, created("short-0", "short", assistantId="a1"))[0].reason == "erased"
    assert is_rebuilt_the_same(engine)


def test_the_quarantine_expires_once_no_content_is_kept_longer_and_nothing_is_held(engine: Engine) -> None:
    record(engine, b'{"old')
    record(engine, b'{"new', minute=35 * DAY)
    hold_id = hold(engine, session_id="held")
    assert run(engine, Rules(30, {}, 0)).quarantined == 0
    with transaction(engine) as connection:
        release_hold(connection, hold_id, "judge", "closed")
    assert run(engine, Rules(30, {"a": 0}, 0)).quarantined == 0
    assert run(engine, Rules(30, {}, 0)).quarantined == 1
    assert rows(engine, "SELECT body FROM archiver.quarantine") == [(b'{"new',)]


def test_what_is_left_goes_once_it_is_sealed_and_does_not_come_back(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"), created("c1", None), created("x", None))
    read(engine, "s1", 5, *said("c1"))
    record(engine, created("late", "s3"), minute=35 * DAY)
    rules = Rules(10, {}, 30)
    run(engine, rules)
    assert rows(engine, "SELECT count(*) FROM archiver.sessions WHERE session_id <> ''") == [(3,)]
    assert run(engine, rules).is_empty  # nothing of it is sealed
    erase(engine, Target("s3"))
    seal(engine)
    hold(engine, session_id="s2")
    due = run(engine, rules)
    assert (due.metadata.total(), due.held) == (3, 1)
    hold_free = "SELECT session_id FROM archiver.sessions WHERE session_id <> '' ORDER BY 1"
    assert rows(engine, hold_free) == [("s2",), ("s3",)]  # the one is held, the other too new
    assert rows(engine, "SELECT count(*) FROM archiver.events WHERE session_id IN ('', 's1')") == [(0,)]
    assert rows(engine, "SELECT count(*) FROM archiver.chats WHERE session_id IN ('', 's1')") == [(0,)]
    assert rows(engine, "SELECT count(*) FROM archiver.removals") == [(4,)]
    assert is_rebuilt_the_same(engine)
    for session_id in ("s1", None):
        assert record(engine, created("c1", session_id))[0].reason == "erased"
    assert rows(engine, "SELECT count(*) FROM archiver.events WHERE session_id IN ('', 's1')") == [(0,)]
    assert run(engine, rules).is_empty


def test_who_writes_the_archive_may_let_it_expire(engine: Engine, database_url: str) -> None:
    record(engine, created("c1", "s1"), created("c2", None), b"{")
    with as_writer(database_url) as writer:
        run(writer, Rules(10, {}, 30))
        seal(engine)
        assert run(writer, Rules(10, {}, 30)).metadata.total() == 2
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(0,)]


def test_a_ledger_row_that_no_rule_removed_stays(engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    with pytest.raises(SQLAlchemyError, match="append-only"):
        execute(engine, "DELETE FROM archiver.events")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ARCHIVER_RETENTION_BY_ASSISTANT": "as_1"}, "ASSISTANT=DAYS"),
        ({"ARCHIVER_RETENTION_BY_ASSISTANT": "as_1=-1"}, "ASSISTANT=DAYS"),
        ({"ARCHIVER_RETENTION_METADATA_DAYS": "10"}, "ARCHIVER_RETENTION_METADATA_DAYS"),
        ({"ARCHIVER_RETENTION_DAYS": "20", "ARCHIVER_RETENTION_METADATA_DAYS": "10"}, "METADATA_DAYS"),
        (
            {
                "ARCHIVER_RETENTION_DAYS": "2",
                "ARCHIVER_RETENTION_BY_ASSISTANT": "a=20",
                "ARCHIVER_RETENTION_METADATA_DAYS": "10",
            },
            "METADATA_DAYS",
        ),
        ({"ARCHIVER_ON_DELETE": "forget"}, "ARCHIVER_ON_DELETE"),
    ],
)
def test_wrong_rules_are_reported(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], says: str) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(settings.SettingsError, match=says):
        settings.read()


def test_rules_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIVER_RETENTION_BY_ASSISTANT", "as_1 = 30, as=2=0,")
    read_settings: Settings = settings.read()
    assert read_settings.retention_of_assistants == {"as_1": 30, "as=2": 0}


@on_one_version
def test_the_command_shows_asks_and_expires(database_url: str, engine: Engine) -> None:
    def retention(*options: str, **environment: str) -> Any:
        return archiver("retention", *options, database_url=database_url, **environment)

    record(engine, created("c1", "s1"))
    execute(engine, "UPDATE archiver.sessions SET last_event_at = now() - interval '50 days' WHERE session_id = 's1'")
    unset = retention("--yes").stderr
    assert "ARCHIVER_RETENTION_DAYS" in unset
    assert "not that of `serve`" in unset
    data = retention("--dry-run", "--json", ARCHIVER_RETENTION_DAYS="30")
    assert json.loads(data.stdout)["content"] == {"assistant-1": 1}
    assert retention(ARCHIVER_RETENTION_DAYS="30").returncode == 1
    assert holds_text(engine, "question of c1") == ["question of c1"]
    done = retention("--yes", ARCHIVER_RETENTION_DAYS="30")
    assert (done.returncode, "assistant-1" in done.stdout) == (0, True)
    assert holds_text(engine, "question of c1") == []


@on_one_version
def test_i8_a_worker_erases_what_is_deleted_and_what_was_left_half_way(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    execute(
        engine,
        "INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)"
        " VALUES ('s1', '', now(), 'request', 1)",
    )
    with serving(database_url, "--worker", ARCHIVER_ON_DELETE="erase") as receiver:
        assert receiver.post(created("c2", "s2")).status_code == 200
        assert receiver.post(deleted("c2", "s2")).status_code == 200
        removed = "question of c1", "question of c2"
        until(lambda: not holds_text(engine, *removed), "the worker has erased it")
        assert receiver.stop() == 0
    parts = {
        row[0]: row[1]
        for row in rows(engine, "SELECT detail ->> 'part', detail FROM archiver.acts WHERE kind = 'settings.changed'")
    }
    assert parts.keys() == {"serve", "worker"}
    assert parts["serve"]["on_delete"] == "erase"
    assert len(parts["serve"]["key_ids"]) == 1


@on_one_version
def test_settings_that_matter_are_recorded_when_they_change(database_url: str, engine: Engine) -> None:
    for days in ("0", "0", "7"):
        with serving(database_url, "--no-worker", ARCHIVER_RETENTION_DAYS=days) as receiver:
            assert receiver.stop() == 0
    rows_found = rows(engine, "SELECT detail FROM archiver.acts ORDER BY id")
    assert [detail["retention_days"] for (detail,) in rows_found] == [0, 7]
    assert "a-secret-for-tests" not in json.dumps([detail for (detail,) in rows_found])
