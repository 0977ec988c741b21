"""Find the quarantine rows about the targets of an erasure, except those that a hold covers.

A quarantined body may not be parseable as a delivery, so it counts as being about every id that its decoded text
mentions.
"""

from collections.abc import Collection, Iterator, Sequence

import msgspec
from sqlalchemy import Connection, text

from archiver import telemetry
from archiver.compliance.erasure import mentions
from archiver.compliance.erasure.decoding import Decoded, decode
from archiver.compliance.erasure.holds import covering
from archiver.compliance.erasure.targets import Target, marks
from archiver.compliance.legal_holds import select_in_force
from archiver.database import as_json
from archiver.ledger import quarantine

Variables = Collection[tuple[str, str]]  # names with values


class QuarantineMatches(msgspec.Struct, frozen=True):
    """The ids of the matching rows: by id of a target, and by variable value only.

    `unsearchable`: other rows that could not be decoded completely. `searched`: at most `MAX_SEARCHED` decoded rows.
    """

    by_id: Sequence[int] = ()
    by_variable: Sequence[int] = ()
    unsearchable: Sequence[int] = ()
    searched: Collection[int] = ()

    def with_later(self, matches: "QuarantineMatches") -> "QuarantineMatches":
        """Return the rows of both searches; the later one skipped the rows that this one had searched."""
        return QuarantineMatches(
            [*self.by_id, *matches.by_id],
            [*self.by_variable, *matches.by_variable],
            [*self.unsearchable, *matches.unsearchable],
            matches.searched,
        )


MAX_SEARCHED = 1_000_000  # rows remembered by a search, so that the next search of the run does not decode them again


def select_matches(
    connection: Connection,
    targets: Sequence[Target],
    variables: Variables = (),
    searched: Collection[int] = (),
) -> QuarantineMatches:
    """Return rows about these targets or with one of these variable values, held or not.

    Reads the whole quarantine and decodes each body, except those already `searched` for the same targets.
    """
    if not targets and not variables:
        return QuarantineMatches()
    is_about = mentions.of_any(marks(connection, targets) if targets else ())
    # A history response covers its whole session, whose id is stored with the body.
    sessions = {each.session_id for each in targets} - {""}
    has_variable_value = [mentions.of_variable(name, value) for name, value in variables]
    by_id, by_variable, unsearchable = list[int](), list[int](), list[int]()
    searched_ids = set(searched)
    for row in quarantine.select_every_body(connection):
        if row["id"] in searched_ids:
            continue
        body = decode(bytes(row["body"]))
        telemetry.quarantine_searched.inc()
        if len(searched_ids) < MAX_SEARCHED:
            searched_ids.add(row["id"])
        if row["session_id"] in sessions or is_about(body):
            by_id.append(row["id"])
        elif any(checks(body) for checks in has_variable_value):
            by_variable.append(row["id"])
        elif not body.is_whole:
            unsearchable.append(row["id"])
    return QuarantineMatches(by_id, by_variable, unsearchable, searched_ids)


def select_unsearchable(connection: Connection) -> Iterator[int]:
    """Yield the ids of rows that cannot be decoded completely, so neither erasures nor holds can search them."""
    for row in quarantine.select_every_body(connection):
        if not decode(bytes(row["body"])).is_whole:
            yield row["id"]


def select_deletable(connection: Connection, matches: QuarantineMatches) -> list[int]:
    """Return the rows that no hold covers.

    While a hold is in force, rows that match only a variable or cannot be searched are excluded: they may concern
    held content. Exact under `Lock.RECORDING`, which blocks the placing of holds.
    """
    holds = select_in_force(connection)
    if not holds:
        return sorted({*matches.by_id, *matches.by_variable})
    if any(hold.is_any_value for hold in holds):  # the held value is unknown
        return []
    sessions = [Target(hold.session_id) for hold in holds if hold.session_id is not None]
    values = {hold.value for hold in holds if hold.value}
    is_held = mentions.of_any(marks(connection, sessions) | values)
    deletable: list[int] = []
    for row in quarantine.select_bodies(connection, matches.by_id):
        body = decode(bytes(row["body"]))
        if (
            body.is_whole
            and not is_held(body)
            and not covering(connection, _names_known_session(connection, body, row["session_id"]))
        ):
            deletable.append(row["id"])
    return deletable


# Sessions and turns of the archive with any of these ids.
_SELECT_NAMED_SESSIONS = text(
    """
    WITH requested AS MATERIALIZED (SELECT json_array_elements_text(:ids) AS id)
    SELECT s.session_id, '' AS chat_id FROM archiver.sessions s
     WHERE s.session_id <> '' AND s.session_id IN (SELECT id FROM requested)
    UNION
    SELECT c.session_id, CASE WHEN c.session_id = '' THEN c.chat_id ELSE '' END FROM archiver.chats c
     WHERE c.chat_id IN (SELECT id FROM requested)
    """
)


def _names_known_session(connection: Connection, body: Decoded, session_id: str | None) -> list[Target]:
    ids = mentions.ids(body) | ({session_id} if session_id else set())
    naming_sessions = connection.execute(_SELECT_NAMED_SESSIONS, {"ids": as_json(sorted(ids))})
    return [Target(row.session_id, row.chat_id) for row in naming_sessions]


def delete_matches(connection: Connection, matches: QuarantineMatches) -> int:
    """Delete the rows that no hold covers; return their number."""
    return quarantine.delete_rows(connection, select_deletable(connection, matches))
