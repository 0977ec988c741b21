"""Where an API is, and what one shows to be let in."""

from urllib.parse import quote

import httpx2
from pydantic import SecretStr

from archiver.settings import SettingsError


def segment(session_id: str) -> str:
    """The id as one segment of a path. Dots too, for `..` alone would leave the folder."""
    return quote(session_id, safe="").replace(".", "%2E")


def base(name: str, url: str) -> str:
    """Raises `SettingsError`, without the URL: it may hold a password."""
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    if parsed.scheme not in {"http", "https"} or not parsed.host or parsed.query or parsed.fragment:
        raise SettingsError(f"{name}: must be like https://api.callhq.ai/api.")
    return str(parsed).rstrip("/")


def shown(url: str) -> str:
    """The URL for people, without what it may hold of a password."""
    parsed = httpx2.URL(url)
    return str(parsed.copy_with(userinfo=b"")) if parsed.userinfo else url


def secret(name: str, secret: SecretStr) -> str:
    """Raises `SettingsError` for what no header can hold; the HTTP library's own error would quote it."""
    value = secret.get_secret_value().strip()
    if not value or not value.isascii() or not value.isprintable():
        raise SettingsError(f"{name}: must be printable ASCII characters, and at least one.")
    return value
