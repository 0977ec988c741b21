"""Each accepted connection is served when `serve` ends; the limit of open files admits all connections."""

import asyncio
import shlex
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from archiver.http.connection_limiter import ConnectionLimiter
from archiver.http.connections import Connection
from archiver.http.listening import DrainingLoop
from tests.support.payloads import SECRET, created
from tests.support.receivers import PATIENT, serving_with
from tests.support.sockets import Answer, connect, delivery, read
from tests.support.versions import on_one_version
from tests.support.waiting import until


@on_one_version
def test_a_request_under_way_on_an_idle_connection_is_answered_as_its_last(database_url: str) -> None:
    with serving_with(PATIENT | {"archiver.http.connections.GRACE_SECONDS": 20}, database_url) as receiver:
        with connect(receiver.port, delivery(created("a"))) as connection, connect(receiver.port) as fresh:
            assert read(connection).headers["connection"] is None
            receiver.signal(signal.SIGTERM)
            until(lambda: is_refused(receiver.port), "it takes no more connections")
            for each in (connection, fresh):
                each.sendall(delivery(created("b")))
                answer = read(each)
                assert (answer.status, answer.headers["connection"]) == (200, "close")
        with pytest.raises(subprocess.TimeoutExpired):  # the client that asked for metrics may still ask more
            receiver.wait(0.1)
        assert receiver.wait(120) == 0


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 120).close()
    except ConnectionRefusedError:
        return True
    return False


class Greeter(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvloop's is one
        transport.write(b"hello")
        transport.close()


def test_connections_accepted_by_the_kernel_are_served_after_listening_ended() -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            server = await loop.create_server(Greeter, sock=listener)
            clients = [socket.create_connection(address, 120) for _ in range(20)]  # the loop did not run meanwhile
            server.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        greetings = await asyncio.gather(*(loop.run_in_executor(None, client.recv, 10) for client in clients))
        assert greetings == [b"hello"] * 20
        for client in clients:
            client.close()

    with asyncio.Runner(loop_factory=DrainingLoop) as runner:
        runner.run(serve())


async def greet(_: Any, __: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


def test_their_answer_is_the_last_on_their_connection() -> None:
    async def serve() -> Answer:
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(greet, log_config=None)
        config.load()
        state, limiter = ServerState(), ConnectionLimiter(10, 10)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = await loop.create_server(lambda: Connection(config, state, {"limiter": limiter}), sock=listener)
            client = connect(listener.getsockname()[1], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            server.close()
        answer = await loop.run_in_executor(None, read, client)
        client.close()
        for connection in state.connections:
            connection.transport.abort()  # uvloop waits for it otherwise
        await asyncio.sleep(0)
        return answer

    with asyncio.Runner(loop_factory=DrainingLoop) as runner:
        answer = runner.run(serve())
    assert (answer.content, answer.headers["connection"]) == (b"hello", "close")


def test_i12_too_low_a_file_limit_is_reported() -> None:
    script = f"ulimit -n 600; exec {shlex.quote(sys.executable)} -m archiver serve --port 0 --no-migrate"
    settings = {
        "DATABASE_URL": "postgresql://127.0.0.1:1/none",
        "ARCHIVER_WEBHOOK_SECRETS": SECRET,
        "ARCHIVER_SPOOL": "off",
    }
    ended = subprocess.run(["sh", "-c", script], env=settings, capture_output=True, text=True, check=False)
    assert "file limit too low" in ended.stderr
