"""The cookies of the console."""

from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

# Of a login, of the form of the login page, and of a login at a provider that is under way.
LOGIN, FORM, ATTEMPT = "archiver_console", "archiver_console_login", "archiver_console_oidc"
PATH = "/console"


def is_over_tls(request: Request) -> bool:
    """Return whether the browser uses TLS.

    A proxy that terminates TLS sets the header. A client that forges it only restricts its own cookie to TLS.
    """
    return request.scope["scheme"] == "https" or request.headers.get("x-forwarded-proto", "").startswith("https")


def set_cookie(
    response: Response,
    request: Request,
    name: str,
    value: str,
    *,
    path: str = PATH,
    samesite: Literal["strict", "lax"] = "strict",
    max_age: int | None = None,
) -> None:
    """Set a cookie that no script can read; over TLS, it is only sent over TLS. `max_age`: in seconds."""
    is_secure = is_over_tls(request)
    response.set_cookie(name, value, max_age, path=path, httponly=True, secure=is_secure, samesite=samesite)
