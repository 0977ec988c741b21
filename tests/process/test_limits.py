"""What one event, one chat or one full disk may cost other events (I4, I12)."""

import os
import signal
import socket
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine

from archiver import events, inbound, ledger
from archiver.archive import MAX_SESSIONS_PER_CHAT, AmbiguousSessionError
from archiver.database import transaction
from archiver.events import Delivery, responses
from archiver.inbound import Ingest
from tests.support.observations import observe
from tests.support.payloads import SECRET, WEBHOOK, created
from tests.support.receivers import serving
from tests.support.versions import on_one_version
from tests.support.waiting import until


@on_one_version
def test_i12_a_chat_known_in_very_many_sessions_is_refused_without_its_session(engine: Engine) -> None:
    for number in range(MAX_SESSIONS_PER_CHAT + 1):
        with transaction(engine) as connection:
            ledger.record(connection, [observe(created("c", f"s{number}"), number)])
    with pytest.raises(AmbiguousSessionError), transaction(engine) as connection:
        ledger.record(connection, [observe(created("c", None), 100)])


@on_one_version
def test_i4_it_is_quarantined_alone(database_url: str, engine: Engine) -> None:
    for number in range(MAX_SESSIONS_PER_CHAT + 1):
        with transaction(engine) as connection:
            ledger.record(connection, [observe(created("c", f"s{number}"), number)])
    with serving(database_url) as receiver:
        answer = receiver.post(created("c", None))
        assert (answer.status_code, answer.json()["reason"]) == (422, "not_processable")
        assert receiver.post(created("d", "s1")).json()["status"] == "stored"


def test_i12_a_batch_is_bounded_by_its_messages_too() -> None:
    body = created("c", "s", input=[{"role": "user", "content": "x"}] * (events.MAX_MESSAGES - 1))
    event = events.parse(body)
    assert isinstance(event, events.Event)
    queue = Ingest(None, queue_events=100, queue_bytes=10**9, batch_events=100)  # type: ignore[arg-type]  # not asked
    limit = inbound.BATCH_MESSAGES // events.MAX_MESSAGES
    delivery = Delivery(event, observe(body).received_at, None)
    queue._queue.extend([inbound._Waiting(delivery, None)] * (limit + 1))  # type: ignore[arg-type]  # nobody waits
    assert len(queue._take()) == limit
    assert len(queue._take()) == 1


def test_i12_and_by_their_bytes() -> None:
    body = b'{"session": {"messages": []}, "filler": "%s"}' % (b"x" * (inbound.BATCH_BYTES // 3))
    delivery = Delivery(responses.parse_history("s", 200, body), observe(created()).received_at, None)
    queue = Ingest(None, queue_events=100, queue_bytes=10**9, batch_events=100)  # type: ignore[arg-type]  # not asked
    queue._queue.extend([inbound._Waiting(delivery, None)] * 5)  # type: ignore[arg-type]  # nobody waits
    assert [len(queue._take()) for _ in range(3)] == [2, 2, 1]


@on_one_version
def test_i4_a_chunked_body_behind_an_upgrade_is_not_taken_for_an_empty_one(database_url: str) -> None:
    body = created()
    head = (
        f"POST {WEBHOOK} HTTP/1.1\r\nhost: x\r\nx-webhook-secret: {SECRET}\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
        f"transfer-encoding: chunked\r\n\r\n{len(body):x}\r\n"
    )
    with serving(database_url) as receiver, socket.create_connection(("127.0.0.1", receiver.port), 30) as connection:
        connection.sendall(head.encode() + body + b"\r\n0\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 400")
    with psycopg.connect(database_url) as database:
        assert database.execute("SELECT count(*) FROM archiver.quarantine").fetchone() == (0,)


@on_one_version
def test_readyz_reports_that_events_cannot_be_committed(database_url: str) -> None:
    with serving(database_url, ARCHIVER_SPOOL="off") as receiver:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("ALTER TABLE archiver.messages RENAME TO elsewhere")
            assert receiver.post(created()).status_code == 503
            answer = receiver.get("/readyz")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert "could not be committed" in answer.json()["database"]
            connection.execute("ALTER TABLE archiver.elsewhere RENAME TO messages")
        assert receiver.post(created()).status_code == 200
        assert receiver.get("/readyz").status_code == 200


@pytest.mark.parametrize("name", ["h", "h" * 100], ids=["short path", "path too long for a socket"])
def test_an_embedded_postgres_that_is_killed_is_started_again(tmp_path: Path, name: str) -> None:
    with serving(None, ARCHIVER_HOME=str(tmp_path / name)) as receiver:
        assert receiver.post(created("before")).status_code == 200
        pid_file = tmp_path / name / "postgres" / "postmaster.pid"
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
        until(lambda: receiver.post(created("after")).json()["status"] == "duplicate", "it takes events again")
        assert receiver.post(created("before")).json()["status"] == "duplicate"
