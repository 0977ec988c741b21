"""The pages: each reads what it shows, records who sees content, and renders."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response

from archiver.compliance import erasure, seals
from archiver.console import conversations, quarantined, rendering, subscriptions
from archiver.console.addresses import address_of, number_of, position_of
from archiver.console.failures import PageError, missing
from archiver.console.filters import Filter, FilterError
from archiver.console.gate import Handler
from archiver.console.listing import MAX_ROWS, ROWS, Column, Listing, Page, Query, encode_csv, encode_json
from archiver.console.logins import Login
from archiver.console.overview import Figures, select_overview
from archiver.console.page_renderer import PageRenderer
from archiver.console.permissions import GRANTED
from archiver.console.shown_bytes import shown_bytes
from archiver.console.view_log import Kind, ViewLog
from archiver.errors import sentence
from archiver.outbound.followups import review
from archiver.outbound.followups.deliveries import parse_message_id

_MIME = {"json": "application/json", "csv": "text/csv; charset=utf-8"}


class Pages:
    """The pages that only read."""

    def __init__(self, renderer: PageRenderer, views: ViewLog) -> None:
        self._renderer, self._views = renderer, views

    async def overview(self, request: Request, login: Login) -> Response:
        """Show the state of the archive on one page."""
        by_hour = request.query_params.get("by") == "hour"
        overview = await self._renderer.read(partial(select_overview, by_hour=by_hour))
        return await self._renderer.render(
            request, "overview.html", login, can_refresh=True, overview=overview, by_hour=by_hour
        )

    async def style(self, request: Request, login: Login) -> Response:
        """Show the parts of which pages consist."""
        figures = [Figures(f"2024-01-{number:02}", 0, number * number % 17, None, 0) for number in range(1, 31)]
        return await self._renderer.render(request, "style.html", login, figures=figures)

    def list_of(self, listing: Listing, form: str) -> Handler:
        """Return the handler of a list as `html`, `json` or `csv`."""

        async def respond(request: Request, login: Login) -> Response:
            parameters = {name: request.query_params.get(name, "") for name in listing.parameters}
            chosen = request.query_params.getlist("column")
            columns = _columns(listing, login, chosen)
            query = Query(
                parameters,
                "content" in GRANTED[login.role],
                request.query_params.get("after", ""),
                ROWS if form == "html" else MAX_ROWS,
                suggests=form == "html",
            )
            fault, page = "", Page([])
            try:
                page = await self._renderer.read(listing.select, query)
            except FilterError as error:
                if form != "html":
                    raise
                fault = str(error)
            if not fault:
                await self._record_list(listing, parameters, columns, form, login)
            if form != "html":
                encode = encode_json if form == "json" else encode_csv
                body = await self._renderer.in_thread(partial(encode, columns, page))
                headers = {
                    **rendering.HEADERS,
                    "content-disposition": f'attachment; filename="{listing.path}.{form}"',
                }
                return Response(body, headers=headers, media_type=_MIME[form])
            given: dict[str, str | list[str]] = {name: value for name, value in parameters.items() if value}
            if chosen:
                given["column"] = [column.name for column in columns]
            return await self._renderer.render(
                request,
                "list.html",
                login,
                400 if fault else 200,
                can_refresh=not any(column.is_content for column in columns),
                listing=listing,
                columns=[column for column in columns if not column.is_sparse or _has_values(page, column)],
                choices=_allowed(listing, login),
                is_chosen=bool(chosen),
                chosen_columns=columns,
                page=page,
                fault=fault,
                parameters=parameters,
                following=address_of(listing.path, given | {"after": page.after}) if page.after else "",
                first=address_of(listing.path, given) if query.after else "",
                twins={each: address_of(f"{listing.path}.{each}", given) for each in ("json", "csv")},
            )

        return respond

    async def _record_list(
        self, listing: Listing, parameters: Mapping[str, str], columns: list[Column], form: str, login: Login
    ) -> None:
        found = Filter() if listing.parse is None else listing.parse(parameters["q"])
        if not found.shows_content and not any(column.is_content for column in columns):
            return
        viewed: Kind = "console.view" if listing.parse is None else "console.search"
        kind = viewed if form == "html" else "console.download"
        await self._views.record(kind, login.user, list=listing.path, fields=sorted(set(found.fields)))

    async def conversation(self, request: Request, login: Login) -> Response:
        """Show a conversation: its transcript, and the events of the ledger."""
        session_id = request.path_params.get("session_id") or request.query_params.get("id", "")
        after = position_of(request.query_params.get("after", ""))
        found = await self._renderer.read(conversations.select_conversation, session_id, after)
        if found is None:
            raise missing()
        await self._views.record("console.view", login.user, session_id=session_id)
        return await self._renderer.render(request, "conversation.html", login, found=found, after=after)

    async def quarantined(self, request: Request, login: Login) -> Response:
        """Show a quarantined delivery: its bytes, why it is in quarantine, and what to do."""
        found = await self._renderer.read(quarantined.select_item, number_of(request, "quarantine_id"))
        if found is None:
            raise missing()
        await self._views.record("console.view", login.user, quarantine=found.row["id"])
        return await self._renderer.render(request, "quarantined.html", login, found=found)

    async def quarantined_body(self, request: Request, login: Login) -> Response:
        """Send the exact bytes of a quarantined delivery as a file."""
        quarantine_id = number_of(request, "quarantine_id")
        body = await self._renderer.read(quarantined.select_body, quarantine_id)
        if body is None:
            raise missing()
        await self._views.record("console.download", login.user, quarantine=quarantine_id)
        return _file(body, f"quarantined-{quarantine_id}")

    async def subscription(self, request: Request, login: Login) -> Response:
        """Show a subscription: its receiver, its health, and its newest deliveries."""
        state = review.only(**{name: request.query_params.get("state") == name for name in ("dead", "pending")})
        subscription_id = number_of(request, "subscription_id")
        found = await self._renderer.read(subscriptions.select_subscription, subscription_id, state)
        if found is None:
            raise missing()
        return await self._renderer.render(request, "subscription.html", login, found=found, state=state)

    async def delivery(self, request: Request, login: Login) -> Response:
        """Show a delivery of a follow-up: its request, and its attempts with what the receiver answered."""
        parsed = parse_message_id(request.path_params["message_id"])
        found = None if parsed is None else await self._renderer.read(subscriptions.select_delivery, *parsed)
        if found is None:
            raise missing()
        await self._views.record("console.view", login.user, delivery=found.row["message_id"])
        return await self._renderer.render(request, "delivery.html", login, found=found)

    async def hold(self, request: Request, login: Login) -> Response:
        """Show a legal hold."""
        found = await self._renderer.read(_select_hold, number_of(request, "hold_id"))
        if found is None:
            raise missing()
        await self._views.record("console.view", login.user, hold=found["id"])
        return await self._renderer.render(request, "hold.html", login, hold=found)

    async def event(self, request: Request, login: Login) -> Response:
        """Show an event of the ledger with its exact bytes."""
        found = await self._event(request)
        await self._views.record("console.view", login.user, event=found.row["id"])
        body = found.body or b""
        return await self._renderer.render(
            request, "event.html", login, found=found, body=shown_bytes(body, len(body))
        )

    async def body(self, request: Request, login: Login) -> Response:
        """Send the exact bytes of an event as a file."""
        found = await self._event(request)
        if found.body is None:
            reason = "It was erased." if found.is_erased else "A part of it is missing: run `archiver verify`."
            raise PageError(404, "This event has no content", reason)
        await self._views.record("console.download", login.user, event=found.row["id"])
        return _file(found.body, f"event-{found.row['id']}")

    async def _event(self, request: Request) -> conversations.LedgerEvent:
        found = await self._renderer.read(conversations.select_event, number_of(request, "event_id"))
        if found is None:
            raise missing()
        return found

    async def proof(self, request: Request, login: Login) -> Response:
        """Show the proof that an event is in its seal, and how to check it."""
        found = await self._proof(request)
        return await self._renderer.render(request, "proof.html", login, proof=found, script=_SCRIPT)

    async def proof_json(self, request: Request, _: Login) -> Response:
        """Send the proof as JSON, for the script that checks it."""
        found = await self._proof(request)
        headers = {**rendering.HEADERS, "content-disposition": f'attachment; filename="proof-{found.event}.json"'}
        return Response(msgspec.json.encode(found), headers=headers, media_type="application/json")

    async def _proof(self, request: Request) -> seals.Proof:
        try:
            return await self._renderer.read(seals.prove, number_of(request, "event_id"))
        except seals.NotSealedError as error:
            raise PageError(404, "There is no proof yet", sentence(error)) from None


_SCRIPT = (rendering.FOLDER / "templates" / "check_proof.txt").read_text(encoding="utf-8")


def _allowed(listing: Listing, login: Login) -> list[Column]:
    may_read = "content" in GRANTED[login.role]
    return [column for column in listing.columns if may_read or not column.is_content]


def _columns(listing: Listing, login: Login, chosen: Sequence[str]) -> list[Column]:
    """Return the chosen columns; if none is, those that are not optional. The first is always among them."""
    first, *others = _allowed(listing, login)
    return [first, *(each for each in others if (each.name in chosen if chosen else not each.is_optional))]


def _has_values(page: Page, column: Column) -> bool:
    return any(row[column.name] is not None for row in page.rows)


def _file(body: bytes, name: str) -> Response:
    headers = {**rendering.HEADERS, "content-disposition": f'attachment; filename="{name}"'}
    return Response(body, headers=headers, media_type="application/octet-stream")


def _select_hold(connection: Connection, hold_id: int) -> Mapping[str, Any] | None:
    found = erasure.select_holds(connection, released=True)
    return next((hold for hold in found if hold["id"] == hold_id), None)
