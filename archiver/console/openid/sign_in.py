"""The two pages of a login with a provider: one leads to the provider, to the other the provider leads back."""

import asyncio
import re
from functools import partial

import structlog
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from archiver.console import accounts, cookies, logins, rendering
from archiver.console.accounts import Identity
from archiver.console.attempts import Attempts
from archiver.console.failures import PageError, reported
from archiver.console.openid import attempt
from archiver.console.openid.attempt import Attempt
from archiver.console.openid.provider import Person, Provider, ProviderError, RefusedError
from archiver.console.view_log import ViewLog
from archiver.console.visitors import visitor_of
from archiver.database import run_async
from archiver.settings import Settings
from archiver.settings.console_roles import Role, role_of

log = structlog.get_logger(__name__)

PATH = "/console/oidc"
ATTEMPT_SECONDS = 600  # in which a person logs in at the provider
CONCURRENT = 4  # exchanges of codes
MAX_CODE = 4_096  # characters
_HOST = re.compile(r"[\w.-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?", re.ASCII)
_ERROR = re.compile(r"[a-z_]{1,60}", re.ASCII)
_AGAIN = "Log in again at /console/login."


class SignIn:
    """Logs people in with a provider. `engine`: of the database that has users and logins."""

    def __init__(self, configuration: Settings, engine: AsyncEngine, views: ViewLog) -> None:
        self._provider, self._roles = Provider(configuration), configuration.roles_of_groups
        self._engine, self._views = engine, views
        self._attempts = Attempts(CONCURRENT)

    async def begin(self, request: Request) -> Response:
        """Lead to the provider."""
        begun = attempt.begin(request.query_params.get("next", ""))
        try:
            async with self._attempts.turn(visitor_of(request), ""):
                address = await self._provider.authorization_address(begun, _redirect_uri(request))
        except ProviderError as error:
            raise self._unavailable(error) from None
        response = RedirectResponse(address, 303, rendering.HEADERS)
        # The provider leads back from its own site, so the cookie must come with such a request.
        cookies.set_cookie(
            response, request, cookies.ATTEMPT, begun.encode(), path=PATH, samesite="lax", max_age=ATTEMPT_SECONDS
        )
        return response

    async def complete(self, request: Request) -> Response:
        """Log in the person for whom the provider gives a code."""
        begun = attempt.parse(request.cookies.get(cookies.ATTEMPT, ""))
        if begun is None or not begun.is_answered_by(_single(request, "state")):
            raise PageError(400, "This login has expired", f"It was begun in another browser, or long ago. {_AGAIN}")
        if refusal := _single(request, "error"):
            named = f" ({refusal})" if _ERROR.fullmatch(refusal) else ""
            raise PageError(403, "The identity provider refused the login", f"It gave a reason{named}. {_AGAIN}")
        visitor = visitor_of(request)
        async with self._attempts.turn(visitor, ""):
            try:
                person = await self._person(request, begun)
            except ProviderError as error:
                raise self._unavailable(error) from None
            except RefusedError as error:
                await self._attempts.failed(visitor, "")
                raise reported(
                    403,
                    "The login could not be verified",
                    f"The answer of the identity provider does not prove who you are. {_AGAIN}",
                    "login with the identity provider refused",
                    reason=str(error),
                ) from None
        return await self._log_in(request, begun, person)

    async def _person(self, request: Request, begun: Attempt) -> Person:
        code = _single(request, "code")
        if not code or len(code) > MAX_CODE:
            raise RefusedError("the answer has no code")
        issuer = _single(request, "iss") if "iss" in request.query_params else None
        return await self._provider.person(begun, _redirect_uri(request), code, issuer)

    async def _log_in(self, request: Request, begun: Attempt, person: Person) -> Response:
        identity, role = person.identity, role_of(person.groups, self._roles)
        if role is None:
            await run_async(self._engine, partial(_end_logins, identity))
            raise reported(
                403,
                "You may not use this console",
                "The identity provider has confirmed who you are, but none of your groups has a role here. An"
                " administrator gives roles to groups with ARCHIVER_OIDC_ROLES.",
                "login with the identity provider refused",
                reason="no group with a role",
                subject=identity.subject,
            )
        earlier = request.cookies.get(cookies.LOGIN, "")
        begun_login = await run_async(self._engine, partial(_insert_login, identity, role, earlier))
        if begun_login is None:
            raise PageError(
                403, "Your user is disabled", "An administrator can enable it: archiver users disable --undo."
            )
        name, token = begun_login
        await self._views.record("console.login", name, issuer=identity.issuer, subject=identity.subject, role=role)
        # A page, not a redirect: browsers send no strict cookie with a redirect that another site began.
        response = await asyncio.to_thread(rendering.html, "signed_in.html", {"next": begun.following, "login": None})
        cookies.set_cookie(response, request, cookies.LOGIN, token)
        response.delete_cookie(cookies.ATTEMPT, path=PATH)
        return response

    def _unavailable(self, error: ProviderError) -> PageError:
        return reported(
            503,
            "The identity provider cannot be used now",
            "Try again, or log in with a password.",
            "identity provider unavailable",
            issuer=self._provider.issuer,
            reason=str(error),
        )


def _insert_login(identity: Identity, role: Role, earlier: str, connection: Connection) -> tuple[str, str] | None:
    """Begin a login of this identity; return the name of the user and the token, None if the user is disabled."""
    name = accounts.upsert_user(connection, identity, role)
    if name is None:
        return None
    token = logins.insert_login(connection, name, None, earlier)
    return None if token is None else (name, token)


def _end_logins(identity: Identity, connection: Connection) -> None:
    accounts.end_logins(connection, identity)


def _single(request: Request, name: str) -> str:
    """Return a parameter of the address; empty if it is absent, or there more than once (RFC 6749, 3.1)."""
    values = request.query_params.getlist(name)
    return values[0] if len(values) == 1 else ""


def _redirect_uri(request: Request) -> str:
    """Return the address to which the provider leads back. It accepts only the one that is registered there."""
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        raise PageError(400, "The address cannot be understood", "The request names no valid host.")
    return f"{'https' if cookies.is_over_tls(request) else 'http'}://{host}{PATH}/callback"
