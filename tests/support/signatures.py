"""Signed requests of every scheme."""

import base64
from typing import Any

import pytest

from archiver.inbound.signatures import Reason, SignatureError, Verifier, verifier
from archiver.settings import Settings

NOW = 1_614_265_330.0


URL = "https://archive.example/webhooks/callhq"


BODY = b'{"message": {"type": "chat.created"}}'


# Three of each kind; those for `standard` and for base64 keys hold + and / too.
TEXTS = ("current-secret", "previous-secret", "\u00e4lteres Geheimnis")


BASE64S = (
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    base64.b64encode(b"\xfb\xff\xfe" * 8).decode(),
    base64.b64encode(b"a key of 25 bytes, padded").decode().rstrip("="),
)


def verifier_of(scheme: str, secrets: tuple[str, ...] = (), **hmac_options: Any) -> Verifier:
    options = {f"ARCHIVER_HMAC_{name.upper()}": value for name, value in hmac_options.items()}
    return verifier(settings_of(scheme, ",".join(secrets), **options))


def settings_of(scheme: str, secrets: str, **others: Any) -> Settings:
    named = {"ARCHIVER_WEBHOOK_SCHEME": scheme, "ARCHIVER_WEBHOOK_SECRETS": secrets}
    return Settings.model_validate({**named, **others})


def asgi(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"archive.example"), *((name.encode(), value.encode()) for name, value in headers.items())]


def signed(check: Verifier, body: bytes = BODY, now: float = NOW) -> dict[str, str]:
    return check.sign(body, now, "msg_1", "POST", URL)


def ask(check: Verifier, headers: dict[str, str], body: bytes = BODY, now: float = NOW) -> str:
    return check.verify(body, asgi(headers), "POST", URL, now)


def refusal(check: Verifier, headers: list[tuple[bytes, bytes]], body: bytes = BODY, now: float = NOW) -> Reason:
    with pytest.raises(SignatureError) as refused:
        check.verify(body, headers, "POST", URL, now)
    return refused.value.reason
