"""Pause, resume and test subscriptions, and retry deliveries."""

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine
from starlette.requests import Request
from starlette.responses import Response

from archiver import database
from archiver.console import outcomes
from archiver.console.actions.fields import actor_of
from archiver.console.actions.running import Runner
from archiver.console.addresses import number_of
from archiver.console.failures import PageError, missing
from archiver.console.gate import read_form
from archiver.console.logins import Login
from archiver.ledger import audit_log
from archiver.outbound.followups import review, subscriptions
from archiver.outbound.followups.deliveries import parse_message_id
from archiver.outbound.followups.sending import Attempt
from archiver.outbound.followups.testing import send_test

MAX_RETRIED = 10_000  # dead deliveries of one action


class Followups:
    """The actions on subscriptions and deliveries. `allow_private`: whether tests may go to private addresses."""

    def __init__(self, runner: Runner, *, allow_private: bool) -> None:
        self._runner, self._allow_private = runner, allow_private

    async def pause(self, request: Request, login: Login) -> Response:
        """Pause a subscription."""
        reason = (await read_form(request)).get("reason", "").strip()[: audit_log.MAX_TEXT] or subscriptions.BY_HAND

        def pause(connection: Connection, subscription_id: int) -> dict[str, Any]:
            subscriptions.pause(connection, subscription_id, reason)
            return {}

        await self._change(request, login, "pause", pause, reason)
        return outcomes.leads_to(_path(request), "paused", login)

    async def resume(self, request: Request, login: Login) -> Response:
        """Resume a subscription."""

        def resume(connection: Connection, subscription_id: int) -> dict[str, Any]:
            return {"gone": subscriptions.resume(connection, subscription_id)}

        detail = await self._change(request, login, "resume", resume)
        return outcomes.leads_to(_path(request), "resumed-with-loss" if detail["gone"] else "resumed", login)

    async def retry_dead(self, request: Request, login: Login) -> Response:
        """Retry the dead deliveries of a subscription."""

        def retry(connection: Connection, subscription_id: int) -> dict[str, Any]:
            subscriptions.select_one(connection, subscription_id)
            return {"retried": review.retry_dead(connection, subscription_id, MAX_RETRIED)}

        await self._change(request, login, "retry", retry)
        return outcomes.leads_to(_path(request), "retried", login)

    async def retry(self, request: Request, login: Login) -> Response:
        """Retry one delivery."""
        message_id, actor = request.path_params["message_id"], actor_of(login)
        parsed = parse_message_id(message_id)
        if parsed is None:
            raise missing()

        def retry(engine: Engine) -> review.Retried:
            with database.transaction(engine) as opened:
                result = review.retry(opened, *parsed)
                if result == "retried":
                    detail = {"deliveries": [message_id], "retried": 1}
                    audit_log.insert_entry(opened, "followups.retry", actor, None, detail)
                return result

        result = await self._runner.run(retry, f"archiver followups retry {message_id}")
        if result != "retried":
            text = "It is already delivered." if result == "delivered" else "There is no such delivery."
            raise PageError(409, "Nothing was changed", text)
        return outcomes.leads_to(f"deliveries/{message_id}", "retried", login)

    async def test(self, request: Request, login: Login) -> Response:
        """Send a test message; if it is accepted, close the circuit of the receiver."""
        subscription_id, actor = number_of(request, "subscription_id"), actor_of(login)

        def test(engine: Engine) -> Attempt:
            with database.transaction(engine) as opened:
                row = subscriptions.select_one(opened, subscription_id)
            subscription = subscriptions.subscription_from_row(row)
            attempt = asyncio.run(send_test(subscription, allow_private=self._allow_private))
            with database.transaction(engine) as opened:
                if attempt.fault is None:
                    subscriptions.reset_circuit(opened, subscription_id)
                detail = {"subscription": subscription_id, "test": attempt.fault or "accepted"}
                audit_log.insert_entry(opened, "followups.test", actor, None, detail)
            return attempt

        attempt = await self._runner.run(test, f"archiver followups test {subscription_id}")
        if attempt.fault is None:
            return outcomes.leads_to(_path(request), "test-accepted", login)
        status = f"It returned {attempt.status}" if attempt.status else "It did not respond"
        text = f"{status} ({attempt.fault}) after {attempt.seconds:.2f} s."
        raise PageError(409, "The receiver did not accept the test", text)

    async def _change(
        self,
        request: Request,
        login: Login,
        verb: str,
        change: Callable[[Connection, int], dict[str, Any]],
        reason: str | None = None,
    ) -> dict[str, Any]:
        subscription_id, actor = number_of(request, "subscription_id"), actor_of(login)

        def run(engine: Engine) -> dict[str, Any]:
            with database.transaction(engine) as opened:
                detail = change(opened, subscription_id)
                entry = {"subscription": subscription_id, **detail}
                audit_log.insert_entry(opened, f"followups.{verb}", actor, reason, entry)
                return detail

        return await self._runner.run(run, f"archiver followups {verb} {subscription_id}")


def _path(request: Request) -> str:
    return f"followups/{number_of(request, 'subscription_id')}"
