"""Call the API of CallHQ, with retries and pauses."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from types import TracebackType
from typing import Protocol, Self

import httpx2
import msgspec
import stamina
from pydantic import SecretStr

from archiver import database
from archiver.history.callhq.access import base, secret, segment
from archiver.history.callhq.connections import connection_pool
from archiver.history.callhq.responses import (
    Answer,
    AttemptFailedError,
    AttemptTimedOutError,
    ThrottledError,
    TooLargeError,
    UnreachableError,
    check,
    failure,
)

ATTEMPT_SECONDS = 30.0  # for one attempt, up to the last byte of the response
ATTEMPTS = 4
READABLE_ATTEMPTS = 3  # of these, the attempts to get a readable response
MAX_PAUSES = 10  # per call
# For pauses of a single session: the call waits for a limited number of short ones; a longer pause ends the call.
SESSION_PAUSE_SECONDS, MAX_SESSION_PAUSES = 5.0, 2
MAX_BYTES = 64 * 1_048_576  # of one response, decompressed
_INITIAL_BACKOFF, _MAX_BACKOFF, _JITTER = 0.5, 10.0, 1.0  # seconds


class Pause(Protocol):
    """The pause that CallHQ requested, shared by all workers."""

    async def wait(self) -> None:
        """Wait until no pause is in force."""

    async def set(self, seconds: float, reason: str, session_id: str) -> bool:
        """Record that a call for this session must wait `seconds`; return whether all calls must wait."""

    def session_answered(self, session_id: str) -> None:
        """Record that CallHQ responded for this session."""


class Limits(msgspec.Struct, frozen=True, gc=False):
    """Limits on a call, so that sessions whose histories hang leave turns for others.

    An attempt that takes `seconds` is not repeated, and no attempt begins after that time. Calls with `is_retry`, for
    sessions whose previous reading failed, occupy at most half of the turns.
    """

    seconds: float
    is_retry: bool = False


class Client:
    """A client of the documented API. Use it in `async with`.

    `concurrency` limits the concurrent calls. `rate` limits the calls that start per second, evenly spaced; None
    means no limit. Raises `SettingsError` if the key or the URL is invalid.
    """

    def __init__(
        self,
        api_url: str,
        api_key: SecretStr,
        *,
        pause: Pause,
        concurrency: int = 8,
        rate: float | None = None,
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
        self._retry_turns = asyncio.Semaphore(max(concurrency // 2, 1))
        self._pool = connection_pool(concurrency)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.aclose()

    @asynccontextmanager
    async def turn(self, *, is_retry: bool = False) -> AsyncIterator[None]:
        """Wait until a call may begin, and occupy one of `concurrency` turns during the block.

        For callers that choose the session to call for at the last moment; the calls themselves wait as well.
        `is_retry`: as in `Limits`.
        """
        async with self._retry_turns if is_retry else nullcontext(), self._turns:
            await self._pause.wait()
            yield

    async def history(
        self, session_id: str, is_readable: Callable[[Answer], bool] = lambda _: True, limits: Limits | None = None
    ) -> Answer:
        """Call `GET /chats/session/{id}`. Every status except 401, 403, 429 and 5xx is returned as a response.

        An unreadable response is retried like a server error; after `READABLE_ATTEMPTS` attempts it is returned.
        Without `limits`, each attempt has the time limit of the client, and one that exceeds it is also retried.

        Raises `UnreachableError`, `UnauthorizedError` and `TooLargeError`; `ValueError` for an invalid id.
        """
        if not session_id:
            raise ValueError("invalid session id: empty")
        return await self._call(f"/chats/session/{segment(session_id)}", session_id, is_readable, limits)

    async def _call(
        self, path: str, session_id: str, is_readable: Callable[[Answer], bool], limits: Limits | None
    ) -> Answer:
        """Call with retries and pauses."""
        pauses = Counter[bool]()  # counted by whether the pause applies to every call
        attempt_seconds = self._timeout if limits is None else limits.seconds

        def is_retried(error: Exception) -> bool:
            is_too_slow = limits is not None and isinstance(error, AttemptTimedOutError)
            return isinstance(error, AttemptFailedError) and not is_too_slow

        try:
            async for attempt in stamina.retry_context(
                on=is_retried,
                attempts=self._attempts,
                timeout=None if limits is None else limits.seconds,
                wait_initial=_INITIAL_BACKOFF,
                wait_max=_MAX_BACKOFF,
                wait_jitter=_JITTER,
            ):
                with attempt:
                    answer = await self._send(path, session_id, pauses, attempt_seconds)
                    if not is_readable(answer) and attempt.num < min(READABLE_ATTEMPTS, self._attempts):
                        raise AttemptFailedError("its response cannot be read")  # noqa: TRY301  # for stamina
                    return answer
        except AttemptFailedError as error:
            # No chained error: it contains the request, and the request contains the key.
            raise UnreachableError(f"the call to CallHQ failed: {error} (attempts: {attempt.num})") from None
        raise AssertionError("stamina ended without a response or an error")

    async def _send(self, path: str, session_id: str, pauses: Counter[bool], seconds: float) -> Answer:
        """Send one attempt; it is repeated after each pause that CallHQ requests."""
        while True:
            try:
                answer = await self._send_once(path, seconds)
            except ThrottledError as busy:
                is_shared = await self._pause.set(busy.seconds, str(busy.status), session_id)
                pauses[is_shared] += 1
                await self._wait_or_raise(busy, pauses, is_shared=is_shared)
            else:
                self._pause.session_answered(session_id)
                return answer

    async def _wait_or_raise(self, busy: ThrottledError, pauses: Counter[bool], *, is_shared: bool) -> None:
        """Raise `UnreachableError` after too many or too long pauses; otherwise wait for a pause of this session."""
        what = f"CallHQ is busy: it returned {busy.status}"
        if pauses[True] > MAX_PAUSES:
            raise UnreachableError(f"{what} after each of {MAX_PAUSES} pauses")
        if is_shared:
            return
        if busy.seconds > SESSION_PAUSE_SECONDS or pauses[False] > MAX_SESSION_PAUSES:
            raise UnreachableError(f"{what} for this session", busy.seconds)
        await asyncio.sleep(busy.seconds)

    async def _send_once(self, path: str, seconds: float) -> Answer:
        """Send one attempt and return its response. Raises an error that describes any other outcome."""
        async with self._pool.acquire() as http:  # waiting for a client does not count against the deadline
            await self._wait_for_permit()
            began = database.now()  # the database clock, so that all machines order turns alike
            try:
                async with (
                    asyncio.timeout(seconds),
                    http.stream("GET", self._url + path, headers=self._headers) as response,
                ):
                    check(response)
                    return Answer(response.status_code, await self._read(response), began)
            except TimeoutError:
                raise AttemptTimedOutError(f"the response was incomplete after {seconds:g} s") from None
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
                raise TooLargeError(f"CallHQ's response exceeds {self._max_bytes} bytes, the limit")
        return bytes(body)
