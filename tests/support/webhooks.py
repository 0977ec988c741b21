"""Signed webhooks, and a ledger that is locked."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from archiver.inbound import signatures
from archiver.settings import Settings


def rows(url: str, query: str, *parameters: Any) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute(query, parameters).fetchall()


@contextmanager
def ledger_locked(url: str) -> Iterator[Callable[[], None]]:
    """Nobody writes the ledger until the function that this gives is called."""
    with psycopg.connect(url) as connection:
        connection.execute("LOCK TABLE archiver.events IN EXCLUSIVE MODE")
        yield connection.rollback


SCHEMES = {
    "secret": {"ARCHIVER_WEBHOOK_SCHEME": "secret", "ARCHIVER_SECRET_HEADER": "X-Vapi-Secret"},
    "bearer": {"ARCHIVER_WEBHOOK_SCHEME": "bearer"},
    "hmac": {
        "ARCHIVER_WEBHOOK_SCHEME": "hmac",
        "ARCHIVER_HMAC_PREFIX": "sha256=",
        "ARCHIVER_HMAC_TEMPLATE": "{timestamp}.{method}.{url}.{body}",
    },
    "standard": {"ARCHIVER_WEBHOOK_SCHEME": "standard"},
}


def signed(scheme: str, secret: str, body: bytes, url: str, at: float | None = None) -> dict[str, str]:
    """The headers with which a platform that knows `secret` would send `body`."""
    result: dict[str, Any] = SCHEMES[scheme] | {"ARCHIVER_WEBHOOK_SECRETS": secret}
    verifier = signatures.verifier(Settings(**result))
    return verifier.sign(body, at or time.time(), "message-1", "POST", url)
