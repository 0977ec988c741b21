"""The pages: each reads what it shows, records who sees content, and renders."""

import asyncio
import codecs
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlencode

import msgspec
from sqlalchemy import Engine
from starlette.requests import Request
from starlette.responses import Response

from archiver.compliance import seals
from archiver.console import conversations, rendering
from archiver.console.failures import PageError, missing
from archiver.console.filters import QUALIFIERS, FilterError, parse
from archiver.console.gate import Handler
from archiver.console.listing import MAX_ROWS, ROWS, Column, Listing, Page, Query, encode_csv, encode_json
from archiver.console.logins import Login
from archiver.console.overview import select_overview
from archiver.console.permissions import GRANTED
from archiver.console.view_log import Kind, ViewLog
from archiver.database import snapshot

T = TypeVar("T")

READ_SECONDS = 10.0  # for each statement of a page
MAX_BODY_SHOWN = 200_000  # bytes of an event on its page; the download has all

_MIME = {"json": "application/json", "csv": "text/csv; charset=utf-8"}


class Pages:
    """The pages. They read with `engine` and render in `threads`, which only they use."""

    def __init__(self, engine: Engine, views: ViewLog, threads: Executor) -> None:
        self._engine, self._views, self._threads = engine, views, threads

    async def overview(self, _: Request, login: Login) -> Response:
        """Show the state of the archive on one page."""
        return await self._render("overview.html", login, overview=await self._read(select_overview))

    def list_of(self, listing: Listing, form: str) -> Handler:
        """Return the handler of a list as `html`, `json` or `csv`."""

        async def respond(request: Request, login: Login) -> Response:
            parameters = {name: request.query_params.get(name, "") for name in listing.parameters}
            columns = _columns(listing, login)
            query = Query(
                parameters,
                "content" in GRANTED[login.role],
                request.query_params.get("after", ""),
                ROWS if form == "html" else MAX_ROWS,
            )
            fault, page = "", Page([])
            try:
                page = await self._read(listing.select, query)
            except FilterError as error:
                if form != "html":
                    raise
                fault = str(error)
            if not fault:
                await self._record_list(listing, parameters, columns, form, login)
            if form != "html":
                encode = encode_json if form == "json" else encode_csv
                body = await self._in_thread(partial(encode, columns, page))
                headers = {
                    **rendering.HEADERS,
                    "content-disposition": f'attachment; filename="{listing.path}.{form}"',
                }
                return Response(body, headers=headers, media_type=_MIME[form])
            given = {name: value for name, value in parameters.items() if value}
            return await self._render(
                "list.html",
                login,
                400 if fault else 200,
                listing=listing,
                columns=columns,
                page=page,
                fault=fault,
                parameters=parameters,
                qualifiers=QUALIFIERS if "q" in listing.parameters else {},
                following=_address(listing.path, given | {"after": page.after}) if page.after else "",
                first=_address(listing.path, given) if query.after else "",
                twins={each: _address(f"{listing.path}.{each}", given) for each in ("json", "csv")},
            )

        return respond

    async def _record_list(
        self, listing: Listing, parameters: Mapping[str, str], columns: list[Column], form: str, login: Login
    ) -> None:
        if not any(column.is_content for column in columns):
            return
        fields = sorted(set(parse(parameters["q"]).fields)) if "q" in parameters else []
        viewed: Kind = "console.search" if "q" in parameters else "console.view"
        kind = viewed if form == "html" else "console.download"
        await self._views.record(kind, login.user, list=listing.path, fields=fields)

    async def conversation(self, request: Request, login: Login) -> Response:
        """Show a conversation: its transcript, and the events of the ledger."""
        session_id = request.path_params.get("session_id") or request.query_params.get("id", "")
        after = _position(request.query_params.get("after", ""))
        found = await self._read(conversations.select_conversation, session_id, after)
        if found is None:
            raise missing()
        await self._views.record("console.view", login.user, session_id=session_id)
        return await self._render("conversation.html", login, found=found, after=after)

    async def event(self, request: Request, login: Login) -> Response:
        """Show an event of the ledger with its exact bytes."""
        found = await self._event(request)
        await self._views.record("console.view", login.user, event=found.row["id"])
        body = found.body or b""
        shown = body[:MAX_BODY_SHOWN]
        try:
            # The cut may be within a character.
            text = codecs.getincrementaldecoder("utf-8")().decode(shown, final=len(body) == len(shown))
            is_text = True
        except UnicodeDecodeError:
            text, is_text = shown.hex(" "), False
        return await self._render(
            "event.html", login, found=found, text=text, is_text=is_text, is_cut=len(body) > len(shown)
        )

    async def body(self, request: Request, login: Login) -> Response:
        """Send the exact bytes of an event as a file."""
        found = await self._event(request)
        if found.body is None:
            reason = "It was erased." if found.is_erased else "A part of it is missing: run `archiver verify`."
            raise PageError(404, "This event has no content", reason)
        await self._views.record("console.download", login.user, event=found.row["id"])
        headers = {**rendering.HEADERS, "content-disposition": f'attachment; filename="event-{found.row["id"]}"'}
        return Response(found.body, headers=headers, media_type="application/octet-stream")

    async def _event(self, request: Request) -> conversations.LedgerEvent:
        found = await self._read(conversations.select_event, _event_id(request))
        if found is None:
            raise missing()
        return found

    async def proof(self, request: Request, login: Login) -> Response:
        """Show the proof that an event is in its seal, and how to check it."""
        found = await self._proof(request)
        return await self._render("proof.html", login, proof=found, script=_SCRIPT)

    async def proof_json(self, request: Request, _: Login) -> Response:
        """Send the proof as JSON, for the script that checks it."""
        found = await self._proof(request)
        headers = {**rendering.HEADERS, "content-disposition": f'attachment; filename="proof-{found.event}.json"'}
        return Response(msgspec.json.encode(found), headers=headers, media_type="application/json")

    async def _proof(self, request: Request) -> seals.Proof:
        try:
            return await self._read(seals.prove, _event_id(request))
        except seals.NotSealedError as error:
            raise PageError(404, "There is no proof yet", f"{str(error)[:1].upper()}{str(error)[1:]}.") from None

    async def _read(self, select: Callable[..., T], *arguments: Any) -> T:
        def read() -> T:
            # A replica's clock must not become that of the receiver.
            with snapshot(self._engine, statement_seconds=READ_SECONDS, keeps_time=False) as connection:
                return select(connection, *arguments)

        return await self._in_thread(read)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _render(self, template: str, login: Login, status: int = 200, **values: Any) -> Response:
        values |= {"login": login, "granted": GRANTED[login.role]}
        return await self._in_thread(partial(rendering.html, template, values, status))


_SCRIPT = (rendering.FOLDER / "templates" / "check_proof.txt").read_text(encoding="utf-8")


def _columns(listing: Listing, login: Login) -> list[Column]:
    may_read = "content" in GRANTED[login.role]
    return [column for column in listing.columns if may_read or not column.is_content]


def _address(path: str, parameters: Mapping[str, str]) -> str:
    return f"/console/{path}" + (f"?{urlencode(parameters)}" if parameters else "")


def _event_id(request: Request) -> int:
    """Return the id in the path. Not with a convertor of the route, which would raise outside of `safely`."""
    text = request.path_params["event_id"]
    if not text.isascii() or not text.isdecimal() or len(text) > _MAX_ID_DIGITS:
        raise missing()
    return int(text)


_MAX_ID_DIGITS = 18
_MAX_DIGITS = 9


def _position(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS else 0
