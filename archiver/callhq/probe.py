"""One question, for whoever wants to know whether the API is there and takes the key."""

import re
from typing import Any

import msgspec
from pydantic import SecretStr

from archiver import history
from archiver.callhq.answers import Answer, UnreachableError
from archiver.callhq.client import Client

NOBODY = "00000000-0000-0000-0000-000000000000"  # no session has this id
SECONDS = 10.0


class WaitError(Exception):
    """CallHQ asks us to wait."""


async def probe(api_url: str, api_key: SecretStr) -> None:
    """Returns where the API is there and takes the key.

    Raises every `CallError`, `WaitError`, and `SettingsError` for what cannot be asked.
    """
    asking = Client(
        api_url, api_key, pause=_Impatience(), concurrency=1, max_bytes=1_048_576, timeout=SECONDS, attempts=1
    )
    async with asking as client:
        answer = await client.history(NOBODY)
    if not is_of_the_api(answer):
        raise UnreachableError(
            f"What answers is not the API, it seems: {answer.status} to GET /chats/session/{{id}}."
        )


class _Impatience:
    async def wait(self) -> None:
        """Nobody asked before us."""

    async def set(self, seconds: float, reason: str, session_id: str | None) -> bool:
        raise WaitError(f"It answered {reason}: wait {seconds:.0f} s.")

    def answered(self, session_id: str) -> None:
        """Nobody asks after us."""


def is_of_the_api(answer: Answer) -> bool:
    """Whether it is an answer to the question for a session, and not to a path that is none.

    How the API says that there is no such session is not documented. It is taken to speak of a session; what speaks
    of a path instead (`Not Found`, `Cannot GET /chats/session/…`), or is no JSON, is not the API.
    """
    if history.observe(NOBODY, answer.status, answer.body).type == history.READ:
        return True
    said = _said(answer.body)
    is_about_it = re.search(r"(?<![/\w])session", said, re.IGNORECASE) is not None or NOBODY in said
    return answer.status in range(400, 500) and is_about_it and "/session" not in said


def _said(body: bytes) -> str:
    try:
        document: Any = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return ""
    told = [document.get(name) for name in ("message", "error", "detail")] if isinstance(document, dict) else []
    return " ".join(str(each) for each in told if each is not None)
