"""`POST /sessions`: the application registers the sessions that it opened."""

import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import psycopg
import pytest

from tests.support import servers
from tests.support.receivers import Receiver, answer, serving
from tests.support.registration import TOKEN, register

pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)


@pytest.fixture(scope="module")
def receiver(url: str) -> Iterator[Receiver]:
    with serving(url, ARCHIVER_API_TOKEN=TOKEN, ARCHIVER_MAX_BODY="100000") as receiver:
        yield receiver


def known(url: str, session_id: str) -> list[Any]:
    query = "SELECT name, assistant_id, created_at::text, coverage FROM archiver.sessions WHERE session_id = %s"
    with psycopg.connect(url, options="-c timezone=UTC") as connection:
        return connection.execute(query, [session_id]).fetchall()


def test_sessions_are_known_once_it_is_answered(receiver: Receiver, url: str) -> None:
    whole = {"id": "one", "assistantId": "a-1", "name": "Kitchen", "createdAt": "2026-01-05T09:00:00Z", "more": [1]}
    answer = register(receiver, {"sessions": [whole, {"id": "two"}]})
    assert (answer.status_code, answer.json()) == (200, {"status": "stored", "sessions": 2, "new": 2})
    assert known(url, "one") == [("Kitchen", "a-1", "2026-01-05 09:00:00+00", "open")]
    assert known(url, "two") == [(None, None, None, "open")]


def test_i3_a_session_registered_again_is_stored_once(receiver: Receiver, url: str) -> None:
    assert register(receiver, {"ids": ["again", "again", 7]}).json()["new"] == 2
    assert register(receiver, {"ids": ["again"]}).json() == {"status": "stored", "sessions": 1, "new": 0}
    assert len(known(url, "again")) == len(known(url, "7")) == 1


@pytest.mark.parametrize("proof", [None, "Bearer", TOKEN, "Bearer wrong", f"Bearer {TOKEN}x", "Bearer é"])
def test_without_the_token_it_is_refused(receiver: Receiver, proof: str | None) -> None:
    headers = {} if proof is None else {b"authorization": proof.encode()}
    answer = httpx2.post(
        f"{receiver.url}/sessions", content=b'{"ids": ["x"]}', headers=headers, trust_env=False, timeout=120
    )
    assert answer.status_code == 401
    assert "ARCHIVER_API_TOKEN" in answer.json()["detail"]


def test_without_a_token_set_there_is_no_such_route(database_url: str) -> None:
    with serving(database_url) as receiver:
        assert register(receiver, {"ids": ["x"]}).status_code == 404
        assert register(receiver, {"ids": ["x"]}, token=None).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        {},
        {"ids": []},
        {"ids": "x"},
        {"ids": [""]},
        {"ids": [None]},
        {"ids": [{"id": "x"}]},
        {"ids": ["\u0000"]},
        {"ids": ["x" * 2000]},
        {"sessions": ["x"]},
        {"sessions": [{}]},
        {"sessions": [{"id": "fine"}, {"name": "without"}]},
        {"ids": ["x"] * 1001},
    ],
)
def test_what_is_no_list_of_sessions_gets_a_clear_answer_and_changes_nothing(
    receiver: Receiver, url: str, body: Any
) -> None:
    answer = register(receiver, body)
    assert answer.status_code == 422
    assert answer.json()["status"] == "invalid"
    assert answer.json()["detail"]
    assert known(url, "fine") == known(url, "x") == []


def test_a_body_too_large_is_refused(receiver: Receiver) -> None:
    assert register(receiver, b" " * 200_000).status_code == 413


def test_a_body_that_an_upgrade_offer_swallows_is_incomplete(receiver: Receiver, url: str) -> None:
    body = b'{"ids": ["swallowed"]}'
    head = (
        f"POST /sessions HTTP/1.1\r\nhost: archiver\r\nauthorization: Bearer {TOKEN}\r\n"
        f"upgrade: h2c\r\nconnection: Upgrade\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", receiver.port), 30) as connection:
        connection.sendall(head.encode() + body)
        code, content = answer(connection)
    assert (code, content["status"]) == (400, "incomplete")
    assert known(url, "swallowed") == []
