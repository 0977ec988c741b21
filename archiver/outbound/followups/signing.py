"""Standard Webhooks, the sender's side: secrets, and signatures over id, time and body.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import hmac
import secrets
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence

from archiver.errors import ArchiverError

PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64  # bytes, as the specification has it
_MADE = 32


class SecretError(ArchiverError):
    """A secret is not one of Standard Webhooks."""

    message = "A secret must be whsec_ and the base64 text of 24 to 64 random bytes."


def make_secret() -> str:
    """A new one."""
    return PREFIX + b2a_base64(secrets.token_bytes(_MADE), newline=False).decode()


def key(secret: str) -> bytes:
    """Return the key bytes of a secret. Raises `SecretError`, which does not quote it."""
    if not secret.startswith(PREFIX):
        raise SecretError
    text = secret.removeprefix(PREFIX).rstrip("=")
    try:
        result = a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError:
        result = b""
    if not MIN_SECRET_BYTES <= len(result) <= MAX_SECRET_BYTES:
        raise SecretError
    return result


def sign(keys: Sequence[bytes], message_id: str, seconds: int, body: bytes) -> dict[str, str]:
    """The three headers of a delivery; one signature a key, so that a secret can be rotated."""
    signed = b"%b.%d.%b" % (message_id.encode(), seconds, body)
    made = (b2a_base64(hmac.digest(each, signed, "sha256"), newline=False).decode() for each in keys)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(seconds),
        "webhook-signature": " ".join(f"v1,{each}" for each in made),
    }
