"""Users of the console: their roles and passwords, in the database."""

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime

import msgspec
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import ColumnElement, Connection, case, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from archiver.database import now, tables
from archiver.errors import ArchiverError
from archiver.ledger import audit_log
from archiver.settings.console_roles import Role

MIN_PASSWORD, MAX_PASSWORD = 12, 1024  # characters
_NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,62}", re.ASCII)


class AccountError(ArchiverError):
    """The user, name or password cannot be used; the message says why, and what to do."""


class User(msgspec.Struct, frozen=True):
    """A row of `archiver.users`, without its password. `issuer`, `subject`: None for a user with a password."""

    name: str
    role: Role
    added_at: datetime
    changed_at: datetime
    disabled_at: datetime | None
    issuer: str | None
    subject: str | None


class Identity(msgspec.Struct, frozen=True):
    """A person at an identity provider: issuer and subject identify the person, the username only names them."""

    issuer: str
    subject: str
    username: str

    @property
    def name(self) -> str:
        """Return the name of the user here: the username and a digest, which no user with a password can have."""
        plain = _NOT_IN_NAME.sub("-", self.username.lower()).lstrip("._@-")[:MAX_USERNAME] or "user"
        digest = hashlib.sha256(f"{self.issuer}\0{self.subject}".encode()).hexdigest()[:DIGEST_CHARACTERS]
        return f"{plain}~{digest}"


MAX_USERNAME, DIGEST_CHARACTERS = 40, 16  # of the name of a user from an identity provider
_NOT_IN_NAME = re.compile(r"[^a-z0-9._@-]", re.ASCII)


# Argon2id with 64 MiB and three passes (RFC 9106, section 4), in one thread, so that a login leaves a core to others.
_hasher = PasswordHasher(time_cost=3, memory_cost=65_536, parallelism=1)


def hash_password(password: str) -> str:
    """Return the Argon2id hash of a new password. Takes about 0.1 s and 64 MiB. Raises `AccountError`."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise AccountError(
            f"a password has {MIN_PASSWORD} to {MAX_PASSWORD:,} characters; this one has {len(password):,}"
        )
    return _hasher.hash(password)


# Of a random password that was not kept.
_UNKNOWN = "$argon2id$v=19$m=65536,t=3,p=1$zJjDDEXzWCNc7EuqvIlliQ$j770Lb+/jhJtiqglWyFJ+Amuq6cLnbFmX7pX3q2bF7M"


def is_password(password: str, password_hash: str | None) -> bool:
    """Return whether a password matches a hash. It takes equally long without a hash, if the user does not exist."""
    try:
        _hasher.verify(_UNKNOWN if password_hash is None else password_hash, password[: MAX_PASSWORD + 1])
    except (VerificationError, InvalidHashError):
        return False
    return password_hash is not None


def insert_user(connection: Connection, name: str, role: Role, password_hash: str, actor: str) -> None:
    """Add a user, with an audit entry. Raises `AccountError` for an invalid or existing name."""
    if not _NAME.fullmatch(name):
        raise AccountError(
            f"{name!r} cannot be a user name: use 1 to 63 of a-z, 0-9, '.', '_', '@' and '-';"
            " the first is a letter or a digit"
        )
    at = now()
    row = {"name": name, "role": role, "password_hash": password_hash, "added_at": at, "changed_at": at}
    added = insert(tables.users).on_conflict_do_nothing().returning(tables.users.c.name)
    if connection.execute(added, row).one_or_none() is None:
        raise AccountError(f"user {name} exists. To set a new password: archiver users reset {name}")
    audit_log.insert_entry(connection, "users.add", actor, None, {"user": name, "role": role})


def upsert_user(connection: Connection, identity: Identity, role: Role) -> str | None:
    """Add the user of an identity, or give the user this role; return the name, None if the user is disabled."""
    users, at = tables.users, now()
    row = {"name": identity.name, "issuer": identity.issuer, "subject": identity.subject, "role": role}
    added = insert(users).values(**row, added_at=at, changed_at=at)
    upserted = added.on_conflict_do_update(
        index_elements=[users.c.issuer, users.c.subject],
        set_={
            "role": added.excluded.role,
            "changed_at": case(
                (users.c.role == added.excluded.role, users.c.changed_at), else_=added.excluded.changed_at
            ),
        },
    ).returning(users.c.name, users.c.disabled_at)
    found = connection.execute(upserted).one()
    return None if found.disabled_at else str(found.name)


def end_logins(connection: Connection, identity: Identity) -> None:
    """End all logins of an identity."""
    users, logins = tables.users.c, tables.logins
    name = select(users.name).where(users.issuer == identity.issuer, users.subject == identity.subject)
    connection.execute(delete(logins).where(logins.c.user_name.in_(name)))


def reset_password(connection: Connection, name: str, password_hash: str, actor: str) -> None:
    """Set a new password and end the user's logins, with an audit entry. Raises `AccountError`."""
    users = tables.users.c
    if connection.scalar(select(users.issuer).where(users.name == name)) is not None:
        raise AccountError(f"user {name} logs in with an identity provider, and has no password here")
    _update(connection, name, password_hash=password_hash)
    audit_log.insert_entry(connection, "users.reset", actor, None, {"user": name})


def disable(connection: Connection, name: str, actor: str) -> None:
    """Forbid the user to log in and end the user's logins, with an audit entry. Raises `AccountError`."""
    _update(connection, name, disabled_at=func.coalesce(tables.users.c.disabled_at, now()))
    audit_log.insert_entry(connection, "users.disable", actor, None, {"user": name})


def enable(connection: Connection, name: str, actor: str) -> None:
    """Allow a disabled user to log in again, with an audit entry. Raises `AccountError`."""
    _update(connection, name, disabled_at=None)
    audit_log.insert_entry(connection, "users.enable", actor, None, {"user": name})


def _update(connection: Connection, name: str, **values: str | ColumnElement[datetime] | None) -> None:
    users, logins = tables.users, tables.logins
    found = connection.execute(update(users).where(users.c.name == name).values(changed_at=now(), **values)).rowcount
    if not found:
        raise AccountError(f"there is no user {name!r}: see `archiver users list`")
    connection.execute(delete(logins).where(logins.c.user_name == name))


def select_users(connection: Connection) -> Sequence[User]:
    """Return all users in order of their names."""
    columns = [tables.users.c[name] for name in User.__struct_fields__]
    return [User(*row) for row in connection.execute(select(*columns).order_by(tables.users.c.name))]


def select_password_hash(connection: Connection, name: str) -> str | None:
    """Return the password hash of a user who may log in; None if there is no such user."""
    users = tables.users.c
    query = select(users.password_hash).where(users.name == name, users.disabled_at.is_(None))
    return connection.scalar(query)
