"""`POST /sessions` of a receiver."""

import json
from typing import Any

import httpx2

from tests.support.receivers import ANSWER_SECONDS, Receiver

TOKEN = "a-token-for-tests"


def register(receiver: Receiver, body: Any, token: str | None = TOKEN) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx2.post(
        f"{receiver.url}/sessions", content=content, headers=headers, trust_env=False, timeout=ANSWER_SECONDS
    )
