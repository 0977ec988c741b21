"""Pages that say why a request failed, and what to do."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping

import structlog
from sqlalchemy.exc import DataError, SQLAlchemyError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from archiver.console import rendering
from archiver.console.attempts import TooManyAttemptsError
from archiver.console.filters import FilterError
from archiver.errors import ArchiverError

log = structlog.get_logger(__name__)

Route = Callable[[Request], Awaitable[Response]]


class PageError(ArchiverError):
    """A page that cannot be shown: the HTTP status, a heading, and a text that says what to do."""

    def __init__(self, status: int, heading: str, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(heading)
        self.status, self.heading, self.text, self.headers = status, heading, text, headers or {}


def missing() -> PageError:
    """Return the error for an address that names nothing."""
    return PageError(404, "This page does not exist", "The address is wrong, or what it names was removed.")


def reported(status: int, heading: str, text: str, event: str, **fields: str) -> PageError:
    """Return an error whose page has an id, and log it with that id."""
    number = secrets.token_hex(4)
    log.warning(event, id=number, **fields)
    return PageError(status, heading, f"{text} In the log of the archiver, this has the id {number}.")


def safely(route: Route) -> Route:
    """Return a route whose errors become pages; the page of a fault has an id that is in the log."""

    async def respond(request: Request) -> Response:
        try:
            return await route(request)
        except ClientDisconnect:
            raise
        except Exception as error:  # noqa: BLE001  # the pages share a process with the receiver
            failed = _page_error(error, request.scope["path"])
        values = {"heading": failed.heading, "text": failed.text, "login": None}
        response = await asyncio.to_thread(rendering.html, "error.html", values, failed.status)
        response.headers.update(failed.headers)
        return response

    return respond


def _page_error(error: Exception, path: str) -> PageError:
    if isinstance(error, PageError):
        return error
    if isinstance(error, FilterError):
        return PageError(400, "The filter cannot be understood", str(error))
    if isinstance(error, TooManyAttemptsError):
        text = f"Wait {error.seconds} seconds, then try again."
        return PageError(429, "Too many attempts to log in", text, {"retry-after": str(error.seconds)})
    if isinstance(error, DataError):
        return PageError(400, "The address cannot be understood", "It contains a character that no name or id has.")
    number = secrets.token_hex(4)
    log.error("console page failed", id=number, path=path, exc_info=error)
    text = f"Try again. If it fails again, look for id {number} in the log of the archiver."
    if isinstance(error, SQLAlchemyError):
        return PageError(503, "The database could not answer", text)
    return PageError(500, "This page failed", text)
