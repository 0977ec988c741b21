"""Senders under whom something fails, and the audit that each fault test ends with."""

import http.client
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import psycopg

from tests.support.payloads import created
from tests.support.receivers import deliver

BROKEN = (http.client.HTTPException, OSError)


def rows(url: str, query: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


def body_of(number: int) -> bytes:
    return created(f"chat-{number}", f"session-{number % 20}")


class Load:
    """Senders, each with a connection of its own; `answers` holds what each event was told, the newest last."""

    def __init__(self, ports: list[int], senders: int, numbers: Iterable[int]) -> None:
        self.answers: list[tuple[int, int, str]] = []  # event, HTTP code, status
        self.broken: list[int] = []  # events whose sender was told nothing
        self._numbers = iter(numbers)
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._send, args=(ports[n % len(ports)],)) for n in range(senders)]
        for thread in self._threads:
            thread.start()

    @property
    def acknowledged(self) -> set[int]:
        return {number for number, code, _ in list(self.answers) if code == 200}

    def end(self) -> None:
        """No more events than those under way."""
        with self._lock:
            self._numbers = iter(())
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()

    def _next(self) -> int | None:
        with self._lock:
            return next(self._numbers, None)

    def _send(self, port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while (number := self._next()) is not None:
            try:
                code, item = deliver(connection, body_of(number))
            except BROKEN:
                self.broken.append(number)
                break
            self.answers.append((number, code, item["status"]))
        connection.close()


def assert_archived(url: str, acknowledged: set[int]) -> None:
    """Every acknowledged event is in the ledger once, and every event of the ledger is in the archive, once."""
    ledger = Counter(row[0] for row in rows(url, "SELECT chat_id FROM archiver.events"))
    assert set(ledger.values()) == {1}
    assert {f"chat-{number}" for number in acknowledged} <= ledger.keys()
    chats = Counter(row[0] for row in rows(url, "SELECT chat_id FROM archiver.chats"))
    assert chats == ledger
    result = "SELECT chat_id, array_agg(role || ': ' || content ORDER BY position) FROM analytics.messages GROUP BY 1"
    assert dict(rows(url, result)) == {
        chat_id: [f"user: question of {chat_id}", f"assistant: answer to {chat_id}"] for chat_id in ledger
    }
