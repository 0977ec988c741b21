"""A list of erasures, to be applied to a restored backup."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
from sqlalchemy import Connection, text

from archiver import events
from archiver.compliance.erasure.ordering import Rule
from archiver.compliance.erasure.targets import Target
from archiver.database import as_json
from archiver.errors import ArchiverError

EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
AHEAD = timedelta(days=1)  # tolerance for clock differences


class ListedErasure(msgspec.Struct, frozen=True):
    """One line of the output of `archiver erase --list`."""

    session_id: str
    chat_id: str
    erased_at: datetime
    rule: Rule

    @property
    def target(self) -> Target:
        return Target(self.session_id, self.chat_id)


class ReplayError(ArchiverError):
    """The list cannot be read; the message names the line and the reason."""


def parse(lines: Iterable[bytes]) -> list[ListedErasure]:
    """Parse the lines of a list. Raises `ReplayError`."""
    return [_parse(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(number: int, line: bytes) -> ListedErasure:
    try:
        parsed = msgspec.json.decode(line, type=ListedErasure)
        for id_in_list in (parsed.session_id, parsed.chat_id):
            events.identifier(id_in_list)
        is_dated = parsed.erased_at.tzinfo is not None
        erased_at = parsed.erased_at.astimezone(UTC)
    except (msgspec.DecodeError, UnicodeDecodeError, events.UnreadableError, OverflowError):
        raise ReplayError(f'line {number} is not output of "archiver erase --list"') from None
    if not is_dated or not (parsed.session_id or parsed.chat_id):
        raise ReplayError(f'line {number} is not output of "archiver erase --list"')
    # Each erasure of a session is later than the previous one, so a time far ahead would block later erasures.
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
    """Return the listed erasures that this database does not contain."""
    values = {"targets": as_json([line.target for line in lines])}
    known = {Target(*row) for row in connection.execute(_SELECT_KNOWN, values)}
    return [line for line in lines if line.target not in known]
