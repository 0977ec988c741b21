"""The client of CallHQ's API, against real servers that answer late, wrongly, endlessly or not at all."""

import asyncio
import gzip
import json
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from urllib.parse import unquote

import pytest
import stamina
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from archiver.history.callhq import (
    Answer,
    CallError,
    Client,
    Limits,
    TooLargeError,
    UnauthorizedError,
    UnreachableError,
)
from archiver.history.callhq.client import ATTEMPTS, MAX_PAUSES, MAX_SESSION_PAUSES, READABLE_ATTEMPTS
from archiver.inbound import signatures
from archiver.settings import Settings, SettingsError
from archiver.simulator import client as customers
from archiver.simulator.faults import Faults
from archiver.simulator.platform import Platform, create
from archiver.simulator.serving import serving
from archiver.simulator.webhooks import Record, Sender
from tests.support.ports import free_port

KEY = "the-key-5b1f0c"
CARD = "my card number is 4929"
FOUND = b'{"session": {"id": "s1", "messages": []}}'


@pytest.fixture(autouse=True)
def _no_backoff() -> Iterator[None]:
    """As many attempts as ever, without the waiting between them."""
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


@dataclass
class Pauses:
    """Keeps the order in which a client waited, called (the server tells that) and was told to wait."""

    log: list[str] = field(default_factory=list)

    async def wait(self) -> None:
        self.log.append("wait")

    async def set(self, seconds: float, reason: str, session_id: str) -> bool:
        self.log.append(f"set {seconds:g} {reason}")
        return True

    def session_answered(self, session_id: str) -> None:
        """No matter here."""

    @property
    def seconds(self) -> list[float]:
        return [float(entry.split()[1]) for entry in self.log if entry.startswith("set")]


class RealPauses(Pauses):
    """Lets everybody wait, as the shared pause does."""

    until = 0.0

    async def wait(self) -> None:
        await super().wait()
        await asyncio.sleep(self.until - asyncio.get_running_loop().time())

    async def set(self, seconds: float, reason: str, session_id: str) -> bool:
        await super().set(seconds, reason, session_id)
        self.until = asyncio.get_running_loop().time() + seconds
        return True


@dataclass
class Call:
    method: str
    path: str  # as it was sent
    headers: dict[str, str]
    body: bytes
    port: int


Scripted = Response | Callable[[Request], Awaitable[Response]]


@dataclass
class Server:
    """Answers as scripted, then always 200 with an empty history."""

    script: list[Scripted] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    pauses: Pauses = field(default_factory=Pauses)
    url: str = ""

    async def answer(self, request: Request) -> Response:
        assert request.client is not None
        raw_path: bytes = request.scope["raw_path"]
        body = await request.body()
        self.pauses.log.append("call")
        self.calls.append(
            Call(request.method, raw_path.decode(), dict(request.headers), body, request.client.port),
        )
        if self.script:
            scripted = self.script.pop(0)
            return scripted if isinstance(scripted, Response) else await scripted(request)
        return Response(FOUND)


@asynccontextmanager
async def server(script: Sequence[Scripted] = ()) -> AsyncIterator[Server]:
    scripted = Server([*script])
    app = Starlette(routes=[Route("/{path:path}", scripted.answer)])
    async with serving(app, "127.0.0.1", 0) as scripted.url:
        yield scripted


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_server(talk: Talk) -> AsyncIterator[Server]:
    """Reads the head of a request and lets `talk` say anything; each connection is one call."""
    counting = Server()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            counting.calls.append(Call(head.decode().split()[0], "", {}, b"", 0))
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listening:
        counting.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        yield counting


def saying(data: bytes) -> Talk:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return talk


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()  # until the client has gone


def dripping(start: bytes, drop: bytes) -> Talk:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while not writer.is_closing():
            await writer.drain()
            await asyncio.sleep(0.005)  # what is tested is a server that does this
            writer.write(drop)

    return talk


async def hanging(request: Request) -> Response:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return Response(status_code=500)


def connect(to: Server, **options: Any) -> Client:
    return Client(f"{to.url}/api", SecretStr(KEY), **{"pause": to.pauses, **options})


# Answers


@pytest.mark.parametrize("status", [200, 201, 206, 301, 304, 400, 402, 404, 410, 413, 418, 422, 451])
async def test_a_response_is_returned_byte_for_byte_with_any_status(status):
    body = b"" if status == 304 else b'\xff\x00{"session": \n'
    async with server([Response(body, status)]) as s, connect(s) as client:
        assert status_and_body(await client.history("s1")) == (status, body)
    assert [(call.method, call.path) for call in s.calls] == [("GET", "/api/chats/session/s1")]
    assert s.calls[0].headers["x-api-key"] == KEY


async def test_a_redirect_is_an_answer_and_not_followed():
    async with server() as elsewhere, server([RedirectResponse(elsewhere.url)]) as s, connect(s) as client:
        assert (await client.history("s1")).status == 307
    assert (len(s.calls), elsewhere.calls) == (1, [])


async def test_a_compressed_response_is_returned_decompressed():
    packed = Response(gzip.compress(FOUND), headers={"content-encoding": "gzip"})
    async with server([packed]) as s, connect(s) as client:
        assert status_and_body(await client.history("s1")) == (200, FOUND)
    assert s.calls[0].headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize(
    "session_id", ["a/b", "../x", "..", ".", "a?b#c", "%2F", "a b+c", "שלום 👍", "\x00\n", "a\\b"]
)
async def test_any_id_is_one_path_segment(session_id):
    async with server() as s, connect(s) as client:
        await client.history(session_id)
    [call] = s.calls
    before, _, segment = call.path.rpartition("/")
    assert (before, unquote(segment)) == ("/api/chats/session", session_id)
    assert segment not in {".", ".."}


@pytest.mark.parametrize("session_id", ["", "\ud800"])
async def test_an_empty_id_causes_no_request(session_id):
    async with server() as s, connect(s) as client:
        with pytest.raises(ValueError, match=r"."):
            await client.history(session_id)
    assert s.calls == []


# Failures


async def test_server_errors_are_tried_again_until_there_is_an_answer():
    script = [Response(status_code=500), Response(status_code=502), Response(b"x", 404)]
    async with server(script) as s, connect(s) as client:
        assert status_and_body(await client.history("s1")) == (404, b"x")
    assert len(s.calls) == 3


async def test_an_answer_that_cannot_be_read_is_tried_again_and_the_last_one_is_the_answer():
    garbage = Response(b"<html>")
    async with server([garbage, Response(b"x", 404)]) as s, connect(s) as client:
        answer = await client.history("s1", lambda answer: answer.status == 404)
        assert (answer.status, len(s.calls)) == (404, 2)
    async with server([garbage] * 9) as s, connect(s) as client:
        answer = await client.history("s1", lambda _: False)
        assert (answer.body, len(s.calls)) == (b"<html>", READABLE_ATTEMPTS)


async def test_attempts_are_bounded_and_the_error_says_what_happened():
    script = [Response(CARD, 500), Response(CARD, 599), *[Response(CARD, 504)] * 9]
    async with server(script) as s, connect(s) as client:
        with pytest.raises(UnreachableError, match=r"it returned 504 \(attempts: 4\)") as raised:
            await client.history("s1")
    assert len(s.calls) == ATTEMPTS == 4
    assert CARD not in str(raised.value)


BROKEN = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.9 " + CARD.encode() + b"\r\n",
    "a bad status": b"HTTP/1.1 200x " + CARD.encode() + b"\r\n\r\n",
    "a bad header": b"HTTP/1.1 200 OK\r\n" + CARD.encode() + b"\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + CARD.encode(),
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n" + CARD.encode(),
    "no gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    "endless head": b"HTTP/1.1 200 OK\r\nx: " + b"x" * 1_000_000,
}


@pytest.mark.parametrize("said", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_response_is_retried_and_never_returned(said):
    async with raw_server(saying(said)) as s, connect(s) as client:
        with pytest.raises(UnreachableError) as raised:
            await client.history("s1")
    assert len(s.calls) == ATTEMPTS
    assert CARD not in str(raised.value)


async def test_a_refused_connection_is_reported():
    deleted = Server(url=f"http://127.0.0.1:{free_port()}")
    async with connect(deleted) as client:
        with pytest.raises(UnreachableError, match=r"cannot connect: .+ \(attempts: 4\)"):
            await client.history("s1")


async def test_a_hanging_server_costs_an_attempt_and_leaves_the_connection_usable():
    async with server([hanging, hanging]) as s, connect(s, timeout=0.5, concurrency=1) as client:
        assert (await client.history("s1")).body == FOUND
        assert (await client.history("s1")).body == FOUND
    assert len(s.calls) == 4


async def test_a_server_that_hangs_for_ever_is_given_up():
    async with raw_server(silent) as s, connect(s, timeout=0.3) as client:
        with pytest.raises(UnreachableError, match="the response was incomplete"):
            await client.history("s1")
    assert len(s.calls) == ATTEMPTS


async def test_i13_a_limited_call_ends_with_an_attempt_that_is_too_slow_and_repeats_other_failures():
    async with raw_server(silent) as s, connect(s) as client:
        with pytest.raises(UnreachableError, match=r"incomplete after 0\.3 s \(attempts: 1\)"):
            await client.history("s1", limits=Limits(0.3))
    assert len(s.calls) == 1
    async with server([Response(status_code=500)] * 3) as s, connect(s) as client:
        assert (await client.history("s1", limits=Limits(60))).body == FOUND
    assert len(s.calls) == ATTEMPTS


@pytest.mark.parametrize(("turns", "others"), [(1, 0), (2, 1), (4, 2), (5, 3)])
async def test_i13_retries_occupy_at_most_half_of_the_turns(turns, others):
    async with server() as s, connect(s, concurrency=turns) as client:
        entered, ending = asyncio.Semaphore(0), asyncio.Event()

        async def hold_turn(*, is_retry: bool) -> None:
            async with client.turn(is_retry=is_retry):
                if not is_retry:
                    entered.release()
                await ending.wait()

        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            for is_retry in [True] * turns + [False] * others:
                tasks.create_task(hold_turn(is_retry=is_retry))
            for _ in range(others):
                await entered.acquire()
            ending.set()


DRIPS = {
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "head": (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
}


@pytest.mark.parametrize(("start", "drop"), DRIPS.values(), ids=DRIPS.keys())
async def test_a_server_that_drips_cannot_hold_a_call(start, drop):
    async with raw_server(dripping(start, drop)) as s, connect(s, timeout=0.3) as client:
        async with asyncio.timeout(120):
            with pytest.raises(UnreachableError, match=r"the response was incomplete after 0\.3 s"):
                await client.history("s1")
    assert len(s.calls) == ATTEMPTS


async def test_a_caller_that_gives_up_is_obeyed_at_once_and_leaves_no_slot_taken():
    async def hanging_up(request: Request) -> Response:
        deadline.reschedule(asyncio.get_running_loop().time())
        return await hanging(request)

    async with server([hanging_up]) as s, connect(s, concurrency=1) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as deadline:
                await client.history("s1")
        assert (await client.history("s1")).status == 200
    assert len(s.calls) == 2


def status_and_body(answer: Answer) -> tuple[int, bytes]:
    return answer.status, answer.body


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_not_tried_again_and_the_error_names_the_setting(status):
    async with server([Response(CARD, status)] * 9) as s, connect(s) as client:
        with pytest.raises(UnauthorizedError, match="CALLHQ_API_KEY") as raised:
            await client.history("s1")
        with pytest.raises(UnauthorizedError):
            await client.history("s2")
    assert len(s.calls) == 2
    assert CARD not in str(raised.value)


# Pauses and rate


def busy(status: int = 429, **headers: str) -> Response:
    return Response(status_code=status, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("status", [429, 503])
async def test_a_pause_is_shared_and_waited_for_before_the_next_attempt(status):
    async with server([busy(status, retry_after="7")]) as s, connect(s) as client:
        assert (await client.history("s1")).status == 200
    assert s.pauses.log == ["wait", "call", f"set 7 {status}", "wait", "call"]


async def test_who_waits_for_another_call_looks_at_the_pause_when_it_is_their_turn():
    async with server() as s, connect(s, concurrency=1) as client:
        await asyncio.gather(*[client.history(f"s{n}") for n in range(3)])
    assert s.pauses.log == ["wait", "call"] * 3


async def test_every_attempt_waits_for_the_shared_pause():
    script = [busy(), Response(status_code=500), busy(503)] * 3
    async with server(script) as s, connect(s, concurrency=3) as client:
        await asyncio.gather(*[client.history(f"s{n}") for n in range(9)])
    for length in range(len(s.pauses.log)):
        assert s.pauses.log[:length].count("wait") >= s.pauses.log[:length].count("call")
    assert s.pauses.log.count("wait") == s.pauses.log.count("call") == len(s.calls) == 18


async def test_retry_after_is_read_in_every_form_and_kept_within_bounds():
    forms = {
        "0": 1,
        "30": 30,
        " 2.5 ": 2.5,
        "3599": 3599,
        "3601": 3600,
        "9" * 5000: 3600,
        "": 5,
        "-3": 5,
        "soon": 5,
        "1e3": 5,
        "٣": 5,
        "Wed, 99 Foo 2026 99:99:99 GMT": 5,
        "Wed, 21 Oct 2015 07:28:00 GMT": 1,
        "Wed, 21 Oct 2015 07:28:00 -0000": 1,
        "Fri, 31 Dec 9999 23:59:59 GMT": 3600,
    }
    script: list[Scripted] = []
    for form in forms:
        response = busy()
        response.raw_headers.append((b"retry-after", form.encode()))
        script.append(response)
    async with server([*script, busy()]) as s, connect(s) as client:
        with pytest.raises(UnreachableError):
            await client.history("s1")
        await client.history("s1")
    assert s.pauses.seconds == [*forms.values(), 5]


async def test_retry_after_may_be_a_date():
    moment = datetime.now(UTC) + timedelta(minutes=30)
    async with server([busy(retry_after=format_datetime(moment, usegmt=True))]) as s, connect(s) as client:
        await client.history("s1")
    [seconds] = s.pauses.seconds
    assert 1200 < seconds <= 1800


async def test_a_pause_is_no_failed_attempt():
    failed: Scripted = Response(status_code=500)
    script = [failed, busy(), failed, busy(503), busy(), failed, *[busy()] * 4]
    async with server(script) as s, connect(s) as client:
        assert (await client.history("s1")).status == 200
    assert len(s.calls) == 11


async def test_failures_are_counted_across_pauses():
    failed: Scripted = Response(status_code=500)
    async with server([failed, busy()] * 9) as s, connect(s) as client:
        with pytest.raises(UnreachableError, match="500"):
            await client.history("s1")
    assert len(s.calls) == 7


@pytest.mark.parametrize("status", [429, 503])
async def test_pauses_are_bounded(status):
    async with server([busy(status)] * 99) as s, connect(s) as client:
        with pytest.raises(UnreachableError, match=f"busy.*{status}"):
            await client.history("s1")
    assert len(s.calls) == MAX_PAUSES + 1


class OwnPauses(Pauses):
    """Each pause is for its session alone."""

    async def set(self, seconds: float, reason: str, session_id: str) -> bool:
        await super().set(seconds, reason, session_id)
        return False


async def test_a_long_pause_for_one_session_ends_its_call_and_says_for_how_long():
    pauses = OwnPauses()
    async with server([busy(503, retry_after="300")]) as s, connect(s, pause=pauses) as client:
        with pytest.raises(UnreachableError, match="503 for this session") as raised:
            await client.history("s1")
        assert (await client.history("s2")).status == 200
    assert (raised.value.retry_after, len(s.calls)) == (300, 2)


async def test_short_pauses_for_one_session_are_waited_for_and_bounded():
    pauses = OwnPauses()
    async with server([busy(429, retry_after="1")] * 9) as s, connect(s, pause=pauses) as client:
        with pytest.raises(UnreachableError, match="429 for this session"):
            await client.history("s1")
    assert len(s.calls) == MAX_SESSION_PAUSES + 1


async def test_no_more_calls_run_at_a_time_than_allowed():
    running, limit = 0, 0
    full = asyncio.Event()

    async def counting(_: Request) -> Response:
        nonlocal running, limit
        running += 1
        limit = max(limit, running)
        if running == 3:
            full.set()
        await full.wait()
        for __ in range(20):  # so that one too many would be seen
            await asyncio.sleep(0)
        running -= 1
        return Response(FOUND)

    async with server([counting] * 12) as s, connect(s, concurrency=3) as client:
        await asyncio.gather(*[client.history(f"s{n}") for n in range(12)])
    assert limit == 3
    assert len({call.port for call in s.calls}) == 3


async def test_connections_are_used_again():
    async with server([Response(b"x" * 200_000, 200), Response(b"x", 404)]) as s, connect(s) as client:
        for number in range(5):
            await client.history(f"s{number}")
    assert len({call.port for call in s.calls}) == 1


@dataclass
class Times(Pauses):
    """When each attempt may go."""

    times: list[float] = field(default_factory=list)

    async def wait(self) -> None:
        self.times.append(asyncio.get_running_loop().time())


@dataclass
class Gate(Pauses):
    """A pause that lasts until it is opened; says when so many wait for it."""

    waiting: int = 2
    is_full: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> None:
        await super().wait()
        if self.log.count("wait") == self.waiting:
            self.is_full.set()
        await self.opened.wait()


async def test_turns_wait_for_the_pause_and_no_more_are_held_than_calls_may_run():
    gate, chosen, both, leaving = Gate(), list[int](), asyncio.Event(), asyncio.Event()
    async with server() as s, connect(s, concurrency=2, pause=gate) as client:

        async def take(number: int) -> None:
            async with client.turn():
                chosen.append(number)
                if len(chosen) == 2:
                    both.set()
                await leaving.wait()

        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            for number in range(5):
                tasks.create_task(take(number))
            await gate.is_full.wait()
            assert chosen == []
            gate.opened.set()
            await both.wait()
            assert (len(chosen), gate.log.count("wait")) == (2, 2)
            leaving.set()
    assert sorted(chosen) == [*range(5)]


async def test_the_rate_spaces_calls_evenly_however_many_wait():
    pauses = Times()
    async with server([Response(status_code=500)]) as s, connect(s, rate=25, pause=pauses) as client:
        await asyncio.gather(*[client.history(f"s{n}") for n in range(8)])
    gaps = [later - earlier for earlier, later in zip(pauses.times, pauses.times[1:], strict=False)]
    assert len(gaps) == 8
    assert min(gaps) > 0.039


# Size


async def test_a_body_of_the_largest_size_is_an_answer_and_one_byte_more_is_not():
    script = [Response(b"x" * 1000), Response(b"x" * 1001), Response(b"x" * 1001, 404)]
    async with server(script) as s, connect(s, max_bytes=1000) as client:
        assert len((await client.history("s1")).body) == 1000
        for _ in range(2):
            with pytest.raises(TooLargeError, match="1000 bytes"):
                await client.history("s1")
        assert (await client.history("s1")).body == FOUND
    assert len(s.calls) == 4


async def test_reading_stops_as_soon_as_a_body_is_too_large():
    was_left = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 10_000
                await asyncio.sleep(0)
        finally:
            was_left.set()

    async with server([StreamingResponse(endless())]) as s, connect(s, max_bytes=50_000) as client:
        with pytest.raises(TooLargeError):
            await client.history("s1")
        async with asyncio.timeout(120):
            await was_left.wait()
    assert len(s.calls) == 1


async def test_a_decompression_bomb_is_measured_by_what_it_becomes():
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 60_000
    packed = Response(bomb, headers={"content-encoding": "gzip"})
    async with server([packed]) as s, connect(s, max_bytes=100_000) as client:
        with pytest.raises(TooLargeError):
            await client.history("s1")
    assert len(s.calls) == 1


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "deflate"])
async def test_an_encoding_that_was_not_asked_for_is_no_answer(encoding):
    async with server([Response(b"abc", headers={"content-encoding": encoding})] * 9) as s, connect(s) as client:
        with pytest.raises(UnreachableError, match="Content-Encoding"):
            await client.history("s1")


# Secrets


async def test_neither_key_nor_content_is_in_any_error_log_or_representation(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    status_and_body: list[str] = []

    async def fail(s: Server) -> None:
        async with connect(s, timeout=0.2, max_bytes=500) as client:
            status_and_body.extend((repr(client), str(client)))
            try:
                await client.history("s1")
            except CallError as error:
                status_and_body.extend((repr(error), *traceback.format_exception(error)))

    for texts in BROKEN.values():
        async with raw_server(saying(texts)) as s:
            await fail(s)
    scripts: list[Sequence[Scripted]] = [
        [Response(CARD, status)] * 20 for status in (301, 400, 401, 404, 429, 500, 503)
    ]
    for script in [*scripts, [hanging] * 20, [Response(b"x" * 501)] * 20]:
        async with server(script) as s:
            await fail(s)
    await fail(s)  # which is gone
    captured = capfd.readouterr()
    own = "\n".join([*status_and_body, captured.out, captured.err])
    assert "UnreachableError" in own
    assert "stamina.retry_scheduled" in own
    # What httpcore2 logs at DEBUG quotes broken answers; `telemetry` mutes it.
    others = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpcore2"))
    assert CARD not in own + others
    assert KEY not in own + caplog.text


@pytest.mark.parametrize("key", ["", "  ", "secret-part\nx: y", "secret-part\x7f", "secret-part-é", "secret-part\r"])
def test_a_key_that_no_header_can_hold_is_refused_by_name(key):
    if key.strip() == "secret-part":
        Client("http://127.0.0.1/api", SecretStr(key), pause=Pauses())
        return
    with pytest.raises(SettingsError, match="CALLHQ_API_KEY") as raised:
        Client("http://127.0.0.1/api", SecretStr(key), pause=Pauses())
    assert "secret-part" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["", "api.callhq.ai/api", "ftp://host/x", "http://", "http://h:port/x", "https://u:pass@h/x?y=1", "x\x00y"]
)
def test_an_invalid_url_is_refused_without_quoting_it(url):
    with pytest.raises(SettingsError, match="CALLHQ_API_URL") as raised:
        Client(url, SecretStr(KEY), pause=Pauses())
    assert "pass" not in str(raised.value)


# The simulated platform


async def test_through_all_that_goes_wrong_the_platforms_histories_are_read():
    faults = Faults(seed=143, history_error=0.25, history_busy=0.03, history_hanging=0.05)
    signer = signatures.verifier(Settings.model_construct(webhook_scheme="none"))
    platform = Platform(Sender(None, signer, Record()), faults, KEY)
    truth = Server(pauses=RealPauses())
    async with (
        serving(create(platform), "127.0.0.1", 0) as truth.url,
        customers.connect(f"{truth.url}/api", KEY) as http,
        connect(truth, timeout=10) as client,
    ):
        application = customers.Client(http)
        ids = [(await application.create_session(f"N{n}", "a"))["id"] for n in range(12)]
        for session_id in ids:
            for text in ("Hello", "ok", "ok"):
                await application.send_message(session_id, text, None)
        answers = await asyncio.gather(*[client.history(session_id) for session_id in ids])
        report = (await http.get(f"{truth.url}/simulator/report")).json()
    for session_id, answer in zip(ids, answers, strict=True):
        assert answer.status == 200
        status_and_body = json.loads(answer.body)["session"]["messages"]
        assert status_and_body == platform.upstream.session(session_id).messages()
    played = report["history_faults"]
    assert all(played[fault] for fault in ("error", "busy", "hanging"))
    assert report["history"]["calls"] == sum(played.values()) + len(ids)
