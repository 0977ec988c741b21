"""Place and release legal holds."""

from collections.abc import Mapping

from sqlalchemy import Engine
from starlette.requests import Request
from starlette.responses import Response

from archiver import database
from archiver.compliance import erasure
from archiver.compliance.erasure import Criteria
from archiver.console import outcomes
from archiver.console.actions.fields import actor_of, id_of, period_of, reason_of
from archiver.console.actions.running import Runner
from archiver.console.addresses import number_of
from archiver.console.gate import read_form
from archiver.console.logins import Login
from archiver.console.page_renderer import PageRenderer


class Holds:
    """The pages that place and release a hold."""

    def __init__(self, runner: Runner, renderer: PageRenderer) -> None:
        self._runner, self._renderer = runner, renderer

    async def place(self, request: Request, login: Login) -> Response:
        """Show the form of a new hold; for a submitted form, place the hold."""
        if request.method != "POST":
            session_id = request.query_params.get("session_id", "")
            return await self._renderer.render(request, "place_hold.html", login, session_id=session_id)
        form = await read_form(request)
        criteria, reason, actor = _criteria(form), reason_of(form), actor_of(login)

        def place(engine: Engine) -> None:
            with database.transaction(engine) as opened:
                erasure.insert_hold(opened, criteria, actor, reason)

        await self._runner.run(place, "archiver hold add --reason TEXT …")
        return outcomes.leads_to("holds", "hold-placed", login)

    async def release(self, request: Request, login: Login) -> Response:
        """Release a hold."""
        hold_id = number_of(request, "hold_id")
        reason, actor = reason_of(await read_form(request)), actor_of(login)

        def release(engine: Engine) -> None:
            with database.transaction(engine) as opened:
                erasure.release_hold(opened, hold_id, actor, reason)

        await self._runner.run(release, f"archiver hold release {hold_id} --reason TEXT")
        return outcomes.leads_to("holds", "hold-released", login)


def _criteria(form: Mapping[str, str]) -> Criteria:
    variable = form.get("variable", "").strip() or None
    value = None if variable is None else form.get("value", "")
    return Criteria(id_of(form, "session_id"), id_of(form, "assistant_id"), variable, value, *period_of(form))
