"""Floods of bad clients, and restarts under load: honest senders are served, and memory stays bounded (I12)."""

import http.client
import itertools
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from tests.support import servers
from tests.support.load import assert_archived, body_of
from tests.support.payloads import created
from tests.support.ports import free_port
from tests.support.receivers import Receiver, deliver, serving
from tests.support.sockets import connect, delivery, head, read, read_all, resident
from tests.support.waiting import until

pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)
MEGABYTE = 1_048_576
HONEST = 20


@contextmanager
def memory_bounded(receiver: Receiver, limit: int) -> Iterator[Callable[[], None]]:
    """That the process holds no more than `limit` bytes more, whenever the function given is called and at the
    end."""
    for number in range(HONEST):
        assert receiver.post(created(f"warm-{number}")).status_code == 200
    before = resident(receiver.process.pid)

    def look() -> None:
        grown = resident(receiver.process.pid) - before
        print(f"grown by {grown / MEGABYTE:.1f} MiB")
        assert grown < limit

    yield look
    look()


def assert_honest_are_served(receiver: Receiver) -> None:
    for number in range(HONEST):
        connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=120)
        assert deliver(connection, created(f"honest-{number}"))[0] == 200
        connection.close()


def test_i12_slowloris_leaves_honest_senders_served(database_url: str) -> None:
    with (
        serving(database_url, ARCHIVER_CLIENT_TIMEOUT="20") as receiver,
        memory_bounded(receiver, 40 * MEGABYTE) as look,
        ExitStack() as stack,
    ):
        slow = [stack.enter_context(connect(receiver.port, head()[: 20 + n % 20])) for n in range(500)]
        until(lambda: receiver.metric("archiver_connections") > 500, "all are open")
        assert_honest_are_served(receiver)
        look()
        assert {read(connection).status for connection in slow} == {408}
        until(lambda: receiver.metric("archiver_connections") < 10, "all are closed")


def test_i12_endless_headers_fill_no_memory(database_url: str) -> None:
    with serving(database_url) as receiver, memory_bounded(receiver, 60 * MEGABYTE) as look:

        def flood(number: int) -> None:
            line = b"x-%d: " % number + b"x" * (60_000 if number % 2 else 50) + b"\r\n"
            with (
                connect(receiver.port, b"GET / HTTP/1.1\r\n") as connection,
                pytest.raises((BrokenPipeError, ConnectionResetError)),
            ):
                until(lambda: connection.sendall(line * 10), "it is cut off")

        with ThreadPoolExecutor(20) as threads:
            floods = list(threads.map(flood, range(20)))
        assert len(floods) == 20
        look()
        assert_honest_are_served(receiver)


def test_i12_unread_answers_fill_no_memory(database_url: str) -> None:
    """Few at a time, so that it is not their number for which they are cut off."""
    ask = head(path="/metrics", method="GET") * 8
    with (
        serving(database_url, ARCHIVER_CLIENT_TIMEOUT="1") as receiver,
        memory_bounded(receiver, 40 * MEGABYTE) as look,
        ExitStack() as stack,
    ):
        rude = [stack.enter_context(connect(receiver.port)) for _ in range(30)]
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and rude:
            _, writable, _ = select.select([], rude, [], 0.1)
            for connection in writable:
                try:
                    connection.send(ask, socket.MSG_DONTWAIT)
                except OSError:
                    rude.remove(connection)
            look()
        assert not rude, "all were cut off"
        assert_honest_are_served(receiver)


def test_i12_bodies_under_way_fill_no_memory(database_url: str) -> None:
    """From senders whose headers promise a signature, so that the body must be read."""
    now = int(time.time())
    proof = [f"x-timestamp: {now}", f"x-signature: {'0' * 64}", "content-length: 1000000"]
    settings = {"ARCHIVER_WEBHOOK_SCHEME": "hmac", "ARCHIVER_QUEUE_BYTES": str(8 * MEGABYTE)}
    with (
        serving(database_url, **settings) as receiver,
        ExitStack() as stack,
    ):
        before = resident(receiver.process.pid)
        held = [stack.enter_context(connect(receiver.port, head(*proof) + b"x" * 900_000)) for _ in range(60)]
        series = 'archiver_received_total{reason="",status="overloaded"}'
        until(lambda: receiver.metric(series) >= 45, "most are refused")
        assert resident(receiver.process.pid) - before < 40 * MEGABYTE
        print(f"grown by {(resident(receiver.process.pid) - before) / MEGABYTE:.1f} MiB")
        for connection in held:
            connection.close()
        until(lambda: receiver.metric("archiver_connections") < 10, "all are closed")
        whole = head(*proof[:2], "content-length: 200000") + b"x" * 200_000
        with connect(receiver.port, whole[:-1]) as connection:  # room again: it is waited for
            connection.sendall(whole[-1:])
            assert read(connection).status == 401


def test_i12_more_connections_than_allowed_cost_no_more(database_url: str) -> None:
    with (
        serving(database_url, ARCHIVER_MAX_CONNECTIONS="100") as receiver,
        memory_bounded(receiver, 40 * MEGABYTE),
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(connect(receiver.port)) for _ in range(600)]
        assert all(read_all(connection) == b"" for connection in clients[:540])  # given up for those after them
        until(lambda: receiver.metric("archiver_connections") < 60, "one address has half of them")
        assert_honest_are_served(receiver)


@pytest.mark.parametrize(
    "sent",
    [
        head("content-length: 5") + b'{"type": "chat.created"}',
        head("content-length: -1") + b"{}",
        head("content-length: 2", "content-length: 3") + b"{}",
        head("content-length: 2", "transfer-encoding: chunked") + b"{}",
        head("transfer-encoding: chunked") + b"xyz\r\n{}",
        head("transfer-encoding: chunked") + b"fffffffffffffffff\r\n{}",
        head() + b"{}",
        delivery(b"{}") + b"\x00\x01\x02\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_a_wrong_content_length_closes_the_connection_and_affects_no_other(sent: bytes, database_url: str) -> None:
    with serving(database_url) as receiver:
        with connect(receiver.port, sent) as connection:
            answers = read_all(connection)
        assert answers.startswith(b"HTTP/1.1 4")
        assert b"connection: close" in answers or answers.count(b"HTTP/1.1") == 1
        assert_honest_are_served(receiver)
        assert "Traceback" not in receiver.stderr()


class Balancer:
    """Passes each connection to one of two ports in turn; where that refuses, to the other. Retries nothing else."""

    def __init__(self, ports: list[int]) -> None:
        self._ports, self._turns = ports, itertools.count()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client, self._connect() as server:
            while True:
                readable, _, _ = select.select([client, server], [], [])
                for one in readable:
                    try:
                        data = one.recv(65_536)
                    except OSError:
                        return
                    if not data:
                        return
                    (server if one is client else client).sendall(data)

    def _connect(self) -> socket.socket:
        turn = next(self._turns) % 2
        for port in (self._ports[turn], self._ports[1 - turn]):
            try:
                return socket.create_connection(("127.0.0.1", port))
            except ConnectionRefusedError:
                continue
        raise AssertionError("nobody listens")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_receivers_restarted_in_turn_fail_no_request(database_url: str) -> None:
    """Half of the senders keep their connection, half open one for each request."""
    numbers, stop, codes = itertools.count(), threading.Event(), []

    def send_requests(port: int, keeps: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while not stop.is_set():
            number = next(numbers)
            code, _ = deliver(connection, body_of(number))
            codes.append((number, code))
            if not keeps:
                connection.close()
        connection.close()

    with ExitStack() as stack:
        starts = [("--port", str(free_port()), "--workers", str(n)) for n in (1, 2)]
        receivers = [stack.enter_context(serving(database_url, *options)) for options in starts]
        balancer = Balancer([receiver.port for receiver in receivers])
        with ThreadPoolExecutor(8) as threads:
            hammers = [threads.submit(send_requests, balancer.port, n % 2 == 0) for n in range(8)]
            try:
                for receiver, options in zip(receivers, starts, strict=True):
                    seen = len(codes)
                    until(lambda seen=seen: len(codes) > seen + 100, "requests pass")  # type: ignore[misc]  # bound on purpose
                    assert receiver.stop() == 0
                    stack.enter_context(serving(database_url, *options))
                seen = len(codes)
                until(lambda: len(codes) > seen + 100, "requests pass")
            finally:
                stop.set()
            for each in hammers:
                each.result(120)
        balancer.close()
        assert {code for _, code in codes} == {200}
    assert_archived(database_url, {number for number, _ in codes})
