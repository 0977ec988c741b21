"""The simulated platform over real sockets: its API, its webhooks, and each of its faults."""

import asyncio
import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from archiver.inbound.signatures import SignatureError, Verifier, verifier
from archiver.settings import Settings, SettingsError
from archiver.simulator import client as clients
from archiver.simulator.conversations import Conversation, conversations
from archiver.simulator.faults import Faults, HistoryFault, history_fault, with_history_faults
from archiver.simulator.platform import Platform, create
from archiver.simulator.serving import serving, simulate, with_secret
from archiver.simulator.upstream import MAX_CHATS, FullError, Upstream
from archiver.simulator.webhooks import ATTEMPTS, Delivery, Record, Sender
from tests.support.guarded_receivers import certificate
from tests.support.ports import free_port

SECRET = "whsec_c2ltdWxhdGlvbi1vbmx5LW5vdC1hLXNlY3JldA=="
SCHEMES = ["secret", "bearer", "hmac", "standard"]
CHAT_KEYS = {
    *("id", "externalChatId", "sessionId", "input", "output", "assistantId", "status", "cost"),
    *("createdAt", "updatedAt"),
}


def proving(scheme: str = "secret") -> Verifier:
    return verifier(Settings.model_construct(webhook_secrets=SecretStr(SECRET), webhook_scheme=scheme))


@dataclass
class Receiver:
    """Keeps what arrives with a right signature; answers as `script` says, then 200."""

    verifier: Verifier
    script: list[Response] = field(default_factory=list)
    requests: int = 0
    refused: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def take(self, request: Request) -> Response:
        body = await request.body()
        self.requests += 1
        try:
            self.verifier.verify(body, request.scope["headers"], request.method, str(request.url), time.time())
        except SignatureError:
            self.refused += 1
            return JSONResponse({"status": "unauthenticated"}, 401)
        if self.script:
            return self.script.pop(0)
        self.bodies.append(body)
        self.events.append(json.loads(body)["message"])
        return JSONResponse({"status": "stored"})

    def received(self) -> list[tuple[str, str]]:
        return [(event["type"], event["chat"]["id"]) for event in self.events]


@dataclass
class World:
    api: clients.Client
    http: httpx2.AsyncClient
    receiver: Receiver
    sender: Sender
    platform: Platform

    async def session(self) -> str:
        return str((await self.api.create_session("Support", "assistant-1"))["id"])

    async def deliveries(self) -> list[Delivery]:
        await self.sender.drain()
        return list(self.sender.record.deliveries)


@asynccontextmanager
async def world(
    faults: Faults | None = None,
    *,
    scheme: str = "secret",
    script: Sequence[Response] = (),
    api_key: str | None = None,
) -> AsyncIterator[World]:
    receiver = Receiver(proving(scheme), [*script])
    app = Starlette(routes=[Route("/hook", receiver.take, methods=["POST"])])
    async with serving(app, "127.0.0.1", 0) as receiver_url:
        sender = Sender(f"{receiver_url}/hook", proving(scheme), Record())
        platform = Platform(sender, faults or Faults(), api_key)
        async with (
            serving(create(platform), "127.0.0.1", 0) as url,
            clients.connect(f"{url}/api", "any-key") as http,
        ):
            yield World(clients.Client(http), http, receiver, sender, platform)


async def hold(world: World, script: Sequence[Conversation]) -> None:
    await clients.run_all(clients.Client(world.http), script, lambda: None)


async def test_the_documented_calls_answer_with_the_documented_fields():
    async with world() as w:
        opened = await w.http.post("/sessions", json={"name": "Support", "assistantId": "assistant-1"})
        session = opened.json()["session"]
        input_messages = {
            "sessionId": session["id"],
            "input": "Hello",
            "assistantOverrides": {"variableValues": {"companyName": "Example Plumbing"}},
        }
        talked = await w.http.post("/chats", json=input_messages)
        read = await w.http.get(f"/chats/session/{session['id']}")
    assert (opened.status_code, talked.status_code, read.status_code) == (201, 201, 200)
    assert session.keys() == {"id", "name", "assistantId", "status", "messages", "createdAt", "updatedAt"}
    assert (session["name"], session["status"], session["messages"]) == ("Support", "active", [])
    chat = talked.json()["chat"]
    assert chat.keys() == CHAT_KEYS | {"assistantOverrides"}
    assert chat["assistantOverrides"] == input_messages["assistantOverrides"]
    assert chat["output"][0].keys() == {"role", "content"}
    assert chat["createdAt"].endswith("Z")
    assert chat["status"] == "active"
    assert chat["createdAt"] < chat["updatedAt"]
    history = read.json()["session"]
    assert history.keys() == {"id", "name", "status", "assistantId", "messages", "updatedAt"}
    assert history["messages"] == [{"role": "user", "content": "Hello"}, *chat["output"]]
    assert all(isinstance(answer.json()["message"], str) for answer in (opened, talked, read))


async def test_no_answer_reports_a_time_of_the_future_however_fast_the_calls():
    seen = []
    async with world() as w:
        session_id = await w.session()
        for number in range(60):
            answer = await w.http.post("/chats", json={"sessionId": session_id, "input": f"{number}"})
            seen.append((answer.json()["chat"], datetime.now(UTC)))
        history = await w.api.history(session_id)
        answered = datetime.now(UTC)
    assert all(datetime.fromisoformat(chat["updatedAt"]) <= at for chat, at in seen)
    assert datetime.fromisoformat(history["updatedAt"]) <= answered
    created = [chat["createdAt"] for chat, _ in seen]
    assert created == sorted(set(created))
    assert all(chat["createdAt"] < chat["updatedAt"] for chat, _ in seen)


@pytest.mark.parametrize("more", [{}, {"assistantId": "assistant-1"}, {"sessionId": None, "assistantOverrides": {}}])
async def test_a_chat_without_a_session_is_answered_delivered_and_deleted(more):
    async with world() as w:
        talked = await w.http.post("/chats", json={"input": "What does tea cost?", **more})
        again = await w.http.post("/chats", json={"input": "What does tea cost?", **more})
        chat = talked.json()["chat"]
        removed = await w.http.request("DELETE", f"/chats/{chat['id']}")
        missing = await w.http.request("DELETE", f"/chats/{chat['id']}")
        await w.deliveries()
        received = w.receiver.received()
        bodies = [event["chat"] for event in w.receiver.events]
    assert (talked.status_code, removed.status_code, missing.status_code) == (201, 200, 404)
    assert "sessionId" not in chat
    assert chat.get("assistantId") == more.get("assistantId")
    assert chat["output"][0]["content"]
    assert chat["id"] != again.json()["chat"]["id"]
    assert sorted(received) == sorted(
        [("chat.created", chat["id"]), ("chat.created", again.json()["chat"]["id"]), ("chat.deleted", chat["id"])]
    )
    assert all("sessionId" not in body for body in bodies)


async def test_history_is_flat_and_in_order_and_replies_use_context_and_variables():
    async with world() as w:
        session_id = await w.session()
        first = await w.api.send_message(session_id, "My boiler 🔥 leaks", {"companyName": "Example Plumbing"})
        await w.api.send_message(session_id, "ok", None)
        last = await w.api.send_message(session_id, "Can you repeat that?", None)
        other = await w.api.send_message(await w.session(), "My boiler 🔥 leaks", None)
        history = await w.api.history(session_id)
    assert "Example Plumbing" in first["output"][0]["content"]
    assert "Example Plumbing" not in other["output"][0]["content"]
    assert "My boiler 🔥 leaks" in last["output"][0]["content"]
    assert "Example Plumbing" in last["output"][0]["content"]
    assert "assistantOverrides" not in last
    users = [message["content"] for message in history["messages"] if message["role"] == "user"]
    assert users == ["My boiler 🔥 leaks", "ok", "Can you repeat that?"]


async def test_input_may_be_a_list_of_messages():
    input_messages = [{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}]
    async with world() as w:
        session_id = await w.session()
        answer = await w.http.post("/chats", json={"sessionId": session_id, "input": input_messages})
        history = await w.api.history(session_id)
    assert answer.json()["chat"]["input"] == input_messages
    assert history["messages"][:2] == input_messages


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", None])
async def test_any_content_type_will_do(content_type):
    headers = {"content-type": content_type} if content_type else {}
    async with world() as w:
        body = b'{"name": "N", "assistantId": "a", "unknown": [1, null]}'
        answer = await w.http.post("/sessions", content=body, headers=headers)
    assert answer.status_code == 201


BAD_INPUT: list[tuple[str, str, bytes | None, int, str]] = [
    ("POST", "/sessions", b"{not json", 400, "not valid JSON: JSON is malformed"),
    ("POST", "/chats", b'{"sessionId": "SESSION", "input": "Hi"', 400, "not valid JSON: Input data was truncated"),
    ("POST", "/chats", b"input=Hi", 400, "not valid JSON"),
    ("POST", "/sessions", b"", 400, "not valid JSON: Input data was truncated"),
    ("POST", "/sessions", b"[]", 400, "Expected `object`"),
    ("POST", "/sessions", b'{"assistantId": "a"}', 400, "`name`"),
    ("POST", "/sessions", b'{"name": "N"}', 400, "`assistantId`"),
    ("POST", "/sessions", b'{"name": "", "assistantId": "a"}', 400, "$.name"),
    ("POST", "/sessions", b'{"name": 7, "assistantId": "a"}', 400, "$.name"),
    ("POST", "/sessions", b'{"name": "\xff", "assistantId": "a"}', 400, "utf-8"),
    ("POST", "/sessions", b'{"name": "N", "x": ' + b"[" * 100_000, 400, "recursion"),
    ("POST", "/sessions", b" " * 2_000_000, 413, "larger than"),
    ("POST", "/chats", b'{"sessionId": "", "input": "Hi"}', 400, "$.sessionId"),
    ("POST", "/chats", b'{"assistantId": "a"}', 400, "`input`"),
    ("POST", "/chats", b'{"sessionId": "SESSION"}', 400, "`input`"),
    ("POST", "/chats", b'{"sessionId": "SESSION", "input": ""}', 400, "$.input"),
    ("POST", "/chats", b'{"sessionId": "SESSION", "input": []}', 400, "$.input"),
    ("POST", "/chats", b'{"sessionId": "SESSION", "input": [{"role": "user"}]}', 400, "`content`"),
    ("POST", "/chats", b'{"sessionId": "SESSION", "input": 1}', 400, "$.input"),
    ("POST", "/chats", b'{"sessionId": "SESSION", "input": "x", "assistantOverrides": 1}', 400, "Overrides"),
    (
        *("POST", "/chats"),
        b'{"sessionId": "SESSION", "input": "x", "assistantOverrides": {"variableValues": 1}}',
        *(400, "variableValues"),
    ),
    ("POST", "/chats", b'{"sessionId": "nowhere", "input": "Hi"}', 404, "nowhere"),
    ("GET", "/chats/session/nowhere", None, 404, "nowhere"),
    ("DELETE", "/chats/nowhere", None, 404, "nowhere"),
    ("GET", "/sessions", None, 405, "Not Allowed"),
    ("GET", "/elsewhere", None, 404, "Not Found"),
]


async def test_bad_input_gets_a_clear_answer_and_causes_no_webhook():
    async with world() as w:
        session_id = await w.session()
        for method, path, body, status, input_messages in BAD_INPUT:
            content = body and body.replace(b"SESSION", session_id.encode())
            answer = await w.http.request(method, path, content=content)
            case = f"{method} {path} {(body or b'')[:80]!r}"
            assert answer.status_code == status, case
            assert input_messages.lower() in answer.json()["message"].lower(), case
        assert await w.deliveries() == []


@pytest.mark.parametrize(
    ("configured", "given", "status"),
    [(None, "", 401), (None, "anything", 201), ("right", "wrong", 401), ("right", "right", 201)],
)
async def test_an_api_key_is_needed(configured, given, status):
    async with world(api_key=configured) as w:
        body = {"name": "N", "assistantId": "a"}
        answer = await w.http.post("/sessions", json=body, headers={"x-api-key": given})
    assert answer.status_code == status
    assert answer.json()["message"]


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_webhooks_are_signed_by_the_scheme_of_the_settings(scheme):
    async with world(scheme=scheme) as w:
        chat = await w.api.send_message(await w.session(), 'שלום "you"\n👍', {"customerTier": "gold"})
        await w.api.delete_chat(chat["id"])
        deliveries = await w.deliveries()
    assert w.receiver.refused == 0
    assert sorted(w.receiver.received()) == [("chat.created", chat["id"]), ("chat.deleted", chat["id"])]
    event = next(event for event in w.receiver.events if event["type"] == "chat.created")
    assert event["chat"] == chat
    assert abs(event["timestamp"] / 1000 - time.time()) < 60
    assert [(d.outcome, d.status, d.answer) for d in deliveries] == [("accepted", 200, "stored")] * 2


async def test_a_delivery_without_proof_is_not_taken():
    async with world() as w:
        unsigned = await w.sender.send(b"{}", None)
        forged = await w.sender.send(
            b"{}", verifier(with_secret(Settings.model_construct(), "another secret than the platform's"))
        )
    assert [unsigned.status, forged.status, w.receiver.refused] == [401, 401, 2]


async def test_a_deleted_chat_leaves_the_history_and_is_gone():
    async with world() as w:
        session_id = await w.session()
        chat = await w.api.send_message(session_id, "Forget me", None)
        remaining = await w.api.send_message(session_id, "ok", None)
        await w.api.delete_chat(chat["id"])
        history = await w.api.history(session_id)
        again = await w.http.delete(f"/chats/{chat['id']}")
    assert history["messages"] == [{"role": "user", "content": "ok"}, *remaining["output"]]
    assert again.status_code == 404


async def _what_happened(seed: int, count: int, chunk: int) -> set[tuple[str, str, frozenset[str], bool]]:
    faults = Faults(seed=seed, duplicates=0.5, reorder=0.3, output_missing_at_creation=0.3, loss=0.2)
    script = list(conversations(seed, count))
    async with world(faults) as w:
        for start in range(0, count, chunk):
            await hold(w, script[start : start + chunk])
        deliveries = await w.deliveries()
    without_times = [
        {name: value for name, value in delivery.chat.items() if not name.endswith("At")} for delivery in deliveries
    ]
    return {
        (delivery.type, json.dumps(chat), frozenset(map(str, delivery.faults)), delivery.outcome == "lost")
        for delivery, chat in zip(deliveries, without_times, strict=True)
    }


async def test_a_seed_determines_conversations_ids_and_faults_at_any_concurrency():
    first = await _what_happened(7, 12, chunk=1)
    assert await _what_happened(7, 12, chunk=12) == first
    assert await _what_happened(8, 12, chunk=12) != first
    assert len(first) > 30


def test_a_longer_run_begins_like_a_shorter_one_and_holds_what_breaks_archives():
    script = list(conversations(1, 200))
    assert list(conversations(1, 20)) == script[:20]
    texts = [line.text for conversation in script for line in conversation.lines]
    assert any(line.is_deleted for conversation in script for line in conversation.lines)
    assert texts.count("ok") > 20
    for piece in ("👍", "שלום", "مرحبا", '"', "\n", "\\"):
        assert any(piece in text for text in texts), piece


async def test_sessions_have_now_and_then_several_outputs():
    async with world() as w:
        session_id = await w.session()
        outputs = [(await w.api.send_message(session_id, "ok", None))["output"] for _ in range(40)]
    assert {len(output) for output in outputs} == {1, 2}


async def test_fault_loss_nothing_is_sent_and_that_is_recorded():
    async with world(Faults(loss=1)) as w:
        await w.api.send_message(await w.session(), "Hello", None)
        deliveries = await w.deliveries()
    assert (w.receiver.requests, [delivery.outcome for delivery in deliveries]) == (0, ["lost"])


async def test_fault_duplicates_the_same_chat_arrives_again_in_the_same_or_a_new_envelope():
    async with world(Faults(duplicates=1)) as w:
        for number in range(20):
            await w.api.send_message(await w.session(), f"Hello {number}", None)
        await w.deliveries()
    by_chat: dict[str, list[int]] = {}
    for index, (_, chat_id) in enumerate(w.receiver.received()):
        by_chat.setdefault(chat_id, []).append(index)
    assert {len(indexes) for indexes in by_chat.values()} == {2, 3}
    for indexes in by_chat.values():
        assert len({json.dumps(w.receiver.events[index]["chat"]) for index in indexes}) == 1
    assert len(set(w.receiver.bodies)) > 20, "some in a new envelope"
    assert any(len({w.receiver.bodies[i] for i in indexes}) < len(indexes) for indexes in by_chat.values())
    assert w.sender.record.total("copies") == len(w.receiver.events) - 20


async def test_fault_reorder_a_later_turn_overtakes():
    async with world(Faults(seed=1, reorder=0.5)) as w:
        session_id = await w.session()
        sent = [(await w.api.send_message(session_id, f"{n}", None))["id"] for n in range(30)]
        await w.deliveries()
    arrived = [chat_id for _, chat_id in w.receiver.received()]
    assert sorted(arrived) == sorted(sent)
    assert arrived != sent


async def test_fault_delay_the_webhook_comes_later_but_a_drain_does_not_wait_for_it():
    async with world(Faults(delay=1)) as w:
        session_id, started = await w.session(), time.monotonic()
        await w.api.send_message(session_id, "Hello", None)
        async with asyncio.timeout(120):
            while not w.receiver.events:  # noqa: ASYNC110  # the deadline is above
                await asyncio.sleep(0.01)
        assert time.monotonic() - started > 0.1
        await w.api.send_message(await w.session(), "Hello again", None)
        await w.deliveries()
        assert len(w.receiver.events) == 2


async def test_fault_deletion_before_creation():
    async with world(Faults(deletion_before_creation=1)) as w:
        chat = await w.api.send_message(await w.session(), "Hello", None)
        await w.api.delete_chat(chat["id"])
        await w.deliveries()
    assert [kind for kind, _ in w.receiver.received()] == ["chat.deleted", "chat.created"]


async def test_fault_output_missing_at_creation_then_a_newer_revision_with_it():
    async with world(Faults(output_missing_at_creation=1)) as w:
        chats = [await w.api.send_message(await w.session(), f"Hello {n}", None) for n in range(12)]
        await w.deliveries()
    for chat in chats:
        early, late = sorted(
            (event["chat"] for event in w.receiver.events if event["chat"]["id"] == chat["id"]),
            key=lambda received: str(received["updatedAt"]),
        )
        assert not early.get("output")
        assert late == chat
        assert early["updatedAt"] < late["updatedAt"]
    assert {"output" in event["chat"] for event in w.receiver.events if not event["chat"].get("output")} == {
        True,
        False,
    }


async def test_fault_bare_deletion_sends_the_id_alone():
    async with world(Faults(bare_deletion=1)) as w:
        chat = await w.api.send_message(await w.session(), "Hello", None)
        await w.api.delete_chat(chat["id"])
        await w.deliveries()
    assert {"id": chat["id"]} in [event["chat"] for event in w.receiver.events]


async def read(w: World, session_id: str) -> httpx2.Response:
    return await w.http.get(f"/chats/session/{session_id}")


async def talked(w: World, turns: int = 3) -> tuple[str, list[dict[str, str]]]:
    """A session with so many turns, and what was said."""
    session_id = await w.session()
    chats = [await w.api.send_message(session_id, "ok", None) for _ in range(turns)]
    return session_id, [message for chat in chats for message in [{"role": "user", "content": "ok"}, *chat["output"]]]


async def report(w: World) -> dict[str, Any]:
    received: dict[str, Any] = (
        await w.http.get(str(w.http.base_url).removesuffix("/api/") + "/simulator/report")
    ).json()
    return received


async def test_no_two_replies_of_a_session_are_alike_however_alike_the_questions():
    async with world() as w:
        _, input_messages = await talked(w, turns=60)
    replies = [message["content"] for message in input_messages if message["role"] == "assistant"]
    assert len(replies) > 60
    assert len(set(replies)) == len(replies)


async def test_some_assistants_speak_first_and_what_they_say_belongs_to_no_chat():
    async with world(Faults(greeting=0.3, seed=2)) as w:
        openings = []
        for number in range(60):
            session = await w.api.create_session("N", f"assistant-{number}")
            again = await w.api.create_session("N", f"assistant-{number}")
            chat = await w.api.send_message(session["id"], "Hello", None)
            history = (await w.api.history(session["id"]))["messages"]
            head, rest = history[: -1 - len(chat["output"])], history[-1 - len(chat["output"]) :]
            assert rest == [{"role": "user", "content": "Hello"}, *chat["output"]]
            assert session["messages"] == again["messages"] == head
            openings.append(head)
    greeted = [head for head in openings if head]
    assert 5 < len(greeted) < 35
    assert all(len(head) == 1 and head[0]["role"] == "assistant" and head[0]["content"] for head in greeted)


async def test_history_faults_of_status_and_of_absence():
    expected: dict[str, tuple[int, Any]] = {
        "missing": (404, None),
        "gone": (410, None),
        "error": (500, None),
        "empty": (200, []),
    }
    for fault, (status, messages) in expected.items():
        shares: dict[str, Any] = {f"history_{fault}": 1}
        async with world(Faults(**shares)) as w:
            session_id, _ = await talked(w)
            answer = await read(w, session_id)
            received = await report(w)
        assert answer.status_code == status, fault
        assert answer.json().get("session", {}).get("messages") == messages, fault
        assert received["history_faults"] == {fault: 1}


async def test_fault_partial_leaves_out_the_first_or_the_last_messages():
    heads, tails = 0, 0
    async with world(Faults(history_partial=1)) as w:
        for _ in range(20):
            session_id, input_messages = await talked(w)
            received = (await read(w, session_id)).json()["session"]["messages"]
            assert 0 < len(received) < len(input_messages)
            heads += received == input_messages[: len(received)]
            tails += received == input_messages[-len(received) :]
        lonely = await w.session()
        assert (await read(w, lonely)).json()["session"]["messages"] == []
    assert (heads > 3, tails > 3, heads + tails) == (True, True, 20)


def _is_a_history(body: bytes) -> bool:
    try:
        messages = json.loads(body)["session"]["messages"]
        return isinstance(messages, list) and all(message["content"] is not None for message in messages)
    except (ValueError, TypeError, KeyError):
        return False


@pytest.mark.parametrize(("fault", "forms", "is_json"), [("garbage", 4, False), ("shape", 8, True)])
async def test_a_history_may_be_unreadable(fault, forms, is_json):
    shares: dict[str, Any] = {f"history_{fault}": 1}
    seen = set()
    async with world(Faults(**shares)) as w:
        session_id, _ = await talked(w, turns=1)
        for _ in range(80):
            answer = await read(w, session_id)
            assert answer.status_code == 200
            assert not _is_a_history(answer.content)
            seen.add(answer.content)
            if is_json:
                answer.json()
            else:
                with pytest.raises(ValueError, match=r"."):
                    json.loads(answer.content)
    assert len(seen) >= forms


async def test_fault_busy_affects_all_history_calls_and_ends():
    faults = Faults(history_busy=0.5, seed=5)
    async with world(faults) as w:
        ids = [await w.session() for _ in range(20)]
        first = next(each for each in ids if history_fault(faults, each, 1) == "busy")
        other = next(each for each in ids if history_fault(faults, each, 1) is None)
        answers = [await read(w, first), await read(w, other)]
        assert [answer.status_code for answer in answers] == [429, 429]
        assert {answer.headers["retry-after"] for answer in answers} == {"1"}
        assert await w.session(), "only histories are in the storm"
        async with asyncio.timeout(120):
            while (await read(w, other)).status_code == 429:  # noqa: ASYNC110  # the deadline is above
                await asyncio.sleep(0.05)
        received = await report(w)
    assert received["history_faults"]["busy"] == 1
    assert received["history_faults"]["storm"] == received["history"]["calls"] - 2


async def test_fault_slow_answers_late_and_in_full():
    async with world(Faults(history_slow=1)) as w:
        session_id, input_messages = await talked(w, turns=1)
        started = time.monotonic()
        answer = await read(w, session_id)
        assert time.monotonic() - started > 0.3
    assert answer.json()["session"]["messages"] == input_messages


async def test_fault_hanging_answers_nothing_and_does_not_outlive_its_caller():
    async with world(Faults(history_hanging=1)) as w:
        session_id = await w.session()
        with pytest.raises(httpx2.ReadTimeout):
            await w.http.get(f"/chats/session/{session_id}", timeout=0.3)
        async with asyncio.timeout(120):
            while not (received := await report(w))["history_statuses"]:  # noqa: ASYNC110  # the deadline is above
                await asyncio.sleep(0.01)
    assert (received["history_faults"], received["history_statuses"]) == ({"hanging": 1}, {"none": 1})


async def _history_faults(seed: int, chunk: int) -> list[list[tuple[int, bytes]]]:
    """What twelve sessions' first five history calls were answered, so many sessions at a time, times aside."""
    shares = {"missing": 0.1, "gone": 0.1, "empty": 0.1, "partial": 0.1, "error": 0.1, "garbage": 0.1, "shape": 0.1}
    chosen: dict[str, Any] = {f"history_{name}": share for name, share in shares.items()}
    async with world(Faults(seed=seed, **chosen)) as w:
        ids = [(await talked(w))[0] for _ in range(12)]

        async def five(session_id: str) -> list[tuple[int, bytes]]:
            answers = [await read(w, session_id) for _ in range(5)]
            updated_at = (w.platform.upstream.session(session_id).described())["updatedAt"].encode()
            return [(answer.status_code, answer.content.replace(updated_at, b"")) for answer in answers]

        result = []
        for start in range(0, 12, chunk):
            result += await asyncio.gather(*[five(session_id) for session_id in ids[start : start + chunk]])
    return result


async def test_a_seed_determines_history_faults_at_any_concurrency():
    first = await _history_faults(3, chunk=1)
    statuses = [[status for status, _ in answers] for answers in first]
    again = await _history_faults(3, chunk=12)
    assert [[status for status, _ in answers] for answers in again] == statuses
    # Half a document ends wherever its half is, so only whole ones can be compared.
    assert [[body for _, body in a if _is_a_history(body)] for a in again] == [
        [body for _, body in a if _is_a_history(body)] for a in first
    ]
    assert [[status for status, _ in answers] for answers in await _history_faults(4, chunk=12)] != statuses
    assert {200, 404, 410, 500} == {status for answers in statuses for status in answers}


def test_a_history_fault_depends_on_seed_session_and_call_alone():
    faults = with_history_faults(Faults(seed=1), 0.5)
    base = [history_fault(faults, "s1", call) for call in range(1, 31)]
    assert [history_fault(faults, "s1", call) for call in reversed(range(1, 31))] == base[::-1]
    assert [history_fault(faults, "s2", call) for call in range(1, 31)] != base
    assert [history_fault(replace(faults, seed=2), "s1", call) for call in range(1, 31)] != base
    assert len(set(base)) > 2


def test_a_share_of_history_faults_is_mixed_of_those_that_a_retry_outlives():
    assert with_history_faults(Faults(loss=0.5), 0) == Faults(loss=0.5)
    for share in (0.2, 1.0):
        faults = with_history_faults(Faults(seed=1), share)
        drawn = [history_fault(faults, f"s{number}", call) for number in range(200) for call in range(1, 6)]
        values = {fault: drawn.count(fault) for fault in get_args(HistoryFault)}
        assert {fault for fault, count in values.items() if count} == {"busy", "error", "slow", "hanging", "garbage"}
        assert abs(sum(values.values()) - 1000 * share) < 60
        assert all(abs(values[fault] - 200 * share) < 60 for fault in ("busy", "error", "slow", "hanging", "garbage"))


@pytest.mark.parametrize(("expired", "status"), [("gone", 410), ("missing", 404), ("empty", 200), ("full", 200)])
async def test_a_session_expires_in_each_way(expired, status):
    async with world(Faults(lifetime=1e-6, expired=expired)) as w:
        session_id, input_messages = await talked(w)
        answer = await read(w, session_id)
        assert (await report(w))["history_statuses"] == {str(status): 1}
    assert answer.status_code == status
    if status == 200:
        session = answer.json()["session"]
        assert (session["status"], session["messages"]) == ("expired", input_messages if expired == "full" else [])


async def test_a_session_within_its_lifetime_has_a_history():
    async with world(Faults(lifetime=3600)) as w:
        session_id, input_messages = await talked(w)
        session = (await read(w, session_id)).json()["session"]
    assert (session["status"], session["messages"]) == ("active", input_messages)


async def test_a_deleted_chat_may_stay_in_the_history_and_is_gone_all_the_same():
    async with world(Faults(keep_deleted=True)) as w:
        session_id = await w.session()
        chat = await w.api.send_message(session_id, "Forget me", None)
        remaining = await w.api.send_message(session_id, "ok", None)
        await w.api.delete_chat(chat["id"])
        history = await w.api.history(session_id)
        again = await w.http.delete(f"/chats/{chat['id']}")
        await w.deliveries()
    assert history["messages"] == [
        {"role": "user", "content": "Forget me"},
        *chat["output"],
        {"role": "user", "content": "ok"},
        *remaining["output"],
    ]
    assert again.status_code == 404
    assert sorted(kind for kind, _ in w.receiver.received()) == ["chat.created", "chat.created", "chat.deleted"]


async def test_each_history_answer_takes_as_long_as_is_wanted():
    async with world(Faults(history_latency=0.2)) as w:
        session_id = await w.session()
        started = time.monotonic()
        await read(w, session_id)
        assert time.monotonic() - started > 0.19


async def test_the_report_counts_history_calls():
    async with world() as w:
        assert (await report(w))["history"] == {"calls": 0}
        session_id = await w.session()
        for each in (session_id, session_id, "nowhere"):
            await read(w, each)
        received = await report(w)
    assert received["history"] == {"calls": 3}
    assert received["history_statuses"] == {"200": 2, "404": 1}
    assert received["history_faults"] == {}


def test_history_faults_that_add_up_to_more_than_all_calls_are_refused():
    tenths: dict[str, Any] = {f"history_{name}": 0.1 for name in get_args(HistoryFault)}
    assert Faults(**tenths).history_slow == 0.1
    with pytest.raises(ValueError, match="add up"):
        Faults(history_error=0.6, history_busy=0.5)


COMMANDS = [
    (["--lifetime", "0.000001"], 410, {}),
    (["--lifetime", "0.000001", "--expired", "missing", "--history-latency", "0.01"], 404, {}),
    (["--keep-deleted", "--history-faults", "0"], 200, {}),
    (["--history-faults", "1", "--seed", "2"], 429, {"busy": 1}),
]


@pytest.mark.parametrize(("options", "status", "faults"), COMMANDS)
def test_the_command_hands_its_options_to_the_platform(options, status, faults):
    port = str(free_port())
    command = [sys.executable, "-m", "archiver", "simulate", "--port", port, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "simulated CallHQ" in process.stdout.readline()
        with httpx2.Client(
            base_url=f"http://127.0.0.1:{port}/api", headers={"x-api-key": "k"}, trust_env=False, timeout=120
        ) as http:
            session_id = http.post("/sessions", json={"name": "N", "assistantId": "a"}).json()["session"]["id"]
            chat = http.post("/chats", json={"sessionId": session_id, "input": "ok"}).json()["chat"]
            http.delete(f"/chats/{chat['id']}")
            answer = http.get(f"/chats/session/{session_id}")
            received = http.get(f"http://127.0.0.1:{port}/simulator/report").json()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=240)
    assert (answer.status_code, received["history_faults"]) == (status, faults)
    if status == 200:
        assert len(answer.json()["session"]["messages"]) >= 2


@pytest.mark.parametrize("wrong", [{"loss": 1.1}, {"duplicates": -0.1}])
def test_a_fault_that_is_no_probability_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Faults(**wrong)


def test_a_session_has_room_for_a_bounded_number_of_chats():
    upstream = Upstream(Faults())
    session = upstream.create_session("N", "a")
    for _ in range(MAX_CHATS):
        upstream.create_chat(session.id, "ok", None)
    with pytest.raises(FullError):
        upstream.create_chat(session.id, "ok", None)


async def test_a_busy_receiver_is_tried_again_a_few_times():
    script = [JSONResponse({}, 503, {"retry-after": "0"}), JSONResponse({}, 500)]
    async with world(script=script) as w:
        await w.api.send_message(await w.session(), "Hello", None)
        [delivery] = await w.deliveries()
    assert (delivery.outcome, delivery.attempts, len(w.receiver.events)) == ("accepted", 3, 1)


async def test_retry_after_is_honoured_within_bounds():
    async with world(script=[JSONResponse({}, 429, {"retry-after": "86400"})]) as w:
        session_id, started = await w.session(), time.monotonic()
        await w.api.send_message(session_id, "Hello", None)
        async with asyncio.timeout(120):
            [delivery] = await w.deliveries()
    assert delivery.outcome == "accepted"
    assert time.monotonic() - started > 1


@pytest.mark.parametrize(("status", "attempts"), [(500, ATTEMPTS), (429, ATTEMPTS), (422, 1), (302, 1)])
async def test_a_refusal_is_final_after_bounded_attempts(status, attempts):
    async with world(script=[JSONResponse({}, status, {"retry-after": "0"}) for _ in range(10)]) as w:
        await w.api.send_message(await w.session(), "Hello", None)
        [delivery] = await w.deliveries()
    assert (delivery.outcome, delivery.status, delivery.attempts) == ("refused", status, attempts)
    assert w.receiver.requests == attempts


async def test_no_receiver_at_all_is_recorded_as_unanswered():
    async with serving(Starlette(), "127.0.0.1", 0) as url:
        deleted = url
    async with Sender(deleted, proving(), Record()) as sender:
        delivery = await sender.send(b"{}", None)
    assert (delivery.outcome, delivery.status) == ("unanswered", None)


async def test_a_webhook_over_tls_trusts_the_authorities_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = certificate(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0, ssl=context) as server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}/hook"
        async with Sender(url, proving(), Record()) as sender:
            assert (await sender.send(b"{}", None)).outcome == "unanswered"
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        async with Sender(url, proving(), Record()) as sender:
            assert (await sender.send(b"{}", None)).outcome == "accepted"


async def test_the_report_counts_what_was_sent():
    async with world(Faults(duplicates=1, seed=3)) as w:
        await w.api.send_message(await w.session(), "Hello", None)
        await w.deliveries()
        report = (await w.http.get(str(w.http.base_url).removesuffix("/api/") + "/simulator/report")).json()
    sent = report["totals"]["sent"]
    assert sent == len(w.receiver.events) == report["totals"]["copies"] + 1
    assert report["outcomes"] == {"accepted": sent}
    assert report["answers"] == {"stored": sent}
    assert report["faults"] == {"duplicates": sent}
    assert report["types"] == {"chat.created": sent}


async def test_a_port_that_is_taken_is_an_error_and_no_exit():
    async with serving(Starlette(), "127.0.0.1", 0) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            async with serving(Starlette(), "127.0.0.1", port):
                pass


@pytest.mark.parametrize(
    "url", ["localhost:8000/webhooks", "ftp://127.0.0.1/x", "http://", "http://127.0.0.1:port/x", "", "x\x00y"]
)
def test_a_webhook_url_that_is_none_is_refused(url):
    with pytest.raises(SettingsError, match="webhook URL"):
        simulate(
            with_secret(Settings.model_construct(), SECRET),
            host="127.0.0.1",
            port=0,
            webhook_url=url,
            faults=Faults(),
            api_key=None,
            announce=print,
        )


SIMULATE = """
import sys
from archiver.simulator.faults import Faults
from archiver.simulator.serving import simulate
from archiver.settings import Settings
sys.exit(simulate(Settings(), host="127.0.0.1", port=0, webhook_url=None, faults=Faults(), api_key=None,
                  announce=lambda url: print(url, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_simulate_runs_without_a_receiver_until_sigterm(number):
    command = [sys.executable, "-c", SIMULATE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        body = {"name": "N", "assistantId": "a"}
        answer = httpx2.post(
            f"{url}/api/sessions", json=body, headers={"x-api-key": "k"}, trust_env=False, timeout=120
        )
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
    assert (answer.status_code, process.returncode, errors) == (201, 0, "")
