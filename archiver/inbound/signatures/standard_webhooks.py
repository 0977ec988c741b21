"""Standard Webhooks: secrets, and signatures over id, time and body.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import hmac
import secrets
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence

from archiver.errors import ArchiverError

PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64  # limits of the specification
_MADE = 32


class SecretError(ArchiverError):
    """The secret is not valid for Standard Webhooks."""

    message = "a secret must be whsec_ followed by 24 to 64 random bytes in base64"


def make_secret() -> str:
    """Return a new secret."""
    return PREFIX + b2a_base64(secrets.token_bytes(_MADE), newline=False).decode()


def decode(secret: str) -> bytes:
    """Return the key bytes of a secret: base64 in the standard alphabet, with or without padding and `whsec_`.

    Raises `ValueError`.
    """
    text = secret.removeprefix(PREFIX).rstrip("=")
    return a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)


def key(secret: str) -> bytes:
    """Return the key bytes of a secret that meets all requirements of the specification.

    Raises `SecretError`, which does not quote it.
    """
    try:
        result = decode(secret)
    except ValueError:
        raise SecretError from None
    if not secret.startswith(PREFIX) or not MIN_SECRET_BYTES <= len(result) <= MAX_SECRET_BYTES:
        raise SecretError
    return result


def payload(message_id: bytes, timestamp: bytes, body: bytes) -> bytes:
    """Return the bytes that are signed."""
    return b"%b.%b.%b" % (message_id, timestamp, body)


def sign(
    keys: Sequence[bytes], message_id: str, seconds: int, body: bytes, family: str = "webhook"
) -> dict[str, str]:
    """Return the three headers of a delivery, with one signature per key, so that a secret can be rotated.

    `family`: the prefix of the header names, `webhook` or `svix`.
    """
    signed = payload(message_id.encode(), b"%d" % seconds, body)
    made = (b2a_base64(hmac.digest(each, signed, "sha256"), newline=False).decode() for each in keys)
    return {
        f"{family}-id": message_id,
        f"{family}-timestamp": str(seconds),
        f"{family}-signature": " ".join(f"v1,{each}" for each in made),
    }
