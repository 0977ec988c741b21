"""Read the fields of the forms of actions, by the rules of the command line."""

from collections.abc import Mapping
from datetime import datetime

from archiver import events
from archiver.console.failures import PageError
from archiver.console.filters import FilterError, parse_moment
from archiver.console.logins import Login
from archiver.ledger import audit_log


def actor_of(login: Login) -> str:
    """Return the actor of an audit entry."""
    return f"{login.user}@console"


def reason_of(form: Mapping[str, str]) -> str:
    """Return the reason for the audit log. Raises `PageError` without one."""
    reason = form.get("reason", "").strip()
    if not reason:
        raise _refused("A reason is required for the audit log.")
    if len(reason) > audit_log.MAX_TEXT:
        raise _refused(f"A reason has at most {audit_log.MAX_TEXT:,} characters.")
    return reason


def id_of(fields: Mapping[str, str], name: str) -> str | None:
    """Return an id; None if the field is empty. Raises `PageError` for an id that no delivery can have."""
    try:
        return events.identifier(fields.get(name, ""))
    except events.UnreadableError as error:
        raise _refused(f"The id is invalid. {events.REASONS[str(error)]}") from None


def period_of(form: Mapping[str, str]) -> tuple[datetime | None, datetime | None]:
    """Return the times `since` and `until`, each None if its field is empty. Raises `PageError`."""
    since, until = (_moment(form.get(name, "").strip()) for name in ("since", "until"))
    if since is not None and until is not None and since >= until:
        raise _refused("The time in Since is not before that in Until.")
    return since, until


def _moment(text: str) -> datetime | None:
    try:
        return parse_moment(text) if text else None
    except FilterError as error:
        raise _refused(str(error)) from None


def _refused(text: str) -> PageError:
    return PageError(400, "The form cannot be used", f"{text} Go back, and change it.")
