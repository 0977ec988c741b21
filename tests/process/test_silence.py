"""Webhooks that stop arriving, and the folders of metrics that several processes share."""

import json
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine

from archiver import events, ledger
from archiver.database import transaction
from archiver.events import Delivery, responses
from archiver.operations import overview
from tests.support.payloads import created, deleted
from tests.support.receivers import archiver, serving

NOW = datetime.now(UTC) - timedelta(hours=3)


def webhook(engine: Engine, body: bytes, minute: int) -> None:
    event = events.parse(body)
    assert isinstance(event, events.Event)
    observation = Delivery(event, NOW + timedelta(minutes=minute), "key")
    with transaction(engine) as connection:
        ledger.record(connection, [observation])


def register(engine: Engine, session_id: str, minute: int) -> None:
    fact = responses.register({"id": session_id})
    at = NOW + timedelta(minutes=minute)
    with transaction(engine) as connection:
        ledger.record(connection, [Delivery(fact, at, None, responses.APPLICATION)])


def read(engine: Engine, session_id: str, minute: int, *chat_ids: str) -> None:
    lines = (
        [("user", f"question of {each}") for each in chat_ids],
        [("assistant", f"answer to {each}") for each in chat_ids],
    )
    result = [{"role": role, "content": content} for pair in zip(*lines, strict=True) for role, content in pair]
    body = json.dumps({"session": {"id": session_id, "messages": result}}).encode()
    fact = responses.parse_history(session_id, 200, body)
    with transaction(engine) as connection:
        at = NOW + timedelta(minutes=minute)
        ledger.record(connection, [Delivery(fact, at, None, responses.SOURCE)])


def silence(engine: Engine) -> overview.Silence:
    with transaction(engine) as connection:
        return overview.select_silence(connection)


def finding_on(database_url: str) -> dict[str, str]:
    """Return the finding of `archiver doctor` on webhooks."""
    output = json.loads(archiver("doctor", "--json", database_url=database_url).stdout)
    (finding,) = [each for each in output if each["check"] == "webhooks"]
    return {name: str(value) for name, value in finding.items()}


def test_webhooks_that_have_stopped_are_reported_with_since_when(engine: Engine, database_url: str) -> None:
    webhook(engine, created("c1", "s1"), 0)
    read(engine, "s1", 5, "c1")
    assert not silence(engine).is_certain
    read(engine, "s1", 30, "c1", "c2", "c3", "c4")  # none of which was there when it was read before
    result = silence(engine)
    assert (result.since, result.turns, result.sessions) == (NOW, 3, 1)
    assert result.is_certain
    doctor = " ".join(archiver("doctor", database_url=database_url).stdout.split())
    assert f"No webhook of a turn has arrived since {NOW:%Y-%m-%d %H:%M:%S} UTC" in doctor
    assert "no webhook of a turn since" in " ".join(archiver("status", database_url=database_url).stdout.split())
    webhook(engine, created("c5", "s1"), 40)
    assert not silence(engine).is_certain


def test_sessions_that_began_since_count_too(engine: Engine) -> None:
    webhook(engine, created("c1", "s1"), 0)
    for number in range(2, 5):
        register(engine, f"s{number}", 10)
        read(engine, f"s{number}", 20, f"c{number}")
    assert (silence(engine).turns, silence(engine).sessions) == (3, 3)


def test_a_quiet_night_after_lost_webhooks_is_no_silence(engine: Engine) -> None:
    webhook(engine, created("c1", "s1"), 0)
    read(engine, "s1", 10, "c1", "c2", "c3", "c4", "c5")  # the first reading: they may be older than the webhook
    read(engine, "s1", 60, "c1", "c2", "c3", "c4", "c5")
    assert silence(engine).turns == 0


def test_a_platform_that_only_sends_deletions_is_not_silent(engine: Engine) -> None:
    webhook(engine, deleted("c0", "s0"), 0)
    register(engine, "s1", 1)
    read(engine, "s1", 5, "c1")
    read(engine, "s1", 30, "c1", "c2", "c3", "c4", "c5")
    assert silence(engine).since is None
    assert not silence(engine).is_certain


def test_an_empty_archive_is_not_silent(engine: Engine) -> None:
    assert silence(engine) == overview.Silence(None, 0, 0)


def test_an_archive_that_never_had_a_webhook_is_reported_with_its_turns(engine: Engine, database_url: str) -> None:
    register(engine, "s1", 0)
    assert finding_on(database_url)["verdict"] == "warning"
    read(engine, "s1", 5, "c1", "c2")
    assert finding_on(database_url)["verdict"] == "warning"
    read(engine, "s1", 30, "c1", "c2", "c3", "c4")
    result = silence(engine)
    assert (result.since, result.turns, result.sessions) == (None, 4, 1)
    assert result.read_since == NOW + timedelta(minutes=5)
    assert result.is_certain
    finding = finding_on(database_url)
    assert finding["verdict"] == "failure"
    assert finding["detail"] == (
        "No webhook has been stored yet, although histories have shown 4 turns of 1 sessions since"
        f" {result.read_since:%Y-%m-%d %H:%M:%S} UTC."
    )
    line = " ".join(archiver("status", database_url=database_url).stdout.split())
    assert f"no webhook stored yet, but 4 turns since {result.read_since:%Y-%m-%d %H:%M:%S} UTC" in line
    webhook(engine, created("c5", "s1"), 40)
    assert not silence(engine).is_certain
    assert finding_on(database_url)["verdict"] == "ok"


def test_refused_deliveries_are_no_arrival(engine: Engine, database_url: str) -> None:
    with serving(database_url) as receiver:
        assert receiver.post(created("c1", "s1"), {"x-webhook-secret": "wrong"}).status_code == 401
    assert silence(engine) == overview.Silence(None, 0, 0)
    finding = finding_on(database_url)
    assert (finding["verdict"], finding["detail"]) == ("warning", "No webhook has been stored yet.")
    assert "archiver_received_total" in finding["advice"]
    assert "no webhook stored yet" in " ".join(archiver("status", database_url=database_url).stdout.split())


def test_what_killed_processes_left_of_their_metrics_goes_at_the_next_start_and_nothing_else(
    database_url: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o711)
    folder = home / "metrics"
    options = ("--workers", "2")
    with serving(database_url, *options, ARCHIVER_HOME=str(home)) as first:
        (of_first,) = folder.iterdir()
        first.signal(signal.SIGKILL)
        first.wait()
    with serving(database_url, *options, ARCHIVER_HOME=str(home)) as second:
        (of_second,) = folder.iterdir()
        assert of_second != of_first
        with serving(database_url, *options, ARCHIVER_HOME=str(home)) as third:
            assert len([*folder.iterdir()]) == 2
            assert third.stop() == 0
        assert [*folder.iterdir()] == [of_second]
        assert second.metric("archiver_queue_events") == 0
