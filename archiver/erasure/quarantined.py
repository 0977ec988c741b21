"""What the quarantine holds about what is to be erased, and about nothing that a hold in force covers.

Its bytes could not be read as a delivery: whatever they mention, decoded, they may be about.
"""

from collections.abc import Collection, Iterator, Sequence

import msgspec
from sqlalchemy import Connection, text

from archiver import quarantine, telemetry
from archiver.erasure import mentions
from archiver.erasure.decoding import Decoded, decode
from archiver.erasure.holds import covering
from archiver.erasure.targets import Target, marks
from archiver.legal_holds import select_in_force

Variables = Collection[tuple[str, str]]  # names with values


class Found(msgspec.Struct, frozen=True):
    """Ids of rows: those that name what is to be erased, and those that only tell such a variable.

    `unsearchable`: of the others those of which not every byte could be decoded. `searched`: all that were decoded.
    """

    naming: Sequence[int] = ()
    telling: Sequence[int] = ()
    unsearchable: Sequence[int] = ()
    searched: Collection[int] = ()

    def with_later(self, found: "Found") -> "Found":
        """Return the rows of both, where the other search left out what this one had searched."""
        return Found(
            [*self.naming, *found.naming],
            [*self.telling, *found.telling],
            [*self.unsearchable, *found.unsearchable],
            found.searched,
        )


MOST_SEARCHED = 1_000_000  # rows that one search remembers, so that the next of the same run decodes none twice


def select_found(
    connection: Connection,
    targets: Sequence[Target],
    variables: Variables = (),
    searched: Collection[int] = (),
) -> Found:
    """What is about these, or tells such a variable; held or not.

    Reads the whole quarantine, and decodes each body but those that were `searched` for the same before.
    """
    if not targets and not variables:
        return Found()
    is_about = mentions.of_any(marks(connection, targets) if targets else ())
    # A history answer tells all of its session, and says whose it is beside its bytes.
    sessions = {each.session_id for each in targets} - {""}
    tells_any = [mentions.of_variable(name, value) for name, value in variables]
    naming, telling, unsearchable = list[int](), list[int](), list[int]()
    looked = set(searched)
    for row in quarantine.select_every_body(connection):
        if row["id"] in looked:
            continue
        body = decode(bytes(row["body"]))
        telemetry.quarantine_searched.inc()
        if len(looked) < MOST_SEARCHED:
            looked.add(row["id"])
        if row["session_id"] in sessions or is_about(body):
            naming.append(row["id"])
        elif any(tells(body) for tells in tells_any):
            telling.append(row["id"])
        elif not body.is_whole:
            unsearchable.append(row["id"])
    return Found(naming, telling, unsearchable, looked)


def select_unsearchable(connection: Connection) -> Iterator[int]:
    """The rows of which not every byte can be decoded, so that no erasure and no hold can search them."""
    for row in quarantine.select_every_body(connection):
        if not decode(bytes(row["body"])).is_whole:
            yield row["id"]


def select_free(connection: Connection, found: Found) -> list[int]:
    """Those that may go.

    As long as anything is held: none that only tells a variable and none that cannot be searched, for it may be about
    what is held. Exact under the lock of `ledger.lock_placement`, beside which nobody places a hold.
    """
    holds = select_in_force(connection)
    if not holds:
        return sorted({*found.naming, *found.telling})
    if any(hold.is_any_value for hold in holds):  # whose value is not known
        return []
    sessions = [Target(hold.session_id) for hold in holds if hold.session_id is not None]
    values = {hold.value for hold in holds if hold.value}
    is_held = mentions.of_any(marks(connection, sessions) | values)
    free: list[int] = []
    for row in quarantine.select_bodies(connection, found.naming):
        body = decode(bytes(row["body"]))
        if (
            body.is_whole
            and not is_held(body)
            and not covering(connection, _named(connection, body, row["session_id"]))
        ):
            free.append(row["id"])
    return free


# What the archive knows by any of these ids.
_SELECT_NAMED = text(
    """
    WITH told AS MATERIALIZED (SELECT json_array_elements_text(:ids) AS id)
    SELECT s.session_id, '' AS chat_id FROM archiver.sessions s
     WHERE s.session_id <> '' AND s.session_id IN (SELECT id FROM told)
    UNION
    SELECT c.session_id, CASE WHEN c.session_id = '' THEN c.chat_id ELSE '' END FROM archiver.chats c
     WHERE c.chat_id IN (SELECT id FROM told)
    """
)


def _named(connection: Connection, body: Decoded, session_id: str | None) -> list[Target]:
    ids = mentions.ids(body) | ({session_id} if session_id else set())
    named = connection.execute(_SELECT_NAMED, {"ids": msgspec.json.encode(sorted(ids)).decode()})
    return [Target(row.session_id, row.chat_id) for row in named]


def delete_found(connection: Connection, found: Found) -> int:
    """Remove those that may go; answers how many there were."""
    return quarantine.delete_rows(connection, select_free(connection, found))


def delete_mentioning(connection: Connection, targets: Sequence[Target]) -> int:
    """Remove what is about these, as far as its bytes tell, and may go; answers how many there were."""
    return delete_found(connection, select_found(connection, targets))
