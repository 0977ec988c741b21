"""Clients that write what they like, when they like."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.payloads import SECRET, WEBHOOK


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def reason(self) -> Any:
        return json.loads(self.content)["reason"]


def connect(port: int, sent: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 120, (source, 0))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(sent)
    return connection


def read(connection: socket.socket) -> Answer:
    """One answer; what follows it stays unread only if it has not arrived."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return Answer(response.status, response.headers, response.read())


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side ends it, however it does."""
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def is_ended(connection: socket.socket) -> bool:
    return read_all(connection) == b""


def head(*lines: str, path: str = WEBHOOK, method: str = "POST", secret: str = SECRET) -> bytes:
    """The head of a delivery, with more header lines."""
    fields = [f"{method} {path} HTTP/1.1", "host: archiver", f"x-webhook-secret: {secret}", *lines]
    return "\r\n".join(fields).encode() + b"\r\n\r\n"


def delivery(body: bytes, *lines: str) -> bytes:
    return head(f"content-length: {len(body)}", *lines) + body


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024
