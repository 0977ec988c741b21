"""Control access: log in and out, find the login of a request, check its role, and check the token of each form."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from urllib.parse import parse_qsl, urlencode

from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Scope

from archiver.console import accounts, cookies, logins, rendering
from archiver.console.addresses import HOME, local_address
from archiver.console.attempts import Attempts
from archiver.console.failures import PageError, Route, safely
from archiver.console.logins import Login
from archiver.console.permissions import GRANTED, Permission
from archiver.console.refreshing import seconds_of
from archiver.console.view_log import ViewLog
from archiver.console.visitors import visitor_of
from archiver.database import run_async

LOGIN = "/console/login"
MAX_FORM = 16_384  # bytes
MAX_NAME = 64  # characters
FORM_SECONDS = 30
WRONG = "The name or the password is wrong, or the user is disabled."

Handler = Callable[[Request, Login], Awaitable[Response]]


class Gate:
    """The access control.

    `engine`: of the database that has users and logins; `authenticated`: see `routes`; `provider`: the host of the
    identity provider, empty if there is none.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        views: ViewLog,
        threads: Executor,
        authenticated: Callable[[Scope], None],
        provider: str = "",
    ) -> None:
        self._engine, self._views, self._threads = engine, views, threads
        self._authenticated, self._provider = authenticated, provider
        self._attempts = Attempts()

    def page(self, permission: Permission, handler: Handler) -> Route:
        """Return a route for the roles that have this permission; without a login it leads to the login page."""

        async def respond(request: Request) -> Response:
            token = request.cookies.get(cookies.LOGIN, "")
            is_token = logins.is_token(token)  # otherwise no query is needed
            is_active = not seconds_of(request)  # a page that loads itself again keeps no login alive
            select = partial(logins.select_login, token=token, is_active=is_active)
            login = await run_async(self._engine, select) if is_token else None
            if login is None:
                return _to_login(request)
            self._authenticated(request.scope)
            if permission not in GRANTED[login.role]:
                raise PageError(
                    403,
                    "Your role does not show this page",
                    f"You are logged in as {login.user}, with the role {login.role}. An administrator can add a user"
                    " with another role: archiver users add.",
                )
            if request.method == "POST":
                _require_form_of(await read_form(request), token)
            return await handler(request, login)

        return safely(respond)

    async def log_in(self, request: Request) -> Response:
        """Show the login page; for a submitted form, check name and password and begin a login."""
        if request.method != "POST":
            return await self._login_page(request, "")
        form = await read_form(request)
        # The form must come from this browser, so that another site cannot log its visitor in as another user.
        _require_form_of(form, request.cookies.get(cookies.FORM, ""))
        name, password = form.get("name", "")[:MAX_NAME].strip().lower().replace("\0", ""), form.get("password", "")
        visitor = visitor_of(request)
        async with self._attempts.turn(visitor, name):
            known = await run_async(self._engine, lambda each: accounts.select_password_hash(each, name))
            checking = partial(accounts.is_password, password, known)
            if not await asyncio.get_running_loop().run_in_executor(self._threads, checking):
                await self._attempts.failed(visitor, name)
                return await self._login_page(request, WRONG, form.get("next", ""))
        self._attempts.succeeded(visitor, name)
        earlier = request.cookies.get(cookies.LOGIN, "")
        token = await run_async(self._engine, lambda each: logins.insert_login(each, name, known or "", earlier))
        if token is None:  # the password was changed in the meantime
            return await self._login_page(request, WRONG, form.get("next", ""))
        await self._views.record("console.login", name)
        response = RedirectResponse(local_address(form.get("next", "")), 303, rendering.HEADERS)
        cookies.set_cookie(response, request, cookies.LOGIN, token)
        response.delete_cookie(cookies.FORM, path="/console")
        return response

    async def _login_page(self, request: Request, fault: str, following: str | None = None) -> Response:
        token = request.cookies.get(cookies.FORM) or secrets.token_urlsafe(32)
        following = request.query_params.get("next", "") if following is None else following
        values = {
            "fault": fault,
            "next": local_address(following),
            "token": logins.form_token(token),
            "provider": self._provider,
            "login": None,
        }
        response = await asyncio.to_thread(rendering.html, "login.html", values, 401 if fault else 200)
        cookies.set_cookie(response, request, cookies.FORM, token)
        return response

    async def log_out(self, request: Request, _: Login) -> Response:
        """End the login of this browser."""
        token = request.cookies[cookies.LOGIN]
        await run_async(self._engine, lambda each: logins.delete_login(each, token))
        response = RedirectResponse(LOGIN, 303, rendering.HEADERS)
        response.delete_cookie(cookies.LOGIN, path="/console")
        return response


async def read_form(request: Request) -> Mapping[str, str]:
    """Return the fields of a form, once read. Raises `PageError`."""
    if hasattr(request.state, "form"):
        return request.state.form  # type: ignore[no-any-return]  # set below
    body = bytearray()
    try:
        async with asyncio.timeout(FORM_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_FORM:
                    raise PageError(413, "The form is too large", f"A form has at most {MAX_FORM:,} bytes.")
    except TimeoutError:
        raise PageError(408, "The form did not arrive in time", "Send it again.") from None
    try:
        request.state.form = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=50))
    except ValueError:
        raise PageError(400, "The form cannot be read", "Reload the page, and send it again.") from None
    return request.state.form  # type: ignore[no-any-return]  # set above


def _require_form_of(form: Mapping[str, str], token: str) -> None:
    if not token or not logins.is_form_token(form.get("token", ""), token):
        raise PageError(
            403,
            "This form has expired",
            "It was made for another login. Go back, reload the page, and send it again.",
        )


def _to_login(request: Request) -> Response:
    path: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    if request.method not in {"GET", "HEAD"} or path.endswith((b".json", b".csv")):
        raise PageError(401, "Log in first", f"Your login has ended. Log in at {LOGIN}, then try again.")
    query: bytes = request.scope["query_string"]
    wanted = (path.partition(b"?")[0] + (b"?" + query if query else b"")).decode("latin-1")
    following = "" if wanted == HOME else f"?{urlencode({'next': wanted})}"
    return RedirectResponse(LOGIN + following, 303, rendering.HEADERS)
