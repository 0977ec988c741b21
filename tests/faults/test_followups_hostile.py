"""Receivers whose responses never end: an attempt costs little, and no other receiver waits (I11, I12)."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from sqlalchemy import Engine

from archiver.outbound.followups.guard import endpoint
from archiver.outbound.followups.sending import Attempt, Transport
from tests.support import servers
from tests.support.followups import change, receiving, sending, subscribe
from tests.support.guarded_receivers import to
from tests.support.rows import rows
from tests.support.waiting import until

# A process of its own, so that it takes no time of those that it is to disturb.
_HOSTILE = """
import socket, sys, threading
head, endless = bytes.fromhex(sys.argv[1]), bytes.fromhex(sys.argv[2])
listener = socket.socket(fileno=int(sys.argv[3]))
def serve(connection):
    try:
        connection.recv(65536)
        connection.sendall(head)
        while True:
            connection.sendall(endless)
    except OSError:
        connection.close()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = {
    "103": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 500),
    "100": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500),
    "one-byte chunks": (CHUNKED, b"1\r\nx\r\n" * 500),
    "empty header lines": (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 500),
    "a long chunk extension": (CHUNKED, b"1;" + b"x" * 4_000),
    "a body without an end": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4_000),
}


@contextmanager
def hostile(kind: str) -> Iterator[str]:
    """The URL of a receiver that never ends its answer."""
    head, endless = ENDLESS[kind]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        arguments = [head.hex(), endless.hex(), str(listener.fileno())]
        process = subprocess.Popen([sys.executable, "-c", _HOSTILE, *arguments], pass_fds=[listener.fileno()])
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            process.kill()
            process.wait()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ENDLESS)
async def test_i12_an_attempt_ends_long_before_an_answer_that_does_not(kind: str) -> None:
    with hostile(kind) as url:
        # More seconds than the test has: it is the answer that ends the attempt.
        async with Transport(endpoint(url), concurrency=1, allow_private=True, seconds=600) as transport:
            attempt: Attempt = await transport.send(to(url), "msg_1", b"{}")
    is_taken = kind in {"one-byte chunks", "a body without an end"}  # a status is all that is asked for
    assert attempt.fault == (None if is_taken else "broken_answer")


@pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)
def test_i11_hostile_receivers_cost_no_other_an_attempt(database_url: str, engine: Engine) -> None:
    with ExitStack() as stack:
        for kind in ENDLESS:
            subscribe(engine, stack.enter_context(hostile(kind)), "chat.created", concurrency=8)
        innocent = stack.enter_context(receiving())
        number = subscribe(engine, innocent.url, "chat.created")
        change(engine, *(("chat.created", f"s{each}", f"c{each}") for each in range(200)))
        with sending(database_url):
            until(lambda: len(innocent.by_id) == 200, "each change is delivered to the innocent one")
            settled = (
                f"SELECT count(*) FROM archiver.deliveries WHERE subscription_id = {number} AND state = 'delivered'"
            )
            until(lambda: rows(engine, settled) == [(200,)], "and recorded")
    failed = f"SELECT count(*) FROM archiver.attempts WHERE subscription_id = {number} AND fault IS NOT NULL"
    assert rows(engine, failed) == [(0,)]
