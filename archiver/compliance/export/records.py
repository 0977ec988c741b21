"""Parse the evidence lines of an export, and compute their leaves."""

from base64 import b64decode
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import msgspec

from archiver.compliance.seals import leaves, merkle

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_KEY, _SALT = 32, 16  # lengths in bytes; with other lengths, bytes of a body could be mistaken for a key or salt


class EventLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A ledger row. `body`: the bytes as text; `body_base64`: the bytes if they are not UTF-8."""

    id: int
    type: str
    source: str
    session_id: str
    chat_id: str | None
    received_at: datetime
    last_received_at: datetime
    delivery_count: int
    occurred_at: datetime | None
    earliest_at: datetime | None
    key_id: str | None
    body_digest: str
    dedupe_key: str
    salt: str | None
    body: str | None
    body_base64: str | None = None

    def content(self) -> bytes | None:
        """Return the exact bytes of the body; None after an erasure. Raises `ValueError` if they are malformed."""
        if self.body_base64 is not None:
            if self.body is not None:
                raise ValueError("two bodies")
            return b64decode(self.body_base64, validate=True)
        return None if self.body is None else self.body.encode()


class AuditLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """An entry of the audit log. `detail`: the text as Postgres writes it, because this text is sealed."""

    id: int
    at: datetime
    actor: str
    kind: str
    reason: str | None
    detail: msgspec.Raw
    database_user: str | None = None


class ErasureLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """An erasure of a session or of one of its turns."""

    id: int
    session_id: str
    chat_id: str
    erased_at: datetime
    rule: str
    act_id: int
    recorded_at: datetime | None = None
    database_user: str | None = None


_keys_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.encode


def is_plain(line: bytes, record: Any) -> bool:
    """Return whether a line is compact and repeats no key, as exports write it.

    A line with a repeated key is ambiguous: readers may use either value.
    """
    if isinstance(record, EventLine) and _is_usual(line, record):
        return True
    raws = _keys_of(line)
    return len(line) == 2 + 4 * len(raws) + sum(map(len, raws)) + sum(map(len, raws.values()))


def _is_usual(line: bytes, event: EventLine) -> bool:
    """Make the same check cheaply for a usual event line, by counting quotation marks before the body.

    Within a string, each quotation mark follows a backslash, so the first `,"body":` is the key.
    """
    body = line.find(b',"body":')
    if event.body is None or body < 0 or line.find(b"\\", 0, body) >= 0:
        return False
    optional = (event.chat_id, event.occurred_at, event.earliest_at, event.key_id, event.salt)
    quotes = 2 * (_KEYS_AND_TEXTS + len(optional) - optional.count(None))
    return line.count(b'"', 0, body) == quotes and len(line) == body + 10 + len(_encode(event.body))


_KEYS_AND_TEXTS = 14 + 7  # keys before the body; values that are always strings


def event_leaf(event: EventLine, body: bytes | None) -> tuple[bytes, bool]:
    """Return the leaf hash and whether the body matches its digest. Raises `ValueError` and `OverflowError`."""
    key, digest = bytes.fromhex(event.dedupe_key), bytes.fromhex(event.body_digest)
    salt = None if event.salt is None else bytes.fromhex(event.salt)
    is_intact = len(key) == _KEY and (salt is None) == (body is None)
    if salt is not None and body is not None:
        is_intact = is_intact and len(salt) == _SALT and sha256(salt + body).digest() == digest
        key = sha256(salt + key).digest()
    fields = (
        _number(event.id),
        _moment(event.received_at),
        digest,
        _moment(event.occurred_at),
        event.type.encode(),
        event.source.encode(),
        event.session_id.encode(),
        _text(event.chat_id),
        _text(event.key_id),
        key,
    )
    return _hashed(b"E", fields), is_intact


def audit_leaf(act: AuditLine) -> bytes:
    """Return the leaf hash. Raises `ValueError` and `OverflowError`."""
    detail = bytes(act.detail)
    fields = (_number(act.id), _moment(act.at), act.actor.encode(), act.kind.encode(), _text(act.reason), detail)
    later = () if act.database_user is None else (act.database_user.encode(),)
    return _hashed(b"A", (*fields, *later))


def erasure_leaf(erasure: ErasureLine) -> bytes:
    """Return the leaf hash. Raises `ValueError` and `OverflowError`."""
    fields = (
        _number(erasure.id),
        erasure.session_id.encode(),
        erasure.chat_id.encode(),
        _moment(erasure.erased_at),
        erasure.rule.encode(),
        _number(erasure.act_id),
    )
    added = (_moment(erasure.recorded_at), _text(erasure.database_user))
    return _hashed(b"X", fields if added == (None, None) else (*fields, *added))


def _hashed(letter: bytes, fields: tuple[bytes | None, ...]) -> bytes:
    return merkle.leaf_hash(leaves.leaf(letter, fields))


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big", signed=True)


def _text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _moment(value: Any) -> bytes | None:
    if value is None:
        return None
    if value.tzinfo is None:
        raise ValueError("time without a zone")
    return _number((value - _EPOCH) // _MICROSECOND)
