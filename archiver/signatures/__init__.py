"""Whether a delivery comes from the platform: `verifier(settings)` is built once, then asked about each request.

Everything is decided over the exact bytes received, before anything is parsed, and compared in constant time.
Pure: the clock, the headers and the body are arguments.
"""

import hmac
import re
from binascii import a2b_base64

from archiver.settings import Settings, SettingsError
from archiver.signatures.schemes import (
    REASONS,
    Hmac,
    Keys,
    Mac,
    Reason,
    SharedSecret,
    SignatureError,
    Standard,
    Unproven,
    Verifier,
)

__all__ = ["REASONS", "Reason", "SignatureError", "Verifier", "key_id", "verifier"]

_PLACEHOLDERS = ("body", "timestamp", "method", "url", "svix-id")
_SECRETS = "ARCHIVER_WEBHOOK_SECRETS"
_MAKE_TEXT = 'python3 -c "import secrets; print(secrets.token_urlsafe(32))"'
_MAKE_BASE64 = 'python3 -c "import base64, secrets; print(base64.b64encode(secrets.token_bytes(32)).decode())"'


def verifier(settings: Settings) -> Verifier:
    """What proves a delivery under these settings.

    Raises `SettingsError`, which names the variable and never tells a secret.
    """
    scheme = settings.webhook_scheme
    if scheme == "none":
        return Unproven()
    base64 = scheme == "standard" or (scheme == "hmac" and settings.hmac_secret_is_base64)
    if not settings.secrets:
        raise SettingsError(
            f"{_SECRETS} is empty, and scheme {scheme} needs a secret. Give the one that the platform was told; "
            f"to make a good one: {_MAKE_BASE64 if base64 else _MAKE_TEXT}"
        )
    # The reference libraries read the standard alphabet only, and one of them skips what it does not know.
    decode = _decode_standard if scheme == "standard" else _decode_any
    keys = tuple(
        (decode(secret, number) if base64 else _bytes(secret), key_id(secret))
        for number, secret in enumerate(settings.secrets, start=1)
    )
    if scheme == "secret":
        return SharedSecret(keys, settings.secret_header.encode(), bearer=False)
    if scheme == "bearer":
        return SharedSecret(keys, b"authorization", bearer=True)
    if scheme == "standard":
        return Standard(Mac(keys, "sha256", "base64"), settings.timestamp_tolerance)
    return _hmac(settings, keys)


def key_id(secret: str | bytes) -> str:
    """8 hex characters that say which secret, as written in the setting, and do not tell it."""
    key = _bytes(secret) if isinstance(secret, str) else secret
    return hmac.digest(key, b"callhq-archiver key id", "sha256").hex()[:8]


def _bytes(secret: str) -> bytes:
    """As they stood in the environment, UTF-8 or not."""
    return secret.encode(errors="surrogateescape")


def _hmac(settings: Settings, keys: Keys) -> Verifier:
    template = _parse_template(settings.hmac_template)
    for placeholder, header, variable in (
        ("timestamp", settings.hmac_timestamp_header, "ARCHIVER_HMAC_TIMESTAMP_HEADER"),
        ("svix-id", settings.hmac_id_header, "ARCHIVER_HMAC_ID_HEADER"),
    ):
        if placeholder in template and not header:
            raise SettingsError(
                f"{variable} is empty, but ARCHIVER_HMAC_TEMPLATE signs {{{placeholder}}}: "
                "name the header that carries it, or take it out of the template."
            )
    return Hmac(
        mac=Mac(keys, settings.hmac_algorithm, settings.hmac_encoding),
        template=template,
        header=settings.hmac_header.encode(),
        prefix=settings.hmac_prefix.encode(),
        timestamp_header=settings.hmac_timestamp_header.encode() if "timestamp" in template else b"",
        id_header=settings.hmac_id_header.encode() if "svix-id" in template else b"",
        tolerance=settings.timestamp_tolerance,
    )


def _parse_template(template: str) -> tuple[bytes | str, ...]:
    known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
    parts: list[bytes | str] = []
    for piece in re.split(r"(\{[^{}]*\})", template):
        name = piece[1:-1] if piece.startswith("{") and piece.endswith("}") else None
        if name in _PLACEHOLDERS:
            parts.append(name)
        elif "{" in piece or "}" in piece:
            raise SettingsError(f"ARCHIVER_HMAC_TEMPLATE: {piece!r} is not a placeholder; there are {known}.")
        elif piece:
            parts.append(piece.encode())
    if "body" not in parts:
        raise SettingsError("ARCHIVER_HMAC_TEMPLATE must hold {body}: a signature over less proves nothing.")
    return tuple(parts)


def _decode_standard(secret: str, number: int) -> bytes:
    """The key of a secret in base64, standard alphabet, padded or not, `whsec_` before it or not."""
    text = secret.removeprefix("whsec_").rstrip("=")
    try:
        key = a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError:
        raise SettingsError(
            f"{_SECRETS}: secret {number} is not base64 (letters, digits, + and /, after an optional whsec_). "
            f"To make a good one: {_MAKE_BASE64}"
        ) from None
    if not key:
        raise SettingsError(f"{_SECRETS}: secret {number} is empty. To make a good one: {_MAKE_BASE64}")
    return key


def _decode_any(secret: str, number: int) -> bytes:
    """As `_decode_standard`, in the URL-safe alphabet too."""
    return _decode_standard(secret.removeprefix("whsec_").replace("-", "+").replace("_", "/"), number)
