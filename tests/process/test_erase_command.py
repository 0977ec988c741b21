"""`archiver erase`, `hold` and `audit` as commands, against real receivers, files and kills (I8)."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from archiver import events, telemetry
from archiver.compliance.erasure import requests
from archiver.database import transaction
from archiver.ledger import quarantine
from tests.conftest import Cluster
from tests.support import servers
from tests.support.erasures import (
    TIMING,
    archive,
    dump,
    holds_text,
    is_rebuilt_the_same,
    read,
    record,
    said,
    sweep,
    texts,
)
from tests.support.files import in_files
from tests.support.payloads import chat, created, deleted, event
from tests.support.proxies import proxied
from tests.support.receivers import archiver, serving
from tests.support.rows import execute, rows
from tests.support.upstreams import simulated
from tests.support.waiting import until

on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)


def erase(url: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return archiver("erase", *options, "--reason", "she asked", "--yes", database_url=url, **environment)


def acts(engine: Engine, kind: str) -> list[Any]:
    return rows(engine, f"SELECT actor, reason, detail FROM archiver.acts WHERE kind = '{kind}' ORDER BY id")


MARKERS = [
    f"marker-{name}-7f3a"
    for name in (
        "input",
        "output",
        "variable",
        "name",
        "history",
        "quarantine",
        "spool",
        "status",
        "extra",
        "greeting",
    )
]


@pytest.mark.usefixtures("cluster")
def test_i8_ten_markers_are_found_nowhere_after_an_erasure(
    cluster: Cluster, database_url: str, engine: Engine, tmp_path: Path
) -> None:
    (
        at_input,
        at_output,
        at_variable,
        at_name,
        at_history,
        at_quarantine,
        at_spool,
        at_status,
        at_extra,
        at_greeting,
    ) = MARKERS
    home = tmp_path / "home"
    with proxied(database_url) as (proxy, through), serving(through, ARCHIVER_HOME=str(home)) as receiver:
        result = chat(
            "c1",
            "s1",
            input=at_input,
            output=at_output,
            status=at_status,
            somethingElse=at_extra,
            session={"id": "s1", "name": at_name},
            assistantOverrides={"variableValues": {"customer": at_variable}},
        )
        assert receiver.post(event("chat.created", 1_705_311_000_000, result)).json()["status"] == "stored"
        assert receiver.post(b'{"sessionId": "s1", "said": "%s"' % at_quarantine.encode()).status_code == 422
        read(engine, "s1", 5, ("assistant", at_greeting), ("user", at_input), ("assistant", at_history))
        # What is on the spool while it is erased.
        proxy.set("cut")
        spooled = created("c2", "s1", input=at_spool)
        assert receiver.post(spooled).json() == {"status": "spooled"}
        execute(engine, "ANALYZE")
        before = searched(cluster, engine, home) | in_files(MARKERS, receiver.log)
        assert before == set(MARKERS)
        done = erase(database_url, "--session", "s1", "--json", ARCHIVER_HOME=str(home))
        assert done.returncode == 0, done.stderr
        assert "1 delivery waits in the spool" in done.stderr
        assert {"sessions": 1, "quarantined": 1, "events": 2}.items() <= json.loads(done.stdout).items()
        proxy.set("pass")
        until(lambda: receiver.metric("archiver_refused_erased_total") == 1, "the spool is drained")
        until(lambda: receiver.metric("archiver_spool_events") == 0, "the spool is empty")
        # And what is sent once more.
        ledger = rows(engine, "SELECT t::text FROM archiver.events t")
        for body in (event("chat.created", 1_705_311_000_000, result), spooled):
            assert receiver.post(body).json() == {"status": "ignored", "reason": "erased"}
        assert rows(engine, "SELECT t::text FROM archiver.events t") == ledger
        assert holds_text(engine, *MARKERS) == []

        def left() -> set[str]:
            """A row stays while a transaction that began before the erasure is open, such as one of autovacuum."""
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("VACUUM (FULL, ANALYZE)"))
                connection.execute(text("CHECKPOINT"))
            return searched(cluster, engine, home) | in_files(MARKERS, receiver.log)

        until(lambda: left() == set(), "none is left in any file")
        assert receiver.stop() == 0
        assert searched(cluster, engine, home) | in_files(MARKERS, receiver.log) == set()
    assert is_rebuilt_the_same(engine)


def searched(cluster: Cluster, engine: Engine, home: Path) -> set[str]:
    """Which markers are in a dump, in the files of this database, or in those of the spool."""
    with transaction(engine) as connection:
        folder = Path(str(connection.scalar(text("SHOW data_directory"))))
        connection.execute(text("SELECT 1"))
    files = [each for each in folder.rglob("*") if each.is_file() and "pg_wal" not in each.parts]
    assert len(files) > 100, cluster.version
    return set(holds_text(engine, *MARKERS)) | in_files(MARKERS, *files, *home.rglob("*"))


@on_one_version
def test_i8_killed_between_order_and_erasure_it_goes_on_with_the_same_command(
    database_url: str, engine: Engine
) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"))
    with engine.connect() as locking:
        # Whoever takes the content away waits for this.
        locking.execute(text("SELECT FROM archiver.events WHERE session_id = 's1' FOR UPDATE"))
        command = [sys.executable, "-m", "archiver", "erase", "--session", "s1", "--reason", "x", "--yes"]
        process = subprocess.Popen(command, env=os.environ | {"DATABASE_URL": database_url})
        until(lambda: rows(engine, "SELECT FROM archiver.erasures"), "it is ordered")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert holds_text(engine, "question of c1") == ["question of c1"]
    assert record(engine, created("c9", "s1"))[0].reason == "erased"
    again = erase(database_url, "--session", "s1")
    assert again.returncode == 0, again.stderr
    assert holds_text(engine, "question of c1", "question of c2") == ["question of c2"]
    assert is_rebuilt_the_same(engine)


@on_one_version
def test_it_asks_first_and_a_dry_run_writes_nothing(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"), created("c3", "s3"), b'{"sessionId": "s1" broken')
    before = archive(engine)
    data = archiver("erase", "--session", "s1", "--reason", "x", "--dry-run", "--json", database_url=database_url)
    figures = json.loads(data.stdout)
    assert figures == {
        "dry_run": True,
        "act": None,
        "sessions": 1,
        "turns": 2,
        "messages": 4,
        "events": 2,
        "quarantined": 1,
        "unsearchable": 0,
        "held": [],
    }
    unanswered = archiver("erase", "--session", "s1", "--reason", "x", database_url=database_url)
    assert unanswered.returncode == 1
    assert "2 events" in unanswered.stderr
    assert archive(engine) == before
    assert rows(engine, "SELECT count(*) FROM archiver.acts") == [(0,)]


@on_one_version
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "specify what to erase"),
        (["--session", "s1"], "--reason"),
        (["--session", "s1", "--reason", " "], "--reason"),
        (["--session", "", "--reason", "x"], "invalid session id"),
        (["--chat", "\x1f1", "--reason", "x"], "invalid chat id"),
        (["--where", "customer", "--reason", "x"], "NAME=VALUE"),
        (["--session", "s1", "--list", "--reason", "x"], "specify what to erase"),
    ],
)
def test_wrong_usage_is_reported(database_url: str, options: list[str], says: str) -> None:
    process = archiver("erase", *options, database_url=database_url)
    assert process.returncode == 2
    assert says in process.stderr


@on_one_version
def test_i8_by_a_variable_and_the_value_is_recorded_nowhere(database_url: str, engine: Engine) -> None:
    def of(customer: str) -> dict[str, Any]:
        return {"assistantOverrides": {"variableValues": {"customer": customer, "plan": 3}}}

    record(engine, created("c1", "s1", **of("Mary Miller")), created("c2", "s1"), created("c3", "s2", **of("Bob")))
    record(engine, created("c4", None, **of("Mary Miller")))
    record(
        engine, b'{"customer": "Mary Miller" broken', b'{"name": "Mary Miller" broken', b'{"customer": "Mary" broken'
    )
    done = erase(database_url, "--where", "customer=Mary Miller", "--actor", "anna", "--json")
    assert done.returncode == 0, done.stderr
    assert texts(engine, "s1") == texts(engine, "") == []
    assert texts(engine, "s2") == ["question of c3", "answer to c3"]
    execute(engine, 'DELETE FROM archiver.quarantine WHERE body = \'{"name": "Mary Miller" broken\'')
    assert b"Mary Miller" not in dump(engine)
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(1,)]
    ((actor, reason, detail),) = acts(engine, "erase")
    assert (actor, reason, detail["where"], detail["sessions"]) == ("anna", "she asked", ["customer"], 1)
    assert is_rebuilt_the_same(engine)


@on_one_version
def test_i8_one_turn_wherever_it_is(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"))
    read(engine, "s1", 5, *said("c1", "c2"))
    done = erase(database_url, "--chat", "c1")
    assert (done.returncode, done.stderr) == (0, ""), "no progress where nobody watches"
    assert holds_text(engine, "question of c1", "question of c2") == ["question of c2"]
    for session_id in ("s1", None, "s9"):
        assert record(engine, created("c1", session_id))[0].reason == "erased"
    assert is_rebuilt_the_same(engine)


@pytest.mark.parametrize("command", [("erase", "--session", "s1", "--reason", "case 7"), ("rebuild",)])
def test_a_command_that_gets_no_answer_names_the_option_that_answers(
    database_url: str, engine: Engine, command: tuple[str, ...]
) -> None:
    record(engine, created("c1", "s1"))
    last = archiver(*command, database_url=database_url).stderr.splitlines()[-1]
    assert last == "archiver: no answer on stdin; nothing was changed. To answer in advance, add --yes"


@on_one_version
def test_i8_unclaimed_words_that_may_belong_to_an_erased_turn_are_reported(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"), deleted("c2", "s1"))
    read(engine, "s1", 5, *said("c1", "c2"))
    for options in (["--dry-run"], []):
        process = erase(database_url, "--chat", "c2", *options).stderr
        assert "session s1 has history messages that belong to no known turn" in process
    assert holds_text(engine, "question of c1", "question of c2") == ["question of c1", "question of c2"]
    for known in (("--chat", "c1"), ("--chat", "c2", "--session", "s1")):
        assert "belong to no known turn" not in erase(database_url, *known).stderr
    assert holds_text(engine, "question of c1", "question of c2") == []


@on_one_version
def test_i8_the_list_survives_a_restore_and_is_applied_again(
    cluster: Cluster, database_url: str, engine: Engine, tmp_path: Path
) -> None:
    record(
        engine,
        created("c1", "s1"),
        created("c2", "s2"),
        created("c3", "s2"),
        created("c4", None),
        created("c5", "s5"),
    )
    read(engine, "s2", 5, *said("c2", "c3"))
    engine.dispose()
    backup = cluster.clone(engine.url.database or "")
    restored = cluster.engine(backup)
    try:
        assert (
            erase(database_url, "--session", "s1", "--chat", "c2", "--chat", "c4", "--actor", "anna").returncode == 0
        )
        process = archiver("erase", "--list", database_url=database_url)
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        assert {"s1", "s2", ""} == {line["session_id"] for line in lines}
        assert {line["actor"] for line in lines} == {"anna"}
        assert set(lines[0]) == {"session_id", "chat_id", "erased_at", "rule", "reason", "actor"}
        file = tmp_path / "erasures.jsonl"
        file.write_text(process.stdout)
        for _ in range(2):
            done = archiver("erase", "--replay", str(file), "--yes", database_url=backup)
            assert done.returncode == 0, done.stderr
        assert holds_text(restored, *(f"question of c{number}" for number in range(1, 6))) == [
            "question of c3",
            "question of c5",
        ]
        assert archiver("erase", "--list", database_url=backup).stdout.count("erased_at") == len(lines)
        when = "SELECT session_id, chat_id, erased_at, rule FROM archiver.erasures ORDER BY 1, 2"
        assert rows(restored, when) == rows(engine, when)
        assert rows(restored, "SELECT detail ->> 'new' FROM archiver.acts WHERE kind = 'erase.replay'") == [("4",)]
        assert archive(restored)[2] == archive(engine)[2]
        assert is_rebuilt_the_same(restored)
    finally:
        restored.dispose()
        cluster.drop(backup)


@on_one_version
@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '{"session_id": "s1"}',
        '{"session_id": "", "chat_id": "", "erased_at": "2026-01-01T00:00:00Z", "rule": "request"}',
        '{"session_id": "s1", "chat_id": "", "erased_at": "2026-01-01T00:00:00Z", "rule": "whim"}',
        '{"session_id": "\\u0000", "chat_id": "", "erased_at": "2026-01-01T00:00:00Z", "rule": "request"}',
        '{"session_id": "s1", "chat_id": "", "erased_at": "2026-01-01T00:00:00", "rule": "request"}',
        '{"session_id": "s1", "chat_id": "", "erased_at": "9999-12-31T23:59:59.999999Z", "rule": "request"}',
        '{"session_id": "s1", "chat_id": "", "erased_at": "9999-12-31T23:59:59-23:59", "rule": "request"}',
        '{"session_id": "s1", "chat_id": "", "erased_at": "0001-01-01T00:00:00+23:59", "rule": "request"}',
        '{"session_id": "s1", "chat_id": "", "erased_at": "1999-12-31T23:59:59Z", "rule": "request"}',
    ],
)
def test_a_list_that_is_none_is_refused(database_url: str, tmp_path: Path, line: str) -> None:
    (tmp_path / "list").write_text(f"\n{line}\n")
    process = archiver("erase", "--replay", str(tmp_path / "list"), "--yes", database_url=database_url)
    assert process.returncode == 2
    assert "line 2" in process.stderr


@on_one_version
def test_holds_are_placed_listed_obeyed_and_released(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"))

    def hold(*arguments: str) -> subprocess.CompletedProcess[str]:
        return archiver("hold", *arguments, database_url=database_url)

    assert hold("add", "--reason", "x").returncode == 2
    placed = hold("add", "--session", "s1", "--since", "2024-01-01", "--reason", "case 7", "--actor", "judge")
    assert placed.returncode == 0, placed.stderr
    by_variable = hold("add", "--variable", "customerTier=Nobody", "--reason", "case 8", "--json")
    assert json.loads(by_variable.stdout) == {"hold": 2, "sessions": 0, "turns_without_session": 0}
    assert "hold 2 covers nothing yet" in by_variable.stderr
    assert (placed.stdout, placed.stderr) == ("Hold 1 is in force. It covers 1 session now.\n", "")
    listed = json.loads(hold("list", "--json").stdout)
    assert next((row["author"], row["session_id"], row["reason"]) for row in listed) == ("judge", "s1", "case 7")
    refused = erase(database_url, "--session", "s1", "--session", "s2")
    assert refused.returncode == 1
    assert "session s1 is under legal hold 1" in refused.stderr
    assert "--skip-held" in refused.stderr
    assert holds_text(engine, "question of c1", "question of c2") == ["question of c1", "question of c2"]
    assert len(acts(engine, "erase.refused")) == 1
    assert erase(database_url, "--session", "s1", "--session", "s2", "--skip-held").returncode == 0
    assert holds_text(engine, "question of c1", "question of c2") == ["question of c1"]
    assert hold("release", "1", "--reason", "closed").returncode == 0
    again = hold("release", "1", "--reason", "closed")
    assert again.returncode == 1
    assert "archiver hold list --all" in again.stderr
    assert len(json.loads(hold("list", "--json").stdout)) == 1
    assert "case 7" in hold("list", "--all").stdout
    assert erase(database_url, "--session", "s1").returncode == 0
    assert holds_text(engine, "question of c1") == []
    trail = archiver("acts", "--json", database_url=database_url).stdout.splitlines()
    kinds = [json.loads(line)["kind"] for line in trail]
    assert kinds == ["hold.add", "hold.add", "erase.refused", "erase", "hold.release", "erase"]
    assert "Nobody" not in "".join(trail)
    assert "hold.add" in archiver("acts", database_url=database_url).stdout
    assert archiver("acts", "--kind", "export", database_url=database_url).returncode == 0
    unknown = archiver("acts", "--kind", "nosuch", database_url=database_url)
    assert unknown.returncode == 2
    assert "hold.release" in unknown.stderr


@on_one_version
def test_the_audit_trail_is_listed_by_kind_time_and_number(database_url: str, engine: Engine) -> None:
    def audit(*arguments: str) -> list[dict[str, Any]]:
        ended = archiver("audit", *arguments, "--json", database_url=database_url)
        assert ended.returncode == 0, ended.stderr
        return [json.loads(line) for line in ended.stdout.splitlines()]

    assert audit() == []
    assert "The audit log is empty." in archiver("audit", database_url=database_url).stdout
    for number in range(5):
        archiver("hold", "add", "--session", f"s{number}", "--reason", f"case {number}", database_url=database_url)
    archiver("hold", "release", "1", "--reason", "closed", database_url=database_url)
    every = audit()
    assert [each["kind"] for each in every] == ["hold.add"] * 5 + ["hold.release"]
    assert audit("--limit", "2") == every[-2:]
    assert audit("--limit", "2", "--kind", "hold.add") == every[3:5]
    assert audit("--limit", "100") == every
    assert audit("--since", every[2]["at"]) == every[2:]
    assert audit("--since", every[2]["at"], "--limit", "1", "--kind", "hold.add") == every[4:5]
    assert audit("--since", "2100-01-01") == []
    assert "no such entry" in archiver("audit", "--since", "2100-01-01", database_url=database_url).stdout
    for wrong in (("--limit", "0"), ("--limit", "x"), ("--since", "yesterday")):
        assert archiver("audit", *wrong, database_url=database_url).returncode == 2


@on_one_version
def test_a_hold_reports_the_sessions_and_unassigned_turns_that_it_covers(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"), created("c3", None))
    process = archiver("hold", "add", "--assistant", "assistant-1", "--reason", "x", database_url=database_url)
    assert process.stdout == "Hold 1 is in force. It covers 2 sessions and 1 turn without a session now.\n"


@on_one_version
def test_i8_what_a_hold_keeps_is_neither_counted_nor_recorded_as_erased(database_url: str, engine: Engine) -> None:
    def of(customer: str) -> dict[str, Any]:
        return {"assistantOverrides": {"variableValues": {"customer": customer}}}

    record(engine, created("c1", "s1", **of("7")), created("c2", "s2", **of("7")), created("c3", "s2"))
    archiver("hold", "add", "--session", "s1", "--reason", "case 7", database_url=database_url)
    before = archive(engine)
    named = ("--where", "customer=7")
    for options in (["--dry-run"], ["--dry-run", "--json"]):
        refused = erase(database_url, *named, *options)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "session s1 is under legal hold 1" in refused.stderr
        assert "nothing would be erased" in refused.stderr
    assert acts(engine, "erase.refused") == []
    shown = erase(database_url, *named, "--dry-run", "--skip-held")
    assert shown.returncode == 0
    assert shown.stdout == "Would erase 1 session, 2 turns, 4 messages, 2 events, 0 quarantined.\n"
    assert archive(engine) == before
    done = erase(database_url, *named, "--skip-held", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert {"sessions": 1, "turns": 2, "messages": 4, "events": 2}.items() <= data.items()
    assert data["held"] == [{"session_id": "s1", "chat_id": "", "holds": [1]}]
    ((_, _, detail),) = acts(engine, "erase")
    assert (detail["sessions"], detail["found"]["sessions"], detail["held"], detail["holds"]) == (1, 1, 1, [1])
    assert holds_text(engine, "question of c1", "question of c2") == ["question of c1"]


@on_one_version
def test_what_is_held_since_it_was_ordered_is_not_counted_as_erased(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", None), created("c2", "s1"))
    read(engine, "s1", 1, *said("c2"))
    archiver("hold", "add", "--session", "s1", "--reason", "case 7", database_url=database_url)
    assert erase(database_url, "--chat", "c1", "--dry-run").stdout.startswith("Would erase 0 sessions, 1 turn,")
    execute(
        engine,
        """
        CREATE FUNCTION place_hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO archiver.holds (placed_at, author, reason, assistant_id) VALUES (now(), 'judge', 'x', 'a9');
            RETURN NULL;
        END $$
        """,
        "CREATE TRIGGER place AFTER INSERT ON archiver.erasures EXECUTE FUNCTION place_hold()",
    )
    record(engine, created("c3", "s3", assistantId="a9"))
    done = erase(database_url, "--session", "s3", "--chat", "c1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Erased 0 sessions, 1 turn, 2 messages, 1 event, 0 quarantined.\n"
    assert "session s3 is under legal hold 2" in done.stderr
    assert holds_text(engine, "question of c1", "question of c3") == ["question of c3"]


@on_one_version
def test_unknown_targets_are_reported(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", None))
    process = erase(database_url, "--chat", "c8", "--session", "s9", "--where", "nosuch=1", "--dry-run").stderr
    assert "chat c8 is unknown; later deliveries for it will be refused" in process
    assert "session s9 is unknown" in process
    assert "no turn has a variable nosuch" in process
    process = erase(
        database_url, "--chat", "c1", "--chat", "c2", "--session", "s1", "--where", "customerTier=1"
    ).stderr
    assert "is unknown" not in process
    assert "no turn" not in process


@on_one_version
def test_a_user_without_the_right_to_place_holds_learns_which_right_is_missing(
    cluster: Cluster, database_url: str, engine: Engine
) -> None:
    name = f"limited_{engine.url.database}"
    execute(engine, f"CREATE ROLE {name} LOGIN", f"GRANT archiver_writer TO {name}")
    try:
        limited = database_url.replace("postgres@", f"{name}@", 1)
        process = archiver("hold", "add", "--session", "s1", "--reason", "x", database_url=limited)
        assert process.returncode == 1
        assert "GRANT INSERT, UPDATE (released_at, released_by) ON archiver.holds" in process.stderr
        record(engine, created("c1", "s1"))
        assert erase(limited, "--session", "s1").returncode == 0
    finally:
        execute(engine, f"DROP OWNED BY {name}", f"DROP ROLE {name}")
    assert holds_text(engine, "question of c1") == []
    assert sweep(engine) == 0


@on_one_version
def test_counsel_places_and_releases_holds_and_erases_nothing(
    cluster: Cluster, database_url: str, engine: Engine
) -> None:
    name = f"counsel_{engine.url.database}"
    execute(
        engine,
        f"CREATE ROLE {name} LOGIN",
        f"GRANT archiver_auditor TO {name}",
        f"GRANT INSERT, UPDATE (released_at, released_by) ON archiver.holds TO {name}",
        f"GRANT USAGE ON SCHEMA archiver_jobs TO {name}",
        f"GRANT UPDATE ON archiver_jobs.lock_placement TO {name}",
    )
    record(engine, created("c1", "s1"))
    try:
        counsel = database_url.replace("postgres@", f"{name}@", 1)
        for arguments in (["add", "--session", "s1"], ["release", "1"]):
            process = archiver("hold", *arguments, "--reason", "x", database_url=counsel)
            assert process.returncode == 0, process.stderr
        assert erase(counsel, "--session", "s1").returncode == 1
    finally:
        execute(engine, f"DROP OWNED BY {name}", f"DROP ROLE {name}")
    assert holds_text(engine, "question of c1") == ["question of c1"]
    assert [kind for (kind,) in rows(engine, "SELECT kind FROM archiver.acts")] == ["hold.add", "hold.release"]


@on_one_version
def test_what_is_held_by_a_variable_stays_in_the_quarantine_too(database_url: str, engine: Engine) -> None:
    record(engine, b'{"customer": "Mary" broken')
    archiver("hold", "add", "--variable", "customer=Mary", "--reason", "x", database_url=database_url)
    assert erase(database_url, "--where", "customer=Mary").returncode == 0
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(1,)]
    archiver("hold", "release", "1", "--reason", "x", database_url=database_url)
    assert erase(database_url, "--where", "customer=Mary").returncode == 0
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(0,)]


@on_one_version
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--since", "0001-01-01T00:00:00+14:00"], "--since"),
        (["--until", "9999-12-31T23:59:59-14:00"], "--until"),
        (["--since", "2024-02-01", "--until", "2024-02-01"], "--since"),
        (["--assistant", " "], "invalid assistant id"),
        (["--session", "s1", "--reason", " "], "--reason TEXT is required"),
    ],
)
def test_a_hold_that_cannot_be_meant_is_wrong_usage(database_url: str, options: list[str], says: str) -> None:
    process = archiver("hold", "add", "--reason", "x", *options, database_url=database_url)
    assert process.returncode == 2, process.stderr
    assert says in process.stderr
    assert archiver("hold", "release", "1", "--reason", " ", database_url=database_url).returncode == 2


@on_one_version
def test_i8_spooled_deliveries_are_reported(database_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    (folder / "damaged-spool-0-1.db").write_bytes(b"what was there")
    (folder / "spool-1.db").write_bytes(b"no database at all" * 100)
    process = erase(database_url, "--session", "s1", ARCHIVER_HOME=str(tmp_path))
    assert process.returncode == 0
    assert "damaged-spool-0-1.db is damaged" in process.stderr
    assert "cannot read the spool" in process.stderr


@on_one_version
def test_i8_a_released_hold_forgets_its_value(database_url: str, engine: Engine, tmp_path: Path) -> None:
    variables: dict[str, Any] = {"assistantOverrides": {"variableValues": {"customer": "Mary Miller"}}}
    record(engine, created("c1", "s1", **variables))

    def hold(*arguments: str) -> subprocess.CompletedProcess[str]:
        return archiver("hold", *arguments, database_url=database_url)

    hold("add", "--variable", "customer=Mary Miller", "--reason", "case 7")
    assert "Mary" in hold("list").stdout
    assert hold("release", "1", "--reason", "closed").returncode == 0
    assert [row["variable"] for row in json.loads(hold("list", "--all", "--json").stdout)] == ["customer"]
    assert "deleted with the release" in hold("list", "--all").stdout
    assert erase(database_url, "--where", "customer=Mary Miller").returncode == 0
    assert b"Mary Miller" not in dump(engine)
    process = archiver("export", "--output", str(tmp_path / "out"), "--hold", "1", database_url=database_url)
    assert process.returncode != 0
    assert "was deleted when the hold was released" in process.stderr


@on_one_version
def test_i8_by_a_variable_nothing_goes_from_the_quarantine_while_anything_is_held(
    database_url: str, engine: Engine
) -> None:
    variables: dict[str, Any] = {"assistantOverrides": {"variableValues": {"customer": "Mary"}}}
    record(engine, created("c1", "s1", **variables), created("c2", "held", **variables))
    record(engine, b'{"sessionId": "held", "customer": "Mary" broken', b'{"customer": "Mary" broken', b'{"s1" broken')
    archiver("hold", "add", "--session", "held", "--reason", "x", database_url=database_url)
    data = erase(database_url, "--where", "customer=Mary", "--skip-held", "--json")
    assert data.returncode == 0
    assert json.loads(data.stdout)["quarantined"] == 1
    assert "2 quarantined deliveries are kept" in data.stderr
    assert texts(engine, "held") == ["question of c2", "answer to c2"]
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(2,)]


@on_one_version
def test_i8_a_replayed_list_takes_what_only_the_quarantine_holds(database_url: str, engine: Engine) -> None:
    record(engine, b'{"sessionId": "s7" broken', b'{"sessionId": "s8" broken')
    line = b'{"session_id": "s7", "chat_id": "", "erased_at": "2026-01-01T00:00:00Z", "rule": "request"}'
    command = [sys.executable, "-m", "archiver", "erase", "--replay", "-", "--yes", "--json"]
    done = subprocess.run(
        command, input=line, capture_output=True, env=os.environ | {"DATABASE_URL": database_url}, check=True
    )
    assert json.loads(done.stdout)["quarantined"] == 1
    assert rows(engine, "SELECT body FROM archiver.quarantine") == [(b'{"sessionId": "s8" broken',)]


@on_one_version
def test_a_retry_of_the_quarantine_is_an_act(database_url: str, engine: Engine) -> None:
    record(engine, b"{", b"[")
    archiver("quarantine", "retry", "--all", "--actor", "anna", database_url=database_url)
    archiver("quarantine", "retry", "99", "--actor", "anna", database_url=database_url)
    assert acts(engine, "quarantine.retry") == [
        ("anna", None, {"became": {"quarantined": 2}}),
        ("anna", None, {"became": {"absent": 1}}),
    ]


@on_one_version
def test_i8_a_backfill_does_not_bring_it_back_and_ends(database_url: str, engine: Engine) -> None:
    with simulated() as callhq:
        whole, partly = callhq.session("whole", "ok"), callhq.session("partly", "ok", "ok")
        record(engine, created("c1", whole.id), created("c2", partly.id), created("c3", partly.id))
        assert erase(database_url, "--session", whole.id, "--chat", "c2").returncode == 0
        messages = rows(engine, "SELECT * FROM analytics.messages ORDER BY 1, 2")
        events = rows(engine, "SELECT count(*) FROM archiver.events")
        for options in (["--all"], ["--session", whole.id, "--session", partly.id]):
            process = archiver("backfill", *options, database_url=database_url, **callhq.settings)
            assert process.returncode == 0, process.stderr
    assert rows(engine, "SELECT * FROM analytics.messages ORDER BY 1, 2") == messages
    (registrations,) = rows(engine, "SELECT count(*) FROM archiver.events WHERE type = 'session.registered'")
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(events[0][0] + registrations[0],)]
    state_query = "SELECT DISTINCT reason, leased_until, reconcile_at FROM archiver.sessions WHERE session_id <> ''"
    assert rows(engine, state_query) == [("erased", None, None)]


@on_one_version
def test_i8_what_was_quarantined_before_does_not_come_back_by_a_retry(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    assert erase(database_url, "--session", "s1").returncode == 0
    # As if it had been refused by a defect at the time, and told again meanwhile.
    with transaction(engine) as connection:
        body = created("c1", "s1")
        quarantine.upsert_quarantine(
            connection, [events.Delivery(events.parse(body), datetime.now(UTC), "key")], "not_processable"
        )
    process = archiver("quarantine", "retry", "--all", database_url=database_url)
    assert (process.returncode, process.stdout) == (0, "1: removed: its content was erased\n")
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(0,)]
    assert holds_text(engine, "question of c1") == []


QUESTION, ANSWER = "Where is my parcel, ordered on 4 May?", "yes"


def conversation(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": each} for number, each in enumerate(texts)]


def test_i8_turns_that_repeat_what_was_erased_are_named_and_can_be_erased(database_url: str, engine: Engine) -> None:
    record(
        engine,
        created("c1", "s1", input=QUESTION, output=conversation("", ANSWER)[1:]),
        created("c2", "s1", input=conversation(QUESTION, ANSWER, "And now?"), output="soon"),
        created("c3", "s1", input=conversation("hello", ANSWER, "Thanks"), output="welcome"),
        created("c4", "s1", input="Go on", output="ok", context=json.dumps({"before": QUESTION})),
        created("c5", "s1", input=ANSWER, output="fine"),
        created("c6", "s2", input="Something else", output="ok"),
        event("chat.rated", 1_705_311_000_000, chat("c7", "s1", note=QUESTION.replace(" ", "  "))),
    )
    known = json.loads(erase(database_url, "--chat", "c1", "--dry-run", "--json").stdout)["resent"]
    named = {each["chat_id"] for each in known["turns"]}
    assert (known["count"], named) == (4, {"c2", "c3", "c4", "c7"})
    ended = erase(database_url, "--chat", "c1", "--json")
    assert json.loads(ended.stdout)["resent"] == known
    for name in sorted(named):
        assert f"archiver erase --chat {name}" in ended.stderr
    assert "--chat c5" not in ended.stderr
    assert archiver("verify", database_url=database_url).returncode == 0
    ended = erase(database_url, *[option for name in sorted(named) for option in ("--chat", name)], "--json")
    assert "resent" not in json.loads(ended.stdout)
    query = "SELECT body FROM archiver.events WHERE body IS NOT NULL"
    assert not [body for (body,) in rows(engine, query) if QUESTION.encode() in bytes(body)]
    whole = erase(database_url, "--session", "s1", "--json")
    assert "resent" not in json.loads(whole.stdout)


def test_i8_an_erasure_decodes_each_quarantined_body_once(database_url: str, engine: Engine) -> None:
    """More erasures than one page, by the command, which looks, orders and sweeps; and by a sweep alone."""
    sessions = [f"s{number}" for number in range(1_200)]
    for start in range(0, len(sessions), 400):
        record(engine, *[created(f"c-{each}", each) for each in sessions[start : start + 400]])
    record(engine, *[b"{" + each.encode() for each in sessions[:40]], *[b"no %d" % number for number in range(60)])
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(100,)]

    def searched() -> float:
        return float(telemetry.quarantine_searched._value.get())

    before = searched()
    preview = requests.preview(engine, requests.Selection(sessions), "counsel", "she asked")
    requests.purge(engine, requests.order(engine, preview), TIMING, lambda _: None)
    assert searched() - before == 100
    assert rows(engine, "SELECT count(*) FROM archiver.quarantine") == [(60,)]
    assert rows(engine, "SELECT count(*) FROM archiver.events WHERE body IS NOT NULL") == [(0,)]
