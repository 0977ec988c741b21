"""Retry quarantined deliveries."""

from collections import Counter

from sqlalchemy import Engine
from starlette.requests import Request
from starlette.responses import Response

from archiver import database
from archiver.archive import Timing
from archiver.console import outcomes
from archiver.console.actions.fields import actor_of
from archiver.console.actions.running import Runner
from archiver.console.addresses import number_of
from archiver.console.failures import PageError
from archiver.console.logins import Login
from archiver.inbound import Outcome, retry_quarantined
from archiver.ledger import audit_log


class Retries:
    """The action that retries a quarantined delivery through the write path."""

    def __init__(self, runner: Runner, timing: Timing) -> None:
        self._runner, self._timing = runner, timing

    async def retry(self, request: Request, login: Login) -> Response:
        """Retry a quarantined delivery."""
        quarantine_id, actor = number_of(request, "quarantine_id"), actor_of(login)

        def retry(engine: Engine) -> Outcome | None:
            outcome = retry_quarantined(engine, quarantine_id, self._timing)
            if outcome is not None:
                detail = {"quarantine": quarantine_id, "became": Counter([outcome.status])}
                with database.transaction(engine) as opened:
                    audit_log.insert_entry(opened, "quarantine.retry", actor, None, detail)
            return outcome

        outcome = await self._runner.run(retry, f"archiver quarantine retry {quarantine_id}")
        if outcome is None:
            raise PageError(404, "It is not in the quarantine", "It was retried or deleted in the meantime.")
        if outcome.status == "quarantined":
            return outcomes.leads_to(f"quarantine/{quarantine_id}", "still-quarantined", login)
        return outcomes.leads_to(
            "quarantine", "refused-as-erased" if outcome.reason == "erased" else "archived", login
        )
