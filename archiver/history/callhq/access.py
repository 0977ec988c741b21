"""Base URL and credentials of an API."""

from urllib.parse import quote

import httpx2
from pydantic import SecretStr

from archiver.settings import SettingsError


def segment(session_id: str) -> str:
    """Return the id as one path segment, with dots encoded because `..` would leave the path."""
    return quote(session_id, safe="").replace(".", "%2E")


def base(name: str, url: str) -> str:
    """Return the base URL. Raises `SettingsError`, which does not quote the URL: it may contain a password."""
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    if parsed.scheme not in {"http", "https"} or not parsed.host or parsed.query or parsed.fragment:
        raise SettingsError(f"{name}: expected a URL like https://api.callhq.ai/api")
    return str(parsed).rstrip("/")


def printable(url: str) -> str:
    """Return the URL without its user name and password."""
    parsed = httpx2.URL(url)
    return str(parsed.copy_with(userinfo=b"")) if parsed.userinfo else url


def secret(name: str, secret: SecretStr) -> str:
    """Return the secret. Raises `SettingsError`, without quoting it, if it is not valid in an HTTP header."""
    value = secret.get_secret_value().strip()
    if not value or not value.isascii() or not value.isprintable():
        raise SettingsError(f"{name}: expected one or more printable ASCII characters")
    return value
