"""Verify that a delivery comes from the platform: `verifier(settings)` returns the verifier of a process.

Signatures are checked over the exact bytes received, before anything is parsed, and compared in constant time. Pure:
the clock, the headers and the body are arguments.
"""

import hmac
import re
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from archiver.inbound.signatures import standard_webhooks
from archiver.inbound.signatures.schemes import (
    REASONS,
    Hmac,
    Keys,
    Mac,
    PublicKeys,
    Reason,
    SharedSecret,
    SignatureError,
    Standard,
    Unproven,
    Verifier,
)
from archiver.settings import Settings, SettingsError

__all__ = ["REASONS", "Reason", "SignatureError", "Verifier", "key_id", "verifier"]

_PLACEHOLDERS = ("body", "timestamp", "method", "url", "svix-id")
_SECRETS = "ARCHIVER_WEBHOOK_SECRETS"
_PUBLIC_KEY, _SIGNING_KEY = "whpk_", "whsk_"
_PUBLIC_KEY_BYTES = 32
_FIELD = 2**255 - 19
# The y of all points whose order divides 8: with such a key, a signature of zeros is valid for one message in eight.
_EIGHTH = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_LOW_ORDER = frozenset({0, 1, _FIELD - 1, _EIGHTH, _FIELD - _EIGHTH})
_MAKE_TEXT = 'python3 -c "import secrets; print(secrets.token_urlsafe(32))"'
_MAKE_BASE64 = 'python3 -c "import base64, secrets; print(base64.b64encode(secrets.token_bytes(32)).decode())"'


def verifier(settings: Settings) -> Verifier:
    """Return the verifier for these settings.

    Raises `SettingsError`, which names the variable and never reveals a secret.
    """
    scheme = settings.webhook_scheme
    if scheme == "none":
        return Unproven()
    is_standard = scheme in {"standard", "svix"}
    base64 = is_standard or (scheme == "hmac" and settings.hmac_secret_is_base64)
    if not settings.secrets:
        raise SettingsError(
            f"{_SECRETS} is empty, and scheme {scheme} needs a secret. Use the secret that is configured on the "
            f"platform; to generate one: {_MAKE_BASE64 if base64 else _MAKE_TEXT}"
        )
    if is_standard:
        return _standard(settings)
    keys = tuple(
        (_decode_any(secret, number) if base64 else _bytes(secret), key_id(secret))
        for number, secret in enumerate(settings.secrets, start=1)
    )
    if scheme == "secret":
        return SharedSecret(keys, settings.secret_header.encode(), bearer=False)
    if scheme == "bearer":
        return SharedSecret(keys, b"authorization", bearer=True)
    return _hmac(settings.model_copy(update=PRESETS.get(scheme, {})), keys)


# The settings of scheme `hmac` for each preset. Sources are the documents of the platforms:
# GitHub "Validating webhook deliveries", Stripe "Verify webhook signatures manually", Slack "Verifying requests from
# Slack", Shopify "Deliver webhooks through HTTPS".
_OF_BODY = {"hmac_algorithm": "sha256", "hmac_template": "{body}", "hmac_timestamp_prefix": ""}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "github": _OF_BODY | {"hmac_header": "x-hub-signature-256", "hmac_prefix": "sha256=", "hmac_encoding": "hex"},
    "stripe": {
        "hmac_algorithm": "sha256",
        "hmac_encoding": "hex",
        "hmac_header": "stripe-signature",
        "hmac_prefix": "v1=",
        "hmac_timestamp_header": "stripe-signature",
        "hmac_timestamp_prefix": "t=",
        "hmac_template": "{timestamp}.{body}",
    },
    "slack": {
        "hmac_algorithm": "sha256",
        "hmac_encoding": "hex",
        "hmac_header": "x-slack-signature",
        "hmac_prefix": "v0=",
        "hmac_timestamp_header": "x-slack-request-timestamp",
        "hmac_timestamp_prefix": "",
        "hmac_template": "v0:{timestamp}:{body}",
    },
    "shopify": _OF_BODY | {"hmac_header": "x-shopify-hmac-sha256", "hmac_prefix": "", "hmac_encoding": "base64"},
}


def key_id(secret: str | bytes) -> str:
    """Return 8 hex characters that identify a secret without revealing it."""
    key = _bytes(secret) if isinstance(secret, str) else secret
    return hmac.digest(key, b"callhq-archiver key id", "sha256").hex()[:8]


def _bytes(secret: str) -> bytes:
    """Return the bytes of the environment variable, even if they are not UTF-8."""
    return secret.encode(errors="surrogateescape")


def _hmac(settings: Settings, keys: Keys) -> Verifier:
    template = _parse_template(settings.hmac_template)
    for placeholder, header, variable in (
        ("timestamp", settings.hmac_timestamp_header, "ARCHIVER_HMAC_TIMESTAMP_HEADER"),
        ("svix-id", settings.hmac_id_header, "ARCHIVER_HMAC_ID_HEADER"),
    ):
        if placeholder in template and not header:
            raise SettingsError(
                f"{variable} is empty, but ARCHIVER_HMAC_TEMPLATE contains {{{placeholder}}}: "
                "name the header that contains this value, or remove the placeholder"
            )
    return Hmac(
        mac=Mac(keys, settings.hmac_algorithm, settings.hmac_encoding),
        template=template,
        header=settings.hmac_header.encode(),
        prefix=settings.hmac_prefix.encode(),
        timestamp_header=settings.hmac_timestamp_header.encode() if "timestamp" in template else b"",
        timestamp_prefix=settings.hmac_timestamp_prefix.encode(),
        id_header=settings.hmac_id_header.encode() if "svix-id" in template else b"",
        tolerance=settings.timestamp_tolerance,
        takes_milliseconds=settings.webhook_scheme == "hmac",
    )


def _standard(settings: Settings) -> Standard:
    numbered = [*enumerate(settings.secrets, start=1)]
    # The reference libraries accept only the standard alphabet, and one of them skips other characters.
    keys = tuple(
        (_decode_standard(secret, number), key_id(secret))
        for number, secret in numbered
        if not secret.startswith(_PUBLIC_KEY)
    )
    public_keys: PublicKeys = tuple(
        (_public_key(secret, number), key_id(secret)) for number, secret in numbered if secret.startswith(_PUBLIC_KEY)
    )
    family = "svix" if settings.webhook_scheme == "svix" else "webhook"
    return Standard(Mac(keys, "sha256", "base64"), public_keys, settings.timestamp_tolerance, family)


def _public_key(secret: str, number: int) -> Ed25519PublicKey:
    """Parse an Ed25519 key: `whpk_` and base64 (Standard Webhooks, "Signature scheme")."""
    raw = _decode_standard(secret.removeprefix(_PUBLIC_KEY), number)
    y = int.from_bytes(raw, "little") & ((1 << 255) - 1)  # the last bit is the sign of x (RFC 8032, section 5.1.2)
    if len(raw) == _PUBLIC_KEY_BYTES and y % _FIELD in _LOW_ORDER:
        raise SettingsError(
            f"{_SECRETS}: secret {number} is a low-order point, so anyone can forge signatures. Copy the platform's"
            " public key again."
        )
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise SettingsError(
            f"{_SECRETS}: secret {number} begins with {_PUBLIC_KEY} but is not an Ed25519 public key: "
            "32 bytes in base64 must follow"
        ) from None


def _parse_template(template: str) -> tuple[bytes | str, ...]:
    known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
    parts: list[bytes | str] = []
    for piece in re.split(r"(\{[^{}]*\})", template):
        name = piece[1:-1] if piece.startswith("{") and piece.endswith("}") else None
        if name in _PLACEHOLDERS:
            parts.append(name)
        elif "{" in piece or "}" in piece:
            raise SettingsError(f"ARCHIVER_HMAC_TEMPLATE: unknown placeholder {piece!r}; use one of {known}")
        elif piece:
            parts.append(piece.encode())
    if "body" not in parts:
        raise SettingsError(
            "ARCHIVER_HMAC_TEMPLATE must contain {body}: otherwise the signature does not cover the body"
        )
    return tuple(parts)


def _decode_standard(secret: str, number: int) -> bytes:
    """Return the key of a Standard Webhooks secret."""
    if secret.startswith(_SIGNING_KEY):
        raise SettingsError(
            f"{_SECRETS}: secret {number} is the platform's signing key ({_SIGNING_KEY}), which only the platform "
            f"may hold. Use the matching public key ({_PUBLIC_KEY})."
        )
    try:
        key = standard_webhooks.decode(secret)
    except ValueError:
        raise SettingsError(
            f"{_SECRETS}: secret {number} is not base64 (letters, digits, + and /, after an optional whsec_). "
            f"To generate one: {_MAKE_BASE64}"
        ) from None
    if not key:
        raise SettingsError(f"{_SECRETS}: secret {number} is empty. To generate one: {_MAKE_BASE64}")
    return key


def _decode_any(secret: str, number: int) -> bytes:
    """Decode a secret in base64, in the standard or the URL-safe alphabet."""
    return _decode_standard(secret.removeprefix(standard_webhooks.PREFIX).replace("-", "+").replace("_", "/"), number)
