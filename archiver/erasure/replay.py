"""The list of what was erased, applied to a backup that was restored: what it brought back goes again."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import get_args

import msgspec
from sqlalchemy import Connection, Engine, text

from archiver import events
from archiver.database import transaction
from archiver.erasure import ordering
from archiver.erasure.holds import covering
from archiver.erasure.ordering import Act, HeldError, Ordered, Rule, order
from archiver.erasure.quarantined import select_found
from archiver.erasure.targets import Target, as_json

FIRST = datetime(2000, 1, 1, tzinfo=UTC)
AHEAD = timedelta(days=1)  # clocks differ


class Line(msgspec.Struct, frozen=True):
    """One line of `archiver erase --list`."""

    session_id: str
    chat_id: str
    erased_at: datetime
    rule: str

    @property
    def target(self) -> Target:
        return Target(self.session_id, self.chat_id)


class ReplayError(Exception):
    """The list cannot be read; the text says where and why."""


def parse(lines: Iterable[bytes]) -> list[Line]:
    """The lines of a list. Raises `ReplayError`."""
    return [_parse(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(number: int, line: bytes) -> Line:
    try:
        told = msgspec.json.decode(line, type=Line)
        for told_id in (told.session_id, told.chat_id):
            events.identifier(told_id)
        is_dated = told.erased_at.tzinfo is not None
        erased_at = told.erased_at.astimezone(UTC)
    except (msgspec.DecodeError, UnicodeDecodeError, events.UnreadableError, OverflowError):
        raise ReplayError(f"Line {number} is none of archiver erase --list.") from None
    if told.rule not in get_args(Rule) or not is_dated or not (told.session_id or told.chat_id):
        raise ReplayError(f"Line {number} is none of archiver erase --list.")
    # Each erasure of a session is later than the one before, so a time out of reach would leave no room for more.
    if not FIRST <= erased_at <= datetime.now(UTC) + AHEAD:
        raise ReplayError(f"Line {number} tells of an erasure at {erased_at:%Y-%m-%d}, which cannot be.")
    return msgspec.structs.replace(told, erased_at=erased_at)


_SELECT_KNOWN = text(
    """
    SELECT t.session_id, t.chat_id FROM json_to_recordset(:targets) AS t (session_id text, chat_id text)
     WHERE EXISTS (SELECT FROM archiver.erasures e WHERE e.session_id = t.session_id AND e.chat_id = t.chat_id)
    """
)


def select_new(connection: Connection, lines: Sequence[Line]) -> list[Line]:
    """Those that this database does not know as erased."""
    told = {"targets": as_json(line.target for line in lines)}
    known = {Target(*row) for row in connection.execute(_SELECT_KNOWN, told)}
    return [line for line in lines if line.target not in known]


def check(engine: Engine, lines: Sequence[Line], act: Act) -> None:
    """Raise `HeldError`, which is recorded, if any of what is new of these is held."""
    for rule, told in _new_by_rule(engine, lines).items():
        ordering.check(engine, sorted(told), rule, act)


def replay(engine: Engine, lines: Sequence[Line], act: Act, *, skip_held: bool) -> list[Ordered]:
    """Order again what this database does not know as erased, under the rule and the time of the list.

    Raises `HeldError`.
    """
    if not skip_held:
        check(engine, lines, act)
    done: list[Ordered] = []
    for rule, told in _new_by_rule(engine, lines).items():
        with transaction(engine, statement_seconds=600) as connection:
            free = sorted(told.keys() - covering(connection, sorted(told)).keys())
            found = select_found(connection, free)
        try:
            done.append(order(engine, list(told), rule, act, skip_held=skip_held, erased_at=told, found=found))
        except HeldError as error:
            error.ordered += sum(len(each.targets) for each in done)
            raise
    return done


def _new_by_rule(engine: Engine, lines: Sequence[Line]) -> dict[Rule, dict[Target, datetime]]:
    with transaction(engine) as connection:
        new = select_new(connection, lines)
    rules: tuple[Rule, ...] = get_args(Rule)
    by_rule = {rule: {line.target: line.erased_at for line in new if line.rule == rule} for rule in rules}
    return {rule: told for rule, told in by_rule.items() if told}
