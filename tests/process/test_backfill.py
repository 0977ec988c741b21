"""`archiver backfill`, as a process, against a simulated CallHQ on a real port."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from starlette.responses import HTMLResponse
from starlette.types import Receive, Scope, Send

from archiver.history.backfill import Selection
from archiver.simulator.upstream import Session
from tests.support import servers
from tests.support.payloads import created
from tests.support.receivers import archiver, serving
from tests.support.upstreams import CallHQ, Refusing, answering, hosting, simulated
from tests.support.waiting import until

pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)


@pytest.fixture
def callhq() -> Iterator[CallHQ]:
    with simulated() as callhq:
        yield callhq


def rows(url: str, query: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


def backfill(url: str, callhq: CallHQ, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return archiver("backfill", *options, database_url=url, **callhq.settings, **settings)


def json_of(ended: subprocess.CompletedProcess[str]) -> Any:
    assert ended.stdout, ended.stderr
    return json.loads(ended.stdout)


def transcript(url: str, session: Session) -> list[Any]:
    query = "SELECT role, content FROM analytics.messages WHERE session_id = %s ORDER BY position"
    with psycopg.connect(url) as connection:
        return [{"role": role, "content": content} for role, content in connection.execute(query, [session.id])]


def test_i6_sessions_without_any_event_are_archived_by_their_ids(
    database_url: str, callhq: CallHQ, tmp_path: Path
) -> None:
    sessions = [callhq.session(f"s{n}", "ok", "ok", "thanks") for n in range(5)]
    file = tmp_path / "ids.csv"
    file.write_text("id,name\n" + "".join(f"{session.id},{session.name}\n" for session in sessions))
    ended = backfill(database_url, callhq, "--file", str(file), "--json")
    assert ended.returncode == 0, ended.stderr
    figures = json_of(ended)
    assert figures["outcomes"] == {"read": 5}
    assert figures["recovered_messages"] == sum(len(session.messages()) for session in sessions)
    for session in sessions:
        assert transcript(database_url, session) == session.messages()


def test_a_dry_run_reports_the_repairs_and_writes_nothing(database_url: str, callhq: CallHQ) -> None:
    session = callhq.session("s", "ok")
    before = rows(database_url, "SELECT * FROM archiver.sessions")
    figures = json_of(backfill(database_url, callhq, "--session", session.id, "--dry-run", "--json"))
    assert figures["recovered_messages"] == len(session.messages())
    assert figures["coverage"] == {"repaired": 1}
    assert rows(database_url, "SELECT * FROM archiver.sessions") == before
    assert rows(database_url, "SELECT count(*) FROM archiver.events") == [(0,)]


def test_a_second_run_finds_nothing_to_do(database_url: str, callhq: CallHQ) -> None:
    session = callhq.session("s", "ok")
    backfill(database_url, callhq, "--session", session.id)
    assert json_of(backfill(database_url, callhq, "--json"))["sessions"] == 0
    again = json_of(backfill(database_url, callhq, "--all", "--json"))
    assert (again["sessions"], again["recovered_messages"]) == (1, 0)


def test_a_session_that_is_gone_is_no_failure(database_url: str) -> None:
    with simulated(history_gone=1.0) as callhq:
        ended = backfill(database_url, callhq, "--session", callhq.session("s", "ok").id, "--json")
    assert ended.returncode == 0
    assert json_of(ended)["outcomes"] == {"gone": 1}
    assert rows(database_url, "SELECT state, reason FROM analytics.coverage") == [("unverified", "history_gone")]


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_an_unknown_id_is_a_failure_and_creates_no_conversation(
    database_url: str, callhq: CallHQ, option: list[str]
) -> None:
    session = callhq.session("s", "ok")
    ended = backfill(database_url, callhq, "--session", "nope", "--session", session.id, "--json", *option)
    assert ended.returncode == 1
    assert json_of(ended)["outcomes"] == {"read": 1, "unknown": 1}
    assert [failure["id"] for failure in json_of(ended)["failures"]] == ["nope"]
    listed = [] if option else [(session.id,)]
    assert rows(database_url, "SELECT session_id FROM analytics.conversations") == listed
    texts = backfill(database_url, callhq, "--session", "nope", *option).stderr
    assert "archiver: nope: This session is unknown to CallHQ (404)" in texts


def deliver_one_of(database_url: str, session_id: str) -> None:
    """One webhook of a session, its others lost."""
    with serving(database_url) as receiver:
        assert receiver.post(created("by hand", session_id)).status_code == 200


def test_a_wrong_url_is_reported_and_the_next_run_recovers(database_url: str, callhq: CallHQ) -> None:
    session = callhq.session("s", "ok")
    deliver_one_of(database_url, session.id)
    without_api = callhq.settings | {"CALLHQ_API_URL": callhq.url.replace("http://", "http://me:hunter2@")}
    for option in ("--dry-run", "--all", "--all"):
        ended = archiver("backfill", option, database_url=database_url, **without_api)
        assert ended.returncode == 1
        assert "CallHQ returned 404 for every session, although 1 of them were active recently" in ended.stderr
        assert "CALLHQ_API_URL" in ended.stderr
        assert "hunter2" not in ended.stderr
    assert rows(database_url, "SELECT reason FROM analytics.coverage") == [("history_gone",)]
    ended = backfill(database_url, callhq, "--json")
    assert (ended.returncode, json_of(ended)["outcomes"]) == (0, {"read": 1})
    assert session.messages()[0]["content"] in str(transcript(database_url, session))


def test_what_callhq_forgot_long_ago_is_no_failure_and_not_asked_for_again(database_url: str, callhq: CallHQ) -> None:
    lifetime = {"ARCHIVER_SESSION_LIFETIME": "1"}
    deliver_one_of(database_url, "forgotten")
    time.sleep(1)
    ended = backfill(database_url, callhq, **lifetime)
    assert (ended.returncode, ended.stderr.count("404")) == (0, 0)
    assert json_of(backfill(database_url, callhq, "--json", **lifetime))["sessions"] == 0


def test_an_answer_that_cannot_be_read_is_asked_for_again(database_url: str) -> None:
    with simulated(history_garbage=0.5) as callhq:
        ids = [callhq.session(f"s{n}", "ok").id for n in range(8)]
        ended = backfill(database_url, callhq, *(option for each in ids for option in ("--session", each)), "--json")
    assert json_of(ended)["outcomes"]["read"] >= 6


class Proxy:
    """The platform, or while it is `down` a page for people, which says that all is well."""

    def __init__(self, callhq: CallHQ) -> None:
        self._app, self.is_down = callhq.app, True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = HTMLResponse("<html>Back soon</html>")
        await (page if scope["type"] == "http" and self.is_down else self._app)(scope, receive, send)


@pytest.mark.parametrize("options", [[], ["--all"], ["--since", "2020-01-01"], ["--session"]])
def test_an_answer_of_an_unexpected_shape_is_never_done_with(
    database_url: str, callhq: CallHQ, options: list[str]
) -> None:
    session, proxy = callhq.session("s", "ok"), Proxy(callhq)
    deliver_one_of(database_url, session.id)
    selection = [*options, session.id] if options == ["--session"] else options
    with hosting(proxy) as callhq.url:
        for _ in range(2):
            ended = backfill(database_url, callhq, *selection)
            assert ended.returncode == 1
            assert f"{session.id}: a response of unexpected form" in ended.stderr
        proxy.is_down = False
        ended = backfill(database_url, callhq, *selection, "--json")
        assert (ended.returncode, json_of(ended)["outcomes"]) == (0, {"read": 1})


def test_a_history_that_cannot_be_read_exits_1_and_names_the_session(database_url: str) -> None:
    with simulated(history_garbage=1.0) as callhq:
        session = callhq.session("s", "ok")
        ended = backfill(database_url, callhq, "--session", session.id)
    assert ended.returncode == 1
    assert session.id in ended.stderr
    assert rows(database_url, "SELECT state, reason FROM analytics.coverage") == [
        ("unverified", "history_unreadable")
    ]


def test_a_refused_key_ends_it_with_one_clear_error(database_url: str, callhq: CallHQ) -> None:
    session = callhq.session("s", "ok")
    ended = archiver(
        "backfill",
        "--session",
        session.id,
        database_url=database_url,
        **callhq.settings | {"CALLHQ_API_KEY": "wrong"},
    )
    assert ended.returncode == 1
    assert "CALLHQ_API_KEY" in ended.stderr
    assert "wrong" not in ended.stderr
    assert "rejects this session" not in ended.stderr  # no session was accepted: the key may be wrong
    assert "Traceback" not in ended.stderr
    # Nobody holds the session any more.
    assert rows(database_url, "SELECT leased_until FROM archiver.sessions WHERE session_id <> ''") == [(None,)]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--session", "a", "--all"], "use only one"),
        (["--since", "yesterday"], "2024-01-15"),
        (["--file", "/nowhere"], "No such file"),
        (["--rate", "0"], "--rate"),
        (["--session", ""], "invalid session id"),
        (["--session", "x" * 2000], "invalid session id"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(database_url: str, options: list[str], complaint: str) -> None:
    ended = archiver("backfill", *options, database_url=database_url, CALLHQ_API_KEY="k")
    assert ended.returncode == 2
    assert complaint in ended.stderr


@pytest.mark.parametrize(
    "content", ["id\n{}\n", "Session ID,name\n{},x\n", "{};Kitchen\n", "id;name\n{};K\u00fcche\n", "\ufeff{}\n"]
)
def test_a_file_of_any_usual_form_is_read(database_url: str, callhq: CallHQ, tmp_path: Path, content: str) -> None:
    session, file = callhq.session("s", "ok"), tmp_path / "ids"
    file.write_text(content.format(session.id), encoding="utf-8")
    assert json_of(backfill(database_url, callhq, "--file", str(file), "--json"))["outcomes"] == {"read": 1}


@pytest.mark.parametrize("content", [b"K\xfcche\n", "id\n".encode("utf-16"), b"x" * 200_000])
def test_a_file_of_no_usual_form_is_wrong_usage(database_url: str, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "ids"
    file.write_bytes(content)
    ended = archiver("backfill", "--file", str(file), database_url=database_url, CALLHQ_API_KEY="k")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_a_selection_without_sessions_says_so(database_url: str, callhq: CallHQ) -> None:
    ended = backfill(database_url, callhq, "--since", "2099-01-01")
    assert (ended.returncode, ended.stdout.splitlines()[0][:16]) == (0, "Nothing to read:")
    assert json_of(backfill(database_url, callhq, "--since", "2099-01-01", "--json"))["sessions"] == 0


def test_a_session_that_could_not_be_read_does_not_count_as_complete_now(database_url: str) -> None:
    with simulated() as callhq, hosting(Refusing(callhq)) as callhq.url:
        ids = [callhq.session(name, "ok").id for name in ("refused", "accepted")]
        listed = [option for each in ids for option in ("--session", each)]
        assert json_of(backfill(database_url, callhq, *listed, "--json"))["coverage"] == {"repaired": 2}
        callhq.refused = ids[0]
        figures = json_of(backfill(database_url, callhq, *listed, "--json"))
    assert (figures["outcomes"], figures["coverage"]) == ({"read": 1, "failed": 1}, {"repaired": 1})


def test_the_progress_shows_the_actual_rate(database_url: str, callhq: CallHQ) -> None:
    ids = [callhq.session(f"s{n}", "ok").id for n in range(5)]
    listed = [option for each in ids for option in ("--session", each)]
    ended = backfill(database_url, callhq, *listed, "--rate", "4", "--concurrency", "1", TTY_COMPATIBLE="1")
    (rate, *_) = re.findall(r"5/5\D* (\d+\.\d)/s", re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", ended.stderr))
    assert 0 < float(rate) < 8


def test_what_failed_is_all_that_the_same_command_reads_again(database_url: str) -> None:
    with simulated() as callhq, hosting(Refusing(callhq)) as callhq.url:
        sessions = [callhq.session(f"s{n}", "ok") for n in range(5)]
        callhq.refused = sessions[0].id
        listed = [option for session in sessions for option in ("--session", session.id)]
        ended = backfill(database_url, callhq, *listed, "--json")
        assert ended.returncode == 1
        assert json_of(ended)["outcomes"] == {"read": 4, "failed": 1}
        callhq.refused = ""
        assert json_of(backfill(database_url, callhq, *listed, "--json"))["outcomes"] == {"read": 1}
        assert json_of(backfill(database_url, callhq, *listed, "--json"))["outcomes"] == {"read": 5}


def test_a_database_that_refuses_is_said_in_one_line(database_url: str, callhq: CallHQ) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("ALTER TABLE archiver.messages RENAME TO elsewhere")
    ended = backfill(database_url, callhq, "--session", callhq.session("s", "ok").id)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "The database did not store the response" in ended.stderr


def test_without_a_key_it_names_the_setting(database_url: str) -> None:
    ended = archiver("backfill", database_url=database_url)
    assert ended.returncode == 1
    assert "CALLHQ_API_KEY" in ended.stderr


def test_a_backfill_that_was_killed_goes_on_where_it_was(database_url: str, tmp_path: Path) -> None:
    with simulated() as callhq, answering(callhq, 10) as platform:
        sessions = [callhq.session(f"s{n}", "ok") for n in range(60)]
        file = tmp_path / "ids"
        file.write_text("".join(f"{session.id}\n" for session in sessions))
        command = [sys.executable, "-m", "archiver", "backfill", "--file", str(file), "--concurrency", "2"]
        environment = {"DATABASE_URL": database_url, "PATH": "", **callhq.settings}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: rows(database_url, _READ)[0][0] >= 5, "some sessions are read")
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 1
        ((read,),) = rows(database_url, _READ)
        assert 5 <= read < 60
        platform.most = None
        figures = json_of(backfill(database_url, callhq, "--file", str(file), "--concurrency", "16", "--json"))
        assert figures["outcomes"] == {"read": 60 - read}
        assert all(transcript(database_url, session) == session.messages() for session in sessions)
        # And when it has ended, the next one begins anew.
        assert json_of(backfill(database_url, callhq, "--file", str(file), "--json"))["sessions"] == 60


@pytest.mark.parametrize("every", [False, True])
def test_a_session_with_events_after_its_reading_is_read_again_when_the_backfill_resumes(
    database_url: str, callhq: CallHQ, *, every: bool
) -> None:
    ids = tuple(callhq.session(f"s{n}", "ok").id for n in range(2))
    listed = [option for session_id in ids for option in ("--session", session_id)]
    backfill(database_url, callhq, *listed)
    options, selection = (["--all"], Selection(every=True)) if every else (listed, Selection(ids))
    with psycopg.connect(database_url) as connection:
        # As if this backfill had begun before those readings, and not ended; then there is news of one of the two.
        begun = "INSERT INTO archiver.backfills SELECT %s, min(read_at) FROM archiver.sessions"
        connection.execute(begun, [selection.key])
        connection.execute("UPDATE archiver.sessions SET last_event_at = now() WHERE session_id = %s", [ids[0]])
    assert json_of(backfill(database_url, callhq, *options, "--json"))["sessions"] == 1
    with psycopg.connect(database_url) as connection:
        # What was left off long ago begins anew.
        connection.execute("INSERT INTO archiver.backfills VALUES (%s, now() - interval '2 days')", [selection.key])
    assert json_of(backfill(database_url, callhq, *options, "--json"))["sessions"] == 2


_READ = "SELECT count(*) FROM archiver.sessions WHERE read_at IS NOT NULL"
