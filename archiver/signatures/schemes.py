"""The ways in which a delivery proves itself: the secret in a header, an HMAC over a template, Standard Webhooks."""

import hmac
from abc import ABC, abstractmethod
from binascii import b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Headers = Sequence[tuple[bytes, bytes]]
"""As ASGI gives them: names in lower case, values any bytes."""

Reason = Literal[
    "missing_header",  # absent or empty
    "malformed_header",  # given twice, or cannot be a signature of this scheme
    "malformed_timestamp",  # not a plain decimal number
    "stale_timestamp",  # too far from our clock, either way
    "bad_signature",  # well formed, and no secret makes it
]
REASONS: tuple[Reason, ...] = get_args(Reason)

Keys = tuple[tuple[bytes, str], ...]  # (key, key id) of each secret, in the order of the setting
_LONGEST_TIMESTAMP = 15  # digits; milliseconds have 13
_FIRST_MILLISECONDS = 10**11  # as seconds this is the year 5138, as milliseconds 1973
_LONGEST_SIGNATURES = 4096  # bytes, over 80 signatures; each is compared with each secret
_URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


class SignatureError(Exception):
    """The delivery does not prove that it comes from the platform."""

    def __init__(self, reason: Reason, header: bytes) -> None:
        super().__init__(f"{self.__doc__} ({reason}: {header.decode()})")
        self.reason = reason


class Verifier(ABC):
    """One way to prove deliveries, with its keys."""

    __slots__ = ()

    @abstractmethod
    def verify(self, body: bytes, headers: Headers, method: str, url: str, now: float) -> str:
        """The key id of the secret that the delivery proves, or `none` where nothing is to be proved.

        `url` is the one the platform called; `now` is in seconds since the epoch. Raises `SignatureError`, and
        nothing else whatever the bytes are.
        """

    @abstractmethod
    def check_headers(self, headers: Headers, now: float) -> None:
        """Raises the `SignatureError` that `verify` would raise whatever the body is, as far as the headers tell."""

    @abstractmethod
    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        """Headers that `verify` accepts, made with the first secret: what the platform would send.

        `message_id` is neither empty nor holds a full stop (Standard Webhooks, "Signature scheme").
        """


@dataclass(frozen=True, slots=True)
class Unproven(Verifier):
    """Scheme `none`."""

    def verify(self, body: bytes, headers: Headers, method: str, url: str, now: float) -> str:
        return "none"

    def check_headers(self, headers: Headers, now: float) -> None:
        pass

    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class SharedSecret(Verifier):
    """Schemes `secret` and `bearer`: the secret itself is in a header."""

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
        found = None
        for secret, name in self.keys:
            if hmac.compare_digest(secret, given):
                found = found or name
        if found is None:
            raise SignatureError("bad_signature", self.header)
        return found

    def check_headers(self, headers: Headers, now: float) -> None:
        self.verify(b"", headers, "", "", now)  # the body proves nothing here

    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        secret = self.keys[0][0].decode(errors="surrogateescape")
        return {self.header.decode(): f"Bearer {secret}" if self.bearer else secret}


@dataclass(frozen=True, slots=True)
class Mac:
    """HMAC (RFC 2104) under several keys, written as text.

    Signatures are compared as canonical text (hex in lower case; base64 in the standard alphabet without padding),
    so that two different texts never stand for one signature by way of a lenient decoder.
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
        """Characters of a canonical signature."""
        size = {"sha1": 20, "sha256": 32, "sha512": 64}[self.algorithm]
        return size * 2 if self.encoding == "hex" else (size * 4 + 2) // 3

    def matching(self, payload: bytes, candidates: list[bytes], header: bytes) -> str:
        """The key id of the first key that makes any of `candidates`; every pair is compared."""
        found = None
        for key, name in self.keys:
            expected = self.canonical(self.sign(key, payload))
            for candidate in candidates:
                if hmac.compare_digest(expected, candidate):
                    found = found or name
        if found is None:
            raise SignatureError("bad_signature", header)
        return found


@dataclass(frozen=True, slots=True)
class Hmac(Verifier):
    """Scheme `hmac`: one signature over a template. A header that the template does not sign is empty here."""

    mac: Mac
    template: tuple[bytes | str, ...]  # bytes stand for themselves, text names a placeholder
    header: bytes
    prefix: bytes
    timestamp_header: bytes
    id_header: bytes
    tolerance: int

    def verify(self, body: bytes, headers: Headers, method: str, url: str, now: float) -> str:
        timestamp, message_id, signature = self._read(headers, now)
        payload = self._payload(body, timestamp, message_id, method, url)
        return self.mac.matching(payload, [signature], self.header)

    def check_headers(self, headers: Headers, now: float) -> None:
        self._read(headers, now)

    def _read(self, headers: Headers, now: float) -> tuple[bytes, bytes, bytes]:
        """Timestamp, message id and canonical signature."""
        timestamp = message_id = b""
        if self.timestamp_header:
            timestamp = _only(headers, self.timestamp_header)
            _check_time(timestamp, now, self.tolerance, self.timestamp_header)
        if self.id_header:
            message_id = _only(headers, self.id_header)
        given = _only(headers, self.header)
        signature = self.mac.canonical(given.removeprefix(self.prefix))
        if not given.startswith(self.prefix) or len(signature) != self.mac.length:
            raise SignatureError("malformed_header", self.header)
        return timestamp, message_id, signature

    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        timestamp = str(int(now))
        payload = self._payload(body, timestamp.encode(), message_id.encode(), method, url)
        signature = self.prefix + self.mac.sign(self.mac.keys[0][0], payload)
        headers = {self.header: signature.decode()}
        if self.timestamp_header:
            headers[self.timestamp_header] = timestamp
        if self.id_header:
            headers[self.id_header] = message_id
        return {name.decode(): value for name, value in headers.items()}

    def _payload(self, body: bytes, timestamp: bytes, message_id: bytes, method: str, url: str) -> bytes:
        """One pass over the template: what is put in is never looked at again."""
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
    """Scheme `standard`: Standard Webhooks, symmetric signatures (`v1`), also under Svix's names of the headers."""

    mac: Mac
    tolerance: int

    def verify(self, body: bytes, headers: Headers, method: str, url: str, now: float) -> str:
        timestamp, message_id, candidates, header = self._read(headers, now)
        payload = b"%b.%b.%b" % (message_id, timestamp, body)
        return self.mac.matching(payload, candidates, header)

    def check_headers(self, headers: Headers, now: float) -> None:
        self._read(headers, now)

    def _read(self, headers: Headers, now: float) -> tuple[bytes, bytes, list[bytes], bytes]:
        """Timestamp, message id, canonical signatures and the name of their header."""
        names = {name for name, _ in headers}
        svix = b"svix-signature" in names and b"webhook-signature" not in names
        family = b"svix-" if svix else b"webhook-"
        timestamp = _only(headers, family + b"timestamp")
        _check_time(timestamp, now, self.tolerance, family + b"timestamp")
        message_id = _only(headers, family + b"id")
        if b"." in message_id:  # else the same signed text could be cut into another id, time and body
            raise SignatureError("malformed_header", family + b"id")
        header = family + b"signature"
        return timestamp, message_id, self._signatures(headers, header), header

    def sign(self, body: bytes, now: float, message_id: str, method: str, url: str) -> dict[str, str]:
        timestamp = str(int(now))
        payload = b"%b.%b.%b" % (message_id.encode(), timestamp.encode(), body)
        signature = self.mac.sign(self.mac.keys[0][0], payload).decode()
        return {
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": f"v1,{signature}",
        }

    def _signatures(self, headers: Headers, header: bytes) -> list[bytes]:
        """Those of version `v1`, from all headers of that name; other versions and stray words are passed over."""
        values = [value for name, value in headers if name == header]
        if not any(values):
            raise SignatureError("missing_header", header)
        words = b" ".join(values)
        if len(words) > _LONGEST_SIGNATURES:
            raise SignatureError("malformed_header", header)
        entries = [word[3:] for word in words.split(b" ") if word.startswith(b"v1,")]
        length = self.mac.length
        candidates = [text for text in map(self.mac.canonical, entries) if len(text) == length]
        if not candidates:
            raise SignatureError("malformed_header", header)
        return candidates


def _only(headers: Headers, header: bytes) -> bytes:
    """The value of a header that must be there once: of two, a proxy and we might take different ones."""
    found = [value for name, value in headers if name == header]
    if len(found) > 1:
        raise SignatureError("malformed_header", header)
    if not found or not found[0]:
        raise SignatureError("missing_header", header)
    return found[0]


def _check_time(timestamp: bytes, now: float, tolerance: int, header: bytes) -> None:
    """Decimal digits: seconds since the epoch, or milliseconds."""
    if len(timestamp) > _LONGEST_TIMESTAMP or not timestamp.isdigit():
        raise SignatureError("malformed_timestamp", header)
    seconds: float = int(timestamp)
    if seconds > _FIRST_MILLISECONDS:
        seconds /= 1000
    if abs(now - seconds) > tolerance:
        raise SignatureError("stale_timestamp", header)
