"""The routes of the console."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import Scope

from archiver.console import lists, rendering
from archiver.console.failures import missing, safely
from archiver.console.gate import HOME, Gate
from archiver.console.pages import Pages
from archiver.console.view_log import ViewLog
from archiver.settings import Settings

# Of the pages alone: the spool and the readiness probe use those of the event loop.
THREADS = 4

_STATIC = {"style.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}
_FILES = {name: (rendering.FOLDER / "static" / name).read_bytes() for name in _STATIC}


def routes(
    configuration: Settings, writing: AsyncEngine, reading: Engine, authenticated: Callable[[Scope], None]
) -> list[BaseRoute]:
    """Return the routes of the console.

    `configuration`: the settings, which a page shows without secrets; `writing`: engine for users, logins and the
    audit log; `reading`: for all else. `authenticated` is called with the scope of each request that has a login.
    """
    views = ViewLog(writing)
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="console")
    gate, pages = Gate(writing, views, threads, authenticated), Pages(reading, views, threads)
    result = [
        Route("/", gate.page("figures", pages.overview)),
        Route("/login", safely(gate.log_in), methods=["GET", "POST"]),
        Route("/logout", gate.page("figures", gate.log_out), methods=["POST"]),
        Route("/static/{name}", safely(_static)),
        Route("/events/{event_id}", gate.page("evidence", pages.event)),
        Route("/events/{event_id}/body", gate.page("evidence", pages.body)),
        Route("/proofs/{event_id}.json", gate.page("evidence", pages.proof_json)),
        Route("/proofs/{event_id}", gate.page("evidence", pages.proof)),
        Route("/conversation", gate.page("content", pages.conversation)),
    ]
    for listing in (*lists.LISTINGS, lists.settings_of(configuration)):
        for form in ("html", "json", "csv"):
            path = f"/{listing.path}" + ("" if form == "html" else f".{form}")
            result.append(Route(path, gate.page(listing.permission, pages.list_of(listing, form))))
    result += [
        Route("/conversations/{session_id:path}", gate.page("content", pages.conversation)),
        Route("/{path:path}", safely(_no_page)),
    ]
    return [Route("/console", _to_first_page), Mount("/console", routes=result)]


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
