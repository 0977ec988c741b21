"""What a database URL means, and what of it may be told to people."""

import re
from urllib.parse import unquote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from archiver.settings import SettingsError


def database_url(value: str) -> URL:
    """A SQLAlchemy URL from `postgres://`, `postgresql://` or `postgresql+psycopg://`.

    Raises `SettingsError` for anything else; the text never repeats the value, which may hold a password.
    """
    try:
        url = _make_url(value.strip())
    except (ArgumentError, ValueError):
        raise SettingsError(
            "DATABASE_URL: not a URL; write postgresql://USER:PASSWORD@HOST:5432/DATABASE,"
            " with special characters in the password percent-encoded."
        ) from None
    if url.drivername not in {"postgres", "postgresql", "postgresql+psycopg"}:
        raise SettingsError("DATABASE_URL: must begin with postgres:// or postgresql://.")
    if value.count("@") > 1:
        raise SettingsError("DATABASE_URL: an @ in the user or the password must be written %40.")
    return url.set(drivername="postgresql+psycopg")


_SEVERAL_HOSTS = re.compile(
    r"(?P<before>[^:/?#]+://(?:[^@/?#]*@)?)(?P<hosts>[^@/?#]*,[^@/?#]*)(?P<rest>(?:[/?#].*)?)", re.DOTALL
)


def _make_url(value: str) -> URL:
    """SQLAlchemy's, which knows several hosts only in the query: libpq's HOST1:5432,HOST2:5432 is brought there."""
    several = _SEVERAL_HOSTS.fullmatch(value)
    if several is None:
        return make_url(value)
    told = [_HOST.fullmatch(each) for each in several["hosts"].split(",")]
    hosts = [unquote(each["name"].strip("[]")) for each in told if each]
    ports = [each["port"] or "" for each in told if each]
    if len(hosts) < len(told) or not all(hosts):
        raise ValueError
    url = make_url(several["before"] + several["rest"])
    return url.update_query_dict({"host": ",".join(hosts)} | ({"port": ",".join(ports)} if any(ports) else {}))


_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.%]+\]|[^:\[\]]+)(?::(?P<port>[0-9]*))?")


def place(url: URL) -> str:
    """Which database a URL names, and as whom, for people; nothing of it that may be secret."""
    told = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    host = url.host or told.get("host") or "the default host"
    port = f":{url.port}" if url.port else ""
    user = url.username or told.get("user")
    return f"{url.database or told.get('dbname') or user or 'the default'} at {host}{port}" + (
        f" as {user}" if user else ""
    )
