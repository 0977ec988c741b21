"""Apply a list of erasures to a restored backup."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import get_args

import msgspec
from sqlalchemy import Connection, Engine, text

from archiver import events
from archiver.compliance.erasure import ordering
from archiver.compliance.erasure.holds import covering
from archiver.compliance.erasure.ordering import AuditEntry, HeldError, Ordered, Rule, order
from archiver.compliance.erasure.quarantine_matches import select_matches
from archiver.compliance.erasure.targets import Target, as_json
from archiver.database import transaction
from archiver.errors import ArchiverError

EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
AHEAD = timedelta(days=1)  # clocks differ


class ListedErasure(msgspec.Struct, frozen=True):
    """One line of `archiver erase --list`."""

    session_id: str
    chat_id: str
    erased_at: datetime
    rule: str

    @property
    def target(self) -> Target:
        return Target(self.session_id, self.chat_id)


class ReplayError(ArchiverError):
    """The list cannot be read; the message names line and reason."""


def parse(lines: Iterable[bytes]) -> list[ListedErasure]:
    """The lines of a list. Raises `ReplayError`."""
    return [_parse(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(number: int, line: bytes) -> ListedErasure:
    try:
        parsed = msgspec.json.decode(line, type=ListedErasure)
        for id_in_list in (parsed.session_id, parsed.chat_id):
            events.identifier(id_in_list)
        is_dated = parsed.erased_at.tzinfo is not None
        erased_at = parsed.erased_at.astimezone(UTC)
    except (msgspec.DecodeError, UnicodeDecodeError, events.UnreadableError, OverflowError):
        raise ReplayError(f"Line {number} is none of archiver erase --list.") from None
    if parsed.rule not in get_args(Rule) or not is_dated or not (parsed.session_id or parsed.chat_id):
        raise ReplayError(f"Line {number} is none of archiver erase --list.")
    # Each erasure of a session is later than the one before, so a time out of reach would leave no room for more.
    if not EARLIEST <= erased_at <= datetime.now(UTC) + AHEAD:
        raise ReplayError(f"line {number}: the erasure time {erased_at:%Y-%m-%d} is impossible")
    return msgspec.structs.replace(parsed, erased_at=erased_at)


_SELECT_KNOWN = text(
    """
    SELECT t.session_id, t.chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
     WHERE EXISTS (SELECT FROM archiver.erasures e WHERE e.session_id = t.session_id AND e.chat_id = t.chat_id)
    """
)


def select_new(connection: Connection, lines: Sequence[ListedErasure]) -> list[ListedErasure]:
    """Return the erasures that this database does not have."""
    values = {"targets": as_json(line.target for line in lines)}
    known = {Target(*row) for row in connection.execute(_SELECT_KNOWN, values)}
    return [line for line in lines if line.target not in known]


def check(engine: Engine, lines: Sequence[ListedErasure], entry: AuditEntry) -> None:
    """Raise `HeldError`, which is recorded, if any of what is new of these is held."""
    for rule, times in _new_by_rule(engine, lines).items():
        ordering.check(engine, sorted(times), rule, entry)


def replay(engine: Engine, lines: Sequence[ListedErasure], entry: AuditEntry, *, skip_held: bool) -> list[Ordered]:
    """Order again what this database does not know as erased, under the rule and the time of the list.

    Raises `HeldError`.
    """
    if not skip_held:
        check(engine, lines, entry)
    done: list[Ordered] = []
    for rule, times in _new_by_rule(engine, lines).items():
        with transaction(engine, statement_seconds=600) as connection:
            deletable = sorted(times.keys() - covering(connection, sorted(times)).keys())
            matches = select_matches(connection, deletable)
        try:
            done.append(
                order(engine, list(times), rule, entry, skip_held=skip_held, erased_at=times, matches=matches)
            )
        except HeldError as error:
            error.ordered += sum(len(each.targets) for each in done)
            raise
    return done


def _new_by_rule(engine: Engine, lines: Sequence[ListedErasure]) -> dict[Rule, dict[Target, datetime]]:
    with transaction(engine) as connection:
        new = select_new(connection, lines)
    rules: tuple[Rule, ...] = get_args(Rule)
    by_rule = {rule: {line.target: line.erased_at for line in new if line.rule == rule} for rule in rules}
    return {rule: times for rule, times in by_rule.items() if times}
