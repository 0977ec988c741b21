"""A TCP proxy before Postgres that fails as networks do: cuts, falls silent, swallows the answer to a COMMIT."""

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from psycopg.conninfo import conninfo_to_dict

Mode = Literal["pass", "cut", "silent", "swallow", "answer"]
CHUNK = 65_536
COMMITTED = b"COMMIT\0"  # the end of the answer


class Proxy:
    """`mode` may change at any time: `cut` ends connections, `silent` passes nothing on, `swallow` ends a connection
    instead of passing on the answer to its COMMIT, and `answer` after this answer.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._mode: Mode = "pass"
        self._open: list[socket.socket] = []
        self.connections = 0
        self.swallowed = 0
        self.requests = Counter[str]()  # messages of all clients, by type
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "cut":
            while self._open:
                _end(self._open.pop())

    def _is_cut(self) -> bool:
        return self._mode == "cut"

    def close(self) -> None:
        self.set("cut")
        _end(self._listener)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                if self._is_cut():
                    client.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                try:
                    server.connect(self._upstream)
                except OSError:
                    client.close()
                    continue
                self._open += [client, server]
                if self._is_cut():  # in between
                    _end(client)
                    _end(server)
                    continue
                threading.Thread(target=self._ask, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        requests = _Requests()
        with suppress(OSError):
            while data := client.recv(CHUNK):
                self.requests.update(requests.read(data))
                if self._mode != "silent":
                    server.sendall(data)
        _end(server)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(CHUNK):
                if self._mode in {"swallow", "answer"} and COMMITTED in data:
                    self.swallowed += 1
                    if self._mode == "answer":
                        client.sendall(data[: data.index(COMMITTED) + len(COMMITTED)])
                    break
                if self._mode != "silent":
                    client.sendall(data)
        _end(client)
        _end(server)


class _Requests:
    """The types of the messages that a client sends, by https://www.postgresql.org/docs/current/protocol.html."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._is_started = False

    def read(self, data: bytes) -> Iterator[str]:
        """Yield the types of the messages that end in this data."""
        self._unread += data
        while True:
            header = 1 if self._is_started else 0  # the first message has no type
            size = header + int.from_bytes(self._unread[header : header + 4])
            if len(self._unread) < max(size, header + 4):
                return
            if self._is_started:
                yield chr(self._unread[0])
            self._is_started = True
            del self._unread[:size]


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server of this URL, which has a unix socket, and the URL that leads through it."""
    result = conninfo_to_dict(url)
    folder, port = str(result.pop("host")), result.pop("port", "5432")
    proxy = Proxy(f"{folder}/.s.PGSQL.{port}")
    user, database = result["user"], result["dbname"]
    password = f":{result['password']}" if result.get("password") else ""
    try:
        yield (
            proxy,
            f"postgresql://{user}{password}@127.0.0.1:{proxy.port}/{database}?sslmode=disable&gssencmode=disable",
        )
    finally:
        proxy.close()
