"""Logins to the console: a random token in the browser's cookie, its digest in the database."""

import hashlib
import hmac
import secrets
from datetime import timedelta

import msgspec
from sqlalchemy import Connection, delete, insert, or_, select, update

from archiver.database import now, tables
from archiver.settings.console_roles import Role

IDLE = timedelta(minutes=30)
LIFETIME = timedelta(hours=12)
SEEN_EVERY = timedelta(minutes=1)
TOKEN_CHARACTERS = 43  # 32 random bytes in base64url


class Login(msgspec.Struct, frozen=True):
    """Who sent a request, and the token that each of this login's forms contains."""

    user: str
    role: Role
    form_token: str


def form_token(token: str) -> str:
    """Return the token for forms that belongs to a cookie; it does not reveal the cookie."""
    return hashlib.sha256(b"form\0" + token.encode()).hexdigest()


def is_form_token(given: str, token: str) -> bool:
    """Return whether a form was made for this cookie."""
    return hmac.compare_digest(given.encode(), form_token(token).encode())


def is_token(text: str) -> bool:
    """Return whether a text could be the token of a login."""
    return len(text) == TOKEN_CHARACTERS and text.isascii()


def insert_login(connection: Connection, user: str, password_hash: str | None, earlier: str) -> str | None:
    """Begin a login and return its token; delete the login of the token `earlier` and all logins that have ended.

    `password_hash`: None for a user whom an identity provider logs in. Returns None if the user was disabled, or if
    the password was changed since it was checked.
    """
    token, at, logins, users = secrets.token_urlsafe(32), now(), tables.logins, tables.users
    known = select(users.c.name).where(
        users.c.name == user, users.c.password_hash == password_hash, users.c.disabled_at.is_(None)
    )
    # Locked, so that a change of the password, which ends the logins, comes before or after this one.
    if connection.scalar(known.with_for_update(read=True)) is None:
        return None
    delete_login(connection, earlier)
    connection.execute(delete(logins).where(or_(logins.c.began_at < at - LIFETIME, logins.c.seen_at < at - IDLE)))
    row = {"token_digest": _digest(token), "user_name": user, "began_at": at, "seen_at": at}
    connection.execute(insert(logins), row)
    return token


def select_login(connection: Connection, token: str, *, is_active: bool = True) -> Login | None:
    """Return the login of a token; None if it has ended, or its user is disabled.

    `is_active`: the user sent the request, so the login does not end soon.
    """
    users, logins, at = tables.users.c, tables.logins, now()
    query = (
        select(users.name, users.role, logins.c.seen_at)
        .join_from(logins, tables.users, users.name == logins.c.user_name)
        .where(logins.c.token_digest == _digest(token), users.disabled_at.is_(None))
        .where(logins.c.began_at >= at - LIFETIME, logins.c.seen_at >= at - IDLE)
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    if is_active and row.seen_at < at - SEEN_EVERY:
        connection.execute(update(logins).where(logins.c.token_digest == _digest(token)).values(seen_at=at))
    return Login(row.name, row.role, form_token(token))


def delete_login(connection: Connection, token: str) -> None:
    """End a login."""
    connection.execute(delete(tables.logins).where(tables.logins.c.token_digest == _digest(token)))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
