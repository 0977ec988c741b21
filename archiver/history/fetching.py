"""Fetch histories; return each response as a fact, or the reason why there is none. Detect a wrong key or URL."""

from datetime import datetime
from time import perf_counter
from typing import Self

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from archiver import database, telemetry
from archiver.events import Event, responses
from archiver.history import callhq
from archiver.history.callhq import Client, Limits, TooLargeError, UnauthorizedError, UnreachableError

log = structlog.get_logger(__name__)

MAX_REFUSALS = 5  # rejected calls without an accepted one, after which the key counts as invalid
MAX_NOT_FOUND = 5  # 404 responses without a found session, after which the URL is suspect
NOT_FOUND = 404


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The result of a history call: the fact, or the reason why there is none.

    `began`: when the successful attempt began, or the first failed one. `retry_after`: seconds that CallHQ requested
    to wait for this session. `defect`: the unexpected error that this session caused in the archiver.
    """

    began: datetime
    event: Event | None
    fault: str = ""
    status: int = 0
    retry_after: float = 0.0
    defect: Exception | None = None

    @classmethod
    def of_defect(cls, began: datetime, error: Exception) -> Self:
        """Return the result of a call during which the archiver itself failed."""
        fault = (
            f"The database failed: {database.explain(error)}."
            if isinstance(error, SQLAlchemyError)
            else f"The archiver failed on the session with {type(error).__name__}: please report it."
        )
        return cls(began, None, fault, defect=error)


class HistoryFetcher:
    """A fetcher of histories with one client and key."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._accepted, self._refused = 0, 0  # calls, with this key
        self._missing = 0  # accepted calls with a 404 response

    @property
    def is_all_not_found(self) -> bool:
        """Return whether every response was 404, as with a wrong URL."""
        return 0 < self._missing == self._accepted and not self._refused

    def check_key(self) -> None:
        """Raise `UnauthorizedError` if the key was rejected for all sessions."""
        if self._refused and not self._accepted:
            raise UnauthorizedError

    async def answer(self, session_id: str, limits: Limits | None = None) -> Answer:
        """Fetch the history of a session. An unreadable body of a 2xx response is retried like a server error.

        Raises `UnauthorizedError` if the key is rejected repeatedly and never accepted.
        """
        began, started = database.now(), perf_counter()
        event: Event | None = None

        def is_readable(answer: callhq.Answer) -> bool:
            nonlocal event
            event = responses.parse_history(session_id, answer.status, answer.body)
            return event.type != responses.UNREADABLE or answer.status not in range(200, 300)

        try:
            answer = await self._client.history(session_id, is_readable, limits)
        except UnreachableError as error:
            return Answer(began, None, str(error), retry_after=error.retry_after)
        except TooLargeError as error:
            log.warning("history response too large", session_id=session_id, error=str(error))
            return Answer(began, responses.parse_history(session_id, 413, b""), status=413)
        except UnauthorizedError:
            self._refused += 1
            if not self._accepted and self._refused >= MAX_REFUSALS:
                raise
            what = "this session" if self._accepted else "the key, or this session"
            return Answer(
                began,
                None,
                f"CallHQ rejects {what}. Check that the session belongs to the account of CALLHQ_API_KEY.",
            )
        self._accept(answer.status)
        telemetry.reading_seconds.observe(perf_counter() - started)
        return Answer(answer.began, event, status=answer.status)

    def _accept(self, status: int) -> None:
        self._accepted += 1
        self._missing += status == NOT_FOUND
        if self._missing == self._accepted == MAX_NOT_FOUND:
            log.warning(
                "history calls returned only 404; check CALLHQ_API_URL (run `archiver doctor`)", calls=self._accepted
            )
