"""Parse database URLs, and describe them without secrets."""

import re
from urllib.parse import unquote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from archiver.settings import SettingsError, given_as


def database_url(value: str) -> URL:
    """Return a SQLAlchemy URL from `postgres://`, `postgresql://` or `postgresql+psycopg://`.

    Raises `SettingsError` for anything else; the message never repeats the value, which may contain a password.
    """
    try:
        url = _make_url(value.strip())
    except (ArgumentError, ValueError):
        raise SettingsError(
            f"{given_as('DATABASE_URL')}: not a URL; write postgresql://USER:PASSWORD@HOST:5432/DATABASE,"
            " with special characters in the password percent-encoded."
        ) from None
    if url.drivername not in {"postgres", "postgresql", "postgresql+psycopg"}:
        raise SettingsError(f"{given_as('DATABASE_URL')}: must begin with postgres:// or postgresql://.")
    if value.count("@") > 1:
        raise SettingsError(f"{given_as('DATABASE_URL')}: an @ in the user or the password must be written as %40.")
    return url.set(drivername="postgresql+psycopg")


_SEVERAL_HOSTS = re.compile(
    r"(?P<before>[^:/?#]+://(?:[^@/?#]*@)?)(?P<hosts>[^@/?#]*,[^@/?#]*)(?P<rest>(?:[/?#].*)?)", re.DOTALL
)


def _make_url(value: str) -> URL:
    """Return the URL for SQLAlchemy, which accepts several hosts (as in libpq) only in the query."""
    several = _SEVERAL_HOSTS.fullmatch(value)
    if several is None:
        return make_url(value)
    hosts_given = [_HOST.fullmatch(each) for each in several["hosts"].split(",")]
    hosts = [unquote(each["name"].strip("[]")) for each in hosts_given if each]
    ports = [each["port"] or "" for each in hosts_given if each]
    if len(hosts) < len(hosts_given) or not all(hosts):
        raise ValueError
    url = make_url(several["before"] + several["rest"])
    return url.update_query_dict({"host": ",".join(hosts)} | ({"port": ",".join(ports)} if any(ports) else {}))


_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.%]+\]|[^:\[\]]+)(?::(?P<port>[0-9]*))?")


def describe(url: URL) -> str:
    """Describe the database of a URL (name, host, user) without secrets."""
    parameters = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    host = url.host or parameters.get("host") or "the default host"
    port = f":{url.port}" if url.port else ""
    user = url.username or parameters.get("user")
    return f"{url.database or parameters.get('dbname') or user or 'the default'} at {host}{port}" + (
        f" as {user}" if user else ""
    )
