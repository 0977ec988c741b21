"""Asking CallHQ for histories: an answer as a fact, or why there is none, and what all answers together say of the
key and of the URL.
"""

from datetime import datetime
from time import perf_counter

import msgspec
import stamina
import structlog

from archiver import database, history, telemetry
from archiver.callhq import Client, TooLargeError, UnauthorizedError, UnreachableError
from archiver.events import Event

log = structlog.get_logger(__name__)

REFUSALS = 5  # of sessions, and none accepted: it is the key
MISSING = 5  # sessions, and none found: it is the URL, or so it seems
ATTEMPTS = 3  # at an answer that can be read
NOT_FOUND = 404
_FIRST_BACKOFF, _LONGEST_BACKOFF, _JITTER = 0.5, 5.0, 0.5  # seconds


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What a call came to: the fact, or why there is none.

    `began`: when the call that was answered did, or the first that was not. `retry_after`: seconds for which CallHQ
    does not want to be asked about this session.
    """

    began: datetime
    event: Event | None
    fault: str = ""
    status: int = 0
    retry_after: float = 0.0

    @property
    def is_odd(self) -> bool:
        """Whether it was told that all is well, and then nothing that can be understood."""
        is_success = self.status in range(200, 300)
        return is_success and self.event is not None and self.event.type == history.UNREADABLE


class Asking:
    """Asks with one client, and so with one key."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._accepted, self._refused = 0, 0  # calls, with this key
        self._missing = 0  # of those accepted: answered 404

    @property
    def finds_nothing(self) -> bool:
        """Whether every answer was 404, as it is where the URL is not the API's."""
        return 0 < self._missing == self._accepted and not self._refused

    def check_key(self) -> None:
        """Raises `UnauthorizedError` if the key was refused for all sessions."""
        if self._refused and not self._accepted:
            raise UnauthorizedError

    async def answer(self, session_id: str) -> Answer:
        """The history of a session. What cannot be read is asked for again, like what a server failed at: a proxy may
        have said it.

        Raises `UnauthorizedError` where the key is refused again and again and never accepted.
        """
        attempts = stamina.retry_context(
            on=_OddError,
            attempts=ATTEMPTS,
            timeout=None,
            wait_initial=_FIRST_BACKOFF,
            wait_max=_LONGEST_BACKOFF,
            wait_jitter=_JITTER,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    return await self._ask_once(session_id)
        except _OddError as odd:
            return odd.answer
        raise AssertionError("stamina ends with an answer or with an error")

    async def _ask_once(self, session_id: str) -> Answer:
        answer = await self._ask(session_id)
        if answer.is_odd:
            raise _OddError(answer)
        return answer

    async def _ask(self, session_id: str) -> Answer:
        began, started = database.now(), perf_counter()
        try:
            answer = await self._client.history(session_id)
        except UnreachableError as error:
            return Answer(began, None, str(error), retry_after=error.retry_after)
        except TooLargeError as error:
            log.warning("history too large", session_id=session_id, error=str(error))
            return Answer(began, history.observe(session_id, 413, b""), status=413)
        except UnauthorizedError:
            self._refused += 1
            if not self._accepted and self._refused >= REFUSALS:
                raise
            what = "this session" if self._accepted else "the key, or this session"
            return Answer(began, None, f"CallHQ refuses {what}: is it one of the account of CALLHQ_API_KEY?")
        self._accept(answer.status)
        telemetry.reading_seconds.observe(perf_counter() - started)
        event = history.observe(session_id, answer.status, answer.body)
        return Answer(answer.began, event, status=answer.status)

    def _accept(self, status: int) -> None:
        self._accepted += 1
        self._missing += status == NOT_FOUND
        if self._missing == self._accepted == MISSING:
            log.warning("CallHQ answers 404 for every session: is CALLHQ_API_URL right? Ask archiver doctor")


class _OddError(Exception):
    """An answer that may be another one when it is asked for again."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer
