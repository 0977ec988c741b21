"""Verify and sign deliveries by scheme: shared secret, HMAC over a template, Standard Webhooks."""

import hmac
import re
from abc import ABC, abstractmethod
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from archiver.errors import ArchiverError
from archiver.inbound.signatures import standard_webhooks
from archiver.settings import SettingsError

Headers = Sequence[tuple[bytes, bytes]]
"""ASGI headers: names in lower case; values may be any bytes."""

Reason = Literal[
    "missing_header",  # absent or empty
    "malformed_header",  # repeated, or not a signature of this scheme
    "malformed_timestamp",  # not a plain decimal number
    "stale_timestamp",  # outside the tolerance, before or after this machine's clock
    "bad_signature",  # well formed, but no secret produces it
]
REASONS: tuple[Reason, ...] = get_args(Reason)

Keys = tuple[tuple[bytes, str], ...]  # (key, key id) of each secret, in the order of the setting
PublicKeys = tuple[tuple[Ed25519PublicKey, str], ...]
_MAX_TIMESTAMP = 15  # digits; milliseconds have 13
_FIRST_MILLISECONDS = 10**11  # in seconds the year 5138, in milliseconds 1973
_MAX_SIGNATURES = 4096  # bytes, over 80 signatures; each is compared with each secret
_MAX_ASYMMETRIC = 16  # signatures per delivery verified with public keys, which is slower
_ED25519_LENGTH = 86  # characters of 64 bytes in base64, without padding
_URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


class SignatureError(ArchiverError):
    """The delivery is not authenticated."""

    message = "The delivery does not prove that it comes from the platform."

    def __init__(self, reason: Reason, header: bytes) -> None:
        super().__init__(f"{self.message} ({reason}: {header.decode()})")
        self.reason = reason


class Verifier(ABC):
    """A verification scheme with its keys."""

    __slots__ = ()

    @abstractmethod
    def verify(self, body: bytes, headers: Headers, method: str, url: str, now: float) -> str:
        """Return the key id of the verified secret, or `none` if verification is disabled.

        `url` is the URL that the platform called; `now` is in seconds since the epoch. Raises only `SignatureError`,
        for any bytes.
        """

    @abstractmethod
    def check_headers(self, headers: Headers, now: float) -> None:
        """Raise the `SignatureError` that `verify` would raise for any body with these headers."""

    @abstractmethod
    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        """Return the headers that the platform would send, signed with the first secret; `verify` accepts them.

        `message_id` must not be empty or contain a full stop (Standard Webhooks, "Signature scheme").
        """


@dataclass(frozen=True, slots=True)
class Unproven(Verifier):
    """A scheme that accepts every delivery (scheme `none`)."""

    def verify(self, body: bytes, headers: Headers, method: str, url: str, now: float) -> str:
        return "none"

    def check_headers(self, headers: Headers, now: float) -> None:
        pass

    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class SharedSecret(Verifier):
    """A secret in a header (schemes `secret` and `bearer`)."""

    keys: Keys = field(repr=False)
    header: bytes
    bearer: bool

    def verify(self, body: bytes, headers: Headers, method: str, url: str, now: float) -> str:
        given = _only(headers, self.header)
        if self.bearer:
            scheme, _, token = given.partition(b" ")
            if scheme.lower() != b"bearer":
                raise SignatureError("malformed_header", self.header)
            given = token.strip(b" ")
        result = None
        for secret, name in self.keys:
            if hmac.compare_digest(secret, given):
                result = result or name
        if result is None:
            raise SignatureError("bad_signature", self.header)
        return result

    def check_headers(self, headers: Headers, now: float) -> None:
        self.verify(b"", headers, "", "", now)  # the body is not signed

    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        secret = self.keys[0][0].decode(errors="surrogateescape")
        return {self.header.decode(): f"Bearer {secret}" if self.bearer else secret}


@dataclass(frozen=True, slots=True)
class Mac:
    """HMAC (RFC 2104) with several keys, as text.

    Signatures are compared as canonical text (hex in lower case; base64 in the standard alphabet without padding), so
    that a lenient decoder cannot accept two encodings of one signature.
    """

    keys: Keys = field(repr=False)
    algorithm: str
    encoding: Literal["hex", "base64"]

    def sign(self, key: bytes, payload: bytes) -> bytes:
        digest = hmac.digest(key, payload, self.algorithm)
        return digest.hex().encode() if self.encoding == "hex" else b2a_base64(digest, newline=False)

    def canonical(self, signature: bytes) -> bytes:
        if self.encoding == "hex":
            return signature.lower()
        return signature.translate(_URL_SAFE_TO_STANDARD).rstrip(b"=")

    @property
    def length(self) -> int:
        """Return the number of characters of a canonical signature."""
        size = {"sha1": 20, "sha256": 32, "sha512": 64}[self.algorithm]
        return size * 2 if self.encoding == "hex" else (size * 4 + 2) // 3

    def find(self, payload: bytes, candidates: list[bytes]) -> str | None:
        """Return the id of the first key that produces one of `candidates`, else None; every pair is compared."""
        result = None
        for key, name in self.keys:
            expected = self.canonical(self.sign(key, payload))
            for candidate in candidates:
                if hmac.compare_digest(expected, candidate):
                    result = result or name
        return result


@dataclass(frozen=True, slots=True)
class Hmac(Verifier):
    """Signatures over a template (scheme `hmac` and presets); a header may contain several during a rotation.

    The name of a header whose value the template does not contain is empty. With a `timestamp_prefix`, the time is an
    entry of its header, which may be the header of the signatures.
    """

    mac: Mac
    template: tuple[bytes | str, ...]  # bytes are literal, text names a placeholder
    header: bytes
    prefix: bytes
    timestamp_header: bytes
    timestamp_prefix: bytes
    id_header: bytes
    tolerance: int
    takes_milliseconds: bool

    def verify(self, body: bytes, headers: Headers, method: str, url: str, now: float) -> str:
        timestamp, message_id, candidates = self._read(headers, now)
        payload = self._payload(body, timestamp, message_id, method, url)
        result = self.mac.find(payload, candidates)
        if result is None:
            raise SignatureError("bad_signature", self.header)
        return result

    def check_headers(self, headers: Headers, now: float) -> None:
        self._read(headers, now)

    def _read(self, headers: Headers, now: float) -> tuple[bytes, bytes, list[bytes]]:
        """Return timestamp, message id and canonical signatures."""
        timestamp = message_id = b""
        if self.timestamp_header:
            timestamp = self._timestamp(headers)
            _check_time(
                timestamp, now, self.tolerance, self.timestamp_header, takes_milliseconds=self.takes_milliseconds
            )
        if self.id_header:
            message_id = _only(headers, self.id_header)
        given = _entries(_only(headers, self.header), self.prefix, self.header)
        length = self.mac.length
        candidates = [text for text in map(self.mac.canonical, given) if len(text) == length]
        if not candidates:
            raise SignatureError("malformed_header", self.header)
        return timestamp, message_id, candidates

    def _timestamp(self, headers: Headers) -> bytes:
        given = _only(headers, self.timestamp_header)
        if not self.timestamp_prefix:
            return given
        result = _entries(given, self.timestamp_prefix, self.timestamp_header)
        if len(result) != 1:  # with two, the platform and the archiver might use different ones
            raise SignatureError("malformed_header", self.timestamp_header)
        return result[0]

    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        timestamp = str(int(now))
        payload = self._payload(body, timestamp.encode(), message_id.encode(), method, url)
        signature = self.prefix + self.mac.sign(self.mac.keys[0][0], payload)
        headers = {self.header: signature.decode()}
        if self.timestamp_header:
            time = self.timestamp_prefix.decode() + timestamp
            is_shared = self.timestamp_header == self.header
            headers[self.timestamp_header] = f"{time},{signature.decode()}" if is_shared else time
        if self.id_header:
            headers[self.id_header] = message_id
        return {name.decode(): value for name, value in headers.items()}

    def _payload(self, body: bytes, timestamp: bytes, message_id: bytes, method: str, url: str) -> bytes:
        """Return the signed bytes, in one pass over the template, so that inserted values are never expanded."""
        values = {
            "body": body,
            "timestamp": timestamp,
            "method": method.encode(errors="surrogatepass"),
            "url": url.encode(errors="surrogatepass"),
            "svix-id": message_id,
        }
        return b"".join([part if isinstance(part, bytes) else values[part] for part in self.template])


@dataclass(frozen=True, slots=True)
class Standard(Verifier):
    """Standard Webhooks (schemes `standard` and `svix`), with either family of header names.

    Symmetric signatures (`v1`) use secrets, asymmetric ones (`v1a`) use public keys.
    """

    mac: Mac
    public_keys: PublicKeys
    tolerance: int
    family: str  # of the headers that `sign` returns: `webhook` or `svix`

    def verify(self, body: bytes, headers: Headers, method: str, url: str, now: float) -> str:
        timestamp, message_id, signatures, header = self._read(headers, now)
        payload = standard_webhooks.payload(message_id, timestamp, body)
        result = self.mac.find(payload, signatures.symmetric) or self._signer(payload, signatures.asymmetric)
        if result is None:
            raise SignatureError("bad_signature", header)
        return result

    def check_headers(self, headers: Headers, now: float) -> None:
        self._read(headers, now)

    def _signer(self, payload: bytes, signatures: list[bytes]) -> str | None:
        """Return the id of the public key that verifies one of the signatures; constant time is not needed."""
        for signature in signatures:
            for key, name in self.public_keys:
                try:
                    key.verify(signature, payload)
                except InvalidSignature:
                    continue
                return name
        return None

    def _read(self, headers: Headers, now: float) -> tuple[bytes, bytes, "_Signatures", bytes]:
        """Return timestamp, message id, signatures and the name of their header."""
        names = {name for name, _ in headers}
        svix = b"svix-signature" in names and b"webhook-signature" not in names
        family = b"svix-" if svix else b"webhook-"
        timestamp = _only(headers, family + b"timestamp")
        _check_time(timestamp, now, self.tolerance, family + b"timestamp", takes_milliseconds=False)
        message_id = _only(headers, family + b"id")
        if b"." in message_id:  # otherwise the signed text could be split into another id, time and body
            raise SignatureError("malformed_header", family + b"id")
        header = family + b"signature"
        return timestamp, message_id, self._signatures(headers, header), header

    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        if not self.mac.keys:
            raise SettingsError(
                "ARCHIVER_WEBHOOK_SECRETS: a public key (whpk_) only verifies. Signing needs a secret (whsec_)."
            )
        return standard_webhooks.sign([self.mac.keys[0][0]], message_id, int(now), body, self.family)

    def _signatures(self, headers: Headers, header: bytes) -> "_Signatures":
        """Return the signatures of supported versions from all headers of this name; other words are skipped."""
        values = [value for name, value in headers if name == header]
        if not any(values):
            raise SignatureError("missing_header", header)
        words = b" ".join(values)
        if len(words) > _MAX_SIGNATURES:
            raise SignatureError("malformed_header", header)
        symmetric = self._texts(words, b"v1,", self.mac.length) if self.mac.keys else []
        texts = self._texts(words, b"v1a,", _ED25519_LENGTH) if self.public_keys else []
        asymmetric = [signature for text in texts if (signature := _decoded(text)) is not None]
        if not symmetric and not asymmetric:
            raise SignatureError("malformed_header", header)
        return _Signatures(symmetric, asymmetric[:_MAX_ASYMMETRIC])

    def _texts(self, words: bytes, version: bytes, length: int) -> list[bytes]:
        result = [self.mac.canonical(word[len(version) :]) for word in words.split(b" ") if word.startswith(version)]
        return [text for text in result if len(text) == length]


@dataclass(frozen=True, slots=True)
class _Signatures:
    symmetric: list[bytes]  # canonical text
    asymmetric: list[bytes]


def _decoded(text: bytes) -> bytes | None:
    """Decode canonical base64; None if the text is not the canonical encoding of its bytes."""
    try:
        signature = a2b_base64(text + b"=" * (-len(text) % 4), strict_mode=True)
    except ValueError:
        return None
    return signature if b2a_base64(signature, newline=False).rstrip(b"=") == text else None


@cache
def _entry(prefix: bytes) -> re.Pattern[bytes]:
    return re.compile(rb"(?:^|[ ,])" + re.escape(prefix) + rb"([^ ,]+)")


def _entries(value: bytes, prefix: bytes, header: bytes) -> list[bytes]:
    """Return the text after the prefix of each entry of a header; commas or spaces separate entries."""
    if len(value) > _MAX_SIGNATURES:
        raise SignatureError("malformed_header", header)
    return _entry(prefix).findall(value)


def _only(headers: Headers, header: bytes) -> bytes:
    """Return the value of a header that must occur once: if there were two, a proxy might use the other one."""
    result = [value for name, value in headers if name == header]
    if len(result) > 1:
        raise SignatureError("malformed_header", header)
    if not result or not result[0]:
        raise SignatureError("missing_header", header)
    return result[0]


def _check_time(timestamp: bytes, now: float, tolerance: int, header: bytes, *, takes_milliseconds: bool) -> None:
    """Check a timestamp in decimal digits: seconds since the epoch, or milliseconds if the scheme allows them."""
    if len(timestamp) > _MAX_TIMESTAMP or not timestamp.isdigit():
        raise SignatureError("malformed_timestamp", header)
    seconds: float = int(timestamp)
    if takes_milliseconds and seconds > _FIRST_MILLISECONDS:
        seconds /= 1000
    if abs(now - seconds) > tolerance:
        raise SignatureError("stale_timestamp", header)
