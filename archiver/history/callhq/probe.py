"""One call that checks URL and API key."""

import re
from typing import Any

import msgspec
from pydantic import SecretStr

from archiver.errors import ArchiverError
from archiver.events import responses
from archiver.history.callhq.client import Client
from archiver.history.callhq.responses import Answer, UnreachableError

UNKNOWN_SESSION = "00000000-0000-0000-0000-000000000000"  # no session has this id
SECONDS = 10.0


class PauseRequestedError(ArchiverError):
    """CallHQ requests a pause."""


async def probe(api_url: str, api_key: SecretStr) -> None:
    """Check that the API responds and accepts the key.

    Raises a `CallError` if it does not, `PauseRequestedError` if it requests a pause, and `SettingsError` for an
    invalid URL or key.
    """
    api = Client(api_url, api_key, pause=_NoPause(), concurrency=1, max_bytes=1_048_576, timeout=SECONDS, attempts=1)
    async with api as client:
        answer = await client.history(UNKNOWN_SESSION)
    if not is_api_answer(answer):
        raise UnreachableError(
            "the server at this URL does not look like the CallHQ API:"
            f" {answer.status} to GET /chats/session/{{id}}. Check CALLHQ_API_URL."
        )


class _NoPause:
    async def wait(self) -> None:
        """Return immediately: a single call needs no pause."""

    async def set(self, seconds: float, reason: str, session_id: str) -> bool:
        raise PauseRequestedError(f"it returned {reason}. Wait {seconds:.0f} s.")

    def session_answered(self, session_id: str) -> None:
        """Do nothing: no further call follows."""


def is_api_answer(answer: Answer) -> bool:
    """Return whether the response is from the API rather than from another server.

    The API's response for an unknown session is not documented. A response whose message is about a path (`Not
    Found`, `Cannot GET /chats/session/…`), or that is not JSON, is not from the API.
    """
    if responses.parse_history(UNKNOWN_SESSION, answer.status, answer.body).type == responses.READ:
        return True
    message = _message_of(answer.body)
    is_about_it = re.search(r"(?<![/\w])session", message, re.IGNORECASE) is not None or UNKNOWN_SESSION in message
    return answer.status in range(400, 500) and is_about_it and "/session" not in message


def _message_of(body: bytes) -> str:
    try:
        document: Any = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return ""
    messages = [document.get(name) for name in ("message", "error", "detail")] if isinstance(document, dict) else []
    return " ".join(str(each) for each in messages if each is not None)
