"""Call the API of CallHQ, with retries and pauses."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import httpx2
import msgspec
import stamina
from pydantic import SecretStr

from archiver import database
from archiver.history.callhq.access import base, secret, segment
from archiver.history.callhq.connections import connection_pool
from archiver.history.callhq.registry import Registrar, Registry
from archiver.history.callhq.responses import (
    Answer,
    AttemptFailedError,
    RequestRefusedError,
    ThrottledError,
    TooLargeError,
    UnreachableError,
    check,
    failure,
    member,
)

ATTEMPT_SECONDS = 30.0  # for one attempt, up to the last byte of the response
ATTEMPTS = 4
READABLE_ATTEMPTS = 3  # of these, at an answer that can be read
MAX_PAUSES = 10  # per call
# For a pause of a single session: the call waits for a shorter one, a limited number of times; a longer one ends it.
SESSION_PAUSE_SECONDS, MAX_SESSION_PAUSES = 5.0, 2
MAX_BYTES = 64 * 1_048_576  # of one response, decompressed
_INITIAL_BACKOFF, _MAX_BACKOFF, _JITTER = 0.5, 10.0, 1.0  # seconds


class Pause(Protocol):
    """The pause that CallHQ requested, shared by all workers."""

    async def wait(self) -> None:
        """Return when no pause is in force."""

    async def set(self, seconds: float, reason: str, session_id: str | None) -> bool:
        """Record a requested pause of `seconds`, for one session or, with None, for all calls."""

    def session_answered(self, session_id: str) -> None:
        """Record that CallHQ answered for this session."""


class Client:
    """Call the documented API. Use it in `async with`.

    `concurrency` limits the concurrent calls. `rate` limits the calls that start per second, evenly spaced; None
    means
    no limit. Raises `SettingsError` if the key or the URL is invalid.
    """

    def __init__(
        self,
        api_url: str,
        api_key: SecretStr,
        *,
        pause: Pause,
        concurrency: int = 8,
        rate: float | None = None,
        registry: Registry | None = None,
        max_bytes: int = MAX_BYTES,
        timeout: float = ATTEMPT_SECONDS,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._url = base("CALLHQ_API_URL", api_url)
        self._headers = {"x-api-key": secret("CALLHQ_API_KEY", api_key)}
        self._pause = pause
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._attempts = attempts
        self._interval = 1 / rate if rate else 0.0
        self._next = 0.0  # on the loop's clock
        self._rate_lock = asyncio.Lock()
        self.concurrency = concurrency
        self._turns = asyncio.Semaphore(concurrency)
        self._pool = connection_pool(concurrency)
        self._registrar = Registrar(concurrency, registry) if registry else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.aclose()
        if self._registrar:
            await self._registrar.aclose()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until a call may begin, then hold one of `concurrency` turns during the block.

        For callers that choose what to call for at the last moment; the calls themselves wait as well.
        """
        async with self._turns:
            await self._pause.wait()
            yield

    async def history(self, session_id: str, is_readable: Callable[[Answer], bool] = lambda _: True) -> Answer:
        """Call `GET /chats/session/{id}`. Every status except 401, 403, 429 and 5xx is returned as a response.

        A response that is not readable is retried like a server error, and returned by the last attempt at it.

        Raises `UnreachableError`, `UnauthorizedError` and `TooLargeError`; `ValueError` for an invalid id.
        """
        if not session_id:
            raise ValueError("invalid session id: empty")
        return await self._call("GET", f"/chats/session/{segment(session_id)}", None, session_id, is_readable)

    async def create_session(self, name: str, assistant_id: str) -> dict[str, Any]:
        """Create a session with `POST /sessions` and return it. Raises any `CallError`."""
        body = {"name": name, "assistantId": assistant_id}
        session = await self._post("/sessions", "session", body)
        if self._registrar:
            await self._registrar.register(session)
        return session

    async def send_message(
        self, session_id: str, text: str, variables: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send a message with `POST /chats` and return the chat with the assistant's output. Raises any `CallError`.

        The message is never sent twice, so it may have arrived if `UnreachableError` is raised.
        """
        body: dict[str, Any] = {"sessionId": session_id, "input": text}
        if variables is not None:
            body["assistantOverrides"] = {"variableValues": variables}
        chat = await self._post("/chats", "chat", body)
        if self._registrar:
            await self._registrar.register({"id": session_id})
        return chat

    async def _post(self, path: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the object under `name` in the response."""
        answer = await self._call("POST", path, msgspec.json.encode(body))
        if not 200 <= answer.status < 300:  # noqa: PLR2004  # HTTP's successes
            raise RequestRefusedError(f"CallHQ returned {answer.status} to POST {path}.", answer.status)
        held = member(answer.body, name)
        if held is None or not isinstance(held.get("id"), str):
            raise RequestRefusedError(
                f"CallHQ returned {answer.status} to POST {path} without a {name}.", answer.status
            )
        return held

    async def _call(
        self,
        method: str,
        path: str,
        body: bytes | None,
        session_id: str | None = None,
        is_readable: Callable[[Answer], bool] = lambda _: True,
    ) -> Answer:
        """Call with retries and pauses. A request other than GET that may have arrived is not repeated."""
        pauses = Counter[bool]()  # counted by whether the pause applies to every call

        def is_retryable(error: Exception) -> bool:
            return isinstance(error, AttemptFailedError) and (method == "GET" or not error.was_sent)

        try:
            async for attempt in stamina.retry_context(
                on=is_retryable,
                attempts=self._attempts,
                timeout=None,
                wait_initial=_INITIAL_BACKOFF,
                wait_max=_MAX_BACKOFF,
                wait_jitter=_JITTER,
            ):
                with attempt:
                    answer = await self._send(method, path, body, session_id, pauses)
                    if not is_readable(answer) and attempt.num < min(READABLE_ATTEMPTS, self._attempts):
                        raise AttemptFailedError("its answer cannot be read", was_sent=True)  # noqa: TRY301  # for stamina
                    return answer
        except AttemptFailedError as error:
            # No chained error: it contains the request, and the request contains the key.
            raise UnreachableError(f"CallHQ did not respond: {error} (attempts: {attempt.num}).") from None
        raise AssertionError("stamina ended without a response or an error")

    async def _send(
        self, method: str, path: str, body: bytes | None, session_id: str | None, pauses: Counter[bool]
    ) -> Answer:
        """Send one attempt; it is repeated after each pause that CallHQ requests."""
        while True:
            try:
                answer = await self._send_once(method, path, body)
            except ThrottledError as busy:
                is_shared = await self._pause.set(busy.seconds, str(busy.status), session_id)
                pauses[is_shared] += 1
                await self._wait_or_raise(method, busy, pauses, is_shared=is_shared)
            else:
                if session_id is not None:
                    self._pause.session_answered(session_id)
                return answer

    async def _wait_or_raise(
        self, method: str, busy: ThrottledError, pauses: Counter[bool], *, is_shared: bool
    ) -> None:
        """Raise if the call ends here; otherwise wait for a pause of this session."""
        what = f"CallHQ is busy: it returned {busy.status}"
        if pauses[True] > MAX_PAUSES:
            raise UnreachableError(f"{what} after each of {MAX_PAUSES} pauses.")
        if method != "GET" and busy.status != httpx2.codes.TOO_MANY_REQUESTS:
            raise UnreachableError(f"{what}.")
        if is_shared:
            return
        if busy.seconds > SESSION_PAUSE_SECONDS or pauses[False] > MAX_SESSION_PAUSES:
            raise UnreachableError(f"{what} for this session.", busy.seconds)
        await asyncio.sleep(busy.seconds)

    async def _send_once(self, method: str, path: str, body: bytes | None) -> Answer:
        """Send one attempt and return its response. Raises an error that describes any other outcome."""
        headers = self._headers if body is None else {**self._headers, "content-type": "application/json"}
        async with self._pool.acquire() as http:  # waiting for a client does not count against the deadline
            await self._wait_for_permit()
            began = database.now()  # the database clock, so that all machines order turns alike
            try:
                async with (
                    asyncio.timeout(self._timeout),
                    http.stream(method, self._url + path, content=body, headers=headers) as response,
                ):
                    check(response)
                    return Answer(response.status_code, await self._read(response), began)
            except TimeoutError:
                raise AttemptFailedError(
                    f"the response was incomplete after {self._timeout:g} s", was_sent=True
                ) from None
            except httpx2.RequestError as error:
                raise failure(error) from None

    async def _wait_for_permit(self) -> None:
        """Wait until a call may begin. The pause is checked last, so that a waiter cannot miss it."""
        if not self._interval:
            await self._pause.wait()
            return
        loop = asyncio.get_running_loop()
        async with self._rate_lock:
            await asyncio.sleep(max(0.0, self._next - loop.time()))
            await self._pause.wait()
            self._next = loop.time() + self._interval

    async def _read(self, response: httpx2.Response) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > self._max_bytes:
                raise TooLargeError(f"CallHQ's response exceeds {self._max_bytes} bytes, the limit.")
        return bytes(body)
