"""Connections of follow-ups: surplus bytes after a response are never read as the next response."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from archiver.outbound.followups.guard import endpoint
from archiver.outbound.followups.sending import Attempt, Transport
from tests.support.guarded_receivers import certificate, to

TIMES = 4


@dataclass
class Raw:
    """A server that answers each request with the same bytes."""

    answer: bytes
    port: int = 0
    connections: int = 0
    requests: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n{}")
                self.requests += 1
                writer.write(self.answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:  # also where it is cancelled: nothing is left open when its loop ends
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()


@contextmanager
def raw(answer: bytes, encrypted: Path | None = None) -> Iterator[Raw]:
    server = Raw(answer)
    context = None
    if encrypted is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(encrypted)
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context))
    server.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_end(listening), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(listening: asyncio.Server) -> None:
    listening.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def send(server: Raw, trusted: Path | None = None) -> list[Attempt]:
    """Several deliveries, one after the other."""

    async def run() -> list[Attempt]:
        scheme = "http" if trusted is None else "https"
        url = f"{scheme}://crm.test:{server.port}/"
        transport = Transport(
            endpoint(url),
            concurrency=1,
            allow_private=True,
            trusted=None if trusted is None else ssl.create_default_context(cafile=str(trusted)),
            resolve=lambda *_: ["127.0.0.1"],
        )
        async with transport:
            return [await transport.send(to(url), f"msg_1_{number}", b"{}") for number in range(TIMES)]

    return asyncio.run(run())


def after_deliveries(answer: bytes, is_encrypted: bool, folder: Path) -> Raw:
    """A server that answered so, after several deliveries, all of which it took."""
    path = certificate(folder, "crm.test") if is_encrypted else None
    with raw(answer, encrypted=path) as server:
        attempts = send(server, path)
    assert [each.fault for each in attempts] == [None] * TIMES
    return server


NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
A_RECORD = b"HTTP/1.1 200 OK\r\ncontent-length: 16342\r\n\r\n".ljust(16_384, b"x")  # the most that TLS has in one


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\nOK",
        NO_CONTENT + b"OK",
        NO_CONTENT * 3,
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nOK" + NO_CONTENT,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n" + NO_CONTENT,
        A_RECORD + NO_CONTENT,  # which is decrypted alone
    ],
)
@pytest.mark.parametrize("is_encrypted", [False, True])
def test_nothing_left_over_is_taken_for_the_next_answer(answer: bytes, is_encrypted: bool, tmp_path: Path) -> None:
    server = after_deliveries(answer, is_encrypted, tmp_path)
    assert server.requests == server.connections == TIMES


@pytest.mark.parametrize("answer", [NO_CONTENT, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nOK"])
@pytest.mark.parametrize("is_encrypted", [False, True])
def test_a_connection_is_kept_for_the_next_delivery(answer: bytes, is_encrypted: bool, tmp_path: Path) -> None:
    server = after_deliveries(answer, is_encrypted, tmp_path)
    assert (server.requests, server.connections) == (TIMES, 1)
