"""The routes of the console."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import msgspec
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import Scope

from archiver.archive import Timing
from archiver.console import lists, openid, rendering
from archiver.console.actions import Erasures, Followups, Holds, Retries, Runner
from archiver.console.addresses import HOME
from archiver.console.checks import Checks
from archiver.console.conversations import listing_of
from archiver.console.failures import missing, safely
from archiver.console.gate import Gate, Handler
from archiver.console.page_renderer import PageRenderer
from archiver.console.pages import Pages
from archiver.console.permissions import Permission
from archiver.console.view_log import ViewLog
from archiver.settings import Settings

# Of the pages alone: the spool and the readiness probe use those of the event loop.
THREADS = 4


class Engines(msgspec.Struct, frozen=True):
    """The engines of the console.

    `recording`: for users, logins and the audit log; `acting`: for actions, with one connection, of the same
    database; `reading`: for everything else.
    """

    recording: AsyncEngine
    acting: Engine
    reading: Engine


_STATIC = {"style.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}
_FILES = {name: (rendering.FOLDER / "static" / name).read_bytes() for name in _STATIC}


def routes(configuration: Settings, engines: Engines, authenticated: Callable[[Scope], None]) -> list[BaseRoute]:
    """Return the routes of the console.

    `configuration`: the settings, which a page shows without secrets. `authenticated` is called with the scope of
    each request that has a login.
    """
    views = ViewLog(engines.recording)
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="console")
    runner = Runner(engines.acting, is_on=configuration.console_acts == "on")
    renderer = PageRenderer(engines.reading, threads, has_actions=runner.is_on)
    provider = urlsplit(configuration.oidc_issuer).hostname or ""
    gate, pages = Gate(engines.recording, views, threads, authenticated, provider), Pages(renderer, views)
    result: list[BaseRoute] = [
        Route("/", gate.page("figures", pages.overview)),
        Route("/login", safely(gate.log_in), methods=["GET", "POST"]),
        *(_sign_in(configuration, engines, views) if provider else ()),
        Route("/logout", gate.page("figures", gate.log_out), methods=["POST"]),
        Route("/static/{name}", safely(_static)),
        Route("/events/{event_id}", gate.page("evidence", pages.event)),
        Route("/events/{event_id}/body", gate.page("evidence", pages.body)),
        Route("/proofs/{event_id}.json", gate.page("evidence", pages.proof_json)),
        Route("/proofs/{event_id}", gate.page("evidence", pages.proof)),
        Route("/quarantine/{quarantine_id}", gate.page("bodies", pages.quarantined)),
        Route("/quarantine/{quarantine_id}/body", gate.page("bodies", pages.quarantined_body)),
        Route("/followups/{subscription_id}", gate.page("operation", pages.subscription)),
        Route("/deliveries/{message_id}", gate.page("operation", pages.delivery)),
        Route("/holds/{hold_id}", gate.page("evidence", pages.hold)),
        Route("/doctor", gate.page("operation", Checks(configuration, runner, renderer).show)),
        *([Route("/style", gate.page("figures", pages.style))] if configuration.log_level == "debug" else []),
        Route("/conversation", gate.page("content", pages.conversation)),
    ]
    result += _actions(gate, runner, renderer, configuration)
    conversations = listing_of(configuration.promoted_variables)
    for listing in (conversations, *lists.OTHERS, lists.settings_of(configuration)):
        for form in ("html", "json", "csv"):
            path = f"/{listing.path}" + ("" if form == "html" else f".{form}")
            result.append(Route(path, gate.page(listing.permission, pages.list_of(listing, form))))
    result += [
        Route("/conversations/{session_id:path}", gate.page("content", pages.conversation)),
        Route("/{path:path}", safely(_no_page)),
    ]
    return [Route("/console", _to_first_page), Mount("/console", routes=result)]


def _sign_in(configuration: Settings, engines: Engines, views: ViewLog) -> list[BaseRoute]:
    openid.require(configuration)
    from archiver.console.openid.sign_in import SignIn  # noqa: PLC0415  # needs an extra

    sign_in = SignIn(configuration, engines.recording, views)
    return [Route("/oidc", safely(sign_in.begin)), Route("/oidc/callback", safely(sign_in.complete))]


def _actions(gate: Gate, runner: Runner, renderer: PageRenderer, configuration: Settings) -> list[BaseRoute]:
    timing = Timing.of(configuration)
    holds, erasures, retries = Holds(runner, renderer), Erasures(runner, renderer, timing), Retries(runner, timing)
    followups = Followups(runner, allow_private=configuration.followups_allow_private)

    def action(path: str, permission: Permission, handler: Handler, *methods: str) -> Route:
        return Route(path, gate.page(permission, runner.when_on(handler)), methods=methods or ["POST"])

    return [
        action("/hold", "preservation", holds.place, "GET", "POST"),
        action("/holds/{hold_id}/release", "preservation", holds.release),
        action("/erase", "preservation", erasures.order, "GET", "POST"),
        action("/quarantine/{quarantine_id}/retry", "operation", retries.retry),
        action("/followups/{subscription_id}/pause", "operation", followups.pause),
        action("/followups/{subscription_id}/resume", "operation", followups.resume),
        action("/followups/{subscription_id}/test", "operation", followups.test),
        action("/followups/{subscription_id}/retry", "operation", followups.retry_dead),
        action("/deliveries/{message_id}/retry", "operation", followups.retry),
    ]


async def _to_first_page(_: Request) -> Response:
    return RedirectResponse(HOME, 303, rendering.HEADERS)


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _FILES:
        raise missing()
    headers = {**rendering.HEADERS, "cache-control": "public, max-age=31536000, immutable"}
    return Response(_FILES[name], headers=headers, media_type=_STATIC[name])


async def _no_page(_: Request) -> Response:
    raise missing()
