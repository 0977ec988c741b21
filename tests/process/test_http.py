"""The HTTP contract, over real sockets, against a real `archiver serve`."""

import http.client
import json
import socket
import string
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from archiver import events
from archiver.database import database_url as parse_url
from archiver.inbound import signatures
from tests.conftest import Cluster
from tests.support import servers
from tests.support.payloads import SECRET, WEBHOOK, created, event
from tests.support.receivers import Receiver, answer, begin, has_read_all, serving
from tests.support.waiting import until
from tests.support.webhooks import SCHEMES, ledger_locked, rows, signed

# What is tested here stands in front of Postgres: one version of it is enough.
pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

LIMIT = 1_048_576


@pytest.fixture(scope="module")
def receiver(url: str) -> Iterator[Receiver]:
    with serving(url) as receiver:
        yield receiver


def counts(url: str) -> tuple[int, int]:
    """Rows of the ledger, rows of the quarantine."""
    ((events_, quarantined),) = rows(
        url, "SELECT (SELECT count(*) FROM archiver.events), (SELECT count(*) FROM archiver.quarantine)"
    )
    return events_, quarantined


def deliveries_of(url: str, chat_id: str) -> list[int]:
    return [row[0] for row in rows(url, "SELECT delivery_count FROM archiver.events WHERE chat_id = %s", chat_id)]


@contextmanager
def database_gone(cluster: Cluster, url: str) -> Iterator[None]:
    name = parse_url(url).database
    cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    cluster.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    try:
        yield
    finally:
        cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


# 200


def test_i1_stored_means_that_the_ledger_holds_the_bytes(receiver: Receiver, url: str) -> None:
    body = b" " + created("stored") + b"\n"
    reply = receiver.post(body)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json()["status"] == "stored"
    query = "SELECT body, type, source, chat_id, key_id FROM archiver.events WHERE id = %s"
    assert rows(url, query, reply.json()["id"]) == [
        (body, "chat.created", "webhook", "stored", signatures.key_id(SECRET))
    ]


def test_i3_a_redelivery_is_a_duplicate_of_the_same_row(receiver: Receiver, url: str) -> None:
    first = receiver.post(created("twice")).json()
    second = receiver.post(created("twice", at=1_705_311_999_000))
    assert second.status_code == 200
    assert second.json() == {"status": "duplicate", "id": first["id"]}
    assert deliveries_of(url, "twice") == [2]


def test_i4_an_unknown_event_is_ignored_and_kept(receiver: Receiver, url: str) -> None:
    body = event("assistant.renamed", 1_705_311_000_000, {"id": "unknown"})
    reply = receiver.post(body)
    assert (reply.status_code, reply.json()["status"]) == (200, "ignored")
    assert rows(url, "SELECT body FROM archiver.events WHERE id = %s", reply.json()["id"]) == [(body,)]


# 401

OLD, NEW = "b2xkIHNlY3JldCBvZiBhIHRlc3Q=", "bmV3IHNlY3JldCBvZiBhIHRlc3Q="


@pytest.mark.parametrize("scheme", SCHEMES)
def test_i2_only_a_delivery_that_proves_a_secret_gets_in_and_the_ledger_says_which(
    scheme: str, database_url: str
) -> None:
    with serving(database_url, **SCHEMES[scheme], ARCHIVER_WEBHOOK_SECRETS=f"{OLD}, {NEW}") as receiver:
        called = receiver.url + WEBHOOK
        body = created("proven")
        refused = {
            "missing": {},
            "wrong": signed(scheme, "d3Jvbmcgc2VjcmV0IG9mIGEgdGVzdA==", body, called),
        }
        if scheme in {"hmac", "standard"}:
            refused["of another body"] = signed(scheme, OLD, body + b" ", called)
            refused["stale"] = signed(scheme, OLD, body, called, time.time() - 400)
            refused["from the future"] = signed(scheme, OLD, body, called, time.time() + 400)
        for why, headers in refused.items():
            reply = receiver.post(body, headers)
            assert (why, reply.status_code) == (why, 401)
            assert reply.json()["status"] == "unauthenticated"
            assert reply.json()["reason"] in signatures.REASONS
            assert "www-authenticate" in reply.headers
        assert counts(database_url) == (0, 0)
        for secret in (OLD, NEW):
            reply = receiver.post(created(secret), signed(scheme, secret, created(secret), called))
            assert (reply.status_code, reply.json()["status"]) == (200, "stored")
            query = "SELECT key_id FROM archiver.events WHERE chat_id = %s"
            assert rows(database_url, query, secret) == [(signatures.key_id(secret),)]
        assert receiver.metric('archiver_received_total{reason="missing_header",status="unauthenticated"}') == 1
        for secret in (OLD, NEW):
            assert secret not in receiver.stderr()


def test_i2_a_malformed_body_without_proof_is_refused_before_it_is_looked_at(receiver: Receiver, url: str) -> None:
    before = counts(url)
    assert receiver.post(b"\xff not JSON", {}).status_code == 401
    assert counts(url) == before


# 413


def padded(chat_id: str, size: int) -> bytes:
    body = created(chat_id)
    return body + b" " * (size - len(body))


def test_i12_a_body_of_just_the_limit_is_accepted(receiver: Receiver, url: str) -> None:
    assert receiver.post(padded("largest", LIMIT)).json()["status"] == "stored"
    assert rows(url, "SELECT length(body) FROM archiver.events WHERE chat_id = 'largest'") == [(LIMIT,)]


@pytest.mark.parametrize("chunked", [False, True])
def test_i12_one_byte_more_is_too_large_with_or_without_content_length(
    chunked: bool, receiver: Receiver, url: str
) -> None:
    body = padded("too large", LIMIT + 1)
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=120)
    pieces = iter([body[:1000], body[1000:LIMIT], body[LIMIT:]]) if chunked else body
    connection.request("POST", WEBHOOK, pieces, {"x-webhook-secret": SECRET}, encode_chunked=chunked)
    reply = connection.getresponse()
    assert (reply.status, json.loads(reply.read())["status"]) == (413, "too_large")
    connection.close()
    assert deliveries_of(url, "too large") == []


def test_i12_a_content_length_beyond_the_limit_is_refused_without_waiting_for_the_body(receiver: Receiver) -> None:
    connection = begin(receiver.port, b"", 10**15)
    assert answer(connection)[0] == 413
    connection.close()


def test_a_chunked_body_is_stored_as_one(receiver: Receiver, url: str) -> None:
    body = created("chunked")
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=120)
    pieces = iter([body[n : n + 7] for n in range(0, len(body), 7)])
    connection.request("POST", WEBHOOK, pieces, {"x-webhook-secret": SECRET}, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    assert rows(url, "SELECT body FROM archiver.events WHERE chat_id = 'chunked'") == [(body,)]


# 400, and offers of another protocol


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
@pytest.mark.parametrize("chunked", [False, True])
def test_i3_a_body_that_an_upgrade_offer_swallows_is_incomplete_and_nothing_of_it_is_kept(
    chunked: bool, protocol: str, receiver: Receiver, url: str
) -> None:
    before = counts(url)
    body = created(f"upgrading to {protocol}, {chunked}")
    offer = [("x-webhook-secret", SECRET.encode()), ("upgrade", protocol.encode()), ("connection", b"Upgrade")]
    wire = Wire(receiver.port)
    code, item = wire.post(body, offer, chunked=chunked)
    wire.close()
    assert (code, item["status"]) == (400, "incomplete")
    assert counts(url) == before
    assert receiver.post(body).json()["status"] == "stored"


@pytest.mark.parametrize(("path", "code"), [("/", 404), (WEBHOOK, 405), ("/healthz", 200)])
def test_a_websocket_offer_is_answered_as_if_it_had_not_been_made(path: str, code: int, receiver: Receiver) -> None:
    offer = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",  # RFC 6455, section 1.3
    }
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=120)
    connection.request("GET", path, headers=offer)
    assert connection.getresponse().status == code
    connection.close()
    assert receiver.post(created("after an offer")).status_code == 200


# 422


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not_json"),
        (b"\x00\xff\xfe not JSON", "not_json"),
        (b'"text"', "not_an_object"),
        (b"{}", "no_event_type"),
        (b'{"type": "chat.created"}', "no_chat_id"),
        (b'{"type": "chat.created", "chat": {"id": "a\\u0000b"}}', "unusable_id"),
        (b"[" * 100_000, "nested_too_deeply"),
    ],
)
def test_i4_what_cannot_be_read_is_quarantined_with_its_bytes_and_a_reason(
    body: bytes, reason: str, receiver: Receiver, url: str
) -> None:
    answers = [receiver.post(body) for _ in range(2)]
    assert [reply.status_code for reply in answers] == [422, 422]
    data = answers[0].json()
    assert (data["status"], data["reason"], data["detail"]) == ("quarantined", reason, events.REASONS[reason])
    assert answers[1].json() == data
    query = "SELECT body, reason, delivery_count, key_id FROM archiver.quarantine WHERE id = %s"
    assert rows(url, query, data["id"]) == [(body, reason, 2, signatures.key_id(SECRET))]


def test_i4_an_event_that_postgres_refuses_does_not_fail_its_batch(database_url: str) -> None:
    rows_refused = "ALTER TABLE archiver.messages ADD CHECK (content NOT LIKE '%poison%')"
    with psycopg.connect(database_url) as connection:
        connection.execute(rows_refused)
    bodies = [created(f"chat-{n}", f"session-{n % 3}", input="poison" if n % 7 == 3 else "good") for n in range(20)]
    with serving(database_url) as receiver:
        with ledger_locked(database_url) as release:
            senders = [begin(receiver.port, body) for body in bodies]
            until(lambda: has_read_all(receiver.port, len(bodies)), "all wait")
            release()
        for body, sender in zip(bodies, senders, strict=True):
            code, item = answer(sender)
            sender.close()
            if b"poison" in body:
                assert (code, item["reason"]) == (422, "not_storable")
                query = "SELECT body FROM archiver.quarantine WHERE id = %s"
            else:
                assert (code, item["status"]) == (200, "stored")
                query = "SELECT body FROM archiver.events WHERE id = %s"
            assert rows(database_url, query, item["id"]) == [(body,)]
        assert counts(database_url) == (17, 3)
        assert "poison" not in receiver.stderr()


# 404, 405


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/", 404),
        ("POST", "/webhooks", 404),
        ("POST", "/webhooks/callhq/more", 404),
        ("POST", f"{WEBHOOK}/", 404),  # a redirect would lose the body of whoever does not follow it
        ("GET", WEBHOOK, 405),
        ("PUT", WEBHOOK, 405),
        ("POST", "/healthz", 405),
        ("DELETE", "/metrics", 405),
    ],
)
def test_other_paths_and_methods_are_refused_in_json(method: str, path: str, code: int, receiver: Receiver) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=120)
    connection.request(method, path, headers={"x-webhook-secret": SECRET})
    reply = connection.getresponse()
    data = json.loads(reply.read())
    connection.close()
    assert (reply.status, reply.headers["content-type"]) == (code, "application/json")
    assert data["status"] == "refused"
    assert ("allow" in reply.headers) == (code == 405)


# 503


def test_i1_without_its_database_it_asks_to_come_again_and_recovers(cluster: Cluster, database_url: str) -> None:
    with serving(database_url, ARCHIVER_SPOOL="off") as receiver:
        assert receiver.post(created("before")).status_code == 200
        with database_gone(cluster, database_url):
            for _ in range(2):
                reply = receiver.post(created("meanwhile"))
                assert (reply.status_code, reply.json()["status"]) == (503, "unavailable")
                assert int(reply.headers["retry-after"]) > 0
            assert receiver.get("/healthz").json() == {"status": "alive"}
            ready = receiver.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
            assert "unavailable" in ready.json()["database"]
            assert int(ready.headers["retry-after"]) > 0
            assert receiver.metric('archiver_received_total{reason="",status="unavailable"}') == 2
        until(lambda: receiver.get("/readyz").status_code == 200, "ready again")
        until(lambda: receiver.post(created("meanwhile")).status_code == 200, "receiving again")
        assert deliveries_of(database_url, "before") == [1]
        assert deliveries_of(database_url, "meanwhile") == [1]


def test_connections_lost_while_idle_fail_no_webhook_and_no_readiness(database_url: str) -> None:
    lose = (
        "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'callhq-archiver'"
    )
    with serving(database_url) as receiver:
        assert receiver.post(created("before")).status_code == 200
        assert set(rows(database_url, lose)) == {(True,)}  # the writer's, readiness's own, and those of its duties
        reply = receiver.post(created("after"))
        assert (reply.status_code, reply.json()["status"]) == (200, "stored")
        assert receiver.get("/readyz").status_code == 200
    assert deliveries_of(database_url, "after") == [1]


def test_it_is_not_ready_on_a_schema_that_is_not_its_own(database_url: str) -> None:
    with (
        serving(database_url, ARCHIVER_SPOOL="off") as receiver,
        psycopg.connect(database_url, autocommit=True) as connection,
    ):
        connection.execute("UPDATE archiver.schema_version SET version_num = 'future'")
        ready = receiver.get("/readyz")
        assert ready.status_code == 503
        assert "upgrade callhq-archiver" in ready.json()["database"]
        connection.execute("DELETE FROM archiver.schema_version")
        assert "archiver migrate" in receiver.get("/readyz").json()["database"]


def test_readyz_has_reasons_alone_and_the_log_has_the_places(
    cluster: Cluster, database_url: str, tmp_path: Path
) -> None:
    home = tmp_path / "a home of secrets"
    with serving(database_url, ARCHIVER_HOME=str(home)) as receiver:
        place = parse_url(database_url)
        secret = [str(place.database), *map(str, place.query.values()), str(place.username), str(home)]
        result = []
        with psycopg.connect(database_url) as connection:
            connection.execute("DELETE FROM archiver.schema_version")
        result.append(receiver.get("/readyz").text)
        with database_gone(cluster, database_url):
            result.append(receiver.get("/readyz").text)
        (home / "spool").rename(tmp_path / "away")
        (home / "spool").write_bytes(b"")
        result.append(receiver.get("/readyz").text)
        for each in result:
            assert json.loads(each)["database"] != "ready"
            assert not [part for part in secret if part in each], each
        assert "archiver migrate" in result[0]
        assert "unavailable" in result[1]
        assert "ARCHIVER_HOME" in json.loads(result[2])["spool"]
        log = receiver.stderr()
        assert all(part in log for part in (str(place.database), str(home / "spool")))


def test_it_is_not_ready_where_it_may_only_read(cluster: Cluster, database_url: str) -> None:
    name = parse_url(database_url).database
    with serving(database_url, ARCHIVER_SPOOL="off") as receiver:
        cluster.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        cluster.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        until(lambda: receiver.get("/readyz").json()["database"] == "read-only", "it sees that it may only read")
        assert receiver.get("/readyz").status_code == 503
        assert receiver.post(created()).status_code == 503


def test_i12_a_full_queue_asks_to_come_again(database_url: str) -> None:
    with (
        serving(database_url, ARCHIVER_QUEUE_EVENTS="1") as receiver,
        ThreadPoolExecutor(1) as thread,
        ledger_locked(database_url) as release,
    ):
        first = thread.submit(receiver.post, created("first"))
        until(lambda: receiver.metric("archiver_queue_events") == 1, "the first waits in the queue")
        second = receiver.post(created("second"))
        assert (second.status_code, second.json()["status"]) == (503, "overloaded")
        assert int(second.headers["retry-after"]) > 0
        assert receiver.get("/readyz").status_code == 200
        release()
        assert first.result().json()["status"] == "stored"
        assert receiver.post(created("second")).json()["status"] == "stored"
        assert receiver.metric("archiver_queue_events") == 0
        assert receiver.metric("archiver_queue_bytes") == 0
        assert receiver.metric('archiver_received_total{reason="",status="overloaded"}') == 1


def test_i12_bytes_fill_the_queue_too_but_one_event_always_may(database_url: str) -> None:
    with (
        serving(database_url, ARCHIVER_QUEUE_BYTES="100") as receiver,
        ThreadPoolExecutor(1) as thread,
        ledger_locked(database_url) as release,
    ):
        first = thread.submit(receiver.post, created("first"))
        until(lambda: receiver.metric("archiver_queue_bytes") == len(created("first")), "the first waits")
        assert receiver.post(created("second")).status_code == 503
        release()
        assert first.result().json()["status"] == "stored"


# Metrics and logs


def test_metrics_are_served_while_another_process_creates_its_file(database_url: str, tmp_path: Path) -> None:
    with serving(database_url, "--workers", "2", ARCHIVER_HOME=str(tmp_path)) as receiver:
        receiver.post(created("a"))
        (folder,) = (tmp_path / "metrics").iterdir()
        (folder / "counter_1.db").touch()
        result = receiver.get("/metrics")
        assert result.status_code == 200
        assert 'archiver_received_total{reason="",status="stored"} 1.0' in result.text


def test_metrics_count_each_outcome(database_url: str) -> None:
    before = time.time()
    with serving(database_url) as receiver:
        assert "\narchiver_last_event_timestamp_seconds" not in receiver.get("/metrics").text
        receiver.post(created("a"))
        receiver.post(created("a"))
        receiver.post(b"{}")
        receiver.post(b"{}", {})
        receiver.post(event("other", 1, {"id": "1"}))
        result = receiver.get("/metrics")
        assert result.headers["content-type"].startswith("text/plain; version=0.0.4")
        counted = {
            ("stored", ""): 1,
            ("duplicate", ""): 1,
            ("ignored", ""): 1,
            ("quarantined", "no_event_type"): 1,
            ("unauthenticated", "missing_header"): 1,
        }
        for (status, reason), number in counted.items():
            series = f'archiver_received_total{{reason="{reason}",status="{status}"}}'
            assert (series, receiver.metric(series)) == (series, number)
        assert receiver.metric("archiver_duplicates_total") == 1
        assert receiver.metric("archiver_batch_events_count") == 4
        assert receiver.metric("archiver_batch_events_sum") == 4
        assert receiver.metric("archiver_commit_seconds_count") == 4
        assert 0 < receiver.metric("archiver_commit_seconds_sum") < 60
        assert "archiver_queue_events 0.0" in result.text
        assert before <= receiver.metric("archiver_last_event_timestamp_seconds") <= time.time()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_time_of_the_last_event_survives_a_restart(database_url: str, workers: str) -> None:
    name = "archiver_last_event_timestamp_seconds"
    with serving(database_url) as receiver:
        receiver.post(created("a"))
        known = receiver.metric(name)
    with serving(database_url, "--workers", workers) as receiver:
        until(lambda: receiver.metric(name) > 0, "the time is read from the ledger")
        assert receiver.metric(name) == pytest.approx(known, abs=0.001)


def test_no_content_secret_or_body_reaches_the_logs(cluster: Cluster, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("ALTER TABLE archiver.chats ADD CHECK (external_id <> 'MARKER-refused')")
    with serving(database_url) as receiver:
        receiver.post(created("a", input="MARKER-input"))
        receiver.post(created("a", input="MARKER-revised", updatedAt="2024-01-16T00:00:00Z"))
        receiver.post(created("b", externalChatId="MARKER-refused"))
        receiver.post(b'{"MARKER-malformed": ')
        receiver.post(created("c"), {"x-webhook-secret": "MARKER-guess"})
        receiver.post(created("c"), {"x-webhook-secret": SECRET, "x-other": "MARKER-header"})
        raw = socket.create_connection(("127.0.0.1", receiver.port), 30)
        raw.sendall(b"MARKER-line\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")
        raw.close()
        with database_gone(cluster, database_url):
            assert receiver.post(created("d", input="MARKER-lost")).json()["status"] == "spooled"
        assert receiver.stop() == 0
        logged = receiver.stderr()
    assert "quarantined" in logged
    assert "database unavailable" in logged
    assert "MARKER" not in logged
    assert SECRET not in logged
    for line in logged.splitlines():
        assert {"event", "level", "timestamp"} <= json.loads(line).keys()


# Clients that go away


def test_i3_a_client_that_leaves_within_its_body_stores_nothing(receiver: Receiver, url: str) -> None:
    body = created("half")
    series = 'archiver_received_total{reason="",status="disconnected"}'
    before, stored = receiver.metric(series), counts(url)
    begin(receiver.port, body[:-1], len(body)).close()
    until(lambda: receiver.metric(series) == before + 1, "the receiver saw it go")
    assert counts(url) == stored


def test_i3_clients_that_leave_before_the_answer_disturb_nothing(receiver: Receiver, url: str) -> None:
    bodies = [created(f"impatient-{n}") for n in range(5)]
    with ledger_locked(url) as release:
        short_timeouts = [begin(receiver.port, body) for body in bodies]
        patient = begin(receiver.port, created("patient"))
        until(lambda: has_read_all(receiver.port, 6), "all wait")
        for connection in short_timeouts:
            connection.close()
        release()
    assert answer(patient)[1]["status"] == "stored"
    patient.close()
    for n, body in enumerate(bodies):
        assert receiver.post(body).json()["status"] == "duplicate"
        assert deliveries_of(url, f"impatient-{n}") == [2]


def test_a_body_that_comes_byte_by_byte_is_stored(receiver: Receiver, url: str) -> None:
    body = created("slow")
    connection = begin(receiver.port, b"", len(body))
    for byte in body:
        connection.sendall(bytes([byte]))
    assert answer(connection)[1]["status"] == "stored"
    connection.close()
    assert rows(url, "SELECT body FROM archiver.events WHERE chat_id = 'slow'") == [(body,)]


# Fuzz

FUZZ_LIMIT = 4_000
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)
times = st.sampled_from(["2024-01-15T09:30:00Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-14:00", 0, -1, 1e300])
near_chats = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["c-1", "c-2", 7, 2**70, True, "", "\ud800", "x" * 600]) | scalars,
        "sessionId": st.sampled_from(["s-1", "s-2", 3]) | documents,
        "input": st.text(max_size=30) | documents,
        "output": st.lists(st.fixed_dictionaries({"role": documents, "content": documents}), max_size=4) | documents,
        "assistantId": scalars,
        "status": scalars,
        "cost": st.sampled_from([0.5, "0.25", "1e5", "NaN", "-Infinity", 10**30]) | documents,
        "createdAt": times | documents,
        "updatedAt": times | documents,
        "externalChatId": documents,
        "assistantOverrides": st.fixed_dictionaries({"variableValues": documents}) | documents,
    },
)
near_events = st.fixed_dictionaries(
    {"type": st.sampled_from(["chat.created", "chat.created", "chat.deleted", "chat.renamed"]) | documents},
    optional={
        "timestamp": times | documents,
        "chat": near_chats | documents,
        "data": near_chats | documents,
        "chatId": scalars,
        "sessionId": scalars,
        "assistant": documents,
        "session": documents,
    },
)
bodies = st.one_of(
    st.binary(max_size=200),
    documents.map(lambda document: json.dumps(document).encode()),
    near_events.map(lambda document: json.dumps(document).encode()),
    near_events.map(lambda document: json.dumps({"message": document}).encode()),
    st.builds(created, st.sampled_from(["c-1", "c-2", "c-3"]), st.sampled_from(["s-1", "s-2", None])),
    st.builds(lambda extra: padded("long", FUZZ_LIMIT + extra), st.integers(-1, 2)),
)
TOKEN = "!#$%&'*+-.^_`|~" + string.digits + string.ascii_letters
# What frames the message itself (its length, its connection) is the HTTP server's to refuse.
header_names = st.sampled_from(
    ["content-type", "content-encoding", "expect", "x-forwarded-for", "x-forwarded-proto", "forwarded", "cookie",
     "authorization", "x-webhook-secret", "x-signature", "accept", "range", "if-match", "x-http-method-override"]
) | st.text(TOKEN, min_size=1, max_size=12).map(lambda name: f"x-{name}")  # fmt: skip
header_values = st.sampled_from([b"100-continue", b"gzip", SECRET.encode(), b"application/x-www-form-urlencoded"]) | (
    st.lists(st.integers(0x20, 0xFF).filter(lambda byte: byte != 0x7F), max_size=30).map(bytes)
)
headers = st.lists(st.tuples(header_names, header_values), max_size=4)


class Wire:
    """A keep-alive connection on which a test writes what it likes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: socket.socket | None = None

    def post(self, body: bytes, lines: list[tuple[str, bytes]], *, chunked: bool) -> tuple[int, Any]:
        if self._connection is None:
            self._connection = socket.create_connection(("127.0.0.1", self._port), 30)
        head = [f"POST {WEBHOOK} HTTP/1.1".encode(), b"host: archiver"]
        head += [name.encode() + b": " + value for name, value in lines]
        if chunked:
            head.append(b"transfer-encoding: chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:9], body[9:]) if piece)
            body += b"0\r\n\r\n"
        else:
            head.append(b"content-length: %d" % len(body))
        self._connection.sendall(b"\r\n".join(head) + b"\r\n\r\n" + body)
        response = http.client.HTTPResponse(self._connection)
        response.begin()
        data = json.loads(response.read())
        if response.will_close or response.status == 413:
            self.close()
        return response.status, data

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def test_i4_every_request_is_answered_and_every_authentic_body_is_kept_byte_for_byte(
    cluster: Cluster, database_url: str
) -> None:
    with (
        serving(database_url, ARCHIVER_MAX_BODY=str(FUZZ_LIMIT)) as receiver,
        psycopg.connect(database_url, autocommit=True) as database,
    ):
        wire = Wire(receiver.port)
        seen = set()

        def kept(table: str, row_id: int) -> bytes | None:
            row = database.execute(f"SELECT body FROM archiver.{table} WHERE id = %s", (row_id,)).fetchone()
            return bytes(row[0]) if row else None

        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(body=bodies, lines=headers, authentic=st.integers(0, 9).map(bool), chunked=st.booleans())
        @example(created("twice"), [], True, False)
        @example(created("twice"), [], True, True)
        @example(b'{"type": "chat.renamed", "chat": {"id": "renamed"}}', [], True, False)
        def check(body: bytes, lines: list[tuple[str, bytes]], authentic: bool, chunked: bool) -> None:
            if authentic:
                lines = [line for line in lines if line[0] != "x-webhook-secret"]
                lines.append(("X-Webhook-Secret", SECRET.encode()))
            status, item = wire.post(body, lines, chunked=chunked)
            seen.add((status, item["status"]))
            if len(body) > FUZZ_LIMIT:
                assert status == 413
            elif not authentic:
                proven = [value.strip(b" ") for name, value in lines if name == "x-webhook-secret"]
                assert status == 401 or proven == [SECRET.encode()]
            elif status == 422:
                assert item["reason"] in events.REASONS
                assert kept("quarantine", item["id"]) == body
            elif item["status"] == "duplicate":
                assert status == 200
                assert kept("events", item["id"]) is not None
            else:
                assert (status, item["status"]) in {(200, "stored"), (200, "ignored")}
                assert kept("events", item["id"]) == body

        try:
            check()
        finally:
            wire.close()
        assert {(413, "too_large"), (401, "unauthenticated"), (422, "quarantined"), (200, "stored")} <= seen
        assert {(200, "duplicate"), (200, "ignored")} <= seen
        assert '"error"' not in receiver.stderr()


def test_many_connections_at_once_are_all_answered(receiver: Receiver, url: str) -> None:
    start = threading.Barrier(40)

    def send(number: int) -> int:
        start.wait(120)
        connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=120)
        connection.request("POST", WEBHOOK, created(f"at-once-{number}"), {"x-webhook-secret": SECRET})
        status = connection.getresponse().status
        connection.close()
        return status

    with ThreadPoolExecutor(40) as threads:
        assert set(threads.map(send, range(40))) == {200}
    assert rows(url, "SELECT count(*) FROM archiver.chats WHERE chat_id LIKE %s", "at-once-%") == [(40,)]
