"""`archiver followups` as commands, and the schemas of the bodies."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from jsonschema import Draft202012Validator
from sqlalchemy import Engine
from standardwebhooks import Webhook
from starlette.responses import Response

from archiver.archive.outbox import TYPES
from archiver.compliance import erasure, seals
from archiver.compliance.erasure import AuditEntry, Target
from tests.support import servers
from tests.support.commands import failed, output_of
from tests.support.erasures import read, record, sweep
from tests.support.erasures import said as lines
from tests.support.feeds import publish
from tests.support.followup_commands import followups, listed
from tests.support.followups import (
    SECRET,
    change,
    let_time_pass,
    receiving,
    retry_by_hand,
    sending,
    states,
    subscribe,
)
from tests.support.payloads import created, deleted
from tests.support.receivers import archiver
from tests.support.rows import execute, rows
from tests.support.servers import as_writer
from tests.support.waiting import until

pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

DOCS = Path(__file__).parents[2] / "docs"


def test_from_add_to_remove(database_url: str, engine: Engine) -> None:
    with receiving() as receiver:
        hook = receiver.url + "/hook?token=t0ken"
        added = followups(
            database_url,
            *("add", hook, "--event", "chat.created", "--event", "session.lost", "--assistant", "a1"),
            *("--variable", "tier=gold", "--contains", "refund", "--ordered", "--concurrency", "2"),
        )
        assert added.returncode == 0, added.stderr
        (secret,) = re.findall(r"whsec_\S+", added.stdout)
        (row,) = listed(database_url, "list")
        assert row["events"] == ["chat.created", "session.lost"]
        assert (row["assistant_id"], row["variable"], row["value"], row["contains"]) == (
            "a1",
            "tier",
            "gold",
            "refund",
        )
        assert (row["is_ordered"], row["concurrency"], row["cursor"]) == (True, 2, 0)
        assert listed(database_url, "show", "1") == row
        receiver.then(Response("thank you", 202))
        tested = followups(database_url, "test", "1")
        assert "returned 202" in output_of(tested)
        assert "thank you" in tested.stdout
        assert Webhook(secret).verify(receiver.got[0].body, receiver.got[0].headers)["type"] == "followups.test"
        check(receiver.got[0].payload)
        receiver.always(418)
        tested = followups(database_url, "test", "1", "--json")
        assert tested.returncode == 1
        assert json.loads(tested.stdout)["status"] == 418
        receiver.then()
        again = listed(database_url, "rotate", "1")
        assert again["secret"] != secret
        assert followups(database_url, "test", "1").returncode == 0
        assert Webhook(secret).verify(receiver.got[-1].body, receiver.got[-1].headers)
        assert Webhook(again["secret"]).verify(receiver.got[-1].body, receiver.got[-1].headers)
        assert followups(database_url, "pause", "1", "--reason", "moving house").returncode == 0
        assert "paused: moving house" in output_of(followups(database_url, "list"))
        assert followups(database_url, "resume", "1").returncode == 0
        printed = "".join(
            followups(database_url, *words).stdout
            for words in (["list"], ["list", "--json"], ["show", "1"], ["show", "1", "--json"], ["deliveries"])
        )
        assert "whsec" not in printed
        assert followups(database_url, "remove", "1", "--yes").returncode == 0
        assert listed(database_url, "list") == []
    acts = rows(engine, "SELECT kind, detail::text FROM archiver.acts ORDER BY id")
    done = ("add", "rotate", "pause", "resume", "remove")
    assert [kind for kind, _ in acts] == [f"followups.{name}" for name in done]
    assert not re.search("whsec|t0ken", str(acts))


def test_deliveries_are_listed_and_retried(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry_by_hand(monkeypatch)
    change(engine, ("chat.created", "s", "c1"), ("chat.created", "s", "c2"))
    with receiving() as receiver:
        subscribe(engine, receiver.url)
        with sending(database_url):
            receiver.always(Response("no [bold]room[/bold]", 500))
            until(lambda: rows(engine, "SELECT count(*) FROM archiver.attempts") == [(2,)], "both failed")
        execute(engine, "UPDATE archiver.deliveries SET state = 'dead', ended_at = now()")
        result = listed(database_url, "deliveries", "--dead")
        assert [(row["status"], row["fault"], row["answer"]) for row in result] == [
            (500, "not_2xx", "no [bold]room[/bold]")
        ] * 2
        shown = output_of(followups(database_url, "deliveries", "--subscription", "1"))
        assert "no [bold]room[/bold]" in shown
        assert listed(database_url, "deliveries", "--pending") == []
        assert "1 scheduled for retry." in output_of(followups(database_url, "retry", result[0]["id"]))
        missing = followups(database_url, "retry", "msg_1_77")
        assert (missing.returncode, "msg_1_77: no such delivery" in missing.stderr) == (1, True)
        assert "1 scheduled for retry." in output_of(followups(database_url, "retry", "--dead", "1"))
        assert len(listed(database_url, "deliveries", "--pending")) == 2
        receiver.then()
        with sending(database_url):
            let_time_pass(engine)
            until(lambda: states(engine) == {"delivered": 2}, "both are delivered")
    late = followups(database_url, "retry", result[0]["id"])
    assert (late.returncode, "already delivered" in late.stderr) == (1, True)
    assert "0 scheduled for retry." in late.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["http://127.0.0.1/", "--event", "chat.created"], "ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE"),
        (["https://localhost/", "--event", "chat.created"], "ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE"),
        (["http://8.8.8.8/", "--event", "chat.created"], "https"),
        (["https://169.254.169.254/", "--event", "chat.created"], "deliveries are never sent there"),
    ],
)
def test_such_receivers_are_refused(words: list[str], reason: str, database_url: str) -> None:
    process = archiver("followups", "add", *words, database_url=as_writer(database_url))
    assert reason in failed(process)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["https://u:hunter2@8.8.8.8/"], "a user name or a password"),
        (["ftp://hunter2.example/"], "https://HOST/PATH"),
        (["https://8.8.8.8:0/hunter2"], "port"),
        (["https://8.8.8.8/hunter2 b"], "%20"),
        (["https://8.8.8.8/hunter2\tb"], "%20"),
        (["https://8.8.8.8/", "--assistant", ""], "--assistant"),
        (["https://8.8.8.8/", "--contains", ""], "--contains"),
        (["https://8.8.8.8/", "--variable", "=gold"], "--variable"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], reason: str, database_url: str) -> None:
    process = followups(database_url, "add", *words, "--event", "chat.created")
    assert (process.returncode, process.stdout) == (2, "")
    assert reason in process.stderr
    assert "hunter2" not in process.stderr


def test_followups_test_names_the_setting_that_refuses(database_url: str, engine: Engine) -> None:
    subscribe(engine, "http://127.0.0.1:9/")
    process = archiver("followups", "test", "1", database_url=as_writer(database_url))
    assert (process.returncode, "refused_address" in process.stdout) == (1, True)
    assert "ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE=true" in process.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["add", "https://8.8.8.8/"],
        ["add", "https://8.8.8.8/", "--event", "chat.exploded"],
        ["add", "https://8.8.8.8/", "--event", "seal.created", "--assistant", "a"],
        ["add", "https://8.8.8.8/", "--event", "chat.erased", "--contains", "a"],
        ["add", "https://8.8.8.8/", "--event", "chat.created", "--variable", "tier"],
        ["add", "https://8.8.8.8/", "--event", "chat.created", "--secret-file", "/dev/null"],
        ["add", "https://8.8.8.8/", "--event", "chat.created", "--secret-file", "/nowhere"],
        ["add", "https://8.8.8.8/", "--event", "chat.created", "--from", "9223372036854775808"],
        ["retry"],
        ["retry", "7"],
        ["retry", "msg_1_1", "--dead", "1"],
        ["deliveries", "--dead", "--pending"],
    ],
)
def test_wrong_usage(words: list[str], database_url: str) -> None:
    process = followups(database_url, *words)
    assert (process.returncode, process.stdout) == (2, "")


@pytest.mark.parametrize(
    "words", ["show", "pause", "resume", "remove --yes", "rotate", "test", "deliveries --subscription"]
)
def test_a_subscription_that_is_not_there(words: str, database_url: str) -> None:
    assert "subscription 9 does not exist" in failed(followups(database_url, *words.split(), "9"))


def test_status_and_doctor_report_follow_ups(database_url: str, engine: Engine) -> None:
    change(engine, ("chat.created", "s", "c1"))
    assert "follow-ups" not in output_of(archiver("doctor", database_url=database_url))
    first = subscribe(engine, "http://127.0.0.1:9")
    status = archiver("status", "--json", database_url=database_url)
    assert json.loads(status.stdout)["followups"]["behind"] == 1
    assert "1 subscriptions, 1 changes behind" in output_of(archiver("status", database_url=database_url))
    execute(engine, "UPDATE archiver.changes SET changed_at = now() - interval '2 hours'")
    assert "is not delivered" in output_of(archiver("doctor", database_url=database_url))
    with sending(database_url):
        until(lambda: rows(engine, "SELECT 1 FROM archiver.attempts"), "it failed")
    execute(engine, "UPDATE archiver.deliveries SET state = 'dead', ended_at = now()")
    listed = output_of(archiver("doctor", database_url=as_writer(database_url)))
    assert "dead deliveries: 1" in listed
    assert f"1 subscriptions are failing: {first} (no_connection)" in listed
    status = archiver("status", database_url=as_writer(database_url))
    assert "1 failing" in output_of(status)
    assert f"failing: {first} (no_connection)" in output_of(status)
    state_query = json.loads(archiver("status", "--json", database_url=database_url).stdout)["followups"]
    (failing,) = state_query["failing_subscriptions"]
    assert (failing["id"], failing["last_fault"]) == (first, "no_connection")
    followups(database_url, "pause", str(first))
    assert "1 subscriptions are paused" in output_of(archiver("doctor", database_url=database_url))
    assert "1 dead; 1 subscriptions, 1 paused" in output_of(archiver("status", database_url=database_url))


def test_a_secret_of_ones_own(database_url: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    with receiving() as receiver:
        added = followups(
            database_url, "add", receiver.url, "--event", "seal.created", "--secret-file", str(path), "--json"
        )
        assert json.loads(added.stdout) == {"id": 1}
        assert followups(database_url, "test", "1").returncode == 0
        Webhook(SECRET).verify(receiver.got[0].body, receiver.got[0].headers)


# The schemas


def check(message: dict[str, Any]) -> None:
    schema = json.loads((DOCS / "schemas" / f"{message['type']}.json").read_text())
    Draft202012Validator.check_schema(schema)
    checker = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    assert [error.message for error in checker.iter_errors(message)] == []


def test_what_is_sent_is_as_the_schemas_say(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), created("c3", None, cost=None, assistantOverrides=None))
    record(engine, created("c1", "s1", updatedAt="2024-01-15T10:00:00Z", input="x" * 300_000), minute=1)
    record(engine, deleted("c2", "s1"), deleted("c9", "s9"), created("c8", "s8"), minute=2)
    read(engine, "s1", 10, *lines("c1", "c4"))
    read(engine, "s9", 10)
    seals.seal(engine)
    publish(engine)
    change(engine, ("session.lost", "s1", None), ("chat.created", "s8", "c8"), ("chat.created", "s7", "c7"))
    change(engine, ("session.settled", "s8", None), ("session.settled", "s7", None), ("chat.erased", "s1", "c1"))
    erasure.order(engine, [Target("s8")], "request", AuditEntry("erase", "anna", "asked"))
    sweep(engine)
    publish(engine)
    with receiving() as receiver:
        subscribe(engine, receiver.url)
        with sending(database_url):
            ((count,),) = rows(engine, "SELECT count(*) FROM archiver.changes")
            until(lambda: states(engine) == {"delivered": count}, "all are told")
    for got in receiver.got:
        check(got.payload)
    assert {got.payload["type"] for got in receiver.got} == set(TYPES)
    assert any("truncated" in got.data for got in receiver.got)
    assert any("erased_at" in got.data for got in receiver.got)
    (erased,) = (got.data for got in receiver.got if got.payload["type"] == "chat.erased")
    assert erased.keys() == {"cursor", "session_id", "chat_id", "erased_at"}  # although s1 still has it
    with pytest.raises(AssertionError):
        check(receiver.got[0].payload | {"data": {}})


# The page


def test_the_receiver_of_the_page_verifies(database_url: str, tmp_path: Path) -> None:
    page = (DOCS / "followups.md").read_text()
    (script,) = re.findall(r"```python\n(# receiver\.py\n.*?)```", page, re.DOTALL)
    path = tmp_path / "receiver.py"
    path.write_text(script.replace("8200", "0"))
    environment = {**os.environ, "FOLLOWUPS_SECRET": SECRET, "PYTHONUNBUFFERED": "1"}
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    with subprocess.Popen([sys.executable, path], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            port = process.stdout.readline().split()[-1]
            url = f"http://127.0.0.1:{port}/"
            followups(database_url, "add", url, "--event", "chat.created", "--secret-file", str(secret))
            assert followups(database_url, "test", "1").returncode == 0
            assert "followups.test" in process.stdout.readline()
            with psycopg.connect(database_url, autocommit=True) as connection:
                connection.execute("UPDATE archiver.subscriptions SET secret = %s", ["whsec_" + "QUJD" * 8])
            assert json.loads(followups(database_url, "test", "1", "--json").stdout)["status"] == 401
        finally:
            process.kill()
