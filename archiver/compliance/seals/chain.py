"""Build the chain of seals: each seal states its content and its predecessor, so none can be changed on its own."""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from sqlalchemy import ColumnElement, Connection, Select, case, func, insert, select, text

from archiver import database
from archiver.compliance.seals import merkle
from archiver.compliance.seals.leaves import ENTRY, KINDS
from archiver.database import tables
from archiver.errors import ArchiverError
from archiver.settings import Settings, SettingsError, given_as

NOTHING = bytes(32)  # the previous hash of the first seal
ENTRY_SIZE = ENTRY.size


class KeyFileError(ArchiverError):
    """The key is invalid; the message names the remedy."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A leaf as listed by its seal: the letter of its table, its id, its hash."""

    letter: bytes
    id: int
    hash: bytes


class Seal(msgspec.Struct, frozen=True):
    """A seal. `through`: the last sealed id of each table, by name.

    `listed`: SHA-256 over its packed entries.
    """

    id: int
    sealed_at: datetime
    through: dict[str, int]
    size: int
    listed: bytes
    root: bytes
    previous: bytes
    hash: bytes
    key_id: str | None = None
    signature: bytes | None = None

    @property
    def statement(self) -> bytes:
        """Return the text that is hashed and signed; its lines can be reproduced without this program."""
        lines = [
            "callhq-archiver seal v1",
            f"id {self.id}",
            f"sealed_at {self.sealed_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
            *(f"{kind.table} {self.through[kind.table]}" for kind in KINDS),
            f"leaves {self.size}",
            f"entries {self.listed.hex()}",
            f"root {self.root.hex()}",
            f"previous {self.previous.hex()}",
            f"key {self.key_id or '-'}",
        ]
        return "\n".join(lines).encode() + b"\n"


FIRST = Seal(
    0, datetime(1970, 1, 1, tzinfo=UTC), {kind.table: 0 for kind in KINDS}, 0, NOTHING, NOTHING, NOTHING, NOTHING
)


def make(before: Seal, entries: bytes, through: dict[str, int], key: Ed25519PrivateKey | None) -> Seal:
    """Create the seal that follows `before` and covers these packed entries; signed if there is a key."""
    draft = Seal(
        id=before.id + 1,
        sealed_at=database.now(),
        through=through,
        size=len(entries) // ENTRY_SIZE,
        listed=sha256(entries).digest(),
        root=merkle.root(hashes(entries)),
        previous=before.hash,
        hash=NOTHING,
        key_id=None if key is None else key_id(key.public_key()),
    )
    return msgspec.structs.replace(
        draft,
        hash=sha256(draft.statement).digest(),
        signature=None if key is None else key.sign(draft.statement),
    )


def is_signed_by(seal: Seal, key: Ed25519PublicKey) -> bool:
    """Return whether this key signed the seal."""
    if seal.signature is None:
        return False
    try:
        key.verify(seal.signature, seal.statement)
    except InvalidSignature:
        return False
    return True


def unpack(packed: bytes) -> list[Entry]:
    """Return the packed entries; incomplete bytes at the end are ignored."""
    whole = len(packed) - len(packed) % ENTRY_SIZE
    return [Entry(*fields) for fields in ENTRY.iter_unpack(packed[:whole])]


def hashes(packed: bytes) -> list[bytes]:
    """Return the leaf hashes of packed entries."""
    return [packed[end - 32 : end] for end in range(ENTRY_SIZE, len(packed) + 1, ENTRY_SIZE)]


def insert_seal(connection: Connection, seal: Seal, entries: bytes) -> None:
    """Append the seal to the chain."""
    values = {name: getattr(seal, name) for name in _KEPT} | {"entries": entries}
    values |= {kind.through: seal.through[kind.table] for kind in KINDS}
    connection.execute(insert(tables.seals), values)


_KEPT = ("id", "sealed_at", "root", "previous", "hash", "key_id", "signature")


def select_newest(connection: Connection) -> Seal:
    """Return the newest seal; `FIRST` if there is none."""
    row = connection.execute(_NEWEST).mappings().first()
    return FIRST if row is None else seal_from_row(dict(row))


def select_seal(connection: Connection, number: int) -> dict[str, Any] | None:
    """Return the seal with this number, in the form that follow-ups publish; None if there is none."""
    row = connection.execute(_without_entries().where(tables.seals.c.id == number)).mappings().first()
    if row is None:
        return None
    found = seal_from_row(dict(row))
    return {
        "id": found.id,
        "sealed_at": found.sealed_at,
        "leaves": found.size,
        "hash": found.hash.hex(),
        "statement": found.statement.decode(),
        "key_id": found.key_id,
        "signature": None if found.signature is None else found.signature.hex(),
    }


# A time outside Python's range cannot be that of a genuine seal: another time replaces it, so the hash will differ.
_SEALED_AT = case(
    (
        tables.seals.c.sealed_at.between(text("'0002-01-01 UTC'"), text("'9999-12-30 UTC'")),
        tables.seals.c.sealed_at,
    )
).label("sealed_at")


def _columns(*, with_entries: bool) -> list[ColumnElement[Any]]:
    entries, sealed_at = tables.seals.c.entries, tables.seals.c.sealed_at
    return [
        _SEALED_AT if column is sealed_at else column
        for column in tables.seals.c
        if with_entries or column is not entries
    ]


def _without_entries() -> Select[Any]:
    """Return a query for seals without their many entries, which the database only counts and digests."""
    entries = tables.seals.c.entries
    return select(
        *_columns(with_entries=False),
        (func.octet_length(entries) / ENTRY_SIZE).label("size"),
        func.sha256(entries).label("listed"),
    )


_NEWEST = _without_entries().order_by(tables.seals.c.id.desc()).limit(1)


def select_seals(connection: Connection, after: int = 0, through: int | None = None) -> Iterator[tuple[Seal, bytes]]:
    """Yield the seals after this id with their packed entries, in order, in small batches."""
    while True:
        query = (
            select(*_columns(with_entries=True))
            .where(tables.seals.c.id > after)
            .order_by(tables.seals.c.id)
            .limit(_PAGE)
        )
        if through is not None:
            query = query.where(tables.seals.c.id <= through)
        rows = connection.execute(query).mappings().all()
        for row in rows:
            entries = bytes(row["entries"])
            size, listed = len(entries) // ENTRY_SIZE, sha256(entries).digest()
            yield seal_from_row({**row, "size": size, "listed": listed}), entries
        if len(rows) < _PAGE:
            return
        after = rows[-1]["id"]


_PAGE = 20
_NO_TIME = datetime.max.replace(tzinfo=UTC)


def seal_from_row(row: Mapping[str, Any]) -> Seal:
    """Return a seal from its row, which includes the `size` and the digest (`listed`) of its entries."""
    return Seal(
        id=row["id"],
        sealed_at=row["sealed_at"] or _NO_TIME,
        through={kind.table: row[kind.through] for kind in KINDS},
        size=int(row["size"]),
        listed=bytes(row["listed"]),
        root=bytes(row["root"]),
        previous=bytes(row["previous"]),
        hash=bytes(row["hash"]),
        key_id=row["key_id"],
        signature=None if row["signature"] is None else bytes(row["signature"]),
    )


_STATEMENT = re.compile(
    r"callhq-archiver seal v1\nid (\d{1,19})\nsealed_at (\S{27})\n"
    + "".join(rf"{kind.table} (\d{{1,19}})\n" for kind in KINDS)
    + r"leaves (\d{1,19})\nentries ([0-9a-f]{64})\nroot ([0-9a-f]{64})\nprevious ([0-9a-f]{64})\nkey (\S{1,64})\n",
    re.ASCII,
)


def seal_from_statement(statement: str, hashed: bytes, key: str | None, signature: bytes | None) -> Seal:
    """Parse a seal from its statement. Raises `ValueError` if the statement is malformed."""
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise ValueError("not the statement of a seal")
    number, sealed_at, *throughs, size, listed, root, previous, key_name = match.groups()
    seal = Seal(
        id=int(number),
        sealed_at=datetime.fromisoformat(sealed_at),
        through={kind.table: int(through) for kind, through in zip(KINDS, throughs, strict=True)},
        size=int(size),
        listed=bytes.fromhex(listed),
        root=bytes.fromhex(root),
        previous=bytes.fromhex(previous),
        hash=hashed,
        key_id=key,
        signature=signature,
    )
    if seal.statement != statement.encode() or key_name != (key or "-"):
        raise ValueError("not the statement of this seal")
    return seal


def signing_key(configuration: Settings) -> Ed25519PrivateKey | None:
    """Return the key that signs seals, if there is one. Raises `SettingsError`."""
    pem = configuration.seal_key.get_secret_value()
    try:
        return private_key(pem) if pem else None
    except KeyFileError as error:
        raise SettingsError(f"{given_as('ARCHIVER_SEAL_KEY')}: {error}") from None


def private_key(pem: str) -> Ed25519PrivateKey:
    """Parse a signing key in PEM. Raises `KeyFileError`."""
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except TypeError:  # a password is required
        raise KeyFileError(
            "the key is encrypted; keys with a password are not supported: decrypt it with"
            " openssl pkey -in seal.key -out plain.key"
        ) from None
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(
            "not an Ed25519 private key in PEM: create one with openssl genpkey -algorithm ed25519 -out seal.key"
        )
    return key


def public_key(pem: str) -> Ed25519PublicKey:
    """Parse a public key in PEM. Raises `KeyFileError`, also for a private key, which no check needs."""
    if "PRIVATE KEY" in pem:
        raise KeyFileError(
            "this is a private key; create its public key with openssl pkey -in seal.key -pubout -out seal.pub"
        )
    try:
        key = load_pem_public_key(pem.encode())
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(
            "not an Ed25519 public key in PEM: create it with openssl pkey -in seal.key -pubout -out seal.pub"
        )
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """Return the key id: the first 16 hexadecimal digits of SHA-256 over the raw public key."""
    return sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]
