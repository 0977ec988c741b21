"""Limits of one client (I12): each limit, just below it and just above, on a real `archiver serve`."""

import http.client
import json
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support import servers
from tests.support.payloads import SECRET, created
from tests.support.receivers import Receiver, has_read_all, serving
from tests.support.sockets import connect, delivery, head, is_ended, read, read_all
from tests.support.waiting import until
from tests.support.webhooks import ledger_locked, rows

pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)
TIMEOUT = 3  # seconds


@pytest.fixture(scope="module")
def receiver(url: str) -> Iterator[Receiver]:
    with serving(url) as receiver:
        yield receiver


@pytest.fixture(scope="module")
def hasty(url: str) -> Iterator[Receiver]:
    """A receiver that waits for its clients for a short time."""
    with serving(url, ARCHIVER_CLIENT_TIMEOUT=str(TIMEOUT)) as receiver:
        yield receiver


def refused(receiver: Receiver, reason: str) -> float:
    """Asked on a connection of its own: one that is kept would be overdue by then."""
    lines = until(lambda: metrics(receiver), "the receiver answers")
    series = f'archiver_connections_refused_total{{reason="{reason}"}} '
    return sum(float(line.removeprefix(series)) for line in lines if line.startswith(series))


def metrics(receiver: Receiver) -> list[str]:
    """Their lines; none where the receiver did not wait for the request, because this process stood still."""
    with (
        suppress(http.client.HTTPException, ConnectionError),
        connect(receiver.port, head("connection: close", path="/metrics", method="GET")) as connection,
    ):
        answer = read(connection)
        return answer.content.decode().splitlines() if answer.status == 200 else []
    return []


# Answers


def test_an_answer_arrives_in_one_piece(receiver: Receiver) -> None:
    with connect(receiver.port) as connection:
        for number in range(50):
            connection.sendall(delivery(created(f"piece {number}")))
            assert connection.recv(65_536).endswith(b"}"), "the head came alone"


def test_an_answer_without_a_body_arrives(receiver: Receiver) -> None:
    with connect(receiver.port) as connection:
        for _ in range(2):
            connection.sendall(head(path="/healthz", method="HEAD"))
            answer = connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 ")
            assert answer.endswith(b"\r\n\r\n")


# Headers


def test_i12_headers_of_almost_the_limit_are_read_and_larger_ones_refused(receiver: Receiver) -> None:
    before = refused(receiver, "headers_too_large")
    body = created("long headers")
    with connect(receiver.port, delivery(body, *[f"x-{n}: {'x' * 1000}" for n in range(64)])) as connection:
        assert read(connection).status == 200
    with connect(receiver.port, delivery(body, *[f"x-{n}: {'x' * 1000}" for n in range(65)])) as connection:
        answer = read(connection)
        assert (answer.status, answer.reason) == (431, "headers_too_large")
        assert answer.headers["connection"] == "close"
        assert is_ended(connection)
    assert refused(receiver, "headers_too_large") == before + 1


@pytest.mark.parametrize("start", [f"GET /{'x' * 100_000}", f"GET / HTTP/1.1\r\nx: {'x' * 100_000}"])
def test_i12_headers_are_too_large_before_they_are_complete(start: str, receiver: Receiver) -> None:
    with connect(receiver.port, start.encode()) as connection:
        assert read(connection).status == 431


def test_i12_a_body_before_the_headers_does_not_count_as_theirs(receiver: Receiver) -> None:
    both = delivery(created("a", input="x" * 200_000)) + delivery(created("b"), f"x: {'x' * 50_000}")
    with connect(receiver.port, both[:-30_000]) as connection:
        assert read(connection).status == 200
        connection.sendall(both[-30_000:])
        assert read(connection).status == 200


@pytest.mark.parametrize("sent", [b"G", b"GET /healthz HTTP/1.1\r\nhost: x\r\n"])
def test_i12_headers_must_be_complete_in_time(sent: bytes, hasty: Receiver) -> None:
    before = refused(hasty, "slow_headers")
    started = time.monotonic()
    with connect(hasty.port, sent) as connection:
        answer = read(connection)
        assert (answer.status, answer.reason) == (408, "slow_headers")
        assert is_ended(connection)
    assert time.monotonic() - started >= TIMEOUT
    assert refused(hasty, "slow_headers") == before + 1


def test_i12_a_silent_client_gets_no_response(hasty: Receiver) -> None:
    before = refused(hasty, "silent")
    with connect(hasty.port) as connection:
        assert is_ended(connection)
    assert refused(hasty, "silent") == before + 1


def test_i12_a_connection_kept_alive_ends_when_it_is_not_used(hasty: Receiver) -> None:
    with connect(hasty.port, head(path="/healthz", method="GET")) as connection:
        assert read(connection).status == 200
        assert is_ended(connection)


# Bodies


@pytest.mark.parametrize("framing", ["content-length: 100", "transfer-encoding: chunked"])
def test_i12_a_body_must_be_complete_in_time(framing: str, hasty: Receiver) -> None:
    before = refused(hasty, "slow_body")
    started = time.monotonic()
    with connect(hasty.port, head(framing) + b"1\r\n") as connection:
        answer = read(connection)
        assert (answer.status, answer.reason) == (408, "slow_body")
        assert is_ended(connection)
    assert time.monotonic() - started >= 3 * TIMEOUT
    assert refused(hasty, "slow_body") == before + 1


def test_a_body_that_keeps_coming_has_more_time(hasty: Receiver) -> None:
    body = created("long", input="x" * 900_000)
    whole = delivery(body)
    started = time.monotonic()
    with connect(hasty.port) as connection:
        while whole:
            connection.sendall(whole[:90_000])
            whole = whole[90_000:]
            threading.Event().wait(0.45 * TIMEOUT)  # as a slow line would
        assert read(connection).status == 200
    assert time.monotonic() - started > 4 * TIMEOUT


def test_trailers_are_no_headers_and_are_not_kept(receiver: Receiver) -> None:
    chunks = b"2\r\n{}\r\n0\r\n"
    proof = f"x-webhook-secret: {SECRET}\r\n".encode()
    with connect(receiver.port, head("transfer-encoding: chunked") + chunks + proof + b"\r\n") as connection:
        assert read(connection).status == 422
    endless = b"".join(b"x-%d: %b\r\n" % (n, b"x" * 1000) for n in range(100))
    with connect(receiver.port, head("transfer-encoding: chunked") + chunks + endless) as connection:
        assert read(connection).status == 431


def test_i12_the_bodies_being_read_are_bounded_in_sum(database_url: str) -> None:
    body = created("first", input="x" * 100_000)
    with serving(database_url, ARCHIVER_QUEUE_BYTES="150000") as receiver:
        with connect(receiver.port, delivery(body)[:-20]) as first:
            second = connect(receiver.port, delivery(body)[:-20])
            answer = read(second)
            assert (answer.status, json.loads(answer.content)["status"]) == (503, "overloaded")
            assert int(answer.headers["retry-after"]) > 0
            second.close()
            first.sendall(delivery(body)[-20:])
            assert read(first).status == 200
        with connect(receiver.port, delivery(body)[:-20]) as third:
            until(lambda: has_read_all(receiver.port, 1), "it is being read")
            third.sendall(delivery(body)[-20:])
            assert read(third).status == 200


# Offers of another protocol


def test_an_upgrade_offer_leaves_no_advice_in_the_log_and_ends_the_connection(receiver: Receiver) -> None:
    offer = head("connection: upgrade", "upgrade: websocket", path="/healthz", method="GET")
    with connect(receiver.port, offer + head(path="/healthz", method="GET")) as connection:
        answer = read(connection)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        connection.sendall(head(path="/healthz", method="GET"))
        assert is_ended(connection)
    logged = receiver.stderr().lower()
    assert "upgrade" not in logged
    assert "websocket" not in logged


# Many requests, many connections


def test_requests_that_wait_are_answered_in_order(receiver: Receiver) -> None:
    bodies = [created(f"waiting {n}") for n in range(17)]
    last = delivery(created("the last"), "connection: close")
    with connect(receiver.port, b"".join(map(delivery, bodies[:-1])) + last) as connection:
        answers = read_all(connection)
    ids = [int(item) for item in re.findall(rb'"stored","id":(\d+)', answers)]
    assert len(ids) == 17
    assert ids == sorted(ids)


def test_i12_too_many_waiting_requests_end_the_connection_once_the_others_are_answered(
    receiver: Receiver, url: str
) -> None:
    before = refused(receiver, "too_many_waiting")
    limiter = b"".join(delivery(created(f"crowding {n}")) for n in range(40))
    with ledger_locked(url) as release, connect(receiver.port, limiter) as connection:
        until(lambda: refused(receiver, "too_many_waiting") == before + 1, "it is refused")
        release()
        assert read_all(connection).count(b'"stored"') == 17


def test_i12_a_client_that_reads_no_responses_is_disconnected(hasty: Receiver) -> None:
    before = refused(hasty, "not_reading")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(120)
    connection.connect(("127.0.0.1", hasty.port))
    with connection:

        def ask() -> bool:
            try:
                # One at a time, for the next line waits for a response: many that wait would be refused as such.
                connection.send(head(path="/metrics", method="GET"), socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except OSError:
                return True
            return refused(hasty, "not_reading") == before + 1

        until(ask, "it is cut off")
    until(lambda: refused(hasty, "not_reading") == before + 1, "and counted")


def test_i12_a_connection_over_the_limit_gets_retry_after(database_url: str) -> None:
    with serving(database_url, ARCHIVER_MAX_CONNECTIONS="4") as receiver, ledger_locked(database_url) as release:
        others = [connect(receiver.port, delivery(created(f"other {number}"))) for number in range(4)]
        until(lambda: has_read_all(receiver.port, len(others)), "all of them are being answered")
        with connect(receiver.port, delivery(created("a"))) as connection:
            answer = read(connection)
            assert (answer.status, answer.reason, answer.headers["connection"]) == (503, "too_many", "close")
            assert int(answer.headers["retry-after"]) > 0
            assert is_ended(connection)
        release()
        for other in others:
            assert read(other).status == 200
            other.close()
        with connect(receiver.port, delivery(created("a"))) as connection:
            assert read(connection).status == 200


@pytest.mark.parametrize("sent", [b"", b"POST /webhooks/callhq HTTP/1.1\r\n", head("content-length: 100") + b"{"])
def test_i12_connections_that_wait_give_way_to_a_new_one(database_url: str, sent: bytes) -> None:
    with serving(database_url, ARCHIVER_MAX_CONNECTIONS="20") as receiver, ExitStack() as stack:
        honest = [stack.enter_context(connect(receiver.port)) for _ in range(5)]
        for number, connection in enumerate(honest):
            connection.sendall(delivery(created(f"before {number}")))
            assert read(connection).status == 200
        idle = [
            stack.enter_context(connect(receiver.port, sent, source=f"127.0.0.{2 + number % 4}"))
            for number in range(200)
        ]
        for number, connection in enumerate(
            [*honest, *(stack.enter_context(connect(receiver.port)) for _ in range(5))]
        ):
            connection.sendall(delivery(created(f"after {number}")))
            assert read(connection).status == 200
        assert all(is_ended(connection) for connection in idle[:100])
        assert receiver.metric('archiver_connections_refused_total{reason="given_up"}') > 100


def test_i12_one_address_has_a_part_of_the_connections(database_url: str) -> None:
    with serving(database_url, ARCHIVER_MAX_CONNECTIONS="20") as receiver, ExitStack() as stack:
        other = stack.enter_context(connect(receiver.port, source="127.0.0.3"))
        for _ in range(30):
            stack.enter_context(connect(receiver.port, source="127.0.0.2"))
        until(lambda: receiver.metric("archiver_connections") <= 12, "the oldest of that address have gone")
        other.sendall(delivery(created("other")))
        assert read(other).status == 200


@pytest.mark.parametrize(
    ("version", "lines"),
    [
        ("1.0", ["transfer-encoding: chunked"]),
        ("1.1", ["transfer-encoding: chunked", "transfer-encoding: chunked"]),
        ("1.1", ["transfer-encoding: identity", "transfer-encoding: chunked"]),
        ("1.1", ["transfer-encoding: chunked, chunked"]),
        ("1.1", ["transfer-encoding: gzip, chunked"]),
        ("1.1", ["transfer-encoding: chunked", "content-length: 5"]),
        ("1.1", ["content-length: 5", "transfer-encoding: chunked"]),
        ("1.1", ["transfer-encoding: identity"]),
        ("1.1", ["transfer-encoding: xchunked"]),
    ],
)
def test_a_request_whose_end_a_proxy_may_see_elsewhere_is_refused(
    receiver: Receiver, url: str, version: str, lines: list[str]
) -> None:
    body = created(f"doubtful {version} {lines}")
    request = head(*lines).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    chunks = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    with connect(receiver.port, request + chunks) as connection:
        answer = read(connection)
        assert (answer.status, answer.reason, answer.headers["connection"]) == (400, "malformed", "close")
        assert is_ended(connection)
    assert rows(url, "SELECT count(*) FROM archiver.events WHERE starts_with(chat_id, 'doubtful')") == [(0,)]


@pytest.mark.parametrize(("version", "hosts"), [("1.1", 0), ("1.1", 2), ("1.0", 2), ("2.0", 1)])
def test_a_request_with_an_invalid_host_or_version_is_refused(receiver: Receiver, version: str, hosts: int) -> None:
    """RFC 9112, 3.2: a signature over `{url}` must not depend on which of two hosts is read."""
    body = created(f"host {version} {hosts}")
    request = delivery(body).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    with connect(receiver.port, request.replace(b"host: archiver\r\n", b"host: archiver\r\n" * hosts)) as connection:
        answer = read(connection)
        assert (answer.status, answer.reason, answer.headers["connection"]) == (400, "malformed", "close")
        assert is_ended(connection)


def test_i12_as_many_files_as_needed_are_allowed(database_url: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    try:
        with serving(database_url, "--workers", "2", ARCHIVER_MAX_CONNECTIONS="700") as receiver:
            for pid in [receiver.process.pid, *workers(receiver)]:
                limits = Path(f"/proc/{pid}/limits").read_text()
                assert int(limits.partition("Max open files")[2].split()[0]) > 700
            assert "file limit too low" not in receiver.stderr()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def workers(receiver: Receiver) -> list[int]:
    result = Path(f"/proc/{receiver.process.pid}/task/{receiver.process.pid}/children").read_text().split()
    return [int(pid) for pid in result if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
