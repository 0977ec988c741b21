"""Parse database URLs, and describe them without secrets."""

import os
import re
from difflib import get_close_matches
from urllib.parse import unquote

from psycopg import pq
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from archiver.database.statements import DIALECT
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
            " with special characters in the password percent-encoded"
        ) from None
    if url.drivername not in {"postgres", "postgresql", "postgresql+psycopg"}:
        raise SettingsError(f"{given_as('DATABASE_URL')}: must begin with postgres:// or postgresql://")
    _check_options(url)
    if value.count("@") > 1:
        raise SettingsError(f"{given_as('DATABASE_URL')}: an @ in the user or the password must be written as %40")
    return url.set(drivername="postgresql+psycopg")


def _check_options(url: URL) -> None:
    known = [option.keyword.decode() for option in pq.Conninfo.get_defaults()]
    for name in url.query:
        if name not in known:
            alike = get_close_matches(name, known, 1)
            advice = f"did you mean {alike[0]}?" if alike else "see the parameter key words of libpq."
            raise SettingsError(f"{given_as('DATABASE_URL')}: Postgres has no connection option {name!r}; {advice}")


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


# Variables that are not options of a connection string, and the options that the archiver sets itself.
_OTHER_VARIABLES = ("PGSERVICEFILE", "PGSYSCONFDIR", "PGDATESTYLE", "PGTZ", "PGGEQO")
_OWN_OPTIONS = frozenset({"application_name", "client_encoding", "connect_timeout"})


def libpq_variables(url: URL) -> list[str]:
    """Return the environment variables from which libpq takes parameters that the URL does not contain."""
    given = _OWN_OPTIONS | DIALECT.create_connect_args(url)[1].keys()
    options = ((option.keyword.decode(), option.envvar) for option in pq.Conninfo.get_defaults())
    names = {variable.decode() for keyword, variable in options if variable and keyword not in given}
    return sorted(name for name in names.union(_OTHER_VARIABLES) if os.environ.get(name))


def what_to_check(url: URL | None) -> str:
    """Return the names of the settings that determine how the database is reached, as text for an error."""
    variables = libpq_variables(url) if url is not None else []
    return " and ".join(("DATABASE_URL", *([f"in the environment {', '.join(variables)}"] if variables else [])))
