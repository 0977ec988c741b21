"""Order erasures: show what would be erased, and order it once it is confirmed."""

import re
from functools import partial

from sqlalchemy import Engine
from starlette.requests import Request
from starlette.responses import Response

from archiver.archive import Timing
from archiver.compliance.erasure import HeldError, requests
from archiver.compliance.erasure.requests import OrderedRequest, Selection
from archiver.console import outcomes
from archiver.console.actions.fields import actor_of, id_of, reason_of
from archiver.console.actions.running import Runner
from archiver.console.failures import PageError
from archiver.console.gate import read_form
from archiver.console.logins import Login
from archiver.console.page_renderer import PageRenderer
from archiver.console.rendering import conversation_path

WORD = "erase"  # confirms the erasure of an id that is hard to type
_TYPED = re.compile(r"[\w.:@-]{1,64}", re.ASCII)


class Erasures:
    """The page that orders the erasure of a conversation or of a turn."""

    def __init__(self, runner: Runner, renderer: PageRenderer, timing: Timing) -> None:
        self._runner, self._renderer, self._timing = runner, renderer, timing

    async def order(self, request: Request, login: Login) -> Response:
        """Show what an erasure would erase, with a form that orders it; for a submitted form, order it."""
        if request.method == "POST":
            return await self._order(request, login)
        session_id, chat_id = (id_of(request.query_params, name) for name in ("session_id", "chat_id"))
        if session_id is not None and chat_id is not None:
            raise PageError(
                400, "The address cannot be used", "It names a conversation and a turn: name one of them."
            )
        found = None
        if session_id is not None or chat_id is not None:
            selection = _selection(session_id, chat_id)
            preview = partial(requests.preview, selection=selection, actor=actor_of(login), reason=None)
            found = await self._runner.run(preview, _command(session_id, chat_id))
        return await self._renderer.render(
            request,
            "erase.html",
            login,
            session_id=session_id or "",
            chat_id=chat_id or "",
            found=found,
            word=confirmation(session_id or chat_id or ""),
        )

    async def _order(self, request: Request, login: Login) -> Response:
        form = await read_form(request)
        session_id, chat_id = (id_of(form, name) for name in ("session_id", "chat_id"))
        word = confirmation(session_id or chat_id or "")
        if (session_id is None) == (chat_id is None):
            raise PageError(400, "The form cannot be used", "Name either a conversation or a turn.")
        if form.get("confirmation", "").strip() != word:
            raise PageError(400, "Nothing was erased", f"To confirm the erasure, go back and type: {word}")
        selection, actor, reason = _selection(session_id, chat_id), actor_of(login), reason_of(form)

        def order(engine: Engine) -> OrderedRequest:
            try:
                return requests.order(engine, requests.preview(engine, selection, actor, reason))
            except HeldError as error:
                raise _held(error) from None

        command = _command(session_id, chat_id)
        ordered = await self._runner.run(order, command)

        def purge(engine: Engine) -> None:
            requests.purge(engine, ordered, self._timing, lambda _: None)

        is_erased = await self._runner.finishes(purge, command)
        path = "erasures" if session_id is None else conversation_path(session_id)
        return outcomes.leads_to(path, "erased" if is_erased else "erasure-ordered", login)


def confirmation(target_id: str) -> str:
    """Return what a user types to confirm the erasure: the id, or a word if the id is hard to type."""
    return target_id if _TYPED.fullmatch(target_id) else WORD


def _held(error: HeldError) -> PageError:
    holds = sorted({each for ids in error.held.values() for each in ids})
    text = f"It is under legal hold {', '.join(map(str, holds))}. The audit log has the refusal."
    return PageError(409, "Nothing was erased", text)


def _selection(session_id: str | None, chat_id: str | None) -> Selection:
    return Selection(() if session_id is None else (session_id,), () if chat_id is None else (chat_id,))


def _command(session_id: str | None, chat_id: str | None) -> str:
    option = "--chat" if session_id is None else "--session"
    return f"archiver erase {option} {session_id or chat_id} --reason TEXT"
