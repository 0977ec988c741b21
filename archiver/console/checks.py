"""The page with the findings of `archiver doctor`, computed when it is opened."""

from sqlalchemy import Engine
from starlette.requests import Request
from starlette.responses import Response

from archiver.console.actions import Runner
from archiver.console.logins import Login
from archiver.console.openid.checks import examine_provider
from archiver.console.page_renderer import PageRenderer
from archiver.operations import doctor
from archiver.operations.doctor import Finding
from archiver.settings import Settings

_ORDER = {"failure": 0, "warning": 1, "ok": 2}


class Checks:
    """The checks of this process: its settings, its spool, and the database to which it writes."""

    def __init__(self, configuration: Settings, runner: Runner, renderer: PageRenderer) -> None:
        self._configuration, self._runner, self._renderer = configuration, runner, renderer

    async def show(self, request: Request, login: Login) -> Response:
        """Show the findings, those that require action first. Checks and actions wait for each other."""
        findings = sorted(
            await self._runner.run(self._examine, "archiver doctor"), key=lambda each: _ORDER[each.verdict]
        )
        return await self._renderer.render(request, "doctor.html", login, findings=findings)

    def _examine(self, engine: Engine) -> list[Finding]:
        return [
            *doctor.examine_settings(self._configuration),
            *doctor.examine_spool(self._configuration),
            doctor.examine_platform(self._configuration),
            *examine_provider(self._configuration),
            *doctor.examine_database(self._configuration, engine),
        ]
