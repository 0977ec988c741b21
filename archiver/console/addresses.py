"""Read and write addresses of pages."""

from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit

from starlette.requests import Request

from archiver.console.failures import missing

HOME = "/console/"
_LEADING_BACK = ("/console/oidc", "/console/log")  # a login that led there would begin again
_MAX_DIGITS = 18  # of an id
_MAX_POSITION_DIGITS = 9


def number_of(request: Request, name: str) -> int:
    """Return an id in the path. Raises `PageError`.

    A convertor of the route would raise outside of `safely`.
    """
    text = request.path_params[name]
    if not text.isascii() or not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise missing()
    return int(text)


def position_of(text: str) -> int:
    """Return the position after which a transcript continues; 0 if the text is not a position."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MAX_POSITION_DIGITS else 0


def address_of(path: str, parameters: Mapping[str, str | list[str]]) -> str:
    """Return the address of a page below /console/ with these parameters, some of them repeated."""
    return f"/console/{path}" + (f"?{urlencode(parameters, doseq=True)}" if parameters else "")


def local_address(address: str) -> str:
    """Return the address if it is a page of the console; else that of the first page."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return HOME
    is_page = not parts.scheme and not parts.netloc and parts.path.startswith(HOME) and "\\" not in address
    is_page = is_page and not parts.path.startswith(_LEADING_BACK)
    return address if is_page and address.isprintable() else HOME
